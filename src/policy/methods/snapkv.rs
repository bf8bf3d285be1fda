//! `snapkv`: what the last rows attend to, with its neighbours (Li et al., arXiv 2404.14469).

use super::{ALWAYS, AttentionRows, Method, MethodFacts, MethodSettings, Needs};

/// Keys that [`observed`] reads.
pub(super) const KEYS: &[&str] = &["observation_window", "pool_kernel"];

/// Keeps the last `observation_window` positions, and of those before them the ones that these rows attend to most, on
/// average over the KV head's query heads and over `pool_kernel` neighbours.
#[derive(Debug)]
pub struct SnapKv;

impl Method for SnapKv {
    fn name(&self) -> &'static str {
        "snapkv"
    }

    fn summary(&self) -> &'static str {
        "what the last `observation_window` rows attend to, averaged over `pool_kernel` neighbours"
    }

    fn keys(&self) -> &'static [&'static str] {
        KEYS
    }

    fn needs(&self, settings: &MethodSettings) -> Needs {
        observed(settings)
    }

    fn scores(&self, facts: &MethodFacts<'_>, settings: &MethodSettings) -> Vec<f32> {
        scores(facts, settings)
    }
}

/// What [`scores`] reads.
pub(super) fn observed(settings: &MethodSettings) -> Needs {
    Needs { attention: AttentionRows::Last(settings.observation_window), ..Needs::default() }
}

/// The scores of `snapkv`.
///
/// Sums stand for means: all positions of a layer are summed up over as many rows and heads, so that the order is the
/// same. Neighbours beyond the ends, and in the window, count as 0. If the budget is smaller than the window, the last
/// positions are kept.
pub(super) fn scores(facts: &MethodFacts<'_>, settings: &MethodSettings) -> Vec<f32> {
    let before = facts.len - settings.observation_window.min(facts.num_rows);
    let attention = &facts.attention[..before];
    let half = settings.pool_kernel / 2;
    let mut scores = Vec::with_capacity(facts.len);
    for position in 0..before {
        let neighbours = &attention[position.saturating_sub(half)..(position + half + 1).min(before)];
        scores.push(neighbours.iter().sum());
    }
    // What of the window the budget has no room for is worth nothing.
    scores.resize(facts.len - facts.budget.min(facts.len - before), f32::NEG_INFINITY);
    scores.resize(facts.len, ALWAYS);
    scores
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept, settings};
    use super::*;

    const ATTENTION: [f32; 9] = [4.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 9.0, 9.0];

    fn small() -> MethodSettings {
        MethodSettings { observation_window: 2, pool_kernel: 3, ..settings() }
    }

    #[test]
    fn neighbours_are_averaged_and_the_window_is_kept() {
        let facts = MethodFacts { attention: &ATTENTION, ..facts(9, 4) };
        let expected = [4.0, 4.0, 1.0, 3.0, 6.0, 5.0, 3.0, ALWAYS, ALWAYS];
        assert_eq!(SnapKv.scores(&facts, &small()), expected);
        assert_eq!(kept(&SnapKv, &facts, &small()), [4, 5, 7, 8]);
        assert_eq!(kept(&SnapKv, &MethodFacts { budget: 5, ..facts }, &small()), [0, 4, 5, 7, 8]);
    }

    #[test]
    fn a_budget_below_the_window_keeps_the_last_positions() {
        let facts = MethodFacts { attention: &ATTENTION, ..facts(9, 1) };
        assert_eq!(kept(&SnapKv, &facts, &small()), [8]);
    }

    #[test]
    fn a_prompt_within_the_window_keeps_the_last_positions() {
        let facts = MethodFacts { attention: &ATTENTION, ..facts(9, 4) };
        assert_eq!(kept(&SnapKv, &facts, &settings()), [5, 6, 7, 8]);
    }

    #[test]
    fn the_window_is_of_the_prompt_and_not_of_tokens_before_it() {
        let facts = MethodFacts { attention: &ATTENTION, num_rows: 1, ..facts(9, 2) };
        assert_eq!(kept(&SnapKv, &facts, &small()), [6, 8]); // 3 + 0 + 9; the last is the window
        assert_eq!(SnapKv.scores(&facts, &small())[7], 9.0);
    }
}
