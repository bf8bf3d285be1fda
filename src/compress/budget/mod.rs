//! Methods that keep as much as a budget says: each position gets a score, the best are kept.
//!
//! [`methods`] has one file for each way to score; [`allocation`] shares a budget out over layers and heads, [`pool`] one
//! over all of them, and [`candidates`] has what is judged anew with what comes; [`profile`] says which heads matter to a model; [`select`] puts it together, for which [`queries`] sums
//! up queries. How large a budget is, and whose
//! positions compete for it, is here.
//!
//! Not for: FastGen, which has a threshold and no budget (see [`super::fastgen`]).

pub mod allocation;
pub mod candidates;
mod leverage;
pub mod methods;
pub mod pool;
pub mod profile;
pub mod queries;
pub mod select;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{ratio_count, values};
use crate::sizes::short_size;
use allocation::{Allocation, SAFEGUARD};
use methods::Method;
use profile::HeadPrior;

/// How much a method keeps: a share of each segment that it decides about, which is a prompt, or a further prompt together
/// with what was generated since the one before; or so many bytes of all that a sequence has seen.
///
/// In a configuration each is a key; reports call the bytes `bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// This share of the segment, in 0..=1, for every head on average.
    KeptRatio(#[serde(deserialize_with = "values::ratio")] f64),
    /// Bytes that a sequence's whole cache may come to: keys and values of all layers in the cache's own format, their
    /// positions, and what is noted of them; at least 1. What was kept of earlier segments competes with the newest.
    #[serde(rename(deserialize = "kv_budget"))]
    Bytes(#[serde(deserialize_with = "values::size")] usize),
}

/// As tables name it: `25%`, or `64MB`.
impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::KeptRatio(ratio) => write!(f, "{}%", (ratio * 1e4).round() / 100.0),
            Self::Bytes(bytes) => f.write_str(&short_size(bytes)),
        }
    }
}

/// The cache that a [`Budget`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BudgetScale {
    /// Layers of the model.
    pub num_layers: usize,
    /// KV heads of a layer.
    pub num_kv_heads: usize,
    /// Bytes of one row of a head: a stored key, its value, and what is noted of them.
    pub row_bytes: usize,
    /// Bytes that a head takes beside its rows, and for rows that are to come.
    pub head_bytes: usize,
}

impl BudgetScale {
    /// Rows of all heads of all layers that so many bytes have room for.
    #[must_use]
    pub fn rows(self, bytes: usize) -> usize {
        let heads = self.num_layers * self.num_kv_heads;
        bytes.saturating_sub(heads.saturating_mul(self.head_bytes)) / self.row_bytes.max(1)
    }
}

impl Budget {
    /// How many of `len` positions a head keeps on average: the share of them, not rounded; or the whole positions that
    /// the head's equal part of the layer's equal part of the bytes has room for. At least 1, whatever the budget, unless
    /// `len` is 0: a head that keeps nothing has nothing to attend to.
    ///
    /// Where all heads keep the same, that is this number rounded down, as [`ratio_count`]
    /// does.
    #[must_use]
    #[expect(clippy::cast_precision_loss)] // counts of tokens
    pub fn average(self, len: usize, scale: BudgetScale) -> f64 {
        let average = match self {
            Self::KeptRatio(ratio) => ratio * len as f64,
            Self::Bytes(bytes) => (scale.rows(bytes) / (scale.num_layers * scale.num_kv_heads).max(1)) as f64,
        };
        average.clamp(1.min(len) as f64, len as f64)
    }

    /// How many positions all heads of all layers keep together, where one list decides about all: the share of all of
    /// them, or what the bytes have room for, rounded down; at least one for each head.
    #[must_use]
    pub fn total(self, len: usize, scale: BudgetScale) -> usize {
        let heads = scale.num_layers * scale.num_kv_heads;
        let total = match self {
            Self::KeptRatio(ratio) => ratio_count(ratio, len * heads),
            Self::Bytes(bytes) => scale.rows(bytes),
        };
        total.clamp(heads.min(len * heads), len * heads)
    }

    /// The key that sets it.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::KeptRatio(_) => "kept_ratio",
            Self::Bytes(_) => "kv_budget",
        }
    }
}

impl Default for Budget {
    /// Half of everything.
    fn default() -> Self {
        Self::KeptRatio(0.5)
    }
}

/// Whose positions compete for a budget (`"budget_over"`), so that the scores of two methods can be compared under the same
/// rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BudgetOver {
    /// Those that the method's authors let compete, see [`Method::allocation`].
    #[default]
    Own,
    /// Those of one head: every head keeps as many as any other.
    Head,
    /// Those of all heads of a layer: every layer keeps as many as any other, and each of its heads at least a fifth of the
    /// average.
    Layer,
    /// Those of all heads of all layers; each head keeps its best position at least.
    Pool,
}

impl BudgetOver {
    /// The key that sets it.
    pub const KEY: &'static str = "budget_over";

    /// All ways.
    pub const ALL: [Self; 4] = [Self::Own, Self::Head, Self::Layer, Self::Pool];

    /// The key's value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Head => "head",
            Self::Layer => "layer",
            Self::Pool => "pool",
        }
    }

    /// How a method's budget is shared out so.
    #[must_use]
    pub fn allocation(self, method: &dyn Method) -> Allocation {
        match self {
            Self::Own => method.allocation(),
            Self::Head => Allocation::Uniform,
            Self::Layer => Allocation::Adaptive { safeguard: SAFEGUARD },
            Self::Pool => Allocation::Pooled,
        }
    }
}

/// A method with a budget, and how large that is.
#[derive(Debug, Clone)]
pub struct BudgetedMethod {
    /// One of [`METHODS`](methods::METHODS), or a program's own, with its settings.
    pub method: Arc<dyn Method>,
    /// How much it keeps.
    pub budget: Budget,
    /// Whose positions compete for it.
    pub over: BudgetOver,
    /// What scales the scores of competing heads, if anything.
    pub prior: Option<HeadPrior>,
}

/// By the method's name and settings.
impl PartialEq for BudgetedMethod {
    fn eq(&self, other: &Self) -> bool {
        let settings = |method: &Self| method.method.settings().ok();
        let rules = |method: &Self| (method.method.name(), method.budget, method.over);
        rules(self) == rules(other) && self.prior == other.prior && settings(self) == settings(other)
    }
}
