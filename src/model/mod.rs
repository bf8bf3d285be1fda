//! LLaMA: the forward pass of a prompt ([`Llama::prefill`]), and the model as others use it. Weights only: state lives in
//! the cache that a call is given. What computes is a [backend](crate::backend); a token's plain forward pass is there, too.

mod anew;
mod facts;
mod forks;
mod keeper;
mod llama;
mod observer;
mod options;
mod prefill;
mod profile;
mod repeat;
mod room;

pub use crate::arch::{Architecture, DynamicNtk, LlamaConfig, Rope, RopeLayout, RopeSettings, SlidingWindow};
pub use llama::Llama;
pub use observer::PrefillObserver;
pub use options::PrefillOptions;
pub use prefill::{ForkedPrefill, Prefill};

use crate::backend::{Backend, Weights};

/// A model of some backend.
#[derive(Debug)]
struct Model<B: Backend> {
    config: LlamaConfig,
    rope: Rope,
    backend: B,
    weights: Weights<B>,
}

impl<B: Backend> Model<B> {
    /// `[num_layers]` how many tokens a token looks at, itself included, if there is a limit.
    fn windows(&self) -> Vec<Option<usize>> {
        (0..self.config.num_layers).map(|layer| self.config.window(layer)).collect()
    }

    fn has_window(&self) -> bool {
        self.windows().iter().any(Option::is_some)
    }
}
