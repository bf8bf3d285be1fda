//! Mean and covariance of each query head's queries over a prompt, before they are rotated.
//!
//! Chunks of rows are summed up one by one, each around its own mean, and merged in f64: neither all queries are held,
//! nor are large means subtracted from each other.

use rayon::prelude::*;

use super::methods::QueryMoments;
use crate::arch::HeadLayout;
use crate::error::{Error, Result};
use crate::kernels::gemm::{Matrix, MatrixMut};

/// Moments of a layer's queries, while its prompt is processed.
#[derive(Debug, Clone)]
pub struct QueryStats {
    layout: HeadLayout,
    heads: Vec<HeadMoments>,
    /// Rows that are still to be left out.
    skip: usize,
}

#[derive(Debug, Clone)]
struct HeadMoments {
    count: usize,
    /// `[head_dim]`
    mean: Vec<f64>,
    /// `[head_dim, head_dim]` sums of products of deviations from the mean.
    products: Vec<f64>,
}

impl QueryStats {
    /// Moments of no rows.
    ///
    /// * `skip`: how many rows to leave out before the first that counts
    #[must_use]
    pub fn new(layout: HeadLayout, skip: usize) -> Self {
        let dim = layout.head_dim;
        let head = HeadMoments { count: 0, mean: vec![0.0; dim], products: vec![0.0; dim * dim] };
        Self { layout, heads: vec![head; layout.num_heads], skip }
    }

    /// Takes in rows of the prompt, in order.
    ///
    /// * `queries`: `[seq_len, num_heads, head_dim]`, not rotated
    ///
    /// # Errors
    /// [`Error::Shape`] if it is not a whole number of rows.
    pub fn add_rows(&mut self, queries: &[f32]) -> Result<()> {
        let width = self.layout.query_width();
        if !queries.len().is_multiple_of(width) {
            return Err(Error::shape("queries", format!("rows of {width}"), queries.len()));
        }
        let skipped = self.skip.min(queries.len() / width);
        self.skip -= skipped;
        let queries = &queries[skipped * width..];
        if queries.is_empty() {
            return Ok(());
        }
        let head_dim = self.layout.head_dim;
        self.heads.par_iter_mut().enumerate().for_each(|(head, moments)| {
            let columns = head * head_dim..(head + 1) * head_dim;
            moments.add(queries.chunks_exact(width).map(|row| &row[columns.clone()]));
        });
        Ok(())
    }

    /// The moments of all rows, `[num_heads]`; the covariance is divided by the number of rows. All 0 without any.
    #[must_use]
    pub fn moments(&self) -> Vec<QueryMoments> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
        let moments = |head: &HeadMoments| QueryMoments {
            mean: head.mean.iter().map(|&number| number as f32).collect(),
            covariance: head.products.iter().map(|&sum| (sum / head.count.max(1) as f64) as f32).collect(),
        };
        self.heads.iter().map(moments).collect()
    }
}

impl HeadMoments {
    /// Merges further rows of `[head_dim]` numbers (Chan, Golub, `LeVeque` 1979).
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    fn add<'a>(&mut self, rows: impl ExactSizeIterator<Item = &'a [f32]> + Clone) {
        let (dim, new) = (self.mean.len(), rows.len());
        let mut mean = vec![0.0f64; dim];
        for row in rows.clone() {
            mean.iter_mut().zip(row).for_each(|(sum, &number)| *sum += f64::from(number));
        }
        for sum in &mut mean {
            *sum /= new as f64;
        }
        let deviations: Vec<f32> = rows
            .flat_map(|row| row.iter().zip(&mean).map(|(&number, mean)| (f64::from(number) - mean) as f32))
            .collect();
        let mut products = vec![0.0f32; dim * dim];
        let deviations = Matrix::new(&deviations, new, dim, dim);
        MatrixMut::new(&mut products, dim, dim, dim).set_product(deviations.transposed(), deviations, 1.0);

        let (old, total) = (self.count as f64, (self.count + new) as f64);
        let shift: Vec<f64> = mean.iter().zip(&self.mean).map(|(new, old)| new - old).collect();
        let between = old * new as f64 / total;
        for (row, sums) in self.products.chunks_exact_mut(dim).enumerate() {
            for (column, sum) in sums.iter_mut().enumerate() {
                *sum += f64::from(products[row * dim + column]) + between * shift[row] * shift[column];
            }
        }
        self.mean.iter_mut().zip(&shift).for_each(|(mean, shift)| *mean += shift * new as f64 / total);
        self.count += new;
    }
}

#[cfg(test)]
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // small known numbers
mod tests {
    use super::*;

    /// Between two ways to sum up some numbers of size 10.
    const TOLERANCE: f32 = 1e-3;

    fn number(index: usize) -> f32 {
        let noise = f32::from(u16::try_from(index * 7919 % 1009).unwrap()) / 1009.0;
        10.0 + noise
    }

    #[test]
    fn moments_are_those_of_the_definition_whatever_the_chunks() {
        let layout = HeadLayout { num_heads: 2, num_kv_heads: 1, head_dim: 3 };
        let queries: Vec<f32> = (0..20 * 6).map(number).collect();
        for (skip, cuts) in [(0, vec![20]), (3, vec![20]), (3, vec![2, 1, 7, 10]), (4, vec![4, 16])] {
            let mut stats = QueryStats::new(layout, skip);
            let mut rest = &queries[..];
            for rows in cuts {
                stats.add_rows(&rest[..rows * 6]).unwrap();
                rest = &rest[rows * 6..];
            }
            for (head, moments) in stats.moments().iter().enumerate() {
                let column = |i: usize| (skip..20).map(move |row| f64::from(number(row * 6 + head * 3 + i)));
                let count = (20 - skip) as f64;
                let mean = |i: usize| column(i).sum::<f64>() / count;
                for i in 0..3 {
                    assert!((moments.mean[i] - mean(i) as f32).abs() < TOLERANCE);
                    for j in 0..3 {
                        let products = column(i).zip(column(j)).map(|(a, b)| (a - mean(i)) * (b - mean(j)));
                        let expected = (products.sum::<f64>() / count) as f32;
                        assert!((moments.covariance[i * 3 + j] - expected).abs() < TOLERANCE * 0.1);
                    }
                }
            }
        }
    }

    #[test]
    fn without_rows_all_is_zero() {
        let layout = HeadLayout { num_heads: 1, num_kv_heads: 1, head_dim: 2 };
        let mut stats = QueryStats::new(layout, 5);
        stats.add_rows(&[1.0; 6]).unwrap();
        assert_eq!(stats.moments(), [QueryMoments { mean: vec![0.0; 2], covariance: vec![0.0; 4] }]);
        assert!(stats.add_rows(&[1.0; 3]).is_err());
    }
}
