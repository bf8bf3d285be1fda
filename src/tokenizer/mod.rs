//! Text to token ids and back, from the tokenizer that a model file brings along.
//!
//! Two kinds: byte-level BPE (GPT-2's, tiktoken's) and `SentencePiece`'s BPE. Here is what they have in common: special
//! tokens, BOS, classes of tokens. GGUF files are read elsewhere, see [`GgufVocab`] for what their reader hands over;
//! the tokenizers of model folders are read here ([`Tokenizer::from_folder`]).
//!
//! The rules are llama.cpp's where its models set them (special tokens in a prompt, defaults), and those of
//! `SentencePiece`, tiktoken and Hugging Face's `tokenizers` for the ids of ordinary text.

mod added;
mod bound;
mod byte_level;
mod chat;
mod classes;
mod ends;
mod fingerprint;
mod folder;
mod json;
mod marked;
mod messages;
mod pipeline;
mod pre;
mod repeat;
mod sentencepiece;
mod settings;
mod special;
mod spelling;
mod spm;
mod stream;
mod template;
mod templates;
mod tiktoken;
mod vocab;

use std::collections::HashSet;

use self::bound::{Bound, Losses};
use self::byte_level::ByteLevel;
use self::ends::Known;
use self::json::JsonModel;
use self::special::{Occurrence, Part, TokenSet};
use self::spm::SentencePiece;
use self::template::Templates;
use self::vocab::{Draft, Kind, Vocab};
use crate::error::{Error, Result};

pub use self::chat::Chat;
pub use self::folder::ModelIds;
pub use self::messages::{ChatContext, ChatInput, ChatMessage, messages_from_json};
pub use self::sentencepiece::read_sentencepiece;
pub use self::stream::StreamDecoder;
pub use self::template::ChatTemplate;
pub use self::templates::ChatFormat;
pub use self::vocab::GgufVocab;

/// A model's tokenizer.
///
/// * [`Tokenizer::encode`] takes a raw prompt, in which special tokens may be spelt out;
/// * [`Tokenizer::encode_chat`] takes messages, whose contents are never anything but text;
/// * [`Tokenizer::decode`] and [`Tokenizer::stream`] make text of ids.
pub struct Tokenizer {
    vocab: Vocab,
    model: Model,
    /// Tokens that carry structure: see [`Vocab::is_marker`].
    markers: TokenSet,
    /// Tokens that are found in a prompt before anything else.
    special: TokenSet,
    special_ids: Vec<u32>,
    eos_ids: Vec<u32>,
    bos_id: Option<u32>,
    /// What a prompt begins with.
    leading_bos: Option<u32>,
    /// Whether decoding drops a leading space.
    strips_space: bool,
    templates: Templates,
    /// What chat templates call the special tokens, and their spellings.
    named_tokens: Vec<(String, String)>,
    notes: Vec<String>,
    bound: Bound,
    /// What [`Tokenizer::limit`] was told.
    most_tokens: Option<usize>,
}

/// What a tokenizer is made of.
struct Parts {
    vocab: Vocab,
    model: Model,
    strips_space: bool,
    bos_id: Option<u32>,
    /// The tokens that end an answer, ascending.
    eos_ids: Vec<u32>,
    leading_bos: Option<u32>,
    templates: Templates,
    named_tokens: Vec<(String, String)>,
    /// As [`Tokenizer::notes`].
    notes: Vec<String>,
}

/// How ordinary text becomes ids.
enum Model {
    ByteLevel(Box<ByteLevel>),
    SentencePiece { pieces: Box<SentencePiece>, prefix: Prefix },
    Json(Box<JsonModel>),
}

/// Which stretches of a text between special tokens begin with a space that is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prefix {
    Never,
    /// The text's very beginning.
    First,
    /// Also after a special token.
    Always,
}

/// Where a stretch of text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing comes before it.
    Start,
    AfterToken,
    AfterText,
}

impl Prefix {
    fn applies(self, place: Place) -> bool {
        match self {
            Self::Never => false,
            Self::First => place == Place::Start,
            Self::Always => place != Place::AfterText,
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.model {
            Model::ByteLevel(_) => "byte-level BPE",
            Model::SentencePiece { .. } => "SentencePiece BPE",
            Model::Json(_) => "BPE of a tokenizer.json",
        };
        f.debug_struct("Tokenizer")
            .field("kind", &kind)
            .field("vocab_size", &self.vocab_size())
            .field("leading_bos", &self.leading_bos)
            .field("eos_ids", &self.eos_ids)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// What the file leaves open is as in llama.cpp: BOS is put before a prompt by `SentencePiece` tokenizers, those of
    /// `LLaMA` 3 and Tekken; a `SentencePiece` text begins with a space that is not in it; BOS, EOS and the unknown
    /// token of a `SentencePiece` tokenizer are `<s>`, `</s>` and `<unk>`; without `pre`, words are split by the rule
    /// `default`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another kind of tokenizer or an unknown pre-tokenizer; [`Error::BadFile`] if the
    /// vocabulary is not consistent: empty, lists of different lengths, ids out of range, one spelling for two tokens,
    /// merges that name unknown tokens, BOS wanted but missing.
    pub fn from_gguf(mut gguf: GgufVocab) -> Result<Self> {
        if !matches!(gguf.model.as_str(), "gpt2" | "llama") {
            let what = format!("the tokenizer `{}` of `{}`", gguf.model, gguf.path.display());
            return Err(Error::unsupported(what).with_hint("supported are gpt2 and llama"));
        }
        if gguf.model == "llama" {
            let named = |text: &str| gguf.tokens.iter().position(|t| t == text).and_then(|id| u32::try_from(id).ok());
            gguf.bos_id = gguf.bos_id.or_else(|| named("<s>"));
            gguf.eos_id = gguf.eos_id.or_else(|| named("</s>"));
            gguf.unk_id = gguf.unk_id.or_else(|| named("<unk>"));
        }
        let mut notes = std::mem::take(&mut gguf.notes);
        if gguf.model == "llama" && gguf.scores.is_empty() {
            notes.push(format!(
                "`{}` has no scores (`tokenizer.ggml.scores`): pieces are joined from left to right, as llama.cpp does it, and \
                 may not be those that the model was trained with",
                gguf.path.display()
            ));
            gguf.scores = vec![0.0; gguf.tokens.len()];
        }
        if gguf.model == "gpt2" && gguf.pre.as_ref().is_none_or(String::is_empty) {
            gguf.pre = None;
            notes.push(format!(
                "`{}` does not say how text is split into words (`tokenizer.ggml.pre`), so the rule `default` is used: GENERATION \
                 QUALITY WILL BE DEGRADED if the model was trained with another; convert the model anew with a current llama.cpp",
                gguf.path.display()
            ));
        }
        let mut draft = Draft::from_gguf(&mut gguf)?;
        let known = Known::find(draft.iter());
        notes.extend(known.correct(&mut draft));
        let vocab = Vocab::new(draft)?;
        let (model, strips_space, bos_by_default) = if gguf.model == "llama" {
            let pieces = Box::new(SentencePiece::new(&vocab, &gguf.scores, gguf.unk_id)?);
            let prefix = if gguf.add_space_prefix.unwrap_or(true) { Prefix::Always } else { Prefix::Never };
            (Model::SentencePiece { pieces, prefix }, prefix != Prefix::Never, true)
        } else {
            let model = ByteLevel::new(&vocab, gguf.pre.as_deref(), &gguf.merges)?;
            let bos_by_default = model.bos_by_default();
            (Model::ByteLevel(Box::new(model)), false, bos_by_default)
        };
        let add_bos = gguf.add_bos.unwrap_or(bos_by_default);
        if add_bos && gguf.bos_id.is_none() {
            return Err(Error::bad_file(
                vocab.path(),
                "a prompt should begin with BOS, but the file names no such token",
            ));
        }
        let other_ends =
            gguf.other_end_ids.iter().copied().filter(|&id| (id as usize) < vocab.len()).collect::<Vec<_>>();
        let mut templates = Templates::default();
        let default = gguf.chat_template.take().map(|source| ("default".to_owned(), source));
        for (name, source) in default.into_iter().chain(std::mem::take(&mut gguf.named_templates)) {
            templates.insert(&name, ChatTemplate::new(vocab.path(), &source));
        }
        Ok(Self::assemble(Parts {
            named_tokens: gguf.named_tokens(&vocab),
            templates,
            vocab,
            model,
            strips_space,
            bos_id: gguf.bos_id,
            eos_ids: known.ends(gguf.eos_id.into_iter().chain(gguf.eot_id).chain(other_ends)),
            leading_bos: gguf.bos_id.filter(|_| add_bos),
            notes,
        }))
    }

    /// Sorts the tokens of a vocabulary by what they are for.
    fn assemble(parts: Parts) -> Self {
        let Parts { vocab, model, strips_space, bos_id, eos_ids, leading_bos, templates, named_tokens, notes } = parts;
        let markers =
            TokenSet::new(vocab.iter().filter(|(id, ..)| vocab.is_marker(*id)).map(|(id, text, _)| (id, text)));
        // SentencePiece finds user-defined pieces by itself, and puts no space behind them.
        let in_prompt = |id: u32, kind: Kind| {
            vocab.is_marker(id) || (kind == Kind::UserDefined && matches!(model, Model::ByteLevel(_)))
        };
        let special =
            TokenSet::new(vocab.iter().filter(|(id, _, kind)| in_prompt(*id, *kind)).map(|(id, text, _)| (id, text)));
        let special_ids: Vec<u32> =
            vocab.iter().filter(|(.., kind)| *kind == Kind::Control).map(|(id, ..)| id).collect();
        let losses = match &model {
            Model::ByteLevel(_) => Losses::NONE,
            Model::SentencePiece { pieces, .. } => pieces.losses(),
            Model::Json(model) => model.losses(),
        };
        Self {
            bound: Bound::new(&vocab, losses),
            most_tokens: None,
            markers,
            special,
            special_ids,
            eos_ids,
            bos_id,
            leading_bos,
            strips_space,
            templates,
            named_tokens,
            notes,
            vocab,
            model,
        }
    }

    /// Refuses, from now on, prompts and chats that certainly have more than `tokens` tokens, before they are tokenised:
    /// a model's context, in which they would not fit. What is refused later anyway would cost some 60 times its size.
    pub fn limit(&mut self, tokens: usize) {
        self.most_tokens = Some(tokens);
    }

    /// A text has at least so many tokens, found out from its bytes alone.
    #[must_use]
    pub fn least_tokens(&self, text: &str) -> usize {
        self.bound.least_tokens(text)
    }

    /// Refuses a text that is certainly above the [limit](Self::limit).
    ///
    /// # Errors
    /// [`Error::Input`] for such a text.
    pub fn check_length(&self, text: &str) -> Result<()> {
        let Some(most) = self.most_tokens else { return Ok(()) };
        let least = self.least_tokens(text);
        if least <= most {
            return Ok(());
        }
        let reason = format!("the prompt has at least {least} tokens, more than the model's context of {most}");
        Err(Error::input(reason).with_hint("shorten the prompt"))
    }

    /// Tokenises the beginning of a text that may be very long: all of it, or at least `tokens` tokens, which are those
    /// of the whole text. No [limit](Self::limit) holds. Otherwise as [`encode`](Self::encode).
    ///
    /// # Errors
    /// [`Error::Input`] if the text cannot be split into words.
    pub fn encode_beginning(&self, text: &str, tokens: usize) -> Result<Vec<u32>> {
        self.encode_unbounded(self.beginning(text, tokens))
    }

    /// As much of a text as certainly has `tokens` tokens; the whole text if it may have fewer.
    #[must_use]
    pub fn beginning<'t>(&self, text: &'t str, tokens: usize) -> &'t str {
        self.bound.beginning(text, tokens)
    }

    /// Tokenises a raw prompt. Special tokens spelt out in it are recognised, and BOS comes first if the tokenizer's
    /// settings say so and the text does not begin with it.
    ///
    /// # Errors
    /// [`Error::Input`] if the text cannot be split into words, or is certainly above the [limit](Self::limit).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.check_length(text)?;
        self.encode_unbounded(text)
    }

    /// As [`encode`](Self::encode), whatever the text's length.
    fn encode_unbounded(&self, text: &str) -> Result<Vec<u32>> {
        let ids =
            self.encode_parts(text, Place::Start, |_| true, |text, place, ids| self.encode_text(text, place, ids))?;
        Ok(self.with_bos(ids))
    }

    /// As [`encode`](Self::encode), of what follows other text: no BOS, and no space that begins a text.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_following(&self, text: &str) -> Result<Vec<u32>> {
        self.check_length(text)?;
        self.encode_parts(text, Place::AfterText, |_| true, |text, place, ids| self.encode_text(text, place, ids))
    }

    /// Tokenises plain text and nothing else: no BOS, no special tokens. A `SentencePiece` text begins with its space.
    ///
    /// # Errors
    /// [`Error::Input`] if the text cannot be split into words.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        self.encode_text(text, Place::Start, &mut ids)?;
        Ok(ids)
    }

    /// Splits a text at its special tokens and tokenises the rest.
    ///
    /// * `counts`: whether an occurrence of a special token is taken for it
    /// * `encode`: appends the ids of ordinary text
    fn encode_parts(
        &self,
        text: &str,
        mut place: Place,
        counts: impl Fn(&Occurrence) -> bool,
        encode: impl Fn(&str, Place, &mut Vec<u32>) -> Result<()>,
    ) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let parts = match &self.model {
            Model::Json(model) => model.added.split(text, counts),
            _ => self.special.split(text, counts),
        };
        for part in parts {
            match part {
                Part::Token(id) => {
                    ids.push(id);
                    place = Place::AfterToken;
                }
                Part::Text(text) => {
                    encode(text, place, &mut ids)?;
                    place = Place::AfterText;
                }
            }
        }
        Ok(ids)
    }

    /// Puts BOS first, if the settings say so and it is not there.
    fn with_bos(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let Some(bos) = self.leading_bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        ids
    }

    /// Appends the ids of ordinary text.
    fn encode_text(&self, text: &str, place: Place, ids: &mut Vec<u32>) -> Result<()> {
        match &self.model {
            Model::ByteLevel(model) => model.encode(text, ids),
            Model::SentencePiece { pieces, prefix } => {
                pieces.encode(text, prefix.applies(place), ids);
                Ok(())
            }
            Model::Json(model) => model.encode(text, model.prefix.applies(place), ids),
        }
    }

    /// Makes text of ids. Bytes that are not UTF-8 become U+FFFD; the space that `SentencePiece` puts before a text is
    /// dropped. Special tokens (control and unknown ones) print their spelling, or nothing with `skip_special`.
    #[must_use]
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut decoder = StreamDecoder::new(self, skip_special, true);
        let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// Makes text of ids as they are generated; special tokens print nothing. `begins_text` says that nothing comes
    /// before them, so that `SentencePiece`'s leading space is dropped; `false` for the continuation of a prompt.
    #[must_use]
    pub fn stream(&self, begins_text: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(self, true, begins_text)
    }

    /// The raw bytes that a token prints: with `<0x0A>` and the byte-level alphabet decoded, and U+2581 as a space. A
    /// special token's are its spelling. None for an id that does not exist.
    #[must_use]
    pub fn id_bytes(&self, id: u32) -> &[u8] {
        self.vocab.bytes(id)
    }

    /// What a token prints, for people: U+FFFD for what is not UTF-8.
    #[must_use]
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.id_bytes(id)).into_owned()
    }

    /// The token of a spelling, in the vocabulary's own writing (`"Ġthe"`, `"▁the"`, `"<|im_end|>"`).
    #[must_use]
    pub fn token_id(&self, spelling: &str) -> Option<u32> {
        self.vocab.id(spelling)
    }

    /// Number of tokens; ids are below it.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// The token that begins a text, whether or not prompts get one (see [`Tokenizer::adds_bos`]).
    #[must_use]
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Whether a prompt begins with BOS.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.leading_bos.is_some()
    }

    /// The tokens that end an answer, ascending: EOS, EOT, what else the files name, and tokens with the well-known
    /// spellings of end markers; in a model folder only those that are added or control tokens.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The control tokens, ascending.
    #[must_use]
    pub fn special_ids(&self) -> &[u32] {
        &self.special_ids
    }

    /// What a user should know of the tokenizer though it can be used: what its files leave open or have wrong, and what is
    /// done instead. One sentence each, in lower case.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Whether a token is a control token.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.vocab.kind(id) == Some(Kind::Control)
    }

    /// Whether a token stands for what cannot be spelt.
    fn is_unknown(&self, id: u32) -> bool {
        self.vocab.kind(id) == Some(Kind::Unknown)
    }

    /// Whether the model brings a chat template along; without it, [`Tokenizer::chat_format`] may know a built-in one.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// The punctuation tokens, ascending: what they print, white space around it aside, is not empty and made of the
    /// characters of `list` only. Tokens that are not whole characters don't count.
    #[must_use]
    pub fn punctuation_ids(&self, list: &[String]) -> Vec<u32> {
        let marks: HashSet<char> = list.iter().flat_map(|s| s.chars()).collect();
        let is_punctuation = |id: &u32| {
            std::str::from_utf8(self.id_bytes(*id)).is_ok_and(|text| {
                let text = text.trim();
                !text.is_empty() && text.chars().all(|c| marks.contains(&c))
            })
        };
        self.vocab.iter().map(|(id, ..)| id).filter(is_punctuation).collect()
    }
}
