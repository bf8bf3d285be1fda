//! Products of stored blocks with activations that are written in three digits of 8 bits each, for processors that add
//! up products of bytes (AVX-512 VNNI).
//!
//! An activation is a whole number of at most 24 bits (23 for `Q8_0`) times a scale, which 128 of them share: as fine as
//! an f32 of the largest one's size. A quant of up to 8 bits times such a number, summed over four quants or eight, fits
//! 32 bits, so that the sums within a block are exact, and a product is as good as one of f32.
//!
//! A group of four blocks, 128 numbers, is unpacked at a time.
//!
//! Not for: other processors, or formats that have no kernel here (see [`super::dot`]).

use std::arch::x86_64::{
    __m128, __m512, __m512i, _MM_HINT_T0, _mm_cvtph_ps, _mm_fmadd_ps, _mm_loadu_ps, _mm_prefetch, _mm_setzero_ps,
    _mm_storeu_si128, _mm256_loadu_si256, _mm256_maskz_loadu_epi8, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_castps_si512, _mm512_castsi256_si512, _mm512_castsi512_si256, _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps,
    _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_dpbusd_epi32, _mm512_extracti32x4_epi32, _mm512_fmadd_ps,
    _mm512_inserti64x4, _mm512_load_si512, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi8,
    _mm512_max_epu32, _mm512_mul_ps, _mm512_permutex2var_epi8, _mm512_permutexvar_epi16, _mm512_reduce_add_ps,
    _mm512_reduce_max_epu32, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_slli_epi32, _mm512_srai_epi32, _mm512_srli_epi16, _mm512_sub_epi32,
    _mm512_zextps128_ps512, _mm512_zextsi256_si512,
};

use super::blocks::{BLOCK, Q4_0, Q4_1, Q8_0, SmallBlock};
use super::dot::Rows;

/// Numbers that are unpacked at a time, and whose activations share a scale.
const GROUP: usize = 128;

/// Blocks of a group.
const GROUP_BLOCKS: usize = GROUP / BLOCK;

/// Lanes of a register of 32-bit numbers.
const LANES: usize = 16;

/// Largest activation in signed digits, each in -128..=127: 24 bits, less what rounding may add.
const LARGEST_SIGNED: f32 = 8_355_000.0;

/// Largest activation in unsigned digits with [`UNSIGNED_BIAS`]: so many, times quants of -128, four of them, fit 32 bits.
const LARGEST_UNSIGNED: f32 = 4_194_000.0;

/// What is added to activations to make them unsigned: 64 in the first digit, 0 in the others.
const UNSIGNED_BIAS: i32 = 64 << 16;

/// Activations below this are taken for 0: their scale would not be a normal number.
const SMALLEST: f32 = 1e-30;

/// How far ahead weights are fetched, in bytes: a row or two.
const AHEAD: usize = 2048;

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
    /// `[count, groups, 4]` sums of the activations of each block, times what offsets are in scales.
    sums: Vec<f32>,
    /// Groups of a row, the last of which may have fewer blocks.
    groups: usize,
}

/// A format whose groups can be unpacked to bytes.
///
/// Its functions may be called only where AVX-512 F, BW, VL, VBMI and VNNI, FMA and F16C are enabled.
pub(super) trait GroupBlock: SmallBlock {
    /// A group in registers.
    type Group: Copy;

    /// Whether quants have a sign; activations are unsigned then, since the processor multiplies one with the other.
    const SIGNED: bool;

    /// Where each 16 activations of a group go: the order in which quants are unpacked.
    const PLACES: [usize; GROUP / LANES];

    /// Loads and unpacks a group, or the first `blocks` of one; the others are then 0.
    ///
    /// # Safety
    /// `bytes` points to so many readable blocks.
    unsafe fn load<const WHOLE: bool>(bytes: *const u8, blocks: usize) -> Self::Group;

    /// Adds the group's products with one row's activations to `sums` and `offsets`.
    ///
    /// # Safety
    /// `x_sums` points to four readable numbers.
    unsafe fn add(
        group: Self::Group,
        digits: &Digits,
        scale: f32,
        x_sums: *const f32,
        sums: &mut __m512,
        offsets: &mut __m128,
    );
}

/// A group of nibbles.
#[derive(Clone, Copy)]
pub(super) struct NibbleGroup {
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
const NIBBLE_PLACES: [usize; GROUP / LANES] = [0, 64, 16, 80, 32, 96, 48, 112];

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

/// # Safety
/// As [`GroupBlock::load`].
#[inline(always)]
unsafe fn load_nibbles<B: SmallBlock, const WHOLE: bool>(
    bytes: *const u8,
    blocks: usize,
    quants: &Quants,
    scales: &Scales,
) -> NibbleGroup {
    // SAFETY: the caller's promise; masked loads touch only the bytes of their mask.
    unsafe {
        let first_bytes = |count: usize| u64::MAX >> (64 - count);
        let (first, behind) = if WHOLE {
            #[expect(clippy::cast_possible_truncation)] // at most 16 bytes
            let behind = first_bytes(GROUP_BLOCKS * B::BYTES - 64) as u32;
            let behind = _mm256_maskz_loadu_epi8(behind, bytes.add(64).cast());
            (_mm512_loadu_si512(bytes.cast()), _mm512_castsi256_si512(behind))
        } else {
            // Three blocks are less than 64 bytes.
            (_mm512_maskz_loadu_epi8(first_bytes(blocks * B::BYTES), bytes.cast()), _mm512_setzero_si512())
        };
        let quants = _mm512_permutex2var_epi8(first, _mm512_load_si512(quants.0.as_ptr().cast()), behind);
        let low = _mm512_set1_epi8(0x0f);
        NibbleGroup {
            quants: [_mm512_and_si512(quants, low), _mm512_and_si512(_mm512_srli_epi16::<4>(quants), low)],
            scales: _mm512_permutexvar_epi16(_mm512_load_si512(scales.0.as_ptr().cast()), first),
        }
    }
}

/// # Safety
/// As [`GroupBlock::add`].
#[inline(always)]
unsafe fn add_nibbles(
    group: NibbleGroup,
    digits: &Digits,
    scale: f32,
    x_sums: *const f32,
    sums: &mut __m512,
    offsets: &mut __m128,
) {
    // SAFETY: the caller's promise; digits are aligned.
    unsafe {
        let mut products = _mm512_setzero_si512();
        for digit in &digits.0 {
            products = _mm512_slli_epi32::<8>(products);
            for half in 0..2 {
                let x = _mm512_load_si512(digit.as_ptr().add(64 * half).cast());
                products = _mm512_dpbusd_epi32(products, group.quants[half], x);
            }
        }
        let scales = _mm512_cvtph_ps(_mm512_castsi512_si256(group.scales));
        *sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_mul_ps(scales, _mm512_set1_ps(scale)), *sums);
        let stored = _mm_cvtph_ps(_mm512_extracti32x4_epi32::<2>(group.scales));
        *offsets = _mm_fmadd_ps(stored, _mm_loadu_ps(x_sums), *offsets);
    }
}

macro_rules! nibble_format {
    ($format:ident, quants at $quants_at:literal, offset at $offset_at:literal) => {
        impl GroupBlock for $format {
            type Group = NibbleGroup;
            const SIGNED: bool = false;
            const PLACES: [usize; GROUP / LANES] = NIBBLE_PLACES;

            #[inline(always)]
            unsafe fn load<const WHOLE: bool>(bytes: *const u8, blocks: usize) -> NibbleGroup {
                static QUANTS: Quants = nibble_table($format::BYTES, $quants_at);
                static SCALES: Scales = scale_table($format::BYTES, $offset_at);
                // SAFETY: the caller's promise.
                unsafe { load_nibbles::<Self, WHOLE>(bytes, blocks, &QUANTS, &SCALES) }
            }

            #[inline(always)]
            unsafe fn add(
                group: NibbleGroup,
                digits: &Digits,
                scale: f32,
                x_sums: *const f32,
                sums: &mut __m512,
                offsets: &mut __m128,
            ) {
                // SAFETY: the caller's promise.
                unsafe { add_nibbles(group, digits, scale, x_sums, sums, offsets) }
            }
        }
    };
}
// The offset of `Q4_0` is -8 scales; that number is in the activations' sums.
nibble_format!(Q4_0, quants at 2, offset at 0);
nibble_format!(Q4_1, quants at 4, offset at 2);

/// A group of signed bytes, two blocks in a register.
#[derive(Clone, Copy)]
pub(super) struct ByteGroup {
    quants: [__m512i; 2],
    /// What the bias of unsigned activations adds to the products.
    bias: [__m512i; 2],
    scales: [__m512; 2],
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
    type Group = ByteGroup;
    const SIGNED: bool = true;
    const PLACES: [usize; GROUP / LANES] = [0, 16, 32, 48, 64, 80, 96, 112];

    #[inline(always)]
    unsafe fn load<const WHOLE: bool>(bytes: *const u8, blocks: usize) -> ByteGroup {
        // SAFETY: the caller's promise; masked loads touch only the bytes of their mask.
        unsafe {
            let zero = _mm512_setzero_si512();
            let mut group = ByteGroup { quants: [zero; 2], bias: [zero; 2], scales: [_mm512_setzero_ps(); 2] };
            for pair in 0..2 {
                let bytes = bytes.wrapping_add(pair * 2 * Self::BYTES);
                let second = bytes.wrapping_add(Self::BYTES);
                let (quants, first_bytes) = if WHOLE || blocks >= 2 * pair + 2 {
                    let quants = _mm512_castsi256_si512(_mm256_loadu_si256(bytes.add(2).cast()));
                    let quants = _mm512_inserti64x4::<1>(quants, _mm256_loadu_si256(second.add(2).cast()));
                    (quants, _mm512_loadu_si512(bytes.cast()))
                } else if blocks > 2 * pair {
                    let quants = _mm512_zextsi256_si512(_mm256_loadu_si256(bytes.add(2).cast()));
                    (quants, _mm512_maskz_loadu_epi8((1 << Self::BYTES) - 1, bytes.cast()))
                } else {
                    break;
                };
                group.quants[pair] = quants;
                group.bias[pair] = _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(64), quants);
                let scales = _mm512_permutexvar_epi16(_mm512_load_si512(PAIR_SCALES.0.as_ptr().cast()), first_bytes);
                group.scales[pair] = _mm512_cvtph_ps(_mm512_castsi512_si256(scales));
            }
            group
        }
    }

    #[inline(always)]
    unsafe fn add(
        group: ByteGroup,
        digits: &Digits,
        scale: f32,
        _x_sums: *const f32,
        sums: &mut __m512,
        _offsets: &mut __m128,
    ) {
        // SAFETY: the caller's promise; digits are aligned.
        unsafe {
            for pair in 0..2 {
                let [high, middle, low] = &digits.0;
                let x = _mm512_load_si512(high.as_ptr().add(64 * pair).cast());
                let products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), x, group.quants[pair]);
                let products = _mm512_slli_epi32::<8>(_mm512_sub_epi32(products, group.bias[pair]));
                let x = _mm512_load_si512(middle.as_ptr().add(64 * pair).cast());
                let products = _mm512_slli_epi32::<8>(_mm512_dpbusd_epi32(products, x, group.quants[pair]));
                let x = _mm512_load_si512(low.as_ptr().add(64 * pair).cast());
                let products = _mm512_dpbusd_epi32(products, x, group.quants[pair]);
                let scales = _mm512_mul_ps(group.scales[pair], _mm512_set1_ps(scale));
                *sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scales, *sums);
            }
        }
    }
}

impl DigitRows {
    /// Prepares rows of activations; what was prepared before is overwritten.
    ///
    /// * `x`: `[count, cols]`
    /// * `offset_factor`: what sums of blocks are multiplied by
    ///
    /// # Safety
    /// The processor has all that [`GroupBlock`] names.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    pub(super) unsafe fn prepare<B: GroupBlock>(&mut self, x: &[f32], cols: usize, offset_factor: f32) {
        self.groups = cols.div_ceil(GROUP);
        let groups = x.len() / cols * self.groups;
        self.digits.resize(groups, Digits([[0; GROUP]; 3]));
        self.scales.resize(groups, 0.0);
        self.sums.resize(groups * GROUP_BLOCKS, 0.0);
        let mut targets = self.digits.iter_mut().zip(&mut self.scales).zip(self.sums.as_chunks_mut::<GROUP_BLOCKS>().0);
        for numbers in x.chunks_exact(cols).flat_map(|row| row.chunks(GROUP)) {
            let Some(((digits, scale), sums)) = targets.next() else { break };
            let mut padded = [0.0; GROUP];
            padded[..numbers.len()].copy_from_slice(numbers);
            for (sum, block) in sums.iter_mut().zip(padded.as_chunks::<BLOCK>().0) {
                *sum = offset_factor * block.iter().sum::<f32>();
            }
            // SAFETY: the caller's promise; 16 numbers are read and 16 bytes written at a time, all within `padded` and
            // `digits`.
            unsafe {
                let part = |index: usize| _mm512_loadu_ps(padded.as_ptr().add(LANES * index));
                let mut largest = _mm512_setzero_si512();
                for index in 0..GROUP / LANES {
                    let bits = _mm512_castps_si512(part(index));
                    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(i32::MAX)));
                }
                // As whole numbers, infinity and what is not a number are the largest: they come out in the scale.
                let largest = f32::from_bits(_mm512_reduce_max_epu32(largest));
                let most = if B::SIGNED { LARGEST_UNSIGNED } else { LARGEST_SIGNED };
                let factor = if largest < SMALLEST { 0.0 } else { most / largest };
                *scale = largest / most;
                if !largest.is_finite() {
                    *scale = f32::NAN;
                }
                for (index, place) in B::PLACES.into_iter().enumerate() {
                    let scaled = _mm512_mul_ps(part(index), _mm512_set1_ps(factor));
                    let mut whole = _mm512_cvtps_epi32(scaled);
                    // A digit with a sign carries into the next one.
                    let carry = if B::SIGNED { _mm512_setzero_si512() } else { _mm512_set1_epi32(128) };
                    if B::SIGNED {
                        whole = _mm512_add_epi32(whole, _mm512_set1_epi32(UNSIGNED_BIAS));
                    }
                    for digit in digits.0.iter_mut().rev() {
                        _mm_storeu_si128(digit.as_mut_ptr().add(place).cast(), _mm512_cvtepi32_epi8(whole));
                        whole = _mm512_srai_epi32::<8>(_mm512_add_epi32(whole, carry));
                    }
                }
            }
        }
    }

    /// Products with some rows of weights.
    ///
    /// * `out`: `[count, rows]`
    ///
    /// # Safety
    /// The processor has all that [`GroupBlock`] names.
    ///
    /// # Panics
    /// If a size does not fit what was prepared.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
    pub(super) unsafe fn dot_rows<B: GroupBlock>(&self, rows: Rows<'_>, out: &mut [f32]) {
        let count = self.scales.len() / self.groups;
        for (index, out) in out.chunks_mut(4 * rows.count).enumerate() {
            let first = 4 * index * self.groups;
            // SAFETY: the caller's promise.
            unsafe {
                match (count - 4 * index).min(4) {
                    1 => self.some_rows::<B, 1>(first, rows, out),
                    2 => self.some_rows::<B, 2>(first, rows, out),
                    3 => self.some_rows::<B, 3>(first, rows, out),
                    _ => self.some_rows::<B, 4>(first, rows, out),
                }
            }
        }
    }

    /// `N` rows of activations at a time, the first at group `first`, so that each group of weights is unpacked once for
    /// all of them. The result for each does not depend on `N`.
    ///
    /// # Safety
    /// As [`dot_rows`](Self::dot_rows), where this is inlined.
    #[inline(always)]
    unsafe fn some_rows<B: GroupBlock, const N: usize>(&self, first: usize, rows: Rows<'_>, out: &mut [f32]) {
        let groups = self.groups;
        let blocks = rows.row_bytes / B::BYTES;
        let (digits, scales) = (&self.digits[first..first + N * groups], &self.scales[first..first + N * groups]);
        let x_sums = &self.sums[first * GROUP_BLOCKS..(first + N * groups) * GROUP_BLOCKS];
        assert!(blocks.div_ceil(GROUP_BLOCKS) == groups && out.len() == N * rows.count, "sizes of products with rows");
        let whole = blocks / GROUP_BLOCKS;
        for (index, row) in rows.iter().enumerate() {
            // SAFETY: sizes were checked above: `group` stays below `groups`, and its blocks lie inside of `row`. Fetching
            // ahead may leave the matrix, which a prefetch allows.
            unsafe {
                // Two sets of sums hide the latency of the multiply-add.
                let mut sums = [[_mm512_setzero_ps(); N]; 2];
                let mut offsets = [_mm_setzero_ps(); N];
                let [even, odd] = &mut sums;
                let place = |group: usize| {
                    let bytes = row.as_ptr().add(group * GROUP_BLOCKS * B::BYTES);
                    (bytes, digits.as_ptr().add(group), scales.as_ptr().add(group), x_sums.as_ptr().add(4 * group))
                };
                for pair in 0..whole / 2 {
                    add_group::<B, N, true>(place(2 * pair), groups, 0, even, &mut offsets);
                    add_group::<B, N, true>(place(2 * pair + 1), groups, 0, odd, &mut offsets);
                }
                if whole % 2 == 1 {
                    add_group::<B, N, true>(place(whole - 1), groups, 0, even, &mut offsets);
                }
                if whole < groups {
                    add_group::<B, N, false>(place(whole), groups, blocks % GROUP_BLOCKS, odd, &mut offsets);
                }
                for n in 0..N {
                    let offsets = _mm512_zextps128_ps512(offsets[n]);
                    let total = _mm512_add_ps(_mm512_add_ps(even[n], odd[n]), offsets);
                    out[n * rows.count + index] = _mm512_reduce_add_ps(total);
                }
            }
        }
    }
}

/// Where a group of weights is, and the first row's digits, scale and sums for it.
type Place = (*const u8, *const Digits, *const f32, *const f32);

/// Adds a group's products. A function of its own, and no closure, so that it is compiled with its surroundings.
///
/// # Safety
/// As [`DigitRows::some_rows`]: all of `place` lies inside of the weights and activations, whose next row is `groups`
/// further.
#[inline(always)]
unsafe fn add_group<B: GroupBlock, const N: usize, const WHOLE: bool>(
    (bytes, digits, scale, x_sums): Place,
    groups: usize,
    blocks: usize,
    sums: &mut [__m512; N],
    offsets: &mut [__m128; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        for line in (0..GROUP_BLOCKS * B::BYTES).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(bytes.wrapping_add(AHEAD + line).cast());
        }
        let group = B::load::<WHOLE>(bytes, blocks);
        for n in 0..N {
            let at = n * groups;
            B::add(group, &*digits.add(at), *scale.add(at), x_sums.add(4 * at), &mut sums[n], &mut offsets[n]);
        }
    }
}
