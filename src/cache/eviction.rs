//! What a layer notes of its rows while tokens are generated, so that rows can go one by one.
//!
//! Rows go one by one: the last row takes the place of one that goes, and the notes follow. So a step moves as many rows
//! as it evicts, however many there are.
//!
//! Not for: telling which rows go (see [`Eviction`]).

mod saved;

use super::growth::{grow, trim};
use super::summary::LayerSummary;
use crate::compress::budget::methods::{StepAttention, fade};
use crate::compress::{Eviction, HeldRows, Segment};
use crate::error::{Error, Result};
use crate::kernels::vector::{self, instruction_set};
use crate::tokens::TokenClass;

/// One head's part in a decoding step. Buffers are kept from step to step.
#[derive(Debug, Clone, Default)]
pub struct HeadStep {
    /// `[rows]` weights of the newest token's attention, summed up over the head's query group; empty if the head does not
    /// [read them](super::Ledger::reads_weights).
    pub weights: Vec<f32>,
    /// `[group_size, head_dim]` queries of the newest token, times what makes scores of their products with keys; looked at
    /// if the head [reads them](super::Ledger::reads_queries).
    pub queries: Vec<f32>,
    /// `[rows, head_dim]` keys; looked at if the head [reads them](super::Ledger::reads_keys) in this step.
    pub keys: Vec<f32>,
    /// Rows that go, descending.
    evicted: Vec<usize>,
}

impl HeadStep {
    /// Rows that go, descending; all of them, once [`Ledger::evict`](super::Ledger::evict) has been asked.
    #[must_use]
    pub fn evicted(&self) -> &[usize] {
        &self.evicted
    }

    pub(super) fn keep_all(&mut self) {
        self.evicted.clear();
    }

    /// Lets rows at some positions go.
    ///
    /// * `positions`: of the head's rows
    pub(super) fn go_where(&mut self, positions: &[u32], goes: impl Fn(u32) -> bool) {
        self.evicted.clear();
        self.evicted.extend((0..positions.len()).rev().filter(|&row| goes(positions[row])));
    }
}

/// A layer's heads, all of which follow one rule.
#[derive(Debug, Clone)]
pub(super) struct LayerEviction {
    eviction: Eviction,
    /// Position of the first token of the last prompt.
    first_position: usize,
    /// `[num_kv_heads]`
    heads: Vec<WatchedHead>,
}

/// What is noted of one head's rows from `first_row` on; those before were settled when the last prompt came.
#[derive(Debug, Clone)]
struct WatchedHead {
    level: usize,
    /// Rows that the head kept of the prompt.
    budget: usize,
    /// `None` if nothing ever goes.
    attention: Option<StepAttention>,
    first_row: usize,
    /// `[rows]` what each row has received, or the fading squares of it, if that tells what goes; else empty.
    received: Vec<f32>,
    /// `[rows]`, if classes tell what goes; else empty.
    classes: Vec<TokenClass>,
    /// `[tokens]` queries of the newest tokens but one, as many as tell what goes; else empty.
    queries: Vec<Vec<f32>>,
}

impl LayerEviction {
    /// Starts with what a prompt left.
    ///
    /// * `past`: `[num_kv_heads]` rows before the prompt's
    /// * `received`: `[num_kv_heads]` of `[segment_len]` what the prompt's rows have received; empty where it was not
    ///   collected
    pub fn new(
        eviction: &Eviction,
        segment: Segment<'_>,
        past: &[usize],
        summary: &LayerSummary,
        received: &[Vec<f32>],
    ) -> Result<Self> {
        let mut heads = Vec::with_capacity(summary.heads.len());
        for ((summary, &first_row), received) in summary.heads.iter().zip(past).zip(received) {
            let level = summary.level.unwrap_or_default();
            let attention = eviction.attention(level);
            let index = |position: &u32| *position as usize - segment.first_position;
            let reads_received = attention.is_some_and(is_received);
            if reads_received && received.len() != segment.len() {
                return Err(Error::shape("what a prompt's positions received", segment.len(), received.len()));
            }
            let of_kept = |wanted: bool| if wanted { &summary.positions[..] } else { &[] };
            heads.push(WatchedHead {
                level,
                budget: summary.positions.len(),
                attention,
                first_row,
                received: of_kept(reads_received).iter().map(|position| received[index(position)]).collect(),
                classes: of_kept(attention.is_some() && eviction.reads_classes())
                    .iter()
                    .map(|position| segment.classes[index(position)])
                    .collect(),
                queries: Vec::new(),
            });
        }
        Ok(Self { eviction: eviction.clone(), first_position: segment.first_position, heads })
    }

    /// Follows rows of the prompt that go before tokens are generated: what stays is the budget.
    ///
    /// * `stay`: `[num_kv_heads]` rows that stay, ascending; those before the prompt's do
    pub fn keep<'a>(&mut self, stay: impl Iterator<Item = &'a [usize]>) {
        for (head, stay) in self.heads.iter_mut().zip(stay) {
            let stay = || stay.iter().filter_map(|row| row.checked_sub(head.first_row));
            head.budget = stay().count();
            head.received = picked(&head.received, stay());
            head.classes = picked(&head.classes, stay());
        }
    }

    /// Bytes that are allocated for notes.
    pub fn allocated(&self) -> usize {
        let bytes = |head: &WatchedHead| {
            let queries: usize = head.queries.iter().map(Vec::capacity).sum();
            (head.received.capacity() + queries) * size_of::<f32>() + head.classes.capacity() * size_of::<TokenClass>()
        };
        self.heads.iter().map(bytes).sum()
    }

    /// Which attention tells what goes of a head; `None` if nothing does.
    pub fn attention(&self, kv_head: usize) -> Option<StepAttention> {
        self.heads.get(kv_head).and_then(|head| head.attention)
    }

    /// Whether a head holds one row more during a step and never more than that.
    pub fn holds_budget(&self) -> bool {
        self.eviction.holds_budget()
    }

    /// Whether rows of a head go after this step, if a budget says how many.
    ///
    /// * `rows`: that it holds in all
    pub fn is_due(&self, kv_head: usize, rows: usize) -> bool {
        let head = &self.heads[kv_head];
        self.eviction.is_due(head.budget, rows.saturating_sub(head.first_row))
    }

    /// Notes a token that every head has got.
    pub fn push(&mut self, class: TokenClass) {
        let holds_budget = self.holds_budget();
        for head in &mut self.heads {
            if head.attention.is_some_and(is_received) {
                push(&mut head.received, 0.0, holds_budget);
            }
            if head.attention.is_some() && self.eviction.reads_classes() {
                push(&mut head.classes, class, holds_budget);
            }
        }
    }

    /// Which rows of a head go, if its own facts tell.
    ///
    /// * `positions`: of the rows that it holds
    /// * `seen`: tokens given so far
    /// * `step`: with the weights, if the head reads them; what was received earlier is added to them
    pub fn decide(&self, kv_head: usize, positions: &[u32], seen: usize, step: &mut HeadStep) {
        step.evicted.clear();
        let head = &self.heads[kv_head];
        let (mut keys, mut queries) = (&[][..], Vec::new());
        let attention = match head.attention {
            None | Some(StepAttention::Newest) => return,
            Some(StepAttention::Queries(_)) => {
                if !self.is_due(kv_head, positions.len()) {
                    return;
                }
                keys = &step.keys[step.keys.len() / positions.len().max(1) * head.first_row..];
                queries = [&head.queries[..], std::slice::from_ref(&step.queries)].concat();
                &[]
            }
            Some(StepAttention::None) => &[],
            Some(StepAttention::Received) => {
                let weights = &mut step.weights[head.first_row..];
                vector::add_assign(instruction_set(), weights, &head.received);
                &*weights
            }
            Some(StepAttention::FadingSquares(half_life)) => {
                let (weights, fade) = (&mut step.weights[head.first_row..], fade(half_life));
                for (weight, received) in weights.iter_mut().zip(&head.received) {
                    *weight = *weight * *weight + fade * received;
                }
                &*weights
            }
        };
        let rows = HeldRows { keys, queries: &queries, ..self.rows(head, positions, seen, attention) };
        let evicted = self.eviction.evicted(head.level, head.budget, rows);
        step.evicted.extend(evicted.into_iter().map(|row| head.first_row + row));
    }

    fn rows<'a>(&self, head: &'a WatchedHead, positions: &'a [u32], seen: usize, attention: &'a [f32]) -> HeldRows<'a> {
        HeldRows {
            first_position: self.first_position,
            seen,
            positions: &positions[head.first_row..],
            classes: &head.classes,
            attention,
            keys: &[],
            queries: &[],
        }
    }

    /// Completes what was decided by what all heads' weights together tell, and takes it down in the notes.
    ///
    /// * `positions`: `[num_kv_heads]` of the rows that are held
    /// * `steps`: `[num_kv_heads]`
    pub fn apply(&mut self, positions: &[Vec<u32>], seen: usize, steps: &mut [HeadStep]) {
        self.decide_together(positions, seen, steps);
        for (head, step) in self.heads.iter_mut().zip(steps) {
            if head.attention.is_none() {
                step.keep_all(); // it has not decided
                continue;
            }
            if head.attention.is_some_and(is_received) {
                head.received.copy_from_slice(&step.weights[head.first_row..]);
            }
            if let Some(StepAttention::Queries(tokens)) = head.attention {
                head.queries.push(step.queries.clone());
                let old = head.queries.len().saturating_sub(tokens.saturating_sub(1));
                head.queries.drain(..old);
            }
            for &row in &step.evicted {
                remove(&mut head.received, row - head.first_row);
                remove(&mut head.classes, row - head.first_row);
            }
            if !step.evicted.is_empty() {
                trim(&mut head.received);
                trim(&mut head.classes);
            }
        }
    }

    /// Where the attention of all heads tells what goes, all heads hold the same positions, in the same order.
    fn decide_together(&self, positions: &[Vec<u32>], seen: usize, steps: &mut [HeadStep]) {
        let (Some(head), Some(held)) = (self.heads.first(), positions.first()) else { return };
        if head.attention != Some(StepAttention::Newest) {
            return;
        }
        debug_assert!(positions.iter().all(|other| other == held));
        let Some((first, others)) = steps.split_first_mut() else { return };
        for other in &*others {
            vector::add_assign(instruction_set(), &mut first.weights, &other.weights);
        }
        let rows = self.rows(head, held, seen, &first.weights[head.first_row..]);
        first.evicted = self.eviction.evicted(head.level, head.budget, rows);
        first.evicted.iter_mut().for_each(|row| *row += head.first_row);
        for other in others {
            other.evicted.clone_from(&first.evicted);
        }
    }
}

/// Whether something is noted of each row that adds up from token to token.
fn is_received(attention: StepAttention) -> bool {
    matches!(attention, StepAttention::Received | StepAttention::FadingSquares(_))
}

/// Adds a note; a full buffer grows as a head's rows do.
fn push<T>(notes: &mut Vec<T>, note: T, holds_budget: bool) {
    grow(notes, holds_budget);
    notes.push(note);
}

/// The notes of some rows, if there are notes, and no room for more.
fn picked<T: Copy>(notes: &[T], rows: impl Iterator<Item = usize>) -> Vec<T> {
    let mut picked: Vec<T> = rows.filter_map(|row| notes.get(row).copied()).collect();
    picked.shrink_to_fit();
    picked
}

/// Takes out the note of a row, if there are notes.
fn remove<T>(notes: &mut Vec<T>, row: usize) {
    if row < notes.len() {
        notes.swap_remove(row);
    }
}
