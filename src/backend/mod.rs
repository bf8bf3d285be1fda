//! What computes: each backend is one vertical slice, from weights to cached rows, behind one trait.
//!
//! [`Kernels`] are the CPU's own kernels, on weights as their file stores them; [`Candle`] is made of candle operations, on
//! any device. A model is of one backend, chosen where it is loaded, and so are its caches; nothing asks later.
//!
//! Not for: the order of things in a forward pass (see [`crate::model`]), or what is kept (see [`crate::cache`]).

mod candle;
mod kernels;
pub(crate) mod plain;
mod weights;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

pub use candle::{Candle, CandleLayer, CandleRows};
pub use kernels::{HeadCache, KernelLayer, KernelRows, Kernels};
pub use weights::{Block, Embedding, Weights};

use crate::attention::map::HeadGrid;
use crate::attention::prompt_rows::PromptKv;
use crate::attention::replay::WidenedRows;
use crate::attention::window::PromptWindow;
use crate::cache::{AdaptiveKvCache, CacheLayer, KvDtype, Rows};
use crate::compress::stats::{LayerStats, StatsRequest};
use crate::error::{Error, Result};
use crate::kernels::quant::{Compute, WeightFormat, WeightMatrix};
use crate::ops::Ops;
use crate::tokens::TokenClass;

/// What is to compute a model, and so where its weights are: the choice of a backend.
#[derive(Debug, Clone)]
pub enum BackendKind {
    /// The CPU kernels, on weights as their file stores them.
    Kernels(Compute),
    /// Candle operations, on weights that are tensors on a device.
    Candle(Ops),
}

impl Default for BackendKind {
    fn default() -> Self {
        Self::Kernels(Compute::default())
    }
}

/// Where matrices, hidden states and cached rows are, and what is done with them.
///
/// A prompt goes through a layer in chunks of rows: [`project`](Self::project), [`attend`](Self::attend),
/// [`finish`](Self::finish), on top of a [`prompt`](Self::prompt) that holds the layer's full keys and values. A token goes
/// through all layers in [`decode`](Self::decode).
pub trait Backend: fmt::Debug + Clone + Send + Sync + 'static {
    /// `y = x W^T + b`, with weights `[out_features, in_features]`.
    type Linear: fmt::Debug + Clone + Send + Sync;
    /// A norm's weight, `[hidden_size]` or `[head_dim]`.
    type Vector: fmt::Debug + Clone + Send + Sync;
    /// The residual stream of some tokens, `[seq_len, hidden_size]`.
    type Hidden;
    /// Rotations of some positions.
    type Rotations;
    /// Queries, keys and values of some tokens, queries and keys rotated.
    type Projected;
    /// What attention makes of some tokens, `[seq_len, num_heads * head_dim]`.
    type Attended;
    /// A layer's full keys and values of a prompt, and what is collected of it on the way.
    type Prompt;
    /// A layer's cached rows.
    type Rows: Rows;

    /// The name in reports.
    const NAME: &'static str;

    /// How tokens are decoded, in reports: `team`, a team of threads; `ragged`, a layer in one launch; `groups`, groups of
    /// heads of about the same length.
    fn decoding(&self) -> &'static str;

    /// How matrices of blocks are multiplied; `None` if a backend leaves no choice.
    fn compute(&self) -> Option<Compute> {
        None
    }

    /// What candle operations run on; `None` if there are none.
    fn ops(&self) -> Option<&Ops> {
        None
    }

    // ---- Loading ----

    /// In which numbers a matrix is computed with if none are asked for.
    ///
    /// * `stored`: those of its file
    ///
    /// # Errors
    /// If the device is not one that computes.
    fn dtype(&self, stored: WeightFormat) -> Result<WeightFormat>;

    /// Takes in a matrix.
    ///
    /// * `bias`: `[rows]`
    ///
    /// # Errors
    /// [`Error::Shape`] if they do not fit, [`Error::Tensor`] if a device refuses.
    fn linear(&self, matrix: Arc<WeightMatrix>, bias: Option<Vec<f32>>) -> Result<Self::Linear>;

    /// Takes in a vector.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device refuses.
    fn vector(&self, numbers: Vec<f32>) -> Result<Self::Vector>;

    /// `(out_features, in_features)` of a linear layer.
    fn shape(linear: &Self::Linear) -> (usize, usize);

    /// Numbers of a vector.
    fn len(vector: &Self::Vector) -> usize;

    /// A linear layer's weights as f32, rows of `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device does not hand them out.
    fn widened<'a>(&self, linear: &'a Self::Linear) -> Result<Box<WidenedRows<'a>>>;

    /// The rows of an empty layer.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if rows can't be stored in such numbers.
    fn empty_rows(&self, dtype: KvDtype) -> Result<Self::Rows>;

    // ---- A prompt ----

    /// The residual stream as it begins.
    ///
    /// * `embedded`: `[seq_len, hidden_size]`
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device refuses.
    fn hidden(&self, embedded: Vec<f32>) -> Result<Self::Hidden>;

    /// Takes in rotations.
    ///
    /// * `angles`: `[seq_len, rope dim / 2]` cosines and sines
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device refuses.
    fn rotations(&self, angles: Vec<(f32, f32)>) -> Result<Self::Rotations>;

    /// Room for a prompt in one layer, behind what every head holds.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device refuses.
    fn prompt(&self, rows: &Self::Rows, asks: PromptRequest<'_>) -> Result<Self::Prompt>;

    /// Projects a chunk to queries, keys and values, and rotates them.
    ///
    /// * `rotations`: of the whole prompt
    /// * `first_row`: of the chunk, in the prompt
    /// * `unrotated`: whether queries are [shown](Self::show) before they are rotated, too
    ///
    /// # Errors
    /// [`Error::Shape`] if sizes do not fit, [`Error::Interrupted`] if a [stop](crate::stop) is requested.
    fn project(
        &self,
        block: &Block<Self>,
        hidden: &Self::Hidden,
        rotations: &Self::Rotations,
        first_row: usize,
        unrotated: bool,
    ) -> Result<Self::Projected>;

    /// Adds a chunk's keys and values to the prompt's, and attends from its queries to all that is there.
    ///
    /// * `stats`: collects what profiles ask for; all of it is there after [`collect`](Self::collect)
    /// * `maps`: `[num_heads]` attention maps to add to
    ///
    /// # Errors
    /// As [`project`](Self::project).
    fn attend(
        &self,
        prompt: &mut Self::Prompt,
        projected: &Self::Projected,
        first_row: usize,
        stats: Option<&mut LayerStats>,
        maps: Option<&mut [HeadGrid]>,
    ) -> Result<Self::Attended>;

    /// Shows numbers of a chunk.
    ///
    /// # Errors
    /// What `look` returns, and [`Error::Tensor`] if a device does not hand them out.
    fn show(
        &self,
        projected: &Self::Projected,
        hidden: &Self::Hidden,
        wanted: Wanted,
        look: &mut dyn FnMut(Shown<'_>) -> Result<()>,
    ) -> Result<()>;

    /// What a block's attention reads of a chunk: the residual stream behind its norm, `[seq_len, hidden_size]`.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    fn attention_input(&self, block: &Block<Self>, hidden: &Self::Hidden) -> Result<Vec<f32>>;

    /// The last row alone of a chunk's residual stream and of what its queries attended to.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device refuses.
    fn last_row(&self, hidden: &Self::Hidden, attended: Self::Attended) -> Result<(Self::Hidden, Self::Attended)>;

    /// Adds the attention's result and the MLP's to the residual stream.
    ///
    /// * `hidden`: as [`project`](Self::project) got it
    ///
    /// # Errors
    /// As [`project`](Self::project).
    fn finish(&self, block: &Block<Self>, hidden: &Self::Hidden, attended: Self::Attended) -> Result<Self::Hidden>;

    /// Rows of a hidden state, from 0, that hold what is not finite; none if it takes too long to look.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device does not hand them out.
    fn bad_rows(&self, hidden: &Self::Hidden) -> Result<Vec<usize>>;

    /// Completes the statistics of a whole prompt.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device does not hand them out.
    fn collect(&self, _prompt: &Self::Prompt, _stats: &mut LayerStats) -> Result<()> {
        Ok(())
    }

    /// Asks a prompt's queries once more: the largest difference that each mask of keys makes, see
    /// [`largest_differences`](crate::attention::prefill::largest_differences).
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    fn ask_again(&self, prompt: &Self::Prompt, pending: &[(usize, Vec<Vec<f32>>)]) -> Result<Vec<Vec<f32>>>;

    /// A prompt's keys and values in memory.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device does not hand them out.
    fn prompt_kv<'a>(&self, prompt: &'a Self::Prompt) -> Result<Cow<'a, PromptKv>>;

    /// A prompt's keys and values, to be stored.
    fn stored_prompt(prompt: &Self::Prompt) -> &<Self::Rows as Rows>::Prompt;

    /// Logits from the last token of a hidden state, `[vocab_size]`.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    fn logits(&self, weights: &Weights<Self>, hidden: &Self::Hidden) -> Result<Vec<f32>>;

    /// Frees what was kept from layer to layer of a prompt.
    fn release(&self) {}

    // ---- A token ----

    /// Gives several sequences one token each, and computes the logits of the next: one sequence after the other, unless
    /// a backend does better.
    ///
    /// * `angles`: `[batch, rope dim / 2]` cosines and sines of the tokens' positions
    /// * `caches`: `[batch]`, of this model's shape and rows; all layers get the token, but it is not counted yet
    /// * `logits`: overwritten with `[batch, vocab_size]`
    ///
    /// # Errors
    /// [`Error::Input`] for an unknown id: no layer has got a token then. Others as [`project`](Self::project).
    fn decode(
        &self,
        weights: &Weights<Self>,
        ids: &[u32],
        angles: &[(f32, f32)],
        caches: &mut [&mut AdaptiveKvCache],
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        weights.embed_tokens.check(ids)?;
        logits.clear();
        let angles = angles.chunks(angles.len().div_ceil(ids.len()).max(1)).chain(std::iter::repeat(&[][..]));
        for ((cache, &id), angles) in caches.iter_mut().zip(ids).zip(angles) {
            logits.extend(plain::decode(self, weights, id, angles, cache, None)?);
        }
        Ok(())
    }

    /// Whether several tokens of one sequence go through the weights together, in [`decode_run`](Self::decode_run).
    fn decodes_runs(&self) -> bool {
        false
    }

    /// Gives one sequence several tokens that follow one another, in one pass over the weights, and computes the logits
    /// after each of them: bit by bit those of [`decode`](Self::decode), one token after the other.
    ///
    /// * `angles`: `[ids.len(), rope dim / 2]`, each token's as for [`decode`](Self::decode)
    /// * `cache`: as for [`decode`](Self::decode), of which no head goes on evicting; tokens are not counted yet. After an
    ///   error it is as it was
    /// * `logits`: overwritten with `[ids.len(), vocab_size]`
    ///
    /// # Errors
    /// [`Error::Unsupported`] if this backend has no such pass, or heads go on evicting; others as [`decode`](Self::decode).
    fn decode_run(
        &self,
        _weights: &Weights<Self>,
        _ids: &[u32],
        _angles: &[(f32, f32)],
        _cache: &mut AdaptiveKvCache,
        _logits: &mut Vec<f32>,
    ) -> Result<()> {
        Err(Error::unsupported(format!("several tokens of a sequence at a time, by the backend `{}`", Self::NAME)))
    }

    /// Forgets the newest tokens of a cache, as if they had never come; they are counted still.
    ///
    /// * `count`: of the tokens that were decoded since the last prompt
    ///
    /// # Errors
    /// [`Error::Unsupported`] if this backend has no [`decode_run`](Self::decode_run), or heads go on evicting.
    fn take_back(&self, _cache: &mut AdaptiveKvCache, _count: usize) -> Result<()> {
        Err(Error::unsupported(format!("taking tokens back, by the backend `{}`", Self::NAME)))
    }

    /// Gives a layer a token's key and value.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    fn append(
        &self,
        layer: &mut CacheLayer<Self::Rows>,
        projected: &Self::Projected,
        position: usize,
        class: TokenClass,
    ) -> Result<()>;

    /// Attends from one token to all rows of a layer.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    fn attend_rows(&self, rows: &Self::Rows, projected: &Self::Projected) -> Result<Self::Attended>;

    /// Weights of one token's attention to a head's rows, summed up over the query heads that share it: `[rows]`.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    fn row_weights(&self, rows: &Self::Rows, projected: &Self::Projected, kv_head: usize) -> Result<Vec<f32>>;

    /// One token's queries of the heads that share a KV head, rotated, times what makes scores of their products with keys:
    /// `[group_size, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device does not hand them out.
    fn group_queries(&self, projected: &Self::Projected, kv_head: usize) -> Result<Vec<f32>>;

    /// A head's keys in the order of its rows, `[rows, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device does not hand them out.
    fn row_keys(&self, rows: &Self::Rows, kv_head: usize) -> Result<Vec<f32>>;

    /// What attention made of one token, `[num_heads * head_dim]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device does not hand it out.
    fn attended(&self, attended: &Self::Attended) -> Result<Vec<f32>>;
}

/// What is asked of a prompt in one layer.
#[derive(Debug, Clone, Copy)]
pub struct PromptRequest<'a> {
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// The statistics that profiles read.
    pub stats: Option<&'a StatsRequest>,
    /// Whether its queries may be [asked again](Backend::ask_again).
    pub again: bool,
    /// What its rows see, in a layer with a sliding window.
    pub window: Option<&'a PromptWindow>,
}

/// Which numbers of a chunk are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Rotated queries, and the residual stream.
    pub replay: bool,
    /// Rotated queries.
    pub queries: bool,
    /// Queries before they are rotated.
    pub unrotated: bool,
}

impl Wanted {
    /// Whether any are.
    #[must_use]
    pub fn any(self) -> bool {
        self.replay || self.queries || self.unrotated
    }
}

/// Numbers of a chunk; empty if they are not wanted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shown<'a> {
    /// `[seq_len, num_heads, head_dim]`
    pub queries: &'a [f32],
    /// `[seq_len, num_heads, head_dim]`
    pub unrotated_queries: &'a [f32],
    /// `[seq_len, hidden_size]`
    pub hidden: &'a [f32],
}
