//! Hugging Face's `tokenizer.json`: byte-level BPE and `SentencePiece`-like BPE, run by the `tokenizers` crate.
//!
//! The file's model, normaliser and pre-tokenizer do the work; added tokens, BOS and decoding are ours, so that contents
//! of messages cannot forge a special token. Source: the serialisation of the `tokenizers` library.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::{ModelWrapper, NormalizedString};

use super::Prefix;
use super::added::AddedTokens;
use super::bound::Losses;
use super::pipeline::{Normalizer, Pipeline, Words};
use super::settings::{Added, Flags, Settings};
use super::spelling::byte_value;
use super::vocab::{Draft, Kind, Vocab};
use crate::error::{Error, Result};
use crate::guard;
use crate::json::{Object, shown};
use crate::side_files::read_json;

/// A `tokenizer.json`, ready to encode.
#[derive(Debug)]
pub(super) struct JsonModel {
    model: ModelWrapper,
    /// For a text that begins with a space that is not in it.
    first: Pipeline,
    /// For other texts, if that makes a difference.
    rest: Option<Pipeline>,
    pub prefix: Prefix,
    /// Tokens that are found in the text before anything else.
    pub added: AddedTokens,
    /// Tokens that are found in the normalised text.
    inner: AddedTokens,
    /// Whether every byte is spelt, as far as the vocabulary has a token for it.
    spells_all: bool,
}

/// What a file says, besides its model.
#[derive(Debug)]
pub(super) struct JsonTokenizer {
    pub vocab: Vocab,
    pub model: JsonModel,
    /// The token that its post-processor puts first.
    pub leading: Option<u32>,
    /// Whether decoding drops a leading space.
    pub strips_space: bool,
}

/// Reads a `tokenizer.json`, with the tokens that `settings` add.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::BadFile`] if it is not what it should be; [`Error::Unsupported`] for
/// models other than BPE, and BPE that is neither byte-level nor `SentencePiece`-like.
pub(super) fn read(path: &Path, settings: &Settings) -> Result<JsonTokenizer> {
    build(read_json(path)?, path, settings)
}

fn build(mut file: Value, path: &Path, settings: &Settings) -> Result<JsonTokenizer> {
    let bad = |reason: String| Error::bad_file(path, reason);
    let top = Object::new(&file, path)?;
    check_kind(&file, path)?;
    let sentence_piece = is_sentence_piece(&file, path)?;
    let mut draft = draft(&file, sentence_piece, path)?;
    let mut added = Vec::new();
    for token in top.list("added_tokens")?.unwrap_or_default() {
        added.push(Added::read(token, None, path)?);
    }
    added.retain(|token| settings.is_known(token));
    let known: HashSet<(u32, &str)> = added.iter().map(|token| (token.id, token.content.as_str())).collect();
    let more = settings.added.iter().filter(|token| !known.contains(&(token.id, token.content.as_str())));
    let more: Vec<_> = more.cloned().collect();
    added.extend(more);
    settings.apply(&added, &mut draft)?;
    let fallback = file["model"]["byte_fallback"] == true;
    let unk = file["model"]["unk_token"].as_str().map(ToOwned::to_owned);
    if let Some(id) = unk.as_ref().filter(|_| sentence_piece).and_then(|unk| draft.id(unk)) {
        draft.set(id, unk.as_deref().unwrap_or_default(), Kind::Unknown)?;
    }
    let failed = |e: &dyn std::fmt::Display| bad(format!("its tokenizer cannot be built: {e}"));
    // Tokens that carry structure are looked for before anything else.
    let (inner, outer): (Vec<_>, Vec<_>) = added.iter().partition(|t| t.normalized && !draft.is_marker(t.id));
    let pipeline = |file: &Value| -> Result<Pipeline> {
        let normalizer = Normalizer::read(&file["normalizer"]).map_err(|e| failed(&e))?;
        Ok(Pipeline { normalizer, words: Words::read(&file["pre_tokenizer"]).map_err(|e| failed(&e))? })
    };
    let first = pipeline(&file)?;
    let mut normalized = Vec::with_capacity(inner.len());
    for token in &inner {
        let mut text = NormalizedString::from(token.content.as_str());
        let result = guard::catch(|| first.normalizer.normalize(&mut text)).map_err(|e| failed(&e))?;
        result.map_err(|e| failed(&e))?;
        if sentence_piece && text.get() != token.content {
            draft.prints(token.id, text.get().to_owned());
        }
        normalized.push((token.id, text.get().to_owned(), token.flags));
    }
    let inner_tokens = AddedTokens::new(normalized.iter().map(|(id, text, flags)| (*id, text.as_str(), *flags)));
    let vocab = Vocab::new(draft)?;
    let leading = leading(&file["post_processor"], &vocab)?;
    let strips_space = strips_space(&file["decoder"]);
    let prefix = prefix(&file);

    let flags: HashMap<u32, Flags> = outer.iter().map(|token| (token.id, token.flags)).collect();
    let found = vocab.iter().filter(|(id, ..)| flags.contains_key(id) || vocab.is_marker(*id));
    let outer = AddedTokens::new(found.map(|(id, text, _)| (id, text, flags.get(&id).copied().unwrap_or_default())));
    let rest = (prefix != Prefix::Never).then(|| {
        let mut parts = json!({"normalizer": file["normalizer"], "pre_tokenizer": file["pre_tokenizer"]});
        drop_prefix(&mut parts);
        pipeline(&parts)
    });
    let rest = rest.transpose()?;
    strip_model(&mut file["model"], &vocab, unk.as_deref())?;
    let model = guard::catch(|| serde_json::from_value::<ModelWrapper>(file["model"].take()));
    let model = model.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
    let byte_fallback = || fallback && (0..=u8::MAX).all(|byte| vocab.id(&format!("<0x{byte:02X}>")).is_some());
    let spells_all = if sentence_piece { byte_fallback() } else { first.spells_bytes() };
    let model = JsonModel { model, first, rest, prefix, added: outer, inner: inner_tokens, spells_all };
    Ok(JsonTokenizer { vocab, model, leading, strips_space })
}

impl JsonModel {
    /// What may become of a text's bytes.
    pub fn losses(&self) -> Losses {
        Losses {
            shrinks: self.first.shrinks(),
            spaces: self.added.take_spaces() || self.inner.take_spaces(),
            unknown: !self.spells_all,
        }
    }

    /// Appends the ids of `text` to `ids`; `prefix` puts the file's prefix before it.
    ///
    /// # Errors
    /// [`Error::Input`] if the text cannot be split into words.
    pub fn encode(&self, text: &str, prefix: bool, ids: &mut Vec<u32>) -> Result<()> {
        let pipeline = self.rest.as_ref().filter(|_| !prefix).unwrap_or(&self.first);
        pipeline.encode(&self.model, &self.inner, text, ids)
    }
}

/// Refuses models that are not BPE, and normalisers with a compiled table.
fn check_kind(file: &Value, path: &Path) -> Result<()> {
    let refuse = |what: &str| {
        let error = Error::unsupported(format!("the {what} of `{}`", path.display()));
        Err(error.with_hint("supported is BPE: byte-level, or with byte fallback as SentencePiece has it"))
    };
    let Some(model) = file.get("model").and_then(Value::as_object) else {
        return Err(Error::bad_file(path, "it has no `model`"));
    };
    match model.get("type").and_then(Value::as_str) {
        Some("BPE") => {}
        Some(other) => return refuse(&format!("tokenizer model `{other}`")),
        None if model.contains_key("merges") => {}
        None => return Err(Error::bad_file(path, "its `model` has no `type`")),
    }
    if any(&file["normalizer"], &|part| is(part, "Precompiled")) {
        return refuse("normaliser `Precompiled`");
    }
    Ok(())
}

/// Whether a part of a pipeline is of a type.
fn is(part: &Map<String, Value>, kind: &str) -> bool {
    part.get("type").and_then(Value::as_str) == Some(kind)
}

/// Whether a part of a pipeline, or of a sequence in it, is `wanted`.
fn any(part: &Value, wanted: &impl Fn(&Map<String, Value>) -> bool) -> bool {
    match part {
        Value::Array(parts) => parts.iter().any(|part| any(part, wanted)),
        Value::Object(map) => {
            let lists = ["normalizers", "pretokenizers", "decoders", "processors"];
            wanted(map) || lists.iter().filter_map(|list| map.get(*list)).any(|list| any(list, wanted))
        }
        _ => false,
    }
}

/// Whether spellings are `SentencePiece`'s; else they are byte-level ones.
fn is_sentence_piece(file: &Value, path: &Path) -> Result<bool> {
    let pipeline = Value::Array(["normalizer", "pre_tokenizer", "decoder"].map(|key| file[key].clone()).into());
    if any(&pipeline, &|part| is(part, "ByteLevel")) {
        return Ok(false);
    }
    if file["model"]["byte_fallback"] == true || any(&pipeline, &|part| is(part, "Metaspace")) {
        return Ok(true);
    }
    Err(Error::unsupported(format!(
        "the tokenizer of `{}`, BPE without byte-level spelling or byte fallback,",
        path.display()
    )))
}

/// The model's tokens; added ones may be among them.
fn draft(file: &Value, sentence_piece: bool, path: &Path) -> Result<Draft> {
    let bad = |reason: String| Error::bad_file(path, reason);
    let Some(vocab) = file["model"]["vocab"].as_object() else {
        return Err(bad("its `model.vocab` is not an object from tokens to ids".into()));
    };
    let mut tokens: Vec<(u32, &str)> = Vec::with_capacity(vocab.len());
    for (text, id) in vocab {
        let Some(id) = id.as_u64().and_then(|id| u32::try_from(id).ok()) else {
            return Err(bad(format!("the id of `{text}` is {}, expected a whole number", shown(id))));
        };
        tokens.push((id, text));
    }
    tokens.sort_unstable();
    let fallback = sentence_piece && file["model"]["byte_fallback"] == true;
    let mut draft = Draft::new(path, sentence_piece);
    for (id, text) in tokens {
        if let Some(there) = draft.text(id) {
            return Err(bad(format!("token {id} is both `{there}` and `{text}`")));
        }
        let kind = if fallback && byte_value(text).is_some() { Kind::Byte } else { Kind::Normal };
        draft.set(id, text, kind)?;
    }
    Ok(draft)
}

/// The token that a post-processor puts before a text.
fn leading(processor: &Value, vocab: &Vocab) -> Result<Option<u32>> {
    let mut leading = Vec::new();
    let mut visit = |part: &Map<String, Value>| {
        if !is(part, "TemplateProcessing") {
            return;
        }
        let single = part.get("single").and_then(Value::as_array).into_iter().flatten();
        leading.extend(single.map_while(|step| step["SpecialToken"]["id"].as_str()).map(ToOwned::to_owned));
    };
    match processor["processors"].as_array() {
        Some(list) => list.iter().filter_map(Value::as_object).for_each(&mut visit),
        None => _ = processor.as_object().map(&mut visit),
    }
    match &leading[..] {
        [] => Ok(None),
        [bos] => vocab.id(bos).map(Some).ok_or_else(|| {
            Error::bad_file(vocab.path(), format!("its post-processor puts `{bos}` first, which is not a token"))
        }),
        more => Err(Error::unsupported(format!(
            "the post-processor of `{}`, which puts {} tokens first,",
            vocab.path().display(),
            more.len()
        ))),
    }
}

/// Whether decoding drops a leading space.
fn strips_space(decoder: &Value) -> bool {
    any(decoder, &|part| {
        let strip = is(part, "Strip")
            && part.get("content").and_then(Value::as_str) == Some(" ")
            && part.get("start").and_then(Value::as_u64).is_some_and(|n| n > 0);
        strip || (is(part, "Metaspace") && metaspace_prefix(part) != Prefix::Never)
    })
}

fn metaspace_prefix(part: &Map<String, Value>) -> Prefix {
    match part.get("prepend_scheme").and_then(Value::as_str) {
        Some("never") => Prefix::Never,
        Some("first") => Prefix::First,
        None if part.get("add_prefix_space") == Some(&Value::Bool(false)) => Prefix::Never,
        _ => Prefix::Always,
    }
}

/// Which texts get a prefix from the normaliser or the pre-tokenizer.
fn prefix(file: &Value) -> Prefix {
    let pipeline = Value::Array(["normalizer", "pre_tokenizer"].map(|key| file[key].clone()).into());
    let scheme = |wanted: Prefix| {
        any(&pipeline, &|part| {
            let has = match part.get("type").and_then(Value::as_str) {
                Some("Prepend") => Prefix::Always,
                Some("Metaspace") => metaspace_prefix(part),
                Some("ByteLevel") if part.get("add_prefix_space") != Some(&Value::Bool(false)) => Prefix::Always,
                _ => Prefix::Never,
            };
            has == wanted
        })
    };
    match (scheme(Prefix::Always), scheme(Prefix::First)) {
        (true, _) => Prefix::Always,
        (false, true) => Prefix::First,
        (false, false) => Prefix::Never,
    }
}

/// Takes the prefixes out of a pipeline.
fn drop_prefix(part: &mut Value) {
    match part {
        Value::Array(parts) => {
            parts.retain(|part| part["type"] != "Prepend");
            parts.iter_mut().for_each(drop_prefix);
        }
        Value::Object(map) => match map.get("type").and_then(Value::as_str) {
            Some("Prepend") => *part = Value::Null,
            Some("Metaspace") => {
                map.insert("prepend_scheme".into(), "never".into());
                map.insert("add_prefix_space".into(), false.into());
            }
            Some("ByteLevel") => _ = map.insert("add_prefix_space".into(), false.into()),
            _ => map.values_mut().for_each(drop_prefix),
        },
        _ => {}
    }
}

/// Leaves of a model what the crate has to do: no special token can be spelt any more, and equal texts have equal ids.
fn strip_model(model: &mut Value, vocab: &Vocab, unk: Option<&str>) -> Result<()> {
    let merged = merged_markers(&model["merges"], vocab);
    let Some(model) = model.as_object_mut() else { return Ok(()) };
    // Without its type the crate would try one kind of model after the other.
    model.insert("type".into(), "BPE".into());
    model.insert("dropout".into(), Value::Null);
    let Some(tokens) = model.get_mut("vocab").and_then(Value::as_object_mut) else { return Ok(()) };
    tokens.retain(|text, _| {
        let special = vocab.id(text).is_some_and(|id| vocab.is_marker(id));
        !special || Some(text.as_str()) == unk || merged.contains(text)
    });
    if let Some(unk) = unk.filter(|unk| !tokens.contains_key(*unk)) {
        return Err(Error::bad_file(vocab.path(), format!("its `unk_token` is `{unk}`, which is not a token")));
    }
    Ok(())
}

/// The special tokens that merges make or need.
fn merged_markers(merges: &Value, vocab: &Vocab) -> HashSet<String> {
    let markers: HashSet<&str> =
        vocab.iter().filter(|(id, ..)| vocab.is_marker(*id)).map(|(_, text, _)| text).collect();
    let mut found = HashSet::new();
    let mut joined = String::new();
    for merge in merges.as_array().into_iter().flatten() {
        let pair = match merge {
            Value::String(pair) => pair.split_once(' '),
            Value::Array(pair) => pair.first().and_then(Value::as_str).zip(pair.get(1).and_then(Value::as_str)),
            _ => None,
        };
        let Some((left, right)) = pair else { continue };
        joined.clear();
        joined.extend([left, right]);
        for text in [left, right, &joined] {
            if markers.contains(text) {
                found.insert(text.to_owned());
            }
        }
    }
    found
}
