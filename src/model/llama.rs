//! The whole model: prefill of a prompt with profiling, and decoding of one token.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use candle_core::Tensor;

use super::block::{Block, BlockContext, norm};
use super::config::LlamaConfig;
use super::device::{DeviceContext, DevicePass, RotationTensors};
use super::host;
use super::layer_pass::{Choice, LayerPass};
use super::linear::{Embedding, Linear};
use super::pass::{Angles, Pass};
use super::rope::Rope;
use super::step::StepModel;
use crate::attention::decode::{decode, plain_row_weights};
use crate::attention::device;
use crate::attention::map::MapAccumulator;
use crate::cache::{AdaptiveKvCache, HeadStep, KvDtype, LayerCacheManager, LayerSummary, Retention};
use crate::config::BudgetScale;
use crate::error::{Error, Result};
use crate::events;
use crate::memory;
use crate::numbers::{all_finite, check_logits};
use crate::ops::Ops;
use crate::profile::{LayerPlace, Pool, Profiler, Segment};
use crate::stop::Watch;

/// A LLaMA model's weights. It holds no state: every call is given the cache that it reads and writes.
#[derive(Debug, Clone)]
pub struct Llama {
    config: LlamaConfig,
    embed_tokens: Embedding,
    layers: Vec<Block>,
    norm: Tensor,
    lm_head: Linear,
    rope: Rope,
    /// For decoding; `None` if weights are dense, or on a device.
    step: Option<StepModel>,
    /// Present if everything is made of candle operations; weights but the embedding are then on its device.
    ops: Option<Ops>,
}

/// How a prompt is processed. Nothing here changes what is computed, only when, and so speed and scratch memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillOptions {
    /// The most prompt rows that go through a layer at a time; default [`DEFAULT_CHUNK`](Self::DEFAULT_CHUNK). Scratch
    /// grows with it; small chunks keep matrix products less busy, and widen the weights more often.
    pub chunk: NonZeroUsize,
}

impl PrefillOptions {
    /// Rows that keep matrix products busy.
    pub const DEFAULT_CHUNK: NonZeroUsize = NonZeroUsize::new(512).unwrap();

    /// Rows of each chunk of a prompt but the last, which may be shorter: as many chunks as it takes, and about equally
    /// long, since a few rows left over would cost nearly as much as many.
    fn rows(self, prompt_len: usize) -> usize {
        let chunks = prompt_len.div_ceil(self.chunk.get()).max(1);
        prompt_len.div_ceil(chunks).max(1)
    }
}

impl Default for PrefillOptions {
    fn default() -> Self {
        Self { chunk: Self::DEFAULT_CHUNK }
    }
}

/// What a prompt left behind.
#[derive(Debug)]
pub struct Prefill {
    /// `[vocab_size]` logits of the next token.
    pub logits: Vec<f32>,
    /// What each layer keeps.
    pub layers: Vec<LayerSummary>,
    /// Time that choosing and storing took, apart from collecting statistics, which is part of attention.
    pub profile_time: std::time::Duration,
}

/// Watches a prefill: progress, choices, attention maps; can stop it.
///
/// Every method does nothing by default.
pub trait PrefillObserver {
    /// Called after each chunk of each layer; `done` goes up to `total` (prompt rows times layers). Breaking ends the
    /// prefill with [`Error::Interrupted`].
    fn progress(&mut self, _done: usize, _total: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// The largest side, in cells, of the attention maps to collect; `None` for no maps.
    fn map_side(&self) -> Option<usize> {
        None
    }

    /// Called when a layer is stored, with its maps (one for each query head) if there are any.
    ///
    /// # Errors
    /// Whatever the observer's own work fails with; it ends the prefill.
    fn layer_done(&mut self, _summary: &LayerSummary, _maps: Option<&MapAccumulator>) -> Result<()> {
        Ok(())
    }
}

/// Watches nothing.
impl PrefillObserver for () {}

/// Tells of what a layer keeps.
fn layer_done(
    observer: &mut dyn PrefillObserver,
    profiler: Option<&Profiler>,
    summary: &LayerSummary,
    maps: Option<&MapAccumulator>,
) -> Result<()> {
    if let Some(profiler) = profiler {
        events::layer_decided(summary, profiler.config());
    }
    observer.layer_done(summary, maps)
}

/// Is shown the attention's output of each layer, `[num_heads, head_dim]`.
type Observe<'a> = &'a mut dyn FnMut(&[f32]);

impl Llama {
    /// Puts a model together.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of blocks is not that of the configuration.
    pub fn new(
        config: LlamaConfig,
        embed_tokens: Embedding,
        layers: Vec<Block>,
        norm: Tensor,
        lm_head: Linear,
    ) -> Result<Self> {
        if layers.len() != config.num_layers {
            return Err(Error::shape("a model's blocks", config.num_layers, layers.len()));
        }
        let rope = Rope::new(&config.rope);
        let step = StepModel::new(&config, &embed_tokens, &layers, &norm, &lm_head)?;
        Ok(Self { config, embed_tokens, layers, norm, lm_head, rope, step, ops: None })
    }

    /// Puts a model together that computes by candle operations, on any device.
    ///
    /// * `embed_tokens`: on the host, where rows are looked up
    /// * `layers`, `norm`, `lm_head`: tensors on the device, norms f32
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of blocks is not that of the configuration.
    pub fn on_device(
        config: LlamaConfig,
        embed_tokens: Embedding,
        layers: Vec<Block>,
        norm: Tensor,
        lm_head: Linear,
        ops: Ops,
    ) -> Result<Self> {
        if layers.len() != config.num_layers {
            return Err(Error::shape("a model's blocks", config.num_layers, layers.len()));
        }
        let rope = Rope::new(&config.rope);
        Ok(Self { config, embed_tokens, layers, norm, lm_head, rope, step: None, ops: Some(ops) })
    }

    /// What its candle operations run on, and how many there were; `None` if the CPU kernels compute.
    #[must_use]
    pub fn ops(&self) -> Option<&Ops> {
        self.ops.as_ref()
    }

    /// Sizes of the model.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// An empty cache for one sequence.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the heads are not whole blocks of a quantised format, see [`KvDtype::check`]; of a model
    /// that computes by candle operations, as [`AdaptiveKvCache::on_device`].
    pub fn new_cache(&self, dtype: KvDtype, retention: Retention) -> Result<AdaptiveKvCache> {
        let LlamaConfig { num_layers, heads, .. } = self.config;
        match &self.ops {
            Some(ops) => AdaptiveKvCache::on_device(num_layers, heads, dtype, retention, ops),
            None => AdaptiveKvCache::new(num_layers, heads, dtype, retention),
        }
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
    /// was decoded since the one before; what it kept earlier stays. A budget is for these tokens alone, so that what is
    /// kept of a conversation grows with it: a share of it, or so many bytes more with each prompt. Where heads go on
    /// evicting while tokens are generated ([`Eviction`](crate::profile::Eviction)), what they hold when the prompt comes
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
        let seen = cache.seen();
        self.check_room(seen, ids.len())?;
        if seen > 0 && observer.map_side().is_some() {
            return Err(Error::unsupported("drawing the attention of a further prompt"));
        }
        let profiler = match cache.retention() {
            Retention::Full => None,
            Retention::Adaptive { profiler, .. } => Some(profiler.clone()),
        };
        let eviction = cache.retention().eviction();
        let classes = cache.segment_classes(ids);
        let recent = classes.len().saturating_sub(ids.len());
        let segment = Segment { first_position: seen - recent, classes: &classes, recent };
        let chunk_rows = options.rows(ids.len());
        let chunks = ids.chunks(chunk_rows).zip((seen..).step_by(chunk_rows));
        let mut hidden: Vec<Tensor> = chunks.map(|(ids, first)| self.embed(ids, first)).collect::<Result<_>>()?;
        let angles = Angles::new(self.rope.angles(seen, ids.len()), self.config.rope.dim / 2, self.ops.as_ref())?;
        let total = ids.len() * self.config.num_layers;
        let mut layers = Vec::with_capacity(self.config.num_layers);
        let mut profile_time = std::time::Duration::ZERO;
        // The best scores of all layers so far and the layers' maps, if layers share a budget.
        let mut pooled: Option<(Pool, Vec<Option<MapAccumulator>>)> = None;
        for (index, block) in self.layers.iter().enumerate() {
            let profile = profiler.as_ref().map(|profiler| (profiler, segment));
            let place = LayerPlace {
                layer: index,
                head_dim: self.config.heads.head_dim,
                scale: BudgetScale {
                    num_layers: self.config.num_layers,
                    num_kv_heads: self.config.heads.num_kv_heads,
                    token_bytes: match self.ops {
                        Some(_) => cache.device_layer_mut(index)?.token_bytes(),
                        None => cache.layer_mut(index)?.token_bytes(),
                    },
                },
            };
            let heads = self.config.heads;
            let maps = observer.map_side();
            let mut pass = match &self.ops {
                Some(ops) => {
                    let layer = cache.device_layer_mut(index)?;
                    Pass::Device(DevicePass::new(ops, heads, layer, profile, place, ids.len(), maps)?)
                }
                None => Pass::Host(LayerPass::new(heads, cache.layer_mut(index)?, profile, place, ids.len(), maps)?),
            };
            for (chunk_index, rows) in hidden.iter_mut().enumerate() {
                let first_row = chunk_index * chunk_rows;
                *rows = self.chunk(&mut pass, block, rows, first_row, &angles)?;
                let done = index * ids.len() + pass.len();
                if observer.progress(done, total).is_break() {
                    return Err(Error::Interrupted);
                }
            }
            if self.ops.is_none() {
                check_layer(&hidden, index, seen)?;
            }
            let started = std::time::Instant::now();
            let choice = pass.choose(block, &self.rope).map_err(|error| error.in_place(|| format!("layer {index}")));
            let choices = match choice? {
                Choice::Everything => None,
                Choice::Heads(choices) => Some(choices),
                Choice::Scores(scores) => {
                    let room =
                        profiler.as_ref().and_then(Profiler::budgeted).map_or(0, |b| b.total(segment.len(), place));
                    let (pool, _) =
                        pooled.get_or_insert_with(|| (Pool::new(room, place.scale.num_kv_heads), Vec::new()));
                    pool.add_layer(scores);
                    Some(pool.choices(index, segment.first_position))
                }
            };
            let summary = pass.store(cache, index, choices)?;
            if let (Some(eviction), Pass::Host(pass)) = (&eviction, &pass) {
                cache.layer_mut(index)?.watch(eviction, segment, &summary, &pass.received())?;
            }
            let layer_maps = pass.into_maps();
            if let Some((pool, maps)) = &mut pooled {
                maps.push(layer_maps);
                if pool.is_overfull() {
                    pool.trim();
                    keep_pooled(cache, pool, index + 1, segment)?;
                    // What the layers gave up lies scattered: of 24 MB at 2,048 tokens 15 would stay in the peak.
                    memory::release_unused();
                }
                profile_time += started.elapsed();
                continue;
            }
            profile_time += started.elapsed();
            layer_done(observer, profiler.as_ref(), &summary, layer_maps.as_ref())?;
            layers.push(summary);
        }
        if let Some((mut pool, maps)) = pooled {
            let started = std::time::Instant::now();
            pool.trim();
            layers = keep_pooled(cache, &pool, self.config.num_layers, segment)?;
            profile_time += started.elapsed();
            for (summary, maps) in layers.iter().zip(&maps) {
                layer_done(observer, profiler.as_ref(), summary, maps.as_ref())?;
            }
        }
        cache.settle(ids.len());
        let last = hidden.pop().ok_or_else(|| Error::input("the prompt is empty"))?;
        let last = last.narrow(0, last.dim(0)? - 1, 1)?;
        drop(hidden);
        let logits = self.logits(&last)?;
        check_logits(&logits, cache.seen())?;
        memory::release_unused();
        Ok(Prefill { logits, layers, profile_time })
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
        for (cache, logits) in caches.iter().zip(logits.chunks_exact(self.config.vocab_size)) {
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
            cache.expect_shape(self.config.num_layers, self.config.heads)?;
        }
        match &self.step {
            _ if ids.is_empty() => logits.clear(),
            Some(step) => {
                step.run(&self.config, &self.rope, &self.embed_tokens, ids, caches, logits)?;
                for (cache, &id) in caches.iter_mut().zip(ids) {
                    cache.advance(id);
                }
            }
            None => {
                self.embed_tokens.forward(ids)?; // no cache has advanced when an id is refused
                logits.clear();
                for (cache, &id) in caches.iter_mut().zip(ids) {
                    logits.extend(self.decode_plain(id, cache)?);
                }
            }
        }
        Ok(())
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

    fn decode_shown(&self, id: u32, cache: &mut AdaptiveKvCache, mut observe: Option<Observe<'_>>) -> Result<Vec<f32>> {
        if let Some(ops) = &self.ops {
            return self.decode_on(ops, id, cache, observe);
        }
        let (position, class) = (cache.seen(), cache.class(id));
        self.check_room(position, 1)?;
        let mut hidden = self.embed_tokens.forward(&[id])?; // [1, hidden_size]
        let angles = self.rope.angles(position, 1);
        let context = self.context(&angles, 0, 1);
        let stop = Watch::default();
        for (index, block) in self.layers.iter().enumerate() {
            if stop.is_over() {
                return Err(Error::Interrupted);
            }
            let projected = block.project(&hidden, context)?;
            let layer = cache.layer_mut(index)?;
            layer.append_token(&projected.keys, &projected.values, position, class)?;
            let attended = decode(self.config.heads, &projected.queries, &layer.rows())?;
            if let Some(observe) = observe.as_deref_mut() {
                observe(&attended);
            }
            self.evict(layer, &projected.queries)?;
            hidden = block.finish(&hidden, attended, context)?;
        }
        cache.advance(id);
        self.logits(&hidden)
    }

    /// [`decode_observed`](Self::decode_observed) by candle operations.
    fn decode_on(
        &self,
        ops: &Ops,
        id: u32,
        cache: &mut AdaptiveKvCache,
        mut observe: Option<Observe<'_>>,
    ) -> Result<Vec<f32>> {
        let (position, heads) = (cache.seen(), self.config.heads);
        self.check_room(position, 1)?;
        let mut hidden = self.embed(&[id], position)?; // [1, hidden_size]
        let rotations = RotationTensors::new(ops, &self.rope.angles(position, 1), self.config.rope.dim / 2)?;
        let context = self.device_context(ops, &rotations);
        let stop = Watch::default();
        for (index, block) in self.layers.iter().enumerate() {
            if stop.is_over() {
                return Err(Error::Interrupted);
            }
            let projected = block.project_on(&hidden, context)?;
            let layer = cache.device_layer_mut(index)?;
            layer.append(&projected.keys, &projected.values, position)?;
            let queries = projected.queries.squeeze(1)?; // [num_heads, head_dim]
            let attended = device::decode(ops, heads, &queries, &layer.rows()?)?;
            let attended = attended.reshape((1, heads.query_width()))?;
            if let Some(observe) = observe.as_deref_mut() {
                observe(&ops.download(&attended)?);
            }
            hidden = block.finish_on(&hidden, &attended, context)?;
        }
        cache.advance(id);
        self.logits(&hidden)
    }

    /// The vectors of tokens, `[ids.len(), hidden_size]`, f32, where the model computes.
    ///
    /// * `first`: position of the first token
    fn embed(&self, ids: &[u32], first: usize) -> Result<Tensor> {
        let hidden = self.embed_tokens.forward(ids)?;
        check_embedding(&hidden, ids, first)?;
        self.ops.as_ref().map_or(Ok(hidden.clone()), |ops| ops.bring(&hidden))
    }

    /// Runs one chunk of a prompt's rows through a layer.
    fn chunk(
        &self,
        pass: &mut Pass<'_>,
        block: &Block,
        rows: &Tensor,
        first_row: usize,
        angles: &Angles,
    ) -> Result<Tensor> {
        let num_rows = rows.dim(0)?;
        match (pass, angles) {
            (Pass::Host(pass), Angles::Host(angles)) => {
                let context = BlockContext {
                    unrotated_queries: pass.wants_unrotated_queries(),
                    ..self.context(angles, first_row, num_rows)
                };
                pass.chunk(block, rows, first_row, context)
            }
            (Pass::Device(pass), Angles::Device(ops, rotations)) => {
                let rotations = rotations.rows(first_row, num_rows)?;
                pass.chunk(block, rows, first_row, self.device_context(ops, &rotations))
            }
            _ => Err(Error::shape("a layer's pass", "where the angles are", "elsewhere")),
        }
    }

    fn device_context<'a>(&'a self, ops: &'a Ops, rotations: &'a RotationTensors) -> DeviceContext<'a> {
        DeviceContext {
            ops,
            layout: self.config.heads,
            rms_norm_eps: self.config.rms_norm_eps,
            rope_layout: self.config.rope.layout,
            rope_dim: self.config.rope.dim / 2 * 2,
            rotations,
        }
    }

    /// Evicts what no longer belongs to what the heads of a layer keep.
    ///
    /// * `queries`: `[num_heads, head_dim]` of the newest token
    fn evict(&self, layer: &mut LayerCacheManager, queries: &[f32]) -> Result<()> {
        let layout = self.config.heads;
        let mut steps = vec![HeadStep::default(); layout.num_kv_heads];
        let groups = queries.chunks_exact(layout.group_size() * layout.head_dim);
        for ((kv_head, step), queries) in steps.iter_mut().enumerate().zip(groups) {
            if layer.reads_weights(kv_head) {
                step.weights = plain_row_weights(layout, queries, layer.heads()[kv_head].rows())?;
            }
            layer.decide(kv_head, step);
        }
        layer.evict(&mut steps);
        Ok(())
    }

    /// Logits `[vocab_size]` from the last hidden state `[1, hidden_size]`.
    fn logits(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        if let Some(ops) = &self.ops {
            let normed = ops.rms_norm(hidden, &self.norm, self.config.rms_norm_eps)?;
            let [logits] = Linear::forward_on(ops, &normed, [&self.lm_head])?;
            return ops.download(&logits);
        }
        let normed = norm(hidden, &self.norm, self.config.rms_norm_eps)?;
        host::to_vec(&self.lm_head.forward(&normed)?)
    }

    fn context<'a>(&'a self, angles: &'a [(f32, f32)], first_row: usize, num_rows: usize) -> BlockContext<'a> {
        let half = self.config.rope.dim / 2;
        BlockContext {
            layout: self.config.heads,
            rms_norm_eps: self.config.rms_norm_eps,
            rope: &self.rope,
            angles: &angles[first_row * half..(first_row + num_rows) * half],
            unrotated_queries: false,
        }
    }

    fn check_room(&self, seen: usize, new: usize) -> Result<()> {
        let context = self.config.context_length;
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

/// Refuses tokens whose vectors are not numbers.
///
/// * `hidden`: `[ids.len(), hidden_size]`, on the host
/// * `first`: position of the first token
fn check_embedding(hidden: &Tensor, ids: &[u32], first: usize) -> Result<()> {
    match bad_rows(hidden)?.first() {
        None => Ok(()),
        Some(&row) => {
            let (id, position) = (ids[row], first + row);
            Err(Error::not_a_number(format!("the vector of token {id}, which is at position {position}")))
        }
    }
}

/// Refuses what a layer made of a prompt if any of it is not a number: what follows would be made of it, and what heads
/// keep be chosen by it.
///
/// * `hidden`: `[chunks]` of `[chunk_rows, hidden_size]`, the layer's output
/// * `seen`: tokens before the prompt
fn check_layer(hidden: &[Tensor], layer: usize, seen: usize) -> Result<()> {
    let (mut bad, mut len) = (Vec::new(), 0);
    for rows in hidden {
        bad.extend(bad_rows(rows)?.into_iter().map(|row| seen + len + row));
        len += rows.dim(0)?;
    }
    // Rows are multiplied with one another, those that are masked with 0: what one has may be found in all.
    let place = match bad[..] {
        [] => return Ok(()),
        [position] => format!("position {position}"),
        [first, ..] => format!("{} of {len} positions, the first {first}", bad.len()),
    };
    Err(Error::not_a_number(format!("the output of layer {layer} at {place}")))
}

/// Rows of `[rows, width]`, on the host, that hold what is not finite.
fn bad_rows(rows: &Tensor) -> Result<Vec<usize>> {
    let width = rows.dim(1)?;
    host::with_slice(rows, |numbers| {
        if all_finite(numbers) {
            return Ok(Vec::new());
        }
        Ok(numbers.chunks_exact(width).enumerate().filter(|(_, row)| !all_finite(row)).map(|(row, _)| row).collect())
    })
}

/// Evicts from the first layers what the pool has dropped.
fn keep_pooled(
    cache: &mut AdaptiveKvCache,
    pool: &Pool,
    num_layers: usize,
    segment: Segment<'_>,
) -> Result<Vec<LayerSummary>> {
    let first = segment.first_position;
    let on_device = !cache.device_layers().is_empty();
    let keep = |layer: usize| {
        let choices = pool.choices(layer, first);
        if on_device {
            cache.device_layer_mut(layer)?.keep_of_prompt(first, choices)
        } else {
            cache.layer_mut(layer)?.keep_of_prompt(first, choices)
        }
    };
    (0..num_layers).map(keep).collect()
}
