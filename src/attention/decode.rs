//! Attention from one new token over heads that each keep their own number of rows.
//!
//! Work is cut into ranges of rows, not into heads, so that one long head does not keep one thread busy while the others
//! wait. Each range is one pass over its keys and one over its values for the whole query group; ranges of a head are
//! merged afterwards.

use half::f16;
use rayon::prelude::*;

use super::{HeadLayout, expect_len};
use crate::error::{Error, Result};
use crate::kernels::element::Element;
use crate::kernels::simd::InstructionSet;
use crate::kernels::vector::{self, MAX_HEAD_DIM, PartialAttention, instruction_set};

/// Rows of a head that one task takes at most.
pub const RANGE_ROWS: usize = 512;

/// Below this many rows over all heads threads cost more than they save.
const MIN_PARALLEL_ROWS: usize = 512;

/// The keys and values that one KV head keeps.
#[derive(Debug, Clone, Copy)]
pub enum HeadRows<'a> {
    /// `[kept, head_dim]` each.
    F32 { keys: &'a [f32], values: &'a [f32] },
    /// `[kept, head_dim]` each.
    F16 { keys: &'a [f16], values: &'a [f16] },
}

impl<'a> HeadRows<'a> {
    /// Numbers in the keys, which must be those in the values.
    pub(super) fn len(&self) -> Result<usize> {
        let (keys, values) = match self {
            Self::F32 { keys, values } => (keys.len(), values.len()),
            Self::F16 { keys, values } => (keys.len(), values.len()),
        };
        if keys == values { Ok(keys) } else { Err(Error::shape("cached values", keys, values)) }
    }

    /// Adds keys and values to buffers, as f32.
    pub(super) fn widen_to(&self, all_keys: &mut Vec<f32>, all_values: &mut Vec<f32>) {
        match *self {
            Self::F32 { keys, values } => {
                all_keys.extend_from_slice(keys);
                all_values.extend_from_slice(values);
            }
            Self::F16 { keys, values } => {
                all_keys.extend(keys.iter().map(|&key| Element::widen(key)));
                all_values.extend(values.iter().map(|&value| Element::widen(value)));
            }
        }
    }

    fn slice(&self, range: std::ops::Range<usize>) -> HeadRows<'a> {
        match *self {
            Self::F32 { keys, values } => HeadRows::F32 { keys: &keys[range.clone()], values: &values[range] },
            Self::F16 { keys, values } => HeadRows::F16 { keys: &keys[range.clone()], values: &values[range] },
        }
    }
}

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
    let HeadLayout { num_heads, num_kv_heads, head_dim } = layout;
    let group_size = layout.group_size();
    expect_len("queries", queries, &[num_heads, head_dim])?;
    if heads.len() != num_kv_heads {
        return Err(Error::shape("cached heads", num_kv_heads, heads.len()));
    }
    if head_dim > MAX_HEAD_DIM {
        return Err(Error::unsupported(format!("a head dimension of {head_dim} (the most is {MAX_HEAD_DIM})")));
    }
    let mut tasks: Vec<(usize, HeadRows<'_>)> = Vec::with_capacity(num_kv_heads);
    let mut total_rows = 0;
    for (kv_head, rows) in heads.iter().enumerate() {
        let len = rows.len()?;
        if len == 0 || !len.is_multiple_of(head_dim) {
            return Err(Error::shape("cached rows", format!("at least one row of {head_dim}"), len));
        }
        total_rows += len / head_dim;
        let step = RANGE_ROWS * head_dim;
        tasks.extend((0..len).step_by(step).map(|start| (kv_head, rows.slice(start..(start + step).min(len)))));
    }

    let scaled: Vec<f32> = queries.iter().map(|&value| value * layout.scale()).collect();
    let run = |&(kv_head, rows): &(usize, HeadRows<'_>)| {
        let start = kv_head * group_size * head_dim;
        let queries = &scaled[start..start + group_size * head_dim];
        let (max_and_sum, out) = match rows {
            HeadRows::F32 { keys, values } => attend(queries, keys, values, group_size, head_dim),
            HeadRows::F16 { keys, values } => attend(queries, keys, values, group_size, head_dim),
        };
        Partial { kv_head, max_and_sum, out }
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

/// Attends over a range of one head's rows.
///
/// * `queries`: `[group_size, head_dim]`, already scaled
/// * `out`: `[group_size, head_dim]`, overwritten with the unnormalised sums
/// * `max_and_sum`: `[group_size]`, overwritten
#[expect(clippy::too_many_arguments)]
pub fn attend_range(
    set: InstructionSet,
    rows: HeadRows<'_>,
    range: std::ops::Range<usize>,
    head_dim: usize,
    queries: &[f32],
    out: &mut [f32],
    max_and_sum: &mut [(f32, f32)],
    scores: &mut Vec<f32>,
) {
    scores.resize(max_and_sum.len() * range.len(), 0.0);
    match rows.slice(range.start * head_dim..range.end * head_dim) {
        HeadRows::F32 { keys, values } => vector::partial_attention(
            set,
            PartialAttention { queries, keys, values, head_dim, scores, out, max_and_sum },
        ),
        HeadRows::F16 { keys, values } => vector::partial_attention(
            set,
            PartialAttention { queries, keys, values, head_dim, scores, out, max_and_sum },
        ),
    }
}

fn attend<T: Element>(
    queries: &[f32],
    keys: &[T],
    values: &[T],
    group_size: usize,
    head_dim: usize,
) -> (Vec<(f32, f32)>, Vec<f32>) {
    let mut scores = vec![0.0; group_size * (keys.len() / head_dim)];
    let mut out = vec![0.0; group_size * head_dim];
    let mut max_and_sum = vec![(0.0, 0.0); group_size];
    let work = PartialAttention {
        queries,
        keys,
        values,
        head_dim,
        scores: &mut scores,
        out: &mut out,
        max_and_sum: &mut max_and_sum,
    };
    vector::partial_attention(instruction_set(), work);
    (max_and_sum, out)
}
