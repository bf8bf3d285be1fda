//! What is collected from the rows of the attention maps while a prompt is processed.
//!
//! A prompt may come on top of a filled cache. A head's keys are then, in this order: those that an earlier profile kept
//! (settled: they stay), those appended by decoding since (recent), and the prompt's own. The last two are the segment
//! that is decided about; the rows are always the prompt's.
//!
//! For the recovered mass two vectors a query head suffice: how much attention each position received in all, and how
//! much of it from rows whose local window holds it. For the largest difference two numbers a row suffice: the kept mass
//! and the largest kept weight. Nothing here is of size n x n.

use crate::error::{Error, Result};
use crate::kernels::vector::{self, instruction_set};
use crate::numbers::has_nan;

/// Columns whose sums are made at a time: few enough to stay in a core's first cache.
const COLUMNS: usize = 512;

/// What [`LayerStats`] must collect for a search.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StatsRequest {
    /// Collect column sums over all rows.
    pub column_sums: bool,
    /// Collect the sums that the recovered mass is made of.
    pub mass: Option<MassRequest>,
    /// Keep-sets, `[levels][segment_len]` of 0 and 1, whose largest difference is wanted: those of the levels that do
    /// not depend on attention, and so are known before the prompt is processed.
    pub masks: Vec<Vec<f32>>,
    /// Recent tokens: those of the segment before the prompt's first.
    pub recent: usize,
    /// Collect the logarithm of each row's sum of exponentials.
    pub log_sums: bool,
}

/// Which sums the recovered mass needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MassRequest {
    /// First profiled query row of the prompt; rows from here to the end count.
    pub first_row: usize,
    /// Width of the sliding window, in positions, if a policy has one.
    pub window: Option<usize>,
}

/// Consecutive rows of one query head's attention map, not yet divided by their sums.
#[derive(Debug, Clone, Copy)]
pub struct UnscaledRows<'a> {
    /// Index of the first query row in the prompt.
    pub first_row: usize,
    /// `[num_rows, num_keys]` with the keys that the last row sees; 0 beyond each row's own key.
    pub weights: &'a [f32],
    /// `[num_rows]` what makes each row add up to 1.
    pub scales: &'a [f32],
}

impl<'a> UnscaledRows<'a> {
    /// Keys that the last row sees.
    fn num_keys(&self) -> usize {
        self.weights.len() / self.scales.len().max(1)
    }

    /// Each row: its index in the prompt, what scales it, and its weights up to its own key.
    pub fn rows(self) -> impl Iterator<Item = (usize, f32, &'a [f32])> {
        let (num_rows, num_keys, first_row) = (self.scales.len(), self.num_keys(), self.first_row);
        let rows = self.weights.chunks_exact(num_keys.max(1)).zip(self.scales).enumerate();
        rows.map(move |(index, (row, &scale))| (first_row + index, scale, &row[..num_keys - (num_rows - 1 - index)]))
    }
}

/// Statistics of one query head over rows of its attention map, or over all of them. `num_keys` counts settled, recent
/// and prompt keys.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeadStats {
    /// `[num_keys]` column sums over all query rows; empty if not requested.
    pub column_sums: Vec<f32>,
    /// `[num_keys]` column sums over the profiled rows; empty if not requested, or if all rows are profiled and
    /// `column_sums` holds the same.
    pub profiled_sums: Vec<f32>,
    /// `[num_keys]` sums over the profiled rows whose window holds the column; empty if there is no window.
    pub window_sums: Vec<f32>,
    /// `[levels]` largest difference of each requested mask; at least 0.
    pub differences: Vec<f32>,
    /// `[num_keys]` at each prompt row's own key, `ln` of the sum of the exponentials of the row's scores; 0 at other
    /// keys; empty if not requested.
    pub log_sums: Vec<f32>,
}

impl HeadStats {
    /// Empty statistics for keys `0..num_keys`.
    #[must_use]
    pub fn new(request: &StatsRequest, num_keys: usize) -> Self {
        let vector = |wanted: bool| if wanted { vec![0.0; num_keys] } else { Vec::new() };
        let mass = request.mass;
        Self {
            column_sums: vector(request.column_sums || mass.is_some_and(|mass| mass.first_row == 0)),
            profiled_sums: vector(mass.is_some_and(|mass| mass.first_row > 0)),
            window_sums: vector(mass.is_some_and(|mass| mass.window.is_some())),
            differences: vec![0.0; request.masks.len()],
            log_sums: vector(request.log_sums),
        }
    }

    /// Takes in rows of the attention map: the same as [`add_row`](Self::add_row) for each of them, up to the order of
    /// additions, in fewer passes over memory.
    pub fn add_rows(&mut self, request: &StatsRequest, rows: UnscaledRows<'_>) {
        if !request.masks.is_empty() {
            for (row, scale, weights) in rows.rows() {
                let settled = weights.len().saturating_sub(request.recent + row + 1);
                for (worst, mask) in self.differences.iter_mut().zip(&request.masks) {
                    *worst = worst.max(unscaled_row_difference(settled, weights, scale, mask));
                }
            }
        }
        if self.column_sums.is_empty() && self.profiled_sums.is_empty() {
            return;
        }
        let UnscaledRows { first_row, weights, scales } = rows;
        let (num_rows, num_keys) = (scales.len(), rows.num_keys());
        let unprofiled = request.mass.map_or(0, |mass| mass.first_row.saturating_sub(first_row).min(num_rows));
        let window = request.mass.and_then(|mass| mass.window);
        // From here on the window of every row holds the column; before, later rows' windows have moved on.
        let in_all_windows = window.map_or(num_keys, |window| num_keys.saturating_sub(window));
        if let Some(window) = window {
            for (_, scale, weights) in rows.rows().skip(unprofiled) {
                let start = weights.len().saturating_sub(window);
                let end = in_all_windows.min(weights.len());
                for (sum, &weight) in self.window_sums[start..end.max(start)].iter_mut().zip(&weights[start..]) {
                    *sum += scale * weight;
                }
            }
        }
        let set = instruction_set();
        let mut buffer = [0.0; COLUMNS];
        for start in (0..num_keys).step_by(COLUMNS) {
            let end = (start + COLUMNS).min(num_keys);
            let sums = &mut buffer[..end - start];
            let columns = |row: usize| weights.get(row * num_keys + start..).unwrap_or_default();
            vector::scaled_column_sums(set, columns(unprofiled), num_keys, &scales[unprofiled..], sums);
            if !self.profiled_sums.is_empty() {
                vector::add_assign(set, &mut self.profiled_sums[start..end], sums);
            }
            if window.is_some() && in_all_windows < end {
                let first = in_all_windows.max(start);
                vector::add_assign(set, &mut self.window_sums[first..end], &sums[first - start..]);
            }
            if !self.column_sums.is_empty() {
                vector::add_assign(set, &mut self.column_sums[start..end], sums);
                if unprofiled > 0 {
                    vector::scaled_column_sums(set, columns(0), num_keys, &scales[..unprofiled], sums);
                    vector::add_assign(set, &mut self.column_sums[start..end], sums);
                }
            }
        }
    }

    /// Takes in one row of the attention map: the plain form of [`add_rows`](Self::add_rows).
    ///
    /// * `row`: index of the query row in the prompt
    /// * `weights`: `[settled + recent + row + 1]`, its softmax over the keys up to its own
    pub fn add_row(&mut self, request: &StatsRequest, row: usize, weights: &[f32]) {
        let set = instruction_set();
        vector::add_assign(set, &mut self.column_sums, weights);
        if let Some(mass) = request.mass
            && row >= mass.first_row
        {
            vector::add_assign(set, &mut self.profiled_sums, weights);
            if let Some(window) = mass.window {
                let start = weights.len().saturating_sub(window);
                vector::add_assign(set, &mut self.window_sums[start..weights.len()], &weights[start..]);
            }
        }
        let settled = weights.len().saturating_sub(request.recent + row + 1);
        for (worst, mask) in self.differences.iter_mut().zip(&request.masks) {
            *worst = worst.max(row_difference(settled, weights, mask));
        }
    }

    /// Takes in the logarithms of the sums of consecutive rows, if they are requested.
    ///
    /// * `first_key`: the first row's own key
    pub fn set_log_sums(&mut self, first_key: usize, log_sums: &[f32]) {
        if !self.log_sums.is_empty() {
            self.log_sums[first_key..first_key + log_sums.len()].copy_from_slice(log_sums);
        }
    }

    /// Takes in the statistics of other rows; vectors may be shorter than this one's.
    pub fn merge(&mut self, other: &Self) {
        self.merge_from(0, other);
    }

    /// Takes in the statistics of other rows, whose first key is this one's key `first_key`; vectors may be shorter than
    /// what is left of this one's.
    pub fn merge_from(&mut self, first_key: usize, other: &Self) {
        let set = instruction_set();
        let add = |sums: &mut [f32], more: &[f32]| {
            vector::add_assign(set, sums.get_mut(first_key..).unwrap_or_default(), more);
        };
        add(&mut self.column_sums, &other.column_sums);
        add(&mut self.profiled_sums, &other.profiled_sums);
        add(&mut self.window_sums, &other.window_sums);
        // Each row is in one of the two only.
        add(&mut self.log_sums, &other.log_sums);
        for (worst, &difference) in self.differences.iter_mut().zip(&other.differences) {
            *worst = worst.max(difference);
        }
    }

    /// `[num_keys]` column sums over the profiled rows.
    #[must_use]
    pub fn profiled(&self) -> &[f32] {
        if self.profiled_sums.is_empty() { &self.column_sums } else { &self.profiled_sums }
    }
}

/// The largest difference between one row of the map and the softmax over its kept keys alone: `max kept weight *
/// (1 / kept mass - 1)`, 0 for a row that keeps nothing (SPEC of the criterion `max_abs`).
///
/// * `settled`: leading keys that are kept in any case
/// * `weights`: adding up to 1
/// * `mask`: for the keys behind the settled ones, and at least as long; 1 where the key is kept, else 0
#[must_use]
pub fn row_difference(settled: usize, weights: &[f32], mask: &[f32]) -> f32 {
    unscaled_row_difference(settled, weights, 1.0, mask)
}

/// [`row_difference`] of weights that add up to `1 / scale`.
#[must_use]
pub fn unscaled_row_difference(settled: usize, weights: &[f32], scale: f32, mask: &[f32]) -> f32 {
    let set = instruction_set();
    let (settled, weights) = weights.split_at(settled.min(weights.len()));
    let (mut kept, mut largest) = vector::masked_sum_and_max(set, weights, mask);
    if !settled.is_empty() {
        let (sum, max) = vector::sum_and_max(set, settled);
        (kept, largest) = (kept + sum, largest.max(max));
    }
    if kept > 0.0 { (largest / kept - largest * scale).max(0.0) } else { 0.0 }
}

/// Statistics of all query heads of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStats {
    /// What is collected.
    pub request: StatsRequest,
    /// `[num_heads]`
    pub heads: Vec<HeadStats>,
}

impl LayerStats {
    /// Empty statistics.
    ///
    /// * `num_keys`: for each query head, the keys that it will see: settled, recent and prompt's
    #[must_use]
    pub fn new(request: StatsRequest, num_keys: impl IntoIterator<Item = usize>) -> Self {
        let heads = num_keys.into_iter().map(|num_keys| HeadStats::new(&request, num_keys)).collect();
        Self { request, heads }
    }

    /// Refuses statistics that hold what is not a number: comparisons would pass over it.
    ///
    /// # Errors
    /// [`Error::NotANumber`] with the query head.
    pub(super) fn check(&self) -> Result<()> {
        let bad = self.heads.iter().position(|head| {
            let HeadStats { column_sums, profiled_sums, window_sums, differences, log_sums } = head;
            [column_sums, profiled_sums, window_sums, differences, log_sums].into_iter().any(|numbers| has_nan(numbers))
        });
        bad.map_or(Ok(()), |head| Err(Error::not_a_number(format!("the attention statistics of query head {head}"))))
    }

    /// `[num_kv_heads]` of `[segment_len]` what each position of the segment received in all, summed up over the query
    /// heads of a KV head; empty lists if it was not collected.
    ///
    /// # Panics
    /// If `num_kv_heads` is 0.
    #[must_use]
    pub fn received(&self, num_kv_heads: usize, segment_len: usize) -> Vec<Vec<f32>> {
        let groups = self.heads.chunks((self.heads.len() / num_kv_heads).max(1));
        groups.map(|group| group_column_sums(group, segment_len)).collect()
    }
}

/// Column sums of a KV head over a segment: those of its query heads added up; empty if not collected.
pub(super) fn group_column_sums(group: &[HeadStats], segment_len: usize) -> Vec<f32> {
    let mut columns = group.iter().map(|head| split_settled(&head.column_sums, segment_len).1);
    let mut sums = columns.next().map(<[f32]>::to_vec).unwrap_or_default();
    for columns in columns {
        for (sum, &value) in sums.iter_mut().zip(columns) {
            *sum += value;
        }
    }
    sums
}

/// Parts a head's columns into those of settled keys and those of the segment.
pub(super) fn split_settled(columns: &[f32], segment_len: usize) -> (&[f32], &[f32]) {
    columns.split_at(columns.len().saturating_sub(segment_len))
}
