//! `tova`: what the last token attends to (Oren et al., arXiv 2401.06104).

use serde::{Deserialize, Serialize};

use super::{ALWAYS, AttentionRows, EvictRows, Method, MethodFacts, Needs, StepAttention, StepFacts};

/// Keeps the positions that the prompt's last row attends to most, on average over the query heads of the layer, so that
/// all heads of a layer keep the same. The last position is always kept.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Tova;

impl Method for Tova {
    fn name(&self) -> &'static str {
        "tova"
    }

    fn summary(&self) -> &'static str {
        "what the last token attends to, on average over the layer's heads"
    }

    fn needs(&self) -> Needs {
        Needs { attention: AttentionRows::Last(1), whole_layer: true, ..Needs::default() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let mut scores = facts.attention.to_vec();
        if let Some(last) = scores.last_mut() {
            *last = ALWAYS;
        }
        scores
    }

    fn eviction(&self) -> Option<&dyn EvictRows> {
        Some(self)
    }
}

impl EvictRows for Tova {
    fn attention(&self) -> StepAttention {
        StepAttention::Newest
    }

    fn scores(&self, facts: &StepFacts<'_>) -> Vec<f32> {
        let score = |(&position, &attention)| if position as usize + 1 == facts.seen { ALWAYS } else { attention };
        facts.positions.iter().zip(facts.attention).map(score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept};
    use super::*;

    #[test]
    fn the_largest_weights_and_the_last_position_are_kept() {
        let attention = [0.3, 0.1, 0.2, 0.2, 0.15, 0.05];
        assert_eq!(kept(&Tova, &MethodFacts { attention: &attention, ..facts(6, 3) }), [0, 2, 5]);
    }
}
