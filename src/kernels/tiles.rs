//! Rows of numbers in tiles: whole tiles of `ROWS` rows are stored transposed, `[tile][width][ROWS]`, so that the lanes of
//! a vector are rows; the rows after the last whole tile are stored one after the other, `[row][width]`. A buffer thus
//! holds exactly `len * width` numbers, whatever the length.
//!
//! Not for: growing and evicting (see [`crate::cache`]).

/// Where a row of `width` numbers is among `len` rows: the index of its first number, and from one number to the next.
#[inline(always)]
pub(crate) fn place<const ROWS: usize>(row: usize, len: usize, width: usize) -> (usize, usize) {
    let tile = row - row % ROWS;
    if tile + ROWS <= len { (tile * width + row % ROWS, ROWS) } else { (row * width, 1) }
}

/// Rows that somebody else owns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Tiles<'a, T, const ROWS: usize> {
    /// `[len * width]`
    pub numbers: &'a [T],
    pub width: usize,
    /// Number of rows.
    pub len: usize,
}

impl<'a, T: Copy, const ROWS: usize> Tiles<'a, T, ROWS> {
    /// A whole tile, `[width][ROWS]`.
    #[inline(always)]
    pub fn tile(&self, tile: usize) -> &'a [[T; ROWS]] {
        let size = self.width * ROWS;
        self.numbers[tile * size..(tile + 1) * size].as_chunks().0
    }

    /// One number of a row.
    #[inline(always)]
    pub fn number(&self, row: usize, number: usize) -> T {
        let (start, step) = place::<ROWS>(row, self.len, self.width);
        self.numbers[start + number * step]
    }

    /// Copies one row, `[width]`.
    #[inline(always)]
    pub fn copy_row(&self, row: usize, out: &mut [T]) {
        let (start, step) = place::<ROWS>(row, self.len, self.width);
        for (number, out) in out.iter_mut().enumerate().take(self.width) {
            *out = self.numbers[start + number * step];
        }
    }
}
