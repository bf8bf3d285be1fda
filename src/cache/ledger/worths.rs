//! Scores of the rows that were decided about, for when they are judged together with others.

/// For each KV head the scores of its first rows, in their order; of fewer digits than a score has, which the order of
/// scores hardly needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Worths(Vec<Vec<u16>>);

/// Bytes of a row's score.
pub const WORTH_BYTES: usize = size_of::<u16>();

impl Worths {
    /// * `scores`: `[num_kv_heads]`; what is no finite number counts as much as the head's highest finite one
    pub fn new<'a>(scores: impl Iterator<Item = &'a [(u32, f32)]>) -> Self {
        Self(scores.map(of_head).collect())
    }

    /// * `worths`: `[num_kv_heads]`
    pub fn of_bits(worths: Vec<Vec<u16>>) -> Self {
        Self(worths)
    }

    /// `[num_kv_heads]`, or none at all.
    pub fn bits(&self) -> &[Vec<u16>] {
        &self.0
    }

    /// The scores of a head's first rows.
    pub fn of(&self, kv_head: usize) -> Vec<f32> {
        let bits = self.0.get(kv_head).map(Vec::as_slice).unwrap_or_default();
        bits.iter().map(|&bits| f32::from_bits(u32::from(bits) << 16)).collect()
    }

    /// Bytes that are allocated.
    pub fn allocated(&self) -> usize {
        self.0.iter().map(|head| head.capacity() * WORTH_BYTES).sum()
    }
}

fn of_head(scores: &[(u32, f32)]) -> Vec<u16> {
    let finite = scores.iter().map(|&(_, score)| score).filter(|score| score.is_finite());
    let most = finite.reduce(f32::max).unwrap_or(0.0);
    let upper = |score: f32| ((if score.is_finite() { score } else { most }).to_bits() >> 16) as u16;
    scores.iter().map(|&(_, score)| upper(score)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_keep_their_order_and_two_digits() {
        let scores = [(0, f32::INFINITY), (1, 1e-9), (5, 0.1234), (6, -2.0), (9, 3.0e7), (11, 0.0)];
        let worths = Worths::new([&scores[..], &[(3, f32::INFINITY)], &[]].into_iter());
        let of = worths.of(0);
        assert_eq!((of[0], of.len(), worths.of(1), worths.of(2)), (of[4], 6, vec![0.0], vec![]));
        for (score, &(_, expected)) in of.iter().zip(&scores).skip(1) {
            assert!((score - expected).abs() <= expected.abs() / 128.0, "{score} for {expected}");
        }
        assert!(of[3] < of[5] && of[5] < of[1] && of[1] < of[2] && of[2] < of[4]);
        assert_eq!(Worths::of_bits(worths.bits().to_vec()), worths);
        assert!(worths.allocated() >= 14 && Worths::default().of(0).is_empty());
    }
}
