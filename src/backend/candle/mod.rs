//! Candle operations, on weights that are tensors on a device: what GPUs run, and on the CPU the kernels' oracle.

mod forward;
mod linear;
mod rows;

pub use forward::Candle;
pub use rows::{CandleLayer, CandleRows};
