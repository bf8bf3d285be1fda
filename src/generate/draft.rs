//! Guesses from the text (prompt-lookup decoding): what followed the last time the text stood at the same tokens is
//! guessed to follow again, and several guesses are checked in one pass over the weights.
//!
//! A guess is taken only if it is the token that is drawn anyhow, from the scores that decoding gives bit by bit: the
//! text is the one that would be generated without guesses. Rows of guesses that fail leave the cache.
//!
//! Not for: telling how likely guesses are (see [`confidence`]), or finding them (see [`index`]).

mod confidence;
mod index;

use serde::Serialize;

use self::confidence::Confidence;
use self::index::TextIndex;
use crate::cache::{AdaptiveKvCache, Retention};
use crate::error::Result;
use crate::model::{Llama, PrefillOptions};

/// The most guesses of a pass. Products with quantised weights take four rows of activations at a time: a fifth costs nearly
/// as much as all before it (`cargo bench --bench runs`: 1.8 passes of one row for 4 rows, 2.7 for 5 and 3.5 for 8 on
/// SmolLM2-135M in `Q4_1`; 1.4, 2.4 and 2.9 at the size of 1.5B in `Q4_K_M`).
const MAX_GUESSES: usize = 3;

/// How likely a guess must be to be made: as likely as what one of these rows more costs, as a share of a pass of one row.
/// Found as above: 0.26 for SmolLM2 in `Q4_1`, which computing holds up, and 0.28 in f16; 0.15 for 1.5B in `Q4_K_M`, which
/// reading does.
const MIN_CHANCE: f32 = 0.3;

/// Whether tokens are guessed from the text. The text is the same either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Draft {
    /// Where guesses have come true so far, unless there is an [obstacle](Self::obstacle).
    #[default]
    Auto,
    /// Never.
    Off,
}

impl Draft {
    /// Why nothing is guessed; `None` if guesses may be made.
    #[must_use]
    pub fn obstacle(self, model: &Llama, retention: &Retention) -> Option<&'static str> {
        match self {
            Self::Off => Some("off"),
            Self::Auto if !model.decodes_runs() => Some("this backend decodes one token at a time"),
            Self::Auto if retention.eviction().is_some() => Some("heads go on evicting while tokens are generated"),
            Self::Auto => None,
        }
    }
}

/// What became of guesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct DraftCounts {
    /// Tokens that were guessed and checked.
    pub drafted: usize,
    /// Those of them that came true.
    pub accepted: usize,
}

impl DraftCounts {
    /// What was added to `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self { drafted: self.drafted - before.drafted, accepted: self.accepted - before.accepted }
    }
}

impl std::ops::AddAssign for DraftCounts {
    fn add_assign(&mut self, other: Self) {
        self.drafted += other.drafted;
        self.accepted += other.accepted;
    }
}

/// Guesses what comes next in a text.
#[derive(Debug)]
pub(super) struct Drafter {
    index: TextIndex,
    confidence: Confidence,
}

impl Drafter {
    /// * `text`: so far
    pub fn new(text: &[u32]) -> Self {
        let mut index = TextIndex::default();
        for &id in text {
            index.push(id);
        }
        Self { index, confidence: Confidence::default() }
    }

    /// Takes in the token that came next, and learns from it, whether it was among the guesses or not.
    fn push(&mut self, id: u32) {
        if let Some((length, guess)) = self.index.guess(0) {
            self.confidence.note(length, guess == id);
        }
        self.index.push(id);
    }

    /// Adds guesses of the tokens that come next to `ids`: as many as are likely enough.
    fn guess(&self, most: usize, ids: &mut Vec<u32>) {
        let mut likely = 1.0;
        for ahead in 0..most.min(MAX_GUESSES) {
            let Some((length, guess)) = self.index.guess(ahead) else { return };
            likely *= self.confidence.of(length);
            if likely < MIN_CHANCE {
                return;
            }
            ids.push(guess);
        }
    }
}

/// The scores that a text's next token is drawn from, and what a cache holds beyond the text.
#[derive(Debug)]
pub(super) struct Drafts {
    /// `None` if nothing is guessed.
    drafter: Option<Drafter>,
    /// Tokens of the last pass: one of the text, and guesses. Empty before the first.
    ids: Vec<u32>,
    /// Up to which of them the text has come.
    reached: usize,
    /// `[ids, vocab_size]`, or `[vocab_size]` before the first pass.
    logits: Vec<f32>,
    counts: DraftCounts,
}

impl Drafts {
    /// * `logits`: `[vocab_size]`, of the text's next token
    pub fn new(drafter: Option<Drafter>, logits: Vec<f32>) -> Self {
        Self { drafter, ids: Vec::new(), reached: 0, logits, counts: DraftCounts::default() }
    }

    /// What became of guesses so far.
    pub fn counts(&self) -> DraftCounts {
        self.counts
    }

    /// `[vocab_size]` scores that the next token is drawn from.
    pub fn logits(&self) -> &[f32] {
        let vocab_size = self.logits.len() / self.ids.len().max(1);
        &self.logits[self.reached * vocab_size..][..vocab_size]
    }

    /// How many tokens the cache holds beyond the text.
    pub fn ahead(&self) -> usize {
        self.ids.len().saturating_sub(self.reached + 1)
    }

    /// Makes room for the text's next token, see [`Llama::make_room`]. Guesses go, if it needs any.
    ///
    /// # Errors
    /// As [`Llama::make_room`].
    pub fn make_room(&mut self, model: &Llama, cache: &mut AdaptiveKvCache) -> Result<()> {
        if model.room(cache) == 0 && model.goes_on(cache, self.ahead()) {
            self.take_back(model, cache)?;
        }
        model.make_room(cache, 1, PrefillOptions::default(), &mut ())
    }

    /// Gives the model the text's next token, unless the cache holds it as a guess already.
    ///
    /// * `cache`: always the same
    /// * `most`: guesses after the token that could be of use; with it they fit into the context
    ///
    /// # Errors
    /// As [`Llama::decode`]; scores are not looked at.
    pub fn give(&mut self, model: &Llama, cache: &mut AdaptiveKvCache, id: u32, most: usize) -> Result<()> {
        if let Some(drafter) = &mut self.drafter {
            drafter.push(id);
        }
        if self.ids.get(self.reached + 1) == Some(&id) {
            self.reached += 1;
            self.counts.accepted += 1;
            return Ok(());
        }
        self.take_back(model, cache)?;
        self.reached = 0;
        self.ids.clear();
        let mut ids = vec![id];
        if let Some(drafter) = &self.drafter {
            // With the token before them.
            let most = most.min(model.longest_run(cache.seen()).saturating_sub(1));
            drafter.guess(most, &mut ids);
        }
        if ids.len() == 1 {
            model.decode_unchecked(&ids, &mut [cache], &mut self.logits)?;
        } else {
            model.decode_run(&ids, cache, &mut self.logits)?;
            self.counts.drafted += ids.len() - 1;
        }
        self.ids = ids;
        Ok(())
    }

    /// Lets go what the cache holds beyond the text.
    ///
    /// # Errors
    /// As [`Llama::take_back`].
    pub fn take_back(&mut self, model: &Llama, cache: &mut AdaptiveKvCache) -> Result<()> {
        let ahead = self.ahead();
        if ahead > 0 {
            let vocab_size = self.logits.len() / self.ids.len();
            self.ids.truncate(self.reached + 1);
            self.logits.truncate(self.ids.len() * vocab_size);
            model.take_back(ahead, cache)?;
        }
        Ok(())
    }
}
