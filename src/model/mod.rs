//! LLaMA: configuration, blocks, rotary positions and linear layers. Weights only: state lives in the cache that a call
//! is given.

mod block;
mod config;
mod device;
mod host;
mod layer_pass;
mod linear;
mod llama;
mod pass;
mod rope;
pub mod rope_scaling;
mod step;

use crate::ops::Ops;

pub use block::Block;
pub use config::{DynamicNtk, LlamaConfig, RopeLayout, RopeSettings};
pub use linear::{Embedding, Linear};
pub use llama::{Llama, Prefill, PrefillObserver, PrefillOptions};
pub use rope::Rope;

/// What computes a model, and so where its weights are.
#[derive(Debug, Clone, Default)]
pub enum Backend {
    /// The CPU kernels, on weights as their file stores them.
    #[default]
    Kernels,
    /// Candle operations, on weights that are tensors on a device.
    Candle(Ops),
}
