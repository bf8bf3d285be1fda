//! The sizes of a LLaMA model, whatever file they were read from.

use crate::attention::HeadLayout;

/// Which numbers of a query or key are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Neighbours `(2i, 2i + 1)`: Meta's weights and GGUF.
    Interleaved,
    /// Halves `(i, i + dim / 2)`: Hugging Face's weights.
    Halves,
}

/// How positions become rotations.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSettings {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// Leading numbers of a head that are rotated; even, at most `head_dim`.
    pub dim: usize,
    /// Which numbers go together.
    pub layout: RopeLayout,
    /// Positions are divided by this (linear scaling); 1 for none.
    pub position_divisor: f64,
    /// `[dim / 2]` divisors of the frequencies, as Llama 3.1's scaling makes them; empty for none.
    pub frequency_divisors: Vec<f32>,
}

/// Sizes and constants of a LLaMA model. Names follow Hugging Face's `config.json` where it has one.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Query heads, key/value heads and their dimension.
    pub heads: HeadLayout,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f64,
    /// Longest sequence that the model was made for.
    pub context_length: usize,
    /// Rotary positions.
    pub rope: RopeSettings,
}
