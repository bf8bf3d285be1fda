//! `LLaMA` 3's own `tokenizer.model`: one line per token, its bytes in base64 and its rank.
//!
//! Only the file's format and the special tokens that are not in it; merging by rank is done in `spm.rs`, splitting
//! into words in `byte_level.rs`. Source: `OpenAI`'s tiktoken (the format) and Meta's llama-models (the special tokens).

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::spelling::spelling;
use super::vocab::{Draft, Kind};
use crate::error::{Error, Result};

/// Number of special tokens behind the ranks.
const SPECIAL_TOKENS: usize = 256;

/// The named ones among the special tokens, as of `LLaMA` 3.1; the rest is reserved.
#[rustfmt::skip]
const NAMED: [&str; 11] = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>",
];

/// Spelling of the token that begins a text.
pub(super) const BEGIN_OF_TEXT: &str = NAMED[0];
/// Spelling of the token that ends one.
pub(super) const END_OF_TEXT: &str = NAMED[1];

/// Most bytes of a token; the longest of `LLaMA` 3 has 128.
const MAX_TOKEN_BYTES: usize = 4096;
/// Most tokens; the largest known have 200 thousand. Ranks are compared as `f32`, which is exact below 2^24.
const MAX_RANKS: usize = 1 << 20;

/// Whether a file looks like this format: its first line is made of base64, a space and a number.
pub(super) fn is_tiktoken(bytes: &[u8]) -> bool {
    let line = bytes.split(|&b| b == b'\n').next().unwrap_or_default();
    // A long first line is some other file.
    line.len() < 2 * MAX_TOKEN_BYTES && parse_line(line).is_ok_and(|entry| entry.is_some())
}

/// Reads the tokens, in the byte-level alphabet, with the special ones behind them.
///
/// # Errors
/// [`Error::BadFile`] if a line is not of the form, ranks are not 0, 1, 2, ..., two tokens are equal or a byte has no
/// token.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Draft> {
    let bad = |line: usize, reason: String| Error::bad_file(path, format!("line {}: {reason}", line + 1));
    let mut tokens: Vec<Option<String>> = Vec::new();
    let mut has_byte = [false; 256];
    let lines = bytes.split(|&b| b == b'\n').count();
    for (number, line) in bytes.split(|&b| b == b'\n').enumerate() {
        let Some((token, rank)) = parse_line(line).map_err(|reason| bad(number, reason))? else { continue };
        if rank >= lines.min(MAX_RANKS) {
            return Err(bad(
                number,
                format!("rank {rank} is not below {}, the number of lines at most", lines.min(MAX_RANKS)),
            ));
        }
        if let [byte] = token[..] {
            has_byte[usize::from(byte)] = true;
        }
        if tokens.len() <= rank {
            tokens.resize(rank + 1, None);
        }
        if tokens[rank].replace(spelling(&token)).is_some() {
            return Err(bad(number, format!("rank {rank} occurs twice")));
        }
    }
    if let Some(byte) = has_byte.iter().position(|has| !has) {
        return Err(Error::bad_file(path, format!("it has no token for the byte 0x{byte:02X}")));
    }
    if let Some(rank) = tokens.iter().position(Option::is_none) {
        return Err(Error::bad_file(path, format!("it has no token of rank {rank}")));
    }
    let mut draft = Draft::new(path, false);
    for token in tokens.into_iter().flatten() {
        draft.push(token, Kind::Normal);
    }
    for special in special_tokens() {
        draft.push(special, Kind::Control);
    }
    Ok(draft)
}

fn special_tokens() -> impl Iterator<Item = String> {
    let reserved = (2..).map(|n| format!("<|reserved_special_token_{n}|>"));
    NAMED.into_iter().map(String::from).chain(reserved).take(SPECIAL_TOKENS)
}

/// Token and rank of a line; `None` for an empty one.
fn parse_line(line: &[u8]) -> Result<Option<(Vec<u8>, usize)>, String> {
    let line = line.trim_ascii();
    if line.is_empty() {
        return Ok(None);
    }
    let expected = || "expected a token in base64, a space and its rank".to_owned();
    let space = line.iter().position(|&b| b == b' ').ok_or_else(expected)?;
    let (token, rank) = (&line[..space], line[space..].trim_ascii());
    let rank = std::str::from_utf8(rank).ok().and_then(|rank| rank.parse().ok()).ok_or_else(expected)?;
    if token.len() > MAX_TOKEN_BYTES {
        return Err(format!("the token has {} characters, expected at most {MAX_TOKEN_BYTES}", token.len()));
    }
    match STANDARD.decode(token) {
        Ok(bytes) if !bytes.is_empty() => Ok(Some((bytes, rank))),
        _ => Err(format!("`{}` is not base64", String::from_utf8_lossy(token))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All bytes, in order, and the tokens given.
    fn file(more: &[&str]) -> String {
        let tokens = (0..=255u8).map(|b| vec![b]).chain(more.iter().map(|t| t.as_bytes().to_vec()));
        let lines = tokens.enumerate().map(|(rank, token)| format!("{} {rank}\n", STANDARD.encode(&token)));
        lines.collect::<Vec<_>>().concat()
    }

    fn reason(content: &str) -> String {
        match parse(content.as_bytes(), Path::new("x.model")) {
            Err(Error::BadFile { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ranks_come_first_and_256_special_tokens_behind() {
        let draft = parse(file(&["ab", " the"]).as_bytes(), Path::new("x.model")).unwrap();
        assert_eq!(draft.len(), 258 + 256);
        assert_eq!((draft.id("ab"), draft.id("Ġthe")), (Some(256), Some(257)));
        assert_eq!((draft.id(BEGIN_OF_TEXT), draft.id("<|eot_id|>")), (Some(258), Some(258 + 9)));
        assert_eq!(draft.id("<|reserved_special_token_246|>"), Some(258 + 255));
    }

    #[test]
    fn base64_is_decoded_or_refused() {
        for (text, bytes) in
            [("Zg==", &b"f"[..]), ("Zm8=", b"fo"), ("Zm9v", b"foo"), ("Zm9vYmFy", b"foobar"), ("+/+/", b"\xfb\xff\xbf")]
        {
            assert_eq!(parse_line(format!("{text} 7").as_bytes()).unwrap().unwrap(), (bytes.to_vec(), 7));
        }
        for bad in ["", "Zg", "Zg=", "Z===", "====", "Zg==Zg==", "Z!==", "Zh==", "Z_=="] {
            assert!(parse_line(format!("{bad} 7").as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn other_files_are_told_apart() {
        assert!(is_tiktoken(file(&[]).as_bytes()));
        for other in ["", "\n", "hello world", "{\"a\": 1}", "IQ==", "IQ== x", "\n\u{e}\n\u{5}<unk>"] {
            assert!(!is_tiktoken(other.as_bytes()), "{other:?}");
        }
    }

    #[test]
    fn bad_lines_are_named() {
        let good = file(&["ab"]);
        assert_eq!(reason(""), "it has no token for the byte 0x00");
        assert_eq!(reason(&good.replacen("AA==", "A*==", 1)), "line 1: `A*==` is not base64");
        assert_eq!(reason(&good.replacen(" 1\n", " 0\n", 1)), "line 2: rank 0 occurs twice");
        assert!(reason(&good.replacen(" 1\n", " 4000000000\n", 1)).starts_with("line 2: rank 4000000000"));
        assert!(reason(&good.replacen(" 1\n", "\n", 1)).starts_with("line 2: expected"));
        assert!(reason(&good.replacen("AQ== 1\n", "", 1)).contains("0x01"));
        assert_eq!(reason(&good.replacen(" 256\n", " 257\n\n\n", 1)), "it has no token of rank 256");
    }
}
