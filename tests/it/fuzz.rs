//! Inputs made at random, kind by kind: whatever comes, there is an error or a result that holds, soon and in bounded
//! memory. `scripts/fuzz.sh` runs these tests for as long as one likes; here each has some hundred cases.
//!
//! Not for: what a result should be.

mod harness;
mod inputs;
mod models;
mod saved;
mod texts;
pub mod tokenizers;
