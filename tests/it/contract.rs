//! Every line of the table of what a backend has to do, compared. The largest error of each is printed (`--nocapture`). A
//! further backend is done when its lines pass.

mod table;

use std::fmt::Display;

use adaptive_kvcache::backend::Embedding;

use crate::numbers::{dot, seeded, uniform};
use table::{EXACT, HIDDEN, Line, Observer, VOCAB, matrix};

/// Compares numbers, relative to the largest; prints and checks the error.
#[track_caller]
fn check(line: impl Display, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{line}");
    let largest = expected.iter().fold(1e-9, |largest: f64, x| largest.max(x.abs()));
    let error = got.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max) / largest;
    println!("{:70} {error:9.1e}", line.to_string());
    assert!(error <= tolerance, "{line}: {error:e}, at most {tolerance:e}");
}

/// Compares.
struct Checks;

impl Observer for Checks {
    fn run<I, O>(&mut self, _: Line, mut input: impl FnMut() -> I, mut operation: impl FnMut(I) -> O) -> O {
        operation(input())
    }

    fn compare(&mut self, line: Line, got: &[f32], expected: impl FnOnce() -> Vec<f64>, tolerance: f64) {
        check(line, got, &expected(), tolerance);
    }
}

#[test]
fn the_kernels_keep_the_contract() {
    table::kernels(&mut Checks);
}

#[test]
fn candle_operations_keep_the_contract() {
    table::candle(&mut Checks);
}

/// The table can fail: numbers that are off by more than the tolerance are found.
#[test]
#[should_panic(expected = "at most")]
fn the_table_finds_a_wrong_number() {
    check("a wrong number", &[1.0, 2.001], &[1.0, 2.0], EXACT);
}

/// Embeddings are looked up in memory, whatever computes.
#[test]
fn tokens_have_their_rows() {
    let mut rng = seeded(1);
    let numbers = uniform(&mut rng, VOCAB * HIDDEN, 1.0);
    let table = Embedding::new(matrix(&numbers, HIDDEN));
    let mut out = Vec::new();
    table.look_up(&[3, 0, 47], &mut out).unwrap();
    assert_eq!(out, [&numbers[3 * HIDDEN..4 * HIDDEN], &numbers[..HIDDEN], &numbers[47 * HIDDEN..]].concat());
    assert!(table.look_up(&[48], &mut out).is_err());
    assert!(dot(&out, &out) > 0.0);
}
