//! What is decided about, and what is decided.
//!
//! Keys that were settled before a segment stay, whatever is decided about it.

use crate::tokens::TokenClass;

/// The tokens that are decided about.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// Position of the first token.
    pub first_position: usize,
    /// `[segment_len]` what each token is.
    pub classes: &'a [TokenClass],
    /// How many of the tokens were appended by decoding before the prompt came; the others are the prompt, whose query
    /// rows are profiled.
    pub recent: usize,
}

impl<'a> Segment<'a> {
    /// A prompt that begins a sequence.
    #[must_use]
    pub fn prompt(classes: &'a [TokenClass]) -> Self {
        Self { first_position: 0, classes, recent: 0 }
    }

    /// Tokens of the segment.
    #[must_use]
    pub fn len(&self) -> usize {
        self.classes.len()
    }

    /// Whether there is nothing to decide about.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// Query rows: tokens of the prompt.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.classes.len().saturating_sub(self.recent)
    }

    /// Position of a token by its index; positions fit 32 bits, which the cache checks.
    pub(super) fn position(&self, index: usize) -> u32 {
        u32::try_from(self.first_position + index).unwrap_or(u32::MAX)
    }

    /// All positions, ascending.
    pub(super) fn all_positions(&self) -> Vec<u32> {
        (0..self.len()).map(|index| self.position(index)).collect()
    }

    /// Positions of the true entries, ascending.
    pub(super) fn positions(&self, mask: &[bool]) -> Vec<u32> {
        let kept = mask.iter().enumerate().filter(|(_, keep)| **keep);
        kept.map(|(index, _)| self.position(index)).collect()
    }
}

/// What one KV head keeps of a segment, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadChoice {
    /// Index of the KV head in its layer.
    pub kv_head: usize,
    /// Index of the chosen level in the search order; 0 if a method with a budget chose.
    pub level: usize,
    /// Recovered mass (`mass`) or largest difference (`max_abs`) of each level tried, up to the chosen one; empty if
    /// there was no search.
    pub recovered: Vec<f64>,
    /// Kept positions of the segment, ascending.
    pub positions: Vec<u32>,
}
