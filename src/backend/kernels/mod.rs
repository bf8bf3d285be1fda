//! The CPU's own kernels, on weights as their file stores them.
//!
//! Tokens are decoded on a team of threads ([`step`]); prompts go through [`forward`].

mod forward;
mod head;
mod linear;
mod rows;
mod step;
mod storage;

pub use forward::Kernels;
pub use head::HeadCache;
pub use rows::{KernelLayer, KernelRows};
