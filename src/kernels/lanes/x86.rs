//! The registers of x86-64.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;
use std::mem::transmute;

use half::f16;

use super::super::simd::each;
use super::{Factors, LANES, Lanes, ROUND};

// Both are private to `lanes`, whose `run` is the caller that has their instructions.
//
// In both: arrays and vectors that are transmuted into each other have one size and no invalid bits, and loads and
// stores go through references to arrays of the vector's size.

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 2]);

impl Avx2 {
    #[inline(always)]
    fn zip(self, other: Self, apply: impl Fn(__m256, __m256) -> __m256) -> Self {
        Self([apply(self.0[0], other.0[0]), apply(self.0[1], other.0[1])])
    }
}

impl Lanes for Avx2 {
    type Sums = [__m256i; 2];
    /// Every second byte of the groups, and the ones between, as 16 bits.
    type Quants = [[__m256i; 2]; 2];

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
    fn store_factors(self, factor: Self, target: &mut [Factors; LANES / 4]) -> Self {
        // SAFETY: see the top of the module. Packing works within halves: the permutation restores the order.
        unsafe {
            let whole = each!(2 of self.mul(factor).0, |number| _mm256_cvtps_epi32(number));
            let packed = _mm256_packs_epi32(whole[0], whole[1]);
            let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
            // Of each four numbers the second and the third change places.
            let low = _mm256_shufflelo_epi16::<0b11_01_10_00>(packed);
            let both = _mm256_shufflehi_epi16::<0b11_01_10_00>(low);
            *target = transmute::<__m256i, [Factors; LANES / 4]>(both);
            Self(each!(2 of whole, |whole| _mm256_cvtepi32_ps(whole)))
        }
    }

    #[inline(always)]
    fn sums(start: i32) -> Self::Sums {
        // SAFETY: the caller has AVX2.
        [unsafe { _mm256_set1_epi32(start) }; 2]
    }

    #[inline(always)]
    fn bytes(source: &[[u8; 4]; LANES]) -> Self::Quants {
        // SAFETY: see the top of the module.
        unsafe {
            let bytes = transmute::<[[u8; 4]; LANES], [__m256i; 2]>(*source);
            [
                each!(2 of bytes, |bytes| _mm256_and_si256(bytes, _mm256_set1_epi16(0xff))),
                each!(2 of bytes, |bytes| _mm256_srli_epi16::<8>(bytes)),
            ]
        }
    }

    #[inline(always)]
    fn nibbles(source: &[[u8; 4]; LANES]) -> [Self::Quants; 2] {
        // SAFETY: see the top of the module.
        unsafe {
            let bytes = transmute::<[[u8; 4]; LANES], [__m256i; 2]>(*source);
            let low = _mm256_set1_epi16(15);
            [
                [
                    each!(2 of bytes, |bytes| _mm256_and_si256(bytes, low)),
                    each!(2 of bytes, |bytes| _mm256_and_si256(_mm256_srli_epi16::<8>(bytes), low)),
                ],
                [
                    each!(2 of bytes, |bytes| _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low)),
                    each!(2 of bytes, |bytes| _mm256_srli_epi16::<12>(bytes)),
                ],
            ]
        }
    }

    #[inline(always)]
    fn add_products(sums: Self::Sums, quants: Self::Quants, factors: &Factors) -> Self::Sums {
        // SAFETY: the caller has AVX2.
        unsafe {
            let [even, odd] = each!(2 of factors, |factors| _mm256_set1_epi32(factors.cast_signed()));
            let sum = |half: usize| {
                let products = _mm256_madd_epi16(quants[0][half], even);
                let sum = _mm256_add_epi32(sums[half], products);
                _mm256_add_epi32(sum, _mm256_madd_epi16(quants[1][half], odd))
            };
            [sum(0), sum(1)]
        }
    }

    #[inline(always)]
    fn total(sums: Self::Sums) -> Self {
        // SAFETY: the caller has AVX2.
        Self(each!(2 of sums, |sums| unsafe { _mm256_cvtepi32_ps(sums) }))
    }
}

/// Where the digits of four numbers of 32 bits are: the second byte of each, and then the first.
const DIGIT_ORDER: [u8; 64] = {
    let mut order = [0; 64];
    let mut at = 0_u8;
    while at < 32 {
        let number = at / 8 * 4 + at % 4;
        order[at as usize] = number * 4 + if at % 8 < 4 { 1 } else { 0 };
        at += 1;
    }
    order
};

/// The sign bits of the lower digits of four numbers.
const LOWER_SIGNS: [u8; 8] = [0, 0, 0, 0, 0x80, 0x80, 0x80, 0x80];

/// AVX-512 F, BW, DQ and VL; with `VNNI` also VBMI and VNNI, without which there are no products of quants.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const VNNI: bool>(__m512);

impl<const VNNI: bool> Lanes for Avx512<VNNI> {
    /// Of the factors' higher digits, and of the lower ones.
    type Sums = [__m512i; 2];
    type Quants = __m512i;

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
    fn store_factors(self, factor: Self, target: &mut [Factors; LANES / 4]) -> Self {
        assert!(VNNI, "quants without VNNI");
        // SAFETY: see the top of the module; the caller has AVX-512 VBMI.
        unsafe {
            // The addend leaves the whole number and 128 in the lowest bits: the second byte is the higher digit,
            // rounded, and the first the lower one, with its sign the other way round.
            let addend = _mm512_set1_ps(ROUND + 128.0);
            let moved = _mm512_fmadd_ps(self.0, factor.0, addend);
            let order = transmute::<[u8; 64], __m512i>(DIGIT_ORDER);
            let digits = _mm512_castsi512_si256(_mm512_permutexvar_epi8(order, _mm512_castps_si512(moved)));
            let digits = _mm256_xor_si256(digits, _mm256_set1_epi64x(i64::from_le_bytes(LOWER_SIGNS)));
            *target = transmute::<__m256i, [Factors; LANES / 4]>(digits);
            Self(_mm512_sub_ps(moved, addend))
        }
    }

    #[inline(always)]
    fn sums(start: i32) -> Self::Sums {
        // SAFETY: the caller has AVX-512.
        unsafe { [_mm512_setzero_si512(), _mm512_set1_epi32(start)] }
    }

    #[inline(always)]
    fn bytes(source: &[[u8; 4]; LANES]) -> Self::Quants {
        // SAFETY: see the top of the module.
        unsafe { transmute::<[[u8; 4]; LANES], __m512i>(*source) }
    }

    #[inline(always)]
    fn nibbles(source: &[[u8; 4]; LANES]) -> [Self::Quants; 2] {
        // SAFETY: see the top of the module.
        unsafe {
            let bytes = transmute::<[[u8; 4]; LANES], __m512i>(*source);
            let low = _mm512_set1_epi8(15);
            [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low)]
        }
    }

    #[inline(always)]
    fn add_products(sums: Self::Sums, quants: Self::Quants, factors: &Factors) -> Self::Sums {
        assert!(VNNI, "quants without VNNI");
        // SAFETY: the caller has AVX-512 and VNNI.
        unsafe {
            [
                _mm512_dpbusd_epi32(sums[0], quants, _mm512_set1_epi32(factors[0].cast_signed())),
                _mm512_dpbusd_epi32(sums[1], quants, _mm512_set1_epi32(factors[1].cast_signed())),
            ]
        }
    }

    #[inline(always)]
    fn total(sums: Self::Sums) -> Self {
        // SAFETY: the caller has AVX-512.
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(sums[0]), sums[1]))) }
    }
}
