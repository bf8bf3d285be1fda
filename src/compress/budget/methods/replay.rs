//! `replay`: the prompt's queries asked again from behind it, and what their answers would lose (this program's own).

use serde::{Deserialize, Serialize};

use super::{ALWAYS, EvictRows, Method, MethodFacts, Needs, Sinks, StepAttention, StepFacts, fade};
use crate::compress::budget::allocation::Allocation;

/// The power of a layer's residual stream, as a squared length, that its errors are divided by. With 1 an error counts by
/// its share of the stream; a little less is better, since what early layers lose all later ones work with.
const RESIDUAL_POWER: f32 = 0.75;

/// While tokens are generated, a token's attention counts half as much as that of one so many tokens later.
const HALF_LIFE: usize = 256;

/// The newest rows that stay in any case, at most; of a small budget half.
const MOST_RECENT: usize = 128;

/// Keeps the first `sink_tokens` positions, and of all other positions of all layers and heads together those that would
/// be missed most: the squared attention that the prompt's own queries pay them when they are asked once more from behind
/// the prompt, times the squared length of the value behind the output projection, relative to the layer's residual
/// stream.
///
/// That is the sum of squared errors of the layer's output if this key alone were left out, where weights are small, and
/// errors of all layers are on one scale; so one list for all of them decides, and heads that look at little get little.
///
/// With `"decode": "evict"` each head holds as many rows as it kept of the prompt. The newest stay; of the others those go to
/// which the prompt's queries, asked again, and the tokens since then paid least squared attention, the later ones counting
/// more.
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
        let mut scores = weighted_squares(facts);
        let unit = facts.replay.squared_residual.max(f32::MIN_POSITIVE).powf(RESIDUAL_POWER);
        for score in &mut scores {
            *score /= unit;
        }
        scores[..facts.num_sinks(self.0.sink_tokens)].fill(ALWAYS);
        scores
    }

    fn judges_past(&self) -> bool {
        true
    }

    fn eviction(&self) -> Option<&dyn EvictRows> {
        Some(self)
    }
}

impl EvictRows for Replay {
    fn attention(&self) -> StepAttention {
        StepAttention::FadingSquares(HALF_LIFE)
    }

    /// What tokens without end would leave that pay as much as the replayed queries on average. Weights of a value count by
    /// its squared length, relative to the mean of all values.
    fn start(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let outputs = || facts.replay.squared_outputs.iter().flatten();
        #[expect(clippy::cast_precision_loss)] // counts of tokens
        let (len, num_rows) = (outputs().count().max(1) as f32, facts.num_rows.max(1) as f32);
        let mean_output = (outputs().sum::<f32>() / len).max(f32::MIN_POSITIVE);
        let tokens = 1.0 / (1.0 - fade(HALF_LIFE));
        let scale = tokens / num_rows / mean_output;
        weighted_squares(facts).into_iter().map(|sum| sum * scale).collect()
    }

    fn scores(&self, facts: &StepFacts<'_>) -> Vec<f32> {
        let first_recent = facts.seen.saturating_sub(MOST_RECENT.min(facts.budget / 2));
        let score = |(&position, &attention): (&u32, &f32)| {
            let position = position as usize;
            if position < self.0.sink_tokens || position >= first_recent { ALWAYS } else { attention }
        };
        facts.positions.iter().zip(facts.attention).map(score).collect()
    }
}

/// The squared attention that replayed queries pay each position, times the squared length of what a query head makes of its
/// value, summed up over the group: `[n]`.
fn weighted_squares(facts: &MethodFacts<'_>) -> Vec<f32> {
    let mut sums = vec![0.0; facts.len];
    for (attention, outputs) in facts.replay.squared_attention.iter().zip(facts.replay.squared_outputs) {
        for (sum, (attention, output)) in sums.iter_mut().zip(attention.iter().zip(outputs)) {
            *sum += attention * output;
        }
    }
    sums
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
        let scores = |sink_tokens, facts: &MethodFacts<'_>| Method::scores(&Replay(Sinks { sink_tokens }), facts);
        assert_eq!(scores(0, &facts), [0.5, 7.0 / 8.0, 5.0 / 8.0]);
        assert_eq!(scores(1, &facts)[0], ALWAYS);
        let later = MethodFacts { first_position: 9, ..facts };
        assert_eq!(scores(4, &later)[0], 0.5);
    }

    #[test]
    fn tokens_without_end_that_pay_what_was_paid_on_average_change_nothing() {
        let attention = [vec![1.0, 0.5, 0.0], vec![0.0, 2.0, 1.0]];
        let outputs = [vec![4.0, 2.0, 8.0], vec![1.0, 3.0, 6.0]];
        let replay = ReplayFacts { squared_attention: &attention, squared_outputs: &outputs, squared_residual: 16.0 };
        let facts = MethodFacts { replay, num_rows: 2, ..facts(3, 1) };
        let start = Replay(Sinks::DEFAULT).start(&facts);
        // The mean value has a squared length of 4, and there are 2 rows.
        for (start, sum) in start.into_iter().zip([4.0, 7.0, 6.0]) {
            let paid = sum / 4.0 / 2.0;
            assert!((fade(HALF_LIFE) * start + paid - start).abs() < 1e-3, "{start}");
        }
        let none = MethodFacts { len: 0, num_rows: 0, replay: ReplayFacts::default(), ..facts };
        assert!(Replay(Sinks::DEFAULT).start(&none).is_empty());
    }

    #[test]
    fn sinks_and_the_newest_rows_stay() {
        let score = |seen: usize, budget: usize| {
            let (positions, attention) = ([0, 7, 5, 9, 8], [0.0, 0.5, 0.25, 0.0, 1.0]);
            let facts =
                StepFacts { positions: &positions, seen, budget, attention: &attention, keys: &[], queries: &[] };
            EvictRows::scores(&Replay(Sinks { sink_tokens: 1 }), &facts)
        };
        assert_eq!(score(10, 4), [ALWAYS, 0.5, 0.25, ALWAYS, ALWAYS]);
        assert_eq!(score(10, 3), [ALWAYS, 0.5, 0.25, ALWAYS, 1.0]);
        assert_eq!(score(10, 1), [ALWAYS, 0.5, 0.25, 0.0, 1.0]);
        assert_eq!(score(136, 1000), [ALWAYS, 0.5, 0.25, ALWAYS, ALWAYS]);
    }
}
