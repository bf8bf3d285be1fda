//! Model files: what they hold, and how weights get from them into a model.
//!
//! [`open`] finds out what a path is: a GGUF file (or one part of a split one), a folder in Hugging Face's layout, or one
//! of its safetensors files. Every format ends in the same two things: a [`LlamaConfig`], and named
//! [`tensors`](tensors::Tensors), of which [`weights`] makes a model.
//!
//! | module | what it reads |
//! |---|---|
//! | [`gguf`], [`llama`] | the GGUF container; its metadata of a LLaMA model and of a tokenizer |
//! | [`safetensors`], [`hf_config`] | safetensors files; Hugging Face's `config.json` |
//! | [`pth`], [`meta`] | PyTorch's `.pth` files; Meta's layout, which consists of them |
//!
//! Not for: computing.

mod files;
pub mod gguf;
pub mod hf_config;
pub mod llama;
pub mod meta;
mod pickle;
pub mod pth;
pub mod safetensors;
pub mod tensors;
pub mod weights;
mod zip;

use std::path::{Path, PathBuf};

use candle_core::DType;
pub use gguf::GgufFile;
pub use pth::PthFile;
pub use weights::WeightDtype;

use crate::device;
use crate::error::{Error, Result};
use crate::memory;
use crate::model::{Backend, Llama, LlamaConfig};
use crate::tokenizer::{ModelIds, Tokenizer};
use tensors::Tensors;
use weights::{Assembly, Bias, Naming, OutputLayer};

/// What can be given as a model.
const HINT: &str =
    "give a GGUF file, a folder with config.json and safetensors files, or one with params.json and consolidated.*.pth";

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
        let unread = name(if self.is_tied() { weights::Role::LmHead } else { weights::Role::EmbedTokens });
        let read = self.tensors.iter().filter(|(name, _)| **name != unread);
        read.map(|(_, tensor)| match dtype {
            WeightDtype::Auto => tensor.len(),
            WeightDtype::F32 => 4 * tensor.shape.iter().product::<usize>(),
            WeightDtype::F16 | WeightDtype::Bf16 => 2 * tensor.shape.iter().product::<usize>(),
        })
        .sum()
    }

    /// In which numbers the model's matrices are with this choice, for people: as `"bf16"`; for `auto` the format that
    /// most of the file is in.
    #[must_use]
    pub fn dtype_name(&self, dtype: WeightDtype) -> String {
        match dtype {
            WeightDtype::Auto => self.tensors.main_dtype(),
            other => other.name().to_owned(),
        }
    }

    /// Makes the model for the CPU kernels.
    ///
    /// * `progress`: called with the number of finished layers and of all layers
    ///
    /// # Errors
    /// As [`weights::assemble`].
    pub fn model(&self, dtype: WeightDtype, progress: &mut dyn FnMut(usize, usize)) -> Result<Llama> {
        self.model_for(&Backend::Kernels, dtype, progress)
    }

    /// Makes the model.
    ///
    /// * `backend`: what is to compute it
    /// * `progress`: called with the number of finished layers and of all layers
    ///
    /// # Errors
    /// As [`weights::assemble_for`].
    pub fn model_for(
        &self,
        backend: &Backend,
        dtype: WeightDtype,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Llama> {
        weights::assemble_for(backend, &self.tensors, self.assembly, self.config.clone(), dtype, progress)
    }

    /// In which numbers most matrices are held with this choice, where the choice is left to what computes them.
    fn held_dtype(&self, backend: &Backend, dtype: WeightDtype) -> Result<WeightDtype> {
        let is_float = matches!(&*self.tensors.main_dtype(), "f32" | "f16" | "bf16");
        Ok(match (backend, dtype) {
            (Backend::Candle(ops), WeightDtype::Auto) if is_float => match device::float_dtype(ops.device())? {
                DType::F16 => WeightDtype::F16,
                DType::BF16 => WeightDtype::Bf16,
                _ => WeightDtype::F32,
            },
            _ => dtype,
        })
    }

    /// Makes the tokenizer.
    ///
    /// # Errors
    /// As [`llama::vocab`] and [`Tokenizer::from_gguf`], or as [`Tokenizer::from_folder`]; [`Error::BadFile`] if its
    /// tokens are not as many as the model's embeddings. In a folder there may be more embeddings: they are padded to
    /// sizes that suit the hardware.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let embeddings = self.config.vocab_size;
        let (tokenizer, fits): (_, fn(usize, usize) -> bool) = match &self.tokenizer {
            TokenizerSource::Gguf(file) => {
                // Before the lists are read.
                let tokens = file.array_len(llama::TOKENS)?;
                if tokens != 0 && tokens != embeddings {
                    return Err(self.wrong_vocabulary(tokens));
                }
                (Tokenizer::from_gguf(llama::vocab(file)?)?, |tokens, embeddings| tokens == embeddings)
            }
            TokenizerSource::Folder(folder, ids) => {
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
    checkpoint_notes: Vec<String>,
}

impl Loaded {
    /// What a user should know of the model though it runs: [`Checkpoint::notes`] and [`Tokenizer::notes`].
    pub fn notes(&self) -> impl Iterator<Item = &str> {
        self.checkpoint_notes.iter().chain(self.tokenizer.notes()).map(String::as_str)
    }
}

/// Loads a model that the CPU kernels compute, and its tokenizer.
///
/// * `progress`: called with the number of finished layers and of all layers
///
/// # Errors
/// As [`load_for`].
pub fn load(path: impl AsRef<Path>, dtype: WeightDtype, progress: &mut dyn FnMut(usize, usize)) -> Result<Loaded> {
    load_for(&Backend::Kernels, path, dtype, progress)
}

/// Loads a model and its tokenizer.
///
/// * `backend`: what is to compute it
/// * `progress`: called with the number of finished layers and of all layers
///
/// # Errors
/// As [`open`], [`Checkpoint::tokenizer`] and [`Checkpoint::model_for`].
pub fn load_for(
    backend: &Backend,
    path: impl AsRef<Path>,
    dtype: WeightDtype,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Loaded> {
    let checkpoint = open(path)?;
    let tokenizer = checkpoint.tokenizer()?;
    // Reading a large vocabulary leaves several times its size behind.
    memory::release_unused();
    let model = checkpoint.model_for(backend, dtype, progress)?;
    let held = checkpoint.held_dtype(backend, dtype)?;
    Ok(Loaded {
        model,
        tokenizer,
        format: checkpoint.format,
        dtype: checkpoint.dtype_name(held),
        weights_bytes: checkpoint.tensors.bytes(),
        decode_bytes: checkpoint.decode_bytes(held),
        checkpoint_notes: checkpoint.notes,
    })
}

/// Opens a checkpoint of any layout.
///
/// * `path`: a GGUF file, or any part of a split one; a folder in Hugging Face's layout, or one of its safetensors files
///   or their index; a folder with one GGUF model
///
/// # Errors
/// [`Error::Io`] if something cannot be read; [`Error::BadFile`] if it is not what its format promises, or a folder holds
/// no model or several; [`Error::Unsupported`], by name, for another layout or a model that is not computed.
pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
    let path = path.as_ref();
    let metadata = std::fs::metadata(path).map_err(|source| Error::io("open", path, source).with_hint(HINT))?;
    if metadata.is_dir() {
        return open_folder(path);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if name.ends_with(".safetensors.index.json") {
        open_hugging_face(path, folder, path)
    } else if name.ends_with(".safetensors") {
        // A part of a model means the model.
        let index = folder.join(safetensors::INDEX_NAME);
        let is_part = name.contains("-of-") && index.is_file();
        open_hugging_face(path, folder, if is_part { &index } else { path })
    } else if name.ends_with(".pth") || name == "params.json" {
        open_meta(folder)
    } else if name == "config.json" {
        open_folder(folder)
    } else if name.ends_with(".bin") && name.starts_with("pytorch_model") {
        Err(pytorch(path))
    } else {
        open_gguf(path)
    }
}

fn open_folder(folder: &Path) -> Result<Checkpoint> {
    let is_file = |name: &str| folder.join(name).is_file();
    if let Some(weights) = safetensors::find_in(folder)?
        && (is_file("config.json") || !is_file("params.json"))
    {
        return open_hugging_face(folder, folder, &weights);
    }
    if is_file("params.json") {
        return open_meta(folder);
    }
    for name in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
        if is_file(name) {
            return Err(pytorch(&folder.join(name)));
        }
    }
    let mut models = files::with_suffix(folder, ".gguf")?;
    // Of a split model, the first part that is there stands for all.
    let mut seen = std::collections::HashSet::new();
    models.retain(|path| gguf::PartName::parse(path).is_none_or(|part| seen.insert(part.path(0))));
    match &models[..] {
        [only] => open_gguf(only),
        [] => {
            let reason = "it holds no model: neither safetensors files, nor params.json, nor a GGUF file";
            Err(Error::bad_file(folder, reason).with_hint(HINT))
        }
        several => Err(Error::bad_file(folder, format!("it holds {} models in GGUF format", several.len()))
            .with_hint("give the path of one of the files")),
    }
}

fn open_gguf(path: &Path) -> Result<Checkpoint> {
    let parts = gguf::open_parts(path)?;
    let tensors = gguf::tensors(&parts)?;
    let first = parts.into_iter().next().ok_or_else(|| Error::bad_file(path, "it has no parts"))?;
    let config = llama::config(&first, &tensors)?;
    Ok(Checkpoint {
        path: path.to_owned(),
        format: Format::Gguf,
        config,
        assembly: Assembly {
            naming: Naming::Gguf,
            attention_bias: Bias::IfPresent,
            mlp_bias: Bias::IfPresent,
            output: OutputLayer::OwnIfPresent,
        },
        tensors,
        tokenizer: TokenizerSource::Gguf(first),
        notes: Vec::new(),
    })
}

fn open_hugging_face(path: &Path, folder: &Path, weights: &Path) -> Result<Checkpoint> {
    if !folder.join("config.json").is_file() {
        let reason = format!("there is no `config.json` beside `{}`", weights.display());
        return Err(Error::bad_file(folder, reason).with_hint("fetch all files of the model"));
    }
    let hf_config::HfConfig { config, assembly, ids } = hf_config::read(folder)?;
    Ok(Checkpoint {
        path: path.to_owned(),
        format: Format::Safetensors,
        config,
        assembly,
        tensors: safetensors::open_any(weights)?,
        tokenizer: TokenizerSource::Folder(folder.to_owned(), ids),
        notes: Vec::new(),
    })
}

fn open_meta(folder: &Path) -> Result<Checkpoint> {
    let shards: Vec<PthFile> = meta::shard_files(folder)?.iter().map(PthFile::open).collect::<Result<_>>()?;
    let config = meta::config(folder, &shards)?;
    let ids = ModelIds { num_embeddings: Some(config.vocab_size), ..ModelIds::default() };
    Ok(Checkpoint {
        path: folder.to_owned(),
        format: Format::Meta,
        tensors: meta::tensors(folder, shards, config.hidden_size)?,
        config,
        assembly: Assembly {
            naming: Naming::Meta,
            attention_bias: Bias::Never,
            mlp_bias: Bias::Never,
            output: OutputLayer::OwnIfPresent,
        },
        tokenizer: TokenizerSource::Folder(folder.to_owned(), ids),
        notes: Vec::new(),
    })
}

fn pytorch(path: &Path) -> Error {
    Error::unsupported(format!("a checkpoint in pickled PyTorch files (`{}`)", path.display()))
        .with_hint("convert it to safetensors, as transformers' `save_pretrained` writes them")
}
