//! The GGUF container: metadata and the places of tensors, over a memory-mapped file or several.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian. Texts
//! are bytes, as in llama.cpp: what is not UTF-8 is read with U+FFFD in its place, and a text ends at its first NUL. Models in
//! several files: as `llama-gguf-split` of <https://github.com/ggml-org/llama.cpp> writes them (`X-00001-of-00003.gguf`).
//!
//! Not for: knowing what a key or a tensor means (see [`super::gguf_config`]).

mod formats;
mod header;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::header::{Cursor, Header};
use super::tensors::{StoredDtype, StoredTensor, TensorData, Tensors};
use crate::error::{Error, Result};
use crate::kernels::quant::{SharedBytes, WeightFormat};
use crate::mapped::MappedFile;

/// A metadata value; integers of all widths become one of two, floats one.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    /// A text's bytes of the file, see [`GgufFile::string`].
    Text(Range<usize>),
    Array(Array),
}

/// An array, left where it is in the file: as values of their own its elements could take 40 times their place.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// GGUF's number of the elements' type.
    kind: u32,
    /// Elements.
    len: usize,
    /// Bytes of the file.
    range: Range<usize>,
}

/// GGUF's number of the type of texts.
const TEXT: u32 = 8;

/// A text as people and keys know it: up to its first NUL, as a text of C ends there, and with U+FFFD for what is not UTF-8.
fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
}

/// Where a tensor lies, and how its numbers are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorEntry {
    /// Block format.
    pub dtype: WeightFormat,
    /// Sizes, outermost first: a weight is `[out_features, in_features]`.
    pub shape: Vec<usize>,
    /// Bytes of the file.
    pub range: Range<usize>,
}

/// A GGUF file, mapped into memory.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    mmap: Arc<MappedFile>,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorEntry>,
}

impl GgufFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened; [`Error::BadFile`] if it is not GGUF, cut off or inconsistent;
    /// [`Error::Unsupported`] for a version or a block format that this program does not read, for big-endian files, and
    /// for files that hold no model (adapters, importance matrices, vocabularies), by name.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mmap = MappedFile::open(path, "give the path of a model file in GGUF format")?;
        let header = Header::parse(path, &mmap)?;
        Ok(Self { path: path.to_owned(), mmap: Arc::new(mmap), metadata: header.metadata, tensors: header.tensors })
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Metadata by key.
    #[must_use]
    pub fn metadata(&self) -> &HashMap<String, Value> {
        &self.metadata
    }

    /// Tensors by name.
    #[must_use]
    pub fn tensors(&self) -> &HashMap<String, TensorEntry> {
        &self.tensors
    }

    /// The mapped bytes, to be shared by the tensors that lie in them.
    #[must_use]
    pub fn shared_bytes(&self) -> SharedBytes {
        self.mmap.clone()
    }

    /// An error about this file.
    #[must_use]
    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(&self.path, reason)
    }

    /// A value that may be absent.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the value is there and is not a whole number of at least 0.
    pub fn whole(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number", |value| match value {
            Value::Unsigned(number) => usize::try_from(*number).ok(),
            Value::Signed(number) => usize::try_from(*number).ok(),
            _ => None,
        })
    }

    /// A value that may be absent.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the value is there and is not a finite number.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        #[expect(clippy::cast_precision_loss)]
        self.get(key, "a finite number", |value| match value {
            Value::Float(number) => number.is_finite().then_some(*number),
            Value::Unsigned(number) => Some(*number as f64),
            Value::Signed(number) => Some(*number as f64),
            _ => None,
        })
    }

    /// A value that may be absent.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the value is there and is not a boolean.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |value| if let Value::Bool(flag) = value { Some(*flag) } else { None })
    }

    /// A value that may be absent.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the value is there and is not a string.
    pub fn string(&self, key: &str) -> Result<Option<String>> {
        Ok(self.text(key)?.map(text_of))
    }

    /// The bytes of a text that may be absent.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the value is there and is not a string.
    pub fn text(&self, key: &str) -> Result<Option<&[u8]>> {
        self.get(
            key,
            "a string",
            |value| if let Value::Text(range) = value { Some(&self.mmap[range.clone()]) } else { None },
        )
    }

    /// Number of an array's elements, 0 if it is absent.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the value is there and is no array.
    pub fn array_len(&self, key: &str) -> Result<usize> {
        let len = self.get(key, "a list", |value| if let Value::Array(array) = value { Some(array.len) } else { None });
        Ok(len?.unwrap_or_default())
    }

    /// The bytes of each text of an array, none if it is absent.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the value is no array of texts.
    pub fn texts(&self, key: &str) -> Result<impl Iterator<Item = &[u8]>> {
        let range = self.get(key, "a list of strings", |value| match value {
            Value::Array(Array { kind: TEXT, range, .. } | Array { len: 0, range, .. }) => Some(range.clone()),
            _ => None,
        })?;
        let range = range.unwrap_or_default();
        let mut cursor = Cursor { path: &self.path, bytes: &self.mmap[..range.end], at: range.start };
        Ok(std::iter::from_fn(move || if cursor.at < cursor.bytes.len() { cursor.text().ok() } else { None }))
    }

    /// An array of numbers or booleans, empty if absent.
    ///
    /// Takes memory for all elements: look at [`array_len`](Self::array_len) before.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the value is no array, or `convert` refuses an element.
    pub fn array<T>(&self, key: &str, kind: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
        let items = self.get(key, kind, |value| {
            let Value::Array(Array { kind, range, .. }) = value else { return None };
            let mut cursor = Cursor { path: &self.path, bytes: &self.mmap[..range.end], at: range.start };
            let mut items = Vec::new();
            while cursor.at < range.end {
                items.push(convert(&cursor.value(*kind, 0).ok()?)?);
            }
            Some(items)
        })?;
        Ok(items.unwrap_or_default())
    }

    /// A whole number that may be absent, or be given as an array of one for each layer.
    ///
    /// # Errors
    /// [`Error::BadFile`] if it is neither, or an array of another length; [`Error::Unsupported`] if the layers' numbers
    /// differ.
    pub fn whole_of_layers(&self, key: &str, num_layers: usize) -> Result<Option<usize>> {
        let Some(Value::Array(array)) = self.metadata.get(key) else { return self.whole(key) };
        if array.len != num_layers {
            let reason = format!(
                "metadata `{key}` has {} numbers, expected one, or one for each of {num_layers} layers",
                array.len
            );
            return Err(self.error(reason));
        }
        let numbers = self.array(key, "whole numbers", |value| match value {
            Value::Unsigned(number) => usize::try_from(*number).ok(),
            Value::Signed(number) => usize::try_from(*number).ok(),
            _ => None,
        })?;
        match numbers.iter().find(|&&number| number != numbers[0]) {
            None => Ok(numbers.first().copied()),
            Some(other) => {
                let what = format!("a model whose layers differ: `{key}` is {} and {other}", numbers[0]);
                Err(Error::unsupported(format!("{what} (`{}`)", self.path.display()))
                    .with_hint("use a model of the LLaMA architecture whose layers are alike"))
            }
        }
    }

    fn get<'a, T>(&'a self, key: &str, kind: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(self.error(format!("metadata `{key}`: expected {kind}"))),
        }
    }
}

/// Opens a file and, if it is a part of a split model, all the others.
///
/// The model's metadata are those of the first. Its parts may be named by any one of them.
///
/// # Errors
/// As [`GgufFile::open`]; [`Error::BadFile`] if a part is missing, is not what its name says, or their tensors are not
/// as many as the first part announces.
pub fn open_parts(path: impl AsRef<Path>) -> Result<Vec<GgufFile>> {
    let path = path.as_ref();
    let file = GgufFile::open(path)?;
    let count = file.whole("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(vec![file]);
    }
    let named = PartName::parse(path).filter(|named| named.count == count);
    let Some(named) = named else {
        return Err(file
            .error(format!("it is one of {count} parts, and its name does not end in -00001-of-{count:05}.gguf"))
            .with_hint("give all parts the names that they were made with"));
    };
    drop(file);
    let mut parts = Vec::new();
    for index in 0..count {
        let part_path = named.path(index);
        let part = GgufFile::open(&part_path).map_err(|error| match error {
            Error::Io { .. } => error.with_hint(format!("the model has {count} parts, which must lie in one folder")),
            other => other,
        })?;
        let (got_index, got_count) = (part.whole("split.no")?, part.whole("split.count")?);
        if (got_index, got_count) != (Some(index), Some(count)) {
            let show = |number: Option<usize>| number.map_or("none".to_owned(), |number| number.to_string());
            return Err(part.error(format!(
                "expected part {index} of {count} (`split.no`, `split.count`), got {} of {}",
                show(got_index),
                show(got_count)
            )));
        }
        parts.push(part);
    }
    let got: usize = parts.iter().map(|part| part.tensors.len()).sum();
    if let Some(expected) = parts[0].whole("split.tensors.count")?.filter(|&expected| expected != got) {
        return Err(parts[0].error(format!("expected {expected} tensors in all {count} parts, got {got}")));
    }
    Ok(parts)
}

/// The name of a part of a split model, `X-00001-of-00003.gguf`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartName {
    folder: PathBuf,
    prefix: String,
    /// Which part it is, from 0.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl PartName {
    /// Reads a name; `None` if it is not one of a part.
    #[must_use]
    pub fn parse(path: &Path) -> Option<Self> {
        let number = |text: &str| -> Option<usize> {
            (text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
        };
        let (rest, count) = path.file_name()?.to_str()?.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, index) = rest.rsplit_once('-')?;
        let (index, count) = (number(index)?.checked_sub(1)?, number(count)?);
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        (index < count).then(|| Self { folder, prefix: prefix.to_owned(), index, count })
    }

    /// The path of the part with this index, from 0.
    #[must_use]
    pub fn path(&self, index: usize) -> PathBuf {
        self.folder.join(format!("{}-{:05}-of-{:05}.gguf", self.prefix, index + 1, self.count))
    }
}

/// All tensors of a model's files.
///
/// # Errors
/// [`Error::BadFile`] if a name occurs twice.
pub fn tensors(parts: &[GgufFile]) -> Result<Tensors> {
    let mut tensors = Tensors::new(parts.first().map_or(Path::new(""), GgufFile::path));
    for part in parts {
        let path: Arc<Path> = Arc::from(part.path());
        for (name, entry) in part.tensors() {
            let data = TensorData::Mapped { owner: part.shared_bytes(), range: entry.range.clone() };
            let dtype = StoredDtype::Usable(entry.dtype);
            let tensor = StoredTensor { path: Arc::clone(&path), dtype, shape: entry.shape.clone(), data };
            tensors.insert(name.as_str(), tensor)?;
        }
    }
    Ok(tensors)
}
