//! Speed of every operation that a backend has to do, at the shapes and in the formats that the tests compare:
//! `cargo bench --bench contract`, or `cargo bench --bench contract -- 'kernels attend'` for some.
//!
//! Of a prompt the last chunk is timed. Sizes are small, so that the plain arithmetic of the tests is affordable: not for
//! the speed of large matrices (see `benches/kernels.rs`) or whole models (see `adaptive-kvcache bench`).
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "tests compute with small known numbers"
)]

#[expect(dead_code, reason = "shared with the tests")]
#[path = "../tests/it/numbers.rs"]
mod numbers;
#[path = "../tests/it/contract/table.rs"]
mod table;

use std::cell::RefCell;
use std::collections::HashSet;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use table::{Line, Observer};

/// Times each line, once.
struct Times<'a> {
    criterion: &'a mut Criterion,
    timed: HashSet<String>,
}

impl<'a> Times<'a> {
    fn new(criterion: &'a mut Criterion) -> Self {
        Self { criterion, timed: HashSet::new() }
    }
}

impl Observer for Times<'_> {
    fn run<I, O>(&mut self, line: Line, input: impl FnMut() -> I, operation: impl FnMut(I) -> O) -> O {
        let line = line.to_string();
        // The harness's closure and the last call take turns with both.
        let (input, operation) = (RefCell::new(input), RefCell::new(operation));
        let (input, operation) = (|| (*input.borrow_mut())(), |input| (*operation.borrow_mut())(input));
        if self.timed.insert(line.clone()) {
            self.criterion
                .bench_function(&line, |bencher| bencher.iter_batched(&input, &operation, BatchSize::LargeInput));
        }
        operation(input())
    }

    fn compare(&mut self, _: Line, _: &[f32], _: impl FnOnce() -> Vec<f64>, _: f64) {}
}

fn kernels(criterion: &mut Criterion) {
    table::kernels(&mut Times::new(criterion));
}

fn candle(criterion: &mut Criterion) {
    table::candle(&mut Times::new(criterion));
}

criterion_group! {
    name = contract;
    config = Criterion::default().warm_up_time(Duration::from_millis(20)).measurement_time(Duration::from_millis(60))
        .sample_size(10).nresamples(1000).without_plots();
    targets = kernels, candle
}
criterion_main!(contract);
