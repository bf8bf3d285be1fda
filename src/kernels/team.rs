//! A team of threads that works on one job in step: phases divided by barriers, whose chunks threads claim as they get
//! to them.
//!
//! Decoding one token is some hundred small phases of a few microseconds. Handing each to a general thread pool costs as
//! much as the work itself; here the threads stay together for the whole token, and a barrier is two atomic operations.
//! Threads that wait spin first, then give their core away, so that a busy machine is not made slower; between jobs they
//! sleep.
//!
//! Not for: work in large pieces (prefill), which rayon spreads as well.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// How often a waiting thread looks before it gives its core away: some tens of microseconds.
const SPINS: usize = 1500;

/// How often a thread without a job gives its core away before it sleeps.
const YIELDS: usize = 50;

/// A job: every thread of the team runs it once.
type Job<'a> = dyn Fn(&Worker<'_>) + Sync + 'a;

/// Threads that stay together.
pub struct Team {
    shared: Arc<Shared>,
    /// Held while a job runs.
    busy: Mutex<()>,
}

struct Shared {
    size: usize,
    /// Counts jobs; its change announces one.
    generation: AtomicUsize,
    /// The job of the current generation.
    job: Mutex<Option<JobPointer>>,
    wake: Condvar,
    /// Threads other than the caller that have finished the job.
    finished: AtomicUsize,
    steps: Steps,
}

/// What the phases of a job are counted by.
#[derive(Default)]
struct Steps {
    arrived: AtomicUsize,
    barrier: AtomicUsize,
    next_chunk: AtomicUsize,
    broken: AtomicBool,
}

/// A job whose lifetime is not written down; [`Team::run`] returns only after every thread has left it.
#[derive(Clone, Copy)]
struct JobPointer(*const Job<'static>);

// SAFETY: the job is `Sync`, and `Team::run` keeps it alive for as long as threads use it.
unsafe impl Send for JobPointer {}

impl std::fmt::Debug for Team {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Team({} threads)", self.shared.size)
    }
}

/// One thread's view of a job.
#[derive(Debug)]
pub struct Worker<'a> {
    steps: &'a Steps,
    size: usize,
}

impl std::fmt::Debug for Steps {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Steps(barrier {})", self.barrier.load(Ordering::Relaxed))
    }
}

impl Worker<'_> {
    /// Threads that run this job.
    #[must_use]
    pub fn team_size(&self) -> usize {
        self.size
    }

    /// Claims the next of `count` chunks of this phase; `None` when all are taken.
    #[must_use]
    pub fn claim(&self, count: usize) -> Option<usize> {
        Some(self.steps.next_chunk.fetch_add(1, Ordering::Relaxed)).filter(|&chunk| chunk < count)
    }

    /// Waits until all threads are here, and starts the next phase. What was written before is seen behind it.
    ///
    /// # Panics
    /// If another thread of the team has panicked.
    pub fn barrier(&self) {
        let steps = self.steps;
        let barrier = steps.barrier.load(Ordering::Acquire);
        if steps.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.size {
            steps.arrived.store(0, Ordering::Relaxed);
            // Everybody is here, so nobody claims.
            steps.next_chunk.store(0, Ordering::Relaxed);
            steps.barrier.store(barrier.wrapping_add(1), Ordering::Release);
            return;
        }
        wait_until(|| {
            assert!(!steps.broken.load(Ordering::Relaxed), "another thread of the team panicked");
            steps.barrier.load(Ordering::Acquire) != barrier
        });
    }
}

/// Spins, then gives the core away, until `done`.
fn wait_until(mut done: impl FnMut() -> bool) {
    let mut spins = 0;
    while !done() {
        spins += 1;
        if spins < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// A panic elsewhere leaves nothing half-done behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// What a thread other than the caller does, until the program ends.
    fn work(&self) {
        let mut seen = 0;
        loop {
            let job = self.next_job(seen);
            seen = self.generation.load(Ordering::Acquire);
            let worker = Worker { steps: &self.steps, size: self.size };
            // SAFETY: `Team::run` waits for `finished` before it lets the job go.
            let job = unsafe { &*job.0 };
            if catch_unwind(AssertUnwindSafe(|| job(&worker))).is_err() {
                self.steps.broken.store(true, Ordering::Relaxed);
            }
            self.finished.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn next_job(&self, seen: usize) -> JobPointer {
        for look in 0..SPINS + YIELDS {
            if self.generation.load(Ordering::Acquire) != seen {
                break;
            }
            if look < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let mut job = lock(&self.job);
        loop {
            match *job {
                Some(job) if self.generation.load(Ordering::Acquire) != seen => return job,
                _ => job = self.wake.wait(job).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl Team {
    /// Starts `size - 1` threads, which the caller of [`run`](Self::run) joins. They sleep when there is nothing to do,
    /// and live until the program ends.
    ///
    /// # Errors
    /// Whatever the system says when it refuses a thread.
    pub fn start(size: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            size: size.max(1),
            generation: AtomicUsize::new(0),
            job: Mutex::new(None),
            wake: Condvar::new(),
            finished: AtomicUsize::new(0),
            steps: Steps::default(),
        });
        for index in 1..shared.size {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("team-{index}")).spawn(move || shared.work())?;
        }
        Ok(Self { shared, busy: Mutex::new(()) })
    }

    /// Runs a job on `size` threads, the calling one among them, and returns when all have left it. Teams are kept for
    /// later calls. If the team of this size has a job already, or the system has no more threads, the job runs on the
    /// calling thread alone.
    ///
    /// # Panics
    /// If the job does, on any thread.
    pub fn run_on(size: usize, job: &Job<'_>) {
        static TEAMS: Mutex<Vec<Arc<Team>>> = Mutex::new(Vec::new());
        if size <= 1 {
            return run_alone(job);
        }
        let team = {
            let mut teams = lock(&TEAMS);
            let known = teams.iter().find(|team| team.shared.size == size).cloned();
            known.or_else(|| {
                let team = Arc::new(Self::start(size).ok()?);
                teams.push(Arc::clone(&team));
                Some(team)
            })
        };
        match team {
            Some(team) if team.try_run(job) => {}
            _ => run_alone(job),
        }
    }

    /// Runs a job on all threads; `false` if there is one already.
    ///
    /// # Panics
    /// If the job does, on any thread.
    pub fn try_run(&self, job: &Job<'_>) -> bool {
        let Ok(_busy) = self.busy.try_lock().or_else(|error| match error {
            std::sync::TryLockError::Poisoned(poisoned) => Ok(poisoned.into_inner()),
            std::sync::TryLockError::WouldBlock => Err(()),
        }) else {
            return false;
        };
        let shared = &*self.shared;
        let steps = &shared.steps;
        steps.arrived.store(0, Ordering::Relaxed);
        steps.next_chunk.store(0, Ordering::Relaxed);
        steps.broken.store(false, Ordering::Relaxed);
        shared.finished.store(0, Ordering::Relaxed);
        {
            // SAFETY: only the lifetime changes; this function waits below until no thread uses the job.
            let job = unsafe { std::mem::transmute::<*const Job<'_>, *const Job<'static>>(std::ptr::from_ref(job)) };
            *lock(&shared.job) = Some(JobPointer(job));
            shared.generation.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        let own = catch_unwind(AssertUnwindSafe(|| job(&Worker { steps, size: shared.size })));
        if own.is_err() {
            steps.broken.store(true, Ordering::Relaxed);
        }
        wait_until(|| shared.finished.load(Ordering::Acquire) + 1 == shared.size);
        *lock(&shared.job) = None;
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!steps.broken.load(Ordering::Relaxed), "a thread of the team panicked");
        true
    }
}

fn run_alone(job: &Job<'_>) {
    job(&Worker { steps: &Steps::default(), size: 1 });
}

/// A slice that the threads of a team write to in disjoint parts.
#[derive(Debug)]
pub struct SharedSlice<'a, T> {
    data: *mut T,
    len: usize,
    owner: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: access is through unsafe functions, whose callers see to it that parts do not overlap.
unsafe impl<T: Send + Sync> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    /// Takes a slice over for as long as the view lives.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), owner: std::marker::PhantomData }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part to read.
    ///
    /// # Panics
    /// If `range` is not inside.
    ///
    /// # Safety
    /// No thread writes to it before the next barrier.
    #[must_use]
    pub unsafe fn read(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part of a shared slice");
        // SAFETY: inside, and not written to (the caller's promise).
        unsafe { std::slice::from_raw_parts(self.data.add(range.start), range.len()) }
    }

    /// A part to write.
    ///
    /// # Panics
    /// If `range` is not inside.
    ///
    /// # Safety
    /// No other thread reads or writes it before the next barrier, and this one has no other view of it.
    #[must_use]
    #[expect(clippy::mut_from_ref, reason = "that is what it is for; disjointness is the caller's promise")]
    pub unsafe fn write(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part of a shared slice");
        // SAFETY: inside, and of this caller alone (its promise).
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_of_every_phase_is_done_once_and_seen_behind_the_barrier() {
        const PHASES: usize = 200;
        for size in [1, 2, 3, 5] {
            let mut numbers = vec![0usize; 64];
            for _ in 0..3 {
                numbers.fill(0);
                let shared = SharedSlice::new(&mut numbers);
                let chunks = shared.len() / 4;
                Team::run_on(size, &|worker| {
                    for phase in 0..PHASES {
                        // SAFETY: read only in this phase.
                        assert!(unsafe { shared.read(0..64) }.iter().all(|&number| number == phase));
                        worker.barrier();
                        while let Some(chunk) = worker.claim(chunks) {
                            // SAFETY: each chunk is claimed once.
                            for number in unsafe { shared.write(4 * chunk..4 * chunk + 4) } {
                                *number += 1;
                            }
                        }
                        worker.barrier();
                    }
                });
                assert!(numbers.iter().all(|&number| number == PHASES), "{size} threads");
            }
        }
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::start(3).unwrap();
        for victim in 0..3 {
            let order = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.try_run(&|worker| {
                    let own = order.fetch_add(1, Ordering::Relaxed);
                    worker.barrier();
                    assert!(own != victim, "this one fails");
                    worker.barrier();
                })
            }));
            assert!(result.is_err());
        }
        let count = AtomicUsize::new(0);
        assert!(team.try_run(&|_| {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        assert_eq!(count.into_inner(), 3);
    }

    #[test]
    fn a_busy_team_does_not_make_others_wait() {
        let team = Team::start(2).unwrap();
        let inner = AtomicBool::new(false);
        team.try_run(&|worker| {
            if worker.claim(1).is_some() {
                inner.store(team.try_run(&|_| {}), Ordering::Relaxed);
            }
        });
        assert!(!inner.into_inner());
        // Two callers of one size at the same time: both get their work done.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let done = AtomicUsize::new(0);
                        Team::run_on(4, &|worker| {
                            while worker.claim(100).is_some() {
                                done.fetch_add(1, Ordering::Relaxed);
                            }
                        });
                        assert_eq!(done.into_inner(), 100);
                    }
                });
            }
        });
    }
}
