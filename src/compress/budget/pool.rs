//! One budget for all layers, shared out while they are processed one after the other.
//!
//! What is not among the best positions of the layers so far is not among the best of all: so everything beyond the budget
//! can be evicted as the layers come, and the result is the same as if all had been there at once.
//!
//! Not for: scores (see [`super::select`]).

use super::allocation::by_score;
use super::candidates::{Candidates, Safe};
use crate::compress::segment::HeadChoice;

/// How far the positions that are held may exceed the budget before they are cut down to it, as a divisor: evicting a
/// little after every layer would move what is kept again and again.
const SLACK: usize = 4;

/// The best positions of the layers so far.
#[derive(Debug, Clone)]
pub struct Pool {
    room: usize,
    slack: usize,
    num_kv_heads: usize,
    safe: Safe,
    /// `[heads]` of all layers so far.
    heads: Vec<Candidates>,
}

impl Pool {
    /// A pool without layers.
    ///
    /// * `room`: how many positions all heads of all layers may hold together
    #[must_use]
    pub fn new(room: usize, num_kv_heads: usize) -> Self {
        Self { room, slack: room / SLACK, num_kv_heads, safe: Safe::default(), heads: Vec::new() }
    }

    /// A pool of layers that hold something before a prompt comes. It is overfull as soon as it holds more than there is room
    /// for.
    ///
    /// * `safe`: what goes last
    /// * `heads`: `[heads]` of all layers
    #[must_use]
    pub fn of(room: usize, num_kv_heads: usize, safe: Safe, heads: Vec<Candidates>) -> Self {
        Self { room, slack: 0, num_kv_heads, safe, heads }
    }

    /// Takes in the scores of the next layer.
    ///
    /// * `first_position`: of the segment
    /// * `scores`: `[num_kv_heads]` of `[segment_len]`
    pub fn add_layer(&mut self, first_position: u32, scores: Vec<Vec<f32>>) {
        self.push_layer(scores.into_iter().map(|scores| (first_position..).zip(scores).collect()).collect());
    }

    /// Takes in what the next layer may hold, `[num_kv_heads]`.
    pub fn push_layer(&mut self, heads: Vec<Candidates>) {
        self.heads.extend(heads);
    }

    /// Takes in what a layer may hold now, in the place of what it held.
    ///
    /// * `heads`: `[num_kv_heads]`
    pub fn set_layer(&mut self, layer: usize, heads: Vec<Candidates>) {
        for (held, head) in self.heads.iter_mut().skip(layer * self.num_kv_heads).zip(heads) {
            *held = head;
        }
    }

    fn held(&self) -> usize {
        self.heads.iter().map(Vec::len).sum()
    }

    /// Whether so much is held beyond the budget that [`trim`](Self::trim) is due before the last layer is there.
    #[must_use]
    pub fn is_overfull(&self) -> bool {
        self.held() > self.room + self.slack
    }

    /// Drops what is beyond the budget: the lowest scores, and of what is [safe](Safe) last; of equal ones the higher
    /// positions, and then those of later heads and layers.
    pub fn trim(&mut self) {
        let excess = self.held().saturating_sub(self.room);
        if excess == 0 {
            return;
        }
        let (heads, safe) = (self.heads.iter().enumerate(), self.safe);
        // With whether it goes before what is safe.
        let mut all: Vec<(bool, f32, u32, usize)> = heads
            .flat_map(|(head, held)| {
                held.iter().map(move |&(position, score)| (!safe.covers(position), score, position, head))
            })
            .collect();
        let order = |a: &(bool, f32, u32, usize), b: &(bool, f32, u32, usize)| {
            a.0.cmp(&b.0).then_with(|| by_score(b.1, a.1)).then(a.2.cmp(&b.2)).then(a.3.cmp(&b.3))
        };
        if self.room > 0 {
            all.select_nth_unstable_by(self.room - 1, order);
        }
        all.truncate(self.room);
        self.heads.iter_mut().for_each(Vec::clear);
        for (_, score, position, head) in all {
            self.heads[head].push((position, score));
        }
        for held in &mut self.heads {
            held.sort_unstable_by_key(|&(position, _)| position);
        }
    }

    /// What the heads of a layer hold, `[num_kv_heads]`.
    #[must_use]
    pub fn layer(&self, layer: usize) -> &[Candidates] {
        let first = layer * self.num_kv_heads;
        self.heads.get(first..first + self.num_kv_heads).unwrap_or_default()
    }

    /// The same as a choice.
    #[must_use]
    pub fn choices(&self, layer: usize) -> Vec<HeadChoice> {
        HeadChoice::of_candidates(self.layer(layer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(layer: usize, len: usize) -> Vec<Vec<f32>> {
        let score = |head: usize, i: usize| f32::from(u8::try_from((layer * 31 + head * 17 + i * 7) % 23).unwrap());
        (0..2).map(|head| (0..len).map(|i| score(head, i)).collect()).collect()
    }

    fn kept(pool: &Pool, layers: usize) -> Vec<Vec<u32>> {
        (0..layers).flat_map(|layer| pool.choices(layer)).map(|choice| choice.positions).collect()
    }

    #[test]
    fn trimming_along_the_way_changes_nothing() {
        for room in [0, 1, 7, 30, 119, 120, 200] {
            let (mut once, mut often) = (Pool::new(room, 2), Pool::new(room, 2));
            for layer in 0..6 {
                once.add_layer(5, scores(layer, 10));
                often.add_layer(5, scores(layer, 10));
                often.trim();
                assert!(!often.is_overfull());
            }
            once.trim();
            assert_eq!(kept(&once, 6), kept(&often, 6));
            assert_eq!(kept(&once, 6).iter().map(Vec::len).sum::<usize>(), room.min(120));
        }
    }

    #[test]
    fn what_is_safe_goes_last() {
        let heads =
            vec![vec![(0, 1.0), (3, 9.0), (7, 2.0)], vec![(0, 1.0), (5, 8.0)], vec![(4, 5.0), (8, 0.0)], vec![]];
        let safe = Safe { before: 1, from: 7 };
        let mut pool = Pool::of(5, 2, safe, heads.clone());
        assert!(pool.is_overfull());
        pool.trim();
        assert_eq!(kept(&pool, 2), [vec![0, 3, 7], vec![0], vec![8], vec![]]);
        assert_eq!(pool.layer(1), [vec![(8, 0.0)], vec![]]);
        pool.set_layer(1, vec![vec![(4, 5.0), (8, 0.0), (9, 0.5)], vec![(9, 0.1)]]);
        pool.trim();
        // Four of five are safe, and more than there is room for: those with the lowest scores go then.
        assert_eq!(kept(&pool, 2), [vec![0, 7], vec![0], vec![9], vec![9]]);
        let mut tiny = Pool::of(0, 2, safe, heads);
        tiny.trim();
        assert_eq!(kept(&tiny, 2), [[0; 0]; 4]);
    }

    #[test]
    fn the_best_are_kept_and_of_equals_the_first() {
        let mut pool = Pool::new(3, 2);
        pool.add_layer(5, vec![vec![1.0, 9.0], vec![2.0, 1.0]]);
        pool.add_layer(5, vec![vec![1.0, 1.0], vec![0.0, f32::INFINITY]]);
        assert!(pool.is_overfull());
        pool.trim();
        assert_eq!(kept(&pool, 2), [vec![6], vec![5], vec![], vec![6]]);
        let mut ties = Pool::new(5, 2);
        ties.add_layer(5, vec![vec![1.0; 2]; 2]);
        ties.add_layer(5, vec![vec![1.0; 2]; 2]);
        ties.trim();
        assert_eq!(kept(&ties, 2), [vec![5, 6], vec![5], vec![5], vec![5]]);
    }
}
