//! `key_norm`: keys of small norm receive much attention (Devoto et al., arXiv 2406.11430).

use serde::{Deserialize, Serialize};

use super::{Method, MethodFacts, Needs};

/// Keeps the positions whose keys have the smallest Euclidean norm.
///
/// In the first layer, keys of the same token are equally long wherever they stand, but for the rounding of the rotation,
/// which then decides.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct KeyNorm;

impl Method for KeyNorm {
    fn name(&self) -> &'static str {
        "key_norm"
    }

    fn summary(&self) -> &'static str {
        "keys of the smallest norm"
    }

    fn needs(&self) -> Needs {
        Needs { keys_and_values: true, ..Needs::default() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        facts.keys.chunks_exact(facts.head_dim).map(|key| -norm(key)).collect()
    }
}

/// Euclidean norm of a vector.
pub(super) fn norm(vector: &[f32]) -> f32 {
    vector.iter().map(|number| number * number).sum::<f32>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept};
    use super::*;

    #[test]
    fn the_smallest_norms_are_kept() {
        let keys = [3.0, 4.0, 1.0, 0.0, 0.0, -6.0, -1.0, 1.0];
        let facts = MethodFacts { keys: &keys, head_dim: 2, ..facts(4, 2) };
        assert_eq!(KeyNorm.scores(&facts), [-5.0, -1.0, -6.0, -2f32.sqrt()]);
        assert_eq!(kept(&KeyNorm, &facts), [1, 3]);
    }
}
