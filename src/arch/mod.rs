//! What a LLaMA model is apart from its weights: sizes, heads, rotary positions.

mod architecture;
mod config;
mod layout;
mod rope;
pub mod rope_scaling;

pub use architecture::Architecture;
pub use config::{DynamicNtk, LlamaConfig, RopeLayout, RopeSettings, SlidingWindow};
pub use layout::HeadLayout;
pub use rope::Rope;
