//! `adakv`: `snapkv`, with a layer's budget shared over its heads by need (Feng et al., arXiv 2407.11550).

use super::{Method, MethodFacts, MethodSettings, Needs, snapkv};
use crate::policy::allocation::Allocation;

/// The share of the average budget that every head gets in any case, as in the paper.
const SAFEGUARD: f64 = 0.2;

/// The scores of `snapkv`; the heads of a layer compete for its budget (see [`Allocation::Adaptive`]).
#[derive(Debug)]
pub struct AdaKv;

impl Method for AdaKv {
    fn name(&self) -> &'static str {
        "adakv"
    }

    fn summary(&self) -> &'static str {
        "as snapkv, with each layer's budget shared over its heads by their scores"
    }

    fn keys(&self) -> &'static [&'static str] {
        snapkv::KEYS
    }

    fn needs(&self, settings: &MethodSettings) -> Needs {
        snapkv::observed(settings)
    }

    fn allocation(&self, _settings: &MethodSettings) -> Allocation {
        Allocation::Adaptive { safeguard: SAFEGUARD }
    }

    fn scores(&self, facts: &MethodFacts<'_>, settings: &MethodSettings) -> Vec<f32> {
        snapkv::scores(facts, settings)
    }
}
