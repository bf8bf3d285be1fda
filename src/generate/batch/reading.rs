//! Reading a prompt while others go on: time is shared between the prompt and the sequences that are under way.
//!
//! A prompt goes through a layer in chunks, and after each of them the others may take a step. Not for: what a step does.

use std::ops::ControlFlow;
use std::time::Duration;

use super::{Batch, Caller};
use crate::attention::map::MapAccumulator;
use crate::cache::LayerSummary;
use crate::error::{Error, Result};
use crate::model::PrefillObserver;

/// Time that prompts are read between two steps of the sequences under way, as a multiple of what the last step took. So at
/// most a fifth of the time goes into steps, and between two tokens of a text lie some five steps' time, or a chunk's in one
/// layer if that is longer.
const READING_PER_STEP: u32 = 4;

/// When the sequences under way took their last step.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LastStep {
    /// When it ended, by the batch's clock.
    pub ended: Duration,
    /// How long it took.
    pub took: Duration,
}

impl LastStep {
    /// Whether enough was read since.
    fn is_long_ago(self, now: Duration) -> bool {
        now.saturating_sub(self.ended) >= self.took.saturating_mul(READING_PER_STEP)
    }
}

/// Lets the sequences under way take steps, and the caller watch, while a prompt is read.
pub(super) struct Reading<'r, 'a, 'c, O> {
    batch: &'r mut Batch<'a>,
    caller: &'r mut Caller<'c>,
    observer: O,
    /// Time that went into the others' steps.
    lent: Duration,
    /// What a step failed with.
    failure: Option<Error>,
}

impl<'r, 'a, 'c, O> Reading<'r, 'a, 'c, O> {
    pub fn new(batch: &'r mut Batch<'a>, caller: &'r mut Caller<'c>, observer: O) -> Self {
        Self { batch, caller, observer, lent: Duration::ZERO, failure: None }
    }

    /// The time that went into steps of other sequences.
    ///
    /// # Errors
    /// What one of them failed with.
    pub fn end(self) -> Result<Duration> {
        self.failure.map_or(Ok(self.lent), Err)
    }

    /// A step of the others, if it is their turn.
    fn share(&mut self) -> Result<()> {
        if self.batch.active.is_empty() {
            return Ok(());
        }
        let started = self.batch.clock.now();
        if !self.batch.last_step.is_long_ago(started) {
            return Ok(());
        }
        self.batch.step(self.caller)?;
        self.lent += self.batch.clock.now().saturating_sub(started);
        Ok(())
    }
}

impl<O: PrefillObserver> PrefillObserver for Reading<'_, '_, '_, O> {
    fn progress(&mut self, done: usize, total: usize) -> ControlFlow<()> {
        self.observer.progress(done, total)?;
        if let Err(error) = self.share() {
            self.failure = Some(error);
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    fn map_side(&self) -> Option<usize> {
        self.observer.map_side()
    }

    fn layer_done(&mut self, summary: &LayerSummary, maps: Option<&MapAccumulator>) -> Result<()> {
        self.observer.layer_done(summary, maps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_due_when_it_is_a_fifth_of_the_time() {
        let millis = Duration::from_millis;
        let last = LastStep { ended: millis(100), took: millis(10) };
        assert!(!last.is_long_ago(millis(100)) && !last.is_long_ago(millis(139)));
        assert!(last.is_long_ago(millis(140)));
        // A clock that goes back, a step that never ended: no overflow.
        assert!(!last.is_long_ago(Duration::ZERO));
        assert!(!LastStep { ended: Duration::ZERO, took: Duration::MAX }.is_long_ago(millis(1)));
        assert!(LastStep::default().is_long_ago(Duration::ZERO), "the first step is not waited with");
    }
}
