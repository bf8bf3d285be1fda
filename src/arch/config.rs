//! The sizes of a LLaMA model, whatever file they were read from.

use serde::Serialize;

use super::architecture::Architecture;
use super::layout::HeadLayout;

/// Which numbers of a query or key are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeLayout {
    /// Neighbours `(2i, 2i + 1)`: Meta's weights and GGUF.
    Interleaved,
    /// Halves `(i, i + dim / 2)`: Hugging Face's weights.
    Halves,
}

/// Dynamic NTK scaling: the base grows with the length of the sequence that is being processed.
///
/// As in transformers, the length is that of the whole sequence at each call, and keys that are in a cache already keep
/// the rotation that they got.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DynamicNtk {
    /// How many times longer than `original_context` sequences may become.
    pub factor: f64,
    /// Tokens up to which the base stays as it is.
    pub original_context: usize,
}

/// How positions become rotations: number `i` of `dim / 2` turns by `theta^(-2i / dim) / frequency_divisors[i] /
/// position_divisor` for each position.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeSettings {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// Leading numbers of a head that are rotated; even, at most `head_dim`.
    pub dim: usize,
    /// Which numbers go together.
    pub layout: RopeLayout,
    /// What the scaling is called: `none`, `linear`, `llama3`, `yarn` or `dynamic`. For people only.
    pub scaling: &'static str,
    /// Positions are divided by this (linear scaling); 1 for none.
    pub position_divisor: f64,
    /// `[dim / 2]` divisors of the frequencies, as Llama 3.1's and `YaRN`'s scaling make them; empty for none.
    pub frequency_divisors: Vec<f32>,
    /// Sines and cosines are multiplied by this (`YaRN`); 1 for none.
    pub attention_factor: f64,
    /// Growth of the base with the sequence, if any.
    pub dynamic: Option<DynamicNtk>,
}

impl RopeSettings {
    /// Settings without any scaling.
    #[must_use]
    pub fn plain(theta: f64, dim: usize, layout: RopeLayout) -> Self {
        Self {
            theta,
            dim,
            layout,
            scaling: "none",
            position_divisor: 1.0,
            frequency_divisors: Vec::new(),
            attention_factor: 1.0,
            dynamic: None,
        }
    }
}

/// Sizes and constants of a model. Names follow Hugging Face's `config.json` where it has one.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Which model they are of.
    pub architecture: Architecture,
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
    /// Longest sequence that can be processed.
    pub context_length: usize,
    /// Which layers look back how far; `None` if all look at everything.
    pub sliding_window: Option<SlidingWindow>,
    /// Rotary positions.
    pub rope: RopeSettings,
}

impl LlamaConfig {
    /// The sliding window of a layer, if it has one.
    #[must_use]
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.as_ref().filter(|window| window.layers.get(layer) == Some(&true)).map(|window| window.size)
    }

    /// How many tokens of a text the layers hold together, each in each of its heads, if nothing but a window makes them
    /// go: those that a next token looks at.
    #[must_use]
    pub fn held_tokens(&self, tokens: usize) -> usize {
        let held = |layer| self.window(layer).map_or(tokens, |window| tokens.min(window.saturating_sub(1)));
        (0..self.num_layers).map(held).fold(0, usize::saturating_add)
    }
}

/// A limit to how far tokens look back: a token at position `p` looks at those from `p - size + 1` on, itself included
/// (Jiang et al., Mistral 7B, arXiv 2310.06825, section 2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlidingWindow {
    /// Tokens that are looked at, at least 1.
    pub size: usize,
    /// `[num_layers]` whether a layer has the window; the others look at everything.
    pub layers: Vec<bool>,
}
