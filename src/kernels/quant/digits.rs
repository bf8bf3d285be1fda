//! Products of stored blocks with activations that are written in digits of 8 bits each, for processors that add up
//! products of bytes (AVX-512 VNNI).
//!
//! An activation is a whole number times a scale, which 128 of them share. In three digits it has at most 24 bits (23 for
//! quants with a sign): as fine as an f32 of the largest one's size. A quant of up to 8 bits times such a number, summed over four
//! quants or eight, fits 32 bits, so that the sums within a block are exact, and a product is as good as one of f32. The
//! formats of 256 numbers have one digit: activations of 8 bits, as ggml's products with them, which share a scale there in
//! twice as many.
//!
//! A group of four blocks, 128 numbers, is unpacked at a time.
//!
//! Not for: other processors, or formats that have no kernel here (see [`super::widened`]).

mod large;
mod small;

use std::arch::x86_64::{
    __m128, __m128i, __m512, __m512i, _mm_setzero_ps, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_broadcast_i32x4, _mm512_castps_si512, _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtps_epi32,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_max_epu32, _mm512_mul_ps, _mm512_reduce_add_ps,
    _mm512_reduce_max_epu32, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_slli_epi32, _mm512_srai_epi32, _mm512_srli_epi16,
    _mm512_sub_epi32, _mm512_zextps128_ps512,
};
use std::mem::transmute;

use super::{Rows, WeightFormat};
use crate::kernels::blocks::{BLOCK, Codes, Iq4Nl, Iq4Xs, Mxfp4, Q4_0, Q4_1, Q8_0};
use crate::kernels::simd::{Vnni, each, fetch};
use large::{Q4K, Q5K, Q6K};
use small::NIBBLE_PLACES;

/// Numbers that are unpacked at a time, and whose activations share a scale.
const GROUP: usize = 128;

/// Blocks of a group.
const GROUP_BLOCKS: usize = GROUP / BLOCK;

/// Lanes of a register of 32-bit numbers.
const LANES: usize = 16;

/// What is added to activations to make them unsigned: so much in the first digit, 0 in the others.
const fn unsigned_bias(digits: usize) -> u8 {
    if digits == 1 { 128 } else { 64 }
}

/// The largest activation as a whole number, less what rounding may add.
const fn largest_whole(digits: usize, signed_quants: bool) -> f32 {
    match (digits, signed_quants) {
        (1, _) => 127.0,
        // So many, times quants of -128, four of them, fit 32 bits.
        (_, true) => 4_194_000.0,
        // Digits in -128..=127.
        (_, false) => 8_355_000.0,
    }
}

/// Activations below this are taken for 0: their scale would not be a normal number.
const SMALLEST: f32 = 1e-30;

/// How far ahead weights are fetched, in bytes: a row or two.
const AHEAD: usize = 2048;

/// Sums of a group's activations, one a block, times what offsets are in scales.
type BlockSums = [f32; GROUP_BLOCKS];

/// A group's activations, digit by digit, the highest first.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Digits([[u8; GROUP]; 3]);

/// Rows of activations as digits. Buffers are kept for reuse.
#[derive(Default)]
pub(super) struct DigitRows {
    /// `[count, groups]`
    digits: Vec<Digits>,
    /// `[count, groups]` what a digit of the lowest place stands for.
    scales: Vec<f32>,
    /// `[count, groups]`
    sums: Vec<BlockSums>,
    /// Groups of a row, the last of which may have fewer blocks.
    groups: usize,
}

/// 128 quants in registers, with their scales and offsets, and how they are multiplied.
pub(super) trait Group: Copy {
    /// Digits of activations that count, 1 or 3.
    const DIGITS: usize;

    /// Whether quants have a sign; activations are unsigned then, since the processor multiplies one with the other.
    const SIGNED: bool;

    /// Where each 16 activations of a group go: the order in which quants are unpacked.
    const PLACES: [usize; GROUP / LANES];

    /// Adds the products with one row's activations to `sums` and `offsets`.
    ///
    /// # Safety
    /// The processor has all that [`GroupBlock`] names.
    unsafe fn add(self, digits: &Digits, scale: f32, x_sums: &BlockSums, sums: &mut __m512, offsets: &mut __m128);
}

/// A format whose groups can be unpacked to bytes.
///
/// Its functions are compiled for AVX-512 F, BW, DQ, VL, VBMI and VNNI, FMA and F16C: the only reason, beside the pointers
/// of [`load`](Self::load), why calling them is unsafe.
pub(super) trait GroupBlock {
    type Group: Group;

    /// Size of a stored block.
    const BLOCK_BYTES: usize;

    /// Numbers of a stored block, [`BLOCK`] or twice [`GROUP`].
    const BLOCK_NUMBERS: usize;

    /// Loads and unpacks a group.
    ///
    /// * `bytes`: where the group's first stored block is, or the one that it is part of
    /// * `part`: which part of that block it is, 0 or 1; 0 if it has blocks of its own
    /// * `blocks`: if not `WHOLE`, how many of the four blocks there are; the others are then 0
    ///
    /// # Safety
    /// These blocks are readable, and the processor has the instructions.
    unsafe fn load<const WHOLE: bool>(bytes: *const u8, part: usize, blocks: usize) -> Self::Group;
}

impl DigitRows {
    /// Whether there is a kernel for a format.
    pub(super) fn has(dtype: WeightFormat) -> bool {
        matches!(
            dtype,
            WeightFormat::Iq4Nl
                | WeightFormat::Iq4Xs
                | WeightFormat::Mxfp4
                | WeightFormat::Q4_0
                | WeightFormat::Q4_1
                | WeightFormat::Q8_0
                | WeightFormat::Q4K
                | WeightFormat::Q5K
                | WeightFormat::Q6K
        )
    }

    /// Prepares rows of activations for weights of a format, one that has a kernel here; what was prepared before is
    /// overwritten.
    ///
    /// * `x`: `[count, cols]`
    /// * `offset_factor`: what sums of blocks are multiplied by
    pub(super) fn prepare(&mut self, _: Vnni, dtype: WeightFormat, x: &[f32], cols: usize, offset_factor: f32) {
        // SAFETY: the processor has the instructions, as the caller's `Vnni` says.
        unsafe { self.prepare_for(dtype, x, cols, offset_factor) };
    }

    /// Products with some rows of weights of the format that activations were prepared for.
    ///
    /// * `out`: `[count, rows]`
    ///
    /// # Panics
    /// If a size does not fit what was prepared.
    pub(super) fn dot_rows(&self, _: Vnni, dtype: WeightFormat, rows: Rows<'_>, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { self.dot_rows_for(dtype, rows, out) };
    }

    /// No rows.
    pub(super) fn clear(&mut self) {
        self.digits.clear();
        self.scales.clear();
        self.sums.clear();
    }

    /// Adds columns, in whole groups but for the last of a row, that were prepared for the same format.
    pub(super) fn append(&mut self, part: &Self) {
        self.digits.extend_from_slice(&part.digits);
        self.scales.extend_from_slice(&part.scales);
        self.sums.extend_from_slice(&part.sums);
    }

    /// Says how many rows all that was added comes to.
    pub(super) fn set_count(&mut self, count: usize) {
        self.groups = self.scales.len() / count;
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn prepare_for(&mut self, dtype: WeightFormat, x: &[f32], cols: usize, offset_factor: f32) {
        match dtype {
            WeightFormat::Iq4Nl => self.prepare_in::<Iq4Nl>(x, cols, offset_factor),
            WeightFormat::Iq4Xs => self.prepare_in::<Iq4Xs>(x, cols, offset_factor),
            WeightFormat::Mxfp4 => self.prepare_in::<Mxfp4>(x, cols, offset_factor),
            WeightFormat::Q4_1 => self.prepare_in::<Q4_1>(x, cols, offset_factor),
            WeightFormat::Q8_0 => self.prepare_in::<Q8_0>(x, cols, offset_factor),
            WeightFormat::Q4K => self.prepare_in::<Q4K>(x, cols, offset_factor),
            WeightFormat::Q5K => self.prepare_in::<Q5K>(x, cols, offset_factor),
            WeightFormat::Q6K => self.prepare_in::<Q6K>(x, cols, offset_factor),
            _ => self.prepare_in::<Q4_0>(x, cols, offset_factor),
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn dot_rows_for(&self, dtype: WeightFormat, rows: Rows<'_>, out: &mut [f32]) {
        match dtype {
            WeightFormat::Iq4Nl => self.dot_rows_in::<Iq4Nl>(rows, out),
            WeightFormat::Iq4Xs => self.dot_rows_in::<Iq4Xs>(rows, out),
            WeightFormat::Mxfp4 => self.dot_rows_in::<Mxfp4>(rows, out),
            WeightFormat::Q4_1 => self.dot_rows_in::<Q4_1>(rows, out),
            WeightFormat::Q8_0 => self.dot_rows_in::<Q8_0>(rows, out),
            WeightFormat::Q4K => self.dot_rows_in::<Q4K>(rows, out),
            WeightFormat::Q5K => self.dot_rows_in::<Q5K>(rows, out),
            WeightFormat::Q6K => self.dot_rows_in::<Q6K>(rows, out),
            _ => self.dot_rows_in::<Q4_0>(rows, out),
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn prepare_in<B: GroupBlock>(&mut self, x: &[f32], cols: usize, offset_factor: f32) {
        self.groups = cols.div_ceil(GROUP);
        let groups = x.len() / cols * self.groups;
        self.digits.resize(groups, Digits([[0; GROUP]; 3]));
        self.scales.resize(groups, 0.0);
        self.sums.resize(groups, [0.0; GROUP_BLOCKS]);
        let mut targets = self.digits.iter_mut().zip(&mut self.scales).zip(&mut self.sums);
        for numbers in x.chunks_exact(cols).flat_map(|row| row.chunks(GROUP)) {
            let Some(((digits, scale), sums)) = targets.next() else { break };
            let mut padded = [0.0; GROUP];
            padded[..numbers.len()].copy_from_slice(numbers);
            for (sum, block) in sums.iter_mut().zip(padded.as_chunks::<BLOCK>().0) {
                *sum = offset_factor * block.iter().sum::<f32>();
            }
            let parts: &[[f32; LANES]; GROUP / LANES] = &padded.as_chunks().0.as_chunks().0[0];
            let mut largest = _mm512_setzero_si512();
            for part in parts {
                let bits = _mm512_castps_si512(load_floats(part));
                largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX)));
            }
            // As whole numbers, infinity and what is not a number are the largest: they come out in the scale.
            let largest = f32::from_bits(_mm512_reduce_max_epu32(largest));
            let most = const { largest_whole(B::Group::DIGITS, B::Group::SIGNED) };
            let factor = if largest < SMALLEST { 0.0 } else { most / largest };
            *scale = largest / most;
            if !largest.is_finite() {
                *scale = f32::NAN;
            }
            for (part, place) in parts.iter().zip(B::Group::PLACES) {
                let scaled = _mm512_mul_ps(load_floats(part), _mm512_set1_ps(factor));
                let mut whole = _mm512_cvtps_epi32(scaled);
                // A digit with a sign carries into the next one.
                let carry = if B::Group::SIGNED { _mm512_setzero_si512() } else { _mm512_set1_epi32(128) };
                if B::Group::SIGNED {
                    let bias = const { (unsigned_bias(B::Group::DIGITS) as i32) << (8 * (B::Group::DIGITS - 1)) };
                    whole = _mm512_add_epi32(whole, _mm512_set1_epi32(bias));
                }
                for digit in digits.0[..B::Group::DIGITS].iter_mut().rev() {
                    let target: &mut [u8; LANES] = &mut digit.as_chunks_mut().0[place / LANES];
                    let bytes = _mm512_cvtepi32_epi8(whole);
                    // SAFETY: plain numbers of the same size.
                    *target = unsafe { transmute::<__m128i, [u8; LANES]>(bytes) };
                    whole = _mm512_srai_epi32::<8>(_mm512_add_epi32(whole, carry));
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn dot_rows_in<B: GroupBlock>(&self, rows: Rows<'_>, out: &mut [f32]) {
        let count = self.scales.len() / self.groups;
        for (index, out) in out.chunks_mut(4 * rows.count).enumerate() {
            let first = 4 * index * self.groups;
            match (count - 4 * index).min(4) {
                1 => self.some_rows::<B, 1>(first, rows, out),
                2 => self.some_rows::<B, 2>(first, rows, out),
                3 => self.some_rows::<B, 3>(first, rows, out),
                _ => self.some_rows::<B, 4>(first, rows, out),
            }
        }
    }

    /// `N` rows of activations at a time, the first at group `first`, so that each group of weights is unpacked once for
    /// all of them. The result for each does not depend on `N`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn some_rows<B: GroupBlock, const N: usize>(&self, first: usize, rows: Rows<'_>, out: &mut [f32]) {
        let groups = self.groups;
        let numbers = rows.row_bytes / B::BLOCK_BYTES * B::BLOCK_NUMBERS;
        let (digits, scales) = (&self.digits[first..first + N * groups], &self.scales[first..first + N * groups]);
        let x_sums = &self.sums[first..first + N * groups];
        assert!(numbers.div_ceil(GROUP) == groups && out.len() == N * rows.count, "sizes of products with rows");
        let whole = numbers / GROUP;
        for (index, row) in rows.iter().enumerate() {
            // Two sets of sums hide the latency of the multiply-add.
            let mut sums = [[_mm512_setzero_ps(); N]; 2];
            let mut offsets = [_mm_setzero_ps(); N];
            let [even, odd] = &mut sums;
            let place = |group: usize| Place { row, group, groups, digits, scales, x_sums };
            for pair in 0..whole / 2 {
                // SAFETY: sizes were checked above: groups up to `whole` are below `groups` and inside of `row`; here and
                // below.
                unsafe { add_group::<B, N, true>(place(2 * pair), 0, even, &mut offsets) };
                // SAFETY: as above.
                unsafe { add_group::<B, N, true>(place(2 * pair + 1), 0, odd, &mut offsets) };
            }
            if whole % 2 == 1 {
                // SAFETY: as above.
                unsafe { add_group::<B, N, true>(place(whole - 1), 0, even, &mut offsets) };
            }
            if whole < groups {
                // SAFETY: as above; of the last group only the blocks that are there are read.
                unsafe { add_group::<B, N, false>(place(whole), numbers % GROUP / BLOCK, odd, &mut offsets) };
            }
            for n in 0..N {
                let offsets = _mm512_zextps128_ps512(offsets[n]);
                let total = _mm512_add_ps(_mm512_add_ps(even[n], odd[n]), offsets);
                out[n * rows.count + index] = _mm512_reduce_add_ps(total);
            }
        }
    }
}

/// A group of weights, and the activations of `N` rows, each of `groups` groups.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// The row of weights.
    row: &'a [u8],
    group: usize,
    groups: usize,
    digits: &'a [Digits],
    scales: &'a [f32],
    x_sums: &'a [BlockSums],
}

/// Adds a group's products. A function of its own, and no closure, so that it is compiled with its surroundings.
///
/// # Safety
/// The group, or its first `blocks` blocks if it is not `WHOLE`, lies inside of the row, and is below `groups`; there are
/// activations for `N * groups` of them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn add_group<B: GroupBlock, const N: usize, const WHOLE: bool>(
    place: Place<'_>,
    blocks: usize,
    sums: &mut [__m512; N],
    offsets: &mut [__m128; N],
) {
    let bytes = GROUP * B::BLOCK_BYTES / B::BLOCK_NUMBERS;
    let row = place.row.as_ptr();
    for line in (0..bytes).step_by(64) {
        fetch::<true>(row.wrapping_add(place.group * bytes + AHEAD + line));
    }
    let parts = (B::BLOCK_NUMBERS / GROUP).max(1);
    let part = place.group % parts;
    let block = row.wrapping_add((place.group - part) * bytes);
    // SAFETY: the caller's promise.
    let group = unsafe { B::load::<WHOLE>(block, part, blocks) };
    for n in 0..N {
        let at = n * place.groups + place.group;
        // SAFETY: the caller's promise, here and below.
        let digits = unsafe { place.digits.get_unchecked(at) };
        // SAFETY: as above.
        let scale = unsafe { *place.scales.get_unchecked(at) };
        // SAFETY: as above.
        let x_sums = unsafe { place.x_sums.get_unchecked(at) };
        // SAFETY: this function is compiled for the same instructions.
        unsafe { group.add(digits, scale, x_sums, &mut sums[n], &mut offsets[n]) };
    }
}

/// Sixteen numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn load_floats(numbers: &[f32; LANES]) -> __m512 {
    // SAFETY: plain numbers of the same size.
    unsafe { transmute::<[f32; LANES], __m512>(*numbers) }
}

/// Four numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn load_sums(sums: &BlockSums) -> __m128 {
    // SAFETY: plain numbers of the same size.
    unsafe { transmute::<BlockSums, __m128>(*sums) }
}

/// The first or the second half of a digit of all activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn load_half(digit: &[u8; GROUP], half: usize) -> __m512i {
    // SAFETY: plain numbers of the same size.
    unsafe { transmute::<[u8; GROUP / 2], __m512i>(digit.as_chunks().0[half]) }
}

/// 64 bytes of nibbles: the low ones and the high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn nibbles(bytes: __m512i) -> [__m512i; 2] {
    let low = _mm512_set1_epi8(0x0f);
    [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low)]
}

/// What codes stand for.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn decoded(quants: [__m512i; 2], codes: &Codes) -> [__m512i; 2] {
    // SAFETY: plain numbers of the same size.
    let codes = _mm512_broadcast_i32x4(unsafe { transmute::<Codes, __m128i>(*codes) });
    each!(2 of quants, |quants| _mm512_shuffle_epi8(codes, quants))
}

/// A group of signed bytes, half of them in a register, in the order of its numbers or, if `OF_NIBBLES`, the first halves of
/// its four blocks and then the second ones; for activations of so many digits.
#[derive(Clone, Copy)]
pub(super) struct ByteGroup<const DIGITS: usize, const OF_NIBBLES: bool> {
    quants: [__m512i; 2],
    /// What the bias of unsigned activations adds to the products.
    bias: [__m512i; 2],
    scales: [__m512; 2],
}

impl<const DIGITS: usize, const OF_NIBBLES: bool> ByteGroup<DIGITS, OF_NIBBLES> {
    /// * `scales`: for each lane of four quants
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    fn new(quants: [__m512i; 2], scales: [__m512; 2]) -> Self {
        let x = _mm512_set1_epi8(const { unsigned_bias(DIGITS) }.cast_signed());
        let bias = each!(2 of quants, |quants| _mm512_dpbusd_epi32(_mm512_setzero_si512(), x, quants));
        Self { quants, bias, scales }
    }
}

impl<const DIGITS: usize, const OF_NIBBLES: bool> Group for ByteGroup<DIGITS, OF_NIBBLES> {
    const DIGITS: usize = DIGITS;
    const SIGNED: bool = true;
    const PLACES: [usize; GROUP / LANES] = if OF_NIBBLES { NIBBLE_PLACES } else { [0, 16, 32, 48, 64, 80, 96, 112] };

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    unsafe fn add(self, digits: &Digits, scale: f32, _: &BlockSums, sums: &mut __m512, _: &mut __m128) {
        for half in 0..2 {
            let mut products = _mm512_setzero_si512();
            for (place, digit) in digits.0[..DIGITS].iter().enumerate() {
                let moved = _mm512_slli_epi32::<8>(products);
                products = _mm512_dpbusd_epi32(moved, load_half(digit, half), self.quants[half]);
                if place == 0 {
                    products = _mm512_sub_epi32(products, self.bias[half]);
                }
            }
            let scales = _mm512_mul_ps(self.scales[half], _mm512_set1_ps(scale));
            *sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scales, *sums);
        }
    }
}
