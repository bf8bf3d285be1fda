//! `punctuation`: tokens that consist of punctuation only.

use super::{HeadFacts, Policy};
use crate::compress::fastgen::FastGen;

/// Keeps the positions whose token is punctuation.
#[derive(Debug)]
pub struct Punctuation;

impl Policy for Punctuation {
    fn name(&self) -> &'static str {
        "punctuation"
    }

    fn summary(&self) -> &'static str {
        "tokens made of characters of `punctuation_list` only"
    }

    fn mark(&self, facts: &HeadFacts<'_>, _settings: &FastGen, keep: &mut [bool]) {
        for (keep, class) in keep.iter_mut().zip(facts.classes) {
            *keep |= class.punctuation;
        }
    }
}
