//! One head's keys and values in the cache's storage format, grown with bounded slack.
//!
//! Rows are rounded once, when they are written; what is kept of them later is moved as it is stored. Keys lie in tiles
//! of 16 rows, and quantised values in fours of rows (see [`crate::kernels::tiles`]), as attention reads them.
//!
//! Not for: knowing which positions the rows belong to (see [`Ledger`](crate::cache::Ledger)).

use std::marker::PhantomData;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::cache::KvDtype;
use crate::kernels::attend::{BlockRows, FOUR, FloatRows, HeadRows, Stored};
use crate::kernels::blocks::{BLOCK, CacheFormat, Q4_0, Q8_0};
use crate::kernels::tiles::{Tiles, place};

/// Rows of a tile of keys, and of scales.
const TILE: usize = 16;

/// A growing buffer of rows of `width` numbers in tiles of `ROWS` rows.
#[derive(Debug, Clone, PartialEq)]
struct Tiled<T, const ROWS: usize> {
    numbers: Vec<T>,
    width: usize,
}

impl<T: Copy, const ROWS: usize> Tiled<T, ROWS> {
    fn new(width: usize) -> Self {
        Self { numbers: Vec::new(), width }
    }

    fn view(&self) -> Tiles<'_, T, ROWS> {
        Tiles { numbers: &self.numbers, width: self.width, len: self.len() }
    }

    fn len(&self) -> usize {
        self.numbers.len() / self.width
    }

    fn allocated(&self) -> usize {
        self.numbers.capacity() * size_of::<T>()
    }

    fn reserve_exact(&mut self, rows: usize) {
        self.numbers.reserve_exact(rows * self.width);
    }

    fn shrink_to_fit(&mut self) {
        self.numbers.shrink_to_fit();
    }

    fn spare(&self) -> usize {
        (self.numbers.capacity() - self.numbers.len()) / self.width
    }

    /// Adds a row, which `write` writes.
    fn push(&mut self, write: impl FnOnce(&mut [T]), zero: T) {
        let start = self.numbers.len();
        self.numbers.resize(start + self.width, zero);
        write(&mut self.numbers[start..]);
        if ROWS > 1 && self.len().is_multiple_of(ROWS) {
            let tile = self.numbers.len() - ROWS * self.width;
            let rows = self.numbers[tile..].to_vec();
            for (lane, row) in rows.chunks_exact(self.width).enumerate() {
                for (number, &value) in row.iter().enumerate() {
                    self.numbers[tile + number * ROWS + lane] = value;
                }
            }
        }
    }

    /// Drops a row, and puts the last one in its place; nothing is given back yet.
    fn swap_remove(&mut self, row: usize) {
        let (len, width) = (self.len(), self.width);
        let last = len - 1;
        let ((from, from_step), (to, to_step)) = (place::<ROWS>(last, len, width), place::<ROWS>(row, len, width));
        for number in 0..width {
            self.numbers[to + number * to_step] = self.numbers[from + number * from_step];
        }
        if ROWS > 1 && len.is_multiple_of(ROWS) {
            // The last tile is not whole any more: its rows lie one after the other again.
            let tile = (len - ROWS) * width;
            let columns = self.numbers[tile..].to_vec();
            for (number, column) in columns.chunks_exact(ROWS).enumerate() {
                for (lane, &value) in column.iter().enumerate() {
                    self.numbers[tile + lane * width + number] = value;
                }
            }
        }
        self.numbers.truncate(last * width);
    }

    /// Keeps `rows`, ascending, and drops the others; nothing is given back yet.
    fn keep_rows(&mut self, rows: &[usize]) {
        let (len, width) = (self.len(), self.width);
        let unchanged = rows.iter().enumerate().take_while(|(to, from)| to == *from).count();
        if unchanged == len {
            return;
        }
        // A tile's rows come from its own place or from behind it: tiles before the first changed one stay, and the
        // tiles behind the one that is written still hold all that is to come.
        let first = unchanged / ROWS * ROWS;
        let mut scratch = Vec::with_capacity(ROWS * width);
        for (index, rows) in rows[first..].chunks(ROWS).enumerate() {
            let target = (first + index * ROWS) * width;
            let places = rows.iter().map(|&row| place::<ROWS>(row, len, width));
            scratch.clear();
            if rows.len() == ROWS {
                let places: Vec<_> = places.collect();
                for number in 0..width {
                    scratch.extend(places.iter().map(|(start, step)| self.numbers[start + number * step]));
                }
            } else {
                for (start, step) in places {
                    scratch.extend((0..width).map(|number| self.numbers[start + number * step]));
                }
            }
            self.numbers[target..target + scratch.len()].copy_from_slice(&scratch);
        }
        self.numbers.truncate(rows.len() * width);
    }
}

/// Numbers that are rounded one by one.
pub(super) trait Float: Copy + Default {
    fn round(row: &[f32], out: &mut [Self]);
}

impl Float for f32 {
    fn round(row: &[f32], out: &mut [Self]) {
        out.copy_from_slice(row);
    }
}

impl Float for f16 {
    fn round(row: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(row);
    }
}

/// Keys and values as plain numbers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Floats<T> {
    keys: Tiled<T, TILE>,
    values: Tiled<T, 1>,
}

impl<T: Float> Floats<T> {
    fn new(head_dim: usize) -> Self {
        Self { keys: Tiled::new(head_dim), values: Tiled::new(head_dim) }
    }

    fn rows(&self) -> FloatRows<'_, T> {
        FloatRows { keys: self.keys.view(), values: self.values.view() }
    }

    fn push(&mut self, key: &[f32], value: &[f32]) {
        self.keys.push(|out| T::round(key, out), T::default());
        self.values.push(|out| T::round(value, out), T::default());
    }

    fn allocated(&self) -> usize {
        self.keys.allocated() + self.values.allocated()
    }

    fn spare(&self) -> usize {
        self.keys.spare().min(self.values.spare())
    }

    fn reserve_exact(&mut self, rows: usize) {
        self.keys.reserve_exact(rows);
        self.values.reserve_exact(rows);
    }

    fn keep_rows(&mut self, rows: &[usize]) {
        self.keys.keep_rows(rows);
        self.values.keep_rows(rows);
    }

    fn swap_remove(&mut self, row: usize) {
        self.keys.swap_remove(row);
        self.values.swap_remove(row);
    }

    fn shrink_to_fit(&mut self) {
        self.keys.shrink_to_fit();
        self.values.shrink_to_fit();
    }
}

/// Keys and values as quantised blocks.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Blocks<Q> {
    keys: Tiled<[u8; FOUR], TILE>,
    key_scales: Tiled<f16, TILE>,
    values: Tiled<u8, FOUR>,
    value_scales: Tiled<f16, TILE>,
    format: PhantomData<Q>,
}

impl<Q: CacheFormat> Blocks<Q> {
    fn new(head_dim: usize) -> Self {
        let blocks = head_dim / BLOCK;
        Self {
            keys: Tiled::new(blocks * Q::QUANT_BYTES / FOUR),
            key_scales: Tiled::new(blocks),
            values: Tiled::new(blocks * Q::QUANT_BYTES),
            value_scales: Tiled::new(blocks),
            format: PhantomData,
        }
    }

    fn rows(&self) -> BlockRows<'_, Q> {
        BlockRows {
            keys: self.keys.view(),
            key_scales: self.key_scales.view(),
            values: self.values.view(),
            value_scales: self.value_scales.view(),
            format: PhantomData,
        }
    }

    fn push(&mut self, key: &[f32], value: &[f32]) {
        // The quants are written first, and tell the scales.
        fn push<Q: CacheFormat>(row: &[f32], scales: &mut Tiled<f16, TILE>, quants: &mut [u8]) {
            let blocks = row.as_chunks::<BLOCK>().0.iter().zip(quants.chunks_exact_mut(Q::QUANT_BYTES));
            scales.push(
                |scales| scales.iter_mut().zip(blocks).for_each(|(scale, (row, out))| *scale = Q::quantize(row, out)),
                f16::ZERO,
            );
        }
        self.keys.push(|out| push::<Q>(key, &mut self.key_scales, out.as_flattened_mut()), [0; FOUR]);
        self.values.push(|out| push::<Q>(value, &mut self.value_scales, out), 0);
    }

    fn allocated(&self) -> usize {
        self.keys.allocated() + self.key_scales.allocated() + self.values.allocated() + self.value_scales.allocated()
    }

    fn spare(&self) -> usize {
        let quants = self.keys.spare().min(self.values.spare());
        quants.min(self.key_scales.spare()).min(self.value_scales.spare())
    }

    fn reserve_exact(&mut self, rows: usize) {
        self.keys.reserve_exact(rows);
        self.key_scales.reserve_exact(rows);
        self.values.reserve_exact(rows);
        self.value_scales.reserve_exact(rows);
    }

    fn keep_rows(&mut self, rows: &[usize]) {
        self.keys.keep_rows(rows);
        self.key_scales.keep_rows(rows);
        self.values.keep_rows(rows);
        self.value_scales.keep_rows(rows);
    }

    fn swap_remove(&mut self, row: usize) {
        self.keys.swap_remove(row);
        self.key_scales.swap_remove(row);
        self.values.swap_remove(row);
        self.value_scales.swap_remove(row);
    }

    fn shrink_to_fit(&mut self) {
        self.keys.shrink_to_fit();
        self.key_scales.shrink_to_fit();
        self.values.shrink_to_fit();
        self.value_scales.shrink_to_fit();
    }
}

/// One head's keys and values in one format.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Storage {
    F32(Floats<f32>),
    F16(Floats<f16>),
    Q8_0(Blocks<Q8_0>),
    Q4_0(Blocks<Q4_0>),
}

/// The same call for whatever format it is.
macro_rules! each {
    ($storage:expr, $rows:ident => $call:expr) => {
        match $storage {
            Storage::F32($rows) => $call,
            Storage::F16($rows) => $call,
            Storage::Q8_0($rows) => $call,
            Storage::Q4_0($rows) => $call,
        }
    };
}

impl Storage {
    /// Storage of rows of `head_dim` numbers, which the format must be able to hold ([`KvDtype::check`]).
    pub(super) fn new(dtype: KvDtype, head_dim: usize) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32(Floats::new(head_dim)),
            KvDtype::F16 => Self::F16(Floats::new(head_dim)),
            KvDtype::Q8_0 => Self::Q8_0(Blocks::new(head_dim)),
            KvDtype::Q4_0 => Self::Q4_0(Blocks::new(head_dim)),
        }
    }

    /// The rows, for attention.
    pub(super) fn rows(&self, head_dim: usize, len: usize) -> HeadRows<'_> {
        let stored = match self {
            Self::F32(rows) => Stored::F32(rows.rows()),
            Self::F16(rows) => Stored::F16(rows.rows()),
            Self::Q8_0(rows) => Stored::Q8_0(rows.rows()),
            Self::Q4_0(rows) => Stored::Q4_0(rows.rows()),
        };
        HeadRows { stored, head_dim, len }
    }

    /// Bytes that are allocated.
    pub(super) fn allocated(&self) -> usize {
        each!(self, rows => rows.allocated())
    }

    /// Makes room for exactly `additional` rows more.
    pub(super) fn reserve_exact(&mut self, additional: usize) {
        each!(self, rows => rows.reserve_exact(additional));
    }

    /// Keeps `kept`, ascending, and drops the other rows; nothing is given back yet.
    pub(super) fn keep_rows(&mut self, kept: &[usize]) {
        each!(self, rows => rows.keep_rows(kept));
    }

    /// Drops a row, and puts the last one in its place; nothing is given back yet.
    pub(super) fn swap_remove(&mut self, row: usize) {
        each!(self, rows => rows.swap_remove(row));
    }

    /// Gives back what is allocated beyond the stored rows.
    pub(super) fn shrink_to_fit(&mut self) {
        each!(self, rows => rows.shrink_to_fit());
    }

    /// Rows that can be added before the buffers must grow.
    pub(super) fn spare(&self) -> usize {
        each!(self, rows => rows.spare())
    }

    /// Adds a row, rounded to the format.
    ///
    /// * `key`, `value`: `[head_dim]`
    pub(super) fn push(&mut self, key: &[f32], value: &[f32]) {
        each!(self, rows => rows.push(key, value));
    }
}
