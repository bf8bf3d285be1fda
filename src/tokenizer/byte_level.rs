//! GPT-2's byte-level BPE, by the Hugging Face crate. Also tiktoken's, which merges by rank.
//!
//! Special tokens are not handled here; the caller finds them in the text first. How text is cut into words: `pre.rs`.

use std::collections::HashSet;

use tokenizers::models::bpe::{BPE, Vocab as BpeVocab};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString};

use super::added::AddedTokens;
use super::pipeline::{Normalizer, Pipeline, Words, guarded};
use super::pre::{self, Named, Pre};
use super::special::{Part, TokenSet};
use super::spm::SentencePiece;
use super::vocab::{Kind, Vocab};
use crate::error::{Error, Result};

/// A byte-level BPE model, ready to encode.
#[derive(Debug)]
pub(super) struct ByteLevel {
    merging: Merging,
    /// Pieces that are cut out of the text before it is split into words.
    user_defined: TokenSet,
    bos_by_default: bool,
}

/// How the bytes of words are merged.
#[derive(Debug)]
enum Merging {
    /// In the order of a list of pairs.
    Pairs(Box<(Pipeline, BPE)>),
    /// By the rank of what results.
    Ranks(Box<(Words, SentencePiece)>),
}

impl ByteLevel {
    /// Builds the model of a vocabulary whose ordinary ids are tiktoken's ranks, with `LLaMA` 3's words.
    ///
    /// # Errors
    /// None in practice: the rule for words is a constant.
    pub fn by_rank(vocab: &Vocab) -> Result<Self> {
        let merging = Merging::Ranks(Box::new((Pre::Llama3.words()?, SentencePiece::by_rank(vocab))));
        Ok(Self { merging, user_defined: TokenSet::default(), bos_by_default: true })
    }

    /// Builds the model of a vocabulary; `pre` is the pre-tokenizer's name, `merges` are pairs, most important first.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an unknown `pre`; [`Error::BadFile`] for merges that do not fit the vocabulary.
    pub fn new(vocab: &Vocab, pre: Option<&str>, merges: &[String]) -> Result<Self> {
        let name = pre.unwrap_or("default");
        let Some(Named { pre, whole_words, bos_by_default }) = pre::named(name) else {
            return Err(Error::unsupported(format!("the pre-tokenizer `{name}` of `{}`", vocab.path().display()))
                .with_hint(format!("supported are {}", pre::names().join(", "))));
        };
        let merges = checked_merges(vocab, merges)?;
        let failed =
            |e: tokenizers::Error| Error::bad_file(vocab.path(), format!("its tokenizer cannot be built: {e}"));
        // Without the special tokens, so that no text can spell them.
        let spellings: BpeVocab = vocab
            .iter()
            .filter(|(_, text, kind)| !text.is_empty() && is_text(*kind))
            .map(|(id, text, _)| (text.to_owned(), id))
            .collect();
        let model =
            BPE::builder().vocab_and_merges(spellings, merges).ignore_merges(whole_words).build().map_err(failed)?;
        let pipeline = Pipeline { normalizer: Normalizer::default(), words: pre.words()? };
        let user_defined = vocab.iter().filter(|(id, _, kind)| *kind == Kind::UserDefined && !vocab.is_marker(*id));
        let user_defined = TokenSet::new(user_defined.map(|(id, text, _)| (id, text)));
        Ok(Self { merging: Merging::Pairs(Box::new((pipeline, model))), user_defined, bos_by_default })
    }

    /// Whether a prompt begins with BOS if the file does not say.
    pub fn bos_by_default(&self) -> bool {
        self.bos_by_default
    }

    /// Appends the ids of `text` to `ids`. Bytes that the vocabulary cannot spell are left out, as Hugging Face and
    /// llama.cpp do it (`SmolLM2` has no token for some control characters).
    ///
    /// # Errors
    /// [`Error::Input`] if the text cannot be split into words: it has about a million spaces in a row.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        for part in self.user_defined.split(text, |_| true) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => self.merging.encode(text, ids)?,
            }
        }
        Ok(())
    }
}

impl Merging {
    fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        match self {
            Self::Pairs(model) => {
                let (pipeline, model) = &**model;
                pipeline.encode(model, &AddedTokens::default(), text, ids)
            }
            Self::Ranks(model) => {
                let (words, pieces) = &**model;
                let mut split = PreTokenizedString::from(text);
                guarded(|| words.split(&mut split))?;
                for (word, ..) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
                    match pieces.whole(word) {
                        Some(id) => ids.push(id),
                        None => pieces.encode(word, false, ids),
                    }
                }
                Ok(())
            }
        }
    }
}

/// Whether tokens of this kind are spelt by ordinary text.
fn is_text(kind: Kind) -> bool {
    !matches!(kind, Kind::Control | Kind::Unknown)
}

/// Splits merges into pairs; of a pair that occurs twice, the first counts.
fn checked_merges(vocab: &Vocab, merges: &[String]) -> Result<Vec<(String, String)>> {
    let bad = |reason: String| Err(Error::bad_file(vocab.path(), reason));
    if merges.is_empty() {
        return bad("its `gpt2` tokenizer has no merges".into());
    }
    let text_id = |text: &str| vocab.id(text).filter(|&id| vocab.kind(id).is_some_and(is_text));
    let mut seen = HashSet::with_capacity(merges.len());
    let mut pairs = Vec::with_capacity(merges.len());
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let pair = merge.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty() && !b.contains(' '));
        let Some((left, right)) = pair else {
            return bad(format!("merge {rank} is `{merge}`, expected two pieces with a space between"));
        };
        joined.clear();
        joined.extend([left, right]);
        if let Some(piece) = [left, right, &joined].into_iter().find(|piece| vocab.id(piece).is_none()) {
            return bad(format!("merge {rank} is `{merge}`, but `{piece}` is no token"));
        }
        // Qwen's vocabulary has merges to `</s>`, which is control by its spelling: no text may come to it.
        let is_text = [left, right, &joined].into_iter().all(|piece| text_id(piece).is_some());
        if is_text && seen.insert((left, right)) {
            pairs.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(pairs)
}
