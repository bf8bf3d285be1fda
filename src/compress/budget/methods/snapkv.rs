//! `snapkv`: what the last rows attend to, with its neighbours (Li et al., arXiv 2404.14469).

use serde::{Deserialize, Serialize};

use super::{ALWAYS, AttentionRows, Method, MethodFacts, Needs};
use crate::compress::values;

/// Keeps the last `observation_window` positions, and of those before them the ones that these rows attend to most, on
/// average over the KV head's query heads and over `pool_kernel` neighbours.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SnapKv {
    /// How many of the prompt's last rows are observed, at least 1; default 64.
    #[serde(deserialize_with = "values::positive")]
    pub observation_window: usize,
    /// Over how many neighbours observed attention is averaged, odd; default 5.
    #[serde(deserialize_with = "values::odd")]
    pub pool_kernel: usize,
}

impl SnapKv {
    /// What kvpress has by default.
    pub const DEFAULT: Self = Self { observation_window: 64, pool_kernel: 5 };
}

impl Default for SnapKv {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Method for SnapKv {
    fn name(&self) -> &'static str {
        "snapkv"
    }

    fn summary(&self) -> &'static str {
        "what the last `observation_window` rows attend to, averaged over `pool_kernel` neighbours"
    }

    fn needs(&self) -> Needs {
        Needs { attention: AttentionRows::Last(self.observation_window), ..Needs::default() }
    }

    /// Sums stand for means: all positions of a layer are summed up over as many rows and heads, so that the order is the
    /// same. Neighbours beyond the ends, and in the window, count as 0. If the budget is smaller than the window, the last
    /// positions are kept.
    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        with_window(facts, self.neighbour_sums(facts, facts.attention))
    }
}

impl SnapKv {
    /// How many positions there are before the window.
    pub(super) fn before_window(&self, facts: &MethodFacts<'_>) -> usize {
        facts.len - self.observation_window.min(facts.num_rows)
    }

    /// Sums over neighbours, of the positions before the window.
    ///
    /// * `numbers`: `[n]`, or at least those before the window
    pub(super) fn neighbour_sums(&self, facts: &MethodFacts<'_>, numbers: &[f32]) -> Vec<f32> {
        let before = self.before_window(facts);
        let half = self.pool_kernel / 2;
        let neighbours = |position: usize| &numbers[position.saturating_sub(half)..(position + half + 1).min(before)];
        (0..before).map(|position| neighbours(position).iter().sum()).collect()
    }
}

/// Scores of the positions before an observation window, and then of those of the window: the last of them, as many as the
/// budget has room for, are kept before all others.
pub(super) fn with_window(facts: &MethodFacts<'_>, mut scores: Vec<f32>) -> Vec<f32> {
    let window = facts.len - scores.len();
    // What of the window the budget has no room for is worth nothing.
    scores.resize(facts.len - facts.budget.min(window), f32::NEG_INFINITY);
    scores.resize(facts.len, ALWAYS);
    scores
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept};
    use super::*;

    const ATTENTION: [f32; 9] = [4.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 9.0, 9.0];

    const SMALL: SnapKv = SnapKv { observation_window: 2, pool_kernel: 3 };

    #[test]
    fn neighbours_are_averaged_and_the_window_is_kept() {
        let facts = MethodFacts { attention: &ATTENTION, ..facts(9, 4) };
        let expected = [4.0, 4.0, 1.0, 3.0, 6.0, 5.0, 3.0, ALWAYS, ALWAYS];
        assert_eq!(SMALL.scores(&facts), expected);
        assert_eq!(kept(&SMALL, &facts), [4, 5, 7, 8]);
        assert_eq!(kept(&SMALL, &MethodFacts { budget: 5, ..facts }), [0, 4, 5, 7, 8]);
    }

    #[test]
    fn a_budget_below_the_window_keeps_the_last_positions() {
        let facts = MethodFacts { attention: &ATTENTION, ..facts(9, 1) };
        assert_eq!(kept(&SMALL, &facts), [8]);
    }

    #[test]
    fn a_prompt_within_the_window_keeps_the_last_positions() {
        let facts = MethodFacts { attention: &ATTENTION, ..facts(9, 4) };
        assert_eq!(kept(&SnapKv::DEFAULT, &facts), [5, 6, 7, 8]);
    }

    #[test]
    fn the_window_is_of_the_prompt_and_not_of_tokens_before_it() {
        let facts = MethodFacts { attention: &ATTENTION, num_rows: 1, ..facts(9, 2) };
        assert_eq!(kept(&SMALL, &facts), [6, 8]); // 3 + 0 + 9; the last is the window
        assert_eq!(SMALL.scores(&facts)[7], 9.0);
    }
}
