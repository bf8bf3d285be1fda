//! Rows of activations that matrices are multiplied with, and what is prepared of them.

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;

use rayon::prelude::*;

use super::Compute;
use super::floats::PackedRows;
use super::many::{ManyFormat, RoundedRows};
use super::source::Source;
use crate::kernels::simd::InstructionSet;
use crate::kernels::vector::{self, instruction_set};

/// Numbers that one thread takes at a time in elementwise work.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Rows of activations, `[count, cols]`, that several matrices are multiplied with: what is prepared for one is there for
/// the next.
pub struct Inputs<'a> {
    compute: Compute,
    count: usize,
    cols: usize,
    /// They, once they are there.
    numbers: OnceCell<&'a [f32]>,
    /// What they are made of until then.
    gated: RefCell<Option<Gated<'a>>>,
    rounded: RefCell<Vec<Rc<RoundedRows>>>,
    packed: OnceCell<PackedRows>,
}

/// Activations that are the products of some numbers and their gates.
struct Gated<'a> {
    gate: &'a [f32],
    up: &'a mut [f32],
}

impl std::fmt::Debug for Inputs<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Inputs({:?} {} x {})", self.compute, self.count, self.cols)
    }
}

impl<'a> Inputs<'a> {
    /// Rows that are there.
    ///
    /// # Panics
    /// If they are not whole rows.
    #[must_use]
    pub fn new(compute: Compute, x: &'a [f32], cols: usize) -> Self {
        let inputs = Self::empty(compute, x.len(), cols);
        let _ = inputs.numbers.set(x);
        inputs
    }

    /// Rows of `up * silu(gate)`, which is what LLaMA's MLP puts out before its last layer: computed where they are rounded,
    /// so that they need not be written and read once more, or else in the place of `up`.
    ///
    /// # Panics
    /// If they are not whole rows, or not of the same size.
    #[must_use]
    pub fn gated(compute: Compute, gate: &'a [f32], up: &'a mut [f32], cols: usize) -> Self {
        assert_eq!(gate.len(), up.len(), "numbers and their gates");
        Self { gated: RefCell::new(Some(Gated { gate, up })), ..Self::empty(compute, gate.len(), cols) }
    }

    fn empty(compute: Compute, len: usize, cols: usize) -> Self {
        assert!(cols > 0 && len.is_multiple_of(cols), "{len} activations in rows of {cols}");
        Self {
            compute,
            count: len / cols,
            cols,
            numbers: OnceCell::new(),
            gated: RefCell::default(),
            rounded: RefCell::default(),
            packed: OnceCell::new(),
        }
    }

    /// How they may be multiplied.
    pub(super) fn compute(&self) -> Compute {
        self.compute
    }

    /// Rows of activations.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Numbers in a row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// They themselves, computed over threads if they are not there.
    pub(super) fn numbers(&self) -> &'a [f32] {
        self.numbers.get_or_init(|| {
            let Some(Gated { gate, up }) = self.gated.take() else { return &[] };
            let set = instruction_set();
            let chunks = up.par_chunks_mut(ELEMENTS_PER_TASK).zip(gate.par_chunks(ELEMENTS_PER_TASK));
            chunks.for_each(|(up, gate)| vector::silu_mul(set, gate, up));
            up
        })
    }

    /// They, rounded for matrices of a format.
    pub(super) fn rounded(&self, format: ManyFormat) -> Rc<RoundedRows> {
        let mut rounded = self.rounded.borrow_mut();
        if let Some(rounded) = rounded.iter().find(|rounded| format.takes(rounded)) {
            return Rc::clone(rounded);
        }
        let new = Rc::new(match &*self.gated.borrow() {
            Some(Gated { gate, up }) => format.round(Source::Gated { gate, up }, self.cols),
            None => format.round(Source::Rows(self.numbers()), self.cols),
        });
        rounded.push(Rc::clone(&new));
        new
    }

    /// They, for products in f32.
    pub(super) fn packed(&self, set: InstructionSet) -> &PackedRows {
        self.packed.get_or_init(|| PackedRows::new(set, self.numbers(), self.cols))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::quant::WeightFormat;
    use crate::kernels::quant::WeightMatrix;
    use crate::kernels::quant::samples::random_blocks;
    use std::sync::Arc;

    /// Whatever is asked for first, results are those of activations that were there.
    #[test]
    fn what_is_gated_when_it_is_rounded_is_what_is_gated_before() {
        let (rows, cols) = (40, 256);
        let number =
            |i: usize| [-1.3, 0.2, 2.9, -0.03, 0.7][i * 7 % 5] + 1e-3 * f32::from(u8::try_from(i % 251).unwrap());
        for count in [1, 3, 40] {
            let gate: Vec<f32> = (0..count * cols).map(number).collect();
            let up: Vec<f32> = (5..5 + count * cols).map(|i| number(3 * i)).collect();
            let mut whole = up.clone();
            vector::silu_mul(instruction_set(), &gate, &mut whole);
            for compute in [Compute::Fast, Compute::Exact] {
                let product = |dtype: WeightFormat, x: &Inputs<'_>| {
                    let data = random_blocks(dtype, rows * cols / dtype.block_size());
                    let range = 0..data.len();
                    let matrix = WeightMatrix::new(Arc::new(data), range, dtype, rows, cols).unwrap();
                    let mut out = vec![f32::NAN; count * rows];
                    matrix.matmul(x, &mut out);
                    out
                };
                // The second needs the numbers themselves, the third rounds others than the first.
                let formats = [WeightFormat::Q4K, WeightFormat::F16, WeightFormat::Q8_0, WeightFormat::Q6K];
                let there = Inputs::new(compute, &whole, cols);
                let mut up = up.clone();
                let gated = Inputs::gated(compute, &gate, &mut up, cols);
                assert_eq!((gated.count(), gated.cols()), (count, cols));
                for dtype in formats {
                    assert_eq!(product(dtype, &gated), product(dtype, &there), "{dtype} {count} {compute:?}");
                }
            }
        }
    }
}
