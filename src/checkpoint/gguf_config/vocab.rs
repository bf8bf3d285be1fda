//! What a GGUF file's metadata say of its vocabulary (`tokenizer.ggml.*`), for [`Tokenizer::from_gguf`].
//!
//! As in llama.cpp, ids of special tokens that no token has are left out with a note, and spellings are bytes. Nothing is
//! read before its length is known to fit.
//!
//! Not for: what tokens mean (see [`crate::tokenizer`]).
//!
//! [`Tokenizer::from_gguf`]: crate::tokenizer::Tokenizer::from_gguf

use std::collections::HashSet;

use super::super::gguf::{GgufFile, Value};
use crate::error::Result;
use crate::tokenizer::GgufVocab;

/// The key of the tokens' list.
pub const TOKENS: &str = "tokenizer.ggml.tokens";

/// The key of the chat template, and with a dot and a name those of further ones.
const TEMPLATE: &str = "tokenizer.chat_template";

/// Most tokens; the largest known vocabularies have 900 thousand.
const MAX_TOKENS: usize = 1 << 20;

/// Reads the vocabulary and the chat template.
///
/// # Errors
/// [`Error::BadFile`](crate::Error::BadFile) if a key is missing or has the wrong type, or a list is shorter than that of
/// the tokens.
pub fn vocab(file: &GgufFile) -> Result<GgufVocab> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let count = file.array_len(TOKENS)?;
    if count > MAX_TOKENS {
        return Err(file.error(format!("metadata `{TOKENS}` has {count} tokens, expected at most {MAX_TOKENS}")));
    }
    let mut vocab = GgufVocab {
        path: file.path().to_owned(),
        model: file.string(&key("model"))?.ok_or_else(|| file.error("metadata `tokenizer.ggml.model` is missing"))?,
        pre: file.string(&key("pre"))?.filter(|pre| !pre.is_empty()),
        add_bos: file.boolean(&key("add_bos_token"))?,
        add_eos: file.boolean(&key("add_eos_token"))?,
        add_space_prefix: file.boolean(&key("add_space_prefix"))?,
        chat_template: file.string(TEMPLATE)?,
        named_templates: named_templates(file)?,
        scores: numbers(file, &key("scores"), "a list of floats", count, score)?,
        token_types: numbers(file, &key("token_type"), "a list of integers", count, kind)?,
        ..GgufVocab::default()
    };
    read_tokens(file, &mut vocab)?;
    read_merges(file, &key("merges"), &mut vocab)?;
    let GgufVocab { bos_id, eos_id, eot_id, other_end_ids, unk_id, other_ids, notes, .. } = &mut vocab;
    let names_bos = file.metadata().contains_key(&key("bos_token_id"));
    for (slot, name) in [(bos_id, "bos"), (eos_id, "eos"), (eot_id, "eot"), (unk_id, "unknown")] {
        *slot = special_id(file, &key(&format!("{name}_token_id")), count, notes)?;
    }
    for name in ["eom", "fim_pad", "fim_rep", "fim_sep"] {
        other_end_ids.extend(special_id(file, &key(&format!("{name}_token_id")), count, notes)?);
    }
    // Only chat templates ask for these.
    for (name, spelt) in
        [("pad_token", "padding"), ("sep_token", "seperator"), ("cls_token", "cls"), ("mask_token", "mask")]
    {
        let id = special_id(file, &key(&format!("{spelt}_token_id")), count, notes)?;
        other_ids.extend(id.map(|id| (name, id)));
    }
    // A BOS that is left out cannot be wanted; those of the kind `llama` have one by its spelling, too.
    if names_bos && vocab.bos_id.is_none() && !(vocab.model == "llama" && vocab.tokens.iter().any(|text| text == "<s>"))
    {
        vocab.add_bos = Some(false);
    }
    let template = file.text(TEMPLATE)?.unwrap_or_default();
    if std::str::from_utf8(template).is_err() {
        vocab.notes.push(format!(
            "the chat template of `{}` is not UTF-8: what is not has U+FFFD in its place",
            file.path().display()
        ));
    }
    Ok(vocab)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
fn score(value: &Value) -> Option<f32> {
    match value {
        Value::Float(number) => Some(*number as f32),
        Value::Signed(number) => Some(*number as f32),
        _ => None,
    }
}

fn kind(value: &Value) -> Option<i32> {
    match value {
        Value::Signed(number) => i32::try_from(*number).ok(),
        Value::Unsigned(number) => i32::try_from(*number).ok(),
        _ => None,
    }
}

/// A list with a number for each token; what it has beyond is left out, and it may be absent.
fn numbers<T>(
    file: &GgufFile,
    key: &str,
    what: &str,
    count: usize,
    convert: fn(&Value) -> Option<T>,
) -> Result<Vec<T>> {
    let len = file.array_len(key)?;
    if len != 0 && !(count..=2 * MAX_TOKENS).contains(&len) {
        return Err(file.error(format!("metadata `{key}` must have one entry per token: expected {count}, got {len}")));
    }
    let mut numbers = file.array(key, what, convert)?;
    numbers.truncate(count);
    Ok(numbers)
}

/// Spellings. A NUL at the end is not part of one, as in llama.cpp, if what is left is a spelling that no other token has.
fn read_tokens(file: &GgufFile, vocab: &mut GgufVocab) -> Result<()> {
    let all: Vec<&[u8]> = file.texts(TOKENS)?.collect();
    let ends_in_nul = all.iter().any(|bytes| bytes.ends_with(b"\0"));
    let mut known: HashSet<&[u8]> = if ends_in_nul { all.iter().copied().collect() } else { HashSet::new() };
    let mut first_raw = None;
    for (id, bytes) in (0u32..).zip(&all) {
        let len = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        let is_cut = len > 0 && len < bytes.len() && known.insert(&bytes[..len]);
        let bytes = if is_cut { &bytes[..len] } else { *bytes };
        if let Ok(text) = std::str::from_utf8(bytes) {
            vocab.tokens.push(text.to_owned());
        } else {
            first_raw.get_or_insert(id);
            vocab.tokens.push(String::new());
            vocab.raw_tokens.insert(id, bytes.to_vec());
        }
    }
    if let Some(id) = first_raw {
        let (path, count) = (file.path().display(), vocab.raw_tokens.len());
        let which = if count == 1 {
            format!("token {id} of `{path}` is")
        } else {
            format!("{count} tokens of `{path}`, the first is {id}, are")
        };
        vocab.notes.push(format!("{which} not UTF-8: no text becomes such a token, and as output it prints its bytes"));
    }
    Ok(())
}

/// Pairs of pieces. One that is not UTF-8 would join what no text has.
fn read_merges(file: &GgufFile, key: &str, vocab: &mut GgufVocab) -> Result<()> {
    let mut left_out = 0;
    for bytes in file.texts(key)? {
        match std::str::from_utf8(bytes) {
            Ok(text) => vocab.merges.push(text.trim_end_matches('\0').to_owned()),
            Err(_) => left_out += 1,
        }
        // No more than the caller would find by itself, but before memory is taken for millions of them.
        if vocab.merges.last().is_some_and(|merge| merge.len() < 3) {
            break;
        }
    }
    if left_out > 0 {
        vocab.notes.push(format!("{left_out} merges of `{}` are not UTF-8 and left out", file.path().display()));
    }
    Ok(())
}

/// Further chat templates, by their names.
fn named_templates(file: &GgufFile) -> Result<Vec<(String, String)>> {
    let name = |key: &String| key.strip_prefix(TEMPLATE)?.strip_prefix('.').map(ToOwned::to_owned);
    let mut names: Vec<String> = file.metadata().keys().filter_map(name).collect();
    names.sort_unstable();
    let mut templates = Vec::new();
    for name in names {
        if let Some(source) = file.string(&format!("{TEMPLATE}.{name}"))? {
            templates.push((name, source));
        }
    }
    Ok(templates)
}

/// The id of a special token; `None`, with a note, if no token has it.
fn special_id(file: &GgufFile, key: &str, count: usize, notes: &mut Vec<String>) -> Result<Option<u32>> {
    let given = match file.metadata().get(key) {
        Some(Value::Signed(number)) if *number < 0 => number.to_string(),
        _ => match file.whole(key)? {
            None => return Ok(None),
            Some(id) if id < count => return Ok(u32::try_from(id).ok()),
            Some(id) => id.to_string(),
        },
    };
    let path = file.path().display();
    notes.push(format!("metadata `{key}` of `{path}` is {given}, but there are only {count} tokens: it is left out"));
    Ok(None)
}
