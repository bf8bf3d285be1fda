//! The decoding kernel on every instruction set and cache format, against plain attention in f64 over the rows as they
//! are stored.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // sizes of tests fit any float

use std::ops::Range;

use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::decode::{plain_row_weights, ranges};
use adaptive_kvcache::backend::HeadCache;
use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::kernels::attend::{HeadRows, attend_range, row_weights};
use adaptive_kvcache::kernels::simd::InstructionSet;
use adaptive_kvcache::kernels::vector::{MAX_HEAD_DIM, instruction_set, merge_partial};
use rand::rngs::StdRng;

use crate::numbers::{assert_close, dot, seeded, softmax, uniform};

/// Scores reach about 5: f32 sums are off by some 1e-6, and weights by that share of themselves.
const FLOAT_TOLERANCE: f64 = 1e-5;

/// Products with quantised rows round queries and weights to 16 bits of the largest of a block: 2^-16 of a score of 5,
/// and of each weight.
const BLOCK_TOLERANCE: f64 = 1e-4;

/// Around the 16 rows of a tile, an odd one for pairs of rows, and more than a block of the kernel.
const LENS: [usize; 9] = [1, 15, 16, 17, 31, 33, 100, 257, 1000];

fn tolerance(dtype: KvDtype) -> f64 {
    if matches!(dtype, KvDtype::F32 | KvDtype::F16) { FLOAT_TOLERANCE } else { BLOCK_TOLERANCE }
}

fn head(dtype: KvDtype, head_dim: usize, len: usize, rng: &mut StdRng) -> HeadCache {
    let mut head = HeadCache::new(head_dim, dtype).unwrap();
    for _ in 0..len {
        let (key, value) = (uniform(rng, head_dim, 2.0), uniform(rng, head_dim, 1.0));
        head.push(&key, &value).unwrap();
    }
    head
}

/// Queries whose scores have a spread of about `spread`.
fn queries(group_size: usize, head_dim: usize, spread: f32, rng: &mut StdRng) -> Vec<f32> {
    uniform(rng, group_size * head_dim, spread / (head_dim as f32).sqrt())
}

/// Plain attention: largest score, sum of exponentials, and normalised output of each query row.
fn plain(queries: &[f32], rows: &HeadRows<'_>, range: Range<usize>) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let head_dim = rows.head_dim();
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    rows.widen_to(&mut keys, &mut values);
    let of_range = |numbers: &[f32]| numbers[range.start * head_dim..range.end * head_dim].to_vec();
    let (keys, values) = (of_range(&keys), of_range(&values));
    let (mut out, mut maxima, mut sums) = (Vec::new(), Vec::new(), Vec::new());
    for query in queries.chunks(head_dim) {
        let scores: Vec<f64> = keys.chunks(head_dim).map(|key| dot(query, key)).collect();
        let weights = softmax(&scores);
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        maxima.push(max);
        sums.push(scores.iter().map(|score| (score - max).exp()).sum());
        let mut row = vec![0.0; head_dim];
        for (weight, value) in weights.iter().zip(values.chunks(head_dim)) {
            row.iter_mut().zip(value).for_each(|(out, &value)| *out += weight * f64::from(value));
        }
        out.extend(row);
    }
    (maxima, sums, out)
}

/// Runs the kernel: largest score and sum of each query row, and the unnormalised output.
fn run(set: InstructionSet, queries: &[f32], rows: &HeadRows<'_>, range: Range<usize>) -> (Vec<(f32, f32)>, Vec<f32>) {
    // What is there before must not matter.
    let mut out = vec![f32::NAN; queries.len()];
    let mut max_and_sum = vec![(f32::NAN, f32::NAN); queries.len() / rows.head_dim()];
    attend_range(set, *rows, range, queries, &mut out, &mut max_and_sum);
    (max_and_sum, out)
}

fn normalised(max_and_sum: &[(f32, f32)], out: &[f32]) -> Vec<f32> {
    let head_dim = out.len() / max_and_sum.len();
    let rows = out.chunks(head_dim).zip(max_and_sum);
    rows.flat_map(|(row, (_, sum))| row.iter().map(move |number| number / sum)).collect()
}

#[track_caller]
fn check(case: &str, queries: &[f32], rows: &HeadRows<'_>, range: Range<usize>, tolerance: f64) {
    let (maxima, sums, expected) = plain(queries, rows, range.clone());
    for set in InstructionSet::available() {
        let (max_and_sum, out) = run(set, queries, rows, range.clone());
        let case = format!("{case}, {set:?}, rows {range:?} of {} x {}", rows.len(), rows.head_dim());
        let (got_maxima, got_sums): (Vec<f32>, Vec<f32>) = max_and_sum.iter().copied().unzip();
        assert_close(&format!("largest score, {case}"), &got_maxima, &maxima, tolerance);
        assert_close(&format!("sum, {case}"), &got_sums, &sums, tolerance);
        assert_close(&format!("output, {case}"), &normalised(&max_and_sum, &out), &expected, tolerance);
    }
}

#[test]
fn attention_over_every_length_group_and_dimension() {
    for dtype in KvDtype::ALL {
        for head_dim in [8, 64, 80, 128].into_iter().filter(|&head_dim| dtype.check(head_dim).is_ok()) {
            for len in LENS {
                let rng = &mut seeded((len * head_dim) as u64);
                let head = head(dtype, head_dim, len, rng);
                for group_size in [1, 2, 3, 4, 5, 8] {
                    let queries = queries(group_size, head_dim, 2.0, rng);
                    let case = format!("{dtype:?}, group of {group_size}");
                    check(&case, &queries, &head.rows(), 0..len, tolerance(dtype));
                }
            }
        }
    }
}

#[test]
fn attention_over_rows_of_uncommon_dimensions() {
    for dtype in KvDtype::ALL {
        for head_dim in [1, 7, 31, 33, 96, 160, 448, MAX_HEAD_DIM].into_iter().filter(|&dim| dtype.check(dim).is_ok()) {
            let rng = &mut seeded(head_dim as u64);
            let head = head(dtype, head_dim, 150, rng);
            let queries = queries(3, head_dim, 2.0, rng);
            check(&format!("{dtype:?}"), &queries, &head.rows(), 0..150, tolerance(dtype));
        }
    }
}

/// Ranges begin at a tile and end anywhere; merged, they are the whole.
#[test]
fn attention_over_ranges_and_their_merging() {
    for dtype in KvDtype::ALL {
        for len in [40, 257] {
            let rng = &mut seeded(len as u64);
            let head = head(dtype, 64, len, rng);
            let queries = queries(3, 64, 2.0, rng);
            for start in [0, 16, 32] {
                for end in (start + 1..=len).filter(|end| end % 5 == 0 || *end + 20 > len) {
                    check(&format!("{dtype:?}"), &queries, &head.rows(), start..end, tolerance(dtype));
                }
            }
            let (_, _, expected) = plain(&queries, &head.rows(), 0..len);
            for set in InstructionSet::available() {
                for cut in [16, 32] {
                    let mut parts =
                        [run(set, &queries, &head.rows(), 0..cut), run(set, &queries, &head.rows(), cut..len)];
                    for _ in 0..2 {
                        let [(mut merged, mut out), (other, other_out)] = parts.clone();
                        for (group, out) in out.chunks_mut(64).enumerate() {
                            let other_out = &other_out[group * 64..(group + 1) * 64];
                            merge_partial(&mut merged[group], out, other[group], other_out);
                        }
                        let case = format!("{dtype:?}, {set:?}, {len} rows cut at {cut}");
                        assert_close(&case, &normalised(&merged, &out), &expected, tolerance(dtype));
                        parts.reverse();
                    }
                }
            }
        }
    }
}

/// The largest score comes late, or early, or is the only one that counts; differences are beyond what `exp` can say.
#[test]
fn scores_of_large_magnitude() {
    const LEN: usize = 500;
    // The scores' own rounding, which exponentials enlarge: 1e-7 (1e-5 in blocks) of 3000.
    const LARGE_TOLERANCE: [f64; 2] = [2e-3, 0.1];
    for dtype in KvDtype::ALL {
        for (what, height) in [
            ("rising", &(|row: usize| row as f32 / LEN as f32) as &dyn Fn(usize) -> f32),
            ("falling", &|row| 1.0 - row as f32 / LEN as f32),
            ("late peak", &|row| if row == LEN - 2 { 1.0 } else { -1.0 }),
            ("early peak", &|row| if row == 1 { 1.0 } else { -1.0 }),
        ] {
            for scale in [30.0, 3000.0] {
                let rng = &mut seeded(1);
                let mut head = HeadCache::new(32, dtype).unwrap();
                for row in 0..LEN {
                    head.push(&[height(row); 32], &uniform(rng, 32, 1.0)).unwrap();
                }
                let queries = [[scale / 32.0; 32], [-scale / 32.0; 32]].concat();
                let case = format!("{dtype:?}, {what}, scores to {scale}");
                let exact = usize::from(tolerance(dtype) > FLOAT_TOLERANCE);
                check(&case, &queries, &head.rows(), 0..LEN, LARGE_TOLERANCE[exact]);
            }
        }
    }
}

/// A number that is none must not vanish in a maximum or a rounding: it spoils the result for all to see.
#[test]
fn what_is_not_a_number_stays_none() {
    for dtype in KvDtype::ALL {
        for len in [16, 17, 40] {
            for row in [0, len - 1] {
                for (in_query, in_key, in_value) in [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)] {
                    let spoil = |numbers: &mut [f32], share: f32| {
                        if share > 0.0 {
                            numbers[5] = f32::NAN;
                        }
                    };
                    let rng = &mut seeded(3);
                    let mut head = HeadCache::new(32, dtype).unwrap();
                    for position in 0..len {
                        let (mut key, mut value) = (uniform(rng, 32, 1.0), uniform(rng, 32, 1.0));
                        if position == row {
                            spoil(&mut key, in_key);
                            spoil(&mut value, in_value);
                        }
                        head.push(&key, &value).unwrap();
                    }
                    let mut queries = queries(2, 32, 1.0, rng);
                    spoil(&mut queries, in_query);
                    for set in InstructionSet::available() {
                        let (max_and_sum, out) = run(set, &queries, &head.rows(), 0..len);
                        let normalised = normalised(&max_and_sum, &out);
                        let case = format!("{dtype:?}, {set:?}, row {row} of {len}: {in_query} {in_key} {in_value}");
                        assert!(normalised[5].is_nan(), "{case}");
                    }
                }
            }
        }
    }
}

/// What a prompt left is in other numbers than what came later: ranges are of one or of the other, and their rows are
/// counted from the first of each.
#[test]
fn ranges_of_rows_in_two_kinds_of_numbers() {
    for (num_settled, num_newest) in [(37, 50), (16, 1), (600, 40), (1, 16)] {
        let mut rng = seeded(7);
        let mut head = HeadCache::new(64, KvDtype::Mixed).unwrap();
        head.settle(num_settled);
        for row in 0..num_settled + num_newest {
            let (key, value) = (uniform(&mut rng, 64, 1.0), uniform(&mut rng, 64, 1.0));
            if row < num_settled { head.push_settled(&key, &value) } else { head.push(&key, &value) }.unwrap();
        }
        assert_eq!((head.rows().num_settled(), head.len()), (num_settled, num_settled + num_newest));
        let queries = uniform(&mut rng, 3 * 64, 0.3);
        let cut: Vec<_> = ranges(num_settled, head.len()).collect();
        assert!(cut.iter().any(|range| range.start == num_settled), "{cut:?}");
        assert_eq!(cut.iter().cloned().flatten().collect::<Vec<_>>(), (0..head.len()).collect::<Vec<_>>());
        for range in cut {
            check("mixed", &queries, &head.rows(), range, tolerance(KvDtype::Mixed));
        }
        let layout = HeadLayout { num_heads: 3, num_kv_heads: 1, head_dim: 64 };
        let unscaled: Vec<f32> = queries.iter().map(|query| query / layout.scale()).collect();
        let expected = plain_row_weights(layout, &unscaled, head.rows()).unwrap();
        let (mut scratch, mut weights) = (Vec::new(), Vec::new());
        row_weights(instruction_set(), head.rows(), &queries, &mut scratch, &mut weights);
        assert!(weights.iter().zip(&expected).all(|(weight, expected)| (weight - expected).abs() < 1e-4));
    }
}

/// Weights of rows, by which some heads tell what they evict.
#[test]
fn row_weights_are_those_of_plain_attention() {
    for dtype in KvDtype::ALL {
        for (head_dim, len) in [(64, 1), (64, 15), (32, 16), (64, 33), (128, 257), (64, 1000)] {
            let rng = &mut seeded((len * head_dim) as u64);
            let head = head(dtype, head_dim, len, rng);
            for group_size in [1, 2, 3, 4, 5, 8] {
                let queries = queries(group_size, head_dim, 2.0, rng);
                let layout = HeadLayout { num_heads: group_size, num_kv_heads: 1, head_dim };
                let unscaled: Vec<f32> = queries.iter().map(|query| query / layout.scale()).collect();
                let expected = plain_row_weights(layout, &unscaled, head.rows()).unwrap();
                assert!((expected.iter().sum::<f32>() - group_size as f32).abs() < 1e-4);
                let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
                for set in InstructionSet::available() {
                    let (mut scratch, mut weights) = (vec![f32::NAN; 7], vec![f32::NAN; 3]);
                    row_weights(set, head.rows(), &queries, &mut scratch, &mut weights);
                    let case = format!("{dtype:?}, {set:?}, {group_size} query rows, {len} x {head_dim}");
                    assert_close(&case, &weights, &expected, tolerance(dtype));
                }
            }
        }
    }
    let layout = HeadLayout { num_heads: 2, num_kv_heads: 1, head_dim: 8 };
    let head = head(KvDtype::F32, 8, 3, &mut seeded(1));
    assert!(plain_row_weights(layout, &[0.0; 8], head.rows()).is_err());
}

/// What prompts read of a cache: keys as columns, values as rows, bit by bit what one row after the other gives.
#[test]
fn widened_rows_are_those_that_are_stored() {
    let rng = &mut seeded(31);
    for dtype in KvDtype::ALL {
        for head_dim in [32, 64, 96, 128] {
            for (len, newest) in [(0, 0), (1, 3), (16, 0), (37, 21), (64, 16)] {
                let mut head = HeadCache::new(head_dim, dtype).unwrap();
                head.center_keys(&uniform(rng, head_dim, 1.0));
                head.settle(len);
                for _ in 0..len {
                    head.push_settled(&uniform(rng, head_dim, 2.0), &uniform(rng, head_dim, 1.0)).unwrap();
                }
                for _ in 0..newest {
                    head.push(&uniform(rng, head_dim, 2.0), &uniform(rng, head_dim, 1.0)).unwrap();
                }
                let (len, rows) = (len + newest, head.rows());
                let (mut keys, mut values) = (Vec::new(), Vec::new());
                rows.widen_to(&mut keys, &mut values);
                for set in InstructionSet::available() {
                    let case = format!("{dtype:?}, {head_dim}, {len} rows, {set:?}");
                    let stride = len + 5;
                    let mut columns = vec![f32::NAN; stride * head_dim];
                    let mut others = vec![f32::NAN; len * head_dim];
                    rows.widen_keys(set, &mut columns, stride);
                    rows.widen_values(set, &mut others);
                    assert!(others == values, "{case}");
                    for (row, key) in keys.chunks_exact(head_dim).enumerate() {
                        assert!(
                            key.iter().enumerate().all(|(at, &number)| columns[at * stride + row] == number),
                            "{case}"
                        );
                    }
                }
            }
        }
    }
}
