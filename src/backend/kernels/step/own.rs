//! Buffers of one thread of a step.

use std::ops::Range;

use super::KernelLinear;
use crate::kernels::quant::{Activations, WeightFormat};
use crate::kernels::simd::InstructionSet;

/// Buffers of one thread.
#[derive(Debug, Default)]
pub(super) struct Own {
    /// Rows that products are taken with, `[batch, cols]`.
    pub rows: Vec<f32>,
    has_rows: bool,
    prepared: Vec<Prepared>,
    pub products: Vec<f32>,
    pub more_products: Vec<f32>,
    pub merged: Vec<(f32, f32)>,
}

/// A thread's rows, prepared for matrices of one format.
#[derive(Debug)]
struct Prepared {
    dtype: WeightFormat,
    valid: bool,
    activations: Activations,
}

impl Own {
    /// A phase with other rows than before begins: what was prepared is of no use any more.
    pub fn start_rows(&mut self) {
        self.has_rows = false;
        for prepared in &mut self.prepared {
            prepared.valid = false;
        }
    }

    /// Makes this phase's rows, at the first piece.
    pub fn with_rows(&mut self, make: impl FnOnce(&mut Self)) {
        if !self.has_rows {
            make(self);
            self.has_rows = true;
        }
    }

    /// Products of some rows of a matrix with this thread's rows, `[batch, cols]`, to `products`.
    pub fn apply(&mut self, set: InstructionSet, linear: &KernelLinear, rows: Range<usize>) {
        let matrix = &linear.matrix;
        let known = self.prepared.iter().position(|prepared| prepared.dtype == matrix.dtype());
        let index = known.unwrap_or_else(|| {
            let activations = Activations::default();
            self.prepared.push(Prepared { dtype: matrix.dtype(), valid: false, activations });
            self.prepared.len() - 1
        });
        let prepared = &mut self.prepared[index];
        if !prepared.valid {
            prepared.activations.prepare(set, linear.compute, matrix.dtype(), &self.rows, matrix.cols());
            prepared.valid = true;
        }
        linear.forward_rows(set, rows, &prepared.activations, &mut self.products);
    }
}
