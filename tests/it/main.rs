//! All integration tests in one binary: each one of its own would link candle again.

mod attention;
mod cli;
mod golden;
mod memory;
mod model;
mod support;
mod tokenizer;
