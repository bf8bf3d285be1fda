//! f32 numbers rounded to blocks of weights, as when a model is quantised while it is loaded.
//!
//! `Q8_0` and `Q4_0` are those of ggml's reference, byte for byte. For `Q4_K`, scale and minimum of each 32 numbers are
//! searched as there (`quantize_row_q4_K_ref` in <https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c>):
//! the best of 21 steps, by the squared error weighted with the numbers' sizes. The eight parts of a block are searched at
//! once, a part in each lane.
//!
//! Not for: caches, which have layouts of their own (see [`super::blocks`]), or computing with blocks.

use std::array::from_fn;

use half::f16;

use super::simd::{Lanes, multiversion};

/// Numbers that share a scale.
const PART: usize = 32;
/// Parts of a block of `Q4_K`.
const PARTS: usize = 8;
/// The largest quant of `Q4_K`.
const LARGEST_QUANT: f32 = 15.0;
/// The largest scale or minimum of a part of `Q4_K`, in units of the block's.
const LARGEST_SCALE: f32 = 63.0;
/// How many steps are tried for a part, from its range over 14 to its range over 16.
const TRIES: u8 = 21;
/// Sums of which less is left than this share are rounding errors: the part's numbers are all alike.
const LEAST_SPREAD: f32 = 1e-6;

multiversion! {
    /// Blocks of 34 bytes; the numbers are finite.
    pub(crate) fn q8_0(numbers: &[f32], out: &mut [u8]) = q8_0_body;
}

multiversion! {
    /// Blocks of 18 bytes; the numbers are finite.
    pub(crate) fn q4_0(numbers: &[f32], out: &mut [u8]) = q4_0_body;
}

multiversion! {
    /// Blocks of 144 bytes for 256 numbers, which are finite.
    pub(crate) fn q4_k(numbers: &[f32], out: &mut [u8]) = q4_k_body;
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // at most 127
fn q8_0_body<L: Lanes>(numbers: &[f32], out: &mut [u8]) {
    /// Just below a half: added to a number before its fraction is cut off, it rounds halves away from zero.
    const HALF: f32 = 0.499_999_97;
    for (numbers, out) in numbers.as_chunks::<PART>().0.iter().zip(out.as_chunks_mut::<{ PART + 2 }>().0) {
        let scale = largest(numbers) / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let (head, quants) = out.split_at_mut(2);
        head.copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        for (quant, number) in quants.iter_mut().zip(numbers) {
            let scaled = number * inverse;
            *quant = (scaled + HALF.copysign(scaled)) as i32 as u8;
        }
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // in 0..=16
fn q4_0_body<L: Lanes>(numbers: &[f32], out: &mut [u8]) {
    for (numbers, out) in numbers.as_chunks::<PART>().0.iter().zip(out.as_chunks_mut::<{ PART / 2 + 2 }>().0) {
        // With the sign of the first of that size.
        let largest = largest(numbers);
        let largest = numbers.iter().find(|number| number.abs() == largest).copied().unwrap_or(0.0);
        let scale = largest / -8.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let (head, bytes) = out.split_at_mut(2);
        head.copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        let quants: [i32; PART] = from_fn(|at| ((numbers[at] * inverse + 8.5) as i32).min(15));
        let (low, high) = quants.split_at(PART / 2);
        for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
            *byte = (low | high << 4) as u8;
        }
    }
}

/// The largest size of a number.
#[inline(always)]
fn largest(numbers: &[f32; PART]) -> f32 {
    let mut largest = [0.0_f32; 8];
    for eight in numbers.as_chunks::<8>().0 {
        largest = from_fn(|lane| if eight[lane].abs() > largest[lane] { eight[lane].abs() } else { largest[lane] });
    }
    largest.into_iter().fold(0.0, f32::max)
}

#[inline(always)]
fn q4_k_body<L: Lanes>(numbers: &[f32], out: &mut [u8]) {
    for (numbers, out) in numbers.as_chunks::<{ PART * PARTS }>().0.iter().zip(out.as_chunks_mut::<144>().0) {
        let columns: [[f32; PARTS]; PART] = from_fn(|at| from_fn(|part| numbers[part * PART + at]));
        q4_k_block(&columns, out);
    }
}

/// * `columns`: a number of each part, then the next of each
#[inline(always)]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // at most 63
fn q4_k_block(columns: &[[f32; PARTS]; PART], out: &mut [u8; 144]) {
    let (scales, minima) = scales_and_minima(columns);
    let unit = |of: &[f32; PARTS]| of.iter().copied().fold(0.0, f32::max) / LARGEST_SCALE;
    let units = [unit(&scales), unit(&minima)];
    let in_units = |of: f32, unit: f32| if unit > 0.0 { (of / unit).round().clamp(0.0, LARGEST_SCALE) } else { 0.0 };
    let scales = scales.map(|scale| in_units(scale, units[0]));
    let minima = minima.map(|minimum| in_units(minimum, units[1]));
    let halves = units.map(f16::from_f32);
    let [unit, unit_of_minima] = halves.map(f16::to_f32);

    let (head, quants) = out.split_at_mut(16);
    head[..2].copy_from_slice(&halves[0].to_le_bytes());
    head[2..4].copy_from_slice(&halves[1].to_le_bytes());
    let bytes = &mut head[4..];
    let (scale, minimum) = (scales.map(|scale| scale as u8), minima.map(|minimum| minimum as u8));
    for part in 0..4 {
        // Six bits each of the first four parts, whose two upper bits are those of the others.
        bytes[part] = scale[part] | scale[part + 4] >> 4 << 6;
        bytes[part + 4] = minimum[part] | minimum[part + 4] >> 4 << 6;
        bytes[part + 8] = (scale[part + 4] & 15) | minimum[part + 4] << 4;
    }

    let inverse: [f32; PARTS] = from_fn(|part| {
        let scale = unit * scales[part];
        if scale > 0.0 { 1.0 / scale } else { 0.0 }
    });
    let below: [f32; PARTS] = from_fn(|part| -unit_of_minima * minima[part]);
    for (at, column) in columns.iter().enumerate() {
        let quant = quants_of(column, &below, &inverse).map(|quant| quant as u8);
        for pair in 0..PARTS / 2 {
            quants[pair * PART + at] = quant[2 * pair] | quant[2 * pair + 1] << 4;
        }
    }
}

/// Whole numbers nearest to a number of each part less the part's smallest, in steps.
#[inline(always)]
fn quants_of(column: &[f32; PARTS], smallest: &[f32; PARTS], inverse: &[f32; PARTS]) -> [f32; PARTS] {
    /// No number of this size has a fraction.
    const WHOLE: f32 = 12_582_912.0;
    from_fn(|part| {
        let steps = (column[part] - smallest[part]) * inverse[part];
        let steps = if steps > 0.0 { steps } else { 0.0 };
        let steps = if steps < LARGEST_QUANT { steps } else { LARGEST_QUANT };
        steps + WHOLE - WHOLE
    })
}

/// The scale of each part, and how far its smallest number is below 0.
#[inline(always)]
fn scales_and_minima(columns: &[[f32; PARTS]; PART]) -> ([f32; PARTS], [f32; PARTS]) {
    #[expect(clippy::cast_precision_loss)] // exact
    const COUNT: f32 = PART as f32;
    let (mut low, mut high, mut squares) = ([0.0_f32; PARTS], columns[0], [0.0_f32; PARTS]);
    for column in columns {
        low = from_fn(|part| if column[part] < low[part] { column[part] } else { low[part] });
        high = from_fn(|part| if column[part] > high[part] { column[part] } else { high[part] });
        squares = from_fn(|part| squares[part] + column[part] * column[part]);
    }
    let mean_size = squares.map(|sum| (sum / COUNT).sqrt());
    let weight = |column: &[f32; PARTS]| -> [f32; PARTS] { from_fn(|part| mean_size[part] + column[part].abs()) };
    let weights: [[f32; PARTS]; PART] = from_fn(|at| weight(&columns[at]));
    let (mut sum_w, mut sum_wx) = ([0.0_f32; PARTS], [0.0_f32; PARTS]);
    for (column, weight) in columns.iter().zip(&weights) {
        sum_w = from_fn(|part| sum_w[part] + weight[part]);
        sum_wx = from_fn(|part| sum_wx[part] + weight[part] * column[part]);
    }

    let range: [f32; PARTS] = from_fn(|part| high[part] - low[part]);
    let mut best_scale = range.map(|range| range / LARGEST_QUANT);
    let mut best_min = low;
    let mut best_gain = [f32::NEG_INFINITY; PARTS];
    for step in 0..TRIES {
        let steps = LARGEST_QUANT - 1.0 + 0.1 * f32::from(step);
        let inverse = range.map(|range| if range > 0.0 { steps / range } else { 0.0 });
        let (mut sum_q, mut sum_qq, mut sum_xq) = ([0.0_f32; PARTS], [0.0_f32; PARTS], [0.0_f32; PARTS]);
        for (column, weight) in columns.iter().zip(&weights) {
            let quant = quants_of(column, &low, &inverse);
            let weighted: [f32; PARTS] = from_fn(|part| weight[part] * quant[part]);
            sum_q = from_fn(|part| sum_q[part] + weighted[part]);
            sum_qq = from_fn(|part| sum_qq[part] + weighted[part] * quant[part]);
            sum_xq = from_fn(|part| sum_xq[part] + weighted[part] * column[part]);
        }
        for part in 0..PARTS {
            let (w, wx, q, qq, xq) = (sum_w[part], sum_wx[part], sum_q[part], sum_qq[part], sum_xq[part]);
            let spread = w * qq - q * q;
            if spread <= LEAST_SPREAD * w * qq {
                continue;
            }
            // The line through the quants with the least error; a minimum above 0 cannot be said.
            let (mut scale, mut min) = ((w * xq - wx * q) / spread, (qq * wx - q * xq) / spread);
            if min > 0.0 {
                (scale, min) = (xq / qq, 0.0);
            }
            // By how much the squared error is less than the sum of squares.
            let gain = 2.0 * (scale * xq + min * wx) - (scale * scale * qq + 2.0 * scale * min * q + min * min * w);
            if gain > best_gain[part] {
                (best_gain[part], best_scale[part], best_min[part]) = (gain, scale, min);
            }
        }
    }
    (best_scale, best_min.map(|min| -min))
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ4K, BlockQ8_0, GgmlType};
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::super::simd::InstructionSet;
    use super::*;

    const COLS: usize = 1024;

    /// Rows as weights are, and some that are not.
    fn samples() -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(3);
        let mut numbers: Vec<f32> = (0..64 * COLS)
            .map(|at| {
                let normal: f32 = (0..6).map(|_| rng.random_range(-1.0_f32..1.0)).sum();
                let scale = [0.02, 1e-6, 3.0][at / COLS % 3];
                let outlier = if at % 97 == 0 { 9.0 } else { 1.0 };
                f16::from_f32(normal * scale * outlier).to_f32()
            })
            .collect();
        numbers[..COLS].fill(0.0);
        numbers[COLS..COLS + 256].fill(0.5);
        numbers[COLS + 256..COLS + 512].fill(-0.25);
        numbers[COLS + 512..COLS + 768].iter_mut().for_each(|number| *number = number.abs() + 1.0);
        numbers
    }

    fn rounded(
        set: InstructionSet,
        round: fn(InstructionSet, &[f32], &mut [u8]),
        dtype: GgmlDType,
        numbers: &[f32],
    ) -> Vec<u8> {
        let mut out = vec![0; numbers.len() / dtype.block_size() * dtype.type_size()];
        round(set, numbers, &mut out);
        out
    }

    /// candle's, which equal ggml's reference.
    fn oracle(dtype: GgmlDType, numbers: &[f32]) -> Vec<u8> {
        let tensor = Tensor::from_slice(numbers, (numbers.len() / COLS, COLS), &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, dtype).unwrap().data().unwrap().into_owned()
    }

    #[test]
    fn plain_blocks_equal_the_reference() {
        let numbers = samples();
        for set in InstructionSet::available() {
            assert!(rounded(set, q8_0, BlockQ8_0::DTYPE, &numbers) == oracle(GgmlDType::Q8_0, &numbers), "{set:?}");
            assert!(rounded(set, q4_0, BlockQ4_0::DTYPE, &numbers) == oracle(GgmlDType::Q4_0, &numbers), "{set:?}");
        }
    }

    #[test]
    fn halves_are_rounded_away_from_zero() {
        let mut numbers = [0.0_f32; PART];
        numbers[0] = 127.0;
        for (at, number) in numbers[1..].iter_mut().enumerate() {
            *number = [0.5, -0.5, 1.5, -2.5, 126.5, 0.499_999_97, -126.5][at % 7];
        }
        for set in InstructionSet::available() {
            assert_eq!(rounded(set, q8_0, GgmlDType::Q8_0, &numbers), oracle_block(&numbers), "{set:?}");
        }
    }

    fn oracle_block(numbers: &[f32; PART]) -> Vec<u8> {
        let tensor = Tensor::from_slice(numbers, (1, PART), &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, GgmlDType::Q8_0).unwrap().data().unwrap().into_owned()
    }

    fn widened_q4_k(data: Vec<u8>, count: usize) -> Vec<f32> {
        let storage = candle_core::quantized::QStorage::from_data(data.into(), &Device::Cpu, BlockQ4K::DTYPE).unwrap();
        let tensor = QTensor::new(storage, (count / COLS, COLS)).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn error(row: &[f32], wide: &[f32]) -> f64 {
        row.iter().zip(wide).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    }

    /// candle's search with weights of 1 is finer (37 steps, and scales refined), and many times as slow.
    #[test]
    fn q4_k_is_as_good_as_a_longer_search() {
        /// Of the root of the mean squared error to the finer one's; measured: 1.012 at most.
        const MOST: f64 = 1.03;
        let numbers = samples();
        let tensor = Tensor::from_slice(&numbers, (numbers.len() / COLS, COLS), &Device::Cpu).unwrap();
        let fine = QTensor::quantize_imatrix(&tensor, &[1.0; COLS], GgmlDType::Q4K).unwrap();
        let fine = widened_q4_k(fine.data().unwrap().into_owned(), numbers.len());
        let first = rounded(InstructionSet::PORTABLE, q4_k, GgmlDType::Q4K, &numbers);
        let wide = widened_q4_k(first.clone(), numbers.len());
        for kind in 0..3 {
            // Rows of one size of numbers.
            let of_kind = |wide: &[f32]| -> f64 {
                let rows = numbers.chunks(COLS).zip(wide.chunks(COLS)).skip(3 + kind).step_by(3);
                rows.map(|(numbers, wide)| error(numbers, wide)).sum::<f64>().sqrt()
            };
            let (ours, theirs) = (of_kind(&wide), of_kind(&fine));
            assert!(ours <= MOST * theirs, "{kind}: {ours} against {theirs}");
        }
        // Blocks of equal numbers, and of numbers that are all far from 0.
        assert!(wide[..COLS].iter().all(|&number| number == 0.0));
        for (wide, number) in wide[COLS..COLS + 768].iter().zip(&numbers[COLS..]) {
            assert!((wide - number).abs() < 0.02 * number.abs() + 0.02, "{wide} for {number}");
        }
        for set in InstructionSet::available() {
            assert!(rounded(set, q4_k, GgmlDType::Q4K, &numbers) == first, "{set:?}");
        }
    }
}
