//! Deciding what the heads of a model keep of a prompt, layer by layer, while it is processed.
//!
//! Not for: how a head's choice is made (see [`crate::compress`]), or what is computed (see [`crate::backend`]).

use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::Model;
use super::anew::{self, Anew, Span, place};
use super::observer::PrefillObserver;
use super::profile::{Choice, Profile};
use crate::attention::map::{HeadGrid, MapAccumulator};
use crate::attention::refit::Answers;
use crate::attention::window::PromptWindow;
use crate::backend::{Backend, Block, PromptRequest, Wanted};
use crate::cache::{AdaptiveKvCache, Bounds, CacheLayer, LayerSummary, Retention};
use crate::compress::budget::select::keep_best;
use crate::compress::{
    AdaptiveConfig, HeadRows, LayerFacts, LayerPlace, LayerRepeat, LayerStats, Pool, Segment, StatsRequest,
};
use crate::error::Result;
use crate::events;
use crate::memory;
use crate::tokens::TokenClass;

/// What is known of a prompt before it is processed.
pub(super) struct Brief {
    retention: Retention,
    /// Classes of the tokens that are decided about.
    classes: Vec<TokenClass>,
    bounds: Bounds,
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
            bounds: cache.bounds(),
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

    fn span(&self) -> Span {
        Span { bounds: self.bounds, seen: self.seen, end: self.seen + self.prompt_len }
    }

    /// Whether what is held is judged together with the prompt.
    fn rejudges(&self) -> bool {
        self.config().is_some_and(AdaptiveConfig::rejudges)
    }

    /// Where a layer stands.
    fn place<B: Backend>(&self, model: &Model<B>, layer: &CacheLayer<B::Rows>) -> LayerPlace {
        place(model, layer, self.config(), (self.bounds, self.retention.most_new_rows(usize::MAX)))
    }

    fn config(&self) -> Option<&AdaptiveConfig> {
        match &self.retention {
            Retention::Full => None,
            Retention::Adaptive { config, .. } => Some(config),
        }
    }

    /// Watches the prompt in one layer.
    pub fn layer<B: Backend>(&self, model: &Model<B>, layer: &CacheLayer<B::Rows>) -> LayerWatch<'_> {
        let (layout, place) = (model.config.heads, self.place(model, layer));
        let (ledger, window) = (layer.ledger(), layer.ledger().window());
        let num_keys = (0..layout.num_heads).map(|head| ledger.len(head / layout.group_size()) + self.prompt_len);
        LayerWatch {
            profile: self.config().map(|config| Profile::new(layout, (config, self.segment(window)), place, num_keys)),
            maps: self.map_side.map(|side| MapAccumulator::new(layout.num_heads, self.prompt_len, side)),
            window: window.map(|size| PromptWindow::new(size, self.seen, &layer.positions())),
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
            (Some(profile), Some(other)) => profile.collects_as(other),
            _ => false,
        }
    }

    /// With all that was collected by one that [collects the same](Self::collects_as).
    pub fn with_collected(mut self, other: &Self) -> Self {
        if let (Some(own), Some(other)) = (&mut self.profile, &other.profile) {
            own.collect_as(other);
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

    /// See [`Profile::answers`].
    fn answers<B: Backend>(&self, model: &Model<B>, prompt: &B::Prompt) -> Result<Option<Answers>> {
        self.profile.as_ref().map_or(Ok(None), |profile| profile.answers(model, prompt))
    }

    /// See [`Profile::received`].
    fn received(&self, num_kv_heads: usize) -> Vec<Vec<f32>> {
        let none = || vec![Vec::new(); num_kv_heads];
        self.profile.as_ref().map_or_else(none, |profile| profile.received(num_kv_heads))
    }
}

/// Has stored what the heads keep of a prompt, layer by layer.
pub(super) struct Keeper<'a> {
    brief: &'a Brief,
    /// The best scores of all layers so far, if layers share a budget.
    pool: Option<Pool>,
    /// The maps of layers that are told of when the last is there.
    pooled_maps: Vec<Option<MapAccumulator>>,
    /// The maps of layers that hold everything until the prompt has been read once more.
    waiting: Vec<Option<MapAccumulator>>,
    /// What values are fitted to in the end, of each layer; none if they are not.
    answers: Vec<Answers>,
    summaries: Vec<LayerSummary>,
    time: Duration,
}

impl<'a> Keeper<'a> {
    pub fn new(brief: &'a Brief) -> Self {
        Self {
            brief,
            pool: None,
            pooled_maps: Vec::new(),
            waiting: Vec::new(),
            answers: Vec::new(),
            summaries: Vec::new(),
            time: Duration::ZERO,
        }
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
        self.answers.extend(watch.answers(model, prompt)?);
        let segment = self.brief.segment(model.config.window(index));
        let waits = matches!(choice, Choice::Later);
        let is_pooled = matches!(&choice, Choice::Scored { method, .. } if method.is_pooled());
        let summary = match choice {
            Choice::Scored { method, place, scores, judged } if self.brief.rejudges() => {
                let anew = Anew::new(method, place, segment.first_position, self.brief.span());
                anew.store::<B>(prompt, cache, &mut self.pool, (scores, &judged))?
            }
            Choice::Scored { method, place, mut scores, .. } => {
                scores.iter_mut().map(Vec::as_mut_slice).for_each(keep_best);
                let room = method.total(self.brief.mean_segment_len(model), place);
                let pool = self.pool.get_or_insert_with(|| Pool::new(room, place.scale.num_kv_heads));
                pool.add_layer(u32::try_from(segment.first_position).unwrap_or(u32::MAX), scores);
                let choices = pool.choices(index);
                cache.layers_mut::<B::Rows>()?[index].store_prompt(B::stored_prompt(prompt), Some(choices))?
            }
            Choice::Everything | Choice::Later => {
                cache.layers_mut::<B::Rows>()?[index].store_prompt(B::stored_prompt(prompt), None)?
            }
            Choice::Heads(choices) => {
                cache.layers_mut::<B::Rows>()?[index].store_prompt(B::stored_prompt(prompt), Some(choices))?
            }
        };
        if waits {
            self.waiting.push(watch.maps);
            self.time += started.elapsed();
            return Ok(());
        }
        if let Some(eviction) = &self.brief.retention.eviction() {
            let layer = &mut cache.layers_mut::<B::Rows>()?[index];
            layer.watch(eviction, segment, &summary, &watch.received(model.config.heads.num_kv_heads))?;
        }
        if is_pooled {
            self.pooled_maps.push(watch.maps);
            if let Some(pool) = self.pool.as_mut().filter(|pool| !self.brief.rejudges() && pool.is_overfull()) {
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
            let place = self.brief.place(model, &cache.layers::<B::Rows>()?[index]);
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
        let first = segment.first_position;
        if self.brief.rejudges() {
            for ((place, scores), maps) in layers.into_iter().zip(maps) {
                let anew = Anew::new(method, place, first, self.brief.span());
                match anew.keep_repeated::<B>(cache, &mut self.pool, scores)? {
                    None => self.pooled_maps.push(maps), // it is shared out at the end
                    Some(summary) => {
                        self.tell(&summary, maps.as_ref(), observer)?;
                        self.summaries.push(summary);
                    }
                }
            }
        } else if let Some((place, _)) = layers.first().filter(|_| method.is_pooled()) {
            let mut pool = Pool::new(method.total(segment.len(), *place), place.scale.num_kv_heads);
            for (_, mut scores) in layers {
                scores.iter_mut().map(Vec::as_mut_slice).for_each(keep_best);
                pool.add_layer(u32::try_from(first).unwrap_or(u32::MAX), scores);
            }
            (self.pool, self.pooled_maps) = (Some(pool), maps); // it is shared out at the end
        } else {
            for (((place, scores), maps), layer) in layers.into_iter().zip(maps).zip(cache.layers_mut::<B::Rows>()?) {
                let choices = method.select(segment, place, &scores);
                let summary = layer.keep_of_prompt(first, choices)?;
                self.tell(&summary, maps.as_ref(), observer)?;
                self.summaries.push(summary);
            }
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
        if let Some(mut pool) = self.pool.take() {
            let started = Instant::now();
            let maps = std::mem::take(&mut self.pooled_maps);
            self.summaries = if self.brief.rejudges() {
                anew::finish::<B>(cache, &mut pool)?
            } else {
                pool.trim();
                keep_pooled::<B>(cache, &pool, maps.len(), self.brief)?
            };
            self.time += started.elapsed();
            for (summary, maps) in self.summaries.iter().zip(&maps) {
                self.tell(summary, maps.as_ref(), observer)?;
            }
        }
        let started = Instant::now();
        let layers = cache.layers_mut::<B::Rows>()?.par_iter_mut().with_max_len(1).zip(&self.answers).enumerate();
        layers.try_for_each(|(index, (layer, answers))| {
            layer.refit(answers).map_err(|error| error.in_place(|| format!("layer {index}")))
        })?;
        self.time += started.elapsed();
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
        layer.keep_of_prompt(first, pool.choices(index))
    };
    layers.map(keep).collect()
}
