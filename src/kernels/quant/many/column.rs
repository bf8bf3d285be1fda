//! A block of sixteen rows of weights at once, a row in each lane, and what formats make of its bits.
//!
//! Not for: what the bits mean in a format (see [`super::strips`]).

use half::f16;

use crate::kernels::simd::{LANES, Lanes};

/// Four bytes of each row.
pub(super) type Words = [u32; LANES];

/// A number of each row.
pub(super) type Numbers = [f32; LANES];

/// A block of some rows.
#[derive(Clone, Copy)]
pub(in super::super) struct Column<'a> {
    /// From the first row's block on.
    data: &'a [u8],
    row_bytes: usize,
    /// At most as many as lanes; the last stands for those that lack.
    rows: usize,
}

impl<'a> Column<'a> {
    /// * `data`: from the first row's block on
    /// * `rows`: at least 1, at most as many as lanes
    #[inline(always)]
    pub fn new(data: &'a [u8], row_bytes: usize, rows: usize) -> Self {
        Self { data, row_bytes, rows }
    }

    /// From a row's block on.
    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [u8] {
        &self.data[row.min(self.rows - 1) * self.row_bytes..]
    }

    /// Four bytes of each row's block.
    #[inline(always)]
    pub fn words<L: Lanes>(&self, at: usize) -> Words {
        let data = &self.data[at..];
        if self.rows == LANES {
            return L::every(data, self.row_bytes);
        }
        let mut words = [0; LANES];
        for (row, word) in words.iter_mut().enumerate() {
            *word = u32::from_le_bytes(self.row(row)[at..].as_chunks().0[0]);
        }
        words
    }
}

/// Some bits of each byte, shifted to the right.
#[inline(always)]
pub(super) fn bits(words: Words, shift: usize, mask: u8) -> Words {
    let mask = u32::from_ne_bytes([mask; 4]);
    let mut words = words;
    for word in &mut words {
        *word = *word >> shift & mask;
    }
    words
}

/// Words with further bits, shifted to the left.
#[inline(always)]
pub(super) fn with(words: Words, higher: Words, shift: usize) -> Words {
    let mut words = words;
    for (word, higher) in words.iter_mut().zip(higher) {
        *word |= higher << shift;
    }
    words
}

/// Bytes that have a sign, with 128 added.
#[inline(always)]
pub(super) fn unsigned(words: Words) -> Words {
    let mut words = words;
    for word in &mut words {
        *word ^= 0x8080_8080;
    }
    words
}

/// The f16 in the lower or the upper half of each word.
#[inline(always)]
#[expect(clippy::cast_possible_truncation)] // a half
pub(super) fn halves<L: Lanes>(words: Words, upper: bool) -> Numbers {
    let mut numbers = [f16::ZERO; LANES];
    for (number, word) in numbers.iter_mut().zip(words) {
        *number = f16::from_bits(if upper { word >> 16 } else { word } as u16);
    }
    let mut wide = [0.0; LANES];
    L::load_f16(&numbers).store(&mut wide);
    wide
}

/// The byte of each word at a place, some bits of it.
#[inline(always)]
#[expect(clippy::cast_possible_truncation)] // masked
pub(super) fn byte(words: Words, place: usize, shift: usize, mask: u8) -> [u8; LANES] {
    let mut bytes = [0; LANES];
    for (byte, word) in bytes.iter_mut().zip(words) {
        *byte = (word >> (8 * place + shift)) as u8 & mask;
    }
    bytes
}

#[inline(always)]
pub(super) fn negative(numbers: Numbers) -> Numbers {
    let mut numbers = numbers;
    for number in &mut numbers {
        *number = -*number;
    }
    numbers
}

/// Numbers times whole ones.
#[inline(always)]
pub(super) fn times(numbers: Numbers, bytes: [u8; LANES], minus: f32) -> Numbers {
    let mut products = numbers;
    for (product, byte) in products.iter_mut().zip(bytes) {
        *product *= f32::from(byte) - minus;
    }
    products
}
