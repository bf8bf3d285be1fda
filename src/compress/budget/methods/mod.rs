//! Compression methods with a budget: each says what every position of a KV head is worth, the best are kept.
//!
//! A method is a pure function on the host from one KV head's facts to a score for each position; it never sees a
//! tensor, a layer or a file, and does not choose: [`Allocation`] shares the budget out over layers and heads. Its settings
//! are its fields, and so keys of the configuration. A new method is one new file here and one line in [`METHODS`]: the
//! configuration, `--help` and the contract tests take it from the registry.
//!
//! Some methods also say which row goes for each token that is generated ([`EvictRows`]).
//!
//! Not for: the search of `fastgen`, which has a threshold and no budget (see [`crate::compress::fastgen`]).

mod adakv;
mod capkv;
mod compactor;
mod criticalkv;
mod dropkv;
mod duo_attention;
mod evict;
mod expected_attention;
mod h2o;
mod key_norm;
mod keydiff;
mod kvzip;
mod laprox;
mod pyramidkv;
mod random;
mod replay;
mod rkv;
mod snapkv;
mod streaming_llm;
mod tova;

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::BudgetOver;
use super::allocation::Allocation;
use crate::compress::section::{Section, keys};
use crate::compress::values;

pub use adakv::AdaKv;
pub use capkv::CapKv;
pub use compactor::Compactor;
pub use criticalkv::{CriticalAdaKv, CriticalKv};
pub use dropkv::DropKv;
pub use duo_attention::DuoAttention;
pub use evict::{EvictRows, StepAttention, StepFacts, fade};
pub use expected_attention::ExpectedAttention;
pub use h2o::H2o;
pub use key_norm::KeyNorm;
pub use keydiff::KeyDiff;
pub use kvzip::{KvZip, KvZipPlus};
pub use laprox::LaProx;
pub use pyramidkv::PyramidKv;
pub use random::Random;
pub use replay::Replay;
pub use rkv::Rkv;
pub use snapkv::SnapKv;
pub use streaming_llm::StreamingLlm;
pub use tova::Tova;

/// Every method with a budget that a configuration can name, with its default settings.
pub static METHODS: &[&dyn Method] = &[
    &StreamingLlm(Sinks::DEFAULT),
    &H2o,
    &Tova,
    &SnapKv::DEFAULT,
    &PyramidKv(SnapKv::DEFAULT),
    &AdaKv(SnapKv::DEFAULT),
    &CriticalKv(SnapKv::DEFAULT),
    &CriticalAdaKv(SnapKv::DEFAULT),
    &DropKv(SnapKv::DEFAULT),
    &LaProx::DEFAULT,
    &ExpectedAttention::DEFAULT,
    &CapKv(Sinks::DEFAULT),
    &Compactor::DEFAULT,
    &DuoAttention::DEFAULT,
    &KeyNorm,
    &KeyDiff,
    &Random { seed: 0 },
    &Replay(Sinks::DEFAULT),
    &KvZip::DEFAULT,
    &KvZipPlus(KvZip::DEFAULT),
    &Rkv::DEFAULT,
];

/// The score of a position that is kept before all others.
pub const ALWAYS: f32 = f32::INFINITY;

/// Rows of the attention maps whose sums a method reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttentionRows {
    /// None: the method does not look at attention.
    #[default]
    None,
    /// All rows of the prompt.
    All,
    /// The last rows of the prompt: an observation window; at least 1.
    Last(usize),
}

/// What a method reads of each KV head. What is not asked for is not collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is asked for or not, whatever the others are")]
pub struct Needs {
    /// Which rows [`MethodFacts::attention`] sums up.
    pub attention: AttentionRows,
    /// Whether [`MethodFacts::attention`] is summed up over all query heads of the layer, and not of the KV head only.
    pub whole_layer: bool,
    /// Whether [`MethodFacts::keys`] and [`MethodFacts::values`] are read.
    pub keys_and_values: bool,
    /// Whether [`MethodFacts::queries`] are read, and for how many positions to come.
    pub future_queries: Option<FutureQueries>,
    /// How many of the prompt's last rows' queries are read, see [`MethodFacts::last_queries`].
    pub last_queries: usize,
    /// Whether [`MethodFacts::replay`] is read.
    pub replay: bool,
    /// Whether [`MethodFacts::repeat`] is read, and how it comes about: the model runs a second time, and until then all
    /// layers hold everything. Nothing else can be read beside it.
    pub repetition: Option<Repetition>,
    /// Whether [`MethodFacts::unrotated_keys`] are read.
    pub unrotated_keys: bool,
    /// How many of the prompt's last rows [`MethodFacts::last_rows`] has one by one; 0 for none.
    pub last_rows: usize,
    /// What of the values [`MethodFacts::outputs`] has.
    pub outputs: Outputs,
    /// Whether [`MethodFacts::block_attention`] is read, and in which blocks.
    pub block_attention: Option<Blocks>,
    /// Over how many distances [`MethodFacts::mean_scores`] goes; 0 for none.
    pub mean_distances: usize,
}

impl Needs {
    /// Whether rows of the cache are read, and not only what is summed up of them.
    #[must_use]
    pub fn reads_rows(&self) -> bool {
        self.keys_and_values || self.unrotated_keys || self.last_rows > 0
    }

    /// Whether keys or values of the prompt are read, or anything that is made of them.
    #[must_use]
    pub fn reads_kv(&self) -> bool {
        let of_layer = self.outputs != Outputs::None || self.block_attention.is_some() || self.mean_distances > 0;
        self.reads_rows() || self.replay || of_layer
    }
}

/// What a method reads of values behind the output projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Outputs {
    /// Nothing.
    #[default]
    None,
    /// The sum of absolute numbers of what each query head of the group makes of a value.
    Absolute,
    /// Products of what two query heads of the group make of the same value, for every pair of them.
    Products,
}

/// Blocks of a segment within which queries see all keys, those behind them, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Leading positions of the sequence that are in no block.
    pub skip_first: usize,
    /// Last positions of the segment that are in no block.
    pub skip_last: usize,
    /// Positions of a block; at least 1. The last block may be shorter.
    pub len: usize,
}

/// A second run of the model, over the tokens that are decided about, on top of all that it has read: it is asked to
/// repeat them, and the tokens are given to it as its answer, chunk by chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repetition {
    /// Whether words ask for it ([`RepeatWords`](crate::tokens::RepeatWords)), or each chunk is simply given once more.
    pub instruction: bool,
    /// Tokens of a chunk, at least 1.
    pub chunk_tokens: usize,
    /// How many of the sequence's first positions the rows of every chunk see beside the chunk's originals and what is
    /// repeated.
    pub sink_tokens: usize,
    /// Whether weights are divided by the length of what the asking row's attention reads, and
    /// [`RepeatFacts::squared_outputs`] are there.
    pub relative: bool,
}

/// Which queries are summarised, and for which positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FutureQueries {
    /// Queries of the first positions of a sequence are left out: those of attention sinks are unlike all others.
    pub skip_positions: usize,
    /// How many positions behind the prompt the rotation is averaged over; at least 1.
    pub positions: usize,
}

/// What the prompt's queries see when they are asked again from behind the prompt, and what it weighs in the layer's output.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReplayFacts<'a> {
    /// `[group_size]` of `[n]`: squared attention weights of the replayed rows, summed up
    /// ([`squared_attention`](crate::attention::replay::squared_attention)).
    pub squared_attention: &'a [Vec<f32>],
    /// `[group_size]` of `[n]`: squared length of each value behind the query head's part of the output projection.
    pub squared_outputs: &'a [Vec<f32>],
    /// Median squared length of the residual stream that enters the layer.
    pub squared_residual: f32,
}

/// What a repetition of the tokens sees of them: for each chunk a softmax over the sinks, the chunk's originals and what is
/// repeated so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct RepeatFacts<'a> {
    /// `[group_size]` of `[n]`: the largest weight that each position gets from any row, see [`Repetition::relative`].
    pub largest_weights: &'a [Vec<f32>],
    /// `[group_size]` of `[n]`: squared length of each value behind the query head's part of the output projection; empty
    /// unless [relative](Repetition::relative).
    pub squared_outputs: &'a [Vec<f32>],
}

/// What the prompt's last rows attend to, row by row.
#[derive(Debug, Clone, Copy, Default)]
pub struct LastRowsFacts<'a> {
    /// `[group_size]` of `[rows, n]`: attention weights of the rows; rows add up to 1 together with the weights of what was
    /// settled before.
    pub weights: &'a [Vec<f32>],
    /// `[group_size]` of `[rows, head_dim]`: what attention makes of each row.
    pub outputs: &'a [Vec<f32>],
}

/// Mean and covariance of one query head's queries over a prompt, turned to the positions behind it.
#[derive(Debug, Clone, PartialEq)]
pub struct QueryMoments {
    /// `[head_dim]`
    pub mean: Vec<f32>,
    /// `[head_dim, head_dim]`, symmetric.
    pub covariance: Vec<f32>,
}

/// What a method may know of one KV head after a prompt, or after a segment of a longer sequence (then positions settled
/// earlier are no part of it).
#[derive(Debug, Clone, Copy, Default)]
pub struct MethodFacts<'a> {
    /// Position of the first token of the segment: 0 for a prompt.
    pub first_position: usize,
    /// `n`: tokens of the segment.
    pub len: usize,
    /// Query rows: the tokens of the prompt, the last of the segment; those before were appended by decoding.
    pub num_rows: usize,
    /// How many positions a head of this layer keeps on average; in `1..=len`, or 0 for an empty segment.
    pub budget: usize,
    /// Index of the KV head in the whole model, so that random numbers differ from head to head.
    pub head_idx: usize,
    /// Numbers of a key, value or query.
    pub head_dim: usize,
    /// Query heads that share the KV head.
    pub group_size: usize,
    /// `[n]` attention that each position received, summed up over the rows and heads that [`Needs`] says; else empty.
    pub attention: &'a [f32],
    /// `[n, head_dim]` rotated keys, if asked for, else empty.
    pub keys: &'a [f32],
    /// `[n, head_dim]` values, if asked for, else empty.
    pub values: &'a [f32],
    /// `[group_size]` of the query heads of this KV head, if asked for, else empty.
    pub queries: &'a [QueryMoments],
    /// `[rows]` of `[group_size, head_dim]` rotated queries of the prompt's last rows, times what makes scores of their
    /// products with keys, if asked for (fewer if the prompt has not as many), else empty.
    pub last_queries: &'a [Vec<f32>],
    /// What replayed queries see, if asked for, else empty.
    pub replay: ReplayFacts<'a>,
    /// What a repetition sees, if asked for, else empty.
    pub repeat: RepeatFacts<'a>,
    /// `[n, head_dim]` keys before they were rotated, if asked for, else empty.
    pub unrotated_keys: &'a [f32],
    /// The prompt's last rows, as many as asked for or as there are; else empty.
    pub last_rows: LastRowsFacts<'a>,
    /// What [`Needs::outputs`] asks for, else empty: `[group_size]` of `[n]`, or `[group_size * group_size]` of `[n]` for
    /// pairs of query heads.
    pub outputs: &'a [Vec<f32>],
    /// `[n]` what each position receives from the queries of its block, each of which gives away 1 in all to the keys of the
    /// block: their softmax is over products that are not divided by the root of the head's size. The mean over the query
    /// heads of the KV head. What the last block lacks counts as queries and keys of zeros; 0 outside of blocks; empty if not
    /// asked for.
    pub block_attention: &'a [f32],
    /// `[group_size]` of `[distances]` products of the mean query with the mean key, divided by the root of the head's size,
    /// if the key stood farther and farther before the query: the last at the query's own position; empty if not asked for.
    pub mean_scores: &'a [Vec<f32>],
}

/// How much a layer keeps, for a method that judges its KV heads together.
#[derive(Debug, Clone, Copy)]
pub struct LayerBudget {
    /// How many positions a head keeps on average, as [`MethodFacts::budget`].
    pub positions: usize,
    /// The same as a share of the segment, in 0..=1, before it is rounded down.
    pub kept_ratio: f64,
    /// How it is shared out.
    pub allocation: Allocation,
}

impl MethodFacts<'_> {
    /// How many positions of the segment are among the first `sink_tokens` of the sequence.
    #[must_use]
    pub fn num_sinks(&self, sink_tokens: usize) -> usize {
        sink_tokens.saturating_sub(self.first_position).min(self.len)
    }
}

/// The setting of methods that always keep attention sinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sinks {
    /// How many leading positions of the sequence are always kept; default 4.
    #[serde(deserialize_with = "values::whole")]
    pub sink_tokens: usize,
}

impl Sinks {
    /// As many as `StreamingLLM` keeps.
    pub const DEFAULT: Self = Self { sink_tokens: 4 };
}

impl Default for Sinks {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What configurations do with a method: every method that `serde` can write and read has it.
///
/// A method without settings is a unit struct; one with settings is a struct whose fields are keys of the configuration:
/// `#[serde(default, deny_unknown_fields)]` makes them optional, and unknown ones an error.
pub trait Settings {
    /// The keys that change what it keeps, besides the budget.
    fn keys(&self) -> &'static [&'static str];

    /// The same method with the settings of a configuration, and its defaults for those that are left out.
    ///
    /// # Errors
    /// Whatever the method's type has against a value.
    fn read(&self, settings: &Section<'_>) -> serde_json::Result<Arc<dyn Method>>;

    /// Its settings as a JSON object; `null` for a method without any.
    ///
    /// # Errors
    /// Whatever the method's type fails with.
    fn settings(&self) -> serde_json::Result<Value>;

    /// A copy, to be shared.
    fn to_arc(&self) -> Arc<dyn Method>;
}

impl<M: Method + Clone + Serialize + DeserializeOwned + 'static> Settings for M {
    fn keys(&self) -> &'static [&'static str] {
        keys::<M>()
    }

    fn read(&self, settings: &Section<'_>) -> serde_json::Result<Arc<dyn Method>> {
        Ok(Arc::new(M::deserialize(settings)?))
    }

    fn settings(&self) -> serde_json::Result<Value> {
        serde_json::to_value(self)
    }

    fn to_arc(&self) -> Arc<dyn Method> {
        Arc::new(self.clone())
    }
}

/// One way to tell what a position is worth.
pub trait Method: Settings + Send + Sync + std::fmt::Debug {
    /// The name in configurations and logs.
    fn name(&self) -> &'static str;

    /// What it keeps, in one line for `--help`.
    fn summary(&self) -> &'static str;

    /// What it reads.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// How its budget is shared out.
    fn allocation(&self) -> Allocation {
        Allocation::Uniform
    }

    /// Why it can't work if the positions of so many heads compete, as the end of a sentence about the method; `None` if it
    /// can, which is so for every method that ranks the positions of a head.
    fn refuses(&self, _over: BudgetOver) -> Option<&'static str> {
        None
    }

    /// The score of every position of the segment, `[n]`: the higher, the sooner it is kept; [`ALWAYS`] before all
    /// others. Of equal scores the lower position is kept. No score is NaN unless a fact is.
    fn scores(&self, facts: &MethodFacts<'_>) -> Vec<f32>;

    /// What [`layer_scores`](Self::layer_scores) wants to know of every position of a KV head: one or more numbers, each as
    /// a list of `[n]`. By default the scores.
    fn measures(&self, facts: &MethodFacts<'_>) -> Vec<Vec<f32>> {
        vec![self.scores(facts)]
    }

    /// The scores of all KV heads of a layer, `[num_kv_heads]` of `[n]`, for methods whose scores of one head depend on the
    /// others. By default the first measure of each.
    ///
    /// * `measures`: of each KV head, as [`measures`](Self::measures) has them
    fn layer_scores(&self, _budget: &LayerBudget, measures: Vec<Vec<Vec<f32>>>) -> Vec<Vec<f32>> {
        measures.into_iter().map(|measures| measures.into_iter().next().unwrap_or_default()).collect()
    }

    /// The scores of rows that were kept earlier, when they compete with a further segment, by their positions alone: `[rows]`.
    /// By default `None`: they keep the scores of then.
    fn past_scores(&self, _positions: &[u32]) -> Option<Vec<f32>> {
        None
    }

    /// Whether such rows are scored by what the further segment's queries see of them, too; the higher score counts then. For
    /// methods that read nothing but the [replay](Needs::replay): [`scores`](Self::scores) is given the rows as a segment at
    /// the beginning of the sequence.
    fn judges_past(&self) -> bool {
        false
    }

    /// How it goes on while tokens are generated; `None` if it says nothing about that.
    fn eviction(&self) -> Option<&dyn EvictRows> {
        None
    }
}

/// The scores of a head that is alone in its layer, of a method that judges a layer's heads together.
#[expect(clippy::cast_precision_loss)] // counts of tokens
fn one_head(method: &dyn Method, facts: &MethodFacts<'_>) -> Vec<f32> {
    let budget = LayerBudget {
        positions: facts.budget,
        kept_ratio: facts.budget as f64 / facts.len.max(1) as f64,
        allocation: method.allocation(),
    };
    method.layer_scores(&budget, vec![method.measures(facts)]).pop().unwrap_or_default()
}

/// Finds a method by its name in configurations.
#[must_use]
pub fn method_by_name(name: &str) -> Option<&'static dyn Method> {
    METHODS.iter().copied().find(|method| method.name() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::budget::allocation::top_positions;

    /// Facts of a prompt of `len` tokens, without numbers.
    pub(super) fn facts(len: usize, budget: usize) -> MethodFacts<'static> {
        MethodFacts { len, num_rows: len, budget, head_dim: 1, group_size: 1, ..MethodFacts::default() }
    }

    /// What a head keeps that has its own budget.
    pub(super) fn kept(method: &dyn Method, facts: &MethodFacts<'_>) -> Vec<usize> {
        top_positions(&method.scores(facts), facts.budget)
    }
}
