//! The plain number formats in which caches and weights are stored, and their widening to f32 in registers.
//!
//! Not for: block formats, whose numbers share a scale (see [`super::quant`]).

use half::{bf16, f16};

/// A storage format that kernels widen to f32 in registers.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Rounds an f32 to this format, to nearest even.
    fn narrow(value: f32) -> Self;

    /// Widens one number; exact.
    fn widen(self) -> f32;

    /// Widens eight numbers at once; exact.
    ///
    /// # Safety
    /// With `SIMD`, the processor has AVX2 and F16C.
    unsafe fn widen8<const SIMD: bool>(source: &[Self; 8]) -> [f32; 8];
}

impl Element for f32 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn widen8<const SIMD: bool>(source: &[Self; 8]) -> [f32; 8] {
        *source
    }
}

impl Element for f16 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        f16::from_f32(value)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    unsafe fn widen8<const SIMD: bool>(source: &[Self; 8]) -> [f32; 8] {
        #[cfg(target_arch = "x86_64")]
        if SIMD {
            // SAFETY: the caller promises F16C with `SIMD`.
            return unsafe { x86::widen_halves(*source) };
        }
        source.map(f16::to_f32)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        // A bf16 is the upper half of an f32.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    unsafe fn widen8<const SIMD: bool>(source: &[Self; 8]) -> [f32; 8] {
        #[cfg(target_arch = "x86_64")]
        if SIMD {
            // SAFETY: the caller promises AVX2 with `SIMD`.
            return unsafe { x86::widen_brains(*source) };
        }
        source.map(Self::widen)
    }
}

/// Numbers come and go by value, not through memory: the compiler then keeps them in registers.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m128i, __m256, __m256i, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_slli_epi32};
    use std::mem::transmute;

    use super::{bf16, f16};

    #[inline]
    #[target_feature(enable = "avx,f16c")]
    pub(super) fn widen_halves(source: [f16; 8]) -> [f32; 8] {
        // SAFETY: f16 is a transparent u16: numbers of the same size in every pattern of bits.
        let halves = unsafe { transmute::<[f16; 8], __m128i>(source) };
        let wide = _mm256_cvtph_ps(halves);
        // SAFETY: numbers of the same size in every pattern of bits.
        unsafe { transmute::<__m256, [f32; 8]>(wide) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn widen_brains(source: [bf16; 8]) -> [f32; 8] {
        // SAFETY: bf16 is a transparent u16: numbers of the same size in every pattern of bits.
        let brains = unsafe { transmute::<[bf16; 8], __m128i>(source) };
        let bits = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(brains));
        // SAFETY: numbers of the same size in every pattern of bits.
        unsafe { transmute::<__m256i, [f32; 8]>(bits) }
    }
}
