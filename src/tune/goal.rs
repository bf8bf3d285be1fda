//! What is looked for: the limit, what it is held against, and which of two points is better.

use serde::{Serialize, Serializer};

use super::search::Wanted;
use crate::eval::FidelityRow;

/// Sums of decimal fractions may miss the number that is meant by so much.
const ROUNDING: f64 = 1e-9;

/// What must not be exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Mean KL divergence from the full cache, in nats: the smallest cache within it is looked for.
    MaxKl(f64),
    /// Bytes of the prompt's kept keys and values: the least divergence within them is looked for.
    MaxBytes(usize),
    /// Kept share of the prompt's keys and values, in 0..=1, whatever the numbers they are stored in: the least
    /// divergence within it is looked for.
    #[serde(rename = "max_kept_ratio")]
    MaxKept(f64),
}

impl Limit {
    /// Which end of the settings within the limit is the best.
    pub(super) fn wanted(self) -> Wanted {
        match self {
            Self::MaxKl(_) => Wanted::Lowest,
            Self::MaxBytes(_) | Self::MaxKept(_) => Wanted::Highest,
        }
    }
}

/// What a point is judged by, where several windows were measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judge {
    /// The mean over all windows.
    Mean,
    /// The worst window: the largest divergence, the largest size.
    Worst,
}

/// A limit, and how it is held.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    pub limit: Limit,
    pub judge: Judge,
}

impl Serialize for Goal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Keys {
            limit: Limit,
            worst_window: bool,
        }
        Keys { limit: self.limit, worst_window: self.judge == Judge::Worst }.serialize(serializer)
    }
}

/// What a point comes to, as it is judged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    /// In nats.
    pub kl: f64,
    pub kv_bytes: usize,
    /// In 0..=1.
    pub kept_ratio: f64,
}

impl Goal {
    /// What a row comes to.
    #[must_use]
    pub fn figures(self, row: &FidelityRow) -> Figures {
        let largest = |mean: f64, by_window: &[f64]| match self.judge {
            Judge::Worst if !mean.is_nan() => by_window.iter().copied().fold(mean, f64::max),
            _ => mean,
        };
        let largest_bytes = row.kv_bytes_by_window.iter().copied().max().filter(|_| self.judge == Judge::Worst);
        Figures {
            kl: largest(row.kl_mean, &row.kl_by_window),
            kv_bytes: largest_bytes.unwrap_or(row.kv_bytes),
            kept_ratio: largest(row.kept_ratio, &row.kept_ratio_by_window),
        }
    }

    /// Whether the limit holds.
    #[must_use]
    pub fn allows(self, figures: &Figures) -> bool {
        match self.limit {
            Limit::MaxKl(kl) => figures.kl <= kl,
            Limit::MaxBytes(bytes) => figures.kv_bytes <= bytes,
            Limit::MaxKept(ratio) => figures.kept_ratio <= ratio + ROUNDING,
        }
    }

    /// Whether `a` is better than `b`, if the limit holds for both: smaller, or less divergent; of equal ones, better in
    /// the other respect. A divergence that is no number is never better.
    pub(super) fn prefers(self, a: Figures, b: Figures) -> bool {
        let (bytes, kl) = (a.kv_bytes.cmp(&b.kv_bytes), a.kl.total_cmp(&b.kl));
        let order = if self.limit.wanted() == Wanted::Lowest { bytes.then(kl) } else { kl.then(bytes) };
        order.is_lt() && !a.kl.is_nan()
    }

    /// Index of the best within the limit; of equal ones the first.
    pub(super) fn best(self, all: &[Figures]) -> Option<usize> {
        let mut best: Option<usize> = None;
        for (index, &figures) in all.iter().enumerate() {
            let is_usable = self.allows(&figures) && !figures.kl.is_nan();
            if is_usable && best.is_none_or(|best| self.prefers(figures, all[best])) {
                best = Some(index);
            }
        }
        best
    }

    /// Index of the one that exceeds the limit least, or is farthest within it.
    pub(super) fn closest(self, all: &[Figures]) -> Option<usize> {
        let closest = all.iter().enumerate().min_by(|(_, a), (_, b)| match self.limit {
            Limit::MaxKl(_) => a.kl.total_cmp(&b.kl),
            Limit::MaxBytes(_) => a.kv_bytes.cmp(&b.kv_bytes),
            Limit::MaxKept(_) => a.kept_ratio.total_cmp(&b.kept_ratio),
        });
        closest.map(|(index, _)| index)
    }
}
