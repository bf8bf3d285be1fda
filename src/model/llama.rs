//! The whole model, whatever computes it.

use std::fmt;
use std::sync::Arc;

use super::Model;
use super::observer::PrefillObserver;
use super::options::PrefillOptions;
use super::prefill::{ForkedPrefill, Prefill};
use crate::arch::{LlamaConfig, Rope};
use crate::backend::{Backend, Weights, plain};
use crate::cache::{AdaptiveKvCache, KvDtype, Retention, Rows};
use crate::error::{Error, Result};
use crate::kernels::quant::Compute;
use crate::numbers::check_logits;
use crate::ops::Ops;

/// A LLaMA model's weights. It holds no state: every call is given the cache that it reads and writes.
#[derive(Debug, Clone)]
pub struct Llama {
    model: Arc<dyn Forward>,
}

/// A model of some backend: what is done with it, once it is known to fit.
trait Forward: fmt::Debug + Send + Sync {
    fn config(&self) -> &LlamaConfig;

    fn name(&self) -> &'static str;

    fn decoding(&self) -> &'static str;
    fn compute(&self) -> Option<Compute>;

    fn ops(&self) -> Option<&Ops>;

    fn new_cache(&self, dtype: KvDtype, retention: Retention) -> Result<AdaptiveKvCache>;

    fn expect_shape(&self, cache: &AdaptiveKvCache) -> Result<()>;

    fn prefill(
        &self,
        ids: &[u32],
        cache: &mut AdaptiveKvCache,
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<Prefill>;

    fn prefill_forks(
        &self,
        ids: &[u32],
        caches: &mut [AdaptiveKvCache],
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<ForkedPrefill>;

    fn decode(&self, ids: &[u32], caches: &mut [&mut AdaptiveKvCache], logits: &mut Vec<f32>) -> Result<()>;

    fn decodes_runs(&self) -> bool;

    fn decode_run(&self, ids: &[u32], cache: &mut AdaptiveKvCache, logits: &mut Vec<f32>) -> Result<()>;

    fn take_back(&self, cache: &mut AdaptiveKvCache, count: usize) -> Result<()>;

    fn move_together(&self, cache: &mut AdaptiveKvCache) -> Result<()>;

    fn cut_back(&self, cache: &mut AdaptiveKvCache) -> Result<()>;

    fn decode_plain(
        &self,
        id: u32,
        cache: &mut AdaptiveKvCache,
        observe: Option<plain::Observe<'_>>,
    ) -> Result<Vec<f32>>;
}

impl<B: Backend> Model<B> {
    /// Refuses a cache that this model or its backend can't have.
    fn expect_cache(&self, dtype: KvDtype, retention: &Retention) -> Result<()> {
        let (has_window, evicts) = (self.config.sliding_window.is_some(), retention.eviction().is_some());
        if has_window && evicts {
            return Err(Error::unsupported("evicting while tokens are generated, by a model with a sliding window")
                .with_hint("set `decode` to \"append\": what the window has passed leaves the cache all the same"));
        }
        if (has_window || evicts) && dtype.settled() != dtype.newest() {
            let what = format!("a {} KV cache where rows go while tokens are generated", dtype.name());
            return Err(Error::unsupported(what).with_hint("store it as q8_0, or as q8_0/q4_0"));
        }
        if retention.refits() && has_window {
            return Err(Error::unsupported("`refit` of a model with a sliding window").with_hint("leave `refit` out"));
        }
        if retention.refits() && !<B::Rows as Rows>::can_refit() {
            return Err(Error::unsupported(format!("`refit` by the backend {}", B::NAME))
                .with_hint("leave `refit` out, or use --backend kernels"));
        }
        retention.expect_model(self.config.num_layers, self.config.heads)
    }
}

impl<B: Backend> Forward for Model<B> {
    fn config(&self) -> &LlamaConfig {
        &self.config
    }

    fn name(&self) -> &'static str {
        B::NAME
    }

    fn decoding(&self) -> &'static str {
        self.backend.decoding()
    }

    fn compute(&self) -> Option<Compute> {
        self.backend.compute()
    }

    fn ops(&self) -> Option<&Ops> {
        self.backend.ops()
    }

    fn new_cache(&self, dtype: KvDtype, retention: Retention) -> Result<AdaptiveKvCache> {
        self.expect_cache(dtype, &retention)?;
        AdaptiveKvCache::new(self.config.num_layers, &self.backend.empty_rows(dtype)?, retention)
            .with_windows::<B::Rows>(&self.windows())
    }

    fn expect_shape(&self, cache: &AdaptiveKvCache) -> Result<()> {
        cache.expect_shape::<B::Rows>(self.config.num_layers, self.config.heads)?;
        let found: Vec<Option<usize>> = cache.ledgers().iter().map(|ledger| ledger.window()).collect();
        let expected = self.windows();
        if found == expected { Ok(()) } else { Err(Error::shape("a cache's windows", expected, found)) }
    }

    fn prefill(
        &self,
        ids: &[u32],
        cache: &mut AdaptiveKvCache,
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<Prefill> {
        self.prefill(ids, cache, options, observer)
    }

    fn prefill_forks(
        &self,
        ids: &[u32],
        caches: &mut [AdaptiveKvCache],
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<ForkedPrefill> {
        self.prefill_forks(ids, caches, options, observer)
    }

    fn decode(&self, ids: &[u32], caches: &mut [&mut AdaptiveKvCache], logits: &mut Vec<f32>) -> Result<()> {
        let angles: Vec<_> = caches.iter().flat_map(|cache| self.rope.angles(cache.seen(), 1)).collect();
        self.backend.decode(&self.weights, ids, &angles, caches, logits)
    }

    fn decodes_runs(&self) -> bool {
        self.backend.decodes_runs()
    }

    fn decode_run(&self, ids: &[u32], cache: &mut AdaptiveKvCache, logits: &mut Vec<f32>) -> Result<()> {
        // Each as of a sequence that ends with it: a rope may depend on the length.
        let positions = cache.seen()..cache.seen() + ids.len();
        let angles: Vec<_> = positions.flat_map(|position| self.rope.angles(position, 1)).collect();
        self.backend.decode_run(&self.weights, ids, &angles, cache, logits)
    }

    fn take_back(&self, cache: &mut AdaptiveKvCache, count: usize) -> Result<()> {
        self.backend.take_back(cache, count)
    }

    fn move_together(&self, cache: &mut AdaptiveKvCache) -> Result<()> {
        self.move_rows_together(cache)
    }

    fn cut_back(&self, cache: &mut AdaptiveKvCache) -> Result<()> {
        self.cut_to_budget(cache)
    }

    fn decode_plain(
        &self,
        id: u32,
        cache: &mut AdaptiveKvCache,
        observe: Option<plain::Observe<'_>>,
    ) -> Result<Vec<f32>> {
        let angles = self.rope.angles(cache.seen(), 1);
        plain::decode(&self.backend, &self.weights, id, &angles, cache, observe)
    }
}

impl Llama {
    /// Puts a model together.
    ///
    /// # Errors
    /// [`Error::Shape`] if weights are not of the configuration's sizes.
    pub fn new<B: Backend>(config: LlamaConfig, backend: B, weights: Weights<B>) -> Result<Self> {
        weights.expect_sizes(&config)?;
        let rope = Rope::new(&config.rope);
        Ok(Self { model: Arc::new(Model { config, rope, backend, weights }) })
    }

    /// What computes it, in reports: see [`Backend::NAME`].
    #[must_use]
    pub fn backend(&self) -> &'static str {
        self.model.name()
    }

    /// How it decodes tokens, in reports: see [`Backend::decoding`].
    #[must_use]
    pub fn decoding(&self) -> &'static str {
        self.model.decoding()
    }

    /// How its matrices of blocks are multiplied: see [`Backend::compute`].
    #[must_use]
    pub fn compute(&self) -> Option<Compute> {
        self.model.compute()
    }

    /// What its candle operations run on, and how many there were; `None` if there are none.
    #[must_use]
    pub fn ops(&self) -> Option<&Ops> {
        self.model.ops()
    }

    /// Sizes of the model.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        self.model.config()
    }

    /// An empty cache for one sequence.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the heads are not whole blocks of a quantised format, see [`KvDtype::check`], or tensors
    /// hold the cache and have no such numbers, see [`KvDtype::tensor_dtype`]; if heads are to go on evicting and layers
    /// have a sliding window; or if one of the two drops rows while tokens are generated, of a [`KvDtype::Mixed`] cache; or if values are to be
    /// [fitted](crate::compress::AdaptiveConfig::refit) of such layers, or by a backend that does not.
    pub fn new_cache(&self, dtype: KvDtype, retention: Retention) -> Result<AdaptiveKvCache> {
        self.model.new_cache(dtype, retention)
    }

    /// Processes a prompt as [`prefill_with`](Self::prefill_with) does, with the default options.
    ///
    /// # Errors
    /// As [`prefill_with`](Self::prefill_with).
    pub fn prefill(
        &self,
        ids: &[u32],
        cache: &mut AdaptiveKvCache,
        observer: &mut dyn PrefillObserver,
    ) -> Result<Prefill> {
        self.prefill_with(ids, cache, PrefillOptions::default(), observer)
    }

    /// Processes a prompt, fills the cache with what its heads keep, and returns the logits of the next token.
    ///
    /// Layers are processed one after the other over the whole prompt, in chunks of rows; a layer's full keys and values
    /// are dropped before the next layer starts. So beside what is kept, at any time one layer's full keys and values
    /// exist; were the chunks processed one after the other through all layers, all layers' would, until the last chunk.
    ///
    /// On top of a filled cache (a further turn of a conversation), the prompt's tokens get the positions that follow and
    /// attend to all that each head keeps, and to each other. Each head is then profiled again, for the prompt and what
    /// was decoded since the one before; what it kept earlier stays. A share is of these tokens alone, so that what is
    /// kept of a conversation grows with it. A [budget in bytes](crate::compress::Budget::Bytes) is for all of it: what was
    /// kept earlier competes with these tokens, by the scores that it had then, or, where a
    /// [method](crate::compress::Method::judges_past) can, by what these tokens' queries see of it, if that is more; see
    /// [`Bounds`](crate::cache::Bounds) for what stays in any case. Where heads go on
    /// evicting while tokens are generated ([`Eviction`](crate::compress::Eviction)), what they hold when the prompt comes
    /// stays, and only the prompt is decided about.
    ///
    /// * `ids`: at least one token; with what the cache has seen at most the context length
    /// * `cache`: from [`new_cache`](Self::new_cache)
    /// * `options`: results do not depend on them, up to the order of additions
    ///
    /// # Errors
    /// [`Error::Input`] for an empty or too long prompt, or an unknown id; [`Error::NotANumber`] if a layer's output (on a
    /// device: the logits) or what chooses is not a number; [`Error::Unsupported`] if maps are wanted of a
    /// further prompt; [`Error::Interrupted`] if the observer says so or a [stop](crate::stop) is requested; whatever the
    /// observer fails with. After an error
    /// some layers may hold the prompt: drop the cache and start from a new one.
    pub fn prefill_with(
        &self,
        ids: &[u32],
        cache: &mut AdaptiveKvCache,
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<Prefill> {
        self.check_room(cache.seen(), ids.len())?;
        self.model.expect_shape(cache)?;
        let holds_bytes = cache.budget().is_some() && cache.retention().eviction().is_some();
        if cache.seen() > 0 && holds_bytes {
            return Err(Error::unsupported("a further prompt within a budget in bytes where heads go on evicting")
                .with_hint("set `decode` to \"append\", or give a share with `kept_ratio`"));
        }
        if cache.seen() > 0 && observer.map_side().is_some() {
            return Err(Error::unsupported("drawing the attention of a further prompt"));
        }
        self.model.prefill(ids, cache, options, observer)
    }

    /// Processes a prompt once for several caches, each of which keeps what it would have kept of a prompt of its own; the
    /// logits of the next token are the same for all.
    ///
    /// * `ids`: at least one token, within the context length
    /// * `caches`: at least one, each from [`new_cache`](Self::new_cache), with retentions and dtypes of their own
    /// * `observer`: is told of progress only
    ///
    /// # Errors
    /// As [`prefill_with`](Self::prefill_with); [`Error::Unsupported`] if a cache is not empty, [`Error::Shape`] if there is
    /// none.
    pub fn prefill_forks(
        &self,
        ids: &[u32],
        caches: &mut [AdaptiveKvCache],
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<ForkedPrefill> {
        self.check_room(0, ids.len())?;
        if caches.is_empty() {
            return Err(Error::shape("caches of a prompt", "at least 1", 0));
        }
        for cache in &*caches {
            self.model.expect_shape(cache)?;
            if cache.seen() > 0 {
                return Err(Error::unsupported("one prompt for several caches that hold something already"));
            }
        }
        self.model.prefill_forks(ids, caches, options, observer)
    }

    /// Processes one more token and returns the logits of the next, `[vocab_size]`.
    ///
    /// # Errors
    /// [`Error::Input`] if the context is full or the id is unknown; the cache is then as it was. [`Error::Interrupted`] if
    /// a [stop](crate::stop) was requested some time ago: some layers may have got the token, so drop the cache.
    pub fn decode(&self, id: u32, cache: &mut AdaptiveKvCache) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        self.decode_batch(&[id], &mut [cache], &mut logits)?;
        Ok(logits)
    }

    /// Processes one more token of each of several sequences. Weights are read once for all of them; the results are
    /// those of [`decode`](Self::decode), bit by bit.
    ///
    /// * `ids`: `[batch]`
    /// * `caches`: `[batch]`, each with at least one token, of one prompt each
    /// * `logits`: overwritten with those of the next tokens, `[batch, vocab_size]`; give the same buffer again
    ///
    /// # Errors
    /// [`Error::Input`] if a context is full or an id is unknown, [`Error::Shape`] if there are not as many caches as ids
    /// or one is of another model: the caches are then as they were. [`Error::NotANumber`] if logits of a sequence are no
    /// numbers; [`Error::Interrupted`] as of [`decode`](Self::decode).
    pub fn decode_batch(&self, ids: &[u32], caches: &mut [&mut AdaptiveKvCache], logits: &mut Vec<f32>) -> Result<()> {
        self.decode_unchecked(ids, caches, logits)?;
        for (cache, logits) in caches.iter().zip(logits.chunks_exact(self.config().vocab_size)) {
            check_logits(logits, cache.seen())?;
        }
        Ok(())
    }

    /// [`decode_batch`](Self::decode_batch) for a caller that looks at the logits itself, as it knows whose they are.
    pub(crate) fn decode_unchecked(
        &self,
        ids: &[u32],
        caches: &mut [&mut AdaptiveKvCache],
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        if ids.len() != caches.len() {
            return Err(Error::shape("a batch's caches", ids.len(), caches.len()));
        }
        for cache in &*caches {
            self.check_room(cache.seen(), 1)?;
            self.model.expect_shape(cache)?;
        }
        if ids.is_empty() {
            logits.clear();
            return Ok(());
        }
        self.model.decode(ids, caches, logits)?;
        for (cache, &id) in caches.iter_mut().zip(ids) {
            cache.advance(id);
        }
        Ok(())
    }

    /// Whether [`decode_run`](Self::decode_run) is possible: with the CPU kernels, and caches of which no head goes on
    /// evicting.
    #[must_use]
    pub fn decodes_runs(&self) -> bool {
        self.model.decodes_runs()
    }

    /// How many tokens [`decode_run`](Self::decode_run) takes at most, of which any may be taken back: so many that no row
    /// leaves a sliding window.
    ///
    /// * `seen`: tokens before them
    #[must_use]
    pub fn longest_run(&self, seen: usize) -> usize {
        let window = self.config().sliding_window.as_ref();
        window.map_or(usize::MAX, |window| window.size.saturating_sub(seen + 1))
    }

    /// Processes several tokens that follow one another, and returns the logits after each. Weights are read once for
    /// all of them; the results are those of [`decode`](Self::decode), one token after the other, bit by bit. Tokens that
    /// were only a guess can be [taken back](Self::take_back).
    ///
    /// * `logits`: overwritten with `[ids.len(), vocab_size]`, not looked at; give the same buffer again
    ///
    /// # Errors
    /// [`Error::Input`] if there are no tokens, more than the context has room for, or one is unknown;
    /// [`Error::Unsupported`] if the model does [not do so](Self::decodes_runs), heads go on evicting, or there are more
    /// tokens than [a run may have](Self::longest_run); [`Error::Shape`] if the cache is of another model; [`Error::Interrupted`] if a [stop](crate::stop) was requested. The cache is then as it
    /// was.
    pub fn decode_run(&self, ids: &[u32], cache: &mut AdaptiveKvCache, logits: &mut Vec<f32>) -> Result<()> {
        self.check_room(cache.seen(), ids.len())?;
        self.model.expect_shape(cache)?;
        self.model.decode_run(ids, cache, logits)?;
        for &id in ids {
            cache.advance(id);
        }
        Ok(())
    }

    /// Forgets the newest tokens of a cache, as if they had never come.
    ///
    /// * `count`: at most the tokens that were decoded since the last prompt
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there are not as many, the model does [not do so](Self::decodes_runs), or heads go on
    /// evicting; [`Error::Shape`] if the cache is of another model. Nothing has changed then.
    pub fn take_back(&self, count: usize, cache: &mut AdaptiveKvCache) -> Result<()> {
        self.model.expect_shape(cache)?;
        self.model.take_back(cache, count)?;
        cache.retreat(count);
        Ok(())
    }

    /// Cuts a cache back to its budget by the scores that its rows have.
    pub(super) fn cut_back(&self, cache: &mut AdaptiveKvCache) -> Result<()> {
        self.model.expect_shape(cache)?;
        self.model.cut_back(cache)
    }

    /// Moves what a cache holds to positions without gaps.
    pub(super) fn move_together(&self, cache: &mut AdaptiveKvCache) -> Result<()> {
        self.model.expect_shape(cache)?;
        self.model.move_together(cache)
    }

    /// Processes one more token through tensors, as a prompt is: the way for dense weights and for candle operations, and
    /// the oracle of the other.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_plain(&self, id: u32, cache: &mut AdaptiveKvCache) -> Result<Vec<f32>> {
        self.decode_shown(id, cache, None)
    }

    /// Processes one more token as [`decode_plain`](Self::decode_plain) does, and shows what attention makes of it.
    ///
    /// * `observe`: called for each layer in turn with the attention's output, `[num_heads, head_dim]`, before the output
    ///   projection
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_observed(
        &self,
        id: u32,
        cache: &mut AdaptiveKvCache,
        observe: &mut dyn FnMut(&[f32]),
    ) -> Result<Vec<f32>> {
        self.decode_shown(id, cache, Some(observe))
    }

    fn decode_shown(
        &self,
        id: u32,
        cache: &mut AdaptiveKvCache,
        observe: Option<plain::Observe<'_>>,
    ) -> Result<Vec<f32>> {
        self.check_room(cache.seen(), 1)?;
        self.model.expect_shape(cache)?;
        let logits = self.model.decode_plain(id, cache, observe)?;
        cache.advance(id);
        Ok(logits)
    }

    fn check_room(&self, seen: usize, new: usize) -> Result<()> {
        let context = self.config().context_length;
        if new == 0 {
            return Err(Error::input("the prompt is empty").with_hint("give at least one token"));
        }
        if seen + new > context {
            return Err(Error::input(format!("{} tokens are more than the model's context of {context}", seen + new))
                .with_hint("shorten the prompt"));
        }
        Ok(())
    }
}
