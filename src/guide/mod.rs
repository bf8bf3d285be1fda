//! The manual, page by page: how the program is used, what it computes, what was measured, and how the library is used.
//!
//! | page | what it is about |
//! |---|---|
//! | [`running`] | a prompt answered: the script and its variables, commands and options, logs, pictures, two caches compared |
//! | [`chat_and_batch`] | conversations, messages with tools, many prompts at a time |
//! | [`saved_caches`] | texts that are read once; a folder of what was read; the format of the files |
//! | [`bounds`] | a budget in bytes that always holds; beyond the model's context |
//! | [`models`] | which model files are read, from where, in which numbers |
//! | [`configuration`] | what decides what is kept: `FastGen`'s search, every key |
//! | [`methods`] | methods with a budget; how `replay` works |
//! | [`fidelity`] | what a smaller cache costs; how to find the setting that a limit allows |
//! | [`speed`] | time and memory, beside llama.cpp; quantised caches, long prompts, large models |
//! | [`devices`] | the CPU's kernels and candle operations; building for a GPU, and checking one |
//! | [`library`] | the same from a program of one's own |
//! | [`design`] | how it works, and where what is |
//! | [`development`] | adding a policy or a method; checks |
//!
//! Each is a Markdown file in `src/guide`, to be read there as well. Figures stand beside the command and the machine that
//! they come from.
#![allow(clippy::doc_markdown, reason = "names of methods and programs stand as their authors write them")]

#[doc = include_str!("bounds.md")]
pub mod bounds {}
#[doc = include_str!("chat_and_batch.md")]
pub mod chat_and_batch {}
#[doc = include_str!("configuration.md")]
pub mod configuration {}
#[doc = include_str!("design.md")]
pub mod design {}
#[doc = include_str!("development.md")]
pub mod development {}
#[doc = include_str!("devices.md")]
pub mod devices {}
#[doc = include_str!("fidelity.md")]
pub mod fidelity {}
#[doc = include_str!("library.md")]
pub mod library {}
#[doc = include_str!("methods.md")]
pub mod methods {}
#[doc = include_str!("models.md")]
pub mod models {}
#[doc = include_str!("running.md")]
pub mod running {}
#[doc = include_str!("saved_caches.md")]
pub mod saved_caches {}
#[doc = include_str!("speed.md")]
pub mod speed {}
