//! `frequency`: heavy hitters, the positions that received most attention.

use super::{HeadFacts, Policy, PolicySettings, ratio_count};

/// Keeps the `frequency_ratio` of the prompt with the largest column sums; of equal sums the lower position.
#[derive(Debug)]
pub struct Frequency;

impl Policy for Frequency {
    fn name(&self) -> &'static str {
        "frequency"
    }

    fn summary(&self) -> &'static str {
        "the `frequency_ratio` of the prompt that received most attention"
    }

    fn mark(&self, facts: &HeadFacts<'_>, settings: &PolicySettings, keep: &mut [bool]) {
        let sums = facts.column_sums;
        let count = ratio_count(settings.frequency_ratio, keep.len()).min(sums.len());
        if count == 0 {
            return;
        }
        let mut order: Vec<usize> = (0..sums.len()).collect();
        // Position breaks ties, which makes this a total order: the selected set does not depend on the algorithm.
        order.select_nth_unstable_by(count - 1, |&a, &b| sums[b].total_cmp(&sums[a]).then(a.cmp(&b)));
        for &position in &order[..count] {
            keep[position] = true;
        }
    }

    fn needs_column_sums(&self) -> bool {
        true
    }
}
