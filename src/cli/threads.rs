//! How many threads compute: what the user asks for, as far as it makes sense here.

use std::thread::available_parallelism;

use super::terminal::note;

/// The variable that the libraries below read, too.
const VARIABLE: &str = "RAYON_NUM_THREADS";

/// So many threads are started whatever the machine is: on few cores they are slow, and equal in what they compute.
const ALWAYS: usize = 64;

/// More than these for each core only wait for one another.
const PER_CORE: usize = 4;

/// The most threads that are started.
fn most() -> usize {
    (PER_CORE * cores()).max(ALWAYS)
}

fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// Threads to compute with: as many as the user says, or else as the environment says, or else as there are cores.
pub fn number(asked: Option<u16>) -> usize {
    let from_environment = || std::env::var(VARIABLE).ok()?.parse().ok().filter(|&threads| threads > 0);
    let threads = asked.map(usize::from).or_else(from_environment).unwrap_or_else(cores);
    bounded(threads)
}

/// A number of threads that makes sense; a note if it is another.
pub fn bounded(threads: usize) -> usize {
    let most = most();
    if threads > most {
        note(format_args!("{threads} threads are of no use on {} cores: {most} compute", cores()));
    }
    threads.min(most)
}

/// Keeps the libraries below from starting an absurd number of threads, or cutting work into so many pieces.
///
/// To be called before any thread starts.
pub fn bound_environment() {
    let Some(threads) = std::env::var_os(VARIABLE) else { return };
    let threads = threads.to_str().and_then(|text| text.trim().parse::<u128>().ok());
    let most = most();
    if threads.is_some_and(|threads| threads > most as u128) {
        note(format_args!("`{VARIABLE}` is more than this machine has any use for: {most} threads compute at most"));
        // SAFETY: no other thread runs yet that could read or write the environment.
        unsafe { std::env::set_var(VARIABLE, most.to_string()) };
    }
}
