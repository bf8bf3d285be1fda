//! What a file is that is not what it was taken for, told by its first bytes, so that a message can say it by name.
//!
//! Two uses: [`refuse`] for files that stand for another file, whatever was expected, and [`unlike`] once a reader has seen
//! that a file does not begin as its format does. Nothing here reads a format. Sources of the first bytes: the Git LFS
//! specification (<https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>), llama.cpp's history for the formats before
//! GGUF, and `file`'s list of magic numbers.

use std::path::Path;

use crate::error::{Error, Result};

/// How a Git LFS pointer begins.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";
/// Bytes that are looked at.
const LOOKED_AT: usize = 4096;
/// Characters of a text that a message shows.
const SHOWN: usize = 40;

/// The name of the first member of PyTorch's checkpoints, behind the archive's folder.
const PYTORCH_MEMBER: &[u8] = b"/data.pkl";

const AGAIN: &str = "fetch it again";
const UNPACK: &str = "unpack it, and give what it holds";
const CONVERT: &str =
    "convert the original model anew with llama.cpp's `convert_hf_to_gguf.py`, or take it in GGUF format";
const GGUF: &str = "give a model in GGUF format the ending .gguf, and give the path of that file";
const SAFETENSORS: &str = "give it the ending .safetensors, beside the model's config.json";
const PYTORCH: &str = "take the model in safetensors or GGUF format; of Meta's own files, give the folder";
const OTHER: &str = "take the model in safetensors or GGUF format";

/// What files begin with, where that is the same in all of them: the bytes, what it is, what to do.
const MAGICS: [(&[u8], &str, &str); 21] = [
    (b"lmgg", "a model in llama.cpp's first format, GGML", CONVERT),
    (b"fmgg", "a model in llama.cpp's old format GGMF", CONVERT),
    (b"tjgg", "a model in llama.cpp's old format GGJT", CONVERT),
    (b"algg", "an adapter (LoRA) in llama.cpp's old format GGLA", "merge it into its base model, and convert that"),
    (b"GGUF", "a file in GGUF format", GGUF),
    (b"AKVCACHE", "a cache that this program has saved", "give it with --cache, beside the model that it is of"),
    (b"PK\x03\x04", "a ZIP archive", UNPACK),
    (b"PK\x05\x06", "an empty ZIP archive", AGAIN),
    (b"\x1f\x8b", "compressed with gzip", UNPACK),
    (b"BZh", "compressed with bzip2", UNPACK),
    (b"\xfd7zXZ\0", "compressed with xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as TensorFlow's and Keras' weights are", OTHER),
    (b"\x93NUMPY", "a NumPy array", OTHER),
    (b"%PDF", "a PDF document", AGAIN),
    (b"\x89PNG", "a picture", AGAIN),
    (b"\x7fELF", "a program", AGAIN),
    (b"MZ", "a program", AGAIN),
    (b"\x80\x02", "a pickle of Python", PYTORCH),
];

/// Refuses what stands for another file, whatever is expected: Git LFS pointers and pages of the web.
///
/// # Errors
/// [`Error::BadFile`], by name, with what to do.
pub(crate) fn refuse(path: &Path, bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(LFS_POINTER) {
        let reason = "it is a Git LFS pointer, a few lines that stand for the file itself";
        return Err(Error::bad_file(path, reason)
            .with_hint("run `git lfs pull` in its folder, or download the file from the model's page"));
    }
    if is_html(bytes) {
        let reason = "it is an HTML page, as a browser shows it, and not the file itself";
        return Err(Error::bad_file(path, reason).with_hint(
            "download the file itself: on a Hugging Face hub the address has `resolve` where the page has `blob`",
        ));
    }
    Ok(())
}

/// Says what a file is whose reader has seen that it does not begin as its format does.
///
/// * `expected`: what it should have been, as `"a model in GGUF format"`
/// * `hint`: what to do if nobody knows what it is
pub(crate) fn unlike(path: &Path, bytes: &[u8], expected: &str, hint: &str) -> Error {
    known(path, bytes, expected, hint).unwrap_or_else(|| {
        Error::bad_file(path, format!("it does not begin as {expected} does")).with_hint(format!("{AGAIN}; {hint}"))
    })
}

/// As [`unlike`], if its first bytes are known.
pub(crate) fn known(path: &Path, bytes: &[u8], expected: &str, hint: &str) -> Option<Error> {
    if let Err(error) = refuse(path, bytes) {
        return Some(error);
    }
    let error = |what: &str, remedy: &str| {
        // What it should be is only damaged, which its reader can say better.
        (what != expected).then(|| Error::bad_file(path, format!("it is {what}, not {expected}")).with_hint(remedy))
    };
    let again = format!("{AGAIN}; {hint}");
    let start = &bytes[..bytes.len().min(LOOKED_AT)];
    if start.is_empty() {
        return error("empty", &again);
    }
    if start.len() >= 16 && start.iter().all(|&byte| byte == 0) {
        return error("nothing but zeros at its beginning, as a download that was not completed leaves it", &again);
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx")) {
        return error("a model in ONNX format", OTHER);
    }
    if path.file_name().is_some_and(|name| name.to_string_lossy().to_ascii_lowercase().contains("imatrix")) {
        return error("an importance matrix, by its name", "it only serves to quantise a model: give the model");
    }
    let is_pytorch =
        start.starts_with(b"PK") && start.windows(PYTORCH_MEMBER.len()).any(|bytes| bytes == PYTORCH_MEMBER);
    if is_pytorch {
        return error("a checkpoint of PyTorch", PYTORCH);
    }
    if let Some((_, what, remedy)) = MAGICS.iter().find(|(magic, ..)| start.starts_with(magic)) {
        return error(what, remedy);
    }
    if start.get(257..262) == Some(b"ustar") {
        return error("a tar archive", UNPACK);
    }
    if start.get(4..8) == Some(b"TFL3") {
        return error("a model of TensorFlow Lite", OTHER);
    }
    if is_safetensors(bytes) {
        return error("a safetensors file", SAFETENSORS);
    }
    text(start).and_then(|text| error(&format!("a text that begins with `{text}`"), &again))
}

/// Whether it is a page of the web: errors and logins are, which are saved under the name of what was asked for.
fn is_html(bytes: &[u8]) -> bool {
    let bytes = &bytes[..bytes.len().min(LOOKED_AT)];
    let start = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start();
    let begins = |tag: &[u8]| start.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag));
    begins(b"<!doctype html") || begins(b"<html") || begins(b"<head")
}

/// Whether it begins with a header's length and a header of JSON.
fn is_safetensors(bytes: &[u8]) -> bool {
    let Some((len, rest)) = bytes.split_first_chunk::<8>() else { return false };
    u64::from_le_bytes(*len) < bytes.len() as u64 && rest.starts_with(b"{\"")
}

/// How a text begins, if it is one.
fn text(start: &[u8]) -> Option<String> {
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        // A character may be cut where the bytes that are looked at end.
        Err(error) if error.error_len().is_none() => std::str::from_utf8(&start[..error.valid_up_to()]).ok()?,
        Err(_) => return None,
    };
    let is_text = !text.trim().is_empty() && text.chars().all(|c| !c.is_control() || matches!(c, '\n' | '\r' | '\t'));
    let line = text.trim().lines().next().unwrap_or_default();
    is_text.then(|| line.chars().take(SHOWN).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(bytes: &[u8]) -> (String, String) {
        let error = unlike(Path::new("x.gguf"), bytes, "a model in GGUF format", "give a GGUF file");
        (error.to_string(), error.hint().unwrap_or_default().to_owned())
    }

    #[test]
    fn files_are_called_by_their_names() {
        let header = br#"{"a":{}}"#;
        let safetensors = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 8]].concat();
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
        for (bytes, name, remedy) in [
            (&b""[..], "it is empty", "again"),
            (&[0; 64], "zeros", "again"),
            (pointer, "Git LFS pointer", "git lfs pull"),
            (b"\n <!DOCTYPE html><title>Sign in</title>", "HTML page", "resolve"),
            (b"\xef\xbb\xbf<HTML>", "HTML page", "resolve"),
            (b"tjgg\x03\0\0\0", "GGJT", "convert_hf_to_gguf"),
            (b"lmgg\0\0", "GGML", "convert_hf_to_gguf"),
            (b"PK\x03\x04....", "ZIP", "unpack"),
            (&safetensors, "a safetensors file", ".safetensors"),
            (b"Entry not found", "a text that begins with `Entry not found`", "again"),
            (b"\x01\x02\x03\xff", "does not begin as a model in GGUF format", "GGUF"),
        ] {
            let (sentence, hint) = said(bytes);
            assert!(sentence.contains("x.gguf") && sentence.contains(name), "{sentence}");
            assert!(hint.contains(remedy), "{name}: {hint}");
        }
    }

    #[test]
    fn only_what_stands_for_another_file_is_refused_at_once() {
        for bytes in [&b""[..], b"{}", b"<s>", b"version 1", b"GGUF"] {
            assert!(refuse(Path::new("x"), bytes).is_ok());
        }
    }
}
