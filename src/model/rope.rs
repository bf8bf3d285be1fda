//! Rotary position embedding (Su et al., arXiv 2104.09864).

use rayon::prelude::*;

use super::config::{RopeLayout, RopeSettings};

/// Rotates queries and keys by their position.
#[derive(Debug, Clone)]
pub struct Rope {
    frequencies: Vec<f64>,
    layout: RopeLayout,
}

impl Rope {
    /// Frequencies as `settings` say.
    #[must_use]
    #[expect(clippy::cast_precision_loss)]
    pub fn new(settings: &RopeSettings) -> Self {
        let frequencies = (0..settings.dim / 2).map(|i| {
            let frequency = settings.theta.powf(-2.0 * i as f64 / settings.dim as f64);
            let divisor = settings.frequency_divisors.get(i).map_or(1.0, |&divisor| f64::from(divisor));
            frequency / divisor / settings.position_divisor
        });
        Self { frequencies: frequencies.collect(), layout: settings.layout }
    }

    /// Cosines and sines of the positions `first..first + count`, `[count, dim / 2]` pairs.
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    pub fn angles(&self, first: usize, count: usize) -> Vec<(f32, f32)> {
        let angle = |position: usize, frequency: f64| {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            (cos as f32, sin as f32)
        };
        (first..first + count)
            .flat_map(|position| self.frequencies.iter().map(move |&frequency| angle(position, frequency)))
            .collect()
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
                match self.layout {
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
