//! One measured case, and the file of them.

use std::path::Path;

use serde::Serialize;

use super::times::Spread;
use crate::error::Result;

/// What was timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    /// Reading a prompt, profiling included.
    Prefill,
    /// One new token after a prompt.
    Decode,
}

impl Work {
    /// The name in tables and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// One case. Times are in milliseconds, per prompt for prefill and per token for decoding.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub work: Work,
    /// Tokens of an earlier turn that the cache held before the prompt.
    pub past: usize,
    /// Tokens of the prompt.
    pub context: usize,
    pub threads: usize,
    /// `full`, or the configuration as the user named it.
    pub setting: String,
    pub kv_dtype: &'static str,
    /// From the median time, in tokens.
    pub tokens_per_s: f64,
    #[serde(flatten)]
    pub times: Spread,
    /// Timed runs, warm-up left out; each decodes several tokens.
    pub runs: usize,
    /// Kept share of all keys and values, those of the earlier turn too, in 0..=1.
    pub kept_ratio: f64,
    /// Bytes of the keys and values that are kept of both.
    pub kv_bytes: usize,
    /// The most that was resident during the case, less caches that only waited: those of other cases, and the one that
    /// runs were forked from. 0 where the system does not tell. Where it can't be reset (anything but Linux) it is the
    /// process's peak so far.
    pub peak_rss_bytes: usize,
    #[serde(flatten)]
    pub reading: Option<Reading>,
}

/// What a decoded token must read, against what memory gives.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Reading {
    /// Weights, and kept keys and values, on average over the run's tokens.
    pub bytes_per_token: usize,
    /// At the median time, in 1e9 bytes a second.
    pub read_gb_per_s: f64,
    /// What a plain loop reads on the same number of threads, in 1e9 bytes a second.
    pub loop_gb_per_s: f64,
    /// The former as a share of the latter.
    pub bandwidth_share: f64,
}

impl Reading {
    /// * `median_ms`: for one token
    #[expect(clippy::cast_precision_loss)]
    pub(super) fn new(bytes_per_token: usize, median_ms: f64, loop_gb_per_s: f64) -> Self {
        let read_gb_per_s = bytes_per_token as f64 / (median_ms * 1e6);
        Self { bytes_per_token, read_gb_per_s, loop_gb_per_s, bandwidth_share: read_gb_per_s / loop_gb_per_s }
    }
}

/// Writes rows as one JSON array, in the place of what the file held.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) if the file cannot be written; it is then as it was.
pub fn write_rows(path: &Path, rows: &[Row]) -> Result<()> {
    crate::report::write_json(rows, path)
}
