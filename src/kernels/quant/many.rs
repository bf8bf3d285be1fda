//! Products of many rows of activations with rows of blocks, in whole numbers of 8 bits: what reads prompts.
//!
//! Activations are rounded to 8 bits with a scale for each group of them, once for a matrix ([`RoundedRows`]). Weights are
//! unpacked to bytes a panel at a time (`strips.rs`), small enough for a core's second cache, and used for all rows of
//! activations before the next panel. Rows of weights lie in the lanes, so that no sum runs across them; whole numbers are
//! summed up over a group, and floats touched once for each.
//!
//! Not for: few rows, for which unpacking does not pay (see [`super::dot`]); plain floats (see [`super::super::gemm`]).

mod strips;

use std::cell::RefCell;

use rayon::prelude::*;

use super::source::Source;
use super::{Rows, WeightFormat};
use crate::kernels::blocks::{Iq4Nl, Iq4Xs, Mxfp4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use crate::kernels::gemm::MatrixMut;
use crate::kernels::simd::{InstructionSet, LANES, Lanes, fetch, multiversion};
use strips::{Format, Fours, Q2K, Q3K, Q4K, Q5K, Q6K, Strips};

/// Vectors of weights that a tile is wide.
const VECTORS: usize = 2;

/// Rows of weights in a strip, which is as wide as a tile.
const STRIP: usize = VECTORS * LANES;

/// Adding it leaves a whole number, rounded, in the lowest bits; 1.5 * 2^23. Sums of products that begin with its bits are
/// floats, moved by it: they need not be converted.
const ROUND: f32 = 12_582_912.0;

/// The bits of [`ROUND`].
const START: i32 = ROUND.to_bits().cast_signed();

/// Bits that are left of a scale: its product with [`ROUND`] is exact.
const SCALE_BITS: u32 = !0b11;

/// Steps of four columns that are taken at a time.
const STEPS: usize = 4;

/// Bytes of a panel: with its scales they stay in a core's second cache.
const PANEL_BYTES: usize = 384 * 1024;

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
        Self { set, kind: Kind::of::<F>(), round: RoundedRows::new::<F>, multiply: RoundedRows::multiply::<F> }
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

/// Rows of activations, rounded to 8 bits for products with the rows of a matrix of one format.
pub(super) struct RoundedRows {
    set: InstructionSet,
    count: usize,
    cols: usize,
    kind: Kind,
    /// `[tiles, cols / 4, tile]`, a tile of [`tile_rows`]: four numbers with a sign each; rows after the last are 0.
    bytes: Vec<[u8; 4]>,
    /// `[tiles, cols / group, tile]`
    scales: Vec<Scale>,
    /// `[tiles, cols / group, tile]`: what sums of products begin with, since bytes of weights have no sign: bits of
    /// [`ROUND`], and some.
    starts: Vec<i32>,
    /// `[tiles, cols / group, tile]`: sums of the activations as they were rounded, for weights with offsets; those before
    /// would be off by more, since offsets and quants may be large and cancel.
    sums: Vec<f32>,
}

impl RoundedRows {
    /// * `x`: `[count, cols]`, with whole groups
    fn new<F: Format>(set: InstructionSet, x: Source<'_>, cols: usize) -> Self {
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

    fn multiply<F: Format>(&self, rows: Rows<'_>, strips: &mut Strips, out: &mut MatrixMut<'_>) {
        let row_bytes = self.cols / F::BLOCK * F::BYTES;
        assert!(self.kind == Kind::of::<F>() && rows.row_bytes == row_bytes, "activations rounded for {:?}", self.kind);
        if rows.count > 0 && self.count > 0 {
            multiply_panel::<F>(self.set, self, rows, strips, out);
        }
    }
}

/// A scale, and what takes [`ROUND`] off of what is multiplied with it: `-ROUND` times the scale.
type Scale = [f32; 2];

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

/// Rows of a tile on an instruction set.
fn tile_rows(set: InstructionSet) -> usize {
    if set.is_wide() { WIDE_ROWS } else { NARROW_ROWS }
}

/// Rows of a tile where 32 registers hold two vectors of sums for each, in whole numbers and in floats.
const WIDE_ROWS: usize = 7;

/// Rows of a tile where there are fewer registers.
const NARROW_ROWS: usize = 3;

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

multiversion! {
    /// Unpacks a panel and multiplies it with all rows of activations.
    fn multiply_panel<F: Format>(x: &RoundedRows, rows: Rows<'_>, strips: &mut Strips, out: &mut MatrixMut<'_>)
        = multiply_panel_body, quants;
}

#[inline(always)]
fn multiply_panel_body<L: Lanes, F: Format>(
    x: &RoundedRows,
    rows: Rows<'_>,
    strips: &mut Strips,
    out: &mut MatrixMut<'_>,
) {
    strips.unpack::<L, F>(rows, x.cols);
    if L::WIDE {
        multiply_strips::<L, F, WIDE_ROWS, VECTORS>(x, strips, out);
    } else {
        multiply_strips::<L, F, NARROW_ROWS, 1>(x, strips, out);
    }
}

/// In tiles of `ROWS` rows of activations and `WIDTH` vectors of weights.
#[inline(always)]
fn multiply_strips<L: Lanes, F: Format, const ROWS: usize, const WIDTH: usize>(
    x: &RoundedRows,
    strips: &Strips,
    out: &mut MatrixMut<'_>,
) {
    assert_eq!(tile_rows(x.set), ROWS, "rows of a tile");
    for (index, strip) in strips.iter().enumerate() {
        for first in (0..VECTORS).step_by(WIDTH) {
            for tile in 0..x.count.div_ceil(ROWS) {
                let (rows, column) = (tile * ROWS..((tile + 1) * ROWS).min(x.count), index * STRIP + first * LANES);
                // They are written when the tile is done; until then the lines can come.
                for row in rows.clone() {
                    let place = out.row(row).as_ptr().wrapping_add(column);
                    (0..WIDTH).for_each(|vector| fetch::<true>(place.wrapping_add(vector * LANES).cast()));
                }
                let totals = multiply_tile::<L, F, ROWS, WIDTH>(x, tile, strip, first);
                for (row, totals) in rows.zip(totals) {
                    let row = &mut out.row(row);
                    for (vector, totals) in totals.into_iter().enumerate() {
                        totals.store_some(row.get_mut(column + vector * LANES..).unwrap_or_default());
                    }
                }
            }
        }
    }
}

/// The products of a tile of activations with a strip, or with some vectors of it.
#[inline(always)]
fn multiply_tile<L: Lanes, F: Format, const ROWS: usize, const WIDTH: usize>(
    x: &RoundedRows,
    tile: usize,
    strip: strips::Strip<'_>,
    first: usize,
) -> [[L; WIDTH]; ROWS] {
    let groups = x.cols / F::RUN;
    let of_tile = tile * groups..(tile + 1) * groups;
    let scales = &x.scales.as_chunks::<ROWS>().0[of_tile.clone()];
    let starts = &x.starts.as_chunks::<ROWS>().0[of_tile.clone()];
    let sums = if F::HAS_OFFSETS { &x.sums.as_chunks::<ROWS>().0[of_tile] } else { &[] };
    let bytes = &x.bytes.as_chunks::<ROWS>().0[tile * x.cols / 4..(tile + 1) * x.cols / 4];
    let weights = &strip.bytes.as_chunks::<VECTORS>().0[..x.cols / 4];
    let weight_scales = &strip.scales.as_chunks::<VECTORS>().0[..groups];
    let weight_offsets = if F::HAS_OFFSETS { &strip.offsets.as_chunks::<VECTORS>().0[..groups] } else { &[] };
    // Steps in the text of the program: short loops within short loops are hard to foresee.
    let (bytes, weights) = (bytes.as_chunks::<STEPS>().0, weights.as_chunks::<STEPS>().0);
    let size = F::RUN / 4 / STEPS;

    let mut totals = [[L::splat(0.0); WIDTH]; ROWS];
    for group in 0..groups {
        let place = group * size..(group + 1) * size;
        let products =
            multiply_group::<L, F, ROWS, WIDTH>(&starts[group], &bytes[place.clone()], &weights[place], first);
        let mut own_scales = [L::splat(0.0); WIDTH];
        for vector in 0..WIDTH {
            own_scales[vector] = L::load(&weight_scales[group][first + vector]);
        }
        for row in 0..ROWS {
            let [factor, term] = scales[group][row].map(L::splat);
            for vector in 0..WIDTH {
                let moved = L::as_floats(products[row][vector]);
                let product =
                    if L::FUSED { moved.mul_add(factor, term) } else { moved.sub(L::splat(ROUND)).mul(factor) };
                totals[row][vector] = product.mul_add(own_scales[vector], totals[row][vector]);
            }
        }
        if F::HAS_OFFSETS {
            for vector in 0..WIDTH {
                let offset = L::load(&weight_offsets[group][first + vector]);
                for row in 0..ROWS {
                    totals[row][vector] = offset.mul_add(L::splat(sums[group][row]), totals[row][vector]);
                }
            }
        }
    }
    totals
}

/// The sums of a group's products, as whole numbers behind the bits of [`ROUND`].
///
/// * `starts`: what they begin with
#[inline(always)]
fn multiply_group<L: Lanes, F: Format, const ROWS: usize, const WIDTH: usize>(
    starts: &[i32; ROWS],
    bytes: &[[[[u8; 4]; ROWS]; STEPS]],
    weights: &[[[Fours; VECTORS]; STEPS]],
    first: usize,
) -> [[L::Whole; WIDTH]; ROWS] {
    let mut sums = [[L::whole(START); WIDTH]; ROWS];
    if L::DOTS || F::LARGEST < 128 {
        for row in 0..ROWS {
            sums[row] = [L::whole(starts[row]); WIDTH];
        }
    }
    if L::DOTS {
        for (bytes, weights) in bytes.iter().zip(weights) {
            for step in 0..STEPS {
                let mut quants = [L::load_bytes(&weights[step][first].0); WIDTH];
                for vector in 1..WIDTH {
                    quants[vector] = L::load_bytes(&weights[step][first + vector].0);
                }
                for row in 0..ROWS {
                    for vector in 0..WIDTH {
                        sums[row][vector] = L::add_dots(sums[row][vector], quants[vector], &bytes[step][row]);
                    }
                }
            }
        }
        return sums;
    }
    let (bytes, weights) = (bytes.as_flattened(), weights.as_flattened());
    if F::LARGEST < 128 {
        // Sums of so many products fit 16 bits; more than four at a time are compiled to more than 16 registers hold.
        let fitting = (i16::MAX as usize / (2 * 127 * F::LARGEST as usize)).min(4);
        for (bytes, weights) in bytes.chunks(fitting).zip(weights.chunks(fitting)) {
            let mut pairs = [[L::no_pairs(); WIDTH]; ROWS];
            for (bytes, weights) in bytes.iter().zip(weights) {
                for vector in 0..WIDTH {
                    let quants = L::load_bytes(&weights[first + vector].0);
                    for row in 0..ROWS {
                        pairs[row][vector] = L::add_pairs(pairs[row][vector], quants, &bytes[row]);
                    }
                }
            }
            for row in 0..ROWS {
                for vector in 0..WIDTH {
                    sums[row][vector] = L::add_both(sums[row][vector], pairs[row][vector]);
                }
            }
        }
        return sums;
    }
    for (bytes, weights) in bytes.iter().zip(weights) {
        for vector in 0..WIDTH {
            let quants = L::load_bytes(&weights[first + vector].0);
            for row in 0..ROWS {
                sums[row][vector] = L::add_centred(sums[row][vector], quants, &bytes[row]);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::quant::dequantize;
    use crate::kernels::quant::samples::{expect_products, random_blocks, set_scales_to_one};

    const FORMATS: [WeightFormat; 13] = [
        WeightFormat::Q4_0,
        WeightFormat::Q4_1,
        WeightFormat::Q5_0,
        WeightFormat::Q5_1,
        WeightFormat::Q8_0,
        WeightFormat::Q2K,
        WeightFormat::Q3K,
        WeightFormat::Q4K,
        WeightFormat::Q5K,
        WeightFormat::Q6K,
        WeightFormat::Iq4Nl,
        WeightFormat::Iq4Xs,
        WeightFormat::Mxfp4,
    ];

    /// `[count, rows]` products by way of panels, and the weights as f32.
    fn products(set: InstructionSet, dtype: WeightFormat, rows: usize, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let data = random_blocks(dtype, rows * COLS / dtype.block_size());
        let mut wide = vec![0.0; rows * COLS];
        dequantize(dtype, &data, &mut wide);
        let format = ManyFormat::new(set, dtype).unwrap();
        let x = format.round(Source::Rows(x), COLS);
        let mut out = vec![f32::NAN; x.count() * rows];
        let (row_bytes, mut buffers) = (data.len() / rows, PanelBuffers::default());
        for panel_rows in [x.panel_rows(rows, 1), STRIP] {
            out.fill(f32::NAN);
            let views = MatrixMut::new(&mut out, x.count(), rows, rows).split_columns(panel_rows);
            for (data, mut view) in data.chunks(panel_rows * row_bytes).zip(views) {
                let rows = Rows { data, row_bytes, count: data.len() / row_bytes };
                format.multiply(&x, rows, &mut buffers, &mut view);
            }
        }
        (out, wide)
    }

    const COLS: usize = 512;

    /// Activations that bytes hold as they are: products must be exact.
    #[test]
    fn products_of_whole_numbers_are_exact_in_every_format_and_on_every_instruction_set() {
        let number = |i: usize| if i % 16 == 5 { -127_i8 } else { [-113, -42, 29, 0, 71, -6, 117][i * 5 % 7] };
        for (set, dtype) in InstructionSet::available().into_iter().flat_map(|set| FORMATS.map(|f| (set, f))) {
            for (count, rows) in [(1, 1), (2, 15), (3, 16), (7, 33), (8, 70), (20, 32)] {
                let x: Vec<f32> = (0..count * COLS).map(|i| f32::from(number(i)) / 64.0).collect();
                let (out, wide) = products(set, dtype, rows, &x);
                expect_products(&format!("{set:?} {dtype:?}"), &out, &wide, &x, COLS);
            }
        }
    }

    /// The error is that of rounding to 127 steps of a group's largest number.
    #[test]
    fn activations_are_rounded_to_the_nearest_byte() {
        let (count, rows) = (3, 5);
        let x: Vec<f32> = (0..count * COLS).map(|i| [-11.3, -4.2, 2.9, 0.03, 7.1, -0.6, 0.7][i * 5 % 7]).collect();
        for set in InstructionSet::available() {
            let (out, wide) = products(set, WeightFormat::Q4_1, rows, &x);
            for (index, &out) in out.iter().enumerate() {
                let (weights, x) = (&wide[index % rows * COLS..][..COLS], &x[index / rows * COLS..][..COLS]);
                let sum: f32 = weights.iter().zip(x).map(|(w, x)| w * x).sum();
                let bound = 0.5 * 11.3 / 127.0 * weights.iter().map(|w| w.abs()).sum::<f32>();
                assert!((out - sum).abs() <= bound && out != sum, "{set:?} {index}: {out} for {sum}, within {bound}");
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_in_its_row_and_zeros_are_zeros() {
        let mut x = vec![0.0; 3 * COLS];
        (x[7], x[2 * COLS + 500]) = (f32::INFINITY, f32::NAN);
        for (set, dtype) in InstructionSet::available().into_iter().flat_map(|set| FORMATS.map(|f| (set, f))) {
            let (out, _) = products(set, dtype, 20, &x);
            let rows: Vec<_> = out.chunks(20).collect();
            assert!(rows[0].iter().chain(rows[2]).all(|out| out.is_nan()), "{set:?} {dtype:?}: {out:?}");
            assert!(rows[1].iter().all(|&out| out == 0.0), "{set:?} {dtype:?}: {out:?}");
        }
    }

    /// The largest bytes on both sides, where sums of 16 bits must not overflow.
    #[test]
    fn the_largest_sums_fit() {
        for (set, dtype) in InstructionSet::available().into_iter().flat_map(|set| FORMATS.map(|f| (set, f))) {
            for (byte, sign) in [(0xff, 1.0), (0xff, -1.0), (0, 1.0), (0x80, -1.0)] {
                // Scales of NaN or 0 say nothing: 1 in their place.
                let mut block = vec![byte; dtype.block_bytes()];
                set_scales_to_one(dtype, &mut block);
                let rows = 16;
                let data = block.repeat(rows * COLS / dtype.block_size());
                let mut wide = vec![0.0; rows * COLS];
                dequantize(dtype, &data, &mut wide);
                let x = vec![sign * 127.0; COLS];
                let format = ManyFormat::new(set, dtype).unwrap();
                let x_bytes = format.round(Source::Rows(&x), COLS);
                let mut out = vec![f32::NAN; rows];
                let panel = Rows { data: &data, row_bytes: data.len() / rows, count: rows };
                format.multiply(
                    &x_bytes,
                    panel,
                    &mut PanelBuffers::default(),
                    &mut MatrixMut::new(&mut out, 1, rows, rows),
                );
                let expected: f64 = wide[..COLS].iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                let tolerance = 1e-5 * expected.abs().max(1.0);
                for &out in &out {
                    assert!(
                        (f64::from(out) - expected).abs() <= tolerance,
                        "{set:?} {dtype:?} {byte}: {out} for {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn panels_cover_all_rows_about_equally() {
        let x = ManyFormat::new(InstructionSet::PORTABLE, WeightFormat::Q4_0)
            .unwrap()
            .round(Source::Rows(&[0.0; 1536]), 1536);
        for (rows, threads, expected) in
            [(1, 1, 32), (256, 2, 128), (1536, 2, 256), (8960, 2, 256), (8960, 64, 160), (0, 2, 32)]
        {
            let panel = x.panel_rows(rows, threads);
            assert_eq!(panel, expected, "{rows} rows, {threads} threads");
        }
    }

    #[test]
    fn formats_without_panels_have_none() {
        for dtype in [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16, WeightFormat::Q8_1, WeightFormat::Q8K] {
            assert!(ManyFormat::new(InstructionSet::PORTABLE, dtype).is_none(), "{dtype:?}");
        }
    }
}
