//! `criticalkv`, `criticaladakv`: half of the budget by attention, half by what the values add to the output, too (Feng et
//! al., arXiv 2502.03805; as kvpress computes it on the scores of `snapkv`).

use serde::{Deserialize, Serialize};

use super::{ALWAYS, LayerBudget, Method, MethodFacts, Needs, Outputs, SnapKv, one_head};
use crate::compress::budget::allocation::{Allocation, SAFEGUARD, top_positions};
use crate::compress::ratio_count;

/// The part of the budget that goes by attention alone.
const FIRST_STAGE: f64 = 0.5;

/// What is added to attention before it is multiplied by the length of an output.
const EPSILON: f32 = 1e-4;

/// Keeps half of the budget as `snapkv` does, and of the other positions those of the largest attention times the length
/// of the value behind the output projection (the sum of absolute numbers, the mean over the KV head's query heads).
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CriticalKv(pub SnapKv);

/// The same, where the heads of a layer compete for its budget: how much each keeps is decided by the scores of `snapkv`, as
/// in `adakv`, and what it keeps as in `criticalkv`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CriticalAdaKv(pub SnapKv);

impl Method for CriticalKv {
    fn name(&self) -> &'static str {
        "criticalkv"
    }

    fn summary(&self) -> &'static str {
        "half as snapkv, half by attention times the length of what a value adds to the output"
    }

    fn needs(&self) -> Needs {
        Needs { outputs: Outputs::Absolute, ..self.0.needs() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        one_head(self, facts)
    }

    fn measures(&self, facts: &MethodFacts<'_>) -> Vec<Vec<f32>> {
        measures(self.0, facts)
    }

    fn layer_scores(&self, budget: &LayerBudget, measures: Vec<Vec<Vec<f32>>>) -> Vec<Vec<f32>> {
        layer_scores(budget, measures)
    }
}

impl Method for CriticalAdaKv {
    fn name(&self) -> &'static str {
        "criticaladakv"
    }

    fn summary(&self) -> &'static str {
        "as criticalkv, with each layer's budget shared over its heads by their attention"
    }

    fn needs(&self) -> Needs {
        CriticalKv(self.0).needs()
    }

    fn allocation(&self) -> Allocation {
        Allocation::Adaptive { safeguard: SAFEGUARD }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        one_head(self, facts)
    }

    fn measures(&self, facts: &MethodFacts<'_>) -> Vec<Vec<f32>> {
        measures(self.0, facts)
    }

    fn layer_scores(&self, budget: &LayerBudget, measures: Vec<Vec<Vec<f32>>>) -> Vec<Vec<f32>> {
        layer_scores(budget, measures)
    }
}

/// Attention as `snapkv` has it, as means and with [`ALWAYS`] in its window; and lengths of outputs.
fn measures(settings: SnapKv, facts: &MethodFacts<'_>) -> Vec<Vec<f32>> {
    let rows = settings.observation_window.min(facts.num_rows).max(1);
    #[expect(clippy::cast_precision_loss)]
    let count = (rows * facts.group_size.max(1) * settings.pool_kernel) as f32;
    let sums = settings.neighbour_sums(facts, facts.attention);
    let mut attention: Vec<f32> = sums.into_iter().map(|sum| sum / count).collect();
    attention.resize(facts.len, ALWAYS);
    let mut lengths = vec![0.0; facts.len];
    #[expect(clippy::cast_precision_loss)]
    let heads = facts.outputs.len().max(1) as f32;
    for outputs in facts.outputs {
        lengths.iter_mut().zip(outputs).for_each(|(sum, length)| *sum += length / heads);
    }
    vec![attention, lengths]
}

/// In two stages; what they choose comes before all others.
fn layer_scores(budget: &LayerBudget, measures: Vec<Vec<Vec<f32>>>) -> Vec<Vec<f32>> {
    let (mut attention, mut lengths) = (Vec::new(), Vec::new());
    for mut head in measures {
        lengths.push(head.pop().unwrap_or_default());
        attention.push(head.pop().unwrap_or_default());
    }
    // The window comes before all that was observed, the last first; but in the second stage it is multiplied like all others.
    let largest = attention.iter().flatten().copied().filter(|score| score.is_finite()).fold(0.0, f32::max);
    for head in &mut attention {
        let before = head.iter().position(|&score| score == ALWAYS).unwrap_or(head.len());
        #[expect(clippy::cast_precision_loss)]
        let window = (head.len() - before).max(1) as f32;
        for (index, score) in head[before..].iter_mut().enumerate() {
            #[expect(clippy::cast_precision_loss)]
            let place = index as f32 / window;
            *score = largest + 1.0 + place * EPSILON;
        }
    }
    let products = attention.iter().zip(&lengths).map(|(attention, lengths)| -> Vec<f32> {
        attention.iter().zip(lengths).map(|(weight, length)| (weight + EPSILON) * length).collect()
    });
    let mut scores: Vec<Vec<f32>> = products.collect();
    let shares = match budget.allocation {
        // How much each head keeps in the end is decided by attention alone, so both stages are over here.
        Allocation::Adaptive { safeguard } => {
            let kept = budget.allocation.select(&attention, budget.positions);
            let safe = ratio_count(safeguard, budget.positions);
            kept.iter().map(|kept| (ratio_count(FIRST_STAGE, kept.len()).max(safe), kept.len())).collect()
        }
        _ => vec![(ratio_count(FIRST_STAGE, budget.positions), 0); attention.len()],
    };
    for ((scores, attention), (first, whole)) in scores.iter_mut().zip(&attention).zip(shares) {
        for position in top_positions(attention, first) {
            scores[position] = ALWAYS;
        }
        for position in top_positions(scores, whole) {
            scores[position] = ALWAYS;
        }
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept};
    use super::*;

    const SMALL: SnapKv = SnapKv { observation_window: 1, pool_kernel: 1 };

    #[test]
    fn half_goes_by_attention_and_half_by_what_values_add() {
        let attention = [0.4, 0.0, 0.1, 0.2, 0.0, 0.05, 0.25];
        let outputs = [vec![1.0, 8.0, 9.0, 1.0, 1100.0, 1.0, 1.0], vec![1.0, 8.0, 9.0, 1.0, 1300.0, 1.0, 1.0]];
        let facts = MethodFacts { attention: &attention, outputs: &outputs, group_size: 2, ..facts(7, 4) };
        // The window and what is looked at most; then by products: position 2, and 4, which nothing looks at, but whose value
        // is so long that 1e-4 of it is more than position 3 adds.
        let scores = CriticalKv(SMALL).scores(&facts);
        assert_eq!(kept(&CriticalKv(SMALL), &facts), [0, 2, 4, 6]);
        assert_eq!((scores[0], scores[6]), (ALWAYS, ALWAYS));
        for (position, expected) in [(1, 8e-4), (2, 0.0501 * 9.0), (3, 0.1001), (4, 0.12), (5, 0.0251)] {
            assert!((scores[position] - expected).abs() < 1e-5, "{position}: {scores:?}");
        }
    }

    #[test]
    fn heads_that_compete_keep_as_much_as_their_attention_says() {
        let allocation = CriticalAdaKv(SMALL).allocation();
        let head = |attention: [f32; 6], lengths: [f32; 6]| {
            let mut attention = attention.to_vec();
            attention[5] = ALWAYS;
            vec![attention, lengths.to_vec()]
        };
        let measures = vec![
            head([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], [1.0, 1.0, 1.0, 9.0, 20.0, 1.0]),
            head([0.05, 0.04, 0.03, 0.02, 0.01, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ];
        let budget = LayerBudget { positions: 3, kept_ratio: 0.5, allocation };
        let scores = CriticalAdaKv(SMALL).layer_scores(&budget, measures);
        // By attention the first head keeps 5 and the second its window only; of 5 go 2 by attention (window, 0), the rest
        // by products: 4 (2.0), 3 (1.8), 1 (0.4).
        assert_eq!(allocation.select(&scores, 3), [vec![0, 1, 3, 4, 5], vec![5]]);
    }
}
