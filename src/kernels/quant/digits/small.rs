//! Groups of the formats of 32 numbers: four blocks each.

use std::arch::x86_64::{
    __m128, __m512, __m512i, _mm_cvtph_ps, _mm_fmadd_ps, _mm256_loadu_si256, _mm256_maskz_loadu_epi8,
    _mm512_castsi256_si512, _mm512_castsi512_ps, _mm512_castsi512_si256, _mm512_cmplt_epu32_mask, _mm512_cvtepi32_ps,
    _mm512_cvtph_ps, _mm512_dpbusd_epi32, _mm512_extracti32x4_epi32, _mm512_fmadd_ps, _mm512_inserti64x4,
    _mm512_loadu_si512, _mm512_mask_sllv_epi32, _mm512_maskz_loadu_epi8, _mm512_maskz_permutexvar_epi8, _mm512_mul_ps,
    _mm512_permutex2var_epi8, _mm512_permutexvar_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_slli_epi32, _mm512_sub_epi32, _mm512_zextsi256_si512,
};
use std::mem::transmute;

use super::{
    BLOCK, BlockSums, ByteGroup, Digits, GROUP, GROUP_BLOCKS, Group, GroupBlock, LANES, decoded, load_half, load_sums,
    nibbles,
};
use crate::kernels::blocks::{BlockFormat, FP4_CODES, IQ4_CODES, Iq4Nl, Mxfp4, Q4_0, Q4_1, Q8_0};

/// A group of nibbles.
#[derive(Clone, Copy)]
pub(in super::super) struct NibbleGroup {
    /// The first halves of the four blocks, and the second ones.
    quants: [__m512i; 2],
    /// As f16, in the lower half for each lane its block's scale, and in the third quarter the blocks' offsets.
    scales: __m512i,
}

/// Indices of bytes: below 64 of a group's first 64, from there on of the bytes behind.
#[repr(C, align(64))]
struct Quants([u8; 64]);

/// Indices of 16-bit words: for each of 16 lanes its block's scale, and then the four blocks' offsets.
#[repr(C, align(64))]
struct Scales([u16; 32]);

/// Of 16 bytes of nibbles the low ones are a block's first half and the high ones its second.
pub(super) const NIBBLE_PLACES: [usize; GROUP / LANES] = [0, 64, 16, 80, 32, 96, 48, 112];

#[expect(clippy::cast_possible_truncation)] // at most 80
const fn nibble_table(block_bytes: usize, first: usize) -> Quants {
    let mut table = [0; 64];
    let mut lane = 0;
    while lane < 64 {
        table[lane] = (lane / 16 * block_bytes + first + lane % 16) as u8;
        lane += 1;
    }
    Quants(table)
}

#[expect(clippy::cast_possible_truncation)] // below 32
const fn scale_table(block_bytes: usize, offset_at: usize) -> Scales {
    let mut table = [0; 32];
    let mut lane = 0;
    while lane < LANES {
        table[lane] = (lane / 4 * block_bytes / 2) as u16;
        lane += 1;
    }
    let mut block = 0;
    while block < GROUP_BLOCKS {
        table[LANES + block] = (block * block_bytes / 2 + offset_at / 2) as u16;
        block += 1;
    }
    Scales(table)
}

/// A table in a register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn load_table(table: &Quants) -> __m512i {
    // SAFETY: plain numbers of the same size.
    unsafe { transmute::<[u8; 64], __m512i>(table.0) }
}

/// A table in a register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn load_words(table: &Scales) -> __m512i {
    // SAFETY: plain numbers of the same size.
    unsafe { transmute::<[u16; 32], __m512i>(table.0) }
}

/// The nibbles of a group, and its first 64 bytes, in which all scales are.
///
/// # Safety
/// As [`GroupBlock::load`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn load_nibbles<B: BlockFormat, const WHOLE: bool>(
    bytes: *const u8,
    blocks: usize,
    quants: &Quants,
) -> ([__m512i; 2], __m512i) {
    let first_bytes = |count: usize| u64::MAX >> (64 - count);
    let (first, behind) = if WHOLE {
        #[expect(clippy::cast_possible_truncation)] // at most 16 bytes
        let mask = first_bytes(GROUP_BLOCKS * B::BYTES - 64) as u32;
        // SAFETY: the caller's promise: four blocks, and of what is behind 64 bytes only those of the mask are read.
        let behind = unsafe { _mm256_maskz_loadu_epi8(mask, bytes.wrapping_add(64).cast()) };
        // SAFETY: four blocks are more than 64 bytes.
        (unsafe { _mm512_loadu_si512(bytes.cast()) }, _mm512_castsi256_si512(behind))
    } else {
        let mask = first_bytes(blocks * B::BYTES); // three blocks are less than 64 bytes
        // SAFETY: only the bytes of the mask are read, those of the blocks that are there.
        (unsafe { _mm512_maskz_loadu_epi8(mask, bytes.cast()) }, _mm512_setzero_si512())
    };
    (nibbles(_mm512_permutex2var_epi8(first, load_table(quants), behind)), first)
}

impl Group for NibbleGroup {
    const DIGITS: usize = 3;
    const SIGNED: bool = false;
    const PLACES: [usize; GROUP / LANES] = NIBBLE_PLACES;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    unsafe fn add(self, digits: &Digits, scale: f32, x_sums: &BlockSums, sums: &mut __m512, offsets: &mut __m128) {
        let mut products = _mm512_setzero_si512();
        for digit in &digits.0[..Self::DIGITS] {
            products = _mm512_slli_epi32::<8>(products);
            for half in 0..2 {
                products = _mm512_dpbusd_epi32(products, self.quants[half], load_half(digit, half));
            }
        }
        let scales = _mm512_cvtph_ps(_mm512_castsi512_si256(self.scales));
        *sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_mul_ps(scales, _mm512_set1_ps(scale)), *sums);
        let stored = _mm_cvtph_ps(_mm512_extracti32x4_epi32::<2>(self.scales));
        *offsets = _mm_fmadd_ps(stored, load_sums(x_sums), *offsets);
    }
}

macro_rules! nibble_format {
    ($format:ident, offset at $offset_at:literal) => {
        impl GroupBlock for $format {
            type Group = NibbleGroup;
            const BLOCK_BYTES: usize = $format::BYTES;
            const BLOCK_NUMBERS: usize = BLOCK;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
            unsafe fn load<const WHOLE: bool>(bytes: *const u8, _part: usize, blocks: usize) -> NibbleGroup {
                static QUANTS: Quants = nibble_table($format::BYTES, $format::QUANTS_AT);
                static SCALES: Scales = scale_table($format::BYTES, $offset_at);
                // SAFETY: the caller's promise.
                let (quants, first) = unsafe { load_nibbles::<Self, WHOLE>(bytes, blocks, &QUANTS) };
                NibbleGroup { quants, scales: _mm512_permutexvar_epi16(load_words(&SCALES), first) }
            }
        }
    };
}
// The offset of `Q4_0` is -8 scales; that number is in the activations' sums.
nibble_format!(Q4_0, offset at 0);
nibble_format!(Q4_1, offset at 2);

impl GroupBlock for Iq4Nl {
    type Group = ByteGroup<3, true>;
    const BLOCK_BYTES: usize = Self::BYTES;
    const BLOCK_NUMBERS: usize = BLOCK;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    unsafe fn load<const WHOLE: bool>(bytes: *const u8, _part: usize, blocks: usize) -> ByteGroup<3, true> {
        static QUANTS: Quants = nibble_table(Iq4Nl::BYTES, Iq4Nl::QUANTS_AT);
        static SCALES: Scales = scale_table(Iq4Nl::BYTES, 0);
        // SAFETY: the caller's promise.
        let (quants, first) = unsafe { load_nibbles::<Self, WHOLE>(bytes, blocks, &QUANTS) };
        let scales = _mm512_permutexvar_epi16(load_words(&SCALES), first);
        let scales = _mm512_cvtph_ps(_mm512_castsi512_si256(scales));
        ByteGroup::new(decoded(quants, &IQ4_CODES), [scales; 2])
    }
}

impl GroupBlock for Mxfp4 {
    type Group = ByteGroup<3, true>;
    const BLOCK_BYTES: usize = Self::BYTES;
    const BLOCK_NUMBERS: usize = BLOCK;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    unsafe fn load<const WHOLE: bool>(bytes: *const u8, _part: usize, blocks: usize) -> ByteGroup<3, true> {
        static QUANTS: Quants = nibble_table(Mxfp4::BYTES, Mxfp4::QUANTS_AT);
        /// Of each lane's four bytes the first is its block's scale.
        static SCALES: Quants = {
            let mut table = nibble_table(Mxfp4::BYTES, 0);
            let mut lane = 0;
            while lane < LANES {
                table.0[4 * lane] = table.0[lane / 4 * 16];
                lane += 1;
            }
            table
        };
        // SAFETY: the caller's promise.
        let (quants, first) = unsafe { load_nibbles::<Self, WHOLE>(bytes, blocks, &QUANTS) };
        let exponents = _mm512_maskz_permutexvar_epi8(0x1111_1111_1111_1111, load_table(&SCALES), first);
        // As `half_of_power`.
        let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(exponents, _mm512_set1_epi32(1)));
        let small = _mm512_cmplt_epu32_mask(exponents, _mm512_set1_epi32(2));
        let scales = _mm512_mask_sllv_epi32(normal, small, _mm512_set1_epi32(0x0020_0000), exponents);
        ByteGroup::new(decoded(quants, &FP4_CODES), [_mm512_castsi512_ps(scales); 2])
    }
}

/// For each lane of 32 bits the scale of its block, the first of two or the second: the only words of 34 bytes apart.
static PAIR_SCALES: Scales = {
    let mut table = [0; 32];
    let mut lane = 8;
    while lane < LANES {
        table[lane] = 17;
        lane += 1;
    }
    Scales(table)
};

impl GroupBlock for Q8_0 {
    type Group = ByteGroup<3, false>;
    const BLOCK_BYTES: usize = Self::BYTES;
    const BLOCK_NUMBERS: usize = BLOCK;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    unsafe fn load<const WHOLE: bool>(bytes: *const u8, _part: usize, blocks: usize) -> ByteGroup<3, false> {
        let mut quants = [_mm512_setzero_si512(); 2];
        let mut scales = [_mm512_setzero_ps(); 2];
        for pair in 0..2 {
            let bytes = bytes.wrapping_add(pair * 2 * Self::BYTES);
            let second = bytes.wrapping_add(Self::BYTES);
            let has_second = WHOLE || blocks >= 2 * pair + 2;
            if !has_second && blocks <= 2 * pair {
                break;
            }
            // SAFETY: the caller's promise: there is the first block of the pair.
            let first_quants = unsafe { _mm256_loadu_si256(bytes.wrapping_add(2).cast()) };
            let first_bytes = if has_second {
                // SAFETY: there is the second block, too.
                let second_quants = unsafe { _mm256_loadu_si256(second.wrapping_add(2).cast()) };
                quants[pair] = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first_quants), second_quants);
                // SAFETY: two blocks are more than 64 bytes.
                unsafe { _mm512_loadu_si512(bytes.cast()) }
            } else {
                quants[pair] = _mm512_zextsi256_si512(first_quants);
                // SAFETY: only the bytes of the mask are read, one block.
                unsafe { _mm512_maskz_loadu_epi8((1 << Self::BYTES) - 1, bytes.cast()) }
            };
            let words = _mm512_permutexvar_epi16(load_words(&PAIR_SCALES), first_bytes);
            scales[pair] = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
        }
        ByteGroup::new(quants, scales)
    }
}
