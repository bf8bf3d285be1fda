//! Sixteen numbers at once, and those of plain loops.

use half::{bf16, f16};

/// How many numbers a value of a [`Lanes`] type holds.
pub const LANES: usize = 16;

/// Below this, `exp` would leave the normal numbers.
const LEAST_EXPONENT: f32 = -87.3;

/// 1.5 * 2^23. Adding it leaves a whole number, rounded to the nearest, halves to even ones, in the lowest bits; subtracting
/// it then gives that as a float.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// The largest factor: two digits of 8 bits with a sign hold it, and less than it with either sign.
pub(crate) const LARGEST_FACTOR: f32 = 32_512.0;

/// Four whole numbers of 16 bits, as some [`Lanes::add_products`] needs them.
pub type Factors = [u32; 2];

/// An instruction set, and sixteen f32 in its registers. Public in name, so that public traits can use it; it is sealed.
pub trait Lanes: Copy {
    /// Sixteen sums of products in the making.
    type Sums: Copy;
    /// Sixteen groups of four quants, each of 8 bits without a sign.
    type Quants: Copy;
    /// Sixteen whole numbers of 32 bits.
    type Whole: Copy;
    /// Sixteen groups of four bytes.
    type Bytes: Copy;
    /// Sixteen pairs of whole numbers of 16 bits.
    type Pairs: Copy;
    /// Two numbers.
    type Halves: Copy;
    /// Sums of scaled numbers in the making, in one register.
    type Folded: Copy;

    /// Whether products are added before they are rounded.
    const FUSED: bool;
    /// Sums that stay in registers beside what is added to them.
    const ACCUMULATORS: usize;
    /// Whether [`add_dots`](Self::add_dots) is one instruction for a register.
    const DOTS: bool;
    /// Whether it is one for all lanes, and there are 32 registers.
    const WIDE: bool;

    fn splat(value: f32) -> Self;
    fn load(source: &[f32; LANES]) -> Self;
    fn load_f16(source: &[f16; LANES]) -> Self;
    fn load_bf16(source: &[bf16; LANES]) -> Self;
    /// Sixteen bytes with a sign.
    fn load_i8(source: &[u8; LANES]) -> Self;
    /// The lower four bits of sixteen bytes, and the upper ones, each with a fifth bit: the lowest of `fifths` belongs to
    /// the first number.
    fn load_fives(source: &[u8; LANES], fifths: u32) -> [Self; 2];
    /// What the lower four bits of sixteen bytes stand for in a table, and the upper ones.
    fn load_codes(source: &[u8; LANES], table: &[i8; LANES]) -> [Self; 2];
    /// Two f16, widened. A type of their own: as two f32 the compiler would widen them one by one.
    fn halves(source: [u8; 4]) -> Self::Halves;
    /// A number, and 0.
    fn half(value: f32) -> Self::Halves;
    /// `halves * factor + sums`
    fn add_halves(halves: Self::Halves, factor: f32, sums: Self::Halves) -> Self::Halves;
    fn pair(halves: Self::Halves) -> [f32; 2];
    /// The first of two, in all lanes.
    fn splat_first(halves: Self::Halves) -> Self;
    /// No sums yet.
    fn no_folded() -> Self::Folded;
    /// Adds all lanes, times the first of two numbers.
    fn fold(self, halves: Self::Halves, sums: Self::Folded) -> Self::Folded;
    fn folded_sum(a: Self::Folded, b: Self::Folded) -> f32;
    fn store(self, target: &mut [f32; LANES]);

    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// `self * factor + term`
    fn mul_add(self, factor: Self, term: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// The larger one; `other` where one is not a number.
    fn max(self, other: Self) -> Self;
    /// The smaller one; `other` where one is not a number.
    fn min(self, other: Self) -> Self;
    /// `then` where the value is above `limit`, `otherwise` elsewhere, also where one is not a number.
    fn if_above(self, limit: Self, then: Self, otherwise: Self) -> Self;
    /// The values without their fractions, as bytes: the lowest eight bits of whole numbers that fit 32.
    fn truncated(self) -> [u8; LANES];
    fn abs(self) -> Self;
    fn sum(self) -> f32;
    fn largest(self) -> f32;

    /// `2^k` for values that hold the whole number `k` in their lowest bits, as rounding by a large addend leaves it.
    fn power_of_two(self) -> Self;
    /// 0 where `condition` is below `limit`, the value elsewhere, also where `condition` is not a number.
    fn zero_below(self, condition: Self, limit: f32) -> Self;
    /// Multiplies by a factor, rounds to whole numbers, to nearest even, and writes these for
    /// [`add_products`](Self::add_products), four in each target; what the bits there mean is this type's own.
    ///
    /// Products must be at most [`LARGEST_FACTOR`]. Returns the whole numbers.
    fn store_factors(self, factor: Self, target: &mut [Factors; LANES / 4]) -> Self;

    /// Sums that start with a whole number.
    fn sums(start: i32) -> Self::Sums;
    /// Sixteen groups of four bytes.
    fn bytes(source: &[[u8; 4]; LANES]) -> Self::Quants;
    /// The lower and the upper four bits of sixteen groups of four bytes.
    fn nibbles(source: &[[u8; 4]; LANES]) -> [Self::Quants; 2];
    /// Adds the products of each lane's four quants with four factors. These are read where they are: passed by value
    /// they would come through other registers.
    #[expect(clippy::trivially_copy_pass_by_ref)]
    fn add_products(sums: Self::Sums, quants: Self::Quants, factors: &Factors) -> Self::Sums;
    /// The sums as floats.
    fn total(sums: Self::Sums) -> Self;

    /// A whole number in all lanes.
    fn whole(value: i32) -> Self::Whole;
    /// The whole numbers as floats.
    fn from_whole(value: Self::Whole) -> Self;
    /// The floats whose bits are the whole numbers'.
    fn as_floats(value: Self::Whole) -> Self;
    fn load_bytes(source: &[u32; LANES]) -> Self::Bytes;
    /// Adds the products of each lane's four bytes, which have no sign, with four bytes that have one.
    #[expect(clippy::trivially_copy_pass_by_ref)]
    fn add_dots(sums: Self::Whole, bytes: Self::Bytes, factors: &[u8; 4]) -> Self::Whole;
    /// As [`add_dots`](Self::add_dots), of bytes from which 128 is subtracted; no factor may be -128.
    #[expect(clippy::trivially_copy_pass_by_ref)]
    fn add_centred(sums: Self::Whole, bytes: Self::Bytes, factors: &[u8; 4]) -> Self::Whole;
    /// Adds the products of each lane's two numbers of 16 bits, the first in the lower half, with two others.
    #[expect(clippy::trivially_copy_pass_by_ref)]
    fn add_words(sums: Self::Whole, words: Self::Bytes, factors: &[i16; 2]) -> Self::Whole;
    /// No sums yet.
    fn no_pairs() -> Self::Pairs;
    /// Adds sums of two products each. Bytes must be at most 127, and the sums fit.
    #[expect(clippy::trivially_copy_pass_by_ref)]
    fn add_pairs(sums: Self::Pairs, bytes: Self::Bytes, factors: &[u8; 4]) -> Self::Pairs;
    /// Adds both numbers of each pair.
    fn add_both(sums: Self::Whole, pairs: Self::Pairs) -> Self::Whole;
    /// Sixteen words of four bytes that lie `step` bytes apart.
    ///
    /// # Panics
    /// If there are not as many.
    fn every(source: &[u8], step: usize) -> [u32; LANES];
    /// What bytes below 16 stand for in a table.
    fn look_up(codes: &[u32; LANES], table: &[u8; LANES]) -> [u32; LANES];

    /// The first numbers of a slice, and 0 where there are fewer.
    #[inline(always)]
    fn load_some(source: &[f32]) -> Self {
        if let Some(source) = source.first_chunk() {
            return Self::load(source);
        }
        let mut numbers = [0.0; LANES];
        numbers[..source.len()].copy_from_slice(source);
        Self::load(&numbers)
    }

    /// Writes to the beginning of a slice, as far as there is room.
    #[inline(always)]
    fn store_some(self, target: &mut [f32]) {
        if let Some(target) = target.first_chunk_mut() {
            self.store(target);
            return;
        }
        let mut numbers = [0.0; LANES];
        self.store(&mut numbers);
        target.copy_from_slice(&numbers[..target.len()]);
    }

    /// `exp` of values that are not above 0, to about two units in the last place; 0 where it would leave the normal
    /// numbers. The same approximation as that of [`crate::kernels::vector::softmax`].
    #[inline(always)]
    fn exp_nonpositive(self) -> Self {
        const LN2_HIGH: f32 = 0.693_359_4; // 355/512: exact products with small integers
        const LN2_LOW: f32 = -2.121_944_4e-4; // ln(2) - LN2_HIGH
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
