//! What is collected from the rows of the attention maps while a prompt is processed.
//!
//! A prompt may come on top of a filled cache. A head's keys are then, in this order: those that an earlier profile kept
//! (settled: they stay), those appended by decoding since (recent), and the prompt's own. The last two are the segment
//! that is decided about; the rows are always the prompt's.
//!
//! For the recovered mass two vectors a query head suffice: how much attention each position received in all, and how
//! much of it from rows whose local window holds it. For the largest difference two numbers a row suffice: the kept mass
//! and the largest kept weight. Nothing here is of size n x n.

use crate::kernels::vector::{self, instruction_set};

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
}

/// Which sums the recovered mass needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MassRequest {
    /// First profiled query row of the prompt; rows from here to the end count.
    pub first_row: usize,
    /// Width of the sliding window, in positions, if a policy has one.
    pub window: Option<usize>,
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
        }
    }

    /// Takes in one row of the attention map.
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

    /// Takes in the statistics of other rows; vectors may be shorter than this one's.
    pub fn merge(&mut self, other: &Self) {
        let set = instruction_set();
        vector::add_assign(set, &mut self.column_sums, &other.column_sums);
        vector::add_assign(set, &mut self.profiled_sums, &other.profiled_sums);
        vector::add_assign(set, &mut self.window_sums, &other.window_sums);
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
    let (settled, weights) = weights.split_at(settled.min(weights.len()));
    let (mut kept_mass, mut largest) = vector::masked_sum_and_max(instruction_set(), weights, mask);
    for &weight in settled {
        kept_mass += weight;
        largest = largest.max(weight);
    }
    if kept_mass > 0.0 { (largest / kept_mass - largest).max(0.0) } else { 0.0 }
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
}
