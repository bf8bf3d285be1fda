//! Many prompts, several at a time: sequences decode together, so that weights are read once for all of them, while each
//! has a ragged cache of its own.
//!
//! Prompts wait in order. One is read as soon as a place is free and its cache is expected to fit into the budget, and
//! joins the others when it does fit. Those under way go on while it is read: see [`reading`]. What a sequence generates
//! does not depend on the others.
//!
//! Not for: reading prompts from a file or writing results; the caller does both.

mod reading;
mod step;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::Duration;

use self::reading::{LastStep, Reading};
use super::draft::Drafts;
use super::sequence::Sequence;
use super::{DraftCounts, FinishReason, GenerationOptions, Sampler};
use crate::cache::{AdaptiveKvCache, CacheBytes, Retention};
use crate::clock::{Clock, SystemClock};
use crate::error::{Error, Result};
use crate::model::{Llama, PrefillObserver, PrefillOptions};
use crate::numbers::check_logits;
use crate::store::Prefixes;
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
    /// Bytes that the caches of all sequences under way may come to, keys, values and positions, with all tokens that they may
    /// still generate; `None` for any.
    ///
    /// What a prompt keeps is known when it was read; before, as large a share is expected of it as the prompts so far
    /// kept together. If it keeps more, so that it does not fit beside the others, it is held until enough of them have
    /// ended, and no further prompt is read. The cache of this one prompt is all that may go beyond the budget.
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
    /// Tokens of the prompts that were read, those apart that a [store](Batch::with_prefixes) held.
    pub prompt_tokens: usize,
    /// Time that reading prompts took, profiling included, without the decoding steps that others took meanwhile.
    pub prefill_time: Duration,
    /// Tokens that came out of decoding steps; the first of each text comes from its prompt.
    pub decoded_tokens: usize,
    /// Time that decoding steps took, drawing tokens included.
    pub decode_time: Duration,
    /// What became of tokens that were guessed, as [`GenerationOptions::draft`] says: of a sequence as long as no other is
    /// under way, since several read the weights together anyhow.
    pub drafts: DraftCounts,
    /// The most sequences that were under way at a time.
    pub most_sequences: usize,
    /// The most bytes that were allocated for all caches, positions included: of the sequences under way, and of a prompt that
    /// was read and does not fit beside them yet. A prompt counts from when it was read. What lies in the file of a saved
    /// cache does not count.
    pub most_kv_bytes: usize,
}

/// Prompts and the sequences that were made of them.
#[derive(Debug)]
pub struct Batch<'a> {
    model: &'a Llama,
    tokenizer: &'a Tokenizer,
    /// What every sequence begins with: nothing, or a text that was read before.
    base: AdaptiveKvCache,
    /// Bytes of one stored key, its value and its position.
    row_bytes: usize,
    limits: BatchLimits,
    prefill_options: PrefillOptions,
    prefixes: Option<&'a Prefixes<'a>>,
    clock: Box<dyn Clock>,
    waiting: VecDeque<Waiting>,
    /// The prompt that was read last, as long as it has not joined the others, and its logits, `[vocab_size]`.
    held: Option<(Active<'a>, Vec<f32>)>,
    active: Vec<Active<'a>>,
    last_step: LastStep,
    /// `[active, vocab_size]` of the last step; its memory is used again.
    logits: Vec<f32>,
    /// Sum over the caches of all prompts so far: the share that they keep is expected of the next.
    prompts_kv: CacheBytes,
    summary: BatchSummary,
}

/// A prompt that was not read yet.
#[derive(Debug)]
struct Waiting {
    index: usize,
    name: String,
    ids: Vec<u32>,
    options: GenerationOptions,
    /// Bytes that it needs, which are known of a full cache.
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
    /// Present while it is alone.
    drafts: Option<Drafts>,
    text: String,
    /// Bytes that are put aside for it.
    reserved: usize,
}

/// What the caller of a batch is asked and told.
struct Caller<'c> {
    go_on: &'c mut dyn FnMut() -> ControlFlow<()>,
    done: &'c mut dyn FnMut(FinishedText),
}

impl Caller<'_> {
    /// # Errors
    /// [`Error::Interrupted`] if it wants no more.
    fn ask(&mut self) -> Result<()> {
        if (self.go_on)().is_break() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

impl<'a> Batch<'a> {
    /// Nothing is computed yet.
    ///
    /// * `base`: what every sequence goes on from: an empty cache, or one with a text that was read before, which all prompts
    ///   ask about; it counts in no budget
    /// * `options`: for every prompt that has none of its own; prompts' texts are drawn independently of one another, and
    ///   of how many are under way at a time
    ///
    /// # Errors
    /// [`Error::Input`] if no sequence may be under way, if a prompt is empty or has no room in the context, or if its full
    /// cache does not fit into the budget alone.
    pub fn new(
        model: &'a Llama,
        tokenizer: &'a Tokenizer,
        base: AdaptiveKvCache,
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
            row_bytes: base.token_bytes() + base.note_bytes(),
            base,
            limits,
            prefill_options: PrefillOptions::default(),
            prefixes: None,
            clock: Box::new(SystemClock::start()),
            waiting: VecDeque::with_capacity(prompts.len()),
            held: None,
            active: Vec::new(),
            last_step: LastStep::default(),
            logits: Vec::new(),
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
        let seen = self.base.seen();
        if ids.len() > context.saturating_sub(seen) {
            let before = if seen > 0 { format!(" behind {seen}") } else { String::new() };
            let reason = format!("{name} has {} tokens{before}, more than the model's context of {context}", ids.len());
            return Err(Error::input(reason).with_hint("shorten the prompt"));
        }
        if !matches!(self.base.retention(), Retention::Full) {
            return Ok(None);
        }
        let rows = self.held_bytes(ids.len().saturating_add(self.text_rows(ids.len(), options)));
        let needed = rows.saturating_add(self.base.head_bytes());
        self.expect_fit(name, needed)?;
        Ok(Some(needed))
    }

    /// Sets how prompts are read.
    #[must_use]
    pub fn with_prefill_options(mut self, options: PrefillOptions) -> Self {
        self.prefill_options = options;
        self
    }

    /// Sets where it is looked up what was read of prompts before, and where those that are read are stored. Prompts that
    /// come behind a text that was read before have nothing of it.
    ///
    /// * `prefixes`: of this model, and of caches like the empty one
    #[must_use]
    pub fn with_prefixes(mut self, prefixes: Option<&'a Prefixes<'a>>) -> Self {
        self.prefixes = prefixes.filter(|_| self.base.seen() == 0);
        self
    }

    /// Sets by which clock time is measured and shared; the system's by default.
    #[must_use]
    pub fn with_clock(mut self, clock: Box<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Generates all texts.
    ///
    /// * `observe`: makes the observer of a prompt's prefill, called once for each prompt; breaking ends all texts that are
    ///   under way
    /// * `go_on`: asked before every step and prompt; breaking ends all texts that are under way
    /// * `done`: gets each text as it ends, in whatever order, also while a prompt is read; after an error, those under way
    ///   as far as they are
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
        let result = self.run_to_end(&mut observe, &mut Caller { go_on: &mut go_on, done: &mut done });
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
        caller: &mut Caller<'_>,
    ) -> Result<()> {
        loop {
            if let Some((read, logits)) = self.take_held()? {
                self.join(read, &logits, caller)?;
            } else if self.has_room() {
                self.read(observe, caller)?;
            } else if self.active.is_empty() {
                return Ok(());
            } else {
                self.step(caller)?;
            }
        }
    }

    /// Bytes of a sequence beyond those that all begin with.
    fn own_bytes(&self, cache: &AdaptiveKvCache) -> CacheBytes {
        let (all, base) = (cache.bytes(), self.base.bytes());
        CacheBytes {
            raw: all.raw.saturating_sub(base.raw),
            kept: all.kept.saturating_sub(base.kept),
            allocated: all.allocated.saturating_sub(base.allocated),
            mapped: all.mapped.saturating_sub(base.mapped),
        }
    }

    /// Bytes of some tokens that all heads keep, but for those that have left a sliding window.
    fn held_bytes(&self, tokens: usize) -> usize {
        let config = self.model.config();
        config.held_tokens(tokens).saturating_mul(config.heads.num_kv_heads * self.row_bytes)
    }

    /// Rows of a head of the tokens that may be generated after a prompt; the last one is never stored, and some heads go
    /// on evicting.
    fn text_rows(&self, prompt_len: usize, options: &GenerationOptions) -> usize {
        let context = self.model.config().context_length;
        let room = context.saturating_sub(self.base.seen() + prompt_len);
        let tokens = options.max_new_tokens.saturating_sub(1).min(room);
        self.base.retention().most_new_rows(tokens)
    }

    /// Bytes that a prompt and the tokens after it come to.
    ///
    /// * `prompt`: bytes that are allocated for it
    fn bytes_with_text(&self, prompt: usize, prompt_len: usize, options: &GenerationOptions) -> usize {
        let text = self.held_bytes(self.text_rows(prompt_len, options));
        prompt.saturating_add(text).min(self.held_bytes(usize::MAX).saturating_add(self.base.head_bytes()))
    }

    /// Bytes that a prompt which was not read yet is expected to need.
    fn expected_bytes(&self, prompt_len: usize, options: &GenerationOptions) -> usize {
        let kept_ratio = 1.0 - self.prompts_kv.saved_ratio();
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let prompt = (prompt_len as f64 * kept_ratio * self.held_bytes(1) as f64) as usize;
        self.bytes_with_text(prompt, prompt_len, options)
    }

    /// Whether `needed` bytes fit beside what is put aside for the sequences under way.
    fn fits(&self, needed: usize) -> bool {
        let reserved = self.active.iter().map(|active| active.reserved).fold(needed, usize::saturating_add);
        self.limits.kv_bytes.is_none_or(|budget| reserved <= budget)
    }

    /// Whether the next prompt may be read.
    fn has_room(&self) -> bool {
        if self.held.is_some() {
            return false;
        }
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

    /// Reads the next prompt, which is held then.
    fn read<O: PrefillObserver>(
        &mut self,
        observe: &mut impl FnMut(usize) -> O,
        caller: &mut Caller<'_>,
    ) -> Result<()> {
        caller.ask()?;
        let Some(Waiting { index, name, ids, options, .. }) = self.waiting.pop_front() else { return Ok(()) };
        let (model, prefill_options) = (self.model, self.prefill_options);
        let found = self.prefixes.and_then(|prefixes| prefixes.longest(&ids));
        let mut cache = found.map_or_else(|| self.base.clone(), |cache| cache.with_bounds(self.base.bounds()));
        let unread = &ids[cache.seen() - self.base.seen()..];
        let started = self.clock.now();
        let mut reading = Reading::new(self, caller, observe(index));
        let prefill = model.prefill_with(unread, &mut cache, prefill_options, &mut reading);
        let lent = reading.end()?;
        let logits = prefill.map_err(|error| error.in_place(|| name.clone()))?.logits;
        self.summary.prefill_time += self.clock.now().saturating_sub(started + lent);
        self.summary.prompt_tokens += unread.len();
        if let Some(prefixes) = self.prefixes {
            prefixes.put(&cache);
        }
        let (prompt_tokens, kv) = (ids.len(), self.own_bytes(&cache));
        self.prompts_kv = [self.prompts_kv, kv].into_iter().sum();
        let reserved = self.bytes_with_text(kv.allocated, prompt_tokens, &options);
        if self.limits.kv_bytes.is_some() && self.base.retention().eviction().is_none() {
            // Not a row more than what is put aside.
            cache.make_room(self.text_rows(prompt_tokens, &options));
        }
        let sequence = Sequence::new(self.tokenizer, Sampler::new(options.sampling, cache.ids()), options);
        let read =
            Active { index, name, prompt_tokens, cache, kv, sequence, drafts: None, text: String::new(), reserved };
        self.held = Some((read, logits));
        self.note_bytes();
        Ok(())
    }

    /// The prompt that was read, if it fits beside the others.
    ///
    /// # Errors
    /// [`Error::Input`] if it does not even fit alone.
    fn take_held(&mut self) -> Result<Option<(Active<'a>, Vec<f32>)>> {
        let Some((read, _)) = &self.held else { return Ok(None) };
        if self.fits(read.reserved) {
            return Ok(self.held.take());
        }
        if self.active.is_empty() {
            self.expect_fit(&read.name, read.reserved)?;
        }
        Ok(None)
    }

    /// Puts a prompt under way and draws its first token.
    fn join(&mut self, read: Active<'a>, logits: &[f32], caller: &mut Caller<'_>) -> Result<()> {
        let index = self.active.len();
        self.active.push(read);
        self.summary.most_sequences = self.summary.most_sequences.max(self.active.len());
        self.accept(index, logits)?;
        self.finish(index).into_iter().for_each(&mut *caller.done);
        Ok(())
    }

    /// Draws a sequence's next token.
    fn accept(&mut self, index: usize, logits: &[f32]) -> Result<()> {
        self.active[index].accept(logits, self.model, 0)
    }

    fn note_bytes(&mut self) {
        let sequences = self.active.iter().chain(self.held.iter().map(|(read, _)| read));
        let allocated = sequences.map(|sequence| self.own_bytes(&sequence.cache).allocated).sum();
        self.summary.most_kv_bytes = self.summary.most_kv_bytes.max(allocated);
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
    /// Draws the next token.
    ///
    /// * `ahead`: tokens that the cache holds beyond the text
    fn accept(&mut self, logits: &[f32], model: &Llama, ahead: usize) -> Result<()> {
        if self.sequence.finish().is_none() {
            let goes_on = model.goes_on(&self.cache, ahead);
            let step =
                check_logits(logits, self.cache.seen() - ahead).and_then(|()| self.sequence.accept(logits, goes_on));
            self.text += &step.map_err(|error| error.in_place(|| self.name.clone()))?.text;
        }
        Ok(())
    }

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
