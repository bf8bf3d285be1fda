//! The books of one layer's cache: which positions each head holds, what has been decided, and what goes next.
//!
//! Nothing here touches a key or a value. A ledger says what is to become of rows, as a [`Plan`] or as the rows that go
//! in a [step](HeadStep); a backend's [`Rows`](super::Rows) carry that out; then the ledger takes it down. So the rules of
//! what is kept are written once, whatever holds the rows. One of them is the model's own: in a layer with a sliding window,
//! rows go that no later token looks at, whatever else is decided.
//!
//! Not for: choosing (see [`crate::compress`]).

mod anew;
mod first;
mod positions;
mod saved;
mod worths;

use std::borrow::Cow;
use std::ops::Range;

use self::positions::Positions;
use self::worths::Worths;
use super::eviction::{HeadStep, LayerEviction};
use super::growth::trim;
use super::summary::{HeadSummary, LayerSummary};
use crate::arch::HeadLayout;
use crate::compress::budget::methods::StepAttention;
use crate::compress::{Eviction, HeadChoice, Segment};
use crate::error::{Error, Result};
use crate::tokens::TokenClass;

/// Bytes that are taken down of a row: its position, and its score where rows are judged anew.
pub const NOTE_BYTES: usize = size_of::<u32>() + worths::WORTH_BYTES;

/// Bytes that are taken down of a row where heads go on evicting by a budget: its position, and what it received.
pub const EVICTING_NOTE_BYTES: usize = size_of::<u32>() + size_of::<f32>();

/// What is known of one layer's rows without looking at them.
#[derive(Debug, Clone)]
pub struct Ledger {
    layer: usize,
    layout: HeadLayout,
    positions: Positions,
    seen: usize,
    /// How many tokens a token looks at, itself included, if there is a limit.
    window: Option<usize>,
    /// Position up to which an earlier profile has decided: what is kept below it stays.
    settled: usize,
    /// Of the rows that were decided about, where they are judged anew with what comes.
    worths: Worths,
    /// Present if rows go while tokens are generated.
    eviction: Option<LayerEviction>,
}

/// What is to become of a layer's rows, and of a prompt's.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// `[num_kv_heads]`
    pub heads: Vec<HeadPlan>,
    /// Tokens that the choice is about, by their positions.
    decided: Range<u32>,
    summaries: Vec<HeadSummary>,
    seen: usize,
}

/// What one head's rows become: those that stay, in their order, and behind them rows of the prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadPlan {
    /// Rows that stay of those that the head holds, ascending.
    pub stay: Vec<usize>,
    /// Rows of the prompt that it keeps, from 0, ascending.
    pub prompt: Vec<usize>,
}

impl Ledger {
    /// The books of an empty layer.
    ///
    /// * `layer`: its index
    #[must_use]
    pub fn new(layer: usize, layout: HeadLayout) -> Self {
        let positions = Positions::new(layout.num_kv_heads);
        Self { layer, layout, positions, seen: 0, window: None, settled: 0, worths: Worths::default(), eviction: None }
    }

    /// Lets rows go that no later token looks at.
    ///
    /// * `window`: tokens that a token looks at, itself included; at least 1
    pub(super) fn limit_to(&mut self, window: Option<usize>) {
        self.window = window;
    }

    /// How many tokens a token of this layer looks at, itself included, if there is a limit.
    #[must_use]
    pub fn window(&self) -> Option<usize> {
        self.window
    }

    /// The first position that a token looks at which comes after `seen` others.
    fn first_in_window(&self, seen: usize) -> usize {
        self.window.map_or(0, |window| (seen + 1).saturating_sub(window))
    }

    /// Index of the layer.
    #[must_use]
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// The heads that it is about.
    #[must_use]
    pub fn layout(&self) -> HeadLayout {
        self.layout
    }

    /// Tokens given so far: the position of the next one.
    #[must_use]
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Tokens that were there when the last prompt was decided about, itself included.
    #[must_use]
    pub fn settled(&self) -> usize {
        self.settled
    }

    /// `[num_kv_heads]` absolute positions of the kept tokens, in the order of their rows: ascending, unless some went one
    /// by one.
    #[must_use]
    pub fn positions(&self) -> Cow<'_, [Vec<u32>]> {
        self.positions.all(self.seen)
    }

    /// `[num_kv_heads]` rows that each head holds.
    #[must_use]
    pub fn lens(&self) -> Vec<usize> {
        (0..self.layout.num_kv_heads).map(|kv_head| self.len(kv_head)).collect()
    }

    /// Rows that a head holds.
    #[must_use]
    pub fn len(&self, kv_head: usize) -> usize {
        self.positions.len(kv_head)
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.num_rows() == 0
    }

    /// Rows that all heads hold together.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        (0..self.layout.num_kv_heads).map(|kv_head| self.len(kv_head)).sum()
    }

    /// Bytes that are allocated for positions, and for notes on what goes next.
    #[must_use]
    pub fn allocated(&self) -> usize {
        let eviction = self.eviction.as_ref().map_or(0, LayerEviction::allocated);
        self.positions.allocated() + self.worths.allocated() + eviction
    }

    /// What becomes of the rows when a prompt is stored: for every KV head, the positions that were chosen, or all of them.
    /// Tokens that were appended since the prompt before are kept or evicted by the same choice, unless heads [go on
    /// evicting](Self::watch): then what they hold stays. What was kept earlier stays.
    ///
    /// * `prompt_len`: tokens of the prompt
    /// * `choices`: one for each KV head, in order; `None` keeps everything
    ///
    /// # Errors
    /// [`Error::Shape`] if head counts or positions do not fit.
    pub fn plan_prompt(&self, prompt_len: usize, choices: Option<Vec<HeadChoice>>) -> Result<Plan> {
        // Where heads go on evicting, no token has waited for this decision.
        let settled = if self.eviction.is_some() { self.seen } else { self.settled };
        self.plan(settled, self.seen + prompt_len, choices)
    }

    /// What becomes of the rows when more of the last prompt goes, and of what was appended before it: all but what is
    /// chosen. What was evicted already stays so.
    ///
    /// * `first_position`: of the first token that is decided about
    /// * `choices`: one for each KV head, in order
    ///
    /// # Errors
    /// As [`plan_prompt`](Self::plan_prompt).
    pub fn plan_less(&self, first_position: usize, choices: Vec<HeadChoice>) -> Result<Plan> {
        self.plan(first_position, self.seen, Some(choices))
    }

    fn plan(&self, first: usize, end: usize, choices: Option<Vec<HeadChoice>>) -> Result<Plan> {
        let (decided, seen) = (as_position(first)?..as_position(end)?, as_position(self.seen)?);
        let first_in_window = as_position(self.first_in_window(end))?;
        let in_window = decided.start.max(first_in_window)..decided.end;
        let summaries = summaries(choices, self.layout.num_kv_heads, &in_window);
        check_kept(self.layout.num_kv_heads, &in_window, &summaries)?;
        let head = |(kv_head, summary): (usize, &HeadSummary)| {
            let is_settled = |position: u32| (first_in_window..decided.start).contains(&position);
            let stays = |position: u32| is_settled(position) || summary.positions.binary_search(&position).is_ok();
            let new = summary.positions.partition_point(|&position| position < seen);
            HeadPlan {
                stay: self
                    .positions
                    .of(kv_head, self.seen)
                    .enumerate()
                    .filter(|&(_, held)| stays(held))
                    .map(|(row, _)| row)
                    .collect(),
                prompt: summary.positions[new..].iter().map(|position| (position - seen) as usize).collect(),
            }
        };
        let heads = summaries.iter().enumerate().map(head).collect();
        Ok(Plan { heads, decided, summaries, seen: end })
    }

    /// Takes down that a plan of this ledger has been carried out.
    ///
    /// Returns how many tokens were decided about, and what each head got of them.
    pub fn settle(&mut self, plan: Plan) -> (usize, Vec<HeadSummary>) {
        let Plan { heads, decided, summaries, seen } = plan;
        if let Some(eviction) = self.eviction.as_mut().filter(|_| seen == self.seen) {
            eviction.keep(heads.iter().map(|head| &head.stay[..]));
        }
        self.positions.settle(&heads, self.seen);
        (self.seen, self.settled) = (seen, seen);
        (decided.len(), summaries)
    }

    /// Checks that a token may come now.
    ///
    /// # Errors
    /// [`Error::Shape`] if `position` is not the number of tokens seen, or too large.
    pub fn check_next(&self, position: usize) -> Result<()> {
        if position != self.seen {
            return Err(Error::shape("the position of a new token", self.seen, position));
        }
        as_position(position).map(drop)
    }

    /// Takes down that every head got a row for the next token.
    ///
    /// * `class`: may tell how long it stays
    pub fn advance(&mut self, class: TokenClass) {
        if self.eviction.is_some() || self.window.is_some() {
            let holds_budget = self.holds_budget();
            self.positions.push_apart(self.seen, holds_budget);
        } else {
            self.positions.push();
        }
        if let Some(eviction) = &mut self.eviction {
            eviction.push(class);
        }
        self.seen += 1;
    }

    /// Checks that several tokens may come now, some of which may be taken back again.
    ///
    /// * `position`: of the first
    ///
    /// # Errors
    /// As [`check_next`](Self::check_next); [`Error::Unsupported`] if rows go while tokens are generated: then every
    /// token has a say in what is left. They do where heads go on evicting, and beyond a sliding window.
    pub fn check_run(&self, position: usize, count: usize) -> Result<()> {
        if self.is_watched() {
            return Err(Error::unsupported("several tokens at a time where heads go on evicting"));
        }
        if self.first_in_window(position.saturating_add(count)) > 0 {
            return Err(Error::unsupported("several tokens at a time where rows leave a sliding window"));
        }
        self.check_next(position)?;
        as_position(position.saturating_add(count)).map(drop)
    }

    /// Forgets the newest tokens, of which every head holds the last rows; those must go, too.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if heads go on evicting, rows have left a sliding window, or a prompt was decided about since
    /// the tokens came; nothing has changed then.
    pub fn take_back(&mut self, count: usize) -> Result<()> {
        self.expect_undecided(count)?;
        self.positions.take_back(count, self.seen);
        self.seen -= count;
        Ok(())
    }

    /// Whether each head holds one row more during a step, and never more than that.
    #[must_use]
    pub fn holds_budget(&self) -> bool {
        self.eviction.as_ref().is_some_and(LayerEviction::holds_budget)
    }

    /// Makes heads go on evicting while tokens are generated, from what the prompt that was stored last has left.
    ///
    /// * `segment`: the prompt
    /// * `summary`: of the prompt
    /// * `received`: `[num_kv_heads]` of `[segment_len]` what the prompt's positions have received, summed up over the query
    ///   heads of each KV head; empty where it was not collected
    ///
    /// # Errors
    /// [`Error::Shape`] if head counts do not fit, or sums are missing that tell what goes; [`Error::Unsupported`] in a layer
    /// with a sliding window.
    pub fn watch(
        &mut self,
        eviction: &Eviction,
        segment: Segment<'_>,
        summary: &LayerSummary,
        received: &[Vec<f32>],
    ) -> Result<()> {
        if self.window.is_some() {
            return Err(Error::unsupported("evicting while tokens are generated, in a layer with a sliding window"));
        }
        let num_heads = self.layout.num_kv_heads;
        if summary.heads.len() != num_heads || received.len() != num_heads {
            let got = (summary.heads.len(), received.len());
            return Err(Error::shape("what a layer's heads go by", num_heads, got));
        }
        let kept = summary.heads.iter().map(|head| head.positions.len());
        let past: Vec<usize> =
            self.lens().into_iter().zip(kept).map(|(held, kept)| held.saturating_sub(kept)).collect();
        self.eviction = Some(LayerEviction::new(eviction, segment, &past, summary, received)?);
        Ok(())
    }

    /// Whether heads go on evicting while tokens are generated.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.eviction.is_some()
    }

    /// Whether rows of a head may go after a step, be it the next or the one that is just over.
    #[must_use]
    pub fn evicts(&self, kv_head: usize) -> bool {
        self.attention(kv_head).is_some() || self.first_in_window(self.seen + 1) > 0
    }

    /// Whether the newest token's attention tells which rows of a head go.
    #[must_use]
    pub fn reads_weights(&self, kv_head: usize) -> bool {
        matches!(
            self.attention(kv_head),
            Some(StepAttention::Received | StepAttention::FadingSquares(_) | StepAttention::Newest)
        )
    }

    /// Whether the newest token's queries are to be noted of a head.
    #[must_use]
    pub fn reads_queries(&self, kv_head: usize) -> bool {
        matches!(self.attention(kv_head), Some(StepAttention::Queries(_)))
    }

    /// Whether a head's keys tell which rows go after this step, for which its row is there already.
    #[must_use]
    pub fn reads_keys(&self, kv_head: usize) -> bool {
        let is_due = |eviction: &LayerEviction| eviction.is_due(kv_head, self.len(kv_head));
        self.reads_queries(kv_head) && self.eviction.as_ref().is_some_and(is_due)
    }

    fn attention(&self, kv_head: usize) -> Option<StepAttention> {
        self.eviction.as_ref().and_then(|eviction| eviction.attention(kv_head))
    }

    /// Tells which rows of a head go, as far as the head's own facts tell; they go with [`evict`](Self::evict). Where there is
    /// a sliding window, nothing but that tells.
    ///
    /// # Panics
    /// If the head [reads weights](Self::reads_weights) or [keys](Self::reads_keys) and they are not there for each row.
    pub fn decide(&self, kv_head: usize, step: &mut HeadStep) {
        if let Some(eviction) = &self.eviction {
            eviction.decide(kv_head, &self.positions.apart()[kv_head], self.seen, step);
        } else {
            let first = self.first_in_window(self.seen);
            step.go_where(&self.positions.apart()[kv_head], |position| (position as usize) < first);
        }
    }

    /// Takes down what goes after a step; the same rows must then go from what holds them, one after the other, the last
    /// row each time in the place of the one that goes.
    ///
    /// * `steps`: `[num_kv_heads]`, of which each head that evicts has [decided](Self::decide)
    ///
    /// # Panics
    /// As [`decide`](Self::decide).
    pub fn evict(&mut self, steps: &mut [HeadStep]) {
        if let Some(eviction) = &mut self.eviction {
            eviction.apply(self.positions.apart(), self.seen, steps);
        } else if self.first_in_window(self.seen) == 0 {
            // No head has decided.
            return steps.iter_mut().for_each(HeadStep::keep_all);
        }
        for (held, step) in self.positions.apart_mut().iter_mut().zip(steps) {
            for &row in step.evicted() {
                held.swap_remove(row);
            }
            if !step.evicted().is_empty() {
                trim(held);
                // They follow the order of rows.
                self.worths = Worths::default();
            }
        }
    }
}

/// What each head got: what was chosen, or everything that was decided about.
fn summaries(choices: Option<Vec<HeadChoice>>, num_kv_heads: usize, all: &Range<u32>) -> Vec<HeadSummary> {
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
fn check_kept(num_kv_heads: usize, range: &Range<u32>, heads: &[HeadSummary]) -> Result<()> {
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

fn as_position(position: usize) -> Result<u32> {
    u32::try_from(position).map_err(|_| Error::shape("a position", "below 2^32", position))
}
