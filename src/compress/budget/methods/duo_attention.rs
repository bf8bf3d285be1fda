//! `duo_attention`: some heads keep everything, the others sinks and recent positions (Xiao et al., arXiv 2410.10819), told
//! apart on the fly as by kvpress's `DuoAttentionPress`.

use serde::{Deserialize, Serialize};

use super::{ALWAYS, Method, MethodFacts, Needs};
use crate::compress::budget::BudgetOver;
use crate::compress::budget::allocation::Allocation;
use crate::compress::values;
use crate::kernels::vector::{self, instruction_set};

/// Distances that a head is judged over.
const DISTANCES: usize = 500;

/// Every head keeps the first `sink_tokens` and the last `recent_tokens` positions of a segment; what the budget has left goes
/// to whole heads, first to those that look farthest back: those whose mean query, if all keys were their mean, would give
/// most to keys far before it (the area under the accumulated weights of the last 500 positions). The head with which the
/// budget ends keeps a part.
///
/// The paper learns which heads these are, and kvpress has a list for some models; where it has none, it looks at samples of
/// a data set as described. Here it is the prompt itself.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DuoAttention {
    /// How many leading positions of the sequence every head keeps; default 128.
    #[serde(deserialize_with = "values::whole")]
    pub sink_tokens: usize,
    /// How many of the last positions every head keeps; default 256.
    #[serde(deserialize_with = "values::whole")]
    pub recent_tokens: usize,
}

impl DuoAttention {
    /// What kvpress has on the fly.
    pub const DEFAULT: Self = Self { sink_tokens: 128, recent_tokens: 256 };
}

impl Default for DuoAttention {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Method for DuoAttention {
    fn name(&self) -> &'static str {
        "duo_attention"
    }

    fn summary(&self) -> &'static str {
        "sinks and recent positions, and everything in the heads that look farthest back"
    }

    fn needs(&self) -> Needs {
        Needs { mean_distances: DISTANCES, ..Needs::default() }
    }

    fn allocation(&self) -> Allocation {
        Allocation::Pooled
    }

    fn refuses(&self, over: BudgetOver) -> Option<&'static str> {
        (over == BudgetOver::Head).then_some("chooses between heads: with a budget for each of them there is no choice")
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let mut scores = vec![far_sight(facts.mean_scores); facts.len];
        let (mut sinks, mut recent) = (facts.num_sinks(self.sink_tokens), self.recent_tokens.min(facts.len));
        if sinks + recent > facts.budget {
            // All heads have to do with less, in the same proportion.
            sinks = facts.budget * sinks / (sinks + recent);
            recent = facts.budget - sinks;
        }
        scores[..sinks].fill(ALWAYS);
        scores[facts.len - recent..].fill(ALWAYS);
        scores
    }
}

/// The mean over query heads of the area under their accumulated weights, from the farthest key on: in 0..=1.
#[expect(clippy::cast_precision_loss)]
fn far_sight(mean_scores: &[Vec<f32>]) -> f32 {
    let areas = mean_scores.iter().map(|scores| {
        let mut weights = scores.clone();
        vector::softmax(instruction_set(), &mut weights);
        // A key's weight counts in every sum from its own on.
        let count = weights.len() as f32;
        let area: f32 = weights.iter().enumerate().map(|(index, weight)| weight * (count - index as f32)).sum();
        area / count
    });
    areas.sum::<f32>() / mean_scores.len().max(1) as f32
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;

    #[test]
    fn heads_that_look_far_back_have_a_large_area() {
        let area = |scores: &[&[f32]]| far_sight(&scores.iter().map(|scores| scores.to_vec()).collect::<Vec<_>>());
        // Weights 1/4 each: accumulated 1/4, 1/2, 3/4, 1.
        assert!((area(&[&[2.0; 4]]) - 2.5 / 4.0).abs() < 1e-6);
        assert!((area(&[&[50.0, 0.0, 0.0, 0.0]]) - 1.0).abs() < 1e-6);
        assert!((area(&[&[0.0, 0.0, 0.0, 50.0]]) - 0.25).abs() < 1e-6);
        assert!((area(&[&[50.0, 0.0], &[0.0, 50.0]]) - 0.75).abs() < 1e-6);
    }

    #[test]
    fn sinks_and_recent_positions_come_first_and_shrink_to_the_budget() {
        let method = DuoAttention { sink_tokens: 1, recent_tokens: 2 };
        let mean_scores = [vec![0.0; 4]];
        let scores = |budget: usize| method.scores(&MethodFacts { mean_scores: &mean_scores, ..facts(5, budget) });
        assert_eq!(scores(4), [ALWAYS, 0.625, 0.625, ALWAYS, ALWAYS]);
        assert_eq!(scores(2), [0.625, 0.625, 0.625, ALWAYS, ALWAYS]);
        assert_eq!(scores(1), [0.625, 0.625, 0.625, 0.625, ALWAYS]);
    }
}
