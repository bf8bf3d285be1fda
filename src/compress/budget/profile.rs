//! A profile of a model's heads: what it costs when one of them alone loses what a method scores.
//!
//! A score is a guess from inside a layer of what a position is worth. How much a head's errors matter to what the model
//! says in the end depends on all layers behind it, and that is more or less the same for every text: so it is measured
//! once, on some texts, and scales the scores of others.
//!
//! Not for: measuring it (see [`crate::eval::head_profile`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::arch::HeadLayout;
use crate::error::{Error, Result};
use crate::json::strict_json;
use crate::reading;

/// Most bytes of a file; one of 128 layers with 64 heads each has some million.
const MAX_BYTES: u64 = 16 << 20;

/// A factor is at most so large, and at least its inverse, before it is weighted: differences below are those of noise.
const LARGEST: f64 = 100.0;

/// What was measured of one KV head: it alone lost what it had least of, all others kept everything.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadCost {
    /// Index of the layer.
    pub layer: usize,
    /// Index of the KV head in it.
    pub kv_head: usize,
    /// Share of its positions that it kept, in 0..=1; the mean over windows.
    pub kept_ratio: f64,
    /// The sum of the scores of those that it lost, at least 0; the mean over windows.
    pub lost_score: f64,
    /// Mean KL divergence from the full cache, in nats, at least 0; the mean over windows.
    pub kl: f64,
}

/// What lost scores cost in each head of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadProfile {
    /// The method whose scores were lost.
    pub method: String,
    pub num_layers: usize,
    /// KV heads of a layer.
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Windows that were measured, of all texts.
    pub windows: usize,
    /// Tokens of each window's prompt.
    pub prompt_tokens: usize,
    /// Tokens behind it that were scored.
    pub score_tokens: usize,
    /// `[num_layers * num_kv_heads]`, layer by layer.
    pub heads: Vec<HeadCost>,
}

impl HeadProfile {
    /// Reads a profile.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::BadFile`] if it is not such a profile.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = reading::text(path, "read head profile", MAX_BYTES)?;
        let bad = |reason: String| {
            Error::bad_file(path, reason).with_hint("a head profile is what `tune --profile FILE` writes")
        };
        let profile = strict_json(&text).and_then(serde_json::from_value::<Self>);
        let profile = profile.map_err(|error| bad(format!("not a head profile: {error}")))?;
        profile.check().map_err(bad)?;
        Ok(profile)
    }

    /// Refuses what no measurement gives.
    fn check(&self) -> Result<(), String> {
        let Self { num_layers, num_kv_heads, heads, .. } = self;
        if num_layers.checked_mul(*num_kv_heads) != Some(heads.len()) {
            return Err(format!(
                "expected {num_layers} layers with {num_kv_heads} KV heads each, got {} heads",
                heads.len()
            ));
        }
        for (index, head) in heads.iter().enumerate() {
            let place = (index / num_kv_heads, index % num_kv_heads);
            if place != (head.layer, head.kv_head) {
                return Err(format!("expected KV head {} of layer {} at place {index}", place.1, place.0));
            }
            let numbers = [head.kept_ratio, head.lost_score, head.kl];
            if numbers.iter().any(|number| !number.is_finite() || *number < 0.0) {
                return Err(format!("KV head {} of layer {} has a number below 0", head.kv_head, head.layer));
            }
        }
        Ok(())
    }

    /// What the scores of each head are multiplied with, `[num_layers * num_kv_heads]`: the divergence that a lost score
    /// costs in it, relative to the geometric mean over all heads, to the power `weight`; 1 for a head that lost nothing.
    ///
    /// * `weight`: in 0..=1
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // a count of heads; rounded
    pub fn factors(&self, weight: f64) -> Vec<f32> {
        let log_cost =
            |head: &HeadCost| (head.kl > 0.0 && head.lost_score > 0.0).then(|| head.kl.ln() - head.lost_score.ln());
        let costs: Vec<Option<f64>> = self.heads.iter().map(log_cost).collect();
        let known = costs.iter().flatten().count().max(1) as f64;
        let mean = costs.iter().flatten().sum::<f64>() / known;
        let largest = LARGEST.ln();
        let factor = |cost: &Option<f64>| {
            let relative = cost.map_or(0.0, |cost| (cost - mean).clamp(-largest, largest));
            (weight * relative).exp() as f32
        };
        costs.iter().map(factor).collect()
    }
}

/// A profile that scales a method's scores, so that its heads compete by what they cost.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadPrior {
    profile: Arc<HeadProfile>,
    /// Where it was read.
    path: PathBuf,
    weight: f64,
    /// `[num_layers * num_kv_heads]`
    factors: Arc<[f32]>,
}

impl HeadPrior {
    /// The key that names the file.
    pub const KEY: &'static str = "head_profile";
    /// The key that sets the weight.
    pub const WEIGHT_KEY: &'static str = "head_profile_weight";
    /// The weight if none is given.
    pub const DEFAULT_WEIGHT: f64 = 0.5;

    /// * `path`: of the profile, for messages and files
    /// * `weight`: in 0..=1: 0 for the scores as they are, 1 for scores in units of divergence
    #[must_use]
    pub fn new(profile: Arc<HeadProfile>, path: PathBuf, weight: f64) -> Self {
        let factors = profile.factors(weight).into();
        Self { profile, path, weight, factors }
    }

    /// The profile.
    #[must_use]
    pub fn profile(&self) -> &HeadProfile {
        &self.profile
    }

    /// Where it was read.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How much it counts, in 0..=1.
    #[must_use]
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Refuses a model of other sizes than the one that was measured.
    ///
    /// # Errors
    /// [`Error::Config`], with both sizes.
    pub fn expect_model(&self, num_layers: usize, heads: HeadLayout) -> Result<()> {
        let HeadProfile { num_layers: layers, num_kv_heads, head_dim, .. } = *self.profile;
        if (layers, num_kv_heads, head_dim) == (num_layers, heads.num_kv_heads, heads.head_dim) {
            return Ok(());
        }
        let sizes = |layers, kv_heads, dim| format!("{layers} layers with {kv_heads} KV heads of {dim} numbers");
        Err(Error::Config {
            path: None,
            key: Self::KEY.to_owned(),
            reason: format!(
                "`{}` was measured on a model of {}, and this one has {}",
                self.path.display(),
                sizes(layers, num_kv_heads, head_dim),
                sizes(num_layers, heads.num_kv_heads, heads.head_dim),
            ),
            hint: Some("measure this model with `tune --profile FILE`".to_owned()),
        })
    }

    /// Scales the scores of a layer's heads, `[num_kv_heads]` of `[n]`.
    pub(super) fn scale(&self, layer: usize, scores: &mut [Vec<f32>]) {
        let factors = self.factors.iter().skip(layer * scores.len());
        for (scores, &factor) in scores.iter_mut().zip(factors) {
            for score in scores {
                *score *= factor;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(costs: &[(f64, f64)]) -> HeadProfile {
        let heads = costs.iter().enumerate().map(|(index, &(lost_score, kl))| HeadCost {
            layer: index / 2,
            kv_head: index % 2,
            kept_ratio: 0.1,
            lost_score,
            kl,
        });
        HeadProfile {
            method: "replay".to_owned(),
            num_layers: costs.len() / 2,
            num_kv_heads: 2,
            head_dim: 8,
            windows: 1,
            prompt_tokens: 100,
            score_tokens: 10,
            heads: heads.collect(),
        }
    }

    #[test]
    fn factors_are_costs_relative_to_their_geometric_mean() {
        // Costs of 4, 1/4, and two heads that say nothing.
        let profile = profile(&[(2.0, 8.0), (2.0, 0.5), (0.0, 1.0), (1.0, 0.0)]);
        assert_eq!(profile.factors(1.0), [4.0, 0.25, 1.0, 1.0]);
        assert_eq!(profile.factors(0.5), [2.0, 0.5, 1.0, 1.0]);
        assert_eq!(profile.factors(0.0), [1.0; 4]);
        let extreme = super::tests::profile(&[(1.0, 1e9), (1.0, 1e-9)]).factors(1.0);
        assert!((extreme[0] - 100.0).abs() < 1e-3 && (extreme[1] - 0.01).abs() < 1e-6, "{extreme:?}");
    }

    #[test]
    fn each_head_is_scaled_by_its_own_factor() {
        let prior =
            HeadPrior::new(Arc::new(profile(&[(1.0, 1.0), (1.0, 1.0), (1.0, 4.0), (1.0, 0.25)])), "p".into(), 1.0);
        let mut scores = vec![vec![1.0, f32::INFINITY, 0.0], vec![8.0, -1.0, 2.0]];
        prior.scale(1, &mut scores);
        assert_eq!(scores, [vec![4.0, f32::INFINITY, 0.0], vec![2.0, -0.25, 0.5]]);
        prior.scale(0, &mut scores);
        assert_eq!(scores[0][0], 4.0);
    }

    #[test]
    fn what_no_measurement_gives_is_refused() {
        let good = profile(&[(1.0, 1.0); 4]);
        assert_eq!(good.check(), Ok(()));
        let missing = HeadProfile { num_layers: 3, ..good.clone() };
        assert!(missing.check().unwrap_err().contains("got 4 heads"));
        let mut turned = good.clone();
        turned.heads.swap(0, 1);
        assert!(turned.check().unwrap_err().contains("KV head 0 of layer 0"));
        let mut negative = good;
        negative.heads[3].kl = -1.0;
        assert!(negative.check().unwrap_err().contains("below 0"));
    }

    #[test]
    fn models_of_other_sizes_are_refused() {
        let prior = HeadPrior::new(Arc::new(profile(&[(1.0, 1.0); 4])), "p.json".into(), 0.5);
        let heads = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 8 };
        assert!(prior.expect_model(2, heads).is_ok());
        for (layers, heads) in
            [(3, heads), (2, HeadLayout { num_kv_heads: 4, ..heads }), (2, HeadLayout { head_dim: 16, ..heads })]
        {
            let message = prior.expect_model(layers, heads).unwrap_err().to_string();
            assert!(message.contains("`p.json`") && message.contains("2 layers with 2 KV heads of 8"), "{message}");
        }
    }
}
