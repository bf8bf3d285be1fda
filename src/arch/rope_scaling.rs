//! How scaling methods that treat frequencies differently make their divisors.
//!
//! * Llama 3.1: `apply_scaling` in Meta's <https://github.com/meta-llama/llama-models>, and
//!   `modeling_rope_utils.py` of <https://github.com/huggingface/transformers>
//! * `YaRN`: Peng et al., arXiv 2309.00071, section 3, with the constants of the same file of transformers
//!
//! Not for: reading settings from files (see [`crate::checkpoint`]), nor for rotating (see [`super::Rope`]).

use std::f64::consts::PI;

/// Llama 3.1's scaling: low frequencies are divided by `factor`, high ones stay, those between are interpolated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Divisor of the low frequencies; above 0.
    pub factor: f64,
    /// Turns within the original context below which a frequency is low.
    pub low_freq_factor: f64,
    /// Turns within the original context above which a frequency is high; more than `low_freq_factor`.
    pub high_freq_factor: f64,
    /// Tokens of the context that the model was first trained on.
    pub original_context: usize,
}

impl Llama3Scaling {
    /// The divisors of the `dim / 2` frequencies of base `theta`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    pub fn divisors(&self, theta: f64, dim: usize) -> Vec<f32> {
        let Self { factor, low_freq_factor, high_freq_factor, .. } = *self;
        let divisor = |i: usize| {
            let wavelength = 2.0 * PI * theta.powf(2.0 * i as f64 / dim as f64);
            let turns = self.original_context as f64 / wavelength;
            if turns > high_freq_factor {
                1.0
            } else if turns < low_freq_factor {
                factor
            } else {
                let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        (0..dim / 2).map(|i| divisor(i) as f32).collect()
    }
}

/// `YaRN`: frequencies that turn often within the original context stay, those that turn rarely are divided by
/// `factor`, with a ramp between.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnScaling {
    /// Divisor of the low frequencies; above 0.
    pub factor: f64,
    /// Tokens of the context that the model was first trained on.
    pub original_context: usize,
    /// Turns within the original context where the ramp begins.
    pub beta_fast: f64,
    /// Turns within the original context where the ramp ends.
    pub beta_slow: f64,
    /// Whether the ramp begins and ends at whole indices.
    pub truncate: bool,
}

impl YarnScaling {
    /// `YaRN`'s own constants, 32 and 1 turns.
    #[must_use]
    pub fn new(factor: f64, original_context: usize) -> Self {
        Self { factor, original_context, beta_fast: 32.0, beta_slow: 1.0, truncate: true }
    }

    /// By how much sines and cosines are multiplied for positions that are `scale` times as dense: `0.1 * weight *
    /// ln(scale) + 1`.
    #[must_use]
    pub fn attention_factor(scale: f64, weight: f64) -> f64 {
        if scale <= 1.0 { 1.0 } else { 0.1 * weight * scale.ln() + 1.0 }
    }

    /// The divisors of the `dim / 2` frequencies of base `theta`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
    pub fn divisors(&self, theta: f64, dim: usize) -> Vec<f32> {
        // The index, not necessarily whole, of the frequency that turns so often within the original context.
        let index =
            |turns: f64| dim as f64 * (self.original_context as f64 / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (index(self.beta_fast), index(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let divisor = |i: usize| {
            let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            1.0 / (divided / self.factor + (1.0 - divided))
        };
        (0..dim / 2).map(|i| divisor(i) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against Meta's `apply_scaling` in double precision.
    #[test]
    fn frequencies_of_llama_3_1() {
        let scaling =
            Llama3Scaling { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let divisors = scaling.divisors(500_000.0, 128);
        assert_eq!((divisors[28], divisors[36], divisors[63]), (1.0, 8.0, 8.0));
        for (i, expected) in [1.207_484, 1.553_415, 2.026_313, 2.694_53, 3.684_253, 5.257_327, 8.0].iter().enumerate() {
            let got = divisors[29 + i];
            assert!((got - expected).abs() < 1e-5, "{i}: {got}");
        }
    }
}
