//! The block formats of 256 numbers (`Q2_K` .. `Q8_K`): how a block is unpacked, and rows of them widened to f32.
//!
//! A block holds 16 groups of 16 numbers with a factor each, which is a small integer times a float of the block; a
//! format whose groups have 32 numbers is read as if each factor were stored twice. A sub-block of 32 numbers is a
//! group and the one behind it.
//!
//! Not for: products (see [`super::dot`]), or the formats of 32 numbers.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m128i, _mm_and_si128, _mm_loadu_si128, _mm_or_si128, _mm_set1_epi8, _mm_setr_epi32, _mm_sll_epi16, _mm_srl_epi16,
};

use super::super::simd::{fma, multiversion};
use super::blocks::half_at;

/// Numbers in a block.
pub(super) const SUPER_BLOCK: usize = 256;

/// Numbers in a group, and groups in a block.
pub(super) const GROUP: usize = 16;

/// Numbers in two groups.
const SUB_BLOCK: usize = 2 * GROUP;

/// Scales and offsets of a block's groups: `scale * scales[group]` and `offset * offsets[group]`.
pub(super) struct Factors {
    pub(super) scale: f32,
    pub(super) scales: [i8; GROUP],
    pub(super) offset: f32,
    pub(super) offsets: [i8; GROUP],
}

/// A format of 256 numbers a block: `number = scale of its group * quant + offset of its group`.
pub(super) trait SuperBlock: 'static {
    /// Size of a block.
    const BYTES: usize;

    /// What a group's offset is in its scale; `None` if blocks store offsets of their own.
    const OFFSET: Option<f32>;

    /// What the groups have in common. `bytes` has at least [`BYTES`](Self::BYTES). A format with a fixed
    /// [`OFFSET`](Self::OFFSET) leaves the offsets at 0.
    fn factors<const SIMD: bool>(bytes: &[u8]) -> Factors;

    /// The quants, without the offset. `bytes` is as in [`factors`](Self::factors).
    fn quants(bytes: &[u8]) -> [i8; SUPER_BLOCK];

    /// The quants of group `G`.
    ///
    /// # Safety
    /// `block` points to [`BYTES`](Self::BYTES) readable bytes.
    #[cfg(target_arch = "x86_64")]
    unsafe fn group<const G: usize>(block: *const u8) -> __m128i;
}

pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;
pub(super) struct Q8K;

/// Fills a block's quants: `quant(sub_block, i)` is number `i` of a sub-block.
#[inline(always)]
fn sub_blocks(quant: impl Fn(usize, usize) -> u8) -> [i8; SUPER_BLOCK] {
    let mut quants = [0; SUPER_BLOCK];
    for (sub_block, quants) in quants.as_chunks_mut::<SUB_BLOCK>().0.iter_mut().enumerate() {
        for (i, out) in quants.iter_mut().enumerate() {
            *out = quant(sub_block, i).cast_signed();
        }
    }
    quants
}

/// Scales and offsets of the 8 sub-blocks of `Q4_K` and `Q5_K`, 6 bits each in 12 bytes: those of sub-blocks 0..4 are
/// the low bits of bytes 0..4 and 4..8, whose two high bits belong to sub-blocks 4..8, the rest of which is in the low
/// and high nibbles of bytes 8..12.
#[inline(always)]
fn six_bit_factors(packed: &[u8]) -> [[i8; GROUP]; 2] {
    let [a, b, c] = words(packed);
    let scales = [a & 0x3f3f_3f3f, (c & 0x0f0f_0f0f) | ((a >> 2) & 0x3030_3030)];
    let offsets = [b & 0x3f3f_3f3f, ((c >> 4) & 0x0f0f_0f0f) | ((b >> 2) & 0x3030_3030)];
    [scales, offsets].map(|[low, high]| {
        let bytes = ((u64::from(high) << 32) | u64::from(low)).to_le_bytes();
        std::array::from_fn(|group| bytes[group / 2].cast_signed())
    })
}

/// The 16 scales of `Q3_K`, 6 bits each in 12 bytes: the low four are the nibbles of bytes 0..8, low ones first; of the
/// high two, byte `8 + i` has those of scales `i`, `4 + i`, `8 + i` and `12 + i`. They are stored with 32 added.
#[inline(always)]
fn six_bit_scales(packed: &[u8]) -> [i8; GROUP] {
    let [a, b, c] = words(packed);
    let words = [a, b, a >> 4, b >> 4];
    let mut scales = [0; GROUP];
    for (i, (scales, word)) in scales.as_chunks_mut::<4>().0.iter_mut().zip(words).enumerate() {
        let word = (word & 0x0f0f_0f0f) | (((c >> (2 * i)) & 0x0303_0303) << 4);
        *scales = word.to_le_bytes().map(|byte| byte.cast_signed() - 32);
    }
    scales
}

/// The first 12 bytes.
#[inline(always)]
fn words(bytes: &[u8]) -> [u32; 3] {
    std::array::from_fn(|i| u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]))
}

/// 16 bytes.
///
/// # Safety
/// There are as many at `bytes`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn load(bytes: *const u8) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe { _mm_loadu_si128(bytes.cast()) }
}

/// Bits of 16 bytes: bit `from` of each is moved to bit `to`, others along with it, and those in `mask` are kept.
///
/// Bits that cross from one byte of a pair into the other must not be in `mask`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn bits(bytes: __m128i, from: usize, to: usize, mask: u8) -> __m128i {
    // SAFETY: register operations of the baseline instruction set.
    unsafe {
        #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
        let count = |by: usize| _mm_setr_epi32(by as i32, 0, 0, 0);
        let moved =
            if from >= to { _mm_srl_epi16(bytes, count(from - to)) } else { _mm_sll_epi16(bytes, count(to - from)) };
        _mm_and_si128(moved, _mm_set1_epi8(mask.cast_signed()))
    }
}

/// The bits of both.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn or(a: __m128i, b: __m128i) -> __m128i {
    // SAFETY: a register operation of the baseline instruction set.
    unsafe { _mm_or_si128(a, b) }
}

/// Two bits a quant. 16 bytes with a scale (low nibble) and an offset (high nibble) for each group; 64 bytes, of which
/// 32 hold four sub-blocks, the first in the lowest bits; the scale of scales and the one of offsets, to be subtracted.
impl SuperBlock for Q2K {
    const BYTES: usize = 84;
    const OFFSET: Option<f32> = None;

    #[inline(always)]
    fn factors<const SIMD: bool>(bytes: &[u8]) -> Factors {
        let packed = &bytes[..GROUP];
        Factors {
            scale: half_at::<SIMD>(bytes, 80),
            scales: std::array::from_fn(|group| (packed[group] & 0x0f).cast_signed()),
            offset: -half_at::<SIMD>(bytes, 82),
            offsets: std::array::from_fn(|group| (packed[group] >> 4).cast_signed()),
        }
    }

    #[inline(always)]
    fn quants(bytes: &[u8]) -> [i8; SUPER_BLOCK] {
        let bytes = &bytes[16..80];
        sub_blocks(|sub, i| (bytes[sub / 4 * 32 + i] >> (2 * (sub % 4))) & 3)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn group<const G: usize>(block: *const u8) -> __m128i {
        let (sub, i) = (G / 2, G % 2 * GROUP);
        // SAFETY: the caller's promise.
        bits(unsafe { load(block.add(16 + sub / 4 * 32 + i)) }, 2 * (sub % 4), 0, 3)
    }
}

/// Three bits a quant, and 4 to be subtracted. 32 bytes with the highest bits, bit `i` of each for sub-block `i`; 64 with
/// the others, as in `Q2_K`; 12 with the scales; their scale.
impl SuperBlock for Q3K {
    const BYTES: usize = 110;
    const OFFSET: Option<f32> = Some(-4.0);

    #[inline(always)]
    fn factors<const SIMD: bool>(bytes: &[u8]) -> Factors {
        let scales = six_bit_scales(&bytes[96..108]);
        Factors { scale: half_at::<SIMD>(bytes, 108), scales, offset: 0.0, offsets: [0; GROUP] }
    }

    #[inline(always)]
    fn quants(bytes: &[u8]) -> [i8; SUPER_BLOCK] {
        let (high, low) = (&bytes[..32], &bytes[32..96]);
        sub_blocks(|sub, i| ((low[sub / 4 * 32 + i] >> (2 * (sub % 4))) & 3) | (((high[i] >> sub) & 1) << 2))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn group<const G: usize>(block: *const u8) -> __m128i {
        let (sub, i) = (G / 2, G % 2 * GROUP);
        // SAFETY: the caller's promise.
        let (high, low) = unsafe { (load(block.add(i)), load(block.add(32 + sub / 4 * 32 + i))) };
        or(bits(low, 2 * (sub % 4), 0, 3), bits(high, sub, 2, 4))
    }
}

/// Four bits a quant. The scale of scales and the one of offsets, to be subtracted; 12 bytes with scales and offsets of
/// sub-blocks; 128, of which 32 hold two sub-blocks, the first in the low nibbles.
impl SuperBlock for Q4K {
    const BYTES: usize = 144;
    const OFFSET: Option<f32> = None;

    #[inline(always)]
    fn factors<const SIMD: bool>(bytes: &[u8]) -> Factors {
        let [scales, offsets] = six_bit_factors(&bytes[4..16]);
        Factors { scale: half_at::<SIMD>(bytes, 0), scales, offset: -half_at::<SIMD>(bytes, 2), offsets }
    }

    #[inline(always)]
    fn quants(bytes: &[u8]) -> [i8; SUPER_BLOCK] {
        let bytes = &bytes[16..144];
        sub_blocks(|sub, i| (bytes[sub / 2 * 32 + i] >> (4 * (sub % 2))) & 0x0f)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn group<const G: usize>(block: *const u8) -> __m128i {
        let (sub, i) = (G / 2, G % 2 * GROUP);
        // SAFETY: the caller's promise.
        bits(unsafe { load(block.add(16 + sub / 2 * 32 + i)) }, 4 * (sub % 2), 0, 0x0f)
    }
}

/// Five bits a quant. As `Q4_K`, with 32 bytes before the nibbles: bit `i` of each is the highest of sub-block `i`.
impl SuperBlock for Q5K {
    const BYTES: usize = 176;
    const OFFSET: Option<f32> = None;

    #[inline(always)]
    fn factors<const SIMD: bool>(bytes: &[u8]) -> Factors {
        Q4K::factors::<SIMD>(bytes)
    }

    #[inline(always)]
    fn quants(bytes: &[u8]) -> [i8; SUPER_BLOCK] {
        let (high, low) = (&bytes[16..48], &bytes[48..176]);
        sub_blocks(|sub, i| ((low[sub / 2 * 32 + i] >> (4 * (sub % 2))) & 0x0f) | (((high[i] >> sub) & 1) << 4))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn group<const G: usize>(block: *const u8) -> __m128i {
        let (sub, i) = (G / 2, G % 2 * GROUP);
        // SAFETY: the caller's promise.
        let (high, low) = unsafe { (load(block.add(16 + i)), load(block.add(48 + sub / 2 * 32 + i))) };
        or(bits(low, 4 * (sub % 2), 0, 0x0f), bits(high, sub, 4, 0x10))
    }
}

/// Six bits a quant, and 32 to be subtracted. 128 bytes with the low nibbles, of which 64 hold four sub-blocks: two in
/// their low nibbles, then two in the high ones; 64 with the two highest bits, of which 32 hold four sub-blocks, the first
/// in the lowest bits; 16 scales; their scale.
impl SuperBlock for Q6K {
    const BYTES: usize = 210;
    const OFFSET: Option<f32> = Some(-32.0);

    #[inline(always)]
    fn factors<const SIMD: bool>(bytes: &[u8]) -> Factors {
        let stored = &bytes[192..208];
        let scales = std::array::from_fn(|group| stored[group].cast_signed());
        Factors { scale: half_at::<SIMD>(bytes, 208), scales, offset: 0.0, offsets: [0; GROUP] }
    }

    #[inline(always)]
    fn quants(bytes: &[u8]) -> [i8; SUPER_BLOCK] {
        let (low, high) = (&bytes[..128], &bytes[128..192]);
        sub_blocks(|sub, i| {
            let (half, sub) = (sub / 4, sub % 4);
            let low = low[half * 64 + sub % 2 * 32 + i] >> (4 * (sub / 2));
            (low & 0x0f) | (((high[half * 32 + i] >> (2 * sub)) & 3) << 4)
        })
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn group<const G: usize>(block: *const u8) -> __m128i {
        let (half, sub, i) = (G / 8, G / 2 % 4, G % 2 * GROUP);
        // SAFETY: the caller's promise.
        let (low, high) =
            unsafe { (load(block.add(half * 64 + sub % 2 * 32 + i)), load(block.add(128 + half * 32 + i))) };
        or(bits(low, 4 * (sub / 2), 0, 0x0f), bits(high, 2 * sub, 4, 0x30))
    }
}

/// Eight bits a quant. The scale, as f32; 256 signed bytes; sums of them, which nothing here needs.
impl SuperBlock for Q8K {
    const BYTES: usize = 292;
    const OFFSET: Option<f32> = Some(0.0);

    #[inline(always)]
    fn factors<const SIMD: bool>(bytes: &[u8]) -> Factors {
        let scale = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        Factors { scale, scales: [1; GROUP], offset: 0.0, offsets: [0; GROUP] }
    }

    #[inline(always)]
    fn quants(bytes: &[u8]) -> [i8; SUPER_BLOCK] {
        let bytes = &bytes[4..260];
        std::array::from_fn(|i| bytes[i].cast_signed())
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn group<const G: usize>(block: *const u8) -> __m128i {
        // SAFETY: the caller's promise.
        unsafe { load(block.add(4 + G * GROUP)) }
    }
}

multiversion! {
    /// Widens blocks to f32; `out` holds 256 numbers a block.
    pub(super) fn dequantize_super<B: SuperBlock>(data: &[u8], out: &mut [f32]) = dequantize_super_body;
}

#[inline(always)]
fn dequantize_super_body<const SIMD: bool, B: SuperBlock>(data: &[u8], out: &mut [f32]) {
    let (blocks, _) = out.as_chunks_mut::<SUPER_BLOCK>();
    for (block, out) in data.chunks_exact(B::BYTES).zip(blocks) {
        let factors = B::factors::<SIMD>(block);
        let quants = B::quants(block);
        let groups = out.as_chunks_mut::<GROUP>().0.iter_mut().zip(quants.as_chunks::<GROUP>().0);
        for (group, (out, quants)) in groups.enumerate() {
            let scale = factors.scale * f32::from(factors.scales[group]);
            let offset = match B::OFFSET {
                Some(offset) => offset * scale,
                None => factors.offset * f32::from(factors.offsets[group]),
            };
            for i in 0..GROUP {
                out[i] = fma::<SIMD>(f32::from(quants[i]), scale, offset);
            }
        }
    }
}
