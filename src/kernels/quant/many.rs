//! Products of many rows of activations with rows of blocks, in whole numbers of 8 bits: what reads prompts.
//!
//! Activations are rounded to 8 bits with a scale for each group of them, once for a matrix ([`RoundedRows`]). Weights are
//! unpacked to bytes a panel at a time (`strips.rs`), small enough for a core's second cache, and used for all rows of
//! activations before the next panel. Rows of weights lie in the lanes, so that no sum runs across them; whole numbers are
//! summed up over a group, and floats touched once for each.
//!
//! Not for: few rows, for which unpacking does not pay (see [`super::dot`]); plain floats (see [`super::super::gemm`]).

mod activations;
mod column;
mod strips;
#[cfg(test)]
mod tests;
mod tiles;

use std::cell::RefCell;

use super::source::Source;
use super::{Rows, WeightFormat};
use crate::kernels::blocks::{Iq4Nl, Iq4Xs, Mxfp4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use crate::kernels::gemm::MatrixMut;
use crate::kernels::simd::{InstructionSet, LANES, ROUND};
pub(super) use activations::RoundedRows;
use strips::{Format, Q2K, Q3K, Q4K, Q5K, Q6K, Strips};

/// Vectors of weights that a tile is wide.
const VECTORS: usize = 2;

/// Rows of weights in a strip, which is as wide as a tile.
const STRIP: usize = VECTORS * LANES;

/// The bits of [`ROUND`]. Sums of products that begin with them are floats, moved by it: they need not be converted.
const START: i32 = ROUND.to_bits().cast_signed();

/// Rows of a tile on an instruction set.
fn tile_rows(set: InstructionSet) -> usize {
    if set.is_wide() { WIDE_ROWS } else { NARROW_ROWS }
}

/// Rows of a tile where 32 registers hold two vectors of sums for each, in whole numbers and in floats.
const WIDE_ROWS: usize = 7;

/// Rows of a tile where there are fewer registers.
const NARROW_ROWS: usize = 3;

/// What is done with the matrices of one format.
#[derive(Clone, Copy)]
pub(super) struct ManyFormat {
    set: InstructionSet,
    /// What activations are rounded for: formats with the same share them.
    kind: Kind,
    round: fn(InstructionSet, Source<'_>, usize) -> RoundedRows,
    multiply: fn(&RoundedRows, Rows<'_>, &mut Strips, &mut MatrixMut<'_>),
}

/// What activations are rounded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    group: usize,
    zero: u8,
    has_offsets: bool,
}

impl ManyFormat {
    fn of<F: Format>(set: InstructionSet) -> Self {
        Self { set, kind: Kind::of::<F>(), round: RoundedRows::new::<F>, multiply: tiles::multiply::<F> }
    }

    /// `None` for formats without blocks, and for those that hold no weights.
    pub fn new(set: InstructionSet, dtype: WeightFormat) -> Option<Self> {
        match dtype {
            WeightFormat::Q4_0 => Some(Self::of::<Q4_0>(set)),
            WeightFormat::Q4_1 => Some(Self::of::<Q4_1>(set)),
            WeightFormat::Q5_0 => Some(Self::of::<Q5_0>(set)),
            WeightFormat::Q5_1 => Some(Self::of::<Q5_1>(set)),
            WeightFormat::Q8_0 => Some(Self::of::<Q8_0>(set)),
            WeightFormat::Q2K => Some(Self::of::<Q2K>(set)),
            WeightFormat::Q3K => Some(Self::of::<Q3K>(set)),
            WeightFormat::Q4K => Some(Self::of::<Q4K>(set)),
            WeightFormat::Q5K => Some(Self::of::<Q5K>(set)),
            WeightFormat::Q6K => Some(Self::of::<Q6K>(set)),
            WeightFormat::Iq4Nl => Some(Self::of::<Iq4Nl>(set)),
            WeightFormat::Iq4Xs => Some(Self::of::<Iq4Xs>(set)),
            WeightFormat::Mxfp4 => Some(Self::of::<Mxfp4>(set)),
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 | WeightFormat::Q8_1 | WeightFormat::Q8K => None,
        }
    }

    /// Rounds rows of activations, over threads.
    ///
    /// * `x`: `[count, cols]`
    pub fn round(self, x: Source<'_>, cols: usize) -> RoundedRows {
        (self.round)(self.set, x, cols)
    }

    /// Whether rows of activations are rounded as this format needs them.
    pub fn takes(self, x: &RoundedRows) -> bool {
        x.kind == self.kind
    }

    /// Overwrites `out`, `[count, rows]`, with products with some rows of weights, on the calling thread.
    ///
    /// # Panics
    /// If the activations are rounded for something else.
    pub fn multiply(self, x: &RoundedRows, rows: Rows<'_>, buffers: &mut PanelBuffers, out: &mut MatrixMut<'_>) {
        (self.multiply)(x, rows, &mut buffers.0, out);
    }
}

impl Kind {
    fn of<F: Format>() -> Self {
        Self { group: F::RUN, zero: F::ZERO, has_offsets: F::HAS_OFFSETS }
    }
}

/// Where panels are unpacked to; kept for reuse.
#[derive(Default)]
pub(super) struct PanelBuffers(Strips);

impl PanelBuffers {
    /// Works with the calling thread's.
    pub fn with<T>(work: impl FnOnce(&mut Self) -> T) -> T {
        thread_local! {
            static BUFFERS: RefCell<PanelBuffers> = RefCell::default();
        }
        BUFFERS.with_borrow_mut(work)
    }
}
