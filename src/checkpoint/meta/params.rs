//! Meta's `params.json`: its keys, and what their values may be.
//!
//! Not for: whether they fit the tensors (see [`super::config`]).

use serde_json::Value;

use crate::error::Result;
use crate::json::{Object, cut};

/// The file with the sizes.
pub(super) const PARAMS: &str = "params.json";

/// Keys of `params.json` that are read.
const KEYS: [&str; 14] = [
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "rope_high_freq_factor",
    "head_dim",
    "max_seq_len",
];
/// Keys of `params.json` that do not change what is computed.
const IGNORED_KEYS: [&str; 3] = ["max_batch_size", "model_parallel_size", "model_type"];

/// Looks whether all keys of `params.json` are known.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported), by name, for one that is not: it may change what is to be computed.
pub(super) fn check_keys(params: &Object<'_>) -> Result<()> {
    match params.map.keys().find(|key| !KEYS.iter().chain(&IGNORED_KEYS).any(|known| known == key)) {
        Some(key) => Err(params.unsupported(&format!("the key `{}`", cut(key))).with_hint(
            "plain LLaMA models in floats are computed, without experts, images, adapters or 8-bit weights",
        )),
        None => Ok(()),
    }
}

/// Number of tokens; none if the tensors are to tell it.
pub(super) fn vocab_size(params: &Object<'_>) -> Result<Option<usize>> {
    match params.get("vocab_size").and_then(Value::as_i64) {
        Some(-1) => Ok(None),
        _ => params.size("vocab_size"),
    }
}

/// Width inside of the MLP by Meta's formula.
pub(super) fn intermediate_size(params: &Object<'_>, hidden_size: usize) -> Result<usize> {
    let multiple_of = params.size("multiple_of")?.unwrap_or(256);
    let mut width = 2 * (4 * hidden_size) / 3;
    if let Some(multiplier) = params.positive("ffn_dim_multiplier")? {
        // Python's `int(multiplier * width)`; casting saturates, and what is absurd fits no tensor.
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let scaled = (multiplier * width as f64) as usize;
        width = scaled;
    }
    let rounded = width.checked_next_multiple_of(multiple_of);
    rounded.ok_or_else(|| params.bad("ffn_dim_multiplier", "the MLP would be absurdly large"))
}
