//! Rotary position embedding (Su et al., arXiv 2104.09864).
//!
//! How a scaling method makes divisors is in [`super::rope_scaling`].

use std::borrow::Cow;

use rayon::prelude::*;

use super::config::{DynamicNtk, RopeLayout, RopeSettings};

/// Rotates queries and keys by their position.
#[derive(Debug, Clone)]
pub struct Rope {
    settings: RopeSettings,
    /// `[dim / 2]`, for sequences within the original context.
    frequencies: Vec<f64>,
}

impl Rope {
    /// Frequencies as `settings` say.
    #[must_use]
    pub fn new(settings: &RopeSettings) -> Self {
        Self { frequencies: frequencies(settings, settings.theta), settings: settings.clone() }
    }

    /// Cosines and sines of the positions `first..first + count`, `[count, dim / 2]` pairs, in a sequence that ends
    /// there: its length is what dynamic scaling looks at.
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    pub fn angles(&self, first: usize, count: usize) -> Vec<(f32, f32)> {
        let frequencies = self.frequencies(first + count);
        let factor = self.settings.attention_factor;
        let angle = |position: usize, frequency: f64| {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            ((cos * factor) as f32, (sin * factor) as f32)
        };
        (first..first + count)
            .flat_map(|position| frequencies.iter().map(move |&frequency| angle(position, frequency)))
            .collect()
    }

    /// `[dim / 2]` frequencies of a sequence.
    fn frequencies(&self, seq_len: usize) -> Cow<'_, [f64]> {
        match self.settings.dynamic.and_then(|dynamic| self.grown_theta(dynamic, seq_len)) {
            Some(theta) => Cow::Owned(frequencies(&self.settings, theta)),
            None => Cow::Borrowed(&self.frequencies),
        }
    }

    /// Turns vectors that are rotated already by so many positions more.
    ///
    /// * `rows`: `[rows, head_dim]`
    /// * `seq_len`: of the sequence by whose length they were rotated
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    pub fn turn(&self, rows: &mut [f32], head_dim: usize, positions: usize, seq_len: usize) {
        let frequencies = self.frequencies(seq_len);
        let angles: Vec<(f32, f32)> = frequencies
            .iter()
            .map(|frequency| {
                let (sin, cos) = (positions as f64 * frequency).sin_cos();
                (cos as f32, sin as f32)
            })
            .collect();
        for row in rows.chunks_exact_mut(head_dim) {
            self.rotate(row, head_dim, head_dim, &angles);
        }
    }

    /// Turns a vector that is rotated already by so many positions more, or fewer.
    ///
    /// * `row`: `[head_dim]`, of a sequence within the original context, if its length counts
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    pub fn turn_by(&self, row: &mut [f32], head_dim: usize, positions: i64) {
        let angle = |frequency: &f64| {
            let (sin, cos) = (positions as f64 * frequency).sin_cos();
            (cos as f32, sin as f32)
        };
        let angles: Vec<(f32, f32)> = self.frequencies.iter().map(angle).collect();
        self.rotate(row, head_dim, head_dim, &angles);
    }

    /// Turns vectors that were rotated by their positions back to what they were before, but for rounding.
    ///
    /// * `rows`: `[rows, head_dim]` of the positions from `first` on, rotated by the length of the sequence that ends with the
    ///   last of them
    pub fn unrotate(&self, rows: &mut [f32], head_dim: usize, first: usize) {
        #[expect(clippy::cast_possible_truncation)]
        let square = (self.settings.attention_factor * self.settings.attention_factor) as f32;
        let mut angles = self.angles(first, rows.len() / head_dim.max(1));
        for (cos, sin) in &mut angles {
            (*cos, *sin) = (*cos / square, -*sin / square);
        }
        self.rotate(rows, head_dim, head_dim, &angles);
    }

    /// Cosines and sines of the positions `first..first + count`, averaged: `[dim / 2]`. No vector's length survives
    /// this rotation; it is linear all the same.
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    pub fn mean_angles(&self, first: usize, count: usize) -> Vec<(f32, f32)> {
        let half = self.frequencies.len();
        let mut sums = vec![(0.0f64, 0.0f64); half];
        for angles in self.angles(first, count).chunks_exact(half.max(1)) {
            for (sum, &(cos, sin)) in sums.iter_mut().zip(angles) {
                *sum = (sum.0 + f64::from(cos), sum.1 + f64::from(sin));
            }
        }
        let count = count.max(1) as f64;
        sums.into_iter().map(|(cos, sin)| ((cos / count) as f32, (sin / count) as f32)).collect()
    }

    /// Turns a mean and a covariance as [`rotate`](Self::rotate) turns each vector: `R mean`, `R covariance R^T`.
    ///
    /// * `mean`: `[head_dim]`; `covariance`: `[head_dim, head_dim]`, symmetric
    /// * `angles`: `[dim / 2]`, one rotation
    pub fn rotate_moments(&self, mean: &mut [f32], covariance: &mut [f32], angles: &[(f32, f32)]) {
        let dim = mean.len();
        self.rotate(mean, dim, dim, angles);
        for _ in 0..2 {
            covariance.chunks_exact_mut(dim).for_each(|row| self.rotate(row, dim, dim, angles));
            for row in 0..dim {
                for column in 0..row {
                    covariance.swap(row * dim + column, column * dim + row);
                }
            }
        }
    }

    /// The base for a sequence that is longer than the original context; `None` for one that is not.
    #[expect(clippy::cast_precision_loss)]
    fn grown_theta(&self, dynamic: DynamicNtk, seq_len: usize) -> Option<f64> {
        if seq_len <= dynamic.original_context {
            return None;
        }
        let dim = self.settings.dim as f64;
        let times_longer = seq_len as f64 / dynamic.original_context as f64;
        let growth = dynamic.factor * times_longer - (dynamic.factor - 1.0);
        Some(self.settings.theta * growth.powf(dim / (dim - 2.0)))
    }

    /// Rotates in place, over threads.
    ///
    /// * `rows`: `[seq_len, width]`, a whole number of heads of `head_dim` in each row
    /// * `angles`: `[seq_len, dim / 2]`, from [`angles`](Self::angles)
    ///
    /// Rows beyond the angles stay as they are.
    pub fn rotate(&self, rows: &mut [f32], width: usize, head_dim: usize, angles: &[(f32, f32)]) {
        let half = self.frequencies.len();
        if half == 0 {
            return;
        }
        let rotate_row = |(row, angles): (&mut [f32], &[(f32, f32)])| {
            for head in row.chunks_exact_mut(head_dim) {
                match self.settings.layout {
                    RopeLayout::Interleaved => {
                        for (pair, &(cos, sin)) in head.chunks_exact_mut(2).zip(angles) {
                            let (x, y) = (pair[0], pair[1]);
                            pair[0] = x * cos - y * sin;
                            pair[1] = x * sin + y * cos;
                        }
                    }
                    RopeLayout::Halves => {
                        let (first, second) = head[..2 * half].split_at_mut(half);
                        for ((x, y), &(cos, sin)) in first.iter_mut().zip(second).zip(angles) {
                            (*x, *y) = (*x * cos - *y * sin, *x * sin + *y * cos);
                        }
                    }
                }
            }
        };
        if rows.len() == width {
            rotate_row((rows, angles));
        } else {
            rows.par_chunks_exact_mut(width).zip(angles.par_chunks_exact(half)).for_each(rotate_row);
        }
    }
}

#[expect(clippy::cast_precision_loss)]
fn frequencies(settings: &RopeSettings, theta: f64) -> Vec<f64> {
    (0..settings.dim / 2)
        .map(|i| {
            let frequency = theta.powf(-2.0 * i as f64 / settings.dim as f64);
            let divisor = settings.frequency_divisors.get(i).map_or(1.0, |&divisor| f64::from(divisor));
            frequency / divisor / settings.position_divisor
        })
        .collect()
}
