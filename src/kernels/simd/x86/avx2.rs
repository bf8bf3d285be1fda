//! Sixteen numbers in two registers of 256 bits.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::super::each;
use super::super::lanes::{Factors, LANES, Lanes};
use super::super::portable::word;

/// AVX2, FMA and F16C; with `DOTS` AVX-VNNI, too.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2<const DOTS: bool>([__m256; 2]);

/// Every second byte of sixteen groups of four, and the ones between, as 16 bits.
type WordPairs = [[__m256i; 2]; 2];

lanes!(
    impl [const DOTS: bool] for Avx2<DOTS>: [__m256i; 2], WordPairs, __m256, [__m256i; 2],
    quants if true, 6 accumulators, dots: DOTS, wide: false
);

impl<const DOTS: bool> Avx2<DOTS> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn splat(value: f32) -> Self {
        Self([_mm256_set1_ps(value); 2])
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load(source: &[f32; LANES]) -> Self {
        Self(as_bits!([f32; LANES] as [__m256; 2], *source))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_f16(source: &[f16; LANES]) -> Self {
        Self(each!(2 of as_bits!([f16; LANES] as [__m128i; 2], *source), |half| _mm256_cvtph_ps(half)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_bf16(source: &[bf16; LANES]) -> Self {
        Self(each!(2 of as_bits!([bf16; LANES] as [__m128i; 2], *source), |half| {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
        }))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_i8(source: &[u8; LANES]) -> Self {
        Self(each!(2 of as_bits!([u8; LANES] as [i64; 2], *source), |half| {
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(half)))
        }))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_fives(source: &[u8; LANES], fifths: u32) -> [Self; 2] {
        let fifths = _mm256_set1_epi32(fifths.cast_signed());
        let bits = each!([0, 8, 16, 24], |first| {
            let bit = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
            _mm256_slli_epi32::<4>(_mm256_and_si256(_mm256_srlv_epi32(fifths, bit), _mm256_set1_epi32(1)))
        });
        let bytes = as_bits!([u8; LANES] as [i64; 2], *source);
        let bytes = each!(2 of bytes, |half| _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(half)));
        [
            Self(each!([0, 1], |half| {
                let low = _mm256_and_si256(bytes[half], _mm256_set1_epi32(15));
                _mm256_cvtepi32_ps(_mm256_or_si256(low, bits[half]))
            })),
            Self(each!([0, 1], |half| {
                _mm256_cvtepi32_ps(_mm256_or_si256(_mm256_srli_epi32::<4>(bytes[half]), bits[2 + half]))
            })),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_codes(source: &[u8; LANES], table: &[i8; LANES]) -> [Self; 2] {
        each!(2 of Self::coded(source, table), |numbers| {
            let halves = [numbers, _mm_unpackhi_epi64(numbers, numbers)];
            Self(each!(2 of halves, |half| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half))))
        })
    }

    /// What the lower four bits of sixteen bytes stand for in a table, and the upper ones, as bytes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn coded(source: &[u8; LANES], table: &[i8; LANES]) -> [__m128i; 2] {
        let (bytes, table) = (as_bits!([u8; LANES] as __m128i, *source), as_bits!([i8; LANES] as __m128i, *table));
        let codes = [bytes, _mm_srli_epi16::<4>(bytes)];
        each!(2 of codes, |codes| _mm_shuffle_epi8(table, _mm_and_si128(codes, _mm_set1_epi8(15))))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn half(value: f32) -> __m128 {
        _mm_set_ss(value)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn halves(source: [u8; 4]) -> __m128 {
        _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from_le_bytes(source)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn add_halves(halves: __m128, factor: f32, sums: __m128) -> __m128 {
        _mm_fmadd_ps(halves, _mm_set1_ps(factor), sums)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn pair(halves: __m128) -> [f32; 2] {
        [_mm_cvtss_f32(halves), _mm_cvtss_f32(_mm_movehdup_ps(halves))]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn splat_first(halves: __m128) -> Self {
        Self([_mm256_broadcastss_ps(halves); 2])
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn no_folded() -> __m256 {
        _mm256_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn fold(self, halves: __m128, sums: __m256) -> __m256 {
        _mm256_fmadd_ps(_mm256_add_ps(self.0[0], self.0[1]), _mm256_broadcastss_ps(halves), sums)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn folded_sum(a: __m256, b: __m256) -> f32 {
        Self([a, b]).sum()
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn store(self, target: &mut [f32; LANES]) {
        *target = as_bits!([__m256; 2] as [f32; LANES], self.0);
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add(self, other: Self) -> Self {
        Self([_mm256_add_ps(self.0[0], other.0[0]), _mm256_add_ps(self.0[1], other.0[1])])
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sub(self, other: Self) -> Self {
        Self([_mm256_sub_ps(self.0[0], other.0[0]), _mm256_sub_ps(self.0[1], other.0[1])])
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn mul(self, other: Self) -> Self {
        Self([_mm256_mul_ps(self.0[0], other.0[0]), _mm256_mul_ps(self.0[1], other.0[1])])
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        Self(each!([0, 1], |half| _mm256_fmadd_ps(self.0[half], factor.0[half], term.0[half])))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn div(self, other: Self) -> Self {
        Self([_mm256_div_ps(self.0[0], other.0[0]), _mm256_div_ps(self.0[1], other.0[1])])
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn max(self, other: Self) -> Self {
        Self([_mm256_max_ps(self.0[0], other.0[0]), _mm256_max_ps(self.0[1], other.0[1])])
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn min(self, other: Self) -> Self {
        Self([_mm256_min_ps(self.0[0], other.0[0]), _mm256_min_ps(self.0[1], other.0[1])])
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn if_above(self, limit: Self, then: Self, otherwise: Self) -> Self {
        Self(each!([0, 1], |half| {
            let above = _mm256_cmp_ps::<_CMP_GT_OQ>(self.0[half], limit.0[half]);
            _mm256_blendv_ps(otherwise.0[half], then.0[half], above)
        }))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn truncated(self) -> [u8; LANES] {
        let lowest = each!(2 of self.0, |half| _mm256_and_si256(_mm256_cvttps_epi32(half), _mm256_set1_epi32(255)));
        // In each half of the registers by themselves: the first and the third four, then the second and the fourth.
        let words = _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_packus_epi32(lowest[0], lowest[1]));
        let bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        as_bits!(__m128i as [u8; LANES], bytes)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn abs(self) -> Self {
        Self(each!(2 of self.0, |value| _mm256_andnot_ps(_mm256_set1_ps(-0.0), value)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sum(self) -> f32 {
        let eight = _mm256_add_ps(self.0[0], self.0[1]);
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn largest(self) -> f32 {
        let eight = _mm256_max_ps(self.0[0], self.0[1]);
        let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn power_of_two(self) -> Self {
        Self(each!(2 of self.0, |value| {
            let moved = _mm256_slli_epi32::<23>(_mm256_castps_si256(value));
            _mm256_castsi256_ps(_mm256_add_epi32(moved, _mm256_set1_epi32(0x3f80_0000)))
        }))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn zero_below(self, condition: Self, limit: f32) -> Self {
        Self(each!([0, 1], |half| {
            let kept = _mm256_cmp_ps::<_CMP_NLT_UQ>(condition.0[half], _mm256_set1_ps(limit));
            _mm256_and_ps(self.0[half], kept)
        }))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn store_factors(self, factor: Self, target: &mut [Factors; LANES / 4]) -> Self {
        let whole = each!([0, 1], |half| _mm256_cvtps_epi32(_mm256_mul_ps(self.0[half], factor.0[half])));
        // Packing works within halves: the permutation restores the order.
        let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(whole[0], whole[1]));
        // Of each four numbers the second and the third change places.
        let low = _mm256_shufflelo_epi16::<0b11_01_10_00>(packed);
        let both = _mm256_shufflehi_epi16::<0b11_01_10_00>(low);
        *target = as_bits!(__m256i as [Factors; LANES / 4], both);
        Self(each!(2 of whole, |whole| _mm256_cvtepi32_ps(whole)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn sums(start: i32) -> [__m256i; 2] {
        [_mm256_set1_epi32(start); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn bytes(source: &[[u8; 4]; LANES]) -> WordPairs {
        let bytes = as_bits!([[u8; 4]; LANES] as [__m256i; 2], *source);
        [
            each!(2 of bytes, |bytes| _mm256_and_si256(bytes, _mm256_set1_epi16(0xff))),
            each!(2 of bytes, |bytes| _mm256_srli_epi16::<8>(bytes)),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn nibbles(source: &[[u8; 4]; LANES]) -> [WordPairs; 2] {
        let bytes = as_bits!([[u8; 4]; LANES] as [__m256i; 2], *source);
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

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_products(sums: [__m256i; 2], quants: WordPairs, factors: &Factors) -> [__m256i; 2] {
        let [even, odd] = each!(2 of factors, |factors| _mm256_set1_epi32(factors.cast_signed()));
        each!([0, 1], |half| {
            let sum = _mm256_add_epi32(sums[half], _mm256_madd_epi16(quants[0][half], even));
            _mm256_add_epi32(sum, _mm256_madd_epi16(quants[1][half], odd))
        })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn total(sums: [__m256i; 2]) -> Self {
        Self(each!(2 of sums, |sums| _mm256_cvtepi32_ps(sums)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn whole(value: i32) -> [__m256i; 2] {
        [_mm256_set1_epi32(value); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn from_whole(value: [__m256i; 2]) -> Self {
        Self::total(value)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn as_floats(value: [__m256i; 2]) -> Self {
        Self(each!(2 of value, |half| _mm256_castsi256_ps(half)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_bytes(source: &[u32; LANES]) -> [__m256i; 2] {
        as_bits!([u32; LANES] as [__m256i; 2], *source)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    fn add_dots_at_once(sums: [__m256i; 2], bytes: [__m256i; 2], factors: [u8; 4]) -> [__m256i; 2] {
        let factors = _mm256_set1_epi32(i32::from_le_bytes(factors));
        each!([0, 1], |half| _mm256_dpbusd_avx_epi32(sums[half], bytes[half], factors))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_dots(sums: [__m256i; 2], bytes: [__m256i; 2], factors: &[u8; 4]) -> [__m256i; 2] {
        if DOTS {
            // SAFETY: `dispatch` hands out this type only where the processor has AVX-VNNI.
            return unsafe { Self::add_dots_at_once(sums, bytes, *factors) };
        }
        // Products of words are exact; sums of two products of bytes need not fit.
        let factors = _mm256_set1_epi32(i32::from_le_bytes(*factors));
        let (even, odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(factors)), _mm256_srai_epi16::<8>(factors));
        each!([0, 1], |half| {
            let evens = _mm256_madd_epi16(_mm256_and_si256(bytes[half], _mm256_set1_epi16(255)), even);
            let odds = _mm256_madd_epi16(_mm256_srli_epi16::<8>(bytes[half]), odd);
            _mm256_add_epi32(sums[half], _mm256_add_epi32(evens, odds))
        })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_words(sums: [__m256i; 2], words: [__m256i; 2], factors: &[i16; 2]) -> [__m256i; 2] {
        let factors = _mm256_set1_epi32(as_bits!([i16; 2] as i32, *factors));
        each!([0, 1], |half| _mm256_add_epi32(sums[half], _mm256_madd_epi16(words[half], factors)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_centred(sums: [__m256i; 2], bytes: [__m256i; 2], factors: &[u8; 4]) -> [__m256i; 2] {
        let factors = _mm256_set1_epi32(i32::from_le_bytes(*factors));
        each!([0, 1], |half| {
            // The bytes' signs move over to the factors: 2 * 128 * 127 fits.
            let bytes = _mm256_xor_si256(bytes[half], _mm256_set1_epi8(-128));
            let products = _mm256_maddubs_epi16(_mm256_abs_epi8(bytes), _mm256_sign_epi8(factors, bytes));
            _mm256_add_epi32(sums[half], _mm256_madd_epi16(products, _mm256_set1_epi16(1)))
        })
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn no_pairs() -> [__m256i; 2] {
        [_mm256_setzero_si256(); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_pairs(sums: [__m256i; 2], bytes: [__m256i; 2], factors: &[u8; 4]) -> [__m256i; 2] {
        let factors = _mm256_set1_epi32(i32::from_le_bytes(*factors));
        each!([0, 1], |half| _mm256_add_epi16(sums[half], _mm256_maddubs_epi16(bytes[half], factors)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_both(sums: [__m256i; 2], pairs: [__m256i; 2]) -> [__m256i; 2] {
        each!([0, 1], |half| _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs[half], _mm256_set1_epi16(1))))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn every(source: &[u8], step: usize) -> [u32; LANES] {
        std::array::from_fn(|lane| word(source, lane * step))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn look_up(codes: &[u32; LANES], table: &[u8; LANES]) -> [u32; LANES] {
        let table = _mm256_broadcastsi128_si256(as_bits!([u8; LANES] as __m128i, *table));
        let codes = as_bits!([u32; LANES] as [__m256i; 2], *codes);
        as_bits!([__m256i; 2] as [u32; LANES], each!(2 of codes, |codes| _mm256_shuffle_epi8(table, codes)))
    }
}
