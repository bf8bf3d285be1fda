//! One layer's cache: its books, and the rows that they are about.

use std::borrow::Cow;
use std::fmt;

use super::eviction::HeadStep;
use super::ledger::{Ledger, NOTE_BYTES, Plan};
use super::summary::LayerSummary;
use super::{CacheBytes, KvDtype};
use crate::arch::HeadLayout;
use crate::attention::refit::Answers;
use crate::compress::{Candidates, Eviction, HeadChoice, Segment};
use crate::error::{Error, Result};
use crate::records::{Sink, Source};

/// Keys and values of one layer, as a backend holds them: what carries out the plans of a [`Ledger`].
pub trait Rows: fmt::Debug + Clone + Send + Sync + 'static {
    /// Full keys and values of a prompt, behind copies of what every head holds.
    type Prompt;

    /// No rows, of the same kind.
    #[must_use]
    fn emptied(&self) -> Self;

    /// The heads that rows are of.
    fn layout(&self) -> HeadLayout;

    /// The numbers that rows are stored in.
    fn dtype(&self) -> KvDtype;

    /// Bytes of the rows that are held.
    ///
    /// * `num_rows`: how many
    fn held_bytes(&self, num_rows: usize) -> usize {
        num_rows * self.dtype().token_bytes(self.layout().head_dim)
    }

    /// Bytes that are allocated for rows, slack included; what is shared with a clone is counted in both, and what lies in
    /// a mapped file in neither.
    fn allocated(&self) -> usize;

    /// Bytes of rows that lie in a mapped file.
    fn mapped(&self) -> usize {
        0
    }

    /// Tokens of a prompt, and the rows before them, `[num_kv_heads]`.
    fn prompt_lens(&self, prompt: &Self::Prompt) -> (usize, Vec<usize>);

    /// Carries out a plan. What is allocated is then exactly what is kept.
    ///
    /// * `ledger`: as it was when the plan was made
    /// * `prompt`: where the plan's rows of a prompt are; `None` if it has none
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device refuses; nothing has changed then.
    fn carry_out(&mut self, ledger: &Ledger, plan: &Plan, prompt: Option<&Self::Prompt>) -> Result<()>;

    /// Whether values can be [fitted](Self::refit).
    #[must_use]
    fn can_refit() -> bool {
        false
    }

    /// Fits the values of all rows, which a prompt has left, to what was read of all keys.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where that [can't be done](Self::can_refit); else as [`Answers::fitted_values`].
    fn refit(&mut self, _answers: &Answers) -> Result<()> {
        Err(Error::unsupported("fitting values where they are stored"))
    }

    /// Bytes that a head takes whatever it holds.
    #[must_use]
    fn head_bytes(&self) -> usize {
        0
    }

    /// Rows that can be added to every head before anything must grow.
    #[must_use]
    fn spare(&self) -> usize {
        usize::MAX
    }

    /// Bytes that the next row of every head may let it grow by.
    #[must_use]
    fn growth_bytes(&self) -> usize {
        0
    }

    /// Makes room for exactly so many rows more in every head, and gives back what is allocated beyond.
    fn make_room(&mut self, _rows: usize) {}

    /// Turns the keys of all rows to other positions.
    ///
    /// * `turn`: turns one head's rotated keys, `[rows, head_dim]`
    ///
    /// # Errors
    /// [`Error::Unsupported`] where keys can't be turned.
    fn turn_keys(&mut self, _turn: &(dyn Fn(usize, &mut [f32]) + Sync)) -> Result<()> {
        Err(Error::unsupported("moving keys to other positions where they are stored")
            .with_hint("use --backend kernels"))
    }

    /// Whether rows can be [saved](Self::save).
    #[must_use]
    fn can_save() -> bool {
        false
    }

    /// Writes all rows as they are stored, where that [can be done](Self::can_save).
    fn save(&self, _sink: &mut Sink<'_>) {}

    /// Takes rows that were saved, where they lie in the file.
    ///
    /// * `lens`: `[num_kv_heads]` rows of each head
    ///
    /// # Errors
    /// [`Error::BadFile`] if there are not as many; [`Error::Unsupported`] where they can't be [saved](Self::can_save).
    fn load(&mut self, _lens: &[usize], _source: &mut Source) -> Result<()> {
        Err(Error::unsupported("a saved cache where its rows are to be stored"))
    }

    /// Lets rows go one by one, the last row each time in the place of the one that goes.
    ///
    /// * `ledger`: in which they are gone already
    /// * `steps`: `[num_kv_heads]` which rows of each head
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device refuses.
    fn evict(&mut self, ledger: &Ledger, steps: &[HeadStep]) -> Result<()>;
}

/// One layer's books and its rows.
#[derive(Debug, Clone)]
pub struct CacheLayer<R> {
    ledger: Ledger,
    rows: R,
}

impl<R: Rows> CacheLayer<R> {
    /// An empty layer.
    ///
    /// * `layer`: its index
    /// * `rows`: an empty one
    pub(super) fn new(layer: usize, rows: &R) -> Self {
        Self { ledger: Ledger::new(layer, rows.layout()), rows: rows.emptied() }
    }

    pub(super) fn emptied(&self) -> Self {
        Self::new(self.ledger.layer(), &self.rows).limited_to(self.ledger.window())
    }

    /// Lets rows go that no later token looks at.
    pub(super) fn limited_to(mut self, window: Option<usize>) -> Self {
        self.ledger.limit_to(window);
        self
    }

    /// What is known of the rows without looking at them.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// `[num_kv_heads]` positions that each head holds, see [`Ledger::positions`].
    #[must_use]
    pub fn positions(&self) -> Cow<'_, [Vec<u32>]> {
        self.ledger.positions()
    }

    /// The rows.
    #[must_use]
    pub fn rows(&self) -> &R {
        &self.rows
    }

    /// The books, and the rows to write to: a backend adds a row to each head, then the [books](Ledger::advance) follow.
    pub fn parts_mut(&mut self) -> (&mut Ledger, &mut R) {
        (&mut self.ledger, &mut self.rows)
    }

    /// The numbers that rows are stored in.
    #[must_use]
    pub fn dtype(&self) -> KvDtype {
        self.rows.dtype()
    }

    /// Bytes of one stored key and its value that a prompt leaves.
    #[must_use]
    pub fn token_bytes(&self) -> usize {
        self.rows.dtype().token_bytes(self.rows.layout().head_dim)
    }

    /// Bytes that what is held needs without any slack, and those of one token more that all heads keep.
    pub(super) fn needed(&self) -> (usize, usize) {
        let HeadLayout { num_kv_heads, head_dim, .. } = self.rows.layout();
        let num_rows = self.ledger.num_rows();
        let held = self.rows.held_bytes(num_rows) + num_rows * NOTE_BYTES + num_kv_heads * self.rows.head_bytes();
        (held, num_kv_heads * (self.rows.dtype().newest().token_bytes(head_dim) + NOTE_BYTES))
    }

    /// Bytes of this layer.
    #[must_use]
    pub fn bytes(&self) -> CacheBytes {
        let HeadLayout { num_kv_heads, head_dim, .. } = self.rows.layout();
        let newest = self.rows.dtype().newest().token_bytes(head_dim);
        let settled = self.ledger.settled();
        CacheBytes {
            raw: num_kv_heads * (settled * self.token_bytes() + (self.ledger.seen() - settled) * newest),
            kept: self.rows.held_bytes(self.ledger.num_rows()),
            allocated: self.rows.allocated() + self.ledger.allocated(),
            mapped: self.rows.mapped(),
        }
    }

    /// Stores what was chosen of a prompt's keys and values, see [`Ledger::plan_prompt`]. Keys must already be rotated:
    /// positions are fixed here, and change only where rows [move together](Ledger::renumber).
    ///
    /// * `prompt`: behind what every head holds now
    /// * `choices`: one for each KV head, in order; `None` keeps everything
    ///
    /// # Errors
    /// [`Error::Shape`] if head counts, rows or positions do not fit, [`Error::Tensor`] if a device refuses; nothing is
    /// stored then.
    pub fn store_prompt(&mut self, prompt: &R::Prompt, choices: Option<Vec<HeadChoice>>) -> Result<LayerSummary> {
        let (prompt_len, past_lens) = self.rows.prompt_lens(prompt);
        let held = self.ledger.lens();
        if past_lens != held {
            return Err(Error::shape("the rows before a prompt", held, past_lens));
        }
        let plan = self.ledger.plan_prompt(prompt_len, choices)?;
        self.rows.carry_out(&self.ledger, &plan, Some(prompt))?;
        Ok(self.settle(plan))
    }

    /// As [`store_prompt`](Self::store_prompt), where what was kept earlier is decided about, too, see [`Ledger::plan_anew`].
    ///
    /// # Errors
    /// As [`store_prompt`](Self::store_prompt).
    pub fn store_anew(&mut self, prompt: &R::Prompt, choices: Vec<HeadChoice>) -> Result<LayerSummary> {
        let plan = self.ledger.plan_anew(self.rows.prompt_lens(prompt).0, choices)?;
        self.rows.carry_out(&self.ledger, &plan, Some(prompt))?;
        Ok(self.settle(plan))
    }

    /// Takes down the scores of all that is held, see [`Ledger::judged`].
    ///
    /// # Errors
    /// As [`Ledger::judged`].
    pub fn judged(&mut self, heads: &[Candidates]) -> Result<()> {
        self.ledger.judged(heads)
    }

    /// Lets the newest tokens go, as if they had never come, see [`Ledger::plan_without`].
    ///
    /// # Errors
    /// As [`Ledger::plan_without`]; [`Error::Tensor`] if a device refuses.
    pub(super) fn forget(&mut self, count: usize) -> Result<()> {
        let plan = self.ledger.plan_without(count)?;
        self.rows.carry_out(&self.ledger, &plan, None)?;
        self.ledger.forget(&plan);
        Ok(())
    }

    /// Keeps some of what is held, whoever decided about it.
    ///
    /// * `heads`: `[num_kv_heads]`
    /// * `settled`: tokens that count as decided about; all heads keep those behind them
    ///
    /// # Errors
    /// As [`keep_of_prompt`](Self::keep_of_prompt).
    pub(crate) fn keep_some(&mut self, heads: &[Candidates], settled: usize) -> Result<()> {
        self.keep_of_prompt(0, HeadChoice::of_candidates(heads))?;
        self.ledger.judged(heads)?;
        self.ledger.unsettle(settled);
        Ok(())
    }

    /// Positions that a layer needs when what it holds moves together: those of the first tokens, and one for each other row of
    /// the head that holds most.
    ///
    /// * `pinned`: the first tokens, which stay where they are
    pub(crate) fn positions_together(&self, pinned: usize) -> usize {
        let others = |(kv_head, len): (usize, usize)| len - self.ledger.num_first(kv_head, pinned);
        pinned + self.ledger.lens().into_iter().enumerate().map(others).max().unwrap_or(0)
    }

    /// Moves what is held together, see [`Ledger::renumber`].
    ///
    /// * `turn`: turns a rotated key, `[head_dim]`, by so many positions
    ///
    /// # Errors
    /// As [`Ledger::renumber`] and [`Rows::turn_keys`].
    pub(crate) fn renumber(
        &mut self,
        (pinned, seen): (usize, usize),
        turn: &(dyn Fn(i64, &mut [f32]) + Sync),
    ) -> Result<()> {
        let head_dim = self.rows.layout().head_dim;
        let moves = self.ledger.clone().renumber(pinned, seen)?;
        self.rows.turn_keys(&|kv_head, keys| {
            for (key, &by) in keys.chunks_exact_mut(head_dim).zip(&moves[kv_head]) {
                turn(by, key);
            }
        })?;
        self.ledger.renumber(pinned, seen).map(drop)
    }

    /// Evicts more of the last prompt that was stored, see [`Ledger::plan_less`].
    ///
    /// # Errors
    /// As [`store_prompt`](Self::store_prompt).
    pub fn keep_of_prompt(&mut self, first_position: usize, choices: Vec<HeadChoice>) -> Result<LayerSummary> {
        let plan = self.ledger.plan_less(first_position, choices)?;
        if plan.heads.iter().map(|head| head.stay.len()).ne(self.ledger.lens()) {
            self.rows.carry_out(&self.ledger, &plan, None)?;
        }
        Ok(self.settle(plan))
    }

    /// Writes the layer.
    pub(super) fn save(&self, sink: &mut Sink<'_>) {
        self.ledger.save(sink);
        self.rows.save(sink);
    }

    /// Takes in what was written, in an empty layer.
    ///
    /// * `tokens`: those that were given, and of these the last, which no profile has decided about
    ///
    /// # Errors
    /// As [`Ledger::load`] and [`Rows::load`].
    pub(super) fn load(
        &mut self,
        tokens: (usize, usize),
        eviction: Option<&Eviction>,
        mut source: Source,
    ) -> Result<()> {
        self.ledger.load(tokens, eviction, &mut source)?;
        self.rows.load(&self.ledger.lens(), &mut source)?;
        source.expect_end()
    }

    fn settle(&mut self, plan: Plan) -> LayerSummary {
        let (prompt_len, heads) = self.ledger.settle(plan);
        LayerSummary { layer: self.ledger.layer(), prompt_len, heads, bytes: self.bytes() }
    }

    /// Fits the values that are kept of the last prompt, see [`Rows::refit`].
    ///
    /// # Errors
    /// As [`Rows::refit`].
    pub fn refit(&mut self, answers: &Answers) -> Result<()> {
        self.rows.refit(answers)
    }

    /// Makes heads go on evicting while tokens are generated, see [`Ledger::watch`]. Until the next prompt, each token's
    /// attention is followed by [`evict`](Self::evict).
    ///
    /// # Errors
    /// As [`Ledger::watch`].
    pub fn watch(
        &mut self,
        eviction: &Eviction,
        segment: Segment<'_>,
        summary: &LayerSummary,
        received: &[Vec<f32>],
    ) -> Result<()> {
        self.ledger.watch(eviction, segment, summary, received)
    }

    /// Evicts, after the newest token's attention, what no longer belongs to what each head keeps.
    ///
    /// * `steps`: `[num_kv_heads]`, of which each head that evicts has [decided](Ledger::decide)
    ///
    /// # Errors
    /// As [`Rows::evict`].
    ///
    /// # Panics
    /// As [`Ledger::decide`].
    pub fn evict(&mut self, steps: &mut [HeadStep]) -> Result<()> {
        self.ledger.evict(steps);
        if steps.iter().any(|step| !step.evicted().is_empty()) {
            self.rows.evict(&self.ledger, steps)?;
        }
        Ok(())
    }
}
