//! Attention of a block of prompt rows over all keys up to them, with the statistics that profiling needs.
//!
//! A prompt may come on top of a filled cache, whose heads keep different numbers of rows: a head's own past rows are
//! then the first of its keys, and every row of the prompt sees all of them.
//!
//! Query rows are taken in tiles. A tile's scores are complete rows, so its softmax, its output and its statistics come
//! out of one pass; scratch is O(tile x n) for each thread, and no map of the prompt is ever stored. Weights are not
//! divided by their rows' sums: outputs and statistics, which are fewer numbers, are. Tiles are taken in strips, which
//! threads share out among themselves.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::{HeadLayout, expect_len};
use crate::attention::map::HeadGrid;
use crate::error::{Error, Result};
use crate::kernels::attend::HeadRows;
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};
use crate::profile::stats::{HeadStats, LayerStats, StatsRequest, UnscaledRows, unscaled_row_difference};
use crate::stop;

/// Scores that a tile may hold: they should stay in a core's cache between the two products.
const TILE_SCORES: usize = 192 * 1024;

/// Query rows of a tile, at least and at most. Multiples of [`ROW_STEP`].
const TILE_ROWS: std::ops::RangeInclusive<usize> = 6..=60;

/// The product of matrices takes so many rows at a time.
const ROW_STEP: usize = 6;

/// Numbers in a cache line.
const CACHE_LINE: usize = 16;

/// Query rows of a strip, at least (a prompt's last may have fewer): its tiles share one set of statistics.
const STRIP_ROWS: usize = 60;

/// One layer's keys or values while a prompt is processed: for each KV head `[past_len + len, head_dim]`, the rows that it
/// kept of earlier tokens and then the prompt's.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRows {
    /// `[num_kv_heads]`
    heads: Vec<HeadNumbers>,
    layout: HeadLayout,
    capacity: usize,
    len: usize,
}

/// The order in which a head's numbers lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Row after row: what sums of rows (values) are fastest with.
    Rows,
    /// Column after column: what products of queries with all rows (keys) are fastest with.
    Columns {
        /// Numbers from one column to the next.
        stride: usize,
    },
}

/// One KV head's part of [`PromptRows`].
#[derive(Debug, Clone, PartialEq)]
struct HeadNumbers {
    /// Room for all rows; 0 where there is none yet.
    numbers: Vec<f32>,
    order: Order,
    past_len: usize,
}

impl HeadNumbers {
    /// * `past`: `[past_len, head_dim]`
    fn by_rows(mut past: Vec<f32>, head_dim: usize, capacity: usize) -> Self {
        let past_len = past.len() / head_dim;
        past.resize((past_len + capacity) * head_dim, 0.0);
        Self { numbers: past, order: Order::Rows, past_len }
    }

    /// * `past`: `[past_len, head_dim]`
    fn by_columns(past: &[f32], head_dim: usize, capacity: usize) -> Self {
        let past_len = past.len() / head_dim;
        // Whole cache lines, and an odd number of them: columns that are a power of two apart would share few places of
        // the cache.
        let stride = ((past_len + capacity).div_ceil(CACHE_LINE) | 1) * CACHE_LINE;
        let order = Order::Columns { stride };
        let mut head = Self { numbers: vec![0.0; stride * head_dim], order, past_len };
        head.set(0, past, head_dim, head_dim);
        head
    }

    /// Writes rows from index `first` on.
    ///
    /// * `rows`: `[num_rows, head_dim]`, with `row_stride` numbers from one to the next
    fn set(&mut self, first: usize, rows: &[f32], row_stride: usize, head_dim: usize) {
        match self.order {
            Order::Rows => {
                let own = self.numbers[first * head_dim..].chunks_exact_mut(head_dim);
                for (own, row) in own.zip(rows.chunks(row_stride)) {
                    own.copy_from_slice(&row[..head_dim]);
                }
            }
            Order::Columns { stride } => {
                for (column, own) in self.numbers.chunks_exact_mut(stride).enumerate() {
                    for (own, row) in own[first..].iter_mut().zip(rows.chunks(row_stride)) {
                        *own = row[column];
                    }
                }
            }
        }
    }
}

impl PromptRows {
    /// Room for a prompt of `capacity` tokens with nothing before it.
    ///
    /// # Panics
    /// If the layout is none (see [`HeadLayout::check`]).
    #[must_use]
    pub fn with_capacity(layout: HeadLayout, capacity: usize) -> Self {
        assert!(layout.check().is_ok(), "{layout:?}");
        let head = HeadNumbers::by_rows(Vec::new(), layout.head_dim, capacity);
        Self { heads: vec![head; layout.num_kv_heads], layout, capacity, len: 0 }
    }

    /// Keys and values, with room for a prompt of `capacity` tokens behind what each head keeps already.
    ///
    /// * `past`: `[num_kv_heads]`
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of heads, or heads of another dimension.
    pub fn after(layout: HeadLayout, capacity: usize, past: &[HeadRows<'_>]) -> Result<(Self, Self)> {
        layout.check()?;
        if past.len() != layout.num_kv_heads {
            return Err(Error::shape("cached heads", layout.num_kv_heads, past.len()));
        }
        let head_dim = layout.head_dim;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for rows in past {
            if rows.head_dim() != head_dim {
                return Err(Error::shape("cached rows", head_dim, rows.head_dim()));
            }
            let past = rows.len() * head_dim;
            let mut head_keys = Vec::with_capacity(past);
            let mut head_values = Vec::with_capacity(past + capacity * head_dim);
            rows.widen_to(&mut head_keys, &mut head_values);
            keys.push(HeadNumbers::by_columns(&head_keys, head_dim, capacity));
            values.push(HeadNumbers::by_rows(head_values, head_dim, capacity));
        }
        let rows = |heads| Self { heads, layout, capacity, len: 0 };
        Ok((rows(keys), rows(values)))
    }

    /// The keys or the values of a whole prompt.
    ///
    /// * `heads`: for each KV head its rows, `[past_lens[head] + len, head_dim]`
    /// * `past_lens`: `[num_kv_heads]` how many of them come before the prompt's first
    ///
    /// # Errors
    /// [`Error::Shape`] if sizes do not fit.
    pub fn whole(layout: HeadLayout, heads: Vec<Vec<f32>>, past_lens: &[usize], len: usize) -> Result<Self> {
        layout.check()?;
        let lens: Vec<usize> = heads.iter().map(Vec::len).collect();
        let expected: Vec<usize> =
            past_lens.iter().map(|past_len| past_len.saturating_add(len).saturating_mul(layout.head_dim)).collect();
        if lens != expected || lens.len() != layout.num_kv_heads {
            return Err(Error::shape("a prompt's rows", expected, lens));
        }
        let head = |(numbers, &past_len)| HeadNumbers { numbers, order: Order::Rows, past_len };
        let heads = heads.into_iter().zip(past_lens).map(head).collect();
        Ok(Self { heads, layout, capacity: len, len })
    }

    /// Checks that these are the rows of such KV heads.
    pub(super) fn expect_layout(&self, what: &'static str, layout: HeadLayout) -> Result<()> {
        let sizes = |layout: HeadLayout| (layout.num_kv_heads, layout.head_dim);
        if sizes(self.layout) == sizes(layout) { Ok(()) } else { Err(Error::shape(what, layout, self.layout)) }
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
        self.heads[kv_head].past_len
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
        for (index, head) in self.heads.iter_mut().enumerate() {
            head.set(head.past_len + self.len, rows.get(index * head_dim..).unwrap_or_default(), width, head_dim);
        }
        self.len += seq_len;
        Ok(())
    }

    /// Writes one row of a KV head to `out`, `[head_dim]`; those before the prompt's first count.
    ///
    /// # Panics
    /// If there is no such row, or `out` has another size.
    pub fn copy_row(&self, kv_head: usize, row: usize, out: &mut [f32]) {
        let (head, head_dim) = (&self.heads[kv_head], self.layout.head_dim);
        assert!(row < head.past_len + self.len && out.len() == head_dim, "row {row} of a prompt's rows");
        match head.order {
            Order::Rows => out.copy_from_slice(&head.numbers[row * head_dim..(row + 1) * head_dim]),
            Order::Columns { stride } => {
                for (out, column) in out.iter_mut().zip(head.numbers.chunks_exact(stride)) {
                    *out = column[row];
                }
            }
        }
    }

    /// A copy of some rows of a KV head, `[rows.len(), head_dim]`; those before the prompt's first count.
    ///
    /// # Panics
    /// If there are no such rows.
    #[must_use]
    pub fn rows(&self, kv_head: usize, rows: Range<usize>) -> Vec<f32> {
        let (head, head_dim) = (&self.heads[kv_head], self.layout.head_dim);
        assert!(rows.start <= rows.end && rows.end <= head.past_len + self.len, "rows {rows:?} of a prompt's");
        match head.order {
            Order::Rows => head.numbers[rows.start * head_dim..rows.end * head_dim].to_vec(),
            Order::Columns { stride } => {
                let mut out = vec![0.0; rows.len() * head_dim];
                for (index, column) in head.numbers.chunks_exact(stride).enumerate() {
                    for (row, &number) in out.chunks_exact_mut(head_dim).zip(&column[rows.clone()]) {
                        row[index] = number;
                    }
                }
                out
            }
        }
    }

    /// Some rows of one head, `[rows.len(), head_dim]`.
    pub(super) fn matrix(&self, kv_head: usize, rows: Range<usize>) -> Matrix<'_> {
        let (head, head_dim) = (&self.heads[kv_head], self.layout.head_dim);
        match head.order {
            Order::Rows => Matrix::new(&head.numbers[rows.start * head_dim..], rows.len(), head_dim, head_dim),
            Order::Columns { stride } => {
                Matrix::new(&head.numbers[rows.start..], head_dim, rows.len(), stride).transposed()
            }
        }
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
    stats: Option<&mut LayerStats>,
    maps: Option<&mut [HeadGrid]>,
) -> Result<Vec<f32>> {
    let strips = Strips::new(layout, block, keys)?;
    values.expect_layout("prompt values", layout)?;
    let lens = |rows: &PromptRows| (0..layout.num_kv_heads).map(|head| rows.past_len(head) + rows.len()).collect();
    let (key_lens, value_lens): (Vec<usize>, Vec<usize>) = (lens(keys), lens(values));
    if values.len() != keys.len() || value_lens != key_lens {
        return Err(Error::shape("prompt values", key_lens, value_lens));
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
    let attend = |strip: Strip, scratch: &mut Scratch| {
        let num_keys = strips.num_keys(strip);
        let mut head_stats = if collect { vec![HeadStats::new(request, num_keys); group_size] } else { Vec::new() };
        let mut out = vec![0.0; strip.num_rows * group_size * head_dim]; // [num_rows, group_size, head_dim]
        let Scratch { queries, weights, scales, log_sums, products } = scratch;
        for tile in strips.tiles(strip) {
            stop::check()?;
            let map = strips.map(tile, queries, weights, scales, log_sums);
            for (head, stats) in head_stats.iter_mut().enumerate() {
                stats.add_rows(request, map.head(head));
                stats.set_log_sums(map.num_keys - map.num_rows, map.head_log_sums(head));
            }
            if let Some(maps) = &maps {
                for head in 0..group_size {
                    let grid = &maps[tile.kv_head * group_size + head];
                    let mut grid = grid.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    for (row, scale, weights) in map.head(head).rows() {
                        let weights: Vec<f32> = weights.iter().map(|weight| weight * scale).collect();
                        grid.add_row(row, &weights)?;
                    }
                }
            }
            let rows = group_size * tile.num_rows;
            products.resize(rows * head_dim, 0.0);
            MatrixMut::new(products, rows, head_dim, head_dim).set_product(
                Matrix::new(map.weights, rows, map.num_keys, map.num_keys),
                values.matrix(tile.kv_head, 0..map.num_keys),
                1.0,
            );
            let first = tile.first_row - strip.first_row;
            for (index, (row, &scale)) in products.chunks_exact(head_dim).zip(map.scales).enumerate() {
                let (head, token) = (index / tile.num_rows, first + index % tile.num_rows);
                let start = (token * group_size + head) * head_dim;
                for (out, &number) in out[start..start + head_dim].iter_mut().zip(row) {
                    *out = number * scale;
                }
            }
        }
        Ok((out, head_stats))
    };
    let results: Vec<(Vec<f32>, Vec<HeadStats>)> = strips.for_all(attend).into_iter().collect::<Result<_>>()?;

    let mut out = vec![0.0; block.queries.len()];
    let (query_width, group_width) = (layout.query_width(), group_size * head_dim);
    // Strips with the same rows, one for each KV head, stand together.
    let rows = results.par_chunks(layout.num_kv_heads).zip(out.par_chunks_mut(strips.strip_rows * query_width));
    rows.for_each(|(results, out)| {
        for (kv_head, (strip_out, _)) in results.iter().enumerate() {
            for (out, row) in out.chunks_exact_mut(query_width).zip(strip_out.chunks_exact(group_width)) {
                out[kv_head * group_width..(kv_head + 1) * group_width].copy_from_slice(row);
            }
        }
    });
    if let Some(stats) = stats {
        stats.heads.par_iter_mut().enumerate().for_each(|(head, stats)| {
            for (_, strip_stats) in results.iter().skip(head / group_size).step_by(layout.num_kv_heads) {
                stats.merge(&strip_stats[head % group_size]);
            }
        });
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
/// [`Error::Shape`] if sizes do not fit; [`Error::Interrupted`] if a [stop] is requested.
pub fn largest_differences(
    layout: HeadLayout,
    block: QueryBlock<'_>,
    keys: &PromptRows,
    pending: &[(usize, Vec<Vec<f32>>)],
) -> Result<Vec<Vec<f32>>> {
    let mut strips = Strips::new(layout, block, keys)?;
    let slot = |kv_head: usize| pending.iter().position(|(head, _)| *head == kv_head);
    strips.list.retain(|strip| slot(strip.kv_head).is_some());
    let masks = |kv_head: usize| slot(kv_head).map_or(&[][..], |slot| &pending[slot].1);
    for (kv_head, masks) in pending {
        let num_keys = keys.past_len(*kv_head) + keys.len();
        if let Some(mask) = masks.iter().find(|mask| mask.len() > num_keys) {
            return Err(Error::shape("a mask of keys", format!("at most {num_keys}"), mask.len()));
        }
    }
    let results = strips.for_all(|strip, Scratch { queries, weights, scales, log_sums, .. }| {
        let masks = masks(strip.kv_head);
        let num_keys = keys.past_len(strip.kv_head) + keys.len();
        let mut worst = vec![0.0f32; masks.len()];
        for tile in strips.tiles(strip) {
            if stop::is_requested() {
                break;
            }
            let map = strips.map(tile, queries, weights, scales, log_sums);
            for (_, scale, weights) in (0..layout.group_size()).flat_map(|head| map.head(head).rows()) {
                for (worst, mask) in worst.iter_mut().zip(masks) {
                    *worst = worst.max(unscaled_row_difference(num_keys - mask.len(), weights, scale, mask));
                }
            }
        }
        worst
    });
    stop::check()?;
    let mut worst: Vec<Vec<f32>> = pending.iter().map(|(_, masks)| vec![0.0; masks.len()]).collect();
    for (strip, result) in strips.list.iter().zip(results) {
        if let Some(slot) = slot(strip.kv_head) {
            for (worst, value) in worst[slot].iter_mut().zip(result) {
                *worst = worst.max(value);
            }
        }
    }
    Ok(worst)
}

/// Query rows of one KV head: a strip, which one thread works on, or a tile of it, whose scores exist at the same time.
#[derive(Debug, Clone, Copy)]
struct Strip {
    kv_head: usize,
    /// Row of the block, and number of rows.
    first_row: usize,
    num_rows: usize,
}

/// All strips of a block, in the order in which their results are merged; it does not depend on the number of threads.
struct Strips<'a> {
    layout: HeadLayout,
    block: QueryBlock<'a>,
    keys: &'a PromptRows,
    tile_rows: usize,
    strip_rows: usize,
    /// Strip after strip of rows, each for all KV heads.
    list: Vec<Strip>,
    /// Buffers that no thread uses at the moment.
    scratch: Mutex<Vec<Scratch>>,
}

/// One thread's buffers, reused from tile to tile.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    weights: Vec<f32>,
    scales: Vec<f32>,
    log_sums: Vec<f32>,
    products: Vec<f32>,
}

/// A tile's rows of the attention maps of a query group, not yet divided by their sums.
struct TileMap<'a> {
    num_rows: usize,
    /// Index of the first row in the prompt.
    first_row: usize,
    /// Keys that the last row sees.
    num_keys: usize,
    /// `[group_size, num_rows, num_keys]`; 0 beyond each row's own key.
    weights: &'a [f32],
    /// `[group_size, num_rows]`
    scales: &'a [f32],
    /// `[group_size, num_rows]` logarithms of the rows' sums of exponentials.
    log_sums: &'a [f32],
}

impl<'a> TileMap<'a> {
    /// The rows of one query head of the group.
    fn head(&self, head: usize) -> UnscaledRows<'a> {
        let rows = head * self.num_rows..(head + 1) * self.num_rows;
        UnscaledRows {
            first_row: self.first_row,
            weights: &self.weights[rows.start * self.num_keys..rows.end * self.num_keys],
            scales: &self.scales[rows],
        }
    }

    /// `[num_rows]` of one query head of the group.
    fn head_log_sums(&self, head: usize) -> &'a [f32] {
        &self.log_sums[head * self.num_rows..(head + 1) * self.num_rows]
    }
}

impl<'a> Strips<'a> {
    fn new(layout: HeadLayout, block: QueryBlock<'a>, keys: &'a PromptRows) -> Result<Self> {
        layout.check()?;
        keys.expect_layout("prompt keys", layout)?;
        let seq_len = block.queries.len() / layout.query_width();
        expect_len("queries", block.queries, &[seq_len, layout.num_heads, layout.head_dim])?;
        let prompt_keys = block.first_row.saturating_add(seq_len);
        if keys.len() < prompt_keys {
            return Err(Error::shape("prompt keys", format!("at least {prompt_keys}"), keys.len()));
        }
        let longest_past = (0..layout.num_kv_heads).map(|kv_head| keys.past_len(kv_head)).max().unwrap_or(0);
        let num_keys = longest_past + prompt_keys;
        let tile_rows = TILE_SCORES / (layout.group_size() * num_keys.max(1));
        let tile_rows = (tile_rows / ROW_STEP * ROW_STEP).clamp(*TILE_ROWS.start(), *TILE_ROWS.end());
        let strip_rows = STRIP_ROWS.next_multiple_of(tile_rows);
        let list = (0..seq_len)
            .step_by(strip_rows)
            .flat_map(|first_row| {
                let num_rows = strip_rows.min(seq_len - first_row);
                (0..layout.num_kv_heads).map(move |kv_head| Strip { kv_head, first_row, num_rows })
            })
            .collect();
        Ok(Self { layout, block, keys, tile_rows, strip_rows, list, scratch: Mutex::default() })
    }

    /// What `work` makes of every strip, over threads, in order.
    fn for_all<T: Send>(&self, work: impl Fn(Strip, &mut Scratch) -> T + Sync) -> Vec<T> {
        let idle = || self.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let compute = |&strip: &Strip| {
            let mut scratch = idle().pop().unwrap_or_default();
            let result = work(strip, &mut scratch);
            idle().push(scratch);
            result
        };
        self.list.par_iter().with_max_len(1).map(compute).collect()
    }

    fn tiles(&self, strip: Strip) -> impl Iterator<Item = Strip> {
        let tile_rows = self.tile_rows;
        (0..strip.num_rows).step_by(tile_rows).map(move |row| Strip {
            first_row: strip.first_row + row,
            num_rows: tile_rows.min(strip.num_rows - row),
            ..strip
        })
    }

    /// Keys that a strip's last row sees.
    fn num_keys(&self, strip: Strip) -> usize {
        self.keys.past_len(strip.kv_head) + self.block.first_row + strip.first_row + strip.num_rows
    }

    /// Computes a tile's rows of the attention maps.
    fn map<'s>(
        &self,
        tile: Strip,
        queries: &mut Vec<f32>,
        weights: &'s mut Vec<f32>,
        scales: &'s mut Vec<f32>,
        log_sums: &'s mut Vec<f32>,
    ) -> TileMap<'s> {
        let HeadLayout { num_heads, head_dim, .. } = self.layout;
        let group_size = self.layout.group_size();
        queries.clear();
        for head in tile.kv_head * group_size..(tile.kv_head + 1) * group_size {
            for row in tile.first_row..tile.first_row + tile.num_rows {
                let start = (row * num_heads + head) * head_dim;
                queries.extend_from_slice(&self.block.queries[start..start + head_dim]);
            }
        }
        let num_keys = self.num_keys(tile);
        let rows = group_size * tile.num_rows;
        // What a tile before left is overwritten.
        weights.resize(rows * num_keys, 0.0);
        MatrixMut::new(weights, rows, num_keys, num_keys).set_product(
            Matrix::new(queries, rows, head_dim, head_dim),
            self.keys.matrix(tile.kv_head, 0..num_keys).transposed(),
            self.layout.scale(),
        );
        let set = instruction_set();
        scales.clear();
        log_sums.clear();
        for (index, row) in weights.chunks_exact_mut(num_keys).enumerate() {
            let (seen, hidden) = row.split_at_mut(num_keys - (tile.num_rows - 1 - index % tile.num_rows));
            let max = vector::max(set, seen);
            let sum = vector::exp_minus_max(set, seen, max);
            scales.push(1.0 / sum);
            log_sums.push(max + sum.ln());
            hidden.fill(0.0);
        }
        TileMap {
            num_rows: tile.num_rows,
            first_row: self.block.first_row + tile.first_row,
            num_keys,
            weights,
            scales,
            log_sums,
        }
    }
}
