//! Products in 16 bits against those of floats.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| (0..4).map(|_| rng.random_range(-1.0_f32..1.0)).sum()).collect()
}

/// `scale * left * right` in f64.
fn oracle(left: &[f32], right: &[f32], stride: usize, inner: usize, cols: usize, scale: f32) -> Vec<f64> {
    let rows = left.chunks_exact(inner);
    let sum = |row: &[f32], col: usize| {
        let products = row.iter().enumerate().map(|(at, &x)| f64::from(x) * f64::from(right[at * stride + col]));
        products.sum::<f64>() * f64::from(scale)
    };
    rows.flat_map(|row| (0..cols).map(move |col| sum(row, col))).collect()
}

/// Each factor is off by at most half a step, and steps are at most what the largest number needs. Errors of several
/// terms cancel: by a root of their number on average.
fn check(bits: Bits, [left, right]: [&[f32]; 2], inner: usize, scale: f32, got: &[f32], expected: &[f64], what: &str) {
    let largest = |numbers: &[f32]| numbers.iter().fold(0.0_f32, |most, number| most.max(number.abs()));
    let steps: f32 = bits.limits().map(|limit| 0.51 / f32::from(limit)).iter().sum();
    let of_term = f64::from(largest(left) * largest(right) * steps * scale);
    let terms = (0..inner).map(|_| 1.0).sum::<f64>();
    let errors = got.iter().zip(expected).map(|(got, expected)| f64::from(*got) - expected);
    let [mut squares, mut count] = [0.0; 2];
    for error in errors {
        assert!(error.abs() <= terms * of_term, "{what}: off by {error}, {of_term} for each of {terms}");
        (squares, count) = (squares + error * error, count + 1.0);
    }
    let mean = (squares / count).sqrt();
    assert!(mean <= terms.sqrt() * of_term, "{what}: off by {mean} on average, {of_term} for each of {terms}");
}

#[test]
fn products_equal_those_of_f64() {
    for (rows, inner, cols) in [(1, 1, 1), (7, 64, 32), (42, 128, 333), (5, 80, 31), (9, 3, 17), (15, 577, 64)] {
        let left = numbers(rows * inner, 1);
        let stride = cols + 5;
        let right = numbers(inner * stride, 2);
        let expected = oracle(&left, &right, stride, inner, cols, 0.3);
        for bits in [Bits::Alike, Bits::Left] {
            for by_strips in [true, false] {
                let mut first = None;
                for set in InstructionSet::available() {
                    let mut panels =
                        if by_strips { Panels::of_columns(bits, inner) } else { Panels::of_rows(bits, cols) };
                    let len = if by_strips { cols } else { inner };
                    // A little more each time.
                    for len in [len.div_ceil(3), len.div_ceil(2), len] {
                        panels.extend(set, &right, stride, len);
                        assert_eq!(panels.len(), len);
                    }
                    let mut out = vec![f32::NAN; rows * cols];
                    let product = Product { left: &left, first: 0, inner, scale: 0.3, out: &mut out, cols };
                    panels.multiply(set, product, &mut Buffer::default());
                    let what = format!("{set:?} {bits:?} {rows} x {inner} x {cols}");
                    check(bits, [&left, &right], inner, 0.3, &out, &expected, &what);
                    // All others fuse products and additions.
                    if set != InstructionSet::PORTABLE {
                        assert!(*first.get_or_insert_with(|| out.clone()) == out, "{what}");
                    }
                }
            }
        }
    }
}

/// Fewer rows and columns than the matrix has, as queries see fewer keys than there are.
#[test]
fn parts_of_a_matrix_are_multiplied() {
    let (rows, inner, cols) = (10, 100, 70);
    let (left, right) = (numbers(rows * inner, 3), numbers(inner * cols, 4));
    let set = InstructionSet::detect();
    let mut by_rows = Panels::of_rows(Bits::Left, cols);
    by_rows.extend(set, &right, cols, inner);
    let mut by_columns = Panels::of_columns(Bits::Alike, inner);
    by_columns.extend(set, &right, cols, cols);
    let some = |row: &[f32]| row[..65].to_vec();
    let short: Vec<f32> = left.chunks_exact(inner).flat_map(some).collect();
    for (panels, bits, left, inner, cols_used) in
        [(&by_rows, Bits::Left, &short, 65, 33), (&by_columns, Bits::Alike, &left, inner, 41)]
    {
        let mut out = vec![f32::NAN; rows * cols_used];
        let product = Product { left, first: 0, inner, scale: 1.0, out: &mut out, cols: cols_used };
        panels.multiply(set, product, &mut Buffer::default());
        let expected = oracle(left, &right, cols, inner, cols_used, 1.0);
        check(bits, [left, &right], inner, 1.0, &out, &expected, "a part");
    }
}

/// Later rows and columns alone, as queries with a window see them.
#[test]
fn later_parts_of_a_matrix_are_multiplied() {
    let (rows, inner, cols) = (10, 200, 170);
    let right = numbers(inner * cols, 8);
    let set = InstructionSet::detect();
    let mut by_rows = Panels::of_rows(Bits::Left, cols);
    by_rows.extend(set, &right, cols, inner);
    let mut by_columns = Panels::of_columns(Bits::Alike, inner);
    by_columns.extend(set, &right, cols, cols);
    for first in [0, RUN, 2 * RUN] {
        for (panels, bits, inner_used, cols_used, skipped) in [
            (&by_rows, Bits::Left, 191 - first, 41, first * cols),
            (&by_columns, Bits::Alike, inner, 161 - first, first),
        ] {
            let left = numbers(rows * inner_used, 9);
            let mut out = vec![f32::NAN; rows * cols_used];
            let product = Product { left: &left, first, inner: inner_used, scale: 1.0, out: &mut out, cols: cols_used };
            panels.multiply(set, product, &mut Buffer::default());
            let right = &right[skipped..];
            let expected = oracle(&left, right, cols, inner_used, cols_used, 1.0);
            check(bits, [&left, right], inner_used, 1.0, &out, &expected, "a later part");
        }
    }
}

/// The largest numbers, in all places, fit.
#[test]
fn sums_fit() {
    let (inner, cols) = (3 * RUN, 40);
    for bits in [Bits::Alike, Bits::Left] {
        for sign in [1.0, -1.0] {
            let (left, right) = (vec![5.0; ROWS * inner], vec![3.0 * sign; inner * cols]);
            for set in InstructionSet::available() {
                let mut panels = Panels::of_rows(bits, cols);
                panels.extend(set, &right, cols, inner);
                let mut out = vec![0.0; ROWS * cols];
                let product = Product { left: &left, first: 0, inner, scale: 1.0, out: &mut out, cols };
                panels.multiply(set, product, &mut Buffer::default());
                let expected = left.iter().zip(&right).take(inner).map(|(a, b)| a * b).sum::<f32>();
                assert!(out.iter().all(|number| (number / expected - 1.0).abs() < 1e-6), "{set:?} {bits:?}");
            }
        }
    }
}

/// What is no number stays none, in its row or column only; zeros stay zeros.
#[test]
fn what_is_no_number_stays_none() {
    let (rows, inner, cols) = (8, 70, 35);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for set in InstructionSet::available() {
            let (mut left, mut right) = (numbers(rows * inner, 5), numbers(inner * cols, 6));
            left[2 * inner + 66] = bad;
            left[3 * inner..4 * inner].fill(0.0);
            right[5 * cols + 34] = bad;
            let mut panels = Panels::of_columns(Bits::Alike, inner);
            panels.extend(set, &right, cols, cols);
            let mut out = vec![0.0; rows * cols];
            let product = Product { left: &left, first: 0, inner, scale: 1.0, out: &mut out, cols };
            panels.multiply(set, product, &mut Buffer::default());
            for (at, number) in out.iter().enumerate() {
                let (row, col) = (at / cols, at % cols);
                assert_eq!(number.is_nan(), row == 2 || col == 34, "{set:?} {bad}: {number} at {row}, {col}");
                assert!(row != 3 || col == 34 || *number == 0.0);
            }
        }
    }
}
