//! Blocks of `Q6_K`, byte for byte those of ggml's `quantize_row_q6_K_ref`: the scale of each 16 numbers is the best of 19, by
//! the squared error weighted with the numbers' squares. A block at a time, a part of 16 in each lane.

use half::f16;

use super::{columns_of, nearest, stored};
use crate::kernels::simd::{LANES, Lanes};

/// Numbers that share a scale; there are as many parts.
const PART: usize = LANES;
const BLOCK: usize = PART * LANES;
const BLOCK_BYTES: usize = 210;
/// Quants are from -32 to 31.
const LEAST_QUANT: f32 = -32.0;
const LARGEST_QUANT: f32 = 31.0;
/// By how many tenths of a step more, or less, than 32 the largest number is tried.
const TRIES: i8 = 9;
/// Numbers below are taken for 0.
const LEAST: f32 = 1e-15;

#[inline(always)]
pub(super) fn body<L: Lanes>(numbers: &[f32], out: &mut [u8]) {
    for (numbers, out) in numbers.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        write_block(numbers, &Search::new(&columns_of::<L, PART>(numbers)), out);
    }
}

/// What was found for each part: quants are the nearest whole numbers to products with `inverse`, and `scale` is what suits
/// those best. Both are 0 for a part of zeros.
struct Search<L> {
    scale: L,
    inverse: L,
}

impl<L: Lanes> Search<L> {
    /// * `columns`: a number of each part, then the next of each
    #[inline(always)]
    fn new(columns: &[L; PART]) -> Self {
        let zero = L::splat(0.0);
        let (mut size, mut largest) = (zero, zero);
        let [mut squares, mut cubes] = [[zero; PART]; 2];
        for at in 0..PART {
            let column = columns[at];
            // With its sign; of two of the same size the first.
            largest = column.abs().if_above(size, column, largest);
            size = size.max(column.abs());
            squares[at] = column.mul(column);
            cubes[at] = squares[at].mul(column);
        }
        let inverse = L::splat(LEAST_QUANT).div(largest);
        let (sum_xq, sum_qq) = sums(columns, &squares, &cubes, inverse);
        let scale = sum_qq.if_above(zero, sum_xq.div(sum_qq), zero);
        let mut best = Self { scale, inverse };
        // By how much the squared error is less than the sum of squares.
        let mut gain = scale.mul(sum_xq);
        for tenths in -TRIES..=TRIES {
            if tenths == 0 {
                continue;
            }
            let inverse = L::splat(-(0.1 * f32::from(tenths) - LEAST_QUANT)).div(largest);
            let (sum_xq, sum_qq) = sums(columns, &squares, &cubes, inverse);
            let scale = sum_xq.div(sum_qq);
            // What is no number is not above.
            let square = sum_qq.if_above(zero, sum_xq.mul(sum_xq), L::splat(f32::NAN));
            let least = gain.mul(sum_qq);
            best.scale = square.if_above(least, scale, best.scale);
            best.inverse = square.if_above(least, inverse, best.inverse);
            gain = square.if_above(least, scale.mul(sum_xq), gain);
        }
        let least = L::splat(LEAST);
        Self { scale: least.if_above(size, zero, best.scale), inverse: least.if_above(size, zero, best.inverse) }
    }
}

/// Sums of products of weighted numbers with their quants, and of weighted squares of quants.
#[inline(always)]
fn sums<L: Lanes>(columns: &[L; PART], squares: &[L; PART], cubes: &[L; PART], inverse: L) -> (L, L) {
    let [mut sum_xq, mut sum_qq] = [L::splat(0.0); 2];
    for at in 0..PART {
        let quant = quant_of(columns[at].mul(inverse));
        sum_xq = sum_xq.add(cubes[at].mul(quant));
        sum_qq = sum_qq.add(squares[at].mul(quant).mul(quant));
    }
    (sum_xq, sum_qq)
}

#[inline(always)]
fn quant_of<L: Lanes>(quotient: L) -> L {
    nearest(quotient).max(L::splat(LEAST_QUANT)).min(L::splat(LARGEST_QUANT))
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // of 8 bits
fn write_block<L: Lanes>(numbers: &[f32; BLOCK], found: &Search<L>, out: &mut [u8; BLOCK_BYTES]) {
    let (scales, inverses) = (stored(found.scale), stored(found.inverse));
    let largest =
        scales.iter().fold(0.0_f32, |largest, scale| if scale.abs() > largest.abs() { *scale } else { largest });
    if largest.abs() < LEAST {
        out.fill(0);
        return;
    }
    let inverse = -128.0 / largest;
    let half = f16::from_f32(1.0 / inverse);
    let units: [f32; PART] = stored(nearest(found.scale.mul(L::splat(inverse))).min(L::splat(127.0)));

    let mut quants = [[0; LANES]; PART];
    for part in 0..PART {
        let (scale, inverse) = (half.to_f32() * units[part], inverses[part]);
        if inverse == 0.0 {
            continue;
        }
        let numbers = L::load(&numbers.as_chunks().0[part]);
        // Parts whose scale is lost keep the quants of the search.
        let quotients = if scale == 0.0 { numbers.mul(L::splat(inverse)) } else { numbers.div(L::splat(scale)) };
        quants[part] = quant_of(quotients).sub(L::splat(LEAST_QUANT)).truncated();
    }
    let quants = quants.as_flattened().as_chunks::<128>().0;
    let (low, rest) = out.split_at_mut(128);
    let (high, tail) = rest.split_at_mut(64);
    for ((quants, low), high) in quants.iter().zip(low.as_chunks_mut::<64>().0).zip(high.as_chunks_mut::<32>().0) {
        for at in 0..64 {
            low[at] = (quants[at] & 15) | quants[at + 64] << 4;
        }
        for at in 0..32 {
            high[at] =
                quants[at] >> 4 | quants[at + 32] >> 4 << 2 | quants[at + 64] >> 4 << 4 | quants[at + 96] >> 4 << 6;
        }
    }
    for (byte, unit) in tail.iter_mut().zip(units) {
        *byte = unit as i32 as u8;
    }
    tail[LANES..].copy_from_slice(&half.to_le_bytes());
}
