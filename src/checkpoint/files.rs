//! Files of a checkpoint: small JSON files, what a folder holds. Not for: what is in them.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::side_files::json_up_to;

/// Longest JSON file that is read; the indices of the largest models take about 100 KB.
const MAX_JSON_BYTES: u64 = 4 << 20;

/// Reads a JSON file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::BadFile`] if it is not JSON, or absurdly long.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    json_up_to(path, MAX_JSON_BYTES)
}

/// The regular files of a folder whose names end in `suffix`, sorted.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be read.
pub(super) fn with_suffix(folder: &Path, suffix: &str) -> Result<Vec<PathBuf>> {
    let read_error = |source| Error::io("read", folder, source);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read_error)? {
        let path = entry.map_err(read_error)?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(suffix)) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
