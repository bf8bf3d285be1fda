//! Choosing by a method with a budget: scores of every head's positions, then the best of them.
//!
//! Two steps: [`BudgetedMethod::scores`] needs a layer's statistics, keys and values; [`BudgetedMethod::select`] needs scores only. A
//! budget for all layers together is shared out from the scores of all of them (see [`super::pool`]).
//!
//! What is decided about is a [`Segment`], as in the search, and the budget is the segment's: keys that were settled
//! earlier stay, and count neither in the budget nor in the scores.

use std::ops::Range;

use rayon::prelude::*;

use super::allocation::{Allocation, top_positions};
use super::candidates::{self, Candidates, Safe};
use super::methods::{
    ALWAYS, AttentionRows, EvictRows, LastRowsFacts, LayerBudget, MethodFacts, Needs, Outputs, QueryMoments,
    RepeatFacts, ReplayFacts, StepAttention,
};
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
    /// What is asked for of a KV head's segment.
    pub rows: &'a (dyn Fn(usize) -> Result<HeadRows> + Sync),
    /// `[rows]` of `[num_heads, head_dim]` queries of the last rows, see [`MethodFacts::last_queries`]; empty if not asked
    /// for.
    pub last_queries: &'a [Vec<f32>],
    /// Present if it is asked for.
    pub replay: Option<LayerReplay>,
    /// Present if it is asked for; nothing else is there then.
    pub repeat: Option<LayerRepeat>,
    /// What [`Needs::outputs`] asks for, else empty: `[num_heads]` of `[segment_len]`, or `[num_heads * group_size]`, those of
    /// a head with all of its group after one another.
    pub outputs: Vec<Vec<f32>>,
    /// `[num_kv_heads]` of `[segment_len]` what [`Needs::block_attention`] asks for, else empty.
    pub block_attention: Vec<Vec<f32>>,
    /// `[num_heads]` what [`Needs::mean_distances`] asks for, else empty.
    pub mean_scores: Vec<Vec<f32>>,
}

/// What a repetition of a segment sees of it in a layer, see [`RepeatFacts`].
#[derive(Debug, Clone)]
pub struct LayerRepeat {
    /// `[num_heads]` of `[segment_len]`
    pub largest_weights: Vec<Vec<f32>>,
    /// `[num_heads]` of `[segment_len]`; empty if it is not asked for.
    pub squared_outputs: Vec<Vec<f32>>,
}

/// Numbers of one KV head's segment, each empty unless it is asked for.
#[derive(Debug, Clone, Default)]
pub struct HeadRows {
    /// `[segment_len, head_dim]`, rotated.
    pub keys: Vec<f32>,
    /// `[segment_len, head_dim]`
    pub values: Vec<f32>,
    /// `[segment_len, head_dim]`
    pub unrotated_keys: Vec<f32>,
    /// `[group_size]` of `[rows, segment_len]` attention weights of the prompt's last rows.
    pub last_weights: Vec<Vec<f32>>,
    /// `[group_size]` of `[rows, head_dim]` what attention made of them.
    pub last_outputs: Vec<Vec<f32>>,
}

/// What replayed queries of a layer see, see [`ReplayFacts`].
#[derive(Debug, Clone)]
pub struct LayerReplay {
    /// `[num_heads]` of `[num_keys]`, settled keys first.
    pub squared_attention: Vec<Vec<f32>>,
    /// `[num_heads]` of `[segment_len]`
    pub squared_outputs: Vec<Vec<f32>>,
    /// `[num_heads]` of `[rows]` the same of what was decided about before the segment, if that is [judged
    /// anew](super::methods::Method::judges_past); else empty.
    pub past_outputs: Vec<Vec<f32>>,
    /// Median squared length of the residual stream that enters the layer.
    pub squared_residual: f32,
}

impl LayerFacts<'_> {
    /// Checks that there is what a method needs, as far as it concerns a whole layer.
    fn check(&self, needs: Needs, num_kv_heads: usize) -> Result<()> {
        let heads = self.stats.heads.len();
        if num_kv_heads == 0 || heads == 0 || !heads.is_multiple_of(num_kv_heads) {
            return Err(Error::shape("profiling", format!("a multiple of {num_kv_heads} query heads"), heads));
        }
        self.stats.check()?;
        let if_any = |is_wanted: bool, count: usize| if is_wanted { count } else { 0 };
        let outputs = match needs.outputs {
            Outputs::None => 0,
            Outputs::Absolute => heads,
            Outputs::Products => heads * (heads / num_kv_heads),
        };
        for (what, expected, got) in [
            ("moments of queries", if_any(needs.future_queries.is_some(), heads), self.queries.len()),
            ("replayed queries", if_any(needs.replay, 1), usize::from(self.replay.is_some())),
            ("values behind the output projection", outputs, self.outputs.len()),
            ("scores of mean queries", if_any(needs.mean_distances > 0, heads), self.mean_scores.len()),
            ("a repetition", if_any(needs.repetition.is_some(), 1), usize::from(self.repeat.is_some())),
        ] {
            if expected != got {
                return Err(Error::shape(what, expected, got));
            }
        }
        Ok(())
    }

    /// `[rows]` of `[group_size, head_dim]` queries of the last rows, of some query heads.
    ///
    /// * `wanted`: how many rows there must be at least
    ///
    /// # Errors
    /// [`Error::Shape`] if there are fewer, or they are not of these heads.
    fn last_queries(&self, wanted: usize, heads: Range<usize>, head_dim: usize) -> Result<Vec<Vec<f32>>> {
        let width = self.stats.heads.len() * head_dim;
        if self.last_queries.len() < wanted || self.last_queries.iter().any(|row| row.len() != width) {
            return Err(Error::shape("queries of the last rows", (wanted, width), self.last_queries.len()));
        }
        let own = heads.start * head_dim..heads.end * head_dim;
        Ok(self.last_queries.iter().map(|row| row[own.clone()].to_vec()).collect())
    }
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
        self.allocation() == Allocation::Pooled
    }

    /// How the budget is shared out.
    #[must_use]
    pub fn allocation(&self) -> Allocation {
        self.over.allocation(&*self.method)
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
        self.allocation().layer_budget(average, segment_len, place.layer, place.scale.num_layers)
    }

    /// The scores of every position of the segment, `[num_kv_heads]` of `[segment_len]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the query heads cannot be shared out, or facts have another size than they must;
    /// [`Error::NotANumber`] if a score or what it is made of is no number.
    pub fn scores(&self, segment: Segment<'_>, place: LayerPlace, facts: &LayerFacts<'_>) -> Result<Vec<Vec<f32>>> {
        let num_kv_heads = place.scale.num_kv_heads;
        facts.check(self.needs(), num_kv_heads)?;
        let replayed = replayed(segment, facts);
        let heads = (0..num_kv_heads).into_par_iter();
        let read = |facts: &MethodFacts<'_>| self.method.measures(facts);
        let measures = heads.map(|kv_head| self.read_head(segment, place, facts, &replayed, kv_head, read));
        #[expect(clippy::cast_precision_loss)] // a count of tokens
        let budget = LayerBudget {
            positions: self.layer_budget(segment.len(), place),
            kept_ratio: self.budget.average(segment.len(), place.scale) / segment.len().max(1) as f64,
            allocation: self.allocation(),
        };
        let mut scores = self.method.layer_scores(&budget, measures.collect::<Result<_>>()?);
        self.expect_numbers(&scores)?;
        if let Some(prior) = &self.prior {
            prior.scale(place.layer, &mut scores);
        }
        Ok(scores)
    }

    /// Scores of the rows that the heads held before the segment, `[num_kv_heads]` of `[rows]`, if they are [judged
    /// anew](super::methods::Method::judges_past); else none.
    ///
    /// # Errors
    /// As [`scores`](Self::scores).
    pub fn judged(&self, place: LayerPlace, facts: &LayerFacts<'_>) -> Result<Vec<Vec<f32>>> {
        let Some(replay) = facts.replay.as_ref().filter(|replay| !replay.past_outputs.is_empty()) else {
            return Ok(Vec::new());
        };
        let group_size = replay.past_outputs.len() / place.scale.num_kv_heads.max(1);
        let judge = |kv_head: usize| {
            let group = kv_head * group_size..(kv_head + 1) * group_size;
            let squared_outputs = &replay.past_outputs[group.clone()];
            let len = squared_outputs.first().map_or(0, Vec::len);
            let of_past = |numbers: &Vec<f32>| numbers[..len.min(numbers.len())].to_vec();
            let squared_attention: Vec<Vec<f32>> = replay.squared_attention[group].iter().map(of_past).collect();
            self.method.scores(&MethodFacts {
                len,
                num_rows: len,
                budget: len,
                head_idx: place.layer * place.scale.num_kv_heads + kv_head,
                head_dim: place.head_dim,
                group_size,
                replay: ReplayFacts {
                    squared_attention: &squared_attention,
                    squared_outputs,
                    squared_residual: replay.squared_residual,
                },
                ..MethodFacts::default()
            })
        };
        let mut scores: Vec<Vec<f32>> = (0..place.scale.num_kv_heads).map(judge).collect();
        self.expect_numbers(&scores)?;
        if let Some(prior) = &self.prior {
            prior.scale(place.layer, &mut scores);
        }
        Ok(scores)
    }

    fn expect_numbers(&self, scores: &[Vec<f32>]) -> Result<()> {
        let Some(kv_head) = scores.iter().position(|scores| has_nan(scores)) else { return Ok(()) };
        let method = self.method.name();
        Err(Error::not_a_number(format!("the scores of `{method}` for KV head {kv_head}")))
    }

    /// What rows are worth that a head holds of what was decided about earlier, `[rows]`.
    ///
    /// * `positions`: `[rows]`
    /// * `scores`: `[rows]` of then, when each was kept
    /// * `judged`: `[rows]` of now, where the method [judges them anew](super::methods::Method::judges_past); else empty
    #[must_use]
    pub fn past_scores(&self, positions: &[u32], scores: Vec<f32>, judged: &[f32]) -> Vec<f32> {
        let mut scores = self.method.past_scores(positions).unwrap_or(scores);
        scores.iter_mut().zip(judged).for_each(|(score, &judged)| *score = score.max(judged));
        scores
    }

    /// What each position is taken to have received when tokens begin to be generated, `[num_kv_heads]` of `[segment_len]`;
    /// none if the method does not [go by that](StepAttention::FadingSquares).
    ///
    /// # Errors
    /// As [`scores`](Self::scores).
    pub fn starts(&self, segment: Segment<'_>, place: LayerPlace, facts: &LayerFacts<'_>) -> Result<Vec<Vec<f32>>> {
        let fades = |rows: &&dyn EvictRows| matches!(rows.attention(), StepAttention::FadingSquares(_));
        let Some(rows) = self.method.eviction().filter(fades) else { return Ok(Vec::new()) };
        facts.check(self.needs(), place.scale.num_kv_heads)?;
        let replayed = replayed(segment, facts);
        let start = |facts: &MethodFacts<'_>| rows.start(facts);
        let heads = (0..place.scale.num_kv_heads).into_par_iter();
        heads.map(|kv_head| self.read_head(segment, place, facts, &replayed, kv_head, start)).collect()
    }

    /// What is read of the facts of one KV head.
    ///
    /// * `replayed`: `[num_heads]` of `[segment_len]` squared attention of replayed queries, or none
    fn read_head<T>(
        &self,
        segment: Segment<'_>,
        place: LayerPlace,
        layer: &LayerFacts<'_>,
        replayed: &[Vec<f32>],
        kv_head: usize,
        read: impl Fn(&MethodFacts<'_>) -> T,
    ) -> Result<T> {
        let (needs, heads) = (self.needs(), &layer.stats.heads);
        let group_size = heads.len() / place.scale.num_kv_heads.max(1);
        let group = kv_head * group_size..(kv_head + 1) * group_size;
        let attending = if needs.whole_layer { &heads[..] } else { &heads[group.clone()] };
        let attention = attention(attending, segment.len(), needs);
        let rows = if needs.reads_rows() { (layer.rows)(kv_head)? } else { HeadRows::default() };
        let outputs = layer.outputs.len() / place.scale.num_kv_heads.max(1);
        let outputs = &layer.outputs[kv_head * outputs..(kv_head + 1) * outputs];
        let block_attention = layer.block_attention.get(kv_head).map_or(&[][..], |own| own);
        let in_blocks = needs.block_attention.is_some();
        for (what, got, wanted, width) in [
            ("attention of a segment", attention.len(), needs.attention != AttentionRows::None, 1),
            ("keys of a segment", rows.keys.len(), needs.keys_and_values, place.head_dim),
            ("values of a segment", rows.values.len(), needs.keys_and_values, place.head_dim),
            ("unrotated keys of a segment", rows.unrotated_keys.len(), needs.unrotated_keys, place.head_dim),
            ("attention within blocks", block_attention.len(), in_blocks, 1),
        ] {
            let expected = segment.len() * width;
            if wanted && got != expected {
                return Err(Error::shape(what, expected, got));
            }
        }
        let last_rows = needs.last_queries.min(segment.num_rows());
        let last_queries = layer.last_queries(last_rows, group.clone(), place.head_dim)?;
        let facts = MethodFacts {
            first_position: segment.first_position,
            len: segment.len(),
            num_rows: segment.num_rows(),
            budget: self.layer_budget(segment.len(), place),
            head_idx: place.layer * place.scale.num_kv_heads + kv_head,
            head_dim: place.head_dim,
            group_size,
            attention: &attention,
            keys: &rows.keys,
            values: &rows.values,
            queries: layer.queries.get(group.clone()).unwrap_or_default(),
            last_queries: &last_queries,
            repeat: layer.repeat.as_ref().map_or_else(RepeatFacts::default, |repeat| RepeatFacts {
                largest_weights: repeat.largest_weights.get(group.clone()).unwrap_or_default(),
                squared_outputs: repeat.squared_outputs.get(group.clone()).unwrap_or_default(),
            }),
            replay: layer.replay.as_ref().map_or_else(ReplayFacts::default, |replay| ReplayFacts {
                squared_attention: replayed.get(group.clone()).unwrap_or_default(),
                squared_outputs: replay.squared_outputs.get(group.clone()).unwrap_or_default(),
                squared_residual: replay.squared_residual,
            }),
            unrotated_keys: &rows.unrotated_keys,
            last_rows: LastRowsFacts { weights: &rows.last_weights, outputs: &rows.last_outputs },
            outputs,
            block_attention,
            mean_scores: layer.mean_scores.get(group).unwrap_or_default(),
        };
        Ok(read(&facts))
    }

    /// What each KV head of a layer keeps, given the scores of its positions.
    ///
    /// * `scores`: from [`scores`](Self::scores)
    #[must_use]
    pub fn select(&self, segment: Segment<'_>, place: LayerPlace, scores: &[Vec<f32>]) -> Vec<HeadChoice> {
        let budget = self.layer_budget(segment.len(), place);
        let kept = self.allocation().select(scores, budget).into_iter().enumerate();
        kept.map(|(kv_head, kept)| HeadChoice {
            kv_head,
            level: 0,
            recovered: Vec::new(),
            positions: kept.into_iter().map(|index| segment.position(index)).collect(),
        })
        .collect()
    }

    /// What each KV head of a layer keeps, where what it holds is judged together with the segment.
    ///
    /// * `heads`: `[num_kv_heads]`
    #[must_use]
    pub fn select_among(&self, place: LayerPlace, safe: Safe, heads: &[Candidates]) -> Vec<Candidates> {
        let len = heads.iter().map(Vec::len).max().unwrap_or(0);
        candidates::select(self.allocation(), self.layer_budget(len, place), safe, heads)
    }
}

/// Squared attention of replayed queries to the segment, `[num_heads]` of `[segment_len]`; settled keys, which come first, are
/// not decided about. None if it is not asked for.
fn replayed(segment: Segment<'_>, facts: &LayerFacts<'_>) -> Vec<Vec<f32>> {
    let of_segment = |numbers: &Vec<f32>| numbers[numbers.len().saturating_sub(segment.len())..].to_vec();
    facts.replay.iter().flat_map(|replay| replay.squared_attention.iter().map(of_segment)).collect()
}

/// Makes sure of a head's best position, where it competes with those of all others: with nothing left it could attend to
/// nothing.
pub(crate) fn keep_best(scores: &mut [f32]) {
    if let [best] = top_positions(scores, 1)[..] {
        scores[best] = ALWAYS;
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
