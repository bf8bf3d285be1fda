//! Model files: what they hold, and how weights get from them into a model.
//!
//! [`open`](open()) finds out what a path is: a GGUF file (or one part of a split one), a folder in Hugging Face's layout, or one
//! of its safetensors files. Every format ends in the same two things: a [`LlamaConfig`], and named
//! [`tensors`](tensors::Tensors), of which [`weights`] makes a model.
//!
//! | module | what it reads |
//! |---|---|
//! | [`gguf`], [`gguf_config`] | the GGUF container; its metadata of a model and of a tokenizer |
//! | [`safetensors`], [`hf_config`] | safetensors files; Hugging Face's `config.json` |
//! | [`pth`], [`meta`] | PyTorch's `.pth` files; Meta's layout, which consists of them |
//!
//! Not for: computing.

mod caches;
mod convert;
mod files;
mod fingerprint;
pub mod gguf;
pub mod gguf_config;
pub mod hf_config;
pub mod meta;
mod open;
mod pickle;
pub mod pth;
pub mod safetensors;
pub mod tensors;
mod tied;
pub mod weights;
mod zip;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::DType;
pub use gguf::GgufFile;
pub use open::open;
pub use pth::PthFile;
pub use weights::WeightDtype;

use crate::backend::BackendKind;
use crate::device;
use crate::error::{Error, Result};
use crate::kernels::quant::WeightFormat;
use crate::memory;
use crate::model::{Llama, LlamaConfig};
use crate::tokenizer::{ModelIds, Tokenizer};
use tensors::{StoredDtype, Tensors};
use weights::{Assembly, OutputLayer};

/// The layout of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One GGUF file or several.
    Gguf,
    /// Hugging Face's: `config.json` and safetensors.
    Safetensors,
    /// Meta's: `params.json` and `consolidated.*.pth`.
    Meta,
}

impl Format {
    /// The name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gguf => "gguf",
            Self::Safetensors => "safetensors",
            Self::Meta => "meta",
        }
    }
}

/// Where the tokenizer is.
#[derive(Debug)]
enum TokenizerSource {
    /// In the metadata of this file.
    Gguf(GgufFile),
    /// In files of this folder.
    Folder(PathBuf, ModelIds),
}

/// A checkpoint that was opened: its configuration is read, its weights are mapped.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    format: Format,
    config: LlamaConfig,
    assembly: Assembly,
    tensors: Tensors,
    tokenizer: TokenizerSource,
    notes: Vec<String>,
}

impl Checkpoint {
    /// The path that was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its layout.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Sizes of the model.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Its tensors.
    #[must_use]
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The metadata of a GGUF file, of the first one if there are several.
    #[must_use]
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.tokenizer {
            TokenizerSource::Gguf(file) => Some(file),
            TokenizerSource::Folder(..) => None,
        }
    }

    /// What a user should know of the files though they can be used: what they leave open or have wrong, and what is done
    /// instead. One sentence each, in lower case. Those about the tokenizer are [`Tokenizer::notes`].
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Whether the output layer is the embedding.
    #[must_use]
    pub fn is_tied(&self) -> bool {
        match self.assembly.output {
            OutputLayer::Own => false,
            OutputLayer::Tied => true,
            OutputLayer::OwnIfPresent => {
                let name = self.assembly.naming.name(weights::Role::LmHead);
                self.tensors.get(&format!("{name}.weight")).is_none()
            }
        }
    }

    /// Bytes of the weights that decoding one token reads: all of them, but of an embedding that is not the output layer
    /// as well only one row.
    #[must_use]
    pub fn decode_bytes(&self, dtype: WeightDtype) -> usize {
        let name = |role| format!("{}.weight", self.assembly.naming.name(role));
        let (mut output, mut unread) = (name(weights::Role::LmHead), name(weights::Role::EmbedTokens));
        if self.is_tied() {
            (output, unread) = (unread, output);
        }
        let read = self.tensors.iter().filter(|(name, _)| **name != unread);
        read.map(|(name, tensor)| {
            // Norms and biases in blocks would be f32; they are too small to count.
            let cols = tensor.shape.last().copied().unwrap_or(0);
            let held = dtype.of_matrix(cols, *name == output);
            held.map_or(tensor.len(), |held| {
                tensor.shape.iter().product::<usize>().div_ceil(held.block_size()) * held.block_bytes()
            })
        })
        .sum()
    }

    /// In which numbers the model's matrices are with this choice, for people: as `"bf16"`; for `auto` the format that
    /// most of the file is in.
    #[must_use]
    pub fn dtype_name(&self, dtype: WeightDtype) -> String {
        match dtype {
            WeightDtype::Auto => {
                self.tensors.main_dtype().map(|dtype| dtype.to_string().to_lowercase()).unwrap_or_default()
            }
            other => other.name().to_owned(),
        }
    }

    /// Makes the model.
    ///
    /// * `backend`: what is to compute it
    /// * `progress`: called with the number of finished layers and of all layers
    ///
    /// # Errors
    /// As [`weights::assemble`].
    pub fn model(
        &self,
        backend: &BackendKind,
        dtype: WeightDtype,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Llama> {
        weights::assemble(backend, &self.tensors, self.assembly, self.config.clone(), dtype, progress)
    }

    /// Makes the model and its tokenizer.
    ///
    /// * `backend`: what is to compute it
    /// * `progress`: called with the number of finished layers and of all layers
    ///
    /// # Errors
    /// As [`Checkpoint::tokenizer`] and [`Checkpoint::model`].
    pub fn load(
        self,
        backend: &BackendKind,
        dtype: WeightDtype,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Loaded> {
        let mut tokenizer = self.tokenizer()?;
        tokenizer.limit(self.config.context_length);
        // Reading a large vocabulary leaves several times its size behind.
        memory::release_unused();
        let model = self.model(backend, dtype, progress)?;
        let held = self.held_dtype(backend, dtype)?;
        let notes = self.notes.iter().cloned().chain(dtype.note(&self.config));
        let checkpoint_notes = notes.chain(self.widening_note(backend, dtype)?).collect();
        Ok(Loaded {
            model,
            tokenizer,
            format: self.format,
            dtype: self.dtype_name(held),
            weights_bytes: self.tensors.bytes(),
            decode_bytes: self.decode_bytes(held),
            fingerprint: fingerprint::weights(&self.tensors),
            checkpoint_notes,
        })
    }

    /// Sets the longest sequence that is processed, in tokens, whatever the files say. Nothing is reserved by it. A note
    /// tells of a length that the model was not made for.
    ///
    /// # Errors
    /// [`Error::Input`] for 0, and for more than 2^30.
    pub fn set_context(&mut self, tokens: usize) -> Result<()> {
        if !(1..=1 << 30).contains(&tokens) {
            return Err(Error::input(format!("a context of {tokens} tokens: expected 1 to 2^30")));
        }
        let context_length = &mut self.config.context_length;
        if tokens > *context_length {
            self.notes.push(format!(
                "a context of {tokens} tokens goes beyond the {context_length} that the model was made for: what it writes there \
                 may make no sense"
            ));
        }
        *context_length = tokens;
        Ok(())
    }

    /// In which numbers most matrices are held with this choice, where the choice is left to what computes them.
    fn held_dtype(&self, backend: &BackendKind, dtype: WeightDtype) -> Result<WeightDtype> {
        let is_blocks = |dtype: &StoredDtype| matches!(dtype, StoredDtype::Usable(format) if format.is_candle_blocks());
        Ok(match (backend, dtype) {
            (BackendKind::Candle(ops), WeightDtype::Auto) if !self.tensors.main_dtype().is_some_and(is_blocks) => {
                match device::float_dtype(ops.device())? {
                    DType::F16 => WeightDtype::F16,
                    DType::BF16 => WeightDtype::Bf16,
                    _ => WeightDtype::F32,
                }
            }
            _ => dtype,
        })
    }

    /// What a user should know of blocks that candle operations do not compute with, if there are any.
    fn widening_note(&self, backend: &BackendKind, dtype: WeightDtype) -> Result<Option<String>> {
        let (BackendKind::Candle(ops), WeightDtype::Auto) = (backend, dtype) else { return Ok(None) };
        let formats: BTreeSet<WeightFormat> = self
            .tensors
            .iter()
            .filter_map(|(_, tensor)| match tensor.dtype {
                StoredDtype::Usable(format) => (!format.is_float() && !format.is_candle_blocks()).then_some(format),
                StoredDtype::Other(_) => None,
            })
            .collect();
        if formats.is_empty() {
            return Ok(None);
        }
        let names = formats.into_iter().map(|format| format.name().to_lowercase()).collect::<Vec<_>>().join(" and ");
        let floats = device::float_dtype(ops.device())?.as_str();
        Ok(Some(format!("matrices in {names} are held in {floats}: candle does not compute with these blocks")))
    }

    /// Makes the tokenizer.
    ///
    /// # Errors
    /// As [`gguf_config::vocab`] and [`Tokenizer::from_gguf`], or as [`Tokenizer::from_folder`]; [`Error::BadFile`] if its
    /// tokens are not as many as the model's embeddings. In a folder there may be more embeddings: they are padded to
    /// sizes that suit the hardware.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let embeddings = self.config.vocab_size;
        let (tokenizer, fits): (_, fn(usize, usize) -> bool) = match &self.tokenizer {
            TokenizerSource::Gguf(file) => {
                // Before the lists are read.
                let tokens = file.array_len(gguf_config::TOKENS)?;
                if tokens != 0 && tokens != embeddings {
                    return Err(self.wrong_vocabulary(tokens));
                }
                (Tokenizer::from_gguf(gguf_config::vocab(file)?)?, |tokens, embeddings| tokens == embeddings)
            }
            TokenizerSource::Folder(folder, ids) => {
                let above = (self.format == Format::Meta).then(|| meta::tokenizer_above(folder)).flatten();
                let folder = above.as_deref().unwrap_or(folder);
                (Tokenizer::from_folder(folder, ids.clone())?, |tokens, embeddings| tokens <= embeddings)
            }
        };
        if fits(tokenizer.vocab_size(), embeddings) {
            return Ok(tokenizer);
        }
        Err(self.wrong_vocabulary(tokenizer.vocab_size()))
    }

    fn wrong_vocabulary(&self, tokens: usize) -> Error {
        let embeddings = self.config.vocab_size;
        Error::bad_file(&self.path, format!("{tokens} tokens in the vocabulary, {embeddings} embeddings"))
    }
}

/// A model with its tokenizer.
#[derive(Debug)]
pub struct Loaded {
    /// The model; its configuration is [`Llama::config`].
    pub model: Llama,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Layout of its checkpoint.
    pub format: Format,
    /// In which numbers its matrices are, as `"bf16"`; the format of most of them if they are the file's own.
    pub dtype: String,
    /// Bytes of the weights, as stored in the files.
    pub weights_bytes: usize,
    /// Bytes of the weights that decoding one token reads, see [`Checkpoint::decode_bytes`].
    pub decode_bytes: usize,
    /// Tells these weights, as stored in the files, from others: in a [saved cache](crate::saved), 32 hexadecimal digits.
    pub fingerprint: String,
    checkpoint_notes: Vec<String>,
}

impl Loaded {
    /// What a user should know of the model though it runs: [`Checkpoint::notes`] and [`Tokenizer::notes`].
    pub fn notes(&self) -> impl Iterator<Item = &str> {
        self.checkpoint_notes.iter().chain(self.tokenizer.notes()).map(String::as_str)
    }
}

/// Loads a model that the CPU kernels compute, and its tokenizer. For other backends, and to see progress, there is
/// [`Checkpoint::load`].
///
/// # Errors
/// As [`open`](open()) and [`Checkpoint::load`].
pub fn load(path: impl AsRef<Path>, dtype: WeightDtype) -> Result<Loaded> {
    open(path)?.load(&BackendKind::default(), dtype, &mut |_, _| {})
}
