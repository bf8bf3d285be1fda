//! Attention of a few query rows over a range of the rows that one KV head keeps: the inner loop of decoding.
//!
//! Keys are read in tiles of 16 rows whose lanes are rows, so that a score needs no sum across lanes; values are read
//! row by row, so that the lanes are numbers of the output. Rows are taken in blocks: scores, their softmax relative to
//! the largest score so far, and the weighted values of one block, before the next one is read. Stored numbers are
//! widened in registers.
//!
//! Not for: cutting work into ranges, or merging them (see [`crate::attention::decode`]).

/// The same expression for the rows of whatever formats they are, and another for those in two of them.
macro_rules! each_stored {
    ($stored:expr, $rows:ident => $call:expr, $mixed:pat => $other:expr) => {
        match $stored {
            Stored::Mixed($mixed) => $other,
            Stored::F32($rows) => $call,
            Stored::F16($rows) => $call,
            Stored::F16Q8_0($rows) => $call,
            Stored::F16Q4_0($rows) => $call,
            Stored::Q8_0($rows) => $call,
            Stored::Q8_0Q4_0($rows) => $call,
            Stored::Q4_0($rows) => $call,
        }
    };
}

mod floats;
mod quants;
mod widen;

use std::ops::Range;

use half::f16;

use super::blocks::{Q4_0, Q8_0};
use super::simd::{self, InstructionSet, LANES, Lanes, dispatch};
use super::vector::{self, MAX_HEAD_DIM};
pub(crate) use floats::{FloatKeys, FloatValues};
pub(crate) use quants::{BlockKeys, BlockValues, FOUR};

/// Rows whose scores are held at a time.
const BLOCK_ROWS: usize = 128;

/// Rows that all query rows go over before the next ones are read: they stay in a core's cache.
const PIECE_ROWS: usize = 512;

/// Query rows that share one pass: their sums stay in registers.
const MAX_GROUP: usize = 4;

/// The keys and values that one KV head keeps, as they are stored; a view that is cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct HeadRows<'a> {
    pub(crate) stored: Stored<'a>,
    pub(crate) head_dim: usize,
    pub(crate) len: usize,
}

/// Rows in one of the storage formats.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::large_enum_variant, reason = "a view, which is on the stack only")]
pub(crate) enum Stored<'a> {
    F32(Pair<FloatKeys<'a, f32>, FloatValues<'a, f32>>),
    F16(Pair<FloatKeys<'a, f16>, FloatValues<'a, f16>>),
    F16Q8_0(Pair<FloatKeys<'a, f16>, BlockValues<'a, Q8_0>>),
    F16Q4_0(Pair<FloatKeys<'a, f16>, BlockValues<'a, Q4_0>>),
    Q8_0(Pair<BlockKeys<'a, Q8_0>, BlockValues<'a, Q8_0>>),
    Q8_0Q4_0(Pair<BlockKeys<'a, Q8_0>, BlockValues<'a, Q4_0>>),
    Q4_0(Pair<BlockKeys<'a, Q4_0>, BlockValues<'a, Q4_0>>),
    Mixed(MixedRows<'a>),
}

/// What a prompt has left, and behind it what came later, in other numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MixedRows<'a> {
    pub settled: Pair<BlockKeys<'a, Q8_0>, BlockValues<'a, Q4_0>>,
    pub newest: Pair<BlockKeys<'a, Q8_0>, BlockValues<'a, Q8_0>>,
}

/// Keys and their values, each in a format of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pair<K, V> {
    pub keys: K,
    pub values: V,
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

    /// The first rows, which are in other numbers than those behind them; 0 if all are in the same.
    #[must_use]
    pub fn num_settled(&self) -> usize {
        if let Stored::Mixed(rows) = self.stored { rows.settled.keys.len() } else { 0 }
    }

    /// Numbers in a key or value.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }
}

/// Attends from query rows over a range of a head's rows.
///
/// * `set`: what is computed with
/// * `range`: rows, all in the same numbers; not empty, and its start a multiple of 16 from the first in these numbers
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
    assert_eq!((queries.len(), out.len()), (max_and_sum.len() * head_dim, queries.len()), "sizes of attention");
    out.fill(0.0);
    max_and_sum.fill((f32::NEG_INFINITY, 0.0));
    let work = Work { head_dim, range, queries, out, max_and_sum };
    each_stored!(rows.stored, rows => work.run(set, rows), MixedRows { settled, newest } => {
        let num_settled = settled.keys.len();
        if work.range.start < num_settled {
            work.run(set, settled);
        } else {
            let range = work.range.start - num_settled..work.range.end - num_settled;
            Work { range, ..work }.run(set, newest);
        }
    });
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
    let score = |keys: &dyn Fn(&mut [f32]), first: usize, count: usize, scores: &mut [f32]| {
        let mut part = vec![0.0; queries.len() / head_dim * count];
        keys(&mut part);
        for (scores, part) in scores.chunks_exact_mut(len.max(1)).zip(part.chunks_exact(count.max(1))) {
            scores[first..first + count].copy_from_slice(part);
        }
    };
    each_stored!(
        rows.stored,
        rows => score_groups(set, rows.keys, head_dim, queries, scratch),
        MixedRows { settled, newest } => {
            let (first, count) = (settled.keys.len(), newest.keys.len());
            score(&|part| score_groups(set, settled.keys, head_dim, queries, part), 0, first, scratch);
            score(&|part| score_groups(set, newest.keys, head_dim, queries, part), first, count, scratch);
        }
    );
    for scores in scratch.chunks_exact_mut(len.max(1)) {
        vector::softmax(set, scores);
        vector::add_assign(set, weights, scores);
    }
}

/// Scores of all rows, `[group_size, len]`.
fn score_groups<K: Keys>(set: InstructionSet, keys: K, head_dim: usize, queries: &[f32], scores: &mut [f32]) {
    let parts = queries.chunks(MAX_GROUP * head_dim).zip(scores.chunks_mut((MAX_GROUP * keys.len()).max(1)));
    for (queries, scores) in parts {
        match queries.len() / head_dim {
            1 => dispatch(set, Score::<K, 1> { keys: &keys, queries, scores }),
            2 => dispatch(set, Score::<K, 2> { keys: &keys, queries, scores }),
            3 => dispatch(set, Score::<K, 3> { keys: &keys, queries, scores }),
            _ => dispatch(set, Score::<K, MAX_GROUP> { keys: &keys, queries, scores }),
        }
    }
}

/// Scores `[GROUP, len]` of all rows.
struct Score<'a, K, const GROUP: usize> {
    keys: &'a K,
    queries: &'a [f32],
    scores: &'a mut [f32],
}

impl<K: Keys, const GROUP: usize> simd::Work for Score<'_, K, GROUP> {
    type Output = ();

    const QUANTS: bool = K::QUANTS;

    #[inline(always)]
    fn run<L: Lanes>(self) {
        score_body::<L, K, GROUP>(self.keys, self.queries, self.scores);
    }
}

#[inline(always)]
fn score_body<L: Lanes, K: Keys, const GROUP: usize>(keys: &K, queries: &[f32], scores: &mut [f32]) {
    let (len, head_dim) = (keys.len(), queries.len() / GROUP);
    let prepared = keys.prepare::<L>(queries, head_dim);
    for tile in 0..len / LANES {
        keys.fetch_ahead(tile);
        let [tile_scores]: [[L; GROUP]; 1] = keys.score_tiles(tile, queries, &prepared);
        for (scores, tile_scores) in scores.chunks_exact_mut(len).zip(tile_scores) {
            tile_scores.store(&mut scores.as_chunks_mut().0[tile]);
        }
    }
    let mut key = [0.0; MAX_HEAD_DIM];
    let key = &mut key[..head_dim];
    for row in len / LANES * LANES..len {
        keys.key(row, key);
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
    fn run<K: Keys, V: Values>(self, set: InstructionSet, rows: Pair<K, V>) {
        assert!(self.range.start.is_multiple_of(LANES), "rows from {}", self.range.start);
        assert!(self.range.end <= rows.keys.len(), "rows up to {} of {}", self.range.end, rows.keys.len());
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
                    1 => dispatch(set, Attend::<K, V, 1> { rows: &rows, work: part }),
                    2 => dispatch(set, Attend::<K, V, 2> { rows: &rows, work: part }),
                    3 => dispatch(set, Attend::<K, V, 3> { rows: &rows, work: part }),
                    _ => dispatch(set, Attend::<K, V, MAX_GROUP> { rows: &rows, work: part }),
                }
                first += size;
            }
        }
    }
}

/// What is attended to, with whose rows.
struct Attend<'a, K, V, const GROUP: usize> {
    rows: &'a Pair<K, V>,
    work: Work<'a>,
}

impl<K: Keys, V: Values, const GROUP: usize> simd::Work for Attend<'_, K, V, GROUP> {
    type Output = ();

    const QUANTS: bool = K::QUANTS || V::QUANTS;

    #[inline(always)]
    fn run<L: Lanes>(self) {
        attend_body::<L, K, V, GROUP>(self.rows, self.work);
    }
}

/// One pass over the range, on top of what `max_and_sum` and `out` hold of the rows before it.
#[inline(always)]
fn attend_body<L: Lanes, K: Keys, V: Values, const GROUP: usize>(rows: &Pair<K, V>, work: Work<'_>) {
    let Work { head_dim, range, queries, out, max_and_sum } = work;
    let Pair { keys, values } = rows;
    let prepared = keys.prepare::<L>(queries, head_dim);
    let whole = keys.len() / LANES * LANES; // rows in whole tiles
    let mut scores = [[0.0; BLOCK_ROWS]; GROUP];
    for first in range.clone().step_by(BLOCK_ROWS) {
        let count = (range.end - first).min(BLOCK_ROWS);
        let chunks = count.div_ceil(LANES);
        let whole_chunks = chunks.min((whole - first.min(whole)) / LANES);
        let pairs = if 4 * GROUP <= L::ACCUMULATORS { whole_chunks / 2 } else { 0 };
        for chunk in 0..whole_chunks {
            values.fetch_ahead(first / LANES + chunk);
        }
        for pair in 0..pairs {
            keys.score_and_store::<L, GROUP, 2>(first, 2 * pair, queries, &prepared, &mut scores);
        }
        for chunk in 2 * pairs..whole_chunks {
            keys.score_and_store::<L, GROUP, 1>(first, chunk, queries, &prepared, &mut scores);
        }
        if whole_chunks < chunks {
            let mut key = [0.0; MAX_HEAD_DIM];
            let key = &mut key[..head_dim];
            for row in first + whole_chunks * LANES..range.end {
                keys.key(row, key);
                for (scores, query) in scores.iter_mut().zip(queries.chunks_exact(head_dim)) {
                    scores[row - first] = dot::<L>(query, key);
                }
            }
        }
        // A range may end within a tile.
        for scores in &mut scores {
            scores[count..chunks * LANES].fill(f32::NEG_INFINITY);
        }

        let factors = exponentials::<L, GROUP>(&mut scores, chunks, max_and_sum);
        values.add_values::<L, GROUP>(first, count, &scores, factors, out);
    }
}

/// Turns the scores of the first `chunks` chunks into softmax weights relative to the largest score so far, and returns what
/// sums over earlier rows are multiplied by.
///
/// The query rows take turns: each has chains of operations that wait for one another.
///
/// * `max_and_sum`: `[GROUP]`
#[inline(always)]
fn exponentials<L: Lanes, const GROUP: usize>(
    scores: &mut [[f32; BLOCK_ROWS]; GROUP],
    chunks: usize,
    max_and_sum: &mut [(f32, f32)],
) -> [f32; GROUP] {
    let mut largest = [L::splat(f32::NEG_INFINITY); GROUP];
    for chunk in 0..chunks {
        for (largest, scores) in largest.iter_mut().zip(&*scores) {
            // In this order NaN is no maximum, and turns up in the sum.
            *largest = L::load(&scores.as_chunks().0[chunk]).max(*largest);
        }
    }
    let mut factors = [1.0; GROUP];
    let mut bases = [L::splat(0.0); GROUP];
    for group in 0..GROUP {
        let largest = largest[group].largest();
        let max = &mut max_and_sum[group].0;
        if largest > *max {
            factors[group] = (*max - largest).exp();
            *max = largest;
        }
        // All scores are minus infinity or NaN: any finite number keeps their differences defined.
        bases[group] = L::splat(max.max(f32::MIN));
    }
    let mut sums = [L::splat(0.0); GROUP];
    for chunk in 0..chunks {
        for group in 0..GROUP {
            let scores = &mut scores[group].as_chunks_mut().0[chunk];
            let weights = L::load(scores).sub(bases[group]).exp_nonpositive();
            sums[group] = sums[group].add(weights);
            weights.store(scores);
        }
    }
    for group in 0..GROUP {
        let sum = &mut max_and_sum[group].1;
        *sum = *sum * factors[group] + sums[group].sum();
    }
    factors
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

/// Keys in a storage format: what the kernel needs of them.
trait Keys: Copy {
    /// Query rows as this format's products need them.
    type Prepared;

    /// See [`simd::Work::QUANTS`].
    const QUANTS: bool;

    fn len(&self) -> usize;
    /// Writes one key as f32.
    fn key(&self, row: usize, out: &mut [f32]);
    fn prepare<L: Lanes>(&self, queries: &[f32], head_dim: usize) -> Self::Prepared;
    /// Starts to fetch, while a tile is scored, what is in its place in the next block.
    fn fetch_ahead(&self, tile: usize);
    /// Writes the keys of a whole tile as f32, number by number.
    ///
    /// * `columns`: `[head_dim]`
    fn widen_tile<L: Lanes>(&self, tile: usize, columns: &mut [[f32; LANES]]);
    /// Scores of the rows of whole tiles, from tile `first` on, for each query row.
    fn score_tiles<L: Lanes, const GROUP: usize, const TILES: usize>(
        &self,
        first: usize,
        queries: &[f32],
        prepared: &Self::Prepared,
    ) -> [[L; GROUP]; TILES];

    /// [`score_tiles`](Self::score_tiles) of chunks of the block that starts at row `first`.
    #[inline(always)]
    fn score_and_store<L: Lanes, const GROUP: usize, const TILES: usize>(
        &self,
        first: usize,
        chunk: usize,
        queries: &[f32],
        prepared: &Self::Prepared,
        scores: &mut [[f32; BLOCK_ROWS]; GROUP],
    ) {
        let tile = first / LANES + chunk;
        for tile in tile..tile + TILES {
            self.fetch_ahead(tile);
        }
        let tiles: [[L; GROUP]; TILES] = self.score_tiles(tile, queries, prepared);
        for (chunk, tile) in (chunk..).zip(tiles) {
            for (scores, tile) in scores.iter_mut().zip(tile) {
                tile.store(&mut scores.as_chunks_mut().0[chunk]);
            }
        }
    }
}

/// Values in a storage format: what the kernel needs of them.
trait Values: Copy {
    /// See [`simd::Work::QUANTS`].
    const QUANTS: bool;

    /// Writes one value as f32.
    fn value(&self, row: usize, out: &mut [f32]);
    /// As [`value`](Self::value), within code for an instruction set.
    #[inline(always)]
    fn widen_row<L: Lanes>(&self, row: usize, out: &mut [f32]) {
        self.value(row, out);
    }
    /// Starts to fetch, before a block is scored, what goes with the same tile of the next block; not the numbers, for which
    /// [`add_values`](Self::add_values) does so.
    fn fetch_ahead(&self, tile: usize);

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
