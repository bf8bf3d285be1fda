//! One KV head's keys and values.

use super::storage::Storage;
use crate::cache::{KvDtype, growth};
use crate::error::{Error, Result};
use crate::kernels::attend::HeadRows;
use crate::records::{Sink, Source};

/// The rows that one KV head keeps: `[kept, head_dim]` keys and values. Whose they are, a
/// [`Ledger`](crate::cache::Ledger) knows.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadCache {
    rows: Storage,
    len: usize,
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
        Ok(Self { rows: Storage::new(dtype, head_dim), len: 0, head_dim, dtype })
    }

    /// An empty head of the same kind.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self { rows: Storage::new(self.dtype, self.head_dim), len: 0, ..*self }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The numbers that rows are stored in.
    #[must_use]
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// The first rows, which are in other numbers than those that are added, see [`HeadRows::num_settled`].
    #[must_use]
    pub fn num_settled(&self) -> usize {
        self.rows.num_settled()
    }

    /// Bytes of the rows that it holds.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let settled = self.num_settled();
        settled * self.dtype.settled().token_bytes(self.head_dim)
            + (self.len - settled) * self.dtype.newest().token_bytes(self.head_dim)
    }

    /// Gives all rows the numbers of what a prompt leaves, and makes room for exactly so many more.
    pub fn settle(&mut self, additional: usize) {
        self.rows.settle(additional, self.head_dim);
    }

    /// Keys and values, for attention.
    #[must_use]
    pub fn rows(&self) -> HeadRows<'_> {
        self.rows.rows(self.head_dim, self.len)
    }

    /// Keys as f32, `[rows, head_dim]`.
    #[must_use]
    pub fn keys(&self) -> Vec<f32> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        self.rows().widen_to(&mut keys, &mut values);
        keys
    }

    /// Bytes that are allocated.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.rows.allocated()
    }

    /// Bytes of rows that lie in a mapped file, which others may read, too.
    #[must_use]
    pub fn shared_bytes(&self) -> usize {
        self.rows.shared()
    }

    /// Writes all rows as they are stored.
    pub(super) fn save(&self, sink: &mut Sink<'_>) {
        self.rows.save(sink);
    }

    /// Takes rows that were saved, where they lie; a copy is made of what changes.
    ///
    /// # Errors
    /// [`Error::BadFile`] if there are not as many.
    pub(super) fn load(&mut self, rows: usize, source: &mut Source) -> Result<()> {
        self.rows.load(rows, source)?;
        self.len = rows;
        Ok(())
    }

    /// Says what keys have in common, while there are none: a format that gains by it does not store that with each key.
    /// What attention reads is the same but for what rounding makes of it.
    ///
    /// * `center`: `[head_dim]`
    ///
    /// # Panics
    /// If there are rows already.
    pub fn center_keys(&mut self, center: &[f32]) {
        assert!(self.is_empty() && center.len() == self.head_dim, "{} rows", self.len);
        self.rows.center_keys(center);
    }

    /// Overwrites the values of all rows, which a prompt has left.
    ///
    /// * `values`: `[rows, head_dim]`
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many, or rows have come since.
    pub fn replace_values(&mut self, values: &[f32]) -> Result<()> {
        let has_newest = self.dtype.settled() != self.dtype.newest() && self.num_settled() != self.len;
        if values.len() != self.len * self.head_dim || has_newest {
            return Err(Error::shape("the values of a head", self.len * self.head_dim, values.len()));
        }
        self.rows.replace_values(values, self.head_dim);
        Ok(())
    }

    /// Overwrites all keys.
    ///
    /// * `keys`: `[rows, head_dim]`, rotated
    ///
    /// # Panics
    /// If there are not as many.
    pub(super) fn replace_keys(&mut self, keys: &[f32]) {
        assert!(keys.len() == self.len * self.head_dim, "{} numbers for {} keys", keys.len(), self.len);
        self.rows.replace_keys(keys, self.head_dim);
    }

    /// Rows that can be added before the buffers must grow.
    pub(super) fn spare(&self) -> usize {
        self.rows.spare()
    }

    /// Bytes that the next row lets full buffers grow by.
    pub(super) fn growth_bytes(&self) -> usize {
        if self.rows.spare() > 0 {
            return 0;
        }
        self.growth() * self.dtype.newest().token_bytes(self.head_dim)
    }

    /// Makes room for exactly `additional` rows more.
    pub fn reserve_exact(&mut self, additional: usize) {
        self.rows.reserve_exact(additional);
    }

    /// Keeps some rows, in their order; the others can't come back.
    ///
    /// * `kept`: ascending
    ///
    /// # Panics
    /// If there is no such row.
    pub fn keep_rows(&mut self, kept: &[usize]) {
        assert!(
            kept.is_sorted_by(|a, b| a < b) && kept.last().is_none_or(|&row| row < self.len),
            "rows of {}",
            self.len
        );
        if kept.len() < self.len {
            self.rows.keep_rows(kept);
            self.len = kept.len();
        }
    }

    /// Lets one row go; the last row takes its place.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn swap_remove(&mut self, row: usize) {
        assert!(row < self.len, "row {row} of {}", self.len);
        self.rows.swap_remove(row);
        self.len -= 1;
    }

    /// Lets the last rows go; what is allocated stays.
    ///
    /// * `len`: rows that stay
    pub fn truncate(&mut self, len: usize) {
        while self.len > len {
            self.swap_remove(self.len - 1);
        }
    }

    /// By how many rows full buffers grow: what is shared is no reason for more.
    fn growth(&self) -> usize {
        growth(self.len - self.rows.shared_rows())
    }

    /// Gives back what is allocated if it is much more than what the next rows need.
    pub(super) fn trim(&mut self) {
        if self.rows.spare() > 2 * self.growth() {
            self.shrink_to_fit();
        }
    }

    /// Gives back what is allocated beyond the rows.
    pub fn shrink_to_fit(&mut self) {
        self.rows.shrink_to_fit();
    }

    /// Adds a row.
    ///
    /// * `key`, `value`: `[head_dim]`, the key rotated
    ///
    /// # Errors
    /// [`Error::Shape`] if a size does not fit.
    pub fn push(&mut self, key: &[f32], value: &[f32]) -> Result<()> {
        self.expect_row(key, value)?;
        if self.rows.spare() == 0 {
            self.reserve_exact(self.growth());
        }
        self.rows.push(key, value);
        self.len += 1;
        Ok(())
    }

    /// Adds a row that a prompt leaves, after [`settle`](Self::settle).
    ///
    /// * `key`, `value`: as for [`push`](Self::push)
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_settled(&mut self, key: &[f32], value: &[f32]) -> Result<()> {
        self.expect_row(key, value)?;
        self.rows.push_settled(key, value);
        self.len += 1;
        Ok(())
    }

    fn expect_row(&self, key: &[f32], value: &[f32]) -> Result<()> {
        if key.len() != self.head_dim || value.len() != self.head_dim {
            return Err(Error::shape("a cached row", self.head_dim, (key.len(), value.len())));
        }
        Ok(())
    }
}
