//! Model files: what they hold, and how weights get from them into a model.
//!
//! Today that is GGUF ([`gguf`] reads the container, [`llama`] makes a model of it). Not for: computing.

pub mod gguf;
pub mod llama;

pub use gguf::GgufFile;
pub use llama::{Loaded, WeightDtype, load};
