//! Opening of checkpoint files: mapped weights, small JSON files, what a folder holds. Not for: what is in them.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::mapped::MappedFile;
use crate::error::{Error, Result};
use crate::foreign;
use crate::side_files::json_up_to;

/// Longest JSON file that is read; the indices of the largest models take about 100 KB.
const MAX_JSON_BYTES: u64 = 4 << 20;

/// Maps a regular file.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened; [`Error::Unsupported`], with `hint`, if it is a folder or no regular file;
/// [`Error::BadFile`] if it is a Git LFS pointer or a page of the web.
pub(super) fn map_file(path: &Path, hint: &str) -> Result<MappedFile> {
    // Asked before the file is opened: opening a pipe would wait for its writer.
    let metadata = std::fs::metadata(path).map_err(|source| Error::io("open", path, source).with_hint(hint))?;
    if !metadata.is_file() {
        let kind = if metadata.is_dir() { "a folder" } else { "what is not a regular file" };
        return Err(Error::unsupported(format!("loading {kind} (`{}`)", path.display())).with_hint(hint));
    }
    let file = std::fs::File::open(path).map_err(|source| Error::io("open", path, source))?;
    let mapped = MappedFile::new(&file, path).map_err(|source| Error::io("map", path, source))?;
    foreign::refuse(path, &mapped)?;
    Ok(mapped)
}

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
