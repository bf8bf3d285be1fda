//! What a sequence holds, judged together with what comes, so that all of it stays within its budget in bytes.
//!
//! Not for: scores (see [`crate::compress::budget`]), or rows (see [`crate::cache`]).

use super::Model;
use crate::backend::Backend;
use crate::cache::{AdaptiveKvCache, Bounds, CacheLayer, EVICTING_NOTE_BYTES, LayerSummary, NOTE_BYTES, Rows};
use crate::compress::budget::methods::ALWAYS;
use crate::compress::{
    AdaptiveConfig, Budget, BudgetScale, BudgetedMethod, Candidates, HeadChoice, LayerPlace, Pool, Safe,
};
use crate::error::Result;

/// Of a small budget, the share of rows that is left for what comes, as a divisor.
const AHEAD_SHARE: usize = 8;

/// And the share of rows that the newest tokens take in any case.
const PROTECTED_SHARE: usize = 2;

/// Where a layer stands, and what its budget is for.
pub(super) fn place<B: Backend>(
    model: &Model<B>,
    layer: &CacheLayer<B::Rows>,
    config: Option<&AdaptiveConfig>,
    (bounds, most_new): (Bounds, usize),
) -> LayerPlace {
    let layout = model.config.heads;
    let (num_layers, num_kv_heads) = (model.config.num_layers, layout.num_kv_heads);
    let rejudges = config.is_some_and(AdaptiveConfig::rejudges);
    let notes = if rejudges { NOTE_BYTES } else { EVICTING_NOTE_BYTES };
    let row_bytes = layer.token_bytes() + notes;
    let ahead = match config.and_then(AdaptiveConfig::budget) {
        Some(Budget::Bytes(bytes)) if rejudges => {
            let average = bytes / (num_layers * num_kv_heads * row_bytes).max(1);
            bounds.ahead.min((average / AHEAD_SHARE).max(usize::from(average > 1)))
        }
        Some(Budget::Bytes(_)) => most_new,
        _ => 0,
    };
    let newest = layer.dtype().newest().token_bytes(layout.head_dim) + notes;
    LayerPlace {
        layer: layer.ledger().layer(),
        head_dim: layout.head_dim,
        scale: BudgetScale {
            num_layers,
            num_kv_heads,
            row_bytes,
            head_bytes: layer.rows().head_bytes() + ahead * newest,
        },
    }
}

/// A prompt on top of a sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    /// Of the sequence.
    pub bounds: Bounds,
    /// Tokens before the prompt.
    pub seen: usize,
    /// Tokens with the prompt.
    pub end: usize,
}

/// Heads of a model that judge what they hold together with a prompt.
#[derive(Clone, Copy)]
pub(super) struct Anew<'a> {
    method: &'a BudgetedMethod,
    place: LayerPlace,
    /// Rows of all heads.
    room: usize,
    safe: Safe,
    /// The first position that the prompt is decided about with.
    first: usize,
    end: usize,
}

impl<'a> Anew<'a> {
    /// * `first`: position of the segment's first token
    pub fn new(method: &'a BudgetedMethod, place: LayerPlace, first: usize, span: Span) -> Self {
        let heads = (place.scale.num_layers * place.scale.num_kv_heads).max(1);
        let room = match method.budget {
            Budget::Bytes(bytes) => place.scale.rows(bytes).max(heads),
            Budget::KeptRatio(_) => usize::MAX,
        };
        let Span { bounds, seen, end } = span;
        let average = room / heads;
        let protected = bounds.protected.min(average / PROTECTED_SHARE);
        let pinned = bounds.pinned.min(average - protected);
        let position = |position: usize| u32::try_from(position).unwrap_or(u32::MAX);
        // What decides about a first prompt knows what its newest tokens are worth.
        let safe = if seen == 0 {
            Safe { before: position(pinned), ..Safe::default() }
        } else {
            Safe { before: position(pinned), from: position(end - protected.min(end)) }
        };
        Self { method, place, room, safe, first, end }
    }

    /// What a layer's heads may keep: what they hold, and the segment.
    ///
    /// * `scores`: `[num_kv_heads]` of `[segment_len]`
    /// * `judged`: `[num_kv_heads]` of `[rows]` of what is held, or none
    fn candidates<B: Backend>(
        &self,
        layer: &CacheLayer<B::Rows>,
        scores: Vec<Vec<f32>>,
        judged: &[Vec<f32>],
    ) -> Vec<Candidates> {
        let window = layer.ledger().window().map_or(0, |window| (self.end + 1).saturating_sub(window));
        let held = layer.ledger().candidates(self.first);
        let head = |(kv_head, (held, scores)): (usize, (Candidates, Vec<f32>))| {
            let (positions, then): (Vec<u32>, Vec<f32>) = held.into_iter().unzip();
            let judged = judged.get(kv_head).map(Vec::as_slice).unwrap_or_default();
            let past = self.method.past_scores(&positions, then, judged);
            let held = positions.into_iter().zip(past).filter(|&(position, _)| position as usize >= window);
            // Positions fit 32 bits, which the cache checks.
            held.chain((u32::try_from(self.first).unwrap_or(u32::MAX)..).zip(scores)).collect()
        };
        held.into_iter().zip(scores).enumerate().map(head).collect()
    }

    /// The pool with what this layer may keep. It begins with the rows of all layers as they are before the prompt comes; none of
    /// those goes that no prompt was decided about with.
    fn pooled<'p, B: Backend>(
        &self,
        pool: &'p mut Option<Pool>,
        heads: Vec<Candidates>,
        cache: &AdaptiveKvCache,
    ) -> Result<&'p mut Pool> {
        let pool = match pool {
            Some(pool) => pool,
            None => pool.insert(self.pool::<B>(cache)?),
        };
        pool.set_layer(self.place.layer, heads);
        Ok(pool)
    }

    fn pool<B: Backend>(&self, cache: &AdaptiveKvCache) -> Result<Pool> {
        let mut heads = Vec::new();
        for layer in cache.layers::<B::Rows>()? {
            let ledger = layer.ledger();
            let (settled, seen) = (ledger.settled(), ledger.seen());
            let newest = |(kv_head, mut held): (usize, Candidates)| {
                let positions = &layer.positions()[kv_head];
                let undecided = positions.iter().filter(|&&position| (settled..seen).contains(&(position as usize)));
                held.extend(undecided.map(|&position| (position, ALWAYS)));
                held
            };
            heads.extend(ledger.candidates(settled).into_iter().enumerate().map(newest));
        }
        Ok(Pool::of(self.room, self.place.scale.num_kv_heads, self.safe, heads))
    }

    /// Stores what a layer keeps of a prompt and of what it held, or, where layers share the budget, what it may keep.
    pub fn store<B: Backend>(
        &self,
        prompt: &B::Prompt,
        cache: &mut AdaptiveKvCache,
        pool: &mut Option<Pool>,
        (scores, judged): (Vec<Vec<f32>>, &[Vec<f32>]),
    ) -> Result<LayerSummary> {
        let index = self.place.layer;
        let heads = self.candidates::<B>(&cache.layers::<B::Rows>()?[index], scores, judged);
        if !self.method.is_pooled() {
            let kept = self.method.select_among(self.place, self.safe, &heads);
            let layer = &mut cache.layers_mut::<B::Rows>()?[index];
            let summary = layer.store_anew(B::stored_prompt(prompt), HeadChoice::of_candidates(&kept))?;
            layer.judged(&kept)?;
            return Ok(summary);
        }
        let pool = self.pooled::<B>(pool, heads, cache)?;
        if pool.is_overfull() {
            pool.trim();
            // Before the layer is stored, so that there is room for it.
            for (other, layer) in cache.layers_mut::<B::Rows>()?.iter_mut().enumerate() {
                if other != index {
                    layer.keep_of_prompt(0, pool.choices(other))?;
                    layer.judged(pool.layer(other))?;
                }
            }
            crate::memory::release_unused();
        }
        cache.layers_mut::<B::Rows>()?[index].store_anew(B::stored_prompt(prompt), pool.choices(index))
    }

    /// What a layer keeps that holds all of a prompt until it has been read once more; where layers share the budget, nothing
    /// goes yet.
    pub fn keep_repeated<B: Backend>(
        &self,
        cache: &mut AdaptiveKvCache,
        pool: &mut Option<Pool>,
        scores: Vec<Vec<f32>>,
    ) -> Result<Option<LayerSummary>> {
        let index = self.place.layer;
        let heads = self.candidates::<B>(&cache.layers::<B::Rows>()?[index], scores, &[]);
        if self.method.is_pooled() {
            return self.pooled::<B>(pool, heads, cache).map(|_| None);
        }
        let kept = self.method.select_among(self.place, self.safe, &heads);
        let layer = &mut cache.layers_mut::<B::Rows>()?[index];
        let summary = layer.keep_of_prompt(0, HeadChoice::of_candidates(&kept))?;
        layer.judged(&kept)?;
        Ok(Some(summary))
    }
}

/// Lets the lowest of all that is held go, by the scores that it has, so that there is room for what comes.
pub(super) fn cut<B: Backend>(
    method: &BudgetedMethod,
    place_of: &dyn Fn(&CacheLayer<B::Rows>) -> LayerPlace,
    cache: &mut AdaptiveKvCache,
) -> Result<()> {
    let (seen, span) = (cache.seen(), Span { bounds: cache.bounds(), seen: cache.seen(), end: cache.seen() });
    let mut pool = None;
    for layer in cache.layers_mut::<B::Rows>()? {
        let (place, heads) = (place_of(layer), layer.ledger().candidates(seen));
        let anew = Anew::new(method, place, seen, span);
        if method.is_pooled() {
            let pool = pool.get_or_insert_with(|| Pool::of(anew.room, place.scale.num_kv_heads, anew.safe, Vec::new()));
            pool.push_layer(heads);
        } else {
            layer.keep_some(&method.select_among(place, anew.safe, &heads), seen)?;
        }
    }
    let Some(mut pool) = pool else { return Ok(()) };
    pool.trim();
    let mut layers = cache.layers_mut::<B::Rows>()?.iter_mut().enumerate();
    layers.try_for_each(|(index, layer)| layer.keep_some(pool.layer(index), seen))
}

/// Lets go what the pool has dropped in the end, and takes the scores of the rest down.
pub(super) fn finish<B: Backend>(cache: &mut AdaptiveKvCache, pool: &mut Pool) -> Result<Vec<LayerSummary>> {
    pool.trim();
    let layers = cache.layers_mut::<B::Rows>()?.iter_mut().enumerate();
    let keep = |(index, layer): (usize, &mut CacheLayer<B::Rows>)| {
        let summary = layer.keep_of_prompt(0, pool.choices(index))?;
        layer.judged(pool.layer(index))?;
        Ok(LayerSummary { bytes: layer.bytes(), ..summary })
    };
    layers.map(keep).collect()
}
