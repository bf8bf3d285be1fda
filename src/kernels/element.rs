//! The plain number formats in which caches and weights are stored, and their widening to f32 in registers.
//!
//! Not for: block formats, whose numbers share a scale (see [`super::quant`]).

use half::{bf16, f16};

use super::simd::{LANES, Lanes};

/// A storage format that kernels widen to f32 in registers.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Rounds an f32 to this format, to nearest even.
    fn narrow(value: f32) -> Self;

    /// Widens one number; exact.
    fn widen(self) -> f32;

    /// Widens sixteen numbers at once; exact.
    #[doc(hidden)]
    fn load<L: Lanes>(source: &[Self; LANES]) -> L;
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
    fn load<L: Lanes>(source: &[Self; LANES]) -> L {
        L::load(source)
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
    fn load<L: Lanes>(source: &[Self; LANES]) -> L {
        L::load_f16(source)
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
    fn load<L: Lanes>(source: &[Self; LANES]) -> L {
        L::load_bf16(source)
    }
}
