//! A sentence for a model's file that is cut short, or whose disk fails, while it is mapped: reading what is gone is a
//! signal, SIGBUS, which would end the process without a word.

/// Starts to listen. A fault that is not about a model's file goes on to whoever listened before.
pub fn install() {
    #[cfg(unix)]
    system::install();
}

#[cfg(unix)]
mod system {
    use std::mem::MaybeUninit;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    use adaptive_kvcache::mapped::with_file_at;

    use crate::cli::interrupt::tidy_terminal;

    /// What was done with the signal before; the runtime looks for overflows of stacks.
    static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

    /// Another thread is telling already.
    static IS_TOLD: AtomicBool = AtomicBool::new(false);

    #[expect(clippy::multiple_unsafe_ops_per_block, reason = "calls of the system, all allowed for one reason")]
    pub fn install() {
        // SAFETY: both structures are complete; the handler does what a handler may (see there).
        unsafe {
            let mut before = MaybeUninit::<libc::sigaction>::uninit();
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), before.as_mut_ptr()) != 0 {
                return;
            }
            BEFORE.get_or_init(|| before.assume_init());
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler = handle as unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            action.sa_sigaction = handler as usize;
            libc::sigemptyset(&raw mut action.sa_mask);
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
        }
    }

    /// Async-signal-safe: it looks into a list without locks, writes, and ends the process.
    ///
    /// # Safety
    /// `info` is what the system gives a handler.
    #[expect(clippy::multiple_unsafe_ops_per_block, reason = "calls of the system, all allowed for one reason")]
    unsafe extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: as this function's; a signal that somebody has sent (a code of 0 or below) has no address.
        let (is_fault, address) = unsafe { ((*info).si_code > 0, (*info).si_addr() as usize) };
        let mut tell = |name: &[u8]| {
            while IS_TOLD.swap(true, Ordering::Relaxed) {
                // SAFETY: it may be called in a handler; the other thread ends the process.
                unsafe { libc::pause() };
            }
            tidy_terminal();
            write(b"error: `");
            write(name);
            write(b"` can no longer be read: it was cut short, or its disk failed, while it was in use\n");
            write(b"hint: leave a model's file as it is as long as a run uses it; put a new one in its place by renaming\n");
        };
        // SAFETY: these may be called in a handler; `BEFORE` is set before the handler is.
        unsafe {
            if is_fault && with_file_at(address, &mut tell) {
                libc::_exit(1);
            }
            match BEFORE.get() {
                // The instruction is run again, and meets the one who listened before.
                Some(before) if is_fault => drop(libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut())),
                _ => {
                    libc::signal(libc::SIGBUS, libc::SIG_DFL);
                    libc::raise(libc::SIGBUS);
                }
            }
        }
    }

    /// What nobody can take is dropped.
    fn write(bytes: &[u8]) {
        // SAFETY: the bytes are there for the time of the call.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
    }
}
