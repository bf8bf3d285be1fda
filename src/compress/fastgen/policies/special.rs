//! `special`: special tokens and the attention sink.

use super::{HeadFacts, Policy};
use crate::compress::fastgen::FastGen;

/// Keeps special (control) tokens, and the first `sink_tokens` positions.
///
/// A Llama-2 prompt begins with `<s>`, which is both; a model without BOS keeps its attention sink by the second rule.
#[derive(Debug)]
pub struct Special;

impl Policy for Special {
    fn name(&self) -> &'static str {
        "special"
    }

    fn summary(&self) -> &'static str {
        "special tokens, and the first `sink_tokens` positions"
    }

    fn mark(&self, facts: &HeadFacts<'_>, settings: &FastGen, keep: &mut [bool]) {
        for ((keep, class), &position) in keep.iter_mut().zip(facts.classes).zip(facts.positions) {
            *keep |= class.special || (position as usize) < settings.sink_tokens;
        }
    }
}
