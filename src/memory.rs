//! Memory of this process, as the operating system counts it.

/// Bytes of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessMemory {
    /// Resident now, mapped files (the weights) included.
    pub resident: usize,
    /// Resident now, mapped files apart.
    pub anonymous: usize,
    /// The most that was resident so far.
    pub peak: usize,
}

/// Reads the process's memory; `None` where the system does not tell (anything but Linux).
#[must_use]
pub fn process_memory() -> Option<ProcessMemory> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<usize> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
    };
    Some(ProcessMemory { resident: field("VmRSS")?, anonymous: field("RssAnon")?, peak: field("VmHWM")? })
}

/// Makes [`ProcessMemory::peak`] count anew from what is resident now; does nothing where the system does not allow it
/// (Linux does).
pub fn reset_peak() {
    /// What the kernel wants to read for this, see `man 5 proc_pid_clear_refs`.
    const PEAK: &str = "5";
    // A peak that cannot be reset is still an upper bound.
    let _ = std::fs::write("/proc/self/clear_refs", PEAK);
}

/// Makes all threads share one heap, which keeps what was freed for what comes next; to be called before threads start.
///
/// The GNU C library gives every thread a heap of its own, and each keeps some of what was freed: of a compressed
/// prompt's saving up to an eighth stayed resident. One heap costs nothing measurable here, since kernels allocate per
/// block and not per number. Buffers of a prompt's rows are some megabytes, which it would give back to the system and ask
/// for again with each layer, page by page: a twentieth of reading a prompt. They stay until [`release_unused`]. Elsewhere
/// this does nothing.
pub fn share_one_heap() {
    /// The most that the library takes.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const MMAP_THRESHOLD: i32 = 32 << 20;
    /// As much again as the buffers of a chunk of a small model need; what is above it is given back at once.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const TRIM_THRESHOLD: i32 = 64 << 20;

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD), (libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD)]
    {
        // SAFETY: `mallopt` only sets parameters of the allocator.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives memory that was freed back to the operating system.
///
/// The GNU C library keeps what a prefill freed for later use; a long-running process is better served by getting it
/// back. Elsewhere this does nothing.
pub fn release_unused() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Asks for large pages under as much of a buffer as whole ones fit in; nothing changes but speed. Where the system has none
/// to give, or is not asked (anything but Linux), this does nothing.
///
/// Rows of products are far apart, each on pages of its own: with large ones, a prompt took 4 % less (the mean of five pairs of
/// runs of a 1.5B model, which differed by more than that).
pub fn prefer_large_pages(buffer: &mut [f32]) {
    #[cfg(target_os = "linux")]
    {
        /// Of x86-64 and, most often, of others.
        const LARGE_PAGE: usize = 2 << 20;
        let bytes = size_of_val(buffer);
        let start = buffer.as_mut_ptr().cast::<u8>();
        let before = start.align_offset(LARGE_PAGE).min(bytes);
        let len = (bytes - before) / LARGE_PAGE * LARGE_PAGE;
        if len > 0 {
            // SAFETY: the range lies within the buffer, and the advice changes nothing that it holds.
            let _ = unsafe { libc::madvise(start.wrapping_add(before).cast(), len, libc::MADV_HUGEPAGE) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_peak_that_is_reset_forgets_what_was_freed() {
        const BYTES: usize = 256 << 20;
        drop(std::hint::black_box(vec![1_u8; BYTES]));
        let before = process_memory().unwrap();
        assert!(before.peak >= before.resident + BYTES / 2, "{before:?}");
        reset_peak();
        let after = process_memory().unwrap();
        assert!(after.peak < before.peak - BYTES / 4, "{before:?} {after:?}");
    }
}
