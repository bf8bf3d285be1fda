//! The generation loop: an iterator of tokens over a model and a filled cache.
//!
//! ```no_run
//! use adaptive_kvcache::cache::{KvDtype, Retention};
//! use adaptive_kvcache::checkpoint::{WeightDtype, load};
//! use adaptive_kvcache::generate::{Generation, GenerationOptions};
//!
//! # fn main() -> adaptive_kvcache::Result<()> {
//! let loaded = load("model.gguf", WeightDtype::Auto, &mut |_, _| {})?;
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
mod sampling;
mod sequence;
mod stop;

use serde::Serialize;

use crate::cache::AdaptiveKvCache;
use crate::error::{Error, Result};
use crate::model::Llama;
use crate::tokenizer::Tokenizer;
use sequence::Sequence;

pub use batch::{Batch, BatchLimits, BatchPrompt, BatchSummary, FinishedText};
pub use conversation::{Conversation, Turn};
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
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self { max_new_tokens: 128, sampling: SamplingOptions::default(), stop: Vec::new(), ignore_eos: false }
    }
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model ended its text.
    Eos,
    /// The most tokens were generated, or the context is full.
    Length,
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
/// [`Error::Interrupted`]; the cache is then of no further use.
#[derive(Debug)]
pub struct Generation<'a> {
    model: &'a Llama,
    cache: &'a mut AdaptiveKvCache,
    sequence: Sequence<'a>,
    logits: Vec<f32>,
    /// A token was given up halfway: no more can come.
    is_stopped: bool,
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
        Self { model, cache, sequence: Sequence::new(tokenizer, prompt, options), logits, is_stopped: false }
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
        &self.logits
    }

    /// Draws a token and gives it to the model; the text that became certain.
    fn step(&mut self) -> Result<Step> {
        if let Some(id) = self.sequence.take_pending() {
            self.model.decode_batch(&[id], &mut [&mut *self.cache], &mut self.logits)?;
        }
        self.sequence.accept(&self.logits, self.cache.seen() < self.model.config().context_length)
    }

    /// Takes the text that might have become a stop text, from a generation that is not gone on with; empty if there is
    /// none, or all steps were taken.
    pub fn held_back(&mut self) -> String {
        self.sequence.held_back()
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_stopped {
            return None;
        }
        if self.sequence.finish().is_some() {
            return self.sequence.flush().map(Ok);
        }
        let step = self.step();
        match step {
            // What was held back may still be taken, as after a caller's own end.
            Err(Error::Interrupted) => self.is_stopped = true,
            Err(_) => self.sequence.break_off(),
            Ok(_) => {}
        }
        Some(step)
    }
}
