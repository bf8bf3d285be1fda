//! Asking all computation of this process to stop soon, as a signal does: between the pieces of a matrix product, long
//! before a layer or a token is done.
//!
//! What was computed is then given up with [`Error::Interrupted`]. A prompt's work is given up at once. Decoding a token is
//! only after [`GRACE`]: nearly always, callers that look for signals between tokens come first and lose nothing.
//!
//! Not for: ending one of several computations; their observers do that.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long a token may go on.
pub const GRACE: Duration = Duration::from_millis(300);

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Asks. One store: may be called from a signal handler.
pub fn request() {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// Takes a [`request`] back: what it was meant for has ended.
pub fn withdraw() {
    REQUESTED.store(false, Ordering::Relaxed);
}

/// Whether computation is to stop.
#[must_use]
pub fn is_requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// # Errors
/// [`Error::Interrupted`] if computation is to stop.
pub(crate) fn check() -> Result<()> {
    if is_requested() { Err(Error::Interrupted) } else { Ok(()) }
}

/// Says when the work on one token is to stop: [`GRACE`] after it has first seen a request.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    seen: OnceLock<Instant>,
}

impl Watch {
    pub(crate) fn is_over(&self) -> bool {
        is_requested() && self.seen.get_or_init(Instant::now).elapsed() >= GRACE
    }
}
