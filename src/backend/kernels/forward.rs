//! A prompt's way through the CPU kernels, and a token's plain one.

use std::borrow::Cow;
use std::sync::Arc;

use rayon::prelude::*;

use super::Kernels;
use super::buffers::Buffer;
use super::linear::KernelLinear;
use super::rows::KernelRows;
use super::step;
use crate::attention::decode::{decode, plain_row_weights};
use crate::attention::map::HeadGrid;
use crate::attention::prefill::{QueryBlock, largest_differences, prefill};
use crate::attention::prompt_rows::PromptKv;
use crate::attention::replay::WidenedRows;
use crate::backend::{Backend, Block, PromptRequest, Shown, Wanted, Weights};
use crate::cache::{AdaptiveKvCache, CacheLayer, KvDtype};
use crate::compress::stats::LayerStats;
use crate::error::{Error, Result};
use crate::kernels::quant::{Compute, Inputs, WeightFormat, WeightMatrix};
use crate::kernels::vector::{self, instruction_set};
use crate::numbers::all_finite;
use crate::tokens::TokenClass;

/// Numbers that one thread takes at a time in elementwise work.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Rows of a prompt from which on it pays to round all keys and values, those of earlier tokens, too.
const MIN_ROUNDED_ROWS: usize = 32;

/// Queries, keys and values of some tokens, queries and keys rotated.
#[derive(Debug)]
pub struct Projected {
    /// `[seq_len, num_heads, head_dim]`
    queries: Buffer,
    /// `[seq_len, num_kv_heads, head_dim]`
    keys: Buffer,
    /// `[seq_len, num_kv_heads, head_dim]`
    values: Buffer,
    /// `[seq_len, num_heads, head_dim]` queries before the rotation; empty if not wanted.
    unrotated_queries: Buffer,
    /// How they may be multiplied with each other.
    compute: Compute,
}

/// A layer's keys and values of a prompt.
#[derive(Debug)]
pub struct KernelPrompt {
    kv: PromptKv,
    /// Queries of the whole prompt, `[prompt_len, num_heads, head_dim]`, kept only if they may be asked again.
    queries: Option<Vec<f32>>,
}

impl Backend for Kernels {
    type Linear = KernelLinear;
    type Vector = Arc<[f32]>;
    type Hidden = Buffer;
    type Rotations = Vec<(f32, f32)>;
    type Projected = Projected;
    type Attended = Vec<f32>;
    type Prompt = KernelPrompt;
    type Rows = KernelRows;

    const NAME: &'static str = "cpu";

    fn decoding(&self) -> &'static str {
        "team"
    }

    fn compute(&self) -> Option<Compute> {
        Some(self.compute)
    }

    fn dtype(&self, stored: WeightFormat) -> Result<WeightFormat> {
        Ok(stored)
    }

    fn linear(&self, matrix: Arc<WeightMatrix>, bias: Option<Vec<f32>>) -> Result<KernelLinear> {
        KernelLinear::new(self.compute, matrix, bias)
    }

    fn vector(&self, numbers: Vec<f32>) -> Result<Arc<[f32]>> {
        Ok(numbers.into())
    }

    fn shape(linear: &KernelLinear) -> (usize, usize) {
        (linear.matrix.rows(), linear.matrix.cols())
    }

    fn len(vector: &Arc<[f32]>) -> usize {
        vector.len()
    }

    fn widened<'a>(&self, linear: &'a KernelLinear) -> Result<Box<WidenedRows<'a>>> {
        Ok(Box::new(|rows, out| {
            out.resize(rows.len() * linear.matrix.cols(), 0.0);
            linear.matrix.dequantize_rows(rows, out);
        }))
    }

    fn empty_rows(&self, dtype: KvDtype) -> Result<KernelRows> {
        KernelRows::new(self.layout, dtype)
    }

    fn hidden(&self, embedded: Vec<f32>) -> Result<Buffer> {
        Ok(self.buffers.holding(embedded))
    }

    fn rotations(&self, angles: Vec<(f32, f32)>) -> Result<Vec<(f32, f32)>> {
        Ok(angles)
    }

    fn prompt(&self, rows: &KernelRows, asks: PromptRequest<'_>) -> Result<KernelPrompt> {
        let queries = asks.again.then(|| Vec::with_capacity(asks.prompt_len * self.layout.query_width()));
        Ok(KernelPrompt { kv: rows.prompt_within(asks.prompt_len, asks.window)?, queries })
    }

    fn project(
        &self,
        block: &Block<Self>,
        hidden: &Buffer,
        rotations: &Vec<(f32, f32)>,
        first_row: usize,
        unrotated: bool,
    ) -> Result<Projected> {
        let normed = self.norm_rows(hidden, &block.input_layernorm)?;
        let normed = self.inputs(&normed)?;
        let mut queries = block.q_proj.forward(&normed, &self.buffers)?;
        let mut keys = block.k_proj.forward(&normed, &self.buffers)?;
        let values = block.v_proj.forward(&normed, &self.buffers)?;
        for (rows, norm) in [(&mut queries, &block.q_norm), (&mut keys, &block.k_norm)] {
            let heads_per_task = (ELEMENTS_PER_TASK / self.layout.head_dim).max(1);
            let tasks = rows.par_chunks_mut(heads_per_task * self.layout.head_dim);
            tasks.for_each(|heads| self.norm_heads(heads, norm.as_ref()));
        }
        let unrotated_queries = self.buffers.copy(if unrotated { &queries } else { &[] });
        let rotations = rotations.get(first_row * self.half..).unwrap_or_default();
        self.rope.rotate(&mut queries, self.layout.query_width(), self.layout.head_dim, rotations);
        self.rope.rotate(&mut keys, self.layout.kv_width(), self.layout.head_dim, rotations);
        Ok(Projected { queries, keys, values, unrotated_queries, compute: block.q_proj.compute_after() })
    }

    fn attend(
        &self,
        prompt: &mut KernelPrompt,
        projected: &Projected,
        first_row: usize,
        stats: Option<&mut LayerStats>,
        maps: Option<&mut [HeadGrid]>,
    ) -> Result<Vec<f32>> {
        prompt.kv.keys.push(&projected.keys)?;
        prompt.kv.values.push(&projected.values)?;
        if projected.compute == Compute::Fast && prompt.kv.keys.capacity() >= MIN_ROUNDED_ROWS {
            prompt.kv.round();
        }
        if let Some(queries) = &mut prompt.queries {
            queries.extend_from_slice(&projected.queries);
        }
        let (block, PromptKv { keys, values }) = (QueryBlock { queries: &projected.queries, first_row }, &prompt.kv);
        prefill(self.layout, block, keys, values, stats, maps)
    }

    fn show(
        &self,
        projected: &Projected,
        hidden: &Buffer,
        _: Wanted,
        look: &mut dyn FnMut(Shown<'_>) -> Result<()>,
    ) -> Result<()> {
        look(Shown { queries: &projected.queries, unrotated_queries: &projected.unrotated_queries, hidden })
    }

    fn attention_input(&self, block: &Block<Self>, hidden: &Buffer) -> Result<Vec<f32>> {
        Ok(self.norm_rows(hidden, &block.input_layernorm)?.to_vec())
    }

    fn last_row(&self, hidden: &Buffer, mut attended: Vec<f32>) -> Result<(Buffer, Vec<f32>)> {
        let last = |numbers: usize, width: usize| numbers.saturating_sub(width);
        let row = self.buffers.copy(&hidden[last(hidden.len(), self.hidden_size)..]);
        attended.drain(..last(attended.len(), self.layout.query_width()));
        Ok((row, attended))
    }

    fn finish(&self, block: &Block<Self>, hidden: &Buffer, attended: Vec<f32>) -> Result<Buffer> {
        let attended = Inputs::new(self.compute, &attended, self.layout.query_width());
        let mut residual = block.o_proj.forward(&attended, &self.buffers)?;
        add(&mut residual, hidden)?;
        let normed = self.norm_rows(&residual, &block.post_attention_layernorm)?;
        let inputs = self.inputs(&normed)?;
        let gate = block.gate_proj.forward(&inputs, &self.buffers)?;
        let mut up = block.up_proj.forward(&inputs, &self.buffers)?;
        let activated = Inputs::gated(self.compute, &gate, &mut up, block.up_proj.rows());
        add(&mut residual, &block.down_proj.forward(&activated, &self.buffers)?)?;
        Ok(residual)
    }

    fn bad_rows(&self, hidden: &Buffer) -> Result<Vec<usize>> {
        if all_finite(hidden) {
            return Ok(Vec::new());
        }
        let rows = hidden.chunks_exact(self.hidden_size).enumerate();
        Ok(rows.filter(|(_, row)| !all_finite(row)).map(|(row, _)| row).collect())
    }

    fn ask_again(&self, prompt: &KernelPrompt, pending: &[(usize, Vec<Vec<f32>>)]) -> Result<Vec<Vec<f32>>> {
        let queries = prompt.queries.as_deref().unwrap_or_default();
        largest_differences(self.layout, QueryBlock { queries, first_row: 0 }, &prompt.kv.keys, pending)
    }

    fn prompt_kv<'a>(&self, prompt: &'a KernelPrompt) -> Result<Cow<'a, PromptKv>> {
        Ok(Cow::Borrowed(&prompt.kv))
    }

    fn stored_prompt(prompt: &KernelPrompt) -> &PromptKv {
        &prompt.kv
    }

    fn logits(&self, weights: &Weights<Self>, hidden: &Buffer) -> Result<Vec<f32>> {
        let last = &hidden[hidden.len().saturating_sub(self.hidden_size)..];
        let normed = self.norm_rows(last, &weights.norm)?;
        Ok(weights.lm_head.forward(&self.inputs(&normed)?, &self.buffers)?.to_vec())
    }

    fn release(&self) {
        self.buffers.clear();
    }

    fn decode(
        &self,
        weights: &Weights<Self>,
        ids: &[u32],
        angles: &[(f32, f32)],
        caches: &mut [&mut AdaptiveKvCache],
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        step::run(self, weights, ids, angles, caches, logits)
    }

    fn decodes_runs(&self) -> bool {
        true
    }

    fn decode_run(
        &self,
        weights: &Weights<Self>,
        ids: &[u32],
        angles: &[(f32, f32)],
        cache: &mut AdaptiveKvCache,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        step::run_tokens(self, weights, ids, angles, cache, logits)
    }

    fn take_back(&self, cache: &mut AdaptiveKvCache, count: usize) -> Result<()> {
        cache.layers_mut::<KernelRows>()?.iter_mut().try_for_each(|layer| layer.take_back(count))
    }

    fn append(
        &self,
        layer: &mut CacheLayer<KernelRows>,
        projected: &Projected,
        position: usize,
        class: TokenClass,
    ) -> Result<()> {
        layer.append(&projected.keys, &projected.values, position, class)
    }

    fn attend_rows(&self, rows: &KernelRows, projected: &Projected) -> Result<Vec<f32>> {
        decode(self.layout, &projected.queries, &rows.for_attention())
    }

    fn row_weights(&self, rows: &KernelRows, projected: &Projected, kv_head: usize) -> Result<Vec<f32>> {
        let group = self.layout.group_size() * self.layout.head_dim;
        let queries = &projected.queries[kv_head * group..(kv_head + 1) * group];
        plain_row_weights(self.layout, queries, rows.heads()[kv_head].rows())
    }

    fn group_queries(&self, projected: &Projected, kv_head: usize) -> Result<Vec<f32>> {
        let (group, scale) = (self.layout.group_size() * self.layout.head_dim, self.layout.scale());
        let queries = &projected.queries[kv_head * group..(kv_head + 1) * group];
        Ok(queries.iter().map(|number| number * scale).collect())
    }

    fn row_keys(&self, rows: &KernelRows, kv_head: usize) -> Result<Vec<f32>> {
        Ok(rows.heads()[kv_head].keys())
    }

    fn attended(&self, attended: &Vec<f32>) -> Result<Vec<f32>> {
        Ok(attended.clone())
    }
}

impl Kernels {
    /// Rows of the hidden size, for several layers.
    fn inputs<'a>(&self, rows: &'a [f32]) -> Result<Inputs<'a>> {
        if self.hidden_size == 0 || !rows.len().is_multiple_of(self.hidden_size) {
            return Err(Error::shape("a linear layer's input", format!("rows of {}", self.hidden_size), rows.len()));
        }
        Ok(Inputs::new(self.compute, rows, self.hidden_size))
    }

    /// Root-mean-square norm of each row of `[seq_len, weight.len()]`, over threads.
    fn norm_rows(&self, x: &[f32], weight: &[f32]) -> Result<Buffer> {
        let (set, width) = (instruction_set(), weight.len().max(1));
        if !x.len().is_multiple_of(width) {
            return Err(Error::shape("a norm's input", format!("rows of {width}"), x.len()));
        }
        let mut out = self.buffers.take(x.len());
        let size = (ELEMENTS_PER_TASK / width).max(1) * width;
        out.par_chunks_mut(size).zip(x.par_chunks(size)).for_each(|(out, x)| {
            out.copy_from_slice(x);
            out.chunks_exact_mut(width).for_each(|row| vector::rms_norm(set, row, weight, self.eps));
        });
        Ok(out)
    }
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
