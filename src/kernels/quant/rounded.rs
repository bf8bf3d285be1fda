//! Activations rounded to 8 bits in blocks of 256, as candle's products of the large formats want them.
//!
//! Bit for bit candle's `BlockQ8K::from_float`, which calls a function of the system for every number, since it is compiled
//! for processors without an instruction that rounds, and takes eight times as long.
//!
//! Not for: processors that have kernels of their own (see [`super::digits`]), or prompts (see [`super::many`]).

use candle_core::quantized::k_quants::BlockQ8K;

use crate::kernels::simd::{Lanes, ROUND, multiversion};

/// Numbers of a block.
const NUMBERS: usize = 256;
/// Numbers that have a sum.
const PART: usize = 16;
/// Numbers that are looked at together.
const LANES: usize = 32;

/// `block_q8_K` of ggml's `ggml-common.h`.
#[repr(C)]
struct Block {
    scale: f32,
    quants: [i8; NUMBERS],
    sums: [i16; NUMBERS / PART],
}

const _: () = assert!(size_of::<Block>() == size_of::<BlockQ8K>() && align_of::<Block>() == align_of::<BlockQ8K>());

multiversion! {
    /// Rounds whole blocks of numbers.
    pub(super) fn round(numbers: &[f32], blocks: &mut [BlockQ8K]) = round_body;
}

#[inline(always)]
fn round_body<L: Lanes>(numbers: &[f32], blocks: &mut [BlockQ8K]) {
    // SAFETY: both are `repr(C)`, of the same numbers in the same order, and every pattern of bits is one.
    let (_, blocks, _) = unsafe { blocks.align_to_mut::<Block>() };
    for (numbers, block) in numbers.as_chunks::<NUMBERS>().0.iter().zip(blocks) {
        round_block(numbers, block);
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the lowest byte is what is wanted")]
fn round_block(numbers: &[f32; NUMBERS], block: &mut Block) {
    /// Just below a half: added to a number before its fraction is cut off, it rounds halves away from zero.
    const HALF: f32 = 0.499_999_97;
    let mut largest = [0.0_f32; LANES];
    for part in numbers.as_chunks::<LANES>().0 {
        for (largest, number) in largest.iter_mut().zip(part) {
            *largest = if number.abs() > *largest { number.abs() } else { *largest };
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            largest[lane] = if largest[lane + width] > largest[lane] { largest[lane + width] } else { largest[lane] };
        }
        width /= 2;
    }
    let largest = largest[0];
    // With the sign of the first of that size; lanes find the part that it is in.
    let has = |part: &&[f32; LANES]| part.iter().fold(false, |has, number| has | (number.abs() == largest));
    let part = numbers.as_chunks::<LANES>().0.iter().find(has);
    let first = part.and_then(|part| part.iter().find(|number| number.abs() == largest));
    let Some(first) = first.filter(|_| largest != 0.0) else {
        *block = Block { scale: 0.0, quants: [0; NUMBERS], sums: [0; NUMBERS / PART] };
        return;
    };
    let inverse = -127.0 / first;
    let quants = block.quants.as_chunks_mut::<LANES>().0;
    for (quants, numbers) in quants.iter_mut().zip(numbers.as_chunks::<LANES>().0) {
        let mut whole = [0; LANES];
        for (whole, number) in whole.iter_mut().zip(numbers) {
            let scaled = inverse * number;
            let scaled = if scaled < -128.0 { -128.0 } else { scaled };
            let scaled = if scaled > 127.0 { 127.0 } else { scaled };
            let scaled = if scaled.is_nan() { 0.0 } else { scaled };
            // The lowest bits are then the whole number's; a conversion would check once more for what is no number.
            *whole = ((scaled + HALF.copysign(scaled)).trunc() + ROUND).to_bits();
        }
        for (quant, whole) in quants.iter_mut().zip(whole) {
            *quant = (whole as u8).cast_signed();
        }
    }
    for (sum, part) in block.sums.iter_mut().zip(block.quants.as_chunks::<PART>().0) {
        *sum = part.iter().map(|&quant| i16::from(quant)).sum();
    }
    block.scale = 1.0 / inverse;
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::GgmlType;
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::simd::InstructionSet;

    /// By bits, since not everything is a number.
    fn bytes(blocks: &[BlockQ8K]) -> Vec<u8> {
        // SAFETY: blocks are numbers that lie close together.
        unsafe { blocks.align_to::<u8>() }.1.to_vec()
    }

    fn check(numbers: &[f32]) {
        let mut expected = vec![BlockQ8K::zeros(); numbers.len() / NUMBERS];
        BlockQ8K::from_float(numbers, &mut expected);
        for set in InstructionSet::available() {
            let mut blocks = vec![BlockQ8K::zeros(); numbers.len() / NUMBERS];
            round(set, numbers, &mut blocks);
            assert!(bytes(&blocks) == bytes(&expected), "{set:?}: {blocks:?}, expected {expected:?}");
        }
    }

    #[test]
    fn blocks_are_those_of_candle_bit_for_bit() {
        // Halves and what lies next to them, both signs of the largest, and numbers so small that their scale is infinite.
        let halves = |index: usize| {
            #[expect(clippy::cast_precision_loss)]
            let half = (index % 128) as f32 - 0.5;
            [half, half.next_up(), half.next_down(), -half][index / 64]
        };
        let ramp = |index: usize| if index == 77 { 127.0 } else { halves(index) };
        let tie = |index: usize| if index.is_multiple_of(2) { -3.5 } else { 3.5 };
        let tiny = |index: usize| if index.is_multiple_of(3) { 1e-41 } else { -1e-45 };
        let huge = |index: usize| if index.is_multiple_of(3) { f32::MAX } else { -1e30 };
        let blocks: [&dyn Fn(usize) -> f32; 8] =
            [&ramp, &|index| -ramp(index), &tie, &|index| -tie(index), &tiny, &huge, &|_| 0.0, &|_| -0.0];
        for block in blocks {
            check(&(0..NUMBERS).map(block).collect::<Vec<_>>());
        }
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 100, 255] {
                check(&(0..NUMBERS).map(|index| if index == at { odd } else { ramp(index) }).collect::<Vec<_>>());
            }
        }
    }

    proptest! {
        #[test]
        fn random_blocks_are_those_of_candle(numbers in prop::collection::vec(any::<f32>(), NUMBERS),
                                             plain in prop::collection::vec(-4.0_f32..4.0, 2 * NUMBERS)) {
            check(&numbers);
            check(&plain);
        }
    }
}
