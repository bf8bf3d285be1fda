//! Positions of a layer's rows.
//!
//! Most tokens are kept by every head: what was appended last is one number for all of them. What forks of one saved text
//! have in common is there once.

use std::borrow::Cow;
use std::sync::Arc;

use super::HeadPlan;
use crate::cache::growth::grow;

/// For each KV head the positions of its rows, in their order: ascending, unless rows go one by one. The three parts follow
/// one another.
#[derive(Debug, Clone)]
pub(super) struct Positions {
    /// `[num_kv_heads]` those that were taken from a file, which clones share.
    shared: Arc<Vec<Vec<u32>>>,
    /// `[num_kv_heads]`
    own: Vec<Vec<u32>>,
    /// How many of the newest tokens all heads hold behind these.
    appended: usize,
}

impl Positions {
    pub fn new(num_kv_heads: usize) -> Self {
        Self { shared: Arc::new(Vec::new()), own: vec![Vec::new(); num_kv_heads], appended: 0 }
    }

    /// * `positions`: `[num_kv_heads]`, which clones are to share
    pub fn shared(positions: Vec<Vec<u32>>) -> Self {
        Self { own: vec![Vec::new(); positions.len()], shared: Arc::new(positions), appended: 0 }
    }

    /// * `positions`: `[num_kv_heads]`
    pub fn own(positions: Vec<Vec<u32>>) -> Self {
        Self { own: positions, ..Self::new(0) }
    }

    fn shared_of(&self, kv_head: usize) -> &[u32] {
        self.shared.get(kv_head).map(Vec::as_slice).unwrap_or_default()
    }

    /// Rows of a head.
    pub fn len(&self, kv_head: usize) -> usize {
        self.shared_of(kv_head).len() + self.own[kv_head].len() + self.appended
    }

    /// Positions of a head's rows.
    ///
    /// * `seen`: tokens so far
    pub fn of(&self, kv_head: usize, seen: usize) -> impl Iterator<Item = u32> {
        let before = self.shared_of(kv_head).iter().chain(&self.own[kv_head]).copied();
        before.chain(self.appended_from(seen))
    }

    #[expect(clippy::cast_possible_truncation, reason = "positions are below 2^32")]
    fn appended_from(&self, seen: usize) -> std::ops::Range<u32> {
        (seen - self.appended) as u32..seen as u32
    }

    /// Positions of all heads' rows.
    pub fn all(&self, seen: usize) -> Cow<'_, [Vec<u32>]> {
        if self.is_apart() {
            return Cow::Borrowed(&self.own);
        }
        (0..self.own.len()).map(|kv_head| self.of(kv_head, seen).collect()).collect()
    }

    /// Bytes that are allocated; what is shared with a clone is counted in both.
    pub fn allocated(&self) -> usize {
        self.shared.iter().chain(&self.own).map(|head| head.capacity() * size_of::<u32>()).sum()
    }

    /// Takes down a token that all heads hold.
    pub fn push(&mut self) {
        self.appended += 1;
    }

    fn is_apart(&self) -> bool {
        self.shared.is_empty() && self.appended == 0
    }

    /// Puts every head's positions into one piece.
    fn part(&mut self, seen: usize) {
        if !self.is_apart() {
            let all = self.all(seen).into_owned();
            *self = Self { own: all, ..Self::new(0) };
        }
    }

    /// Takes down a token that all heads hold, where each is to have its positions in one piece.
    ///
    /// * `seen`: tokens before it
    /// * `by_one`: see [`grow`]
    #[expect(clippy::cast_possible_truncation, reason = "positions are below 2^32")]
    pub fn push_apart(&mut self, seen: usize, by_one: bool) {
        self.part(seen);
        for head in &mut self.own {
            grow(head, by_one);
            head.push(seen as u32);
        }
    }

    /// `[num_kv_heads]` where all were [pushed so](Self::push_apart), or none since a prompt.
    ///
    /// # Panics
    /// If they are in several pieces.
    pub fn apart(&self) -> &[Vec<u32>] {
        assert!(self.is_apart(), "positions in one piece");
        &self.own
    }

    /// As [`apart`](Self::apart).
    pub fn apart_mut(&mut self) -> &mut [Vec<u32>] {
        assert!(self.is_apart(), "positions in one piece");
        &mut self.own
    }

    /// Forgets the newest tokens, which all heads hold.
    ///
    /// * `seen`: tokens before that
    pub fn take_back(&mut self, count: usize, seen: usize) {
        if self.appended < count {
            self.part(seen);
            self.own.iter_mut().for_each(|head| head.truncate(head.len() - count));
        } else {
            self.appended -= count;
        }
    }

    /// Takes down what stays, and behind it what is kept of a prompt.
    ///
    /// * `heads`: `[num_kv_heads]`
    /// * `seen`: tokens before the prompt
    #[expect(clippy::cast_possible_truncation, reason = "a plan's positions are below 2^32")]
    pub fn settle(&mut self, heads: &[HeadPlan], seen: usize) {
        let all_stay = heads.iter().enumerate().all(|(kv_head, head)| head.stay.len() == self.len(kv_head));
        let appended = self.appended_from(seen);
        let new = |head: &HeadPlan| -> Vec<u32> { head.prompt.iter().map(|&row| (seen + row) as u32).collect() };
        if all_stay {
            for (own, head) in self.own.iter_mut().zip(heads) {
                own.reserve_exact(appended.len() + head.prompt.len());
                own.extend(appended.clone());
                own.extend(new(head));
            }
            self.appended = 0;
            return;
        }
        let kept = |(kv_head, head): (usize, &HeadPlan)| -> Vec<u32> {
            let held: Vec<u32> = self.of(kv_head, seen).collect();
            let mut kept = Vec::with_capacity(head.stay.len() + head.prompt.len());
            kept.extend(head.stay.iter().map(|&row| held[row]));
            kept.extend(new(head));
            kept
        };
        let own = heads.iter().enumerate().map(kept).collect();
        *self = Self { own, ..Self::new(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same steps on lists.
    #[test]
    fn they_are_what_lists_would_hold() {
        let plan = |stay: &[usize], prompt: &[usize]| HeadPlan { stay: stay.to_vec(), prompt: prompt.to_vec() };
        let mut positions = Positions::shared(vec![vec![0, 2, 3], vec![1]]);
        let fork = positions.clone();
        let mut seen = 4;
        for _ in 0..2 {
            positions.push();
            seen += 1;
        }
        assert_eq!(*positions.all(seen), [vec![0, 2, 3, 4, 5], vec![1, 4, 5]]);
        assert_eq!((positions.len(0), positions.len(1)), (5, 3));
        positions.take_back(1, seen);
        seen -= 1;
        positions.settle(&[plan(&[0, 1, 2, 3], &[0, 2]), plan(&[0, 1], &[1])], seen);
        seen += 3;
        assert_eq!(*positions.all(seen), [vec![0, 2, 3, 4, 5, 7], vec![1, 4, 6]]);
        assert!(Arc::ptr_eq(&positions.shared, &fork.shared));
        positions.push();
        seen += 1;
        positions.settle(&[plan(&[1, 6], &[]), plan(&[0, 3], &[0])], seen);
        seen += 1;
        assert_eq!(*positions.all(seen), [vec![2, 8], vec![1, 8, 9]]);
        positions.push_apart(seen, true);
        assert_eq!(*positions.apart(), [vec![2, 8, 10], vec![1, 8, 9, 10]]);
        positions.push();
        positions.take_back(2, seen + 2);
        assert_eq!(*positions.all(seen), [vec![2, 8], vec![1, 8, 9]]);
        assert_eq!(*fork.all(4), [vec![0, 2, 3], vec![1]]);
    }
}
