//! How far two next-token distributions agree: what a smaller cache costs.
//!
//! What is not a number, on either side, is never taken for agreement.

use crate::numbers::{at_least_zero, has_nan};

/// Natural log-probabilities of a row of logits. An empty row stays empty.
#[must_use]
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    #[expect(clippy::cast_possible_truncation)]
    let log_sum = sum.ln() as f32;
    logits.iter().map(|&logit| logit - max - log_sum).collect()
}

/// Kullback-Leibler divergence `sum p (ln p - ln q)`, in nats, of two rows of log-probabilities.
///
/// * `reference`: p, the full cache's; `other`: q, the compressed cache's
///
/// NaN if either holds a NaN, or both are not equally long or empty; infinite if q rules out what p does not.
#[must_use]
pub fn kl_divergence(reference: &[f32], other: &[f32]) -> f64 {
    if reference.is_empty() || reference.len() != other.len() {
        return f64::NAN;
    }
    let terms = reference.iter().zip(other).map(|(&p, &q)| {
        let (p, q) = (f64::from(p), f64::from(q));
        // A token without any probability adds nothing, whatever the other says of it; but NaN is no such token.
        if p.exp() == 0.0 && !q.is_nan() { 0.0 } else { p.exp() * (p - q) }
    });
    // Rounding may leave it a little below 0.
    at_least_zero(terms.sum())
}

/// Index of the largest value; of equal ones the lowest. `None` for an empty row, and for one that holds a NaN.
#[must_use]
pub fn argmax(row: &[f32]) -> Option<usize> {
    if has_nan(row) {
        return None;
    }
    row.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i))).map(|(index, _)| index)
}

/// Whether two rows have the same most probable token. `false` if either has none.
#[must_use]
pub fn same_top1(a: &[f32], b: &[f32]) -> bool {
    argmax(a).is_some_and(|top| argmax(b) == Some(top))
}

/// The `count` most probable tokens with their log-probabilities, most probable first; of equal ones the lower id.
///
/// * `logits`: `[vocab_size]`
#[must_use]
pub fn top_logprobs(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let logprobs = log_softmax(logits);
    let mut order: Vec<u32> = (0u32..).take(logprobs.len()).collect();
    order.sort_by(|&a, &b| logprobs[b as usize].total_cmp(&logprobs[a as usize]).then(a.cmp(&b)));
    order.into_iter().take(count).map(|id| (id, logprobs[id as usize])).collect()
}

/// How well one run agrees with another.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Agreement {
    /// Tokens of the reference's own text that are the same before the first difference.
    pub equal_tokens: usize,
    /// Tokens of the reference's own text.
    pub reference_tokens: usize,
    /// Mean KL divergence of the next-token distributions on the reference's text, in nats.
    pub kl_mean: f64,
    /// Share of positions on the reference's text at which the most probable token is the same.
    pub top1_agreement: f64,
    /// Positions over which the last two were taken.
    pub positions: usize,
}

impl Agreement {
    /// Compares two texts and, position by position, the distributions on the first one's text.
    ///
    /// * `reference_ids`, `other_ids`: what each run generated on its own
    /// * `reference`, `other`: `[positions]` rows of log-probabilities on the reference's text
    #[must_use]
    #[expect(clippy::cast_precision_loss)]
    pub fn measure(reference_ids: &[u32], other_ids: &[u32], reference: &[Vec<f32>], other: &[Vec<f32>]) -> Self {
        let positions = reference.len().min(other.len());
        let pairs = || reference.iter().zip(other);
        let count = positions.max(1) as f64;
        Self {
            equal_tokens: reference_ids.iter().zip(other_ids).take_while(|(a, b)| a == b).count(),
            reference_tokens: reference_ids.len(),
            kl_mean: at_least_zero(pairs().map(|(p, q)| kl_divergence(p, q)).sum::<f64>() / count),
            top1_agreement: pairs().filter(|(p, q)| same_top1(p, q)).count() as f64 / count,
            positions,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_distributions_have_no_divergence_and_unequal_ones_the_known_one() {
        let p = log_softmax(&[0.0, 0.0]);
        let q = log_softmax(&[0.0, 3f32.ln()]);
        assert_eq!(kl_divergence(&p, &p), 0.0);
        // p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3)
        let expected = 0.5 * 2f64.ln() + 0.5 * (2.0 / 3.0f64).ln();
        assert!((kl_divergence(&p, &q) - expected).abs() < 1e-6);
        assert_eq!(format!("{:.5}", kl_divergence(&[0.0, f32::NEG_INFINITY], &[0.0, -1.0])), "0.00000");
    }

    #[test]
    fn what_is_not_a_number_never_agrees() {
        let (p, nan) = (log_softmax(&[0.0, 1.0]), f32::NAN);
        for bad in [[nan; 2], [nan, 0.0], [0.0, -nan], [f32::NEG_INFINITY, nan]] {
            assert!(kl_divergence(&p, &bad).is_nan() && kl_divergence(&bad, &p).is_nan(), "{bad:?}");
            assert!(!same_top1(&bad, &bad), "{bad:?}");
            let agreement = Agreement::measure(&[1], &[1], &[bad.to_vec()], &[bad.to_vec()]);
            assert!(agreement.kl_mean.is_nan() && agreement.top1_agreement == 0.0, "{agreement:?}");
        }
        // All minus infinity: no distribution either.
        assert!(kl_divergence(&log_softmax(&[f32::NEG_INFINITY; 2]), &p).is_nan());
        assert!(kl_divergence(&[], &[]).is_nan() && kl_divergence(&p, &p[..1]).is_nan());
        // What one rules out and the other does not is infinitely far, not unknown.
        assert_eq!(kl_divergence(&p, &[0.0, f32::NEG_INFINITY]), f64::INFINITY);
        // A text of one token has no positions to compare.
        let agreement = Agreement::measure(&[1], &[1], &[], &[]);
        assert_eq!(format!("{:.5}", agreement.kl_mean), "0.00000");
    }

    #[test]
    fn argmax_takes_the_first_of_equals() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(argmax(&[]), None);
    }
}
