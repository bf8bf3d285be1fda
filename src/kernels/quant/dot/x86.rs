//! Products with blocks of 32 numbers, widened to f32 in the registers of x86-64.

use std::arch::x86_64::{
    __m128, __m256, __m512, _MM_HINT_T0, _mm_add_ps, _mm_add_ss, _mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32,
    _mm_fmadd_ps, _mm_movehdup_ps, _mm_movehl_ps, _mm_prefetch, _mm_set1_ps, _mm_setzero_ps, _mm256_add_ps,
    _mm256_broadcastss_ps, _mm256_castps256_ps128, _mm256_cvtepi32_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_mul_ps, _mm256_setzero_ps, _mm512_add_ps, _mm512_broadcastss_ps, _mm512_castps512_ps256, _mm512_cvtepi32_ps,
    _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_mul_ps, _mm512_setzero_ps,
};
use std::mem::transmute;

use super::super::super::simd::each;
use super::{BLOCK, BlockDot, SmallBlock};

/// How far ahead weights are fetched, in bytes: a row or two.
const AHEAD: usize = 2048;

/// Registers of one width, as many as a block needs: unlike the lanes of [`lanes`](crate::kernels::lanes), eight numbers
/// stay eight, so that with AVX2 the sums of four rows of activations fit the registers.
///
/// # Safety
/// Of all functions: the processor has the type's instruction set, and pointers have as many bytes or numbers as is said.
pub(super) trait Registers {
    /// Partial sums.
    type Sums: Copy;
    /// The quants of a block.
    type Quants: Copy;
    unsafe fn zero() -> Self::Sums;
    /// * `block`: of `B::BYTES`
    unsafe fn quants<B: SmallBlock>(block: *const u8) -> Self::Quants;
    /// `sums + scale * (quants * x)`, where the scale is the lowest lane.
    unsafe fn add(quants: Self::Quants, x: &[f32; BLOCK], scale: __m128, sums: Self::Sums) -> Self::Sums;
    /// All lanes of both.
    unsafe fn total(a: Self::Sums, b: Self::Sums) -> f32;
}

/// AVX2, FMA and F16C.
pub(super) struct Eight;

/// The above, and AVX-512 F, BW, DQ and VL.
pub(super) struct Sixteen;

/// Parts of a block's activations.
macro_rules! load {
    ($numbers:expr, $part:expr, $vector:ty) => {{
        // SAFETY: plain numbers of the same size.
        unsafe { transmute::<[f32; size_of::<$vector>() / 4], $vector>($numbers.as_chunks().0[$part]) }
    }};
}

impl Registers for Eight {
    type Sums = __m256;
    type Quants = [__m256; 4];

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn zero() -> __m256 {
        _mm256_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn quants<B: SmallBlock>(block: *const u8) -> [__m256; 4] {
        // SAFETY: the caller's promise.
        let quants = unsafe { B::quants8(block) };
        each!(4 of quants, |quants| _mm256_cvtepi32_ps(quants))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add(quants: [__m256; 4], x: &[f32; BLOCK], scale: __m128, sums: __m256) -> __m256 {
        let x = each!([0, 1, 2, 3], |part| load!(x, part, __m256));
        let even = _mm256_fmadd_ps(quants[2], x[2], _mm256_mul_ps(quants[0], x[0]));
        let odd = _mm256_fmadd_ps(quants[3], x[3], _mm256_mul_ps(quants[1], x[1]));
        _mm256_fmadd_ps(_mm256_add_ps(even, odd), _mm256_broadcastss_ps(scale), sums)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn total(a: __m256, b: __m256) -> f32 {
        let eight = _mm256_add_ps(a, b);
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

impl Registers for Sixteen {
    type Sums = __m512;
    type Quants = [__m512; 2];

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn zero() -> __m512 {
        _mm512_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn quants<B: SmallBlock>(block: *const u8) -> [__m512; 2] {
        // SAFETY: the caller's promise.
        let quants = unsafe { B::quants16(block) };
        each!(2 of quants, |quants| _mm512_cvtepi32_ps(quants))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn add(quants: [__m512; 2], x: &[f32; BLOCK], scale: __m128, sums: __m512) -> __m512 {
        let [low, high] = each!([0, 1], |part| load!(x, part, __m512));
        let products = _mm512_fmadd_ps(quants[1], high, _mm512_mul_ps(quants[0], low));
        _mm512_fmadd_ps(products, _mm512_broadcastss_ps(scale), sums)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn total(a: __m512, b: __m512) -> f32 {
        let sums = _mm512_add_ps(a, b);
        let (low, high) = (_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums));
        // SAFETY: AVX-512 has AVX2.
        unsafe { Eight::total(low, high) }
    }
}

/// # Safety
/// The caller is compiled for FMA, F16C and what `L` needs.
#[inline(always)]
pub(super) unsafe fn block_dot_rows<L: Registers, B: SmallBlock>(work: BlockDot<'_>) {
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
        match width {
            // SAFETY: the caller's promise, here and below.
            1 => unsafe { some_columns::<L, 1, B>(part) },
            // SAFETY: as above.
            2 => unsafe { some_columns::<L, 2, B>(part) },
            // SAFETY: as above.
            3 => unsafe { some_columns::<L, 3, B>(part) },
            // SAFETY: as above.
            _ => unsafe { some_columns::<L, 4, B>(part) },
        }
    }
}

/// Where a block of weights is, and the activations of `N` rows, each of `num_blocks` blocks.
#[derive(Clone, Copy)]
struct Place<'a> {
    row: &'a [u8],
    block: usize,
    num_blocks: usize,
    x: &'a [[f32; BLOCK]],
    x_sums: &'a [f32],
}

/// A scale, and behind it the offset or something else, in the lowest lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_two(halves: i32) -> __m128 {
    _mm_cvtph_ps(_mm_cvtsi32_si128(halves))
}

/// Offsets in the making.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn no_offset() -> __m128 {
    _mm_setzero_ps()
}

/// `sums + stored * sum`
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_offset(stored: __m128, sum: f32, sums: __m128) -> __m128 {
    _mm_fmadd_ps(stored, _mm_set1_ps(sum), sums)
}

/// A lane of offsets.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn offset_of<B: SmallBlock>(offsets: __m128) -> f32 {
    match B::OFFSET {
        Some(0.0) => 0.0,
        Some(_) => _mm_cvtss_f32(offsets),
        None => _mm_cvtss_f32(_mm_movehdup_ps(offsets)),
    }
}

/// Adds a block's products. A function of its own, and no closure: those were left out of line, without the
/// instruction set of their surroundings.
///
/// # Safety
/// As [`block_dot_rows`]; the block lies inside of the row and is below `num_blocks`, and there are activations for
/// `N * num_blocks`.
#[inline(always)]
unsafe fn add_block<L: Registers, const N: usize, B: SmallBlock>(
    place: Place<'_>,
    sums: &mut [L::Sums; N],
    offsets: &mut [__m128; N],
) {
    let block = place.row.as_ptr().wrapping_add(place.block * B::BYTES);
    // SAFETY: it reads nothing that a program could notice, wherever that is.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(AHEAD).cast()) };
    // SAFETY: the caller's promise, here and below.
    let halves = unsafe { block.cast::<i32>().read_unaligned() };
    // SAFETY: as above.
    let stored = unsafe { widen_two(halves) };
    // SAFETY: as above.
    let quants = unsafe { L::quants::<B>(block) };
    for n in 0..N {
        let at = n * place.num_blocks + place.block;
        // SAFETY: as above.
        let x = unsafe { place.x.get_unchecked(at) };
        // SAFETY: as above.
        sums[n] = unsafe { L::add(quants, x, stored, sums[n]) };
        if B::OFFSET != Some(0.0) {
            // SAFETY: as above.
            let sum = unsafe { *place.x_sums.get_unchecked(at) };
            // SAFETY: as above.
            offsets[n] = unsafe { add_offset(stored, sum, offsets[n]) };
        }
    }
}

/// `N` rows of activations at a time, so that each block is unpacked once for all of them. The result for each does
/// not depend on `N`.
///
/// # Safety
/// As [`block_dot_rows`].
#[inline(always)]
unsafe fn some_columns<L: Registers, const N: usize, B: SmallBlock>(work: BlockDot<'_>) {
    let BlockDot { rows, x, sums: x_sums, cols, out } = work;
    let num_blocks = cols / BLOCK;
    let x = x.as_chunks().0;
    assert!(
        x.len() == N * num_blocks
            && x_sums.len() == N * num_blocks
            && out.len() == N * rows.count
            && rows.row_bytes == num_blocks * B::BYTES
    );
    for (index, row) in rows.iter().enumerate() {
        // Two sets of sums hide the latency of the multiply-add.
        // SAFETY: the caller's promise.
        let mut sums = [[unsafe { L::zero() }; N]; 2];
        // SAFETY: the caller's promise.
        let mut offsets = [unsafe { no_offset() }; N];
        let [even, odd] = &mut sums;
        let place = |block: usize| Place { row, block, num_blocks, x, x_sums };
        for pair in 0..num_blocks / 2 {
            // SAFETY: sizes were checked above, and `block` stays below `num_blocks`; here and below.
            unsafe { add_block::<L, N, B>(place(2 * pair), even, &mut offsets) };
            // SAFETY: as above.
            unsafe { add_block::<L, N, B>(place(2 * pair + 1), odd, &mut offsets) };
        }
        if num_blocks % 2 == 1 {
            // SAFETY: as above.
            unsafe { add_block::<L, N, B>(place(num_blocks - 1), even, &mut offsets) };
        }
        for n in 0..N {
            // SAFETY: the caller's promise, here and below.
            let total = unsafe { L::total(even[n], odd[n]) };
            // SAFETY: as above.
            out[n * rows.count + index] = total + unsafe { offset_of::<B>(offsets[n]) };
        }
    }
}
