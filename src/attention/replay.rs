//! A prompt's queries asked again, as if the same text came once more behind it: which keys would they look at?
//!
//! Queries to come are not known when a prompt is compressed. Those of the prompt are, and much of what comes later asks
//! as they did; but within the prompt a query sees only what is before it. So chunks of the prompt's query rows are turned
//! to the positions behind its end, where they see all of its keys, and their own chunk's as well, as a repetition would
//! (the idea of asking for a repetition is that of `KVzip`, Kim et al., arXiv 2505.23416; here the model does not run a
//! second time). The weights are those of a softmax over both.
//!
//! Rows that are far apart are enough to see what a head looks at in general. What a row of the repetition finds in the
//! prompt by its own place, the tokens around its original, is different for every row, and is computed for all of them.
//!
//! Scratch is O(n) for each head and thread; no map is stored. Not for: judging keys by it ([`crate::compress::budget::methods`]).

use std::ops::{Range, RangeInclusive};

use rayon::prelude::*;

use super::prompt_rows::PromptRows;
use super::{HeadLayout, expect_len};
use crate::error::{Error, Result};
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};
use crate::stop;

/// Query rows that are turned by the same number of positions.
pub(super) const CHUNK_ROWS: usize = 256;

/// Every so many rows one is asked all keys, at least; [`MAX_FULL_ROWS`] limits how many.
const MIN_STRIDE: usize = 8;

/// Rows that are asked all keys, at most (up to [`CHUNK_ROWS`] times as many tokens), so that the work is O(n).
const MAX_FULL_ROWS: usize = 256;

/// Where a row's near keys lie, in positions from its original.
const NEAR: RangeInclusive<isize> = -2..=7;

/// Parts of a head's chunks, or of a projection's rows, that threads take; a fixed number, so that sums do not depend on how
/// many there are.
const SECTIONS: usize = 4;

/// Numbers of a projection's rows that are widened at a time: they stay in a core's cache.
const PANEL_NUMBERS: usize = 256 * 1024;

/// A prompt whose queries are asked again.
#[derive(Clone, Copy)]
pub struct Replay<'a> {
    /// The heads.
    pub layout: HeadLayout,
    /// `[prompt_len, num_heads, head_dim]`, rotated.
    pub queries: &'a [f32],
    /// All keys of the prompt, behind those that were kept before it.
    pub keys: &'a PromptRows,
    /// `[num_heads]` of `[num_keys]`: for each row of the prompt at its own key, `ln` of its sum of exponentials.
    pub log_sums: &'a [&'a [f32]],
    /// Turns rotated vectors, `[rows, head_dim]`, by so many positions more.
    pub turn: &'a (dyn Fn(usize, &mut [f32]) + Sync),
}

impl std::fmt::Debug for Replay<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Replay").field("layout", &self.layout).finish_non_exhaustive()
    }
}

/// Every how many rows of a prompt one is asked all keys.
#[must_use]
pub fn stride(prompt_len: usize) -> usize {
    prompt_len.div_ceil(MAX_FULL_ROWS).clamp(MIN_STRIDE, CHUNK_ROWS)
}

/// Sums of the squared attention weights that each key gets from the replayed rows: `[num_heads]` of `[num_keys]`. A row
/// that stands for others counts as often as there are others.
///
/// # Errors
/// [`Error::Shape`] if sizes do not fit; [`Error::Interrupted`] if a [stop] is requested.
pub fn squared_attention(replay: Replay<'_>) -> Result<Vec<Vec<f32>>> {
    let Replay { layout, queries, keys, log_sums, .. } = replay;
    layout.check()?;
    keys.expect_layout("prompt keys", layout)?;
    let prompt_len = keys.len();
    expect_len("queries", queries, &[prompt_len, layout.num_heads, layout.head_dim])?;
    let group_size = layout.group_size();
    let num_keys = |head: usize| keys.past_len(head / group_size) + prompt_len;
    if log_sums.len() != layout.num_heads || (0..log_sums.len()).any(|head| log_sums[head].len() != num_keys(head)) {
        return Err(Error::shape("sums of rows", layout.num_heads, log_sums.len()));
    }
    let chunks = prompt_len.div_ceil(CHUNK_ROWS);
    let tasks: Vec<(usize, usize)> =
        (0..layout.num_kv_heads).flat_map(|kv| (0..SECTIONS).map(move |s| (kv, s))).collect();
    let section = |&(kv_head, section): &(usize, usize)| {
        let mut sums = vec![vec![0.0; keys.past_len(kv_head) + prompt_len]; group_size];
        for chunk in section * chunks / SECTIONS..(section + 1) * chunks / SECTIONS {
            if stop::is_requested() {
                break;
            }
            let rows = chunk * CHUNK_ROWS..((chunk + 1) * CHUNK_ROWS).min(prompt_len);
            Chunk::new(replay, kv_head, rows).add(&mut sums);
        }
        sums
    };
    let parts: Vec<Vec<Vec<f32>>> = tasks.par_iter().with_max_len(1).map(section).collect();
    stop::check()?;
    let mut heads = Vec::with_capacity(layout.num_heads);
    for parts in parts.chunks(SECTIONS) {
        let mut sums = parts[0].clone();
        for part in &parts[1..] {
            sums.iter_mut().zip(part).for_each(|(sums, part)| vector::add_assign(instruction_set(), sums, part));
        }
        heads.extend(sums);
    }
    Ok(heads)
}

/// The query rows of one KV head's group in one chunk.
struct Chunk<'a> {
    replay: Replay<'a>,
    kv_head: usize,
    rows: Range<usize>,
    /// `[group_size, rows, head_dim]`, as they are.
    queries: Vec<f32>,
    /// `[group_size, rows, head_dim]`, turned to behind the prompt.
    turned: Vec<f32>,
}

impl<'a> Chunk<'a> {
    fn new(replay: Replay<'a>, kv_head: usize, rows: Range<usize>) -> Self {
        let HeadLayout { num_heads, head_dim, .. } = replay.layout;
        let group_size = replay.layout.group_size();
        let mut queries = Vec::with_capacity(group_size * rows.len() * head_dim);
        for head in kv_head * group_size..(kv_head + 1) * group_size {
            for row in rows.clone() {
                let start = (row * num_heads + head) * head_dim;
                queries.extend_from_slice(&replay.queries[start..start + head_dim]);
            }
        }
        let mut turned = queries.clone();
        (replay.turn)(replay.keys.len() - rows.start, &mut turned);
        Self { replay, kv_head, rows, queries, turned }
    }

    /// Adds the chunk's squared weights to `sums`, `[group_size]` of `[num_keys]`.
    fn add(&self, sums: &mut [Vec<f32>]) {
        self.add_far(sums);
        self.add_near(sums);
    }

    /// The keys near a row's original that there are, as indices of keys, and the row's own.
    fn near_keys(&self, row: usize) -> Range<usize> {
        let past = self.replay.keys.past_len(self.kv_head);
        let first = row.saturating_add_signed(*NEAR.start());
        let end = (row.saturating_add_signed(*NEAR.end()) + 1).min(self.replay.keys.len());
        past + first..past + end
    }

    /// Some rows asked all keys but the near ones.
    fn add_far(&self, sums: &mut [Vec<f32>]) {
        let (layout, keys) = (self.replay.layout, self.replay.keys);
        let (head_dim, len) = (layout.head_dim, self.rows.len());
        let stride = stride(keys.len());
        let asked: Vec<usize> = (0..len).step_by(stride).collect();
        let past = keys.past_len(self.kv_head);
        let num_keys = past + keys.len();
        let some = |rows: &[f32]| -> Vec<f32> {
            let rows = rows.chunks_exact(len * head_dim);
            rows.flat_map(|rows| asked.iter().flat_map(|&row| &rows[row * head_dim..(row + 1) * head_dim]))
                .copied()
                .collect()
        };
        let num_rows = sums.len() * asked.len();
        let scores = |queries: &[f32], rows: Range<usize>| {
            let mut scores = vec![0.0; num_rows * rows.len()];
            let width = rows.len();
            MatrixMut::new(&mut scores, num_rows, width, width).set_product(
                Matrix::new(queries, num_rows, head_dim, head_dim),
                keys.matrix(self.kv_head, rows).transposed(),
                layout.scale(),
            );
            scores
        };
        let mut of_all = scores(&some(&self.turned), 0..num_keys);
        let mut of_chunk = scores(&some(&self.queries), past + self.rows.start..past + self.rows.end);
        let set = instruction_set();
        let rows = of_all.chunks_exact_mut(num_keys).zip(of_chunk.chunks_exact_mut(len));
        for (index, (all, chunk)) in rows.enumerate() {
            let (head, row) = (index / asked.len(), asked[index % asked.len()]);
            let chunk = &mut chunk[..=row];
            let max = vector::max(set, all).max(vector::max(set, chunk));
            let sum = vector::exp_minus_max(set, all, max) + vector::exp_minus_max(set, chunk, max);
            all[self.near_keys(self.rows.start + row)].fill(0.0);
            // The last row of a chunk may stand for fewer.
            #[expect(clippy::cast_precision_loss)]
            let stands_for = stride.min(len - row) as f32;
            vector::add_scaled_squares(set, &mut sums[head], all, stands_for / (sum * sum));
        }
    }

    /// All rows asked the near keys only. What they give to others is taken to be what the original rows gave to all.
    fn add_near(&self, sums: &mut [Vec<f32>]) {
        let (layout, keys) = (self.replay.layout, self.replay.keys);
        let head_dim = layout.head_dim;
        let around = self.near_keys(self.rows.start).start..self.near_keys(self.rows.end - 1).end;
        let near = keys.rows(self.kv_head, around.clone());
        let past = keys.past_len(self.kv_head);
        let set = instruction_set();
        let mut scores = Vec::new();
        for (head, queries) in self.turned.chunks_exact(self.rows.len() * head_dim).enumerate() {
            let log_sums = self.replay.log_sums[self.kv_head * layout.group_size() + head];
            for (row, query) in self.rows.clone().zip(queries.chunks_exact(head_dim)) {
                let log_sum = log_sums[past + row];
                let own = self.near_keys(row);
                let numbers = (own.start - around.start) * head_dim..(own.end - around.start) * head_dim;
                scores.clear();
                scores.extend(
                    near[numbers].chunks_exact(head_dim).map(|key| vector::dot(set, query, key) * layout.scale()),
                );
                let max = scores.iter().copied().fold(log_sum, f32::max);
                for score in &mut scores {
                    *score = (*score - max).exp();
                }
                let sum = (log_sum - max).exp() + scores.iter().sum::<f32>();
                for (total, weight) in sums[head][own].iter_mut().zip(&scores) {
                    *total += (weight / sum) * (weight / sum);
                }
            }
        }
    }
}

/// Gives rows of a matrix as f32: overwrites a buffer with `[rows, cols]`.
pub type WidenedRows<'a> = dyn Fn(Range<usize>, &mut Vec<f32>) + Sync + 'a;

/// The squared length, behind the output projection, of each value as each query head of its group would write it if it
/// attended to nothing else: `[num_heads]` of `[len]`.
///
/// * `weights`: of the output projection, `[hidden_size, num_heads * head_dim]`
/// * `values`: `[num_kv_heads]` of `[len, head_dim]`
///
/// # Errors
/// [`Error::Shape`] if the projection is of other heads.
pub fn squared_outputs(
    layout: HeadLayout,
    hidden_size: usize,
    weights: &WidenedRows<'_>,
    values: &[Vec<f32>],
) -> Result<Vec<Vec<f32>>> {
    layout.check()?;
    if values.len() != layout.num_kv_heads {
        return Err(Error::shape("values", layout.num_kv_heads, values.len()));
    }
    let panel = |first: usize, rows: usize, weights_of: &mut Vec<f32>| {
        let rows = first..(first + rows).min(hidden_size);
        weights(rows.clone(), weights_of);
        expect_len("an output projection", weights_of, &[rows.len(), layout.query_width()])
    };
    let panel_rows = (PANEL_NUMBERS / layout.query_width()).max(1);
    // Few values are multiplied as they are; for many there is a small matrix in between, the same for all.
    if values.iter().all(|values| values.len() / layout.head_dim < layout.head_dim) {
        let panels = (0..hidden_size).into_par_iter().step_by(panel_rows).map_init(Vec::new, |buffer, first| {
            panel(first, panel_rows, buffer)?;
            Ok(squared_products(layout, buffer, values))
        });
        let mut heads: Vec<Vec<f32>> = (0..layout.num_heads)
            .map(|head| vec![0.0; values[head / layout.group_size()].len() / layout.head_dim])
            .collect();
        for panel in panels.collect::<Result<Vec<_>>>()? {
            for (sums, panel) in heads.iter_mut().zip(panel) {
                vector::add_assign(instruction_set(), sums, &panel);
            }
        }
        return Ok(heads);
    }
    let panels = hidden_size.div_ceil(panel_rows);
    let section = |section: usize| -> Result<Vec<f32>> {
        let (mut grams, mut buffer) = (vec![0.0; layout.query_width() * layout.head_dim], Vec::new());
        for index in section * panels / SECTIONS..(section + 1) * panels / SECTIONS {
            panel(index * panel_rows, panel_rows, &mut buffer)?;
            add_grams(layout, &buffer, &mut grams);
        }
        Ok(grams)
    };
    let sections: Vec<Vec<f32>> = (0..SECTIONS).into_par_iter().with_max_len(1).map(section).collect::<Result<_>>()?;
    Ok((0..layout.num_heads).into_par_iter().map(|head| squared_by_gram(layout, &sections, values, head)).collect())
}

/// [`squared_outputs`] over some rows of the projection, each value multiplied with them.
fn squared_products(layout: HeadLayout, weights: &[f32], values: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let (head_dim, width, set) = (layout.head_dim, layout.query_width(), instruction_set());
    let num_rows = weights.len() / width;
    let of_head = |head: usize| {
        let own = Matrix::new(&weights[head * head_dim..], num_rows, head_dim, width);
        let values = &values[head / layout.group_size()];
        let len = values.len() / head_dim;
        let mut outputs = vec![0.0; len * num_rows];
        let rows = Matrix::new(values, len, head_dim, head_dim);
        MatrixMut::new(&mut outputs, len, num_rows, num_rows).set_product(rows, own.transposed(), 1.0);
        outputs.chunks_exact(num_rows).map(|output| vector::dot(set, output, output)).collect()
    };
    (0..layout.num_heads).map(of_head).collect()
}

/// Adds what some rows of the projection are of each head's `W^T W`.
///
/// * `grams`: `[num_heads, head_dim, head_dim]`
fn add_grams(layout: HeadLayout, weights: &[f32], grams: &mut [f32]) {
    let (head_dim, width) = (layout.head_dim, layout.query_width());
    for (head, gram) in grams.chunks_exact_mut(head_dim * head_dim).enumerate() {
        let own = Matrix::new(&weights[head * head_dim..], weights.len() / width, head_dim, width);
        MatrixMut::new(gram, head_dim, head_dim, head_dim).add_product(own.transposed(), own);
    }
}

/// [`squared_outputs`] of one head as `v^T (W^T W) v`.
///
/// * `sections`: of which each holds all heads' `W^T W` over other rows of `W`
fn squared_by_gram(layout: HeadLayout, sections: &[Vec<f32>], values: &[Vec<f32>], head: usize) -> Vec<f32> {
    let (head_dim, set) = (layout.head_dim, instruction_set());
    let size = head_dim * head_dim;
    let mut gram = vec![0.0; size];
    for grams in sections {
        vector::add_assign(set, &mut gram, &grams[head * size..(head + 1) * size]);
    }
    let values = &values[head / layout.group_size()];
    let len = values.len() / head_dim;
    let gram = Matrix::new(&gram, head_dim, head_dim, head_dim);
    let mut products = vec![0.0; values.len()];
    let rows = Matrix::new(values, len, head_dim, head_dim);
    MatrixMut::new(&mut products, len, head_dim, head_dim).set_product(rows, gram, 1.0);
    let pairs = products.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
    pairs.map(|(product, value)| vector::dot(set, product, value).max(0.0)).collect()
}
