//! Rows of quantised blocks: products are sums of integers.
//!
//! Query rows and weights are rounded to 16 bits of the largest in their block, which adds less than a hundredth of the
//! error that the stored 8 bits have. Four neighbours of a stored row or column, a byte each, are multiplied at a time.

use std::marker::PhantomData;

use half::f16;

use super::{BLOCK_ROWS, Keys, MAX_GROUP, Values};
use crate::kernels::blocks::{BLOCK, CacheFormat};
use crate::kernels::hadamard;
use crate::kernels::simd::{self, Factors, LANES, LARGEST_FACTOR, Lanes};
use crate::kernels::tiles::Tiles;
use crate::kernels::vector::MAX_HEAD_DIM;

/// Blocks of the longest row.
const MAX_BLOCKS: usize = MAX_HEAD_DIM / BLOCK;

/// Numbers, or rows, that are multiplied together.
pub(crate) const FOUR: usize = 4;

/// Steps in which [`CacheFormat::unpack`] goes through a block, two groups of four at a time.
const STEPS: usize = BLOCK / (2 * FOUR);

/// Keys as quantised blocks, in tiles of fours of bytes: without what they have in common, and [rotated](hadamard), since a
/// few of their numbers may be much larger than others, and would leave the others of their block no bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockKeys<'a, Q> {
    pub quants: Tiles<'a, [u8; FOUR], LANES>,
    pub scales: Tiles<'a, f16, LANES>,
    /// `[head_dim]` what was subtracted from each key before it was rotated and rounded; empty if nothing was.
    pub center: &'a [f32],
    pub format: PhantomData<Q>,
}

/// Values as quantised blocks: fours of rows, byte by byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockValues<'a, Q> {
    pub quants: Tiles<'a, u8, FOUR>,
    pub scales: Tiles<'a, f16, LANES>,
    pub format: PhantomData<Q>,
}

/// Numbers of a block, or weights of a block's rows, as whole numbers of 16 bits.
#[derive(Debug, Clone, Copy)]
struct Rounded {
    /// What a whole number is worth; not a number if one of them was not finite.
    scale: f32,
    /// What the format's zero adds up to, negated.
    offset: i32,
}

/// What numbers are multiplied by before they are rounded, and what a whole number is worth then.
///
/// * `largest`: of the numbers, without their signs
#[inline(always)]
fn rounding(largest: f32) -> (f32, f32) {
    // The reciprocal of less would not be finite; so small numbers add nothing to any sum.
    if largest < 1e-30 { (0.0, 0.0) } else { (LARGEST_FACTOR / largest, largest / LARGEST_FACTOR) }
}

/// What the format's zero adds up to over whole numbers, negated; anything where one of them is not a number.
///
/// * `sum`: of the whole numbers, at most 128 of 16 bits
#[inline(always)]
#[expect(clippy::cast_possible_truncation)] // a whole number
fn offset<Q: CacheFormat>(sum: f32) -> i32 {
    (sum as i32).wrapping_mul(-Q::ZERO)
}

/// Rounds the numbers of a block.
#[inline(always)]
fn round_block<L: Lanes, Q: CacheFormat>(numbers: &[f32; BLOCK], fours: &mut [Factors; BLOCK / FOUR]) -> Rounded {
    let numbers = numbers.as_chunks::<LANES>().0;
    let (mut largest, mut not_finite) = (L::splat(0.0), L::splat(0.0));
    for numbers in numbers {
        largest = L::load(numbers).abs().max(largest);
        not_finite = L::load(numbers).mul_add(L::splat(0.0), not_finite);
    }
    let (factor, scale) = rounding(largest.largest());
    let mut sum = L::splat(0.0);
    for (numbers, fours) in numbers.iter().zip(fours.as_chunks_mut().0) {
        sum = sum.add(L::load(numbers).store_factors(L::splat(factor), fours));
    }
    // What is not a number stays none, whatever the sums are.
    Rounded { scale: scale + not_finite.sum(), offset: offset::<Q>(sum.sum()) }
}

/// Query rows as whole numbers, block by block.
pub(super) struct BlockQueries {
    /// `[GROUP][head_dim / 32]` of the two fours of each step.
    factors: [[[[Factors; 2]; STEPS]; MAX_BLOCKS]; MAX_GROUP],
    /// `[GROUP][head_dim / 32]`
    rounded: [[Rounded; MAX_BLOCKS]; MAX_GROUP],
    /// `[GROUP]` products with what was subtracted from keys: a part of every score.
    with_center: [f32; MAX_GROUP],
}

impl<Q: CacheFormat> BlockValues<'_, Q> {
    /// Scales of block `block` of the values of `count` rows from `first` on, and 0 up to the end of the last chunk. Returns
    /// 0, or not a number if a scale is none.
    #[inline(always)]
    fn block_scales<L: Lanes>(&self, block: usize, first: usize, count: usize, scales: &mut [f32; BLOCK_ROWS]) -> f32 {
        let chunks = count.div_ceil(LANES);
        let mut not_finite = L::splat(0.0);
        for (chunk, scales) in scales.as_chunks_mut::<LANES>().0.iter_mut().enumerate().take(chunks) {
            let row = first + chunk * LANES;
            if row + LANES <= self.scales.len {
                L::load_f16(&self.scales.tile(row / LANES)[block]).store(scales);
            } else {
                for (lane, scale) in scales.iter_mut().enumerate().take(self.scales.len - row) {
                    *scale = self.scales.number(row + lane, block).to_f32();
                }
            }
            if count < (chunk + 1) * LANES {
                scales[count - chunk * LANES..].fill(0.0);
            }
            not_finite = L::load(scales).mul_add(L::splat(0.0), not_finite);
        }
        not_finite.sum()
    }

    /// Weights times the scales of their rows' values, as whole numbers. The query rows take turns, as in
    /// [`exponentials`](super::exponentials). A weight that is not a number shows in the weights' sum, not here.
    ///
    /// * `not_finite`: as [`block_scales`](Self::block_scales) returns it
    /// * `fours`: overwritten in the first `chunks` chunks
    #[inline(always)]
    fn round_weights<L: Lanes, const GROUP: usize>(
        weights: &[[f32; BLOCK_ROWS]; GROUP],
        scales: &[f32; BLOCK_ROWS],
        not_finite: f32,
        chunks: usize,
        fours: &mut [[[Factors; LANES / FOUR]; BLOCK_ROWS / LANES]; GROUP],
    ) -> [Rounded; GROUP] {
        let scales = &scales.as_chunks::<LANES>().0[..chunks];
        let mut largest = [L::splat(0.0); GROUP];
        for (chunk, scales) in scales.iter().enumerate() {
            let scales = L::load(scales).abs();
            for (largest, weights) in largest.iter_mut().zip(weights) {
                *largest = L::load(&weights.as_chunks().0[chunk]).mul(scales).max(*largest);
            }
        }
        let mut rounded = [Rounded { scale: 0.0, offset: 0 }; GROUP];
        let mut factors = [L::splat(0.0); GROUP];
        for group in 0..GROUP {
            let (factor, scale) = rounding(largest[group].largest());
            factors[group] = L::splat(factor);
            rounded[group].scale = scale + not_finite;
        }
        let mut sums = [L::splat(0.0); GROUP];
        for (chunk, scales) in scales.iter().enumerate() {
            for group in 0..GROUP {
                let weights = L::load(&weights[group].as_chunks().0[chunk]).mul(L::load(scales));
                sums[group] = sums[group].add(weights.store_factors(factors[group], &mut fours[group][chunk]));
            }
        }
        for group in 0..GROUP {
            rounded[group].offset = offset::<Q>(sums[group].sum());
        }
        rounded
    }
}

/// Dequantises a row.
///
/// * `quants`: `[blocks * QUANT_BYTES]`
/// * `scale`: of each block
#[inline(always)]
fn dequantize<Q: CacheFormat>(quants: &[u8], scale: impl Fn(usize) -> f16, out: &mut [f32]) {
    let blocks = out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(quants.chunks_exact(Q::QUANT_BYTES));
    for (block, (out, quants)) in blocks.enumerate() {
        *out = Q::dequantize(quants, scale(block));
    }
}

impl<Q: CacheFormat> Keys for BlockKeys<'_, Q> {
    type Prepared = BlockQueries;

    const QUANTS: bool = true;

    #[inline(always)]
    fn len(&self) -> usize {
        self.scales.len
    }

    #[inline(always)]
    fn key(&self, row: usize, out: &mut [f32]) {
        let mut quants = [[0; FOUR]; MAX_HEAD_DIM / FOUR];
        self.quants.copy_row(row, &mut quants);
        dequantize::<Q>(quants.as_flattened(), |block| self.scales.number(row, block), out);
        hadamard::rotate(out, out.len());
        out.iter_mut().zip(self.center).for_each(|(out, center)| *out += center);
    }

    #[inline(always)]
    fn widen_tile<L: Lanes>(&self, tile: usize, columns: &mut [[f32; LANES]]) {
        let (quants, scales) = (self.quants.tile(tile), self.scales.tile(tile));
        for (block, columns) in columns.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let scale = L::load_f16(&scales[block]);
            let quants = &quants[block * (Q::QUANT_BYTES / FOUR)..(block + 1) * (Q::QUANT_BYTES / FOUR)];
            Q::widen(quants, columns);
            for column in columns {
                L::load(column).mul(scale).store(column);
            }
        }
        hadamard::rotate_columns::<L>(columns);
        for (column, &center) in columns.iter_mut().zip(self.center) {
            L::load(column).add(L::splat(center)).store(column);
        }
    }

    #[inline(always)]
    fn prepare<L: Lanes>(&self, queries: &[f32], head_dim: usize) -> BlockQueries {
        let mut prepared = BlockQueries {
            factors: [[[[[0; 2]; 2]; STEPS]; MAX_BLOCKS]; MAX_GROUP],
            rounded: [[Rounded { scale: 0.0, offset: 0 }; MAX_BLOCKS]; MAX_GROUP],
            with_center: [0.0; MAX_GROUP],
        };
        let mut rotated = [0.0; MAX_HEAD_DIM];
        for (group, query) in queries.chunks_exact(head_dim).enumerate().take(MAX_GROUP) {
            prepared.with_center[group] = query.iter().zip(self.center).map(|(query, center)| query * center).sum();
            let rotated = &mut rotated[..head_dim];
            rotated.copy_from_slice(query);
            hadamard::rotate(rotated, head_dim);
            for (block, numbers) in rotated.as_chunks::<BLOCK>().0.iter().enumerate() {
                let mut fours = [[0; 2]; BLOCK / FOUR];
                prepared.rounded[group][block] = round_block::<L, Q>(numbers, &mut fours);
                for (step, factors) in prepared.factors[group][block].iter_mut().enumerate() {
                    *factors = Q::fours(step).map(|four| fours[four]);
                }
            }
        }
        prepared
    }

    #[inline(always)]
    fn fetch_ahead(&self, tile: usize) {
        let ahead = tile + BLOCK_ROWS / LANES;
        let keys = LANES * self.quants.width;
        fetch(self.quants.numbers(ahead * keys, keys));
        let scales = LANES * self.scales.width;
        fetch(self.scales.numbers(ahead * scales, scales));
    }

    #[inline(always)]
    fn score_tiles<L: Lanes, const GROUP: usize, const TILES: usize>(
        &self,
        first: usize,
        _queries: &[f32],
        prepared: &BlockQueries,
    ) -> [[L; GROUP]; TILES] {
        let mut scores = [[L::splat(0.0); GROUP]; TILES];
        for scores in &mut scores {
            for (score, &with_center) in scores.iter_mut().zip(&prepared.with_center) {
                *score = L::splat(with_center);
            }
        }
        let tiles: [_; TILES] =
            std::array::from_fn(|tile| (self.quants.tile(first + tile), self.scales.tile(first + tile)));
        for block in 0..self.scales.width.min(MAX_BLOCKS) {
            let mut sums = [[L::sums(0); GROUP]; TILES];
            for sums in &mut sums {
                for (sum, rounded) in sums.iter_mut().zip(&prepared.rounded) {
                    *sum = L::sums(rounded[block].offset);
                }
            }
            for step in 0..STEPS {
                for (sums, (quants, _)) in sums.iter_mut().zip(tiles) {
                    let quants = &quants[block * (Q::QUANT_BYTES / FOUR)..(block + 1) * (Q::QUANT_BYTES / FOUR)];
                    let [low, high] = Q::unpack::<L>(quants, step);
                    for (sum, factors) in sums.iter_mut().zip(&prepared.factors) {
                        *sum = L::add_products(*sum, low, &factors[block][step][0]);
                        *sum = L::add_products(*sum, high, &factors[block][step][1]);
                    }
                }
            }
            for ((scores, sums), (_, scales)) in scores.iter_mut().zip(sums).zip(tiles) {
                let scale = L::load_f16(&scales[block]);
                for group in 0..GROUP {
                    let sum = L::total(sums[group]).mul(L::splat(prepared.rounded[group][block].scale));
                    scores[group] = sum.mul_add(scale, scores[group]);
                }
            }
        }
        scores
    }
}

impl<Q: CacheFormat> Values for BlockValues<'_, Q> {
    const QUANTS: bool = true;

    #[inline(always)]
    fn value(&self, row: usize, out: &mut [f32]) {
        let mut quants = [0; MAX_HEAD_DIM];
        self.quants.copy_row(row, &mut quants);
        dequantize::<Q>(&quants, |block| self.scales.number(row, block), out);
    }

    #[inline(always)]
    fn widen_row<L: Lanes>(&self, row: usize, out: &mut [f32]) {
        if row / FOUR * FOUR + FOUR > self.scales.len {
            return self.value(row, out);
        }
        let fours = self.quants.tile(row / FOUR).chunks_exact(Q::QUANT_BYTES);
        for (block, (numbers, fours)) in out.as_chunks_mut().0.iter_mut().zip(fours).enumerate() {
            Q::widen_one(fours, row % FOUR, self.scales.number(row, block).to_f32(), numbers);
        }
    }

    #[inline(always)]
    fn fetch_ahead(&self, tile: usize) {
        let count = LANES * self.scales.width;
        fetch(self.scales.numbers((tile + BLOCK_ROWS / LANES) * count, count));
    }

    #[inline(always)]
    fn add_values<L: Lanes, const GROUP: usize>(
        &self,
        first: usize,
        count: usize,
        weights: &[[f32; BLOCK_ROWS]; GROUP],
        factors: [f32; GROUP],
        out: &mut [f32],
    ) {
        let head_dim = self.scales.width * BLOCK;
        // Rows behind the last four are stored one by one; the last four may reach beyond the range.
        let in_fours = count.min(self.scales.len / FOUR * FOUR - first);
        let chunks = self.quants.width / LANES; // of sixteen columns, in four rows
        let fours = in_fours.div_ceil(FOUR).min(BLOCK_ROWS / FOUR);
        let mut joined = Vec::new();
        let quants = self.quants.rows(first, fours * FOUR, &mut joined);
        let quants = quants.as_chunks::<FOUR>().0.as_chunks::<LANES>().0;
        let mut scales = [0.0; BLOCK_ROWS];
        let mut rounded_weights = [[[[0; 2]; LANES / FOUR]; BLOCK_ROWS / LANES]; GROUP];
        for block in 0..head_dim / BLOCK {
            let not_finite = self.block_scales::<L>(block, first, in_fours, &mut scales);
            let rounded = Self::round_weights::<L, GROUP>(
                weights,
                &scales,
                not_finite,
                in_fours.div_ceil(LANES),
                &mut rounded_weights,
            );
            let mut sums = [[L::sums(0); 2]; GROUP];
            for (sums, rounded) in sums.iter_mut().zip(&rounded) {
                *sums = [L::sums(rounded.offset); 2];
            }
            for four in 0..fours {
                // Block by block, so that fetching keeps pace with computing.
                let four_ahead = (first + BLOCK_ROWS) / FOUR + four;
                let chunk_ahead = four_ahead * chunks + block * Q::CHUNKS;
                fetch(self.quants.numbers(chunk_ahead * LANES * FOUR, Q::CHUNKS * LANES * FOUR));
                let quants = Q::unpack::<L>(&quants[four * chunks + block * Q::CHUNKS..][..Q::CHUNKS], 0);
                for (sums, weights) in sums.iter_mut().zip(&rounded_weights) {
                    for (sum, &quants) in sums.iter_mut().zip(&quants) {
                        *sum = L::add_products(*sum, quants, &weights.as_flattened()[four]);
                    }
                }
            }
            for group in 0..GROUP {
                let out = &mut out[group * head_dim + block * BLOCK..][..BLOCK];
                for (out, sum) in out.as_chunks_mut().0.iter_mut().zip(sums[group]) {
                    let old = L::load(out).mul(L::splat(factors[group]));
                    L::total(sum).mul_add(L::splat(rounded[group].scale), old).store(out);
                }
            }
        }
        let mut value = [0.0; MAX_HEAD_DIM];
        let value = &mut value[..head_dim];
        for row in in_fours..count {
            self.value(first + row, value);
            for (out, weights) in out.chunks_exact_mut(head_dim).zip(weights) {
                out.iter_mut().zip(&*value).for_each(|(out, value)| *out += weights[row] * value);
            }
        }
    }
}

/// Starts to fetch numbers into the second-level cache, if there are any. Where several streams are read in turn, page by
/// page, the processor's own prefetching falls behind.
#[inline(always)]
fn fetch<T>(numbers: Option<&[T]>) {
    /// Bytes that are fetched together.
    const LINE: usize = 64;
    if let Some(numbers) = numbers {
        let start = numbers.as_ptr().cast::<u8>();
        for at in (0..size_of_val(numbers)).step_by(LINE) {
            simd::fetch::<false>(start.wrapping_add(at));
        }
    }
}
