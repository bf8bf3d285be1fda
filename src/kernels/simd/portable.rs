//! Lanes of plain loops: what runs on every processor, and the oracle of the others.

use half::{bf16, f16};

use super::lanes::{Factors, LANES, Lanes};

/// Plain loops.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(mut self, other: Self, apply: impl Fn(f32, f32) -> f32) -> Self {
        for lane in 0..LANES {
            self.0[lane] = apply(self.0[lane], other.0[lane]);
        }
        self
    }
}

impl Lanes for Portable {
    type Sums = [i32; LANES];
    type Quants = [[u8; 4]; LANES];
    type Whole = [i32; LANES];
    type Bytes = [u32; LANES];
    type Pairs = [i32; LANES];
    type Halves = [f32; 2];
    type Folded = Self;

    const FUSED: bool = false;
    const ACCUMULATORS: usize = 3;
    const DOTS: bool = false;
    const WIDE: bool = false;

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
    fn load_bf16(source: &[bf16; LANES]) -> Self {
        Self(source.map(|number| f32::from_bits(u32::from(number.to_bits()) << 16)))
    }

    #[inline(always)]
    fn load_i8(source: &[u8; LANES]) -> Self {
        Self(source.map(|byte| f32::from(byte.cast_signed())))
    }

    #[inline(always)]
    fn load_fives(source: &[u8; LANES], fifths: u32) -> [Self; 2] {
        let fifth = |number: usize| if fifths >> number & 1 == 0 { 0 } else { 16 };
        [
            Self(std::array::from_fn(|lane| f32::from(source[lane] & 15 | fifth(lane)))),
            Self(std::array::from_fn(|lane| f32::from(source[lane] >> 4 | fifth(LANES + lane)))),
        ]
    }

    #[inline(always)]
    fn load_codes(source: &[u8; LANES], table: &[i8; LANES]) -> [Self; 2] {
        let number = |code: u8| f32::from(table[usize::from(code)]);
        [Self(source.map(|byte| number(byte & 15))), Self(source.map(|byte| number(byte >> 4)))]
    }

    #[inline(always)]
    fn half(value: f32) -> [f32; 2] {
        [value, 0.0]
    }

    #[inline(always)]
    fn halves(source: [u8; 4]) -> [f32; 2] {
        let [a, b, c, d] = source;
        [f16::from_le_bytes([a, b]).to_f32(), f16::from_le_bytes([c, d]).to_f32()]
    }

    #[inline(always)]
    fn add_halves(halves: [f32; 2], factor: f32, sums: [f32; 2]) -> [f32; 2] {
        [halves[0] * factor + sums[0], halves[1] * factor + sums[1]]
    }

    #[inline(always)]
    fn pair(halves: [f32; 2]) -> [f32; 2] {
        halves
    }

    #[inline(always)]
    fn splat_first(halves: [f32; 2]) -> Self {
        Self::splat(halves[0])
    }

    #[inline(always)]
    fn no_folded() -> Self {
        Self::splat(0.0)
    }

    #[inline(always)]
    fn fold(self, halves: [f32; 2], sums: Self) -> Self {
        self.mul_add(Self::splat_first(halves), sums)
    }

    #[inline(always)]
    fn folded_sum(a: Self, b: Self) -> f32 {
        a.add(b).sum()
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
        let mut sums = term.0;
        for (sum, (a, b)) in sums.iter_mut().zip(self.0.iter().zip(&factor.0)) {
            *sum += a * b;
        }
        Self(sums)
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn if_above(self, limit: Self, then: Self, otherwise: Self) -> Self {
        let mut chosen = otherwise;
        for lane in 0..LANES {
            chosen.0[lane] = if self.0[lane] > limit.0[lane] { then.0[lane] } else { otherwise.0[lane] };
        }
        chosen
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the lowest bits
    fn truncated(self) -> [u8; LANES] {
        self.0.map(|value| value as i32 as u8)
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
    fn store_factors(self, factor: Self, target: &mut [Factors; LANES / 4]) -> Self {
        let rounded = Self(self.mul(factor).0.map(f32::round_ties_even));
        for (target, numbers) in target.iter_mut().zip(rounded.0.as_chunks::<4>().0) {
            let [a, b, c, d] = numbers.map(|number| number as i16);
            *target = [join(a, c), join(b, d)];
        }
        rounded
    }

    #[inline(always)]
    fn sums(start: i32) -> Self::Sums {
        [start; LANES]
    }

    #[inline(always)]
    fn bytes(source: &[[u8; 4]; LANES]) -> Self::Quants {
        *source
    }

    #[inline(always)]
    fn nibbles(source: &[[u8; 4]; LANES]) -> [Self::Quants; 2] {
        [source.map(|bytes| bytes.map(|byte| byte & 15)), source.map(|bytes| bytes.map(|byte| byte >> 4))]
    }

    #[inline(always)]
    fn add_products(sums: Self::Sums, quants: Self::Quants, factors: &Factors) -> Self::Sums {
        let ([a, c], [b, d]) = (split(factors[0]), split(factors[1]));
        let factors = [a, b, c, d];
        std::array::from_fn(|lane| {
            let products = quants[lane].iter().zip(factors);
            products.fold(sums[lane], |sum, (&quant, factor)| sum + i32::from(quant) * i32::from(factor))
        })
    }

    #[inline(always)]
    #[expect(clippy::cast_precision_loss)] // rounds, as the vector instructions do
    fn total(sums: Self::Sums) -> Self {
        Self(sums.map(|sum| sum as f32))
    }

    #[inline(always)]
    fn whole(value: i32) -> Self::Whole {
        [value; LANES]
    }

    #[inline(always)]
    fn from_whole(value: Self::Whole) -> Self {
        Self::total(value)
    }

    #[inline(always)]
    fn as_floats(value: Self::Whole) -> Self {
        Self(value.map(|value| f32::from_bits(value.cast_unsigned())))
    }

    #[inline(always)]
    fn load_bytes(source: &[u32; LANES]) -> Self::Bytes {
        *source
    }

    #[inline(always)]
    fn add_dots(mut sums: Self::Whole, bytes: Self::Bytes, factors: &[u8; 4]) -> Self::Whole {
        for (sum, bytes) in sums.iter_mut().zip(bytes) {
            for (byte, factor) in bytes.to_le_bytes().into_iter().zip(factors) {
                *sum += i32::from(byte) * i32::from(factor.cast_signed());
            }
        }
        sums
    }

    #[inline(always)]
    fn add_centred(mut sums: Self::Whole, bytes: Self::Bytes, factors: &[u8; 4]) -> Self::Whole {
        for (sum, bytes) in sums.iter_mut().zip(bytes) {
            for (byte, factor) in bytes.to_le_bytes().into_iter().zip(factors) {
                *sum += (i32::from(byte) - 128) * i32::from(factor.cast_signed());
            }
        }
        sums
    }

    #[inline(always)]
    fn add_words(mut sums: Self::Whole, words: Self::Bytes, factors: &[i16; 2]) -> Self::Whole {
        for (sum, word) in sums.iter_mut().zip(words) {
            for (number, &factor) in split(word).into_iter().zip(factors) {
                *sum += i32::from(number) * i32::from(factor);
            }
        }
        sums
    }

    #[inline(always)]
    fn no_pairs() -> Self::Pairs {
        [0; LANES]
    }

    #[inline(always)]
    fn add_pairs(sums: Self::Pairs, bytes: Self::Bytes, factors: &[u8; 4]) -> Self::Pairs {
        Self::add_dots(sums, bytes, factors)
    }

    #[inline(always)]
    fn add_both(mut sums: Self::Whole, pairs: Self::Pairs) -> Self::Whole {
        sums.iter_mut().zip(pairs).for_each(|(sum, pair)| *sum += pair);
        sums
    }

    #[inline(always)]
    fn every(source: &[u8], step: usize) -> [u32; LANES] {
        std::array::from_fn(|lane| word(source, lane * step))
    }

    #[inline(always)]
    fn look_up(codes: &[u32; LANES], table: &[u8; LANES]) -> [u32; LANES] {
        codes.map(|codes| u32::from_le_bytes(codes.to_le_bytes().map(|code| table[usize::from(code)])))
    }
}

/// Two numbers as one, the first in the lower half.
#[inline(always)]
fn join(first: i16, second: i16) -> u32 {
    u32::from(first.cast_unsigned()) | u32::from(second.cast_unsigned()) << 16
}

/// What [`join`] has put together.
#[inline(always)]
#[expect(clippy::cast_possible_truncation)] // halves
fn split(joined: u32) -> [i16; 2] {
    [(joined as u16).cast_signed(), ((joined >> 16) as u16).cast_signed()]
}

/// Four bytes of a slice.
#[inline(always)]
pub(super) fn word(source: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(source[at..].as_chunks().0[0])
}
