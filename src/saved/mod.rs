//! Caches in files: a text is read once, and what is kept of it is mapped into memory whenever it is asked about again.
//!
//! ```no_run
//! use adaptive_kvcache::prelude::*;
//!
//! # fn main() -> Result<()> {
//! let loaded = load("model.gguf", WeightDtype::Auto)?;
//! let config = AdaptiveConfig::from_file("configs/best.json")?;
//! let mut cache = loaded.cache(KvDtype::Q8_0, &config)?;
//! let text = std::fs::read_to_string("book.txt").expect("a book");
//! loaded.model.prefill(&loaded.tokenizer.encode(&text)?, &mut cache, &mut ())?;
//! loaded.save_cache(&cache, "book.kv")?;
//!
//! let mut cache = loaded.saved_cache("book.kv")?; // later: nothing is read anew
//! let question = loaded.tokenizer.encode("\n\nWho is the hero of this book?")?;
//! let logits = loaded.model.prefill(&question, &mut cache, &mut ())?.logits;
//! # let _ = logits;
//! # Ok(())
//! # }
//! ```
//!
//! The format is described in [the guide](crate::guide::saved_caches), so that other programs can read it.
//!
//! Not for: what is kept (see [`crate::cache`]).

mod first;
mod layout;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::arch::{HeadLayout, LlamaConfig};
use crate::backend::KernelRows;
use crate::cache::{AdaptiveKvCache, CacheLayer, KvDtype, Retention};
use crate::checkpoint::Loaded;
use crate::compress::AdaptiveConfig;
use crate::error::{Error, Result};
use crate::files;
use crate::kernels::quant::SharedBytes;
use crate::mapped::MappedFile;
use crate::records::{Sink, Source};
use crate::tokenizer::ChatInput;
use crate::tokens::TokenClassifier;
use layout::{AGAIN, Description, ModelSide, Place};

/// The conversation that a cache holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Dialogue {
    /// Its messages, and what else the chat template was told.
    pub input: ChatInput,
    /// How many of the messages it was opened with, before the first question.
    pub opening: usize,
    /// The token with which the last answer broke off, which the cache has not got.
    pub unread: Option<u32>,
}

/// As it is read.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadDialogue {
    input: Value,
    opening: usize,
    unread: Option<u32>,
}

/// A file that holds a cache: opened, and as far as header and description go checked.
#[derive(Debug)]
pub struct SavedCache {
    path: Arc<Path>,
    file: Arc<MappedFile>,
    description: Description,
    /// `[1 + num_layers]` where the tokens and the layers are, and their checksums.
    sections: Vec<Place>,
    kv_dtype: KvDtype,
}

impl Loaded {
    /// Saves a cache of this model. The file appears when it is complete.
    ///
    /// # Errors
    /// [`Error::Io`] if it can't be written; [`Error::Unsupported`] for a cache that the CPU kernels do not read, and on
    /// processors that are not little-endian; [`Error::Shape`] for a cache of another model; [`Error::Input`] for one that
    /// holds half a prompt. What was in the file before is there then.
    pub fn save_cache(&self, cache: &AdaptiveKvCache, path: impl AsRef<Path>) -> Result<()> {
        self.save_dialogue(cache, None, path)
    }

    /// As [`save_cache`](Self::save_cache), with the conversation that the cache holds.
    ///
    /// # Errors
    /// As [`save_cache`](Self::save_cache).
    pub fn save_dialogue(
        &self,
        cache: &AdaptiveKvCache,
        dialogue: Option<&Dialogue>,
        path: impl AsRef<Path>,
    ) -> Result<()> {
        let path = path.as_ref();
        expect_little_endian()?;
        if !cache.is_consistent() {
            return Err(Error::input("the cache holds part of a prompt that was broken off, and can't be saved"));
        }
        if !cache.can_save() {
            return Err(Error::unsupported(format!("saving a cache of the backend {}", self.model.backend()))
                .with_hint("use --backend kernels on the CPU"));
        }
        cache.expect_shape::<KernelRows>(self.model.config().num_layers, self.model.config().heads)?;
        let to_json = |value: serde_json::Result<Value>| {
            value.map_err(|error| Error::io("write", path, std::io::Error::other(error)))
        };
        let config = match cache.retention() {
            Retention::Full => None,
            Retention::Adaptive { config, .. } => Some(to_json(serde_json::to_value(&**config))?),
        };
        let dialogue = dialogue.map(|dialogue| to_json(serde_json::to_value(dialogue)));
        let (bytes, ids) = (cache.bytes(), cache.ids());
        let id_bytes = if ids.iter().all(|&id| u16::try_from(id).is_ok()) { 2 } else { 4 };
        let description = Description {
            program: concat!("adaptive-kvcache ", env!("CARGO_PKG_VERSION")).to_owned(),
            model: to_json(serde_json::to_value(&self.model.config().rope)).map(|rope| self.side(rope))?,
            kv_dtype: cache.layers::<KernelRows>()?.first().map_or(KvDtype::F16, CacheLayer::dtype).name().to_owned(),
            config,
            tokens: ids.len(),
            undecided: cache.undecided(),
            shifted: cache.shifted(),
            id_bytes,
            kept_bytes: bytes.kept,
            raw_bytes: bytes.raw,
            dialogue: dialogue.transpose()?,
            sections: Vec::new(),
        };
        let mut write_section = |section: usize, sink: &mut Sink<'_>| match section.checked_sub(1) {
            Some(layer) => cache.save_layer(layer, sink),
            None => ids.iter().for_each(|id| sink.bytes(&id.to_le_bytes()[..id_bytes])),
        };
        files::replace_with(path, &mut |file| {
            layout::write(file, description.clone(), 1 + cache.num_layers(), &mut write_section)
        })
    }

    /// Takes a cache from a file, as [`SavedCache::cache`] does.
    ///
    /// # Errors
    /// As [`SavedCache::open`] and [`SavedCache::cache`].
    pub fn saved_cache(&self, path: impl AsRef<Path>) -> Result<AdaptiveKvCache> {
        SavedCache::open(path)?.cache(self)
    }

    /// What has to be the same where a cache is used.
    fn side(&self, rope: Value) -> ModelSide {
        let config: &LlamaConfig = self.model.config();
        let HeadLayout { num_heads, num_kv_heads, head_dim } = config.heads;
        let windows = (0..config.num_layers).map(|layer| config.window(layer)).collect();
        ModelSide {
            architecture: config.architecture.to_string(),
            layers: config.num_layers,
            query_heads: num_heads,
            kv_heads: num_kv_heads,
            head_dim,
            weights: self.fingerprint.clone(),
            vocabulary: self.tokenizer.fingerprint(),
            rope,
            windows: config.sliding_window.is_some().then_some(windows),
        }
    }
}

impl SavedCache {
    /// Opens a file: maps it, and reads what it says of itself.
    ///
    /// # Errors
    /// [`Error::Io`] if it can't be read; [`Error::BadFile`], with what is wrong, if it is not a saved cache, was cut short
    /// or is damaged there; [`Error::Unsupported`] for another version of the format, or a processor that is not
    /// little-endian.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        expect_little_endian()?;
        let file = MappedFile::open(path, "give the path of a saved cache, as `cache create` writes it")?;
        let (description, sections) = layout::read(path, &file)?;
        let bad = |reason: String| Error::bad_file(path, reason).with_hint(AGAIN);
        let kv_dtype = KvDtype::ALL.into_iter().find(|dtype| dtype.name() == description.kv_dtype);
        let kv_dtype = kv_dtype.ok_or_else(|| bad(format!("numbers of the kind `{}`", description.kv_dtype)))?;
        let saved = Self { path: path.into(), file: Arc::new(file), description, sections, kv_dtype };
        let Description { model, tokens, undecided, shifted, id_bytes, sections, .. } = &saved.description;
        let len = |section: usize| saved.sections.get(section).map_or(0, |section| section.range.len());
        // A layer has at least so many bytes for each head.
        let has_heads = |section| model.kv_heads.checked_mul(8).is_some_and(|bytes| bytes <= len(section));
        if sections.len() != model.layers.saturating_add(1) || !(1..sections.len()).all(has_heads) {
            return Err(bad(format!("{} sections for {} layers", sections.len(), model.layers)));
        }
        if ![2, 4].contains(id_bytes) || tokens.checked_mul(*id_bytes).is_none_or(|bytes| bytes > len(0)) {
            return Err(bad(format!("{} bytes for {tokens} tokens of {id_bytes} bytes each", len(0))));
        }
        if shifted > tokens || *undecided > tokens - shifted {
            return Err(bad(format!(
                "{undecided} of {tokens} tokens are not decided about, {shifted} have no position"
            )));
        }
        saved.layout().check().map_err(|error| bad(error.to_string()))?;
        Ok(saved)
    }

    /// The path that was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    #[must_use]
    pub fn file_bytes(&self) -> usize {
        self.file.len()
    }

    /// Bytes of keys and values: those that are kept, and those that a full cache of the same tokens needs.
    #[must_use]
    pub fn kept_and_raw_bytes(&self) -> (usize, usize) {
        (self.description.kept_bytes, self.description.raw_bytes)
    }

    /// The program that wrote it, with its version.
    #[must_use]
    pub fn program(&self) -> &str {
        &self.description.program
    }

    /// The architecture and the number of layers of the model that it is of.
    #[must_use]
    pub fn model(&self) -> (&str, usize) {
        (&self.description.model.architecture, self.description.model.layers)
    }

    /// What tells its weights and its vocabulary from others, see [`Loaded::fingerprint`] and
    /// [`Tokenizer::fingerprint`](crate::tokenizer::Tokenizer::fingerprint).
    #[must_use]
    pub fn fingerprints(&self) -> (&str, &str) {
        (&self.description.model.weights, &self.description.model.vocabulary)
    }

    /// The heads of each layer.
    #[must_use]
    pub fn layout(&self) -> HeadLayout {
        let ModelSide { query_heads, kv_heads, head_dim, .. } = self.description.model;
        HeadLayout { num_heads: query_heads, num_kv_heads: kv_heads, head_dim }
    }

    /// The numbers that keys and values are stored in.
    #[must_use]
    pub fn kv_dtype(&self) -> KvDtype {
        self.kv_dtype
    }

    /// How many tokens were given.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.description.tokens
    }

    /// The tokens that were given.
    #[must_use]
    pub fn ids(&self) -> Vec<u32> {
        let width = self.description.id_bytes;
        let bytes = &self.file[self.sections[0].range.clone()][..self.num_tokens() * width];
        let id = |bytes: &[u8]| bytes.iter().rev().fold(0, |id, &byte| id << 8 | u32::from(byte));
        bytes.chunks_exact(width).map(id).collect()
    }

    /// What decides what is kept; `None` for a full cache.
    ///
    /// # Errors
    /// As [`AdaptiveConfig::from_file`]; [`Error::Config`] if a profile of heads that it names is not where it was.
    pub fn config(&self) -> Result<Option<AdaptiveConfig>> {
        let config = self.description.config.as_ref();
        config.map(|config| AdaptiveConfig::parse(&config.to_string(), Some(&self.path))).transpose()
    }

    /// The conversation that it holds, if it was saved with one.
    ///
    /// # Errors
    /// [`Error::BadFile`] if it can't be.
    pub fn dialogue(&self) -> Result<Option<Dialogue>> {
        let Some(dialogue) = &self.description.dialogue else { return Ok(None) };
        let read = ReadDialogue::deserialize(dialogue)
            .map_err(|error| Error::bad_file(&self.path, format!("its conversation: {error}")))?;
        let input = ChatInput::from_value(read.input, &self.path)?;
        if read.opening > input.messages.len() {
            return Err(Error::bad_file(&self.path, format!("a conversation opened with {} messages", read.opening)));
        }
        Ok(Some(Dialogue { input, opening: read.opening, unread: read.unread }))
    }

    /// Compares every section with its checksum, and reads what it holds. No model is needed.
    ///
    /// # Errors
    /// [`Error::BadFile`] if something is damaged.
    pub fn check(&self) -> Result<()> {
        self.check_sections()?;
        self.dialogue()?;
        let retention = match self.config()? {
            None => Retention::Full,
            Some(config) => {
                let (classifier, words) = (TokenClassifier::default(), None);
                Retention::Adaptive { config: Arc::new(config), classifier, words }
            }
        };
        let rows = KernelRows::new(self.layout(), self.kv_dtype)?;
        let ModelSide { layers, windows, .. } = &self.description.model;
        let mut cache = AdaptiveKvCache::new(*layers, &rows, retention);
        if let Some(windows) = windows {
            cache = cache.with_windows::<KernelRows>(windows)?;
        }
        self.fill(&mut cache)
    }

    /// The cache, for the model that it is of. Its rows stay where they are in the file, which has to stay as it is; new
    /// rows lie in memory, as does a copy of a head's rows once one of them goes. Everything is compared with its checksum
    /// first.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the model, its vocabulary or its rotations are others, with what differs, or if something is
    /// damaged; [`Error::Unsupported`] by a backend that does not read such rows; others as
    /// [`Llama::new_cache`](crate::model::Llama::new_cache) and [`config`](Self::config).
    pub fn cache(&self, loaded: &Loaded) -> Result<AdaptiveKvCache> {
        self.expect_model(loaded)?;
        self.check_sections()?;
        let retention = self.config()?.map_or(Retention::Full, |config| loaded.retention(&config));
        let mut cache = loaded.model.new_cache(self.kv_dtype, retention)?;
        if !cache.can_save() {
            return Err(Error::unsupported(format!("a saved cache by the backend {}", loaded.model.backend()))
                .with_hint("use --backend kernels on the CPU"));
        }
        let vocab_size = loaded.model.config().vocab_size;
        if let Some(id) = self.ids().into_iter().find(|&id| id as usize >= vocab_size) {
            return Err(Error::bad_file(&self.path, format!("token {id} of a vocabulary of {vocab_size}")));
        }
        self.fill(&mut cache)?;
        Ok(cache)
    }

    fn fill(&self, cache: &mut AdaptiveKvCache) -> Result<()> {
        let source = |(layer, section): (usize, &Place)| {
            let owner: SharedBytes = self.file.clone();
            Source::new(owner, section.range.clone(), Arc::clone(&self.path), format!("layer {layer}"))
        };
        let layers = self.sections[1..].iter().enumerate().map(source).collect();
        cache.load(self.ids(), (self.description.undecided, self.description.shifted), layers)
    }

    fn check_sections(&self) -> Result<()> {
        self.sections.par_iter().enumerate().try_for_each(|(section, Place { range, crc32 })| {
            if crc32fast::hash(&self.file[range.clone()]) == *crc32 {
                return Ok(());
            }
            let what = section.checked_sub(1).map_or("its tokens".to_owned(), |layer| format!("layer {layer}"));
            Err(Error::bad_file(&self.path, format!("{what}: the checksum differs, so it is damaged")).with_hint(AGAIN))
        })
    }

    /// Says in what a model differs from the one that the cache is of.
    fn expect_model(&self, loaded: &Loaded) -> Result<()> {
        let rope = serde_json::to_value(&loaded.model.config().rope).ok();
        // As it is after it was written and read, digit by digit.
        let rope = rope.and_then(|rope| serde_json::from_str(&rope.to_string()).ok()).unwrap_or_default();
        let (here, there) = (loaded.side(rope), &self.description.model);
        if here == *there {
            return Ok(());
        }
        let compare = |what: &str, here: &dyn ToString, there: &dyn ToString| {
            let (here, there) = (here.to_string(), there.to_string());
            (here != there).then(|| format!("{what} {there}, here {here}"))
        };
        let mut differs: Vec<String> = Vec::new();
        differs.extend(compare("architecture", &here.architecture, &there.architecture));
        differs.extend(compare("layers", &here.layers, &there.layers));
        differs.extend(compare("query heads", &here.query_heads, &there.query_heads));
        differs.extend(compare("KV heads", &here.kv_heads, &there.kv_heads));
        differs.extend(compare("head dimension", &here.head_dim, &there.head_dim));
        // Of another shape, all else is another, too.
        if differs.is_empty() {
            differs.extend(compare("weights", &here.weights, &there.weights));
            differs.extend(compare("vocabulary", &here.vocabulary, &there.vocabulary));
            for key in ["theta", "dim", "layout", "scaling", "position_divisor", "attention_factor", "dynamic"] {
                differs.extend(compare(&format!("rotary positions' {key}"), &here.rope[key], &there.rope[key]));
            }
            if here.rope != there.rope && differs.is_empty() {
                differs.push("rotary positions".to_owned());
            }
        }
        if here.windows != there.windows {
            differs.push("sliding windows".to_owned());
        }
        let reason = format!("it is a cache of another model: {}", differs.join("; "));
        Err(Error::bad_file(&self.path, reason).with_hint("give the model that it was saved with"))
    }
}

/// Whether a file begins as saved caches do; nothing else is looked at.
#[must_use]
pub fn is_saved_cache(path: &Path) -> bool {
    let mut start = [0; layout::MAGIC.len()];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut start));
    read.is_ok() && start == *layout::MAGIC
}

fn expect_little_endian() -> Result<()> {
    if cfg!(target_endian = "little") {
        return Ok(());
    }
    Err(Error::unsupported("saved caches on a processor that is not little-endian"))
}
