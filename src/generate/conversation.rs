//! A conversation of several turns on one cache.
//!
//! Every turn's new tokens go on top of what the heads kept of the turns before, at the positions that follow, and are
//! profiled again together with the answer before them. The model never reads the earlier turns anew.
//!
//! Not for: reading lines or showing answers; the caller does both.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{DraftCounts, FinishReason, Generation, GenerationOptions, Sampler};
use crate::cache::{AdaptiveKvCache, Bounds, KvDtype, LayerSummary, Overflow, Retention};
use crate::error::{Error, Result};
use crate::model::{Llama, PrefillObserver, PrefillOptions};
use crate::store::Prefixes;
use crate::tokenizer::{ChatContext, ChatMessage, Tokenizer};

/// A conversation: the messages so far, and the cache that holds them.
///
/// ```no_run
/// use std::ops::ControlFlow;
///
/// use adaptive_kvcache::cache::{KvDtype, Retention};
/// use adaptive_kvcache::checkpoint::{WeightDtype, load};
/// use adaptive_kvcache::generate::{Conversation, GenerationOptions};
/// use adaptive_kvcache::tokenizer::ChatMessage;
///
/// # fn main() -> adaptive_kvcache::Result<()> {
/// let loaded = load("model.gguf", WeightDtype::Auto)?;
/// let opening = vec![ChatMessage::new("system", "You answer in one sentence.")];
/// let mut chat = Conversation::new(&loaded.model, &loaded.tokenizer, KvDtype::F16, Retention::Full, opening)?;
/// let options = GenerationOptions::default();
/// let turn = chat.ask("Who wrote Around the World in Eighty Days?", &options, &mut (), &mut |text| {
///     print!("{text}");
///     ControlFlow::Continue(())
/// })?;
/// # let _ = turn;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Conversation<'a> {
    model: &'a Llama,
    tokenizer: &'a Tokenizer,
    opening: Vec<ChatMessage>,
    /// Holds the opening, if it was read before.
    opening_cache: Option<AdaptiveKvCache>,
    messages: Vec<ChatMessage>,
    context: ChatContext,
    /// How many of the messages the cache holds; none, if it has to be filled anew.
    cached: usize,
    cache: AdaptiveKvCache,
    prefill_options: PrefillOptions,
    prefixes: Option<&'a Prefixes<'a>>,
    /// The token with which the last answer broke off: it is part of the text, and the cache has not got it.
    unread: Option<u32>,
    /// The cache holds tokens that are not part of the messages: those of a stop text.
    stale: bool,
    /// What drew the last answer: the next goes on with its random numbers.
    sampler: Option<Sampler>,
    turns: Vec<Turn>,
}

/// What one question and its answer came to.
#[derive(Debug, Clone)]
pub struct Turn {
    /// The position of its first token, the last of an answer before it that broke off included.
    pub first_position: usize,
    /// How many positions had been won [so far](AdaptiveKvCache::shifted) when it began.
    pub shifted: usize,
    /// Tokens that were read for this turn: the question in the template's markers.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub answer_tokens: usize,
    /// Whether the whole conversation had to be read again, since a turn before failed or ended at a stop text, or the
    /// chat template writes earlier messages differently as the conversation goes on.
    pub reread: bool,
    /// Tokens that were decided about: the question, and the answer before it.
    pub profiled_tokens: usize,
    /// How many of them a KV head kept, the mean over all heads.
    pub mean_kept: f64,
    /// Why the answer ended.
    pub finish_reason: FinishReason,
    /// Time that reading took, profiling included.
    pub prefill_time: Duration,
    /// Time that the answer took.
    pub decode_time: Duration,
    /// What became of tokens that were guessed.
    pub drafts: DraftCounts,
}

/// How many positions from the first on a KV head kept, the mean over all heads.
#[expect(clippy::cast_precision_loss)]
fn mean_kept(layers: &[LayerSummary], first: usize) -> f64 {
    let heads = || layers.iter().flat_map(|layer| &layer.heads);
    let is_new = |position: &&u32| **position as usize >= first;
    let kept: usize = heads().map(|head| head.positions.iter().filter(is_new).count()).sum();
    kept as f64 / heads().count().max(1) as f64
}

impl<'a> Conversation<'a> {
    /// Starts a conversation; nothing is read yet.
    ///
    /// * `opening`: messages before the first question, such as the system's
    ///
    /// # Errors
    /// As [`Llama::new_cache`].
    pub fn new(
        model: &'a Llama,
        tokenizer: &'a Tokenizer,
        kv_dtype: KvDtype,
        retention: Retention,
        opening: Vec<ChatMessage>,
    ) -> Result<Self> {
        let cache = model.new_cache(kv_dtype, retention)?;
        let messages = opening.clone();
        Ok(Self {
            model,
            tokenizer,
            opening,
            opening_cache: None,
            messages,
            context: ChatContext::default(),
            cached: 0,
            cache,
            prefill_options: PrefillOptions::default(),
            prefixes: None,
            unread: None,
            stale: false,
            sampler: None,
            turns: Vec::new(),
        })
    }

    /// Goes on with a conversation that a cache holds.
    ///
    /// * `opening`: how many of the messages are left by a [`reset`](Self::reset)
    /// * `unread`: the token with which the last answer broke off, which the cache has not got
    ///
    /// # Errors
    /// [`Error::Input`] if there are fewer messages than the opening has.
    pub fn resume(
        model: &'a Llama,
        tokenizer: &'a Tokenizer,
        cache: AdaptiveKvCache,
        messages: Vec<ChatMessage>,
        opening: usize,
        unread: Option<u32>,
    ) -> Result<Self> {
        let opening = messages.get(..opening).map(<[_]>::to_vec);
        let opening =
            opening.ok_or_else(|| Error::input("a conversation has fewer messages than it was opened with"))?;
        Ok(Self {
            model,
            tokenizer,
            opening_cache: (opening.len() == messages.len()).then(|| cache.clone()),
            opening,
            cached: messages.len(),
            messages,
            context: ChatContext::default(),
            cache,
            prefill_options: PrefillOptions::default(),
            prefixes: None,
            unread,
            stale: false,
            sampler: None,
            turns: Vec::new(),
        })
    }

    /// What it was opened with, and the token with which the last answer broke off, which the cache has not got: for
    /// [`resume`](Self::resume). `None` if the cache does not hold the messages as they are: if nothing was asked yet, or
    /// a stop text ended the last answer.
    #[must_use]
    pub fn resumable(&self) -> Option<(usize, Option<u32>)> {
        let is_held = !self.stale && self.cached == self.messages.len() && self.cache.is_consistent();
        is_held.then_some((self.opening.len(), self.unread))
    }

    /// Sets what the chat template is told besides the messages: tools, documents, variables.
    #[must_use]
    pub fn with_chat_context(mut self, context: ChatContext) -> Self {
        self.context = context;
        self
    }

    /// Sets what happens when the conversation reaches its budget in bytes, or the end of the context. The messages that it is
    /// opened with stay in any case.
    #[must_use]
    pub fn with_bounds(mut self, bounds: Bounds) -> Self {
        self.cache = self.cache.with_bounds(bounds);
        self.opening_cache = self.opening_cache.map(|cache| cache.with_bounds(bounds));
        self
    }

    /// Sets how turns are read.
    #[must_use]
    pub fn with_prefill_options(mut self, options: PrefillOptions) -> Self {
        self.prefill_options = options;
        self
    }

    /// Sets where it is looked up what was read before, whenever the conversation is read from its beginning.
    ///
    /// * `prefixes`: of this model, and of caches like the conversation's
    #[must_use]
    pub fn with_prefixes(mut self, prefixes: Option<&'a Prefixes<'a>>) -> Self {
        self.prefixes = prefixes;
        self
    }

    /// All messages so far.
    #[must_use]
    pub fn messages(&self) -> &[ChatMessage] {
        &self.messages
    }

    /// What the chat template is told besides the messages.
    #[must_use]
    pub fn chat_context(&self) -> &ChatContext {
        &self.context
    }

    /// The turns since the start or the last [`reset`](Self::reset).
    #[must_use]
    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// How many rows a head holds of each turn, its question and its answer, the mean over all heads; of the first also those
    /// of what came before it. `None` of turns before what is kept [moved together](Overflow::Shift): their rows lie among
    /// one another's positions.
    #[must_use]
    #[expect(clippy::cast_precision_loss)]
    pub fn held(&self) -> Vec<Option<f64>> {
        let ledgers = self.cache.ledgers();
        let heads: usize = ledgers.iter().map(|ledger| ledger.layout().num_kv_heads).sum();
        // Positions of earlier turns are others now.
        let moved = self.turns.partition_point(|turn| turn.shifted != self.cache.shifted());
        let turns = &self.turns[moved..];
        let mut rows = vec![0_usize; turns.len()];
        for position in ledgers.iter().flat_map(|ledger| ledger.positions().concat()) {
            let begun = turns.partition_point(|turn| turn.first_position <= position as usize);
            // What came before the first turn of all counts as that turn's.
            let turn = if moved == 0 { Some(begun.saturating_sub(1)) } else { begun.checked_sub(1) };
            if let Some(count) = turn.and_then(|turn| rows.get_mut(turn)) {
                *count += 1;
            }
        }
        let means = rows.into_iter().map(|count| Some(count as f64 / heads.max(1) as f64));
        std::iter::repeat_n(None, moved).chain(means).collect()
    }

    /// What the heads keep.
    #[must_use]
    pub fn cache(&self) -> &AdaptiveKvCache {
        &self.cache
    }

    /// Forgets everything but the opening. Random numbers go on, so that the same question may be answered otherwise.
    pub fn reset(&mut self) {
        self.messages.clone_from(&self.opening);
        self.turns.clear();
        self.empty_cache();
        if let Some(cache) = &self.opening_cache {
            (self.cache, self.cached) = (cache.clone(), self.opening.len());
        }
    }

    /// Asks, and generates the answer.
    ///
    /// * `options`: for this answer; after one that a stop text ended, the next turn reads the conversation anew. Answers
    ///   go on with the random numbers of those before, unless the seed is another. The repeat penalty looks at the whole
    ///   conversation.
    /// * `show`: gets the answer's text as it comes; breaking ends the answer, which stays part of the conversation
    ///
    /// # Errors
    /// [`Error::Input`] if the template refuses the question, or the context has no room for it: the conversation is then
    /// as it was.
    /// [`Error::Interrupted`] and whatever the observer fails with: the question is dropped, and the next turn reads the
    /// conversation anew. Errors while answering: as the latter.
    pub fn ask(
        &mut self,
        question: &str,
        options: &GenerationOptions,
        observer: &mut dyn PrefillObserver,
        show: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<&Turn> {
        self.tokenizer.check_length(question)?;
        let before = self.messages.len();
        self.messages.push(ChatMessage::new("user", question));
        let seen = self.cache.seen();
        let result = self.answer(options, observer, show);
        if result.is_err() {
            self.messages.truncate(before);
        }
        match result {
            Ok(turn) => {
                self.turns.push(turn);
                self.turns.last().ok_or(Error::Interrupted)
            }
            // Refused before anything was read.
            Err(error @ Error::Input { .. })
                if self.cached > 0 && self.cache.seen() == seen && self.cache.is_consistent() =>
            {
                Err(error)
            }
            Err(error) => {
                self.empty_cache();
                Err(error)
            }
        }
    }

    fn empty_cache(&mut self) {
        self.cache = self.cache.emptied();
        self.cached = 0;
        self.unread = None;
        self.stale = false;
    }

    /// Ids of the messages that the cache has not got.
    fn new_ids(&mut self) -> Result<(Vec<u32>, bool)> {
        if self.stale {
            self.empty_cache();
        }
        let chat = self.tokenizer.chat(&self.context)?;
        let (previous, new) = self.messages.split_at(self.cached);
        if previous.is_empty() {
            return Ok((chat.encode(new)?, !self.turns.is_empty()));
        }
        match chat.encode_turn(previous, new) {
            Ok(ids) => Ok((self.unread.into_iter().chain(ids).collect(), false)),
            // The template changes earlier turns.
            Err(Error::Unsupported { .. }) => {
                let ids = chat.encode(&self.messages)?;
                self.empty_cache();
                Ok((ids, true))
            }
            Err(error) => Err(error),
        }
    }

    /// Sees to it that the context has room for a turn.
    fn make_room(&mut self, new: usize) -> Result<()> {
        let context = self.model.config().context_length;
        self.model.make_positions(&mut self.cache, new)?;
        let seen = self.cache.seen();
        if seen.saturating_add(new) <= context {
            return Ok(());
        }
        if self.turns.is_empty() {
            let reason = format!("the question takes {new} tokens, more than the model's context of {context}");
            return Err(Error::input(reason).with_hint("shorten it, or the messages before it"));
        }
        let taken = if seen > 0 {
            format!("{seen} of {context} tokens are taken, and this turn needs {new}")
        } else {
            format!("with this turn it has {new} tokens, and the context is {context}")
        };
        // Of a conversation that has to be read again, nothing is there to move.
        let hint = match self.cache.bounds().overflow {
            Overflow::Stop => "/reset forgets it, and makes room; --context-overflow shift goes on",
            Overflow::Shift => "/reset forgets it, and makes room",
        };
        Err(Error::input(format!("the conversation is full: {taken}")).with_hint(hint))
    }

    /// The messages that it was opened with are the first of the text: they stay, if there is a beginning to tell them by.
    fn pin_opening(&mut self) {
        if self.cache.budget().is_none() && self.cache.bounds().overflow == Overflow::Stop || self.opening.is_empty() {
            return;
        }
        // A template that can't write them alone puts something in front.
        if let Ok(ids) = self.tokenizer.chat(&self.context).and_then(|chat| chat.encode_beginning(&self.opening)) {
            self.cache.pin(ids.len());
        }
    }

    /// Takes what was read before from the store, and the rest of the ids.
    fn without_prefix(&mut self, ids: Vec<u32>) -> Vec<u32> {
        let prefixes = self.prefixes.filter(|_| self.cache.seen() == 0);
        match prefixes.and_then(|prefixes| prefixes.longest(&ids)) {
            Some(cache) => {
                self.cache = cache.with_bounds(self.cache.bounds());
                ids[self.cache.seen()..].to_vec()
            }
            None => ids,
        }
    }

    fn answer(
        &mut self,
        options: &GenerationOptions,
        observer: &mut dyn PrefillObserver,
        show: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Turn> {
        let (ids, reread) = self.new_ids()?;
        self.make_room(ids.len())?;
        let ids = self.without_prefix(ids);
        self.pin_opening();
        let first_position = self.cache.seen();
        let (first_profiled, shifted) = (first_position - self.cache.undecided(), self.cache.shifted());
        let started = Instant::now();
        let prefill = self.model.prefill_with(&ids, &mut self.cache, self.prefill_options, observer)?;
        let prefill_time = started.elapsed();

        let started = Instant::now();
        let mut text = String::new();
        let sampler = Sampler::after(self.sampler.take(), options.sampling, self.cache.ids());
        let (model, tokenizer, cache) = (self.model, self.tokenizer, &mut self.cache);
        let mut generation =
            Generation::with_sampler(model, tokenizer, cache, sampler, prefill.logits, options.clone());
        let mut failure = None;
        for step in generation.by_ref() {
            match step {
                Ok(step) => {
                    text += &step.text;
                    if show(&step.text).is_break() {
                        break;
                    }
                }
                // As if it had been broken off before this token.
                Err(Error::Interrupted) => break,
                Err(error) => failure = Some(error),
            }
        }
        let held_back = generation.held_back();
        let (finish_reason, answer) = (generation.finish_reason(), generation.ids().to_vec());
        let drafts = generation.drafts();
        self.sampler = Some(generation.into_sampler());
        if let Some(error) = failure {
            // What came before the failure is shown, whole.
            let _ = show(&held_back);
            return Err(error);
        }
        text += &held_back;
        // The last token was drawn and not read. One that ended the answer is not part of it: the template ends turns.
        self.unread = answer.last().copied().filter(|_| finish_reason != FinishReason::Eos);
        // A token that was given up halfway is in some layers only.
        self.stale = finish_reason == FinishReason::Stop || !self.cache.is_consistent();
        self.messages.push(ChatMessage::new("assistant", text));
        self.cached = self.messages.len();
        Ok(Turn {
            first_position,
            shifted,
            prompt_tokens: ids.len(),
            answer_tokens: answer.len(),
            reread,
            profiled_tokens: first_position + ids.len() - first_profiled,
            mean_kept: mean_kept(&prefill.layers, first_profiled),
            finish_reason,
            prefill_time,
            decode_time: started.elapsed(),
            drafts,
        })
    }
}
