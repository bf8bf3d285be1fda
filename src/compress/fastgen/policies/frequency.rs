//! `frequency`: heavy hitters, the positions that received most attention.

use super::{HeadFacts, Policy};
use crate::compress::fastgen::FastGen;
use crate::compress::ratio_count;

/// Keeps the `frequency_ratio` of the prompt with the largest column sums; of equal sums the lower position.
///
/// While tokens are generated the share is of all tokens so far, and the candidates are those that are still held.
#[derive(Debug)]
pub struct Frequency;

impl Policy for Frequency {
    fn name(&self) -> &'static str {
        "frequency"
    }

    fn summary(&self) -> &'static str {
        "the `frequency_ratio` of the prompt that received most attention"
    }

    fn mark(&self, facts: &HeadFacts<'_>, settings: &FastGen, keep: &mut [bool]) {
        let sums = facts.column_sums;
        let count = ratio_count(settings.frequency_ratio, facts.segment_len).min(sums.len());
        if count == sums.len() {
            return keep[..count].fill(true);
        }
        if count == 0 {
            return;
        }
        let keys = || sums.iter().zip(facts.positions).map(|(&sum, &position)| key(sum, position));
        let mut order: Vec<u64> = keys().collect();
        let (_, &mut last, _) = order.select_nth_unstable(count - 1);
        for (keep, key) in keep.iter_mut().zip(keys()) {
            *keep |= key <= last;
        }
    }

    fn needs_column_sums(&self) -> bool {
        true
    }
}

/// A number that is the smaller, the larger the sum, and of equal sums the lower the position. Comparing numbers is several
/// times quicker than looking up what rows stand for, which counts where a row goes with every token. Positions differ, so
/// that this is a total order, and the selected set does not depend on the algorithm.
fn key(sum: f32, position: u32) -> u64 {
    // The order of `f32::total_cmp`: bits of negative numbers descend.
    let bits = sum.to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(!ascending) << 32 | u64::from(position)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_the_order_of_sums_and_then_positions() {
        let sums =
            [f32::NAN, f32::INFINITY, 2.5, 1.0, f32::MIN_POSITIVE, 0.0, -0.0, -1.0, f32::NEG_INFINITY, -f32::NAN];
        let in_order: Vec<(f32, u32)> = sums.iter().flat_map(|&sum| [0, 1, 7, u32::MAX].map(|at| (sum, at))).collect();
        assert!(in_order.is_sorted_by(|a, b| key(a.0, a.1) < key(b.0, b.1)));
        assert!(in_order.is_sorted_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).is_lt()));
    }
}
