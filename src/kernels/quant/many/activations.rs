//! Rows of activations in whole numbers of 8 bits, with a scale for each group of them, in the order in which tiles take them.
//!
//! Not for: their products (see [`super::tiles`]).

use rayon::prelude::*;

use super::super::source::Source;
use super::strips::Format;
use super::{Kind, START, STRIP, tile_rows};
use crate::kernels::simd::{InstructionSet, LANES, Lanes, ROUND, multiversion};

/// Bits that are left of a scale: its product with [`ROUND`] is exact.
const SCALE_BITS: u32 = !0b11;

/// Bytes of a panel: with its scales they stay in a core's second cache.
const PANEL_BYTES: usize = 384 * 1024;

/// Rows of activations, rounded to 8 bits for products with the rows of a matrix of one format.
pub(in super::super) struct RoundedRows {
    pub(super) set: InstructionSet,
    count: usize,
    pub(super) cols: usize,
    pub(super) kind: Kind,
    /// `[tiles, cols / 4, tile]`, a tile of [`tile_rows`]: four numbers with a sign each; rows after the last are 0.
    pub(super) bytes: Vec<[u8; 4]>,
    /// `[tiles, cols / group, tile]`
    pub(super) scales: Vec<Scale>,
    /// `[tiles, cols / group, tile]`: what sums of products begin with, since bytes of weights have no sign: bits of
    /// [`ROUND`], and some.
    pub(super) starts: Vec<i32>,
    /// `[tiles, cols / group, tile]`: sums of the activations as they were rounded, for weights with offsets; those before
    /// would be off by more, since offsets and quants may be large and cancel.
    pub(super) sums: Vec<f32>,
}

impl RoundedRows {
    /// * `x`: `[count, cols]`, with whole groups
    pub(super) fn new<F: Format>(set: InstructionSet, x: Source<'_>, cols: usize) -> Self {
        assert!(
            cols > 0 && cols.is_multiple_of(F::RUN) && x.len().is_multiple_of(cols),
            "{} in rows of {cols}",
            x.len()
        );
        let (count, tile, groups) = (x.len() / cols, tile_rows(set), cols / F::RUN);
        let rows = count.next_multiple_of(tile);
        let mut rounded = Self {
            set,
            count,
            cols,
            kind: Kind::of::<F>(),
            bytes: vec![[0; 4]; rows * cols / 4],
            // Zeros are mapped when they are first written to, by the thread that does.
            scales: vec![[0.0; 2]; rows * groups],
            starts: vec![0; rows * groups],
            sums: vec![0.0; if F::HAS_OFFSETS { rows * groups } else { 0 }],
        };
        let size = tile * groups;
        let tiles = (0..count).into_par_iter().step_by(tile).zip(rounded.bytes.par_chunks_mut(tile * cols / 4));
        let scales = rounded.scales.par_chunks_mut(size).zip(rounded.starts.par_chunks_mut(size));
        // Where there are no sums, each tile gets none of them.
        let mut no_sums = vec![[0.0_f32; 0]; if F::HAS_OFFSETS { 0 } else { rows / tile }];
        let sums = rounded.sums.par_chunks_mut(size).chain(no_sums.par_iter_mut().map(|none| &mut none[..]));
        tiles.zip(scales).zip(sums).for_each_init(Vec::new, |buffer, (((first, bytes), (scales, starts)), sums)| {
            starts.fill(START); // of rows that lack, too: others than the bits of floats are slow
            for row in first..(first + tile).min(count) {
                let x = x.part(set, row * cols..(row + 1) * cols, buffer);
                round_row::<F>(set, RoundRow { x, row: row - first, tile, bytes, scales, starts, sums });
            }
        });
        rounded
    }

    /// Rows of activations.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Rows of weights that are best taken at a time, for a matrix of so many.
    pub fn panel_rows(&self, rows: usize, threads: usize) -> usize {
        let most = (PANEL_BYTES / self.cols).max(STRIP);
        let strips = rows.div_ceil(STRIP);
        // As many panels for each thread, of about the same size.
        let panels = strips.div_ceil(most / STRIP).next_multiple_of(threads.max(1)).max(1);
        strips.div_ceil(panels).max(1) * STRIP
    }
}

/// A scale, and what takes [`ROUND`] off of what is multiplied with it: `-ROUND` times the scale.
pub(super) type Scale = [f32; 2];

/// A row of activations and the tile that it is rounded to, see [`RoundedRows`].
struct RoundRow<'a> {
    x: &'a [f32],
    /// Of the tile.
    row: usize,
    /// Rows of the tile.
    tile: usize,
    bytes: &'a mut [[u8; 4]],
    scales: &'a mut [Scale],
    starts: &'a mut [i32],
    /// Empty if there are none.
    sums: &'a mut [f32],
}

multiversion! {
    /// Rounds a row of a tile.
    fn round_row<F: Format>(work: RoundRow<'_>) = round_row_body;
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation)] // to 8 bits
fn round_row_body<L: Lanes, F: Format>(work: RoundRow<'_>) {
    let RoundRow { x, row, tile, bytes, scales, starts, sums } = work;
    let mut rounded = vec![[0; 4]; F::RUN / 4];
    // NaN if there is anything that no byte can say.
    let mut nothing = L::splat(0.0);
    for (group, x) in x.chunks_exact(F::RUN).enumerate() {
        let x = x.as_chunks::<LANES>().0;
        let [mut largest, mut sum] = [L::splat(0.0); 2];
        for x in x {
            let x = L::load(x);
            largest = x.abs().max(largest);
            nothing = x.mul_add(L::splat(0.0), nothing);
        }
        let largest = largest.largest();
        let inverse = L::splat(if largest > 0.0 { 127.0 / largest } else { 0.0 });
        for (x, rounded) in x.iter().zip(rounded.as_flattened_mut().as_chunks_mut::<LANES>().0) {
            let moved = L::load(x).mul_add(inverse, L::splat(ROUND));
            sum = sum.add(moved.sub(L::splat(ROUND)));
            let mut numbers = [0.0; LANES];
            moved.store(&mut numbers);
            for (rounded, number) in rounded.iter_mut().zip(numbers) {
                *rounded = number.to_bits() as u8;
            }
        }
        let at = group * tile + row;
        let factor = f32::from_bits((largest / 127.0).to_bits() & SCALE_BITS);
        scales[at] = [factor, -ROUND * factor];
        let sum = sum.sum();
        starts[at] = START - i32::from(F::ZERO) * sum as i32;
        if F::HAS_OFFSETS {
            sums[at] = sum * factor;
        }
        let fours = bytes[group * F::RUN / 4 * tile..].chunks_exact_mut(tile);
        for (fours, &rounded) in fours.zip(&rounded) {
            fours[row] = rounded;
        }
    }
    if nothing.sum().is_nan() {
        scales[row] = [f32::NAN; 2]; // every product with the row has it in it
    }
}
