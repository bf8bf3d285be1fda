//! The one setting of a configuration that says how much is kept, in steps.

use crate::compress::{AdaptiveConfig, Budget, Compression};

/// What is searched: the higher, the more is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Knob {
    /// `kept_ratio` of a method with a budget, in steps of 1/200. At 0 every head keeps one position.
    KeptRatio,
    /// `recovery_threshold` of FastGen's search, in steps of 1/1000: the share that is kept changes quickly near 1.
    RecoveryThreshold,
}

impl Knob {
    /// The knob of a configuration; `None` if it keeps everything, whatever its settings.
    #[must_use]
    pub fn of(config: &AdaptiveConfig) -> Option<Self> {
        match &config.method {
            Compression::Budgeted(_) => Some(Self::KeptRatio),
            Compression::FastGen(search) => (search.policies.num_levels() > 1).then_some(Self::RecoveryThreshold),
        }
    }

    /// The highest step; the lowest is 0.
    #[must_use]
    pub fn last_step(self) -> usize {
        match self {
            Self::KeptRatio => 200,
            Self::RecoveryThreshold => 1000,
        }
    }

    /// The setting's value at a step, in 0..=1.
    #[must_use]
    #[expect(clippy::cast_precision_loss)] // small counts
    pub fn value(self, step: usize) -> f64 {
        step.min(self.last_step()) as f64 / self.last_step() as f64
    }

    /// The configuration with the setting at a step, and all else as it is. A budget in bytes gives way to a share.
    #[must_use]
    pub fn turned(self, config: &AdaptiveConfig, step: usize) -> AdaptiveConfig {
        let mut config = config.clone();
        match &mut config.method {
            Compression::Budgeted(method) => method.budget = Budget::KeptRatio(self.value(step)),
            Compression::FastGen(search) => search.recovery_threshold = self.value(step),
        }
        config
    }
}
