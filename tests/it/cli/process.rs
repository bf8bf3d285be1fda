//! A program that runs while a test looks on. Tests wait for what it does (a line, an opened pipe, time that it has
//! computed), never for a time: how long that takes on a busy machine decides nothing.

use std::process::{Child, Command, Output};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Ends a test that hangs, and nothing else: far more than anything here takes on a busy machine.
const HUNG: Duration = Duration::from_secs(600);

/// Computing time in which a signal is answered, many times over.
const SOON: Duration = Duration::from_secs(10);

pub fn send(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

/// Waits until something has happened.
#[track_caller]
pub fn until(what: &str, has_happened: impl FnMut() -> bool) {
    let (started, mut has_happened) = (Instant::now(), has_happened);
    while !has_happened() {
        assert!(started.elapsed() < HUNG, "{what}: it does not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a program printed, once it has ended.
#[track_caller]
pub fn output_of(child: Child, what: &str) -> Output {
    let (ended, over) = channel::<()>();
    let pid = child.id().to_string();
    let guard = std::thread::spawn(move || {
        let hangs = over.recv_timeout(HUNG) == Err(RecvTimeoutError::Timeout);
        if hangs {
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
        }
        hangs
    });
    let output = child.wait_with_output().unwrap();
    drop(ended);
    assert!(!guard.join().unwrap(), "{what}: it did not end");
    output
}

/// A letter for what a process does, `Z` once it has ended, and the time that all its threads have computed.
fn state(child: &Child) -> (char, Duration) {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    // The name in front of the fields ends in a bracket. User and system time are in hundredths of a second.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    (fields[0].chars().next().unwrap(), Duration::from_millis(10 * ticks))
}

/// Waits until a program has computed for so long, which it must not end before.
#[track_caller]
pub fn computes_for(child: &Child, time: Duration) {
    until("the program computes", || {
        let (state, computed) = state(child);
        assert_ne!(state, 'Z', "it ended after {computed:?}");
        computed >= time
    });
}

/// Sends a signal, which must be answered before much more is computed.
///
/// The program must not print more than pipes hold.
#[track_caller]
pub fn ends_soon_by(child: Child, signal: &str, what: &str) -> Output {
    let before = state(&child).1;
    send(&child, signal);
    until("the program ends", || state(&child).0 == 'Z');
    let took = state(&child).1.saturating_sub(before);
    assert!(took < SOON, "{what}: it computed for another {took:?}");
    output_of(child, what)
}

/// Waits until a program reads its standard input, where there is nothing for it yet.
#[track_caller]
pub fn reads_input(child: &Child) {
    // The call `read` of file 0; of a thread that computes, there is the word `running`.
    let is_reading = |task: std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("syscall")).is_ok_and(|call| call.starts_with("0 0x0 "))
    };
    until("standard input is read", || {
        std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().flatten().any(is_reading)
    });
}

/// Waits until a program answers signals itself.
#[track_caller]
pub fn listens(child: &Child) {
    /// Bit of SIGINT, number 2.
    const INTERRUPT: u64 = 1 << 1;
    until("signals are listened to", || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        caught.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & INTERRUPT != 0)
    });
}
