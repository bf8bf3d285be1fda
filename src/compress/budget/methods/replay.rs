//! `replay`: the prompt's queries asked again from behind it, and what their answers would lose (this program's own).

use serde::{Deserialize, Serialize};

use super::{ALWAYS, Method, MethodFacts, Needs, Sinks};
use crate::compress::budget::allocation::Allocation;

/// The power of a layer's residual stream, as a squared length, that its errors are divided by. With 1 an error counts by
/// its share of the stream; a little less is better, since what early layers lose all later ones work with.
const RESIDUAL_POWER: f32 = 0.75;

/// Keeps the first `sink_tokens` positions, and of all other positions of all layers and heads together those that would
/// be missed most: the squared attention that the prompt's own queries pay them when they are asked once more from behind
/// the prompt, times the squared length of the value behind the output projection, relative to the layer's residual
/// stream.
///
/// That is the sum of squared errors of the layer's output if this key alone were left out, where weights are small, and
/// errors of all layers are on one scale; so one list for all of them decides, and heads that look at little get little.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Replay(pub Sinks);

impl Method for Replay {
    fn name(&self) -> &'static str {
        "replay"
    }

    fn summary(&self) -> &'static str {
        "what the prompt's queries, asked again from behind it, would miss most; one budget for all layers"
    }

    fn needs(&self) -> Needs {
        Needs { replay: true, ..Needs::default() }
    }

    fn allocation(&self) -> Allocation {
        Allocation::Pooled
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let mut scores = vec![0.0; facts.len];
        let heads = facts.replay.squared_attention.iter().zip(facts.replay.squared_outputs);
        for (attention, outputs) in heads {
            for (score, (attention, output)) in scores.iter_mut().zip(attention.iter().zip(outputs)) {
                *score += attention * output;
            }
        }
        let unit = facts.replay.squared_residual.max(f32::MIN_POSITIVE).powf(RESIDUAL_POWER);
        for score in &mut scores {
            *score /= unit;
        }
        scores[..facts.num_sinks(self.0.sink_tokens)].fill(ALWAYS);
        scores
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::super::{MethodFacts, ReplayFacts};
    use super::*;

    #[test]
    fn scores_are_sums_over_the_group_in_units_of_the_residual_stream() {
        let attention = [vec![1.0, 0.5, 0.0], vec![0.0, 2.0, 1.0]];
        let outputs = [vec![4.0, 2.0, 8.0], vec![1.0, 3.0, 5.0]];
        let replay = ReplayFacts { squared_attention: &attention, squared_outputs: &outputs, squared_residual: 16.0 };
        let facts = MethodFacts { replay, ..facts(3, 1) };
        let scores = |sink_tokens: usize, facts: &MethodFacts<'_>| Replay(Sinks { sink_tokens }).scores(facts);
        assert_eq!(scores(0, &facts), [0.5, 7.0 / 8.0, 5.0 / 8.0]);
        assert_eq!(scores(1, &facts)[0], ALWAYS);
        let later = MethodFacts { first_position: 9, ..facts };
        assert_eq!(scores(4, &later)[0], 0.5);
    }
}
