//! What is collected of a prompt in one layer for the method that decides, and what the layer's heads keep by it.
//!
//! Not for: storing it, or sharing a budget out over layers (see [`super::keeper`]); how a choice is made (see
//! [`crate::compress`]).

use super::Model;
use super::facts::{PromptFacts, kv_of_segment};
use crate::attention::HeadLayout;
use crate::attention::refit::{Answers, Asked};
use crate::attention::replay::{Replay, squared_attention, squared_outputs};
use crate::backend::{Backend, Block, Shown, Wanted};
use crate::compress::budget::methods::FutureQueries;
use crate::compress::{
    AdaptiveConfig, Budget, BudgetedMethod, Compression, DecodeMode, HeadChoice, LayerFacts, LayerPlace, LayerReplay,
    LayerStats, Needs, QueryStats, Segment,
};
use crate::error::Result;
use crate::kernels::vector::{self, instruction_set};

/// The farthest that queries are turned beyond the end of a prompt: farther on, hardly anything changes.
const MOST_LATER: usize = 2048;

/// What the heads of a layer keep.
pub(super) enum Choice<'a> {
    /// Everything.
    Everything,
    /// Everything, until the prompt has been read once more.
    Later,
    /// What is chosen.
    Heads(Vec<HeadChoice>),
    /// What the best scores say: of all layers together, or of the layer's, those of what it held before included.
    Scored {
        /// What says how much is kept.
        method: &'a BudgetedMethod,
        /// The layer.
        place: LayerPlace,
        /// `[num_kv_heads]` of `[segment_len]`
        scores: Vec<Vec<f32>>,
        /// `[num_kv_heads]` of `[rows]` of what was held before, if that is judged anew; else empty.
        judged: Vec<Vec<f32>>,
    },
}

/// What a layer's heads are profiled by.
#[derive(Clone)]
pub(super) struct Profile<'a> {
    method: &'a Compression,
    /// What is decided about.
    pub segment: Segment<'a>,
    /// What attention adds to.
    pub stats: LayerStats,
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
    /// Whether heads go on evicting while tokens are generated.
    evicts: bool,
    /// Whether values are fitted afterwards.
    refits: bool,
    /// Whether what the heads hold already is judged together with the segment.
    rejudges: bool,
    /// `[num_kv_heads]` of `[segment_len]` what positions are taken to have received then, if a method goes by that.
    starts: Vec<Vec<f32>>,
}

impl<'a> Profile<'a> {
    /// * `num_keys`: `[num_heads]` the keys that each query head will see
    pub fn new(
        layout: HeadLayout,
        (config, segment): (&'a AdaptiveConfig, Segment<'a>),
        place: LayerPlace,
        num_keys: impl Iterator<Item = usize>,
    ) -> Self {
        let method = &config.method;
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
        let asks_all = needs.replay || needs.block_attention.is_some() || config.refit;
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
            evicts: config.decode == DecodeMode::Evict,
            refits: config.refit,
            rejudges: config.rejudges(),
            starts: Vec::new(),
        }
    }

    /// What the method reads, beyond the statistics that it asks for.
    fn needs(&self) -> Needs {
        match self.method {
            Compression::FastGen(_) => Needs::default(),
            Compression::Budgeted(method) => method.needs(),
        }
    }

    /// Whether the same is collected as for another.
    pub fn collects_as(&self, other: &Self) -> bool {
        self.stats.request == other.stats.request
            && self.needs() == other.needs()
            && self.may_need_second_pass() == other.may_need_second_pass()
            && self.refits == other.refits
            && self.rejudges == other.rejudges
    }

    /// Takes over what was collected for another.
    pub fn collect_as(&mut self, other: &Self) {
        let Self { method, segment, place, evicts, .. } = *self;
        *self = Self { method, segment, place, evicts, ..other.clone() };
    }

    /// Whether queries may be asked again, with keep-sets that are known only then.
    pub fn may_need_second_pass(&self) -> bool {
        matches!(self.method, Compression::FastGen(search) if search.may_need_second_pass())
    }

    /// Which numbers of the prompt are to be [added](Self::add).
    pub fn wanted(&self) -> Wanted {
        Wanted {
            replay: self.squared_residuals.is_some(),
            queries: self.kept_rows > 0,
            unrotated: self.query_stats.is_some(),
        }
    }

    /// Takes in rows of the prompt, as far as they are wanted.
    pub fn add(&mut self, rows: Shown<'_>, hidden_size: usize) -> Result<()> {
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
    pub fn choose<B: Backend>(&mut self, model: &Model<B>, block: &Block<B>, prompt: &B::Prompt) -> Result<Choice<'a>> {
        match self.method {
            Compression::FastGen(search) => {
                let again = |pending: &[_]| model.backend.ask_again(prompt, pending);
                search.choose(self.segment, model.config.heads.num_kv_heads, &self.stats, again).map(Choice::Heads)
            }
            Compression::Budgeted(method) if method.needs().repetition.is_some() => Ok(Choice::Later),
            Compression::Budgeted(method) => self.choose_by_budget(method, model, block, prompt),
        }
    }

    /// What some of the prompt's queries read of all keys, if values are to be fitted to it.
    ///
    /// # Errors
    /// As [`Answers::of`].
    pub fn answers<B: Backend>(&self, model: &Model<B>, prompt: &B::Prompt) -> Result<Option<Answers>> {
        if !self.refits {
            return Ok(None);
        }
        let (layout, segment) = (model.config.heads, self.segment);
        let turn = |positions: usize, rows: &mut [f32]| {
            model.rope.turn(rows, layout.head_dim, positions, segment.first_position + segment.len());
        };
        let kv = model.backend.prompt_kv(prompt)?;
        Answers::of(Asked { layout, queries: &self.kept_queries, kv: &kv, turn: &turn }).map(Some)
    }

    fn choose_by_budget<B: Backend>(
        &mut self,
        method: &'a BudgetedMethod,
        model: &Model<B>,
        block: &Block<B>,
        prompt: &B::Prompt,
    ) -> Result<Choice<'a>> {
        let (backend, layout, rope) = (&model.backend, model.config.heads, &model.rope);
        let Self { segment, stats, place, query_stats, kept_queries, .. } = &*self;
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
                let later = self.asked_later(method);
                let turn = |positions: usize, rows: &mut [f32]| rope.turn(rows, head_dim, positions + later, seq_len);
                let log_sums = |head: usize| {
                    let log_sums = &stats.heads[head].log_sums[..];
                    let num_keys = kv.keys.past_len(head / layout.group_size()) + kv.keys.len();
                    &log_sums[log_sums.len().saturating_sub(num_keys)..]
                };
                let log_sums: Vec<&[f32]> = (0..stats.heads.len()).map(log_sums).collect();
                let replay = Replay { layout, queries: kept_queries, keys: &kv.keys, log_sums: &log_sums, turn: &turn };
                let weights = backend.widened(&block.o_proj)?;
                let outputs = |values: &[Vec<f32>]| squared_outputs(layout, hidden_size, &*weights, values);
                let judges_past = self.rejudges && method.method.judges_past() && cut.is_none();
                let past = if judges_past { collected.past_values() } else { Vec::new() };
                Some(LayerReplay {
                    squared_attention: squared_attention(replay)?,
                    squared_outputs: outputs(&collected.values())?,
                    past_outputs: if past.iter().all(Vec::is_empty) { Vec::new() } else { outputs(&past)? },
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
        let starts = if self.evicts { method.starts(*segment, *place, &facts)? } else { Vec::new() };
        let choice = if method.is_pooled() || self.rejudges {
            Choice::Scored { method, place: *place, scores, judged: method.judged(*place, &facts)? }
        } else {
            Choice::Heads(method.select(*segment, *place, &scores))
        };
        self.starts = starts;
        Ok(choice)
    }

    /// How many tokens later a prompt's queries are taken to be asked again than right behind it. What is judged stays on for as
    /// long as a budget has room for tokens: asked right behind a short prompt, heads that look at what is near would find
    /// all of it, and later hold it for nothing. A long first prompt is farther from its end than that; of further ones the
    /// newest tokens are held in any case.
    fn asked_later(&self, method: &BudgetedMethod) -> usize {
        let scale = self.place.scale;
        match method.budget {
            Budget::Bytes(bytes) if self.rejudges => {
                let average = scale.rows(bytes) / (scale.num_layers * scale.num_kv_heads).max(1);
                let begins = self.segment.first_position == 0;
                average.min(MOST_LATER).saturating_sub(if begins { self.segment.num_rows() } else { 0 })
            }
            _ => 0,
        }
    }

    /// What each position of the segment has received when tokens begin to be generated, `[num_kv_heads]` of `[segment_len]`;
    /// empty lists if it was not collected. Known once it was [chosen](Self::choose) what heads keep.
    pub fn received(&self, num_kv_heads: usize) -> Vec<Vec<f32>> {
        if self.starts.is_empty() {
            return self.stats.received(num_kv_heads, self.segment.len());
        }
        self.starts.clone()
    }
}

/// The middle one of some numbers, the larger of two; 0 if there are none.
fn median(numbers: &[f32]) -> f32 {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable_by(f32::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
