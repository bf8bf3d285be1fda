//! The formats in which 32 numbers share a scale, ggml's `Q4_0` .. `Q8_0`, `IQ4_NL`, `IQ4_XS` and `MXFP4`: each described
//! once, for weights and for a quantised cache.
//!
//! Weights stay in their file's own blocks: a scale (f16, but for the last two), then an f16 offset or fifth bits if there
//! are any, then the quants ([`BlockFormat`]). In a cache scales and quants lie apart, so that each can be read as whole vectors ([`CacheFormat`]).
//!
//! Not for: products (see [`super::quant`] and [`super::attend`]), or the K-quants.

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
    /// 4 bits, as nibbles: each says which number of the table it stands for.
    Codes(&'static Codes),
}

/// What codes of 4 bits stand for.
pub(crate) type Codes = [i8; 16];

/// Those of `IQ4_NL` and `IQ4_XS`: denser where weights are.
pub(crate) const IQ4_CODES: Codes = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Those of `MXFP4`: floats of a sign, two bits of exponent and one of mantissa, doubled.
pub(crate) const FP4_CODES: Codes = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A format of blocks: `number = scale * quant + offset`.
pub(crate) trait BlockFormat: Copy + std::fmt::Debug + PartialEq + Send + Sync + 'static {
    /// How quants are stored.
    const QUANTS: Quants;

    /// What the offset is in scales; `None` if blocks store an offset of their own, behind the scale.
    const OFFSET: Option<f32>;

    /// Runs of [`BLOCK`] numbers in a block, each with a scale.
    const RUNS: usize = 1;

    /// Bytes of a block's scales: more or fewer than two are not just one in f16.
    const SCALE_BYTES: usize = 2;

    /// Bytes of a run's quants, without their fifth bits.
    const QUANT_BYTES: usize = if matches!(Self::QUANTS, Quants::Bytes) { BLOCK } else { BLOCK / 2 };

    /// Where the quants are in a block of weights.
    const QUANTS_AT: usize = Self::SCALE_BYTES
        + if Self::OFFSET.is_some() { 0 } else { 2 }
        + if matches!(Self::QUANTS, Quants::Fives) { 4 } else { 0 };

    /// Size of a block of weights.
    const BYTES: usize = Self::QUANTS_AT + Self::RUNS * Self::QUANT_BYTES;

    /// The scale of a run of weights, and behind it the offset or something else.
    ///
    /// * `block`: `[BYTES]`
    /// * `run`: below `RUNS`
    #[inline(always)]
    fn scales<L: Lanes>(block: &[u8], run: usize) -> L::Halves {
        let _ = run;
        L::halves(*part(block, 0))
    }

    /// The quants of a run of weights, without the offset.
    ///
    /// * `block`: `[BYTES]`
    /// * `run`: below `RUNS`
    #[inline(always)]
    fn quants<L: Lanes>(block: &[u8], run: usize) -> [L; 2] {
        let at = Self::QUANTS_AT + run * Self::QUANT_BYTES;
        let first = part(block, at);
        match Self::QUANTS {
            Quants::Bytes => [L::load_i8(first), L::load_i8(part(block, at + LANES))],
            Quants::Nibbles => L::load_fives(first, 0),
            Quants::Fives => L::load_fives(first, u32::from_le_bytes(*part(block, at - 4))),
            Quants::Codes(codes) => L::load_codes(first, codes),
        }
    }
}

/// `N` bytes of a block.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    &block[at..].as_chunks().0[0]
}

macro_rules! formats {
    ($($(#[$meta:meta])* $name:ident: $quants:expr, $offset:expr;)+) => {
        $(
            $(#[$meta])*
            #[derive(Debug, Clone, Copy, PartialEq)]
            pub(crate) struct $name;

            impl BlockFormat for $name {
                const QUANTS: Quants = $quants;
                const OFFSET: Option<f32> = $offset;
            }
        )+
    };
}
formats! {
    /// 18 bytes a block.
    Q4_0: Quants::Nibbles, Some(-8.0);
    /// 20 bytes a block.
    Q4_1: Quants::Nibbles, None;
    /// 22 bytes a block.
    Q5_0: Quants::Fives, Some(-16.0);
    /// 24 bytes a block.
    Q5_1: Quants::Fives, None;
    /// 34 bytes a block.
    Q8_0: Quants::Bytes, Some(0.0);
    /// 18 bytes a block.
    Iq4Nl: Quants::Codes(&IQ4_CODES), Some(0.0);
}

/// 136 bytes a block of 256 numbers: an f16 scale of scales, the upper two bits of eight scales, their lower four, codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Iq4Xs;

impl BlockFormat for Iq4Xs {
    const QUANTS: Quants = Quants::Codes(&IQ4_CODES);
    const OFFSET: Option<f32> = Some(0.0);
    const RUNS: usize = 8;
    const SCALE_BYTES: usize = 8;

    #[inline(always)]
    fn scales<L: Lanes>(block: &[u8], run: usize) -> L::Halves {
        let [scale, _] = L::pair(L::halves(*part(block, 0)));
        let words = u64::from_le_bytes(*part(block, 0));
        #[expect(clippy::cast_possible_truncation)] // 6 bits
        let of_run = (words >> (16 + 2 * run) << 4 & 0x30 | words >> (32 + 4 * run) & 15) as u8;
        L::half(scale * (f32::from(of_run) - 32.0))
    }
}

/// 17 bytes a block: the scale is a power of two.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Mxfp4;

impl BlockFormat for Mxfp4 {
    const QUANTS: Quants = Quants::Codes(&FP4_CODES);
    const OFFSET: Option<f32> = Some(0.0);
    const SCALE_BYTES: usize = 1;

    #[inline(always)]
    fn scales<L: Lanes>(block: &[u8], _: usize) -> L::Halves {
        L::half(half_of_power(block[0]))
    }
}

/// Half of what a byte stands for that is a biased exponent (E8M0), as quants are doubled; 255 is no special case, as in
/// ggml.
#[inline(always)]
pub(crate) fn half_of_power(exponent: u8) -> f32 {
    // Below 2^-126 numbers have no exponent of their own.
    f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { (u32::from(exponent) - 1) << 23 })
}

multiversion! {
    /// Widens blocks of weights to f32; `out` holds 32 numbers a run.
    pub(super) fn dequantize<B: BlockFormat>(data: &[u8], out: &mut [f32]) = dequantize_body;
}

#[inline(always)]
fn dequantize_body<L: Lanes, B: BlockFormat>(data: &[u8], out: &mut [f32]) {
    for (block, out) in data.chunks_exact(B::BYTES).zip(out.chunks_exact_mut(B::RUNS * BLOCK)) {
        for (run, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let scales = B::scales::<L>(block, run);
            let scale = L::splat_first(scales);
            let offset = match B::OFFSET {
                Some(offset) => L::splat(offset).mul(scale),
                None => L::splat(L::pair(scales)[1]),
            };
            for (quants, out) in B::quants::<L>(block, run).into_iter().zip(out.as_chunks_mut().0) {
                let is_offset = B::OFFSET != Some(0.0);
                let numbers = if is_offset { quants.mul_add(scale, offset) } else { quants.mul(scale) };
                numbers.store(out);
            }
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

    /// The quants of sixteen blocks that lie side by side, as f32, number by number; without their scales.
    ///
    /// * `quants`: `[QUANT_BYTES / 4]`
    #[inline(always)]
    fn widen(quants: &[[[u8; 4]; LANES]], columns: &mut [[f32; LANES]; BLOCK]) {
        #[expect(clippy::cast_precision_loss)] // at most 128
        let zero = Self::ZERO as f32;
        for (four, quants) in quants.iter().enumerate() {
            for (byte, number) in (4 * four..4 * four + 4).enumerate() {
                if matches!(Self::QUANTS, Quants::Bytes) {
                    columns[number] = std::array::from_fn(|lane| f32::from(quants[lane][byte]) - zero);
                } else {
                    columns[number] = std::array::from_fn(|lane| f32::from(quants[lane][byte] & 15) - zero);
                    columns[number + BLOCK / 2] = std::array::from_fn(|lane| f32::from(quants[lane][byte] >> 4) - zero);
                }
            }
        }
    }

    /// One of four blocks that lie side by side, byte by byte, as f32.
    ///
    /// * `quants`: `[QUANT_BYTES]`
    /// * `at`: which block, below 4
    #[inline(always)]
    fn widen_one(quants: &[[u8; 4]], at: usize, scale: f32, numbers: &mut [f32; BLOCK]) {
        #[expect(clippy::cast_precision_loss)] // at most 128
        let zero = Self::ZERO as f32;
        let (first, second) = numbers.split_at_mut(BLOCK / 2);
        if matches!(Self::QUANTS, Quants::Bytes) {
            let (first_quants, second_quants) = quants.split_at(BLOCK / 2);
            for (numbers, quants) in [(first, first_quants), (second, second_quants)] {
                for (number, quants) in numbers.iter_mut().zip(quants) {
                    *number = (f32::from(quants[at]) - zero) * scale;
                }
            }
        } else {
            for ((first, second), quants) in first.iter_mut().zip(second).zip(quants) {
                *first = (f32::from(quants[at] & 15) - zero) * scale;
                *second = (f32::from(quants[at] >> 4) - zero) * scale;
            }
        }
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::kernels::simd::InstructionSet;

    fn bytes(hexadecimal: &str) -> Vec<u8> {
        let digits = hexadecimal.as_bytes().as_chunks::<2>().0;
        digits.iter().map(|digits| u8::from_str_radix(str::from_utf8(digits).unwrap(), 16).unwrap()).collect()
    }

    fn check<B: BlockFormat>(known: &[[String; 2]]) {
        assert!(known.len() > 3);
        for [block, numbers] in known {
            let (block, numbers) = (bytes(block), bytes(numbers));
            assert_eq!(block.len(), B::BYTES);
            for set in InstructionSet::available() {
                let mut out = vec![f32::NAN; B::RUNS * BLOCK];
                dequantize::<B>(set, &block, &mut out);
                let out: Vec<u8> = out.iter().flat_map(|number| number.to_le_bytes()).collect();
                assert!(out == numbers, "{set:?}: {block:x?}");
            }
        }
    }

    /// Bit for bit. The numbers are those of `scripts/block_oracle.py`.
    #[test]
    fn blocks_of_codes_hold_the_numbers_that_gguf_py_reads() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/blocks.json")).unwrap();
        let known: HashMap<String, Vec<[String; 2]>> = serde_json::from_str(&text).unwrap();
        check::<Iq4Nl>(&known["IQ4_NL"]);
        check::<Iq4Xs>(&known["IQ4_XS"]);
        check::<Mxfp4>(&known["MXFP4"]);
    }
}
