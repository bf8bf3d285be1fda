//! Meta's own LLaMA checkpoints: a folder with `params.json` and `consolidated.NN.pth`.
//!
//! Names, sizes and how tensors are split over files: <https://github.com/meta-llama/llama-models>, as Llama 1 to 3 have
//! them. With several files each holds a part of every matrix, as one of as many devices needed it.
//!
//! Not for: the container (see [`super::pth`]), the vocabulary, or Hugging Face's layout of the same weights.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use serde_json::{Map, Value};

use super::gguf::TensorEntry;
use super::pickle::shown;
use super::pth::PthFile;
use super::tensors::{StoredDtype, StoredTensor, TensorData, Tensors};
use crate::attention::HeadLayout;
use crate::error::{Error, Result};
use crate::json::bytes_without_bom;
use crate::kernels::quant::SharedBytes;
use crate::kernels::vector::MAX_HEAD_DIM;
use crate::model::rope_scaling::Llama3Scaling;
use crate::model::{LlamaConfig, RopeLayout, RopeSettings};

/// The file with the sizes.
const PARAMS: &str = "params.json";
/// Bytes of it; Meta's have 200.
const MAX_PARAMS: u64 = 1 << 20;
/// Where a buffer's numbers begin: what PyTorch aligns storages to.
const ALIGNMENT: usize = 64;
/// Tokens of Llama 3's vocabulary.
const LLAMA3_VOCAB: usize = 128_256;

/// Keys of `params.json` that are read.
const KEYS: [&str; 14] = [
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "rope_high_freq_factor",
    "head_dim",
    "max_seq_len",
];
/// Keys of `params.json` that do not change what is computed.
const IGNORED_KEYS: [&str; 3] = ["max_batch_size", "model_parallel_size", "model_type"];

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
    let params = Params::read(&folder.join(PARAMS))?;
    let first = shards.first().ok_or_else(|| Error::bad_file(folder, "it has no files with weights"))?;
    check_shards(shards)?;

    let hidden_size = params.required("dim")?;
    let num_layers = params.required("n_layers")?;
    if num_layers > first.tensors().len() {
        return Err(
            params.wrong("n_layers", &format!("{num_layers} layers, but `{}` has fewer", first.path().display()))
        );
    }
    let num_heads = params.required("n_heads")?;
    let num_kv_heads = params.whole("n_kv_heads")?.unwrap_or(num_heads);
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        let reason = format!("{num_heads} query heads cannot share {num_kv_heads} KV heads");
        return Err(params.wrong("n_kv_heads", &reason));
    }
    let head_dim = params.whole("head_dim")?.unwrap_or(hidden_size / num_heads);
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        let reason = format!("a head dimension of {head_dim}, expected an even number up to {MAX_HEAD_DIM}");
        return Err(params.wrong("n_heads", &reason));
    }
    for (name, key, heads) in [("wq", "n_heads", num_heads), ("wk", "n_kv_heads", num_kv_heads)] {
        let name = format!("layers.0.attention.{name}.weight");
        let rows = merged_shape(&name, shards, hidden_size)?[0];
        if Some(rows) != heads.checked_mul(head_dim) {
            let reason = format!("{heads} heads of {head_dim}, but tensor `{name}` has {rows} rows");
            return Err(params.wrong(key, &reason));
        }
    }

    let intermediate_size = params.intermediate_size(hidden_size)?;
    let name = "layers.0.feed_forward.w1.weight";
    let rows = merged_shape(name, shards, hidden_size)?[0];
    if rows != intermediate_size {
        let reason = format!("an MLP of {intermediate_size}, but tensor `{name}` has {rows} rows");
        return Err(params.wrong("multiple_of", &reason));
    }

    let name = "tok_embeddings.weight";
    let vocab_size = merged_shape(name, shards, hidden_size)?[0];
    if let Some(given) = params.vocab_size()?
        && given != vocab_size
    {
        return Err(params.wrong("vocab_size", &format!("{given} tokens, but tensor `{name}` has {vocab_size} rows")));
    }
    if first.tensors().contains_key("output.weight") {
        let rows = merged_shape("output.weight", shards, hidden_size)?[0];
        if rows != vocab_size {
            let reason = format!("tensor `output.weight` has {rows} rows, `{name}` {vocab_size}");
            return Err(first.error(reason));
        }
    }

    let theta = params.positive("rope_theta")?.unwrap_or(10_000.0);
    let scaled = params.flag("use_scaled_rope")?;
    let rms_norm_eps = params.float("norm_eps")?.ok_or_else(|| params.wrong("norm_eps", "it is missing"))?;
    if !(0.0..1.0).contains(&rms_norm_eps) {
        return Err(params.wrong("norm_eps", &format!("expected a number from 0 to 1, got {rms_norm_eps}")));
    }
    let context_length = match params.whole("max_seq_len")? {
        Some(0) => return Err(params.wrong("max_seq_len", "expected at least 1, got 0")),
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
        return Err(params.wrong("rope_high_freq_factor", &format!("expected more than 1, got {high_freq}")));
    }
    let mut rope = RopeSettings::plain(theta, head_dim, RopeLayout::Interleaved);
    if scaled {
        let scaling =
            Llama3Scaling { factor, low_freq_factor: 1.0, high_freq_factor: high_freq, original_context: 8192 };
        rope.scaling = "llama3";
        rope.frequency_divisors = scaling.divisors(theta, head_dim);
    }
    Ok(LlamaConfig {
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
        "attention_norm.weight" | "ffn_norm.weight" => Some(Split::Whole),
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
    pub dtype: GgmlDType,
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
            let row = first.shape[1] * dtype.type_size();
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
            if (part.as_ptr() as usize).is_multiple_of(dtype.type_size()) {
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

/// The content of `params.json`.
struct Params {
    path: PathBuf,
    values: Map<String, Value>,
}

impl Params {
    fn read(path: &Path) -> Result<Self> {
        const HINT: &str = "the file belongs beside `consolidated.00.pth`";
        let metadata = std::fs::metadata(path).map_err(|source| Error::io("open", path, source).with_hint(HINT))?;
        if !metadata.is_file() || metadata.len() > MAX_PARAMS {
            return Err(Error::bad_file(path, format!("it is no file of at most {MAX_PARAMS} bytes")).with_hint(HINT));
        }
        let file = std::fs::File::open(path).map_err(|source| Error::io("open", path, source))?;
        let mut bytes = Vec::new();
        file.take(MAX_PARAMS).read_to_end(&mut bytes).map_err(|source| Error::io("read", path, source))?;
        let values: Map<String, Value> = serde_json::from_slice(bytes_without_bom(&bytes))
            .map_err(|error| Error::bad_file(path, format!("it is not a JSON object: {error}")).with_hint(HINT))?;
        if let Some(key) = values.keys().find(|key| !KEYS.iter().chain(&IGNORED_KEYS).any(|known| known == key)) {
            return Err(Error::unsupported(format!("the key `{}` in `{}`", shown(key), path.display())).with_hint(
                "plain LLaMA models in floats are computed, without experts, images, adapters or 8-bit weights",
            ));
        }
        Ok(Self { path: path.to_owned(), values })
    }

    fn wrong(&self, key: &str, reason: &str) -> Error {
        Error::bad_file(&self.path, format!("`{key}`: {reason}"))
    }

    fn get<T>(&self, key: &str, kind: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match convert(value) {
                Some(converted) => Ok(Some(converted)),
                None => Err(self.wrong(key, &format!("expected {kind}, got {}", shown(&value.to_string())))),
            },
        }
    }

    fn whole(&self, key: &str) -> Result<Option<usize>> {
        let whole = |value: &Value| value.as_u64().filter(|&number| number <= 1 << 30);
        self.get(key, "a whole number up to 2^30", |value| usize::try_from(whole(value)?).ok())
    }

    fn required(&self, key: &str) -> Result<usize> {
        match self.whole(key)? {
            Some(0) => Err(self.wrong(key, "expected at least 1, got 0")),
            Some(number) => Ok(number),
            None => Err(self.wrong(key, "it is missing")),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number above 0", |value| value.as_f64().filter(|number| number.is_finite() && *number > 0.0))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.get(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// Number of tokens; none if the tensors are to tell it.
    fn vocab_size(&self) -> Result<Option<usize>> {
        if self.values.get("vocab_size").and_then(Value::as_i64) == Some(-1) {
            Ok(None)
        } else {
            self.whole("vocab_size")
        }
    }

    /// Width inside of the MLP by Meta's formula.
    fn intermediate_size(&self, hidden_size: usize) -> Result<usize> {
        let multiple_of = self.whole("multiple_of")?.unwrap_or(256);
        if multiple_of == 0 {
            return Err(self.wrong("multiple_of", "expected at least 1, got 0"));
        }
        let mut width = 2 * (4 * hidden_size) / 3;
        if let Some(multiplier) = self.positive("ffn_dim_multiplier")? {
            // Python's `int(multiplier * width)`; casting saturates, and what is absurd fits no tensor.
            #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let scaled = (multiplier * width as f64) as usize;
            width = scaled;
        }
        let rounded = width.checked_next_multiple_of(multiple_of);
        rounded.ok_or_else(|| self.wrong("ffn_dim_multiplier", "the MLP would be absurdly large"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::pth::tests::checkpoint_of;
    use super::*;

    const HIDDEN: usize = 8;
    const LLAMA3: &str = r#"{"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 6, "multiple_of": 4,
        "ffn_dim_multiplier": 1.2, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": true}"#;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fixtures").join(name)
    }

    fn open(folder: &Path) -> Vec<PthFile> {
        shard_files(folder).unwrap().iter().map(|path| PthFile::open(path).unwrap()).collect()
    }

    fn bytes(merged: &Merged) -> &[u8] {
        &(*merged.bytes).as_ref()[merged.range.clone()]
    }

    fn floats(merged: &Merged) -> Vec<f32> {
        bytes(merged).as_chunks::<4>().0.iter().map(|&number| f32::from_le_bytes(number)).collect()
    }

    /// One of two files of a model with one layer, as Llama 3 splits it. Numbers tell the file and the place.
    #[expect(clippy::cast_precision_loss)]
    fn half(shard: usize, change: impl FnOnce(&mut Vec<(String, Vec<usize>)>)) -> Vec<u8> {
        let layer = |name: &str, shape: &[usize]| (format!("layers.0.{name}.weight"), shape.to_vec());
        let mut shapes = vec![
            ("tok_embeddings.weight".to_owned(), vec![3, HIDDEN]),
            ("output.weight".to_owned(), vec![3, HIDDEN]),
            ("norm.weight".to_owned(), vec![HIDDEN]),
            layer("attention.wq", &[4, HIDDEN]),
            layer("attention.wk", &[4, HIDDEN]),
            layer("attention.wv", &[4, HIDDEN]),
            layer("attention.wo", &[HIDDEN, 4]),
            layer("feed_forward.w1", &[14, HIDDEN]),
            layer("feed_forward.w2", &[HIDDEN, 14]),
            layer("feed_forward.w3", &[14, HIDDEN]),
            layer("attention_norm", &[HIDDEN]),
            layer("ffn_norm", &[HIDDEN]),
        ];
        change(&mut shapes);
        let numbers = |len: usize| (0..len).map(|i| (1000 * shard + i) as f32).collect();
        let tensors = shapes.into_iter().map(|(name, shape)| {
            let len = shape.iter().product();
            (name, shape, numbers(len))
        });
        checkpoint_of(&tensors.collect::<Vec<_>>())
    }

    fn folder(params: &str, shards: &[Vec<u8>]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(PARAMS), params).unwrap();
        for (number, bytes) in shards.iter().enumerate() {
            std::fs::write(folder.path().join(format!("consolidated.{number:02}.pth")), bytes).unwrap();
        }
        folder
    }

    fn config_of(params: &str) -> Result<LlamaConfig> {
        let folder = folder(params, &[half(0, |_| ()), half(1, |_| ())]);
        config(folder.path(), &open(folder.path()))
    }

    #[track_caller]
    fn refused(params: &str, names: &[&str]) {
        let error = config_of(params).unwrap_err().to_string();
        assert!(error.contains(PARAMS) && names.iter().all(|name| error.contains(name)), "{error}");
    }

    #[test]
    fn halves_are_the_whole() {
        let (one, two) = (open(&fixture("meta-1shard")), open(&fixture("meta-2shard")));
        assert_eq!((one.len(), two.len()), (1, 2));
        let sizes = config(&fixture("meta-1shard"), &one).unwrap();
        assert_eq!(sizes, config(&fixture("meta-2shard"), &two).unwrap());
        assert_eq!((sizes.vocab_size, sizes.intermediate_size, sizes.context_length), (1000, 172, 4096));
        assert_eq!(sizes.heads, HeadLayout { num_heads: 4, num_kv_heads: 4, head_dim: 16 });
        assert_eq!((sizes.rope.theta, sizes.rope.dim), (10_000.0, 16));
        for (name, entry) in one[0].tensors() {
            let (whole, merged) = (merge(name, &one, 64).unwrap(), merge(name, &two, 64).unwrap());
            assert_eq!((whole.dtype, &whole.shape), (entry.dtype, &entry.shape), "{name}");
            assert_eq!((merged.dtype, &merged.shape), (entry.dtype, &entry.shape), "{name}");
            assert!(bytes(&whole) == bytes(&merged), "{name}");
            assert_eq!(whole.range, entry.range, "{name} is not copied");
            assert_eq!(bytes(&merged).as_ptr().align_offset(2), 0, "{name}");
            // The pages that were given back are still there.
            assert!(bytes(&merged) == bytes(&merge(name, &two, 64).unwrap()), "{name}");
        }
    }

    #[test]
    fn llama_3_splits_embeddings_by_rows() {
        let folder = folder(LLAMA3, &[half(0, |_| ()), half(1, |_| ())]);
        let shards = open(folder.path());
        let embeddings = merge("tok_embeddings.weight", &shards, HIDDEN).unwrap();
        assert_eq!(embeddings.shape, [6, HIDDEN]);
        assert_eq!(floats(&embeddings)[22..26], [22.0, 23.0, 1000.0, 1001.0]);
        let output = merge("layers.0.attention.wo.weight", &shards, HIDDEN).unwrap();
        assert_eq!(output.shape, [HIDDEN, HIDDEN]);
        assert_eq!(floats(&output)[..10], [0.0, 1.0, 2.0, 3.0, 1000.0, 1001.0, 1002.0, 1003.0, 4.0, 5.0]);
        // These tests' archives do not align anything: what is taken from one file may have to be copied.
        let norm = merge("norm.weight", &shards, HIDDEN).unwrap();
        assert_eq!(bytes(&norm).as_ptr().align_offset(4), 0);
        assert_eq!(floats(&norm)[..2], [0.0, 1.0]);

        let sizes = config(folder.path(), &shards).unwrap();
        assert_eq!((sizes.vocab_size, sizes.intermediate_size, sizes.context_length), (6, 28, 131_072));
        let scaling =
            Llama3Scaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        assert_eq!(sizes.rope.frequency_divisors, scaling.divisors(500_000.0, 4));
    }

    #[test]
    fn widths_of_metas_models() {
        for (dim, multiple_of, multiplier, width) in [
            (4096, 256, "null", 11_008),
            (5120, 256, "null", 13_824),
            (8192, 256, "null", 22_016),
            (8192, 4096, "1.3", 28_672),
            (4096, 1024, "1.3", 14_336),
            (16_384, 4096, "1.2", 53_248),
            (2048, 256, "1.5", 8192),
            (3072, 256, "1.0", 8192),
        ] {
            let text = format!(r#"{{"multiple_of": {multiple_of}, "ffn_dim_multiplier": {multiplier}}}"#);
            let params = Params { path: PathBuf::new(), values: serde_json::from_str(&text).unwrap() };
            assert_eq!(params.intermediate_size(dim).unwrap(), width);
        }
    }

    #[test]
    fn context_lengths() {
        let with = |add: &str| {
            let plain = LLAMA3.replace(r#", "use_scaled_rope": true"#, "").replace("500000.0", "10000");
            config_of(&plain.replace('}', &format!("{add}}}"))).unwrap().context_length
        };
        assert_eq!(with(""), 4096);
        assert_eq!(with(r#", "norm_eps": 1e-06"#), 2048);
        assert_eq!(with(r#", "rope_theta": 1000000.0"#), 16_384);
        assert_eq!(with(r#", "max_seq_len": 512"#), 512);
    }

    #[test]
    fn params_that_do_not_fit_are_refused() {
        let change = |from: &str, to: &str| {
            assert!(LLAMA3.contains(from));
            LLAMA3.replace(from, to)
        };
        refused("[]", &["JSON"]);
        refused("", &["JSON"]);
        refused("{}", &["`dim`", "missing"]);
        refused(&change("\"dim\"", "\"moe\": {}, \"dim\""), &["`moe`"]);
        refused(&change("\"dim\"", "\"vision_chunk_size\": 448, \"dim\""), &["`vision_chunk_size`"]);
        refused(&change("\"dim\": 8", "\"dim\": -8"), &["`dim`", "-8"]);
        refused(&change("\"dim\": 8", "\"dim\": 1e300"), &["`dim`"]);
        refused(&change("\"dim\": 8", "\"dim\": 0"), &["`dim`", "0"]);
        refused(&change("\"n_layers\": 1", "\"n_layers\": 1000000"), &["`n_layers`", "1000000"]);
        refused(&change("\"n_heads\": 2", "\"n_heads\": 4"), &["`n_kv_heads`", "wk"]);
        refused(&change("\"n_heads\": 2", "\"n_heads\": 9"), &["`n_kv_heads`"]);
        refused(&change("\"n_heads\": 2", "\"n_heads\": 8"), &["`n_heads`", "head dimension"]);
        refused(&change("\"n_kv_heads\": 2", "\"n_kv_heads\": 0"), &["`n_kv_heads`"]);
        refused(&change("\"n_kv_heads\": 2", "\"n_kv_heads\": 1"), &["`n_kv_heads`", "wk"]);
        refused(&change("\"vocab_size\": 6", "\"vocab_size\": 7"), &["`vocab_size`", "6 rows"]);
        refused(&change("\"multiple_of\": 4", "\"multiple_of\": 0"), &["`multiple_of`"]);
        refused(&change("\"multiple_of\": 4", "\"multiple_of\": 32"), &["`multiple_of`", "32", "28 rows"]);
        refused(&change("1.2", "1e300"), &["`ffn_dim_multiplier`"]);
        refused(&change("1.2", "-1"), &["`ffn_dim_multiplier`"]);
        refused(&change("1e-05", "\"small\""), &["`norm_eps`", "small"]);
        refused(&change("500000.0", "0"), &["`rope_theta`"]);
        refused(&change("true", "\"yes\""), &["`use_scaled_rope`"]);
    }

    #[test]
    fn files_that_do_not_fit_together_are_refused() {
        let error = |shards: &[Vec<u8>]| {
            let folder = folder(LLAMA3, shards);
            config(folder.path(), &open(folder.path())).unwrap_err().to_string()
        };
        let good = || half(0, |_| ());
        assert!(error(&[good()]).contains("4 rows"));
        let missing = error(&[good(), half(1, |shapes| shapes.retain(|(name, _)| !name.contains("w1")))]);
        assert!(missing.contains("consolidated.01.pth") && missing.contains("w1"), "{missing}");
        let extra = error(&[good(), half(1, |shapes| shapes.push(("extra".to_owned(), vec![1])))]);
        assert!(extra.contains("consolidated.01.pth") && extra.contains("`extra`"), "{extra}");
        let other = error(&[good(), half(1, |shapes| shapes[3].1 = vec![2, HIDDEN])]);
        assert!(other.contains("[2, 8]") && other.contains("[4, 8]"), "{other}");
        let embeddings = error(&[3, 3].map(|columns| half(0, |shapes| shapes[0].1 = vec![3, columns])));
        assert!(embeddings.contains("tok_embeddings"), "{embeddings}");
        let flat = error(&[0, 1].map(|shard| half(shard, |shapes| shapes[3].1 = vec![32])));
        assert!(flat.contains("2 dimensions"), "{flat}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let folder = folder(LLAMA3, &[Vec::new(), Vec::new(), Vec::new()]);
        std::fs::write(folder.path().join("consolidated.1.pth"), "").unwrap();
        assert_eq!(shard_files(folder.path()).unwrap().len(), 3);
        std::fs::remove_file(folder.path().join("consolidated.01.pth")).unwrap();
        let error = shard_files(folder.path()).unwrap_err().to_string();
        assert!(error.contains("`consolidated.01.pth` is missing"), "{error}");
        let empty = tempfile::tempdir().unwrap();
        assert!(shard_files(empty.path()).unwrap_err().hint().is_some());
        shard_files(&empty.path().join("none")).unwrap_err();
    }
}
