//! One head's keys and values in two kinds of numbers.

use super::tiled::Buffer;
use super::{Columns, KeyBlocks, ValueBlocks};
use crate::error::Result;
use crate::kernels::attend::{HeadRows, MixedRows, Stored};
use crate::kernels::blocks::{Q4_0, Q8_0};
use crate::records::{Sink, Source};

/// What a prompt has left, and behind it what came later, in other numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixed {
    settled: Columns<KeyBlocks<Q8_0>, ValueBlocks<Q4_0>>,
    newest: Columns<KeyBlocks<Q8_0>, ValueBlocks<Q8_0>>,
}

impl Mixed {
    /// No rows.
    pub fn new(head_dim: usize) -> Self {
        Self { settled: Columns::new(head_dim), newest: Columns::new(head_dim) }
    }

    /// The rows, for attention.
    pub fn view(&self) -> MixedRows<'_> {
        MixedRows { settled: self.settled.view(), newest: self.newest.view() }
    }

    /// The first rows, which are in the numbers of what a prompt leaves.
    pub fn num_settled(&self) -> usize {
        self.settled.len()
    }

    /// Adds a row that a prompt leaves, where all rows are such.
    pub fn push_settled(&mut self, key: &[f32], value: &[f32]) {
        self.settled.push(key, value);
    }

    /// Adds a row that came later.
    pub fn push(&mut self, key: &[f32], value: &[f32]) {
        self.newest.push(key, value);
    }

    /// Gives all rows the numbers of what a prompt leaves, and makes room for exactly so many more.
    pub fn settle(&mut self, additional: usize, head_dim: usize) {
        let len = self.newest.len();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        HeadRows { stored: Stored::Q8_0(self.newest.view()), head_dim, len }.widen_to(&mut keys, &mut values);
        self.settled.reserve_exact(len + additional);
        for (key, value) in keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim)) {
            self.settled.push(key, value);
        }
        self.newest.keep_rows(&[]);
    }

    /// See [`Storage::replace_values`](super::Storage::replace_values).
    pub fn replace_values(&mut self, values: &[f32], head_dim: usize) {
        self.settled.replace_values(values, head_dim);
    }

    /// See [`Storage::replace_keys`](super::Storage::replace_keys).
    pub fn replace_keys(&mut self, keys: &[f32], center: &[f32]) {
        let (settled, newest) = keys.split_at(self.settled.len() * center.len());
        self.settled.replace_keys(settled, center);
        self.newest.replace_keys(newest, center);
    }

    /// See [`Storage::center_keys`](super::Storage::center_keys).
    pub fn center_keys(&mut self, center: &[f32]) {
        self.settled.center_keys(center);
        self.newest.center_keys(center);
    }
}

impl Buffer for Mixed {
    fn len(&self) -> usize {
        self.settled.len() + self.newest.len()
    }

    fn allocated(&self) -> usize {
        self.settled.allocated() + self.newest.allocated()
    }

    fn spare(&self) -> usize {
        self.newest.spare()
    }

    fn reserve_exact(&mut self, rows: usize) {
        self.newest.reserve_exact(rows);
    }

    fn keep_rows(&mut self, rows: &[usize]) {
        let num_settled = self.settled.len();
        let (settled, newest) = rows.split_at(rows.partition_point(|&row| row < num_settled));
        self.settled.keep_rows(settled);
        self.newest.keep_rows(&newest.iter().map(|row| row - num_settled).collect::<Vec<_>>());
    }

    fn swap_remove(&mut self, row: usize) {
        let num_settled = self.settled.len();
        if row >= num_settled {
            self.newest.swap_remove(row - num_settled);
        } else {
            assert!(row + 1 == self.len(), "a row in the place of row {row}, which is in other numbers");
            self.settled.swap_remove(row);
        }
    }

    fn shrink_to_fit(&mut self) {
        self.settled.shrink_to_fit();
        self.newest.shrink_to_fit();
    }

    fn shared_rows(&self) -> usize {
        self.settled.shared_rows() + self.newest.shared_rows()
    }

    fn shared(&self) -> usize {
        self.settled.shared() + self.newest.shared()
    }

    fn save(&self, sink: &mut Sink<'_>) {
        sink.count(self.settled.len());
        self.settled.save(sink);
        self.newest.save(sink);
    }

    fn load(&mut self, rows: usize, source: &mut Source) -> Result<()> {
        let settled = source.count()?;
        if settled > rows {
            return Err(source.error(format_args!("{settled} of {rows} rows are what a prompt has left")));
        }
        self.settled.load(settled, source)?;
        self.newest.load(rows - settled, source)
    }
}
