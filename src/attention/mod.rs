//! Attention over a prompt and over a ragged cache.
//!
//! [`prefill`] processes a block of query rows against all keys up to them and collects what profiling needs from the
//! same pass; [`replay`] asks a prompt's queries again, as if they came after it; [`repeat`] tells what is looked at when the
//! prompt does come again; [`decode`] attends from one new token over heads that each keep their own rows. Grouped-query attention is
//! native: keys and values are read once for all query heads that share them, and never repeated.
//! [`refit`] changes values of keys that stay so that they answer for those that go.
//! Some methods look closer: [`last_rows`] at single rows, [`blocks`] both ways, [`outputs`] at what values write.
//!
//! Not for: deciding what is kept ([`crate::compress`]), or owning it ([`crate::cache`]).

pub mod blocks;
pub mod decode;
pub mod device;
pub mod last_rows;
pub mod map;
pub mod outputs;
pub mod prefill;
pub mod prompt_rows;
pub mod ragged;
pub mod refit;
pub mod repeat;
pub mod replay;
pub mod window;

use crate::error::{Error, Result};

pub use crate::arch::HeadLayout;

/// Checks a slice's length against the product of its dimensions.
fn expect_len(what: &'static str, slice: &[f32], dims: &[usize]) -> Result<()> {
    let expected = dims.iter().try_fold(1, |product: usize, &dim| product.checked_mul(dim));
    if expected == Some(slice.len()) { Ok(()) } else { Err(Error::shape(what, dims, slice.len())) }
}
