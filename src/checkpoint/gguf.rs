//! The GGUF container: metadata and the places of tensors, over a memory-mapped file or several.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian. Every length in
//! the header is checked against the file before anything is allocated for it. Models in several files: as
//! `llama-gguf-split` of <https://github.com/ggml-org/llama.cpp> writes them (`X-00001-of-00003.gguf`).
//!
//! Not for: knowing what a key or a tensor means (see [`super::llama`]).

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;

use super::files::map_file;
use super::mapped::MappedFile;
use super::tensors::{StoredDtype, StoredTensor, TensorData, Tensors};
use crate::error::{Error, Result};
use crate::kernels::quant::SharedBytes;

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml's own limit.
const MAX_DIMS: u32 = 4;
/// Arrays of arrays deeper than this are hostile.
const MAX_NESTING: usize = 4;

/// A metadata value; integers of all widths become one of two, floats one.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    /// Strings or further arrays.
    Array(Vec<Value>),
    /// Numbers or booleans, left where they are: widened they could take 32 times their place.
    Numbers(NumberArray),
}

/// A list of numbers in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct NumberArray {
    /// GGUF's number of their type.
    kind: u32,
    /// Bytes of the file.
    range: Range<usize>,
}

/// Where a tensor lies, and how its numbers are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorEntry {
    /// Block format.
    pub dtype: GgmlDType,
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
    /// [`Error::Unsupported`] for a version or a block format that this program does not read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mmap = map_file(path, "give the path of a model file in GGUF format")?;
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
        self.get(key, "a string", |value| if let Value::String(text) = value { Some(text.clone()) } else { None })
    }

    /// An array of one kind, empty if absent.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the value is no array, or `convert` refuses an element.
    pub fn array<T>(&self, key: &str, kind: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
        let items = self.get(key, kind, |value| match value {
            Value::Array(items) => items.iter().map(&convert).collect(),
            Value::Numbers(NumberArray { kind, range }) => {
                let mut cursor = Cursor { path: &self.path, bytes: &self.mmap[..range.end], at: range.start };
                let mut items = Vec::new();
                while cursor.at < range.end {
                    items.push(convert(&cursor.value(*kind, 0).ok()?)?);
                }
                Some(items)
            }
            _ => None,
        })?;
        Ok(items.unwrap_or_default())
    }

    fn get<T>(&self, key: &str, kind: &str, convert: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
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

/// What stands before the tensors' data.
struct Header {
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, TensorEntry>,
}

impl Header {
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut cursor = Cursor { path, bytes, at: 0 };
        if bytes.get(..4) != Some(MAGIC) {
            return Err(cursor
                .error("it does not begin with the letters GGUF")
                .with_hint("give a model in GGUF format"));
        }
        cursor.at = 4;
        let version = cursor.u32()?;
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!("GGUF version {version} (`{}`)", path.display()))
                .with_hint("convert the model anew; versions 2 and 3, little-endian, are read"));
        }
        let tensor_count = cursor.count("tensors", 8 + 4 + 4 + 8)?;
        let metadata_count = cursor.count("metadata entries", 8 + 4 + 1)?;

        let mut metadata = HashMap::with_capacity(metadata_count);
        for _ in 0..metadata_count {
            let key = cursor.string()?;
            let kind = cursor.u32()?;
            let value = cursor.value(kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(cursor.error(format!("metadata `{key}` is given twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(alignment)) if alignment.is_power_of_two() && *alignment <= 1 << 20 => *alignment,
            Some(other) => return Err(cursor.error(format!("metadata `general.alignment` is {other:?}"))),
        };

        let mut entries = Vec::with_capacity(tensor_count);
        for _ in 0..tensor_count {
            entries.push(cursor.tensor()?);
        }
        let data_start = (cursor.at as u64).next_multiple_of(alignment);
        let mut tensors = HashMap::with_capacity(tensor_count);
        for (name, dtype, shape, offset, size) in entries {
            let start = data_start.checked_add(offset);
            let end = start.and_then(|start| start.checked_add(size));
            let range = match (start, end) {
                (Some(start), Some(end)) if end <= bytes.len() as u64 => {
                    usize::try_from(start).ok().zip(usize::try_from(end).ok()).map(|(start, end)| start..end)
                }
                _ => None,
            };
            let Some(range) = range else {
                let reason = format!("tensor `{name}` reaches beyond the end of the file ({} bytes)", bytes.len());
                return Err(cursor.error(reason).with_hint("the file is cut off: fetch it again"));
            };
            if offset % alignment != 0 {
                return Err(cursor.error(format!("tensor `{name}` is not aligned to {alignment} bytes")));
            }
            if tensors.insert(name.clone(), TensorEntry { dtype, shape, range }).is_some() {
                return Err(cursor.error(format!("tensor `{name}` is given twice")));
            }
        }
        Ok(Self { metadata, tensors })
    }
}

/// A reader of the header that never reads beyond the file.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn error(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(self.path, reason)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            let reason = format!("the header needs {len} bytes at {}, the file has {}", self.at, self.bytes.len());
            return Err(self.error(reason).with_hint("the file is cut off or damaged: fetch it again"));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of items of which each takes at least `least` bytes: refused if the file cannot hold them.
    fn count(&mut self, what: &str, least: usize) -> Result<usize> {
        let count = self.u64()?;
        let room = (self.bytes.len() - self.at) / least;
        match usize::try_from(count) {
            Ok(count) if count <= room => Ok(count),
            _ => Err(self
                .error(format!("the header announces {count} {what}, the file has room for {room}"))
                .with_hint("the file is cut off or damaged: fetch it again")),
        }
    }

    fn string(&mut self) -> Result<String> {
        let len = self.count("characters", 1)?;
        let bytes = self.take(len)?;
        String::from_utf8(bytes.to_vec())
            .map_err(|_| self.error(format!("a string before byte {} is not UTF-8", self.at)))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::String(self.string()?),
            9 => {
                let kind = self.u32()?;
                let (width, is_number) = match kind {
                    0 | 1 | 7 => (1, true),
                    2 | 3 => (2, true),
                    4..=6 => (4, true),
                    10..=12 => (8, true),
                    8 => (8, false),
                    _ => (12, false),
                };
                let count = self.count("array elements", width)?;
                if is_number {
                    let start = self.at;
                    self.take(count * width)?;
                    return Ok(Value::Numbers(NumberArray { kind, range: start..self.at }));
                }
                if depth >= MAX_NESTING {
                    return Err(self.error("arrays of metadata are nested too deeply"));
                }
                let mut items = Vec::with_capacity(count);
                for _ in 0..count {
                    items.push(self.value(kind, depth + 1)?);
                }
                Value::Array(items)
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.error(format!("metadata before byte {} has the unknown type {kind}", self.at))),
        })
    }

    /// Name, block format, shape, offset and size of one tensor.
    fn tensor(&mut self) -> Result<(String, GgmlDType, Vec<usize>, u64, u64)> {
        let name = self.string()?;
        let num_dims = self.u32()?;
        if num_dims == 0 || num_dims > MAX_DIMS {
            return Err(self.error(format!("tensor `{name}` has {num_dims} dimensions, expected 1..={MAX_DIMS}")));
        }
        let mut shape = Vec::new();
        let mut numbers: u64 = 1;
        for _ in 0..num_dims {
            let dim = self.u64()?;
            let product = numbers.checked_mul(dim).filter(|_| dim > 0);
            let (Some(product), Ok(dim)) = (product, usize::try_from(dim)) else {
                return Err(self.error(format!("tensor `{name}` has a dimension of {dim}")));
            };
            numbers = product;
            shape.push(dim);
        }
        shape.reverse();
        let kind = self.u32()?;
        let offset = self.u64()?;
        let dtype = block_format(kind).ok_or_else(|| {
            Error::unsupported(format!("block format {kind} of tensor `{name}` in `{}`", self.path.display()))
                .with_hint("use F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or a K-quant, as Q4_K")
        })?;
        let block = dtype.block_size();
        if !shape.last().is_some_and(|cols| cols.is_multiple_of(block)) {
            return Err(self.error(format!("tensor `{name}` {shape:?} has rows that are not whole blocks of {block}")));
        }
        let size = (numbers / block as u64).checked_mul(dtype.type_size() as u64);
        let size = size.ok_or_else(|| self.error(format!("tensor `{name}` {shape:?} is absurdly large")))?;
        Ok((name, dtype, shape, offset, size))
    }
}

/// ggml's numbers of the block formats that candle has.
fn block_format(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}
