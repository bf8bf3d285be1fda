//! Many prompts, several at a time: sequences decode together, so that weights are read once for all of them, while each
//! has a ragged cache of its own.
//!
//! Prompts wait in order. One is taken in as soon as a place is free and its cache fits into the budget: it is prefilled,
//! and joins the others at the next step. What a sequence generates does not depend on the others.
//!
//! Not for: reading prompts from a file or writing results; the caller does both.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::sequence::Sequence;
use super::{FinishReason, GenerationOptions, Sampler};
use crate::cache::{AdaptiveKvCache, CacheBytes, KvDtype, Retention};
use crate::error::{Error, Result};
use crate::model::{Llama, PrefillObserver, PrefillOptions};
use crate::numbers::check_logits;
use crate::tokenizer::Tokenizer;

/// A text to go on from.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchPrompt {
    /// What messages call it, such as `prompt 3`.
    pub name: String,
    /// Its tokens, at least one.
    pub ids: Vec<u32>,
    /// How its text is generated, taken as it is, seed included; `None` for the batch's options with a stream of random
    /// numbers of its own, [`SamplingOptions::stream`](super::SamplingOptions::stream) of the prompt's index.
    pub options: Option<GenerationOptions>,
}

/// How many sequences may be under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Sequences at a time; at least 1.
    pub sequences: usize,
    /// Bytes that the kept keys and values of all sequences under way may come to, with all tokens that they may still
    /// generate; `None` for any.
    pub kv_bytes: Option<usize>,
}

/// A text that was generated.
#[derive(Debug, Clone, PartialEq)]
pub struct FinishedText {
    /// Index of the prompt.
    pub index: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Generated tokens.
    pub ids: Vec<u32>,
    /// Their text, without a stop text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The cache right after the prompt.
    pub kv: CacheBytes,
    /// Seed with which its tokens were drawn; `None` if the most probable one was taken always. Given to a run of this
    /// prompt alone, it draws the same text.
    pub seed: Option<u64>,
}

/// What a batch came to.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BatchSummary {
    /// Texts that were generated to their end.
    pub finished: usize,
    /// Tokens of prompts, those counted again that had to be read again.
    pub prompt_tokens: usize,
    /// Time that reading prompts took, profiling included.
    pub prefill_time: Duration,
    /// Tokens that came out of decoding steps; the first of each text comes from its prompt.
    pub decoded_tokens: usize,
    /// Time that decoding steps took, drawing tokens included.
    pub decode_time: Duration,
    /// The most sequences that were under way at a time.
    pub most_sequences: usize,
    /// The most bytes that all kept keys and values came to.
    pub most_kv_bytes: usize,
}

/// Prompts and the sequences that were made of them.
#[derive(Debug)]
pub struct Batch<'a> {
    model: &'a Llama,
    tokenizer: &'a Tokenizer,
    kv_dtype: KvDtype,
    retention: Retention,
    limits: BatchLimits,
    prefill_options: PrefillOptions,
    waiting: VecDeque<Waiting>,
    active: Vec<Active<'a>>,
    /// Sum over the caches of all prompts so far: the share that they keep is expected of the next.
    prompts_kv: CacheBytes,
    summary: BatchSummary,
}

/// A prompt that is not under way yet.
#[derive(Debug)]
struct Waiting {
    index: usize,
    name: String,
    ids: Vec<u32>,
    options: GenerationOptions,
    /// Bytes that it needs; known for a full cache, and once it was read.
    needed: Option<usize>,
}

/// A sequence that is under way.
#[derive(Debug)]
struct Active<'a> {
    index: usize,
    name: String,
    prompt_tokens: usize,
    cache: AdaptiveKvCache,
    /// The cache right after the prompt.
    kv: CacheBytes,
    sequence: Sequence<'a>,
    text: String,
    /// Bytes that are put aside for it.
    reserved: usize,
}

impl<'a> Batch<'a> {
    /// Nothing is computed yet.
    ///
    /// * `options`: for every prompt that has none of its own; prompts' texts are drawn independently of one another, and
    ///   of how many are under way at a time
    ///
    /// # Errors
    /// [`Error::Input`] if no sequence may be under way, if a prompt is empty or longer than the context, or if its full
    /// cache does not fit into the budget alone.
    pub fn new(
        model: &'a Llama,
        tokenizer: &'a Tokenizer,
        kv_dtype: KvDtype,
        retention: Retention,
        prompts: Vec<BatchPrompt>,
        options: &GenerationOptions,
        limits: BatchLimits,
    ) -> Result<Self> {
        if limits.sequences == 0 {
            return Err(Error::input("a batch of no sequences").with_hint("allow at least one at a time"));
        }
        let mut batch = Self {
            model,
            tokenizer,
            kv_dtype,
            retention,
            limits,
            prefill_options: PrefillOptions::default(),
            waiting: VecDeque::with_capacity(prompts.len()),
            active: Vec::new(),
            prompts_kv: CacheBytes::default(),
            summary: BatchSummary::default(),
        };
        // A prompt that cannot be used is refused before hours are spent on those in front of it.
        for (index, BatchPrompt { name, ids, options: own }) in prompts.into_iter().enumerate() {
            let options = own.unwrap_or_else(|| GenerationOptions {
                sampling: options.sampling.stream(index as u64),
                ..options.clone()
            });
            let needed = batch.check(&name, &ids, &options)?;
            batch.waiting.push_back(Waiting { index, name, ids, options, needed });
        }
        Ok(batch)
    }

    /// Refuses a prompt that can never be taken in; the bytes that it needs, if they are known.
    fn check(&self, name: &str, ids: &[u32], options: &GenerationOptions) -> Result<Option<usize>> {
        let context = self.model.config().context_length;
        if ids.is_empty() {
            return Err(Error::input(format!("{name} is empty")).with_hint("give at least one token"));
        }
        if ids.len() > context {
            let reason = format!("{name} has {} tokens, more than the model's context of {context}", ids.len());
            return Err(Error::input(reason).with_hint("shorten the prompt"));
        }
        if !matches!(self.retention, Retention::Full) {
            return Ok(None);
        }
        let prompt_bytes = ids.len().saturating_mul(self.token_bytes());
        let needed = prompt_bytes.saturating_add(self.text_bytes(ids.len(), options));
        self.expect_fit(name, needed)?;
        Ok(Some(needed))
    }

    /// Sets how prompts are read.
    #[must_use]
    pub fn with_prefill_options(mut self, options: PrefillOptions) -> Self {
        self.prefill_options = options;
        self
    }

    /// Generates all texts.
    ///
    /// * `observe`: makes the observer of a prompt's prefill; breaking ends all texts that are under way
    /// * `go_on`: asked before every step and prompt; breaking ends all texts that are under way
    /// * `done`: gets each text as it ends, in whatever order; after an error, those under way as far as they are
    ///
    /// # Errors
    /// [`Error::Input`] if what a prompt keeps does not fit into the budget alone; [`Error::NotANumber`] at the first text
    /// whose scores are no numbers, which ends the others too, since they come from the same weights; whatever else
    /// prefill, sampling and decoding fail with.
    pub fn run<O: PrefillObserver>(
        &mut self,
        mut observe: impl FnMut(usize) -> O,
        mut go_on: impl FnMut() -> ControlFlow<()>,
        mut done: impl FnMut(FinishedText),
    ) -> Result<BatchSummary> {
        let result = self.run_to_end(&mut observe, &mut go_on, &mut done);
        for index in (0..self.active.len()).rev() {
            done(self.finish(index).unwrap_or_else(|| self.break_off(index)));
        }
        match result {
            Ok(()) | Err(Error::Interrupted) => Ok(self.summary),
            Err(error) => Err(error),
        }
    }

    /// Leaves texts under way if it ends early.
    fn run_to_end<O: PrefillObserver>(
        &mut self,
        observe: &mut impl FnMut(usize) -> O,
        go_on: &mut impl FnMut() -> ControlFlow<()>,
        done: &mut impl FnMut(FinishedText),
    ) -> Result<()> {
        let mut logits = Vec::new();
        loop {
            while self.has_room() {
                if go_on().is_break() {
                    return Err(Error::Interrupted);
                }
                if let Some(logits) = self.admit(observe)? {
                    let last = self.active.len() - 1;
                    self.accept(last, &logits)?;
                    self.finish(last).into_iter().for_each(&mut *done);
                }
            }
            if self.active.is_empty() {
                return Ok(());
            }
            if go_on().is_break() {
                return Err(Error::Interrupted);
            }
            self.step(&mut logits)?.into_iter().for_each(&mut *done);
        }
    }

    /// Bytes of one token that all heads keep.
    fn token_bytes(&self) -> usize {
        let config = self.model.config();
        config.num_layers * config.heads.num_kv_heads * 2 * self.kv_dtype.row_bytes(config.heads.head_dim)
    }

    /// Bytes of the tokens that may be generated after a prompt; the last one is never stored, and some heads go on
    /// evicting.
    fn text_bytes(&self, prompt_len: usize, options: &GenerationOptions) -> usize {
        let context = self.model.config().context_length;
        let tokens = options.max_new_tokens.saturating_sub(1).min(context.saturating_sub(prompt_len));
        self.retention.most_new_rows(tokens).saturating_mul(self.token_bytes())
    }

    /// Bytes that a prompt which was not read yet is expected to need.
    fn expected_bytes(&self, prompt_len: usize, options: &GenerationOptions) -> usize {
        let kept_ratio = 1.0 - self.prompts_kv.saved_ratio();
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let prompt = (prompt_len as f64 * kept_ratio * self.token_bytes() as f64) as usize;
        prompt.saturating_add(self.text_bytes(prompt_len, options))
    }

    /// Whether `needed` bytes fit beside what is put aside for the sequences under way.
    fn fits(&self, needed: usize) -> bool {
        let reserved = self.active.iter().map(|active| active.reserved).fold(needed, usize::saturating_add);
        self.limits.kv_bytes.is_none_or(|budget| reserved <= budget)
    }

    /// Whether the next prompt may be taken in.
    fn has_room(&self) -> bool {
        let Some(Waiting { ids, options, needed, .. }) = self.waiting.front() else { return false };
        // What is expected is only what others kept: alone, each prompt gets its try.
        self.active.is_empty()
            || self.active.len() < self.limits.sequences
                && self.fits(needed.unwrap_or_else(|| self.expected_bytes(ids.len(), options)))
    }

    /// Refuses what does not even fit alone.
    fn expect_fit(&self, name: &str, needed: usize) -> Result<()> {
        let Some(budget) = self.limits.kv_bytes.filter(|&budget| needed > budget) else { return Ok(()) };
        let (needed, budget) = (crate::sizes::size(needed), crate::sizes::size(budget));
        Err(Error::input(format!(
            "{name} and the text to generate need {needed} of KV cache, more than the budget of {budget}"
        ))
        .with_hint("raise the budget, generate fewer tokens, or keep less"))
    }

    /// Prefills the next prompt; its logits, or `None` if it has to wait after all.
    fn admit<O: PrefillObserver>(&mut self, observe: &mut impl FnMut(usize) -> O) -> Result<Option<Vec<f32>>> {
        let Some(Waiting { index, name, ids, options, needed }) = self.waiting.pop_front() else { return Ok(None) };
        if let Some(needed) = needed {
            self.expect_fit(&name, needed)?;
        }
        let prompt_tokens = ids.len();
        let mut cache = self.model.new_cache(self.kv_dtype, self.retention.clone())?;
        let started = Instant::now();
        let prefill = self.model.prefill_with(&ids, &mut cache, self.prefill_options, &mut observe(index));
        let prefill = prefill.map_err(|error| error.in_place(|| name.clone()))?;
        self.summary.prefill_time += started.elapsed();
        self.summary.prompt_tokens += prompt_tokens;
        let kv = cache.bytes();
        if needed.is_none() {
            self.prompts_kv = [self.prompts_kv, kv].into_iter().sum();
        }
        let reserved = kv.kept.saturating_add(self.text_bytes(prompt_tokens, &options));
        if !self.fits(reserved) {
            if self.active.is_empty() {
                self.expect_fit(&name, reserved)?;
            }
            // It keeps more than was expected: it is read again when others have ended.
            self.waiting.push_front(Waiting { index, name, ids, options, needed: Some(reserved) });
            return Ok(None);
        }
        let sequence = Sequence::new(self.tokenizer, Sampler::new(options.sampling, &ids), options);
        self.active.push(Active { index, name, prompt_tokens, cache, kv, sequence, text: String::new(), reserved });
        self.summary.most_sequences = self.summary.most_sequences.max(self.active.len());
        self.note_bytes();
        Ok(Some(prefill.logits))
    }

    /// Draws a sequence's next token.
    fn accept(&mut self, index: usize, logits: &[f32]) -> Result<()> {
        let active = &mut self.active[index];
        if active.sequence.finish().is_none() {
            let room = active.cache.seen() < self.model.config().context_length;
            let step = check_logits(logits, active.cache.seen()).and_then(|()| active.sequence.accept(logits, room));
            active.text += &step.map_err(|error| error.in_place(|| active.name.clone()))?.text;
        }
        Ok(())
    }

    /// Gives every sequence its pending token and draws the next; the texts that end with it.
    fn step(&mut self, logits: &mut Vec<f32>) -> Result<Vec<FinishedText>> {
        let started = Instant::now();
        let mut ids = Vec::with_capacity(self.active.len());
        let mut caches = Vec::with_capacity(self.active.len());
        for active in &mut self.active {
            ids.extend(active.sequence.take_pending());
            caches.push(&mut active.cache);
        }
        self.model.decode_unchecked(&ids, &mut caches, logits)?;
        self.note_bytes();
        let vocab_size = logits.len() / ids.len();
        for (index, logits) in logits.chunks_exact(vocab_size).enumerate() {
            self.accept(index, logits)?;
        }
        let finished = (0..ids.len()).rev().filter_map(|index| self.finish(index)).collect();
        self.summary.decode_time += started.elapsed();
        self.summary.decoded_tokens += ids.len();
        Ok(finished)
    }

    fn note_bytes(&mut self) {
        let kept = self.active.iter().map(|active| active.cache.bytes().kept).sum();
        self.summary.most_kv_bytes = self.summary.most_kv_bytes.max(kept);
    }

    /// Takes a sequence out if its text has ended.
    fn finish(&mut self, index: usize) -> Option<FinishedText> {
        let finish_reason = self.active[index].sequence.finish()?;
        let mut active = self.active.remove(index);
        if let Some(step) = active.sequence.flush() {
            active.text += &step.text;
        }
        self.summary.finished += 1;
        Some(active.into_text(finish_reason))
    }

    /// Takes a sequence out whose text has not ended.
    fn break_off(&mut self, index: usize) -> FinishedText {
        let mut active = self.active.remove(index);
        active.text += &active.sequence.held_back();
        active.into_text(FinishReason::Interrupted)
    }
}

impl Active<'_> {
    fn into_text(self, finish_reason: FinishReason) -> FinishedText {
        FinishedText {
            index: self.index,
            prompt_tokens: self.prompt_tokens,
            ids: self.sequence.ids().to_vec(),
            text: self.text,
            finish_reason,
            kv: self.kv,
            seed: self.sequence.seed(),
        }
    }
}
