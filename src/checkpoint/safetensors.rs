//! Safetensors: one file, or several with an index, mapped into memory.
//!
//! Format: <https://github.com/huggingface/safetensors#format>. A tensor's entry and its number format are the `safetensors`
//! crate's; the header around them is checked here, because the crate takes the last of two tensors of one name, and
//! does not name the tensor that is wrong. Not for: knowing what a tensor means (see [`super::weights`]).

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde_json::Value;

use super::files::read_json;
use super::tensors::{StoredDtype, StoredTensor, TensorData, Tensors};
use super::weights::Naming;
use crate::error::{Error, Result};
use crate::foreign;
use crate::json::strict_json;
use crate::kernels::quant::{SharedBytes, WeightFormat};
use crate::mapped::MappedFile;

/// Longest header that is read. Headers of the largest LLaMA models take about 200 KB.
const MAX_HEADER_BYTES: u64 = 32 << 20;

/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;

/// What an index that is not one should be replaced by.
const FETCH_HINT: &str = "the file is cut off or damaged: fetch it again";

/// A checkpoint in one file.
pub const SINGLE_NAME: &str = "model.safetensors";

/// The index of a checkpoint in several files.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// Reads one file's tensors.
///
/// # Errors
/// [`Error::Io`] if it cannot be opened; [`Error::BadFile`] if it is not safetensors, cut off or inconsistent;
/// [`Error::Unsupported`] for a number format that the `safetensors` crate does not know.
pub fn open(path: impl AsRef<Path>) -> Result<Tensors> {
    let mut tensors = Tensors::new(path.as_ref());
    for (name, tensor) in open_file(path.as_ref())? {
        tensors.insert(name, tensor)?;
    }
    Ok(tensors)
}

/// Reads the tensors of all files that an index names.
///
/// # Errors
/// As [`open`], for each file; [`Error::BadFile`] if the index is not one, names a file outside of its folder, or says
/// that a tensor is where it is not.
pub fn open_index(index: impl AsRef<Path>) -> Result<Tensors> {
    let index = index.as_ref();
    let bad = |reason: String| Error::bad_file(index, reason);
    let json = read_json(index)?;
    let weight_map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| bad("it has no object `weight_map`".to_owned()))?;
    let mut names_by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, shard) in weight_map {
        let shard = shard.as_str().ok_or_else(|| bad(format!("the file of tensor `{name}` is not a string")))?;
        names_by_shard.entry(shard).or_default().push(name);
    }
    if names_by_shard.is_empty() {
        return Err(bad("its `weight_map` is empty".to_owned()));
    }
    // Before any file is opened: what an index with a bad name says of the others is not believed either.
    if let Some(shard) = names_by_shard.keys().find(|shard| !is_plain_name(shard)) {
        return Err(bad(format!("it names `{shard}`, expected the name of a file beside it")));
    }
    let folder = index.parent().unwrap_or(Path::new(""));
    let mut tensors = Tensors::new(index);
    let mut shards = Vec::new();
    for (shard, names) in names_by_shard {
        let stored = open_file(&folder.join(shard)).map_err(|error| match error {
            Error::Io { .. } => {
                error.with_hint(format!("`{}` names it: fetch all files of the model", index.display()))
            }
            other => other,
        })?;
        shards.push((shard, names, stored));
    }
    for (shard, names, mut stored) in shards {
        for name in names {
            match stored.remove(name) {
                Some(tensor) => tensors.insert(name, tensor)?,
                None if Naming::HuggingFace.is_harmless(name) => {}
                None => return Err(bad(format!("it says that tensor `{name}` is in `{shard}`, where it is not"))),
            }
        }
        if let Some(name) = stored.keys().filter(|name| !Naming::HuggingFace.is_harmless(name)).min() {
            return Err(bad(format!("it does not name tensor `{name}` of `{shard}`")));
        }
    }
    Ok(tensors)
}

/// Whether a name is that of a file in the same folder and nothing else.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let is_normal = matches!(components.next(), Some(Component::Normal(part)) if part.to_str() == Some(name));
    is_normal && components.next().is_none() && !name.contains(['/', '\\', '\0', ':'])
}

/// Maps a file and reads its header.
fn open_file(path: &Path) -> Result<HashMap<String, StoredTensor>> {
    let mmap = MappedFile::open(path, "give a checkpoint in safetensors format")?;
    let tensors = parse(path, &mmap)?;
    let owner: SharedBytes = Arc::new(mmap);
    let path: Arc<Path> = Arc::from(path);
    let stored = tensors.into_iter().map(|(name, (entry, range))| {
        let data = TensorData::Mapped { owner: Arc::clone(&owner), range };
        (name, StoredTensor { path: Arc::clone(&path), dtype: stored_dtype(entry.dtype), shape: entry.shape, data })
    });
    Ok(stored.collect())
}

/// A format that is computed on, or the name of any other.
fn stored_dtype(dtype: Dtype) -> StoredDtype {
    match dtype {
        Dtype::F32 => StoredDtype::Usable(WeightFormat::F32),
        Dtype::F16 => StoredDtype::Usable(WeightFormat::F16),
        Dtype::BF16 => StoredDtype::Usable(WeightFormat::BF16),
        other => StoredDtype::Other(other.to_string()),
    }
}

type Places = HashMap<String, (TensorInfo, Range<usize>)>;

/// Reads the header: every tensor and the bytes of the file that hold it.
fn parse(path: &Path, bytes: &[u8]) -> Result<Places> {
    let bad = |reason: String| Error::bad_file(path, reason);
    let Some((len, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(bad(format!("it has {} bytes, fewer than any safetensors file", bytes.len())).with_hint(FETCH_HINT));
    };
    let len = u64::from_le_bytes(*len);
    let split =
        usize::try_from(len).ok().filter(|_| len <= MAX_HEADER_BYTES).and_then(|len| rest.split_at_checked(len));
    let Some((header, data)) = split else {
        if let Some(error) = foreign::known(path, bytes, "a safetensors file", FETCH_HINT) {
            return Err(error);
        }
        let room = MAX_HEADER_BYTES.min(rest.len() as u64);
        return Err(bad(format!("it announces a header of {len} bytes, expected at most {room}")).with_hint(FETCH_HINT));
    };
    let data_start = bytes.len() - data.len();

    let mut entries = entries(path, header)?;
    entries.sort_by(|(a_name, a), (b_name, b)| (a.data_offsets, a_name).cmp(&(b.data_offsets, b_name)));
    let mut places = HashMap::with_capacity(entries.len());
    let mut end = 0;
    for (name, tensor) in entries {
        let TensorInfo { dtype, ref shape, data_offsets: (first, last) } = tensor;
        if shape.len() > MAX_DIMS {
            return Err(bad(format!("tensor `{name}` has {} sizes, expected at most {MAX_DIMS} sizes", shape.len())));
        }
        let numbers = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
        let bits = numbers.and_then(|numbers| numbers.checked_mul(dtype.bitsize()));
        let Some(bits) = bits else {
            return Err(bad(format!("tensor `{name}` {shape:?} is absurdly large")));
        };
        if last > data.len() {
            let reason = format!("tensor `{name}` reaches beyond the end of the file ({} bytes)", bytes.len());
            return Err(bad(reason).with_hint(FETCH_HINT));
        }
        if first != end {
            return Err(bad(format!(
                "tensor `{name}` begins at {first}, expected {end}: tensors overlap or leave gaps"
            )));
        }
        if last < first || (last - first).checked_mul(8) != Some(bits) {
            let reason =
                format!("tensor `{name}` {shape:?} in {dtype} has bytes {first}..{last}, expected {bits} bits");
            return Err(bad(reason));
        }
        end = last;
        places.insert(name, (tensor, data_start + first..data_start + last));
    }
    if end != data.len() {
        return Err(bad(format!("its tensors end at {end}, expected {}, the end of the file", data.len())));
    }
    Ok(places)
}

/// The tensors that a header's JSON names, in its order; a name that is given twice is an error.
fn entries(path: &Path, header: &[u8]) -> Result<Vec<(String, TensorInfo)>> {
    let bad = |error: &dyn fmt::Display| {
        Error::bad_file(path, format!("its header is not that of safetensors: {error}")).with_hint(FETCH_HINT)
    };
    let text = std::str::from_utf8(header).map_err(|error| bad(&error))?;
    let Value::Object(map) = strict_json(text).map_err(|error| bad(&error))? else {
        return Err(bad(&"expected an object of tensors"));
    };
    let tensors = map.into_iter().filter(|(name, _)| name != "__metadata__");
    let entry = |(name, value): (String, Value)| {
        let dtype = &value["dtype"];
        if let Some(dtype) = dtype.as_str().filter(|_| Dtype::deserialize(dtype).is_err()) {
            let what = format!("number format `{dtype}` of tensor `{name}` in `{}`", path.display());
            return Err(Error::unsupported(what).with_hint("use a checkpoint in F32, F16 or BF16"));
        }
        let tensor = TensorInfo::deserialize(&value).map_err(|error| bad(&format!("tensor `{name}`: {error}")))?;
        Ok((name, tensor))
    };
    tensors.map(entry).collect()
}

/// Whether a file of this name is of Mistral's own layout.
pub(super) fn is_mistrals(name: &str) -> bool {
    name.starts_with("consolidated") && name.ends_with(".safetensors")
}

/// The safetensors file or index of a folder, if it has one: `model.safetensors`, as transformers prefers it, the index, or
/// the only file that ends so. Files of Mistral's own layout do not count.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be read; [`Error::BadFile`] if it holds several files and no index.
pub fn find_in(folder: &Path) -> Result<Option<PathBuf>> {
    for name in [SINGLE_NAME, INDEX_NAME] {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(Some(path));
        }
    }
    let mut found = super::files::with_suffix(folder, ".safetensors")?;
    found.retain(|path| !is_mistrals(&path.file_name().unwrap_or_default().to_string_lossy()));
    match &found[..] {
        [] => Ok(None),
        [only] => Ok(Some(only.clone())),
        several => Err(Error::bad_file(
            folder,
            format!("it holds {} files that end in .safetensors, and no `{INDEX_NAME}`", several.len()),
        )
        .with_hint("fetch the index as well, or give the path of one file")),
    }
}

/// Reads a file, or all files of an index.
///
/// # Errors
/// As [`open`] and [`open_index`].
pub fn open_any(path: &Path) -> Result<Tensors> {
    if path.extension().is_some_and(|extension| extension == "json") { open_index(path) } else { open(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_files_beside_the_index_are_plain() {
        assert!(is_plain_name("model-00001-of-00002.safetensors"));
        for name in ["", ".", "..", "../x", "a/b", "/etc/passwd", "a/", "./a", "a\\b", "c:x", "a\0"] {
            assert!(!is_plain_name(name), "{name:?}");
        }
    }
}
