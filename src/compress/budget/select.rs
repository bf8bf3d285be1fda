//! Choosing by a method with a budget: scores of every head's positions, then the best of them.
//!
//! Two steps: [`BudgetedMethod::scores`] needs a layer's statistics, keys and values; [`BudgetedMethod::select`] needs scores only. A
//! budget for all layers together is shared out from the scores of all of them (see [`super::pool`]).
//!
//! What is decided about is a [`Segment`], as in the search, and the budget is the segment's: keys that were settled
//! earlier stay, and count neither in the budget nor in the scores.

use rayon::prelude::*;

use super::allocation::Allocation;
use super::methods::{AttentionRows, MethodFacts, Needs, QueryMoments, RepeatFacts, ReplayFacts};
use super::{BudgetScale, BudgetedMethod};
use crate::compress::segment::{HeadChoice, Segment};
use crate::compress::stats::{HeadStats, LayerStats, MassRequest, StatsRequest};
use crate::error::{Error, Result};
use crate::numbers::has_nan;

/// Which layer is decided about, and in what model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerPlace {
    /// Index of the layer.
    pub layer: usize,
    /// Numbers of a key, value or query.
    pub head_dim: usize,
    /// Layers, heads and bytes that the budget is for.
    pub scale: BudgetScale,
}

/// What was collected of a layer, as [`BudgetedMethod::request`] and [`BudgetedMethod::needs`] say.
pub struct LayerFacts<'a> {
    /// Sums over rows of the attention maps.
    pub stats: &'a LayerStats,
    /// `[num_heads]` moments of the queries, turned to the positions to come; empty if not asked for.
    pub queries: &'a [QueryMoments],
    /// The keys and values of a KV head's segment, `[segment_len, head_dim]` each; called only if they are asked for.
    pub rows: &'a (dyn Fn(usize) -> (Vec<f32>, Vec<f32>) + Sync),
    /// `[rows]` of `[num_heads, head_dim]` queries of the last rows, see [`MethodFacts::last_queries`]; empty if not asked
    /// for.
    pub last_queries: &'a [Vec<f32>],
    /// Present if it is asked for.
    pub replay: Option<LayerReplay>,
    /// Present if it is asked for; nothing else is there then.
    pub repeat: Option<LayerRepeat>,
}

/// What a repetition of a segment sees of it in a layer, see [`RepeatFacts`].
#[derive(Debug, Clone)]
pub struct LayerRepeat {
    /// `[num_heads]` of `[segment_len]`
    pub largest_weights: Vec<Vec<f32>>,
    /// `[num_heads]` of `[segment_len]`; empty if it is not asked for.
    pub squared_outputs: Vec<Vec<f32>>,
}

/// What replayed queries of a layer see, see [`ReplayFacts`].
#[derive(Debug, Clone)]
pub struct LayerReplay {
    /// `[num_heads]` of `[num_keys]`, settled keys first.
    pub squared_attention: Vec<Vec<f32>>,
    /// `[num_heads]` of `[segment_len]`
    pub squared_outputs: Vec<Vec<f32>>,
    /// Median squared length of the residual stream that enters the layer.
    pub squared_residual: f32,
}

impl std::fmt::Debug for LayerFacts<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("LayerFacts").field("heads", &self.stats.heads.len()).finish_non_exhaustive()
    }
}

/// Keeps the positions of each KV head that the method finds worth most, as many as its budget has room for.
impl BudgetedMethod {
    /// What the method reads.
    #[must_use]
    pub fn needs(&self) -> Needs {
        self.method.needs()
    }

    /// Which sums over the attention maps have to be collected while a prompt is processed.
    #[must_use]
    pub fn request(&self, segment: Segment<'_>) -> StatsRequest {
        let mass = |rows: usize| MassRequest { first_row: segment.num_rows().saturating_sub(rows), window: None };
        let recent = segment.recent;
        match self.needs().attention {
            AttentionRows::None => StatsRequest { recent, log_sums: self.needs().replay, ..StatsRequest::default() },
            AttentionRows::All => StatsRequest { column_sums: true, recent, ..StatsRequest::default() },
            AttentionRows::Last(rows) => StatsRequest { mass: Some(mass(rows)), recent, ..StatsRequest::default() },
        }
    }

    /// Whether one budget is for all layers together: then [`select`](Self::select) is not for it.
    #[must_use]
    pub fn is_pooled(&self) -> bool {
        self.method.allocation() == Allocation::Pooled
    }

    /// How many positions of a segment all heads of all layers keep together.
    #[must_use]
    pub fn total(&self, segment_len: usize, place: LayerPlace) -> usize {
        self.budget.total(segment_len, place.scale)
    }

    /// How many positions of a segment each head of a layer keeps on average.
    #[must_use]
    pub fn layer_budget(&self, segment_len: usize, place: LayerPlace) -> usize {
        let average = self.budget.average(segment_len, place.scale);
        let allocation = self.method.allocation();
        allocation.layer_budget(average, segment_len, place.layer, place.scale.num_layers)
    }

    /// The scores of every position of the segment, `[num_kv_heads]` of `[segment_len]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the query heads cannot be shared out, or facts have another size than they must;
    /// [`Error::NotANumber`] if a score or what it is made of is no number.
    pub fn scores(&self, segment: Segment<'_>, place: LayerPlace, facts: &LayerFacts<'_>) -> Result<Vec<Vec<f32>>> {
        let num_kv_heads = place.scale.num_kv_heads;
        let heads = &facts.stats.heads;
        if num_kv_heads == 0 || heads.is_empty() || !heads.len().is_multiple_of(num_kv_heads) {
            return Err(Error::shape("profiling", format!("a multiple of {num_kv_heads} query heads"), heads.len()));
        }
        facts.stats.check()?;
        let needs = self.needs();
        if needs.future_queries.is_some() && facts.queries.len() != heads.len() {
            return Err(Error::shape("moments of queries", heads.len(), facts.queries.len()));
        }
        if needs.replay && facts.replay.is_none() {
            return Err(Error::shape("replayed queries", heads.len(), 0));
        }
        if needs.repetition.is_some() && facts.repeat.is_none() {
            return Err(Error::shape("a repetition", heads.len(), 0));
        }
        let width = heads.len() * place.head_dim;
        let wanted_rows = needs.last_queries.min(segment.num_rows());
        if facts.last_queries.len() < wanted_rows || facts.last_queries.iter().any(|row| row.len() != width) {
            return Err(Error::shape("queries of the last rows", (wanted_rows, width), facts.last_queries.len()));
        }
        let group_size = heads.len() / num_kv_heads;
        // Settled keys come first, and are not decided about.
        let of_segment = |numbers: &Vec<f32>| numbers[numbers.len().saturating_sub(segment.len())..].to_vec();
        let replayed: Vec<Vec<f32>> =
            facts.replay.iter().flat_map(|replay| replay.squared_attention.iter().map(of_segment)).collect();
        let whole_layer = if needs.whole_layer { attention(heads, segment.len(), needs) } else { Vec::new() };
        let budget = self.layer_budget(segment.len(), place);
        let score = |kv_head: usize| {
            let group = kv_head * group_size..(kv_head + 1) * group_size;
            let own =
                if needs.whole_layer { Vec::new() } else { attention(&heads[group.clone()], segment.len(), needs) };
            let (keys, values) = if needs.keys_and_values { (facts.rows)(kv_head) } else { Default::default() };
            let attention = if needs.whole_layer { &whole_layer } else { &own };
            let own_queries = group.start * place.head_dim..group.end * place.head_dim;
            let last_queries: Vec<Vec<f32>> =
                facts.last_queries.iter().map(|row| row[own_queries.clone()].to_vec()).collect();
            for (what, got, wanted, width) in [
                ("attention of a segment", attention.len(), needs.attention != AttentionRows::None, 1),
                ("keys of a segment", keys.len(), needs.keys_and_values, place.head_dim),
                ("values of a segment", values.len(), needs.keys_and_values, place.head_dim),
            ] {
                let expected = segment.len() * width;
                if wanted && got != expected {
                    return Err(Error::shape(what, expected, got));
                }
            }
            let facts = MethodFacts {
                first_position: segment.first_position,
                len: segment.len(),
                num_rows: segment.num_rows(),
                budget,
                head_idx: place.layer * num_kv_heads + kv_head,
                head_dim: place.head_dim,
                attention,
                keys: &keys,
                values: &values,
                queries: facts.queries.get(group.clone()).unwrap_or_default(),
                last_queries: &last_queries,
                replay: facts.replay.as_ref().map_or_else(ReplayFacts::default, |replay| ReplayFacts {
                    squared_attention: replayed.get(group.clone()).unwrap_or_default(),
                    squared_outputs: replay.squared_outputs.get(group.clone()).unwrap_or_default(),
                    squared_residual: replay.squared_residual,
                }),
                repeat: facts.repeat.as_ref().map_or_else(RepeatFacts::default, |repeat| RepeatFacts {
                    largest_weights: repeat.largest_weights.get(group.clone()).unwrap_or_default(),
                    squared_outputs: repeat.squared_outputs.get(group).unwrap_or_default(),
                }),
            };
            let scores = self.method.scores(&facts);
            if has_nan(&scores) {
                let method = self.method.name();
                return Err(Error::not_a_number(format!("the scores of `{method}` for KV head {kv_head}")));
            }
            Ok(scores)
        };
        (0..num_kv_heads).into_par_iter().map(score).collect()
    }

    /// What each KV head of a layer keeps, given the scores of its positions.
    ///
    /// * `scores`: from [`scores`](Self::scores)
    #[must_use]
    pub fn select(&self, segment: Segment<'_>, place: LayerPlace, scores: &[Vec<f32>]) -> Vec<HeadChoice> {
        let budget = self.layer_budget(segment.len(), place);
        let allocation = self.method.allocation();
        let kept = allocation.select(scores, budget).into_iter().enumerate();
        kept.map(|(kv_head, kept)| HeadChoice {
            kv_head,
            level: 0,
            recovered: Vec::new(),
            positions: kept.into_iter().map(|index| segment.position(index)).collect(),
        })
        .collect()
    }
}

/// Sums over the requested rows and some query heads, for the keys of the segment; empty if no rows are asked for.
fn attention(heads: &[HeadStats], segment_len: usize, needs: Needs) -> Vec<f32> {
    if needs.attention == AttentionRows::None {
        return Vec::new();
    }
    let mut sums = vec![0.0; segment_len];
    for head in heads {
        let columns = head.profiled();
        let own = &columns[columns.len().saturating_sub(segment_len)..];
        if own.len() != segment_len {
            return Vec::new(); // refused by the caller
        }
        sums.iter_mut().zip(own).for_each(|(sum, &value)| *sum += value);
    }
    sums
}
