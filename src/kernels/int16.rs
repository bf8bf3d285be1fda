//! Products of f32 matrices in whole numbers of 16 bits: attention's, while a prompt is read.
//!
//! Both matrices are rounded to 16 bits, with a scale for each [`RUN`] numbers of a row of the left and of a column of the
//! right one, so that sums of [`RUN`] products fit 32 bits. With VNNI that is twice the rate of f32, and about as exact as f16
//! (11 bits with a sign or more for each factor). The right matrix stays the same for many products ([`Panels`]); its
//! columns lie in the lanes, so that no sum runs across them.
//!
//! On the calling thread. Not for: weights, which are in 8 bits or less ([`super::quant`]); exact products ([`super::gemm`]).

#[cfg(test)]
mod tests;

use super::simd::{InstructionSet, LANES, Lanes, ROUND, fetch, multiversion};

/// Terms of a sum that share a scale.
pub(crate) const RUN: usize = 64;

/// Rows of a tile: 32 registers hold two vectors of sums for each, in whole numbers and in floats.
pub(crate) const ROWS: usize = 7;

/// Vectors of columns that a tile is wide.
const VECTORS: usize = 2;

/// Columns of a strip, which is as wide as a tile.
const STRIP: usize = VECTORS * LANES;

/// Runs that are summed over at a time: a strip's and some tiles' stay in a core's first cache.
const BLOCK_RUNS: usize = 4;

/// What factors are rounded to, so that sums of [`RUN`] products fit 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bits {
    /// As many for the left as for the right one.
    Alike,
    /// All 16 for the left one, whose numbers may be of very different sizes, as attention weights are.
    Left,
}

impl Bits {
    /// The largest whole numbers of the left and of the right matrix.
    const fn limits(self) -> [u16; 2] {
        match self {
            Self::Alike => [5792, 5792],
            Self::Left => [32767, 1023],
        }
    }
}

/// Two numbers that meet two others in one sum.
type Pair = [i16; 2];

/// A run of the rows of a tile.
#[derive(Clone, Copy)]
struct LeftRun {
    numbers: [[Pair; RUN / 2]; ROWS],
    scales: [f32; ROWS],
}

const NO_LEFT: LeftRun = LeftRun { numbers: [[[0; 2]; RUN / 2]; ROWS], scales: [0.0; ROWS] };

/// A run of the columns of a strip.
#[derive(Debug, Clone, Copy, PartialEq)]
struct RightRun {
    /// Pairs of each column, the first in the lower half.
    numbers: [[u32; STRIP]; RUN / 2],
    scales: [f32; STRIP],
}

const NO_RIGHT: RightRun = RightRun { numbers: [[0; STRIP]; RUN / 2], scales: [0.0; STRIP] };

/// The right matrix of products, rounded; rows or columns may be added.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Panels {
    bits: Bits,
    /// Rows, which are summed over, and columns.
    inner: usize,
    cols: usize,
    /// Whether runs of one strip stand together, strip after strip (columns may be added), or strips of one run (rows may be).
    by_strips: bool,
    runs: Vec<RightRun>,
}

impl Panels {
    /// A matrix of `inner` rows to which columns are added.
    pub fn of_columns(bits: Bits, inner: usize) -> Self {
        Self { bits, inner, cols: 0, by_strips: true, runs: Vec::new() }
    }

    /// A matrix of `cols` columns to which rows are added.
    pub fn of_rows(bits: Bits, cols: usize) -> Self {
        Self { bits, inner: 0, cols, by_strips: false, runs: Vec::new() }
    }

    /// How many columns, or rows, were added.
    pub fn len(&self) -> usize {
        if self.by_strips { self.cols } else { self.inner }
    }

    /// Makes it a matrix of `len` columns or rows, of which those after the last are new.
    ///
    /// * `matrix`: all of it, row after row with `stride` numbers from one to the next
    ///
    /// # Panics
    /// If there are fewer rows or columns there.
    pub fn extend(&mut self, set: InstructionSet, matrix: &[f32], stride: usize, len: usize) {
        let unit = if self.by_strips { STRIP } else { RUN };
        // What was not full is rounded again.
        let first = self.len() / unit;
        let per_unit = if self.by_strips { self.inner.div_ceil(RUN) } else { self.cols.div_ceil(STRIP) };
        *(if self.by_strips { &mut self.cols } else { &mut self.inner }) = len;
        self.runs.resize(len.div_ceil(unit) * per_unit, NO_RIGHT);
        let [_, limit] = self.bits.limits();
        for (index, run) in self.runs.iter_mut().enumerate().skip(first * per_unit) {
            let [strip, row] = if self.by_strips {
                [index / per_unit, index % per_unit]
            } else {
                [index % per_unit, index / per_unit]
            };
            let (row, column) = (row * RUN, strip * STRIP);
            let numbers = &matrix[row * stride + column..];
            let (rows, cols) = (RUN.min(self.inner - row), STRIP.min(self.cols - column));
            round_right(set, Source { numbers, stride, rows, cols }, f32::from(limit), run);
        }
    }

    /// Runs of a strip: the first, and from one to the next.
    fn place(&self, strip: usize) -> (usize, usize) {
        if self.by_strips { (strip * self.inner.div_ceil(RUN), 1) } else { (strip, self.cols.div_ceil(STRIP)) }
    }

    /// Overwrites `out`, `[rows, cols]`, with `scale * left * right`, where `right` is made of the matrix's first `cols` columns
    /// and first rows, or of those from `first` on.
    ///
    /// * `left`: `[rows, inner]`; rows after the last whole tile of [`ROWS`] make one of their own
    /// * `inner`: rows of the matrix that are summed over, at most; all if columns are added to it
    /// * `buffer`: for reuse
    ///
    /// # Panics
    /// If sizes do not fit.
    pub fn multiply(&self, set: InstructionSet, product: Product<'_>, buffer: &mut Buffer) {
        let Product { left, first, inner, scale: _, ref out, cols } = product;
        let [rows, columns] = if self.by_strips { [inner, first + cols] } else { [first + inner, cols] };
        assert!(
            rows <= self.inner && columns <= self.cols && (rows == self.inner || !self.by_strips),
            "a right matrix"
        );
        assert!(first.is_multiple_of(RUN), "a part of a right matrix");
        assert!(
            left.len().is_multiple_of(inner.max(1)) && out.len() * inner == left.len() * cols,
            "sizes of a product"
        );
        if inner > 0 && cols > 0 {
            multiply(set, self, product, buffer);
        } else {
            product.out.fill(0.0);
        }
    }
}

/// A product with [`Panels`].
pub(crate) struct Product<'a> {
    /// `[rows, inner]`
    pub left: &'a [f32],
    /// The first column, if columns are added to the matrix, or else the first row, that is multiplied; whole [runs](RUN).
    pub first: usize,
    pub inner: usize,
    pub scale: f32,
    /// `[rows, cols]`
    pub out: &'a mut [f32],
    pub cols: usize,
}

/// Where left matrices are rounded to; kept for reuse.
#[derive(Default)]
pub(crate) struct Buffer {
    runs: Vec<LeftRun>,
}

/// A part of a matrix that is rounded.
#[derive(Clone, Copy)]
struct Source<'a> {
    numbers: &'a [f32],
    stride: usize,
    rows: usize,
    cols: usize,
}

multiversion! {
    /// Rounds a run of a strip's columns.
    fn round_right(source: Source<'_>, limit: f32, run: &mut RightRun) = round_right_body;
}

#[inline(always)]
fn round_right_body<L: Lanes>(source: Source<'_>, limit: f32, run: &mut RightRun) {
    let mut rows = [[0.0; STRIP]; RUN];
    for (row, numbers) in rows.iter_mut().zip(source.numbers.chunks(source.stride)).take(source.rows) {
        row[..source.cols].copy_from_slice(&numbers[..source.cols]);
    }
    for vector in 0..VECTORS {
        let load = |row: &[f32; STRIP]| L::load(&row.as_chunks().0[vector]);
        // NaN if there is anything that no whole number can say.
        let [mut largest, mut nothing] = [L::splat(0.0); 2];
        for row in &rows {
            largest = load(row).abs().max(largest);
            nothing = load(row).mul_add(L::splat(0.0), nothing);
        }
        let mut sizes = [0.0; LANES];
        largest.store(&mut sizes);
        let inverse = sizes.map(|largest| if largest > 0.0 { limit / largest } else { 0.0 });
        let inverse = L::load(&inverse);
        let scales = largest.mul(L::splat(1.0 / limit)).add(nothing);
        scales.store(&mut run.scales.as_chunks_mut().0[vector]);
        for (pair, numbers) in rows.as_chunks::<2>().0.iter().zip(&mut run.numbers) {
            let mut rounded = [[0.0; LANES]; 2];
            for (row, rounded) in pair.iter().zip(&mut rounded) {
                load(row).mul_add(inverse, L::splat(ROUND)).store(rounded);
            }
            for (lane, number) in numbers.as_chunks_mut::<LANES>().0[vector].iter_mut().enumerate() {
                *number = rounded[0][lane].to_bits() & 0xffff | rounded[1][lane].to_bits() << 16;
            }
        }
    }
}

multiversion! {
    fn multiply(panels: &Panels, product: Product<'_>, buffer: &mut Buffer) = multiply_body, quants;
}

#[inline(always)]
fn multiply_body<L: Lanes>(panels: &Panels, product: Product<'_>, buffer: &mut Buffer) {
    let Product { left, first, inner, scale, out, cols } = product;
    let [first_strip, first_run] = if panels.by_strips { [first / STRIP, 0] } else { [0, first / RUN] };
    let [limit, _] = panels.bits.limits();
    let limit = f32::from(limit);
    let rows = left.len() / inner;
    let runs = inner.div_ceil(RUN);
    let tiles = rows.div_ceil(ROWS);
    for block in (0..runs).step_by(BLOCK_RUNS) {
        let block = block..runs.min(block + BLOCK_RUNS);
        let columns = block.start * RUN..inner.min(block.end * RUN);
        buffer.runs.resize(tiles * block.len(), NO_LEFT);
        for tile in 0..tiles {
            let tile_rows = tile * ROWS..rows.min((tile + 1) * ROWS);
            for (index, row) in tile_rows.enumerate() {
                let row = &left[row * inner..][columns.clone()];
                for (run, numbers) in buffer.runs[tile * block.len()..].iter_mut().zip(row.chunks(RUN)) {
                    round_left::<L>(numbers, limit, scale, run, index);
                }
            }
        }
        let last_pairs = columns.len().div_ceil(2) - (block.len() - 1) * (RUN / 2);
        for strip in 0..cols.div_ceil(STRIP) {
            let (first, step) = panels.place(first_strip + strip);
            let right = &panels.runs[first + (first_run + block.start) * step..];
            let columns = strip * STRIP..cols.min((strip + 1) * STRIP);
            for tile in 0..tiles {
                let left = &buffer.runs[tile * block.len()..(tile + 1) * block.len()];
                let tile_rows = tile * ROWS..rows.min((tile + 1) * ROWS);
                for row in tile_rows.clone() {
                    let place = out.as_ptr().wrapping_add(row * cols + columns.start);
                    (0..VECTORS).for_each(|vector| fetch::<true>(place.wrapping_add(vector * LANES).cast()));
                }
                let totals = multiply_tile::<L>(left, right, step, last_pairs);
                for (row, totals) in tile_rows.zip(totals) {
                    let mut out = &mut out[row * cols..][columns.clone()];
                    for total in totals {
                        let (now, later) = out.split_at_mut(LANES.min(out.len()));
                        if block.start > 0 { L::load_some(now).add(total) } else { total }.store_some(now);
                        out = later;
                    }
                }
            }
        }
    }
}

/// Rounds a run of a row, which may end before the run.
#[inline(always)]
#[expect(clippy::cast_possible_truncation)] // to 16 bits
fn round_left<L: Lanes>(numbers: &[f32], limit: f32, scale: f32, run: &mut LeftRun, row: usize) {
    let mut padded = [0.0; RUN];
    let numbers = if let Some(numbers) = numbers.first_chunk::<RUN>() {
        numbers
    } else {
        padded[..numbers.len()].copy_from_slice(numbers);
        &padded
    };
    let vectors = numbers.as_chunks::<LANES>().0;
    let [mut largest, mut nothing] = [L::splat(0.0); 2];
    for vector in vectors {
        largest = L::load(vector).abs().max(largest);
        nothing = L::load(vector).mul_add(L::splat(0.0), nothing);
    }
    let (largest, nothing) = (largest.largest(), nothing.sum());
    let inverse = L::splat(if largest > 0.0 { limit / largest } else { 0.0 });
    for (vector, out) in vectors.iter().zip(run.numbers[row].as_flattened_mut().as_chunks_mut::<LANES>().0) {
        let mut rounded = [0.0; LANES];
        L::load(vector).mul_add(inverse, L::splat(ROUND)).store(&mut rounded);
        *out = rounded.map(|number| (number.to_bits() as u16).cast_signed());
    }
    run.scales[row] = largest * (scale / limit) + nothing;
}

/// The products of a tile with a strip, over a block of runs.
///
/// * `step`: runs from one of the strip to the next
/// * `last_pairs`: pairs of the last run
#[inline(always)]
fn multiply_tile<L: Lanes>(
    left: &[LeftRun],
    right: &[RightRun],
    step: usize,
    last_pairs: usize,
) -> [[L; VECTORS]; ROWS] {
    let mut totals = [[L::splat(0.0); VECTORS]; ROWS];
    let last = left.len() - 1;
    for (index, (left, right)) in left.iter().zip(right.iter().step_by(step)).enumerate() {
        let pairs = if index == last { last_pairs } else { RUN / 2 };
        let mut sums = [[L::whole(0); VECTORS]; ROWS];
        for (pair, numbers) in right.numbers[..pairs].iter().enumerate() {
            let [first, second] = [0, 1].map(|vector| L::load_bytes(&numbers.as_chunks().0[vector]));
            #[expect(clippy::needless_range_loop, reason = "with iterators the sums are compiled to memory")]
            for row in 0..ROWS {
                let factors = &left.numbers[row][pair];
                sums[row][0] = L::add_words(sums[row][0], first, factors);
                sums[row][1] = L::add_words(sums[row][1], second, factors);
            }
        }
        let mut scales = [L::splat(0.0); VECTORS];
        for (scales, numbers) in scales.iter_mut().zip(right.scales.as_chunks().0) {
            *scales = L::load(numbers);
        }
        for row in 0..ROWS {
            let scale = L::splat(left.scales[row]);
            for vector in 0..VECTORS {
                totals[row][vector] =
                    L::from_whole(sums[row][vector]).mul_add(scales[vector].mul(scale), totals[row][vector]);
            }
        }
    }
    totals
}
