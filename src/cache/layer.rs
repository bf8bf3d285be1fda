//! One layer's cache: its heads, and what was chosen for them.

use std::ops::Range;

use super::eviction::{HeadStep, LayerEviction};
use super::storage::KvDtype;
use super::{CacheBytes, HeadCache};
use crate::attention::HeadLayout;
use crate::attention::decode::HeadRows;
use crate::attention::prefill::PromptRows;
use crate::error::{Error, Result};
use crate::policy::methods::StepAttention;
use crate::profile::{Eviction, HeadChoice, Segment};
use crate::tokens::TokenClass;

/// Keys and values of one layer, head by head.
#[derive(Debug, Clone)]
pub struct LayerCacheManager {
    layer: usize,
    layout: HeadLayout,
    dtype: KvDtype,
    heads: Vec<HeadCache>,
    seen: usize,
    /// Position up to which an earlier profile has decided: what is kept below it stays.
    settled: usize,
    /// Present if rows go while tokens are generated.
    eviction: Option<LayerEviction>,
}

/// What one KV head got, right after a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSummary {
    /// Index of the KV head.
    pub kv_head: usize,
    /// Index of the level in the search order, 0 if a method with a budget chose; `None` if the cache is full by
    /// request and nothing was chosen.
    pub level: Option<usize>,
    /// The value of each level tried, see [`HeadChoice::recovered`].
    pub recovered: Vec<f64>,
    /// Kept positions of what was decided about, ascending.
    pub positions: Vec<u32>,
}

impl From<HeadChoice> for HeadSummary {
    fn from(choice: HeadChoice) -> Self {
        let HeadChoice { kv_head, level, recovered, positions } = choice;
        Self { kv_head, level: Some(level), recovered, positions }
    }
}

/// What one layer keeps, right after a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSummary {
    /// Index of the layer.
    pub layer: usize,
    /// Tokens that were decided about: the prompt, and what was generated since the prompt before it.
    pub prompt_len: usize,
    /// One for each KV head.
    pub heads: Vec<HeadSummary>,
    /// Sizes of the layer's whole cache.
    pub bytes: CacheBytes,
}

impl LayerCacheManager {
    pub(super) fn new(layer: usize, layout: HeadLayout, dtype: KvDtype) -> Result<Self> {
        let heads = vec![HeadCache::new(layout.head_dim, dtype)?; layout.num_kv_heads];
        Ok(Self { layer, layout, dtype, heads, seen: 0, settled: 0, eviction: None })
    }

    pub(super) fn emptied(&self) -> Self {
        let heads = self.heads.iter().map(HeadCache::emptied).collect();
        let Self { layer, layout, dtype, .. } = *self;
        Self { layer, layout, dtype, heads, seen: 0, settled: 0, eviction: None }
    }

    pub(super) fn layout(&self) -> HeadLayout {
        self.layout
    }

    pub(super) fn seen(&self) -> usize {
        self.seen
    }

    /// The heads, by KV head.
    #[must_use]
    pub fn heads(&self) -> &[HeadCache] {
        &self.heads
    }

    /// Bytes of one stored key and its value.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        2 * self.dtype.row_bytes(self.layout.head_dim)
    }

    /// Bytes of this layer.
    #[must_use]
    pub fn bytes(&self) -> CacheBytes {
        let token = self.token_bytes();
        CacheBytes {
            raw: self.seen * self.layout.num_kv_heads * token,
            kept: self.heads.iter().map(HeadCache::len).sum::<usize>() * token,
            allocated: self.heads.iter().map(HeadCache::allocated_bytes).sum::<usize>()
                + self.eviction.as_ref().map_or(0, LayerEviction::allocated),
        }
    }

    /// Stores a prompt's keys and values: for every KV head, the positions that were chosen, or all of them. Tokens that
    /// were appended since the prompt before are kept or evicted by the same choice, unless heads [go on
    /// evicting](Self::watch): then what they hold stays. What was kept earlier stays.
    ///
    /// Keys must already be rotated: positions are fixed here and never renumbered. Buffers end up at exactly the kept
    /// size.
    ///
    /// * `keys`, `values`: the prompt, behind what every head holds now (see [`prompt_rows`](Self::prompt_rows))
    /// * `choices`: one for each KV head, in order; `None` keeps everything
    ///
    /// # Errors
    /// [`Error::Shape`] if head counts, rows or positions do not fit; nothing is stored then.
    pub fn store_prompt(
        &mut self,
        keys: &PromptRows,
        values: &PromptRows,
        choices: Option<Vec<HeadChoice>>,
    ) -> Result<LayerSummary> {
        let num_kv_heads = self.layout.num_kv_heads;
        // Where heads go on evicting, no token has waited for this decision.
        let settled = if self.eviction.is_some() { self.seen } else { self.settled };
        let (first, new) = (as_position(settled)?, as_position(self.seen)?);
        let end = as_position(self.seen + keys.len())?;
        let summaries = summaries(choices, num_kv_heads, first..end);
        // Checked before anything is stored: a refused prompt leaves the cache as it was.
        check_kept(num_kv_heads, first..end, &summaries)?;
        let row_counts =
            |rows: &PromptRows| -> Vec<usize> { (0..num_kv_heads).map(|head| rows.past_len(head)).collect() };
        let held: Vec<usize> = self.heads.iter().map(HeadCache::len).collect();
        if values.len() != keys.len() || row_counts(keys) != held || row_counts(values) != held {
            return Err(Error::shape("the rows before a prompt", held, (row_counts(keys), row_counts(values))));
        }
        let mut key = vec![0.0; self.layout.head_dim];
        let mut value = vec![0.0; self.layout.head_dim];
        for (head, summary) in self.heads.iter_mut().zip(&summaries) {
            let past = head.len();
            head.evict_from(first, &summary.positions);
            let from_prompt = &summary.positions[summary.positions.partition_point(|&position| position < new)..];
            head.reserve_exact(from_prompt.len());
            for &position in from_prompt {
                let row = past + (position - new) as usize;
                keys.copy_row(summary.kv_head, row, &mut key);
                values.copy_row(summary.kv_head, row, &mut value);
                head.push(&key, &value, position)?;
            }
            head.shrink_to_fit();
        }
        self.seen = end as usize;
        self.settled = self.seen;
        let prompt_len = (end - first) as usize;
        Ok(LayerSummary { layer: self.layer, prompt_len, heads: summaries, bytes: self.bytes() })
    }

    /// Evicts more of the last prompt that was stored, and of what was appended before it: all but what is chosen. What
    /// was evicted already stays so.
    ///
    /// * `first_position`: of the first token that is decided about
    /// * `choices`: one for each KV head, in order
    ///
    /// # Errors
    /// [`Error::Shape`] if head counts or positions do not fit; nothing is evicted then.
    pub fn keep_of_prompt(&mut self, first_position: usize, choices: Vec<HeadChoice>) -> Result<LayerSummary> {
        let (first, end) = (as_position(first_position)?, as_position(self.seen)?);
        let heads = summaries(Some(choices), self.heads.len(), first..end);
        check_kept(self.heads.len(), first..end, &heads)?;
        for (head, summary) in self.heads.iter_mut().zip(&heads) {
            if head.len() - head.count_below(first) > summary.positions.len() {
                head.evict_from(first, &summary.positions);
                head.shrink_to_fit();
            }
        }
        let prompt_len = (end - first) as usize;
        Ok(LayerSummary { layer: self.layer, prompt_len, heads, bytes: self.bytes() })
    }

    /// Room for the keys and values of a prompt of `capacity` tokens, behind copies of what every head holds now.
    ///
    /// # Errors
    /// As [`PromptRows::after`].
    pub fn prompt_rows(&self, capacity: usize) -> Result<(PromptRows, PromptRows)> {
        PromptRows::after(self.layout, capacity, &self.rows())
    }

    /// Keeps one new token in every head.
    ///
    /// * `keys`, `values`: `[num_kv_heads, head_dim]`, keys rotated
    /// * `position`: the number of tokens seen before it
    ///
    /// # Errors
    /// [`Error::Shape`] if sizes or the position do not fit.
    pub fn append(&mut self, keys: &[f32], values: &[f32], position: usize) -> Result<()> {
        self.append_token(keys, values, position, TokenClass::default())
    }

    /// As [`append`](Self::append), of a token whose class may tell how long it stays.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn append_token(&mut self, keys: &[f32], values: &[f32], position: usize, class: TokenClass) -> Result<()> {
        let width = self.layout.kv_width();
        if keys.len() != width || values.len() != width {
            return Err(Error::shape("a token's keys and values", width, (keys.len(), values.len())));
        }
        if position != self.seen {
            return Err(Error::shape("the position of a new token", self.seen, position));
        }
        let position = as_position(position)?;
        let head_dim = self.layout.head_dim;
        let rows = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        let holds_budget = self.eviction.as_ref().is_some_and(LayerEviction::holds_budget);
        for (head, (key, value)) in self.heads.iter_mut().zip(rows) {
            if holds_budget {
                head.reserve_exact(1);
            }
            head.push(key, value, position)?;
        }
        if let Some(eviction) = &mut self.eviction {
            eviction.push(class);
        }
        self.seen += 1;
        Ok(())
    }

    /// Makes heads go on evicting while tokens are generated, from what the prompt that was stored last has left. Until
    /// the next prompt, each [`append_token`](Self::append_token) and attention is followed by [`evict`](Self::evict).
    ///
    /// * `segment`: the prompt
    /// * `summary`: from [`store_prompt`](Self::store_prompt)
    /// * `received`: `[num_kv_heads]` of `[segment_len]` column sums of the prompt's attention, summed up over the query
    ///   heads of each KV head; empty where none were collected
    ///
    /// # Errors
    /// [`Error::Shape`] if head counts do not fit, or sums are missing that tell what goes.
    pub fn watch(
        &mut self,
        eviction: &Eviction,
        segment: Segment<'_>,
        summary: &LayerSummary,
        received: &[Vec<f32>],
    ) -> Result<()> {
        if summary.heads.len() != self.heads.len() || received.len() != self.heads.len() {
            let got = (summary.heads.len(), received.len());
            return Err(Error::shape("what a layer's heads go by", self.heads.len(), got));
        }
        let kept = summary.heads.iter().map(|head| head.positions.len());
        let past: Vec<usize> =
            self.heads.iter().zip(kept).map(|(head, kept)| head.len().saturating_sub(kept)).collect();
        self.eviction = Some(LayerEviction::new(eviction, segment, &past, summary, received)?);
        Ok(())
    }

    /// Whether rows of a head may go after a step.
    #[must_use]
    pub fn evicts(&self, kv_head: usize) -> bool {
        self.attention(kv_head).is_some()
    }

    /// Whether the newest token's attention tells which rows of a head go.
    #[must_use]
    pub fn reads_weights(&self, kv_head: usize) -> bool {
        matches!(self.attention(kv_head), Some(StepAttention::Received | StepAttention::Newest))
    }

    fn attention(&self, kv_head: usize) -> Option<StepAttention> {
        self.eviction.as_ref().and_then(|eviction| eviction.attention(kv_head))
    }

    /// Tells which rows of a head go, as far as the head's own facts tell; they go with [`evict`](Self::evict).
    ///
    /// # Panics
    /// If the head [reads weights](Self::reads_weights) and there is not one for each row.
    pub fn decide(&self, kv_head: usize, step: &mut HeadStep) {
        if let Some(eviction) = &self.eviction {
            eviction.decide(kv_head, &self.heads[kv_head], self.seen, step);
        }
    }

    /// Evicts, after the newest token's attention, what no longer belongs to what each head keeps.
    ///
    /// * `steps`: `[num_kv_heads]`, of which each head that evicts has [decided](Self::decide)
    ///
    /// # Panics
    /// As [`decide`](Self::decide).
    pub fn evict(&mut self, steps: &mut [HeadStep]) {
        if let Some(eviction) = &mut self.eviction {
            eviction.apply(&mut self.heads, self.seen, steps);
        }
    }

    /// The kept rows of every head, for attention.
    #[must_use]
    pub fn rows(&self) -> Vec<HeadRows<'_>> {
        self.heads.iter().map(HeadCache::rows).collect()
    }
}

/// What each head got: what was chosen, or everything in the range.
pub(super) fn summaries(choices: Option<Vec<HeadChoice>>, num_kv_heads: usize, all: Range<u32>) -> Vec<HeadSummary> {
    match choices {
        Some(choices) => choices.into_iter().map(HeadSummary::from).collect(),
        None => (0..num_kv_heads)
            .map(|kv_head| HeadSummary {
                kv_head,
                level: None,
                recovered: Vec::new(),
                positions: all.clone().collect(),
            })
            .collect(),
    }
}

/// Checks that there is a choice for each head, with positions in range and ascending.
pub(super) fn check_kept(num_kv_heads: usize, range: Range<u32>, heads: &[HeadSummary]) -> Result<()> {
    if !heads.iter().map(|head| head.kv_head).eq(0..num_kv_heads) {
        return Err(Error::shape("the choices of a layer", num_kv_heads, heads.len()));
    }
    if let Some(position) = heads.iter().flat_map(|head| &head.positions).find(|position| !range.contains(position)) {
        return Err(Error::shape("a kept position", format!("in {range:?}"), position));
    }
    if !heads.iter().all(|head| head.positions.is_sorted_by(|a, b| a < b)) {
        return Err(Error::shape("kept positions", "ascending", "another order"));
    }
    Ok(())
}

pub(super) fn as_position(position: usize) -> Result<u32> {
    u32::try_from(position).map_err(|_| Error::shape("a position", "below 2^32", position))
}
