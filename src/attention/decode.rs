//! Attention from one new token over heads that each keep their own number of rows.
//!
//! Work is cut into ranges of rows, not into heads, so that one long head does not keep one thread busy while the others
//! wait. Each range is one pass over its keys and one over its values for the whole query group; ranges of a head are
//! merged afterwards.

use std::ops::Range;

use rayon::prelude::*;

use super::{HeadLayout, expect_len};
use crate::error::{Error, Result};
pub use crate::kernels::attend::HeadRows;
use crate::kernels::attend::attend_range;
use crate::kernels::vector::{self, MAX_HEAD_DIM, instruction_set};

/// Rows of a head that one task takes at most; a whole number of tiles of keys.
pub const RANGE_ROWS: usize = 512;

/// Cuts a head's rows into ranges, of which none has rows in two kinds of numbers.
///
/// * `num_settled`: see [`HeadRows::num_settled`]
/// * `len`: all rows
pub fn ranges(num_settled: usize, len: usize) -> impl Iterator<Item = Range<usize>> {
    let cut = |first: usize, end: usize| {
        (first..end).step_by(RANGE_ROWS).map(move |start| start..(start + RANGE_ROWS).min(end))
    };
    cut(0, num_settled).chain(cut(num_settled, len))
}

/// Below this many rows over all heads threads cost more than they save.
const MIN_PARALLEL_ROWS: usize = 512;

/// Result of attending over one range of a head's rows.
struct Partial {
    kv_head: usize,
    /// `[group_size]`
    max_and_sum: Vec<(f32, f32)>,
    /// `[group_size, head_dim]`
    out: Vec<f32>,
}

/// Attends from one token over every head's kept rows.
///
/// * `queries`: `[num_heads, head_dim]`, rotated
/// * `heads`: `[num_kv_heads]`; each keeps at least one row
///
/// Returns `[num_heads, head_dim]`.
///
/// # Errors
/// [`Error::Shape`] if sizes do not fit, or a head keeps nothing.
pub fn decode(layout: HeadLayout, queries: &[f32], heads: &[HeadRows<'_>]) -> Result<Vec<f32>> {
    layout.check()?;
    let HeadLayout { num_heads, num_kv_heads, head_dim } = layout;
    let group_size = layout.group_size();
    expect_len("queries", queries, &[num_heads, head_dim])?;
    if heads.len() != num_kv_heads {
        return Err(Error::shape("cached heads", num_kv_heads, heads.len()));
    }
    if head_dim > MAX_HEAD_DIM {
        return Err(Error::unsupported(format!("a head dimension of {head_dim} (the most is {MAX_HEAD_DIM})")));
    }
    let mut tasks: Vec<(usize, Range<usize>)> = Vec::with_capacity(num_kv_heads);
    let mut total_rows = 0;
    for (kv_head, rows) in heads.iter().enumerate() {
        if rows.is_empty() || rows.head_dim() != head_dim {
            let got = (rows.len(), rows.head_dim());
            return Err(Error::shape("cached rows", format!("at least one row of {head_dim}"), got));
        }
        total_rows += rows.len();
        tasks.extend(ranges(rows.num_settled(), rows.len()).map(|range| (kv_head, range)));
    }

    let scaled: Vec<f32> = queries.iter().map(|&value| value * layout.scale()).collect();
    let run = |(kv_head, range): &(usize, Range<usize>)| {
        let start = kv_head * group_size * head_dim;
        let queries = &scaled[start..start + group_size * head_dim];
        let mut out = vec![0.0; queries.len()];
        let mut max_and_sum = vec![(0.0, 0.0); group_size];
        attend_range(instruction_set(), heads[*kv_head], range.clone(), queries, &mut out, &mut max_and_sum);
        Partial { kv_head: *kv_head, max_and_sum, out }
    };
    let partials: Vec<Partial> = if total_rows < MIN_PARALLEL_ROWS {
        tasks.iter().map(run).collect()
    } else {
        tasks.par_iter().map(run).collect()
    };

    let mut out = vec![0.0; queries.len()];
    for (kv_head, out) in out.chunks_exact_mut(group_size * head_dim).enumerate() {
        let mut partials = partials.iter().filter(|partial| partial.kv_head == kv_head);
        let Some(first) = partials.next() else { continue };
        let mut merged = first.max_and_sum.clone();
        out.copy_from_slice(&first.out);
        for partial in partials {
            for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let partial_out = &partial.out[head * head_dim..(head + 1) * head_dim];
                vector::merge_partial(&mut merged[head], out, partial.max_and_sum[head], partial_out);
            }
        }
        for (out, (_, sum)) in out.chunks_exact_mut(head_dim).zip(merged) {
            for value in out {
                *value /= sum;
            }
        }
    }
    Ok(out)
}

/// What the query heads of one KV head make of each row: their softmax weights, summed up. The plain form of
/// [`row_weights`](crate::kernels::attend::row_weights).
///
/// * `queries`: `[group_size, head_dim]`, rotated
///
/// Returns `[len]`.
///
/// # Errors
/// [`Error::Shape`] if sizes do not fit.
pub fn plain_row_weights(layout: HeadLayout, queries: &[f32], rows: HeadRows<'_>) -> Result<Vec<f32>> {
    layout.check()?;
    let head_dim = layout.head_dim;
    expect_len("queries of a KV head", queries, &[layout.group_size(), head_dim])?;
    if rows.head_dim() != head_dim {
        return Err(Error::shape("cached rows", head_dim, rows.head_dim()));
    }
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    rows.widen_to(&mut keys, &mut values);
    let mut weights = vec![0.0; rows.len()];
    for query in queries.chunks_exact(head_dim) {
        let score = |key: &[f32]| layout.scale() * key.iter().zip(query).map(|(key, query)| key * query).sum::<f32>();
        let scores: Vec<f32> = keys.chunks_exact(head_dim).map(score).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exponentials: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f32 = exponentials.iter().sum();
        for (weight, exponential) in weights.iter_mut().zip(exponentials) {
            *weight += exponential / sum;
        }
    }
    Ok(weights)
}
