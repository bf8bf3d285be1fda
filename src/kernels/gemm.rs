//! Matrix products on f32 slices: a safe front of the `gemm` crate, single-threaded, for strided views.
//!
//! Threads are the caller's: it splits the output into disjoint views and runs one product on each.

use std::marker::PhantomData;

/// A read-only matrix view: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A view of `rows` x `cols` with `row_stride` numbers between rows.
    ///
    /// # Panics
    /// If the last element lies outside of `data`.
    #[must_use]
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let row_stride = checked_stride(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The same numbers with rows and columns exchanged; nothing is copied.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// A writable matrix view, row after row, that can be split into disjoint column ranges for threads.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a view has exclusive access to its elements, as `&mut [f32]` would: `new` takes that borrow, and
// `split_columns` consumes the view and hands out disjoint parts.
unsafe impl Send for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// A view of `rows` x `cols` with `row_stride` numbers between rows.
    ///
    /// # Panics
    /// If the last element lies outside of `data`, or rows overlap.
    #[must_use]
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let row_stride = checked_stride(data.len(), rows, cols, row_stride);
        assert!(rows <= 1 || cols == 0 || cols <= row_stride, "rows of a writable matrix overlap");
        Self { data: data.as_mut_ptr(), rows, cols, row_stride, owner: PhantomData }
    }

    /// Splits into views of `width` columns each (the last may be narrower), left to right.
    ///
    /// # Panics
    /// If `width` is 0.
    #[must_use]
    pub fn split_columns(self, width: usize) -> Vec<Self> {
        (0..self.cols)
            .step_by(width)
            .map(|start| Self {
                // Inside of the view if there is a row; else nothing is ever read or written there.
                data: self.data.wrapping_add(start),
                rows: self.rows,
                cols: width.min(self.cols - start),
                row_stride: self.row_stride,
                owner: PhantomData,
            })
            .collect()
    }

    /// One of the rows.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row lies inside of the view, which was checked to lie inside of its slice and is exclusive.
        let start = unsafe { self.data.add(row * self.row_stride) };
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(start, self.cols) }
    }

    /// Overwrites this view with `scale * lhs * rhs`, on the calling thread.
    ///
    /// # Panics
    /// If the shapes do not fit: `lhs` `[rows, inner]`, `rhs` `[inner, cols]`.
    pub fn set_product(&mut self, lhs: Matrix<'_>, rhs: Matrix<'_>, scale: f32) {
        self.product(lhs, rhs, scale, false);
    }

    /// Adds `lhs * rhs` to this view, on the calling thread.
    ///
    /// # Panics
    /// As [`set_product`](Self::set_product).
    pub fn add_product(&mut self, lhs: Matrix<'_>, rhs: Matrix<'_>) {
        self.product(lhs, rhs, 1.0, true);
    }

    fn product(&mut self, lhs: Matrix<'_>, rhs: Matrix<'_>, scale: f32, is_added: bool) {
        assert_eq!((lhs.rows, rhs.cols, lhs.cols), (self.rows, self.cols, rhs.rows), "matrix product of these shapes");
        if self.rows == 0 || self.cols == 0 {
            return;
        }
        // SAFETY: all three views were checked to lie inside of their slices, the shapes fit, and the output is
        // exclusive. Strides fit isize, see `checked_stride`.
        #[expect(clippy::cast_possible_wrap)]
        unsafe {
            gemm::gemm(
                self.rows,
                self.cols,
                lhs.cols,
                self.data,
                1,
                self.row_stride as isize,
                is_added,
                lhs.data.as_ptr(),
                lhs.col_stride as isize,
                lhs.row_stride as isize,
                rhs.data.as_ptr(),
                rhs.col_stride as isize,
                rhs.row_stride as isize,
                f32::from(u8::from(is_added)),
                scale,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

/// Checks that a matrix lies inside of a slice, and returns its row stride: at most `cols` where there is no second row to
/// stride to, so that the stride of every matrix lies inside of its slice.
fn checked_stride(len: usize, rows: usize, cols: usize, row_stride: usize) -> usize {
    let needed = match (rows, cols) {
        (0, _) | (_, 0) => Some(0),
        _ => (rows - 1).checked_mul(row_stride).and_then(|start| start.checked_add(cols)),
    };
    let shown = || needed.map_or_else(|| "more".to_owned(), |needed| needed.to_string());
    assert!(
        needed.is_some_and(|needed| needed <= len),
        "a {rows} x {cols} matrix with row stride {row_stride} needs {} numbers, got {len}",
        shown()
    );
    match rows {
        _ if needed == Some(0) => 0,
        1 => row_stride.min(cols),
        _ => row_stride,
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation)]
mod tests {
    use super::*;

    #[test]
    fn a_product_split_by_columns_equals_the_plain_loops() {
        let (rows, inner, cols) = (5, 7, 11);
        let lhs: Vec<f32> = (0..rows * inner).map(|i| f32::from((i % 13) as u8) - 6.0).collect();
        let rhs_transposed: Vec<f32> = (0..cols * inner).map(|i| f32::from((i % 17) as u8) - 8.0).collect();
        let mut out = vec![f32::NAN; rows * cols];
        let views = MatrixMut::new(&mut out, rows, cols, cols).split_columns(4);
        for (index, mut view) in views.into_iter().enumerate() {
            let width = view.cols;
            let part = Matrix::new(&rhs_transposed[index * 4 * inner..], width, inner, inner).transposed();
            view.set_product(Matrix::new(&lhs, rows, inner, inner), part, 0.5);
        }
        for i in 0..rows {
            for j in 0..cols {
                let expected: f32 = (0..inner).map(|k| lhs[i * inner + k] * rhs_transposed[j * inner + k]).sum();
                assert_eq!(out[i * cols + j], 0.5 * expected, "({i}, {j})");
            }
        }
    }

    #[test]
    #[should_panic(expected = "needs 12 numbers, got 11")]
    fn a_view_outside_of_its_slice_is_refused() {
        let _ = Matrix::new(&[0.0; 11], 3, 4, 4);
    }

    /// What a view of these sizes does.
    fn outcome(len: usize, rows: usize, cols: usize, row_stride: usize) -> Result<(), ()> {
        let read = std::panic::catch_unwind(|| Matrix::new(&vec![0.0; len], rows, cols, row_stride).rows);
        let written = std::panic::catch_unwind(|| MatrixMut::new(&mut vec![0.0; len], rows, cols, row_stride).rows);
        // Only rows that overlap may be read and not written.
        assert!(read.is_ok() || written.is_err(), "{len} {rows} {cols} {row_stride}");
        written.map(drop).map_err(drop)
    }

    #[test]
    fn sizes_whose_products_overflow_are_refused() {
        const MAX: usize = usize::MAX;
        const HALF: usize = usize::MAX / 2 + 1;
        for (len, rows, cols, row_stride) in [
            (1, 2, 1, MAX),     // the second row would be one number before the first
            (1, 3, 1, HALF),    // 2 * HALF is 0
            (4, 2, 2, MAX - 1), // ends at 0
            (1, 1, MAX, 1),
            (1, MAX, 1, MAX),
            (1, MAX, MAX, MAX),
            (2, 2, 2, 1), // rows overlap
            (3, 2, 2, 0),
            (0, 1, 1, 1),
        ] {
            assert_eq!(outcome(len, rows, cols, row_stride), Err(()), "{len} {rows} {cols} {row_stride}");
        }
        for (len, rows, cols, row_stride) in
            [(1, 1, 1, MAX), (0, 0, MAX, MAX), (0, MAX, 0, MAX), (4, 2, 2, 2), (3, 2, 1, 2)]
        {
            assert_eq!(outcome(len, rows, cols, row_stride), Ok(()), "{len} {rows} {cols} {row_stride}");
        }
    }

    #[test]
    fn products_without_rows_columns_or_terms_touch_nothing_else() {
        let mut out = [7.0; 4];
        for mut view in MatrixMut::new(&mut out[..0], 0, 9, usize::MAX).split_columns(4) {
            let cols = view.cols;
            view.set_product(Matrix::new(&[], 0, 3, 3), Matrix::new(&[0.0; 27], 3, cols, cols), 1.0);
        }
        assert_eq!(out, [7.0; 4]);
        // A row of one number, whatever is said of the next row's place.
        MatrixMut::new(&mut out[1..2], 1, 1, usize::MAX).set_product(
            Matrix::new(&[2.0, 3.0], 1, 2, usize::MAX),
            Matrix::new(&[5.0, 1.0], 1, 2, usize::MAX).transposed(),
            1.0,
        );
        assert_eq!(out, [7.0, 13.0, 7.0, 7.0]);
        // Sums of nothing are 0.
        MatrixMut::new(&mut out, 2, 1, 2).set_product(Matrix::new(&[], 2, 0, 9), Matrix::new(&[], 0, 1, 9), 1.0);
        assert_eq!(out, [0.0, 13.0, 0.0, 7.0]);
    }
}
