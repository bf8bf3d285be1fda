//! Meta's `params.json`: its keys, and what their values may be.
//!
//! Not for: whether they fit the tensors (see [`super::config`]).

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::super::pickle::shown;
use crate::error::{Error, Result};
use crate::foreign;
use crate::json::bytes_without_bom;

/// The file with the sizes.
pub(super) const PARAMS: &str = "params.json";
/// Bytes of it; Meta's have 200.
const MAX_PARAMS: u64 = 1 << 20;

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

/// The content of `params.json`.
pub(super) struct Params {
    pub path: PathBuf,
    pub values: Map<String, Value>,
}

impl Params {
    pub fn read(path: &Path) -> Result<Self> {
        const HINT: &str = "the file belongs beside `consolidated.00.pth`";
        let metadata = std::fs::metadata(path).map_err(|source| Error::io("open", path, source).with_hint(HINT))?;
        if !metadata.is_file() || metadata.len() > MAX_PARAMS {
            return Err(Error::bad_file(path, format!("it is no file of at most {MAX_PARAMS} bytes")).with_hint(HINT));
        }
        let file = std::fs::File::open(path).map_err(|source| Error::io("open", path, source))?;
        let mut bytes = Vec::new();
        file.take(MAX_PARAMS).read_to_end(&mut bytes).map_err(|source| Error::io("read", path, source))?;
        foreign::refuse(path, &bytes)?;
        let values: Map<String, Value> = serde_json::from_slice(bytes_without_bom(&bytes))
            .map_err(|error| Error::bad_file(path, format!("it is not a JSON object: {error}")).with_hint(HINT))?;
        if let Some(key) = values.keys().find(|key| !KEYS.iter().chain(&IGNORED_KEYS).any(|known| known == key)) {
            return Err(Error::unsupported(format!("the key `{}` in `{}`", shown(key), path.display())).with_hint(
                "plain LLaMA models in floats are computed, without experts, images, adapters or 8-bit weights",
            ));
        }
        Ok(Self { path: path.to_owned(), values })
    }

    pub fn wrong(&self, key: &str, reason: &str) -> Error {
        Error::bad_file(&self.path, format!("`{key}`: {reason}"))
    }

    fn get<T>(&self, key: &str, kind: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match convert(value) {
                Some(converted) => Ok(Some(converted)),
                None => Err(self.wrong(key, &format!("expected {kind}, got {}", shown(&value.to_string())))),
            },
        }
    }

    pub fn whole(&self, key: &str) -> Result<Option<usize>> {
        let whole = |value: &Value| value.as_u64().filter(|&number| number <= 1 << 30);
        self.get(key, "a whole number up to 2^30", |value| usize::try_from(whole(value)?).ok())
    }

    pub fn required(&self, key: &str) -> Result<usize> {
        match self.whole(key)? {
            Some(0) => Err(self.wrong(key, "expected at least 1, got 0")),
            Some(number) => Ok(number),
            None => Err(self.wrong(key, "it is missing")),
        }
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number above 0", |value| value.as_f64().filter(|number| number.is_finite() && *number > 0.0))
    }

    pub fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.get(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// Number of tokens; none if the tensors are to tell it.
    pub fn vocab_size(&self) -> Result<Option<usize>> {
        if self.values.get("vocab_size").and_then(Value::as_i64) == Some(-1) {
            Ok(None)
        } else {
            self.whole("vocab_size")
        }
    }

    /// Width inside of the MLP by Meta's formula.
    pub fn intermediate_size(&self, hidden_size: usize) -> Result<usize> {
        let multiple_of = self.whole("multiple_of")?.unwrap_or(256);
        if multiple_of == 0 {
            return Err(self.wrong("multiple_of", "expected at least 1, got 0"));
        }
        let mut width = 2 * (4 * hidden_size) / 3;
        if let Some(multiplier) = self.positive("ffn_dim_multiplier")? {
            // Python's `int(multiplier * width)`; casting saturates, and what is absurd fits no tensor.
            #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let scaled = (multiplier * width as f64) as usize;
            width = scaled;
        }
        let rounded = width.checked_next_multiple_of(multiple_of);
        rounded.ok_or_else(|| self.wrong("ffn_dim_multiplier", "the MLP would be absurdly large"))
    }
}
