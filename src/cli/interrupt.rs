//! Signals that end a run: Ctrl-C, SIGTERM and SIGHUP. The first asks it to end in order, the second ends the process.
//!
//! What can be ended in order (text, log, report, rows) is; while there is nothing of that kind, as during loading and
//! while waiting for input, the first signal ends the process at once. So an answer never takes longer than the computation
//! of one layer. The handler does nothing but what POSIX allows one to do.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use adaptive_kvcache::{files, stop};

/// Ctrl-C's number.
const SIGINT: i32 = 2;

/// The signal that asks the run to end; 0 for none.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Something has been told of the signal, and ends in order for it.
static ANSWERED: AtomicBool = AtomicBool::new(false);

/// Nothing is under way that could be ended in order.
static AT_ONCE: AtomicBool = AtomicBool::new(true);

/// Starts to listen. A signal ends the process at once until [`listen`] is called. SIGHUP and SIGTERM stay ignored if they
/// are, as under `nohup`.
pub fn install() {
    system::install();
}

/// From now on a signal asks the run to end in order, except in [`while_waiting`].
#[expect(clippy::unnecessary_wraps, reason = "a place to refuse a run")]
pub fn listen() -> anyhow::Result<()> {
    AT_ONCE.store(false, Ordering::SeqCst);
    Ok(())
}

/// Whether a signal came that asks the run to end. Who asks ends what it is doing.
pub fn interrupted() -> bool {
    let came = SIGNAL.load(Ordering::SeqCst) != 0;
    if came {
        ANSWERED.store(true, Ordering::SeqCst);
    }
    came
}

/// Whether a signal came that is meant for the whole program, and not for what it is doing, as Ctrl-C may be.
pub fn terminated() -> bool {
    !matches!(SIGNAL.load(Ordering::SeqCst), 0 | SIGINT)
}

/// Forgets Ctrl-C: what it ended is over.
pub fn clear() {
    let _ = SIGNAL.compare_exchange(SIGINT, 0, Ordering::SeqCst, Ordering::SeqCst);
    if !interrupted() {
        ANSWERED.store(false, Ordering::SeqCst);
        stop::withdraw();
    }
}

/// Exit status of a run that a signal ended: 128 and its number.
pub fn status() -> u8 {
    let signal = SIGNAL.load(Ordering::SeqCst);
    status_of(if signal == 0 { SIGINT } else { signal })
}

fn status_of(signal: i32) -> u8 {
    128 | u8::try_from(signal & 127).unwrap_or(0)
}

/// Runs `wait`, during which a signal ends the process at once: nothing that it does needs to be completed.
pub fn while_waiting<T>(wait: impl FnOnce() -> T) -> T {
    let before = AT_ONCE.swap(true, Ordering::SeqCst);
    // One that came before this is not to be found only afterwards.
    if !before && interrupted() {
        system::exit(status());
    }
    let result = wait();
    AT_ONCE.store(before, Ordering::SeqCst);
    result
}

/// Runs `write`, which writes to a path. As long as somebody has to take it on the other end, a signal ends the process at
/// once; what is written as a file is completed. A run that has ended for a signal still writes to both.
pub fn while_writing<T>(path: &Path, write: impl FnOnce() -> T) -> T {
    if !files::is_stream(path) {
        return write();
    }
    let before = AT_ONCE.swap(true, Ordering::SeqCst);
    // One that came since the run was over.
    if !ANSWERED.load(Ordering::SeqCst) && interrupted() {
        system::exit(status());
    }
    let result = write();
    AT_ONCE.store(before, Ordering::SeqCst);
    result
}

/// Called by the handler: whether the process is to end now.
fn ends_now(signal: i32) -> bool {
    let is_second = SIGNAL.swap(signal, Ordering::SeqCst) != 0;
    stop::request();
    is_second || AT_ONCE.load(Ordering::SeqCst)
}

#[cfg(unix)]
mod system {
    use std::io::IsTerminal;
    use std::mem::MaybeUninit;
    use std::ptr::null_mut;
    use std::sync::OnceLock;

    use super::{ends_now, status_of};

    /// How the terminal was set at the start: an editor of lines changes it as long as it waits.
    static TERMINAL: OnceLock<libc::termios> = OnceLock::new();

    /// Whether standard error is a terminal, where a bar may stand.
    static SHOWS_BARS: OnceLock<bool> = OnceLock::new();

    #[expect(clippy::multiple_unsafe_ops_per_block, reason = "calls of the system, all allowed for one reason")]
    pub fn install() {
        SHOWS_BARS.get_or_init(|| std::io::stderr().is_terminal());
        let mut settings = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: `tcgetattr` fills the structure if it returns 0.
        unsafe {
            if libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) == 0 {
                TERMINAL.get_or_init(|| settings.assume_init());
            }
        }
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: both structures are complete; the handler does what a handler may (see there).
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                let mut before: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, std::ptr::null(), &raw mut before) != 0 {
                    continue;
                }
                // A shell lets its background jobs ignore Ctrl-C only because it goes to all of a terminal's processes;
                // one that is sent to this very process is meant.
                if before.sa_sigaction == libc::SIG_IGN && signal != libc::SIGINT {
                    continue;
                }
                action.sa_sigaction = handle as extern "C" fn(libc::c_int) as usize;
                libc::sigemptyset(&raw mut action.sa_mask);
                // Calls go on, and look at the signal when they have something to decide.
                action.sa_flags = libc::SA_RESTART;
                libc::sigaction(signal, &raw const action, null_mut());
            }
        }
    }

    /// Async-signal-safe: atomics, and what [`exit`] calls.
    extern "C" fn handle(signal: libc::c_int) {
        if ends_now(signal) {
            exit(status_of(signal));
        }
    }

    /// Ends the process without any of its own work; async-signal-safe. The terminal is as it was before.
    pub fn exit(status: u8) -> ! {
        tidy_terminal();
        // SAFETY: it does not return, and calls nothing of this process.
        unsafe { libc::_exit(i32::from(status)) }
    }

    /// Takes a bar away and undoes what an editor of lines has set; async-signal-safe.
    #[expect(clippy::multiple_unsafe_ops_per_block, reason = "calls of the system, all allowed for one reason")]
    pub fn tidy_terminal() {
        const ERASE_LINE: &[u8] = b"\r\x1b[2K";
        // What is pasted is no longer put in brackets.
        const PLAIN_PASTE: &[u8] = b"\x1b[?2004l";
        // SAFETY: these calls are among those that POSIX allows in handlers, on memory that is never freed. The statics are
        // set before the handler is, and only read since; `tcgetattr` fills the structure if it returns 0.
        unsafe {
            if SHOWS_BARS.get() == Some(&true) {
                libc::write(libc::STDERR_FILENO, ERASE_LINE.as_ptr().cast(), ERASE_LINE.len());
            }
            let Some(settings) = TERMINAL.get() else { return };
            let mut now = MaybeUninit::<libc::termios>::uninit();
            let is_edited = libc::tcgetattr(libc::STDIN_FILENO, now.as_mut_ptr()) == 0
                && now.assume_init_ref().c_lflag != settings.c_lflag;
            // Of a process in the background it is somebody else who has changed them, and to set them would stop it.
            if is_edited && libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() {
                libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, settings);
                libc::write(libc::STDOUT_FILENO, PLAIN_PASTE.as_ptr().cast(), PLAIN_PASTE.len());
            }
        }
    }
}

#[cfg(not(unix))]
mod system {
    pub fn install() {
        // Without it Ctrl-C ends the process all the same, only not in order.
        let _ = ctrlc::set_handler(|| {
            if super::ends_now(super::SIGINT) {
                exit(super::status());
            }
        });
    }

    pub fn exit(status: u8) -> ! {
        std::process::exit(i32::from(status))
    }
}

#[cfg(unix)]
pub use system::tidy_terminal;
