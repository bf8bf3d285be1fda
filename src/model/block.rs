//! One transformer block: attention and MLP, each behind a norm and around a residual.

use candle_core::Tensor;
use rayon::prelude::*;

use super::host;
use super::linear::Linear;
use super::rope::Rope;
use crate::attention::HeadLayout;
use crate::error::{Error, Result};
use crate::kernels::gemm::{Matrix, MatrixMut};
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
    /// `[seq_len, num_heads, head_dim]` queries before the rotation; empty if not wanted.
    pub unrotated_queries: Vec<f32>,
}

/// What a block needs to know of the model and of the tokens that it is given.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockContext<'a> {
    pub layout: HeadLayout,
    pub rms_norm_eps: f64,
    pub rope: &'a Rope,
    /// `[seq_len, rope dim / 2]`
    pub angles: &'a [(f32, f32)],
    /// Whether [`Projected::unrotated_queries`] are wanted.
    pub unrotated_queries: bool,
}

impl Block {
    /// Projects hidden states to queries, keys and values, and rotates them.
    ///
    /// * `hidden`: `[seq_len, hidden_size]`
    pub(super) fn project(&self, hidden: &Tensor, context: BlockContext<'_>) -> Result<Projected> {
        let BlockContext { layout, rope, angles, .. } = context;
        let seq_len = hidden.dim(0)?;
        let normed = host::with_slice(hidden, |hidden| norm_rows(hidden, &self.input_layernorm, context.rms_norm_eps))?;
        let mut queries = self.q_proj.apply(&normed, seq_len)?;
        let mut keys = self.k_proj.apply(&normed, seq_len)?;
        let values = self.v_proj.apply(&normed, seq_len)?;
        let unrotated_queries = if context.unrotated_queries { queries.clone() } else { Vec::new() };
        rope.rotate(&mut queries, layout.query_width(), layout.head_dim, angles);
        rope.rotate(&mut keys, layout.kv_width(), layout.head_dim, angles);
        Ok(Projected { queries, keys, values, unrotated_queries })
    }

    /// The squared length, behind the output projection, of each value as each query head of its group would write it if
    /// it attended to nothing else: `[num_heads]` of `[len]`.
    ///
    /// * `values`: `[num_kv_heads]` of `[len, head_dim]`
    ///
    /// # Errors
    /// [`Error::Shape`] if the projection is of other heads.
    pub(super) fn squared_outputs(&self, layout: HeadLayout, values: &[Vec<f32>]) -> Result<Vec<Vec<f32>>> {
        let (head_dim, width) = (layout.head_dim, layout.query_width());
        let weights = self.o_proj.widened()?; // [hidden_size, num_heads * head_dim]
        if !weights.len().is_multiple_of(width) || values.len() != layout.num_kv_heads {
            return Err(Error::shape("an output projection", format!("rows of {width}"), weights.len()));
        }
        let hidden_size = weights.len() / width;
        let of_head = |head: usize| {
            let own = Matrix::new(&weights[head * head_dim..], hidden_size, head_dim, width);
            // v^T (W^T W) v: the small matrix in between is the same for all values.
            let mut gram = vec![0.0; head_dim * head_dim];
            MatrixMut::new(&mut gram, head_dim, head_dim, head_dim).set_product(own.transposed(), own, 1.0);
            let values = &values[head / layout.group_size()];
            let len = values.len() / head_dim;
            let mut products = vec![0.0; values.len()];
            MatrixMut::new(&mut products, len, head_dim, head_dim).set_product(
                Matrix::new(values, len, head_dim, head_dim),
                Matrix::new(&gram, head_dim, head_dim, head_dim),
                1.0,
            );
            let set = instruction_set();
            let rows = products.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
            rows.map(|(product, value)| vector::dot(set, product, value).max(0.0)).collect()
        };
        Ok((0..layout.num_heads).into_par_iter().map(of_head).collect())
    }

    /// Adds the attention's result and the MLP's to the residual stream.
    ///
    /// * `hidden`: `[seq_len, hidden_size]`, as [`project`](Self::project) got it
    /// * `attended`: `[seq_len, num_heads, head_dim]`
    ///
    /// Returns `[seq_len, hidden_size]`.
    pub(super) fn finish(&self, hidden: &Tensor, attended: Vec<f32>, context: BlockContext<'_>) -> Result<Tensor> {
        let (seq_len, hidden_size) = hidden.dims2()?;
        let mut residual = self.o_proj.apply(&attended, seq_len)?;
        drop(attended);
        host::with_slice(hidden, |hidden| add(&mut residual, hidden))?;
        let normed = norm_rows(&residual, &self.post_attention_layernorm, context.rms_norm_eps)?;
        let mut activated = self.up_proj.apply(&normed, seq_len)?;
        silu_mul(&self.gate_proj.apply(&normed, seq_len)?, &mut activated);
        add(&mut residual, &self.down_proj.apply(&activated, seq_len)?)?;
        host::matrix(residual, seq_len, hidden_size)
    }
}

/// Root-mean-square norm over the last dimension of `[seq_len, hidden_size]`.
pub(super) fn norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (seq_len, hidden_size) = x.dims2()?;
    host::matrix(host::with_slice(x, |x| norm_rows(x, weight, eps))?, seq_len, hidden_size)
}

/// [`norm`] of numbers in memory, over threads.
fn norm_rows(x: &[f32], weight: &Tensor, eps: f64) -> Result<Vec<f32>> {
    #[expect(clippy::cast_possible_truncation)]
    let eps = eps as f32;
    let mut out = x.to_vec();
    host::with_slice(weight, |weight| {
        let set = instruction_set();
        let width = weight.len().max(1);
        if !x.len().is_multiple_of(width) {
            return Err(Error::shape("a norm's input", format!("rows of {width}"), x.len()));
        }
        let rows_per_task = (ELEMENTS_PER_TASK / width).max(1);
        out.par_chunks_mut(rows_per_task * width).for_each(|rows| {
            rows.chunks_exact_mut(width).for_each(|row| vector::rms_norm(set, row, weight, eps));
        });
        Ok(())
    })?;
    Ok(out)
}

/// `sums += numbers`, over threads.
fn add(sums: &mut [f32], numbers: &[f32]) -> Result<()> {
    if sums.len() != numbers.len() {
        return Err(Error::shape("a residual", numbers.len(), sums.len()));
    }
    let set = instruction_set();
    let chunks = sums.par_chunks_mut(ELEMENTS_PER_TASK).zip(numbers.par_chunks(ELEMENTS_PER_TASK));
    chunks.for_each(|(sums, numbers)| vector::add_assign(set, sums, numbers));
    Ok(())
}

/// `up *= silu(gate)`, over threads.
fn silu_mul(gate: &[f32], up: &mut [f32]) {
    let set = instruction_set();
    let chunks = up.par_chunks_mut(ELEMENTS_PER_TASK).zip(gate.par_chunks(ELEMENTS_PER_TASK));
    chunks.for_each(|(up, gate)| vector::silu_mul(set, gate, up));
}
