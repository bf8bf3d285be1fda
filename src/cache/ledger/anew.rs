//! What was decided about once, decided about anew: rows that compete with what comes, and rows that move together.

use super::worths::Worths;
use super::{HeadPlan, Ledger, Plan, Positions, as_position};
use crate::compress::{Candidates, HeadChoice};
use crate::error::{Error, Result};

impl Ledger {
    /// What each head holds of the first tokens, with the scores of when it was kept, `[num_kv_heads]`; a row without one has
    /// 0.
    ///
    /// * `before`: the first position that is not asked for
    #[must_use]
    pub fn candidates(&self, before: usize) -> Vec<Candidates> {
        let head = |kv_head: usize| {
            let worths = self.worths.of(kv_head).into_iter().chain(std::iter::repeat(0.0));
            let rows = self.positions.of(kv_head, self.seen).zip(worths);
            let mut rows: Candidates = rows.filter(|&(position, _)| (position as usize) < before).collect();
            rows.sort_unstable_by_key(|&(position, _)| position); // those that left a window went one by one
            rows
        };
        (0..self.layout.num_kv_heads).map(head).collect()
    }

    /// Takes down the scores of what is held after a prompt, all of which was judged.
    ///
    /// * `heads`: `[num_kv_heads]` the rows that are held, in their order
    ///
    /// # Errors
    /// [`Error::Shape`] if they are others.
    pub fn judged(&mut self, heads: &[Candidates]) -> Result<()> {
        let lens: Vec<usize> = heads.iter().map(Vec::len).collect();
        if lens != self.lens() {
            return Err(Error::shape("rows that were judged", self.lens(), lens));
        }
        // Rows that leave a window are not in the order of positions.
        if self.window.is_none() {
            self.worths = Worths::new(heads.iter().map(Vec::as_slice));
        }
        Ok(())
    }

    /// As [`plan_prompt`](Self::plan_prompt), where what was kept earlier is decided about, too: what is not chosen of it goes.
    ///
    /// # Errors
    /// As [`plan_prompt`](Self::plan_prompt).
    pub fn plan_anew(&self, prompt_len: usize, choices: Vec<HeadChoice>) -> Result<Plan> {
        self.plan(0, self.seen + prompt_len, Some(choices))
    }

    /// What becomes of the rows if the newest tokens were never there, which no prompt has decided about.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there are not as many, heads go on evicting, or rows leave a sliding window.
    pub fn plan_without(&self, count: usize) -> Result<Plan> {
        self.expect_undecided(count)?;
        let seen = self.seen - count;
        let stay = |kv_head: usize| {
            let positions = self.positions.of(kv_head, self.seen).enumerate();
            positions.filter(|&(_, position)| (position as usize) < seen).map(|(row, _)| row).collect()
        };
        let heads = (0..self.layout.num_kv_heads).map(|kv_head| HeadPlan { stay: stay(kv_head), prompt: Vec::new() });
        Ok(Plan { heads: heads.collect(), decided: 0..0, summaries: Vec::new(), seen })
    }

    /// Takes down that such a plan has been carried out.
    pub(in crate::cache) fn forget(&mut self, plan: &Plan) {
        self.positions.take_back(self.seen - plan.seen, self.seen);
        self.seen = plan.seen;
    }

    pub(super) fn expect_undecided(&self, count: usize) -> Result<()> {
        if self.is_watched() || self.seen - self.settled < count || self.first_in_window(self.seen) > 0 {
            return Err(Error::unsupported("taking tokens back of which it was decided what stays"));
        }
        Ok(())
    }

    /// Rows of the first tokens that a head holds.
    ///
    /// * `first`: how many tokens these are
    pub(in crate::cache) fn num_first(&self, kv_head: usize, first: usize) -> usize {
        self.positions.of(kv_head, self.seen).filter(|&position| (position as usize) < first).count()
    }

    /// Takes down that less is decided about than was said.
    pub(in crate::cache) fn unsettle(&mut self, settled: usize) {
        self.settled = self.settled.min(settled);
    }

    /// Gives the rows positions that follow one another without gaps, in their order, up to the newest token's. The first
    /// tokens stay where they are.
    ///
    /// * `pinned`: how many these are
    /// * `seen`: how many positions are taken then, at least these and as many as any head has other rows
    ///
    /// Returns by how many positions each row moves, `[num_kv_heads]` of `[rows]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if heads go on evicting; [`Error::Shape`] if there are too few positions.
    pub fn renumber(&mut self, pinned: usize, seen: usize) -> Result<Vec<Vec<i64>>> {
        if self.is_watched() {
            return Err(Error::unsupported("moving rows to other positions where heads go on evicting"));
        }
        let lens = self.lens();
        let undecided = self.seen - self.settled;
        let of_first = |kv_head: usize| self.num_first(kv_head, pinned);
        let others = (0..lens.len()).map(|kv_head| lens[kv_head] - of_first(kv_head)).max().unwrap_or(0);
        if seen < pinned || seen - pinned < others || as_position(seen).is_err() {
            return Err(Error::shape("positions for a layer's rows", seen, lens));
        }
        let mut moves = Vec::with_capacity(lens.len());
        let mut positions = Vec::with_capacity(lens.len());
        for (kv_head, &len) in lens.iter().enumerate() {
            let mut order: Vec<(u32, usize)> = self.positions.of(kv_head, self.seen).zip(0..).collect();
            order.sort_unstable(); // rows that left a window went one by one
            let (mut own, mut moved) = (vec![0; len], vec![0; len]);
            let first = self.num_first(kv_head, pinned);
            let new: Vec<usize> =
                order[..first].iter().map(|&(old, _)| old as usize).chain(seen - (len - first)..seen).collect();
            for (&(old, row), new) in order.iter().zip(new) {
                own[row] = as_position(new)?;
                moved[row] = i64::from(own[row]) - i64::from(old);
            }
            positions.push(own);
            moves.push(moved);
        }
        self.positions = Positions::own(positions);
        // Of those that a window has passed, nothing is left.
        (self.settled, self.seen) = (seen.saturating_sub(undecided), seen);
        Ok(moves)
    }
}
