//! `dropkv`: what the last rows' attention would lose by each position alone, exactly (`DropKV`, kvpress's pull request 285).

use serde::{Deserialize, Serialize};

use super::snapkv::with_window;
use super::{Method, MethodFacts, Needs, SnapKv};
use crate::kernels::vector::{self, instruction_set};

/// What the weights of all other keys are taken to be at least, together.
const MIN_REST: f32 = 1e-6;

/// Keeps the last `observation_window` positions, and of those before them the ones without which what these rows attend to
/// would change most: with weight `p`, value `v` and output `o` of a row, leaving the key out and dividing by the rest of the
/// weights moves the output by `p / (1 - p) * (o - v)`. The squared lengths of that are summed up over the rows and the KV
/// head's query heads, and over `pool_kernel` neighbours.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DropKv(pub SnapKv);

impl Method for DropKv {
    fn name(&self) -> &'static str {
        "dropkv"
    }

    fn summary(&self) -> &'static str {
        "what the last `observation_window` rows' attention would lose, were it missing alone"
    }

    fn needs(&self) -> Needs {
        Needs { last_rows: self.0.observation_window, keys_and_values: true, ..Needs::default() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let changes = changes(facts, self.0.before_window(facts));
        with_window(facts, self.0.neighbour_sums(facts, &changes))
    }
}

/// The sums of squared changes that each of the first `count` positions makes.
fn changes(facts: &MethodFacts<'_>, count: usize) -> Vec<f32> {
    let (dim, set) = (facts.head_dim, instruction_set());
    let values = || facts.values.chunks_exact(dim).take(count);
    let lengths: Vec<f32> = values().map(|value| vector::dot(set, value, value)).collect();
    let mut sums = vec![0.0; count];
    for (weights, outputs) in facts.last_rows.weights.iter().zip(facts.last_rows.outputs) {
        for (weights, output) in weights.chunks_exact(facts.len).zip(outputs.chunks_exact(dim)) {
            let own = vector::dot(set, output, output);
            for (((sum, &weight), value), length) in sums.iter_mut().zip(weights).zip(values()).zip(&lengths) {
                let odds = weight / (1.0 - weight).max(MIN_REST);
                let distance = length - 2.0 * vector::dot(set, output, value) + own;
                *sum += odds * odds * distance.max(0.0);
            }
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::super::LastRowsFacts;
    use super::super::tests::{facts, kept};
    use super::*;

    const SMALL: SnapKv = SnapKv { observation_window: 2, pool_kernel: 1 };

    /// The definition: attention with one key left out, and weights that add up to 1 again.
    #[test]
    fn scores_are_the_squared_changes_of_outputs_without_the_position() {
        let values = [1.0, 0.0, 0.0, 2.0, -1.0, 1.0, 3.0, 3.0, 0.5, -0.5];
        // Two query heads, two rows; something settled has the rest of the second head's weights, with value (1, 1).
        let weights = [
            vec![0.5, 0.25, 0.125, 0.125, 0.0, 0.1, 0.2, 0.3, 0.2, 0.2],
            vec![0.1, 0.1, 0.2, 0.1, 0.0, 0.3, 0.1, 0.1, 0.1, 0.1],
        ];
        let output = |weights: &[f32], without: Option<usize>| {
            let settled = 1.0 - weights.iter().sum::<f32>();
            let kept = |index: usize| if Some(index) == without { 0.0 } else { weights[index] };
            let total: f32 = settled + (0..5).map(kept).sum::<f32>();
            [0, 1].map(|i| (settled + (0..5).map(|index| kept(index) * values[2 * index + i]).sum::<f32>()) / total)
        };
        let outputs =
            weights.each_ref().map(|rows| rows.chunks(5).flat_map(|row| output(row, None)).collect::<Vec<_>>());
        let last_rows = LastRowsFacts { weights: &weights, outputs: &outputs };
        let facts = MethodFacts { values: &values, last_rows, head_dim: 2, group_size: 2, ..facts(5, 3) };
        let scores = DropKv(SMALL).scores(&facts);
        for (position, score) in scores.iter().take(3).enumerate() {
            let rows = weights.iter().flat_map(|rows| rows.chunks(5));
            let expected: f32 = rows
                .map(|row| {
                    let (all, rest) = (output(row, None), output(row, Some(position)));
                    (all[0] - rest[0]).powi(2) + (all[1] - rest[1]).powi(2)
                })
                .sum();
            assert!((score - expected).abs() < 1e-5, "{position}: {score}, {expected}");
        }
        assert_eq!(kept(&DropKv(SMALL), &facts)[1..], [3, 4]);
    }

    #[test]
    fn a_row_that_looks_at_one_key_only_makes_no_infinity() {
        let last_rows = LastRowsFacts { weights: &[vec![1.0, 0.0]], outputs: &[vec![2.0]] };
        let facts = MethodFacts { values: &[2.0, 1.0], last_rows, num_rows: 1, ..facts(2, 1) };
        let scores = DropKv(SnapKv { observation_window: 1, pool_kernel: 1 }).scores(&facts);
        assert!(scores[0] == 0.0, "{scores:?}"); // the value is the output, and the odds are finite
    }
}
