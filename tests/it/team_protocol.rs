//! The protocol of the thread team, the program's own source, under `loom`: every order in which two threads may act with
//! so many preemptions, and every older value that a read may still see.
//!
//! What threads do in a phase are reads and writes of cells that `loom` watches: two that are not ordered fail the test.
//! Not for: how threads sleep and wake (see the unit tests of `kernels::team`).

use std::sync::Arc;
use std::sync::atomic::AtomicUsize as Counter;
use std::sync::atomic::Ordering::Relaxed;

use loom::cell::UnsafeCell;
use loom::model::Builder;

/// What the protocol finds in place of `std::sync::atomic`.
mod atomic {
    pub use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
}

/// How long a thread looks before it lets others run: it does so at once.
#[derive(Default, Clone, Copy)]
struct Patience;

/// What the protocol waits by.
fn wait_until(_: Patience, mut done: impl FnMut() -> bool) {
    while !done() {
        loom::thread::yield_now();
    }
}

#[path = "../../src/kernels/team/protocol.rs"]
mod protocol;

use protocol::{Gate, Progress};

/// A number that threads share; `loom` sees to it that none looks at it while another writes.
struct Shared(UnsafeCell<usize>);

// SAFETY: `loom` runs one thread at a time, and fails where two accesses are not ordered.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(number: usize) -> Self {
        Self(UnsafeCell::new(number))
    }

    fn read(&self) -> usize {
        // SAFETY: see above.
        self.0.with(|number| unsafe { *number })
    }

    fn write(&self, number: usize) {
        // SAFETY: see above.
        self.0.with_mut(|own| unsafe { *own = number });
    }
}

/// Tries all orders with at most so many preemptions; how many there were.
fn explore(preemptions: Option<usize>, run: impl Fn() + Sync + Send + 'static) -> usize {
    let orders = Arc::new(Counter::new(0));
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    let counter = Arc::clone(&orders);
    builder.check(move || {
        counter.fetch_add(1, Relaxed);
        run();
    });
    orders.load(Relaxed)
}

/// Phases of `chunks` chunks. In each, a chunk first reads what the next chunk wrote in the phase before, if `reads`, and
/// in every second phase writes.
fn phases(threads: usize, num_phases: usize, chunks: usize) {
    struct Team {
        progress: Progress,
        cells: Vec<Shared>,
        times: Vec<Counter>,
    }
    let team = Arc::new(Team {
        progress: Progress::new(Patience),
        cells: (0..chunks).map(|_| Shared::new(0)).collect(),
        times: (0..num_phases * chunks).map(|_| Counter::new(0)).collect(),
    });
    let work = move |team: &Team| {
        for phase in 0..num_phases {
            team.progress.phase(phase as u64, chunks, |chunk| {
                team.times[phase * chunks + chunk].fetch_add(1, Relaxed);
                if phase % 2 == 0 {
                    team.cells[chunk].write(phase + 1);
                } else {
                    assert_eq!(team.cells[(chunk + 1) % chunks].read(), phase, "what the phase before wrote");
                }
            });
        }
    };
    let others: Vec<_> = (1..threads)
        .map(|_| {
            let team = Arc::clone(&team);
            loom::thread::spawn(move || work(&team))
        })
        .collect();
    work(&team);
    // The caller knows that all is done, though others may not have looked yet.
    assert!(team.times.iter().all(|times| times.load(Relaxed) == 1), "every chunk once");
    for other in others {
        other.join().unwrap();
    }
}

#[test]
fn chunks_are_claimed_once_and_phases_end_when_all_are_done() {
    let two = explore(Some(2), || phases(2, 2, 2));
    println!("{two} orders of two threads in two phases");
    let longer = explore(Some(1), || phases(2, 3, 2));
    println!("{longer} orders of two threads in three phases");
    assert!(two > 20 && longer > 20, "{two} {longer}");
}

/// One thread gives two jobs, another gets to each of them in time or does not.
fn jobs() {
    struct Team {
        gate: Gate,
        progress: Progress,
        /// The job's number; 0 where there is none.
        job: Shared,
    }
    let team = Arc::new(Team { gate: Gate::new(Patience), progress: Progress::new(Patience), job: Shared::new(0) });
    let other = {
        let team = Arc::clone(&team);
        loom::thread::spawn(move || {
            for _ in 0..2 {
                let Some(_inside) = team.gate.enter() else { continue };
                let job = team.job.read();
                assert!(job > 0, "inside, there is a job");
                team.progress.phase(0, 2, |_| assert_eq!(team.job.read(), job, "inside, the job stays"));
            }
        })
    };
    for job in 1..=2 {
        // Nobody is inside: these are not ordered with anything else.
        team.progress.reset();
        assert!(!team.progress.is_broken());
        team.job.write(job);
        team.gate.open();
        team.progress.phase(0, 2, |_| assert_eq!(team.job.read(), job));
        team.gate.close();
        // Nobody is inside any more.
        team.progress.set_broken();
        team.job.write(0);
    }
    other.join().unwrap();
}

#[test]
fn a_job_stays_until_everybody_has_left_it() {
    let orders = explore(Some(4), jobs);
    println!("{orders} orders");
    assert!(orders > 100, "{orders}");
}
