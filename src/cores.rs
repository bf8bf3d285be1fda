//! How many threads are worth starting: the physical cores that this process may use.
//!
//! Two hardware threads of one core share its vector units and its caches, which is all that this program waits for, so a
//! core counts once. Of hybrid processors all cores count, the slow ones, too: threads claim work piece by piece, so that a
//! slow core takes fewer pieces and keeps nobody waiting. What the process may not use does not count: cores outside of
//! its affinity mask (`taskset`, a container's cpuset), and time beyond the CPU quota of its control group or of one
//! around it (a container's limit).
//!
//! Not for: pinning threads to cores. Where a core is shared with another process, a pinned thread waits for it, and its
//! team with it, while the next core idles; the system's scheduler moves one that is not.

#[cfg(target_os = "linux")]
mod linux;

/// Cores, and how much of them there is for this process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cores {
    /// Physical cores of the machine.
    pub machine: usize,
    /// Those of them that the process may run on, at least 1.
    pub allowed: usize,
    /// The most processor time that it may take, in seconds of one CPU a second; above 0.
    pub quota: Option<f64>,
}

/// What says how many threads there should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The machine has no more cores.
    Cores,
    /// The process may not run on all of them.
    Affinity,
    /// Its control group may not take more time.
    Quota,
}

impl Limit {
    /// As reports have it: `cores`, `affinity` or `quota`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cores => "cores",
            Self::Affinity => "affinity",
            Self::Quota => "quota",
        }
    }
}

impl Cores {
    /// Asks the system. What it does not tell does not limit: then every hardware thread that the process may run on is a
    /// core, and there is no quota.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_os = "linux")]
        if let Some(cores) = linux::cores() {
            return cores;
        }
        let allowed = std::thread::available_parallelism().map_or(1, usize::from);
        #[cfg(target_os = "linux")]
        let machine = allowed;
        #[cfg(not(target_os = "linux"))]
        let machine = num_cpus::get_physical().max(1);
        Self { machine, allowed: allowed.min(machine), quota: None }
    }

    /// How many threads should compute, at least 1, and why not more.
    ///
    /// A quota is rounded to the nearest number. Below half of a core's time, one more thread would spend more of it on
    /// waiting for the others than it adds, and all of them stand still once it is used up; above, the group would not
    /// get what it may take.
    #[must_use]
    pub fn threads(&self) -> (usize, Limit) {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "large ones saturate")]
        let quota = self.quota.map(|quota| (quota.round() as usize).max(1));
        match quota {
            Some(quota) if quota < self.allowed => (quota, Limit::Quota),
            _ if self.allowed < self.machine => (self.allowed.max(1), Limit::Affinity),
            _ => (self.allowed.max(1), Limit::Cores),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_limit_counts() {
        for (machine, allowed, quota, expected) in [
            (8, 8, None, (8, Limit::Cores)),
            (8, 3, None, (3, Limit::Affinity)),
            (8, 8, Some(4.0), (4, Limit::Quota)),
            (8, 3, Some(4.0), (3, Limit::Affinity)),
            (8, 3, Some(2.0), (2, Limit::Quota)),
            // As many cores as the quota is for: it takes nothing away.
            (4, 4, Some(4.0), (4, Limit::Cores)),
            (4, 4, Some(100.0), (4, Limit::Cores)),
            (4, 4, Some(1e300), (4, Limit::Cores)),
            (8, 8, Some(1.4), (1, Limit::Quota)),
            (8, 8, Some(1.5), (2, Limit::Quota)),
            (8, 8, Some(7.5), (8, Limit::Cores)),
            (8, 8, Some(0.01), (1, Limit::Quota)),
            (1, 1, Some(0.25), (1, Limit::Cores)),
        ] {
            assert_eq!(Cores { machine, allowed, quota }.threads(), expected, "{machine} {allowed} {quota:?}");
        }
    }

    /// Whatever this machine is.
    #[test]
    fn there_are_as_many_cores_as_hardware_threads_at_most() {
        let cores = Cores::detect();
        assert!(cores.allowed >= 1 && cores.allowed <= cores.machine, "{cores:?}");
        assert!(cores.quota.is_none_or(|quota| quota > 0.0), "{cores:?}");
        let (threads, _) = cores.threads();
        // The standard library knows of affinity and quotas, and not of siblings; it rounds quotas down.
        let hardware = std::thread::available_parallelism().unwrap().get();
        assert!(threads <= hardware + 1, "{threads} threads on {hardware}: {cores:?}");
    }
}
