//! Attention over prompts and over ragged caches, against slow obvious attention in f64.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // sizes of tests fit any float

use adaptive_kvcache::Error;
use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::decode::decode;
use adaptive_kvcache::attention::map::MapAccumulator;
use adaptive_kvcache::attention::prefill::{QueryBlock, largest_differences, prefill};
use adaptive_kvcache::attention::prompt_rows::{PromptKv, PromptRows};
use adaptive_kvcache::backend::HeadCache;
use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::compress::stats::MassRequest;
use adaptive_kvcache::compress::{LayerStats, StatsRequest};
use half::f16;
use rand::Rng;
use rayon::ThreadPoolBuilder;

use crate::numbers::{assert_close, column_sums, dot, largest_difference, seeded, softmax, uniform};

/// Scores reach about 10, where f32 holds 1e-6; a weight is then off by that share of itself.
const WEIGHT_TOLERANCE: f64 = 1e-5;

/// Sums of up to 1000 weights, relative to `1 + sum`: the weights' own errors, and rounding after each addition.
const SUM_TOLERANCE: f64 = 2e-5;

/// Queries and keys in `-QUERY_SCALE..QUERY_SCALE` make attention that is neither flat nor a single peak.
const QUERY_SCALE: f32 = 2.0;

/// Cells on a side of the maps: small, so that each cell is a maximum over many rows and blocks.
const MAP_SIDE: usize = 7;

fn layout(num_kv_heads: usize, group_size: usize, head_dim: usize) -> HeadLayout {
    HeadLayout { num_heads: num_kv_heads * group_size, num_kv_heads, head_dim }
}

/// A prompt's queries, keys and values, token after token.
struct Prompt {
    layout: HeadLayout,
    len: usize,
    /// `[len, num_heads, head_dim]`
    queries: Vec<f32>,
    /// `[len, num_kv_heads, head_dim]`
    keys: Vec<f32>,
    /// `[len, num_kv_heads, head_dim]`
    values: Vec<f32>,
}

/// What the library makes of a prompt.
/// With what a prompt's rows are multiplied.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Products {
    Exact,
    /// In 16 bits, where the processor is faster so.
    Rounded,
}

impl Products {
    /// By how much numbers may be off that exact products leave within `tolerance`.
    fn tolerance(self, tolerance: f64) -> f64 {
        match self {
            Self::Exact => tolerance,
            Self::Rounded => 100.0 * tolerance,
        }
    }
}

struct Results {
    out: Vec<f32>,
    stats: LayerStats,
    maps: MapAccumulator,
    keys: PromptRows,
}

impl Prompt {
    fn random(layout: HeadLayout, len: usize, seed: u64) -> Self {
        let mut rng = seeded(seed);
        Self {
            layout,
            len,
            queries: uniform(&mut rng, len * layout.query_width(), QUERY_SCALE),
            keys: uniform(&mut rng, len * layout.kv_width(), QUERY_SCALE),
            values: uniform(&mut rng, len * layout.kv_width(), 1.0),
        }
    }

    fn query(&self, token: usize, head: usize) -> &[f32] {
        &self.queries[token * self.layout.query_width() + head * self.layout.head_dim..][..self.layout.head_dim]
    }

    fn kv_start(&self, token: usize, head: usize) -> usize {
        token * self.layout.kv_width() + head / self.layout.group_size() * self.layout.head_dim
    }

    /// The causal attention map of a query head: rows of `i + 1` weights.
    fn map(&self, head: usize) -> Vec<Vec<f64>> {
        let key = |token| &self.keys[self.kv_start(token, head)..][..self.layout.head_dim];
        let scale = 1.0 / (self.layout.head_dim as f64).sqrt();
        let row = |i| softmax(&(0..=i).map(|j| dot(self.query(i, head), key(j)) * scale).collect::<Vec<_>>());
        (0..self.len).map(row).collect()
    }

    /// `[len, num_heads, head_dim]`
    fn naive_out(&self, maps: &[Vec<Vec<f64>>]) -> Vec<f64> {
        let mut out = Vec::new();
        for i in 0..self.len {
            for (head, map) in maps.iter().enumerate() {
                out.extend((0..self.layout.head_dim).map(|number| {
                    let value = |j| f64::from(self.values[self.kv_start(j, head) + number]);
                    map[i].iter().enumerate().map(|(j, weight)| weight * value(j)).sum::<f64>()
                }));
            }
        }
        out
    }

    /// Runs the prompt through `prefill` in blocks of `block_len` rows.
    fn run(&self, request: &StatsRequest, block_len: usize) -> Results {
        self.run_with(Products::Exact, request, block_len)
    }

    fn run_with(&self, products: Products, request: &StatsRequest, block_len: usize) -> Results {
        let (query_width, kv_width) = (self.layout.query_width(), self.layout.kv_width());
        let nothing = HeadCache::new(self.layout.head_dim, KvDtype::F32).unwrap();
        let past = vec![nothing.rows(); self.layout.num_kv_heads];
        let (keys, values) = PromptRows::after(self.layout, self.len, &past).unwrap();
        let mut kv = PromptKv { keys, values };
        let mut stats = LayerStats::new(request.clone(), vec![self.len; self.layout.num_heads]);
        let mut maps = MapAccumulator::new(self.layout.num_heads, self.len, MAP_SIDE);
        let mut out = Vec::new();
        for first in (0..self.len).step_by(block_len) {
            let end = (first + block_len).min(self.len);
            kv.keys.push(&self.keys[first * kv_width..end * kv_width]).unwrap();
            kv.values.push(&self.values[first * kv_width..end * kv_width]).unwrap();
            if products == Products::Rounded {
                kv.round();
            }
            let PromptKv { keys, values } = &kv;
            let block = QueryBlock { queries: &self.queries[first * query_width..end * query_width], first_row: first };
            let block_out =
                prefill(self.layout, block, keys, values, Some(&mut stats), Some(maps.heads_mut())).unwrap();
            out.extend(block_out);
        }
        Results { out, stats, maps, keys: kv.keys }
    }

    fn whole(&self) -> QueryBlock<'_> {
        QueryBlock { queries: &self.queries, first_row: 0 }
    }

    fn random_mask(&self, seed: u64, share: f64) -> Vec<bool> {
        let mut rng = seeded(seed);
        (0..self.len).map(|_| rng.random_bool(share)).collect()
    }

    /// Masks from sparse to dense, one that starts late (so that the first rows keep nothing), and the extremes.
    fn masks(&self) -> Vec<Vec<bool>> {
        let late = (0..self.len).map(|position| position > self.len / 2).collect();
        let mut masks = vec![vec![false; self.len], late, vec![true; self.len]];
        masks.extend([0.1, 0.5, 0.9].map(|share| self.random_mask(9, share)));
        masks
    }
}

fn as_numbers(mask: &[bool]) -> Vec<f32> {
    mask.iter().map(|&keep| if keep { 1.0 } else { 0.0 }).collect()
}

/// Checks everything that `prefill` gives for a prompt against its maps, whole and in blocks.
fn check_prompt(prompt: &Prompt, products: Products, block_lens: &[usize]) {
    let [weight_tolerance, sum_tolerance] = [WEIGHT_TOLERANCE, SUM_TOLERANCE].map(|most| products.tolerance(most));
    let (layout, len) = (prompt.layout, prompt.len);
    let maps: Vec<_> = (0..layout.num_heads).map(|head| prompt.map(head)).collect();
    let expected_out = prompt.naive_out(&maps);
    let masks = prompt.masks();
    let (first_row, window) = (len / 3, len.div_ceil(4));
    let request = StatsRequest {
        column_sums: true,
        mass: Some(MassRequest { first_row, window: Some(window) }),
        masks: masks.iter().map(|mask| as_numbers(mask)).collect(),
        recent: 0,
        log_sums: true,
    };
    let side = len.min(MAP_SIDE);
    for &block_len in block_lens {
        let case = |what: &str| format!("{what}, {layout:?}, {len} tokens in blocks of {block_len}, {products:?}");
        let results = prompt.run_with(products, &request, block_len);
        assert_close(&case("output"), &results.out, &expected_out, weight_tolerance);
        for (head, map) in maps.iter().enumerate() {
            let stats = &results.stats.heads[head];
            let case = |what: &str| case(&format!("{what} of head {head}"));
            let close = |what: &str, got: &[f32], expected: &[f64]| {
                assert_close(&case(what), got, expected, sum_tolerance);
            };
            close("column sums", &stats.column_sums, &column_sums(map, |_, _| true));
            let profiled = column_sums(map, |row, _| row >= first_row);
            // Where all rows are profiled the column sums are the same numbers, and are not held twice.
            close("profiled sums", stats.profiled(), &profiled);
            close("profiled sums", &stats.profiled_sums, if first_row > 0 { &profiled } else { &[] });
            close(
                "window sums",
                &stats.window_sums,
                &column_sums(map, |row, column| row >= first_row && row - column < window),
            );
            let differences: Vec<f64> = masks.iter().map(|mask| largest_difference(map, mask)).collect();
            assert_close(&case("differences"), &stats.differences, &differences, weight_tolerance);

            let mut cells = vec![0.0_f64; side * side];
            for (i, row) in map.iter().enumerate() {
                for (j, weight) in row.iter().enumerate() {
                    let cell = &mut cells[i * side / len * side + j * side / len];
                    *cell = cell.max(*weight);
                }
            }
            assert_close(&case("map"), results.maps.cells(head), &cells, weight_tolerance);
        }
    }

    // The second pass: other masks for each KV head, heads in any order and not all of them.
    let keys = prompt.run_with(products, &StatsRequest::default(), len).keys;
    let heads: Vec<usize> =
        (0..layout.num_kv_heads).rev().filter(|head| layout.num_kv_heads == 1 || *head != 1).collect();
    let wanted: Vec<(usize, Vec<Vec<bool>>)> = heads
        .into_iter()
        .map(|head| (head, (0..=head as u64).map(|seed| prompt.random_mask(head as u64 * 100 + seed, 0.6)).collect()))
        .collect();
    let pending: Vec<(usize, Vec<Vec<f32>>)> =
        wanted.iter().map(|(head, masks)| (*head, masks.iter().map(|mask| as_numbers(mask)).collect())).collect();
    let got = largest_differences(layout, prompt.whole(), &keys, &pending).unwrap();
    assert_eq!(got.len(), wanted.len());
    for (got, (kv_head, masks)) in got.iter().zip(&wanted) {
        let group = &maps[kv_head * layout.group_size()..(kv_head + 1) * layout.group_size()];
        let worst = |mask: &Vec<bool>| group.iter().map(|map| largest_difference(map, mask)).fold(0.0, f64::max);
        let expected: Vec<f64> = masks.iter().map(worst).collect();
        assert_close(&format!("second pass of KV head {kv_head}"), got, &expected, weight_tolerance);
    }
}

#[test]
fn prefill_equals_naive_attention_for_every_shape_and_block_size() {
    for (num_kv_heads, group_size) in [(3, 1), (2, 3), (1, 4)] {
        for head_dim in [8, 16, 64, 80] {
            for (len, block_lens) in
                [(1, &[1][..]), (2, &[2, 1]), (17, &[17, 1, 5]), (100, &[100, 33, 7]), (300, &[300, 101, 65])]
            {
                let prompt = Prompt::random(layout(num_kv_heads, group_size, head_dim), len, len as u64);
                check_prompt(&prompt, Products::Exact, block_lens);
            }
        }
    }
}

#[test]
fn rounded_prompts_attend_as_exact_ones() {
    for (num_kv_heads, group_size, head_dim) in [(2, 3, 64), (1, 4, 128), (3, 1, 80), (2, 1, 7)] {
        for (len, block_lens) in [(1, &[1][..]), (100, &[100, 33, 7]), (300, &[300, 101, 65])] {
            let prompt = Prompt::random(layout(num_kv_heads, group_size, head_dim), len, len as u64);
            check_prompt(&prompt, Products::Rounded, block_lens);
        }
    }
}

/// Keys and values come back as they were given, behind those of the past, in either order of memory.
#[test]
fn rows_of_a_prompt_are_where_they_were_put() {
    let layout = layout(2, 1, 3);
    let numbers = |len: usize, first: usize| -> Vec<f32> { (first..first + len).map(|n| n as f32).collect() };
    let past = [numbers(6, 1000), numbers(15, 2000)];
    let held = past.each_ref().map(|rows| cached(KvDtype::F32, 3, rows, rows));
    let held = held.each_ref().map(HeadCache::rows);
    let (keys, values) = PromptRows::after(layout, 17, &held).unwrap();
    for mut rows in [keys, values] {
        rows.push(&numbers(5 * 6, 0)).unwrap();
        rows.push(&numbers(6, 30)).unwrap();
        assert_eq!((rows.len(), rows.past_len(0), rows.past_len(1)), (6, 2, 5));
        for (kv_head, past) in past.iter().enumerate() {
            let prompt = (0..6).flat_map(|token| numbers(3, token * 6 + kv_head * 3));
            let expected: Vec<f32> = past.iter().copied().chain(prompt).collect();
            let mut got = vec![0.0; expected.len()];
            got.chunks_mut(3).enumerate().for_each(|(row, out)| rows.copy_row(kv_head, row, out));
            assert_eq!(got, expected);
        }
        assert!(rows.push(&numbers(12 * 6, 0)).is_err(), "room is for 17");
    }
}

/// Long enough that tiles have fewer rows than at most, and their last one still fewer.
#[test]
fn prefill_equals_naive_attention_when_tiles_are_short() {
    check_prompt(&Prompt::random(layout(1, 4, 8), 1000, 1), Products::Exact, &[1000, 777]);
}

#[test]
fn only_what_is_requested_is_collected() {
    let prompt = Prompt::random(layout(2, 2, 8), 20, 3);
    let stats = |request| prompt.run(&request, 20).stats.heads.remove(0);
    let nothing = stats(StatsRequest::default());
    assert!(nothing.column_sums.is_empty() && nothing.profiled_sums.is_empty());
    assert!(nothing.window_sums.is_empty() && nothing.differences.is_empty());
    // All rows are profiled: column sums serve for both.
    let all_rows = MassRequest { first_row: 0, window: None };
    let mass = stats(StatsRequest { mass: Some(all_rows), ..StatsRequest::default() });
    assert!(mass.profiled_sums.is_empty() && mass.window_sums.is_empty());
    assert_close("profiled", mass.profiled(), &column_sums(&prompt.map(0), |_, _| true), SUM_TOLERANCE);
    // The last rows are: without `frequency` nobody wants sums over the others.
    let last_rows = MassRequest { first_row: 15, window: Some(0) };
    let mass = stats(StatsRequest { mass: Some(last_rows), ..StatsRequest::default() });
    assert!(mass.column_sums.is_empty());
    assert_close("profiled", mass.profiled(), &column_sums(&prompt.map(0), |row, _| row >= 15), SUM_TOLERANCE);
    assert_eq!(mass.window_sums, [0.0; 20], "a window of width 0 holds nothing");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let prompt = Prompt::random(layout(2, 3, 64), 300, 5);
    let request = StatsRequest {
        column_sums: true,
        mass: Some(MassRequest { first_row: 100, window: Some(90) }),
        masks: prompt.masks().iter().map(|mask| as_numbers(mask)).collect(),
        recent: 0,
        log_sums: true,
    };
    let cache: Vec<HeadCache> = (0..2)
        .map(|head| {
            let rows = uniform(&mut seeded(head), (3000 + head as usize) * 64, 1.0);
            cached(KvDtype::F32, 64, &rows, &rows)
        })
        .collect();
    let run = |threads| {
        ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let results = prompt.run(&request, 128);
            let pending = [(1, request.masks.clone()), (0, request.masks.clone())];
            let second = largest_differences(prompt.layout, prompt.whole(), &results.keys, &pending).unwrap();
            let heads: Vec<_> = cache.iter().map(HeadCache::rows).collect();
            let decoded = decode(prompt.layout, &prompt.queries[..prompt.layout.query_width()], &heads).unwrap();
            let maps: Vec<f32> = (0..6).flat_map(|head| results.maps.cells(head).to_vec()).collect();
            (results.out, results.stats, maps, second, decoded)
        })
    };
    let one = run(1);
    for threads in [2, 3] {
        assert!(run(threads) == one, "{threads} threads differ from one");
    }
}

#[test]
fn prefill_refuses_what_does_not_fit() {
    let layout = layout(1, 2, 4);
    let mut keys = PromptRows::with_capacity(layout, 3);
    assert!(keys.is_empty());
    assert!(matches!(keys.push(&[0.0; 5]), Err(Error::Shape { .. })), "not a whole number of tokens");
    assert!(matches!(keys.push(&[0.0; 16]), Err(Error::Shape { .. })), "more than there is room for");
    keys.push(&[1.0; 8]).unwrap();
    assert_eq!(keys.len(), 2);
    assert!(matches!(keys.push(&[0.0; 8]), Err(Error::Shape { .. })), "more than there is room left for");

    let block = |queries, first_row| QueryBlock { queries, first_row };
    let attend = |block, values| prefill(layout, block, &keys, values, None, None);
    assert!(attend(block(&[0.0; 16], 0), &keys).is_ok());
    assert!(matches!(attend(block(&[0.0; 15], 0), &keys), Err(Error::Shape { .. })), "not a whole number of queries");
    assert!(matches!(attend(block(&[0.0; 16], 1), &keys), Err(Error::Shape { .. })), "a query without its key");
    let empty = PromptRows::with_capacity(layout, 3);
    assert!(matches!(attend(block(&[0.0; 16], 0), &empty), Err(Error::Shape { .. })), "fewer values than keys");
    assert!(attend(block(&[], 0), &keys).unwrap().is_empty());
}

#[test]
fn prefill_refuses_maps_and_statistics_of_another_number_of_heads() {
    let prompt = Prompt::random(layout(2, 1, 4), 3, 1);
    let results = prompt.run(&StatsRequest::default(), 3);
    let attend = |num_heads: usize| {
        let mut stats = LayerStats::new(StatsRequest::default(), vec![3; num_heads]);
        prefill(prompt.layout, prompt.whole(), &results.keys, &results.keys, Some(&mut stats), None).map(drop)
    };
    let draw = |num_heads: usize| {
        let mut maps = MapAccumulator::new(num_heads, 3, 8);
        prefill(prompt.layout, prompt.whole(), &results.keys, &results.keys, None, Some(maps.heads_mut())).map(drop)
    };
    assert!(attend(2).is_ok() && draw(2).is_ok());
    for num_heads in [0, 1] {
        assert!(matches!(attend(num_heads), Err(Error::Shape { .. })), "statistics of {num_heads} heads");
        assert!(matches!(draw(num_heads), Err(Error::Shape { .. })), "maps of {num_heads} heads");
    }
}

/// Keys and values of one head of a cache.
struct CachedHead {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Puts rows `[kept, head_dim]` into a cache.
fn cached(dtype: KvDtype, head_dim: usize, keys: &[f32], values: &[f32]) -> HeadCache {
    let mut head = HeadCache::new(head_dim, dtype).unwrap();
    for (key, value) in keys.chunks(head_dim).zip(values.chunks(head_dim)) {
        head.push(key, value).unwrap();
    }
    head
}

/// Dense attention in f64 from one token over every head's rows, `[num_heads, head_dim]`.
fn naive_decode(layout: HeadLayout, queries: &[f32], heads: &[CachedHead]) -> Vec<f64> {
    let scale = 1.0 / (layout.head_dim as f64).sqrt();
    let attend = |(index, query): (usize, &[f32])| {
        let CachedHead { keys, values } = &heads[index / layout.group_size()];
        let scores: Vec<f64> = keys.chunks(layout.head_dim).map(|key| dot(query, key) * scale).collect();
        let mut out = vec![0.0; layout.head_dim];
        for (weight, row) in softmax(&scores).iter().zip(values.chunks(layout.head_dim)) {
            out.iter_mut().zip(row).for_each(|(out, &value)| *out += weight * f64::from(value));
        }
        out
    };
    queries.chunks(layout.head_dim).enumerate().flat_map(attend).collect()
}

#[test]
fn decode_equals_dense_attention_over_ragged_heads() {
    for (lens, query_scale) in [
        (&[1, 3000, 2, 17][..], 2.0),
        (&[1024, 1025, 2049, 1][..], 2.0),
        (&[5, 1, 3][..], 2.0),     // too few rows for threads
        (&[2500, 2100][..], 30.0), // a single peak, in any of the ranges
    ] {
        for group_size in [1, 3, 4] {
            for head_dim in [8, 16, 64, 80] {
                let layout = layout(lens.len(), group_size, head_dim);
                let mut rng = seeded((lens[0] * head_dim + group_size) as u64);
                let queries = uniform(&mut rng, layout.query_width(), query_scale);
                // Numbers that f16 holds exactly: the same dense attention is right for both formats.
                let mut rows = |len: usize| -> Vec<f32> {
                    let rows = uniform(&mut rng, len * head_dim, QUERY_SCALE);
                    rows.into_iter().map(|number| f16::from_f32(number).to_f32()).collect()
                };
                let heads: Vec<_> = lens.iter().map(|&len| CachedHead { keys: rows(len), values: rows(len) }).collect();
                let expected = naive_decode(layout, &queries, &heads);
                let tolerance = WEIGHT_TOLERANCE * f64::from(query_scale / QUERY_SCALE); // scores grow as queries do
                for dtype in [KvDtype::F32, KvDtype::F16] {
                    let caches: Vec<_> =
                        heads.iter().map(|head| cached(dtype, head_dim, &head.keys, &head.values)).collect();
                    let rows: Vec<_> = caches.iter().map(HeadCache::rows).collect();
                    let case = format!("{dtype:?}, {lens:?} rows, {layout:?}");
                    assert_close(&case, &decode(layout, &queries, &rows).unwrap(), &expected, tolerance);
                }
            }
        }
    }
}

/// The last row of a prompt attends to all of it: prefill and decode are the same computation there.
#[test]
fn decode_over_everything_equals_the_last_row_of_prefill() {
    let prompt = Prompt::random(layout(2, 3, 16), 130, 8);
    let results = prompt.run(&StatsRequest::default(), 130);
    let head = |numbers: &[f32], head: usize| -> Vec<f32> {
        numbers.chunks(32).flat_map(|token| token[head * 16..(head + 1) * 16].to_vec()).collect()
    };
    let heads: Vec<_> = (0..2).map(|kv| (head(&prompt.keys, kv), head(&prompt.values, kv))).collect();
    for (kv, (keys, _)) in heads.iter().enumerate() {
        let mut row = [0.0; 16];
        for (index, key) in keys.chunks(16).enumerate() {
            results.keys.copy_row(kv, index, &mut row);
            assert_eq!(row, key);
        }
    }
    let caches: Vec<_> = heads.iter().map(|(keys, values)| cached(KvDtype::F32, 16, keys, values)).collect();
    let rows: Vec<_> = caches.iter().map(HeadCache::rows).collect();
    let width = prompt.layout.query_width();
    let decoded = decode(prompt.layout, &prompt.queries[129 * width..], &rows).unwrap();
    let last_row: Vec<f64> = results.out[129 * width..].iter().map(|&number| f64::from(number)).collect();
    assert_close("decode", &decoded, &last_row, WEIGHT_TOLERANCE);
}

#[test]
fn decode_refuses_what_does_not_fit() {
    let layout = layout(2, 1, 4);
    let head = |head_dim, numbers: &[f32]| cached(KvDtype::F32, head_dim, numbers, numbers);
    let (two, one, none, other) = (head(4, &[0.5; 8]), head(4, &[0.25; 4]), head(4, &[]), head(2, &[0.5; 8]));
    let good = two.rows();
    assert_eq!(decode(layout, &[1.0; 8], &[good, one.rows()]).unwrap(), [0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]);
    for (what, queries, heads) in [
        ("a head that keeps nothing", &[1.0; 8][..], &[good, none.rows()][..]),
        ("rows of another dimension", &[1.0; 8], &[good, other.rows()]),
        ("a head too few", &[1.0; 8], &[good]),
        ("a head too many", &[1.0; 8], &[good, good, good]),
        ("a query too few", &[1.0; 4], &[good, good]),
    ] {
        assert!(matches!(decode(layout, queries, heads), Err(Error::Shape { .. })), "{what}");
    }
    let wide = HeadLayout { num_heads: 1, num_kv_heads: 1, head_dim: 1024 };
    assert!(matches!(decode(wide, &[0.0; 1024], &[good]), Err(Error::Unsupported { .. })));
    assert!(matches!(HeadCache::new(1024, KvDtype::F32), Err(Error::Unsupported { .. })));
}
