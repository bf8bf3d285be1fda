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

/// A mean and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub mean: f64,
    /// Half of the 95 % confidence interval around it; `None` for fewer than two values.
    pub half_width: Option<f64>,
}

/// The mean of `a[i] - b[i]`, with Student's 95 % confidence interval: what the same samples share, such as being hard,
/// does not widen it. Where no sample differs it is 0, which says only that differences are rare: below about `3 / n` of all
/// samples.
///
/// * `a`, `b`: `[samples]`
#[must_use]
pub fn paired_difference(a: &[f64], b: &[f64]) -> Interval {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let half_width = standard_error(&differences).map(|error| error * student_975(differences.len() - 1));
    Interval { mean: mean(&differences), half_width }
}

/// The number below which 97.5 % of Student's t distribution lie.
///
/// * `freedom`: degrees of freedom, at least 1
#[must_use]
#[expect(clippy::cast_precision_loss)]
pub fn student_975(freedom: usize) -> f64 {
    /// For one degree of freedom and more.
    const FEW: [f64; 10] = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281];
    /// Of the normal distribution.
    const NORMAL: f64 = 1.959_964;
    if let Some(value) = freedom.checked_sub(1).and_then(|index| FEW.get(index)) {
        return *value;
    }
    // Fisher's expansion (Abramowitz and Stegun, 26.7.5): beyond ten degrees right to four digits.
    let (z, n) = (NORMAL, freedom.max(1) as f64);
    let terms = [
        (z.powi(3) + z) / 4.0,
        (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0,
        (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0,
        (79.0 * z.powi(9) + 776.0 * z.powi(7) + 1482.0 * z.powi(5) - 1920.0 * z.powi(3) - 945.0 * z) / 92_160.0,
    ];
    terms.into_iter().rev().fold(0.0, |sum, term| (sum + term) / n) + z
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
    fn students_distribution_is_as_in_tables() {
        for (freedom, expected) in [(1, 12.7062), (4, 2.7764), (10, 2.2281), (11, 2.2010), (19, 2.0930), (49, 2.0096)] {
            assert!((student_975(freedom) - expected).abs() < 1e-4, "{freedom}");
        }
        assert!((student_975(100_000) - 1.95999).abs() < 1e-4);
    }

    #[test]
    fn differences_are_taken_sample_by_sample() {
        let Interval { mean, half_width } = paired_difference(&[1.0, 0.5, 0.0], &[1.0, 1.0, 1.0]);
        // 0, -0.5 and -1: a standard deviation of 0.5.
        assert!((mean + 0.5).abs() < 1e-12);
        assert!((half_width.unwrap() - 4.3027 * 0.5 / 3f64.sqrt()).abs() < 1e-9);
        assert_eq!(paired_difference(&[1.0], &[0.0]), Interval { mean: 1.0, half_width: None });
        assert_eq!(paired_difference(&[0.3; 4], &[0.3; 4]).half_width, Some(0.0));
    }

    #[test]
    fn nothing_has_no_number() {
        assert!(mean(&[]).is_nan() && percentile(&[], 0.5).is_nan() && perplexity(&[]).is_nan());
    }
}
