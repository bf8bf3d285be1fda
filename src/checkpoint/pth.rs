//! PyTorch's checkpoints (`.pth`): the places of tensors, over a memory-mapped file.
//!
//! Format: the ZIP archive of `torch.save`, <https://pytorch.org/docs/stable/notes/serialization.html>: `data.pkl`, a
//! pickle with names and shapes, and one member for each storage, which is not compressed. The pickle is read by
//! `pickle.rs`, which runs nothing; the archive by `zip.rs`. Checksums are not compared, as that would read
//! all weights.
//!
//! Not for: files from before PyTorch 1.6, which are no archives, `TorchScript`, or knowing what a tensor means.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::gguf::TensorEntry;
use super::pickle::{self, Id, Pickle, Storage, Tensor, Value, shown};
use super::zip;
use crate::error::{Error, Result};
use crate::foreign;
use crate::kernels::quant::{SharedBytes, WeightFormat};
use crate::mapped::MappedFile;

/// More dimensions than weights have.
const MAX_DIMS: usize = 8;
/// Bytes of `data.pkl`; the largest LLaMA's has 200 thousand.
const MAX_PICKLE: usize = 64 << 20;
/// Bytes of a storage's name, which is a number.
const MAX_KEY: usize = 64;
/// Entries of the outermost dictionary that may hold the tensors instead of it.
const WRAPPERS: [&str; 2] = ["model", "state_dict"];

/// A checkpoint of PyTorch, mapped into memory.
#[derive(Debug)]
pub struct PthFile {
    path: PathBuf,
    mmap: Arc<MappedFile>,
    tensors: HashMap<String, TensorEntry>,
}

impl PthFile {
    /// Maps a file and reads names and shapes of its tensors.
    ///
    /// The outermost value must be a dictionary of tensors, or have one as its entry `model` or `state_dict`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened; [`Error::BadFile`] if it is no checkpoint, cut off or inconsistent, if
    /// its pickle asks for anything but tensors, or an entry is no tensor; [`Error::Unsupported`] for the format before
    /// PyTorch 1.6, big-endian or compressed files, and tensors that are not contiguous or not of floats.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        const HINT: &str = "give the path of a checkpoint that `torch.save` wrote";
        let path = path.as_ref();
        let mmap = MappedFile::open(path, HINT)?;
        let tensors = parse(path, &mmap)?;
        Ok(Self { path: path.to_owned(), mmap: Arc::new(mmap), tensors })
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensors by name, of `F32`, `F16` or `BF16` numbers; row after row, little-endian.
    ///
    /// Several may share bytes. PyTorch aligns storages to 64 bytes, but other writers do not, and a tensor may begin
    /// anywhere in its storage: who reads the numbers in place must check the alignment.
    #[must_use]
    pub fn tensors(&self) -> &HashMap<String, TensorEntry> {
        &self.tensors
    }

    /// The mapped bytes, to be shared by the tensors that lie in them.
    #[must_use]
    pub fn shared_bytes(&self) -> SharedBytes {
        self.mmap.clone()
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn tensor_bytes(&self) -> usize {
        self.tensors.values().fold(0, |sum: usize, tensor| sum.saturating_add(tensor.range.len()))
    }

    /// An error about this file.
    #[must_use]
    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(&self.path, reason)
    }

    /// Tells the operating system that bytes of the file are not needed in memory for now. They stay readable.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        self.mmap.release(range);
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Finds the tensors of a checkpoint.
fn parse(path: &Path, bytes: &[u8]) -> Result<HashMap<String, TensorEntry>> {
    if !zip::looks_like_zip(bytes) {
        return Err(not_an_archive(path, bytes));
    }
    let all = zip::members(path, bytes)?;
    let error = |reason: String| Error::bad_file(path, reason);

    let mut pickles = all.keys().filter_map(|name| name.strip_suffix(b"data.pkl")).filter(|prefix| is_folder(prefix));
    let prefix = pickles.next().ok_or_else(|| {
        error("it is an archive without `data.pkl`".to_owned())
            .with_hint("give a checkpoint that `torch.save` wrote, with names like `consolidated.00.pth`")
    })?;
    if pickles.next().is_some() {
        return Err(error("it is an archive with several `data.pkl`".to_owned()));
    }
    let members: HashMap<&[u8], Range<usize>> =
        all.iter().filter_map(|(name, range)| Some((name.strip_prefix(prefix)?, range.clone()))).collect();
    if let Some(order) = members.get(b"byteorder".as_slice())
        && bytes[order.clone()] != *b"little"
    {
        return Err(Error::unsupported(format!("a checkpoint that is not little-endian (`{}`)", path.display()))
            .with_hint("save it anew with `torch.save` on a little-endian machine"));
    }
    let range = members[b"data.pkl".as_slice()].clone();
    if range.len() > MAX_PICKLE {
        return Err(error(format!("its `data.pkl` has {} bytes, expected at most {MAX_PICKLE}", range.len())));
    }
    let pickle = pickle::read(path, &bytes[range])?;
    Reader { path, members, pickle }.tensors()
}

/// Whether it is nothing, or one folder's name with a slash at its end.
fn is_folder(prefix: &[u8]) -> bool {
    prefix.is_empty() || prefix.iter().position(|&byte| byte == b'/') == Some(prefix.len() - 1)
}

/// Says what a file is that is no archive.
fn not_an_archive(path: &Path, bytes: &[u8]) -> Error {
    const AGAIN: &str = "load it with PyTorch 1.6 or later and save it again with `torch.save`";
    let is_pickle = bytes.first() == Some(&0x80) && bytes.get(1).is_some_and(|version| (1..=5).contains(version));
    if is_pickle {
        let what = format!("PyTorch's old format, a bare pickle, (`{}`)", path.display());
        return Error::unsupported(what).with_hint(AGAIN);
    }
    if bytes.get(257..262) == Some(b"ustar") {
        let what = format!("PyTorch's old format, a tar archive, (`{}`)", path.display());
        return Error::unsupported(what).with_hint(AGAIN);
    }
    foreign::unlike(path, bytes, "a ZIP archive", "give a checkpoint that `torch.save` of PyTorch 1.6 or later wrote")
}

struct Reader<'a, 'p> {
    path: &'p Path,
    /// By name without the archive's folder.
    members: HashMap<&'a [u8], Range<usize>>,
    pickle: Pickle<'a>,
}

impl<'a> Reader<'a, '_> {
    fn error(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(self.path, reason)
    }

    fn unsupported(&self, what: &str) -> Error {
        Error::unsupported(format!("{what} (`{}`)", self.path.display()))
    }

    fn value(&self, id: Id) -> &Value<'a> {
        &self.pickle.values[id]
    }

    fn tensors(&self) -> Result<HashMap<String, TensorEntry>> {
        let mut tensors = HashMap::new();
        for &(key, value) in self.entries()? {
            let &Value::Text(name) = self.value(key) else {
                let kind = self.value(key).kind();
                return Err(self.error(format!("a tensor has {kind} for its name, expected a text")));
            };
            let Value::Tensor(tensor) = self.value(value) else {
                let reason = format!("its entry `{}` is {}, expected a tensor", shown(name), self.value(value).kind());
                return Err(self.error(reason).with_hint("save a dictionary of tensors only, as `model.state_dict()`"));
            };
            let entry = self.tensor(&shown(name), *tensor)?;
            if tensors.insert(name.to_owned(), entry).is_some() {
                return Err(self.error(format!("tensor `{}` is given twice", shown(name))));
            }
        }
        Ok(tensors)
    }

    /// Entries of the dictionary that holds the tensors.
    fn entries(&self) -> Result<&[(Id, Id)]> {
        let Value::Dict(outer) = self.value(self.pickle.root) else {
            let kind = self.value(self.pickle.root).kind();
            return Err(self
                .error(format!("it holds {kind}, expected a dictionary of tensors"))
                .with_hint("save a dictionary of tensors, as `model.state_dict()`"));
        };
        let mut wrapped = outer.iter().filter_map(|&(key, value)| match (self.value(key), self.value(value)) {
            (Value::Text(name), Value::Dict(inner)) if WRAPPERS.contains(name) => Some(inner),
            _ => None,
        });
        match (wrapped.next(), wrapped.next()) {
            (None, _) => Ok(outer),
            (Some(inner), None) => Ok(inner),
            _ => Err(self.error(format!("it has several dictionaries named `{}`", WRAPPERS.join("` or `")))),
        }
    }

    /// Checks a tensor against its storage.
    fn tensor(&self, name: &str, tensor: Tensor<'a>) -> Result<TensorEntry> {
        let Value::Storage(storage) = *self.value(tensor.storage) else {
            return Err(self.error(format!("tensor `{name}` has no storage")));
        };
        let kind = tensor.dtype.unwrap_or(storage.class);
        let dtype = number_type(kind).ok_or_else(|| {
            self.unsupported(&format!("tensor `{name}` with numbers of `torch.{}`", shown(kind)))
                .with_hint("convert the weights to float32, float16 or bfloat16")
        })?;
        let item = dtype.block_bytes();
        let stored = self.storage(name, storage, item)?;

        let shape = self.whole_numbers(name, "sizes", tensor.shape)?;
        let strides = self.whole_numbers(name, "strides", tensor.strides)?;
        if shape.len() != strides.len() || shape.contains(&0) {
            return Err(self.error(format!("tensor `{name}` has the sizes {shape:?} and the strides {strides:?}")));
        }
        let absurd = || self.error(format!("tensor `{name}` {shape:?} is absurdly large"));
        let mut numbers = 1usize;
        for (&size, &stride) in shape.iter().zip(&strides).rev() {
            // How far to step along a single item does not matter.
            if size != 1 && stride != numbers {
                return Err(self
                    .unsupported(&format!("tensor `{name}` {shape:?} with the strides {strides:?}"))
                    .with_hint("save the tensor's `.contiguous()`"));
            }
            numbers = numbers.checked_mul(size).ok_or_else(absurd)?;
        }
        let len = numbers.checked_mul(item).ok_or_else(absurd)?;
        let first = usize::try_from(tensor.offset).ok().and_then(|offset| offset.checked_mul(item));
        let end = first.and_then(|first| first.checked_add(len));
        match (first, end) {
            (Some(first), Some(end)) if end <= stored.len() => {
                Ok(TensorEntry { dtype, shape, range: stored.start + first..stored.start + end })
            }
            _ => Err(self.error(format!(
                "tensor `{name}` {shape:?} at {} reaches beyond its storage of {} numbers",
                tensor.offset,
                stored.len() / item
            ))),
        }
    }

    /// Bytes of a storage of numbers of `item` bytes.
    fn storage(&self, name: &str, storage: Storage<'a>, item: usize) -> Result<Range<usize>> {
        let &Value::Text(key) = self.value(storage.key) else {
            return Err(self.error(format!("tensor `{name}` has no storage")));
        };
        let member = (key.len() <= MAX_KEY).then(|| self.members.get(format!("data/{key}").as_bytes())).flatten();
        let Some(member) = member else {
            return Err(self.error(format!("the storage `{}` of tensor `{name}` is missing", shown(key))));
        };
        let item = if storage.class == "UntypedStorage" { 1 } else { item };
        let len = usize::try_from(storage.len).ok().and_then(|len| len.checked_mul(item));
        match len {
            Some(len) if len <= member.len() => Ok(member.start..member.start + len),
            _ => Err(self
                .error(format!(
                    "the storage `{key}` of tensor `{name}` has {} bytes, too few for {} numbers",
                    member.len(),
                    storage.len
                ))
                .with_hint("the file is damaged: fetch it again")),
        }
    }

    /// A tuple of sizes or strides.
    fn whole_numbers(&self, name: &str, what: &str, id: Id) -> Result<Vec<usize>> {
        let items = match self.value(id) {
            Value::Tuple(items) if items.len() <= MAX_DIMS => items.as_slice(),
            Value::Tuple(items) => {
                return Err(self.error(format!("tensor `{name}` has {} {what}, expected at most 8", items.len())));
            }
            other => return Err(self.error(format!("tensor `{name}` has {} for its {what}", other.kind()))),
        };
        let number = |&item: &Id| match self.value(item) {
            Value::Int(number) => usize::try_from(*number)
                .map_err(|_| self.error(format!("tensor `{name}` has {number} among its {what}"))),
            other => Err(self.error(format!("tensor `{name}` has {} among its {what}", other.kind()))),
        };
        items.iter().map(number).collect()
    }
}

/// The numbers of a class of storages, or of a type in the module `torch`.
fn number_type(name: &str) -> Option<WeightFormat> {
    match name {
        "FloatStorage" | "float32" | "float" => Some(WeightFormat::F32),
        "HalfStorage" | "float16" | "half" => Some(WeightFormat::F16),
        "BFloat16Storage" | "bfloat16" => Some(WeightFormat::BF16),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests;
