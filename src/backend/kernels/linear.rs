//! Linear layers over weights as a file stores them.

use std::ops::Range;
use std::sync::Arc;

use super::buffers::{Buffer, Buffers};
use crate::error::{Error, Result};
use crate::kernels::quant::{Activations, Compute, Inputs, WeightMatrix};
use crate::kernels::simd::InstructionSet;
use crate::kernels::vector::{self, instruction_set};
use crate::stop;

/// `y = x W^T + b`, with weights `[out_features, in_features]` that are mapped or in memory.
#[derive(Debug, Clone)]
pub struct KernelLinear {
    pub(super) matrix: Arc<WeightMatrix>,
    pub(super) compute: Compute,
    /// `[out_features]`, or empty
    bias: Vec<f32>,
}

impl KernelLinear {
    /// # Errors
    /// [`Error::Shape`] if the bias is not one for each row.
    pub(super) fn new(compute: Compute, matrix: Arc<WeightMatrix>, bias: Option<Vec<f32>>) -> Result<Self> {
        let bias = bias.unwrap_or_default();
        if !bias.is_empty() && bias.len() != matrix.rows() {
            return Err(Error::shape("a bias", matrix.rows(), bias.len()));
        }
        Ok(Self { matrix, compute, bias })
    }

    /// How what comes of the layer may be multiplied: exactly, if its weights are plain floats.
    pub(super) fn compute_after(&self) -> Compute {
        if self.matrix.dtype().is_float() { Compute::Exact } else { self.compute }
    }

    /// Numbers of an output.
    pub(super) fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// Applies the layer to several rows, on all threads.
    ///
    /// * `x`: `[seq_len, in_features]`, prepared by other layers if they had it before
    ///
    /// Returns `[seq_len, out_features]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the sizes do not fit; [`Error::Interrupted`] if a [stop] is requested while it works on several
    /// rows.
    pub(super) fn forward(&self, x: &Inputs<'_>, buffers: &Buffers) -> Result<Buffer> {
        let (rows, cols) = (self.matrix.rows(), self.matrix.cols());
        if x.cols() != cols {
            return Err(Error::shape("a linear layer's input", format!("rows of {cols}"), x.cols()));
        }
        let mut y = buffers.take(x.count() * rows);
        self.matrix.matmul(x, &mut y);
        if x.count() > 1 {
            stop::check()?; // or the product may not be whole
        }
        self.add_bias(instruction_set(), 0..rows, &mut y);
        Ok(y)
    }

    /// Products of some rows of the weights with prepared activations, biases added: `[count, rows.len()]`.
    pub(super) fn forward_rows(&self, set: InstructionSet, rows: Range<usize>, x: &Activations, out: &mut Vec<f32>) {
        out.resize(x.count() * rows.len(), 0.0);
        self.matrix.dot_rows(rows.clone(), x, out);
        self.add_bias(set, rows, out);
    }

    fn add_bias(&self, set: InstructionSet, rows: Range<usize>, y: &mut [f32]) {
        if !self.bias.is_empty() {
            y.chunks_exact_mut(rows.len().max(1)).for_each(|y| vector::add_assign(set, y, &self.bias[rows.clone()]));
        }
    }
}
