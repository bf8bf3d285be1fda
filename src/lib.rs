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
//! | [`report`], [`plot`], [`fidelity`] | tables, JSON; pictures; agreement of two runs |
//! | [`generate`] | the loop: sampling, stop rules, streaming |
//! | [`hub`] | models by their id on a hub, fetched into a cache |
//! | [`checkpoint`], [`tokenizer`] | model files; text to tokens and back, chat templates |
//! | [`model`] | LLaMA: the forward pass; weights only, no state |
//! | [`events`] | what heads and layers keep, as `tracing` events |
//! | [`backend`] | what computes: the CPU kernels, or candle operations; one slice each, from weights to cached rows |
//! | [`cache`] | what is kept: a layer's books, which no backend has a say in |
//! | [`attention`] | prefill with statistics, decoding over ragged heads |
//! | [`profile`] | the search, and what goes while tokens are generated |
//! | [`config`] | configurations of the adaptive cache |
//! | [`policy`] | one file for each policy and method |
//! | [`jinja`] | chat templates of strangers, run within bounds |
//! | [`arch`] | sizes, heads and rotary positions of a model |
//! | [`kernels`], [`ops`], [`device`], [`tokens`], [`error`], [`files`], [`guard`], [`json`], [`memory`], [`numbers`], [`reading`], [`stop`] | leaves |
//!
//! The library never prints, exits or reads the environment; it speaks by [`events`].

pub mod arch;
pub mod attention;
pub mod backend;
pub mod bench;
pub mod cache;
pub mod checkpoint;
pub mod config;
pub mod device;
pub mod error;
pub mod eval;
pub mod events;
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
pub mod profile;
pub mod reading;
pub mod report;
mod side_files;
mod sizes;
pub mod stop;
pub mod tokenizer;
pub mod tokens;
pub mod tune;

pub use error::{Error, Result};
