//! `laprox`: what each position adds to the layer's output, one list for the whole model (after `LaProx`, Mai and Kim, arXiv
//! 2605.07234).

use serde::{Deserialize, Serialize};

use super::snapkv::with_window;
use super::{Method, MethodFacts, Needs, Outputs};
use crate::compress::budget::allocation::Allocation;
use crate::compress::values;

/// Keeps the last `observation_window` positions, and of those before them, over all layers and heads, those that add most
/// to what these rows write into the residual stream.
///
/// The layer's output is a product: the attention maps of its query heads beside one another, times the values behind each
/// head's part of the output projection below one another. What a position of a KV head has in it is the sum over the query
/// heads that share it of a column of a map times a row of that; the score is the length of this sum (its Frobenius norm), in
/// which heads that write the same count together, and heads that write the opposite against one another.
///
/// Written after the paper's idea: what its authors normalise or pool beyond that is not in here.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LaProx {
    /// How many of the prompt's last rows are observed, at least 1; default 64.
    #[serde(deserialize_with = "values::positive")]
    pub observation_window: usize,
}

impl LaProx {
    /// As many rows as `snapkv` observes.
    pub const DEFAULT: Self = Self { observation_window: 64 };
}

impl Default for LaProx {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Method for LaProx {
    fn name(&self) -> &'static str {
        "laprox"
    }

    fn summary(&self) -> &'static str {
        "what adds most to the layer's output of the last `observation_window` rows; one budget for all layers"
    }

    fn needs(&self) -> Needs {
        Needs { last_rows: self.observation_window, outputs: Outputs::Products, ..Needs::default() }
    }

    fn allocation(&self) -> Allocation {
        Allocation::Pooled
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let before = facts.len - self.observation_window.min(facts.num_rows);
        let maps = facts.last_rows.weights;
        let mut sums = vec![0.0f32; before];
        for (left, a) in maps.iter().enumerate() {
            // Pairs are symmetric.
            for (right, b) in maps.iter().enumerate().skip(left) {
                let twice = if left == right { 1.0 } else { 2.0 };
                let outputs = &facts.outputs[left * maps.len() + right];
                let mut overlaps = vec![0.0f32; before];
                for (a, b) in a.chunks_exact(facts.len).zip(b.chunks_exact(facts.len)) {
                    overlaps.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
                }
                for ((sum, overlap), output) in sums.iter_mut().zip(overlaps).zip(outputs) {
                    *sum += twice * overlap * output;
                }
            }
        }
        with_window(facts, sums.into_iter().map(|sum| sum.max(0.0).sqrt()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::super::{ALWAYS, LastRowsFacts};
    use super::*;

    /// What two query heads make of three values, in a residual stream of two numbers.
    const MADE: [[[f32; 2]; 3]; 2] = [[[1.0, 2.0], [0.0, 1.0], [3.0, 3.0]], [[-1.0, 0.5], [0.0, -1.0], [1.0, 0.0]]];

    #[test]
    fn scores_are_lengths_of_what_a_position_adds_to_the_output() {
        let weights = [vec![0.5, 0.3, 0.2, 0.6, 0.1, 0.3], vec![0.2, 0.3, 0.5, 0.4, 0.1, 0.5]];
        let product =
            |g: usize, h: usize| (0..3).map(|j| MADE[g][j].iter().zip(MADE[h][j]).map(|(a, b)| a * b).sum()).collect();
        let outputs: Vec<Vec<f32>> = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(g, h)| product(g, h)).to_vec();
        let last_rows = LastRowsFacts { weights: &weights, outputs: &[] };
        let facts = MethodFacts { last_rows, outputs: &outputs, group_size: 2, num_rows: 2, ..facts(3, 3) };
        let scores = LaProx { observation_window: 2 }.scores(&facts);
        let mut squares = 0.0;
        for (row, i) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let sum: f32 = weights.iter().zip(MADE).map(|(weights, made)| weights[row * 3] * made[0][i]).sum();
            squares += sum * sum;
        }
        assert!((scores[0] - squares.sqrt()).abs() < 1e-6, "{scores:?}, {squares}");
        assert_eq!(scores[1..], [ALWAYS; 2]);
        // Heads that write the opposite of one another with the same weights write nothing.
        let all = MethodFacts { num_rows: 1, len: 3, ..facts };
        let weights = [vec![0.5, 0.3, 0.2], vec![0.2, 0.3, 0.5]];
        let last_rows = LastRowsFacts { weights: &weights, outputs: &[] };
        let scores = LaProx { observation_window: 1 }.scores(&MethodFacts { last_rows, ..all });
        assert!(scores[1].abs() < 1e-6, "{scores:?}");
    }
}
