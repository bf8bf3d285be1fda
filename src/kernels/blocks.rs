//! The formats of 32 numbers a block that share a scale, ggml's `Q4_0` .. `Q8_0`: each described once, for weights and for
//! a quantised cache.
//!
//! Weights stay in their file's own blocks: an f16 scale, then an f16 offset or fifth bits if there are any, then the quants
//! ([`BlockFormat`]). In a cache scales and quants lie apart, so that each can be read as whole vectors ([`CacheFormat`]).
//!
//! Not for: products (see [`super::quant`] and [`super::attend`]), or the formats of 256 numbers.

use half::f16;

use super::simd::{LANES, Lanes, multiversion};

/// Numbers that share a scale.
pub(crate) const BLOCK: usize = 32;

/// How the quants of a block are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quants {
    /// 4 bits: byte `i` holds number `i` in its lower half and number `16 + i` in its upper.
    Nibbles,
    /// 5 bits: as nibbles, behind 32 fifth bits.
    Fives,
    /// 8 bits with a sign.
    Bytes,
}

/// A format of blocks: `number = scale * quant + offset`.
pub(crate) trait BlockFormat: Copy + std::fmt::Debug + PartialEq + Send + Sync + 'static {
    /// How quants are stored.
    const QUANTS: Quants;

    /// What the offset is in scales; `None` if blocks store an offset of their own, behind the scale.
    const OFFSET: Option<f32>;

    /// Bytes of a block's quants, without their fifth bits.
    const QUANT_BYTES: usize = if matches!(Self::QUANTS, Quants::Bytes) { BLOCK } else { BLOCK / 2 };

    /// Where the quants are in a block of weights.
    const QUANTS_AT: usize =
        if Self::OFFSET.is_some() { 2 } else { 4 } + if matches!(Self::QUANTS, Quants::Fives) { 4 } else { 0 };

    /// Size of a block of weights.
    const BYTES: usize = Self::QUANTS_AT + Self::QUANT_BYTES;

    /// The scale of a block of weights, and behind it the offset or something else.
    ///
    /// * `block`: `[BYTES]`
    #[inline(always)]
    fn scales<L: Lanes>(block: &[u8]) -> L::Halves {
        L::halves(*part(block, 0))
    }

    /// The quants of a block of weights, without the offset.
    ///
    /// * `block`: `[BYTES]`
    #[inline(always)]
    fn quants<L: Lanes>(block: &[u8]) -> [L; 2] {
        let first = part(block, Self::QUANTS_AT);
        match Self::QUANTS {
            Quants::Bytes => [L::load_i8(first), L::load_i8(part(block, Self::QUANTS_AT + LANES))],
            Quants::Nibbles => L::load_fives(first, 0),
            Quants::Fives => L::load_fives(first, u32::from_le_bytes(*part(block, Self::QUANTS_AT - 4))),
        }
    }
}

/// `N` bytes of a block.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    &block[at..].as_chunks().0[0]
}

macro_rules! formats {
    ($($(#[$meta:meta])* $name:ident: $quants:ident, $offset:expr;)+) => {
        $(
            $(#[$meta])*
            #[derive(Debug, Clone, Copy, PartialEq)]
            pub(crate) struct $name;

            impl BlockFormat for $name {
                const QUANTS: Quants = Quants::$quants;
                const OFFSET: Option<f32> = $offset;
            }
        )+
    };
}
formats! {
    /// 18 bytes a block.
    Q4_0: Nibbles, Some(-8.0);
    /// 20 bytes a block.
    Q4_1: Nibbles, None;
    /// 22 bytes a block.
    Q5_0: Fives, Some(-16.0);
    /// 24 bytes a block.
    Q5_1: Fives, None;
    /// 34 bytes a block.
    Q8_0: Bytes, Some(0.0);
}

multiversion! {
    /// Widens blocks of weights to f32; `out` holds 32 numbers a block.
    pub(super) fn dequantize<B: BlockFormat>(data: &[u8], out: &mut [f32]) = dequantize_body;
}

#[inline(always)]
fn dequantize_body<L: Lanes, B: BlockFormat>(data: &[u8], out: &mut [f32]) {
    for (block, out) in data.chunks_exact(B::BYTES).zip(out.as_chunks_mut::<BLOCK>().0) {
        let scales = B::scales::<L>(block);
        let scale = L::splat_first(scales);
        let offset = match B::OFFSET {
            Some(offset) => L::splat(offset).mul(scale),
            None => L::splat(L::pair(scales)[1]),
        };
        for (quants, out) in B::quants::<L>(block).into_iter().zip(out.as_chunks_mut().0) {
            quants.mul_add(scale, offset).store(out);
        }
    }
}

/// A format of a cache. Its quants have no sign: those of [`Quants::Bytes`] are stored with 128 added.
pub(crate) trait CacheFormat: BlockFormat {
    /// The quant that means 0.
    const ZERO: i32 = if matches!(Self::QUANTS, Quants::Bytes) { 128 } else { 8 };

    /// Chunks of sixteen groups of four bytes that make up twice sixteen groups of quants.
    const CHUNKS: usize = Self::QUANT_BYTES / 16;

    /// Rounds a block: its quants, and its scale.
    ///
    /// * `quants`: `[QUANT_BYTES]`
    fn quantize(numbers: &[f32; BLOCK], quants: &mut [u8]) -> f16;

    /// What a block's quants and scale mean.
    fn dequantize(quants: &[u8], scale: f16) -> [f32; BLOCK] {
        let scale = scale.to_f32();
        std::array::from_fn(|number| {
            let quant = match (Self::QUANTS, number < BLOCK / 2) {
                (Quants::Bytes, _) => quants[number],
                (_, true) => quants[number] & 15,
                (_, false) => quants[number - BLOCK / 2] >> 4,
            };
            #[expect(clippy::cast_precision_loss)] // at most 128
            let zero = Self::ZERO as f32;
            (f32::from(quant) - zero) * scale
        })
    }

    /// Of which four numbers of a block the quants of each group of a step are, as the index of the four.
    ///
    /// * `step`: below 4
    #[inline(always)]
    fn fours(step: usize) -> [usize; 2] {
        if matches!(Self::QUANTS, Quants::Bytes) { [2 * step, 2 * step + 1] } else { [step, step + BLOCK / 8] }
    }

    /// The quants of a step, twice sixteen groups of four; the zero is not subtracted.
    ///
    /// * `quants`: chunks of sixteen groups of four bytes, [`CHUNKS`](Self::CHUNKS) for each step
    #[inline(always)]
    fn unpack<L: Lanes>(quants: &[[[u8; 4]; LANES]], step: usize) -> [L::Quants; 2] {
        if matches!(Self::QUANTS, Quants::Bytes) {
            [L::bytes(&quants[2 * step]), L::bytes(&quants[2 * step + 1])]
        } else {
            L::nibbles(&quants[step])
        }
    }
}

impl CacheFormat for Q8_0 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // in 1..=255
    fn quantize(numbers: &[f32; BLOCK], quants: &mut [u8]) -> f16 {
        let largest = numbers.iter().fold(0.0_f32, |largest, number| largest.max(number.abs()));
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (quant, number) in quants.iter_mut().zip(numbers) {
            *quant = ((number * inverse).round() + 128.0) as u8;
        }
        finite_or_nan(numbers, scale)
    }
}

impl CacheFormat for Q4_0 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // in 0..16
    fn quantize(numbers: &[f32; BLOCK], quants: &mut [u8]) -> f16 {
        let largest = numbers.iter().fold(0.0_f32, |a, &b| if b.abs() > a.abs() { b } else { a });
        let scale = largest / -8.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let quant = |number: f32| ((number * inverse + 8.5) as u8).min(15);
        for (at, byte) in quants.iter_mut().enumerate() {
            *byte = quant(numbers[at]) | quant(numbers[at + BLOCK / 2]) << 4;
        }
        finite_or_nan(numbers, scale)
    }
}

/// The scale in f16; NaN if a number of the block is not finite, which no quant can say.
fn finite_or_nan(numbers: &[f32; BLOCK], scale: f32) -> f16 {
    if numbers.iter().all(|number| number.is_finite()) { f16::from_f32(scale) } else { f16::NAN }
}
