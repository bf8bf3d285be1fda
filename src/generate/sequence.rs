//! One text in the making: tokens drawn from logits, turned into text that is certain, until a rule ends it.
//!
//! Not for: computing logits; who holds a sequence gives each pending token to a model.

use super::draft::Drafter;
use super::{FinishReason, GenerationOptions, Sampler, Step, StopFilter};
use crate::cache::Retention;
use crate::error::Result;
use crate::model::Llama;
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// A text that is being generated.
#[derive(Debug)]
pub(super) struct Sequence<'a> {
    tokenizer: &'a Tokenizer,
    options: GenerationOptions,
    sampler: Sampler,
    stop: StopFilter,
    decoder: Option<StreamDecoder<'a>>,
    ids: Vec<u32>,
    /// A token whose keys and values the cache has not got yet.
    pending: Option<u32>,
    finish: Option<FinishReason>,
}

impl<'a> Sequence<'a> {
    /// * `sampler`: knows the text so far
    pub(super) fn new(tokenizer: &'a Tokenizer, sampler: Sampler, options: GenerationOptions) -> Self {
        Self {
            tokenizer,
            sampler,
            stop: StopFilter::new(&options.stop),
            decoder: Some(tokenizer.stream(false)),
            ids: Vec::new(),
            pending: None,
            finish: (options.max_new_tokens == 0).then_some(FinishReason::Length),
            options,
        }
    }

    /// Tokens generated so far.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Seed with which tokens are drawn; `None` if none is drawn at random.
    pub(super) fn seed(&self) -> Option<u64> {
        self.options.sampling.drawn_seed()
    }

    /// Why the text ended; `None` as long as it has not.
    pub(super) fn finish(&self) -> Option<FinishReason> {
        self.finish
    }

    /// How many guesses after the pending token could be of use: each lets a token be drawn, and so does the pending one.
    ///
    /// * `room`: tokens that the context has room for
    pub(super) fn most_guesses(&self, room: usize) -> usize {
        let drawn = self.options.max_new_tokens.saturating_sub(self.ids.len());
        drawn.min(room).saturating_sub(1)
    }

    /// What guesses tokens of the text, if that is wanted and possible.
    pub(super) fn drafter(&self, model: &Llama, retention: &Retention) -> Option<Drafter> {
        self.options.draft.obstacle(model, retention).is_none().then(|| Drafter::new(self.sampler.text()))
    }

    /// Takes the token that the model must get before there are logits for the next.
    pub(super) fn take_pending(&mut self) -> Option<u32> {
        self.pending.take()
    }

    /// Draws a token; the text that became certain. A token that ends the text is no part of it, whatever it prints.
    ///
    /// * `logits`: `[vocab_size]`
    /// * `room`: whether the context has room for one more token
    pub(super) fn accept(&mut self, logits: &[f32], room: bool) -> Result<Step> {
        let id = self.sampler.sample(logits)?;
        self.ids.push(id);
        if self.tokenizer.eos_ids().contains(&id) && !self.options.ignore_eos {
            self.finish = Some(FinishReason::Eos);
            return Ok(Step { id: Some(id), text: String::new() });
        }
        let printed = self.decoder.as_mut().map(|decoder| decoder.push(id)).unwrap_or_default();
        let mut text = self.stop.push(&printed);
        if self.tokenizer.is_special(id) {
            // It prints nothing; a stop text may name it all the same.
            text += &self.stop.push_unprinted(&self.tokenizer.token_text(id));
        }
        if self.stop.stopped() {
            self.finish = Some(FinishReason::Stop);
        } else if self.ids.len() >= self.options.max_new_tokens {
            self.finish = Some(FinishReason::Length);
        } else if !room {
            self.finish = Some(FinishReason::Context);
        } else {
            self.pending = Some(id);
        }
        Ok(Step { id: Some(id), text })
    }

    /// Ends a text that is not gone on with, and takes what might have become a stop text; empty if there is none, or all
    /// of it was taken.
    pub(super) fn held_back(&mut self) -> String {
        if self.decoder.take().is_none() || self.finish == Some(FinishReason::Stop) {
            return String::new();
        }
        self.finish.get_or_insert(FinishReason::Interrupted);
        self.stop.finish()
    }

    /// What the filters still hold back when the text is over.
    pub(super) fn flush(&mut self) -> Option<Step> {
        let mut text = self.decoder.take()?.finish();
        if self.finish != Some(FinishReason::Stop) {
            text = self.stop.push(&text) + &self.stop.finish();
        }
        (!text.is_empty()).then_some(Step { id: None, text })
    }

    /// What draws its tokens, for a text that goes on with it.
    pub(super) fn into_sampler(self) -> Sampler {
        self.sampler
    }
}
