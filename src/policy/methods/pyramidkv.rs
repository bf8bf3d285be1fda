//! `pyramidkv`: `snapkv`, with more for the first layers than for the last (Cai et al., arXiv 2406.02069).

use super::{Method, MethodFacts, MethodSettings, Needs, snapkv};
use crate::policy::allocation::Allocation;

/// How steep the pyramid is: the last layer's budget is this part of the average, as in the paper.
const BETA: f64 = 20.0;

/// The scores of `snapkv`, and budgets that fall linearly from layer to layer (see [`Allocation::Pyramid`]).
#[derive(Debug)]
pub struct PyramidKv;

impl Method for PyramidKv {
    fn name(&self) -> &'static str {
        "pyramidkv"
    }

    fn summary(&self) -> &'static str {
        "as snapkv, with budgets that fall from layer to layer"
    }

    fn keys(&self) -> &'static [&'static str] {
        snapkv::KEYS
    }

    fn needs(&self, settings: &MethodSettings) -> Needs {
        snapkv::observed(settings)
    }

    fn allocation(&self, settings: &MethodSettings) -> Allocation {
        Allocation::Pyramid { beta: BETA, window: settings.observation_window }
    }

    fn scores(&self, facts: &MethodFacts<'_>, settings: &MethodSettings) -> Vec<f32> {
        snapkv::scores(facts, settings)
    }
}
