//! Attention of a block of prompt rows over all keys up to them, with the statistics that profiling needs.
//!
//! A prompt may come on top of a filled cache, whose heads keep different numbers of rows: a head's own past rows are
//! then the first of its keys, and every row of the prompt sees all of them.
//!
//! Query rows are taken in tiles. A tile's scores are complete rows, so its softmax, its output and its statistics come
//! out of one pass; scratch is O(tile x n) for each thread, and no map of the prompt is ever stored. Weights are not
//! divided by their rows' sums: outputs and statistics, which are fewer numbers, are. Tiles are taken in strips, which
//! threads share out among themselves.
//!
//! In a layer with a sliding window, a strip begins at the first key that any of its rows sees: work and scratch are
//! O(window) for each row.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::prompt_rows::PromptRows;
use super::{HeadLayout, expect_len};
use crate::attention::map::HeadGrid;
use crate::compress::stats::{HeadStats, LayerStats, StatsRequest, UnscaledRows, unscaled_row_difference};
use crate::error::{Error, Result};
use crate::kernels::int16;
use crate::kernels::vector::{self, instruction_set};
use crate::stop;

/// Scores that a tile may hold: they should stay in a core's cache between the two products.
const TILE_SCORES: usize = 192 * 1024;

/// Query rows of a tile, at most, in steps that products take at a time; at least it is one step.
const TILE_STEPS: usize = 10;

/// Query rows of a strip, at least (a prompt's last may have fewer): its tiles share one set of statistics.
const STRIP_ROWS: usize = 60;

/// A block of prompt rows to attend from.
#[derive(Debug, Clone, Copy)]
pub struct QueryBlock<'a> {
    /// `[seq_len, num_heads, head_dim]`, rotated.
    pub queries: &'a [f32],
    /// Index of the first row in the prompt; row `i` sees all past keys, and the prompt's keys `0..=first_row + i`, as far
    /// as they are in its window, if there is one.
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
    let (request, sums) = match stats {
        Some(stats) => {
            let LayerStats { request, heads } = stats;
            let groups = heads.chunks_mut(layout.group_size());
            let sums: Vec<_> =
                groups.map(|heads| Mutex::new(InOrder { heads, next: 0, early: BTreeMap::new() })).collect();
            (&*request, Some(sums))
        }
        None => (&empty, None),
    };
    let maps: Option<Vec<Mutex<&mut HeadGrid>>> = maps.map(|maps| maps.iter_mut().map(Mutex::new).collect());
    let collect = sums.is_some();
    let first_profiled = keys.first_profiled();

    let group_size = layout.group_size();
    let head_dim = layout.head_dim;
    let attend = |strip: Strip, scratch: &mut Scratch| {
        let num_keys = strips.num_keys(strip) - strip.first_key;
        let mut head_stats = if collect { vec![HeadStats::new(request, num_keys); group_size] } else { Vec::new() };
        let mut out = vec![0.0; strip.num_rows * group_size * head_dim]; // [num_rows, group_size, head_dim]
        let Scratch { map, products, buffer } = scratch;
        for tile in strips.tiles(strip) {
            stop::check()?;
            let map = strips.map(tile, map, buffer);
            for (head, stats) in head_stats.iter_mut().enumerate() {
                let rows = map.profiled(head, first_profiled);
                let log_sums = map.head_log_sums(head);
                stats.set_log_sums(map.num_keys - rows.scales.len(), &log_sums[map.num_rows - rows.scales.len()..]);
                stats.add_rows(request, rows);
            }
            if let Some(maps) = &maps {
                for head in 0..group_size {
                    let grid = &maps[tile.kv_head * group_size + head];
                    let mut grid = grid.lock().unwrap_or_else(PoisonError::into_inner);
                    for (row, scale, weights) in map.head(head).rows() {
                        let unseen = std::iter::repeat_n(0.0, strip.first_key);
                        let weights: Vec<f32> = unseen.chain(weights.iter().map(|weight| weight * scale)).collect();
                        grid.add_row(row, &weights)?;
                    }
                }
            }
            let rows = group_size * tile.num_rows;
            products.resize(rows * head_dim, 0.0);
            let seen = tile.first_key..tile.first_key + map.num_keys;
            values.sums(tile.kv_head, map.weights, seen, products, buffer);
            let first = tile.first_row - strip.first_row;
            for (index, (row, &scale)) in products.chunks_exact(head_dim).zip(map.scales).enumerate() {
                let (head, token) = (index / tile.num_rows, first + index % tile.num_rows);
                let start = (token * group_size + head) * head_dim;
                for (out, &number) in out[start..start + head_dim].iter_mut().zip(row) {
                    *out = number * scale;
                }
            }
        }
        if let Some(sums) = sums.as_ref().and_then(|sums| sums.get(strip.kv_head)) {
            let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
            sums.add(strip.first_row / strips.strip_rows, (strip.first_key, head_stats));
        }
        Ok(out)
    };
    let results: Vec<Vec<f32>> = strips.for_all(attend).into_iter().collect::<Result<_>>()?;

    let mut out = vec![0.0; block.queries.len()];
    let (query_width, group_width) = (layout.query_width(), group_size * head_dim);
    // Strips with the same rows, one for each KV head, stand together.
    let rows = results.par_chunks(layout.num_kv_heads).zip(out.par_chunks_mut(strips.strip_rows * query_width));
    rows.for_each(|(results, out)| {
        for (kv_head, strip_out) in results.iter().enumerate() {
            for (out, row) in out.chunks_exact_mut(query_width).zip(strip_out.chunks_exact(group_width)) {
                out[kv_head * group_width..(kv_head + 1) * group_width].copy_from_slice(row);
            }
        }
    });
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
    let first_profiled = keys.first_profiled();
    let results = strips.for_all(|strip, Scratch { map, buffer, .. }| {
        let masks = masks(strip.kv_head);
        let num_keys = (keys.past_len(strip.kv_head) + keys.len()).saturating_sub(strip.first_key);
        let mut worst = vec![0.0f32; masks.len()];
        for tile in strips.tiles(strip) {
            if stop::is_requested() {
                break;
            }
            let map = strips.map(tile, map, buffer);
            let rows = (0..layout.group_size()).flat_map(|head| map.profiled(head, first_profiled).rows());
            for (_, scale, weights) in rows {
                for (worst, mask) in worst.iter_mut().zip(masks) {
                    let settled = num_keys.saturating_sub(mask.len());
                    *worst = worst.max(unscaled_row_difference(settled, weights, scale, mask));
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
    /// The first key that is looked at; rows of the strip may see fewer.
    first_key: usize,
}

/// Statistics of one KV head's query heads, to which strips are added in their order, whoever is done first: sums do not
/// depend on threads, and few strips' statistics are there at a time.
struct InOrder<'a> {
    heads: &'a mut [HeadStats],
    /// The strip that is added next.
    next: usize,
    /// Strips that were done before it: their first keys, and statistics from there on.
    early: BTreeMap<usize, (usize, Vec<HeadStats>)>,
}

impl InOrder<'_> {
    fn add(&mut self, strip: usize, stats: (usize, Vec<HeadStats>)) {
        self.early.insert(strip, stats);
        while let Some((first_key, stats)) = self.early.remove(&self.next) {
            for (head, stats) in self.heads.iter_mut().zip(&stats) {
                head.merge_from(first_key, stats);
            }
            self.next += 1;
        }
    }
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
}

/// One thread's buffers, reused from tile to tile.
#[derive(Default)]
struct Scratch {
    map: MapScratch,
    products: Vec<f32>,
    buffer: int16::Buffer,
}

/// What a [`TileMap`] is made in.
#[derive(Default)]
struct MapScratch {
    queries: Vec<f32>,
    weights: Vec<f32>,
    scales: Vec<f32>,
    log_sums: Vec<f32>,
}

/// A tile's rows of the attention maps of a query group, not yet divided by their sums.
struct TileMap<'a> {
    num_rows: usize,
    /// Index of the first row in the prompt.
    first_row: usize,
    /// Keys from the tile's first to the last row's own.
    num_keys: usize,
    /// `[group_size, num_rows, num_keys]`; 0 beyond each row's own key, and before the first that it sees.
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

    /// The rows of one query head that are profiled, counted from the first of the prompt that is.
    fn profiled(&self, head: usize, first_profiled: usize) -> UnscaledRows<'a> {
        let rows = self.head(head);
        let skipped = first_profiled.saturating_sub(self.first_row).min(self.num_rows);
        UnscaledRows {
            first_row: (self.first_row + skipped).saturating_sub(first_profiled),
            weights: &rows.weights[skipped * self.num_keys..],
            scales: &rows.scales[skipped..],
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
        // A window's strip sees less of them, and begins at a whole step.
        let in_window = |size: usize| size.saturating_add(STRIP_ROWS + PromptRows::first_step()).min(num_keys);
        let num_keys = keys.window_size().map_or(num_keys, in_window);
        let tile_rows = TILE_SCORES / (layout.group_size() * num_keys.max(1));
        let step = keys.row_step();
        let tile_rows = (tile_rows / step).clamp(1, TILE_STEPS) * step;
        let strip_rows = STRIP_ROWS.next_multiple_of(tile_rows);
        let list = (0..seq_len)
            .step_by(strip_rows)
            .flat_map(|first_row| {
                let num_rows = strip_rows.min(seq_len - first_row);
                (0..layout.num_kv_heads).map(move |kv_head| {
                    let seen = keys.seen(kv_head, block.first_row + first_row);
                    let first_key = seen.start / PromptRows::first_step() * PromptRows::first_step();
                    Strip { kv_head, first_row, num_rows, first_key }
                })
            })
            .collect();
        Ok(Self { layout, block, keys, tile_rows, strip_rows, list })
    }

    /// What `work` makes of every strip, in order; threads claim one after the other, so that they are done about in order,
    /// too.
    fn for_all<T: Send>(&self, work: impl Fn(Strip, &mut Scratch) -> T + Sync) -> Vec<T> {
        let results: Vec<Mutex<Option<T>>> = self.list.iter().map(|_| Mutex::new(None)).collect();
        let next = AtomicUsize::new(0);
        let claim = || {
            let index = next.fetch_add(1, Ordering::Relaxed);
            self.list.get(index).map(|&strip| (strip, &results[index]))
        };
        rayon::scope(|scope| {
            for _ in 0..rayon::current_num_threads().min(self.list.len()) {
                scope.spawn(|_| {
                    let mut scratch = Scratch::default();
                    while let Some((strip, result)) = claim() {
                        let done = work(strip, &mut scratch);
                        *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
                    }
                });
            }
        });
        let results = results.into_iter();
        results.filter_map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    fn tiles(&self, strip: Strip) -> impl Iterator<Item = Strip> {
        let tile_rows = self.tile_rows;
        (0..strip.num_rows).step_by(tile_rows).map(move |row| Strip {
            first_row: strip.first_row + row,
            num_rows: tile_rows.min(strip.num_rows - row),
            ..strip
        })
    }

    /// Keys up to the own one of a strip's last row.
    fn num_keys(&self, strip: Strip) -> usize {
        self.keys.past_len(strip.kv_head) + self.block.first_row + strip.first_row + strip.num_rows
    }

    /// Computes a tile's rows of the attention maps.
    fn map<'s>(&self, tile: Strip, scratch: &'s mut MapScratch, buffer: &mut int16::Buffer) -> TileMap<'s> {
        let MapScratch { queries, weights, scales, log_sums } = scratch;
        let HeadLayout { num_heads, head_dim, .. } = self.layout;
        let group_size = self.layout.group_size();
        queries.clear();
        for head in tile.kv_head * group_size..(tile.kv_head + 1) * group_size {
            for row in tile.first_row..tile.first_row + tile.num_rows {
                let start = (row * num_heads + head) * head_dim;
                queries.extend_from_slice(&self.block.queries[start..start + head_dim]);
            }
        }
        let end = self.num_keys(tile);
        let num_keys = end - tile.first_key;
        let rows = group_size * tile.num_rows;
        // What a tile before left is overwritten.
        weights.resize(rows * num_keys, 0.0);
        self.keys.scores(tile.kv_head, queries, self.layout.scale(), tile.first_key..end, weights, buffer);
        let set = instruction_set();
        scales.clear();
        log_sums.clear();
        for (index, row) in weights.chunks_exact_mut(num_keys).enumerate() {
            let seen = self.keys.seen(tile.kv_head, self.block.first_row + tile.first_row + index % tile.num_rows);
            let (seen_or_gone, hidden) = row.split_at_mut(seen.end - tile.first_key);
            let (gone, seen) = seen_or_gone.split_at_mut(seen.start - tile.first_key);
            let max = vector::max(set, seen);
            let sum = vector::exp_minus_max(set, seen, max);
            scales.push(1.0 / sum);
            log_sums.push(max + sum.ln());
            gone.fill(0.0);
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
