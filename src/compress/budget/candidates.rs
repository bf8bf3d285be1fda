//! What a head may keep when rows that it holds are judged together with new ones: positions, each with its score.

use super::allocation::Allocation;
use super::methods::ALWAYS;
use crate::compress::segment::HeadChoice;

/// Positions of a head and their scores, ascending by position.
pub type Candidates = Vec<(u32, f32)>;

/// Positions that go last, whatever their scores: the first of a sequence, and the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Safe {
    /// All positions before this one.
    pub before: u32,
    /// This position, and all behind it.
    pub from: u32,
}

/// Nothing is safe.
impl Default for Safe {
    fn default() -> Self {
        Self { before: 0, from: u32::MAX }
    }
}

impl Safe {
    /// Whether a position is among them.
    #[must_use]
    pub fn covers(self, position: u32) -> bool {
        position < self.before || position >= self.from
    }
}

impl HeadChoice {
    /// The choices of all that the heads of a layer may keep.
    ///
    /// * `heads`: `[num_kv_heads]`
    #[must_use]
    pub fn of_candidates(heads: &[Candidates]) -> Vec<Self> {
        let choice = |(kv_head, candidates): (usize, &Candidates)| {
            let positions = candidates.iter().map(|&(position, _)| position).collect();
            Self { kv_head, level: 0, recovered: Vec::new(), positions }
        };
        heads.iter().enumerate().map(choice).collect()
    }
}

/// What the heads of a layer keep of their candidates, were it the only layer.
///
/// * `budget`: positions of a head on average, as [`Allocation::layer_budget`] has it
#[must_use]
pub fn select(allocation: Allocation, budget: usize, safe: Safe, heads: &[Candidates]) -> Vec<Candidates> {
    // What a method always keeps goes before what is safe.
    let score = |&(position, score): &(u32, f32)| if safe.covers(position) { ALWAYS } else { score.min(f32::MAX) };
    let scores: Vec<Vec<f32>> = heads.iter().map(|head| head.iter().map(score).collect()).collect();
    let kept = allocation.select(&scores, budget);
    heads.iter().zip(kept).map(|(head, kept)| kept.into_iter().map(|index| head[index]).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_of_different_lengths_keep_what_is_safe_and_then_the_best() {
        let heads = vec![vec![(0, 0.0), (4, 3.0), (9, 1.0), (12, 0.5)], vec![(2, 7.0), (12, 0.1)]];
        let safe = Safe { before: 1, from: 12 };
        let kept = |allocation, budget| select(allocation, budget, safe, &heads);
        assert_eq!(kept(Allocation::Uniform, 3), [vec![(0, 0.0), (4, 3.0), (12, 0.5)], vec![(2, 7.0), (12, 0.1)]]);
        assert_eq!(kept(Allocation::Uniform, 1), [vec![(0, 0.0)], vec![(12, 0.1)]]);
        let adaptive = Allocation::Adaptive { safeguard: 0.0 };
        assert_eq!(kept(adaptive, 2), [vec![(0, 0.0), (12, 0.5)], vec![(2, 7.0), (12, 0.1)]]);
        let window = vec![vec![(4, ALWAYS), (5, ALWAYS), (12, 0.5), (13, 0.4)]];
        assert_eq!(select(Allocation::Uniform, 3, safe, &window), [vec![(4, ALWAYS), (12, 0.5), (13, 0.4)]]);
        assert!(!Safe::default().covers(0) && !Safe::default().covers(u32::MAX - 1));
    }
}
