//! One transformer block: attention and MLP, each behind a norm and around a residual.

use candle_core::Tensor;
use rayon::prelude::*;

use super::host;
use super::linear::Linear;
use super::rope::Rope;
use crate::attention::HeadLayout;
use crate::error::Result;
use crate::kernels::vector::{self, instruction_set};

/// Numbers that one thread takes at a time in elementwise work.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// The weights of one block. Fields are named after Hugging Face's tensors.
#[derive(Debug, Clone)]
pub struct Block {
    /// `[hidden_size]`
    pub input_layernorm: Tensor,
    /// `[num_heads * head_dim, hidden_size]`
    pub q_proj: Linear,
    /// `[num_kv_heads * head_dim, hidden_size]`
    pub k_proj: Linear,
    /// `[num_kv_heads * head_dim, hidden_size]`
    pub v_proj: Linear,
    /// `[hidden_size, num_heads * head_dim]`
    pub o_proj: Linear,
    /// `[hidden_size]`
    pub post_attention_layernorm: Tensor,
    /// `[intermediate_size, hidden_size]`
    pub gate_proj: Linear,
    /// `[intermediate_size, hidden_size]`
    pub up_proj: Linear,
    /// `[hidden_size, intermediate_size]`
    pub down_proj: Linear,
}

/// Queries, keys and values of some tokens, queries and keys rotated.
#[derive(Debug)]
pub(super) struct Projected {
    /// `[seq_len, num_heads, head_dim]`
    pub queries: Vec<f32>,
    /// `[seq_len, num_kv_heads, head_dim]`
    pub keys: Vec<f32>,
    /// `[seq_len, num_kv_heads, head_dim]`
    pub values: Vec<f32>,
}

/// What a block needs to know of the model and of the tokens that it is given.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockContext<'a> {
    pub layout: HeadLayout,
    pub rms_norm_eps: f64,
    pub rope: &'a Rope,
    /// `[seq_len, rope dim / 2]`
    pub angles: &'a [(f32, f32)],
}

impl Block {
    /// Projects hidden states to queries, keys and values, and rotates them.
    ///
    /// * `hidden`: `[seq_len, hidden_size]`
    pub(super) fn project(&self, hidden: &Tensor, context: BlockContext<'_>) -> Result<Projected> {
        let BlockContext { layout, rope, angles, .. } = context;
        let normed = norm(hidden, &self.input_layernorm, context.rms_norm_eps)?;
        let mut queries = host::to_vec(&self.q_proj.forward(&normed)?)?;
        let mut keys = host::to_vec(&self.k_proj.forward(&normed)?)?;
        let values = host::to_vec(&self.v_proj.forward(&normed)?)?;
        rope.rotate(&mut queries, layout.query_width(), layout.head_dim, angles);
        rope.rotate(&mut keys, layout.kv_width(), layout.head_dim, angles);
        Ok(Projected { queries, keys, values })
    }

    /// Adds the attention's result and the MLP's to the residual stream.
    ///
    /// * `hidden`: `[seq_len, hidden_size]`, as [`project`](Self::project) got it
    /// * `attended`: `[seq_len, num_heads, head_dim]`
    ///
    /// Returns `[seq_len, hidden_size]`.
    pub(super) fn finish(&self, hidden: &Tensor, attended: Vec<f32>, context: BlockContext<'_>) -> Result<Tensor> {
        let attended = host::matrix(attended, hidden.dim(0)?, context.layout.query_width())?;
        let hidden = (hidden + self.o_proj.forward(&attended)?)?;
        let normed = norm(&hidden, &self.post_attention_layernorm, context.rms_norm_eps)?;
        let activated = silu_mul(&self.gate_proj.forward(&normed)?, &self.up_proj.forward(&normed)?)?;
        Ok((hidden + self.down_proj.forward(&activated)?)?)
    }
}

/// Root-mean-square norm over the last dimension.
pub(super) fn norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    #[expect(clippy::cast_possible_truncation)]
    let eps = eps as f32;
    Ok(candle_nn::ops::rms_norm(&x.contiguous()?, weight, eps)?)
}

/// `silu(gate) * up`, over threads.
fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (rows, cols) = up.dims2()?;
    let mut out = host::to_vec(up)?;
    host::with_slice(gate, |gate| {
        let set = instruction_set();
        let chunks = out.par_chunks_mut(ELEMENTS_PER_TASK).zip(gate.par_chunks(ELEMENTS_PER_TASK));
        chunks.for_each(|(up, gate)| vector::silu_mul(set, gate, up));
        Ok(())
    })?;
    host::matrix(out, rows, cols)
}
