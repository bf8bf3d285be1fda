//! Attention of blocks of prompt rows over all keys up to them, with the statistics that profiling needs, as candle
//! operations.
//!
//! A prompt may come on top of a filled cache, whose heads keep different numbers of rows. Past rows then end in the same
//! column for every head, and shorter heads are padded in front, where a mask hides them: so every distance from a row's
//! own key, on which windows depend, is the same for all heads.
//!
//! A block's weights are complete rows, `[num_kv_heads, group_size, rows, keys]`, and exist only while the block is
//! processed. Sums stay on the device until the layer is done: [`DeviceStats::finish`] brings them to the host at once.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::super::HeadLayout;
use super::prompt::{PromptTensors, WindowTensors};
use crate::attention::map::HeadGrid;
use crate::compress::stats::{LayerStats, StatsRequest};
use crate::error::{Error, Result};
use crate::ops::{MASKED, Ops};
use crate::stop;

/// Weights that a block may hold, over all heads.
const BLOCK_WEIGHTS: usize = 16 << 20;

/// Query rows of a block, at least: fewer keep no device busy.
const MIN_BLOCK_ROWS: usize = 16;

/// A block of prompt rows to attend from.
#[derive(Debug, Clone)]
pub struct PromptBlock {
    /// `[num_heads, seq_len, head_dim]`, f32, rotated.
    pub queries: Tensor,
    /// Index of the first row in the prompt.
    pub first_row: usize,
}

/// Statistics of all query heads of a layer, on the device; keys are columns of [`PromptTensors`].
#[derive(Debug)]
pub struct DeviceStats {
    request: StatsRequest,
    num_keys: usize,
    /// The first row of the prompt that counts.
    first_profiled: usize,
    /// `[num_kv_heads, group_size, num_keys]` each, once there are rows.
    column_sums: Option<Tensor>,
    profiled_sums: Option<Tensor>,
    window_sums: Option<Tensor>,
    /// `[1, 1, 1, num_keys]` for each level.
    masks: Vec<Tensor>,
    /// `[num_kv_heads, group_size, levels]`, once there are rows.
    differences: Option<Tensor>,
    /// `[num_kv_heads, group_size, rows]` for each block.
    log_sums: Vec<Tensor>,
}

impl DeviceStats {
    /// Empty statistics.
    ///
    /// * `prompt`: with room for all rows
    ///
    /// # Errors
    /// [`Error::Shape`] for a mask that is longer than there are keys, [`Error::Tensor`] if the device refuses.
    pub fn new(ops: &Ops, request: &StatsRequest, prompt: &PromptTensors) -> Result<Self> {
        let num_keys = prompt.past + prompt.capacity;
        let upload = |mask: &Vec<f32>| ops.upload(&widened(mask, num_keys)?, (1, 1, 1, num_keys));
        Ok(Self {
            masks: request.masks.iter().map(upload).collect::<Result<_>>()?,
            request: request.clone(),
            num_keys,
            first_profiled: prompt.first_profiled(),
            column_sums: None,
            profiled_sums: None,
            window_sums: None,
            differences: None,
            log_sums: Vec::new(),
        })
    }

    /// Takes in the weights of a block of rows, which are profiled either all or not at all, and count all or not at all.
    fn add(&mut self, ops: &Ops, rows: &MapRows) -> Result<()> {
        if rows.first_row < self.first_profiled {
            return Ok(());
        }
        let mass = self.request.mass;
        let is_profiled = mass.is_some_and(|mass| rows.first_row >= self.first_profiled + mass.first_row);
        let all = self.request.column_sums || mass.is_some_and(|mass| mass.first_row == 0);
        let apart = mass.is_some_and(|mass| mass.first_row > 0) && is_profiled;
        if all || apart {
            let sums = column_sums(ops, &rows.weights, rows.first_key, self.num_keys)?;
            if all {
                add_to(ops, &mut self.column_sums, &sums)?;
            }
            if apart {
                add_to(ops, &mut self.profiled_sums, &sums)?;
            }
        }
        if let Some(window) = mass.and_then(|mass| mass.window).filter(|_| is_profiled) {
            let inside = rows.within(ops, window)?;
            let sums = column_sums(ops, &ops.mul(&rows.weights, &inside)?, rows.first_key, self.num_keys)?;
            add_to(ops, &mut self.window_sums, &sums)?;
        }
        if !self.masks.is_empty() {
            let found = differences(ops, rows, &self.masks)?;
            self.differences = Some(match &self.differences {
                Some(worst) => ops.maximum(worst, &found)?,
                None => found,
            });
        }
        if let Some(log_sums) = &rows.log_sums {
            self.log_sums.push(log_sums.clone());
        }
        Ok(())
    }

    /// Brings everything to the host.
    ///
    /// * `stats`: empty statistics for the same request, overwritten
    ///
    /// # Errors
    /// [`Error::Tensor`] if the device refuses.
    pub fn finish(&self, ops: &Ops, prompt: &PromptTensors, stats: &mut LayerStats) -> Result<()> {
        let group_size = prompt.layout.group_size();
        let first_key = |head: usize| prompt.past - prompt.past_lens[head / group_size];
        let download = |sums: &Option<Tensor>| sums.as_ref().map(|sums| ops.download(sums)).transpose();
        for (sums, of_head) in [
            (&self.column_sums, (|head| &mut head.column_sums) as fn(&mut crate::compress::HeadStats) -> &mut Vec<f32>),
            (&self.profiled_sums, |head| &mut head.profiled_sums),
            (&self.window_sums, |head| &mut head.window_sums),
        ] {
            let Some(sums) = download(sums)? else { continue };
            for (index, sums) in sums.chunks_exact(self.num_keys).enumerate() {
                *of_head(&mut stats.heads[index]) = sums[first_key(index)..].to_vec();
            }
        }
        if let Some(differences) = download(&self.differences)? {
            for (head, differences) in stats.heads.iter_mut().zip(differences.chunks_exact(self.masks.len())) {
                head.differences = differences.to_vec();
            }
        }
        if !self.log_sums.is_empty() {
            let log_sums = ops.download(&ops.contiguous(&ops.cat(&self.log_sums, 2)?)?)?;
            for (index, rows) in log_sums.chunks_exact(prompt.len - self.first_profiled).enumerate() {
                stats.heads[index].set_log_sums(prompt.past - first_key(index) + self.first_profiled, rows);
            }
        }
        Ok(())
    }
}

/// A mask for a segment, which is the last of all keys, stretched to all: those before are kept.
fn widened(mask: &[f32], num_keys: usize) -> Result<Vec<f32>> {
    let settled = num_keys
        .checked_sub(mask.len())
        .ok_or_else(|| Error::shape("a mask of keys", format!("at most {num_keys}"), mask.len()))?;
    Ok([&vec![1.0; settled][..], mask].concat())
}

fn add_to(ops: &Ops, sums: &mut Option<Tensor>, more: &Tensor) -> Result<()> {
    *sums = Some(match sums.as_ref() {
        Some(sums) => ops.add(sums, more)?,
        None => more.clone(),
    });
    Ok(())
}

/// Sums over the rows of weights, zeros before and behind them: `[num_kv_heads, group_size, num_keys]`.
///
/// * `first_key`: which key is the first of the weights
fn column_sums(ops: &Ops, weights: &Tensor, first_key: usize, num_keys: usize) -> Result<Tensor> {
    let (kv_heads, group_size, rows, seen) = weights.dims4()?;
    let ones = ops.ones((kv_heads * group_size, 1, rows))?;
    let sums = ops.matmul(&ones, &weights.reshape((kv_heads * group_size, rows, seen))?)?;
    let sums = sums.reshape((kv_heads, group_size, seen))?;
    let zeros = |count: usize| ops.zeros((kv_heads, group_size, count), DType::F32);
    let end = first_key + seen;
    match (first_key > 0, end < num_keys) {
        (false, false) => Ok(sums),
        (false, true) => ops.cat(&[sums, zeros(num_keys - end)?], 2),
        (true, false) => ops.cat(&[zeros(first_key)?, sums], 2),
        (true, true) => ops.cat(&[zeros(first_key)?, sums, zeros(num_keys - end)?], 2),
    }
}

/// Largest differences over the rows of weights, see [`row_difference`](crate::compress::stats::row_difference):
/// `[kv_heads, group_size, levels]`.
///
/// * `masks`: for each level, of a shape that stretches to `[kv_heads, 1, 1, num_keys]`
fn differences(ops: &Ops, map: &MapRows, masks: &[Tensor]) -> Result<Tensor> {
    let weights = &map.weights;
    let (kv_heads, group_size, rows, seen) = weights.dims4()?;
    let mut worst = Vec::with_capacity(masks.len());
    for mask in masks {
        let kept = ops.mul(weights, &mask.narrow(3, map.first_key, seen)?)?;
        let (sums, largest) = (ops.sum_last(&kept)?, ops.max_last(&kept)?);
        // A row that keeps nothing has no difference: 0 divided by as little as changes no other sum.
        let renormalised = ops.div(&largest, &ops.shift(&sums, f64::from(f32::MIN_POSITIVE))?)?;
        let rows = ops.relu(&ops.sub(&renormalised, &largest)?)?.reshape((kv_heads, group_size, rows))?;
        worst.push(ops.max_last(&rows)?);
    }
    ops.cat(&worst, 2)
}

/// Attends from a block of prompt rows, causally, and collects statistics.
///
/// * `prompt`: keys and values at least up to the block's last row
/// * `stats`: statistics to add to, if wanted
/// * `maps`: `[num_heads]` down-sampled maps to draw into, if wanted; for a prompt without a past only
///
/// Returns `[seq_len, num_heads * head_dim]`, f32.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Tensor`] if sizes do not fit.
pub fn prefill(
    ops: &Ops,
    layout: HeadLayout,
    block: &PromptBlock,
    prompt: &PromptTensors,
    mut stats: Option<&mut DeviceStats>,
    mut maps: Option<&mut [HeadGrid]>,
) -> Result<Tensor> {
    let HeadLayout { num_kv_heads, head_dim, .. } = layout;
    let group_size = layout.group_size();
    let heads = (0..num_kv_heads).collect::<Vec<_>>();
    let blocks = Blocks::new(ops, layout, block, prompt, &heads)?;
    let counted = prompt.first_profiled();
    let first_profiled = stats.as_ref().and_then(|stats| stats.request.mass).map_or(0, |mass| counted + mass.first_row);
    let log_sums = stats.as_ref().is_some_and(|stats| stats.request.log_sums);
    let mut outs = Vec::new();
    for rows in blocks.cut([counted, first_profiled]) {
        stop::check()?;
        let num_rows = rows.len();
        let map = blocks.map(ops, rows, log_sums)?;
        if let Some(stats) = stats.as_deref_mut() {
            stats.add(ops, &map)?;
        }
        if let Some(maps) = maps.as_deref_mut() {
            draw(ops, &map, prompt, maps)?;
        }
        let seen = map.num_keys()?;
        let flat = map.weights.reshape((num_kv_heads, group_size * num_rows, seen))?;
        let out = ops.matmul(&flat, &prompt.values.narrow(1, map.first_key, seen)?)?;
        let out = out.reshape((num_kv_heads * group_size, num_rows, head_dim))?.transpose(0, 1)?;
        outs.push(ops.contiguous(&out)?.reshape((num_rows, layout.query_width()))?);
    }
    ops.cat(&outs, 0)
}

/// Draws a block's rows into maps.
fn draw(ops: &Ops, map: &MapRows, prompt: &PromptTensors, maps: &mut [HeadGrid]) -> Result<()> {
    if prompt.past > 0 {
        return Err(Error::unsupported("drawing the attention of a further prompt"));
    }
    let (seen, num_rows) = (map.num_keys()?, map.weights.dim(2)?);
    let numbers = ops.download(&map.weights)?;
    for (grid, rows) in maps.iter_mut().zip(numbers.chunks_exact(num_rows * seen)) {
        for (index, row) in rows.chunks_exact(seen).enumerate() {
            let row_index = map.first_row + index;
            let unseen = std::iter::repeat_n(0.0, map.first_key);
            let row: Vec<f32> = unseen.chain(row[..=row_index - map.first_key].iter().copied()).collect();
            grid.add_row(row_index, &row)?;
        }
    }
    Ok(())
}

/// Largest differences of keep-sets that were not known while the prompt was processed: a second pass over its rows.
///
/// * `blocks`: all rows of the prompt
/// * `pending`: pairs of a KV head and its `[levels][n]` masks of 0 and 1 for its last `n` keys; those before are kept
///
/// Returns `[levels]` for each pair: the largest over the rows and the query heads of the KV head.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Tensor`] if sizes do not fit.
pub fn largest_differences(
    ops: &Ops,
    layout: HeadLayout,
    blocks: &[PromptBlock],
    prompt: &PromptTensors,
    pending: &[(usize, Vec<Vec<f32>>)],
) -> Result<Vec<Vec<f32>>> {
    let levels = pending.first().map_or(0, |(_, masks)| masks.len());
    if levels == 0 || pending.iter().any(|(_, masks)| masks.len() != levels) {
        return Err(Error::shape("the masks of a second pass", format!("{levels} levels, and some"), pending.len()));
    }
    let num_keys = prompt.past + prompt.len;
    let masks = (0..levels).map(|level| {
        let of_heads = pending.iter().map(|(_, masks)| widened(&masks[level], num_keys)).collect::<Result<Vec<_>>>()?;
        ops.upload(&of_heads.concat(), (pending.len(), 1, 1, num_keys))
    });
    let masks = masks.collect::<Result<Vec<_>>>()?;
    let heads: Vec<usize> = pending.iter().map(|&(head, _)| head).collect();
    let mut worst: Option<Tensor> = None;
    for block in blocks {
        let blocks = Blocks::new(ops, layout, block, prompt, &heads)?;
        for rows in blocks.cut([prompt.first_profiled(), 0]) {
            stop::check()?;
            if block.first_row + rows.start < prompt.first_profiled() {
                continue;
            }
            let found = differences(ops, &blocks.map(ops, rows, false)?, &masks)?;
            worst = Some(match worst {
                Some(worst) => ops.maximum(&worst, &found)?,
                None => found,
            });
        }
    }
    let worst = worst.ok_or_else(|| Error::shape("the rows of a second pass", "at least 1", 0))?;
    let numbers = ops.download(&worst)?; // [pending, group_size, levels]
    let largest = |group: &[f32]| -> Vec<f32> {
        (0..levels).map(|level| group.iter().skip(level).step_by(levels).fold(0.0, |a: f32, &b| a.max(b))).collect()
    };
    Ok(numbers.chunks_exact(layout.group_size() * levels).map(largest).collect())
}

/// Some heads' queries and keys, ready for products.
struct Blocks<'a> {
    prompt: &'a PromptTensors,
    first_row: usize,
    seq_len: usize,
    /// `[heads, group_size, seq_len, head_dim]`, scaled
    queries: Tensor,
    /// `[heads, past + capacity, head_dim]`
    keys: Tensor,
    /// `[heads, 1, 1, past + capacity]`
    padding: Option<Tensor>,
    /// `[heads, 1, 1, past + capacity]` positions of keys, in a layer with a sliding window.
    positions: Option<Tensor>,
}

/// A block's rows of the attention maps.
struct MapRows {
    /// `[heads, group_size, rows, num_keys]`; 0 beyond each row's own key.
    weights: Tensor,
    /// `[heads, group_size, rows]` logarithms of the rows' sums of exponentials, if wanted.
    log_sums: Option<Tensor>,
    /// Index of the first row in the prompt.
    first_row: usize,
    /// Column of the prompt's keys that is the first here.
    first_key: usize,
    /// Column of the first row's own key, here.
    first_own_key: usize,
}

impl MapRows {
    /// Keys from the first to the last row's own.
    fn num_keys(&self) -> Result<usize> {
        Ok(self.weights.dim(3)?)
    }

    /// 1 where a key lies in the window of a row that ends at its own key (or behind it, where weights are 0), else 0:
    /// `[rows, num_keys]`.
    fn within(&self, ops: &Ops, window: usize) -> Result<Tensor> {
        columns_after(ops, self.weights.dim(2)?, self.num_keys()?, self.first_own_key, window)
    }
}

/// 1 where a column lies behind the row's own less `window`, else 0: `[rows, columns]`.
fn columns_after(ops: &Ops, rows: usize, columns: usize, first_own: usize, window: usize) -> Result<Tensor> {
    #[expect(clippy::cast_precision_loss)]
    let first = first_own as f64 - window as f64;
    let ends = ops.shift(&ops.indices(rows)?, first)?.reshape((rows, 1))?;
    ops.is_larger(&ops.indices(columns)?.reshape((1, columns))?, &ends)
}

impl<'a> Blocks<'a> {
    /// * `heads`: KV heads, ascending
    fn new(
        ops: &Ops,
        layout: HeadLayout,
        block: &PromptBlock,
        prompt: &'a PromptTensors,
        heads: &[usize],
    ) -> Result<Self> {
        let seq_len = block.queries.dim(1)?;
        let last = block.first_row + seq_len;
        if prompt.len < last {
            return Err(Error::shape("prompt keys", format!("at least {last}"), prompt.len));
        }
        let queries = block.queries.reshape((layout.num_kv_heads, layout.group_size(), seq_len, layout.head_dim))?;
        let queries = ops.scale(&queries, f64::from(layout.scale()))?;
        let (keys, padding) = (prompt.keys.clone(), prompt.padding.clone());
        let positions = prompt.window.as_ref().map(|WindowTensors { positions, .. }| positions.clone());
        if heads.len() == layout.num_kv_heads {
            return Ok(Self { prompt, first_row: block.first_row, seq_len, queries, keys, padding, positions });
        }
        let heads: Vec<u32> = heads.iter().filter_map(|&head| u32::try_from(head).ok()).collect();
        let heads = ops.upload(&heads, heads.len())?;
        Ok(Self {
            prompt,
            first_row: block.first_row,
            seq_len,
            queries: ops.index_select(&queries, &heads, 0)?,
            keys: ops.index_select(&keys, &heads, 0)?,
            padding: padding.map(|padding| ops.index_select(&padding, &heads, 0)).transpose()?,
            positions: positions.map(|positions| ops.index_select(&positions, &heads, 0)).transpose()?,
        })
    }

    /// Ranges of the block's rows whose weights exist at the same time; none crosses one of some rows of the prompt.
    ///
    /// * `borders`: those rows, ascending unless they are 0
    fn cut(&self, borders: [usize; 2]) -> Vec<Range<usize>> {
        let heads = self.queries.dims()[0] * self.queries.dims()[1];
        let num_keys = self.prompt.past + self.first_row + self.seq_len - self.prompt.first_column(self.first_row);
        let mut step = (BLOCK_WEIGHTS / (heads * num_keys).max(1)).max(MIN_BLOCK_ROWS);
        if let Some(window) = &self.prompt.window {
            // Rows of a block share its first key: many of them would look at much that most do not see.
            step = step.min(window.of_rows.size().max(MIN_BLOCK_ROWS));
        }
        let borders = borders.map(|border| border.saturating_sub(self.first_row));
        let mut ranges = Vec::new();
        let mut start = 0;
        while start < self.seq_len {
            let end = (start + step).min(self.seq_len);
            let end = borders.iter().filter(|&&border| start < border).fold(end, |end, &border| end.min(border));
            ranges.push(start..end);
            start = end;
        }
        ranges
    }

    /// Computes some of the block's rows of the attention maps.
    fn map(&self, ops: &Ops, rows: Range<usize>, log_sums: bool) -> Result<MapRows> {
        let (heads, group_size, _, head_dim) = self.queries.dims4()?;
        let first_row = self.first_row + rows.start;
        let first_key = self.prompt.first_column(first_row);
        let first_own_key = self.prompt.past + first_row - first_key;
        let num_keys = first_own_key + rows.len();
        let queries = ops.contiguous(&self.queries.narrow(2, rows.start, rows.len())?)?;
        let queries = queries.reshape((heads, group_size * rows.len(), head_dim))?;
        let scores = ops.matmul(&queries, &self.keys.narrow(1, first_key, num_keys)?.transpose(1, 2)?)?;
        let mut scores = scores.reshape((heads, group_size, rows.len(), num_keys))?;
        if rows.len() > 1 {
            let hidden = columns_after(ops, rows.len(), num_keys, first_own_key, 0)?;
            scores = ops.add(&scores, &ops.scale(&hidden, MASKED)?)?;
        }
        if let Some(padding) = &self.padding {
            scores = ops.add(&scores, &padding.narrow(3, first_key, num_keys)?)?;
        }
        if let (Some(positions), Some(window)) = (&self.positions, &self.prompt.window) {
            // What lies before the first position that a row sees: `[heads, 1, rows, num_keys]`.
            #[expect(clippy::cast_precision_loss)]
            let first = (window.of_rows.first_position() + first_row + 1) as f64 - window.of_rows.size() as f64;
            let firsts = ops.shift(&ops.indices(rows.len())?, first)?.reshape((1, 1, rows.len(), 1))?;
            let hidden = ops.is_larger(&firsts, &positions.narrow(3, first_key, num_keys)?)?;
            scores = ops.add(&scores, &ops.scale(&hidden, MASKED)?)?;
        }
        let log_sums = if log_sums {
            let largest = ops.max_last(&scores)?;
            let sums = ops.sum_last(&ops.exp(&ops.sub(&scores, &largest)?)?)?;
            Some(ops.add(&largest, &ops.ln(&sums)?)?.reshape((heads, group_size, rows.len()))?)
        } else {
            None
        };
        Ok(MapRows { weights: ops.softmax(&scores)?, log_sums, first_row, first_key, first_own_key })
    }
}
