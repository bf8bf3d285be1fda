//! Finding out what a path is: which layout a file or a folder has, and, of those that hold no usable model, what they are.
//!
//! Not for: reading a format.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::files::{self, read_json};
use super::weights::{Assembly, Bias, Naming, OutputLayer};
use super::{Checkpoint, Format, PthFile, TokenizerSource, gguf, gguf_config, hf_config, meta, safetensors, tied};
use crate::error::{Error, Result};
use crate::tokenizer::ModelIds;

/// What can be given as a model.
const HINT: &str =
    "give a GGUF file, a folder with config.json and safetensors files, or one with params.json and consolidated.*.pth";
/// What says that a folder holds an adapter.
const ADAPTER_CONFIG: &str = "adapter_config.json";
/// How the names of adapters' weights begin.
const ADAPTER: &str = "adapter_model.";

/// Weights that are not read, by how their names end.
const FOREIGN_WEIGHTS: [(&str, &str); 9] = [
    (".onnx", "a model in ONNX format"),
    (".h5", "weights of TensorFlow or Keras"),
    (".msgpack", "weights of Flax"),
    (".ckpt.index", "weights of TensorFlow"),
    (".npz", "weights of MLX or NumPy"),
    (".tflite", "a model of TensorFlow Lite"),
    (".pte", "a model of ExecuTorch"),
    (".ckpt", "a checkpoint in pickled PyTorch files"),
    (".pt", "a checkpoint in pickled PyTorch files"),
];

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
    if name.starts_with(ADAPTER) || name == ADAPTER_CONFIG {
        return Err(adapter(folder));
    }
    if name.ends_with(".safetensors.index.json") {
        open_hugging_face(path, folder, path)
    } else if safetensors::is_mistrals(&name) {
        Err(mistrals(path))
    } else if name.ends_with(".safetensors") {
        // A part of a model means the model.
        let index = folder.join(safetensors::INDEX_NAME);
        let is_part = name.contains("-of-") && index.is_file();
        open_hugging_face(path, folder, if is_part { &index } else { path })
    } else if name.ends_with(".pth") || name == "params.json" {
        open_meta(folder)
    } else if name == "config.json" {
        open_folder(folder)
    } else if name.starts_with("pytorch_model") && (name.ends_with(".bin") || name.ends_with(".bin.index.json")) {
        Err(pytorch(path))
    } else {
        open_gguf(path)
    }
}

fn open_folder(folder: &Path) -> Result<Checkpoint> {
    let is_file = |name: &str| folder.join(name).is_file();
    if is_file(ADAPTER_CONFIG) {
        return Err(adapter(folder));
    }
    if let Some(weights) = safetensors::find_in(folder)?
        && (is_file("config.json") || !is_file("params.json"))
    {
        let mut checkpoint = open_hugging_face(folder, folder, &weights)?;
        if weights.ends_with(safetensors::SINGLE_NAME) && is_file(safetensors::INDEX_NAME) {
            checkpoint.notes.push(format!(
                "`{}` holds `{}` and the index of several files: the single file is taken, as transformers does",
                folder.display(),
                safetensors::SINGLE_NAME
            ));
        }
        return Ok(checkpoint);
    }
    if let Some(weights) =
        files::with_suffix(folder, ".safetensors")?.iter().find(|path| safetensors::is_mistrals(&name_of(path)))
    {
        return Err(mistrals(weights));
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
    let mut seen = HashSet::new();
    models.retain(|path| gguf::PartName::parse(path).is_none_or(|part| seen.insert(part.path(0))));
    match &models[..] {
        [only] => open_gguf(only),
        [] => Err(no_model(folder)),
        several => Err(Error::bad_file(folder, format!("it holds {} models in GGUF format", several.len()))
            .with_hint("give the path of one of the files")),
    }
}

fn open_gguf(path: &Path) -> Result<Checkpoint> {
    let parts = gguf::open_parts(path)?;
    let tensors = gguf::tensors(&parts)?;
    let first = parts.into_iter().next().ok_or_else(|| Error::bad_file(path, "it has no parts"))?;
    let config = gguf_config::config(&first, &tensors)?;
    Ok(Checkpoint {
        path: path.to_owned(),
        format: Format::Gguf,
        config,
        assembly: Assembly {
            naming: Naming::Gguf,
            attention_bias: Bias::IfPresent,
            attention_output_bias: Bias::IfPresent,
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
    let hf_config::HfConfig { config, mut assembly, ids, mut notes } = hf_config::read(folder)?;
    let mut tensors = safetensors::open_any(weights)?;
    if assembly.output == OutputLayer::Tied {
        let (output, note) = tied::resolve(&mut tensors, assembly.naming)?;
        assembly.output = output;
        notes.extend(note);
    }
    if weights.ends_with(safetensors::SINGLE_NAME) && folder.join(safetensors::INDEX_NAME).is_file() {
        tensors.set_hint(format!(
            "if the model is in the several files that `{}` names, give its path, or take `{}` away",
            safetensors::INDEX_NAME,
            safetensors::SINGLE_NAME
        ));
    }
    Ok(Checkpoint {
        path: path.to_owned(),
        format: Format::Safetensors,
        config,
        assembly,
        tensors,
        tokenizer: TokenizerSource::Folder(folder.to_owned(), ids),
        notes,
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
            attention_output_bias: Bias::Never,
            mlp_bias: Bias::Never,
            output: OutputLayer::OwnIfPresent,
        },
        tokenizer: TokenizerSource::Folder(folder.to_owned(), ids),
        notes: Vec::new(),
    })
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn mistrals(path: &Path) -> Error {
    Error::unsupported(format!("Mistral's own layout of a model (`{}`)", path.display())).with_hint(
        "take the files in Hugging Face's layout from the same place (config.json and model*.safetensors), or a GGUF file",
    )
}

fn pytorch(path: &Path) -> Error {
    Error::unsupported(format!("a checkpoint in pickled PyTorch files (`{}`)", path.display()))
        .with_hint("convert it to safetensors, as transformers' `save_pretrained` writes them")
}

/// Names an adapter, and its base model if it can be told.
fn adapter(folder: &Path) -> Error {
    let config = read_json(&folder.join(ADAPTER_CONFIG)).ok();
    let base = config.as_ref().and_then(|config| config.get("base_model_name_or_path")).and_then(Value::as_str);
    let base =
        base.filter(|base| !base.is_empty() && base.len() < 200).map(|base| format!(" `{base}`")).unwrap_or_default();
    Error::unsupported(format!("an adapter (LoRA), which is no model by itself (`{}`)", folder.display())).with_hint(format!(
        "merge it into its base model{base} with peft's `merge_and_unload`, save that, and give its folder; if the weights in \
         the folder are merged already, take `{ADAPTER_CONFIG}` away"
    ))
}

/// Says what a folder holds instead of a model.
fn no_model(folder: &Path) -> Error {
    let names: Vec<String> = match std::fs::read_dir(folder) {
        Ok(entries) => entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
        Err(source) => return Error::io("read", folder, source),
    };
    let mut sorted: Vec<&String> = names.iter().collect();
    sorted.sort();
    let foreign = sorted.iter().find_map(|name| {
        let lower = name.to_ascii_lowercase();
        let (_, what) = FOREIGN_WEIGHTS.iter().find(|(suffix, _)| lower.ends_with(suffix))?;
        Some((folder.join(name), *what))
    });
    if let Some((path, what)) = foreign {
        return Error::unsupported(format!("{what} (`{}`)", path.display()))
            .with_hint("take the model in safetensors or GGUF format");
    }
    let has = |name: &str| names.iter().any(|other| other == name);
    if names.iter().any(|name| {
        name.starts_with("consolidated.") && Path::new(name).extension().is_some_and(|extension| extension == "pth")
    }) {
        return Error::bad_file(folder, "it holds Meta's files of a model, and no `params.json`")
            .with_hint("fetch `params.json` as well: it tells the model's sizes");
    }
    let reason = if ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"].into_iter().any(has) {
        "it holds no model, only a tokenizer: neither safetensors files, nor params.json, nor a GGUF file"
    } else {
        "it holds no model: neither safetensors files, nor params.json, nor a GGUF file"
    };
    let folders: Vec<PathBuf> = sorted.iter().map(|name| folder.join(name)).filter(|path| path.is_dir()).collect();
    let inner = folders.iter().find(|path| path.join("config.json").is_file() || path.join("params.json").is_file());
    let hint = inner.map_or_else(|| HINT.to_owned(), |inner| format!("did you mean `{}`?", inner.display()));
    Error::bad_file(folder, reason).with_hint(hint)
}
