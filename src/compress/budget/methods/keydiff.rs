//! `keydiff`: keys unlike the others (Park et al., arXiv 2504.15364).

use serde::{Deserialize, Serialize};

use super::key_norm::norm;
use super::{Method, MethodFacts, Needs};

/// Lengths below this count as this, as in kvpress.
const MIN_NORM: f32 = 1e-8;

/// Keeps the positions whose keys point away from the mean of all keys' directions: those of the smallest cosine to it.
///
/// The paper evicts block by block while the prompt is read; here one decision is made about all of it, as by kvpress's
/// `KeyDiffPress` alone.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct KeyDiff;

impl Method for KeyDiff {
    fn name(&self) -> &'static str {
        "keydiff"
    }

    fn summary(&self) -> &'static str {
        "keys that point away from the mean direction of keys"
    }

    fn needs(&self) -> Needs {
        Needs { keys_and_values: true, ..Needs::default() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let keys = || facts.keys.chunks_exact(facts.head_dim);
        let norms: Vec<f32> = keys().map(|key| norm(key).max(MIN_NORM)).collect();
        let mut sums = vec![0.0f64; facts.head_dim];
        for (key, norm) in keys().zip(&norms) {
            sums.iter_mut().zip(key).for_each(|(sum, number)| *sum += f64::from(number / norm));
        }
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        let anchor: Vec<f32> = sums.into_iter().map(|sum| (sum / facts.len.max(1) as f64) as f32).collect();
        let anchor_norm = norm(&anchor).max(MIN_NORM);
        let cosine = |(key, norm): (&[f32], &f32)| {
            key.iter().zip(&anchor).map(|(a, b)| a * b).sum::<f32>() / (norm * anchor_norm)
        };
        keys().zip(&norms).map(|pair| -cosine(pair)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept};
    use super::*;

    #[test]
    fn keys_unlike_the_mean_are_kept_whatever_their_length() {
        let keys = [2.0, 0.0, 0.0, 0.5, 9.0, 0.0, 1.0, 0.0, -3.0, 0.0, 0.0, 0.0];
        let facts = MethodFacts { keys: &keys, head_dim: 2, ..facts(6, 3) };
        let scores = KeyDiff.scores(&facts);
        // The anchor is (1 + 1 + 1 - 1, 1) / 6.
        let root = 5f32.sqrt();
        for (score, expected) in scores.iter().zip([-2.0, -1.0, -2.0, -2.0, 2.0, 0.0]) {
            assert!((score - expected / root).abs() < 1e-6, "{scores:?}");
        }
        assert_eq!(kept(&KeyDiff, &facts), [1, 4, 5]);
    }
}
