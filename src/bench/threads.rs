//! Running work on a number of threads of its own.

use crate::error::{Error, Result};

/// Runs `work` with `threads` threads to compute on, whatever the rest of the process computes on.
///
/// The caller's thread waits meanwhile. candle's operations and this crate's kernels share these threads; candle's own
/// pool, for quantised matrix products, is not used by this crate.
///
/// # Errors
/// [`Error::Input`] if the system refuses to start so many threads.
pub fn with_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| {
        Error::input(format!("failed to start `{threads}` threads: {error}")).with_hint("use fewer --threads")
    })?;
    Ok(pool.install(work))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_sees_its_own_number_of_threads() {
        for threads in [1, 3] {
            assert_eq!(with_threads(threads, rayon::current_num_threads).unwrap(), threads);
        }
    }
}
