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
        assert_inside(data.len(), rows, cols, row_stride);
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
        assert_inside(data.len(), rows, cols, row_stride);
        assert!(rows <= 1 || cols <= row_stride, "rows of a writable matrix overlap");
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
                // SAFETY: `start < cols`, so the pointer stays inside of the view.
                data: unsafe { self.data.add(start) },
                rows: self.rows,
                cols: width.min(self.cols - start),
                row_stride: self.row_stride,
                owner: PhantomData,
            })
            .collect()
    }

    /// Overwrites this view with `scale * lhs * rhs`, on the calling thread.
    ///
    /// # Panics
    /// If the shapes do not fit: `lhs` `[rows, inner]`, `rhs` `[inner, cols]`.
    pub fn set_product(&mut self, lhs: Matrix<'_>, rhs: Matrix<'_>, scale: f32) {
        assert_eq!((lhs.rows, rhs.cols, lhs.cols), (self.rows, self.cols, rhs.rows), "matrix product of these shapes");
        if self.rows == 0 || self.cols == 0 {
            return;
        }
        // SAFETY: all three views were checked to lie inside of their slices, the shapes fit, and the output is
        // exclusive. Strides fit isize because they lie inside of a slice.
        #[expect(clippy::cast_possible_wrap)]
        unsafe {
            gemm::gemm(
                self.rows,
                self.cols,
                lhs.cols,
                self.data,
                1,
                self.row_stride as isize,
                false,
                lhs.data.as_ptr(),
                lhs.col_stride as isize,
                lhs.row_stride as isize,
                rhs.data.as_ptr(),
                rhs.col_stride as isize,
                rhs.row_stride as isize,
                0.0,
                scale,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

fn assert_inside(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(needed <= len, "a {rows} x {cols} matrix with row stride {row_stride} needs {needed} numbers, got {len}");
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
}
