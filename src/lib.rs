//! LLaMA inference with a KV cache that keeps, for every head, only what that head attends to.
//!
//! The method is FastGen (Ge et al., *Model Tells You What to Discard*, ICLR 2024, arXiv 2310.01801): each KV head is
//! profiled once, while the prompt is processed, and keeps the smallest union of special tokens, punctuation, heavy
//! hitters and a local window that recovers its attention. Heads keep different numbers of rows, each in a buffer of its
//! own length, so that memory is really freed.
//!
//! How it is used is in the [`guide`], most of all in [`guide::library`]:
//!
//! ```no_run
//! use adaptive_kvcache::prelude::*;
//!
//! # fn main() -> Result<()> {
//! let loaded = load("model.gguf", WeightDtype::Auto)?;
//! let config = AdaptiveConfig::from_file("configs/best.json")?;
//! let mut cache = loaded.cache(KvDtype::F16, &config)?; // one for each sequence
//! let ids = loaded.tokenizer.encode("Phileas Fogg was a member of the Reform Club, and that was all.")?;
//! let logits = loaded.model.prefill(&ids, &mut cache, &mut ())?.logits;
//! let options = GenerationOptions { max_new_tokens: 16, ..GenerationOptions::default() };
//! for step in Generation::new(&loaded.model, &loaded.tokenizer, &mut cache, &ids, logits, options) {
//!     print!("{}", step?.text);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Layers of the library: a module uses only those behind it, in the rows below or further right in its own row (a test
//! holds it).
//!
//! | module | what it is for |
//! |---|---|
//! | [`guide`], [`prelude`] | the manual; what most programs name |
//! | [`tune`] | the configuration that a limit allows |
//! | [`bench`](mod@bench) | speed and memory, measured case by case |
//! | [`eval`] | what a smaller cache costs, on text and in tasks |
//! | [`report`], [`plot`] | tables, JSON; pictures |
//! | [`generate`] | the loop: sampling, stop rules, streaming |
//! | [`store`] | a folder in which prompts find what was read before |
//! | [`saved`] | caches in files |
//! | [`hub`] | models by their id on a hub, fetched into a cache |
//! | [`checkpoint`], [`tokenizer`] | model files; text to tokens and back, chat templates |
//! | [`model`] | LLaMA: the forward pass; weights only, no state |
//! | [`events`] | what heads and layers keep, as `tracing` events |
//! | [`backend`] | what computes: the CPU kernels, or candle operations; one slice each, from weights to cached rows |
//! | [`cache`] | what is kept: a layer's books, which no backend has a say in |
//! | [`attention`] | prefill with statistics, decoding over ragged heads |
//! | [`compress`] | configurations; what each head keeps, one file for each policy and method |
//! | [`jinja`] | chat templates of strangers, run within bounds |
//! | [`arch`] | sizes, heads and rotary positions of a model |
//! | `records`, `kernels`, [`cores`], [`ops`], [`device`], [`clock`], `side_files`, [`files`], `fingerprint`, [`fidelity`], `mapped`, `foreign`, `numbers`, `reading`, `json`, [`stop`], [`error`], `guard`, [`memory`], `sizes`, [`tokens`] | leaves |
//!
//! Modules without a link are not for other programs: they are private, or public for the binary, tests and benchmarks.
//!
//! The library never prints, exits or reads the environment; it speaks by [`events`].

pub mod arch;
pub mod attention;
pub mod backend;
pub mod bench;
pub mod cache;
pub mod checkpoint;
pub mod clock;
pub mod compress;
pub mod cores;
pub mod device;
pub mod error;
pub mod eval;
pub mod events;
pub mod fidelity;
pub mod files;
#[doc(hidden)]
pub mod fingerprint;
mod foreign;
pub mod generate;
#[doc(hidden)]
pub mod guard;
pub mod guide;
pub mod hub;
pub mod jinja;
#[doc(hidden)]
pub mod json;
#[doc(hidden)]
pub mod kernels;
#[doc(hidden)]
pub mod mapped;
pub mod memory;
pub mod model;
#[doc(hidden)]
pub mod numbers;
pub mod ops;
pub mod plot;
pub mod prelude;
#[doc(hidden)]
pub mod reading;
#[doc(hidden)]
pub mod records;
pub mod report;
pub mod saved;
mod side_files;
mod sizes;
pub mod stop;
pub mod store;
pub mod tokenizer;
pub mod tokens;
pub mod tune;

pub use error::{Error, Result};
