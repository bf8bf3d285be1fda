//! One layer's work on a prompt: its full keys and values, what its heads are judged by, and what they keep.

use candle_core::Tensor;

use super::block::{Block, BlockContext};
use super::host;
use super::rope::Rope;
use crate::attention::HeadLayout;
use crate::attention::map::MapAccumulator;
use crate::attention::prefill::{PromptRows, QueryBlock, largest_differences, prefill};
use crate::attention::replay::{Replay, squared_attention};
use crate::cache::LayerCacheManager;
use crate::error::Result;
use crate::kernels::vector::{self, instruction_set};
use crate::policy::methods::FutureQueries;
use crate::profile::{
    Budgeted, HeadChoice, LayerFacts, LayerPlace, LayerReplay, LayerStats, Profiler, QueryStats, Segment,
};

/// The work on one prompt.
pub(super) struct LayerPass<'a> {
    keys: PromptRows,
    values: PromptRows,
    profile: Option<Profile<'a>>,
    /// Queries of the whole prompt, `[prompt_len, num_heads, head_dim]`, kept only if they may be asked again.
    queries: Option<Vec<f32>>,
    maps: Option<MapAccumulator>,
    layout: HeadLayout,
}

/// What a layer's heads are profiled by, whatever computes it.
pub(super) struct Profile<'a> {
    profiler: &'a Profiler,
    segment: Segment<'a>,
    pub stats: LayerStats,
    /// Where the layer stands, for methods with a budget.
    place: LayerPlace,
    /// Present if a method with a budget chooses, and not the search.
    budgeted: Option<Budgeted>,
    /// Present if that method reads queries.
    query_stats: Option<(FutureQueries, QueryStats)>,
    /// Queries of the whole prompt, `[prompt_len, num_heads, head_dim]`, kept only if a method asks them again.
    replayed_queries: Option<Vec<f32>>,
    /// `[prompt_len]` squared lengths of the residual stream that enters the layer, if a method reads them.
    squared_residuals: Option<Vec<f32>>,
}

impl<'a> Profile<'a> {
    /// * `num_keys`: `[num_heads]` the keys that each query head will see
    pub fn new(
        layout: HeadLayout,
        (profiler, segment): (&'a Profiler, Segment<'a>),
        place: LayerPlace,
        num_keys: impl Iterator<Item = usize>,
    ) -> Self {
        let budgeted = profiler.budgeted();
        let request = budgeted.as_ref().map_or_else(|| profiler.request(segment), |budgeted| budgeted.request(segment));
        let query_stats = budgeted.as_ref().and_then(|budgeted| budgeted.needs().future_queries).map(|future| {
            let first_row = segment.first_position + segment.recent;
            (future, QueryStats::new(layout, future.skip_positions.saturating_sub(first_row)))
        });
        let replay = budgeted.as_ref().is_some_and(|budgeted| budgeted.needs().replay);
        let prompt_len = segment.num_rows();
        Self {
            profiler,
            segment,
            stats: LayerStats::new(request, num_keys),
            place,
            budgeted,
            query_stats,
            replayed_queries: replay.then(|| Vec::with_capacity(prompt_len * layout.query_width())),
            squared_residuals: replay.then(|| Vec::with_capacity(prompt_len)),
        }
    }

    /// Whether queries may be asked again, with keep-sets that are known only then.
    pub fn may_need_second_pass(&self) -> bool {
        self.budgeted.is_none() && self.profiler.may_need_second_pass()
    }

    /// Whether queries are to be [added](Self::add_rows) before they are rotated.
    pub fn wants_unrotated_queries(&self) -> bool {
        self.query_stats.is_some()
    }

    /// Whether rows are to be [added](Self::add_rows) with their rotated queries and the residual stream.
    pub fn wants_replay(&self) -> bool {
        self.replayed_queries.is_some()
    }

    /// Whether [`choose`](Self::choose) reads keys and values.
    pub fn reads_rows(&self) -> bool {
        self.budgeted.as_ref().is_some_and(|budgeted| budgeted.needs().keys_and_values || budgeted.needs().replay)
    }

    /// Takes in rows of the prompt, as far as they are wanted.
    ///
    /// * `queries`, `unrotated_queries`: `[seq_len, num_heads, head_dim]`
    /// * `hidden`: `[seq_len, hidden_size]`, with rows of `hidden_size`
    pub fn add_rows(
        &mut self,
        queries: &[f32],
        unrotated_queries: &[f32],
        hidden: &[f32],
        hidden_size: usize,
    ) -> Result<()> {
        if let Some(replayed) = &mut self.replayed_queries {
            replayed.extend_from_slice(queries);
        }
        if let Some((_, stats)) = &mut self.query_stats {
            stats.add_rows(unrotated_queries)?;
        }
        if let Some(residuals) = &mut self.squared_residuals {
            let set = instruction_set();
            residuals.extend(hidden.chunks_exact(hidden_size.max(1)).map(|row| vector::dot(set, row, row)));
        }
        Ok(())
    }
}

/// What the heads of a layer keep.
pub(super) enum Choice {
    /// Everything.
    Everything,
    /// What is chosen.
    Heads(Vec<HeadChoice>),
    /// What the best scores of all layers together say: `[num_kv_heads]` of `[segment_len]`.
    Scores(Vec<Vec<f32>>),
}

impl<'a> LayerPass<'a> {
    pub fn new(
        layout: HeadLayout,
        cache: &LayerCacheManager,
        profile: Option<(&'a Profiler, Segment<'a>)>,
        place: LayerPlace,
        prompt_len: usize,
        map_side: Option<usize>,
    ) -> Result<Self> {
        let (keys, values) = cache.prompt_rows(prompt_len)?;
        let num_keys = |head: usize| keys.past_len(head / layout.group_size()) + prompt_len;
        let profile = profile.map(|profile| Profile::new(layout, profile, place, (0..layout.num_heads).map(num_keys)));
        let second_pass = profile.as_ref().is_some_and(Profile::may_need_second_pass);
        let queries = second_pass.then(|| Vec::with_capacity(prompt_len * layout.query_width()));
        let maps = map_side.map(|side| MapAccumulator::new(layout.num_heads, prompt_len, side));
        Ok(Self { keys, values, profile, queries, maps, layout })
    }

    pub fn wants_unrotated_queries(&self) -> bool {
        self.profile.as_ref().is_some_and(Profile::wants_unrotated_queries)
    }

    /// Rows of the prompt that went through the layer.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Keys and values of the prompt, behind those that were kept before.
    pub fn rows(&self) -> (&PromptRows, &PromptRows) {
        (&self.keys, &self.values)
    }

    /// The prompt's attention maps, if there are any.
    pub fn into_maps(self) -> Option<MapAccumulator> {
        self.maps
    }

    /// Runs one chunk of rows `[seq_len, hidden_size]` through the layer.
    pub fn chunk(
        &mut self,
        block: &Block,
        hidden: &Tensor,
        first_row: usize,
        context: BlockContext<'_>,
    ) -> Result<Tensor> {
        let projected = block.project(hidden, context)?;
        self.keys.push(&projected.keys)?;
        self.values.push(&projected.values)?;
        let attended = prefill(
            self.layout,
            QueryBlock { queries: &projected.queries, first_row },
            &self.keys,
            &self.values,
            self.profile.as_mut().map(|profile| &mut profile.stats),
            self.maps.as_mut().map(MapAccumulator::heads_mut),
        )?;
        if let Some(queries) = &mut self.queries {
            queries.extend_from_slice(&projected.queries);
        }
        if let Some(profile) = &mut self.profile {
            let width = hidden.dim(1)?;
            host::with_slice(hidden, |hidden| {
                profile.add_rows(&projected.queries, &projected.unrotated_queries, hidden, width)
            })?;
        }
        block.finish(hidden, attended, context)
    }

    /// What each position of the segment received in all, `[num_kv_heads]` of `[segment_len]`; empty lists if it was not
    /// collected.
    pub fn received(&self) -> Vec<Vec<f32>> {
        let num_kv_heads = self.layout.num_kv_heads;
        self.profile.as_ref().map_or_else(
            || vec![Vec::new(); num_kv_heads],
            |profile| profile.stats.received(num_kv_heads, profile.segment.len()),
        )
    }

    /// What each head keeps, or what decides about it.
    pub fn choose(&self, block: &Block, rope: &Rope) -> Result<Choice> {
        let Some(profile) = &self.profile else { return Ok(Choice::Everything) };
        let queries = self.queries.as_deref().unwrap_or_default();
        profile.choose(self.layout, block, rope, Some(self.rows()), |pending| {
            largest_differences(self.layout, QueryBlock { queries, first_row: 0 }, &self.keys, pending)
        })
    }
}

impl Profile<'_> {
    /// What each head keeps, or what decides about it.
    ///
    /// * `rows`: keys and values of the prompt, behind those that were kept before; must be there if they are
    ///   [read](Self::reads_rows)
    /// * `second_pass`: see [`Profiler::choose`]
    pub fn choose(
        &self,
        layout: HeadLayout,
        block: &Block,
        rope: &Rope,
        rows: Option<(&PromptRows, &PromptRows)>,
        second_pass: impl FnOnce(&[(usize, Vec<Vec<f32>>)]) -> Result<Vec<Vec<f32>>>,
    ) -> Result<Choice> {
        let Self { profiler, segment, stats, place, budgeted, query_stats, replayed_queries, .. } = self;
        let Some(budgeted) = budgeted else {
            return Ok(Choice::Heads(profiler.choose(*segment, layout.num_kv_heads, stats, second_pass)?));
        };
        let moments = query_stats.as_ref().map_or_else(Vec::new, |(future, stats)| {
            let angles = rope.mean_angles(segment.first_position + segment.len(), future.positions);
            let mut moments = stats.moments();
            for head in &mut moments {
                rope.rotate_moments(&mut head.mean, &mut head.covariance, &angles);
            }
            moments
        });
        let segment_rows = |rows: &PromptRows, kv_head: usize| {
            let end = rows.past_len(kv_head) + rows.len();
            rows.rows(kv_head, end - segment.len()..end)
        };
        let head_rows = |kv_head: usize| {
            rows.map(|(keys, values)| (segment_rows(keys, kv_head), segment_rows(values, kv_head))).unwrap_or_default()
        };
        let replay = match (&self.squared_residuals, rows) {
            (Some(residuals), Some((keys, values))) => {
                let log_sums: Vec<&[f32]> = stats.heads.iter().map(|head| &head.log_sums[..]).collect();
                let (head_dim, seq_len) = (layout.head_dim, segment.first_position + segment.len());
                let turn = |positions: usize, rows: &mut [f32]| rope.turn(rows, head_dim, positions, seq_len);
                let queries = replayed_queries.as_deref().unwrap_or_default();
                let replay = Replay { layout, queries, keys, log_sums: &log_sums, turn: &turn };
                let values: Vec<Vec<f32>> =
                    (0..layout.num_kv_heads).map(|kv_head| segment_rows(values, kv_head)).collect();
                Some(LayerReplay {
                    squared_attention: squared_attention(replay)?,
                    squared_outputs: block.squared_outputs(layout, &values)?,
                    squared_residual: median(residuals),
                })
            }
            _ => None,
        };
        let facts = LayerFacts { stats, queries: &moments, rows: &head_rows, replay };
        let scores = budgeted.scores(*segment, *place, &facts)?;
        Ok(if budgeted.is_pooled() {
            Choice::Scores(scores)
        } else {
            Choice::Heads(budgeted.select(*segment, *place, &scores))
        })
    }
}

/// The middle one of some numbers, the larger of two; 0 if there are none.
fn median(numbers: &[f32]) -> f32 {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable_by(f32::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
