//! Rows of numbers in the cache's storage format, grown with bounded slack.

use half::f16;
use serde::Serialize;

use crate::kernels::element::Element;

/// The format in which keys and values are stored; scores and statistics are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// 4 bytes a number, exact.
    F32,
    /// 2 bytes a number; the default.
    F16,
}

impl KvDtype {
    /// Bytes of one stored number.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }

    /// The name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }
}

/// A growing buffer of numbers in one format.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Storage {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Storage {
    pub(super) fn new(dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32(Vec::new()),
            KvDtype::F16 => Self::F16(Vec::new()),
        }
    }

    /// Bytes that are allocated.
    pub(super) fn allocated(&self) -> usize {
        match self {
            Self::F32(numbers) => numbers.capacity() * size_of::<f32>(),
            Self::F16(numbers) => numbers.capacity() * size_of::<f16>(),
        }
    }

    /// Makes room for exactly `additional` numbers more.
    pub(super) fn reserve_exact(&mut self, additional: usize) {
        match self {
            Self::F32(numbers) => numbers.reserve_exact(additional),
            Self::F16(numbers) => numbers.reserve_exact(additional),
        }
    }

    /// Keeps `rows`, ascending, of the rows of `width` numbers, and drops the others; nothing is given back yet.
    pub(super) fn keep_rows(&mut self, rows: &[usize], width: usize) {
        fn keep<T: Copy>(numbers: &mut Vec<T>, rows: &[usize], width: usize) {
            for (to, &from) in rows.iter().enumerate().filter(|(to, from)| to != *from) {
                numbers.copy_within(from * width..(from + 1) * width, to * width);
            }
            numbers.truncate(rows.len() * width);
        }
        match self {
            Self::F32(numbers) => keep(numbers, rows, width),
            Self::F16(numbers) => keep(numbers, rows, width),
        }
    }

    /// Gives back what is allocated beyond the stored numbers.
    pub(super) fn shrink_to_fit(&mut self) {
        match self {
            Self::F32(numbers) => numbers.shrink_to_fit(),
            Self::F16(numbers) => numbers.shrink_to_fit(),
        }
    }

    /// Numbers that can be added before the buffer must grow.
    pub(super) fn spare(&self) -> usize {
        match self {
            Self::F32(numbers) => numbers.capacity() - numbers.len(),
            Self::F16(numbers) => numbers.capacity() - numbers.len(),
        }
    }

    /// Adds a row, rounded to the format.
    pub(super) fn push(&mut self, row: &[f32]) {
        match self {
            Self::F32(numbers) => numbers.extend_from_slice(row),
            Self::F16(numbers) => numbers.extend(row.iter().map(|&value| <f16 as Element>::narrow(value))),
        }
    }
}
