//! One budget for all layers, shared out while they are processed one after the other.
//!
//! What is not among the best positions of the layers so far is not among the best of all: so everything beyond the budget
//! can be evicted as the layers come, and the result is the same as if all had been there at once.
//!
//! Not for: scores (see [`super::select`]).

use super::allocation::by_score;
use crate::compress::segment::HeadChoice;

/// How far the positions that are held may exceed the budget before they are cut down to it, as a divisor: evicting a
/// little after every layer would move what is kept again and again.
const SLACK: usize = 4;

/// The best positions of the layers so far.
#[derive(Debug, Clone)]
pub struct Pool {
    room: usize,
    num_kv_heads: usize,
    /// `[heads]` of all layers so far: held positions of the segment, ascending by index, and their scores.
    heads: Vec<Vec<(u32, f32)>>,
}

impl Pool {
    /// A pool without layers.
    ///
    /// * `room`: how many positions all heads of all layers may hold together
    #[must_use]
    pub fn new(room: usize, num_kv_heads: usize) -> Self {
        Self { room, num_kv_heads, heads: Vec::new() }
    }

    /// Takes in the scores of the next layer, `[num_kv_heads]` of `[segment_len]`.
    pub fn add_layer(&mut self, scores: Vec<Vec<f32>>) {
        self.heads.extend(scores.into_iter().map(|scores| (0..).zip(scores).collect::<Vec<_>>()));
    }

    fn held(&self) -> usize {
        self.heads.iter().map(Vec::len).sum()
    }

    /// Whether so much is held beyond the budget that [`trim`](Self::trim) is due before the last layer is there.
    #[must_use]
    pub fn is_overfull(&self) -> bool {
        self.held() > self.room + self.room / SLACK
    }

    /// Drops what is beyond the budget: the lowest scores; of equal ones the higher positions, and then those of later
    /// heads and layers.
    pub fn trim(&mut self) {
        let excess = self.held().saturating_sub(self.room);
        if excess == 0 {
            return;
        }
        let heads = self.heads.iter().enumerate();
        let mut all: Vec<(f32, u32, usize)> =
            heads.flat_map(|(head, held)| held.iter().map(move |&(index, score)| (score, index, head))).collect();
        let order =
            |a: &(f32, u32, usize), b: &(f32, u32, usize)| by_score(b.0, a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2));
        if self.room > 0 {
            all.select_nth_unstable_by(self.room - 1, order);
        }
        all.truncate(self.room);
        self.heads.iter_mut().for_each(Vec::clear);
        for (score, index, head) in all {
            self.heads[head].push((index, score));
        }
        for held in &mut self.heads {
            held.sort_unstable_by_key(|&(index, _)| index);
        }
    }

    /// What each head of a layer holds.
    ///
    /// * `first_position`: of the segment
    #[must_use]
    pub fn choices(&self, layer: usize, first_position: usize) -> Vec<HeadChoice> {
        let first = u32::try_from(first_position).unwrap_or(u32::MAX);
        let heads = self.heads.iter().skip(layer * self.num_kv_heads).take(self.num_kv_heads).enumerate();
        heads
            .map(|(kv_head, held)| HeadChoice {
                kv_head,
                level: 0,
                recovered: Vec::new(),
                // Positions fit 32 bits, which the cache checks.
                positions: held.iter().map(|&(index, _)| first.saturating_add(index)).collect(),
            })
            .collect()
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
        (0..layers).flat_map(|layer| pool.choices(layer, 5)).map(|choice| choice.positions).collect()
    }

    #[test]
    fn trimming_along_the_way_changes_nothing() {
        for room in [0, 1, 7, 30, 119, 120, 200] {
            let (mut once, mut often) = (Pool::new(room, 2), Pool::new(room, 2));
            for layer in 0..6 {
                once.add_layer(scores(layer, 10));
                often.add_layer(scores(layer, 10));
                often.trim();
                assert!(!often.is_overfull());
            }
            once.trim();
            assert_eq!(kept(&once, 6), kept(&often, 6));
            assert_eq!(kept(&once, 6).iter().map(Vec::len).sum::<usize>(), room.min(120));
        }
    }

    #[test]
    fn the_best_are_kept_and_of_equals_the_first() {
        let mut pool = Pool::new(3, 2);
        pool.add_layer(vec![vec![1.0, 9.0], vec![2.0, 1.0]]);
        pool.add_layer(vec![vec![1.0, 1.0], vec![0.0, f32::INFINITY]]);
        assert!(pool.is_overfull());
        pool.trim();
        assert_eq!(kept(&pool, 2), [vec![6], vec![5], vec![], vec![6]]);
        let mut ties = Pool::new(5, 2);
        ties.add_layer(vec![vec![1.0; 2]; 2]);
        ties.add_layer(vec![vec![1.0; 2]; 2]);
        ties.trim();
        assert_eq!(kept(&ties, 2), [vec![5, 6], vec![5], vec![5], vec![5]]);
    }
}
