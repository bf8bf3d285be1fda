//! A model's weights as a backend holds them, and the table of tokens.
//!
//! Not for: where they come from (see [`crate::checkpoint`]).

use std::sync::Arc;

use super::Backend;
use crate::arch::LlamaConfig;
use crate::error::{Error, Result};
use crate::kernels::quant::WeightMatrix;

/// A model's weights, as a backend takes them in.
#[derive(Debug, Clone)]
pub struct Weights<B: Backend> {
    /// Vectors of the tokens.
    pub embed_tokens: Embedding,
    /// From the first layer.
    pub blocks: Vec<Block<B>>,
    /// Before the output layer.
    pub norm: B::Vector,
    /// `[vocab_size, hidden_size]`
    pub lm_head: B::Linear,
}

impl<B: Backend> Weights<B> {
    /// Checks that all weights are of a model's sizes.
    ///
    /// # Errors
    /// [`Error::Shape`] if some are not.
    pub fn expect_sizes(&self, config: &LlamaConfig) -> Result<()> {
        let LlamaConfig { hidden_size, intermediate_size, vocab_size, heads, .. } = *config;
        if self.blocks.len() != config.num_layers {
            return Err(Error::shape("a model's blocks", config.num_layers, self.blocks.len()));
        }
        let (queries, kv) = (heads.query_width(), heads.kv_width());
        let mut linears = vec![(&self.lm_head, (vocab_size, hidden_size))];
        let mut norms = vec![&self.norm];
        let mut head_norms = Vec::new();
        for block in &self.blocks {
            linears.extend([
                (&block.q_proj, (queries, hidden_size)),
                (&block.k_proj, (kv, hidden_size)),
                (&block.v_proj, (kv, hidden_size)),
                (&block.o_proj, (hidden_size, queries)),
                (&block.gate_proj, (intermediate_size, hidden_size)),
                (&block.up_proj, (intermediate_size, hidden_size)),
                (&block.down_proj, (hidden_size, intermediate_size)),
            ]);
            norms.extend([&block.input_layernorm, &block.post_attention_layernorm]);
            head_norms.extend([&block.q_norm, &block.k_norm]);
        }
        let table = (self.embed_tokens.0.rows(), self.embed_tokens.0.cols());
        let found = linears.into_iter().map(|(linear, expected)| (B::shape(linear), expected));
        let found = found.chain([(table, (vocab_size, hidden_size))]);
        if let Some((found, expected)) = found.into_iter().find(|(found, expected)| found != expected) {
            return Err(Error::shape("a weight matrix", expected, found));
        }
        if let Some(len) = norms.into_iter().map(B::len).find(|&len| len != hidden_size) {
            return Err(Error::shape("a norm's weight", hidden_size, len));
        }
        let expected = config.architecture.has_head_norms().then_some(heads.head_dim);
        match head_norms.into_iter().map(|norm| norm.as_ref().map(B::len)).find(|&len| len != expected) {
            Some(len) => Err(Error::shape("a norm's weight of heads", format!("{expected:?}"), format!("{len:?}"))),
            None => Ok(()),
        }
    }
}

/// The weights of one block. Fields are named after Hugging Face's tensors.
#[derive(Debug, Clone)]
pub struct Block<B: Backend> {
    /// `[hidden_size]`
    pub input_layernorm: B::Vector,
    /// `[head_dim]`, of each query head before it is rotated; where the [architecture](crate::arch::Architecture::has_head_norms)
    /// has it.
    pub q_norm: Option<B::Vector>,
    /// `[head_dim]`, of each key as of queries.
    pub k_norm: Option<B::Vector>,
    /// `[num_heads * head_dim, hidden_size]`
    pub q_proj: B::Linear,
    /// `[num_kv_heads * head_dim, hidden_size]`
    pub k_proj: B::Linear,
    /// `[num_kv_heads * head_dim, hidden_size]`
    pub v_proj: B::Linear,
    /// `[hidden_size, num_heads * head_dim]`
    pub o_proj: B::Linear,
    /// `[hidden_size]`
    pub post_attention_layernorm: B::Vector,
    /// `[intermediate_size, hidden_size]`
    pub gate_proj: B::Linear,
    /// `[intermediate_size, hidden_size]`
    pub up_proj: B::Linear,
    /// `[hidden_size, intermediate_size]`
    pub down_proj: B::Linear,
}

/// The table that turns token ids into vectors, `[vocab_size, hidden_size]`, in memory; rows are widened as they are
/// looked up.
#[derive(Debug, Clone)]
pub struct Embedding(Arc<WeightMatrix>);

impl Embedding {
    /// A table as it is stored.
    #[must_use]
    pub fn new(table: Arc<WeightMatrix>) -> Self {
        Self(table)
    }

    /// Checks that there are such tokens.
    ///
    /// # Errors
    /// [`Error::Input`] for an id outside of the vocabulary.
    pub fn check(&self, ids: &[u32]) -> Result<()> {
        let vocab_size = self.0.rows();
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => Err(Error::input(format!("token id `{id}` is outside of the vocabulary of {vocab_size}"))),
            None => Ok(()),
        }
    }

    /// Looks up ids.
    ///
    /// * `out`: overwritten with `[ids.len(), hidden_size]`
    ///
    /// # Errors
    /// [`Error::Input`] for an id outside of the vocabulary.
    pub fn look_up(&self, ids: &[u32], out: &mut Vec<f32>) -> Result<()> {
        self.check(ids)?;
        let table = &self.0;
        out.resize(ids.len() * table.cols(), 0.0);
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(table.cols())) {
            table.dequantize_rows(id as usize..id as usize + 1, row);
        }
        Ok(())
    }
}
