//! The block formats of a quantised cache: 32 numbers of a row share an f16 scale, as in ggml's `Q8_0` and `Q4_0`. Scales
//! and quants lie apart, so that each can be read as whole vectors.
//!
//! Not for: weights, which stay in their file's own blocks (see [`super::quant`]).

use half::f16;

use super::lanes::{LANES, Lanes};

/// Numbers that share a scale.
pub(crate) const BLOCK: usize = 32;

/// A block format.
pub(crate) trait BlockFormat: Copy + std::fmt::Debug + PartialEq + Send + Sync + 'static {
    /// Bytes of a block's quants.
    const BYTES: usize;

    /// Chunks of sixteen pairs of bytes that make up twice sixteen pairs of quants.
    const CHUNKS: usize = Self::BYTES / 16;

    /// What is subtracted from a quant before it is scaled.
    const OFFSET: i32;

    /// Rounds a block: its quants, and its scale.
    ///
    /// * `quants`: `[BYTES]`
    fn quantize(numbers: &[f32; BLOCK], quants: &mut [u8]) -> f16;

    /// What a block's quants and scale mean.
    fn dequantize(quants: &[u8], scale: f16) -> [f32; BLOCK];

    /// Of which two numbers of a block the quants of pair `pair` are, where pairs are taken in the order in which
    /// [`widen`](Self::widen) gives the pairs of bytes of a row.
    fn pair(pair: usize) -> [usize; 2];

    /// The quants of a step as numbers, twice sixteen pairs; the offset is not subtracted.
    ///
    /// * `quants`: chunks of sixteen pairs of bytes, [`CHUNKS`](Self::CHUNKS) for each step
    fn widen<L: Lanes>(quants: &[[[u8; 2]; LANES]], step: usize) -> [L::Pairs; 2];
}

/// 8 bits a number, 34 bytes a block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Q8_0;

/// 4 bits a number, 18 bytes a block: byte `i` holds number `i` in its lower half and number `16 + i` in its upper.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Q4_0;

impl BlockFormat for Q8_0 {
    const BYTES: usize = BLOCK;
    const OFFSET: i32 = 0;

    #[expect(clippy::cast_possible_truncation)] // in -127..=127
    fn quantize(numbers: &[f32; BLOCK], quants: &mut [u8]) -> f16 {
        let largest = numbers.iter().fold(0.0_f32, |largest, number| largest.max(number.abs()));
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (quant, number) in quants.iter_mut().zip(numbers) {
            *quant = ((number * inverse).round() as i8).cast_unsigned();
        }
        finite_or_nan(numbers, scale)
    }

    fn dequantize(quants: &[u8], scale: f16) -> [f32; BLOCK] {
        let scale = scale.to_f32();
        std::array::from_fn(|number| f32::from(quants[number].cast_signed()) * scale)
    }

    #[inline(always)]
    fn pair(pair: usize) -> [usize; 2] {
        [2 * pair, 2 * pair + 1]
    }

    #[inline(always)]
    fn widen<L: Lanes>(quants: &[[[u8; 2]; LANES]], step: usize) -> [L::Pairs; 2] {
        [L::pairs_i8(&quants[2 * step]), L::pairs_i8(&quants[2 * step + 1])]
    }
}

impl BlockFormat for Q4_0 {
    const BYTES: usize = BLOCK / 2;
    const OFFSET: i32 = 8;

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

    fn dequantize(quants: &[u8], scale: f16) -> [f32; BLOCK] {
        let scale = scale.to_f32();
        std::array::from_fn(|number| {
            let byte = quants[number % (BLOCK / 2)];
            let quant = if number < BLOCK / 2 { byte & 15 } else { byte >> 4 };
            (f32::from(quant) - 8.0) * scale
        })
    }

    #[inline(always)]
    fn pair(pair: usize) -> [usize; 2] {
        // A pair of bytes gives a pair of lower halves and then one of upper halves.
        let first = pair / 2 * 2 + pair % 2 * (BLOCK / 2);
        [first, first + 1]
    }

    #[inline(always)]
    fn widen<L: Lanes>(quants: &[[[u8; 2]; LANES]], step: usize) -> [L::Pairs; 2] {
        L::pairs_u4(&quants[step])
    }
}

/// The scale in f16; NaN if a number of the block is not finite, which no quant can say.
fn finite_or_nan(numbers: &[f32; BLOCK], scale: f32) -> f16 {
    if numbers.iter().all(|number| number.is_finite()) { f16::from_f32(scale) } else { f16::NAN }
}
