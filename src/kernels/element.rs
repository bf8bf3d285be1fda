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

    /// Widens eight numbers at once; exact. With `SIMD`, the caller runs on a processor with F16C.
    fn widen8<const SIMD: bool>(source: &[Self; 8]) -> [f32; 8];
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
    fn widen8<const SIMD: bool>(source: &[Self; 8]) -> [f32; 8] {
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
    fn widen8<const SIMD: bool>(source: &[Self; 8]) -> [f32; 8] {
        #[cfg(target_arch = "x86_64")]
        if SIMD {
            use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
            let mut out = [0.0; 8];
            // SAFETY: `source` and `out` are as long as the loads and stores, which need no alignment; f16 is a
            // transparent u16; the caller promises F16C with `SIMD`.
            unsafe {
                let halves = _mm_loadu_si128(source.as_ptr().cast());
                _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(halves));
            }
            return out;
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
    fn widen8<const SIMD: bool>(source: &[Self; 8]) -> [f32; 8] {
        source.map(Self::widen)
    }
}
