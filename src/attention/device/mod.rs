//! Attention made of candle operations, on any device: the oracle of the CPU kernels, and what other devices run.
//!
//! [`prefill()`] takes a prompt's query rows in blocks and collects the same statistics as [`crate::attention::prefill`];
//! [`decode()`] attends over heads that are grouped by how many rows they keep, or over all at once by
//! [`crate::attention::ragged`], as [`Ops::decode_with`](crate::ops::Ops::decode_with) says. Scores, softmax and statistics are f32,
//! whatever the cache is stored in. Query heads that share a KV head are rows of one product: keys and values are never
//! repeated.
//!
//! Not for: holding rows (see [`crate::cache`]), or deciding which (see [`crate::compress`]).

pub mod decode;
pub mod groups;
pub mod prefill;
pub mod prompt;

pub use decode::{GroupedRows, decode};
pub use groups::{HeadGroup, Slots};
pub use prefill::{DeviceStats, PromptBlock, largest_differences, prefill};
pub use prompt::PromptTensors;
