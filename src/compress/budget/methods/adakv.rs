//! `adakv`: `snapkv`, with a layer's budget shared over its heads by need (Feng et al., arXiv 2407.11550).

use serde::{Deserialize, Serialize};

use super::{Method, MethodFacts, Needs, SnapKv};
use crate::compress::budget::allocation::{Allocation, SAFEGUARD};

/// The scores of `snapkv`; the heads of a layer compete for its budget (see [`Allocation::Adaptive`]).
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AdaKv(pub SnapKv);

impl Method for AdaKv {
    fn name(&self) -> &'static str {
        "adakv"
    }

    fn summary(&self) -> &'static str {
        "as snapkv, with each layer's budget shared over its heads by their scores"
    }

    fn needs(&self) -> Needs {
        self.0.needs()
    }

    fn allocation(&self) -> Allocation {
        Allocation::Adaptive { safeguard: SAFEGUARD }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        self.0.scores(facts)
    }
}
