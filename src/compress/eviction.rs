//! Eviction while tokens are generated (paper, algorithm 2): which rows of a head go after each step.
//!
//! What was chosen at the last prompt goes on: of the search, each head's level is applied to the segment as it grows, its
//! budgets taken of the current length; a method with a budget keeps as many rows as it kept of the prompt. The newest
//! token takes part in its own step, and may be among what goes after it. What is gone can't come back: rows are chosen
//! from those that are held.
//!
//! A further prompt begins a segment of its own: what a head holds then is settled, stays, and counts in no budget; only
//! the prompt is decided about, and from there on what the head does follows from that decision.
//!
//! Not for: attention, or holding rows and what they received (see [`crate::cache`]).

use std::sync::Arc;

use super::budget::allocation::by_score;
use super::budget::methods::{EvictRows, StepAttention, StepFacts};
use super::config::{AdaptiveConfig, Compression, DecodeMode};
use super::fastgen::policies::HeadFacts;
use crate::tokens::TokenClass;

/// Tells which rows of a head go after a decoding step.
#[derive(Debug, Clone)]
pub struct Eviction {
    config: Arc<AdaptiveConfig>,
}

/// The rows that a head holds of its last segment after a decoding step, the newest token's included.
#[derive(Debug, Clone, Copy)]
pub struct HeldRows<'a> {
    /// Position of the segment's first token.
    pub first_position: usize,
    /// Tokens given so far, the newest included.
    pub seen: usize,
    /// `[n]` position of each row, in any order.
    pub positions: &'a [u32],
    /// `[n]` class of each row's token, if [`Eviction::reads_classes`]; else empty.
    pub classes: &'a [TokenClass],
    /// `[n]` attention, as [`Eviction::attention`] says; else empty.
    pub attention: &'a [f32],
    /// `[n, head_dim]` keys, if [that](Eviction::attention) says so; else empty.
    pub keys: &'a [f32],
    /// `[tokens]` of `[group_size, head_dim]` queries of the newest tokens, if [that](Eviction::attention) says so; else
    /// empty.
    pub queries: &'a [Vec<f32>],
}

impl Eviction {
    /// Eviction as `config` says; `None` if every new token is kept.
    #[must_use]
    pub fn new(config: &Arc<AdaptiveConfig>) -> Option<Self> {
        (config.decode == DecodeMode::Evict).then(|| Self { config: Arc::clone(config) })
    }

    /// Which attention tells what goes of a head that ended up at `level`; `None` if nothing ever goes.
    #[must_use]
    pub fn attention(&self, level: usize) -> Option<StepAttention> {
        match &self.config.method {
            Compression::Budgeted(method) => method.method.eviction().map(EvictRows::attention),
            Compression::FastGen(search) => {
                let policies = search.policies.level(level);
                if policies.iter().any(|policy| policy.keeps_all()) {
                    return None;
                }
                let received = policies.iter().any(|policy| policy.needs_column_sums());
                Some(if received { StepAttention::Received } else { StepAttention::None })
            }
        }
    }

    /// How many levels a head can end up at.
    #[must_use]
    pub fn num_levels(&self) -> usize {
        self.config.num_levels()
    }

    /// Whether tokens' classes tell what goes.
    #[must_use]
    pub fn reads_classes(&self) -> bool {
        self.config.fastgen().is_some()
    }

    /// Whether a head never holds more rows after a step than after the prompt.
    #[must_use]
    pub fn holds_budget(&self) -> bool {
        self.most_new_rows() == Some(1)
    }

    /// How many rows a head holds at most beside those that it kept of the prompt, the newest token's included; `None` if
    /// there is no such bound.
    #[must_use]
    pub fn most_new_rows(&self) -> Option<usize> {
        let method = self.config.budgeted()?;
        method.method.eviction().map(|rows| rows.every().max(1))
    }

    /// Whether rows of a head go after this step, if a budget says how many.
    ///
    /// * `budget`: how many rows it kept of the prompt
    /// * `rows`: how many it holds
    #[must_use]
    pub fn is_due(&self, budget: usize, rows: usize) -> bool {
        self.most_new_rows().is_none_or(|most| rows.saturating_sub(budget) >= most)
    }

    /// The rows that go, by index, descending.
    ///
    /// * `level`: at which the head ended up
    /// * `budget`: how many rows it kept of the prompt
    #[must_use]
    pub fn evicted(&self, level: usize, budget: usize, rows: HeldRows<'_>) -> Vec<usize> {
        let HeldRows { first_position, seen, positions, classes, attention, keys, queries } = rows;
        match &self.config.method {
            Compression::Budgeted(method) => {
                let excess = positions.len().saturating_sub(budget);
                let facts = StepFacts { positions, seen, budget, attention, keys, queries };
                match method.method.eviction() {
                    Some(rows) if excess > 0 && self.is_due(budget, positions.len()) => {
                        lowest(&rows.scores(&facts), positions, excess)
                    }
                    _ => Vec::new(),
                }
            }
            Compression::FastGen(search) => {
                let segment_len = seen.saturating_sub(first_position);
                let facts = HeadFacts { first_position, segment_len, positions, classes, column_sums: attention };
                let mut keep = vec![false; positions.len()];
                for policy in search.policies.level(level) {
                    policy.mark(&facts, search, &mut keep);
                }
                (0..keep.len()).rev().filter(|&row| !keep[row]).collect()
            }
        }
    }
}

/// Indices of the `count` lowest scores, descending; of equal scores the higher position.
fn lowest(scores: &[f32], positions: &[u32], count: usize) -> Vec<usize> {
    let order = |&a: &usize, &b: &usize| by_score(scores[a], scores[b]).then_with(|| positions[b].cmp(&positions[a]));
    if count == 1 {
        return (0..scores.len()).min_by(order).into_iter().collect();
    }
    let mut rows: Vec<usize> = (0..scores.len()).collect();
    rows.sort_unstable_by(order);
    rows.truncate(count);
    rows.sort_unstable_by(|a, b| b.cmp(a));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eviction(config: &str) -> Eviction {
        Eviction::new(&Arc::new(AdaptiveConfig::parse(config, None).unwrap())).unwrap()
    }

    /// Positions that go, of rows at `positions` with `attention`, ascending.
    fn gone(config: &str, level: usize, budget: usize, positions: &[u32], attention: &[f32], seen: usize) -> Vec<u32> {
        let classes: Vec<TokenClass> =
            positions.iter().map(|&at| TokenClass { special: false, punctuation: at % 10 == 9 }).collect();
        let rows =
            HeldRows { first_position: 0, seen, positions, classes: &classes, attention, keys: &[], queries: &[] };
        let evicted = eviction(config).evicted(level, budget, rows);
        assert!(evicted.is_sorted_by(|a, b| a > b));
        let mut gone: Vec<u32> = evicted.into_iter().map(|row| positions[row]).collect();
        gone.sort_unstable();
        gone
    }

    #[test]
    fn appending_evicts_nothing() {
        assert!(Eviction::new(&Arc::new(AdaptiveConfig::default())).is_none());
    }

    #[test]
    fn each_level_reads_what_its_policies_read() {
        let search = eviction(r#"{"decode": "evict"}"#);
        let expected = [
            Some(StepAttention::None),
            Some(StepAttention::None),
            Some(StepAttention::Received),
            Some(StepAttention::Received),
            None,
        ];
        assert_eq!([0, 1, 2, 3, 4].map(|level| search.attention(level)), expected);
        for (method, attention) in [
            ("streaming_llm", StepAttention::None),
            ("h2o", StepAttention::Received),
            ("tova", StepAttention::Newest),
            ("replay", StepAttention::FadingSquares(256)),
        ] {
            let method = eviction(&format!(r#"{{"decode": "evict", "method": "{method}"}}"#));
            assert_eq!(method.attention(0), Some(attention));
        }
    }

    #[test]
    fn a_level_is_applied_to_the_whole_length_and_to_what_is_held() {
        let config = r#"{"decode": "evict", "frequency_ratio": 0.2, "locality_ratio": 0.1, "sink_tokens": 1}"#;
        // 20 tokens were given: 4 heavy ones and the last 2 are kept.
        let (positions, attention) = ([0, 9, 19, 18, 4, 5, 6, 7], [0.0, 0.0, 0.1, 0.2, 3.0, 2.0, 2.0, 2.0]);
        assert_eq!(gone(config, 0, 0, &positions, &attention, 20), [4, 5, 6, 7, 9, 18, 19]);
        assert_eq!(gone(config, 1, 0, &positions, &attention, 20), [4, 5, 6, 7, 18]);
        assert_eq!(gone(config, 2, 0, &positions, &attention, 20), [18]);
        assert!(gone(config, 3, 0, &positions, &attention, 20).is_empty());
        // Of 15 it would be 3 heavy ones: of equal sums the lower positions.
        assert_eq!(gone(config, 2, 0, &positions[4..], &attention[4..], 15), [7]);
    }

    #[test]
    fn methods_hold_the_prompts_budget() {
        let streaming = r#"{"decode": "evict", "method": "streaming_llm", "sink_tokens": 2}"#;
        assert_eq!(gone(streaming, 0, 4, &[0, 1, 12, 11, 10], &[], 13), [10]);
        assert_eq!(gone(streaming, 0, 3, &[0, 1, 12, 11, 10], &[], 13), [10, 11]);
        assert_eq!(gone(streaming, 0, 1, &[0, 12], &[], 13), [12], "the first of the sinks stays");
        assert!(gone(streaming, 0, 5, &[0, 1, 12, 11, 10], &[], 13).is_empty());
        let h2o = r#"{"decode": "evict", "method": "h2o"}"#;
        assert_eq!(gone(h2o, 0, 4, &[3, 12, 11, 10, 5], &[1.0, 0.0, 0.1, 0.9, 0.9], 13), [10]);
        let tova = r#"{"decode": "evict", "method": "tova"}"#;
        assert_eq!(gone(tova, 0, 3, &[3, 12, 7, 5], &[0.3, 0.1, 0.2, 0.2], 13), [7]);
        let replay = r#"{"decode": "evict", "method": "replay", "sink_tokens": 1}"#;
        assert_eq!(gone(replay, 0, 4, &[0, 12, 11, 10, 5], &[0.0, 0.0, 0.1, 0.9, 0.9], 13), [10]);
        assert_eq!(gone(replay, 0, 1, &[0, 12], &[0.0, 9.0], 13), [12], "a sink stays");
    }
}
