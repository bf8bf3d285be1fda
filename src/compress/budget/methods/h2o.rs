//! `h2o`: heavy hitters and recent positions, half of the budget each (Zhang et al., arXiv 2306.14048).

use serde::{Deserialize, Serialize};

use super::{ALWAYS, AttentionRows, EvictRows, Method, MethodFacts, Needs, StepAttention, StepFacts};

/// Keeps the last half of the budget (the larger one if it is odd), and of the others the positions that received most
/// attention over all rows.
///
/// With `"decode": "evict"` it goes on so while tokens are generated, as the paper does.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct H2o;

impl Method for H2o {
    fn name(&self) -> &'static str {
        "h2o"
    }

    fn summary(&self) -> &'static str {
        "half of the budget what received most attention, half the last positions"
    }

    fn needs(&self) -> Needs {
        Needs { attention: AttentionRows::All, ..Needs::default() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let mut scores = facts.attention.to_vec();
        scores[facts.len - recent(facts.budget)..].fill(ALWAYS);
        scores
    }

    fn eviction(&self) -> Option<&dyn EvictRows> {
        Some(self)
    }
}

impl EvictRows for H2o {
    fn attention(&self) -> StepAttention {
        StepAttention::Received
    }

    fn scores(&self, facts: &StepFacts<'_>) -> Vec<f32> {
        let first_recent = facts.seen.saturating_sub(recent(facts.budget));
        let score = |(&position, &attention)| if position as usize >= first_recent { ALWAYS } else { attention };
        facts.positions.iter().zip(facts.attention).map(score).collect()
    }
}

/// How many of a budget are the last positions.
fn recent(budget: usize) -> usize {
    budget.div_ceil(2)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept};
    use super::*;

    #[test]
    fn half_of_the_budget_is_recent_and_half_heavy() {
        let attention = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0];
        let facts = MethodFacts { attention: &attention, ..facts(8, 4) };
        assert_eq!(kept(&H2o, &facts), [4, 5, 6, 7]);
        let facts = MethodFacts { attention: &attention, budget: 3, ..facts };
        assert_eq!(kept(&H2o, &facts), [5, 6, 7]);
    }
}
