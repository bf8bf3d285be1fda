//! Weights of any block format as bytes in strips: rows in the lanes, `weight = scale * (byte - zero) + offset`.
//!
//! A format says where its quants are and what they mean ([`Format`]); they become bytes as they are. Rounding them to 8 bits,
//! so that more of them share a scale, made formats with runs of 16 a quarter faster, and the divergence of a 0.5B model in
//! `Q4_K_M` a tenth larger (0.0016 against 0.0014).
//!
//! Not for: products (see [`super`]).

use super::super::Rows;
use super::column::{Column, Numbers, Words, bits, byte, halves, negative, times, unsigned, with};
use super::{STRIP, VECTORS};
use crate::kernels::blocks::{BLOCK, BlockFormat, Codes, Quants};
use crate::kernels::simd::{LANES, Lanes};

/// The most runs in a block.
const RUNS: usize = 16;

/// The scales and the offsets of a block's runs, for each row.
#[derive(Default)]
pub(in super::super) struct Scales {
    scales: [Numbers; RUNS],
    offsets: [Numbers; RUNS],
}

/// A format of blocks, runs of whose quants share a scale and an offset: `weight = scale * (quant - zero) + offset`. What is
/// not said of a format is what most of those of 256 numbers have.
pub(in super::super) trait Format: 'static {
    /// Weights in a block.
    const BLOCK: usize = 256;
    /// Size of a block in bytes.
    const BYTES: usize;
    /// Weights that share a scale.
    const RUN: usize = 16;
    /// The largest quant; they have no sign.
    const LARGEST: u8;
    /// The quant that means 0, apart from the offset.
    const ZERO: u8 = 0;
    const HAS_OFFSETS: bool = Self::ZERO == 0;

    /// The scales, and the offsets if there are any; others are 0.
    fn scales<L: Lanes>(block: Column<'_>, out: &mut Scales);

    /// Hands over the quants.
    fn quants<L: Lanes>(block: Column<'_>, target: &mut Target<'_>);
}

/// The quant that means 0 if codes become quants without a sign: the middle of all bytes if they need more than 7 bits, for
/// which there are products of their own.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // at most 128
const fn zero_of(codes: &Codes) -> u8 {
    let ([mut least, mut largest], mut at) = ([0, 0], 0);
    while at < codes.len() {
        let number = codes[at] as i16;
        least = if number < least { number } else { least };
        largest = if number > largest { number } else { largest };
        at += 1;
    }
    if largest - least < 128 { -least as u8 } else { 128 }
}

/// Codes as quants without a sign, and the largest of these.
const fn unsigned_codes(codes: &Codes) -> ([u8; 16], u8) {
    let (mut quants, mut largest, mut at) = ([0; 16], 0, 0);
    while at < codes.len() {
        quants[at] = codes[at].cast_unsigned().wrapping_add(zero_of(codes));
        largest = if quants[at] > largest { quants[at] } else { largest };
        at += 1;
    }
    (quants, largest)
}

/// The quants of a format's codes, if it has any.
const fn quants_of_codes<B: BlockFormat>() -> [u8; 16] {
    if let Quants::Codes(codes) = B::QUANTS { unsigned_codes(codes).0 } else { [0; 16] }
}

impl<B: BlockFormat> Format for B {
    const BLOCK: usize = B::RUNS * BLOCK;
    const BYTES: usize = B::BYTES;
    const RUN: usize = BLOCK;
    const LARGEST: u8 = match B::QUANTS {
        Quants::Nibbles => 15,
        Quants::Fives => 31,
        Quants::Bytes => 255,
        Quants::Codes(codes) => unsigned_codes(codes).1,
    };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a small whole number
    const ZERO: u8 = match (B::QUANTS, B::OFFSET) {
        (Quants::Bytes, _) => 128,
        (Quants::Codes(codes), _) => zero_of(codes),
        (_, Some(offset)) => -offset as u8,
        (_, None) => 0,
    };

    #[inline(always)]
    fn scales<L: Lanes>(block: Column<'_>, out: &mut Scales) {
        if B::SCALE_BYTES != 2 {
            for run in 0..B::RUNS {
                for row in 0..LANES {
                    out.scales[run][row] = L::pair(B::scales::<L>(block.row(row), run))[0];
                }
            }
            return;
        }
        let words = block.words::<L>(0);
        out.scales[0] = halves::<L>(words, false);
        if B::OFFSET.is_none() {
            out.offsets[0] = halves::<L>(words, true);
        }
    }

    #[inline(always)]
    fn quants<L: Lanes>(block: Column<'_>, target: &mut Target<'_>) {
        if B::QUANTS == Quants::Bytes {
            for four in 0..8 {
                target.put(four, unsigned(block.words::<L>(B::QUANTS_AT + 4 * four)));
            }
            return;
        }
        let fifths = if B::QUANTS == Quants::Fives { block.words::<L>(B::QUANTS_AT - 4) } else { [0; LANES] };
        for word in 0..4 * B::RUNS {
            let stored = block.words::<L>(B::QUANTS_AT + 4 * word);
            for upper in 0..2 {
                let four = word / 4 * 8 + word % 4 + 4 * upper;
                let mut quants = bits(stored, 4 * upper, 15);
                if B::QUANTS == Quants::Fives {
                    for (quants, fifths) in quants.iter_mut().zip(fifths) {
                        // Bit `i` of the four to byte `i`.
                        *quants |= (((fifths >> (4 * four) & 15) * 0x0020_4081) & 0x0101_0101) << 4;
                    }
                }
                if matches!(B::QUANTS, Quants::Codes(_)) {
                    quants = L::look_up(&quants, &const { quants_of_codes::<B>() });
                }
                target.put(four, quants);
            }
        }
    }
}

/// The scales and minima of `Q4_K` and `Q5_K`, eight of 6 bits each in 12 bytes.
#[inline(always)]
fn sixes<L: Lanes>(block: Column<'_>, out: &mut Scales) {
    let words = block.words::<L>(0);
    let (scale, minimum) = (halves::<L>(words, false), negative(halves::<L>(words, true)));
    // Of the first four runs 6 bits each; of the others 4 together, and 2 in the bits that are left.
    let [first, second, both] = [block.words::<L>(4), block.words::<L>(8), block.words::<L>(12)];
    let later = [with(bits(both, 0, 15), bits(first, 6, 3), 4), with(bits(both, 4, 15), bits(second, 6, 3), 4)];
    for run in 0..4 {
        out.scales[run] = times(scale, byte(first, run, 0, 63), 0.0);
        out.offsets[run] = times(minimum, byte(second, run, 0, 63), 0.0);
        out.scales[run + 4] = times(scale, byte(later[0], run, 0, 63), 0.0);
        out.offsets[run + 4] = times(minimum, byte(later[1], run, 0, 63), 0.0);
    }
}

/// The format of 256 numbers in 4 bits, eight runs with a scale and a minimum each.
pub(in super::super) struct Q4K;

impl Format for Q4K {
    const BYTES: usize = 144;
    const RUN: usize = 32;
    const LARGEST: u8 = 15;

    #[inline(always)]
    fn scales<L: Lanes>(block: Column<'_>, out: &mut Scales) {
        sixes::<L>(block, out);
    }

    #[inline(always)]
    fn quants<L: Lanes>(block: Column<'_>, target: &mut Target<'_>) {
        for word in 0..32 {
            let stored = block.words::<L>(16 + 4 * word);
            let four = word / 8 * 16 + word % 8;
            target.put(four, bits(stored, 0, 15));
            target.put(four + 8, bits(stored, 4, 15));
        }
    }
}

/// As [`Q4K`], in 5 bits.
pub(in super::super) struct Q5K;

impl Format for Q5K {
    const BYTES: usize = 176;
    const RUN: usize = 32;
    const LARGEST: u8 = 31;

    #[inline(always)]
    fn scales<L: Lanes>(block: Column<'_>, out: &mut Scales) {
        sixes::<L>(block, out);
    }

    #[inline(always)]
    fn quants<L: Lanes>(block: Column<'_>, target: &mut Target<'_>) {
        for column in 0..8 {
            let fifths = block.words::<L>(16 + 4 * column);
            for part in 0..4 {
                let stored = block.words::<L>(48 + 32 * part + 4 * column);
                let four = 16 * part + column;
                target.put(four, with(bits(stored, 0, 15), bits(fifths, 2 * part, 1), 4));
                target.put(four + 8, with(bits(stored, 4, 15), bits(fifths, 2 * part + 1, 1), 4));
            }
        }
    }
}

/// The format of 256 numbers in 6 bits, sixteen runs with a scale each.
pub(in super::super) struct Q6K;

impl Format for Q6K {
    const BYTES: usize = 210;
    const LARGEST: u8 = 63;
    const ZERO: u8 = 32;

    #[inline(always)]
    fn scales<L: Lanes>(block: Column<'_>, out: &mut Scales) {
        // The last four bytes: the scale is in the upper half.
        let scale = halves::<L>(block.words::<L>(206), true);
        for run in 0..RUNS {
            let words = unsigned(block.words::<L>(192 + run / 4 * 4));
            out.scales[run] = times(scale, byte(words, run % 4, 0, 255), 128.0);
        }
    }

    #[inline(always)]
    fn quants<L: Lanes>(block: Column<'_>, target: &mut Target<'_>) {
        for part in 0..2 {
            for column in 0..8 {
                let first = block.words::<L>(64 * part + 4 * column);
                let second = block.words::<L>(64 * part + 32 + 4 * column);
                let high = block.words::<L>(128 + 32 * part + 4 * column);
                let four = 32 * part + column;
                target.put(four, with(bits(first, 0, 15), bits(high, 0, 3), 4));
                target.put(four + 8, with(bits(second, 0, 15), bits(high, 2, 3), 4));
                target.put(four + 16, with(bits(first, 4, 15), bits(high, 4, 3), 4));
                target.put(four + 24, with(bits(second, 4, 15), bits(high, 6, 3), 4));
            }
        }
    }
}

/// The format of 256 numbers in 2 bits, sixteen runs with a scale and a minimum each.
pub(in super::super) struct Q2K;

impl Format for Q2K {
    const BYTES: usize = 84;
    const LARGEST: u8 = 3;

    #[inline(always)]
    fn scales<L: Lanes>(block: Column<'_>, out: &mut Scales) {
        let words = block.words::<L>(80);
        let (scale, minimum) = (halves::<L>(words, false), negative(halves::<L>(words, true)));
        for run in 0..RUNS {
            let words = block.words::<L>(run / 4 * 4);
            out.scales[run] = times(scale, byte(words, run % 4, 0, 15), 0.0);
            out.offsets[run] = times(minimum, byte(words, run % 4, 4, 15), 0.0);
        }
    }

    #[inline(always)]
    fn quants<L: Lanes>(block: Column<'_>, target: &mut Target<'_>) {
        for word in 0..16 {
            let stored = block.words::<L>(16 + 4 * word);
            let four = word / 8 * 32 + word % 8;
            for part in 0..4 {
                target.put(four + 8 * part, bits(stored, 2 * part, 3));
            }
        }
    }
}

/// The format of 256 numbers in 3 bits, sixteen runs with a scale each.
pub(in super::super) struct Q3K;

impl Format for Q3K {
    const BYTES: usize = 110;
    const LARGEST: u8 = 7;
    const ZERO: u8 = 4;

    #[inline(always)]
    fn scales<L: Lanes>(block: Column<'_>, out: &mut Scales) {
        let scale = halves::<L>(block.words::<L>(106), true);
        // Four bits of two scales in each of eight bytes, and two bits of four in each of the four behind.
        let high = block.words::<L>(104);
        for four in 0..4 {
            let low = block.words::<L>(96 + four % 2 * 4);
            let both = with(bits(low, four / 2 * 4, 15), bits(high, 2 * four, 3), 4);
            for run in 0..4 {
                out.scales[4 * four + run] = times(scale, byte(both, run, 0, 63), 32.0);
            }
        }
    }

    #[inline(always)]
    fn quants<L: Lanes>(block: Column<'_>, target: &mut Target<'_>) {
        for column in 0..8 {
            let thirds = block.words::<L>(4 * column);
            for half in 0..2 {
                let stored = block.words::<L>(32 + 32 * half + 4 * column);
                for part in 0..4 {
                    let third = bits(thirds, 4 * half + part, 1);
                    target.put(32 * half + 8 * part + column, with(bits(stored, 2 * part, 3), third, 2));
                }
            }
        }
    }
}

/// Where a block of some rows goes.
pub(in super::super) struct Target<'a> {
    /// `[BLOCK / 4, VECTORS]`, of which every one of `vector` is written.
    bytes: &'a mut [Fours],
    vector: usize,
}

impl Target<'_> {
    /// Takes quants, four of each row.
    ///
    /// * `four`: which four numbers of the block
    #[inline(always)]
    fn put(&mut self, four: usize, quants: Words) {
        self.bytes[four * VECTORS + self.vector] = Fours(quants);
    }
}

/// A panel's weights.
#[derive(Default)]
pub(super) struct Strips {
    /// Fours of columns of a strip, times its vectors.
    fours: usize,
    /// Groups of a strip, times its vectors.
    groups: usize,
    /// `[strips, cols / 4, VECTORS]`
    bytes: Vec<Fours>,
    /// `[strips, cols / group, VECTORS, LANES]`
    scales: Vec<[f32; LANES]>,
    /// As the scales; empty if there are none.
    offsets: Vec<[f32; LANES]>,
}

/// Four bytes of each row, in a register's place.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Fours(pub Words);

/// A strip's weights, see [`Strips`].
#[derive(Clone, Copy)]
pub(super) struct Strip<'a> {
    pub bytes: &'a [Fours],
    pub scales: &'a [[f32; LANES]],
    pub offsets: &'a [[f32; LANES]],
}

impl Strips {
    /// Unpacks rows; beyond the last one the last strip holds what is finite.
    #[inline(always)]
    pub fn unpack<L: Lanes, F: Format>(&mut self, rows: Rows<'_>, cols: usize) {
        let strips = rows.count.div_ceil(STRIP);
        (self.fours, self.groups) = (cols / 4 * VECTORS, cols / F::RUN * VECTORS);
        self.bytes.resize(strips * self.fours, Fours([0; LANES]));
        self.scales.resize(strips * self.groups, [0.0; LANES]);
        self.offsets.resize(if F::HAS_OFFSETS { strips * self.groups } else { 0 }, [0.0; LANES]);
        let (fours, runs) = (F::BLOCK / 4 * VECTORS, F::BLOCK / F::RUN);
        for (index, first) in (0..strips * STRIP).step_by(LANES).enumerate() {
            // Those that lack are the last one again.
            let first = first.min(rows.count - 1);
            let row_bytes = rows.row_bytes;
            let data = &rows.data[first * row_bytes..];
            let (strip, vector) = (index / VECTORS, index % VECTORS);
            for block in 0..cols / F::BLOCK {
                let column = Column::new(&data[block * F::BYTES..], row_bytes, (rows.count - first).min(LANES));
                let mut numbers = Scales::default();
                F::scales::<L>(column, &mut numbers);
                for run in 0..runs {
                    let at = strip * self.groups + (block * runs + run) * VECTORS + vector;
                    self.scales[at] = numbers.scales[run];
                    if F::HAS_OFFSETS {
                        self.offsets[at] = numbers.offsets[run];
                    }
                }
                let start = strip * self.fours + block * fours;
                F::quants::<L>(column, &mut Target { bytes: &mut self.bytes[start..start + fours], vector });
            }
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Strip<'_>> {
        (0..self.bytes.len() / self.fours.max(1)).map(|strip| Strip {
            bytes: &self.bytes[strip * self.fours..(strip + 1) * self.fours],
            scales: &self.scales[strip * self.groups..(strip + 1) * self.groups],
            offsets: self.offsets.get(strip * self.groups..(strip + 1) * self.groups).unwrap_or_default(),
        })
    }
}
