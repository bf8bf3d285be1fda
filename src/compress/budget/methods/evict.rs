//! How a method goes on evicting while tokens are generated: what it reads of a step, and what each row is worth then.
//!
//! Not for: carrying it out (see [`crate::compress::eviction`]).

use super::MethodFacts;

/// What tells which row goes while tokens are generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepAttention {
    /// No attention.
    None,
    /// What each row has received since the prompt began, summed up over the query heads of the KV head.
    Received,
    /// The squares of what each row receives from each token, summed up over the query heads of the KV head before they are
    /// squared; on top of what the method [starts](EvictRows::start) with. A token counts half as much as one that comes so
    /// many tokens later, at least 1.
    FadingSquares(usize),
    /// What each row receives from the newest token, summed up over all query heads of the layer.
    Newest,
    /// No sums: keys, and the queries of so many of the newest tokens, at least 1.
    Queries(usize),
}

/// What a method may know of the rows that one KV head holds after a decoding step, the newest token's included; rows that
/// were settled before the last prompt are no part of it.
#[derive(Debug, Clone, Copy)]
pub struct StepFacts<'a> {
    /// `[n]` position of each row, in any order.
    pub positions: &'a [u32],
    /// Tokens given so far: one more than the newest token's position.
    pub seen: usize,
    /// How many of the rows stay: as many as the head kept of the prompt.
    pub budget: usize,
    /// `[n]` attention as [`StepAttention`] says; else empty.
    pub attention: &'a [f32],
    /// `[n, head_dim]` rotated keys, if [asked for](StepAttention::Queries), else empty.
    pub keys: &'a [f32],
    /// `[tokens]` of `[group_size, head_dim]` of the newest tokens, the newest last, as [`MethodFacts::last_queries`], if
    /// asked for, else empty.
    pub queries: &'a [Vec<f32>],
}

/// How a method goes on evicting while tokens are generated. The number of rows stays that of the prompt, or goes back to it
/// [every](Self::every) so many tokens.
pub trait EvictRows: Send + Sync + std::fmt::Debug {
    /// What it reads.
    fn attention(&self) -> StepAttention;

    /// How many rows beyond its budget a head has when they go, all at once; at least 1.
    fn every(&self) -> usize {
        1
    }

    /// What each position of a prompt is taken to have received when tokens begin to be generated, `[n]`; asked for with
    /// [`StepAttention::FadingSquares`] only.
    fn start(&self, facts: &MethodFacts<'_>) -> Vec<f32> {
        vec![0.0; facts.len]
    }

    /// The score of every row after a decoding step, `[n]`: the lowest go; of equal scores the higher position.
    fn scores(&self, facts: &StepFacts<'_>) -> Vec<f32>;
}

/// What a token's attention counts after one further token, if it counts half after `half_life` of them.
///
/// * `half_life`: at least 1
#[must_use]
#[expect(clippy::cast_precision_loss)] // a count of tokens
pub fn fade(half_life: usize) -> f32 {
    0.5_f32.powf(1.0 / half_life.max(1) as f32)
}
