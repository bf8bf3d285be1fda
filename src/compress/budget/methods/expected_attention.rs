//! `expected_attention`: the attention that queries to come are expected to pay (NVIDIA's kvpress,
//! `ExpectedAttentionPress`).
//!
//! Queries are taken for normally distributed, with the mean and covariance of the prompt's own; the expectation of
//! `exp(q.k / sqrt(d))` is then `exp(mean.k / sqrt(d) + k.covariance.k / 2d)`.

use serde::{Deserialize, Serialize};

use super::key_norm::norm;
use super::{ALWAYS, FutureQueries, Method, MethodFacts, Needs, QueryMoments};
use crate::compress::values;
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};

/// Positions behind the prompt over which the rotation of queries is averaged, as in kvpress.
const FUTURE_POSITIONS: usize = 512;

/// Keeps the first `sink_tokens` positions, and of the others those of the largest expected attention (a softmax over
/// them, averaged over the KV head's query heads) times the norm of the value.
///
/// Its authors run it (arXiv 2510.00636) with an `epsilon` of 0.01 and let the heads of a layer compete: then a value that is
/// long is not given up only because nothing is expected to look at it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpectedAttention {
    /// How many leading positions of the sequence are always kept, and left out of the queries; default 4.
    #[serde(deserialize_with = "values::whole")]
    pub sink_tokens: usize,
    /// What is added to every expected weight before it is multiplied by the norm of the value, at least 0; default 0.
    #[serde(deserialize_with = "values::non_negative")]
    pub epsilon: f32,
}

impl ExpectedAttention {
    /// What kvpress has by default.
    pub const DEFAULT: Self = Self { sink_tokens: 4, epsilon: 0.0 };
}

impl Default for ExpectedAttention {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Method for ExpectedAttention {
    fn name(&self) -> &'static str {
        "expected_attention"
    }

    fn summary(&self) -> &'static str {
        "what queries to come are expected to attend to, by the length of the value"
    }

    fn needs(&self) -> Needs {
        let queries = FutureQueries { skip_positions: self.sink_tokens, positions: FUTURE_POSITIONS };
        Needs { keys_and_values: true, future_queries: Some(queries), ..Needs::default() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let sinks = facts.num_sinks(self.sink_tokens);
        let behind_sinks = sinks * facts.head_dim..;
        let keys = &facts.keys[behind_sinks.clone()];
        let mut sums = vec![0.0; facts.len - sinks];
        for queries in facts.queries {
            let attention = expected(queries, keys, facts.head_dim);
            sums.iter_mut().zip(attention).for_each(|(sum, weight)| *sum += weight);
        }
        let mut scores = vec![ALWAYS; sinks];
        let values = facts.values[behind_sinks].chunks_exact(facts.head_dim);
        #[expect(clippy::cast_precision_loss)]
        let heads = facts.queries.len().max(1) as f32;
        scores.extend(sums.into_iter().zip(values).map(|(sum, value)| (sum / heads + self.epsilon) * norm(value)));
        scores
    }
}

/// Softmax of the expected logarithms over `keys` `[n, head_dim]`.
fn expected(queries: &QueryMoments, keys: &[f32], head_dim: usize) -> Vec<f32> {
    let set = instruction_set();
    let len = keys.len() / head_dim;
    let mut products = vec![0.0; keys.len()]; // [n, head_dim], keys times covariance
    MatrixMut::new(&mut products, len, head_dim, head_dim).set_product(
        Matrix::new(keys, len, head_dim, head_dim),
        Matrix::new(&queries.covariance, head_dim, head_dim, head_dim),
        1.0,
    );
    #[expect(clippy::cast_precision_loss)]
    let dim = head_dim as f32;
    let rows = keys.chunks_exact(head_dim).zip(products.chunks_exact(head_dim));
    let mut logits: Vec<f32> = rows
        .map(|(key, product)| {
            vector::dot(set, &queries.mean, key) / dim.sqrt() + vector::dot(set, product, key) / (2.0 * dim)
        })
        .collect();
    if !logits.is_empty() {
        vector::softmax(set, &mut logits);
    }
    logits
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;

    /// Between f32 and the same by hand.
    const TOLERANCE: f32 = 1e-6;

    #[test]
    fn scores_are_those_computed_by_hand() {
        let queries = [QueryMoments { mean: vec![1.0, -1.0], covariance: vec![2.0, 0.5, 0.5, 1.0] }];
        let keys = [9.0, 9.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0];
        let values = [5.0, 5.0, 3.0, 4.0, 0.0, 2.0, 1.0, 0.0];
        let facts = MethodFacts { keys: &keys, values: &values, queries: &queries, head_dim: 2, ..facts(4, 2) };
        let scores = ExpectedAttention { sink_tokens: 1, epsilon: 0.0 }.scores(&facts);
        let floored = ExpectedAttention { sink_tokens: 1, epsilon: 0.5 }.scores(&facts);
        // mean.k / sqrt 2 + k.C.k / 4 of the three keys behind the sink.
        let root = 2f32.sqrt();
        let logits = [1.0 / root + 2.0 / 4.0, -1.0 / root + 1.0 / 4.0, 0.0 + 4.0 / 4.0];
        let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
        assert_eq!(scores[0], ALWAYS);
        for ((index, logit), norm) in (1..).zip(logits).zip([5.0, 2.0, 1.0]) {
            assert!((scores[index] - logit.exp() / sum * norm).abs() < TOLERANCE, "{}", scores[index]);
            assert!((floored[index] - (logit.exp() / sum + 0.5) * norm).abs() < TOLERANCE, "{}", floored[index]);
        }
    }

    #[test]
    fn a_segment_of_sinks_only_is_kept() {
        let (keys, values) = ([1.0; 6], [1.0; 6]);
        let facts = MethodFacts { keys: &keys, values: &values, head_dim: 2, ..facts(3, 3) };
        assert_eq!(ExpectedAttention::DEFAULT.scores(&facts), [ALWAYS; 3]);
    }
}
