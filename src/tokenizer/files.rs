//! Reading the small files of a model folder: bounded, and with the path in every message.
//!
//! Knows nothing of what is in them beyond JSON.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::json::bytes_without_bom;

/// Most bytes that are read of one file; the largest known tokenizers have 35 MB.
const MAX_BYTES: u64 = 256 << 20;

/// Reads a whole file of at most [`MAX_BYTES`].
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::BadFile`] if it is larger.
pub(super) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let failed = |source| Error::io("read", path, source);
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    // The length that the system reports is not relied upon: a pipe has none.
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::bad_file(
            path,
            format!("it has more than {} MiB, too much for such a file", MAX_BYTES >> 20),
        ));
    }
    Ok(bytes)
}

/// Reads a JSON file.
///
/// # Errors
/// As [`read_bounded`]; [`Error::BadFile`] also if it is not JSON.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let bytes = read_bounded(path)?;
    serde_json::from_slice(bytes_without_bom(&bytes))
        .map_err(|e| Error::bad_file(path, format!("it is not valid JSON: {e}")))
}

/// Reads a JSON file if there is one; `None` without it.
///
/// # Errors
/// As [`read_json`].
pub(super) fn read_json_if_any(path: &Path) -> Result<Option<Value>> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}
