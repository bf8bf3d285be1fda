//! How much a method keeps: a share, or bytes.

use serde::Serialize;

use crate::policy::{self, Method};

/// How much a method keeps of each segment that it decides about: of a prompt, or of a further prompt together with what
/// was generated since the one before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// This share of the segment, in 0..=1, for every head on average.
    KeptRatio(f64),
    /// Bytes of kept keys and values of the segment, all layers together, in the cache's own format; at least 1.
    Bytes(usize),
}

/// The cache that a [`Budget`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BudgetScale {
    /// Layers of the model.
    pub num_layers: usize,
    /// KV heads of a layer.
    pub num_kv_heads: usize,
    /// Bytes of one stored key and its value.
    pub token_bytes: usize,
}

impl Budget {
    /// How many of `len` positions a head keeps on average: the share of them, not rounded; or the whole positions that
    /// the head's equal part of the layer's equal part of the bytes has room for. At least 1, whatever the budget, unless
    /// `len` is 0: a head that keeps nothing has nothing to attend to.
    ///
    /// Where all heads keep the same, that is this number rounded down, as [`ratio_count`](crate::policy::ratio_count)
    /// does.
    #[must_use]
    #[expect(clippy::cast_precision_loss)] // counts of tokens
    pub fn average(self, len: usize, scale: BudgetScale) -> f64 {
        let average = match self {
            Self::KeptRatio(ratio) => ratio * len as f64,
            Self::Bytes(bytes) => {
                let layer_bytes = bytes / scale.num_layers.max(1);
                (layer_bytes / (scale.num_kv_heads * scale.token_bytes).max(1)) as f64
            }
        };
        average.clamp(1.min(len) as f64, len as f64)
    }

    /// How many positions all heads of all layers keep together, where one list decides about all: the share of all of
    /// them, or what the bytes have room for, rounded down; at least one for each head.
    #[must_use]
    pub fn total(self, len: usize, scale: BudgetScale) -> usize {
        let heads = scale.num_layers * scale.num_kv_heads;
        let total = match self {
            Self::KeptRatio(ratio) => policy::ratio_count(ratio, len * heads),
            Self::Bytes(bytes) => bytes / scale.token_bytes.max(1),
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

/// A size in bytes, as a person writes it: a number, and KB, MB (the default) or GB, in powers of 1024, or B for bytes.
///
/// # Errors
/// What was expected, if it is anything else, or less than a byte.
pub fn parse_size(text: &str) -> std::result::Result<usize, String> {
    let text = text.trim();
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let unit = match text[end..].to_ascii_uppercase().as_str() {
        "B" => 1u64,
        "" | "MB" | "M" | "MIB" => 1 << 20,
        "KB" | "K" | "KIB" => 1 << 10,
        "GB" | "G" | "GIB" => 1 << 30,
        _ => 0,
    };
    let number: Option<f64> = text[..end].trim().parse().ok();
    #[expect(clippy::cast_precision_loss)]
    let bytes = number.filter(|number| number.is_finite() && *number > 0.0).map(|number| number * unit as f64);
    match bytes {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Some(bytes) if (1.0..1e15).contains(&bytes) => Ok(bytes as usize),
        _ => Err("expected a size such as 64MB, 512KB or 1.5GB".to_owned()),
    }
}

/// A method with a budget, and how large that is.
#[derive(Debug, Clone, Copy)]
pub struct BudgetedMethod {
    /// One of [`METHODS`](crate::policy::METHODS).
    pub method: &'static dyn Method,
    /// How much it keeps.
    pub budget: Budget,
}

impl PartialEq for BudgetedMethod {
    fn eq(&self, other: &Self) -> bool {
        self.method.name() == other.method.name() && self.budget == other.budget
    }
}
