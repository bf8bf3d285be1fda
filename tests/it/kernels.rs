//! Kernels on every instruction set of this processor, against plain loops in f64.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // sizes of tests fit any float

use std::sync::Arc;

use adaptive_kvcache::Error;
use adaptive_kvcache::kernels::element::Element;
use adaptive_kvcache::kernels::quant::{Compute, Inputs, SharedBytes, WeightFormat, WeightMatrix};
use adaptive_kvcache::kernels::simd::InstructionSet;
use adaptive_kvcache::kernels::vector;
use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rand::RngCore;
use rand::rngs::StdRng;

use crate::numbers::{assert_close, dot, seeded, softmax, uniform, widen};

/// Around the 32 lanes of a kernel, and more than one round of them.
const LENS: [usize; 8] = [0, 1, 7, 31, 32, 33, 100, 1000];

/// Sums of up to 1000 products below 1 in 32 partial sums: some 32 roundings of 6e-8 each.
const SUM_TOLERANCE: f64 = 1e-5;

/// `exp` promises about two units in the last place: 2 x 1.2e-7.
const EXP_TOLERANCE: f64 = 2.5e-7;

/// A weight is one `exp` over a sum of them, after a few roundings.
const WEIGHT_TOLERANCE: f64 = 1e-6;

/// The result of `exp` below this is 0: it would leave the normal numbers.
const LEAST_EXPONENT: f64 = -87.3;

fn for_every_set(check: impl Fn(InstructionSet)) {
    let sets = InstructionSet::available();
    assert_eq!(sets[0], InstructionSet::PORTABLE);
    assert_eq!(sets.last(), Some(&InstructionSet::detect()));
    assert_eq!(vector::instruction_set(), InstructionSet::detect());
    sets.into_iter().for_each(check);
}

#[test]
fn dot_products() {
    for_every_set(|set| {
        for len in LENS {
            let rng = &mut seeded(len as u64);
            let (a, b) = (uniform(rng, len, 1.0), uniform(rng, len, 1.0));
            let case = format!("{set:?}, {len}");
            assert_close(&case, &[vector::dot(set, &a, &b)], &[dot(&a, &b)], SUM_TOLERANCE);
            let longer = [&b[..], &[f32::NAN; 40]].concat();
            assert_close(&case, &[vector::dot(set, &a, &longer)], &[dot(&a, &b)], SUM_TOLERANCE);
            assert_close(&case, &[vector::dot(set, &longer, &a)], &[dot(&a, &b)], SUM_TOLERANCE);
        }
    });
}

fn check_stored<T: Element>(set: InstructionSet, len: usize, tolerance: f64) {
    let rng = &mut seeded(len as u64 + 1);
    let (x, weights) = (uniform(rng, len, 1.0), uniform(rng, len, 1.0));
    let stored: Vec<T> = weights.iter().map(|&value| T::narrow(value)).collect();
    let exact: Vec<f32> = stored.iter().map(|value| value.widen()).collect();
    let case = format!("{set:?}, {len} of {}", std::any::type_name::<T>());
    for (&exact, &weight) in exact.iter().zip(&weights) {
        assert!(f64::from((exact - weight).abs()) <= tolerance * f64::from(weight.abs()), "{case}: {exact} {weight}");
    }
    let mut wide = vec![f32::NAN; len];
    vector::widen(set, &stored, &mut wide);
    assert_eq!(wide, exact, "{case}");
    assert_close(&case, &[vector::dot_stored(set, &x, &stored)], &[dot(&x, &exact)], SUM_TOLERANCE);
    let longer = [&x[..], &[f32::NAN; 40]].concat();
    assert_close(&case, &[vector::dot_stored(set, &longer, &stored)], &[dot(&x, &exact)], SUM_TOLERANCE);
}

/// Rows of every length up to several rounds of the lanes, so that every kind of rest occurs.
#[test]
fn products_with_stored_numbers() {
    for_every_set(|set| {
        for len in (0..140).chain([1000, 1023]) {
            check_stored::<f32>(set, len, 0.0);
            check_stored::<f16>(set, len, 1.0 / 2048.0);
            check_stored::<bf16>(set, len, 1.0 / 256.0);
        }
    });
}

/// Every number of the formats, infinities and subnormal ones included, is widened to what it means.
#[test]
fn every_stored_number_is_widened_exactly() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let brains: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let expected = [
        halves.iter().map(|value| value.to_f32()).collect::<Vec<f32>>(),
        brains.iter().map(|value| value.to_f32()).collect(),
    ];
    for_every_set(|set| {
        let mut got = [vec![0.0; halves.len()], vec![0.0; brains.len()]];
        vector::widen(set, &halves, &mut got[0]);
        vector::widen(set, &brains, &mut got[1]);
        for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
            assert!(got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()), "{got} {expected}");
        }
    });
}

#[test]
fn sums_and_maxima() {
    for_every_set(|set| {
        for len in LENS {
            let rng = &mut seeded(len as u64);
            let (row, other) = (uniform(rng, len, 1.0), uniform(rng, len, 1.0));
            let case = format!("{set:?}, {len}");

            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(vector::max(set, &row), largest, "{case}");
            for at in [0, len / 2, len.saturating_sub(1)].into_iter().filter(|&at| at < len) {
                let mut peaked = row.clone();
                peaked[at] = 7.0;
                assert_eq!(vector::max(set, &peaked), 7.0, "{case}, peak at {at}");
                peaked[at] = f32::NAN;
                let rest = peaked.iter().copied().filter(|value| !value.is_nan()).fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(vector::max(set, &peaked), rest, "{case}, NaN at {at}");
            }

            let mut sums = other.clone();
            vector::add_assign(set, &mut sums, &row);
            let expected: Vec<f32> = other.iter().zip(&row).map(|(a, b)| a + b).collect();
            assert_eq!(sums, expected, "{case}");
            let mut longer = [&other[..], &[5.0; 3]].concat();
            vector::add_assign(set, &mut longer, &row);
            assert_eq!(longer, [&expected[..], &[5.0; 3]].concat(), "{case}: only what both have");

            let weights: Vec<f32> = row.iter().map(|value| value.abs()).collect();
            let masks: [Vec<f32>; 3] = [
                vec![0.0; len],
                vec![1.0; len],
                other.iter().map(|&value| if value > 0.0 { 1.0 } else { 0.0 }).collect(),
            ];
            let (sum, largest) = vector::sum_and_max(set, &weights);
            assert_close(&case, &[sum], &[widen(&weights).iter().sum()], SUM_TOLERANCE);
            assert_eq!(largest, weights.iter().copied().fold(0.0, f32::max), "{case}");
            for mask in &masks {
                let kept: Vec<f32> = weights.iter().zip(mask).filter(|(_, m)| **m == 1.0).map(|(w, _)| *w).collect();
                let longer = [&mask[..], &[1.0; 35]].concat();
                for mask in [mask, &longer] {
                    let (sum, largest) = vector::masked_sum_and_max(set, &weights, mask);
                    assert_close(&case, &[sum], &[widen(&kept).iter().sum()], SUM_TOLERANCE);
                    assert_eq!(largest, kept.iter().copied().fold(0.0, f32::max), "{case}");
                }
            }
        }
    });
}

#[test]
fn sums_of_scaled_rows() {
    for_every_set(|set| {
        for len in LENS {
            for (num_rows, stride) in [(0, len), (1, len), (3, len + 5), (9, len + 32)] {
                let rng = &mut seeded(len as u64);
                let (rows, scales) = (uniform(rng, num_rows * stride, 1.0), uniform(rng, num_rows, 1.0));
                let mut got = vec![f32::NAN; len];
                vector::scaled_column_sums(set, &rows, stride, &scales, &mut got);
                let sum = |column: usize| {
                    let terms =
                        (0..num_rows).map(|row| f64::from(rows[row * stride + column]) * f64::from(scales[row]));
                    terms.sum::<f64>()
                };
                let expected: Vec<f64> = (0..len).map(sum).collect();
                assert_close(&format!("{set:?}, {num_rows} x {len}"), &got, &expected, SUM_TOLERANCE);
            }
        }
    });
}

#[test]
fn the_root_mean_square_norm() {
    for_every_set(|set| {
        for len in LENS {
            for (scale, eps) in [(1.0, 1e-5), (1e-4, 1e-5), (100.0, 1e-6), (0.0, 1e-5)] {
                let rng = &mut seeded(len as u64);
                let row: Vec<f32> = uniform(rng, len, 1.0).iter().map(|value| value * scale).collect();
                let weight = uniform(rng, len, 2.0);
                let mut got = row.clone();
                vector::rms_norm(set, &mut got, &weight, eps);
                let root = (dot(&row, &row) / len as f64 + f64::from(eps)).sqrt();
                let expected: Vec<f64> =
                    row.iter().zip(&weight).map(|(&x, &w)| f64::from(x) * f64::from(w) / root).collect();
                assert_close(&format!("{set:?}, {len} of {scale}"), &got, &expected, SUM_TOLERANCE);
            }
        }
    });
}

#[test]
fn exponentials_are_accurate_over_their_whole_range() {
    for_every_set(|set| {
        let range: Vec<f32> = (0..=1_000_000).map(|step| -100.0 * step as f32 / 1e6).collect();
        for x in range.chunks(1000) {
            let mut powers = x.to_vec();
            let sum = vector::exp_minus_max(set, &mut powers, 0.0);
            let exact: Vec<f64> = widen(x).into_iter().map(f64::exp).collect();
            for ((&x, &got), exact) in x.iter().zip(&powers).zip(&exact) {
                if f64::from(x) > LEAST_EXPONENT + 1e-5 {
                    assert!((f64::from(got) / exact - 1.0).abs() <= EXP_TOLERANCE, "{set:?}: exp({x}) = {got:e}");
                } else if f64::from(x) < LEAST_EXPONENT - 1e-5 {
                    assert_eq!(got, 0.0, "{set:?}: exp({x})");
                }
            }
            assert_close(&format!("{set:?}, sum from {}", x[0]), &[sum], &[exact.iter().sum()], SUM_TOLERANCE);
        }

        let mut extremes = [0.0, -0.0, -f32::MIN_POSITIVE, -1e9, f32::MIN, f32::NEG_INFINITY];
        assert_eq!(vector::exp_minus_max(set, &mut extremes, 0.0), 3.0, "{set:?}");
        assert_eq!(extremes, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], "{set:?}");
    });
}

#[test]
fn exponentials_are_relative_to_the_given_maximum() {
    for_every_set(|set| {
        for len in LENS {
            let row = uniform(&mut seeded(len as u64), len, 20.0);
            let max = 25.0_f32;
            let expected: Vec<f64> = row.iter().map(|&value| f64::from(value - max).exp()).collect();
            let mut got = row.clone();
            let sum = vector::exp_minus_max(set, &mut got, max);
            assert_close(&format!("{set:?}, {len}"), &[sum], &[expected.iter().sum()], SUM_TOLERANCE);
            for (got, expected) in got.iter().zip(expected) {
                assert!((f64::from(*got) / expected - 1.0).abs() <= EXP_TOLERANCE, "{set:?}, {len}");
            }
        }
    });
}

#[test]
fn softmax_of_ordinary_and_extreme_rows() {
    for_every_set(|set| {
        for len in LENS {
            let rng = &mut seeded(len as u64);
            let shifted = |rng: &mut StdRng, by: f32| -> Vec<f32> {
                uniform(rng, len, 5.0).into_iter().map(|value| value + by).collect()
            };
            let rows = [
                uniform(rng, len, 1.0),
                uniform(rng, len, 50.0), // part of it vanishes
                shifted(rng, -1e4),
                shifted(rng, 1e4),
                vec![0.0; len],
                vec![-3e38; len],
                vec![3e38; len],
                (0..len).map(|index| if index + 1 == len { 0.0 } else { f32::NEG_INFINITY }).collect(),
            ];
            for row in rows {
                let mut got = row.clone();
                vector::softmax(set, &mut got);
                let case = format!("{set:?}, {len}, {:?}", row.first());
                assert_close(&case, &got, &softmax(&widen(&row)), WEIGHT_TOLERANCE);
                if len > 0 {
                    assert_close(&case, &[widen(&got).iter().sum::<f64>() as f32], &[1.0], WEIGHT_TOLERANCE);
                }
            }
        }
    });
}

#[test]
fn the_gated_activation_of_ordinary_and_extreme_gates() {
    let silu = |gate: f32| f64::from(gate) / (1.0 + (-f64::from(gate)).exp());
    for_every_set(|set| {
        for len in LENS {
            let rng = &mut seeded(len as u64);
            let (gate, up) = (uniform(rng, len, 12.0), uniform(rng, len, 3.0));
            let expected: Vec<f64> = gate.iter().zip(&up).map(|(&gate, &up)| silu(gate) * f64::from(up)).collect();
            let mut got = up.clone();
            vector::silu_mul(set, &gate, &mut got);
            assert_close(&format!("{set:?}, {len}"), &got, &expected, WEIGHT_TOLERANCE);
        }
        let gates = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, 1e4, -1e4, 3e38, -3e38];
        let mut got = [1.0; 12];
        vector::silu_mul(set, &gates, &mut got);
        assert_close(&format!("{set:?}, extremes"), &got, &gates.map(silu), WEIGHT_TOLERANCE);
        assert!(got.iter().all(|value| value.is_finite()), "{set:?}: {got:?}");
    });
}

#[test]
fn merging_ranges_whose_scores_are_far_apart() {
    for (a, b) in [((1000.0, 2.0), (-1000.0, 5.0)), ((-3e38, 5.0), (3e38, 2.0))] {
        let (mut merged, mut out) = (a, [2.0, 4.0]);
        vector::merge_partial(&mut merged, &mut out, b, &[1.0, 3.0]);
        assert_eq!(merged, (a.0.max(b.0), 2.0));
        assert_eq!(out, if a.0 > b.0 { [2.0, 4.0] } else { [1.0, 3.0] });
    }
    let (mut merged, mut out) = ((3.0, 1.0), [1.0, 2.0]);
    vector::merge_partial(&mut merged, &mut out, (3.0, 2.0), &[10.0, 20.0]);
    assert_eq!((merged, out), ((3.0, 3.0), [11.0, 22.0]));
}

/// Formats whose blocks are widened to f32: products are those with dequantised weights.
const SMALL_FORMATS: [WeightFormat; 11] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::BF16,
    WeightFormat::Q4_0,
    WeightFormat::Q4_1,
    WeightFormat::Q5_0,
    WeightFormat::Q5_1,
    WeightFormat::Q8_0,
    WeightFormat::Q8_1,
    WeightFormat::Iq4Nl,
    WeightFormat::Mxfp4,
];

/// Formats in blocks of 256, for which `matvec` rounds the activations to 8 bits.
const LARGE_FORMATS: [WeightFormat; 7] = [
    WeightFormat::Q2K,
    WeightFormat::Q3K,
    WeightFormat::Q4K,
    WeightFormat::Q5K,
    WeightFormat::Q6K,
    WeightFormat::Q8K,
    WeightFormat::Iq4Xs,
];

/// Error of a product, relative to `1 + product`: f32 sums of up to 1024 products below 2.
const EXACT_PRODUCT_TOLERANCE: f64 = 1e-4;

/// Error of a product with rounded activations, relative to the norm of the row of weights. Activations in -1..1.5 are
/// off by up to 1.5/127/2 = 0.006, 0.0034 in the mean square, so that this is six standard deviations.
const ROUNDED_PRODUCT_TOLERANCE: f64 = 2e-2;

/// One unit in the last place of f32, for a number that is made by one multiplication and one addition, fused or not.
const DEQUANTIZE_TOLERANCE: f64 = 2.5e-7;

/// A matrix of random blocks in a format that candle does not have, and its numbers; that they are those of gguf-py is tested
/// beside the kernels.
fn coded(dtype: WeightFormat, rows: usize, cols: usize, seed: u64) -> (WeightMatrix, Vec<f32>) {
    let mut bytes = vec![0_u8; rows * cols / dtype.block_size() * dtype.block_bytes()];
    seeded(seed).fill_bytes(&mut bytes);
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        match dtype {
            WeightFormat::Mxfp4 => block[0] = 125,
            WeightFormat::Iq4Nl => block[..2].copy_from_slice(&f16::from_f32(0.01).to_le_bytes()),
            _ => block[..2].copy_from_slice(&f16::from_f32(0.000_4).to_le_bytes()),
        }
    }
    let len = bytes.len();
    let matrix = WeightMatrix::new(Arc::new(bytes), 0..len, dtype, rows, cols).unwrap();
    let mut numbers = vec![f32::NAN; rows * cols];
    matrix.dequantize_rows(0..rows, &mut numbers);
    assert!(numbers.iter().all(|number| number.abs() < 2.0));
    (matrix, numbers)
}

/// A matrix of random weights in a block format, and the numbers that candle reads from it.
fn quantized(dtype: WeightFormat, rows: usize, cols: usize, seed: u64) -> (WeightMatrix, Vec<f32>) {
    let Some(candle) = dtype.candle() else { return coded(dtype, rows, cols, seed) };
    let weights = uniform(&mut seeded(seed), rows * cols, 1.0);
    let weights = Tensor::from_vec(weights, (rows, cols), &Device::Cpu).unwrap();
    let tensor = QTensor::quantize(&weights, candle).unwrap();
    let numbers = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let bytes = tensor.data().unwrap().into_owned();
    let len = bytes.len();
    let matrix = WeightMatrix::new(Arc::new(bytes), 0..len, dtype, rows, cols).unwrap();
    assert_eq!((matrix.rows(), matrix.cols(), matrix.dtype(), matrix.bytes()), (rows, cols, dtype, len));
    (matrix, numbers)
}

/// Activations that are not centred, so that offsets of blocks count.
fn activations(len: usize, seed: u64) -> Vec<f32> {
    uniform(&mut seeded(seed), len, 1.25).into_iter().map(|value| value + 0.25).collect()
}

/// `X W^T` in f64, `[seq_len, rows]`.
fn naive_product(x: &[f32], weights: &[f32], cols: usize) -> Vec<f64> {
    x.chunks(cols).flat_map(|x| weights.chunks(cols).map(|row| dot(x, row))).collect()
}

fn check_products(dtype: WeightFormat, rows: usize, cols: usize) {
    let (matrix, weights) = quantized(dtype, rows, cols, (rows * cols) as u64);
    let case = |what: &str| format!("{what}, {dtype:?}, {rows} x {cols}");

    for range in [0..rows, 0..1, rows - 1..rows, rows / 3..rows / 2, 0..0] {
        let mut got = vec![f32::NAN; range.len() * cols];
        matrix.dequantize_rows(range.clone(), &mut got);
        let expected = widen(&weights[range.start * cols..range.end * cols]);
        assert_close(&case("dequantised"), &got, &expected, DEQUANTIZE_TOLERANCE);
    }

    let is_float = dtype.block_size() == 1;
    for compute in [Compute::Exact, Compute::Fast] {
        for count in [0, 1, 2, 5, 17, 40] {
            let x = activations(count * cols, 7 + count as u64);
            let expected = naive_product(&x, &weights, cols);
            let mut got = vec![f32::NAN; count * rows];
            matrix.matmul(&Inputs::new(compute, &x, cols), &mut got);
            let what = case(&format!("{compute:?} product of {count}"));
            if count == 1 {
                let mut again = vec![f32::NAN; rows];
                matrix.matvec(compute, &x, &mut again);
                assert_eq!(got, again, "{what}: one row is a matrix-vector product");
            }
            let few = SMALL_FORMATS.contains(&dtype) && count <= matrix.few_rows();
            if compute == Compute::Exact || is_float || few {
                assert_close(&what, &got, &expected, EXACT_PRODUCT_TOLERANCE);
                continue;
            }
            let rows = weights.chunks(cols).cycle();
            for ((got, expected), row) in got.iter().zip(expected).zip(rows) {
                let close = (f64::from(*got) - expected).abs() <= ROUNDED_PRODUCT_TOLERANCE * dot(row, row).sqrt();
                assert!(close, "{what}: {got}, expected {expected}");
            }
        }
    }
}

#[test]
fn products_with_every_format_equal_those_with_candles_own_dequantised_weights() {
    for dtype in SMALL_FORMATS {
        for (rows, cols) in [(1, 32), (7, 96), (33, 320), (100, 576), (250, 1024)] {
            check_products(dtype, rows, cols);
        }
    }
    for dtype in LARGE_FORMATS {
        for (rows, cols) in [(1, 256), (7, 256), (33, 512), (100, 768), (250, 1024)] {
            check_products(dtype, rows, cols);
        }
    }
    // Plain floats need no whole blocks.
    for dtype in [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16] {
        for (rows, cols) in [(1, 1), (5, 7), (40, 33), (33, 129), (70, 1001)] {
            check_products(dtype, rows, cols);
        }
    }
}

#[test]
fn bytes_that_do_not_fit_are_refused() {
    for dtype in SMALL_FORMATS.into_iter().chain(LARGE_FORMATS) {
        let cols = 2 * dtype.block_size();
        let size = 3 * 2 * dtype.block_bytes();
        let owner: SharedBytes = Arc::new(vec![0_u8; size + 16]);
        let address = (*owner).as_ref().as_ptr() as usize;
        let first = address.next_multiple_of(4) - address;
        let matrix = |range, rows, cols| WeightMatrix::new(Arc::clone(&owner), range, dtype, rows, cols);
        assert!(matrix(first..first + size, 3, cols).is_ok(), "{dtype:?}");

        for (what, range, rows, cols) in [
            ("a byte too few", first..first + size - 1, 3, cols),
            ("a byte too many", first..first + size + 1, 3, cols),
            ("another number of rows", first..first + size, 4, cols),
            ("outside of the bytes", first + 20..first + 20 + size, 3, cols),
            ("no columns", first..first, 3, 0),
            ("more rows than any memory", first..first + size, usize::MAX, cols),
        ] {
            assert!(matches!(matrix(range, rows, cols), Err(Error::Shape { .. })), "{dtype:?}: {what}");
        }
        if dtype.block_size() > 1 {
            let result = matrix(first..first + size, 3, cols - 1);
            assert!(matches!(result, Err(Error::Shape { .. })), "{dtype:?}: part of a block");
        }

        let at = |offset: usize| matrix(first + offset..first + offset + size, 3, cols);
        assert!(matches!(at(1), Err(Error::Unsupported { .. })), "{dtype:?}: an odd address");
        let needs_four = matches!(dtype, WeightFormat::F32 | WeightFormat::Q8K);
        assert_eq!(at(2).is_err(), needs_four, "{dtype:?}: an even address");
    }
}
