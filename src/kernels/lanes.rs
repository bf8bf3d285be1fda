//! Sixteen numbers at once, for kernels whose loops the compiler does not turn into good vector code by itself.
//!
//! A kernel is an `#[inline(always)]` body over `L: Lanes`. The implementations for x86-64 may be used only where the
//! caller has been compiled for, and runs on, their instruction set; [`Portable`] may be used everywhere. Integer sums
//! are exact, so they are equal on all of them; sums of floats differ by whether products are rounded before they are
//! added.
//!
//! Not for: kernels that are well served by plain loops (see [`super::simd`]).

use half::f16;

/// How many numbers a value of a [`Lanes`] type holds.
pub(crate) const LANES: usize = 16;

/// Below this, `exp` would leave the normal numbers.
const LEAST_EXPONENT: f32 = -87.3;

/// Sixteen f32 in registers.
pub(crate) trait Lanes: Copy {
    /// Sixteen i32.
    type Ints: Copy;
    /// Sixteen pairs of i16.
    type Pairs: Copy;

    /// Sums that stay in registers beside what is added to them.
    const ACCUMULATORS: usize;

    fn splat(value: f32) -> Self;
    fn load(source: &[f32; LANES]) -> Self;
    fn load_f16(source: &[f16; LANES]) -> Self;
    fn store(self, target: &mut [f32; LANES]);

    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self * factor + term`
    fn mul_add(self, factor: Self, term: Self) -> Self;
    /// The larger one; `other` where one is not a number.
    fn max(self, other: Self) -> Self;
    fn abs(self) -> Self;
    fn sum(self) -> f32;
    fn largest(self) -> f32;

    /// `2^k` for values that hold the whole number `k` in their lowest bits, as rounding by a large addend leaves it.
    fn power_of_two(self) -> Self;
    /// 0 where `condition` is below `limit`, the value elsewhere, also where `condition` is not a number.
    fn zero_below(self, condition: Self, limit: f32) -> Self;
    /// Rounds to i16, to nearest even; values must fit.
    fn store_i16(self, target: &mut [i16; LANES]);

    fn ints(value: i32) -> Self::Ints;
    fn from_ints(ints: Self::Ints) -> Self;
    /// Sixteen pairs of signed bytes.
    fn pairs_i8(source: &[[u8; 2]; LANES]) -> Self::Pairs;
    /// The lower and the upper four bits of sixteen pairs of bytes, each as 0..16.
    fn pairs_u4(source: &[[u8; 2]; LANES]) -> [Self::Pairs; 2];
    /// Adds `pairs[lane][0] * factors[0] + pairs[lane][1] * factors[1]` to each lane.
    fn add_products(sums: Self::Ints, pairs: Self::Pairs, factors: [i16; 2]) -> Self::Ints;

    /// `exp` of values that are not above 0, to about two units in the last place; 0 where it would leave the normal
    /// numbers. The same approximation as that of [`super::vector::softmax`].
    #[inline(always)]
    fn exp_nonpositive(self) -> Self {
        const LN2_HIGH: f32 = 0.693_359_4; // 355/512: exact products with small integers
        const LN2_LOW: f32 = -2.121_944_4e-4; // ln(2) - LN2_HIGH
        /// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
        const ROUND: f32 = 12_582_912.0;
        const TAYLOR: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

        // In this order what is not a number stays none.
        let clamped = Self::splat(LEAST_EXPONENT).max(self);
        let rounded = clamped.mul_add(Self::splat(std::f32::consts::LOG2_E), Self::splat(ROUND));
        let k = rounded.sub(Self::splat(ROUND));
        let r = k.mul_add(Self::splat(-LN2_LOW), k.mul_add(Self::splat(-LN2_HIGH), clamped));
        let mut p = Self::splat(1.0 / 5040.0);
        for coefficient in TAYLOR {
            p = p.mul_add(r, Self::splat(coefficient));
        }
        p.mul(rounded.power_of_two()).zero_below(self, LEAST_EXPONENT)
    }
}

/// Plain loops.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, apply: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| apply(self.0[lane], other.0[lane])))
    }
}

impl Lanes for Portable {
    type Ints = [i32; LANES];
    type Pairs = [[i16; 2]; LANES];

    const ACCUMULATORS: usize = 3;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    fn load(source: &[f32; LANES]) -> Self {
        Self(*source)
    }

    #[inline(always)]
    fn load_f16(source: &[f16; LANES]) -> Self {
        Self(source.map(f16::to_f32))
    }

    #[inline(always)]
    fn store(self, target: &mut [f32; LANES]) {
        *target = self.0;
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        self.mul(factor).add(term)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Self(self.0.map(f32::abs))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let mut sums = self.0;
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                sums[lane] += sums[lane + width];
            }
        }
        sums[0]
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        Self(self.0.map(|value| f32::from_bits((value.to_bits() << 23).wrapping_add(0x3f80_0000))))
    }

    #[inline(always)]
    fn zero_below(self, condition: Self, limit: f32) -> Self {
        self.zip(condition, |value, condition| if condition < limit { 0.0 } else { value })
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation)] // promised to fit
    fn store_i16(self, target: &mut [i16; LANES]) {
        *target = self.0.map(|value| value.round_ties_even() as i16);
    }

    #[inline(always)]
    fn ints(value: i32) -> Self::Ints {
        [value; LANES]
    }

    #[inline(always)]
    #[expect(clippy::cast_precision_loss)] // rounds, as the vector instructions do
    fn from_ints(ints: Self::Ints) -> Self {
        Self(ints.map(|value| value as f32))
    }

    #[inline(always)]
    fn pairs_i8(source: &[[u8; 2]; LANES]) -> Self::Pairs {
        source.map(|pair| pair.map(|byte| i16::from(byte.cast_signed())))
    }

    #[inline(always)]
    fn pairs_u4(source: &[[u8; 2]; LANES]) -> [Self::Pairs; 2] {
        [
            source.map(|pair| pair.map(|byte| i16::from(byte & 15))),
            source.map(|pair| pair.map(|byte| i16::from(byte >> 4))),
        ]
    }

    #[inline(always)]
    fn add_products(sums: Self::Ints, pairs: Self::Pairs, factors: [i16; 2]) -> Self::Ints {
        let [first, second] = factors.map(i32::from);
        std::array::from_fn(|lane| {
            let [a, b] = pairs[lane].map(i32::from);
            sums[lane] + a * first + b * second
        })
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports)]
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use half::f16;

    use super::super::simd::each;
    use super::{LANES, Lanes};

    /// Two factors as the 32 bits that are repeated in every lane.
    #[inline(always)]
    fn pair_bits(factors: [i16; 2]) -> i32 {
        let ([a, b], [c, d]) = (factors[0].to_le_bytes(), factors[1].to_le_bytes());
        i32::from_le_bytes([a, b, c, d])
    }

    // In both: arrays and vectors that are transmuted into each other have one size and no invalid bits, and loads and
    // stores go through references to arrays of the vector's size.

    /// AVX2, FMA and F16C.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2([__m256; 2]);

    impl Avx2 {
        #[inline(always)]
        fn zip(self, other: Self, apply: impl Fn(__m256, __m256) -> __m256) -> Self {
            Self([apply(self.0[0], other.0[0]), apply(self.0[1], other.0[1])])
        }
    }

    impl Lanes for Avx2 {
        type Ints = [__m256i; 2];
        type Pairs = [__m256i; 2];

        const ACCUMULATORS: usize = 6;

        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: the caller has AVX2, here and below.
            Self([unsafe { _mm256_set1_ps(value) }; 2])
        }

        #[inline(always)]
        fn load(source: &[f32; LANES]) -> Self {
            // SAFETY: see the top of the module.
            Self(unsafe { transmute::<[f32; LANES], [__m256; 2]>(*source) })
        }

        #[inline(always)]
        fn load_f16(source: &[f16; LANES]) -> Self {
            // SAFETY: see the top of the module; f16 is a transparent u16.
            unsafe {
                let [low, high] = transmute::<[f16; LANES], [__m128i; 2]>(*source);
                Self([_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)])
            }
        }

        #[inline(always)]
        fn store(self, target: &mut [f32; LANES]) {
            // SAFETY: see the top of the module.
            *target = unsafe { transmute::<[__m256; 2], [f32; LANES]>(self.0) };
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: the caller has AVX2.
            self.zip(other, |a, b| unsafe { _mm256_add_ps(a, b) })
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: the caller has AVX2.
            self.zip(other, |a, b| unsafe { _mm256_sub_ps(a, b) })
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: the caller has AVX2.
            self.zip(other, |a, b| unsafe { _mm256_mul_ps(a, b) })
        }

        #[inline(always)]
        fn mul_add(self, factor: Self, term: Self) -> Self {
            // SAFETY: the caller has FMA.
            unsafe {
                Self([
                    _mm256_fmadd_ps(self.0[0], factor.0[0], term.0[0]),
                    _mm256_fmadd_ps(self.0[1], factor.0[1], term.0[1]),
                ])
            }
        }

        #[inline(always)]
        fn max(self, other: Self) -> Self {
            // SAFETY: the caller has AVX2.
            self.zip(other, |a, b| unsafe { _mm256_max_ps(a, b) })
        }

        #[inline(always)]
        fn abs(self) -> Self {
            // SAFETY: the caller has AVX2.
            self.zip(Self::splat(-0.0), |a, sign| unsafe { _mm256_andnot_ps(sign, a) })
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: the caller has AVX2.
            unsafe {
                let eight = _mm256_add_ps(self.0[0], self.0[1]);
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }

        #[inline(always)]
        fn largest(self) -> f32 {
            // SAFETY: the caller has AVX2.
            unsafe {
                let eight = _mm256_max_ps(self.0[0], self.0[1]);
                let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
            }
        }

        #[inline(always)]
        fn power_of_two(self) -> Self {
            // SAFETY: the caller has AVX2.
            Self(each!(2 of self.0, |value| unsafe {
                let moved = _mm256_slli_epi32::<23>(_mm256_castps_si256(value));
                _mm256_castsi256_ps(_mm256_add_epi32(moved, _mm256_set1_epi32(0x3f80_0000)))
            }))
        }

        #[inline(always)]
        fn zero_below(self, condition: Self, limit: f32) -> Self {
            // SAFETY: the caller has AVX2.
            self.zip(condition, |value, condition| unsafe {
                _mm256_and_ps(value, _mm256_cmp_ps::<_CMP_NLT_UQ>(condition, _mm256_set1_ps(limit)))
            })
        }

        #[inline(always)]
        fn store_i16(self, target: &mut [i16; LANES]) {
            // SAFETY: see the top of the module. Packing works within halves: the permutation restores the order.
            unsafe {
                let packed = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0[0]), _mm256_cvtps_epi32(self.0[1]));
                *target = transmute::<__m256i, [i16; LANES]>(_mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
            }
        }

        #[inline(always)]
        fn ints(value: i32) -> Self::Ints {
            // SAFETY: the caller has AVX2.
            [unsafe { _mm256_set1_epi32(value) }; 2]
        }

        #[inline(always)]
        fn from_ints(ints: Self::Ints) -> Self {
            // SAFETY: the caller has AVX2.
            Self(each!(2 of ints, |ints| unsafe { _mm256_cvtepi32_ps(ints) }))
        }

        #[inline(always)]
        fn pairs_i8(source: &[[u8; 2]; LANES]) -> Self::Pairs {
            // SAFETY: see the top of the module.
            unsafe {
                each!(2 of transmute::<[[u8; 2]; LANES], [__m128i; 2]>(*source), |bytes| _mm256_cvtepi8_epi16(bytes))
            }
        }

        #[inline(always)]
        fn pairs_u4(source: &[[u8; 2]; LANES]) -> [Self::Pairs; 2] {
            // SAFETY: see the top of the module.
            unsafe {
                let bytes = transmute::<[[u8; 2]; LANES], [__m128i; 2]>(*source);
                let bytes = each!(2 of bytes, |bytes| _mm256_cvtepu8_epi16(bytes));
                [
                    each!(2 of bytes, |bytes| _mm256_and_si256(bytes, _mm256_set1_epi16(15))),
                    each!(2 of bytes, |bytes| _mm256_srli_epi16::<4>(bytes)),
                ]
            }
        }

        #[inline(always)]
        fn add_products(sums: Self::Ints, pairs: Self::Pairs, factors: [i16; 2]) -> Self::Ints {
            // SAFETY: the caller has AVX2.
            unsafe {
                let factors = _mm256_set1_epi32(pair_bits(factors));
                [
                    _mm256_add_epi32(sums[0], _mm256_madd_epi16(pairs[0], factors)),
                    _mm256_add_epi32(sums[1], _mm256_madd_epi16(pairs[1], factors)),
                ]
            }
        }
    }

    /// Adds products of pairs of i16 to i32.
    ///
    /// As assembly, because the compiler takes the intrinsic apart into a multiplication and an addition where it thinks
    /// that latency counts; throughput does here.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn multiply_pairs(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: arithmetic on registers, of an instruction that the feature promises.
        unsafe {
            std::arch::asm!(
                "vpdpwssd {sums}, {a}, {b}",
                sums = inout(zmm_reg) sums,
                a = in(zmm_reg) a,
                b = in(zmm_reg) b,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sums
    }

    /// AVX-512 F, BW, DQ and VL; for `add_products` also VNNI.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512(__m512);

    impl Lanes for Avx512 {
        type Ints = __m512i;
        type Pairs = __m512i;

        const ACCUMULATORS: usize = 24;

        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: the caller has AVX-512, here and below.
            Self(unsafe { _mm512_set1_ps(value) })
        }

        #[inline(always)]
        fn load(source: &[f32; LANES]) -> Self {
            // SAFETY: see the top of the module.
            Self(unsafe { transmute::<[f32; LANES], __m512>(*source) })
        }

        #[inline(always)]
        fn load_f16(source: &[f16; LANES]) -> Self {
            // SAFETY: see the top of the module; f16 is a transparent u16.
            Self(unsafe { _mm512_cvtph_ps(transmute::<[f16; LANES], __m256i>(*source)) })
        }

        #[inline(always)]
        fn store(self, target: &mut [f32; LANES]) {
            // SAFETY: see the top of the module.
            *target = unsafe { transmute::<__m512, [f32; LANES]>(self.0) };
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: the caller has AVX-512.
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: the caller has AVX-512.
            Self(unsafe { _mm512_sub_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: the caller has AVX-512.
            Self(unsafe { _mm512_mul_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn mul_add(self, factor: Self, term: Self) -> Self {
            // SAFETY: the caller has AVX-512.
            Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, term.0) })
        }

        #[inline(always)]
        fn max(self, other: Self) -> Self {
            // SAFETY: the caller has AVX-512.
            Self(unsafe { _mm512_max_ps(self.0, other.0) })
        }

        #[inline(always)]
        fn abs(self) -> Self {
            // SAFETY: the caller has AVX-512.
            Self(unsafe { _mm512_abs_ps(self.0) })
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: the caller has AVX-512.
            unsafe { _mm512_reduce_add_ps(self.0) }
        }

        #[inline(always)]
        fn largest(self) -> f32 {
            // SAFETY: the caller has AVX-512.
            unsafe { _mm512_reduce_max_ps(self.0) }
        }

        #[inline(always)]
        fn power_of_two(self) -> Self {
            // SAFETY: the caller has AVX-512.
            unsafe {
                let moved = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
                Self(_mm512_castsi512_ps(_mm512_add_epi32(moved, _mm512_set1_epi32(0x3f80_0000))))
            }
        }

        #[inline(always)]
        fn zero_below(self, condition: Self, limit: f32) -> Self {
            // SAFETY: the caller has AVX-512.
            unsafe {
                let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(condition.0, _mm512_set1_ps(limit));
                Self(_mm512_maskz_mov_ps(kept, self.0))
            }
        }

        #[inline(always)]
        fn store_i16(self, target: &mut [i16; LANES]) {
            // SAFETY: see the top of the module.
            *target = unsafe { transmute::<__m256i, [i16; LANES]>(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(self.0))) };
        }

        #[inline(always)]
        fn ints(value: i32) -> Self::Ints {
            // SAFETY: the caller has AVX-512.
            unsafe { _mm512_set1_epi32(value) }
        }

        #[inline(always)]
        fn from_ints(ints: Self::Ints) -> Self {
            // SAFETY: the caller has AVX-512.
            Self(unsafe { _mm512_cvtepi32_ps(ints) })
        }

        #[inline(always)]
        fn pairs_i8(source: &[[u8; 2]; LANES]) -> Self::Pairs {
            // SAFETY: see the top of the module.
            unsafe { _mm512_cvtepi8_epi16(transmute::<[[u8; 2]; LANES], __m256i>(*source)) }
        }

        #[inline(always)]
        fn pairs_u4(source: &[[u8; 2]; LANES]) -> [Self::Pairs; 2] {
            // SAFETY: see the top of the module.
            unsafe {
                let bytes = _mm512_cvtepu8_epi16(transmute::<[[u8; 2]; LANES], __m256i>(*source));
                [_mm512_and_si512(bytes, _mm512_set1_epi16(15)), _mm512_srli_epi16::<4>(bytes)]
            }
        }

        #[inline(always)]
        fn add_products(sums: Self::Ints, pairs: Self::Pairs, factors: [i16; 2]) -> Self::Ints {
            // SAFETY: the caller has AVX-512 and VNNI.
            unsafe { multiply_pairs(sums, pairs, _mm512_set1_epi32(pair_bits(factors))) }
        }
    }
}
