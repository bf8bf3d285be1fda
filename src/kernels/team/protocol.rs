//! The numbers by which threads agree on who does what: the chunks of a phase, and who is inside of a job.
//!
//! Takes its atomic numbers and its ways of waiting from the module around it: a test compiles this file once more with
//! those of `loom`, which tries the orders in which threads and memory may act.
//!
//! Not for: starting threads, or handing them a job (see [`Team`](super::Team)).

use super::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use super::{Patience, wait_until};

/// Who is inside of the current job.
#[derive(Default)]
pub(super) struct Gate {
    /// [`OPEN`](Self::OPEN) while it may be entered, and twice the threads inside.
    users: AtomicUsize,
    patience: Patience,
}

/// A thread inside of a [`Gate`], until it is dropped.
pub(super) struct Inside<'a>(&'a Gate);

impl Gate {
    const OPEN: usize = 1;
    const ONE: usize = 2;

    pub(super) fn new(patience: Patience) -> Self {
        Self { patience, ..Self::default() }
    }

    /// `None` if the gate is closed.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let enter = |state: usize| (state & Self::OPEN != 0).then_some(state + Self::ONE);
        self.users.fetch_update(Ordering::AcqRel, Ordering::Acquire, enter).ok().map(|_| Inside(self))
    }

    pub(super) fn open(&self) {
        self.users.store(Self::OPEN, Ordering::Release);
    }

    /// Lets nobody in any more, and waits until all have left; what they did is then seen.
    pub(super) fn close(&self) {
        self.users.fetch_and(!Self::OPEN, Ordering::AcqRel);
        wait_until(self.patience, || self.users.load(Ordering::Acquire) == 0);
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.users.fetch_sub(Gate::ONE, Ordering::AcqRel);
    }
}

/// How far a job is.
#[derive(Default)]
pub(super) struct Progress {
    /// The current phase in the upper half, its next chunk in the lower.
    claims: AtomicU64,
    /// Chunks of the current phase that are done.
    done: AtomicUsize,
    broken: AtomicBool,
    patience: Patience,
}

impl Progress {
    pub(super) fn new(patience: Patience) -> Self {
        Self { patience, ..Self::default() }
    }

    /// Begins anew; to be called while nobody else looks.
    pub(super) fn reset(&self) {
        self.claims.store(0, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.broken.store(false, Ordering::Relaxed);
    }

    /// Says that a thread will never finish its chunk.
    pub(super) fn set_broken(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Claims chunks of a phase, does them, and returns when all of the phase are done, or when it is over already.
    ///
    /// * `phase`: below 2^32 - 1
    /// * `count`: number of chunks, above 0 and below 2^32, the same on every thread
    ///
    /// # Panics
    /// If a thread is broken while this one waits, or a number is too large.
    pub(super) fn phase(&self, phase: u64, count: usize, mut work: impl FnMut(usize)) {
        // Both share one number: a chunk must never be claimed twice, since unsafe code builds on that.
        assert!(u32::try_from(count).is_ok() && phase < u64::from(u32::MAX), "phase {phase} of {count} chunks");
        loop {
            let claims = self.claims.load(Ordering::Acquire);
            #[expect(clippy::cast_possible_truncation)]
            let chunk = (claims & u64::from(u32::MAX)) as usize;
            if claims >> 32 != phase {
                return;
            }
            if chunk >= count {
                break;
            }
            if self.claims.compare_exchange_weak(claims, claims + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            work(chunk);
            if self.done.fetch_add(1, Ordering::AcqRel) + 1 == count {
                self.done.store(0, Ordering::Relaxed);
                self.claims.store((phase + 1) << 32, Ordering::Release);
                return;
            }
        }
        wait_until(self.patience, || {
            assert!(!self.is_broken(), "another thread of the team panicked");
            self.claims.load(Ordering::Acquire) >> 32 != phase
        });
    }
}
