//! The registers of x86-64.
//!
//! A type's arithmetic is written as functions of its own, each compiled for the type's instruction set, in which the
//! intrinsics are safe to call; [`Lanes`] calls them, at one place for both types. The file is long since both types stand
//! in it, one function beside the other.

#[allow(clippy::wildcard_imports)]
use std::arch::x86_64::*;
use std::mem::transmute;

use half::{bf16, f16};

use super::each;
use super::lanes::{Factors, LANES, Lanes, ROUND, word};

/// Numbers as the other type of the same size: arrays and vectors of plain numbers.
macro_rules! as_bits {
    ($from:ty as $to:ty, $value:expr) => {{
        let value: $from = $value;
        // SAFETY: both are plain numbers in every pattern of bits, without padding; the compiler checks the sizes.
        unsafe { transmute::<$from, $to>(value) }
    }};
}

/// Functions of [`Lanes`] that call those of the same name that the type has of its own.
macro_rules! forward {
    (if $has:expr; $(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty;)+) => {
        $(
            #[inline(always)]
            fn $name($($argument: $type),*) -> $result {
                assert!($has, "quants without VNNI");
                // SAFETY: the processor has the instructions. The type is private to `simd`, whose `dispatch` alone hands
                // it to kernels, for an `InstructionSet` that only detection makes.
                unsafe { Self::$name($($argument),*) }
            }
        )+
    };
}

/// [`Lanes`] for a type that has all functions below of its own, those of quants on a condition.
macro_rules! lanes {
    (
        impl [$($generic:tt)*] for $of:ty: $sums:ty, $quants:ty, $folded:ty, $whole:ty,
        quants if $has_quants:expr, $accumulators:literal accumulators, dots: $dots:expr
    ) => {
        #[allow(
            clippy::needless_arbitrary_self_type,
            clippy::assertions_on_constants,
            reason = "`forward` takes all arguments and conditions alike"
        )]
        impl<$($generic)*> Lanes for $of {
            type Sums = $sums;
            type Quants = $quants;
            type Whole = $whole;
            type Bytes = $whole;
            type Pairs = $whole;
            type Halves = __m128;
            type Folded = $folded;

            const FUSED: bool = true;
            const ACCUMULATORS: usize = $accumulators;
            const DOTS: bool = $dots;

            forward! {
                if true;
                fn splat(value: f32) -> Self;
                fn load(source: &[f32; LANES]) -> Self;
                fn load_f16(source: &[f16; LANES]) -> Self;
                fn load_bf16(source: &[bf16; LANES]) -> Self;
                fn load_i8(source: &[u8; LANES]) -> Self;
                fn load_fives(source: &[u8; LANES], fifths: u32) -> [Self; 2];
                fn halves(source: [u8; 4]) -> __m128;
                fn add_halves(halves: __m128, factor: f32, sums: __m128) -> __m128;
                fn pair(halves: __m128) -> [f32; 2];
                fn splat_first(halves: __m128) -> Self;
                fn no_folded() -> Self::Folded;
                fn fold(self: Self, halves: __m128, sums: Self::Folded) -> Self::Folded;
                fn folded_sum(a: Self::Folded, b: Self::Folded) -> f32;
                fn store(self: Self, target: &mut [f32; LANES]) -> ();
                fn add(self: Self, other: Self) -> Self;
                fn sub(self: Self, other: Self) -> Self;
                fn mul(self: Self, other: Self) -> Self;
                fn mul_add(self: Self, factor: Self, term: Self) -> Self;
                fn max(self: Self, other: Self) -> Self;
                fn abs(self: Self) -> Self;
                fn sum(self: Self) -> f32;
                fn largest(self: Self) -> f32;
                fn power_of_two(self: Self) -> Self;
                fn zero_below(self: Self, condition: Self, limit: f32) -> Self;
                fn sums(start: i32) -> Self::Sums;
                fn bytes(source: &[[u8; 4]; LANES]) -> Self::Quants;
                fn nibbles(source: &[[u8; 4]; LANES]) -> [Self::Quants; 2];
                fn total(sums: Self::Sums) -> Self;
                fn whole(value: i32) -> Self::Whole;
                fn from_whole(value: Self::Whole) -> Self;
                fn load_bytes(source: &[u32; LANES]) -> Self::Bytes;
                fn every(source: &[u8], step: usize) -> [u32; LANES];
                fn no_pairs() -> Self::Pairs;
                fn add_centred(sums: Self::Whole, bytes: Self::Bytes, factors: &[u8; 4]) -> Self::Whole;
                fn add_pairs(sums: Self::Pairs, bytes: Self::Bytes, factors: &[u8; 4]) -> Self::Pairs;
                fn add_both(sums: Self::Whole, pairs: Self::Pairs) -> Self::Whole;
            }
            forward! {
                if $has_quants;
                fn store_factors(self: Self, factor: Self, target: &mut [Factors; LANES / 4]) -> Self;
                fn add_products(sums: Self::Sums, quants: Self::Quants, factors: &Factors) -> Self::Sums;
                fn add_dots(sums: Self::Whole, bytes: Self::Bytes, factors: &[u8; 4]) -> Self::Whole;
            }
        }
    };
}

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 2]);

/// Every second byte of sixteen groups of four, and the ones between, as 16 bits.
type WordPairs = [[__m256i; 2]; 2];

lanes!(
    impl [] for Avx2: [__m256i; 2], WordPairs, __m256, [__m256i; 2],
    quants if true, 6 accumulators, dots: false
);

impl Avx2 {
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
    fn halves(source: [u8; 4]) -> __m128 {
        _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from_le_bytes(source)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_halves(halves: __m128, factor: f32, sums: __m128) -> __m128 {
        _mm_fmadd_ps(halves, _mm_set1_ps(factor), sums)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn pair(halves: __m128) -> [f32; 2] {
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
    fn max(self, other: Self) -> Self {
        Self([_mm256_max_ps(self.0[0], other.0[0]), _mm256_max_ps(self.0[1], other.0[1])])
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
    fn load_bytes(source: &[u32; LANES]) -> [__m256i; 2] {
        as_bits!([u32; LANES] as [__m256i; 2], *source)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "see `Lanes::add_products`")]
    fn add_dots(sums: [__m256i; 2], bytes: [__m256i; 2], factors: &[u8; 4]) -> [__m256i; 2] {
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

// Sums are of the factors' higher digits, and of the lower ones.
lanes!(
    impl [const VNNI: bool] for Avx512<VNNI>: [__m512i; 2], __m512i, __m512, __m512i,
    quants if VNNI, 24 accumulators, dots: VNNI
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
    fn halves(source: [u8; 4]) -> __m128 {
        Avx2::halves(source)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn add_halves(halves: __m128, factor: f32, sums: __m128) -> __m128 {
        Avx2::add_halves(halves, factor, sums)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn pair(halves: __m128) -> [f32; 2] {
        Avx2::pair(halves)
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
    fn max(self, other: Self) -> Self {
        Self(_mm512_max_ps(self.0, other.0))
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
}
