//! A step of the sequences under way: each gets its pending token, and draws the next.
//!
//! Several go through the weights together. One that is alone shares them with its own guesses instead.

use super::reading::LastStep;
use super::{Active, Batch, Caller};
use crate::error::Result;
use crate::generate::draft::Drafts;

impl Batch<'_> {
    /// Gives every sequence its pending token and draws the next; tells of the texts that end with it.
    pub(super) fn step(&mut self, caller: &mut Caller<'_>) -> Result<()> {
        caller.ask()?;
        let started = self.clock.now();
        let count = self.active.len();
        if count == 1 {
            self.step_alone()?;
        } else {
            self.step_together()?;
        }
        let finished: Vec<_> = (0..count).rev().filter_map(|index| self.finish(index)).collect();
        let ended = self.clock.now();
        self.last_step = LastStep { ended, took: ended.saturating_sub(started) };
        self.summary.decode_time += self.last_step.took;
        self.summary.decoded_tokens += count;
        finished.into_iter().for_each(&mut *caller.done);
        Ok(())
    }

    fn step_together(&mut self) -> Result<()> {
        let mut ids = Vec::with_capacity(self.active.len());
        let mut caches = Vec::with_capacity(self.active.len());
        for active in &mut self.active {
            if let Some(mut drafts) = active.drafts.take() {
                drafts.take_back(self.model, &mut active.cache)?;
            }
            self.model.make_room(&mut active.cache, 1, self.prefill_options, &mut ())?;
            ids.extend(active.sequence.take_pending());
            caches.push(&mut active.cache);
        }
        let mut logits = std::mem::take(&mut self.logits);
        self.model.decode_unchecked(&ids, &mut caches, &mut logits)?;
        self.note_bytes();
        let vocab_size = logits.len() / ids.len();
        for (index, logits) in logits.chunks_exact(vocab_size).enumerate() {
            self.accept(index, logits)?;
        }
        self.logits = logits;
        Ok(())
    }

    /// The step of a sequence that shares the weights with no other: it may guess.
    fn step_alone(&mut self) -> Result<()> {
        let model = self.model;
        let Some(active) = self.active.first_mut() else { return Ok(()) };
        let Active { cache, sequence, drafts, .. } = active;
        let mut drafts = drafts.take().unwrap_or_else(|| {
            Drafts::new(sequence.drafter(model, cache.retention()), std::mem::take(&mut self.logits))
        });
        let before = drafts.counts();
        if let Some(id) = sequence.take_pending() {
            drafts.make_room(model, cache)?;
            drafts.give(model, cache, id, sequence.most_guesses(model.room(cache)))?;
        }
        self.summary.drafts += drafts.counts().since(before);
        active.accept(drafts.logits(), model, drafts.ahead())?;
        active.drafts = Some(drafts);
        self.note_bytes();
        Ok(())
    }
}
