//! Products of activations with runs of 32 numbers that share a scale, widened to f32 in registers.
//!
//! Not for: products of whole numbers (see [`super::digits`]).

use super::Rows;
use crate::kernels::blocks::{BLOCK, BlockFormat};
use crate::kernels::simd::{Lanes, fetch, multiversion};

/// How far ahead weights are fetched, in bytes: a row or two.
const AHEAD: usize = 2048;

/// Rows of activations with their blocks' sums, and where products go.
pub(super) struct BlockDot<'a> {
    /// Of weights.
    pub rows: Rows<'a>,
    /// `[count, cols]`
    pub x: &'a [f32],
    /// `[count, cols / 32]`: what a block's stored offset, or its scale if it has none, is multiplied by.
    pub sums: &'a [f32],
    pub cols: usize,
    /// `[count, rows]`
    pub out: &'a mut [f32],
}

multiversion! {
    /// Products of rows of activations with rows of blocks.
    pub(super) fn block_dot_rows<B: BlockFormat>(work: BlockDot<'_>) = block_dot_rows_body;
}

#[inline(always)]
fn block_dot_rows_body<L: Lanes, B: BlockFormat>(work: BlockDot<'_>) {
    let BlockDot { rows, x, sums, cols, out } = work;
    let (count, num_blocks) = (x.len() / cols, cols / BLOCK);
    for first in (0..count).step_by(4) {
        let width = (count - first).min(4);
        let part = BlockDot {
            rows,
            x: &x[first * cols..(first + width) * cols],
            sums: &sums[first * num_blocks..(first + width) * num_blocks],
            cols,
            out: &mut out[first * rows.count..(first + width) * rows.count],
        };
        match width {
            1 => some_columns::<L, 1, B>(part),
            2 => some_columns::<L, 2, B>(part),
            3 => some_columns::<L, 3, B>(part),
            _ => some_columns::<L, 4, B>(part),
        }
    }
}

/// Where a block (or run) of weights is, and the activations of `N` rows, each of `num_blocks` blocks.
#[derive(Clone, Copy)]
struct Place<'a> {
    row: &'a [u8],
    block: usize,
    num_blocks: usize,
    x: &'a [[f32; BLOCK]],
    x_sums: &'a [f32],
}

/// Adds a block's products. A function of its own, and no closure: those were left out of line, without the
/// instruction set of their surroundings.
///
/// # Safety
/// The block lies inside of the row and is below `num_blocks`, and there are activations for `N * num_blocks`.
#[inline(always)]
unsafe fn add_block<L: Lanes, const N: usize, B: BlockFormat>(
    place: Place<'_>,
    sums: &mut [L::Folded; N],
    offsets: &mut [L::Halves; N],
) {
    let at = place.block / B::RUNS * B::BYTES;
    fetch::<true>(place.row.as_ptr().wrapping_add(at + AHEAD));
    // SAFETY: the caller's promise, here and below.
    let block = unsafe { place.row.get_unchecked(at..at + B::BYTES) };
    let scales = B::scales::<L>(block, place.block % B::RUNS);
    let quants = B::quants::<L>(block, place.block % B::RUNS);
    for n in 0..N {
        let at = n * place.num_blocks + place.block;
        // SAFETY: as above.
        let x = unsafe { place.x.get_unchecked(at) }.as_chunks().0;
        let products = quants[1].mul_add(L::load(&x[1]), quants[0].mul(L::load(&x[0])));
        sums[n] = products.fold(scales, sums[n]);
        if B::OFFSET != Some(0.0) {
            // SAFETY: as above.
            let sum = unsafe { *place.x_sums.get_unchecked(at) };
            offsets[n] = L::add_halves(scales, sum, offsets[n]);
        }
    }
}

/// `N` rows of activations at a time, so that each block is unpacked once for all of them. The result for each does
/// not depend on `N`.
#[inline(always)]
fn some_columns<L: Lanes, const N: usize, B: BlockFormat>(work: BlockDot<'_>) {
    let BlockDot { rows, x, sums: x_sums, cols, out } = work;
    let num_blocks = cols / BLOCK;
    let x = x.as_chunks().0;
    assert!(
        x.len() == N * num_blocks
            && x_sums.len() == N * num_blocks
            && out.len() == N * rows.count
            && num_blocks.is_multiple_of(B::RUNS)
            && rows.row_bytes == num_blocks / B::RUNS * B::BYTES
    );
    for (index, row) in rows.iter().enumerate() {
        // Two sets of sums hide the latency of the multiply-add.
        let [mut even, mut odd] = [[L::no_folded(); N]; 2];
        let mut offsets = [L::halves([0; 4]); N];
        let place = |block: usize| Place { row, block, num_blocks, x, x_sums };
        for pair in 0..num_blocks / 2 {
            // SAFETY: sizes were checked above, and `block` stays below `num_blocks`; here and below.
            unsafe { add_block::<L, N, B>(place(2 * pair), &mut even, &mut offsets) };
            // SAFETY: as above.
            unsafe { add_block::<L, N, B>(place(2 * pair + 1), &mut odd, &mut offsets) };
        }
        if num_blocks % 2 == 1 {
            // SAFETY: as above.
            unsafe { add_block::<L, N, B>(place(num_blocks - 1), &mut even, &mut offsets) };
        }
        for n in 0..N {
            let offset = L::pair(offsets[n])[usize::from(B::OFFSET.is_none())];
            out[n * rows.count + index] = L::folded_sum(even[n], odd[n]) + offset;
        }
    }
}
