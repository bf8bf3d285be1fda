//! `random`: chance, for comparison: what a method must beat.

use serde::{Deserialize, Serialize};

use super::{Method, MethodFacts};
use crate::compress::values;

/// Keeps positions at random. The same seed keeps the same positions of the same head.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Random {
    /// Another one keeps other positions; default 0.
    #[serde(deserialize_with = "values::whole")]
    pub seed: u64,
}

impl Method for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn summary(&self) -> &'static str {
        "positions at random, by `seed`"
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let stream = mix(mix(self.seed).wrapping_add(facts.head_idx as u64));
        let positions = facts.first_position..facts.first_position + facts.len;
        positions.map(|position| unit(mix(stream.wrapping_add(position as u64)))).collect()
    }
}

/// The step and finaliser of `SplitMix64`: nearby numbers become unrelated ones.
pub(super) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The upper bits as a number in 0..1.
#[expect(clippy::cast_precision_loss)] // 24 bits fit
pub(super) fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u32 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept};
    use super::*;

    #[test]
    fn scores_are_even_and_differ_by_seed_head_and_position() {
        let facts = facts(4000, 10);
        let scores = Random::default().scores(&facts);
        let mean = scores.iter().sum::<f32>() / 4000.0;
        assert!((mean - 0.5).abs() < 0.02 && scores.iter().all(|score| (0.0..1.0).contains(score)), "{mean}");
        assert_ne!(kept(&Random::default(), &facts), kept(&Random { seed: 1 }, &facts));
        let other_head = MethodFacts { head_idx: 1, ..facts };
        assert_ne!(kept(&Random::default(), &facts), kept(&Random::default(), &other_head));
        let later = MethodFacts { first_position: 7, ..facts };
        assert_eq!(Random::default().scores(&later)[..100], scores[7..107]);
    }
}
