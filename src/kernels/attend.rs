//! Attention of a few query rows over a range of the rows that one KV head keeps: the inner loop of decoding.
//!
//! Keys are read in tiles of 16 rows whose lanes are rows, so that a score needs no sum across lanes; values are read
//! row by row, so that the lanes are numbers of the output. Rows are taken in blocks: scores, their softmax relative to
//! the largest score so far, and the weighted values of one block, before the next one is read. Stored numbers are
//! widened in registers.
//!
//! Products with quantised rows are sums of integers: query rows and weights are rounded to 16 bits of the largest in
//! their block, which adds less than a hundredth of the error that the stored 8 bits have.
//!
//! Not for: cutting work into ranges, or merging them (see [`crate::attention::decode`]).

use std::ops::Range;

use half::f16;

use super::blocks::{BLOCK, BlockFormat, Q4_0, Q8_0};
use super::element::Element;
use super::lanes::{self, LANES, Lanes};
use super::simd::InstructionSet;
use super::tiles::Tiles;
use super::vector::{self, MAX_HEAD_DIM};

/// Rows whose scores are held at a time.
const BLOCK_ROWS: usize = 128;

/// Rows that all query rows go over before the next ones are read: they stay in a core's cache.
const PIECE_ROWS: usize = 512;

/// Query rows that share one pass: their sums stay in registers.
const MAX_GROUP: usize = 4;

/// Blocks of the longest row.
const MAX_BLOCKS: usize = MAX_HEAD_DIM / BLOCK;

/// The keys and values that one KV head keeps, as they are stored; a view that is cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct HeadRows<'a> {
    pub(crate) stored: Stored<'a>,
    pub(crate) head_dim: usize,
    pub(crate) len: usize,
}

/// Rows in one of the storage formats.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stored<'a> {
    F32(FloatRows<'a, f32>),
    F16(FloatRows<'a, f16>),
    Q8_0(BlockRows<'a, Q8_0>),
    Q4_0(BlockRows<'a, Q4_0>),
}

/// Rows of plain numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FloatRows<'a, T> {
    pub keys: Tiles<'a, T, LANES>,
    pub values: Tiles<'a, T, 1>,
}

/// Rows of quantised blocks. Keys are tiles of pairs of bytes; values are pairs of rows, byte by byte.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockRows<'a, Q> {
    pub keys: Tiles<'a, [u8; 2], LANES>,
    pub key_scales: Tiles<'a, f16, LANES>,
    pub values: Tiles<'a, u8, 2>,
    pub value_scales: Tiles<'a, f16, LANES>,
    pub format: std::marker::PhantomData<Q>,
}

impl HeadRows<'_> {
    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Numbers in a key or value.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Adds all keys and values to buffers as f32, row after row.
    pub fn widen_to(&self, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        match &self.stored {
            Stored::F32(rows) => self.widen_rows(rows, keys, values),
            Stored::F16(rows) => self.widen_rows(rows, keys, values),
            Stored::Q8_0(rows) => self.widen_rows(rows, keys, values),
            Stored::Q4_0(rows) => self.widen_rows(rows, keys, values),
        }
    }

    fn widen_rows(&self, rows: &impl Rows, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        let (from_key, from_value) = (keys.len(), values.len());
        keys.resize(from_key + self.len * self.head_dim, 0.0);
        values.resize(from_value + self.len * self.head_dim, 0.0);
        for (row, key) in keys[from_key..].chunks_exact_mut(self.head_dim).enumerate() {
            rows.key(row, key);
        }
        for (row, value) in values[from_value..].chunks_exact_mut(self.head_dim).enumerate() {
            rows.value(row, value);
        }
    }
}

/// Attends from query rows over a range of a head's rows.
///
/// * `set`: from [`InstructionSet::detect`] or [`InstructionSet::available`]
/// * `range`: rows; not empty, and its start a multiple of 16
/// * `queries`: `[group_size, head_dim]`, rotated, and multiplied by `1 / sqrt(head_dim)`
/// * `out`: `[group_size, head_dim]`, overwritten with the *unnormalised* sums of `exp(score - max) * value`
/// * `max_and_sum`: `[group_size]`, overwritten with the largest score and the sum of exponentials
///
/// Results of ranges are merged with [`merge_partial`](super::vector::merge_partial).
///
/// # Panics
/// If a size or the range does not fit, or `head_dim` is above [`MAX_HEAD_DIM`].
pub fn attend_range(
    set: InstructionSet,
    rows: HeadRows<'_>,
    range: Range<usize>,
    queries: &[f32],
    out: &mut [f32],
    max_and_sum: &mut [(f32, f32)],
) {
    let head_dim = rows.head_dim;
    assert!((1..=MAX_HEAD_DIM).contains(&head_dim), "head dimension of {head_dim}");
    assert!(range.start < range.end && range.end <= rows.len, "rows {range:?} of {}", rows.len);
    assert!(range.start.is_multiple_of(LANES), "rows from {}", range.start);
    assert_eq!((queries.len(), out.len()), (max_and_sum.len() * head_dim, queries.len()), "sizes of attention");
    out.fill(0.0);
    max_and_sum.fill((f32::NEG_INFINITY, 0.0));
    let work = Work { head_dim, range, queries, out, max_and_sum };
    match rows.stored {
        Stored::F32(rows) => work.run(set, rows),
        Stored::F16(rows) => work.run(set, rows),
        Stored::Q8_0(rows) => work.run(set, rows),
        Stored::Q4_0(rows) => work.run(set, rows),
    }
}

/// What query rows make of each of a head's rows: their softmax weights, summed up.
///
/// * `set`, `queries`: as for [`attend_range`]
/// * `scratch`: any buffer; give the same again
/// * `weights`: overwritten with `[len]`
///
/// # Panics
/// If a size does not fit, or `head_dim` is above [`MAX_HEAD_DIM`].
pub fn row_weights(
    set: InstructionSet,
    rows: HeadRows<'_>,
    queries: &[f32],
    scratch: &mut Vec<f32>,
    weights: &mut Vec<f32>,
) {
    let (head_dim, len) = (rows.head_dim, rows.len);
    assert!((1..=MAX_HEAD_DIM).contains(&head_dim), "head dimension of {head_dim}");
    assert!(queries.len().is_multiple_of(head_dim), "sizes of queries");
    weights.clear();
    weights.resize(len, 0.0);
    scratch.resize(queries.len() / head_dim * len, 0.0);
    match rows.stored {
        Stored::F32(rows) => score_groups(set, rows, head_dim, queries, scratch),
        Stored::F16(rows) => score_groups(set, rows, head_dim, queries, scratch),
        Stored::Q8_0(rows) => score_groups(set, rows, head_dim, queries, scratch),
        Stored::Q4_0(rows) => score_groups(set, rows, head_dim, queries, scratch),
    }
    for scores in scratch.chunks_exact_mut(len.max(1)) {
        vector::softmax(set, scores);
        vector::add_assign(set, weights, scores);
    }
}

/// Scores of all rows, `[group_size, len]`.
fn score_groups<R: Rows>(set: InstructionSet, rows: R, head_dim: usize, queries: &[f32], scores: &mut [f32]) {
    let parts = queries.chunks(MAX_GROUP * head_dim).zip(scores.chunks_mut((MAX_GROUP * rows.len()).max(1)));
    for (queries, scores) in parts {
        match queries.len() / head_dim {
            1 => score::<R, 1>(set, &rows, queries, scores),
            2 => score::<R, 2>(set, &rows, queries, scores),
            3 => score::<R, 3>(set, &rows, queries, scores),
            _ => score::<R, MAX_GROUP>(set, &rows, queries, scores),
        }
    }
}

fn score<R: Rows, const GROUP: usize>(set: InstructionSet, rows: &R, queries: &[f32], scores: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<R: Rows, const GROUP: usize>(rows: &R, queries: &[f32], scores: &mut [f32]) {
            score_body::<lanes::Avx2, R, GROUP>(rows, queries, scores);
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<R: Rows, const GROUP: usize>(rows: &R, queries: &[f32], scores: &mut [f32]) {
            score_body::<lanes::Avx512, R, GROUP>(rows, queries, scores);
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn vnni<R: Rows, const GROUP: usize>(rows: &R, queries: &[f32], scores: &mut [f32]) {
            score_body::<lanes::Avx512, R, GROUP>(rows, queries, scores);
        }
        match set {
            // SAFETY: `set` was detected on this processor, here and below.
            InstructionSet::Avx512Vnni if R::NEEDS_VNNI => return unsafe { vnni::<R, GROUP>(rows, queries, scores) },
            InstructionSet::Avx512 | InstructionSet::Avx512Vnni if !R::NEEDS_VNNI => {
                return unsafe { avx512::<R, GROUP>(rows, queries, scores) };
            }
            InstructionSet::Avx2 | InstructionSet::Avx512 | InstructionSet::Avx512Vnni => {
                return unsafe { avx2::<R, GROUP>(rows, queries, scores) };
            }
            InstructionSet::Portable => {}
        }
    }
    let _ = set;
    score_body::<lanes::Portable, R, GROUP>(rows, queries, scores);
}

/// Scores `[GROUP, len]` of all rows.
#[inline(always)]
fn score_body<L: Lanes, R: Rows, const GROUP: usize>(rows: &R, queries: &[f32], scores: &mut [f32]) {
    let (len, head_dim) = (rows.len(), queries.len() / GROUP);
    let prepared = R::prepare(queries, head_dim);
    for tile in 0..len / LANES {
        rows.fetch_ahead(tile);
        let tile_scores: [L; GROUP] = rows.score_tile(tile, queries, &prepared);
        for (scores, tile_scores) in scores.chunks_exact_mut(len).zip(tile_scores) {
            tile_scores.store(&mut scores.as_chunks_mut().0[tile]);
        }
    }
    let mut key = [0.0; MAX_HEAD_DIM];
    let key = &mut key[..head_dim];
    for row in len / LANES * LANES..len {
        rows.key(row, key);
        for (scores, query) in scores.chunks_exact_mut(len).zip(queries.chunks_exact(head_dim)) {
            scores[row] = dot::<L>(query, key);
        }
    }
}

/// What is attended to, and by whom; see [`attend_range`].
struct Work<'a> {
    head_dim: usize,
    range: Range<usize>,
    queries: &'a [f32],
    out: &'a mut [f32],
    max_and_sum: &'a mut [(f32, f32)],
}

impl Work<'_> {
    fn run<R: Rows>(self, set: InstructionSet, rows: R) {
        let group_size = self.max_and_sum.len();
        for start in self.range.clone().step_by(PIECE_ROWS) {
            let range = start..(start + PIECE_ROWS).min(self.range.end);
            let mut first = 0;
            while first < group_size {
                // As equal as can be: 5 are 3 and 2, not 4 and 1.
                let left = group_size - first;
                let size = left.div_ceil(left.div_ceil(MAX_GROUP));
                let numbers = first * self.head_dim..(first + size) * self.head_dim;
                let part = Work {
                    head_dim: self.head_dim,
                    range: range.clone(),
                    queries: &self.queries[numbers.clone()],
                    out: &mut self.out[numbers],
                    max_and_sum: &mut self.max_and_sum[first..first + size],
                };
                match size {
                    1 => attend::<R, 1>(set, &rows, part),
                    2 => attend::<R, 2>(set, &rows, part),
                    3 => attend::<R, 3>(set, &rows, part),
                    _ => attend::<R, MAX_GROUP>(set, &rows, part),
                }
                first += size;
            }
        }
    }
}

fn attend<R: Rows, const GROUP: usize>(set: InstructionSet, rows: &R, work: Work<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<R: Rows, const GROUP: usize>(rows: &R, work: Work<'_>) {
            attend_body::<lanes::Avx2, R, GROUP>(rows, work);
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<R: Rows, const GROUP: usize>(rows: &R, work: Work<'_>) {
            attend_body::<lanes::Avx512, R, GROUP>(rows, work);
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn vnni<R: Rows, const GROUP: usize>(rows: &R, work: Work<'_>) {
            attend_body::<lanes::Avx512, R, GROUP>(rows, work);
        }
        match set {
            // SAFETY: `set` was detected on this processor, here and below.
            InstructionSet::Avx512Vnni if R::NEEDS_VNNI => return unsafe { vnni::<R, GROUP>(rows, work) },
            InstructionSet::Avx512 | InstructionSet::Avx512Vnni if !R::NEEDS_VNNI => {
                return unsafe { avx512::<R, GROUP>(rows, work) };
            }
            InstructionSet::Avx2 | InstructionSet::Avx512 | InstructionSet::Avx512Vnni => {
                return unsafe { avx2::<R, GROUP>(rows, work) };
            }
            InstructionSet::Portable => {}
        }
    }
    let _ = set;
    attend_body::<lanes::Portable, R, GROUP>(rows, work);
}

/// One pass over the range, on top of what `max_and_sum` and `out` hold of the rows before it.
#[inline(always)]
fn attend_body<L: Lanes, R: Rows, const GROUP: usize>(rows: &R, work: Work<'_>) {
    let Work { head_dim, range, queries, out, max_and_sum } = work;
    let prepared = R::prepare(queries, head_dim);
    let whole = rows.len() / LANES * LANES; // rows in whole tiles
    for first in range.clone().step_by(BLOCK_ROWS) {
        let count = (range.end - first).min(BLOCK_ROWS);
        let chunks = count.div_ceil(LANES);
        let mut scores = [[f32::NEG_INFINITY; BLOCK_ROWS]; GROUP];

        for chunk in 0..chunks {
            let row = first + chunk * LANES;
            if row < whole {
                rows.fetch_ahead(row / LANES);
                let tile_scores: [L; GROUP] = rows.score_tile(row / LANES, queries, &prepared);
                for (scores, tile_scores) in scores.iter_mut().zip(tile_scores) {
                    tile_scores.store(&mut scores.as_chunks_mut().0[chunk]);
                }
            } else {
                let mut key = [0.0; MAX_HEAD_DIM];
                let key = &mut key[..head_dim];
                for row in row..range.end.min(row + LANES) {
                    rows.key(row, key);
                    for (scores, query) in scores.iter_mut().zip(queries.chunks_exact(head_dim)) {
                        scores[row - first] = dot::<L>(query, key);
                    }
                }
            }
        }
        // A range may end within a tile.
        for scores in &mut scores {
            scores[count..].fill(f32::NEG_INFINITY);
        }

        let mut factors = [1.0; GROUP];
        for (group, scores) in scores.iter_mut().enumerate() {
            let scores = &mut scores.as_chunks_mut::<LANES>().0[..chunks];
            let (max, sum) = &mut max_and_sum[group];
            // In this order NaN is no maximum, and turns up in the sum.
            let largest =
                scores.iter().fold(L::splat(f32::NEG_INFINITY), |max, scores| L::load(scores).max(max)).largest();
            if largest > *max {
                factors[group] = (*max - largest).exp();
                *max = largest;
            }
            // All scores are minus infinity or NaN: any finite number keeps their differences defined.
            let base = L::splat(max.max(f32::MIN));
            let mut sums = L::splat(0.0);
            for scores in scores {
                let weights = L::load(scores).sub(base).exp_nonpositive();
                sums = sums.add(weights);
                weights.store(scores);
            }
            *sum = *sum * factors[group] + sums.sum();
        }
        rows.add_values::<L, GROUP>(first, count, &scores, factors, out);
    }
}

#[inline(always)]
fn dot<L: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let mut sums = L::splat(0.0);
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        sums = L::load(a).mul_add(L::load(b), sums);
    }
    a_rest.iter().zip(b_rest).fold(sums.sum(), |sum, (a, b)| sum + a * b)
}

/// Starts to fetch `count` numbers from number `first` on into the second-level cache, if there are so many.
#[inline(always)]
fn fetch<T>(numbers: &[T], first: usize, count: usize) {
    /// Bytes that are fetched together.
    const LINE: usize = 64;
    #[cfg(target_arch = "x86_64")]
    if let Some(numbers) = numbers.get(first..first + count) {
        let start = numbers.as_ptr().cast::<i8>();
        for at in (0..size_of_val(numbers)).step_by(LINE) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: every processor of this architecture has it, and it reads nothing that a program could notice.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (numbers, first, count, LINE);
}

/// Rows in a storage format: what the kernel needs of them.
trait Rows: Copy {
    /// Query rows as this format's products need them.
    type Prepared;

    /// Whether AVX-512 is of use only together with VNNI.
    const NEEDS_VNNI: bool;

    fn len(&self) -> usize;
    /// Writes one key as f32.
    fn key(&self, row: usize, out: &mut [f32]);
    /// Writes one value as f32.
    fn value(&self, row: usize, out: &mut [f32]);
    fn prepare(queries: &[f32], head_dim: usize) -> Self::Prepared;
    /// Starts to fetch what is read next from elsewhere: a whole tile's values, and the keys of the tile that is in its
    /// place in the next block. The processor's own prefetching stops at the end of each page.
    fn fetch_ahead(&self, tile: usize);
    /// Scores of the 16 rows of a whole tile for each query row.
    fn score_tile<L: Lanes, const GROUP: usize>(
        &self,
        tile: usize,
        queries: &[f32],
        prepared: &Self::Prepared,
    ) -> [L; GROUP];
    /// `out = out * factor + sum of weight * value` for each query row, over `count` rows from `first` on.
    fn add_values<L: Lanes, const GROUP: usize>(
        &self,
        first: usize,
        count: usize,
        weights: &[[f32; BLOCK_ROWS]; GROUP],
        factors: [f32; GROUP],
        out: &mut [f32],
    );
}

/// Plain numbers that are widened sixteen at a time.
pub(crate) trait Float: Element {
    fn load<L: Lanes>(source: &[Self; LANES]) -> L;
}

impl Float for f32 {
    #[inline(always)]
    fn load<L: Lanes>(source: &[Self; LANES]) -> L {
        L::load(source)
    }
}

impl Float for f16 {
    #[inline(always)]
    fn load<L: Lanes>(source: &[Self; LANES]) -> L {
        L::load_f16(source)
    }
}

/// Numbers of a query that are taken together.
const STEP: usize = 8;

impl<T: Float> FloatRows<'_, T> {
    /// `SETS` partial sums for each query row hide the latency of additions.
    #[inline(always)]
    fn score_tile_in<L: Lanes, const GROUP: usize, const SETS: usize>(
        &self,
        tile: usize,
        queries: &[f32],
    ) -> [L; GROUP] {
        let head_dim = self.keys.width;
        let queries: [&[f32]; GROUP] = std::array::from_fn(|group| &queries[group * head_dim..(group + 1) * head_dim]);
        let mut sums = [[L::splat(0.0); GROUP]; SETS];
        let (steps, rest) = self.keys.tile(tile).as_chunks::<STEP>();
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

impl<T: Float> Rows for FloatRows<'_, T> {
    type Prepared = ();

    const NEEDS_VNNI: bool = false;

    #[inline(always)]
    fn len(&self) -> usize {
        self.keys.len
    }

    #[inline(always)]
    fn key(&self, row: usize, out: &mut [f32]) {
        let mut stored = [T::default(); MAX_HEAD_DIM];
        self.keys.copy_row(row, &mut stored);
        out.iter_mut().zip(stored).for_each(|(out, number)| *out = number.widen());
    }

    #[inline(always)]
    fn value(&self, row: usize, out: &mut [f32]) {
        let stored = &self.values.numbers[row * self.values.width..];
        out.iter_mut().zip(stored).for_each(|(out, number)| *out = number.widen());
    }

    #[inline(always)]
    fn prepare(_queries: &[f32], _head_dim: usize) -> Self::Prepared {}

    /// Plain rows are so many bytes that the processor's own prefetching does better (measured).
    #[inline(always)]
    fn fetch_ahead(&self, _tile: usize) {}

    #[inline(always)]
    fn score_tile<L: Lanes, const GROUP: usize>(&self, tile: usize, queries: &[f32], (): &()) -> [L; GROUP] {
        if 2 * GROUP <= L::ACCUMULATORS {
            self.score_tile_in::<L, GROUP, 2>(tile, queries)
        } else {
            self.score_tile_in::<L, GROUP, 1>(tile, queries)
        }
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
        let head_dim = self.values.width;
        let values = &self.values.numbers[first * head_dim..(first + count) * head_dim];
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

/// Query rows rounded to 16 bits, block by block.
struct BlockQueries {
    /// `[GROUP][head_dim / 32]` blocks of pairs, in the order of [`BlockFormat::pair`].
    pairs: [[[[i16; 2]; BLOCK / 2]; MAX_BLOCKS]; MAX_GROUP],
    scales: [[f32; MAX_BLOCKS]; MAX_GROUP],
    /// What the formats' offset adds up to in a block, negated.
    offsets: [[i32; MAX_BLOCKS]; MAX_GROUP],
}

/// The largest i16, as what the largest number of a block becomes.
const I16_MAX: f32 = 32767.0;

/// What a block's numbers are multiplied by to fit i16, and what undoes it.
#[inline(always)]
fn to_i16(largest: f32) -> (f32, f32) {
    // The reciprocal of less would not be finite; so small numbers add nothing to any sum.
    if largest < 1e-30 { (0.0, 0.0) } else { (I16_MAX / largest, largest / I16_MAX) }
}

impl<Q: BlockFormat> BlockRows<'_, Q> {
    /// Scales of block `block` of the values of `count` rows from `first` on; 0 for other rows.
    #[inline(always)]
    fn value_scales<L: Lanes>(&self, block: usize, first: usize, count: usize) -> [f32; BLOCK_ROWS] {
        let mut scales = [0.0; BLOCK_ROWS];
        for (chunk, scales) in scales.as_chunks_mut().0.iter_mut().enumerate().take(count.div_ceil(LANES)) {
            let row = first + chunk * LANES;
            if row + LANES <= self.len() {
                L::load_f16(&self.value_scales.tile(row / LANES)[block]).store(scales);
            } else {
                for (lane, scale) in scales.iter_mut().enumerate().take(self.len() - row) {
                    *scale = self.value_scales.number(row + lane, block).to_f32();
                }
            }
        }
        scales[count..].fill(0.0);
        scales
    }

    /// Dequantises a row.
    ///
    /// * `quants`: `[blocks * BYTES]`
    /// * `scale`: of each block
    #[inline(always)]
    fn dequantize(quants: &[u8], scale: impl Fn(usize) -> f16, out: &mut [f32]) {
        let blocks = out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(quants.chunks_exact(Q::BYTES));
        for (block, (out, quants)) in blocks.enumerate() {
            *out = Q::dequantize(quants, scale(block));
        }
    }
}

impl<Q: BlockFormat> Rows for BlockRows<'_, Q> {
    type Prepared = BlockQueries;

    const NEEDS_VNNI: bool = true;

    #[inline(always)]
    fn len(&self) -> usize {
        self.key_scales.len
    }

    #[inline(always)]
    fn key(&self, row: usize, out: &mut [f32]) {
        let mut quants = [[0; 2]; MAX_HEAD_DIM / 2];
        self.keys.copy_row(row, &mut quants);
        Self::dequantize(quants.as_flattened(), |block| self.key_scales.number(row, block), out);
    }

    #[inline(always)]
    fn value(&self, row: usize, out: &mut [f32]) {
        let mut quants = [0; MAX_HEAD_DIM];
        self.values.copy_row(row, &mut quants);
        Self::dequantize(&quants, |block| self.value_scales.number(row, block), out);
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation)] // made to fit
    fn prepare(queries: &[f32], head_dim: usize) -> BlockQueries {
        let mut prepared = BlockQueries {
            pairs: [[[[0; 2]; BLOCK / 2]; MAX_BLOCKS]; MAX_GROUP],
            scales: [[0.0; MAX_BLOCKS]; MAX_GROUP],
            offsets: [[0; MAX_BLOCKS]; MAX_GROUP],
        };
        for (group, query) in queries.chunks_exact(head_dim).enumerate().take(MAX_GROUP) {
            for (block, numbers) in query.as_chunks::<BLOCK>().0.iter().enumerate() {
                let largest = numbers.iter().fold(0.0_f32, |largest, number| largest.max(number.abs()));
                let (factor, scale) = to_i16(largest);
                let rounded = numbers.map(|number| (number * factor).round_ties_even() as i16);
                for (index, pair) in prepared.pairs[group][block].iter_mut().enumerate() {
                    *pair = Q::pair(index).map(|number| rounded[number]);
                }
                // What is not a number stays none.
                let finite = numbers.iter().all(|number| number.is_finite());
                prepared.scales[group][block] = if finite { scale } else { f32::NAN };
                prepared.offsets[group][block] = -Q::OFFSET * rounded.into_iter().map(i32::from).sum::<i32>();
            }
        }
        prepared
    }

    #[inline(always)]
    fn fetch_ahead(&self, tile: usize) {
        let size = LANES * self.values.width;
        fetch(self.values.numbers, tile * size, size);
        fetch(self.keys.numbers.as_flattened(), (tile + BLOCK_ROWS / LANES) * size, size);
    }

    #[inline(always)]
    fn score_tile<L: Lanes, const GROUP: usize>(
        &self,
        tile: usize,
        _queries: &[f32],
        prepared: &BlockQueries,
    ) -> [L; GROUP] {
        let mut scores = [L::splat(0.0); GROUP];
        let (tile_quants, scales) = (self.keys.tile(tile), self.key_scales.tile(tile));
        for (block, scale) in scales.iter().enumerate().take(MAX_BLOCKS) {
            let quants = &tile_quants[block * (Q::BYTES / 2)..(block + 1) * (Q::BYTES / 2)];
            let mut sums: [L::Ints; GROUP] = std::array::from_fn(|group| L::ints(prepared.offsets[group][block]));
            for step in 0..BLOCK / 4 {
                let [first, second] = Q::widen::<L>(quants, step);
                for (sum, queries) in sums.iter_mut().zip(&prepared.pairs) {
                    *sum = L::add_products(*sum, first, queries[block][2 * step]);
                    *sum = L::add_products(*sum, second, queries[block][2 * step + 1]);
                }
            }
            let scale = L::load_f16(scale);
            for group in 0..GROUP {
                let sum = L::from_ints(sums[group]).mul(L::splat(prepared.scales[group][block]));
                scores[group] = sum.mul_add(scale, scores[group]);
            }
        }
        scores
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
        let head_dim = self.value_scales.width * BLOCK;
        // The last row of an odd number of rows is not stored as a pair; the last pair may reach beyond the range.
        let paired = count.min(self.len() / 2 * 2 - first);
        let chunks = self.values.width / LANES; // of sixteen pairs, in a pair of rows
        let pairs = paired.div_ceil(2).min(BLOCK_ROWS / 2);
        let quants = self.values.numbers.as_chunks::<2>().0.as_chunks::<LANES>().0;
        let quants = &quants[first / 2 * chunks..][..pairs * chunks];
        for block in 0..head_dim / BLOCK {
            let scales = self.value_scales::<L>(block, first, paired);
            let mut rounded = [[[0_i16; 2]; BLOCK_ROWS / 2]; GROUP];
            let mut undo = [L::splat(0.0); GROUP];
            let mut sums = [[L::ints(0); 2]; GROUP];
            for group in 0..GROUP {
                let mut scaled = [L::splat(0.0); BLOCK_ROWS / LANES];
                let (mut largest, mut not_finite) = (L::splat(0.0), L::splat(0.0));
                let factors = weights[group].as_chunks().0.iter().zip(scales.as_chunks().0);
                for (scaled, (weights, scales)) in scaled.iter_mut().zip(factors).take(paired.div_ceil(LANES)) {
                    *scaled = L::load(weights).mul(L::load(scales));
                    largest = scaled.abs().max(largest);
                    not_finite = scaled.mul_add(L::splat(0.0), not_finite);
                }
                let (factor, scale) = to_i16(largest.largest());
                // What is not a number stays none.
                undo[group] = L::splat(scale + not_finite.sum());
                let targets = rounded[group].as_flattened_mut().as_chunks_mut().0;
                for (scaled, target) in scaled.into_iter().zip(targets) {
                    scaled.mul(L::splat(factor)).store_i16(target);
                }
                if Q::OFFSET != 0 {
                    let sum: i32 = rounded[group].as_flattened().iter().map(|&weight| i32::from(weight)).sum();
                    sums[group] = [L::ints(-Q::OFFSET * sum); 2];
                }
            }
            for pair in 0..pairs {
                let wide = Q::widen::<L>(&quants[pair * chunks + block * Q::CHUNKS..][..Q::CHUNKS], 0);
                for (sums, weights) in sums.iter_mut().zip(&rounded) {
                    for (sum, &wide) in sums.iter_mut().zip(&wide) {
                        *sum = L::add_products(*sum, wide, weights[pair]);
                    }
                }
            }
            for group in 0..GROUP {
                let out = &mut out[group * head_dim + block * BLOCK..][..BLOCK];
                for (out, sum) in out.as_chunks_mut().0.iter_mut().zip(sums[group]) {
                    let old = L::load(out).mul(L::splat(factors[group]));
                    L::from_ints(sum).mul_add(undo[group], old).store(out);
                }
            }
        }
        if paired < count {
            let mut value = [0.0; MAX_HEAD_DIM];
            self.value(first + paired, &mut value[..head_dim]);
            for group in 0..GROUP {
                let weight = weights[group][paired];
                for (out, value) in out[group * head_dim..][..head_dim].iter_mut().zip(value) {
                    *out += weight * value;
                }
            }
        }
    }
}
