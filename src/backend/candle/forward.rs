//! A prompt's and a token's way through candle operations, on any device.
//!
//! The residual stream, norms and rotations are f32; products with weights are in the numbers of the weights. What is
//! profiled is brought to the host once for each layer; methods that read queries, keys or values get copies of them there.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::linear::CandleLinear;
use super::rows::{CandleRows, decode_with};
use crate::arch::{LlamaConfig, RopeLayout};
use crate::attention::HeadLayout;
use crate::attention::device::{self, DeviceStats, PromptBlock, PromptTensors};
use crate::attention::map::HeadGrid;
use crate::attention::prompt_rows::PromptKv;
use crate::attention::replay::WidenedRows;
use crate::backend::{Backend, Block, PromptRequest, Shown, Wanted, Weights};
use crate::cache::{CacheLayer, KvDtype};
use crate::compress::stats::LayerStats;
use crate::device::float_dtype;
use crate::error::Result;
use crate::kernels::quant::{WeightFormat, WeightMatrix};
use crate::ops::{DecodeWith, Ops};
use crate::tokens::TokenClass;

/// Candle operations on a device.
#[derive(Debug, Clone)]
pub struct Candle {
    ops: Ops,
    layout: HeadLayout,
    hidden_size: usize,
    rms_norm_eps: f64,
    rope_layout: RopeLayout,
    /// Leading numbers of a head that are rotated; even.
    rope_dim: usize,
}

impl Candle {
    /// Operations on a device, for a model of some sizes.
    #[must_use]
    pub fn new(ops: Ops, config: &LlamaConfig) -> Self {
        Self {
            ops,
            layout: config.heads,
            hidden_size: config.hidden_size,
            rms_norm_eps: config.rms_norm_eps,
            rope_layout: config.rope.layout,
            rope_dim: config.rope.dim / 2 * 2,
        }
    }

    /// Puts heads before tokens: `[seq_len, heads * head_dim]` becomes `[heads, seq_len, head_dim]`.
    fn by_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (seq_len, width) = x.dims2()?;
        let head_dim = self.layout.head_dim;
        let x = x.reshape((seq_len, width / head_dim, head_dim))?.transpose(0, 1)?;
        self.ops.contiguous(&x)
    }

    /// Normalises each head of `[seq_len, heads * head_dim]`, where a layer has a weight for it.
    fn norm_heads(&self, x: Tensor, norm: Option<&Tensor>) -> Result<Tensor> {
        let Some(norm) = norm else { return Ok(x) };
        let (seq_len, width) = x.dims2()?;
        let head_dim = self.layout.head_dim;
        let heads = self.ops.contiguous(&x)?.reshape((seq_len * (width / head_dim), head_dim))?;
        Ok(self.ops.rms_norm(&heads, norm, self.rms_norm_eps)?.reshape((seq_len, width))?)
    }

    /// Rotates `[heads, seq_len, head_dim]`.
    ///
    /// * `first_row`: of the rotations
    fn rotate(&self, x: &Tensor, rotations: &RotationTensors, first_row: usize) -> Result<Tensor> {
        let head_dim = self.layout.head_dim;
        if self.rope_dim == 0 {
            return Ok(x.clone());
        }
        let rotated = self.ops.contiguous(&x.narrow(2, 0, self.rope_dim)?)?.unsqueeze(0)?;
        let rows = |x: &Tensor| x.narrow(0, first_row, rotated.dim(2)?);
        let (cos, sin) = (rows(&rotations.cos)?, rows(&rotations.sin)?);
        let rotated = match self.rope_layout {
            RopeLayout::Halves => candle_nn::rotary_emb::rope(&rotated, &cos, &sin),
            RopeLayout::Interleaved => candle_nn::rotary_emb::rope_i(&rotated, &cos, &sin),
        };
        let rotated = self.ops.counted(rotated)?.squeeze(0)?;
        if self.rope_dim == head_dim {
            return Ok(rotated);
        }
        let rest = self.ops.contiguous(&x.narrow(2, self.rope_dim, head_dim - self.rope_dim)?)?;
        self.ops.cat(&[rotated, rest], 2)
    }
}

/// Cosines and sines of some positions.
#[derive(Debug, Clone)]
pub struct RotationTensors {
    /// `[seq_len, rope dim / 2]`
    cos: Tensor,
    sin: Tensor,
}

/// Queries, keys and values of some tokens, queries and keys rotated.
#[derive(Debug)]
pub struct ProjectedTensors {
    /// `[num_heads, seq_len, head_dim]`
    queries: Tensor,
    /// `[num_kv_heads, seq_len, head_dim]`
    keys: Tensor,
    /// `[num_kv_heads, seq_len, head_dim]`
    values: Tensor,
    /// `[seq_len, num_heads * head_dim]` queries before the rotation.
    unrotated_queries: Tensor,
}

/// A layer's keys and values of a prompt, and what is collected of it.
#[derive(Debug)]
pub struct CandlePrompt {
    kv: PromptTensors,
    stats: Option<DeviceStats>,
    /// Queries of the whole prompt, kept only if they may be asked again.
    queries: Option<Vec<PromptBlock>>,
}

impl Backend for Candle {
    type Linear = CandleLinear;
    type Vector = Tensor;
    type Hidden = Tensor;
    type Rotations = RotationTensors;
    type Projected = ProjectedTensors;
    type Attended = Tensor;
    type Prompt = CandlePrompt;
    type Rows = CandleRows;

    const NAME: &'static str = "candle";

    fn decoding(&self) -> &'static str {
        match decode_with(self.layout, &self.ops) {
            DecodeWith::Groups => "groups",
            DecodeWith::Ragged => "ragged",
        }
    }

    fn ops(&self) -> Option<&Ops> {
        Some(&self.ops)
    }

    fn dtype(&self, stored: WeightFormat) -> Result<WeightFormat> {
        if stored.is_candle_blocks() {
            return Ok(stored);
        }
        Ok(match float_dtype(self.ops.device())? {
            DType::F16 => WeightFormat::F16,
            DType::BF16 => WeightFormat::BF16,
            _ => WeightFormat::F32,
        })
    }

    fn linear(&self, matrix: Arc<WeightMatrix>, bias: Option<Vec<f32>>) -> Result<CandleLinear> {
        CandleLinear::new(&self.ops, &matrix, bias)
    }

    fn vector(&self, numbers: Vec<f32>) -> Result<Tensor> {
        self.ops.upload(&numbers, numbers.len())
    }

    fn shape(linear: &CandleLinear) -> (usize, usize) {
        linear.shape()
    }

    fn len(vector: &Tensor) -> usize {
        vector.elem_count()
    }

    fn widened<'a>(&self, linear: &'a CandleLinear) -> Result<Box<WidenedRows<'a>>> {
        let (wide, (_, cols)) = (linear.widened()?, linear.shape());
        Ok(Box::new(move |rows, out| wide[rows.start * cols..rows.end * cols].clone_into(out)))
    }

    fn empty_rows(&self, dtype: KvDtype) -> Result<CandleRows> {
        CandleRows::new(self.layout, dtype, &self.ops)
    }

    fn hidden(&self, embedded: Vec<f32>) -> Result<Tensor> {
        self.ops.upload(&embedded, (embedded.len() / self.hidden_size.max(1), self.hidden_size))
    }

    fn rotations(&self, angles: Vec<(f32, f32)>) -> Result<RotationTensors> {
        let half = self.rope_dim / 2;
        let shape = (angles.len() / half.max(1), half);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.into_iter().unzip();
        Ok(RotationTensors { cos: self.ops.upload(&cos, shape)?, sin: self.ops.upload(&sin, shape)? })
    }

    fn prompt(&self, rows: &CandleRows, asks: PromptRequest<'_>) -> Result<CandlePrompt> {
        let kv = rows.prompt_within(asks.prompt_len, asks.window)?;
        let stats = asks.stats.map(|request| DeviceStats::new(&self.ops, request, &kv)).transpose()?;
        Ok(CandlePrompt { kv, stats, queries: asks.again.then(Vec::new) })
    }

    fn project(
        &self,
        block: &Block<Self>,
        hidden: &Tensor,
        rotations: &RotationTensors,
        first_row: usize,
        _: bool,
    ) -> Result<ProjectedTensors> {
        let normed = self.ops.rms_norm(hidden, &block.input_layernorm, self.rms_norm_eps)?;
        let linears = [&block.q_proj, &block.k_proj, &block.v_proj];
        let [queries, keys, values] = CandleLinear::forward(&self.ops, &normed, linears)?;
        let unrotated_queries = self.norm_heads(queries, block.q_norm.as_ref())?;
        let keys = self.norm_heads(keys, block.k_norm.as_ref())?;
        Ok(ProjectedTensors {
            queries: self.rotate(&self.by_heads(&unrotated_queries)?, rotations, first_row)?,
            keys: self.rotate(&self.by_heads(&keys)?, rotations, first_row)?,
            values: self.by_heads(&values)?,
            unrotated_queries,
        })
    }

    fn attend(
        &self,
        prompt: &mut CandlePrompt,
        projected: &ProjectedTensors,
        first_row: usize,
        _: Option<&mut LayerStats>,
        maps: Option<&mut [HeadGrid]>,
    ) -> Result<Tensor> {
        let CandlePrompt { kv, stats, queries } = prompt;
        kv.push(&self.ops, &projected.keys, &projected.values)?;
        let rows = PromptBlock { queries: projected.queries.clone(), first_row };
        let attended = device::prefill(&self.ops, self.layout, &rows, kv, stats.as_mut(), maps)?;
        if let Some(queries) = queries {
            queries.push(rows);
        }
        Ok(attended)
    }

    fn show(
        &self,
        projected: &ProjectedTensors,
        hidden: &Tensor,
        wanted: Wanted,
        look: &mut dyn FnMut(Shown<'_>) -> Result<()>,
    ) -> Result<()> {
        let download = |wanted: bool, x: &Tensor| if wanted { self.ops.download(x) } else { Ok(Vec::new()) };
        let queries = projected.queries.transpose(0, 1)?; // [seq_len, num_heads, head_dim]
        look(Shown {
            queries: &download(wanted.replay || wanted.queries, &queries)?,
            unrotated_queries: &download(wanted.unrotated, &projected.unrotated_queries)?,
            hidden: &download(wanted.replay, hidden)?,
        })
    }

    fn attention_input(&self, block: &Block<Self>, hidden: &Tensor) -> Result<Vec<f32>> {
        self.ops.download(&self.ops.rms_norm(hidden, &block.input_layernorm, self.rms_norm_eps)?)
    }

    fn last_row(&self, hidden: &Tensor, attended: Tensor) -> Result<(Tensor, Tensor)> {
        let last = |rows: &Tensor| rows.narrow(0, rows.dim(0)?.saturating_sub(1), 1);
        Ok((last(hidden)?, last(&attended)?))
    }

    fn finish(&self, block: &Block<Self>, hidden: &Tensor, attended: Tensor) -> Result<Tensor> {
        let ops = &self.ops;
        let [attended] = CandleLinear::forward(ops, &attended, [&block.o_proj])?;
        let residual = ops.add(hidden, &attended)?;
        let normed = ops.rms_norm(&residual, &block.post_attention_layernorm, self.rms_norm_eps)?;
        let [gate, up] = CandleLinear::forward(ops, &normed, [&block.gate_proj, &block.up_proj])?;
        let [down] = CandleLinear::forward(ops, &ops.silu_mul(&gate, &up)?, [&block.down_proj])?;
        ops.add(&residual, &down)
    }

    /// Looking would wait for the device after each layer; the logits are looked at.
    fn bad_rows(&self, _: &Tensor) -> Result<Vec<usize>> {
        Ok(Vec::new())
    }

    fn collect(&self, prompt: &CandlePrompt, stats: &mut LayerStats) -> Result<()> {
        prompt.stats.as_ref().map_or(Ok(()), |own| own.finish(&self.ops, &prompt.kv, stats))
    }

    fn ask_again(&self, prompt: &CandlePrompt, pending: &[(usize, Vec<Vec<f32>>)]) -> Result<Vec<Vec<f32>>> {
        let queries = prompt.queries.as_deref().unwrap_or_default();
        device::largest_differences(&self.ops, self.layout, queries, &prompt.kv, pending)
    }

    fn prompt_kv<'a>(&self, prompt: &'a CandlePrompt) -> Result<Cow<'a, PromptKv>> {
        let (keys, values) = prompt.kv.to_host(&self.ops)?;
        Ok(Cow::Owned(PromptKv { keys, values }))
    }

    fn stored_prompt(prompt: &CandlePrompt) -> &PromptTensors {
        &prompt.kv
    }

    fn logits(&self, weights: &Weights<Self>, hidden: &Tensor) -> Result<Vec<f32>> {
        let last = hidden.narrow(0, hidden.dim(0)?.saturating_sub(1), 1)?;
        let normed = self.ops.rms_norm(&last, &weights.norm, self.rms_norm_eps)?;
        let [logits] = CandleLinear::forward(&self.ops, &normed, [&weights.lm_head])?;
        self.ops.download(&logits)
    }

    fn append(
        &self,
        layer: &mut CacheLayer<CandleRows>,
        projected: &ProjectedTensors,
        position: usize,
        class: TokenClass,
    ) -> Result<()> {
        layer.append(&projected.keys, &projected.values, position, class)
    }

    fn attend_rows(&self, rows: &CandleRows, projected: &ProjectedTensors) -> Result<Tensor> {
        let queries = projected.queries.squeeze(1)?; // [num_heads, head_dim]
        let attended = device::decode(&self.ops, self.layout, &queries, &rows.for_attention()?)?;
        Ok(attended.reshape((1, self.layout.query_width()))?)
    }

    fn row_weights(&self, rows: &CandleRows, projected: &ProjectedTensors, kv_head: usize) -> Result<Vec<f32>> {
        let group = self.layout.group_size();
        let queries = projected.queries.squeeze(1)?.narrow(0, kv_head * group, group)?; // [group_size, head_dim]
        let keys = self.ops.cast(&rows.keys_of(kv_head)?, DType::F32)?; // [rows, head_dim]
        let queries = self.ops.scale(&queries, f64::from(self.layout.scale()))?;
        let weights = self.ops.softmax(&self.ops.matmul(&queries, &keys.t()?)?)?;
        self.ops.download(&self.ops.sum_last(&self.ops.contiguous(&weights.t()?)?)?)
    }

    fn group_queries(&self, projected: &ProjectedTensors, kv_head: usize) -> Result<Vec<f32>> {
        let group = self.layout.group_size();
        let queries = projected.queries.squeeze(1)?.narrow(0, kv_head * group, group)?; // [group_size, head_dim]
        self.ops.download(&self.ops.scale(&queries, f64::from(self.layout.scale()))?)
    }

    fn row_keys(&self, rows: &CandleRows, kv_head: usize) -> Result<Vec<f32>> {
        self.ops.download(&self.ops.cast(&rows.keys_of(kv_head)?, DType::F32)?)
    }

    fn attended(&self, attended: &Tensor) -> Result<Vec<f32>> {
        self.ops.download(attended)
    }
}
