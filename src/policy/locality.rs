//! `locality`: the most recent positions.

use super::{HeadFacts, Policy, PolicySettings, ratio_count};

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

    fn mark(&self, _facts: &HeadFacts<'_>, settings: &PolicySettings, keep: &mut [bool]) {
        let start = keep.len() - ratio_count(settings.locality_ratio, keep.len());
        keep[start..].fill(true);
    }

    fn window(&self, prompt_len: usize, settings: &PolicySettings) -> Option<usize> {
        Some(ratio_count(settings.locality_ratio, prompt_len))
    }
}
