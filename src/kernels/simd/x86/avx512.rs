//! Sixteen numbers in one register of 512 bits.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::each;
use super::super::lanes::{Factors, LANES, Lanes, ROUND};
use super::Avx2;

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
pub(in super::super) struct Avx512<const VNNI: bool>(__m512);

// Sums are of the factors' higher digits, and of the lower ones.
lanes!(
    impl [const VNNI: bool] for Avx512<VNNI>: [__m512i; 2], __m512i, __m512, __m512i,
    quants if VNNI, 24 accumulators, dots: VNNI, wide: VNNI
);

impl<const VNNI: bool> Avx512<VNNI> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn splat(value: f32) -> Self {
        Self(_mm512_set1_ps(value))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load(source: &[f32; LANES]) -> Self {
        Self(as_bits!([f32; LANES] as __m512, *source))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_f16(source: &[f16; LANES]) -> Self {
        Self(_mm512_cvtph_ps(as_bits!([f16; LANES] as __m256i, *source)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_bf16(source: &[bf16; LANES]) -> Self {
        let wide = _mm512_cvtepu16_epi32(as_bits!([bf16; LANES] as __m256i, *source));
        Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_i8(source: &[u8; LANES]) -> Self {
        Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(as_bits!([u8; LANES] as __m128i, *source))))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_fives(source: &[u8; LANES], fifths: u32) -> [Self; 2] {
        let bytes = _mm512_cvtepu8_epi32(as_bits!([u8; LANES] as __m128i, *source));
        let nibbles = [_mm512_and_si512(bytes, _mm512_set1_epi32(15)), _mm512_srli_epi32::<4>(bytes)];
        let fifths = as_bits!(u32 as [u16; 2], fifths);
        each!([0, 1], |half| {
            let fifth = _mm512_maskz_mov_epi32(fifths[half], _mm512_set1_epi32(16));
            Self(_mm512_cvtepi32_ps(_mm512_or_si512(nibbles[half], fifth)))
        })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_codes(source: &[u8; LANES], table: &[i8; LANES]) -> [Self; 2] {
        each!(2 of Avx2::<false>::coded(source, table), |numbers| Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(numbers))))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn half(value: f32) -> __m128 {
        Avx2::<false>::half(value)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn halves(source: [u8; 4]) -> __m128 {
        Avx2::<false>::halves(source)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn add_halves(halves: __m128, factor: f32, sums: __m128) -> __m128 {
        Avx2::<false>::add_halves(halves, factor, sums)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn pair(halves: __m128) -> [f32; 2] {
        Avx2::<false>::pair(halves)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn splat_first(halves: __m128) -> Self {
        Self(_mm512_broadcastss_ps(halves))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn no_folded() -> __m512 {
        _mm512_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn fold(self, halves: __m128, sums: __m512) -> __m512 {
        _mm512_fmadd_ps(self.0, _mm512_broadcastss_ps(halves), sums)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn folded_sum(a: __m512, b: __m512) -> f32 {
        Self(_mm512_add_ps(a, b)).sum()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn store(self, target: &mut [f32; LANES]) {
        *target = as_bits!(__m512 as [f32; LANES], self.0);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn add(self, other: Self) -> Self {
        Self(_mm512_add_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn sub(self, other: Self) -> Self {
        Self(_mm512_sub_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn mul(self, other: Self) -> Self {
        Self(_mm512_mul_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        Self(_mm512_fmadd_ps(self.0, factor.0, term.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn div(self, other: Self) -> Self {
        Self(_mm512_div_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn max(self, other: Self) -> Self {
        Self(_mm512_max_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn min(self, other: Self) -> Self {
        Self(_mm512_min_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn if_above(self, limit: Self, then: Self, otherwise: Self) -> Self {
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, limit.0);
        Self(_mm512_mask_blend_ps(above, otherwise.0, then.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn truncated(self) -> [u8; LANES] {
        as_bits!(__m128i as [u8; LANES], _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(self.0)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn abs(self) -> Self {
        Self(_mm512_abs_ps(self.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn sum(self) -> f32 {
        _mm512_reduce_add_ps(self.0)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn largest(self) -> f32 {
        _mm512_reduce_max_ps(self.0)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn power_of_two(self) -> Self {
        let moved = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
        Self(_mm512_castsi512_ps(_mm512_add_epi32(moved, _mm512_set1_epi32(0x3f80_0000))))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn zero_below(self, condition: Self, limit: f32) -> Self {
        let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(condition.0, _mm512_set1_ps(limit));
        Self(_mm512_maskz_mov_ps(kept, self.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn store_factors(self, factor: Self, target: &mut [Factors; LANES / 4]) -> Self {
        // The addend leaves the whole number and 128 in the lowest bits: the second byte is the higher digit, rounded, and
        // the first the lower one, with its sign the other way round.
        let addend = _mm512_set1_ps(ROUND + 128.0);
        let moved = _mm512_fmadd_ps(self.0, factor.0, addend);
        let order = as_bits!([u8; 64] as __m512i, DIGIT_ORDER);
        let digits = _mm512_permutexvar_epi8(order, _mm512_castps_si512(moved));
        let signs = _mm256_set1_epi64x(i64::from_le_bytes(LOWER_SIGNS));
        *target = as_bits!(__m256i as [Factors; LANES / 4], _mm256_xor_si256(_mm512_castsi512_si256(digits), signs));
        Self(_mm512_sub_ps(moved, addend))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn sums(start: i32) -> [__m512i; 2] {
        [_mm512_setzero_si512(), _mm512_set1_epi32(start)]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn bytes(source: &[[u8; 4]; LANES]) -> __m512i {
        as_bits!([[u8; 4]; LANES] as __m512i, *source)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn nibbles(source: &[[u8; 4]; LANES]) -> [__m512i; 2] {
        let (bytes, low) = (as_bits!([[u8; 4]; LANES] as __m512i, *source), _mm512_set1_epi8(15));
        [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low)]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_products(sums: [__m512i; 2], quants: __m512i, factors: &Factors) -> [__m512i; 2] {
        each!([0, 1], |digit| {
            _mm512_dpbusd_epi32(sums[digit], quants, _mm512_set1_epi32(factors[digit].cast_signed()))
        })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn total(sums: [__m512i; 2]) -> Self {
        Self(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(sums[0]), sums[1])))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn whole(value: i32) -> __m512i {
        _mm512_set1_epi32(value)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn from_whole(value: __m512i) -> Self {
        Self(_mm512_cvtepi32_ps(value))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn as_floats(value: __m512i) -> Self {
        Self(_mm512_castsi512_ps(value))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn load_bytes(source: &[u32; LANES]) -> __m512i {
        as_bits!([u32; LANES] as __m512i, *source)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_dots(sums: __m512i, bytes: __m512i, factors: &[u8; 4]) -> __m512i {
        _mm512_dpbusd_epi32(sums, bytes, _mm512_set1_epi32(i32::from_le_bytes(*factors)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_words(sums: __m512i, words: __m512i, factors: &[i16; 2]) -> __m512i {
        _mm512_dpwssd_epi32(sums, words, _mm512_set1_epi32(as_bits!([i16; 2] as i32, *factors)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_centred(sums: __m512i, bytes: __m512i, factors: &[u8; 4]) -> __m512i {
        let factors = _mm512_set1_epi32(i32::from_le_bytes(*factors));
        let bytes = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
        let negative = _mm512_movepi8_mask(bytes);
        let signed = _mm512_mask_sub_epi8(factors, negative, _mm512_setzero_si512(), factors);
        let products = _mm512_maddubs_epi16(_mm512_abs_epi8(bytes), signed);
        _mm512_add_epi32(sums, _mm512_madd_epi16(products, _mm512_set1_epi16(1)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn no_pairs() -> __m512i {
        _mm512_setzero_si512()
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_pairs(sums: __m512i, bytes: __m512i, factors: &[u8; 4]) -> __m512i {
        let factors = _mm512_set1_epi32(i32::from_le_bytes(*factors));
        _mm512_add_epi16(sums, _mm512_maddubs_epi16(bytes, factors))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn add_both(sums: __m512i, pairs: __m512i) -> __m512i {
        _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn every(source: &[u8], step: usize) -> [u32; LANES] {
        let last = (LANES - 1) * step;
        assert!(
            i32::try_from(last).is_ok() && source.len() >= last + 4,
            "words {step} bytes apart, in {}",
            source.len()
        );
        let step = i32::try_from(step).unwrap_or(0); // it is smaller than the last place
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(step));
        // SAFETY: the last of them lies inside of the slice.
        let words = unsafe { _mm512_i32gather_epi32::<1>(places, source.as_ptr().cast()) };
        as_bits!(__m512i as [u32; LANES], words)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn look_up(codes: &[u32; LANES], table: &[u8; LANES]) -> [u32; LANES] {
        let table = _mm512_broadcast_i32x4(as_bits!([u8; LANES] as __m128i, *table));
        as_bits!(__m512i as [u32; LANES], _mm512_shuffle_epi8(table, as_bits!([u32; LANES] as __m512i, *codes)))
    }
}
