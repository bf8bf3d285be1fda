//! `full`: everything.

use super::{HeadFacts, Policy};
use crate::compress::fastgen::FastGen;

/// Keeps every position: what a head gets that nothing smaller recovers.
#[derive(Debug)]
pub struct Full;

impl Policy for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn summary(&self) -> &'static str {
        "everything; ends the search, since it always recovers the head"
    }

    fn mark(&self, _facts: &HeadFacts<'_>, _settings: &FastGen, keep: &mut [bool]) {
        keep.fill(true);
    }

    fn keeps_all(&self) -> bool {
        true
    }
}
