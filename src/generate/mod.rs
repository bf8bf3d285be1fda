//! The generation loop: an iterator of tokens over a model and a filled cache.
//!
//! ```no_run
//! use adaptive_kvcache::cache::{KvDtype, Retention};
//! use adaptive_kvcache::checkpoint::{WeightDtype, load};
//! use adaptive_kvcache::generate::{Generation, GenerationOptions};
//!
//! # fn main() -> adaptive_kvcache::Result<()> {
//! let loaded = load("model.gguf", WeightDtype::Auto)?;
//! let ids = loaded.tokenizer.encode("The Reform Club was founded in")?;
//! let mut cache = loaded.model.new_cache(KvDtype::F16, Retention::Full)?;
//! let prefill = loaded.model.prefill(&ids, &mut cache, &mut ())?;
//! let options = GenerationOptions { max_new_tokens: 16, ..GenerationOptions::default() };
//! for step in Generation::new(&loaded.model, &loaded.tokenizer, &mut cache, &ids, prefill.logits, options) {
//!     let text: String = step?.text; // complete characters only
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Not for: processing the prompt (see [`Llama::prefill`]) or showing text.

mod batch;
mod conversation;
mod draft;
mod sampling;
mod sequence;
mod stop;

use serde::Serialize;

use crate::cache::AdaptiveKvCache;
use crate::error::Result;
use crate::model::Llama;
use crate::numbers::check_logits;
use crate::tokenizer::Tokenizer;
use draft::Drafts;
use sequence::Sequence;

pub use batch::{Batch, BatchLimits, BatchPrompt, BatchSummary, FinishedText};
pub use conversation::{Conversation, Turn};
pub use draft::{Draft, DraftCounts};
pub use sampling::{Sampler, SamplingOptions};
pub use stop::StopFilter;

/// How far to generate, and how tokens are drawn.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerationOptions {
    /// The most tokens to generate; default 128.
    pub max_new_tokens: usize,
    /// How tokens are drawn; default greedy.
    pub sampling: SamplingOptions,
    /// Texts at which generation ends; they are not part of the result.
    pub stop: Vec<String>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Whether tokens are guessed from the text, which may be faster and changes nothing else; default
    /// [`Auto`](Draft::Auto).
    pub draft: Draft,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            sampling: SamplingOptions::default(),
            stop: Vec::new(),
            ignore_eos: false,
            draft: Draft::default(),
        }
    }
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model ended its text.
    Eos,
    /// The most tokens were generated.
    Length,
    /// The model's context is full: the text is cut where it ends, if it does not [move on](crate::cache::Overflow).
    Context,
    /// A stop text was met.
    Stop,
    /// The caller stopped asking.
    Interrupted,
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The token; `None` for the last step, which only brings text that was held back.
    pub id: Option<u32>,
    /// Text that became certain: complete characters, no part of a stop text.
    pub text: String,
}

/// Generates tokens, one for each call of `next`. A [stop](crate::stop) in the middle of a token is
/// [`Error::Interrupted`](crate::Error::Interrupted); the cache is then of no further use.
///
/// While it generates, the cache may hold [guesses](Draft) beyond the text; when it is dropped, they are gone.
///
/// A cache that reaches its budget in bytes, or the end of the context where it is to move on, is [made room
/// in](Llama::make_room).
#[derive(Debug)]
pub struct Generation<'a> {
    source: Source<'a>,
    sequence: Sequence<'a>,
    /// Nothing comes after an error.
    failed: bool,
}

/// Where scores come from.
#[derive(Debug)]
struct Source<'a> {
    model: &'a Llama,
    cache: &'a mut AdaptiveKvCache,
    drafts: Drafts,
}

impl Drop for Source<'_> {
    fn drop(&mut self) {
        // Guesses are there only if they can be taken back.
        let _ = self.drafts.take_back(self.model, self.cache);
    }
}

impl<'a> Generation<'a> {
    /// Starts after a prefill.
    ///
    /// * `prompt`: the prompt's ids, for the repeat penalty
    /// * `logits`: `[vocab_size]`, of the token after the prompt
    #[must_use]
    pub fn new(
        model: &'a Llama,
        tokenizer: &'a Tokenizer,
        cache: &'a mut AdaptiveKvCache,
        prompt: &[u32],
        logits: Vec<f32>,
        options: GenerationOptions,
    ) -> Self {
        Self::with_sampler(model, tokenizer, cache, Sampler::new(options.sampling, prompt), logits, options)
    }

    /// As [`new`](Self::new), with a sampler that has drawn before; what `options` say of sampling counts for nothing.
    fn with_sampler(
        model: &'a Llama,
        tokenizer: &'a Tokenizer,
        cache: &'a mut AdaptiveKvCache,
        sampler: Sampler,
        logits: Vec<f32>,
        options: GenerationOptions,
    ) -> Self {
        let sequence = Sequence::new(tokenizer, sampler, options);
        let drafts = Drafts::new(sequence.drafter(model, cache.retention()), logits);
        Self { source: Source { model, cache, drafts }, sequence, failed: false }
    }

    /// What draws its tokens, for a text that goes on with it.
    fn into_sampler(self) -> Sampler {
        self.sequence.into_sampler()
    }

    /// Tokens generated so far.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        self.sequence.ids()
    }

    /// Why generation ended; [`FinishReason::Interrupted`] as long as it has not.
    #[must_use]
    pub fn finish_reason(&self) -> FinishReason {
        self.sequence.finish().unwrap_or(FinishReason::Interrupted)
    }

    /// `[vocab_size]` logits from which the next token is drawn.
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        self.source.drafts.logits()
    }

    /// What became of guesses so far; none were made if there is an [obstacle](Draft::obstacle).
    #[must_use]
    pub fn drafts(&self) -> DraftCounts {
        self.source.drafts.counts()
    }

    /// Draws a token and gives it to the model; the text that became certain.
    fn step(&mut self) -> Result<Step> {
        let Source { model, cache, drafts } = &mut self.source;
        let pending = self.sequence.take_pending();
        if let Some(id) = pending {
            drafts.make_room(model, cache)?;
            drafts.give(model, cache, id, self.sequence.most_guesses(model.room(cache)))?;
        }
        let seen = cache.seen() - drafts.ahead();
        if pending.is_some() {
            check_logits(drafts.logits(), seen)?;
        }
        self.sequence.accept(drafts.logits(), model.goes_on(cache, drafts.ahead()))
    }

    /// Ends a generation that is not gone on with, and takes the text that might have become a stop text; empty if there
    /// is none, or all steps were taken. After an error it is what came before it and was not given out.
    pub fn held_back(&mut self) -> String {
        self.sequence.held_back()
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.failed && self.sequence.finish().is_some() {
            return self.sequence.flush().map(Ok);
        }
        if self.failed {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        Some(step)
    }
}
