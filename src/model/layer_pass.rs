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
    pub keys: PromptRows,
    pub values: PromptRows,
    profile: Option<Profile<'a>>,
    pub maps: Option<MapAccumulator>,
    layout: HeadLayout,
}

/// What a layer's heads are profiled by.
struct Profile<'a> {
    profiler: &'a Profiler,
    segment: Segment<'a>,
    stats: LayerStats,
    /// Where the layer stands, for methods with a budget.
    place: LayerPlace,
    /// Present if a method with a budget chooses, and not the search.
    budgeted: Option<Budgeted>,
    /// Present if that method reads queries.
    query_stats: Option<(FutureQueries, QueryStats)>,
    /// Queries of the whole prompt, `[prompt_len, num_heads, head_dim]`, kept only if they may be asked again.
    queries: Option<Vec<f32>>,
    /// `[prompt_len]` squared lengths of the residual stream that enters the layer, if a method reads them.
    squared_residuals: Option<Vec<f32>>,
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
        let profile = profile.map(|(profiler, segment)| {
            let budgeted = profiler.budgeted();
            let request =
                budgeted.as_ref().map_or_else(|| profiler.request(segment), |budgeted| budgeted.request(segment));
            let query_stats = budgeted.as_ref().and_then(|budgeted| budgeted.needs().future_queries).map(|future| {
                let first_row = segment.first_position + segment.recent;
                (future, QueryStats::new(layout, future.skip_positions.saturating_sub(first_row)))
            });
            let replay = budgeted.as_ref().is_some_and(|budgeted| budgeted.needs().replay);
            let second_pass = replay || budgeted.is_none() && profiler.may_need_second_pass();
            Profile {
                profiler,
                segment,
                stats: LayerStats::new(request, (0..layout.num_heads).map(num_keys)),
                place,
                budgeted,
                query_stats,
                queries: second_pass.then(|| Vec::with_capacity(prompt_len * layout.query_width())),
                squared_residuals: replay.then(|| Vec::with_capacity(prompt_len)),
            }
        });
        let maps = map_side.map(|side| MapAccumulator::new(layout.num_heads, prompt_len, side));
        Ok(Self { keys, values, profile, maps, layout })
    }

    pub fn wants_unrotated_queries(&self) -> bool {
        self.profile.as_ref().is_some_and(|profile| profile.query_stats.is_some())
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
        if let Some(profile) = &mut self.profile {
            if let Some(queries) = &mut profile.queries {
                queries.extend_from_slice(&projected.queries);
            }
            if let Some((_, stats)) = &mut profile.query_stats {
                stats.add_rows(&projected.unrotated_queries)?;
            }
            if let Some(residuals) = &mut profile.squared_residuals {
                let (width, set) = (hidden.dim(1)?, instruction_set());
                host::with_slice(hidden, |hidden| {
                    residuals.extend(hidden.chunks_exact(width.max(1)).map(|row| vector::dot(set, row, row)));
                    Ok(())
                })?;
            }
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
        let Profile { profiler, segment, stats, place, budgeted, query_stats, queries, .. } = profile;
        let queries = queries.as_deref().unwrap_or_default();
        let Some(budgeted) = budgeted else {
            let choices = profiler.choose(*segment, self.layout.num_kv_heads, stats, |pending| {
                largest_differences(self.layout, QueryBlock { queries, first_row: 0 }, &self.keys, pending)
            })?;
            return Ok(Choice::Heads(choices));
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
        let rows = |kv_head: usize| (segment_rows(&self.keys, kv_head), segment_rows(&self.values, kv_head));
        let replay = match &profile.squared_residuals {
            Some(residuals) => {
                let log_sums: Vec<&[f32]> = stats.heads.iter().map(|head| &head.log_sums[..]).collect();
                let (head_dim, seq_len) = (self.layout.head_dim, segment.first_position + segment.len());
                let turn = |positions: usize, rows: &mut [f32]| rope.turn(rows, head_dim, positions, seq_len);
                let replay =
                    Replay { layout: self.layout, queries, keys: &self.keys, log_sums: &log_sums, turn: &turn };
                let values: Vec<Vec<f32>> =
                    (0..self.layout.num_kv_heads).map(|kv_head| segment_rows(&self.values, kv_head)).collect();
                Some(LayerReplay {
                    squared_attention: squared_attention(replay)?,
                    squared_outputs: block.squared_outputs(self.layout, &values)?,
                    squared_residual: median(residuals),
                })
            }
            None => None,
        };
        let facts = LayerFacts { stats, queries: &moments, rows: &rows, replay };
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
