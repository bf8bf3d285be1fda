//! Blocks of `Q4_K`: scale and minimum of each 32 numbers are searched as in ggml's `quantize_row_q4_K_ref`, the best of 21
//! steps by the squared error weighted with the numbers' sizes. Two blocks at a time, a part of 32 in each lane.

use std::array::from_fn;

use half::f16;

use super::{columns_of, nearest, stored};
use crate::kernels::simd::{LANES, Lanes};

/// Numbers that share a scale.
const PART: usize = 32;
/// Parts of a block.
const PARTS: usize = 8;
const BLOCK: usize = PARTS * PART;
const BLOCK_BYTES: usize = 144;
/// Blocks that fill the lanes.
const BLOCKS: usize = LANES / PARTS;
const LARGEST_QUANT: f32 = 15.0;
/// The largest scale or minimum of a part, in units of the block's.
const LARGEST_SCALE: f32 = 63.0;
/// How many steps are tried for a part, from its range over 14 to its range over 16.
const TRIES: u8 = 21;
/// Sums of which less is left than this share are rounding errors: the part's numbers are all alike.
const LEAST_SPREAD: f32 = 1e-6;
/// Parts of a smaller range have scales that f16 cannot tell from 0.
const LEAST_RANGE: f32 = 1e-30;

#[inline(always)]
pub(super) fn body<L: Lanes>(numbers: &[f32], out: &mut [u8]) {
    for (numbers, out) in numbers.chunks(BLOCKS * BLOCK).zip(out.chunks_mut(BLOCKS * BLOCK_BYTES)) {
        let (scales, minima) = scales_and_minima(&columns_of::<L, PART>(numbers));
        let parts = scales.as_chunks().0.iter().zip(minima.as_chunks().0);
        let blocks = numbers.as_chunks().0.iter().zip(out.as_chunks_mut().0);
        for ((numbers, out), (scales, minima)) in blocks.zip(parts) {
            write_block::<L>(numbers, scales, minima, out);
        }
    }
}

/// The scale of each part, and how far its smallest number is below 0.
///
/// * `columns`: a number of each part, then the next of each
#[inline(always)]
fn scales_and_minima<L: Lanes>(columns: &[L; PART]) -> ([f32; LANES], [f32; LANES]) {
    #[expect(clippy::cast_precision_loss)] // exact
    const COUNT: f32 = PART as f32;
    let zero = L::splat(0.0);
    let (mut low, mut high, mut squares) = (zero, columns[0], zero);
    for &column in columns {
        low = low.min(column);
        high = high.max(column);
        squares = squares.add(column.mul(column));
    }
    let mut mean_size = stored(squares);
    for squares in &mut mean_size {
        *squares = (*squares / COUNT).sqrt();
    }
    let mean_size = L::load(&mean_size);
    let range = high.sub(low);
    // How far numbers are above the smallest, and how much they weigh.
    let (mut above, mut weights) = ([zero; PART], [zero; PART]);
    let (mut sum_w, mut sum_wx) = (zero, zero);
    for at in 0..PART {
        above[at] = columns[at].sub(low);
        weights[at] = mean_size.add(columns[at].abs());
        sum_w = sum_w.add(weights[at]);
        sum_wx = sum_wx.add(weights[at].mul(columns[at]));
    }

    let inverse_range = range.if_above(L::splat(LEAST_RANGE), L::splat(1.0).div(range), zero);
    let mut best = Line { scale: range.div(L::splat(LARGEST_QUANT)), min: low, gain: L::splat(f32::NEG_INFINITY) };
    for step in 0..TRIES {
        let inverse = L::splat(LARGEST_QUANT - 1.0 + 0.1 * f32::from(step)).mul(inverse_range);
        let (mut sum_q, mut sum_qq, mut sum_xq) = (zero, zero, zero);
        for at in 0..PART {
            let quant = nearest(above[at].mul(inverse).min(L::splat(LARGEST_QUANT)));
            let weighted = weights[at].mul(quant);
            sum_q = sum_q.add(weighted);
            sum_qq = sum_qq.add(weighted.mul(quant));
            sum_xq = sum_xq.add(weighted.mul(columns[at]));
        }
        best = best.or(Sums { w: sum_w, wx: sum_wx, q: sum_q, qq: sum_qq, xq: sum_xq }.line());
    }
    (stored(best.scale), stored(zero.sub(best.min)))
}

/// Numbers as multiples of a scale above a minimum.
#[derive(Clone, Copy)]
struct Line<L> {
    scale: L,
    min: L,
    /// By how much the squared error is less than the sum of squares.
    gain: L,
}

impl<L: Lanes> Line<L> {
    /// The better one of two; this one if they are as good.
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        let better = |then: L, otherwise: L| other.gain.if_above(self.gain, then, otherwise);
        Self {
            scale: better(other.scale, self.scale),
            min: better(other.min, self.min),
            gain: better(other.gain, self.gain),
        }
    }
}

/// Sums of weights, and of their products with numbers x and quants q.
struct Sums<L> {
    w: L,
    wx: L,
    q: L,
    qq: L,
    xq: L,
}

impl<L: Lanes> Sums<L> {
    /// The line through the quants with the least error; a minimum above 0 cannot be said.
    #[inline(always)]
    fn line(self) -> Line<L> {
        let Self { w, wx, q, qq, xq } = self;
        let zero = L::splat(0.0);
        let spread = w.mul(qq).sub(q.mul(q));
        let (scale, min) = (w.mul(xq).sub(wx.mul(q)), qq.mul(wx).sub(q.mul(xq)));
        // One division: they are slow.
        let inverse = L::splat(1.0).div(min.if_above(zero, qq, spread));
        let scale = min.if_above(zero, xq, scale).mul(inverse);
        let min = min.min(zero).mul(inverse);
        let product = scale.mul(xq).add(min.mul(wx));
        let squares = scale.mul(scale).mul(qq).add(L::splat(2.0).mul(scale).mul(min).mul(q)).add(min.mul(min).mul(w));
        let gain = L::splat(2.0).mul(product).sub(squares);
        let least = L::splat(LEAST_SPREAD).mul(w).mul(qq);
        Line { scale, min, gain: spread.if_above(least, gain, L::splat(f32::NEG_INFINITY)) }
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // at most 63
fn write_block<L: Lanes>(
    numbers: &[f32; BLOCK],
    scales: &[f32; PARTS],
    minima: &[f32; PARTS],
    out: &mut [u8; BLOCK_BYTES],
) {
    let unit = |of: &[f32; PARTS]| of.iter().copied().fold(0.0, f32::max) / LARGEST_SCALE;
    let in_units = |of: f32, unit: f32| if unit > 0.0 { (of / unit).round().clamp(0.0, LARGEST_SCALE) } else { 0.0 };
    let units = [unit(scales), unit(minima)];
    let scale: [u8; PARTS] = from_fn(|part| in_units(scales[part], units[0]) as u8);
    let minimum: [u8; PARTS] = from_fn(|part| in_units(minima[part], units[1]) as u8);
    let halves = units.map(f16::from_f32);
    let [unit, unit_of_minima] = halves.map(f16::to_f32);

    let (head, quants) = out.split_at_mut(16);
    head[..2].copy_from_slice(&halves[0].to_le_bytes());
    head[2..4].copy_from_slice(&halves[1].to_le_bytes());
    let bytes = &mut head[4..];
    for part in 0..4 {
        // Six bits each of the first four parts, whose two upper bits are those of the others.
        bytes[part] = scale[part] | scale[part + 4] >> 4 << 6;
        bytes[part + 4] = minimum[part] | minimum[part + 4] >> 4 << 6;
        bytes[part + 8] = (scale[part + 4] & 15) | minimum[part + 4] << 4;
    }

    let [mut inverse, mut below] = [[0.0; PARTS]; 2];
    for part in 0..PARTS {
        let scale = unit * f32::from(scale[part]);
        inverse[part] = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        below[part] = -unit_of_minima * f32::from(minimum[part]);
    }
    let numbers = numbers.as_chunks::<LANES>().0;
    for (index, bytes) in quants.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        // Two parts share bytes.
        let (pair, half) = (index / 2, index % 2);
        let mut quants = [[0; LANES]; 2];
        for (part, quants) in (2 * pair..).zip(&mut quants) {
            let above = L::load(&numbers[2 * part + half]).sub(L::splat(below[part]));
            let steps = above.mul(L::splat(inverse[part])).max(L::splat(0.0)).min(L::splat(LARGEST_QUANT));
            *quants = nearest(steps).truncated();
        }
        for (byte, (low, high)) in bytes.iter_mut().zip(quants[0].iter().zip(quants[1])) {
            *byte = low | high << 4;
        }
    }
}
