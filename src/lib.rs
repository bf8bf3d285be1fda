//! LLaMA inference with a KV cache that keeps, for every head, only what that head attends to.
//!
//! The method is FastGen (Ge et al., *Model Tells You What to Discard*, ICLR 2024, arXiv 2310.01801): each KV head is
//! profiled once, while the prompt is processed, and keeps the smallest union of special tokens, punctuation, heavy
//! hitters and a local window that recovers its attention. Heads keep different numbers of rows, each in a buffer of its
//! own length, so that memory is really freed.
//!
//! Layers of the library, each of which uses only those below it:
//!
//! | module | what it is for |
//! |---|---|
//! | [`tune`] | the configuration that a limit allows |
//! | [`bench`](mod@bench) | speed and memory, measured case by case |
//! | [`eval`] | what a smaller cache costs, on text and in tasks |
//! | [`report`], [`plot`], [`fidelity`] | tables, log lines, JSON; pictures; agreement of two runs |
//! | [`generate`] | the loop: sampling, stop rules, streaming |
//! | [`hub`] | models by their id on a hub, fetched into a cache |
//! | [`checkpoint`], [`tokenizer`] | model files; text to tokens and back, chat templates |
//! | [`model`] | LLaMA: weights only, no state |
//! | [`attention`], [`cache`] | prefill with statistics, decode over ragged heads; what is kept |
//! | [`profile`], [`policy`] | the search; one file for each policy |
//! | [`jinja`] | chat templates of strangers, run within bounds |
//! | [`kernels`], [`ops`], [`device`], [`config`], [`tokens`], [`error`], [`files`], [`guard`], [`json`], [`memory`], [`numbers`], [`reading`], [`stop`] | leaves |
//!
//! The library never prints, exits or reads the environment.

pub mod attention;
pub mod bench;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod device;
pub mod error;
pub mod eval;
pub mod fidelity;
pub mod files;
mod foreign;
pub mod generate;
pub mod guard;
pub mod hub;
pub mod jinja;
pub mod json;
pub mod kernels;
pub mod memory;
pub mod model;
pub mod numbers;
pub mod ops;
pub mod plot;
pub mod policy;
pub mod prelude;
pub mod profile;
pub mod reading;
pub mod report;
pub mod stop;
pub mod tokenizer;
pub mod tokens;
pub mod tune;

pub use error::{Error, Result};
