//! Runs cases that are made of a seed, and watches them: a panic, a case that takes too long or too much memory fails the
//! test with what reproduces it.
//!
//! An abort or an overflow of the stack ends the process: what it was about is in the file `PREFIX-NAME.case` then, which
//! `scripts/fuzz.sh` shows.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use adaptive_kvcache::memory::{process_memory, reset_peak};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Cases of an ordinary run.
const CASES: u64 = 300;

/// Far more than any case takes on a busy machine.
const SLOW: Duration = Duration::from_secs(20);

/// What the process may take, the tests' own files included.
const MOST_BYTES: usize = 1 << 30;

/// Cases between two looks at the memory.
const LOOK_EVERY: u64 = 32;

/// How long, and which cases: from the environment, which `scripts/fuzz.sh` sets.
struct Budget {
    seed: u64,
    first: u64,
    cases: u64,
    ends: Option<Instant>,
}

impl Budget {
    fn read() -> Self {
        let number = |name: &str| -> Option<u64> {
            let text = std::env::var(name).ok()?;
            Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
        };
        let ends = number("FUZZ_SECONDS").map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let cases = number("FUZZ_CASES").unwrap_or(if ends.is_some() { u64::MAX } else { CASES });
        Self { seed: number("FUZZ_SEED").unwrap_or(1), first: number("FUZZ_FIRST").unwrap_or(0), cases, ends }
    }
}

/// Milliseconds since the start of the test when the current case began, and whether the test is over.
struct Watch {
    began: AtomicU64,
    over: AtomicBool,
}

/// Runs cases until the budget is spent.
///
/// * `case`: makes an input of the numbers that it is given, and runs it; all that it does must depend on them only
pub fn run(name: &str, case: impl Fn(&mut StdRng)) {
    let Budget { seed, first, cases, ends } = Budget::read();
    let started = Instant::now();
    let watch = Watch { began: AtomicU64::new(0), over: AtomicBool::new(false) };
    let place = std::env::temp_dir().join(format!("adaptive-kvcache-fuzz-{name}.case"));
    reset_peak();
    std::thread::scope(|scope| {
        scope.spawn(|| guard(name, &watch, started, &place));
        let _over = Over(&watch);
        let mut done = 0;
        while done < cases && ends.is_none_or(|ends| Instant::now() < ends) {
            let index = first + done;
            let repeat = format!("FUZZ_SEED={seed} FUZZ_FIRST={index} FUZZ_CASES=1 scripts/fuzz.sh fuzz_{name}");
            std::fs::write(&place, &repeat).unwrap();
            watch.began.store(millis(started), Ordering::Relaxed);
            let _failing = Failing(&repeat);
            let mut rng = StdRng::seed_from_u64(seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            case(&mut rng);
            done += 1;
            if done % LOOK_EVERY == 0 {
                let peak = process_memory().map_or(0, |memory| memory.peak);
                assert!(peak <= MOST_BYTES, "{peak} bytes within {LOOK_EVERY} cases up to case {index}");
            }
        }
        if ends.is_some() {
            println!("fuzz_{name}: {done} cases, seed {seed}");
        }
        // It stays if a case ends the process.
        let _ = std::fs::remove_file(&place);
    });
}

/// Tells the watching thread that there is nothing to watch any more, also after a panic.
struct Over<'a>(&'a Watch);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// Says how to repeat a case that panics.
struct Failing<'a>(&'a str);

impl Drop for Failing<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("to repeat: {}", self.0);
        }
    }
}

fn millis(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap()
}

/// Ends the process if a case does not end.
fn guard(name: &str, watch: &Watch, started: Instant, place: &PathBuf) {
    const LOOK: Duration = Duration::from_millis(50);
    while !watch.over.load(Ordering::Relaxed) {
        std::thread::sleep(LOOK);
        let took = Duration::from_millis(millis(started).saturating_sub(watch.began.load(Ordering::Relaxed)));
        if took > SLOW && !watch.over.load(Ordering::Relaxed) {
            let repeat = std::fs::read_to_string(place).unwrap_or_default();
            eprintln!("fuzz_{name}: a case takes more than {} s\nto repeat: {repeat}", SLOW.as_secs());
            std::process::abort();
        }
    }
}
