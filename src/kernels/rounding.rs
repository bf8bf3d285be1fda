//! f32 numbers rounded to blocks of weights, as when a model is quantised while it is loaded.
//!
//! `Q8_0`, `Q4_0` and `Q6_K` are those of ggml's reference, byte for byte (`quantize_row_*_ref` in
//! <https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c>); `Q4_K` is searched as there. Every
//! instruction set does the same operations, none of them fused, so that blocks do not depend on it.
//!
//! Not for: caches, which have layouts of their own (see [`super::blocks`]), or computing with blocks.

mod q4_k;
mod q6_k;

use half::f16;
use q4_k::body as q4_k_body;
use q6_k::body as q6_k_body;

use super::simd::{LANES, Lanes, ROUND, multiversion};

/// Numbers of a plain block.
const BLOCK: usize = 32;

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

multiversion! {
    /// Blocks of 210 bytes for 256 numbers, which are finite.
    pub(crate) fn q6_k(numbers: &[f32], out: &mut [u8]) = q6_k_body;
}

#[inline(always)]
fn q8_0_body<L: Lanes>(numbers: &[f32], out: &mut [u8]) {
    /// Just below a half: added to a number before its fraction is cut off, it rounds halves away from zero.
    const HALF: f32 = 0.499_999_97;
    for (numbers, out) in numbers.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<{ BLOCK + 2 }>().0) {
        let [first, second] = vectors::<L>(numbers);
        let scale = first.abs().max(second.abs()).largest() / 127.0;
        let inverse = L::splat(if scale == 0.0 { 0.0 } else { 1.0 / scale });
        let (head, quants) = out.split_at_mut(2);
        head.copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        let quants = quants.as_chunks_mut::<LANES>().0;
        for (quants, numbers) in quants.iter_mut().zip([first, second]) {
            let scaled = numbers.mul(inverse);
            let half = L::splat(0.0).if_above(scaled, L::splat(-HALF), L::splat(HALF));
            *quants = scaled.add(half).truncated();
        }
    }
}

#[inline(always)]
fn q4_0_body<L: Lanes>(numbers: &[f32], out: &mut [u8]) {
    for (numbers, out) in numbers.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<{ BLOCK / 2 + 2 }>().0) {
        let [first, second] = vectors::<L>(numbers);
        let zero = L::splat(0.0);
        let above = first.max(second).largest();
        let below = zero.sub(first).max(zero.sub(second)).largest();
        // The largest, with its sign; of two of the same size the first.
        let largest = if above > below {
            above
        } else if below > above {
            -below
        } else {
            numbers.iter().find(|number| number.abs() == above).copied().unwrap_or(0.0)
        };
        let scale = largest / -8.0;
        let inverse = L::splat(if scale == 0.0 { 0.0 } else { 1.0 / scale });
        let (head, bytes) = out.split_at_mut(2);
        head.copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        let mut quants = [[0; LANES]; 2];
        for (quants, numbers) in quants.iter_mut().zip([first, second]) {
            *quants = numbers.mul(inverse).add(L::splat(8.5)).min(L::splat(15.0)).truncated();
        }
        for (byte, (low, high)) in bytes.iter_mut().zip(quants[0].iter().zip(quants[1])) {
            *byte = low | high << 4;
        }
    }
}

/// A plain block's numbers.
#[inline(always)]
fn vectors<L: Lanes>(numbers: &[f32; BLOCK]) -> [L; 2] {
    let numbers = numbers.as_chunks().0;
    [L::load(&numbers[0]), L::load(&numbers[1])]
}

/// The nearest whole numbers, even ones for halves; what is no number stays none.
///
/// * `numbers`: at most 2^22 in size
#[inline(always)]
fn nearest<L: Lanes>(numbers: L) -> L {
    numbers.add(L::splat(ROUND)).sub(L::splat(ROUND))
}

/// Parts of `N` numbers: the first of each, then the second of each. Lanes without a part are 0.
#[inline(always)]
fn columns_of<L: Lanes, const N: usize>(numbers: &[f32]) -> [L; N] {
    let mut columns = [[0.0; LANES]; N];
    for (lane, part) in numbers.as_chunks::<N>().0.iter().enumerate() {
        for (column, &number) in columns.iter_mut().zip(part) {
            column[lane] = number;
        }
    }
    let mut vectors = [L::splat(0.0); N];
    for (vector, column) in vectors.iter_mut().zip(&columns) {
        *vector = L::load(column);
    }
    vectors
}

/// The numbers in lanes.
#[inline(always)]
fn stored<L: Lanes>(vector: L) -> [f32; LANES] {
    let mut numbers = [0.0; LANES];
    vector.store(&mut numbers);
    numbers
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
        let mut numbers = [0.0_f32; BLOCK];
        numbers[0] = 127.0;
        for (at, number) in numbers[1..].iter_mut().enumerate() {
            *number = [0.5, -0.5, 1.5, -2.5, 126.5, 0.499_999_97, -126.5][at % 7];
        }
        for set in InstructionSet::available() {
            assert_eq!(rounded(set, q8_0, GgmlDType::Q8_0, &numbers), oracle_block(&numbers), "{set:?}");
        }
    }

    fn oracle_block(numbers: &[f32; BLOCK]) -> Vec<u8> {
        let tensor = Tensor::from_slice(numbers, (1, BLOCK), &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, GgmlDType::Q8_0).unwrap().data().unwrap().into_owned()
    }

    /// The numbers of `tests/data/rounding/make.py`.
    #[expect(clippy::cast_precision_loss)] // exact
    fn numbers_of_the_golden_file(blocks: usize) -> Vec<f32> {
        let mut state = 1_u32;
        let mut total = || -> i32 {
            (0..4)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 16).cast_signed() - 32_768
                })
                .sum()
        };
        let mut numbers = Vec::new();
        for (block, at) in (0..blocks).flat_map(|block| (0..256_usize).map(move |at| (block, at))) {
            let (drawn, group) = (total() as f32, at / 16);
            let number = match block {
                4 => 0.0,
                5 => 30_000.0,
                6 if group.is_multiple_of(3) => 0.0,
                7 if group.is_multiple_of(2) => drawn / 4096.0,
                8 => (at % 33) as f32 * 1024.0 - 16_384.0,
                _ => drawn,
            };
            numbers.push(number * [(-21_f32).exp2(), (-36_f32).exp2(), (-15_f32).exp2()][block % 3]);
        }
        numbers
    }

    #[test]
    fn q6_k_equals_ggmls_reference() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/rounding/q6_k.bin");
        let golden = std::fs::read(path).unwrap();
        assert!(golden.len() == 24 * 210);
        let numbers = numbers_of_the_golden_file(24);
        for set in InstructionSet::available() {
            let blocks = rounded(set, q6_k, GgmlDType::Q6K, &numbers);
            for (block, (ours, theirs)) in blocks.chunks(210).zip(golden.chunks(210)).enumerate() {
                assert_eq!(ours, theirs, "{set:?}, block {block}");
            }
        }
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
            // An odd number of blocks.
            let some = rounded(set, q4_k, GgmlDType::Q4K, &numbers[256..1024]);
            assert!(some == first[144..576], "{set:?}");
        }
    }
}
