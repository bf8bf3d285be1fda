//! The tokenizer of a model folder: which of its files is taken, and what the files beside it add.
//!
//! Formats are read elsewhere: `json.rs`, `sentencepiece.rs`, `tiktoken.rs`, `settings.rs`.

use std::path::Path;

use super::byte_level::ByteLevel;
use super::ends::Known;
use super::settings::Settings;
use super::spm::SentencePiece;
use super::vocab::{Draft, Kind, Vocab};
use super::{Model, Parts, Prefix, Tokenizer, json, sentencepiece, tiktoken};
use crate::error::{Error, Result};
use crate::side_files::read_bounded;

/// What a model's `config.json` and `generation_config.json` say of tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelIds {
    /// `bos_token_id`: begins a text. Counts only if the tokenizer's own files name no BOS.
    pub bos_id: Option<u32>,
    /// `eos_token_id`, of both files: each ends an answer.
    pub eos_ids: Vec<u32>,
    /// How many tokens the model can tell apart. Tokens that were added behind them are left out: old downloads of Llama
    /// 2 have a `<pad>` that no text holds.
    pub num_embeddings: Option<usize>,
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder: `tokenizer.json` if there is one, else `tokenizer.model` (`SentencePiece`
    /// or `LLaMA` 3's tiktoken format, told apart by content), with `tokenizer_config.json`, `special_tokens_map.json`,
    /// `added_tokens.json`, `chat_template.jinja`, `chat_template.json` and `additional_chat_templates/tool_use.jinja` where
    /// they are there.
    ///
    /// The model may have more embeddings than [`Tokenizer::vocab_size`], since folders pad them; never fewer.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no tokenizer or a file cannot be read; [`Error::BadFile`] if a file is not what its
    /// format promises or contradicts another; [`Error::Unsupported`] for other kinds of tokenizers.
    pub fn from_folder(folder: &Path, ids: ModelIds) -> Result<Self> {
        let settings = Settings::read(folder, ids.num_embeddings)?;
        let json = folder.join("tokenizer.json");
        let model = folder.join("tokenizer.model");
        let loaded = if json.exists() {
            from_json(&json, &settings)?
        } else if model.exists() {
            let bytes = read_bounded(&model)?;
            if tiktoken::is_tiktoken(&bytes) {
                from_tiktoken(&bytes, &model, &settings)?
            } else {
                from_sentencepiece(&bytes, &model, &settings)?
            }
        } else {
            return Err(Error::bad_file(folder, "it has neither `tokenizer.json` nor `tokenizer.model`")
                .with_hint("copy the tokenizer's files from the model's repository into the folder"));
        };
        let Loaded { vocab, .. } = &loaded;
        let mut notes = Vec::new();
        let mut is_token = |what: &str, id: u32| {
            let is_token = (id as usize) < vocab.len();
            if !is_token {
                notes.push(format!(
                    "the model's configuration gives {what} the id {id}, but there are only {} tokens in `{}`: it is left out",
                    vocab.len(),
                    vocab.path().display()
                ));
            }
            is_token
        };
        let mut ids = ids;
        ids.bos_id = ids.bos_id.filter(|&id| is_token("BOS", id));
        ids.eos_ids.retain(|&id| is_token("EOS", id));
        let named = |text: &Option<String>| text.as_ref().and_then(|text| vocab.id(text));
        let bos_id = named(&settings.bos).or(loaded.bos_id).or(ids.bos_id).or(loaded.leading);
        let eos_id = named(&settings.eos).or(loaded.eos_id).or(ids.eos_ids.first().copied());
        let leading = match settings.add_bos {
            Some(true) => bos_id,
            Some(false) => None,
            None => loaded.leading.or(bos_id.filter(|_| loaded.bos_by_default)),
        };
        if leading.is_none()
            && (settings.add_bos == Some(true) || (settings.add_bos.is_none() && loaded.bos_by_default))
        {
            return Err(Error::bad_file(
                vocab.path(),
                "a prompt should begin with BOS, but the folder names no such token",
            ));
        }
        let spelt = |id: Option<u32>| id.and_then(|id| vocab.text(id));
        let unk_id = vocab.iter().find(|(.., kind)| *kind == Kind::Unknown).map(|(id, ..)| id);
        let named_tokens = settings.named_tokens([
            ("bos_token", spelt(bos_id)),
            ("eos_token", spelt(eos_id)),
            ("unk_token", spelt(unk_id)),
        ]);
        let mut eos_ids: Vec<u32> = eos_id.into_iter().chain(ids.eos_ids).collect();
        // Pieces of ordinary text end nothing, whatever they spell.
        let may_end = |kind| matches!(kind, Kind::Control | Kind::Unknown | Kind::UserDefined);
        let tokens = loaded.vocab.iter().filter(|(.., kind)| may_end(*kind));
        let known = Known::find(tokens.map(|(id, text, _)| (id, text)));
        // What the folder names ends a text whatever else there is.
        eos_ids.extend(known.ends([]));
        eos_ids.sort_unstable();
        eos_ids.dedup();
        Ok(Self::assemble(Parts {
            vocab: loaded.vocab,
            model: loaded.model,
            strips_space: loaded.strips_space,
            bos_id,
            eos_ids,
            leading_bos: leading,
            templates: settings.templates,
            named_tokens,
            notes,
        }))
    }
}

/// What the tokenizer's own file gives.
struct Loaded {
    vocab: Vocab,
    model: Model,
    strips_space: bool,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    /// What the file itself puts before a prompt.
    leading: Option<u32>,
    /// Whether prompts begin with BOS if no file says otherwise.
    bos_by_default: bool,
}

fn from_json(path: &Path, settings: &Settings) -> Result<Loaded> {
    let file = json::read(path, settings)?;
    Ok(Loaded {
        vocab: file.vocab,
        model: Model::Json(Box::new(file.model)),
        strips_space: file.strips_space,
        bos_id: None,
        eos_id: None,
        leading: file.leading,
        bos_by_default: false,
    })
}

fn from_sentencepiece(bytes: &[u8], path: &Path, settings: &Settings) -> Result<Loaded> {
    let mut gguf = sentencepiece::parse(bytes, path)?;
    let mut scores = std::mem::take(&mut gguf.scores);
    let mut draft = Draft::from_gguf(&mut gguf)?;
    settings.apply(&settings.added, &mut draft)?;
    scores.resize(draft.len(), 0.0);
    let vocab = Vocab::new(draft)?;
    let pieces = Box::new(SentencePiece::new(&vocab, &scores, gguf.unk_id)?);
    let prefix = match (gguf.add_space_prefix, settings.add_prefix_space, settings.legacy) {
        (Some(false), ..) | (_, Some(false), _) => Prefix::Never,
        (.., Some(false)) => Prefix::First,
        _ => Prefix::Always,
    };
    Ok(Loaded {
        vocab,
        model: Model::SentencePiece { pieces, prefix },
        strips_space: prefix != Prefix::Never,
        bos_id: gguf.bos_id,
        eos_id: gguf.eos_id,
        leading: None,
        bos_by_default: true,
    })
}

fn from_tiktoken(bytes: &[u8], path: &Path, settings: &Settings) -> Result<Loaded> {
    let mut draft = tiktoken::parse(bytes, path)?;
    settings.apply(&settings.added, &mut draft)?;
    let (bos_id, eos_id) = (draft.id(tiktoken::BEGIN_OF_TEXT), draft.id(tiktoken::END_OF_TEXT));
    let vocab = Vocab::new(draft)?;
    let model = Model::ByteLevel(Box::new(ByteLevel::by_rank(&vocab)?));
    Ok(Loaded { vocab, model, strips_space: false, bos_id, eos_id, leading: None, bos_by_default: true })
}
