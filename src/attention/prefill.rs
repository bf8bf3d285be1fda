//! Attention of a block of prompt rows over all keys up to them, with the statistics that profiling needs.
//!
//! A prompt may come on top of a filled cache, whose heads keep different numbers of rows: a head's own past rows are
//! then the first of its keys, and every row of the prompt sees all of them.
//!
//! Query rows are taken in tiles. A tile's scores are complete rows, so its softmax, its output and its statistics come
//! out of one pass; scratch is O(tile x n) for each thread, and no map of the prompt is ever stored.

use std::sync::Mutex;

use rayon::prelude::*;

use super::{HeadLayout, expect_len};
use crate::attention::map::HeadGrid;
use crate::error::{Error, Result};
use crate::kernels::attend::HeadRows;
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};
use crate::profile::stats::{HeadStats, LayerStats, StatsRequest, row_difference};

/// Scores that a tile may hold: they should stay in a core's cache between the two products.
const TILE_SCORES: usize = 192 * 1024;

/// Query rows of a tile, at least and at most.
const TILE_ROWS: std::ops::RangeInclusive<usize> = 8..=64;

/// One layer's keys or values while a prompt is processed: for each KV head `[past_len + len, head_dim]`, the rows that it
/// kept of earlier tokens and then the prompt's.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRows {
    /// `[num_kv_heads]` buffers.
    heads: Vec<Vec<f32>>,
    layout: HeadLayout,
    capacity: usize,
    len: usize,
}

impl PromptRows {
    /// Room for a prompt of `capacity` tokens with nothing before it.
    #[must_use]
    pub fn with_capacity(layout: HeadLayout, capacity: usize) -> Self {
        let heads = (0..layout.num_kv_heads).map(|_| Vec::with_capacity(capacity * layout.head_dim)).collect();
        Self { heads, layout, capacity, len: 0 }
    }

    /// Keys and values, with room for a prompt of `capacity` tokens behind what each head keeps already.
    ///
    /// * `past`: `[num_kv_heads]`
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of heads, or heads of another dimension.
    pub fn after(layout: HeadLayout, capacity: usize, past: &[HeadRows<'_>]) -> Result<(Self, Self)> {
        if past.len() != layout.num_kv_heads {
            return Err(Error::shape("cached heads", layout.num_kv_heads, past.len()));
        }
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for rows in past {
            if rows.head_dim() != layout.head_dim {
                return Err(Error::shape("cached rows", layout.head_dim, rows.head_dim()));
            }
            let room = (rows.len() + capacity) * layout.head_dim;
            let (mut head_keys, mut head_values) = (Vec::with_capacity(room), Vec::with_capacity(room));
            rows.widen_to(&mut head_keys, &mut head_values);
            keys.push(head_keys);
            values.push(head_values);
        }
        let rows = |heads| Self { heads, layout, capacity, len: 0 };
        Ok((rows(keys), rows(values)))
    }

    /// Tokens of the prompt that are stored.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token of the prompt is stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Rows of a KV head before the prompt's first.
    #[must_use]
    pub fn past_len(&self, kv_head: usize) -> usize {
        self.heads[kv_head].len() / self.layout.head_dim - self.len
    }

    /// Adds tokens of the prompt.
    ///
    /// * `rows`: `[seq_len, num_kv_heads, head_dim]`
    ///
    /// # Errors
    /// [`Error::Shape`] if `rows` is not a whole number of tokens, or more than there is room for.
    pub fn push(&mut self, rows: &[f32]) -> Result<()> {
        let width = self.layout.kv_width();
        let head_dim = self.layout.head_dim;
        let seq_len = rows.len() / width;
        if rows.len() != seq_len * width || seq_len > self.capacity - self.len {
            return Err(Error::shape(
                "prompt rows",
                format!("at most {} x {width}", self.capacity - self.len),
                rows.len(),
            ));
        }
        for row in rows.chunks_exact(width) {
            for (head, row) in self.heads.iter_mut().zip(row.chunks_exact(head_dim)) {
                head.extend_from_slice(row);
            }
        }
        self.len += seq_len;
        Ok(())
    }

    /// The rows of one head, `[past_len + len, head_dim]`.
    #[must_use]
    pub fn head(&self, kv_head: usize) -> &[f32] {
        &self.heads[kv_head]
    }
}

/// A block of prompt rows to attend from.
#[derive(Debug, Clone, Copy)]
pub struct QueryBlock<'a> {
    /// `[seq_len, num_heads, head_dim]`, rotated.
    pub queries: &'a [f32],
    /// Index of the first row in the prompt; row `i` sees all past keys, and the prompt's keys `0..=first_row + i`.
    pub first_row: usize,
}

/// Attends from a block of prompt rows, causally, and collects statistics.
///
/// * `keys`, `values`: at least up to the block's last row, keys rotated
/// * `stats`: statistics to add to, if wanted; its request says which
/// * `maps`: `[num_heads]` down-sampled maps to draw into, if wanted
///
/// Returns `[seq_len, num_heads, head_dim]`.
///
/// # Errors
/// [`Error::Shape`] if sizes do not fit.
pub fn prefill(
    layout: HeadLayout,
    block: QueryBlock<'_>,
    keys: &PromptRows,
    values: &PromptRows,
    mut stats: Option<&mut LayerStats>,
    maps: Option<&mut [HeadGrid]>,
) -> Result<Vec<f32>> {
    let tiles = Tiles::new(layout, block, keys)?;
    if values.len() != keys.len() {
        return Err(Error::shape("prompt values", keys.len(), values.len()));
    }
    for (what, heads) in [
        ("statistics of query heads", stats.as_ref().map(|stats| stats.heads.len())),
        ("maps of query heads", maps.as_ref().map(|maps| maps.len())),
    ] {
        if let Some(heads) = heads.filter(|&heads| heads != layout.num_heads) {
            return Err(Error::shape(what, layout.num_heads, heads));
        }
    }
    let empty = StatsRequest::default();
    let request = stats.as_ref().map_or(&empty, |stats| &stats.request);
    let maps: Option<Vec<Mutex<&mut HeadGrid>>> = maps.map(|maps| maps.iter_mut().map(Mutex::new).collect());
    let collect = stats.is_some();

    let group_size = layout.group_size();
    let head_dim = layout.head_dim;
    let results: Vec<Result<(Vec<f32>, Vec<HeadStats>)>> = tiles.map(|tile| {
        let mut head_stats =
            if collect { vec![HeadStats::new(request, tile.num_keys); group_size] } else { Vec::new() };
        for (head, row, weights) in tile.rows() {
            if let Some(head_stats) = head_stats.get_mut(head) {
                head_stats.add_row(request, row, weights);
            }
            if let Some(maps) = &maps {
                let mut map =
                    maps[tile.kv_head * group_size + head].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                map.add_row(row, weights)?;
            }
        }
        let rows = group_size * tile.num_rows;
        let mut out = vec![0.0; rows * head_dim];
        MatrixMut::new(&mut out, rows, head_dim, head_dim).set_product(
            Matrix::new(tile.weights, rows, tile.num_keys, tile.num_keys),
            Matrix::new(values.head(tile.kv_head), tile.num_keys, head_dim, head_dim),
            1.0,
        );
        Ok((out, head_stats))
    });

    let mut out = vec![0.0; block.queries.len()];
    for (tile, result) in tiles.list.iter().zip(results) {
        let (tile_out, tile_stats) = result?;
        for (index, row) in tile_out.chunks_exact(head_dim).enumerate() {
            let (head, token) =
                (tile.kv_head * group_size + index / tile.num_rows, tile.first_row + index % tile.num_rows);
            let start = (token * layout.num_heads + head) * head_dim;
            out[start..start + head_dim].copy_from_slice(row);
        }
        if let Some(stats) = stats.as_deref_mut() {
            let heads = &mut stats.heads[tile.kv_head * group_size..];
            for (head, tile_stats) in heads.iter_mut().zip(&tile_stats) {
                head.merge(tile_stats);
            }
        }
    }
    Ok(out)
}

/// Largest differences of keep-sets that were not known while the prompt was processed: a second pass over its rows.
///
/// * `block`: all rows of the prompt
/// * `pending`: pairs of a KV head and its `[levels][n]` masks of 0 and 1 for its last `n` keys; those before are kept
///
/// Returns `[levels]` for each pair: the largest over the rows and the query heads of the KV head.
///
/// # Errors
/// [`Error::Shape`] if sizes do not fit.
pub fn largest_differences(
    layout: HeadLayout,
    block: QueryBlock<'_>,
    keys: &PromptRows,
    pending: &[(usize, Vec<Vec<f32>>)],
) -> Result<Vec<Vec<f32>>> {
    let mut tiles = Tiles::new(layout, block, keys)?;
    let slot = |kv_head: usize| pending.iter().position(|(head, _)| *head == kv_head);
    tiles.list.retain(|tile| slot(tile.kv_head).is_some());
    let masks = |kv_head: usize| slot(kv_head).map_or(&[][..], |slot| &pending[slot].1);
    for (kv_head, masks) in pending {
        let num_keys = keys.past_len(*kv_head) + keys.len();
        if let Some(mask) = masks.iter().find(|mask| mask.len() > num_keys) {
            return Err(Error::shape("a mask of keys", format!("at most {num_keys}"), mask.len()));
        }
    }
    let results: Vec<Vec<f32>> = tiles.map(|tile| {
        let masks = masks(tile.kv_head);
        let num_keys = keys.past_len(tile.kv_head) + keys.len();
        let mut worst = vec![0.0f32; masks.len()];
        for (_, _, weights) in tile.rows() {
            for (worst, mask) in worst.iter_mut().zip(masks) {
                *worst = worst.max(row_difference(num_keys - mask.len(), weights, mask));
            }
        }
        worst
    });
    let mut worst: Vec<Vec<f32>> = pending.iter().map(|(_, masks)| vec![0.0; masks.len()]).collect();
    for (tile, result) in tiles.list.iter().zip(results) {
        if let Some(slot) = slot(tile.kv_head) {
            for (worst, value) in worst[slot].iter_mut().zip(result) {
                *worst = worst.max(value);
            }
        }
    }
    Ok(worst)
}

/// Query rows of one KV head that are processed together.
#[derive(Debug, Clone, Copy)]
struct Tile {
    kv_head: usize,
    /// Row of the block, and number of rows.
    first_row: usize,
    num_rows: usize,
}

/// All tiles of a block, in the order in which their results are merged; it does not depend on the number of threads.
struct Tiles<'a> {
    layout: HeadLayout,
    block: QueryBlock<'a>,
    keys: &'a PromptRows,
    list: Vec<Tile>,
}

/// A tile with its attention weights.
struct TileWeights<'a> {
    kv_head: usize,
    num_rows: usize,
    /// Index of the first row in the prompt.
    first_row: usize,
    /// Keys that the last row sees.
    num_keys: usize,
    /// `[group_size * num_rows, num_keys]`, query head after query head; 0 beyond each row's own key.
    weights: &'a [f32],
}

impl<'a> TileWeights<'a> {
    /// Each row: query head in the group, index in the prompt, and weights of the keys up to its own.
    fn rows(&self) -> impl Iterator<Item = (usize, usize, &'a [f32])> {
        let (num_rows, first_row, num_keys) = (self.num_rows, self.first_row, self.num_keys);
        self.weights.chunks_exact(num_keys).enumerate().map(move |(index, weights)| {
            let row = index % num_rows;
            (index / num_rows, first_row + row, &weights[..=num_keys - num_rows + row])
        })
    }
}

impl<'a> Tiles<'a> {
    fn new(layout: HeadLayout, block: QueryBlock<'a>, keys: &'a PromptRows) -> Result<Self> {
        let seq_len = block.queries.len() / layout.query_width();
        expect_len("queries", block.queries, &[seq_len, layout.num_heads, layout.head_dim])?;
        let prompt_keys = block.first_row + seq_len;
        if keys.len() < prompt_keys {
            return Err(Error::shape("prompt keys", format!("at least {prompt_keys}"), keys.len()));
        }
        let longest_past = (0..layout.num_kv_heads).map(|kv_head| keys.past_len(kv_head)).max().unwrap_or(0);
        let num_keys = longest_past + prompt_keys;
        let tile_rows =
            (TILE_SCORES / (layout.group_size() * num_keys.max(1))).clamp(*TILE_ROWS.start(), *TILE_ROWS.end());
        let list = (0..layout.num_kv_heads)
            .flat_map(|kv_head| {
                (0..seq_len).step_by(tile_rows).map(move |first_row| Tile {
                    kv_head,
                    first_row,
                    num_rows: tile_rows.min(seq_len - first_row),
                })
            })
            .collect();
        Ok(Self { layout, block, keys, list })
    }

    /// Computes the weights of every tile, over threads, and what `consume` makes of them, in order.
    fn map<T: Send>(&self, consume: impl Fn(&TileWeights<'_>) -> T + Sync) -> Vec<T> {
        let compute = |scratch: &mut (Vec<f32>, Vec<f32>), tile: &Tile| {
            let (queries, weights) = scratch;
            consume(&self.weights(*tile, queries, weights))
        };
        self.list.par_iter().map_init(Default::default, compute).collect()
    }

    fn weights<'s>(&self, tile: Tile, queries: &mut Vec<f32>, weights: &'s mut Vec<f32>) -> TileWeights<'s> {
        let HeadLayout { num_heads, head_dim, .. } = self.layout;
        let group_size = self.layout.group_size();
        queries.clear();
        for head in tile.kv_head * group_size..(tile.kv_head + 1) * group_size {
            for row in tile.first_row..tile.first_row + tile.num_rows {
                let start = (row * num_heads + head) * head_dim;
                queries.extend_from_slice(&self.block.queries[start..start + head_dim]);
            }
        }
        let first_row = self.block.first_row + tile.first_row;
        let first_key = self.keys.past_len(tile.kv_head) + first_row; // the first row's own
        let num_keys = first_key + tile.num_rows;
        let rows = group_size * tile.num_rows;
        weights.resize(rows * num_keys, 0.0);
        let keys = Matrix::new(self.keys.head(tile.kv_head), num_keys, head_dim, head_dim).transposed();
        MatrixMut::new(weights, rows, num_keys, num_keys).set_product(
            Matrix::new(queries, rows, head_dim, head_dim),
            keys,
            self.layout.scale(),
        );
        let set = instruction_set();
        for (index, row) in weights.chunks_exact_mut(num_keys).enumerate() {
            let (seen, hidden) = row.split_at_mut(first_key + index % tile.num_rows + 1);
            vector::softmax(set, seen);
            hidden.fill(0.0);
        }
        TileWeights { kv_head: tile.kv_head, num_rows: tile.num_rows, first_row, num_keys, weights }
    }
}
