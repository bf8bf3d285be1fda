//! Reading a GGUF file's header: what stands before the tensors' data.
//!
//! A header is not believed. Counts are compared with what the file has room for and with what real files have, nothing is
//! reserved by them, and texts and arrays stay where they are in the file: memory grows with the number of keys and
//! tensors that are really there, of which at most [`MAX_ENTRIES`] each are read.
//!
//! Not for: what a key means.

use std::collections::HashMap;
use std::path::Path;

use super::formats;
use super::{Array, TensorEntry, Value, text_of};
use crate::error::{Error, Result};
use crate::foreign;
use crate::kernels::quant::WeightFormat;

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// ggml's own limit.
const MAX_DIMS: u32 = 4;
/// Arrays of arrays deeper than this are hostile.
const MAX_NESTING: usize = 4;
/// Metadata entries, and tensors: the largest models have some dozen and a few thousand.
const MAX_ENTRIES: usize = 1 << 16;
/// Texts in an array: the largest vocabularies have a million tokens, or half as many merges.
const MAX_TEXTS: usize = 1 << 21;

/// What a cut-off or damaged file should be replaced by.
const AGAIN: &str = "the file is cut off or damaged: fetch it again";

/// What stands before the tensors' data.
pub(super) struct Header {
    pub metadata: HashMap<String, Value>,
    pub tensors: HashMap<String, TensorEntry>,
}

/// Name, block format, shape, offset and size of one tensor.
type RawTensor = (String, WeightFormat, Vec<usize>, u64, u64);

impl Header {
    /// Reads a file's header.
    ///
    /// # Errors
    /// As [`super::GgufFile::open`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut cursor = Cursor { path, bytes, at: 0 };
        if bytes.get(..4) != Some(MAGIC) {
            return Err(foreign::unlike(path, bytes, "a model in GGUF format", "give a model in GGUF format"));
        }
        cursor.at = 4;
        let version = cursor.u32()?;
        if (1..=3).contains(&version.swap_bytes()) {
            return Err(Error::unsupported(format!("a big-endian GGUF file (`{}`)", path.display()))
                .with_hint("convert it with gguf-py's `gguf_convert_endian.py MODEL little`"));
        }
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!("GGUF version {version} (`{}`)", path.display()))
                .with_hint("convert the model anew; versions 2 and 3, little-endian, are read"));
        }
        let tensor_count = cursor.entries("tensors", 8 + 4 + 4 + 8)?;
        let metadata_count = cursor.entries("metadata entries", 8 + 4 + 1)?;
        let metadata = cursor.metadata(metadata_count)?;
        refuse_other_kinds(path, bytes, &metadata)?;
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(alignment)) if alignment.is_power_of_two() && *alignment <= 1 << 20 => *alignment,
            Some(other) => return Err(cursor.error(format!("metadata `general.alignment` is {other:?}"))),
        };
        let mut entries = Vec::new();
        for _ in 0..tensor_count {
            entries.push(cursor.tensor()?);
        }
        let tensors = cursor.place(entries, alignment)?;
        Ok(Self { metadata, tensors })
    }
}

/// Refuses files in this format that hold no model, by name: their tensors need not even be readable.
fn refuse_other_kinds(path: &Path, bytes: &[u8], metadata: &HashMap<String, Value>) -> Result<()> {
    let text = |key: &str| match metadata.get(key) {
        Some(Value::Text(range)) => text_of(&bytes[range.clone()]),
        _ => String::new(),
    };
    let (kind, architecture) = (text("general.type"), text("general.architecture"));
    let has = |key: &str| metadata.contains_key(key);
    let (what, remedy) = match (kind.as_str(), architecture.as_str()) {
        ("adapter", _) => (
            "an adapter (LoRA)",
            "merge it into its base model with llama.cpp's `llama-export-lora`, and give the result",
        ),
        (_, "controlvector") => ("a control vector", "give the model that it belongs to"),
        ("imatrix", _) => ("an importance matrix", "it only serves to quantise a model: give the model"),
        _ if has("imatrix.datasets") || has("imatrix.chunk_count") => {
            ("an importance matrix", "it only serves to quantise a model: give the model")
        }
        ("mmproj", _) | (_, "clip") => {
            ("the part of a model that sees or hears (mmproj)", "give the text model that it belongs to")
        }
        ("vocab", _) => ("a vocabulary without a model", "give the model that it belongs to"),
        _ => return Ok(()),
    };
    Err(Error::unsupported(format!("{what} (`{}`)", path.display())).with_hint(remedy))
}

/// A reader of the header that never reads beyond the file.
pub(super) struct Cursor<'a> {
    pub path: &'a Path,
    pub bytes: &'a [u8],
    pub at: usize,
}

impl<'a> Cursor<'a> {
    fn error(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(self.path, reason)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            let reason = format!("the header needs {len} bytes at {}, the file has {}", self.at, self.bytes.len());
            return Err(self.error(reason).with_hint(AGAIN));
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
                .with_hint(AGAIN)),
        }
    }

    /// As [`count`](Self::count), of what a header has few of.
    fn entries(&mut self, what: &str, least: usize) -> Result<usize> {
        self.at_most(what, least, MAX_ENTRIES)
    }

    fn at_most(&mut self, what: &str, least: usize, most: usize) -> Result<usize> {
        let count = self.count(what, least)?;
        if count > most {
            let reason = format!("the header announces {count} {what}, expected at most {most}");
            return Err(self.error(reason).with_hint(AGAIN));
        }
        Ok(count)
    }

    /// The bytes of a text, whatever they are.
    pub fn text(&mut self) -> Result<&'a [u8]> {
        let len = self.count("characters", 1)?;
        self.take(len)
    }

    fn metadata(&mut self, count: usize) -> Result<HashMap<String, Value>> {
        let mut metadata = HashMap::new();
        for _ in 0..count {
            let key = text_of(self.text()?);
            let kind = self.u32()?;
            let value = self.value(kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(self.error(format!("metadata `{key}` is given twice")));
            }
        }
        Ok(metadata)
    }

    /// A value of a kind; texts and arrays are only walked over.
    pub fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => {
                let len = self.text()?.len();
                Value::Text(self.at - len..self.at)
            }
            9 => self.elements(depth)?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.error(format!("metadata before byte {} has the unknown type {kind}", self.at))),
        })
    }

    fn elements(&mut self, depth: usize) -> Result<Value> {
        let kind = self.u32()?;
        let (width, is_number) = match kind {
            0 | 1 | 7 => (1, true),
            2 | 3 => (2, true),
            4..=6 => (4, true),
            10..=12 => (8, true),
            8 => (8, false),
            _ => (12, false),
        };
        let what = "array elements";
        let len = if is_number { self.count(what, width)? } else { self.at_most(what, width, MAX_TEXTS)? };
        let start = self.at;
        if is_number {
            self.take(len * width)?;
        } else {
            if depth >= MAX_NESTING {
                return Err(self.error("arrays of metadata are nested too deeply"));
            }
            for _ in 0..len {
                self.value(kind, depth + 1)?;
            }
        }
        Ok(Value::Array(Array { kind, len, range: start..self.at }))
    }

    fn tensor(&mut self) -> Result<RawTensor> {
        let name = text_of(self.text()?);
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
        let dtype = WeightFormat::of_number(kind).ok_or_else(|| {
            let (format, path) = (formats::shown(kind), self.path.display());
            Error::unsupported(format!("the block format {format} of tensor `{name}` in `{path}`"))
                .with_hint("take the same model with K-quants, as Q4_K_M, or in Q8_0, Q5_0, Q4_0, F16, BF16 or F32")
        })?;
        let block = dtype.block_size();
        if !shape.last().is_some_and(|cols| cols.is_multiple_of(block)) {
            return Err(self.error(format!("tensor `{name}` {shape:?} has rows that are not whole blocks of {block}")));
        }
        let size = (numbers / block as u64).checked_mul(dtype.block_bytes() as u64);
        let size = size.ok_or_else(|| self.error(format!("tensor `{name}` {shape:?} is absurdly large")))?;
        Ok((name, dtype, shape, offset, size))
    }

    /// Finds the tensors' bytes, behind the header that ends here.
    fn place(&self, entries: Vec<RawTensor>, alignment: u64) -> Result<HashMap<String, TensorEntry>> {
        let data_start = (self.at as u64).next_multiple_of(alignment);
        let mut tensors = HashMap::new();
        for (name, dtype, shape, offset, size) in entries {
            let start = data_start.checked_add(offset);
            let end = start.and_then(|start| start.checked_add(size));
            let range = match (start, end) {
                (Some(start), Some(end)) if end <= self.bytes.len() as u64 => {
                    usize::try_from(start).ok().zip(usize::try_from(end).ok()).map(|(start, end)| start..end)
                }
                _ => None,
            };
            let Some(range) = range else {
                let reason = format!("tensor `{name}` reaches beyond the end of the file ({} bytes)", self.bytes.len());
                return Err(self.error(reason).with_hint("the file is cut off: fetch it again"));
            };
            if offset % alignment != 0 {
                return Err(self.error(format!("tensor `{name}` is not aligned to {alignment} bytes")));
            }
            if tensors.insert(name.clone(), TensorEntry { dtype, shape, range }).is_some() {
                return Err(self.error(format!("tensor `{name}` is given twice")));
            }
        }
        Ok(tensors)
    }
}
