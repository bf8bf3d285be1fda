//! A team of threads that works on one job in step: phases of chunks, which threads claim as they get to them.
//!
//! Decoding one token is some hundred small phases of a few microseconds. Handing each to a general thread pool costs as
//! much as the work itself; here the threads stay together for the whole token, and the end of a phase is a change of one
//! number. A phase is over when all of its chunks are done, whoever did them: a thread whose core was taken away between
//! chunks keeps nobody waiting before the end of the job, and catches up later. Threads that wait spin first, then give their core away, then
//! take naps; between jobs they sleep. Those of a team that has more threads than there are CPUs for do not spin: what they wait
//! for may need their CPU.
//!
//! Threads are not pinned to cores. See [`cores`](crate::cores) for the reason, and for how many are worth starting.
//!
//! Not for: work in large pieces (prefill), which rayon spreads as well.

mod protocol;
mod shared_slice;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{self, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::available_parallelism;
use std::time::Duration;

use protocol::{Gate, Progress};
pub use shared_slice::SharedSlice;

/// How often a waiting thread looks before it gives its core away: some tens of microseconds.
const SPINS: usize = 1500;

/// How often a thread without a job gives its core away before it sleeps.
const YIELDS: usize = 50;

/// How often a thread that waits within a job gives its core away before it takes naps: a millisecond of its own time or
/// so, in which every phase ends unless another process has taken a core away.
const YIELDS_IN_JOB: usize = 2000;

/// A nap: short beside what was waited before it.
const NAP: Duration = Duration::from_micros(50);

/// A job: every thread of the team may run it once, with the same phases in the same order.
type Job<'a> = dyn Fn(&mut Worker<'_>) + Sync + 'a;

/// Threads that stay together.
pub struct Team {
    shared: Arc<Shared>,
    /// Held while a job runs.
    busy: Mutex<()>,
}

struct Shared {
    size: usize,
    patience: Patience,
    /// Counts jobs; its change announces one.
    generation: AtomicUsize,
    gate: Gate,
    job: Mutex<Option<JobPointer>>,
    wake: Condvar,
    progress: Progress,
}

/// A job whose lifetime is not written down; [`Team::try_run`] returns only after every thread has left it.
#[derive(Clone, Copy)]
struct JobPointer(*const Job<'static>);

// SAFETY: the job is `Sync`, and `Team::try_run` keeps it alive for as long as threads use it.
unsafe impl Send for JobPointer {}

impl std::fmt::Debug for Team {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Team({} threads)", self.shared.size)
    }
}

/// One thread's way through a job.
pub struct Worker<'a> {
    progress: &'a Progress,
    phase: u64,
    size: usize,
}

impl std::fmt::Debug for Worker<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Worker(phase {})", self.phase)
    }
}

impl Worker<'_> {
    /// Threads of the team.
    #[must_use]
    pub fn team_size(&self) -> usize {
        self.size
    }

    /// Takes part in the next phase, and returns when all of its chunks are done; what was written in it is then seen.
    ///
    /// * `count`: number of chunks, below 2^32, the same on every thread
    /// * `work`: does one chunk. Only inside of it is it certain that the phase is not over yet: a late thread finds all
    ///   chunks taken, and later phases under way.
    ///
    /// # Panics
    /// If another thread of the team has panicked, or there are too many chunks, or 2^32 phases in one job.
    pub fn phase(&mut self, count: usize, work: impl FnMut(usize)) {
        if count > 0 {
            let phase = self.phase;
            self.phase += 1;
            self.progress.phase(phase, count, work);
        }
    }
}

/// How a thread waits.
#[derive(Clone, Copy)]
struct Patience {
    /// How often it looks before it gives its core away.
    spins: usize,
}

impl Default for Patience {
    fn default() -> Self {
        Self { spins: SPINS }
    }
}

impl Patience {
    /// That of a team's threads.
    ///
    /// * `cpus`: how many of them can run at a time
    fn of_team(size: usize, cpus: usize) -> Self {
        if size > cpus { Self { spins: 0 } } else { Self::default() }
    }
}

/// Spins, then gives the core away, then takes naps, until `done`.
fn wait_until(patience: Patience, mut done: impl FnMut() -> bool) {
    let mut looks = 0;
    while !done() {
        if looks < patience.spins {
            std::hint::spin_loop();
        } else if looks < patience.spins + YIELDS_IN_JOB {
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
            continue;
        }
        looks += 1;
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
            seen = self.wait_for_job(seen);
            let Some(_inside) = self.gate.enter() else {
                continue; // it was over sooner
            };
            // Inside, the job stays.
            let job = {
                let job = lock(&self.job);
                seen = self.generation.load(Ordering::Acquire);
                *job
            };
            if let Some(job) = job {
                let mut worker = Worker { progress: &self.progress, phase: 0, size: self.size };
                // SAFETY: `Team::try_run` closes the gate, and waits until everybody has left, before it lets the job go.
                let job = unsafe { &*job.0 };
                // What was thrown is let go last: that may panic again.
                let outcome = catch_unwind(AssertUnwindSafe(|| job(&mut worker)));
                if outcome.is_err() {
                    self.progress.set_broken();
                }
            }
        }
    }

    /// Waits for another job than that of generation `seen`; its generation.
    fn wait_for_job(&self, seen: usize) -> usize {
        let spins = self.patience.spins;
        for look in 0..spins + YIELDS {
            let generation = self.generation.load(Ordering::Acquire);
            if generation != seen {
                return generation;
            }
            if look < spins {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let mut job = lock(&self.job);
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            if generation != seen {
                return generation;
            }
            job = self.wake.wait(job).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Team {
    /// Starts `size - 1` threads, which the caller of [`try_run`](Self::try_run) joins. They sleep when there is nothing
    /// to do, and live until the program ends. There are fewer if the system refuses some: no phase waits for them.
    #[must_use]
    pub fn start(size: usize) -> Self {
        let patience = Patience::of_team(size, available_parallelism().map_or(1, usize::from));
        let shared = Arc::new(Shared {
            size: size.max(1),
            patience,
            generation: AtomicUsize::new(0),
            gate: Gate::new(patience),
            job: Mutex::new(None),
            wake: Condvar::new(),
            progress: Progress::new(patience),
        });
        for index in 1..shared.size {
            let shared = Arc::clone(&shared);
            if std::thread::Builder::new().name(format!("team-{index}")).spawn(move || shared.work()).is_err() {
                break;
            }
        }
        Self { shared, busy: Mutex::new(()) }
    }

    /// Runs a job on up to `size` threads, the calling one among them, and returns when all have left it. Teams are kept
    /// for later calls. If the team of this size has a job already, the job runs on the calling thread
    /// alone.
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
            known.unwrap_or_else(|| {
                let team = Arc::new(Self::start(size));
                teams.push(Arc::clone(&team));
                team
            })
        };
        if !team.try_run(job) {
            run_alone(job);
        }
    }

    /// Runs a job on all threads that get to it in time; `false` if there is one already.
    ///
    /// # Panics
    /// If the job does, on any thread.
    pub fn try_run(&self, job: &Job<'_>) -> bool {
        let _busy = match self.busy.try_lock() {
            Ok(busy) => busy,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let shared = &*self.shared;
        let progress = &shared.progress;
        // The gate is closed: nobody looks at these.
        progress.reset();
        {
            // SAFETY: only the lifetime changes; the gate is closed below before this function returns.
            let job = unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job) };
            // All under the lock: a thread about to sleep sees the new number or gets the call, and one that slips in early
            // waits here for its number.
            let mut current = lock(&shared.job);
            *current = Some(JobPointer(job));
            shared.gate.open();
            shared.generation.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        let mut worker = Worker { progress, phase: 0, size: shared.size };
        let own = catch_unwind(AssertUnwindSafe(|| job(&mut worker)));
        if own.is_err() {
            progress.set_broken();
        }
        shared.gate.close();
        *lock(&shared.job) = None;
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!progress.is_broken(), "a thread of the team panicked");
        true
    }
}

fn run_alone(job: &Job<'_>) {
    job(&mut Worker { progress: &Progress::default(), phase: 0, size: 1 });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn every_chunk_of_every_phase_is_done_once_and_seen_by_the_next() {
        const PHASES: usize = 200;
        for size in [1, 2, 3, 5] {
            let mut numbers = vec![0usize; 64];
            for _ in 0..3 {
                numbers.fill(0);
                let shared = SharedSlice::new(&mut numbers);
                Team::run_on(size, &|worker| {
                    for phase in 0..PHASES {
                        worker.phase(16, |chunk| {
                            // Numbers that another chunk of the phase before wrote.
                            let other = (chunk + phase) % 16;
                            // SAFETY: these are written in odd phases, and read in even ones.
                            assert!(unsafe { shared.read(4 * other..4 * other + 4) }.iter().all(|&n| n == phase));
                        });
                        worker.phase(0, |_| unreachable!());
                        worker.phase(16, |chunk| {
                            // SAFETY: each chunk is claimed once.
                            for number in unsafe { shared.write(4 * chunk..4 * chunk + 4) } {
                                *number += 1;
                            }
                        });
                    }
                });
                assert!(numbers.iter().all(|&number| number == PHASES), "{size} threads");
            }
        }
    }

    #[test]
    #[should_panic(expected = "of 4294967297 chunks")]
    #[cfg(target_pointer_width = "64")]
    fn more_chunks_than_can_be_counted_are_refused() {
        Team::run_on(1, &|worker| worker.phase((1 << 32) + 1, |_| {}));
    }

    #[test]
    fn a_thread_that_comes_late_keeps_nobody_waiting() {
        let team = Team::start(2);
        let caller = std::thread::current().id();
        let (late, chunks) = (AtomicBool::new(false), AtomicUsize::new(0));
        team.try_run(&|worker| {
            let is_caller = std::thread::current().id() == caller;
            // The other thread gets to its first phase only after the caller has been through all of them.
            wait_until(Patience::default(), || is_caller || late.load(Ordering::Acquire));
            for _ in 0..10 {
                worker.phase(3, |_| {
                    chunks.fetch_add(1, Ordering::Relaxed);
                });
            }
            late.store(true, Ordering::Release);
        });
        assert_eq!(chunks.into_inner(), 30);
    }

    #[test]
    fn threads_spin_only_if_there_are_cpus_for_all() {
        for (size, cpus, spins) in [(1, 1, SPINS), (2, 2, SPINS), (2, 64, SPINS), (2, 1, 0), (64, 8, 0)] {
            assert_eq!(Patience::of_team(size, cpus).spins, spins, "{size} threads, {cpus} CPUs");
        }
    }

    /// Of a second that one thread needs for its chunk, the other computes next to nothing.
    #[cfg(target_os = "linux")]
    #[test]
    fn waiting_long_costs_little() {
        /// What this thread has computed.
        fn computed() -> Duration {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the call writes to the structure.
            assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
            Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap())
        }
        for team in [Team::start(2), Team::start(64)] {
            let (claimed, most) = (AtomicBool::new(false), Mutex::new(Duration::ZERO));
            team.try_run(&|worker| {
                let before = computed();
                worker.phase(1, |_| {
                    claimed.store(true, Ordering::Release);
                    std::thread::sleep(Duration::from_secs(1));
                });
                let mut most = lock(&most);
                *most = most.max(computed().saturating_sub(before));
            });
            assert!(claimed.into_inner());
            let most = most.into_inner().unwrap();
            assert!(most < Duration::from_millis(300), "{most:?}");
        }
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::start(3);
        for victim in 0..6 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.try_run(&|worker| {
                    worker.phase(6, |chunk| {
                        std::thread::sleep(std::time::Duration::from_millis(1)); // so that others get theirs
                        assert!(chunk != victim, "this one fails");
                    });
                    worker.phase(6, |_| {});
                })
            }));
            assert!(result.is_err());
        }
        let count = AtomicUsize::new(0);
        assert!(team.try_run(&|worker| {
            worker.phase(100, |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        }));
        assert_eq!(count.into_inner(), 100);
    }

    #[test]
    fn a_busy_team_does_not_make_others_wait() {
        let team = Team::start(2);
        let inner = AtomicBool::new(false);
        team.try_run(&|worker| {
            worker.phase(1, |_| inner.store(team.try_run(&|_| {}), Ordering::Relaxed));
        });
        assert!(!inner.into_inner());
        // Two callers of one size at the same time: both get their work done.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let done = AtomicUsize::new(0);
                        Team::run_on(4, &|worker| {
                            worker.phase(100, |_| {
                                done.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                        assert_eq!(done.into_inner(), 100);
                    }
                });
            }
        });
    }
}
