//! `rkv`: what the newest tokens look at, and nothing twice (`R-KV`, Cai et al., arXiv 2505.24133).

use serde::{Deserialize, Serialize};

use super::{ALWAYS, EvictRows, Method, MethodFacts, Needs, StepAttention, StepFacts};
use crate::compress::values;
use crate::kernels::gemm::{Matrix, MatrixMut};
use crate::kernels::vector::{self, instruction_set};

/// Keys whose cosine is larger are alike.
const ALIKE: f32 = 0.5;

/// Rows of the keys' cosines that exist at a time.
const BLOCK_ROWS: usize = 64;

/// Keeps the last `observation_window` positions, and of those before them the ones with the most of `importance` times
/// their importance less (1 - `importance`) times their redundancy.
///
/// Importance is the attention of the last rows, of each the largest score in the group of query heads, the mean over the
/// rows, and the largest of `pool_kernel` neighbours. Redundancy is the mean cosine with the other keys, those left out for
/// which it is the last of their like; both add up to 1 over all positions.
///
/// Made for long answers: with `"decode": "evict"`, rows go back to the budget whenever there are `evict_every` more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rkv {
    /// How many of the last rows are observed, and kept, at least 1; default 8.
    #[serde(deserialize_with = "values::positive")]
    pub observation_window: usize,
    /// Over how many neighbours the largest importance is taken, odd; default 7.
    #[serde(deserialize_with = "values::odd")]
    pub pool_kernel: usize,
    /// The share of importance in a score, in 0..=1; default 0.1.
    #[serde(deserialize_with = "values::ratio")]
    pub importance: f64,
    /// After how many generated tokens rows go, at least 1; default 128.
    #[serde(deserialize_with = "values::positive")]
    pub evict_every: usize,
}

impl Rkv {
    /// As its authors run it.
    pub const DEFAULT: Self = Self { observation_window: 8, pool_kernel: 7, importance: 0.1, evict_every: 128 };

    /// Scores of rows in the order of their positions, `[n]`.
    ///
    /// * `keys`: `[n, head_dim]`
    /// * `queries`: `[tokens]` of `[group_size, head_dim]`, of the last tokens
    /// * `num_recent`: how many of the last rows are kept in any case
    /// * `budget`: how many rows stay
    fn judge(self, keys: Keys<'_>, queries: &[Vec<f32>], num_recent: usize, budget: usize) -> Vec<f32> {
        let len = keys.len();
        let importance = pooled(&keys.importance(queries, len - num_recent), self.pool_kernel);
        #[expect(clippy::cast_possible_truncation)] // a share
        let share = self.importance as f32;
        let score = |(importance, redundancy): (&f32, f32)| share * importance - (1.0 - share) * redundancy;
        let mut scores: Vec<f32> = importance.iter().zip(keys.redundancy()).map(score).collect();
        // What of the last rows the budget has no room for is worth nothing.
        scores.resize(len - budget.min(num_recent), f32::NEG_INFINITY);
        scores.resize(len, ALWAYS);
        scores
    }
}

impl Default for Rkv {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Method for Rkv {
    fn name(&self) -> &'static str {
        "rkv"
    }

    fn summary(&self) -> &'static str {
        "what the last rows attend to, less what other keys are like; made for \"decode\": \"evict\""
    }

    fn needs(&self) -> Needs {
        Needs { keys_and_values: true, last_queries: self.observation_window, ..Needs::default() }
    }

    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        let keys = Keys { numbers: facts.keys, head_dim: facts.head_dim };
        self.judge(keys, facts.last_queries, self.observation_window.min(facts.len), facts.budget)
    }

    fn eviction(&self) -> Option<&dyn EvictRows> {
        Some(self)
    }
}

impl EvictRows for Rkv {
    fn attention(&self) -> StepAttention {
        StepAttention::Queries(self.observation_window)
    }

    fn every(&self) -> usize {
        self.evict_every
    }

    fn scores(&self, facts: &StepFacts<'_>) -> Vec<f32> {
        let len = facts.positions.len();
        let mut order: Vec<usize> = (0..len).collect();
        order.sort_unstable_by_key(|&row| facts.positions[row]);
        let head_dim = facts.keys.len() / len.max(1);
        let numbers: Vec<f32> =
            order.iter().flat_map(|&row| &facts.keys[row * head_dim..(row + 1) * head_dim]).copied().collect();
        let first_recent = facts.seen.saturating_sub(self.observation_window);
        let num_recent = order.iter().rev().take_while(|&&row| facts.positions[row] as usize >= first_recent).count();
        let judged = self.judge(Keys { numbers: &numbers, head_dim }, facts.queries, num_recent, facts.budget);
        let mut scores = vec![0.0; len];
        for (row, score) in order.into_iter().zip(judged) {
            scores[row] = score;
        }
        scores
    }
}

/// Keys in the order of their positions, `[n, head_dim]`.
#[derive(Clone, Copy)]
struct Keys<'a> {
    numbers: &'a [f32],
    head_dim: usize,
}

impl Keys<'_> {
    fn len(self) -> usize {
        self.numbers.len() / self.head_dim.max(1)
    }

    /// The attention that some tokens pay to the first keys, `[count]`, the mean over the tokens; of a token's query heads
    /// the largest score counts.
    fn importance(self, queries: &[Vec<f32>], count: usize) -> Vec<f32> {
        let (set, mut sums, mut own) = (instruction_set(), vec![0.0; count], vec![0.0; count]);
        if count == 0 {
            return sums;
        }
        for token in queries {
            for (score, key) in own.iter_mut().zip(self.numbers.chunks_exact(self.head_dim)) {
                let products = token.chunks_exact(self.head_dim).map(|query| vector::dot(set, query, key));
                *score = products.fold(f32::NEG_INFINITY, f32::max);
            }
            let max = vector::max(set, &own);
            let sum = vector::exp_minus_max(set, &mut own, max) * as_number(queries.len());
            sums.iter_mut().zip(&own).for_each(|(total, weight)| *total += weight / sum);
        }
        sums
    }

    /// How much of what each key says others say, too: shares, `[n]`.
    fn redundancy(self) -> Vec<f32> {
        let (set, len, head_dim) = (instruction_set(), self.len(), self.head_dim);
        let unit = |key: &[f32]| {
            let scale = 1.0 / (vector::dot(set, key, key).sqrt() + 1e-8);
            key.iter().map(|number| number * scale).collect::<Vec<f32>>()
        };
        let units: Vec<f32> = self.numbers.chunks_exact(head_dim.max(1)).flat_map(unit).collect();
        let (mut sums, mut cosines) = (vec![0.0; len], Vec::new());
        for first in (0..len).step_by(BLOCK_ROWS) {
            let rows = BLOCK_ROWS.min(len - first);
            cosines.resize(rows * len, 0.0);
            MatrixMut::new(&mut cosines, rows, len, len).set_product(
                Matrix::new(&units[first * head_dim..], rows, head_dim, head_dim),
                Matrix::new(&units, len, head_dim, head_dim).transposed(),
                1.0,
            );
            for (index, row) in cosines.chunks_exact_mut(len).enumerate() {
                row[first + index] = 0.0; // a key is not its own like
                if let Some(last) = row.iter().rposition(|&cosine| cosine > ALIKE) {
                    row[last] = 0.0;
                }
                vector::add_assign(set, &mut sums, row);
            }
        }
        for sum in &mut sums {
            *sum /= as_number(len);
        }
        vector::softmax(set, &mut sums);
        sums
    }
}

/// The largest of each number's neighbours.
fn pooled(numbers: &[f32], kernel: usize) -> Vec<f32> {
    let half = kernel / 2;
    let around = |index: usize| &numbers[index.saturating_sub(half)..numbers.len().min(index + half + 1)];
    (0..numbers.len()).map(|index| around(index).iter().copied().fold(0.0, f32::max)).collect()
}

#[expect(clippy::cast_precision_loss)] // counts of tokens
fn as_number(count: usize) -> f32 {
    count as f32
}

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, kept};
    use super::*;

    const SMALL: Rkv = Rkv { observation_window: 2, pool_kernel: 1, importance: 0.5, evict_every: 3 };

    /// Of three keys that are alike the last is kept; of two that are unlike all others, both.
    #[test]
    fn of_keys_that_are_alike_the_last_is_kept() {
        let keys = [
            [1.0, 0.0, 0.0, 0.0],
            [1.0, 0.0, 0.0, 0.1],
            [0.0, 1.0, 0.0, 0.0],
            [1.0, 0.0, 0.0, 0.05],
            [0.0, 0.0, 1.0, 0.0],
            [0.0, 0.0, 0.0, -1.0],
            [0.0, 0.0, -1.0, 0.0],
        ];
        let queries = [vec![0.0; 4]];
        let facts = MethodFacts { keys: keys.as_flattened(), last_queries: &queries, head_dim: 4, ..facts(7, 5) };
        assert_eq!(kept(&SMALL, &facts), [2, 3, 4, 5, 6]);
        // What is asked for stays, where importance counts.
        let queries = [vec![40.0, 0.0, 0.0, 0.0], vec![0.0, 0.0, 40.0, 0.0]];
        let facts = MethodFacts { last_queries: &queries, budget: 3, ..facts };
        assert_eq!(kept(&Rkv { importance: 1.0, ..SMALL }, &facts), [4, 5, 6]);
        assert_eq!(kept(&SMALL, &MethodFacts { budget: 1, ..facts }), [6]);
    }

    #[test]
    fn rows_in_any_order_are_judged_as_in_order() {
        let keys = [0.5, 1.0, 0.25, -1.0, 1.0, 0.5, 0.125, 0.75, -0.5, 0.5];
        let positions = [3, 4, 9, 10, 11];
        let queries = [vec![1.0, 0.5, -0.25, 2.0], vec![0.0, 1.0, 1.0, 0.0]];
        let facts =
            |positions, keys| StepFacts { positions, seen: 12, budget: 3, attention: &[], keys, queries: &queries };
        let settings = Rkv { pool_kernel: 3, ..SMALL };
        let in_order = EvictRows::scores(&settings, &facts(&positions, &keys));
        assert_eq!(in_order[3..], [ALWAYS; 2]);
        let order = [4, 0, 3, 1, 2];
        let moved_keys: Vec<f32> = order.iter().flat_map(|&row| keys[row * 2..row * 2 + 2].to_vec()).collect();
        let scores = EvictRows::scores(&settings, &facts(&order.map(|row| positions[row]), &moved_keys));
        assert_eq!(scores, order.map(|row| in_order[row]));
    }
}
