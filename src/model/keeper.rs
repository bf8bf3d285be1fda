//! Deciding what the heads of a model keep of a prompt, layer by layer, while it is processed.
//!
//! Not for: how a head's choice is made (see [`crate::compress`]), or what is computed (see [`crate::backend`]).

use std::time::{Duration, Instant};

use super::Model;
use super::facts::{PromptFacts, kv_of_segment};
use super::observer::PrefillObserver;
use crate::attention::HeadLayout;
use crate::attention::map::{HeadGrid, MapAccumulator};
use crate::attention::replay::{Replay, squared_attention, squared_outputs};
use crate::attention::window::PromptWindow;
use crate::backend::{Backend, Block, PromptRequest, Shown, Wanted};
use crate::cache::{AdaptiveKvCache, CacheLayer, LayerSummary, Retention};
use crate::compress::budget::methods::FutureQueries;
use crate::compress::{
    AdaptiveConfig, BudgetScale, BudgetedMethod, Compression, HeadChoice, HeadRows, LayerFacts, LayerPlace,
    LayerRepeat, LayerReplay, LayerStats, Needs, Pool, QueryStats, Segment, StatsRequest,
};
use crate::error::Result;
use crate::events;
use crate::kernels::vector::{self, instruction_set};
use crate::memory;
use crate::tokens::TokenClass;

/// What is known of a prompt before it is processed.
pub(super) struct Brief {
    retention: Retention,
    /// Classes of the tokens that are decided about.
    classes: Vec<TokenClass>,
    /// Tokens before the prompt.
    seen: usize,
    prompt_len: usize,
    map_side: Option<usize>,
}

impl Brief {
    /// * `map_side`: of the attention maps to draw, if any
    pub fn new(cache: &AdaptiveKvCache, ids: &[u32], map_side: Option<usize>) -> Self {
        Self {
            retention: cache.retention().clone(),
            classes: cache.segment_classes(ids),
            seen: cache.seen(),
            prompt_len: ids.len(),
            map_side,
        }
    }

    /// What is decided about in a layer: of a layer with a sliding window, what later tokens look at.
    pub fn segment(&self, window: Option<usize>) -> Segment<'_> {
        let len = window.map_or(usize::MAX, |window| window.saturating_sub(1)).min(self.classes.len());
        let classes = &self.classes[self.classes.len() - len..];
        Segment {
            first_position: self.seen + self.prompt_len - len,
            classes,
            recent: len.saturating_sub(self.prompt_len),
        }
    }

    fn config(&self) -> Option<&AdaptiveConfig> {
        match &self.retention {
            Retention::Full => None,
            Retention::Adaptive { config, .. } => Some(config),
        }
    }

    /// Watches the prompt in one layer.
    pub fn layer<B: Backend>(&self, model: &Model<B>, layer: &CacheLayer<B::Rows>) -> LayerWatch<'_> {
        let (layout, place) = (model.config.heads, place(model, layer));
        let (held, window) = (layer.positions(), layer.ledger().window());
        let num_keys = (0..layout.num_heads).map(|head| held[head / layout.group_size()].len() + self.prompt_len);
        LayerWatch {
            profile: self
                .config()
                .map(|config| Profile::new(layout, (&config.method, self.segment(window)), place, num_keys)),
            maps: self.map_side.map(|side| MapAccumulator::new(layout.num_heads, self.prompt_len, side)),
            window: window.map(|size| PromptWindow::new(size, self.seen, held)),
            prompt_len: self.prompt_len,
            hidden_size: model.config.hidden_size,
        }
    }

    /// Tokens that layers decide about, the mean over all, rounded down.
    fn mean_segment_len<B: Backend>(&self, model: &Model<B>) -> usize {
        let windows = model.windows();
        let lens = windows.iter().map(|&window| self.segment(window).len());
        lens.sum::<usize>() / windows.len().max(1)
    }
}

/// Where a layer stands.
fn place<B: Backend>(model: &Model<B>, layer: &CacheLayer<B::Rows>) -> LayerPlace {
    let layout = model.config.heads;
    LayerPlace {
        layer: layer.ledger().layer(),
        head_dim: layout.head_dim,
        scale: BudgetScale {
            num_layers: model.config.num_layers,
            num_kv_heads: layout.num_kv_heads,
            token_bytes: layer.token_bytes(),
        },
    }
}

/// What is collected of a prompt in one layer.
pub(super) struct LayerWatch<'a> {
    profile: Option<Profile<'a>>,
    maps: Option<MapAccumulator>,
    /// Present in a layer with a sliding window.
    window: Option<PromptWindow>,
    prompt_len: usize,
    hidden_size: usize,
}

impl<'a> LayerWatch<'a> {
    /// What is asked of the prompt.
    pub fn request(&self) -> PromptRequest<'_> {
        PromptRequest {
            prompt_len: self.prompt_len,
            stats: self.profile.as_ref().map(|profile| &profile.stats.request),
            again: self.profile.as_ref().is_some_and(Profile::may_need_second_pass),
            window: self.window.as_ref(),
        }
    }

    /// What attention adds to.
    pub fn collectors(&mut self) -> (Option<&mut LayerStats>, Option<&mut [HeadGrid]>) {
        let stats = self.profile.as_mut().map(|profile| &mut profile.stats);
        (stats, self.maps.as_mut().map(MapAccumulator::heads_mut))
    }

    /// Whether the same is collected as of another, so that one can be [given](Self::with_collected) to both.
    pub fn collects_as(&self, other: &Self) -> bool {
        match (&self.profile, &other.profile) {
            (None, None) => true,
            (Some(profile), Some(other)) => {
                profile.stats.request == other.stats.request
                    && profile.needs() == other.needs()
                    && profile.may_need_second_pass() == other.may_need_second_pass()
            }
            _ => false,
        }
    }

    /// With all that was collected by one that [collects the same](Self::collects_as).
    pub fn with_collected(mut self, other: &Self) -> Self {
        if let (Some(own), Some(other)) = (&mut self.profile, &other.profile) {
            *own = Profile { method: own.method, segment: own.segment, place: own.place, ..other.clone() };
        }
        self
    }

    /// Which numbers of a chunk are [looked at](Self::look).
    pub fn wanted(&self) -> Wanted {
        self.profile.as_ref().map(Profile::wanted).unwrap_or_default()
    }

    /// Takes in numbers of a chunk, as far as they are wanted.
    pub fn look<B: Backend>(&mut self, backend: &B, projected: &B::Projected, hidden: &B::Hidden) -> Result<()> {
        let (wanted, hidden_size) = (self.wanted(), self.hidden_size);
        match &mut self.profile {
            Some(profile) if wanted.any() => {
                backend.show(projected, hidden, wanted, &mut |rows| profile.add(rows, hidden_size))
            }
            _ => Ok(()),
        }
    }

    /// What each head keeps, or what decides about it.
    fn choose<B: Backend>(&mut self, model: &Model<B>, block: &Block<B>, prompt: &B::Prompt) -> Result<Choice<'a>> {
        let Some(profile) = &mut self.profile else { return Ok(Choice::Everything) };
        model.backend.collect(prompt, &mut profile.stats)?;
        profile.choose(model, block, prompt)
    }

    /// What each position of the segment received in all, `[num_kv_heads]` of `[segment_len]`; empty lists if it was not
    /// collected.
    fn received(&self, num_kv_heads: usize) -> Vec<Vec<f32>> {
        self.profile.as_ref().map_or_else(
            || vec![Vec::new(); num_kv_heads],
            |profile| profile.stats.received(num_kv_heads, profile.segment.len()),
        )
    }
}

/// Has stored what the heads keep of a prompt, layer by layer.
pub(super) struct Keeper<'a> {
    brief: &'a Brief,
    /// The best scores of all layers so far and the layers' maps, if layers share a budget.
    pooled: Option<(Pool, Vec<Option<MapAccumulator>>)>,
    /// The maps of layers that hold everything until the prompt has been read once more.
    waiting: Vec<Option<MapAccumulator>>,
    summaries: Vec<LayerSummary>,
    time: Duration,
}

impl<'a> Keeper<'a> {
    pub fn new(brief: &'a Brief) -> Self {
        Self { brief, pooled: None, waiting: Vec::new(), summaries: Vec::new(), time: Duration::ZERO }
    }

    /// Stores what the heads of a layer keep, or, where layers share a budget, what they may keep.
    pub fn layer_done<B: Backend>(
        &mut self,
        model: &Model<B>,
        index: usize,
        mut watch: LayerWatch<'_>,
        prompt: &B::Prompt,
        cache: &mut AdaptiveKvCache,
        observer: &mut dyn PrefillObserver,
    ) -> Result<()> {
        let started = Instant::now();
        let block = &model.weights.blocks[index];
        let choice = watch.choose(model, block, prompt).map_err(|error| error.in_place(|| format!("layer {index}")))?;
        let segment = self.brief.segment(model.config.window(index));
        let waits = matches!(choice, Choice::Later);
        let choices = match choice {
            Choice::Everything | Choice::Later => None,
            Choice::Heads(choices) => Some(choices),
            Choice::Pooled { method, place, scores } => {
                let num_kv_heads = model.config.heads.num_kv_heads;
                let room = method.total(self.brief.mean_segment_len(model), place);
                let (pool, _) = self.pooled.get_or_insert_with(|| (Pool::new(room, num_kv_heads), Vec::new()));
                pool.add_layer(scores);
                Some(pool.choices(index, segment.first_position))
            }
        };
        let layer = &mut cache.layers_mut::<B::Rows>()?[index];
        let summary = layer.store_prompt(B::stored_prompt(prompt), choices)?;
        if waits {
            self.waiting.push(watch.maps);
            self.time += started.elapsed();
            return Ok(());
        }
        if let Some(eviction) = &self.brief.retention.eviction() {
            layer.watch(eviction, segment, &summary, &watch.received(model.config.heads.num_kv_heads))?;
        }
        if let Some((pool, maps)) = &mut self.pooled {
            maps.push(watch.maps);
            if pool.is_overfull() {
                pool.trim();
                keep_pooled::<B>(cache, pool, index + 1, self.brief)?;
                // What the layers gave up lies scattered: of 24 MB at 2,048 tokens 15 would stay in the peak.
                memory::release_unused();
            }
            self.time += started.elapsed();
            return Ok(());
        }
        self.time += started.elapsed();
        self.tell(&summary, watch.maps.as_ref(), observer)?;
        self.summaries.push(summary);
        Ok(())
    }

    /// Chooses what each layer keeps, given what was seen of the prompt when it was read once more.
    ///
    /// * `seen`: `[num_layers]`
    pub fn repeated<B: Backend>(
        &mut self,
        model: &Model<B>,
        seen: Vec<LayerRepeat>,
        cache: &mut AdaptiveKvCache,
        observer: &mut dyn PrefillObserver,
    ) -> Result<()> {
        let started = Instant::now();
        let Some(method) = self.brief.config().and_then(AdaptiveConfig::budgeted) else { return Ok(()) };
        let (segment, num_heads) = (self.brief.segment(None), model.config.heads.num_heads);
        let stats = LayerStats::new(StatsRequest::default(), std::iter::repeat_n(0, num_heads));
        let mut layers = Vec::with_capacity(seen.len());
        for (index, seen) in seen.into_iter().enumerate() {
            let place = place(model, &cache.layers::<B::Rows>()?[index]);
            let rows = |_| Ok(HeadRows::default());
            let facts = LayerFacts {
                stats: &stats,
                queries: &[],
                rows: &rows,
                last_queries: &[],
                replay: None,
                repeat: Some(seen),
                outputs: Vec::new(),
                block_attention: Vec::new(),
                mean_scores: Vec::new(),
            };
            let scores = method.scores(segment, place, &facts);
            layers.push((place, scores.map_err(|error| error.in_place(|| format!("layer {index}")))?));
        }
        let maps = std::mem::take(&mut self.waiting);
        if let Some((place, _)) = layers.first().filter(|_| method.is_pooled()) {
            let mut pool = Pool::new(method.total(segment.len(), *place), place.scale.num_kv_heads);
            for (_, scores) in layers {
                pool.add_layer(scores);
            }
            self.pooled = Some((pool, maps)); // it is shared out at the end
            self.time += started.elapsed();
            return Ok(());
        }
        for (((place, scores), maps), layer) in layers.into_iter().zip(maps).zip(cache.layers_mut::<B::Rows>()?) {
            let choices = method.select(segment, place, &scores);
            let summary = layer.keep_of_prompt(segment.first_position, choices)?;
            self.tell(&summary, maps.as_ref(), observer)?;
            self.summaries.push(summary);
        }
        self.time += started.elapsed();
        Ok(())
    }

    /// Tells of what a layer keeps.
    fn tell(
        &self,
        summary: &LayerSummary,
        maps: Option<&MapAccumulator>,
        observer: &mut dyn PrefillObserver,
    ) -> Result<()> {
        if let Some(config) = self.brief.config() {
            events::layer_decided(summary, config);
        }
        observer.layer_done(summary, maps)
    }

    /// Ends the prompt: what each layer keeps, and the time that choosing and storing took.
    pub fn finish<B: Backend>(
        mut self,
        cache: &mut AdaptiveKvCache,
        observer: &mut dyn PrefillObserver,
    ) -> Result<(Vec<LayerSummary>, Duration)> {
        if let Some((mut pool, maps)) = self.pooled.take() {
            let started = Instant::now();
            pool.trim();
            self.summaries = keep_pooled::<B>(cache, &pool, maps.len(), self.brief)?;
            self.time += started.elapsed();
            for (summary, maps) in self.summaries.iter().zip(&maps) {
                self.tell(summary, maps.as_ref(), observer)?;
            }
        }
        Ok((self.summaries, self.time))
    }
}

/// Evicts from the first layers what the pool has dropped.
fn keep_pooled<B: Backend>(
    cache: &mut AdaptiveKvCache,
    pool: &Pool,
    num_layers: usize,
    brief: &Brief,
) -> Result<Vec<LayerSummary>> {
    let layers = cache.layers_mut::<B::Rows>()?.iter_mut().take(num_layers).enumerate();
    let keep = |(index, layer): (usize, &mut CacheLayer<B::Rows>)| {
        let first = brief.segment(layer.ledger().window()).first_position;
        layer.keep_of_prompt(first, pool.choices(index, first))
    };
    layers.map(keep).collect()
}

/// What the heads of a layer keep.
enum Choice<'a> {
    /// Everything.
    Everything,
    /// Everything, until the prompt has been read once more.
    Later,
    /// What is chosen.
    Heads(Vec<HeadChoice>),
    /// What the best scores of all layers together say.
    Pooled {
        /// What says how much all layers together keep.
        method: &'a BudgetedMethod,
        /// The layer.
        place: LayerPlace,
        /// `[num_kv_heads]` of `[segment_len]`
        scores: Vec<Vec<f32>>,
    },
}

/// What a layer's heads are profiled by.
#[derive(Clone)]
struct Profile<'a> {
    method: &'a Compression,
    segment: Segment<'a>,
    stats: LayerStats,
    /// Where the layer stands, for methods with a budget.
    place: LayerPlace,
    /// Present if that method reads sums of queries, of those to come or of the prompt's own.
    query_stats: Option<(Option<FutureQueries>, QueryStats)>,
    /// Queries of the prompt's last rows, `[at most kept_rows, num_heads, head_dim]`, kept only if a method asks them again.
    kept_queries: Vec<f32>,
    kept_rows: usize,
    /// Of all query heads, and what makes scores of products with keys.
    query_width: usize,
    query_scale: f32,
    /// `[prompt_len]` squared lengths of the residual stream that enters the layer, if a method reads them.
    squared_residuals: Option<Vec<f32>>,
}

impl<'a> Profile<'a> {
    /// * `num_keys`: `[num_heads]` the keys that each query head will see
    fn new(
        layout: HeadLayout,
        (method, segment): (&'a Compression, Segment<'a>),
        place: LayerPlace,
        num_keys: impl Iterator<Item = usize>,
    ) -> Self {
        let (request, needs) = match method {
            Compression::FastGen(search) => (search.request(segment), Needs::default()),
            Compression::Budgeted(method) => (method.request(segment), method.needs()),
        };
        let query_stats = (needs.future_queries.is_some() || needs.mean_distances > 0).then(|| {
            let first_row = segment.first_position + segment.recent;
            let skip = needs.future_queries.map_or(0, |future| future.skip_positions);
            (needs.future_queries, QueryStats::new(layout, skip.saturating_sub(first_row)))
        });
        let prompt_len = segment.num_rows();
        let asks_all = needs.replay || needs.block_attention.is_some();
        Self {
            method,
            segment,
            stats: LayerStats::new(request, num_keys),
            place,
            query_stats,
            kept_queries: Vec::with_capacity(if asks_all { prompt_len * layout.query_width() } else { 0 }),
            kept_rows: if asks_all { prompt_len } else { needs.last_rows.max(needs.last_queries).min(prompt_len) },
            query_width: layout.query_width(),
            query_scale: layout.scale(),
            squared_residuals: needs.replay.then(|| Vec::with_capacity(prompt_len)),
        }
    }

    /// What the method reads, beyond the statistics that it asks for.
    fn needs(&self) -> Needs {
        match self.method {
            Compression::FastGen(_) => Needs::default(),
            Compression::Budgeted(method) => method.needs(),
        }
    }

    /// Whether queries may be asked again, with keep-sets that are known only then.
    fn may_need_second_pass(&self) -> bool {
        matches!(self.method, Compression::FastGen(search) if search.may_need_second_pass())
    }

    /// Which numbers of the prompt are to be [added](Self::add).
    fn wanted(&self) -> Wanted {
        Wanted {
            replay: self.squared_residuals.is_some(),
            queries: self.kept_rows > 0,
            unrotated: self.query_stats.is_some(),
        }
    }

    /// Takes in rows of the prompt, as far as they are wanted.
    fn add(&mut self, rows: Shown<'_>, hidden_size: usize) -> Result<()> {
        if self.kept_rows > 0 {
            let kept = self.kept_rows * self.query_width;
            self.kept_queries.extend_from_slice(rows.queries);
            self.kept_queries.drain(..self.kept_queries.len().saturating_sub(kept));
        }
        if let Some((_, stats)) = &mut self.query_stats {
            stats.add_rows(rows.unrotated_queries)?;
        }
        if let Some(residuals) = &mut self.squared_residuals {
            let set = instruction_set();
            residuals.extend(rows.hidden.chunks_exact(hidden_size.max(1)).map(|row| vector::dot(set, row, row)));
        }
        Ok(())
    }

    /// What each head keeps, or what decides about it.
    fn choose<B: Backend>(&self, model: &Model<B>, block: &Block<B>, prompt: &B::Prompt) -> Result<Choice<'a>> {
        match self.method {
            Compression::FastGen(search) => {
                let again = |pending: &[_]| model.backend.ask_again(prompt, pending);
                search.choose(self.segment, model.config.heads.num_kv_heads, &self.stats, again).map(Choice::Heads)
            }
            Compression::Budgeted(method) if method.needs().repetition.is_some() => Ok(Choice::Later),
            Compression::Budgeted(method) => self.choose_by_budget(method, model, block, prompt),
        }
    }

    fn choose_by_budget<B: Backend>(
        &self,
        method: &'a BudgetedMethod,
        model: &Model<B>,
        block: &Block<B>,
        prompt: &B::Prompt,
    ) -> Result<Choice<'a>> {
        let (backend, layout, rope) = (&model.backend, model.config.heads, &model.rope);
        let Self { segment, stats, place, query_stats, kept_queries, .. } = self;
        let needs = method.needs();
        let of_prompt = query_stats.as_ref().map_or_else(Vec::new, |(_, stats)| stats.moments());
        let future = query_stats.as_ref().and_then(|(future, _)| *future);
        let moments = future.map_or_else(Vec::new, |future| {
            let angles = rope.mean_angles(segment.first_position + segment.len(), future.positions);
            let mut moments = of_prompt.clone();
            for head in &mut moments {
                rope.rotate_moments(&mut head.mean, &mut head.covariance, &angles);
            }
            moments
        });
        let kv = needs.reads_kv().then(|| backend.prompt_kv(prompt)).transpose()?;
        // Of a prompt beyond the window, what later tokens look at is there, and nothing else.
        let cut = kv.as_deref().filter(|kv| kv.keys.len() != segment.num_rows());
        let cut = cut.map(|kv| kv_of_segment(layout, *segment, kv)).transpose()?;
        let kv = cut.as_ref().or(kv.as_deref());
        let collected = PromptFacts { layout, rope, segment: *segment, needs, kv, queries: kept_queries };
        let head_rows = |kv_head: usize| collected.head_rows(kv_head);
        let hidden_size = B::shape(&block.o_proj).0;
        let replay = match (&self.squared_residuals, kv) {
            (Some(residuals), Some(kv)) => {
                let (head_dim, seq_len) = (layout.head_dim, segment.first_position + segment.len());
                let turn = |positions: usize, rows: &mut [f32]| rope.turn(rows, head_dim, positions, seq_len);
                let log_sums = |head: usize| {
                    let log_sums = &stats.heads[head].log_sums[..];
                    let num_keys = kv.keys.past_len(head / layout.group_size()) + kv.keys.len();
                    &log_sums[log_sums.len().saturating_sub(num_keys)..]
                };
                let log_sums: Vec<&[f32]> = (0..stats.heads.len()).map(log_sums).collect();
                let replay = Replay { layout, queries: kept_queries, keys: &kv.keys, log_sums: &log_sums, turn: &turn };
                Some(LayerReplay {
                    squared_attention: squared_attention(replay)?,
                    squared_outputs: squared_outputs(
                        layout,
                        hidden_size,
                        &*backend.widened(&block.o_proj)?,
                        &collected.values(),
                    )?,
                    squared_residual: median(residuals),
                })
            }
            _ => None,
        };
        let scaled = |row: &[f32]| row.iter().map(|number| number * self.query_scale).collect();
        let rows = kept_queries.chunks_exact(self.query_width.max(1)).rev().take(needs.last_queries);
        let mut last_queries: Vec<Vec<f32>> = rows.map(scaled).collect();
        last_queries.reverse();
        let facts = LayerFacts {
            stats,
            queries: &moments,
            rows: &head_rows,
            last_queries: &last_queries,
            repeat: None,
            replay,
            outputs: collected.outputs(hidden_size, || backend.widened(&block.o_proj))?,
            block_attention: collected.block_attention()?,
            mean_scores: collected.mean_scores(&of_prompt),
        };
        let scores = method.scores(*segment, *place, &facts)?;
        Ok(if method.is_pooled() {
            Choice::Pooled { method, place: *place, scores }
        } else {
            Choice::Heads(method.select(*segment, *place, &scores))
        })
    }
}

/// The middle one of some numbers, the larger of two; 0 if there are none.
fn median(numbers: &[f32]) -> f32 {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable_by(f32::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
