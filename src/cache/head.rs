//! One KV head's keys, values and positions.

use super::storage::{KvDtype, Storage};
use crate::error::{Error, Result};
use crate::kernels::attend::HeadRows;

/// A full buffer grows by this share of its rows (1/16), so that slack stays small and growth is rare.
const GROWTH_SHIFT: u32 = 4;

/// And by at least so many rows.
const MIN_GROWTH: usize = 16;

/// The rows that one KV head keeps: `[kept, head_dim]` keys and values, and the position of each.
///
/// Positions are absolute: a kept key keeps the rotary phase of the position at which it was written. They ascend, until
/// rows [go one by one](Self::swap_remove).
#[derive(Debug, Clone, PartialEq)]
pub struct HeadCache {
    rows: Storage,
    positions: Vec<u32>,
    head_dim: usize,
    dtype: KvDtype,
}

impl HeadCache {
    /// An empty head; nothing is allocated.
    ///
    /// # Errors
    /// As [`KvDtype::check`]; [`Error::Shape`] if `head_dim` is 0.
    pub fn new(head_dim: usize, dtype: KvDtype) -> Result<Self> {
        dtype.check(head_dim)?;
        if head_dim == 0 {
            return Err(Error::shape("a head's dimension", "at least 1", head_dim));
        }
        Ok(Self { rows: Storage::new(dtype, head_dim), positions: Vec::new(), head_dim, dtype })
    }

    /// An empty head of the same kind.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self { rows: Storage::new(self.dtype, self.head_dim), positions: Vec::new(), ..*self }
    }

    /// Number of kept tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Absolute positions of the kept tokens, in the order of their rows: ascending, unless some went
    /// [one by one](Self::swap_remove).
    #[must_use]
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// How many of the kept tokens stand before a position.
    pub(super) fn count_below(&self, position: u32) -> usize {
        self.positions.partition_point(|&kept| kept < position)
    }

    /// Keys and values, for attention.
    #[must_use]
    pub fn rows(&self) -> HeadRows<'_> {
        self.rows.rows(self.head_dim, self.len())
    }

    /// Bytes that are allocated for keys, values and positions.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.rows.allocated() + self.positions.capacity() * size_of::<u32>()
    }

    /// Makes room for exactly `additional` tokens more.
    pub fn reserve_exact(&mut self, additional: usize) {
        self.rows.reserve_exact(additional);
        self.positions.reserve_exact(additional);
    }

    /// Evicts all tokens from position `first` on that are not in `kept` (ascending); they can't come back.
    pub fn evict_from(&mut self, first: u32, kept: &[u32]) {
        let settled = self.count_below(first);
        let mut rows: Vec<usize> = (0..settled).collect();
        rows.extend((settled..self.len()).filter(|&row| kept.binary_search(&self.positions[row]).is_ok()));
        self.rows.keep_rows(&rows);
        self.positions = rows.into_iter().map(|row| self.positions[row]).collect();
    }

    /// Evicts one token; the last row takes its place.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn swap_remove(&mut self, row: usize) {
        self.positions.swap_remove(row);
        self.rows.swap_remove(row);
    }

    /// Gives back what is allocated if it is much more than what the next tokens need.
    pub(super) fn trim(&mut self) {
        if self.rows.spare() > 2 * growth(self.len()) {
            self.shrink_to_fit();
        }
    }

    /// Gives back what is allocated beyond the kept tokens.
    pub fn shrink_to_fit(&mut self) {
        self.rows.shrink_to_fit();
        self.positions.shrink_to_fit();
    }

    /// Keeps one more token.
    ///
    /// * `key`, `value`: `[head_dim]`, the key rotated
    ///
    /// # Errors
    /// [`Error::Shape`] if a size does not fit or `position` is not above all kept ones.
    pub fn push(&mut self, key: &[f32], value: &[f32], position: u32) -> Result<()> {
        if key.len() != self.head_dim || value.len() != self.head_dim {
            return Err(Error::shape("a cached row", self.head_dim, (key.len(), value.len())));
        }
        if self.positions.last().is_some_and(|&last| last >= position) {
            return Err(Error::shape("a cached position", "above all earlier ones", position));
        }
        if self.rows.spare() == 0 {
            self.reserve_exact(growth(self.len()));
        }
        self.rows.push(key, value);
        self.positions.push(position);
        Ok(())
    }
}

/// By how many rows a full buffer of `len` rows grows.
pub(super) fn growth(len: usize) -> usize {
    (len >> GROWTH_SHIFT).max(MIN_GROWTH)
}
