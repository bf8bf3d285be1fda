//! One head's keys and values in the cache's storage format, grown with bounded slack.
//!
//! Keys and values are each in a format of their own. Rows are rounded once, when they are written; what is kept of them
//! later is moved as it is stored. Keys lie in tiles of 16 rows, and quantised values in fours of rows (see
//! [`crate::kernels::tiles`]), as attention reads them.
//!
//! Not for: knowing which positions the rows belong to (see [`Ledger`](crate::cache::Ledger)).

mod mixed;
mod tiled;
mod view;

use std::marker::PhantomData;

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;

use mixed::Mixed;
use tiled::{Buffer, Tiled};

use crate::cache::KvDtype;
use crate::error::Result;
use crate::kernels::attend::{FOUR, HeadRows, Stored};
use crate::kernels::blocks::{BLOCK, CacheFormat, Q4_0, Q8_0};
use crate::kernels::hadamard;
use crate::kernels::vector::MAX_HEAD_DIM;
use crate::records::{Sink, Source};

/// Rows of a tile of keys, and of scales.
const TILE: usize = 16;

/// One head's keys, or its values, in one format.
pub(super) trait Column: Buffer {
    /// Nothing; rows are `head_dim` numbers.
    fn new(head_dim: usize) -> Self;
    /// Adds a row, rounded to the format.
    fn push(&mut self, row: &[f32]);
    /// See [`Storage::center_keys`].
    fn center(&mut self, _center: &[f32]) {}
}

/// Numbers that are rounded one by one.
pub(super) trait Float: Pod {
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

impl<T: Float, const ROWS: usize> Column for Tiled<T, ROWS> {
    fn new(head_dim: usize) -> Self {
        Self::with_width(head_dim)
    }

    fn push(&mut self, row: &[f32]) {
        self.push_with(|out| T::round(row, out), T::zeroed());
    }
}

/// Quants that are stored together.
pub(super) trait Quants: Pod {
    /// Whether they are of keys, which are centred and rotated before they are rounded.
    const ARE_KEYS: bool;

    /// All bytes of a row.
    fn bytes(row: &mut [Self]) -> &mut [u8];
}

impl Quants for u8 {
    const ARE_KEYS: bool = false;

    fn bytes(row: &mut [Self]) -> &mut [u8] {
        row
    }
}

impl Quants for [u8; FOUR] {
    const ARE_KEYS: bool = true;

    fn bytes(row: &mut [Self]) -> &mut [u8] {
        row.as_flattened_mut()
    }
}

/// Rows of quantised blocks.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Blocks<Q, E: Quants, const ROWS: usize> {
    quants: Tiled<E, ROWS>,
    scales: Tiled<f16, TILE>,
    /// `[head_dim]` what is subtracted from each row; empty if nothing is.
    center: Vec<f32>,
    format: PhantomData<Q>,
}

/// Keys, which attention reads in fours of bytes.
type KeyBlocks<Q> = Blocks<Q, [u8; FOUR], TILE>;

/// Values, which attention reads in fours of rows.
type ValueBlocks<Q> = Blocks<Q, u8, FOUR>;

impl<Q: CacheFormat, E: Quants, const ROWS: usize> Column for Blocks<Q, E, ROWS> {
    fn new(head_dim: usize) -> Self {
        let blocks = head_dim / BLOCK;
        Self {
            quants: Tiled::with_width(blocks * Q::QUANT_BYTES / size_of::<E>()),
            scales: Tiled::with_width(blocks),
            center: Vec::new(),
            format: PhantomData,
        }
    }

    fn push(&mut self, row: &[f32]) {
        let mut rotated = [0.0; MAX_HEAD_DIM];
        let row = if E::ARE_KEYS {
            let rotated = &mut rotated[..row.len()];
            rotated.copy_from_slice(row);
            rotated.iter_mut().zip(&self.center).for_each(|(number, center)| *number -= center);
            hadamard::rotate(rotated, row.len());
            rotated
        } else {
            row
        };
        let scales = &mut self.scales;
        // The quants are written first, and tell the scales.
        let write = |quants: &mut [E]| {
            let blocks = row.as_chunks::<BLOCK>().0.iter().zip(E::bytes(quants).chunks_exact_mut(Q::QUANT_BYTES));
            scales.push_with(
                |scales| scales.iter_mut().zip(blocks).for_each(|(scale, (row, out))| *scale = Q::quantize(row, out)),
                f16::ZERO,
            );
        };
        self.quants.push_with(write, E::zeroed());
    }

    fn center(&mut self, center: &[f32]) {
        if E::ARE_KEYS {
            self.center = center.to_vec();
        }
    }
}

impl<Q, E: Quants, const ROWS: usize> Buffer for Blocks<Q, E, ROWS> {
    fn len(&self) -> usize {
        self.scales.len()
    }

    fn allocated(&self) -> usize {
        self.quants.allocated() + self.scales.allocated() + self.center.capacity() * size_of::<f32>()
    }

    fn spare(&self) -> usize {
        self.quants.spare().min(self.scales.spare())
    }

    fn reserve_exact(&mut self, rows: usize) {
        self.quants.reserve_exact(rows);
        self.scales.reserve_exact(rows);
    }

    fn keep_rows(&mut self, rows: &[usize]) {
        self.quants.keep_rows(rows);
        self.scales.keep_rows(rows);
    }

    fn swap_remove(&mut self, row: usize) {
        self.quants.swap_remove(row);
        self.scales.swap_remove(row);
    }

    fn shrink_to_fit(&mut self) {
        self.quants.shrink_to_fit();
        self.scales.shrink_to_fit();
    }

    fn shared_rows(&self) -> usize {
        self.scales.shared_rows()
    }

    fn shared(&self) -> usize {
        self.quants.shared() + self.scales.shared()
    }

    fn save(&self, sink: &mut Sink<'_>) {
        if E::ARE_KEYS {
            sink.count(self.center.len());
            sink.f32s(&self.center);
        }
        self.quants.save(sink);
        self.scales.save(sink);
    }

    fn load(&mut self, rows: usize, source: &mut Source) -> Result<()> {
        if E::ARE_KEYS {
            let (center, head_dim) = (source.count()?, self.scales.width() * BLOCK);
            if center != 0 && center != head_dim {
                return Err(source.error(format_args!("a mean key of {center} numbers, expected {head_dim} or none")));
            }
            self.center = source.f32s(center)?;
        }
        self.quants.load(rows, source)?;
        self.scales.load(rows, source)
    }
}

/// Keys of plain numbers.
type KeyFloats<T> = Tiled<T, TILE>;

/// Values of plain numbers.
type ValueFloats<T> = Tiled<T, 1>;

/// Keys and their values, each in a format of its own.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Columns<K, V> {
    keys: K,
    values: V,
}

impl<K: Column, V: Column> Columns<K, V> {
    fn new(head_dim: usize) -> Self {
        Self { keys: K::new(head_dim), values: V::new(head_dim) }
    }

    fn push(&mut self, key: &[f32], value: &[f32]) {
        self.keys.push(key);
        self.values.push(value);
    }

    fn center_keys(&mut self, center: &[f32]) {
        self.keys.center(center);
    }

    /// * `center`: `[head_dim]` what they have in common
    fn replace_keys(&mut self, keys: &[f32], center: &[f32]) {
        self.keys.keep_rows(&[]);
        self.keys.center(center);
        keys.chunks_exact(center.len()).for_each(|key| self.keys.push(key));
    }

    fn replace_values(&mut self, values: &[f32], head_dim: usize) {
        self.values.keep_rows(&[]);
        values.chunks_exact(head_dim).for_each(|value| self.values.push(value));
    }
}

impl<K: Buffer, V: Buffer> Buffer for Columns<K, V> {
    fn len(&self) -> usize {
        self.keys.len()
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

    fn shared_rows(&self) -> usize {
        self.keys.shared_rows()
    }

    fn shared(&self) -> usize {
        self.keys.shared() + self.values.shared()
    }

    fn save(&self, sink: &mut Sink<'_>) {
        self.keys.save(sink);
        self.values.save(sink);
    }

    fn load(&mut self, rows: usize, source: &mut Source) -> Result<()> {
        self.keys.load(rows, source)?;
        self.values.load(rows, source)
    }
}

/// The mean of some rows, `[head_dim]`; zeros of none.
fn mean(rows: &[f32], head_dim: usize) -> Vec<f32> {
    let mut mean = vec![0.0; head_dim];
    for row in rows.chunks_exact(head_dim) {
        mean.iter_mut().zip(row).for_each(|(sum, number)| *sum += number);
    }
    #[expect(clippy::cast_precision_loss)] // a count of tokens
    let scale = 1.0 / (rows.len() / head_dim).max(1) as f32;
    for sum in &mut mean {
        *sum *= scale;
    }
    mean
}

/// One head's keys and values.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Storage {
    F32(Columns<KeyFloats<f32>, ValueFloats<f32>>),
    F16(Columns<KeyFloats<f16>, ValueFloats<f16>>),
    F16Q8_0(Columns<KeyFloats<f16>, ValueBlocks<Q8_0>>),
    F16Q4_0(Columns<KeyFloats<f16>, ValueBlocks<Q4_0>>),
    Q8_0(Columns<KeyBlocks<Q8_0>, ValueBlocks<Q8_0>>),
    Q8_0Q4_0(Columns<KeyBlocks<Q8_0>, ValueBlocks<Q4_0>>),
    Q4_0(Columns<KeyBlocks<Q4_0>, ValueBlocks<Q4_0>>),
    Mixed(Box<Mixed>),
}

/// The same call for whatever formats they are.
macro_rules! each {
    ($storage:expr, $rows:ident => $call:expr) => {
        match $storage {
            Storage::F32($rows) => $call,
            Storage::F16($rows) => $call,
            Storage::F16Q8_0($rows) => $call,
            Storage::F16Q4_0($rows) => $call,
            Storage::Q8_0($rows) => $call,
            Storage::Q8_0Q4_0($rows) => $call,
            Storage::Q4_0($rows) => $call,
            Storage::Mixed($rows) => $call,
        }
    };
}

impl Storage {
    /// Storage of rows of `head_dim` numbers, which the format must be able to hold ([`KvDtype::check`]).
    pub(super) fn new(dtype: KvDtype, head_dim: usize) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32(Columns::new(head_dim)),
            KvDtype::F16 => Self::F16(Columns::new(head_dim)),
            KvDtype::F16Q8_0 => Self::F16Q8_0(Columns::new(head_dim)),
            KvDtype::F16Q4_0 => Self::F16Q4_0(Columns::new(head_dim)),
            KvDtype::Q8_0 => Self::Q8_0(Columns::new(head_dim)),
            KvDtype::Q8_0Q4_0 => Self::Q8_0Q4_0(Columns::new(head_dim)),
            KvDtype::Q4_0 => Self::Q4_0(Columns::new(head_dim)),
            KvDtype::Mixed => Self::Mixed(Box::new(Mixed::new(head_dim))),
        }
    }

    /// The rows, for attention.
    pub(super) fn rows(&self, head_dim: usize, len: usize) -> HeadRows<'_> {
        let stored = match self {
            Self::F32(rows) => Stored::F32(rows.view()),
            Self::F16(rows) => Stored::F16(rows.view()),
            Self::F16Q8_0(rows) => Stored::F16Q8_0(rows.view()),
            Self::F16Q4_0(rows) => Stored::F16Q4_0(rows.view()),
            Self::Q8_0(rows) => Stored::Q8_0(rows.view()),
            Self::Q8_0Q4_0(rows) => Stored::Q8_0Q4_0(rows.view()),
            Self::Q4_0(rows) => Stored::Q4_0(rows.view()),
            Self::Mixed(rows) => Stored::Mixed(rows.view()),
        };
        HeadRows { stored, head_dim, len }
    }

    /// The first rows, which are in other numbers than those that are added: what prompts have left of a mixed cache, else
    /// none.
    pub(super) fn num_settled(&self) -> usize {
        if let Self::Mixed(rows) = self { rows.num_settled() } else { 0 }
    }

    /// Gives all rows the numbers of what a prompt leaves, and makes room for exactly so many more.
    pub(super) fn settle(&mut self, additional: usize, head_dim: usize) {
        if let Self::Mixed(rows) = self {
            rows.settle(additional, head_dim);
        } else {
            self.reserve_exact(additional);
        }
    }

    /// Adds a row that a prompt leaves, where all rows are such.
    ///
    /// * `key`, `value`: `[head_dim]`
    pub(super) fn push_settled(&mut self, key: &[f32], value: &[f32]) {
        if let Self::Mixed(rows) = self { rows.push_settled(key, value) } else { self.push(key, value) }
    }

    /// What all keys have in common from now on: it is subtracted before they are rounded, and taken into account where they
    /// are read, so that what is rounded is smaller. Only while there are no rows; nothing happens where keys are not
    /// [in blocks](KvDtype::has_key_blocks).
    ///
    /// * `center`: `[head_dim]`
    pub(super) fn center_keys(&mut self, center: &[f32]) {
        each!(self, rows => rows.center_keys(center));
    }

    /// Overwrites all values, those of a mixed cache where all rows are such as a prompt leaves.
    ///
    /// * `values`: `[rows, head_dim]`
    pub(super) fn replace_values(&mut self, values: &[f32], head_dim: usize) {
        each!(self, rows => rows.replace_values(values, head_dim));
    }

    /// Overwrites all keys.
    ///
    /// * `keys`: `[rows, head_dim]`
    pub(super) fn replace_keys(&mut self, keys: &[f32], head_dim: usize) {
        let center = mean(keys, head_dim);
        each!(self, rows => rows.replace_keys(keys, &center));
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

    /// Drops a row, and puts the last one in its place; nothing is given back yet. Of a mixed cache, one that came after the
    /// last prompt, or the last.
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

    /// Rows that lie in memory that others read, too.
    pub(super) fn shared_rows(&self) -> usize {
        each!(self, rows => rows.shared_rows())
    }

    /// Bytes of these.
    pub(super) fn shared(&self) -> usize {
        each!(self, rows => rows.shared())
    }

    /// Writes all rows.
    pub(super) fn save(&self, sink: &mut Sink<'_>) {
        each!(self, rows => rows.save(sink));
    }

    /// Takes rows that were saved.
    ///
    /// * `rows`: how many
    ///
    /// # Errors
    /// [`Error::BadFile`](crate::Error::BadFile) if there are not as many.
    pub(super) fn load(&mut self, rows: usize, source: &mut Source) -> Result<()> {
        each!(self, columns => columns.load(rows, source))
    }
}
