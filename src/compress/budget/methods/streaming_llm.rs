//! `streaming_llm`: attention sinks and the most recent positions (Xiao et al., arXiv 2309.17453).

use serde::{Deserialize, Serialize};

use super::{ALWAYS, EvictRows, Method, MethodFacts, Sinks, StepAttention, StepFacts};

/// Keeps the first `sink_tokens` positions of the sequence, and of the others the last.
///
/// The paper's own code numbers what is kept anew with each token; here positions stay until the model's context ends, and what
/// is kept [moves together](crate::cache::Overflow::Shift) then.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StreamingLlm(pub Sinks);

impl Method for StreamingLlm {
    fn name(&self) -> &'static str {
        "streaming_llm"
    }

    fn summary(&self) -> &'static str {
        "the first `sink_tokens` positions, and the last"
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        (facts.first_position..facts.first_position + facts.len).map(|position| self.score(position)).collect()
    }

    fn past_scores(&self, positions: &[u32]) -> Option<Vec<f32>> {
        Some(positions.iter().map(|&position| self.score(position as usize)).collect())
    }

    fn eviction(&self) -> Option<&dyn EvictRows> {
        Some(self)
    }
}

impl StreamingLlm {
    fn score(self, position: usize) -> f32 {
        #[expect(clippy::cast_precision_loss)] // 2^24 tokens are far beyond any context
        if position < self.0.sink_tokens { ALWAYS } else { position as f32 }
    }
}

impl EvictRows for StreamingLlm {
    fn attention(&self) -> StepAttention {
        StepAttention::None
    }

    fn scores(&self, facts: &StepFacts<'_>) -> Vec<f32> {
        facts.positions.iter().map(|&position| self.score(position as usize)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept};
    use super::*;

    #[test]
    fn sinks_and_the_last_positions_are_kept() {
        assert_eq!(kept(&StreamingLlm(Sinks::DEFAULT), &facts(10, 6)), [0, 1, 2, 3, 8, 9]);
    }

    #[test]
    fn sinks_are_those_of_the_sequence_and_not_of_a_later_segment() {
        let later = MethodFacts { first_position: 3, ..facts(10, 3) };
        assert_eq!(kept(&StreamingLlm(Sinks::DEFAULT), &later), [0, 8, 9]);
        let later = MethodFacts { first_position: 50, ..facts(10, 3) };
        assert_eq!(kept(&StreamingLlm(Sinks::DEFAULT), &later), [7, 8, 9]);
    }

    #[test]
    fn a_budget_below_the_number_of_sinks_keeps_the_first_of_them() {
        assert_eq!(kept(&StreamingLlm(Sinks::DEFAULT), &facts(10, 2)), [0, 1]);
    }
}
