//! Random numbers, comparisons and the slow obvious attention in f64 that the oracles share.

#![allow(clippy::cast_precision_loss)] // sizes of tests fit any float

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A generator that gives the same numbers on every run.
pub fn seeded(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// `len` numbers, uniform in `-scale..scale`.
pub fn uniform(rng: &mut StdRng, len: usize, scale: f32) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

pub fn widen(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|&number| f64::from(number)).collect()
}

/// Dot product in f64.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// Softmax in f64.
pub fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

/// The definition of the criterion `max_abs`: the largest difference between a causal map and the softmax over its kept
/// keys alone.
///
/// * `map`: rows of `i + 1` weights
pub fn largest_difference(map: &[Vec<f64>], keep: &[bool]) -> f64 {
    let mut worst = 0.0_f64;
    for row in map {
        let kept = || row.iter().zip(keep).filter(|(_, keep)| **keep).map(|(weight, _)| *weight);
        let mass: f64 = kept().sum();
        if mass > 0.0 {
            worst = kept().fold(worst, |worst, weight| worst.max(weight * (1.0 / mass - 1.0)));
        }
    }
    worst
}

/// Column sums of a causal map over the entries that `counts(row, column)` selects; the last row has all columns.
pub fn column_sums(map: &[Vec<f64>], counts: impl Fn(usize, usize) -> bool) -> Vec<f64> {
    let mut sums = vec![0.0; map.last().map_or(0, Vec::len)];
    for (row, weights) in map.iter().enumerate() {
        for (column, weight) in weights.iter().enumerate().filter(|(column, _)| counts(row, *column)) {
            sums[column] += weight;
        }
    }
    sums
}

/// Asserts `|got - expected| <= tolerance * (1 + |expected|)` for every number; NaN fails.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        // Not `>`: that would let NaN pass.
        let close = error <= tolerance * (1.0 + expected.abs());
        assert!(close, "{what}: number {index} is {got}, expected {expected}: off by {error:e}");
    }
}
