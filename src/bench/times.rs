//! What several times of the same work come to.

use serde::Serialize;

use crate::clock::Clock;

/// Runs `work`; its result, and how long it took in milliseconds.
pub(super) fn timed<T>(clock: &dyn Clock, work: impl FnOnce() -> T) -> (T, f64) {
    let started = clock.now();
    let result = work();
    (result, clock.now().saturating_sub(started).as_secs_f64() * 1e3)
}

/// The middle and the ends of some times, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median_ms: f64,
    pub min_ms: f64,
    pub max_ms: f64,
}

impl Spread {
    /// Of `times_ms`, in any order; `None` if there are none. Of an even number, the median lies between the middle two.
    #[must_use]
    pub fn of(times_ms: &[f64]) -> Option<Self> {
        let mut sorted = times_ms.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&min_ms, &max_ms) = (sorted.first()?, sorted.last()?);
        let upper = sorted.len() / 2;
        let lower = (sorted.len() - 1) / 2;
        Some(Self { median_ms: f64::midpoint(sorted[lower], sorted[upper]), min_ms, max_ms })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;

    /// A clock on which each look takes one millisecond more than the look before: 1, 2, 3, ...
    #[derive(Debug, Default)]
    pub struct SlowingClock {
        looks: AtomicU64,
    }

    impl Clock for SlowingClock {
        fn now(&self) -> Duration {
            let looks = self.looks.fetch_add(1, Ordering::Relaxed) + 1;
            Duration::from_millis(looks * (looks + 1) / 2)
        }
    }

    #[test]
    fn work_is_timed_by_the_clock_it_is_given() {
        let clock = SlowingClock::default();
        let times: Vec<f64> = (0..3).map(|_| timed(&clock, || ()).1).collect();
        assert_eq!(times, [2.0, 4.0, 6.0]);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        let spread = |times: &[f64]| Spread::of(times).map(|spread| (spread.median_ms, spread.min_ms, spread.max_ms));
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[5.0]), Some((5.0, 5.0, 5.0)));
        assert_eq!(spread(&[9.0, 1.0, 2.0]), Some((2.0, 1.0, 9.0)));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 90.0]), Some((3.0, 1.0, 90.0)));
    }
}
