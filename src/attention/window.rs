//! A prompt in a layer with a sliding window: which keys each of its rows sees.
//!
//! A token at position `p` sees those from `p - size + 1` on (Jiang et al., Mistral 7B, arXiv 2310.06825, section 2). In the
//! order of positions these are the last keys up to its own; so what a head holds of earlier tokens is put in that order
//! when a prompt begins, wherever rows have gone from between the others.
//!
//! Not for: letting rows go that no later token sees (see [`crate::cache::Ledger`]).

use std::ops::Range;

/// A prompt's window, and what the heads hold before the prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptWindow {
    size: usize,
    /// Position of the prompt's first token.
    first_position: usize,
    /// `[num_kv_heads]`
    past: Vec<PastRows>,
}

/// What one head holds before a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PastRows {
    /// Its rows in the order of their positions.
    order: Vec<usize>,
    /// Their positions, ascending.
    positions: Vec<u32>,
}

impl PromptWindow {
    /// * `size`: tokens that a token sees, itself included; at least 1
    /// * `first_position`: of the prompt
    /// * `positions`: `[num_kv_heads]` of the rows that each head holds
    #[must_use]
    pub fn new(size: usize, first_position: usize, positions: &[Vec<u32>]) -> Self {
        let of_head = |held: &Vec<u32>| {
            let mut order: Vec<usize> = (0..held.len()).collect();
            order.sort_unstable_by_key(|&row| held[row]);
            PastRows { positions: order.iter().map(|&row| held[row]).collect(), order }
        };
        Self { size, first_position, past: positions.iter().map(of_head).collect() }
    }

    /// Tokens that a token sees, itself included.
    #[must_use]
    pub fn size(&self) -> usize {
        self.size
    }

    /// Position of the prompt's first token.
    #[must_use]
    pub fn first_position(&self) -> usize {
        self.first_position
    }

    /// The rows that a head holds before the prompt, in the order of their positions.
    #[must_use]
    pub fn order(&self, kv_head: usize) -> &[usize] {
        &self.past[kv_head].order
    }

    /// Positions of the rows that a head holds before the prompt, ascending.
    #[must_use]
    pub fn positions(&self, kv_head: usize) -> &[u32] {
        &self.past[kv_head].positions
    }

    /// The keys that a row of the prompt sees, its own the last; those before the prompt, in the order of their positions,
    /// count first.
    #[must_use]
    pub fn seen(&self, kv_head: usize, row: usize) -> Range<usize> {
        let past = &self.past[kv_head].positions;
        let end = past.len() + row + 1;
        if row + 1 >= self.size {
            return end - self.size..end;
        }
        let position = self.first_position + row;
        past.partition_point(|&held| held as usize + self.size <= position)..end
    }

    /// The first row of the prompt whose key a next token sees: what the rows from there on look at is profiled, and it is
    /// decided about their keys.
    #[must_use]
    pub fn first_profiled(&self, prompt_len: usize) -> usize {
        (prompt_len + 1).saturating_sub(self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_see_what_is_near_them_wherever_it_lies() {
        // Position 20 is the prompt's first; a window of 5 sees 16 to 20 from there.
        let window = PromptWindow::new(5, 20, &[vec![19, 12, 17, 18], vec![]]);
        assert_eq!(window.order(0), [1, 2, 3, 0]);
        assert_eq!(window.positions(0), [12, 17, 18, 19]);
        let seen = |kv_head| (0..6).map(|row| window.seen(kv_head, row)).collect::<Vec<_>>();
        assert_eq!(seen(0), [1..5, 1..6, 2..7, 3..8, 4..9, 5..10]);
        assert_eq!(seen(1), [0..1, 0..2, 0..3, 0..4, 0..5, 1..6]);
        assert_eq!([0, 3, 4, 5, 9].map(|len| window.first_profiled(len)), [0, 0, 0, 1, 5]);
        let narrow = PromptWindow::new(1, 3, &[vec![2]]);
        assert_eq!([0, 1].map(|row| narrow.seen(0, row)), [1..2, 2..3]);
    }
}
