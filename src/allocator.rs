//! The program's memory: where there is none left, it ends with a sentence and status 1, not by a signal.
//!
//! The standard library can only abort then. What asks whether there is memory ([`Vec::try_reserve`] and all that builds
//! on it) never hears no.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, which ends the program if it has nothing to give.
pub struct OrExit;

// SAFETY: all is the system's allocator, but that a null pointer never comes back.
unsafe impl GlobalAlloc for OrExit {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises, here and below.
        or_exit(unsafe { System.alloc(layout) }, layout.size())
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        or_exit(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: as above.
        or_exit(unsafe { System.realloc(block, layout, new_size) }, new_size)
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) };
    }
}

#[inline]
fn or_exit(block: *mut u8, size: usize) -> *mut u8 {
    if block.is_null() {
        exit(size);
    }
    block
}

/// Says how much was asked for, without asking for more, and ends the process as it is.
#[cold]
fn exit(size: usize) -> ! {
    const BEFORE: &[u8] = b"error: out of memory: ";
    const BEHIND: &[u8] = b" bytes more are not to be had\nhint: use a smaller model, --kv-dtype q8_0 or q4_0, \
        a smaller --prefill-chunk or --batch, or a shorter prompt\n";
    let mut digits = [0_u8; 20];
    let (mut left, mut first) = (size, digits.len());
    loop {
        first -= 1;
        digits[first] = b'0' + u8::try_from(left % 10).unwrap_or(0);
        left /= 10;
        if left == 0 || first == 0 {
            break;
        }
    }
    #[cfg(unix)]
    for part in [BEFORE, &digits[first..], BEHIND] {
        // SAFETY: the bytes are there; nobody may be listening, which the status tells all the same.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    #[cfg(unix)]
    // SAFETY: nothing runs any more that could be left half done.
    unsafe {
        libc::_exit(1)
    }
    #[cfg(not(unix))]
    {
        let _ = (BEFORE, BEHIND);
        std::process::abort()
    }
}
