//! The registers of x86-64.
//!
//! A type's arithmetic is written as functions of its own, each compiled for the type's instruction set, in which the
//! intrinsics are safe to call; [`Lanes`](super::lanes::Lanes) calls them, at one place for both types.

/// Numbers as the other type of the same size: arrays and vectors of plain numbers.
macro_rules! as_bits {
    ($from:ty as $to:ty, $value:expr) => {{
        let value: $from = $value;
        // SAFETY: both are plain numbers in every pattern of bits, without padding; the compiler checks the sizes.
        unsafe { std::mem::transmute::<$from, $to>(value) }
    }};
}

/// Functions of [`Lanes`](super::lanes::Lanes) that call those of the same name that the type has of its own.
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

/// [`Lanes`](super::lanes::Lanes) for a type that has all functions below of its own, those of quants on a condition.
macro_rules! lanes {
    (
        impl [$($generic:tt)*] for $of:ty: $sums:ty, $quants:ty, $folded:ty, $whole:ty,
        quants if $has_quants:expr, $accumulators:literal accumulators, dots: $dots:expr, wide: $wide:expr
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
            const WIDE: bool = $wide;

            forward! {
                if true;
                fn splat(value: f32) -> Self;
                fn load(source: &[f32; LANES]) -> Self;
                fn load_f16(source: &[f16; LANES]) -> Self;
                fn load_bf16(source: &[bf16; LANES]) -> Self;
                fn load_i8(source: &[u8; LANES]) -> Self;
                fn load_fives(source: &[u8; LANES], fifths: u32) -> [Self; 2];
                fn load_codes(source: &[u8; LANES], table: &[i8; LANES]) -> [Self; 2];
                fn halves(source: [u8; 4]) -> __m128;
                fn half(value: f32) -> __m128;
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
                fn div(self: Self, other: Self) -> Self;
                fn max(self: Self, other: Self) -> Self;
                fn min(self: Self, other: Self) -> Self;
                fn if_above(self: Self, limit: Self, then: Self, otherwise: Self) -> Self;
                fn truncated(self: Self) -> [u8; LANES];
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
                fn as_floats(value: Self::Whole) -> Self;
                fn load_bytes(source: &[u32; LANES]) -> Self::Bytes;
                fn every(source: &[u8], step: usize) -> [u32; LANES];
                fn look_up(codes: &[u32; LANES], table: &[u8; LANES]) -> [u32; LANES];
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
                fn add_words(sums: Self::Whole, words: Self::Bytes, factors: &[i16; 2]) -> Self::Whole;
            }
        }
    };
}

mod avx2;
mod avx512;

pub(super) use avx2::Avx2;
pub(super) use avx512::Avx512;
