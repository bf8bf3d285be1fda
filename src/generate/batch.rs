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
use super::{FinishReason, GenerationOptions};
use crate::cache::{AdaptiveKvCache, CacheBytes, KvDtype, Retention};
use crate::error::{Error, Result};
use crate::model::{Llama, PrefillObserver, PrefillOptions};
use crate::tokenizer::Tokenizer;

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
    /// Time that decoding steps took.
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
    options: GenerationOptions,
    limits: BatchLimits,
    prefill_options: PrefillOptions,
    waiting: VecDeque<(usize, Vec<u32>)>,
    active: Vec<Active<'a>>,
    /// The largest share of a prompt that a cache was seen to keep: what is expected of the next.
    expected_ratio: f64,
    summary: BatchSummary,
}

/// A sequence that is under way.
#[derive(Debug)]
struct Active<'a> {
    index: usize,
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
    /// * `prompts`: ids, each at least one
    /// * `options`: for every text; each has a sampler of its own, with the same seed
    ///
    /// # Errors
    /// [`Error::Input`] if no sequence may be under way.
    pub fn new(
        model: &'a Llama,
        tokenizer: &'a Tokenizer,
        kv_dtype: KvDtype,
        retention: Retention,
        prompts: Vec<Vec<u32>>,
        options: GenerationOptions,
        limits: BatchLimits,
    ) -> Result<Self> {
        if limits.sequences == 0 {
            return Err(Error::input("a batch of no sequences").with_hint("allow at least one at a time"));
        }
        let expected_ratio = if matches!(retention, Retention::Full) { 1.0 } else { 0.0 };
        Ok(Self {
            model,
            tokenizer,
            kv_dtype,
            retention,
            options,
            limits,
            prefill_options: PrefillOptions::default(),
            waiting: prompts.into_iter().enumerate().collect(),
            active: Vec::new(),
            expected_ratio,
            summary: BatchSummary::default(),
        })
    }

    /// Sets how prompts are read.
    #[must_use]
    pub fn with_prefill_options(mut self, options: PrefillOptions) -> Self {
        self.prefill_options = options;
        self
    }

    /// Generates all texts.
    ///
    /// * `observe`: makes the observer of a prompt's prefill
    /// * `go_on`: asked before every step; breaking ends all texts that are under way
    /// * `done`: gets each text as it ends, in whatever order
    ///
    /// # Errors
    /// [`Error::Input`] if a prompt is empty or too long, or does not fit into the budget alone; [`Error::Interrupted`]
    /// if an observer says so; whatever else prefill, sampling and decoding fail with.
    pub fn run<O: PrefillObserver>(
        &mut self,
        mut observe: impl FnMut(usize) -> O,
        mut go_on: impl FnMut() -> ControlFlow<()>,
        mut done: impl FnMut(FinishedText),
    ) -> Result<BatchSummary> {
        let mut logits = Vec::new();
        loop {
            while self.has_room()? {
                if let Some(logits) = self.admit(&mut observe)? {
                    let last = self.active.len() - 1;
                    self.accept(last, &logits)?;
                    self.finish(last).into_iter().for_each(&mut done);
                }
            }
            if self.active.is_empty() {
                return Ok(self.summary);
            }
            if go_on().is_break() {
                for mut active in self.active.drain(..) {
                    active.text += &active.sequence.held_back();
                    done(active.into_text(FinishReason::Interrupted));
                }
                return Ok(self.summary);
            }
            self.step(&mut logits)?;
            let vocab_size = logits.len() / self.active.len();
            for (index, logits) in logits.chunks_exact(vocab_size).enumerate() {
                self.accept(index, logits)?;
            }
            for index in (0..self.active.len()).rev() {
                self.finish(index).into_iter().for_each(&mut done);
            }
        }
    }

    /// Bytes of one token that all heads keep.
    fn token_bytes(&self) -> usize {
        let config = self.model.config();
        config.num_layers * config.heads.num_kv_heads * 2 * self.kv_dtype.row_bytes(config.heads.head_dim)
    }

    /// Whether the next prompt may be taken in.
    fn has_room(&self) -> Result<bool> {
        let Some((index, prompt)) = self.waiting.front() else { return Ok(false) };
        if self.active.len() >= self.limits.sequences {
            return Ok(false);
        }
        let Some(budget) = self.limits.kv_bytes else { return Ok(true) };
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let expected = (prompt.len() as f64 * self.expected_ratio * self.token_bytes() as f64) as usize
            + self.options.max_new_tokens * self.token_bytes();
        let reserved: usize = self.active.iter().map(|active| active.reserved).sum();
        if reserved + expected <= budget {
            return Ok(true);
        }
        if self.active.is_empty() && self.expected_ratio == 1.0 {
            return Err(self.too_small(*index, expected, budget));
        }
        // A ratio is only what others kept: alone, each prompt gets its try.
        Ok(self.active.is_empty())
    }

    fn too_small(&self, index: usize, needed: usize, budget: usize) -> Error {
        let (needed, budget) = (crate::report::megabytes(needed), crate::report::megabytes(budget));
        Error::input(format!(
            "prompt {} and the {} tokens to generate need {needed:.1} MB of KV cache, more than the budget of {budget:.1} MB",
            index + 1,
            self.options.max_new_tokens
        ))
        .with_hint("raise the budget, generate fewer tokens, or keep less")
    }

    /// Prefills the next prompt; its logits, or `None` if it has to wait after all.
    fn admit<O: PrefillObserver>(&mut self, observe: &mut impl FnMut(usize) -> O) -> Result<Option<Vec<f32>>> {
        let Some((index, prompt)) = self.waiting.pop_front() else { return Ok(None) };
        let mut cache = self.model.new_cache(self.kv_dtype, self.retention.clone())?;
        let started = Instant::now();
        let prefill = self.model.prefill_with(&prompt, &mut cache, self.prefill_options, &mut observe(index))?;
        self.summary.prefill_time += started.elapsed();
        self.summary.prompt_tokens += prompt.len();
        let kv = cache.bytes();
        self.expected_ratio = self.expected_ratio.max(1.0 - kv.saved_ratio());
        let reserved = kv.kept + self.options.max_new_tokens * self.token_bytes();
        let others: usize = self.active.iter().map(|active| active.reserved).sum();
        if let Some(budget) = self.limits.kv_bytes
            && others + reserved > budget
        {
            if self.active.is_empty() {
                return Err(self.too_small(index, reserved, budget));
            }
            // It keeps more than was expected: it is read again when others have ended.
            self.waiting.push_front((index, prompt));
            return Ok(None);
        }
        let sequence = Sequence::new(self.tokenizer, &prompt, self.options.clone());
        let prompt_tokens = prompt.len();
        self.active.push(Active { index, prompt_tokens, cache, kv, sequence, text: String::new(), reserved });
        self.summary.most_sequences = self.summary.most_sequences.max(self.active.len());
        self.note_bytes();
        Ok(Some(prefill.logits))
    }

    /// Draws a sequence's next token.
    fn accept(&mut self, index: usize, logits: &[f32]) -> Result<()> {
        let active = &mut self.active[index];
        if active.sequence.finish().is_none() {
            let room = active.cache.seen() < self.model.config().context_length;
            active.text += &active.sequence.accept(logits, room)?.text;
        }
        Ok(())
    }

    /// Gives every sequence its pending token.
    fn step(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        let started = Instant::now();
        let mut ids = Vec::with_capacity(self.active.len());
        let mut caches = Vec::with_capacity(self.active.len());
        for active in &mut self.active {
            ids.extend(active.sequence.take_pending());
            caches.push(&mut active.cache);
        }
        self.model.decode_batch(&ids, &mut caches, logits)?;
        self.summary.decode_time += started.elapsed();
        self.summary.decoded_tokens += ids.len();
        self.note_bytes();
        Ok(())
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
        }
    }
}
