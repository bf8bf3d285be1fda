//! Linear systems with a symmetric positive definite matrix, in f32: `A = L L^T`, and two triangular solves.
//!
//! For matrices whose smallest eigenvalue is not much below 1e-4 of the largest, as those with a ridge have it; nothing is
//! pivoted. (Leverage in [`crate::compress`] factorises small matrices in f64, of which some directions may be lost in rounding.)

use super::vector::{self, instruction_set};

/// The lower triangle of a factor.
#[derive(Debug)]
pub struct Cholesky {
    /// `[size, size]`, row after row; what is above the diagonal is not read.
    factor: Vec<f32>,
    size: usize,
}

impl Cholesky {
    /// * `matrix`: `[size, size]`, of which the lower triangle is read
    ///
    /// Returns `None` if it is not positive definite, or was before it was rounded.
    ///
    /// # Panics
    /// If the matrix has not as many numbers.
    #[must_use]
    pub fn of(mut matrix: Vec<f32>, size: usize) -> Option<Self> {
        assert_eq!(matrix.len(), size * size, "a matrix of {size} rows and columns");
        let set = instruction_set();
        for row in 0..size {
            let (above, own) = matrix.split_at_mut(row * size);
            let own = &mut own[..=row];
            for column in 0..row {
                let other = &above[column * size..=column * size + column];
                let known = vector::dot(set, &own[..column], &other[..column]);
                own[column] = (own[column] - known) / other[column];
            }
            let square = own[row] - vector::dot(set, &own[..row], &own[..row]);
            // False of what is no number, too.
            if square > 0.0 && square.is_finite() {
                own[row] = square.sqrt();
            } else {
                return None;
            }
        }
        Some(Self { factor: matrix, size })
    }

    /// Overwrites a right-hand side, `[size]`, with what the matrix makes it of.
    ///
    /// # Panics
    /// If it has not as many numbers.
    pub fn solve(&self, numbers: &mut [f32]) {
        assert_eq!(numbers.len(), self.size, "a right-hand side");
        let set = instruction_set();
        let row = |index: usize| self.factor[index * self.size..=index * self.size + index].split_at(index);
        for index in 0..self.size {
            let (left, diagonal) = row(index);
            numbers[index] = (numbers[index] - vector::dot(set, left, &numbers[..index])) / diagonal[0];
        }
        for index in (0..self.size).rev() {
            let (left, diagonal) = row(index);
            numbers[index] /= diagonal[0];
            let solved = numbers[index];
            vector::add_scaled(set, &mut numbers[..index], left, -solved);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `B B^T` and the unit matrix, of numbers that look random.
    fn matrix(size: usize) -> Vec<f32> {
        let number = |index: usize| f32::from(u16::try_from(index * 7919 % 101).unwrap()) / 50.0 - 1.0;
        let rows: Vec<Vec<f32>> =
            (0..size).map(|row| (0..size).map(|column| number(row * size + column)).collect()).collect();
        let mut matrix = vec![0.0; size * size];
        for (i, a) in rows.iter().enumerate() {
            for (j, b) in rows.iter().enumerate() {
                let product: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                matrix[i * size + j] = product + f32::from(u8::from(i == j));
            }
        }
        matrix
    }

    #[test]
    fn what_is_solved_gives_the_right_side() {
        for size in [1, 2, 3, 17, 40] {
            let matrix = matrix(size);
            #[expect(clippy::cast_precision_loss)]
            let right: Vec<f32> = (0..size).map(|index| (index as f32 * 0.7).sin()).collect();
            let mut solved = right.clone();
            Cholesky::of(matrix.clone(), size).unwrap().solve(&mut solved);
            for (row, right) in matrix.chunks(size).zip(right) {
                let got: f32 = row.iter().zip(&solved).map(|(a, x)| a * x).sum();
                assert!((got - right).abs() < 1e-3, "{size}: {got} {right}");
            }
        }
    }

    #[test]
    fn what_is_above_the_diagonal_is_not_read() {
        let mut matrix = matrix(5);
        let expected = Cholesky::of(matrix.clone(), 5).unwrap();
        (0..5).for_each(|row| matrix[row * 5 + row + 1..(row + 1) * 5].fill(f32::NAN));
        let [mut a, mut b] = [[1.0; 5]; 2];
        expected.solve(&mut a);
        Cholesky::of(matrix, 5).unwrap().solve(&mut b);
        assert_eq!(a, b);
    }

    #[test]
    fn what_has_no_factor_is_told() {
        assert!(Cholesky::of(vec![1.0, 0.0, 2.0, 1.0], 2).is_none(), "an eigenvalue of -1");
        assert!(Cholesky::of(vec![f32::NAN], 1).is_none());
        assert!(Cholesky::of(vec![0.0], 1).is_none());
        Cholesky::of(Vec::new(), 0).unwrap().solve(&mut []);
    }
}
