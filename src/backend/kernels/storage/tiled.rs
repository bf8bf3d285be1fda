//! Growing buffers of rows in tiles.

use crate::kernels::tiles::{Tiles, place};

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
}

/// A growing buffer of rows of `width` numbers in tiles of `ROWS` rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Tiled<T, const ROWS: usize> {
    numbers: Vec<T>,
    width: usize,
}

impl<T: Copy, const ROWS: usize> Tiled<T, ROWS> {
    pub fn with_width(width: usize) -> Self {
        Self { numbers: Vec::new(), width }
    }

    pub fn tiles(&self) -> Tiles<'_, T, ROWS> {
        Tiles { numbers: &self.numbers, width: self.width, len: self.len() }
    }

    /// Adds a row, which `write` writes.
    pub fn push_with(&mut self, write: impl FnOnce(&mut [T]), zero: T) {
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
}

impl<T: Copy, const ROWS: usize> Buffer for Tiled<T, ROWS> {
    fn len(&self) -> usize {
        self.numbers.len() / self.width
    }

    fn allocated(&self) -> usize {
        self.numbers.capacity() * size_of::<T>()
    }

    fn spare(&self) -> usize {
        (self.numbers.capacity() - self.numbers.len()) / self.width
    }

    fn reserve_exact(&mut self, rows: usize) {
        self.numbers.reserve_exact(rows * self.width);
    }

    fn shrink_to_fit(&mut self) {
        self.numbers.shrink_to_fit();
    }

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
