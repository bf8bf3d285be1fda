//! Products with blocks of 32 numbers, widened to f32 in the registers of x86-64.

use std::arch::x86_64::{
    __m128, __m256, __m512, _MM_HINT_T0, _mm_add_ps, _mm_add_ss, _mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32,
    _mm_fmadd_ps, _mm_movehdup_ps, _mm_movehl_ps, _mm_prefetch, _mm_set1_ps, _mm_setzero_ps, _mm256_add_ps,
    _mm256_broadcastss_ps, _mm256_castps256_ps128, _mm256_cvtepi32_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_mul_ps, _mm256_setzero_ps, _mm512_add_ps, _mm512_broadcastss_ps, _mm512_castps512_ps256,
    _mm512_cvtepi32_ps, _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_setzero_ps,
};

use super::super::super::simd::each;
use super::{BLOCK, BlockDot, SmallBlock};

/// How far ahead weights are fetched, in bytes: a row or two.
const AHEAD: usize = 2048;

/// Registers of one width. Its functions may be called only where its instruction set is enabled.
pub(super) trait Lanes {
    /// Partial sums.
    type Sums: Copy;
    /// The quants of a block.
    type Quants: Copy;
    unsafe fn zero() -> Self::Sums;
    unsafe fn quants<B: SmallBlock>(block: *const u8) -> Self::Quants;
    /// `sums + scale * (quants * x)`, where `x` points to 32 numbers and the scale is the lowest lane.
    unsafe fn add(quants: Self::Quants, x: *const f32, scale: __m128, sums: Self::Sums) -> Self::Sums;
    /// All lanes of both.
    unsafe fn total(a: Self::Sums, b: Self::Sums) -> f32;
}

/// AVX2 and FMA.
pub(super) struct Eight;

/// AVX-512 F and DQ.
pub(super) struct Sixteen;

impl Lanes for Eight {
    type Sums = __m256;
    type Quants = [__m256; 4];

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn quants<B: SmallBlock>(block: *const u8) -> [__m256; 4] {
        unsafe { each!(4 of B::quants8(block), |quants| _mm256_cvtepi32_ps(quants)) }
    }

    #[inline(always)]
    unsafe fn add(quants: [__m256; 4], x: *const f32, scale: __m128, sums: __m256) -> __m256 {
        unsafe {
            let x = each!([0, 1, 2, 3], |part| _mm256_loadu_ps(x.add(8 * part)));
            let even = _mm256_fmadd_ps(quants[2], x[2], _mm256_mul_ps(quants[0], x[0]));
            let odd = _mm256_fmadd_ps(quants[3], x[3], _mm256_mul_ps(quants[1], x[1]));
            _mm256_fmadd_ps(_mm256_add_ps(even, odd), _mm256_broadcastss_ps(scale), sums)
        }
    }

    #[inline(always)]
    unsafe fn total(a: __m256, b: __m256) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(a, b);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
}

impl Lanes for Sixteen {
    type Sums = __m512;
    type Quants = [__m512; 2];

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn quants<B: SmallBlock>(block: *const u8) -> [__m512; 2] {
        unsafe { each!(2 of B::quants16(block), |quants| _mm512_cvtepi32_ps(quants)) }
    }

    #[inline(always)]
    unsafe fn add(quants: [__m512; 2], x: *const f32, scale: __m128, sums: __m512) -> __m512 {
        unsafe {
            let products = _mm512_mul_ps(quants[0], _mm512_loadu_ps(x));
            let products = _mm512_fmadd_ps(quants[1], _mm512_loadu_ps(x.add(16)), products);
            _mm512_fmadd_ps(products, _mm512_broadcastss_ps(scale), sums)
        }
    }

    #[inline(always)]
    unsafe fn total(a: __m512, b: __m512) -> f32 {
        unsafe {
            let sums = _mm512_add_ps(a, b);
            Eight::total(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums))
        }
    }
}

/// # Safety
/// The caller is compiled for FMA, F16C and what `L` needs.
#[inline(always)]
pub(super) unsafe fn block_dot_rows<L: Lanes, B: SmallBlock>(work: BlockDot<'_>) {
    let BlockDot { rows, x, sums, cols, out } = work;
    let (count, num_blocks) = (x.len() / cols, cols / BLOCK);
    for first in (0..count).step_by(4) {
        let width = (count - first).min(4);
        let part = BlockDot {
            rows,
            x: &x[first * cols..(first + width) * cols],
            sums: &sums[first * num_blocks..(first + width) * num_blocks],
            cols,
            out: &mut out[first * rows.count..(first + width) * rows.count],
        };
        // SAFETY: the caller's promise.
        unsafe {
            match width {
                1 => some_columns::<L, 1, B>(part),
                2 => some_columns::<L, 2, B>(part),
                3 => some_columns::<L, 3, B>(part),
                _ => some_columns::<L, 4, B>(part),
            }
        }
    }
}

/// One block of weights, and its activations in each of `N` rows.
#[derive(Clone, Copy)]
struct Place {
    block: *const u8,
    /// The first row's 32 activations; the next row's are `cols` further.
    x: *const f32,
    cols: usize,
    /// The first row's sum; the next row's is `num_blocks` further.
    x_sum: *const f32,
    num_blocks: usize,
}

/// Adds a block's products. A function of its own, and no closure: those were left out of line, without the
/// instruction set of their surroundings.
///
/// # Safety
/// As [`block_dot_rows`]; all of `place` lies inside of the weights and activations. Fetching ahead may leave the
/// matrix, which a prefetch allows.
#[inline(always)]
unsafe fn add_block<L: Lanes, const N: usize, B: SmallBlock>(
    place: Place,
    sums: &mut [L::Sums; N],
    offsets: &mut [__m128; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(place.block.wrapping_add(AHEAD).cast());
        // The scale, and behind it the offset or something else.
        let stored = _mm_cvtph_ps(_mm_cvtsi32_si128(place.block.cast::<i32>().read_unaligned()));
        let quants = L::quants::<B>(place.block);
        for n in 0..N {
            sums[n] = L::add(quants, place.x.add(n * place.cols), stored, sums[n]);
            if B::OFFSET != Some(0.0) {
                offsets[n] = _mm_fmadd_ps(stored, _mm_set1_ps(*place.x_sum.add(n * place.num_blocks)), offsets[n]);
            }
        }
    }
}

/// `N` rows of activations at a time, so that each block is unpacked once for all of them. The result for each does
/// not depend on `N`.
///
/// # Safety
/// As [`block_dot_rows`].
#[inline(always)]
unsafe fn some_columns<L: Lanes, const N: usize, B: SmallBlock>(work: BlockDot<'_>) {
    let BlockDot { rows, x, sums: x_sums, cols, out } = work;
    let num_blocks = cols / BLOCK;
    assert!(
        x.len() == N * cols
            && x_sums.len() == N * num_blocks
            && out.len() == N * rows.count
            && rows.row_bytes == num_blocks * B::BYTES
    );
    for (index, row) in rows.iter().enumerate() {
        // SAFETY: sizes were checked above; `block` stays below `num_blocks`, so that its bytes lie inside of `row`.
        // Fetching ahead may leave the matrix, which a prefetch allows.
        unsafe {
            // Two sets of sums hide the latency of the multiply-add.
            let mut sums = [[L::zero(); N]; 2];
            let mut offsets = [_mm_setzero_ps(); N];
            let [even, odd] = &mut sums;
            let place = |block: usize| Place {
                block: row.as_ptr().add(block * B::BYTES),
                x: x.as_ptr().add(block * BLOCK),
                cols,
                x_sum: x_sums.as_ptr().add(block),
                num_blocks,
            };
            for pair in 0..num_blocks / 2 {
                add_block::<L, N, B>(place(2 * pair), even, &mut offsets);
                add_block::<L, N, B>(place(2 * pair + 1), odd, &mut offsets);
            }
            if num_blocks % 2 == 1 {
                add_block::<L, N, B>(place(num_blocks - 1), even, &mut offsets);
            }
            for n in 0..N {
                let offset = match B::OFFSET {
                    Some(0.0) => 0.0,
                    Some(_) => _mm_cvtss_f32(offsets[n]),
                    None => _mm_cvtss_f32(_mm_movehdup_ps(offsets[n])),
                };
                out[n * rows.count + index] = L::total(even[n], odd[n]) + offset;
            }
        }
    }
}
