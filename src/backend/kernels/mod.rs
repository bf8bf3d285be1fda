//! The CPU's own kernels, on weights as their file stores them.
//!
//! Tokens are decoded on a team of threads ([`step`]); prompts go through [`forward`].

mod buffers;
mod forward;
mod head;
mod linear;
mod rows;
mod step;
mod storage;

pub use head::HeadCache;
pub use rows::{KernelLayer, KernelRows};

use std::sync::Arc;

use crate::arch::{HeadLayout, LlamaConfig, Rope};
use crate::kernels::quant::Compute;
use crate::kernels::vector::{self, instruction_set};
use buffers::Buffers;

/// The CPU's own kernels.
#[derive(Debug, Clone)]
pub struct Kernels {
    layout: HeadLayout,
    hidden_size: usize,
    eps: f32,
    rope: Rope,
    /// Numbers of a position's rotations.
    half: usize,
    compute: Compute,
    buffers: Buffers,
}

impl Kernels {
    /// Kernels for a model of some sizes, and how its matrices are multiplied.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "as it is computed with")]
    pub fn new(config: &LlamaConfig, compute: Compute) -> Self {
        Self {
            layout: config.heads,
            hidden_size: config.hidden_size,
            eps: config.rms_norm_eps as f32,
            rope: Rope::new(&config.rope),
            half: config.rope.dim / 2,
            compute,
            buffers: Buffers::default(),
        }
    }

    /// Normalises each head of some rows, where a layer has a weight for it.
    fn norm_heads(&self, heads: &mut [f32], norm: Option<&Arc<[f32]>>) {
        if let Some(norm) = norm {
            let set = instruction_set();
            heads.chunks_exact_mut(norm.len().max(1)).for_each(|head| vector::rms_norm(set, head, norm, self.eps));
        }
    }
}
