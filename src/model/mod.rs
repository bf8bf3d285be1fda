//! LLaMA: the forward pass of a prompt ([`prefill`]), and the model as others use it. Weights only: state lives in the
//! cache that a call is given. What computes is a [backend](crate::backend).

mod keeper;
mod llama;
mod prefill;

pub use crate::arch::{DynamicNtk, LlamaConfig, Rope, RopeLayout, RopeSettings};
pub use llama::Llama;
pub use prefill::{Prefill, PrefillObserver, PrefillOptions};
