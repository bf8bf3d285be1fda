//! Rows of plain numbers: stored as they are read, and widened in registers.

use super::{BLOCK_ROWS, Keys, Values};
use crate::kernels::element::Element;
use crate::kernels::simd::{LANES, Lanes};
use crate::kernels::tiles::Tiles;
use crate::kernels::vector::MAX_HEAD_DIM;

/// Keys of plain numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FloatKeys<'a, T>(pub Tiles<'a, T, LANES>);

/// Values of plain numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FloatValues<'a, T>(pub Tiles<'a, T, 1>);

/// Numbers of a query that are taken together.
const STEP: usize = 8;

impl<T: Element> FloatKeys<'_, T> {
    /// `SETS` partial sums for each query row hide the latency of additions.
    #[inline(always)]
    fn score_tile_in<L: Lanes, const GROUP: usize, const SETS: usize>(
        &self,
        tile: usize,
        queries: &[f32],
    ) -> [L; GROUP] {
        let head_dim = self.0.width;
        let queries: [&[f32]; GROUP] = std::array::from_fn(|group| &queries[group * head_dim..(group + 1) * head_dim]);
        let mut sums = [[L::splat(0.0); GROUP]; SETS];
        let (steps, rest) = self.0.tile(tile).as_chunks::<STEP>();
        for (index, keys) in steps.iter().enumerate() {
            let queries: [&[f32; STEP]; GROUP] = std::array::from_fn(|group| &queries[group].as_chunks().0[index]);
            for (number, key) in keys.iter().enumerate() {
                let key: L = T::load(key);
                for group in 0..GROUP {
                    let sum = &mut sums[number % SETS][group];
                    *sum = key.mul_add(L::splat(queries[group][number]), *sum);
                }
            }
        }
        for (number, key) in rest.iter().enumerate() {
            let key: L = T::load(key);
            for group in 0..GROUP {
                let query = queries[group][steps.len() * STEP + number];
                sums[0][group] = key.mul_add(L::splat(query), sums[0][group]);
            }
        }
        std::array::from_fn(|group| sums[1..].iter().fold(sums[0][group], |sum, set| sum.add(set[group])))
    }
}

impl<T: Element> FloatValues<'_, T> {
    /// The sums of `WIDTH * 16` numbers of the output, from number `at` on, stay in registers over all rows.
    #[inline(always)]
    fn add_columns<L: Lanes, const GROUP: usize, const WIDTH: usize>(
        values: &[T],
        head_dim: usize,
        at: usize,
        weights: &[[f32; BLOCK_ROWS]; GROUP],
        factors: [f32; GROUP],
        out: &mut [f32],
    ) {
        let mut sums = [[L::splat(0.0); WIDTH]; GROUP];
        for (row, value) in values.chunks_exact(head_dim).enumerate().take(BLOCK_ROWS) {
            let value: &[[T; LANES]; WIDTH] = &value[at..].as_chunks().0.as_chunks().0[0];
            let value: [L; WIDTH] = std::array::from_fn(|column| T::load(&value[column]));
            for group in 0..GROUP {
                let weight = L::splat(weights[group][row]);
                for column in 0..WIDTH {
                    sums[group][column] = weight.mul_add(value[column], sums[group][column]);
                }
            }
        }
        for (group, sums) in sums.into_iter().enumerate() {
            let out = out[group * head_dim + at..].as_chunks_mut::<LANES>().0;
            for (out, sum) in out.iter_mut().zip(sums) {
                L::load(out).mul_add(L::splat(factors[group]), sum).store(out);
            }
        }
    }
}

impl<T: Element> Keys for FloatKeys<'_, T> {
    type Prepared = ();

    const QUANTS: bool = false;

    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len
    }

    #[inline(always)]
    fn key(&self, row: usize, out: &mut [f32]) {
        let mut stored = [T::default(); MAX_HEAD_DIM];
        self.0.copy_row(row, &mut stored);
        out.iter_mut().zip(stored).for_each(|(out, number)| *out = number.widen());
    }

    #[inline(always)]
    fn widen_tile<L: Lanes>(&self, tile: usize, columns: &mut [[f32; LANES]]) {
        for (column, numbers) in columns.iter_mut().zip(self.0.tile(tile)) {
            let numbers: L = T::load(numbers);
            numbers.store(column);
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(&self, _queries: &[f32], _head_dim: usize) -> Self::Prepared {}

    /// Plain rows are so many bytes that the processor's own prefetching does better (measured).
    #[inline(always)]
    fn fetch_ahead(&self, _tile: usize) {}

    #[inline(always)]
    fn score_tiles<L: Lanes, const GROUP: usize, const TILES: usize>(
        &self,
        first: usize,
        queries: &[f32],
        (): &(),
    ) -> [[L; GROUP]; TILES] {
        let mut scores = [[L::splat(0.0); GROUP]; TILES];
        for (tile, scores) in (first..).zip(&mut scores) {
            *scores = if 2 * GROUP <= L::ACCUMULATORS {
                self.score_tile_in::<L, GROUP, 2>(tile, queries)
            } else {
                self.score_tile_in::<L, GROUP, 1>(tile, queries)
            };
        }
        scores
    }
}

impl<T: Element> Values for FloatValues<'_, T> {
    const QUANTS: bool = false;

    #[inline(always)]
    fn value(&self, row: usize, out: &mut [f32]) {
        let mut stored = [T::default(); MAX_HEAD_DIM];
        self.0.copy_row(row, &mut stored);
        out.iter_mut().zip(stored).for_each(|(out, number)| *out = number.widen());
    }

    #[inline(always)]
    fn widen_row<L: Lanes>(&self, row: usize, out: &mut [f32]) {
        let Some(numbers) = self.0.numbers(row * self.0.width, self.0.width) else { return };
        let (chunks, rest) = numbers.as_chunks();
        let (out_chunks, out_rest) = out.as_chunks_mut();
        for (out, numbers) in out_chunks.iter_mut().zip(chunks) {
            let numbers: L = T::load(numbers);
            numbers.store(out);
        }
        out_rest.iter_mut().zip(rest).for_each(|(out, number)| *out = number.widen());
    }

    #[inline(always)]
    fn fetch_ahead(&self, _tile: usize) {}

    #[inline(always)]
    fn add_values<L: Lanes, const GROUP: usize>(
        &self,
        first: usize,
        count: usize,
        weights: &[[f32; BLOCK_ROWS]; GROUP],
        factors: [f32; GROUP],
        out: &mut [f32],
    ) {
        let head_dim = self.0.width;
        let mut joined = Vec::new();
        let values = self.0.rows(first, count, &mut joined);
        let mut at = 0;
        while at + 4 * LANES <= head_dim && 4 * GROUP <= L::ACCUMULATORS {
            Self::add_columns::<L, GROUP, 4>(values, head_dim, at, weights, factors, out);
            at += 4 * LANES;
        }
        while at + 2 * LANES <= head_dim && 2 * GROUP <= L::ACCUMULATORS {
            Self::add_columns::<L, GROUP, 2>(values, head_dim, at, weights, factors, out);
            at += 2 * LANES;
        }
        while at + LANES <= head_dim {
            Self::add_columns::<L, GROUP, 1>(values, head_dim, at, weights, factors, out);
            at += LANES;
        }
        for group in 0..GROUP {
            for number in at..head_dim {
                let column = values[number..].iter().step_by(head_dim);
                let sum: f32 = column.zip(&weights[group]).map(|(value, weight)| value.widen() * weight).sum();
                let out = &mut out[group * head_dim + number];
                *out = *out * factors[group] + sum;
            }
        }
    }
}
