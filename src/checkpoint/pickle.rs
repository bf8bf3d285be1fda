//! A reader of the pickles in PyTorch checkpoints, which runs nothing.
//!
//! Format: <https://github.com/python/cpython/blob/main/Lib/pickletools.py>, protocol 2 as `torch.save` writes it, and
//! what later protocols add as far as it is harmless. A pickle is a program that may call any function of Python; here
//! only the few names are known that rebuild a tensor, and they become data. Any other name ends the reading.
//!
//! Values lie in one list and refer to each other by their place in it, so that what is shared stays shared: memory
//! and time grow with the pickle's length, and a structure that contains itself costs nothing and is never walked.
//!
//! Not for: what the tensors are (see [`super::pth`]), or writing.

mod machine;

use std::path::Path;

use self::machine::Machine;
use crate::error::Result;

/// Characters of a name from a file that a message shows.
const MAX_SHOWN: usize = 120;

/// A value's place in [`Pickle::values`].
pub(super) type Id = usize;

/// A name that a pickle may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global<'a> {
    /// `collections.OrderedDict`.
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`.
    RebuildTensor,
    /// `torch._utils._rebuild_tensor_v3`, which is told the type of the numbers.
    RebuildTypedTensor,
    /// `torch._utils._rebuild_parameter`.
    RebuildParameter,
    /// A class of storages, as `FloatStorage`.
    Storage(&'a str),
    /// A type of numbers, as `bfloat16`.
    Dtype(&'a str),
}

/// A storage: a member of the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Storage<'a> {
    /// Class, as `FloatStorage`.
    pub class: &'a str,
    /// A text: the member's name.
    pub key: Id,
    /// Numbers; bytes in an `UntypedStorage`.
    pub len: i64,
}

/// A tensor, not checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tensor<'a> {
    /// A [`Value::Storage`].
    pub storage: Id,
    /// Numbers before the first one in the storage.
    pub offset: i64,
    /// A tuple.
    pub shape: Id,
    /// A tuple.
    pub strides: Id,
    /// Type of the numbers, if it does not follow from the storage.
    pub dtype: Option<&'a str>,
}

/// What a pickle is made of.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    Int(i64),
    Text(&'a str),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global<'a>),
    Storage(Storage<'a>),
    Tensor(Tensor<'a>),
    /// A list; nothing in a checkpoint needs its items.
    List,
    /// Something that only needs a name in messages.
    Other(&'static str),
}

impl Value<'_> {
    /// What it is, in messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Int(_) => "an integer",
            Self::Text(_) => "a text",
            Self::Tuple(_) => "a tuple",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a name",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
            Self::List => "a list",
            Self::Other(kind) => kind,
        }
    }
}

/// A pickle that was read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    /// Every value.
    pub values: Vec<Value<'a>>,
    /// The outermost one.
    pub root: Id,
}

/// Reads a pickle.
///
/// * `path`: named in errors
/// * `bytes`: the pickle; what follows its end is ignored
///
/// # Errors
/// [`Error::BadFile`](crate::error::Error::BadFile) if it is cut off, inconsistent or beyond the limits, uses a name that is not known, or an
/// instruction that a checkpoint does not need.
pub(super) fn read<'a>(path: &Path, bytes: &'a [u8]) -> Result<Pickle<'a>> {
    let mut machine = Machine::new(path, bytes);
    let root = machine.run()?;
    Ok(Pickle { values: machine.values, root })
}

/// A name from a file, cut to a length that fits into a message.
pub(super) fn shown(name: &str) -> String {
    let mut text: String = name.chars().take(MAX_SHOWN).collect();
    if text.len() < name.len() {
        text.push_str("...");
    }
    text
}
