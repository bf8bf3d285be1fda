//! `locality`: the most recent positions.

use super::{HeadFacts, Policy};
use crate::compress::fastgen::FastGen;
use crate::compress::ratio_count;

/// Keeps the last `locality_ratio` of the prompt.
///
/// While a prompt is profiled by recovered mass, the window slides with the query row; what is kept in the end is the
/// window of the last row.
#[derive(Debug)]
pub struct Locality;

impl Policy for Locality {
    fn name(&self) -> &'static str {
        "locality"
    }

    fn summary(&self) -> &'static str {
        "the last `locality_ratio` of the prompt"
    }

    fn mark(&self, facts: &HeadFacts<'_>, settings: &FastGen, keep: &mut [bool]) {
        let len = facts.segment_len;
        let start = facts.first_position + len - ratio_count(settings.locality_ratio, len);
        for (keep, &position) in keep.iter_mut().zip(facts.positions) {
            *keep |= position as usize >= start;
        }
    }

    fn window(&self, prompt_len: usize, settings: &FastGen) -> Option<usize> {
        Some(ratio_count(settings.locality_ratio, prompt_len))
    }
}
