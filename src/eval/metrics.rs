//! Numbers that sum up many: all of them NaN of nothing, since there is no such number.

/// The arithmetic mean.
#[must_use]
#[expect(clippy::cast_precision_loss)]
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The value that a share of all values lie below, between neighbours in proportion.
///
/// * `share`: in 0..=1: 0.5 is the median, 0 the smallest, 1 the largest
#[must_use]
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = share.clamp(0.0, 1.0) * last as f64;
    let (lower, upper) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    lower + (upper - lower) * place.fract()
}

/// The perplexity `exp(-mean)` of log-probabilities in nats.
#[must_use]
pub fn perplexity(logprobs: &[f64]) -> f64 {
    (-mean(logprobs)).exp()
}

/// The standard error of the mean of independent values; `None` for fewer than two.
#[must_use]
#[expect(clippy::cast_precision_loss)]
pub fn standard_error(values: &[f64]) -> Option<f64> {
    let count = values.len() as f64;
    let center = mean(values);
    let squares: f64 = values.iter().map(|value| (value - center).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (count - 1.0) / count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let values = [4.0, 1.0, 3.0, 2.0];
        for (share, expected) in [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.25, 1.75), (0.99, 3.97), (7.0, 4.0)] {
            assert!((percentile(&values, share) - expected).abs() < 1e-12, "{share}");
        }
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
        assert_eq!(percentile(&[1.0, 9.0, 2.0], 0.5), 2.0);
    }

    #[test]
    fn perplexity_is_the_inverse_geometric_mean() {
        let logprobs = [0.5f64.ln(), 0.125f64.ln()];
        assert!((perplexity(&logprobs) - 4.0).abs() < 1e-12);
        assert_eq!(perplexity(&[0.0, 0.0]), 1.0);
    }

    #[test]
    fn the_standard_error_needs_two_values() {
        assert_eq!((standard_error(&[]), standard_error(&[1.0])), (None, None));
        // Variance 2 of two values: the mean's is 1.
        assert!((standard_error(&[1.0, 3.0]).unwrap() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn nothing_has_no_number() {
        assert!(mean(&[]).is_nan() && percentile(&[], 0.5).is_nan() && perplexity(&[]).is_nan());
    }
}
