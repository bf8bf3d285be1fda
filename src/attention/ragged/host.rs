//! Ragged attention on the CPU, over the rows as they lie on a device: what the kernels in `kernels/` are compared with.
//!
//! Not for: the CPU's own cache, whose rows lie in tiles (see [`crate::attention::decode`]).

use std::ops::Range;

use rayon::prelude::*;

use crate::attention::decode::RANGE_ROWS;
use crate::kernels::element::Element;
use crate::kernels::vector::{self, instruction_set};

/// Rows of one head that follow each other in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'a, T> {
    /// `[rows, head_dim]`
    pub keys: &'a [T],
    /// `[rows, head_dim]`
    pub values: &'a [T],
}

impl<T> Piece<'_, T> {
    /// Some of its rows.
    pub fn rows(&self, range: Range<usize>, head_dim: usize) -> Self {
        let numbers = range.start * head_dim..range.end * head_dim;
        Self { keys: &self.keys[numbers.clone()], values: &self.values[numbers] }
    }
}

/// Result of one query group over some rows of a head.
struct Partial {
    /// `[group_size]`: largest score and sum of exponentials
    max_and_sum: Vec<(f32, f32)>,
    /// `[group_size, head_dim]`, unnormalised
    out: Vec<f32>,
}

/// Attends from every query group over its head's rows.
///
/// * `queries`: `[heads.len(), group_size, head_dim]`, multiplied by `1 / sqrt(head_dim)`
/// * `heads`: at least one row each, in one piece or more
///
/// Returns the queries' shape.
pub(super) fn attend<T: Element>(
    queries: &[f32],
    group_size: usize,
    head_dim: usize,
    heads: &[[Piece<T>; 2]],
) -> Vec<f32> {
    let width = group_size * head_dim;
    let mut tasks: Vec<(usize, Piece<T>)> = Vec::new();
    for (head, pieces) in heads.iter().enumerate() {
        for piece in pieces {
            let len = piece.keys.len() / head_dim;
            let ranges = (0..len).step_by(RANGE_ROWS).map(|start| start..(start + RANGE_ROWS).min(len));
            tasks.extend(ranges.map(|range| (head, piece.rows(range, head_dim))));
        }
    }
    let partials: Vec<Partial> = tasks
        .par_iter()
        .map(|&(head, piece)| attend_piece(&queries[head * width..(head + 1) * width], head_dim, piece))
        .collect();

    let mut out = vec![0.0; queries.len()];
    let mut max_and_sum = vec![(f32::NEG_INFINITY, 0.0); heads.len() * group_size];
    for ((head, _), partial) in tasks.iter().zip(&partials) {
        let merged = max_and_sum[head * group_size..(head + 1) * group_size].iter_mut();
        let out = out[head * width..(head + 1) * width].chunks_exact_mut(head_dim);
        let partial = partial.max_and_sum.iter().zip(partial.out.chunks_exact(head_dim));
        for ((merged, out), (&max_and_sum, partial_out)) in merged.zip(out).zip(partial) {
            vector::merge_partial(merged, out, max_and_sum, partial_out);
        }
    }
    for (out, (_, sum)) in out.chunks_exact_mut(head_dim).zip(max_and_sum) {
        for value in out {
            *value /= sum;
        }
    }
    out
}

fn attend_piece<T: Element>(queries: &[f32], head_dim: usize, piece: Piece<T>) -> Partial {
    let set = instruction_set();
    let mut out = vec![0.0; queries.len()];
    let mut values = vec![0.0; piece.values.len()];
    vector::widen(set, piece.values, &mut values);
    let mut scores = vec![0.0; piece.keys.len() / head_dim];
    let mut max_and_sum = Vec::with_capacity(queries.len() / head_dim);
    for (query, out) in queries.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
        for (score, key) in scores.iter_mut().zip(piece.keys.chunks_exact(head_dim)) {
            *score = vector::dot_stored(set, query, key);
        }
        let max = vector::max(set, &scores);
        let sum = vector::exp_minus_max(set, &mut scores, max.max(f32::MIN));
        max_and_sum.push((max, sum));
        vector::scaled_column_sums(set, &values, head_dim, &scores, out);
    }
    Partial { max_and_sum, out }
}
