//! `capkv`: values that keep directions open which queries to come will ask for (`CapKV`, Yang et al., arXiv 2604.25975; as
//! kvpress's `CapPress` computes it).

use serde::{Deserialize, Serialize};

use super::key_norm::norm;
use super::{ALWAYS, FutureQueries, Method, MethodFacts, Needs, Sinks};
use crate::compress::budget::leverage::leverage;
use crate::kernels::vector::{self, instruction_set};

/// How sharply keys that point as the mean query does are preferred.
const TAU: f32 = 5.0;

/// Positions behind the prompt over which the rotation of queries is averaged.
const FUTURE_POSITIONS: usize = 512;

/// What is added to weights in the matrix that values are set against.
const EPSILON: f32 = 1e-6;

/// Lengths below this count as this.
const MIN_NORM: f32 = 1e-12;

/// Keeps the first `sink_tokens` positions, and of the others those of the largest weighted leverage: with weights `w`, the
/// exponential of 5 times the cosine of the key and the mean query, turned to the positions to come, a value's score is `w v
/// (I + sum w v v^T)^-1 v^T`, the mean over the KV head's query heads.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CapKv(pub Sinks);

impl Method for CapKv {
    fn name(&self) -> &'static str {
        "capkv"
    }

    fn summary(&self) -> &'static str {
        "values of their own direction, by how much their keys agree with the mean query"
    }

    fn needs(&self) -> Needs {
        let queries = FutureQueries { skip_positions: self.0.sink_tokens, positions: FUTURE_POSITIONS };
        Needs { keys_and_values: true, future_queries: Some(queries), ..Needs::default() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let (dim, set) = (facts.head_dim, instruction_set());
        let sinks = facts.num_sinks(self.0.sink_tokens);
        let (keys, values) = (&facts.keys[sinks * dim..], &facts.values[sinks * dim..]);
        let norms: Vec<f32> = keys.chunks_exact(dim).map(|key| norm(key).max(MIN_NORM)).collect();
        let mut sums = vec![0.0; facts.len - sinks];
        #[expect(clippy::cast_precision_loss)]
        let heads = facts.queries.len().max(1) as f32;
        for queries in facts.queries {
            let mean_norm = norm(&queries.mean).max(MIN_NORM);
            let cosines = keys.chunks_exact(dim).zip(&norms);
            let cosines: Vec<f32> = cosines
                .map(|(key, norm)| (vector::dot(set, key, &queries.mean) / (norm * mean_norm)).clamp(-1.0, 1.0))
                .collect();
            let largest = cosines.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = cosines.iter().map(|cosine| (TAU * cosine - TAU * largest).exp()).collect();
            let floored: Vec<f32> = weights.iter().map(|weight| weight + EPSILON).collect();
            let leverages = leverage(values, dim, Some(&floored), 1.0);
            for ((sum, weight), leverage) in sums.iter_mut().zip(weights).zip(leverages) {
                *sum += weight * leverage / heads;
            }
        }
        [vec![ALWAYS; sinks], sums].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::super::QueryMoments;
    use super::super::tests::facts;
    use super::*;

    #[test]
    fn scores_are_those_computed_by_hand() {
        // Values of one number: leverage is v^2 / (1 + sum of w v^2).
        let queries = [QueryMoments { mean: vec![2.0], covariance: vec![1.0] }];
        let (keys, values) = ([9.0, 3.0, -1.0, 0.5], [7.0, 1.0, 2.0, -3.0]);
        let facts = MethodFacts { keys: &keys, values: &values, queries: &queries, ..facts(4, 2) };
        let scores = CapKv(Sinks { sink_tokens: 1 }).scores(&facts);
        let weights = [1.0, (-10f32).exp(), 1.0];
        let sum = 1.0 + 1.0 + 4.0 * weights[1] + 9.0;
        assert_eq!(scores[0], ALWAYS);
        for ((score, weight), square) in scores[1..].iter().zip(weights).zip([1.0, 4.0, 9.0]) {
            assert!((score - weight * square / sum).abs() < 1e-5, "{scores:?}");
        }
    }

    #[test]
    fn a_segment_of_sinks_only_is_kept() {
        let facts = MethodFacts { keys: &[1.0; 3], values: &[1.0; 3], ..facts(3, 3) };
        assert_eq!(CapKv(Sinks::DEFAULT).scores(&facts), [ALWAYS; 3]);
    }
}
