//! Groups of the formats of 256 numbers: half a block each.
//!
//! Layouts: `block_q4_K`, `block_q5_K`, `block_q6_K` and `block_iq4_xs` of ggml's `ggml-common.h`.

use std::arch::x86_64::{
    __m128, __m512, __m512i, _mm_and_si128, _mm_broadcastss_ps, _mm_cvtepi32_ps, _mm_cvtepu8_epi32, _mm_cvtph_ps,
    _mm_cvtsi32_si128, _mm_fmadd_ps, _mm_loadl_epi64, _mm_mul_ps, _mm_or_si128, _mm_permute_ps, _mm_set1_epi32,
    _mm_setr_epi32, _mm_slli_epi32, _mm_srlv_epi32, _mm_sub_epi32, _mm256_broadcastss_ps, _mm256_cvtepi8_epi32,
    _mm256_cvtepi32_ps, _mm256_loadu_si256, _mm256_mul_ps, _mm256_set1_epi16, _mm512_and_si512, _mm512_broadcast_i64x4,
    _mm512_castsi256_si512, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_inserti64x4,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_or_si512, _mm512_permutexvar_ps, _mm512_set1_epi8, _mm512_set1_ps,
    _mm512_setzero_si512, _mm512_slli_epi32, _mm512_sllv_epi16, _mm512_srli_epi16, _mm512_srlv_epi16, _mm512_sub_epi8,
    _mm512_zextps128_ps512, _mm512_zextps256_ps512,
};
use std::mem::transmute;

use super::{BlockSums, ByteGroup, Digits, GROUP, Group, GroupBlock, LANES, decoded, load_half, load_sums, nibbles};
use crate::kernels::blocks::{BlockFormat, IQ4_CODES, Iq4Xs};
use crate::kernels::simd::each;

/// Numbers of a block.
const NUMBERS: usize = 256;

/// Of activations: more would be slower than memory (two digits: 15 to 20 % fewer tokens a second on one thread).
const DIGITS: usize = 1;

/// 144 bytes: f16 scale and scale of minima, 12 bytes of scales and minima of 6 bits, nibbles.
pub(in super::super) struct Q4K;

/// 176 bytes: as [`Q4K`], with 32 bytes of fifth bits before the nibbles.
pub(in super::super) struct Q5K;

/// 210 bytes: nibbles, 64 bytes of pairs of higher bits, 16 scales of 8 bits with a sign, f16 scale.
pub(in super::super) struct Q6K;

/// A group of quants without a sign, four blocks of 32.
#[derive(Clone, Copy)]
pub(in super::super) struct PairGroup {
    /// Blocks 0 and 2, and blocks 1 and 3.
    quants: [__m512i; 2],
    /// For each lane its block's.
    scales: [__m512; 2],
    /// What is subtracted from the four blocks.
    minima: __m128,
}

/// Indices of 16 numbers.
#[repr(C, align(64))]
struct Indices([u32; LANES]);

/// Which block's scale each lane of [`PairGroup`] has.
static PAIR_BLOCKS: [Indices; 2] = {
    let mut table = [[0; LANES]; 2];
    let mut lane = 0;
    while lane < LANES {
        table[0][lane] = if lane < 8 { 0 } else { 2 };
        table[1][lane] = table[0][lane] + 1;
        lane += 1;
    }
    [Indices(table[0]), Indices(table[1])]
};

/// Which of eight scales, each of 16 numbers, each lane has.
static SIXTEENTHS: [Indices; 2] = {
    let mut table = [[0; LANES]; 2];
    let mut lane = 0;
    while lane < LANES {
        #[expect(clippy::cast_possible_truncation)] // below 4
        {
            table[0][lane] = (lane / 4) as u32;
        }
        table[1][lane] = table[0][lane] + 4;
        lane += 1;
    }
    [Indices(table[0]), Indices(table[1])]
};

/// Two registers' worth of lanes, picked from `numbers`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn pick(numbers: __m512, indices: &[Indices; 2]) -> [__m512; 2] {
    each!(2 of indices, |indices| {
        // SAFETY: plain numbers of the same size.
        let indices = unsafe { transmute::<[u32; LANES], __m512i>(indices.0) };
        _mm512_permutexvar_ps(indices, numbers)
    })
}

/// 64 bytes of nibbles: the low ones and the high ones.
///
/// # Safety
/// `bytes` points to so many readable bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn load_nibbles(bytes: *const u8) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    nibbles(unsafe { _mm512_loadu_si512(bytes.cast()) })
}

/// 32 bytes, in both halves of a register.
///
/// # Safety
/// `bytes` points to so many readable bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn twice(bytes: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(bytes.cast()) })
}

/// 16-bit words, `low` in the lower half of a register and `high` in the upper one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn halves(low: i16, high: i16) -> __m512i {
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm256_set1_epi16(low)), _mm256_set1_epi16(high))
}

/// [`PairGroup`] of part `part` of a block with its quants.
///
/// # Safety
/// As [`GroupBlock::load`]; the block begins as those of `Q4_K` and `Q5_K` do.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn pair_group(block: *const u8, part: usize, quants: [__m512i; 2]) -> PairGroup {
    // SAFETY: the caller's promise: 16 bytes, the scales of scales first.
    let [stored, a, b, c] = unsafe { block.cast::<[u32; 4]>().read_unaligned() };
    // The last four scales and minima have four bits in one place and two in another.
    let (scales, minima) = if part == 0 {
        (a & 0x3f3f_3f3f, b & 0x3f3f_3f3f)
    } else {
        (c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030)
    };
    let [scales, minima] =
        each!([scales, minima], |bytes| _mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes.cast_signed()))));
    let stored = _mm_cvtph_ps(_mm_cvtsi32_si128(stored.cast_signed()));
    let scales = _mm_mul_ps(scales, _mm_broadcastss_ps(stored));
    PairGroup {
        quants,
        scales: pick(_mm512_zextps128_ps512(scales), &PAIR_BLOCKS),
        minima: _mm_mul_ps(minima, _mm_permute_ps::<0b01_01_01_01>(stored)),
    }
}

impl Group for PairGroup {
    const DIGITS: usize = DIGITS;
    const SIGNED: bool = false;
    /// Of 32 bytes of nibbles the low ones are a block and the high ones the next.
    const PLACES: [usize; GROUP / LANES] = [0, 16, 64, 80, 32, 48, 96, 112];

    /// `x_sums` are negative.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    unsafe fn add(self, digits: &Digits, scale: f32, x_sums: &BlockSums, sums: &mut __m512, offsets: &mut __m128) {
        for half in 0..2 {
            let mut products = _mm512_setzero_si512();
            for digit in &digits.0[..DIGITS] {
                let moved = _mm512_slli_epi32::<8>(products);
                products = _mm512_dpbusd_epi32(moved, self.quants[half], load_half(digit, half));
            }
            let scales = _mm512_mul_ps(self.scales[half], _mm512_set1_ps(scale));
            *sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scales, *sums);
        }
        *offsets = _mm_fmadd_ps(self.minima, load_sums(x_sums), *offsets);
    }
}

macro_rules! pair_format {
    ($format:ident, $bytes:literal bytes, $quants:ident) => {
        impl GroupBlock for $format {
            type Group = PairGroup;
            const BLOCK_BYTES: usize = $bytes;
            const BLOCK_NUMBERS: usize = NUMBERS;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
            unsafe fn load<const WHOLE: bool>(block: *const u8, part: usize, _blocks: usize) -> PairGroup {
                // SAFETY: the caller's promise.
                let quants = unsafe { $quants(block, part) };
                // SAFETY: the caller's promise.
                unsafe { pair_group(block, part, quants) }
            }
        }
    };
}
pair_format!(Q4K, 144 bytes, quants_of_q4k);
pair_format!(Q5K, 176 bytes, quants_of_q5k);

/// # Safety
/// As [`GroupBlock::load`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn quants_of_q4k(block: *const u8, part: usize) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe { load_nibbles(block.wrapping_add(16 + 64 * part)) }
}

/// # Safety
/// As [`GroupBlock::load`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn quants_of_q5k(block: *const u8, part: usize) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    let [even, odd] = unsafe { load_nibbles(block.wrapping_add(48 + 64 * part)) };
    // Bit `b` of byte `i` belongs to number `i` of block `b`. Shifts are of 16 bits; what crosses a byte is masked.
    // SAFETY: the caller's promise.
    let bits = unsafe { twice(block.wrapping_add(16)) };
    let bits = if part == 0 { bits } else { _mm512_srli_epi16::<4>(bits) };
    let fifth = _mm512_set1_epi8(0x10);
    [
        _mm512_or_si512(even, _mm512_and_si512(_mm512_sllv_epi16(bits, halves(4, 2)), fifth)),
        _mm512_or_si512(odd, _mm512_and_si512(_mm512_sllv_epi16(bits, halves(3, 1)), fifth)),
    ]
}

impl GroupBlock for Q6K {
    type Group = ByteGroup<DIGITS, false>;
    const BLOCK_BYTES: usize = 210;
    const BLOCK_NUMBERS: usize = NUMBERS;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    unsafe fn load<const WHOLE: bool>(block: *const u8, part: usize, _blocks: usize) -> ByteGroup<DIGITS, false> {
        // SAFETY: the caller's promise, here and below.
        let [first, second] = unsafe { load_nibbles(block.wrapping_add(64 * part)) };
        // Bits `2q` and `2q + 1` of byte `i` belong to number `32 q + i`; shifts as for `Q5K`.
        // SAFETY: as above.
        let bits = unsafe { twice(block.wrapping_add(128 + 32 * part)) };
        let (pair, offset) = (_mm512_set1_epi8(0x30), _mm512_set1_epi8(32));
        let first = _mm512_or_si512(first, _mm512_and_si512(_mm512_sllv_epi16(bits, halves(4, 2)), pair));
        let second = _mm512_or_si512(second, _mm512_and_si512(_mm512_srlv_epi16(bits, halves(0, 2)), pair));
        let quants = [_mm512_sub_epi8(first, offset), _mm512_sub_epi8(second, offset)];

        // SAFETY: as above.
        let stored = unsafe { block.wrapping_add(208).cast::<u16>().read_unaligned() };
        let stored = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(stored)));
        // SAFETY: as above.
        let scales = unsafe { _mm_loadl_epi64(block.wrapping_add(192 + 8 * part).cast()) };
        let scales = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales));
        let scales = _mm256_mul_ps(scales, _mm256_broadcastss_ps(stored));
        ByteGroup::new(quants, pick(_mm512_zextps256_ps512(scales), &SIXTEENTHS))
    }
}

impl GroupBlock for Iq4Xs {
    type Group = ByteGroup<DIGITS, true>;
    const BLOCK_BYTES: usize = Self::BYTES;
    const BLOCK_NUMBERS: usize = NUMBERS;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    unsafe fn load<const WHOLE: bool>(block: *const u8, part: usize, _blocks: usize) -> ByteGroup<DIGITS, true> {
        // SAFETY: the caller's promise, here and below.
        let quants = unsafe { load_nibbles(block.wrapping_add(Self::QUANTS_AT + 64 * part)) };
        // SAFETY: as above.
        let [stored, upper, lower @ ..] = unsafe { block.cast::<[u16; 4]>().read_unaligned() };
        // Four scales: of each two bits in a byte, and four bits in two bytes.
        let upper = _mm_srlv_epi32(_mm_set1_epi32(i32::from(upper) >> (8 * part)), _mm_setr_epi32(0, 2, 4, 6));
        let lower = _mm_srlv_epi32(_mm_set1_epi32(i32::from(lower[part])), _mm_setr_epi32(0, 4, 8, 12));
        let upper = _mm_slli_epi32::<4>(_mm_and_si128(upper, _mm_set1_epi32(3)));
        let scales = _mm_or_si128(upper, _mm_and_si128(lower, _mm_set1_epi32(15)));
        let scales = _mm_cvtepi32_ps(_mm_sub_epi32(scales, _mm_set1_epi32(32)));
        let stored = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(stored)));
        let scales = _mm_mul_ps(scales, _mm_broadcastss_ps(stored));
        let [scales, _] = pick(_mm512_zextps128_ps512(scales), &SIXTEENTHS);
        ByteGroup::new(decoded(quants, &IQ4_CODES), [scales; 2])
    }
}
