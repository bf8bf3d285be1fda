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

/// Rows that somebody else owns, in one piece or in two.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiles<'a, T, const ROWS: usize> {
    /// The first rows, whole tiles of them, if they do not lie before the others in memory; else empty.
    pub base: &'a [T],
    /// The other rows.
    pub own: &'a [T],
    pub width: usize,
    /// Number of rows.
    pub len: usize,
}

impl<'a, T: Copy, const ROWS: usize> Tiles<'a, T, ROWS> {
    /// Numbers from index `first` on, as if all were in one piece; `None` if there are not as many, or they lie in both.
    #[inline(always)]
    pub fn numbers(&self, first: usize, count: usize) -> Option<&'a [T]> {
        match first.checked_sub(self.base.len()) {
            Some(first) => self.own.get(first..first + count),
            None => self.base.get(first..first + count),
        }
    }

    /// A whole tile, `[width][ROWS]`.
    #[inline(always)]
    pub fn tile(&self, tile: usize) -> &'a [[T; ROWS]] {
        let (first, size) = (tile * self.width * ROWS, self.width * ROWS);
        let numbers = match first.checked_sub(self.base.len()) {
            Some(first) => &self.own[first..first + size],
            None => &self.base[first..first + size],
        };
        numbers.as_chunks().0
    }

    /// Some rows as they lie in memory, one piece.
    ///
    /// * `first`, `count`: whole tiles, or up to the last row
    /// * `joined`: takes the rows if they lie in both pieces
    #[inline(always)]
    pub fn rows<'b>(&self, first: usize, count: usize, joined: &'b mut Vec<T>) -> &'b [T]
    where
        'a: 'b,
    {
        let (first, end, split) = (first * self.width, (first + count) * self.width, self.base.len());
        if first >= split {
            &self.own[first - split..end - split]
        } else if end <= split {
            &self.base[first..end]
        } else {
            joined.clear();
            joined.extend_from_slice(&self.base[first..]);
            joined.extend_from_slice(&self.own[..end - split]);
            joined
        }
    }

    /// One number of a row.
    #[inline(always)]
    pub fn number(&self, row: usize, number: usize) -> T {
        let (start, step) = place::<ROWS>(row, self.len, self.width);
        self.at(start + number * step)
    }

    /// Copies one row, `[width]`.
    #[inline(always)]
    pub fn copy_row(&self, row: usize, out: &mut [T]) {
        let (start, step) = place::<ROWS>(row, self.len, self.width);
        for (number, out) in out.iter_mut().enumerate().take(self.width) {
            *out = self.at(start + number * step);
        }
    }

    #[inline(always)]
    fn at(&self, index: usize) -> T {
        match index.checked_sub(self.base.len()) {
            Some(index) => self.own[index],
            None => self.base[index],
        }
    }
}
