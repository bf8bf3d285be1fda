//! Replayed queries against slow obvious attention in f64.

use std::ops::Range;

use adaptive_kvcache::attention::HeadLayout;
use adaptive_kvcache::attention::prefill::{QueryBlock, prefill};
use adaptive_kvcache::attention::prompt_rows::PromptRows;
use adaptive_kvcache::attention::replay::{Replay, squared_attention, squared_outputs, stride};
use adaptive_kvcache::backend::HeadCache;
use adaptive_kvcache::cache::KvDtype;
use adaptive_kvcache::compress::{LayerStats, StatsRequest};

use crate::numbers::{dot, seeded, softmax, uniform};

/// Squares of weights of f32, summed up over up to 1000 rows, relative to `1e-3 + sum`.
const TOLERANCE: f64 = 1e-4;

/// Query rows that are turned together, and the near keys of a row, as the method defines them.
const CHUNK: usize = 256;
const NEAR: Range<isize> = -2..8;

/// Turns pairs of numbers by an angle that grows with the positions.
fn turn(positions: usize, rows: &mut [f32], head_dim: usize) {
    for row in rows.chunks_exact_mut(head_dim) {
        for (index, pair) in row.chunks_exact_mut(2).enumerate() {
            let (sin, cos) = (positions as f32 * 0.3 / (1 + index) as f32).sin_cos();
            (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
        }
    }
}

struct Prompt {
    layout: HeadLayout,
    len: usize,
    /// Rows that the KV heads hold before the prompt.
    past: Vec<Vec<f32>>,
    queries: Vec<f32>,
    keys: Vec<f32>,
}

impl Prompt {
    fn random(layout: HeadLayout, len: usize, past: &[usize], seed: u64) -> Self {
        let mut rng = seeded(seed);
        let head_dim = layout.head_dim;
        Self {
            layout,
            len,
            past: past.iter().map(|&rows| uniform(&mut rng, rows * head_dim, 2.0)).collect(),
            queries: uniform(&mut rng, len * layout.query_width(), 2.0),
            keys: uniform(&mut rng, len * layout.kv_width(), 2.0),
        }
    }

    /// A head's keys, those before the prompt first.
    fn head_keys(&self, kv_head: usize) -> Vec<&[f32]> {
        let head_dim = self.layout.head_dim;
        let own = self.keys.chunks_exact(self.layout.kv_width());
        let own = own.map(|token| &token[kv_head * head_dim..(kv_head + 1) * head_dim]);
        self.past[kv_head].chunks_exact(head_dim).chain(own).collect()
    }

    fn scores(&self, query: &[f32], keys: &[&[f32]]) -> Vec<f64> {
        keys.iter().map(|key| dot(query, key) * f64::from(self.layout.scale())).collect()
    }

    /// The definition, row by row.
    fn naive(&self, head: usize) -> Vec<f64> {
        let (head_dim, kv_head) = (self.layout.head_dim, head / self.layout.group_size());
        let keys = self.head_keys(kv_head);
        let past = keys.len() - self.len;
        let mut sums = vec![0.0; keys.len()];
        for row in 0..self.len {
            let start = row * self.layout.query_width() + head * head_dim;
            let query = &self.queries[start..start + head_dim];
            let chunk = row / CHUNK * CHUNK;
            let mut turned = query.to_vec();
            turn(self.len - chunk, &mut turned, head_dim);
            let is_near = |key: usize| NEAR.contains(&(key.cast_signed() - (past + row).cast_signed())) && key >= past;

            let step = stride(self.len);
            if (row - chunk).is_multiple_of(step) {
                let mut all = self.scores(&turned, &keys);
                all.extend(self.scores(query, &keys[past + chunk..=past + row]));
                let stands_for = step.min(self.len.min(chunk + CHUNK) - row) as f64;
                for (key, weight) in softmax(&all).into_iter().enumerate().take(keys.len()) {
                    sums[key] += if is_near(key) { 0.0 } else { stands_for * weight * weight };
                }
            }
            let original = self.scores(query, &keys[..=past + row]);
            let rest = original.iter().map(|score| score.exp()).sum::<f64>();
            let near: Vec<usize> = (past..keys.len()).filter(|&key| is_near(key)).collect();
            let exps: Vec<f64> = near.iter().map(|&key| self.scores(&turned, &keys[key..=key])[0].exp()).collect();
            let total = rest + exps.iter().sum::<f64>();
            for (&key, exp) in near.iter().zip(exps) {
                sums[key] += (exp / total) * (exp / total);
            }
        }
        sums
    }

    fn check(&self) {
        let layout = self.layout;
        let caches: Vec<HeadCache> = self
            .past
            .iter()
            .map(|rows| {
                let mut cache = HeadCache::new(layout.head_dim, KvDtype::F32).unwrap();
                for row in rows.chunks_exact(layout.head_dim) {
                    cache.push(row, row).unwrap();
                }
                cache
            })
            .collect();
        let past: Vec<_> = caches.iter().map(HeadCache::rows).collect();
        let (mut keys, mut values) = PromptRows::after(layout, self.len, &past).unwrap();
        keys.push(&self.keys).unwrap();
        values.push(&self.keys).unwrap();
        let request = StatsRequest { log_sums: true, ..StatsRequest::default() };
        let num_keys =
            (0..layout.num_heads).map(|head| self.past[head / layout.group_size()].len() / layout.head_dim + self.len);
        let mut stats = LayerStats::new(request, num_keys);
        // In two blocks: the sums of a row are in one of them.
        let cut = self.len / 3;
        for (first_row, rows) in [(0, 0..cut), (cut, cut..self.len)] {
            let width = layout.query_width();
            let queries = &self.queries[rows.start * width..rows.end * width];
            if !queries.is_empty() {
                prefill(layout, QueryBlock { queries, first_row }, &keys, &values, Some(&mut stats), None).unwrap();
            }
        }
        let log_sums: Vec<&[f32]> = stats.heads.iter().map(|head| &head.log_sums[..]).collect();
        let turn = |positions: usize, rows: &mut [f32]| turn(positions, rows, layout.head_dim);
        let replay = Replay { layout, queries: &self.queries, keys: &keys, log_sums: &log_sums, turn: &turn };
        let sums = squared_attention(replay).unwrap();
        assert_eq!(sums.len(), layout.num_heads);
        for (head, sums) in sums.iter().enumerate() {
            let expected = self.naive(head);
            assert_eq!(sums.len(), expected.len());
            for (key, (&sum, &expected)) in sums.iter().zip(&expected).enumerate() {
                let difference = (f64::from(sum) - expected).abs();
                assert!(
                    difference <= TOLERANCE * (1e-3 + expected),
                    "{layout:?}, {} tokens, head {head}, key {key}: {sum} for {expected}",
                    self.len
                );
            }
        }
        // What does not fit is refused.
        assert!(squared_attention(Replay { log_sums: &log_sums[1..], ..replay }).is_err());
        assert!(squared_attention(Replay { queries: &self.queries[1..], ..replay }).is_err());
    }
}

#[test]
fn replayed_queries_see_what_the_definition_says() {
    for (num_kv_heads, group_size, head_dim) in [(1, 1, 4), (2, 3, 8)] {
        let layout = HeadLayout { num_heads: num_kv_heads * group_size, num_kv_heads, head_dim };
        for (seed, len) in [1, 2, 7, 9, 60, 255, 256, 257, 530].into_iter().enumerate() {
            Prompt::random(layout, len, &vec![0; num_kv_heads], seed as u64).check();
        }
    }
}

#[test]
fn keys_of_earlier_prompts_are_asked_as_well() {
    let layout = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 8 };
    for len in [3, 300] {
        Prompt::random(layout, len, &[5, 21], 1).check();
    }
}

#[test]
fn the_work_is_bounded_for_long_prompts() {
    assert_eq!([1, 2048, 2049, 8192, 65_536, 1_000_000].map(stride), [8, 8, 9, 32, 256, 256]);
}

/// Few values are multiplied with the weights, many with a small matrix in between: both are the squared lengths of what
/// the output projection makes of them.
#[test]
fn squared_outputs_are_those_of_the_projection() {
    let layout = HeadLayout { num_heads: 4, num_kv_heads: 2, head_dim: 8 };
    let mut rng = seeded(3);
    // The second is more than is widened at a time, and no multiple of it.
    for (hidden_size, len) in [(24, 0), (24, 1), (24, 7), (24, 8), (24, 9), (24, 40), (20_000, 0), (20_000, 3)] {
        let weights = uniform(&mut rng, hidden_size * layout.query_width(), 1.0);
        let values: Vec<Vec<f32>> = (0..2).map(|_| uniform(&mut rng, len * 8, 1.0)).collect();
        let widened = |rows: Range<usize>, out: &mut Vec<f32>| {
            weights[rows.start * layout.query_width()..rows.end * layout.query_width()].clone_into(out);
        };
        let outputs = squared_outputs(layout, hidden_size, &widened, &values).unwrap();
        assert_eq!(outputs.len(), 4);
        for (head, outputs) in outputs.iter().enumerate() {
            assert_eq!(outputs.len(), len);
            for (row, &output) in outputs.iter().enumerate() {
                let value = &values[head / 2][row * 8..(row + 1) * 8];
                let number = |weights: &[f32]| dot(&weights[head * 8..(head + 1) * 8], value).powi(2);
                let expected: f64 = weights.chunks_exact(layout.query_width()).map(number).sum();
                assert!((f64::from(output) - expected).abs() < 1e-4 * (1.0 + expected), "{output} for {expected}");
            }
        }
        let short = |_: Range<usize>, out: &mut Vec<f32>| weights[1..].clone_into(out);
        assert!(squared_outputs(layout, hidden_size, &short, &values).is_err());
        assert!(squared_outputs(layout, hidden_size, &widened, &values[1..]).is_err());
    }
}
