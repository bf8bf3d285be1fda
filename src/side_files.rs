//! Reading the small files of a model folder: bounded, and with the path in every message.
//!
//! Knows nothing of what is in them beyond JSON.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::foreign;
use crate::json::bytes_without_bom;

/// Most bytes that are read of one file; the largest known tokenizers have 35 MB.
const MAX_BYTES: u64 = 128 << 20;
/// Most bytes that the values of a JSON file may take in memory; those of the largest known tokenizers take 150 MB.
const MAX_VALUES: usize = 384 << 20;

/// Reads a whole file of at most [`MAX_BYTES`].
///
/// # Errors
/// As [`read_up_to`].
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    read_up_to(path, MAX_BYTES)
}

/// Reads a whole file of at most `most` bytes.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::BadFile`] if it is larger, or stands for another file (Git LFS pointers).
fn read_up_to(path: &Path, most: u64) -> Result<Vec<u8>> {
    let failed = |source| Error::io("read", path, source);
    let file = File::open(path).map_err(failed)?;
    // The length that the system reports is not relied upon: a pipe has none.
    let len = file.metadata().map_or(0, |metadata| metadata.len()).min(most);
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or_default() + 1);
    file.take(most + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > most {
        return Err(Error::bad_file(path, format!("it has more than {} MiB, too much for such a file", most >> 20)));
    }
    foreign::refuse(path, &bytes)?;
    Ok(bytes)
}

/// Reads a JSON file of at most [`MAX_BYTES`].
///
/// # Errors
/// As [`json_up_to`].
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    json_up_to(path, MAX_BYTES)
}

/// Reads a JSON file of at most `most` bytes.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::BadFile`] if it is larger, no regular file, or not JSON.
pub(crate) fn json_up_to(path: &Path, most: u64) -> Result<Value> {
    // Asked before the file is opened: opening a pipe would wait for its writer.
    if !path.metadata().map_err(|source| Error::io("read", path, source))?.is_file() {
        return Err(Error::bad_file(path, "it is not a regular file"));
    }
    let bytes = read_up_to(path, most)?;
    if values_bytes(&bytes) > MAX_VALUES {
        let reason = format!("its values would take more than {} MiB, too much for such a file", MAX_VALUES >> 20);
        return Err(Error::bad_file(path, reason));
    }
    serde_json::from_slice(bytes_without_bom(&bytes))
        .map_err(|error| Error::bad_file(path, format!("it is not valid JSON: {error}")))
}

/// At least as many bytes as the values of a JSON text take in memory, by what it is made of.
fn values_bytes(text: &[u8]) -> usize {
    /// Of a value in a list, and of a text's own memory beside its characters.
    const VALUE: usize = 40;
    /// Of an object: its first entries share a block.
    const OBJECT: usize = 640;
    let (mut bytes, mut in_text, mut is_escaped) = (0usize, false, false);
    for byte in text {
        match byte {
            _ if is_escaped => {
                is_escaped = false;
                bytes += 1;
            }
            b'\\' if in_text => is_escaped = true,
            b'"' => {
                in_text = !in_text;
                bytes += VALUE / 2;
            }
            _ if in_text => bytes += 1,
            b',' | b'[' | b':' => bytes += VALUE,
            b'{' => bytes += OBJECT,
            _ => {}
        }
    }
    bytes
}

/// Reads a JSON file if there is one; `None` without it.
///
/// # Errors
/// As [`read_json`].
pub(crate) fn read_json_if_any(path: &Path) -> Result<Option<Value>> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_by_what_they_are_made_of() {
        assert_eq!(values_bytes(br#"{"a\"": ["b,{", 1]}"#), 640 + 40 + 40 + 40 + 4 * 20 + 2 + 3);
    }

    /// Hostile files of 100 MB are refused before they take gigabytes; the largest real kind is not.
    #[test]
    fn a_file_of_many_small_values_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        for (part, count) in
            [("[],", 40_000_000), ("{},", 40_000_000), ("\"\",", 30_000_000), ("{\"\":0},", 12_000_000)]
        {
            std::fs::write(&path, format!("[{}0]", part.repeat(count))).unwrap();
            let error = read_json(&path).unwrap_err().to_string();
            assert!(error.contains("tokenizer.json") && error.contains("384 MiB"), "{error}");
        }
        // As many tokens and merges as Gemma 3 has.
        let merges = "[\"abcdef\",\"ghijkl\"],".repeat(515_000);
        let tokens = "\"abcdefgh\":123456,".repeat(262_000);
        assert!(values_bytes(format!("{{{tokens}}}[{merges}]").as_bytes()) < MAX_VALUES / 2);
    }
}
