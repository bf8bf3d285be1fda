//! Buffers of one thread of a step.

use std::ops::Range;

use super::KernelLinear;
use crate::kernels::quant::{Activations, Compute, WeightFormat};
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
    #[cfg(test)]
    pub counts: Counts,
}

/// Numbers that a thread has worked on to make rows ready for products, apart from the products.
#[cfg(test)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Scaled by a norm; the sums of squares, an addition a number, are left out.
    pub normed: usize,
    /// Of ranges of heads, put together.
    pub merged: usize,
    /// Prepared for a format: rounded, or summed in blocks, or copied.
    pub prepared: usize,
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
        let index = self.index_of(matrix.dtype());
        let prepared = &mut self.prepared[index];
        if !prepared.valid {
            prepared.activations.prepare(set, linear.compute, matrix.dtype(), &self.rows, matrix.cols());
            prepared.valid = true;
            #[cfg(test)]
            {
                self.counts.prepared += self.rows.len();
            }
        }
        linear.forward_rows(set, rows, &prepared.activations, &mut self.products);
    }

    /// Takes over rows that threads have prepared in parts, for matrices of one format.
    ///
    /// * `count`, `parts`: as [`Activations::join`] wants them
    pub fn join<'a>(&mut self, dtype: WeightFormat, count: usize, parts: impl Iterator<Item = &'a Activations>) {
        let index = self.index_of(dtype);
        self.prepared[index].activations.join(count, parts);
        self.prepared[index].valid = true;
    }

    /// Prepares the numbers in [`rows`](Self::rows) as a part of a row, for others as well.
    pub fn prepare_part(&mut self, set: InstructionSet, compute: Compute, dtype: WeightFormat, part: &mut Activations) {
        part.prepare(set, compute, dtype, &self.rows, self.rows.len());
        #[cfg(test)]
        {
            self.counts.prepared += self.rows.len();
        }
    }

    /// Where rows are prepared for a format.
    fn index_of(&mut self, dtype: WeightFormat) -> usize {
        let known = self.prepared.iter().position(|prepared| prepared.dtype == dtype);
        known.unwrap_or_else(|| {
            self.prepared.push(Prepared { dtype, valid: false, activations: Activations::default() });
            self.prepared.len() - 1
        })
    }
}
