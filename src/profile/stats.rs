//! What is collected from the rows of the attention maps while a prompt is processed.
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
    /// Keep-sets, `[levels][prompt_len]` of 0 and 1, whose largest difference is wanted: those of the levels that do
    /// not depend on attention, and so are known before the prompt is processed.
    pub masks: Vec<Vec<f32>>,
}

/// Which sums the recovered mass needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MassRequest {
    /// First profiled query row; rows from here to the end count.
    pub first_row: usize,
    /// Width of the sliding window, in positions, if a policy has one.
    pub window: Option<usize>,
}

/// Statistics of one query head over rows of its attention map, or over all of them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeadStats {
    /// `[prompt_len]` column sums over all query rows; empty if not requested.
    pub column_sums: Vec<f32>,
    /// `[prompt_len]` column sums over the profiled rows; empty if not requested, or if all rows are profiled and
    /// `column_sums` holds the same.
    pub profiled_sums: Vec<f32>,
    /// `[prompt_len]` sums over the profiled rows whose window holds the column; empty if there is no window.
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
    /// * `weights`: `[row + 1]`, the softmax of query row `row` over keys `0..=row`
    pub fn add_row(&mut self, request: &StatsRequest, row: usize, weights: &[f32]) {
        let set = instruction_set();
        vector::add_assign(set, &mut self.column_sums, weights);
        if let Some(mass) = request.mass
            && row >= mass.first_row
        {
            vector::add_assign(set, &mut self.profiled_sums, weights);
            if let Some(window) = mass.window {
                let start = (row + 1).saturating_sub(window);
                vector::add_assign(set, &mut self.window_sums[start..=row], &weights[start..]);
            }
        }
        for (worst, mask) in self.differences.iter_mut().zip(&request.masks) {
            *worst = worst.max(row_difference(weights, mask));
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

    /// `[prompt_len]` column sums over the profiled rows.
    #[must_use]
    pub fn profiled(&self) -> &[f32] {
        if self.profiled_sums.is_empty() { &self.column_sums } else { &self.profiled_sums }
    }
}

/// The largest difference between one row of the map and the softmax over its kept keys alone: `max kept weight *
/// (1 / kept mass - 1)`, 0 for a row that keeps nothing (SPEC of the criterion `max_abs`).
///
/// * `weights`: `[row + 1]`, adding up to 1
/// * `mask`: at least as long; 1 where the key is kept, else 0
#[must_use]
pub fn row_difference(weights: &[f32], mask: &[f32]) -> f32 {
    let (kept_mass, largest) = vector::masked_sum_and_max(instruction_set(), weights, mask);
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
    /// Empty statistics of `num_heads` query heads over a prompt of `prompt_len` tokens.
    #[must_use]
    pub fn new(request: StatsRequest, num_heads: usize, prompt_len: usize) -> Self {
        let heads = vec![HeadStats::new(&request, prompt_len); num_heads];
        Self { request, heads }
    }
}
