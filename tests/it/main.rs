//! All integration tests in one binary: each one of its own would link candle again.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "tests compute with small known numbers"
)]

mod attend;
mod attention;
mod batch;
mod batch_turns;
mod bounds;
mod budget;
mod budget_over;
mod cache;
mod checkpoint;
mod chunks;
mod circles;
mod cli;
mod contract;
mod conversation;
mod device;
mod device_attention;
mod device_ragged;
mod draft;
mod empty;
#[cfg(unix)]
mod emulation;
mod eviction;
mod forks;
mod fuzz;
mod golden;
#[cfg(feature = "hub")]
mod hub;
mod jinja;
mod jinja_bounds;
mod jinja_fuzz;
mod kernels;
mod kvzip;
mod layers;
mod ledger;
mod library;
mod memory;
mod meta;
mod method_facts;
mod model;
mod numbers;
mod peers_script;
mod policy;
mod profile;
mod quantised;
mod qwen;
mod ragged;
mod refit;
mod replay;
mod replay_evict;
mod rkv;
mod saved;
mod second_model;
mod shape_script;
mod store;
mod support;
mod team_protocol;
mod tokenizer;
mod window;
mod writing;
