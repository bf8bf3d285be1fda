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

    /// Chunks of sixteen groups of four bytes that make up twice sixteen groups of quants.
    const CHUNKS: usize = Self::BYTES / 16;

    /// What is subtracted from a quant before it is scaled.
    const OFFSET: i32;

    /// Rounds a block: its quants, and its scale.
    ///
    /// * `quants`: `[BYTES]`
    fn quantize(numbers: &[f32; BLOCK], quants: &mut [u8]) -> f16;

    /// What a block's quants and scale mean.
    fn dequantize(quants: &[u8], scale: f16) -> [f32; BLOCK];

    /// Of which four numbers of a block the quants of each group of a step are, as the index of the four.
    ///
    /// * `step`: below 4
    fn fours(step: usize) -> [usize; 2];

    /// The quants of a step, twice sixteen groups of four; the offset is not subtracted.
    ///
    /// * `quants`: chunks of sixteen groups of four bytes, [`CHUNKS`](Self::CHUNKS) for each step
    fn unpack<L: Lanes>(quants: &[[[u8; 4]; LANES]], step: usize) -> [L::Quants; 2];
}

/// 8 bits a number, 34 bytes a block: bytes hold what ggml's do and 128 more, so that they have no sign.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Q8_0;

/// 4 bits a number, 18 bytes a block: byte `i` holds number `i` in its lower half and number `16 + i` in its upper.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Q4_0;

impl BlockFormat for Q8_0 {
    const BYTES: usize = BLOCK;
    const OFFSET: i32 = 128;

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

    fn dequantize(quants: &[u8], scale: f16) -> [f32; BLOCK] {
        let scale = scale.to_f32();
        std::array::from_fn(|number| (f32::from(quants[number]) - 128.0) * scale)
    }

    #[inline(always)]
    fn fours(step: usize) -> [usize; 2] {
        [2 * step, 2 * step + 1]
    }

    #[inline(always)]
    fn unpack<L: Lanes>(quants: &[[[u8; 4]; LANES]], step: usize) -> [L::Quants; 2] {
        [L::bytes(&quants[2 * step]), L::bytes(&quants[2 * step + 1])]
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
    fn fours(step: usize) -> [usize; 2] {
        [step, step + BLOCK / 8]
    }

    #[inline(always)]
    fn unpack<L: Lanes>(quants: &[[[u8; 4]; LANES]], step: usize) -> [L::Quants; 2] {
        L::nibbles(&quants[step])
    }
}

/// The scale in f16; NaN if a number of the block is not finite, which no quant can say.
fn finite_or_nan(numbers: &[f32; BLOCK], scale: f32) -> f16 {
    if numbers.iter().all(|number| number.is_finite()) { f16::from_f32(scale) } else { f16::NAN }
}
