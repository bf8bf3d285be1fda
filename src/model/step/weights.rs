//! A model's weights as a step uses them.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kernels::quant::{Activations, WeightMatrix};
use crate::kernels::simd::InstructionSet;
use crate::kernels::vector;
use crate::model::block::Block;
use crate::model::config::LlamaConfig;
use crate::model::host;
use crate::model::linear::{Embedding, Linear};

/// A model's weights as a step uses them; exists if all matrices are stored on the CPU.
#[derive(Debug, Clone)]
pub(in super::super) struct StepModel {
    pub(super) layers: Vec<StepLayer>,
    /// `[hidden_size]`
    pub(super) norm: Vec<f32>,
    pub(super) lm_head: StepLinear,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
}

#[derive(Debug, Clone)]
pub(super) struct StepLayer {
    /// `[hidden_size]`
    pub input_norm: Vec<f32>,
    /// Queries, keys, values: their outputs lie one after the other.
    pub qkv: [StepLinear; 3],
    pub output: StepLinear,
    /// `[hidden_size]`
    pub post_norm: Vec<f32>,
    pub gate: StepLinear,
    pub up: StepLinear,
    pub down: StepLinear,
}

#[derive(Debug, Clone)]
pub(super) struct StepLinear {
    pub matrix: Arc<WeightMatrix>,
    /// `[rows]`, or empty
    bias: Vec<f32>,
}

impl StepLinear {
    fn new(linear: &Linear) -> Result<Option<Self>> {
        let Some((matrix, bias)) = linear.stored_parts() else { return Ok(None) };
        let bias = bias.map(host::to_vec).transpose()?.unwrap_or_default();
        if !bias.is_empty() && bias.len() != matrix.rows() {
            return Err(Error::shape("a bias", matrix.rows(), bias.len()));
        }
        Ok(Some(Self { matrix: Arc::clone(matrix), bias }))
    }

    pub fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// Products of some rows with prepared activations, biases added: `[count, rows.len()]`.
    pub fn apply(&self, set: InstructionSet, rows: Range<usize>, x: &Activations, out: &mut Vec<f32>) {
        out.resize(x.count() * rows.len(), 0.0);
        self.matrix.dot_rows(rows.clone(), x, out);
        if !self.bias.is_empty() {
            for out in out.chunks_exact_mut(rows.len()) {
                vector::add_assign(set, out, &self.bias[rows.clone()]);
            }
        }
    }
}

impl StepModel {
    /// `None` if some matrix is not stored.
    pub(in super::super) fn new(
        config: &LlamaConfig,
        embed_tokens: &Embedding,
        layers: &[Block],
        norm: &candle_core::Tensor,
        lm_head: &Linear,
    ) -> Result<Option<Self>> {
        if !embed_tokens.is_stored() {
            return Ok(None);
        }
        let Some(lm_head) = StepLinear::new(lm_head)? else { return Ok(None) };
        let mut step_layers = Vec::with_capacity(layers.len());
        for block in layers {
            let Some(layer) = StepLayer::new(block, config)? else { return Ok(None) };
            step_layers.push(layer);
        }
        let hidden_size = config.hidden_size;
        let norm = norm_weight(norm, hidden_size)?;
        expect_shape(&lm_head, config.vocab_size, hidden_size)?;
        Ok(Some(Self { layers: step_layers, norm, lm_head, hidden_size, intermediate_size: config.intermediate_size }))
    }
}

impl StepLayer {
    fn new(block: &Block, config: &LlamaConfig) -> Result<Option<Self>> {
        let (hidden, layout) = (config.hidden_size, config.heads);
        let linears = [
            (&block.q_proj, layout.query_width(), hidden),
            (&block.k_proj, layout.kv_width(), hidden),
            (&block.v_proj, layout.kv_width(), hidden),
            (&block.o_proj, hidden, layout.query_width()),
            (&block.gate_proj, config.intermediate_size, hidden),
            (&block.up_proj, config.intermediate_size, hidden),
            (&block.down_proj, hidden, config.intermediate_size),
        ];
        let mut stored = Vec::with_capacity(linears.len());
        for (linear, rows, cols) in linears {
            let Some(linear) = StepLinear::new(linear)? else { return Ok(None) };
            expect_shape(&linear, rows, cols)?;
            stored.push(linear);
        }
        let Ok([q, k, v, output, gate, up, down]) = <[StepLinear; 7]>::try_from(stored) else { return Ok(None) };
        Ok(Some(Self {
            input_norm: norm_weight(&block.input_layernorm, hidden)?,
            qkv: [q, k, v],
            output,
            post_norm: norm_weight(&block.post_attention_layernorm, hidden)?,
            gate,
            up,
            down,
        }))
    }
}

fn expect_shape(linear: &StepLinear, rows: usize, cols: usize) -> Result<()> {
    let found = (linear.matrix.rows(), linear.matrix.cols());
    if found == (rows, cols) { Ok(()) } else { Err(Error::shape("a weight matrix", (rows, cols), found)) }
}

fn norm_weight(weight: &candle_core::Tensor, len: usize) -> Result<Vec<f32>> {
    let weight = host::to_vec(weight)?;
    if weight.len() == len { Ok(weight) } else { Err(Error::shape("a norm's weight", len, weight.len())) }
}
