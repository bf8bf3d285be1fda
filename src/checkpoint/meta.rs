//! Meta's own LLaMA checkpoints: a folder with `params.json` and `consolidated.NN.pth`.
//!
//! Names, sizes and how tensors are split over files: <https://github.com/meta-llama/llama-models>, as Llama 1 to 3 have
//! them. With several files each holds a part of every matrix, as one of as many devices needed it.
//!
//! Not for: the container (see [`super::pth`]), the vocabulary, or Hugging Face's layout of the same weights.

mod params;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::params::{PARAMS, check_keys, intermediate_size};
use super::files::read_json;
use super::gguf::TensorEntry;
use super::pickle::shown;
use super::pth::PthFile;
use super::tensors::{StoredDtype, StoredTensor, TensorData, Tensors};
use crate::arch::rope_scaling::Llama3Scaling;
use crate::attention::HeadLayout;
use crate::error::{Error, Result};
use crate::json::Object;
use crate::kernels::quant::{SharedBytes, WeightFormat};
use crate::kernels::vector::MAX_HEAD_DIM;
use crate::model::{Architecture, LlamaConfig, RopeLayout, RopeSettings};

/// Where a buffer's numbers begin: what PyTorch aligns storages to.
const ALIGNMENT: usize = 64;
/// Tokens of Llama 3's vocabulary.
const LLAMA3_VOCAB: usize = 128_256;

/// Finds the files with weights, in their order.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be read; [`Error::BadFile`] if it has no such file, or a number is left out.
pub fn shard_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::io("read", folder, source);
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix("consolidated.").and_then(|rest| rest.strip_suffix(".pth"));
        let number = number.and_then(|digits| Some((digits, digits.parse::<usize>().ok()?)));
        if let Some((_, number)) = number.filter(|(digits, number)| **digits == format!("{number:02}")) {
            found.insert(number, path);
        }
    }
    if found.is_empty() {
        return Err(Error::bad_file(folder, "it has no file `consolidated.00.pth`")
            .with_hint("give the folder of one of Meta's checkpoints"));
    }
    if let Some(missing) = (0..found.len()).find(|number| !found.contains_key(number)) {
        return Err(Error::bad_file(folder, format!("the file `consolidated.{missing:02}.pth` is missing"))
            .with_hint("fetch the checkpoint's files again"));
    }
    Ok(found.into_values().collect())
}

/// Reads the model's sizes from `params.json`, and compares them to the tensors.
///
/// Meta's files do not have the longest sequence that a model was made for. It is `max_seq_len` if that is given;
/// 131072 with Llama 3.1's scaling of positions; 8192 with Llama 3's vocabulary of 128256 tokens; 16384 with the
/// `rope_theta` of 1000000 that Code Llama has; 2048 with the `norm_eps` of 1e-6 that most of the first LLaMA have;
/// else 4096, as Llama 2's.
///
/// * `shards`: the files of [`shard_files`], all and in order
///
/// # Errors
/// [`Error::Io`] if `params.json` cannot be read; [`Error::Unsupported`] for a key in it that is not known, as it may
/// change what is to be computed; [`Error::BadFile`] for a value that makes no sense, or tensors that have other sizes or
/// are not the same ones in all files.
pub fn config(folder: &Path, shards: &[PthFile]) -> Result<LlamaConfig> {
    let path = folder.join(PARAMS);
    let json = read_json(&path)?;
    let params = Object::new(&json, &path)?;
    check_keys(&params)?;
    let first = shards.first().ok_or_else(|| Error::bad_file(folder, "it has no files with weights"))?;
    check_shards(shards)?;

    let hidden_size = params.required_size("dim")?;
    let num_layers = params.required_size("n_layers")?;
    if num_layers > first.tensors().len() {
        let reason = format!("{num_layers} layers, but `{}` has fewer", first.path().display());
        return Err(params.bad("n_layers", reason));
    }
    let num_heads = params.required_size("n_heads")?;
    let num_kv_heads = params.size("n_kv_heads")?.unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        let reason = format!("{num_heads} query heads cannot share {num_kv_heads} KV heads");
        return Err(params.bad("n_kv_heads", reason));
    }
    let head_dim = params.size("head_dim")?.unwrap_or(hidden_size / num_heads);
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        let reason = format!("a head dimension of {head_dim}, expected an even number up to {MAX_HEAD_DIM}");
        return Err(params.bad("n_heads", reason));
    }
    let intermediate_size = intermediate_size(&params, hidden_size)?;
    check_number_of_files(&path, first, shards.len(), num_heads.saturating_mul(head_dim), intermediate_size)?;
    for (name, key, heads) in [("wq", "n_heads", num_heads), ("wk", "n_kv_heads", num_kv_heads)] {
        let name = format!("layers.0.attention.{name}.weight");
        let rows = merged_shape(&name, shards, hidden_size)?[0];
        if Some(rows) != heads.checked_mul(head_dim) {
            let reason = format!("{heads} heads of {head_dim}, but tensor `{name}` has {rows} rows");
            return Err(params.bad(key, reason));
        }
    }

    let name = "layers.0.feed_forward.w1.weight";
    let rows = merged_shape(name, shards, hidden_size)?[0];
    if rows != intermediate_size {
        let reason = format!("an MLP of {intermediate_size}, but tensor `{name}` has {rows} rows");
        return Err(params.bad("multiple_of", reason));
    }

    let name = "tok_embeddings.weight";
    let vocab_size = merged_shape(name, shards, hidden_size)?[0];
    if let Some(given) = self::params::vocab_size(&params)?
        && given != vocab_size
    {
        return Err(params.bad("vocab_size", format!("{given} tokens, but tensor `{name}` has {vocab_size} rows")));
    }
    if first.tensors().contains_key("output.weight") {
        let rows = merged_shape("output.weight", shards, hidden_size)?[0];
        if rows != vocab_size {
            let reason = format!("tensor `output.weight` has {rows} rows, `{name}` {vocab_size}");
            return Err(first.error(reason));
        }
    }

    let theta = params.positive("rope_theta")?.unwrap_or(10_000.0);
    let scaled = params.flag("use_scaled_rope")?.unwrap_or(false);
    let epsilon = "a number from 0 to 1";
    let rms_norm_eps = params.typed("norm_eps", epsilon, |value| value.as_f64().filter(|x| (0.0..1.0).contains(x)))?;
    let rms_norm_eps = rms_norm_eps.ok_or_else(|| params.wrong("norm_eps", epsilon))?;
    let context_length = match params.size("max_seq_len")? {
        Some(given) => given,
        None if scaled => 131_072,
        None if vocab_size >= LLAMA3_VOCAB => 8192,
        None if theta == 1e6 => 16_384,
        None if rms_norm_eps == 1e-6 => 2048,
        None => 4096,
    };
    // Meta's code has 8 and 4 where nothing is given. Llama 3.2's `params.json` gives nothing either, but its text models
    // have 32 in every other layout, those that Meta published included.
    let is_llama_3_2 = matches!((hidden_size, num_layers), (2048, 16) | (3072, 28));
    let factor = params.positive("rope_scaling_factor")?.unwrap_or(if is_llama_3_2 { 32.0 } else { 8.0 });
    let high_freq = params.positive("rope_high_freq_factor")?.unwrap_or(4.0);
    if high_freq <= 1.0 {
        return Err(params.wrong("rope_high_freq_factor", "a number above 1"));
    }
    let mut rope = RopeSettings::plain(theta, head_dim, RopeLayout::Interleaved);
    if scaled {
        let scaling =
            Llama3Scaling { factor, low_freq_factor: 1.0, high_freq_factor: high_freq, original_context: 8192 };
        rope.scaling = "llama3";
        rope.frequency_divisors = scaling.divisors(theta, head_dim);
    }
    Ok(LlamaConfig {
        architecture: Architecture::Llama,
        hidden_size,
        intermediate_size,
        num_layers,
        heads: HeadLayout { num_heads, num_kv_heads, head_dim },
        vocab_size,
        rms_norm_eps,
        context_length,
        sliding_window: None,
        rope,
    })
}

/// Checks that all files hold the same names, and that merging needs no more memory than the files have bytes.
fn check_shards(shards: &[PthFile]) -> Result<()> {
    let Some((first, others)) = shards.split_first() else { return Ok(()) };
    for other in others {
        if let Some(name) = other.tensors().keys().find(|name| !first.tensors().contains_key(*name)) {
            let reason = format!("its tensor `{}` is not in `{}`", shown(name), first.path().display());
            return Err(other.error(reason));
        }
    }
    for shard in shards.iter().filter(|_| !others.is_empty()) {
        let len = (*shard.shared_bytes()).as_ref().len();
        if shard.tensor_bytes() > len {
            let reason = format!("its tensors of {} bytes share the file's {len} bytes", shard.tensor_bytes());
            return Err(shard.error(reason));
        }
    }
    Ok(())
}

/// Says that files are missing, if two matrices agree on how many the model was split into: each of its files has an equal
/// share of their rows.
///
/// * `params`: the path of `params.json`, for messages
/// * `queries`, `mlp`: rows of the query and gate matrices, as `params.json` tells
fn check_number_of_files(params: &Path, first: &PthFile, files: usize, queries: usize, mlp: usize) -> Result<()> {
    let number = |name: &str, rows: usize| {
        let part = *first.tensors().get(&format!("layers.0.{name}.weight"))?.shape.first()?;
        (part > 0 && rows.is_multiple_of(part)).then(|| rows / part)
    };
    let expected = number("attention.wq", queries).filter(|&count| number("feed_forward.w1", mlp) == Some(count));
    match expected {
        Some(expected) if expected > files => {
            let reason = format!(
                "it describes a model in {expected} files, `consolidated.00.pth` to `consolidated.{:02}.pth`, of which {files} are \
                 there",
                expected - 1
            );
            Err(Error::bad_file(params, reason).with_hint("fetch the files that are missing"))
        }
        Some(expected) if expected < files => {
            let reason = format!("it describes a model in {expected} files, and beside it are {files}");
            Err(Error::bad_file(params, reason).with_hint("keep the files of one model only in its folder"))
        }
        _ => Ok(()),
    }
}

/// The folder above a checkpoint's, if its tokenizer is there: Meta's own downloads have one `tokenizer.model` for the folders
/// of all sizes.
pub(super) fn tokenizer_above(folder: &Path) -> Option<PathBuf> {
    let has = |folder: &Path, name: &str| folder.join(name).is_file();
    if has(folder, "tokenizer.json") || has(folder, "tokenizer.model") {
        return None;
    }
    // As the path is written, and as the file system has it, which links may tell apart.
    let written = std::path::absolute(folder).ok();
    let real = folder.canonicalize().ok();
    let above = [written, real].into_iter().flatten().filter_map(|folder| folder.parent().map(Path::to_owned));
    above.into_iter().find(|above| has(above, "tokenizer.model"))
}

/// How the parts of a tensor in several files belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// One below the other.
    Rows,
    /// Side by side.
    Columns,
    /// Each file has all of it.
    Whole,
}

/// How a tensor is split over files.
///
/// * `name`: as in Meta's files, as `layers.0.attention.wq.weight`
/// * `columns`: of the tensor in one file
/// * `shards`: number of files
/// * `hidden_size`: width of the residual stream; it tells how the embeddings are split, by columns up to Llama 2 and
///   by rows since
///
/// Returns none if it is no tensor of LLaMA.
#[must_use]
pub fn split(name: &str, columns: usize, shards: usize, hidden_size: usize) -> Option<Split> {
    let name = match name.strip_prefix("layers.") {
        Some(rest) => {
            let (layer, name) = rest.split_once('.')?;
            layer.parse::<usize>().ok()?;
            name
        }
        None => match name {
            "tok_embeddings.weight" if columns == hidden_size => return Some(Split::Rows),
            "tok_embeddings.weight" if columns.checked_mul(shards) == Some(hidden_size) => return Some(Split::Columns),
            "output.weight" => return Some(Split::Rows),
            "norm.weight" | "rope.freqs" => return Some(Split::Whole),
            _ => return None,
        },
    };
    match name {
        "attention.wq.weight"
        | "attention.wk.weight"
        | "attention.wv.weight"
        | "feed_forward.w1.weight"
        | "feed_forward.w3.weight" => Some(Split::Rows),
        "attention.wo.weight" | "feed_forward.w2.weight" => Some(Split::Columns),
        "attention_norm.weight" | "ffn_norm.weight" | "attention.inner_attention.rope.freqs" => Some(Split::Whole),
        _ => None,
    }
}

/// A tensor of all files together.
#[derive(Clone)]
pub struct Merged {
    /// The mapped file, or a buffer of its own.
    pub bytes: SharedBytes,
    /// Where in them the tensor lies, aligned to its numbers.
    pub range: Range<usize>,
    /// Type of the numbers, as in the files.
    pub dtype: WeightFormat,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl std::fmt::Debug for Merged {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Merged({:?} {:?} at {:?})", self.dtype, self.shape, self.range)
    }
}

/// The parts of a tensor, and what they make together.
struct Parts<'a> {
    entries: Vec<&'a TensorEntry>,
    split: Split,
    shape: Vec<usize>,
}

impl<'a> Parts<'a> {
    fn find(name: &str, shards: &'a [PthFile], hidden_size: usize) -> Result<Self> {
        let mut entries: Vec<&TensorEntry> = Vec::with_capacity(shards.len());
        for shard in shards {
            let entry = shard.tensors().get(name);
            let entry = entry.ok_or_else(|| shard.error(format!("tensor `{}` is missing", shown(name))))?;
            if let Some(first) = entries.first()
                && (first.dtype != entry.dtype || first.shape != entry.shape)
            {
                return Err(shard.error(format!(
                    "tensor `{}` is {:?} {:?}, in the first file {:?} {:?}",
                    shown(name),
                    entry.dtype,
                    entry.shape,
                    first.dtype,
                    first.shape
                )));
            }
            entries.push(entry);
        }
        let (Some(first), Some(shard)) = (entries.first(), shards.first()) else {
            return Err(Error::input("a checkpoint without files has no tensors"));
        };
        let part = &first.shape;
        let columns = part.last().copied().unwrap_or(1);
        let split = split(name, columns, shards.len(), hidden_size).ok_or_else(|| {
            let reason =
                format!("tensor `{}` {part:?} in {} files does not belong to LLaMA", shown(name), shards.len());
            shard.error(reason)
        })?;
        let dims = if split == Split::Whole { 1 } else { 2 };
        if part.len() != dims {
            return Err(shard.error(format!("tensor `{}` {part:?} has not {dims} dimensions", shown(name))));
        }
        let mut shape = part.clone();
        let at = match split {
            Split::Rows => Some(0),
            Split::Columns => Some(1),
            Split::Whole => None,
        };
        if let Some(at) = at {
            // No overflow: the parts lie in files that are mapped.
            shape[at] = shape[at].saturating_mul(shards.len());
        }
        Ok(Self { entries, split, shape })
    }
}

/// All tensors by name, to be put together when they are asked for.
///
/// * `folder`: for messages
/// * `shards`, `hidden_size`: as for [`merge`]
///
/// # Errors
/// As [`merge`], but for tensors that do not belong to LLaMA: these are handed over as the first file has them.
pub fn tensors(folder: &Path, shards: Vec<PthFile>, hidden_size: usize) -> Result<Tensors> {
    let mut tensors = Tensors::new(folder);
    let shards: Arc<[PthFile]> = shards.into();
    let Some(first) = shards.first() else { return Ok(tensors) };
    for (name, entry) in first.tensors() {
        let columns = entry.shape.last().copied().unwrap_or(1);
        let (shape, data) = if split(name, columns, shards.len(), hidden_size).is_some() {
            let Parts { entries, split, shape } = Parts::find(name, &shards, hidden_size)?;
            let parts = if split == Split::Whole { 1 } else { entries.len() };
            let (name, shards) = (name.clone(), Arc::clone(&shards));
            let make = move || merge(&name, &shards, hidden_size).map(|Merged { bytes, range, .. }| (bytes, range));
            (shape, TensorData::Made { len: entry.range.len() * parts, make: Arc::new(make) })
        } else {
            (entry.shape.clone(), TensorData::Mapped { owner: first.shared_bytes(), range: entry.range.clone() })
        };
        let dtype = StoredDtype::Usable(entry.dtype);
        tensors.insert(name.clone(), StoredTensor { path: first.path().into(), dtype, shape, data })?;
    }
    Ok(tensors)
}

/// Sizes of a tensor of all files together.
///
/// # Errors
/// As [`merge`].
pub fn merged_shape(name: &str, shards: &[PthFile], hidden_size: usize) -> Result<Vec<usize>> {
    Ok(Parts::find(name, shards, hidden_size)?.shape)
}

/// Puts the parts of a tensor together.
///
/// From one file, or if each file has all of it, it stays where it is; else it is copied to a buffer, and the files'
/// pages are given back to the operating system: at most, memory is needed for the weights and this tensor once more. A
/// tensor that is not aligned to its numbers is copied too.
///
/// * `shards`: all files, in order
/// * `hidden_size`: width of the residual stream, see [`split`]
///
/// # Errors
/// [`Error::BadFile`] if a file lacks the tensor, the parts are not alike, or it does not belong to LLaMA.
pub fn merge(name: &str, shards: &[PthFile], hidden_size: usize) -> Result<Merged> {
    let Parts { entries, split, shape } = Parts::find(name, shards, hidden_size)?;
    let first = entries[0];
    let dtype = first.dtype;
    let (bytes, range): (SharedBytes, _) = match split {
        Split::Rows | Split::Columns if shards.len() > 1 => {
            let maps: Vec<SharedBytes> = shards.iter().map(PthFile::shared_bytes).collect();
            let parts: Vec<&[u8]> =
                maps.iter().zip(&entries).map(|(map, entry)| &(**map).as_ref()[entry.range.clone()]).collect();
            let row = first.shape[1] * dtype.block_bytes();
            let chunk = if split == Split::Rows { first.range.len() } else { row };
            let (buffer, range) = interleave(&parts, chunk);
            for (shard, entry) in shards.iter().zip(&entries) {
                shard.release(entry.range.clone());
            }
            (Arc::new(buffer), range)
        }
        _ => {
            let map = shards[0].shared_bytes();
            let part = &(*map).as_ref()[first.range.clone()];
            if (part.as_ptr() as usize).is_multiple_of(dtype.block_bytes()) {
                (map, first.range.clone())
            } else {
                let (buffer, range) = interleave(&[part], part.len());
                shards[0].release(first.range.clone());
                (Arc::new(buffer), range)
            }
        }
    };
    Ok(Merged { bytes, range, dtype, shape })
}

/// Takes `chunk` bytes of each part in turn, to a buffer's aligned range.
fn interleave(parts: &[&[u8]], chunk: usize) -> (Vec<u8>, Range<usize>) {
    let len = parts.iter().map(|part| part.len()).sum::<usize>();
    let mut buffer: Vec<u8> = Vec::with_capacity(len + ALIGNMENT);
    let start = buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    buffer.resize(start, 0);
    let mut chunks: Vec<_> = parts.iter().map(|part| part.chunks(chunk)).collect();
    while let Some(chunk) = chunks.first_mut().and_then(Iterator::next) {
        buffer.extend_from_slice(chunk);
        for other in &mut chunks[1..] {
            buffer.extend_from_slice(other.next().unwrap_or_default());
        }
    }
    let end = buffer.len();
    (buffer, start..end)
}

#[cfg(test)]
mod tests;
