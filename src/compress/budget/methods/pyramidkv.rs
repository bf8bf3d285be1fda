//! `pyramidkv`: `snapkv`, with more for the first layers than for the last (Cai et al., arXiv 2406.02069).

use serde::{Deserialize, Serialize};

use super::{Method, MethodFacts, Needs, SnapKv};
use crate::compress::budget::allocation::Allocation;

/// How steep the pyramid is: the last layer's budget is this part of the average, as in the paper.
const BETA: f64 = 20.0;

/// The scores of `snapkv`, and budgets that fall linearly from layer to layer (see [`Allocation::Pyramid`]).
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PyramidKv(pub SnapKv);

impl Method for PyramidKv {
    fn name(&self) -> &'static str {
        "pyramidkv"
    }

    fn summary(&self) -> &'static str {
        "as snapkv, with budgets that fall from layer to layer"
    }

    fn needs(&self) -> Needs {
        self.0.needs()
    }

    fn allocation(&self) -> Allocation {
        Allocation::Pyramid { beta: BETA, window: self.0.observation_window }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        self.0.scores(facts)
    }
}
