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
//! let mut cache = loaded.model.new_cache(KvDtype::F16, Retention::Full);
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

mod conversation;
mod sampling;
mod stop;

use serde::Serialize;

use crate::cache::AdaptiveKvCache;
use crate::error::Result;
use crate::model::Llama;
use crate::tokenizer::{StreamDecoder, Tokenizer};

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

/// Generates tokens, one for each call of `next`.
#[derive(Debug)]
pub struct Generation<'a> {
    model: &'a Llama,
    tokenizer: &'a Tokenizer,
    cache: &'a mut AdaptiveKvCache,
    options: GenerationOptions,
    sampler: Sampler,
    stop: StopFilter,
    decoder: Option<StreamDecoder<'a>>,
    logits: Vec<f32>,
    ids: Vec<u32>,
    /// A token whose keys and values the cache has not got yet.
    pending: Option<u32>,
    finish: Option<FinishReason>,
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
        let sampler = Sampler::new(options.sampling, prompt);
        let stop = StopFilter::new(&options.stop);
        let decoder = Some(tokenizer.stream(false));
        let finish = (options.max_new_tokens == 0).then_some(FinishReason::Length);
        Self {
            model,
            tokenizer,
            cache,
            options,
            sampler,
            stop,
            decoder,
            logits,
            ids: Vec::new(),
            pending: None,
            finish,
        }
    }

    /// Tokens generated so far.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Why generation ended; [`FinishReason::Interrupted`] as long as it has not.
    #[must_use]
    pub fn finish_reason(&self) -> FinishReason {
        self.finish.unwrap_or(FinishReason::Interrupted)
    }

    /// `[vocab_size]` logits from which the next token is drawn.
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Draws a token and gives it to the model; the text that became certain.
    fn step(&mut self) -> Result<Step> {
        if let Some(id) = self.pending.take() {
            self.logits = self.model.decode(id, self.cache)?;
        }
        let id = self.sampler.sample(&self.logits)?;
        self.ids.push(id);
        let mut text = self.decoder.as_mut().map(|decoder| decoder.push(id)).unwrap_or_default();
        if self.tokenizer.eos_ids().contains(&id) && !self.options.ignore_eos {
            self.finish = Some(FinishReason::Eos);
        } else {
            text = self.stop.push(&text);
            if self.stop.stopped() {
                self.finish = Some(FinishReason::Stop);
            } else if self.ids.len() >= self.options.max_new_tokens
                || self.cache.seen() >= self.model.config().context_length
            {
                self.finish = Some(FinishReason::Length);
            } else {
                self.pending = Some(id);
            }
        }
        Ok(Step { id: Some(id), text })
    }

    /// Takes the text that might have become a stop text, from a generation that is not gone on with; empty if there is
    /// none, or all steps were taken.
    pub fn held_back(&mut self) -> String {
        if self.decoder.take().is_none() || self.finish == Some(FinishReason::Stop) {
            return String::new();
        }
        self.finish.get_or_insert(FinishReason::Interrupted);
        self.stop.finish()
    }

    /// What the filters still hold back when generation is over.
    fn flush(&mut self) -> Option<Step> {
        let mut text = self.decoder.take()?.finish();
        if self.finish != Some(FinishReason::Stop) {
            text = self.stop.push(&text) + &self.stop.finish();
        }
        (!text.is_empty()).then_some(Step { id: None, text })
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finish.is_some() {
            return self.flush().map(Ok);
        }
        let step = self.step();
        if step.is_err() {
            self.finish = Some(FinishReason::Interrupted);
            self.decoder = None;
        }
        Some(step)
    }
}
