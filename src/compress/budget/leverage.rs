//! Statistical leverage: how much of a direction a vector alone accounts for among many.
//!
//! Not for: which vectors a method takes, and what it makes of their leverage (see [`super::methods`]).

use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};

/// `x (ridge I + sum_i w_i x_i x_i^T)^-1 x^T` of each row, at least 0.
///
/// * `rows`: `[n, dim]`
/// * `weights`: `[n]` of at least 0, or none for 1 each
/// * `ridge`: above 0
pub fn leverage(rows: &[f32], dim: usize, weights: Option<&[f32]>, ridge: f64) -> Vec<f32> {
    let len = rows.len() / dim.max(1);
    if len == 0 {
        return Vec::new();
    }
    let scaled = weights.map(|weights| -> Vec<f32> {
        let rows = rows.chunks_exact(dim).zip(weights);
        rows.flat_map(|(row, &weight)| row.iter().map(move |number| number * weight)).collect()
    });
    let mut gram = vec![0.0f32; dim * dim];
    MatrixMut::new(&mut gram, dim, dim, dim).set_product(
        Matrix::new(scaled.as_deref().unwrap_or(rows), len, dim, dim).transposed(),
        Matrix::new(rows, len, dim, dim),
        1.0,
    );
    let mut gram: Vec<f64> = gram.into_iter().map(f64::from).collect();
    for index in 0..dim {
        gram[index * dim + index] += ridge;
    }
    // As squared lengths of whitened rows: `x A^-1 x^T` itself would be a small difference of large products where rows leave
    // directions out, and the ridge alone holds those.
    let whitening = whitening(&gram, dim);
    let mut white = vec![0.0; len * dim];
    let all = Matrix::new(rows, len, dim, dim);
    let whitening = Matrix::new(&whitening, dim, dim, dim).transposed();
    MatrixMut::new(&mut white, len, dim, dim).set_product(all, whitening, 1.0);
    let set = instruction_set();
    white.chunks_exact(dim).map(|row| vector::dot(set, row, row)).collect()
}

/// The inverse of the Cholesky factor of a symmetric matrix that is positive definite but for rounding: `[dim, dim]`, lower
/// triangle.
fn whitening(matrix: &[f64], dim: usize) -> Vec<f32> {
    let mut factor = vec![0.0f64; dim * dim];
    for row in 0..dim {
        for column in 0..=row {
            let known: f64 = (0..column).map(|k| factor[row * dim + k] * factor[column * dim + k]).sum();
            // Of the two triangles the mean: sums of products in f32 may differ in their order.
            let rest = 0.5 * (matrix[row * dim + column] + matrix[column * dim + row]) - known;
            factor[row * dim + column] = if row == column {
                // A direction that is lost in rounding has hardly any weight: it counts as if it had the least there is.
                rest.max(f64::from(f32::EPSILON) * matrix[row * dim + row].abs()).max(f64::MIN_POSITIVE).sqrt()
            } else {
                rest / factor[column * dim + column]
            };
        }
    }
    let mut inverse = vec![0.0f32; dim * dim];
    let mut column = vec![0.0f64; dim];
    for unit in 0..dim {
        for row in unit..dim {
            let known: f64 = (unit..row).map(|k| factor[row * dim + k] * column[k]).sum();
            column[row] = (f64::from(u8::from(row == unit)) - known) / factor[row * dim + row];
        }
        #[expect(clippy::cast_possible_truncation)] // rounded
        for (row, &number) in column.iter().enumerate().skip(unit) {
            inverse[row * dim + unit] = number as f32;
        }
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of f32 sums, relative.
    const TOLERANCE: f32 = 1e-4;

    #[test]
    fn a_row_of_its_own_direction_accounts_for_all_of_it() {
        // Two rows share a direction, one has the other for itself; ridge hardly counts.
        let rows = [3.0, 0.0, 4.0, 0.0, 0.0, 0.1];
        let got = leverage(&rows, 2, None, 1e-9);
        for (got, expected) in got.iter().zip([9.0 / 25.0, 16.0 / 25.0, 1.0]) {
            assert!((got - expected).abs() < TOLERANCE, "{got}, {expected}");
        }
    }

    #[test]
    fn leverages_are_those_of_the_matrix_solved_by_elimination() {
        let number = |index: usize| f32::from(u16::try_from(index * 7919 % 101).unwrap()) / 25.0 - 2.0;
        let (dim, len, ridge) = (5, 12, 0.5);
        let rows: Vec<f32> = (0..dim * len).map(number).collect();
        let weights: Vec<f32> = (0..len).map(|row| 0.1 + number(row + 900).abs()).collect();
        let row = |index: usize| &rows[index * dim..(index + 1) * dim];
        let mut matrix = vec![vec![0.0f64; dim]; dim];
        for (index, &weight) in weights.iter().enumerate() {
            for (i, line) in matrix.iter_mut().enumerate() {
                for (j, entry) in line.iter_mut().enumerate() {
                    *entry += f64::from(weight) * f64::from(row(index)[i]) * f64::from(row(index)[j]);
                }
            }
        }
        (0..dim).for_each(|i| matrix[i][i] += ridge);
        for (index, got) in leverage(&rows, dim, Some(&weights), ridge).into_iter().enumerate() {
            let (mut system, mut right) =
                (matrix.clone(), row(index).iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
            for i in 0..dim {
                for j in i + 1..dim {
                    let factor = system[j][i] / system[i][i];
                    let above = system[i].clone();
                    system[j].iter_mut().zip(above).for_each(|(entry, above)| *entry -= factor * above);
                    right[j] -= factor * right[i];
                }
            }
            for i in (0..dim).rev() {
                let known: f64 = (i + 1..dim).map(|k| system[i][k] * right[k]).sum();
                right[i] = (right[i] - known) / system[i][i];
            }
            let expected: f64 = right.iter().zip(row(index)).map(|(x, &y)| x * f64::from(y)).sum();
            assert!((f64::from(got) - expected).abs() < f64::from(TOLERANCE) * expected.abs().max(1.0));
        }
    }

    /// Rows of few directions among many: what leaves the others to the ridge.
    #[test]
    fn directions_that_no_row_has_change_nothing() {
        let number = |index: usize| f32::from(u16::try_from(index * 7919 % 101).unwrap()) / 5.0 - 10.0;
        let rows: Vec<f32> = (0..300 * 2).map(number).collect();
        // The same rows, by three times as many numbers each: lengths grow by the root of 3.
        let wide: Vec<f32> = rows.chunks(2).flat_map(|row| row.repeat(3)).collect();
        let (narrow, wide) = (leverage(&rows, 2, None, 1e-2), leverage(&wide, 6, None, 3e-2));
        for (narrow, wide) in narrow.iter().zip(&wide) {
            assert!((narrow - wide).abs() < TOLERANCE * narrow, "{narrow}, {wide}");
        }
    }

    #[test]
    fn equal_rows_and_no_rows_are_no_trouble() {
        assert!(leverage(&[], 3, None, 1.0).is_empty());
        let got = leverage(&[1e4; 300], 3, None, 1e-2);
        assert!(got.iter().all(|score| score.is_finite() && (0.0..0.05).contains(score)), "{got:?}");
    }
}
