//! How many threads compute: what the user asks for, as far as it makes sense here, or else what the machine has.

use std::sync::OnceLock;
use std::thread::available_parallelism;

use adaptive_kvcache::cores::{Cores, Limit};

use super::args::Command;
use super::terminal::note;

/// The variable that the libraries below read, too.
const VARIABLE: &str = "RAYON_NUM_THREADS";

/// So many threads are started whatever the machine is: on few cores they are slow, and equal in what they compute.
const ALWAYS: usize = 64;

/// More than these for each CPU only wait for one another.
const PER_CPU: usize = 4;

/// How many threads compute, and why so many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threads {
    pub number: usize,
    pub source: Source,
}

/// Who says how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// `--threads`
    Option,
    /// [`VARIABLE`]
    Variable,
    /// The machine, or what this process may use of it.
    Machine(Limit),
}

impl Source {
    /// As reports have it: `option`, `variable`, `cores`, `affinity` or `quota`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Option => "option",
            Self::Variable => "variable",
            Self::Machine(limit) => limit.name(),
        }
    }
}

static CHOSEN: OnceLock<Threads> = OnceLock::new();

/// What is chosen if nobody says anything.
fn default() -> Threads {
    static DEFAULT: OnceLock<Threads> = OnceLock::new();
    *DEFAULT.get_or_init(|| {
        let (number, limit) = Cores::detect().threads();
        Threads { number, source: Source::Machine(limit) }
    })
}

/// Chooses for the whole run, and tells the libraries below, which start threads of their own: rayon, and candle, whose
/// operations have a pool, and its quantised products another.
///
/// To be called before any thread starts.
pub fn choose(command: &Command) {
    let asked = command.threads().map(|number| (usize::from(number), Source::Option));
    let variable = || {
        let text = std::env::var(VARIABLE).ok()?;
        let number = text.trim().parse::<u128>().ok().filter(|&number| number > 0)?;
        Some((usize::try_from(number).unwrap_or(usize::MAX), Source::Variable))
    };
    let (number, source) = asked.or_else(variable).unwrap_or((default().number, default().source));
    let threads = Threads { number: bounded(number), source };
    if threads.number < number {
        let cpus = available_parallelism().map_or(1, usize::from);
        note(format_args!("{number} threads are of no use on {cpus} CPUs: {} compute", threads.number));
    }
    let threads = CHOSEN.get_or_init(|| threads);
    // SAFETY: no other thread runs yet that could read or write the environment.
    unsafe { std::env::set_var(VARIABLE, threads.number.to_string()) };
}

/// What [`choose`] chose.
pub fn chosen() -> Threads {
    CHOSEN.get().copied().unwrap_or_else(default)
}

/// A number of threads that makes sense.
pub fn bounded(threads: usize) -> usize {
    let cpus = available_parallelism().map_or(1, usize::from);
    threads.min((PER_CPU * cpus).max(ALWAYS))
}

/// Help of an option that asks for threads, with what is chosen here without it.
///
/// * `what`: the option's own sentence
pub fn help(what: &str) -> String {
    let here = default().number;
    format!(
        "{what} [default: what {VARIABLE} says, or else one for each physical core that the affinity mask and the CPU \
         quota of the control group leave to this process: {here} here]"
    )
}
