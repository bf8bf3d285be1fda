//! How far two next-token distributions agree: what a smaller cache costs.

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
#[must_use]
pub fn kl_divergence(reference: &[f32], other: &[f32]) -> f64 {
    let terms = reference.iter().zip(other).filter(|(p, _)| **p > f32::NEG_INFINITY).map(|(&p, &q)| {
        let (p, q) = (f64::from(p), f64::from(q));
        p.exp() * (p - q)
    });
    let divergence = terms.sum::<f64>();
    // Rounding may leave it a little below 0; what is not a number must not look like agreement.
    if divergence < 0.0 { 0.0 } else { divergence }
}

/// Index of the largest value; of equal ones the lowest. `None` for an empty row.
#[must_use]
pub fn argmax(row: &[f32]) -> Option<usize> {
    row.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i))).map(|(index, _)| index)
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
            kl_mean: pairs().map(|(p, q)| kl_divergence(p, q)).sum::<f64>() / count,
            top1_agreement: pairs().filter(|(p, q)| argmax(p) == argmax(q)).count() as f64 / count,
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
        assert!(kl_divergence(&p, &[f32::NAN; 2]).is_nan());
    }

    #[test]
    fn argmax_takes_the_first_of_equals() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(argmax(&[]), None);
    }
}
