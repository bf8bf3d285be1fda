//! Growing buffers of rows in tiles, of which the first may lie in memory that others read, too.

use std::marker::PhantomData;
use std::ops::{Deref, Range};

use bytemuck::Pod;

use super::TILE;
use crate::error::Result;
use crate::kernels::quant::SharedBytes;
use crate::kernels::tiles::{Tiles, place};
use crate::records::{Sink, Source};

/// What holds rows, whatever they are.
pub trait Buffer {
    /// Rows that it holds.
    fn len(&self) -> usize;
    /// Bytes that are allocated.
    fn allocated(&self) -> usize;
    /// Rows that can be added before it must grow.
    fn spare(&self) -> usize;
    /// Makes room for exactly so many rows more.
    fn reserve_exact(&mut self, rows: usize);
    /// Keeps `rows`, ascending, and drops the others; nothing is given back yet.
    fn keep_rows(&mut self, rows: &[usize]);
    /// Drops a row, and puts the last one in its place; nothing is given back yet.
    fn swap_remove(&mut self, row: usize);
    /// Gives back what is allocated beyond the rows.
    fn shrink_to_fit(&mut self);
    /// Rows, the first, that lie in memory that others read, too.
    fn shared_rows(&self) -> usize;
    /// Bytes of these.
    fn shared(&self) -> usize;
    /// Writes the rows as they lie in memory.
    fn save(&self, sink: &mut Sink<'_>);
    /// Takes rows that were [saved](Self::save), where they lie; but for the last few, which are copied.
    ///
    /// * `rows`: how many
    ///
    /// # Errors
    /// [`Error::BadFile`](crate::Error::BadFile) if there are not as many.
    fn load(&mut self, rows: usize, source: &mut Source) -> Result<()>;
}

/// Numbers in somebody's bytes.
#[derive(Clone)]
struct Shared<T> {
    owner: SharedBytes,
    /// Of the bytes; aligned for the numbers.
    range: Range<usize>,
    numbers: PhantomData<T>,
}

impl<T: Pod> Deref for Shared<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&(*self.owner).as_ref()[self.range.clone()])
    }
}

/// A growing buffer of rows of `width` numbers in tiles of `ROWS` rows.
///
/// The first rows may be shared; they are copied when one of them goes.
#[derive(Clone)]
pub struct Tiled<T, const ROWS: usize> {
    /// Whole tiles.
    base: Option<Shared<T>>,
    /// The rows behind them.
    own: Vec<T>,
    width: usize,
}

impl<T: Pod, const ROWS: usize> std::fmt::Debug for Tiled<T, ROWS> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tiled({} rows, {} of them shared)", self.len(), self.shared_rows())
    }
}

/// Bit by bit, wherever the rows are.
impl<T: Pod, const ROWS: usize> PartialEq for Tiled<T, ROWS> {
    fn eq(&self, other: &Self) -> bool {
        let bytes = |rows: &Self| -> Vec<u8> {
            [bytemuck::cast_slice(rows.base()), bytemuck::cast_slice::<T, u8>(&rows.own)].concat()
        };
        self.width == other.width && self.len() == other.len() && bytes(self) == bytes(other)
    }
}

impl<T: Pod, const ROWS: usize> Tiled<T, ROWS> {
    pub fn with_width(width: usize) -> Self {
        Self { base: None, own: Vec::new(), width }
    }

    /// Numbers of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    pub fn tiles(&self) -> Tiles<'_, T, ROWS> {
        Tiles { base: self.base(), own: &self.own, width: self.width, len: self.len() }
    }

    fn base(&self) -> &[T] {
        self.base.as_deref().unwrap_or(&[])
    }

    /// Copies the rows that are shared.
    fn own_all(&mut self) {
        if let Some(base) = self.base.take() {
            let mut all = Vec::with_capacity(base.len() + self.own.capacity());
            all.extend_from_slice(&base);
            all.append(&mut self.own);
            self.own = all;
        }
    }

    /// Shares no row from `row` on: those up to the end of its tile are copied, and those behind are let go.
    fn share_before(&mut self, row: usize) {
        let (width, first) = (self.width, row / TILE * TILE);
        let Some(base) = &mut self.base else { return };
        self.own = base[first * width..(first + TILE) * width].to_vec();
        base.range.end = base.range.start + first * width * size_of::<T>();
        if first == 0 {
            self.base = None;
        }
    }

    /// Adds a row, which `write` writes.
    pub fn push_with(&mut self, write: impl FnOnce(&mut [T]), zero: T) {
        let start = self.own.len();
        self.own.resize(start + self.width, zero);
        write(&mut self.own[start..]);
        if ROWS > 1 && self.len().is_multiple_of(ROWS) {
            let tile = self.own.len() - ROWS * self.width;
            let rows = self.own[tile..].to_vec();
            for (lane, row) in rows.chunks_exact(self.width).enumerate() {
                for (number, &value) in row.iter().enumerate() {
                    self.own[tile + number * ROWS + lane] = value;
                }
            }
        }
    }
}

impl<T: Pod, const ROWS: usize> Buffer for Tiled<T, ROWS> {
    fn len(&self) -> usize {
        self.shared_rows() + self.own.len() / self.width
    }

    fn allocated(&self) -> usize {
        self.own.capacity() * size_of::<T>()
    }

    fn spare(&self) -> usize {
        (self.own.capacity() - self.own.len()) / self.width
    }

    fn reserve_exact(&mut self, rows: usize) {
        self.own.reserve_exact(rows * self.width);
    }

    fn shrink_to_fit(&mut self) {
        self.own.shrink_to_fit();
    }

    fn shared_rows(&self) -> usize {
        self.base().len() / self.width
    }

    fn shared(&self) -> usize {
        size_of_val(self.base())
    }

    fn save(&self, sink: &mut Sink<'_>) {
        sink.aligned(&[bytemuck::cast_slice(self.base()), bytemuck::cast_slice(&self.own)]);
    }

    fn load(&mut self, rows: usize, source: &mut Source) -> Result<()> {
        let row_bytes = self.width * size_of::<T>();
        let (owner, range) = source.aligned(rows.saturating_mul(row_bytes))?;
        let shared = range.start..range.start + rows / TILE * TILE * row_bytes;
        self.own = bytemuck::cast_slice(&(*owner).as_ref()[shared.end..range.end]).to_vec();
        self.base = (!shared.is_empty()).then_some(Shared { owner, range: shared, numbers: PhantomData });
        Ok(())
    }

    fn swap_remove(&mut self, row: usize) {
        if row.min(self.len() - 1) < self.shared_rows() {
            self.own_all();
        }
        let (row, width) = (row - self.shared_rows(), self.width);
        let len = self.own.len() / width;
        let last = len - 1;
        let ((from, from_step), (to, to_step)) = (place::<ROWS>(last, len, width), place::<ROWS>(row, len, width));
        for number in 0..width {
            self.own[to + number * to_step] = self.own[from + number * from_step];
        }
        if ROWS > 1 && len.is_multiple_of(ROWS) {
            // The last tile is not whole any more: its rows lie one after the other again.
            let tile = (len - ROWS) * width;
            let columns = self.own[tile..].to_vec();
            for (number, column) in columns.chunks_exact(ROWS).enumerate() {
                for (lane, &value) in column.iter().enumerate() {
                    self.own[tile + lane * width + number] = value;
                }
            }
        }
        self.own.truncate(last * width);
    }

    fn keep_rows(&mut self, rows: &[usize]) {
        let unchanged = rows.iter().enumerate().take_while(|(to, from)| to == *from).count();
        if unchanged == self.len() {
            return;
        }
        if rows.is_empty() {
            self.base = None;
        } else if unchanged < self.shared_rows() {
            // The first rows stay where they are if all that go are behind them.
            if unchanged == rows.len() { self.share_before(unchanged) } else { self.own_all() }
        }
        let (shared, width) = (self.shared_rows(), self.width);
        let len = self.own.len() / width;
        // A tile's rows come from its own place or from behind it: tiles before the first changed one stay, and the
        // tiles behind the one that is written still hold all that is to come.
        let first = unchanged / ROWS * ROWS;
        let mut scratch = Vec::with_capacity(ROWS * width);
        for (index, rows) in rows[first..].chunks(ROWS).enumerate() {
            let target = (first - shared + index * ROWS) * width;
            let places = rows.iter().map(|&row| place::<ROWS>(row - shared, len, width));
            scratch.clear();
            if rows.len() == ROWS {
                let places: Vec<_> = places.collect();
                for number in 0..width {
                    scratch.extend(places.iter().map(|(start, step)| self.own[start + number * step]));
                }
            } else {
                for (start, step) in places {
                    scratch.extend((0..width).map(|number| self.own[start + number * step]));
                }
            }
            self.own[target..target + scratch.len()].copy_from_slice(&scratch);
        }
        self.own.truncate((rows.len() - shared) * width);
    }
}
