//! Named tensors of a checkpoint, in one file or several: what they are called, how they are stored, where their bytes
//! are.
//!
//! Nothing is read before it is asked for: most tensors lie in mapped files, and those that must be put together from
//! several parts are made one at a time. Not for: what a name means (see [`super::weights`]).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kernels::quant::{SharedBytes, WeightFormat};
use crate::mapped;

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum StoredDtype {
    /// A format that is computed on: plain floats or quantised blocks.
    Usable(WeightFormat),
    /// Any other, by the name that its file uses.
    Other(String),
}

impl std::fmt::Display for StoredDtype {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usable(dtype) => write!(formatter, "{dtype}"),
            Self::Other(name) => formatter.write_str(name),
        }
    }
}

/// Makes a tensor's bytes, row after row, little-endian, when they are needed: somebody's bytes, and which of them.
pub type MakeBytes = Arc<dyn Fn() -> Result<(SharedBytes, Range<usize>)> + Send + Sync>;

/// Where a tensor's bytes come from.
#[derive(Clone)]
pub enum TensorData {
    /// They lie in bytes that somebody owns, as a mapped file.
    Mapped { owner: SharedBytes, range: Range<usize> },
    /// They are put together when they are asked for, as from the parts of several files.
    Made { len: usize, make: MakeBytes },
}

impl std::fmt::Debug for TensorData {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mapped { range, .. } => write!(formatter, "Mapped({range:?})"),
            Self::Made { len, .. } => write!(formatter, "Made({len})"),
        }
    }
}

/// One tensor of a checkpoint.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// The file that it comes from, for messages.
    pub path: Arc<Path>,
    /// Format of its numbers.
    pub dtype: StoredDtype,
    /// Sizes, outermost first: a weight is `[out_features, in_features]`.
    pub shape: Vec<usize>,
    /// Its bytes, row after row.
    pub data: TensorData,
}

impl StoredTensor {
    /// Size in bytes, as stored.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.data {
            TensorData::Mapped { range, .. } => range.len(),
            TensorData::Made { len, .. } => *len,
        }
    }

    /// Whether it has no numbers.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tensor's bytes, beginning at an address that is a multiple of `align` (a power of two, at most
    /// [`MAX_ALIGN`]): as they are in their file if that holds already, else in memory of their own.
    ///
    /// # Errors
    /// Whatever putting the tensor together fails with; [`Error::Shape`] if it was mapped outside of its file.
    pub fn aligned(&self, align: usize) -> Result<(SharedBytes, Range<usize>)> {
        let (owner, range) = match &self.data {
            TensorData::Mapped { owner, range } => (Arc::clone(owner), range.clone()),
            TensorData::Made { make, .. } => make()?,
        };
        let all = (*owner).as_ref();
        let bytes = all.get(range.clone()).ok_or_else(|| Error::shape("a tensor's bytes", &range, all.len()))?;
        let is_aligned = (bytes.as_ptr() as usize).is_multiple_of(align);
        if is_aligned {
            return Ok((owner, range));
        }
        let copy = aligned_copy(bytes);
        mapped::release(bytes);
        Ok(copy)
    }
}

/// The largest alignment that [`StoredTensor::aligned`] and [`aligned_buffer`] give.
pub const MAX_ALIGN: usize = 64;

/// A buffer of zeros and the `len` bytes of it that begin at a multiple of [`MAX_ALIGN`].
#[must_use]
pub fn aligned_buffer(len: usize) -> (Vec<u8>, Range<usize>) {
    let buffer = vec![0; len + MAX_ALIGN];
    let address = buffer.as_ptr() as usize;
    let start = address.next_multiple_of(MAX_ALIGN) - address;
    (buffer, start..start + len)
}

fn aligned_copy(bytes: &[u8]) -> (SharedBytes, Range<usize>) {
    let (mut buffer, range) = aligned_buffer(bytes.len());
    buffer[range.clone()].copy_from_slice(bytes);
    (Arc::new(buffer), range)
}

/// All tensors of a checkpoint, by the names that its format gives them.
#[derive(Debug, Clone)]
pub struct Tensors {
    /// The file or folder, for messages about what is not there.
    path: PathBuf,
    by_name: BTreeMap<String, StoredTensor>,
    /// What to do if one is missing, if there is something to be said.
    hint: Option<String>,
}

impl Tensors {
    /// No tensors yet, of a checkpoint at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), by_name: BTreeMap::new(), hint: None }
    }

    /// Says what to do if a tensor is missing.
    pub(super) fn set_hint(&mut self, hint: String) {
        self.hint = Some(hint);
    }

    /// The error for a tensor that is not there.
    pub(super) fn missing(&self, name: &str) -> Error {
        let error = Error::bad_file(&self.path, format!("tensor `{name}` is missing"));
        match &self.hint {
            Some(hint) => error.with_hint(hint),
            None => error,
        }
    }

    /// Gives a tensor another name, in place of the one that has it, if any.
    pub(super) fn rename(&mut self, from: &str, to: &str) {
        if let Some(tensor) = self.by_name.remove(from) {
            self.by_name.insert(to.to_owned(), tensor);
        }
    }

    /// Adds a tensor.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the name is taken.
    pub fn insert(&mut self, name: impl Into<String>, tensor: StoredTensor) -> Result<()> {
        use std::collections::btree_map::Entry;
        match self.by_name.entry(name.into()) {
            Entry::Vacant(entry) => _ = entry.insert(tensor),
            Entry::Occupied(entry) => {
                let other = entry.get().path.display();
                return Err(Error::bad_file(
                    &tensor.path,
                    format!("tensor `{}` is given twice, the other time in `{other}`", entry.key()),
                ));
            }
        }
        Ok(())
    }

    /// The checkpoint's file or folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A tensor by its name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.by_name.get(name)
    }

    /// All tensors, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.by_name.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Bytes of all tensors, as stored.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.by_name.values().map(StoredTensor::len).sum()
    }

    /// The format that holds the most bytes; `None` without any tensor.
    #[must_use]
    pub fn main_dtype(&self) -> Option<&StoredDtype> {
        let mut bytes: BTreeMap<&StoredDtype, usize> = BTreeMap::new();
        for tensor in self.by_name.values() {
            *bytes.entry(&tensor.dtype).or_default() += tensor.len();
        }
        let main = bytes.into_iter().max_by_key(|(_, bytes)| *bytes);
        main.map(|(dtype, _)| dtype)
    }
}
