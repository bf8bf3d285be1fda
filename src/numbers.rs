//! Whether numbers are numbers: what a model computes of damaged or overflowing weights must not pass for a result.
//!
//! Not for: deciding what to do about it; callers make an [`Error::NotANumber`] that says where.

use crate::error::{Error, Result};

/// Whether a row of logits makes a distribution: none is NaN, and the largest is finite. Some may be minus infinity.
#[must_use]
pub fn is_distribution(logits: &[f32]) -> bool {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    largest.is_finite() && !has_nan(logits)
}

/// Whether a number is NaN.
#[must_use]
pub fn has_nan(numbers: &[f32]) -> bool {
    // Without an early end, so that several are looked at at a time.
    numbers.iter().fold(false, |found, number| found | number.is_nan())
}

/// Whether all numbers are finite.
#[must_use]
pub fn all_finite(numbers: &[f32]) -> bool {
    numbers.iter().fold(true, |all, number| all & number.is_finite())
}

/// What rounding leaves a little below 0, or at minus 0, as 0; NaN as it is.
#[must_use]
pub fn at_least_zero(number: f64) -> f64 {
    if number <= 0.0 { 0.0 } else { number }
}

/// Refuses logits that make no distribution.
///
/// * `seen`: tokens before the one that they are for
///
/// # Errors
/// [`Error::NotANumber`] with the position.
pub(crate) fn check_logits(logits: &[f32], seen: usize) -> Result<()> {
    if is_distribution(logits) {
        return Ok(());
    }
    Err(Error::not_a_number(format!("the model's scores for the token at position {seen}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_has_no_nan_and_a_finite_best() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        for (logits, expected) in [
            (vec![0.0, -1.0], true),
            (vec![-inf, 3.0], true),
            (vec![nan, 3.0], false),
            (vec![3.0, -nan], false),
            (vec![-inf, -inf], false),
            (vec![inf, 0.0], false),
            (vec![], false),
        ] {
            assert_eq!(is_distribution(&logits), expected, "{logits:?}");
        }
        assert!(all_finite(&[1.0, -2.0]) && !all_finite(&[1.0, inf]) && !all_finite(&[nan]));
        assert!(has_nan(&[1.0, nan, 2.0]) && !has_nan(&[inf, -inf]));
    }

    #[test]
    fn nothing_is_below_zero_or_minus_zero() {
        for number in [-0.0, -1e-9, 0.0] {
            assert_eq!(format!("{:.5}", at_least_zero(number)), "0.00000");
        }
        assert_eq!(at_least_zero(0.25), 0.25);
        assert!(at_least_zero(f64::NAN).is_nan());
    }
}
