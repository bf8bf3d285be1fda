//! CPU arithmetic on slices: what attention and linear layers are made of.
//!
//! Every kernel is one body, compiled several times: once plainly, and once for each instruction set that is worth it,
//! chosen when the program runs ([`simd`]). Not for: anything that knows of layers or policies.

pub mod attend;
pub(crate) mod blocks;
pub(crate) mod cholesky;
pub mod element;
pub mod gemm;
pub(crate) mod hadamard;
pub(crate) mod int16;
pub mod quant;
pub(crate) mod rounding;
pub mod simd;
pub mod team;
pub(crate) mod tiles;
pub mod vector;
