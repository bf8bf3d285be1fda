//! The block formats of 32 numbers (`Q4_0` .. `Q8_0`): how a block is unpacked, and rows of them widened to f32.
//!
//! Not for: products (see [`super::dot`]), or the formats of 256 numbers.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128i, __m256i, __m512i, _mm_loadl_epi64, _mm_loadu_si128, _mm256_and_si256, _mm256_cvtepi8_epi32,
    _mm256_cvtepu8_epi32, _mm256_or_si256, _mm256_set1_epi32, _mm256_setr_epi32, _mm256_slli_epi32, _mm256_srli_epi32,
    _mm256_srlv_epi32, _mm512_and_si512, _mm512_cvtepi8_epi32, _mm512_cvtepu8_epi32, _mm512_maskz_mov_epi32,
    _mm512_or_si512, _mm512_set1_epi32, _mm512_srli_epi32,
};

use half::f16;

#[cfg(target_arch = "x86_64")]
use super::super::simd::each;
use super::super::simd::{fma, multiversion};

/// Numbers in a block.
pub(super) const BLOCK: usize = 32;

/// A format of 32 numbers a block: `number = scale * quant + offset`.
pub(super) trait SmallBlock: 'static {
    /// Size of a block.
    const BYTES: usize;

    /// What the offset is in scales; `None` if blocks store an offset of their own, behind the scale.
    const OFFSET: Option<f32>;

    /// Scale, offset and the 32 quants of a block. `bytes` has at least [`BYTES`](Self::BYTES).
    ///
    /// # Safety
    /// With `SIMD`, the processor has F16C.
    unsafe fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]);

    /// The 32 quants, without the offset, eight in a register.
    ///
    /// # Safety
    /// `block` points to [`BYTES`](Self::BYTES) readable bytes, and the processor has AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn quants8(block: *const u8) -> [__m256i; 4];

    /// The 32 quants, without the offset, sixteen in a register.
    ///
    /// # Safety
    /// As [`quants8`](Self::quants8), with AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    unsafe fn quants16(block: *const u8) -> [__m512i; 2];
}

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;
pub(super) struct Q8_0;

/// The f16 at `bytes[at..at + 2]`, widened.
///
/// # Safety
/// With `SIMD`, the processor has F16C.
#[inline(always)]
unsafe fn half_at<const SIMD: bool>(bytes: &[u8], at: usize) -> f32 {
    let bits = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    #[cfg(target_arch = "x86_64")]
    if SIMD {
        // SAFETY: the caller promises F16C with `SIMD`.
        return unsafe { widen_half(bits) };
    }
    f16::from_bits(bits).to_f32()
}

/// An f16, widened.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "f16c")]
fn widen_half(bits: u16) -> f32 {
    use std::arch::x86_64::{_mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32};
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}

/// 16 bytes of nibbles: the low ones are quants 0..16, the high ones 16..32.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [i8; BLOCK] {
    let mut quants = [0i8; BLOCK];
    for i in 0..BLOCK / 2 {
        #[expect(clippy::cast_possible_wrap)]
        {
            quants[i] = (bytes[i] & 0x0f) as i8;
            quants[i + BLOCK / 2] = (bytes[i] >> 4) as i8;
        }
    }
    quants
}

/// Nibbles with a fifth bit from `bits`, one for each quant.
#[inline(always)]
fn nibbles_and_bits(bytes: &[u8], bits: &[u8]) -> [i8; BLOCK] {
    let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
    let mut quants = nibbles(bytes);
    for (i, quant) in quants.iter_mut().enumerate() {
        *quant |= i8::from((bits >> i) & 1 != 0) << 4;
    }
    quants
}

/// Eight bytes in the lower half of a register.
///
/// # Safety
/// `bytes` points to so many readable bytes.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load8(bytes: *const u8) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe { _mm_loadl_epi64(bytes.cast()) }
}

/// Sixteen bytes.
///
/// # Safety
/// `bytes` points to so many readable bytes.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load16(bytes: *const u8) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe { _mm_loadu_si128(bytes.cast()) }
}

/// [`nibbles`], eight in a register.
///
/// # Safety
/// `bytes` points to 16 readable bytes.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn nibbles8(bytes: *const u8) -> [__m256i; 4] {
    let both = each!([0, 8], |at| {
        // SAFETY: the caller's promise.
        _mm256_cvtepu8_epi32(unsafe { load8(bytes.wrapping_add(at)) })
    });
    let [first, second] = each!(2 of both, |both| _mm256_and_si256(both, _mm256_set1_epi32(0x0f)));
    let [third, fourth] = each!(2 of both, |both| _mm256_srli_epi32::<4>(both));
    [first, second, third, fourth]
}

/// [`nibbles`], sixteen in a register.
///
/// # Safety
/// `bytes` points to 16 readable bytes.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn nibbles16(bytes: *const u8) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    let both = _mm512_cvtepu8_epi32(unsafe { load16(bytes) });
    [_mm512_and_si512(both, _mm512_set1_epi32(0x0f)), _mm512_srli_epi32::<4>(both)]
}

/// [`nibbles_and_bits`], eight in a register.
///
/// # Safety
/// `bytes` points to 16 readable bytes, and `bits` to 4.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn nibbles_and_bits8(bytes: *const u8, bits: *const u8) -> [__m256i; 4] {
    // SAFETY: the caller's promise, here and below.
    let bits = unsafe { bits.cast::<i32>().read_unaligned() };
    // SAFETY: as above.
    let nibbles = unsafe { nibbles8(bytes) };
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    each!([0, 1, 2, 3], |part| {
        let bits = _mm256_srlv_epi32(_mm256_set1_epi32(bits >> (8 * part)), lanes);
        let fifth = _mm256_slli_epi32::<4>(_mm256_and_si256(bits, _mm256_set1_epi32(1)));
        _mm256_or_si256(nibbles[part], fifth)
    })
}

/// [`nibbles_and_bits`], sixteen in a register.
///
/// # Safety
/// As [`nibbles_and_bits8`].
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn nibbles_and_bits16(bytes: *const u8, bits: *const u8) -> [__m512i; 2] {
    // SAFETY: the caller's promise, here and below.
    let bits = unsafe { bits.cast::<[u16; 2]>().read_unaligned() };
    // SAFETY: as above.
    let nibbles = unsafe { nibbles16(bytes) };
    each!([0, 1], |part| {
        _mm512_or_si512(nibbles[part], _mm512_maskz_mov_epi32(bits[part], _mm512_set1_epi32(0x10)))
    })
}

impl SmallBlock for Q4_0 {
    const BYTES: usize = 18;
    const OFFSET: Option<f32> = Some(-8.0);

    #[inline(always)]
    unsafe fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        // SAFETY: the caller's promise.
        let scale = unsafe { half_at::<SIMD>(bytes, 0) };
        (scale, -8.0 * scale, nibbles(&bytes[2..18]))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn quants8(block: *const u8) -> [__m256i; 4] {
        // SAFETY: the caller's promise.
        unsafe { nibbles8(block.wrapping_add(2)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn quants16(block: *const u8) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe { nibbles16(block.wrapping_add(2)) }
    }
}

impl SmallBlock for Q4_1 {
    const BYTES: usize = 20;
    const OFFSET: Option<f32> = None;

    #[inline(always)]
    unsafe fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        // SAFETY: the caller's promise, here and below.
        let scale = unsafe { half_at::<SIMD>(bytes, 0) };
        // SAFETY: as above.
        let offset = unsafe { half_at::<SIMD>(bytes, 2) };
        (scale, offset, nibbles(&bytes[4..20]))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn quants8(block: *const u8) -> [__m256i; 4] {
        // SAFETY: the caller's promise.
        unsafe { nibbles8(block.wrapping_add(4)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn quants16(block: *const u8) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe { nibbles16(block.wrapping_add(4)) }
    }
}

impl SmallBlock for Q5_0 {
    const BYTES: usize = 22;
    const OFFSET: Option<f32> = Some(-16.0);

    #[inline(always)]
    unsafe fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        // SAFETY: the caller's promise.
        let scale = unsafe { half_at::<SIMD>(bytes, 0) };
        (scale, -16.0 * scale, nibbles_and_bits(&bytes[6..22], &bytes[2..6]))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn quants8(block: *const u8) -> [__m256i; 4] {
        // SAFETY: the caller's promise.
        unsafe { nibbles_and_bits8(block.wrapping_add(6), block.wrapping_add(2)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn quants16(block: *const u8) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe { nibbles_and_bits16(block.wrapping_add(6), block.wrapping_add(2)) }
    }
}

impl SmallBlock for Q5_1 {
    const BYTES: usize = 24;
    const OFFSET: Option<f32> = None;

    #[inline(always)]
    unsafe fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        // SAFETY: the caller's promise, here and below.
        let scale = unsafe { half_at::<SIMD>(bytes, 0) };
        // SAFETY: as above.
        let offset = unsafe { half_at::<SIMD>(bytes, 2) };
        (scale, offset, nibbles_and_bits(&bytes[8..24], &bytes[4..8]))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn quants8(block: *const u8) -> [__m256i; 4] {
        // SAFETY: the caller's promise.
        unsafe { nibbles_and_bits8(block.wrapping_add(8), block.wrapping_add(4)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn quants16(block: *const u8) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe { nibbles_and_bits16(block.wrapping_add(8), block.wrapping_add(4)) }
    }
}

impl SmallBlock for Q8_0 {
    const BYTES: usize = 34;
    const OFFSET: Option<f32> = Some(0.0);

    #[inline(always)]
    unsafe fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        let mut quants = [0i8; BLOCK];
        for (quant, &byte) in quants.iter_mut().zip(&bytes[2..34]) {
            *quant = byte.cast_signed();
        }
        // SAFETY: the caller's promise.
        (unsafe { half_at::<SIMD>(bytes, 0) }, 0.0, quants)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn quants8(block: *const u8) -> [__m256i; 4] {
        each!([2, 10, 18, 26], |at| {
            // SAFETY: the caller's promise.
            _mm256_cvtepi8_epi32(unsafe { load8(block.wrapping_add(at)) })
        })
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn quants16(block: *const u8) -> [__m512i; 2] {
        each!([2, 18], |at| {
            // SAFETY: the caller's promise.
            _mm512_cvtepi8_epi32(unsafe { load16(block.wrapping_add(at)) })
        })
    }
}

multiversion! {
    /// Widens blocks to f32; `out` holds 32 numbers a block.
    pub(super) fn dequantize_small<B: SmallBlock>(data: &[u8], out: &mut [f32]) = dequantize_small_body;
}

#[inline(always)]
fn dequantize_small_body<const SIMD: bool, B: SmallBlock>(data: &[u8], out: &mut [f32]) {
    let (chunks, _) = out.as_chunks_mut::<BLOCK>();
    for (block, out) in data.chunks_exact(B::BYTES).zip(chunks) {
        // SAFETY: `SIMD` is on only where `multiversion!` has chosen it for this processor.
        let (scale, offset, quants) = unsafe { B::unpack::<SIMD>(block) };
        for i in 0..BLOCK {
            out[i] = fma::<SIMD>(f32::from(quants[i]), scale, offset);
        }
    }
}
