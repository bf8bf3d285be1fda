//! How fast memory can be read at all: the bound of decoding, which reads every weight for every token.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::threads::with_threads;
use crate::error::Result;
use crate::kernels::simd::{Lanes, multiversion};
use crate::kernels::vector::instruction_set;

/// Bytes of the buffer: much more than the caches of any processor of today hold.
const BUFFER_BYTES: usize = 512 << 20;

/// Passes over the buffer, of which the middle one counts.
const PASSES: usize = 7;

/// Sums that are carried along: as many as keep the widest registers and several loads busy.
const LANES: usize = 64;

multiversion! {
    /// The wrapping sum of numbers: a loop that does nothing but read.
    fn sum(numbers: &[u64]) -> u64 = sum_body;
}

#[inline(always)]
fn sum_body<L: Lanes>(numbers: &[u64]) -> u64 {
    let mut sums = [0_u64; LANES];
    let (blocks, rest) = numbers.as_chunks::<LANES>();
    for block in blocks {
        for (sum, &number) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(number);
        }
    }
    sums.iter().chain(rest).fold(0, |sum, &number| sum.wrapping_add(number))
}

/// Measures how fast `threads` threads, each with its own part of a buffer of 512 MB, read memory: the median of several
/// passes, in GB (1e9 bytes) a second.
///
/// # Errors
/// As [`with_threads`].
pub fn read_rate(threads: usize) -> Result<f64> {
    // Ones, since a page that was never written to may be no memory of its own.
    let buffer = vec![1_u64; BUFFER_BYTES / size_of::<u64>()];
    with_threads(threads.max(1), || {
        let mut rates = Vec::with_capacity(PASSES);
        // After a request to stop, what is measured is of no use to anybody.
        while rates.is_empty() || rates.len() < PASSES && !crate::stop::is_requested() {
            rates.push(pass(&buffer));
        }
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    })
}

/// GB a second of one pass, on the threads of the pool that this runs in.
fn pass(buffer: &[u64]) -> f64 {
    let parts: Vec<&[u64]> = buffer.chunks(buffer.len().div_ceil(rayon::current_num_threads())).collect();
    let start = Barrier::new(parts.len());
    let read = |part: &&[u64]| {
        start.wait();
        let started = Instant::now();
        std::hint::black_box(sum(instruction_set(), part));
        (started, Instant::now())
    };
    let times: Vec<(Instant, Instant)> =
        rayon::broadcast(|thread| parts.get(thread.index()).map(read)).into_iter().flatten().collect();
    // From the first thread's start to the last one's end.
    let started = times.iter().map(|(started, _)| *started).min();
    let ended = times.iter().map(|(_, ended)| *ended).max();
    let time = started.zip(ended).map(|(started, ended)| ended - started);
    let seconds = time.unwrap_or(Duration::MAX).as_secs_f64();
    #[expect(clippy::cast_precision_loss)]
    let bytes = size_of_val(buffer) as f64;
    bytes / seconds / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::InstructionSet;

    #[test]
    fn everything_is_read_once() {
        let numbers: Vec<u64> = (0..1000).collect();
        for set in InstructionSet::available() {
            for len in [0, 1, 63, 64, 65, 1000] {
                assert_eq!(sum(set, &numbers[..len]), numbers[..len].iter().sum::<u64>(), "{set:?} {len}");
            }
        }
    }

    #[test]
    fn a_pass_on_any_number_of_threads_has_a_rate() {
        let numbers = vec![1_u64; 1 << 16];
        for threads in [1, 2, 7] {
            let rate = with_threads(threads, || pass(&numbers)).unwrap();
            assert!(rate.is_finite() && rate > 0.0, "{rate}");
        }
    }
}
