//! Products of activations with rows of weights, on the stored numbers.
//!
//! Activations are prepared once for all rows of a matrix. Weights are widened to f32 in registers, so that a product
//! equals the one with dequantised weights up to the order of additions; the offset of a block, or of a group in a block
//! of 256 numbers, is multiplied by the sum of its activations.
//!
//! Not for: threads, or many activations at a time (then dequantised panels are faster, see
//! [`WeightMatrix::matmul`](super::WeightMatrix::matmul)).

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use super::super::element::Element;
use super::super::simd::InstructionSet;
use super::super::vector;
use super::blocks::{BLOCK, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, SmallBlock};
use super::super_blocks::{GROUP, Q2K, Q3K, Q4K, Q5K, Q6K, Q8K, SuperBlock};
use super::{blocks_of, dequantize};

/// Rows of activations, prepared for products with the rows of a matrix of one format. Buffers are kept for reuse.
#[derive(Default)]
pub struct Activations {
    count: usize,
    cols: usize,
    /// `[count, cols]`
    x: Vec<f32>,
    /// `[count, cols / group]`: what a group's stored offset, or its scale if it has none, is multiplied by. Empty for
    /// plain floats.
    sums: Vec<f32>,
}

impl std::fmt::Debug for Activations {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Activations({} x {})", self.count, self.cols)
    }
}

impl Activations {
    /// Prepares rows for a matrix of `dtype`; what was prepared before is overwritten.
    ///
    /// * `x`: `[count, cols]`
    ///
    /// # Panics
    /// If `x` is not a whole number of rows, or `cols` no whole number of the format's blocks.
    pub fn prepare(&mut self, dtype: GgmlDType, x: &[f32], cols: usize) {
        assert!(
            cols > 0 && x.len().is_multiple_of(cols) && cols.is_multiple_of(dtype.block_size()),
            "{} activations in rows of {cols} for {dtype:?}",
            x.len()
        );
        self.count = x.len() / cols;
        self.cols = cols;
        x.clone_into(&mut self.x);
        self.sums.clear();
        if let Some((group, factor)) = groups(dtype) {
            self.sums.extend(x.chunks_exact(group).map(|numbers| factor * numbers.iter().sum::<f32>()));
        }
    }

    /// Rows of activations.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Numbers in a row.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Products with some rows of weights.
    ///
    /// * `data`: the rows' blocks, `row_bytes` each
    /// * `out`: `[count, rows]`
    pub(super) fn dot_rows(
        &self,
        set: InstructionSet,
        dtype: GgmlDType,
        data: &[u8],
        row_bytes: usize,
        out: &mut [f32],
    ) {
        let rows = Rows { data, row_bytes, count: data.len() / row_bytes };
        let work = Products { rows, x: &self.x, sums: &self.sums, cols: self.cols, out };
        match dtype {
            GgmlDType::F32 => plain_products::<f32>(set, work),
            GgmlDType::F16 => plain_products::<f16>(set, work),
            GgmlDType::BF16 => plain_products::<bf16>(set, work),
            GgmlDType::Q4_0 => small_products::<Q4_0>(set, work),
            GgmlDType::Q4_1 => small_products::<Q4_1>(set, work),
            GgmlDType::Q5_0 => small_products::<Q5_0>(set, work),
            GgmlDType::Q5_1 => small_products::<Q5_1>(set, work),
            GgmlDType::Q8_0 => small_products::<Q8_0>(set, work),
            GgmlDType::Q8_1 => unpacked_products(set, dtype, work),
            GgmlDType::Q2K => super_products::<Q2K>(set, dtype, work),
            GgmlDType::Q3K => super_products::<Q3K>(set, dtype, work),
            GgmlDType::Q4K => super_products::<Q4K>(set, dtype, work),
            GgmlDType::Q5K => super_products::<Q5K>(set, dtype, work),
            GgmlDType::Q6K => super_products::<Q6K>(set, dtype, work),
            GgmlDType::Q8K => super_products::<Q8K>(set, dtype, work),
        }
    }
}

/// How many numbers of a format share an offset, and what that is in the stored offset, or in the scale if none is
/// stored. `None` for formats whose products need no sums.
fn groups(dtype: GgmlDType) -> Option<(usize, f32)> {
    let (group, offset) = match dtype {
        GgmlDType::Q4_0 => (BLOCK, Q4_0::OFFSET),
        GgmlDType::Q4_1 => (BLOCK, Q4_1::OFFSET),
        GgmlDType::Q5_0 => (BLOCK, Q5_0::OFFSET),
        GgmlDType::Q5_1 => (BLOCK, Q5_1::OFFSET),
        GgmlDType::Q8_0 => (BLOCK, Q8_0::OFFSET),
        GgmlDType::Q2K => (GROUP, Q2K::OFFSET),
        GgmlDType::Q3K => (GROUP, Q3K::OFFSET),
        GgmlDType::Q4K => (GROUP, Q4K::OFFSET),
        GgmlDType::Q5K => (GROUP, Q5K::OFFSET),
        GgmlDType::Q6K => (GROUP, Q6K::OFFSET),
        GgmlDType::Q8K => (GROUP, Q8K::OFFSET),
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_1 => return None,
    };
    Some((group, offset.unwrap_or(1.0)))
}

/// Rows of weights.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [u8],
    row_bytes: usize,
    count: usize,
}

impl<'a> Rows<'a> {
    fn iter(self) -> impl Iterator<Item = &'a [u8]> {
        self.data.chunks_exact(self.row_bytes)
    }
}

/// Products of rows of activations with rows of weights.
struct Products<'a> {
    rows: Rows<'a>,
    /// `[count, cols]`
    x: &'a [f32],
    /// `[count, cols / group]`
    sums: &'a [f32],
    cols: usize,
    /// `[count, rows]`
    out: &'a mut [f32],
}

/// Products with plain floats, read in place.
fn plain_products<T: Element>(set: InstructionSet, work: Products<'_>) {
    let Products { rows, x, cols, out, .. } = work;
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(rows.count)) {
        for (out, row) in out.iter_mut().zip(rows.iter()) {
            *out = vector::dot_stored::<T>(set, x, blocks_of(row));
        }
    }
}

/// Products with a format that has no kernel of its own here: each row is unpacked first.
fn unpacked_products(set: InstructionSet, dtype: GgmlDType, work: Products<'_>) {
    let Products { rows, x, cols, out, .. } = work;
    let mut wide = vec![0.0; cols];
    for (index, row) in rows.iter().enumerate() {
        dequantize(set, dtype, row, &mut wide);
        for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(rows.count)) {
            out[index] = vector::dot(set, x, &wide);
        }
    }
}

/// Products with blocks of 32 numbers.
fn small_products<B: SmallBlock>(set: InstructionSet, work: Products<'_>) {
    #[cfg(target_arch = "x86_64")]
    let Some(work) = x86::products::<x86::Small<B>>(set, work) else { return };
    let _ = set;
    portable_small_products::<B>(work);
}

/// Products with blocks of 256 numbers.
fn super_products<B: SuperBlock>(set: InstructionSet, dtype: GgmlDType, work: Products<'_>) {
    #[cfg(target_arch = "x86_64")]
    let Some(work) = x86::products::<x86::Super<B>>(set, work) else { return };
    unpacked_products(set, dtype, work);
}

fn portable_small_products<B: SmallBlock>(work: Products<'_>) {
    const WIDTH: usize = 8;
    let Products { rows, x, sums, cols, out } = work;
    let x = x.chunks_exact(cols).zip(sums.chunks_exact(cols / BLOCK));
    for ((x, x_sums), out) in x.zip(out.chunks_exact_mut(rows.count)) {
        let (x, _) = x.as_chunks::<BLOCK>();
        for (out, row) in out.iter_mut().zip(rows.iter()) {
            let mut sums = [0.0f32; WIDTH];
            let mut offsets = 0.0f32;
            for ((block, x), x_sum) in row.chunks_exact(B::BYTES).zip(x).zip(x_sums) {
                let (scale, offset, quants) = B::unpack::<false>(block);
                let mut block_sums = [0.0f32; WIDTH];
                for i in 0..BLOCK {
                    block_sums[i % WIDTH] += f32::from(quants[i]) * x[i];
                }
                for lane in 0..WIDTH {
                    sums[lane] += block_sums[lane] * scale;
                }
                offsets += if B::OFFSET.is_some() { scale } else { offset } * x_sum;
            }
            *out = offsets + sums.iter().sum::<f32>();
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128, __m128i, __m256, __m512, _MM_HINT_T0, _mm_add_ps, _mm_add_ss, _mm_cvtph_ps, _mm_cvtsi32_si128,
        _mm_cvtss_f32, _mm_fmadd_ps, _mm_loadu_si128, _mm_movehdup_ps, _mm_movehl_ps, _mm_prefetch, _mm_set1_ps,
        _mm_setzero_ps, _mm_unpackhi_epi64, _mm256_add_ps, _mm256_broadcastss_ps, _mm256_castps256_ps128,
        _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
        _mm256_mul_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps, _mm512_add_ps, _mm512_broadcastss_ps,
        _mm512_castps512_ps256, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps, _mm512_extractf32x8_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use std::marker::PhantomData;

    use super::super::super::simd::InstructionSet;
    use super::super::super_blocks::{GROUP, SUPER_BLOCK, SuperBlock};
    use super::{BLOCK, Products, SmallBlock};

    /// How far ahead weights are fetched, in bytes: a row or two.
    const AHEAD: usize = 2048;

    /// What a cache holds at once, in bytes.
    const LINE: usize = 64;

    /// Registers of one width. Its functions may be called only where its instruction set is enabled.
    pub(super) trait Lanes {
        /// Partial sums.
        type Sums: Copy;
        /// The quants of a block.
        type Quants: Copy;
        /// 16 numbers.
        type Group: Copy;
        unsafe fn zero() -> Self::Sums;
        unsafe fn quants<B: SmallBlock>(block: *const u8) -> Self::Quants;
        /// `sums + scale * (quants * x)`, where `x` points to 32 numbers and the scale is the lowest lane.
        unsafe fn add(quants: Self::Quants, x: *const f32, scale: __m128, sums: Self::Sums) -> Self::Sums;
        /// All lanes of both.
        unsafe fn total(a: Self::Sums, b: Self::Sums) -> f32;
        /// 16 signed bytes times a number.
        unsafe fn scaled(bytes: __m128i, scale: f32) -> Self::Group;
        /// `sums + group * x`, where `x` points to 16 numbers.
        unsafe fn add_group(group: Self::Group, x: *const f32, sums: Self::Sums) -> Self::Sums;
        unsafe fn store_group(group: Self::Group) -> [f32; GROUP];
    }

    /// AVX2 and FMA.
    pub(super) struct Eight;

    /// AVX-512 F and DQ.
    pub(super) struct Sixteen;

    impl Lanes for Eight {
        type Sums = __m256;
        type Quants = [__m256; 4];
        type Group = [__m256; 2];

        #[inline(always)]
        unsafe fn zero() -> __m256 {
            // SAFETY: the caller's promise, here and below.
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn quants<B: SmallBlock>(block: *const u8) -> [__m256; 4] {
            unsafe { B::quants8(block).map(|quants| _mm256_cvtepi32_ps(quants)) }
        }

        #[inline(always)]
        unsafe fn add(quants: [__m256; 4], x: *const f32, scale: __m128, sums: __m256) -> __m256 {
            unsafe {
                let x: [__m256; 4] = std::array::from_fn(|part| _mm256_loadu_ps(x.add(8 * part)));
                let even = _mm256_fmadd_ps(quants[2], x[2], _mm256_mul_ps(quants[0], x[0]));
                let odd = _mm256_fmadd_ps(quants[3], x[3], _mm256_mul_ps(quants[1], x[1]));
                _mm256_fmadd_ps(_mm256_add_ps(even, odd), _mm256_broadcastss_ps(scale), sums)
            }
        }

        #[inline(always)]
        unsafe fn total(a: __m256, b: __m256) -> f32 {
            unsafe {
                let eight = _mm256_add_ps(a, b);
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }

        #[inline(always)]
        unsafe fn scaled(bytes: __m128i, scale: f32) -> [__m256; 2] {
            unsafe {
                let scale = _mm256_set1_ps(scale);
                let low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                let high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
                [_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale)]
            }
        }

        #[inline(always)]
        unsafe fn add_group(group: [__m256; 2], x: *const f32, sums: __m256) -> __m256 {
            unsafe {
                // Adding their sum makes the chain from group to group shorter than two multiply-adds would.
                let low = _mm256_mul_ps(group[0], _mm256_loadu_ps(x));
                _mm256_add_ps(sums, _mm256_fmadd_ps(group[1], _mm256_loadu_ps(x.add(8)), low))
            }
        }

        #[inline(always)]
        unsafe fn store_group(group: [__m256; 2]) -> [f32; GROUP] {
            let mut numbers = [0.0; GROUP];
            unsafe {
                _mm256_storeu_ps(numbers.as_mut_ptr(), group[0]);
                _mm256_storeu_ps(numbers.as_mut_ptr().add(8), group[1]);
            }
            numbers
        }
    }

    impl Lanes for Sixteen {
        type Sums = __m512;
        type Quants = [__m512; 2];
        type Group = __m512;

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            // SAFETY: the caller's promise, here and below.
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn quants<B: SmallBlock>(block: *const u8) -> [__m512; 2] {
            unsafe { B::quants16(block).map(|quants| _mm512_cvtepi32_ps(quants)) }
        }

        #[inline(always)]
        unsafe fn add(quants: [__m512; 2], x: *const f32, scale: __m128, sums: __m512) -> __m512 {
            unsafe {
                let products = _mm512_mul_ps(quants[0], _mm512_loadu_ps(x));
                let products = _mm512_fmadd_ps(quants[1], _mm512_loadu_ps(x.add(16)), products);
                _mm512_fmadd_ps(products, _mm512_broadcastss_ps(scale), sums)
            }
        }

        #[inline(always)]
        unsafe fn total(a: __m512, b: __m512) -> f32 {
            unsafe {
                let sums = _mm512_add_ps(a, b);
                Eight::total(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums))
            }
        }

        #[inline(always)]
        unsafe fn scaled(bytes: __m128i, scale: f32) -> __m512 {
            unsafe { _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), _mm512_set1_ps(scale)) }
        }

        #[inline(always)]
        unsafe fn add_group(group: __m512, x: *const f32, sums: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(group, _mm512_loadu_ps(x), sums) }
        }

        #[inline(always)]
        unsafe fn store_group(group: __m512) -> [f32; GROUP] {
            let mut numbers = [0.0; GROUP];
            unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), group) };
            numbers
        }
    }

    /// Where a block meets its activations: the row of activations `n` begins at `x + n * cols` with the block's first
    /// number, and its sums at `sums + n * num_groups`.
    #[derive(Clone, Copy)]
    pub(super) struct Columns {
        x: *const f32,
        cols: usize,
        sums: *const f32,
        num_groups: usize,
    }

    /// A block format in the loops below.
    pub(super) trait Kernel {
        /// Numbers in a block.
        const NUMBERS: usize;
        /// Size of a block.
        const BYTES: usize;
        /// Numbers that share an offset.
        const GROUP: usize;
        /// What offsets add up to.
        type Offsets: Copy;
        /// No offsets.
        ///
        /// # Safety
        /// As [`add_block`](Self::add_block).
        unsafe fn no_offsets() -> Self::Offsets;
        /// Adds the products of a block with `N` rows of activations. Block `n` of a row adds to `sums` first, block
        /// `n + 1` gets them swapped: two sets hide the latency of additions.
        ///
        /// A function of its own, not a closure, which the compiler might not inline into one that has the instructions.
        ///
        /// # Safety
        /// The caller is compiled for FMA, F16C and what `L` needs; `block` points to a block, and `columns` to what it
        /// says, for `N` rows.
        unsafe fn add_block<L: Lanes, const N: usize>(
            block: *const u8,
            columns: Columns,
            sums: [&mut [L::Sums; N]; 2],
            offsets: &mut [Self::Offsets; N],
        );
        /// The sum of offsets.
        ///
        /// # Safety
        /// As [`add_block`](Self::add_block).
        unsafe fn offset(offsets: Self::Offsets) -> f32;
    }

    /// Blocks of 32 numbers.
    pub(super) struct Small<B>(PhantomData<B>);

    /// Blocks of 256 numbers.
    pub(super) struct Super<B>(PhantomData<B>);

    impl<B: SmallBlock> Kernel for Small<B> {
        const NUMBERS: usize = BLOCK;
        const BYTES: usize = B::BYTES;
        const GROUP: usize = BLOCK;
        /// Sums of scales, and of what is stored behind them, times sums of activations.
        type Offsets = __m128;

        #[inline(always)]
        unsafe fn no_offsets() -> __m128 {
            // SAFETY: the caller's promise, here and below.
            unsafe { _mm_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn add_block<L: Lanes, const N: usize>(
            block: *const u8,
            columns: Columns,
            [sums, _]: [&mut [L::Sums; N]; 2],
            offsets: &mut [__m128; N],
        ) {
            unsafe {
                // The scale, and behind it the offset or something else.
                let stored = _mm_cvtph_ps(_mm_cvtsi32_si128(block.cast::<i32>().read_unaligned()));
                let quants = L::quants::<B>(block);
                for n in 0..N {
                    sums[n] = L::add(quants, columns.x.add(n * columns.cols), stored, sums[n]);
                    if B::OFFSET != Some(0.0) {
                        let x_sum = _mm_set1_ps(*columns.sums.add(n * columns.num_groups));
                        offsets[n] = _mm_fmadd_ps(stored, x_sum, offsets[n]);
                    }
                }
            }
        }

        #[inline(always)]
        unsafe fn offset(offsets: __m128) -> f32 {
            unsafe {
                match B::OFFSET {
                    Some(0.0) => 0.0,
                    Some(_) => _mm_cvtss_f32(offsets),
                    None => _mm_cvtss_f32(_mm_movehdup_ps(offsets)),
                }
            }
        }
    }

    impl<B: SuperBlock> Kernel for Super<B> {
        const NUMBERS: usize = SUPER_BLOCK;
        const BYTES: usize = B::BYTES;
        const GROUP: usize = GROUP;
        /// They go to the same sums as products of quants.
        type Offsets = ();

        #[inline(always)]
        unsafe fn no_offsets() {}

        #[inline(always)]
        unsafe fn add_block<L: Lanes, const N: usize>(
            block: *const u8,
            columns: Columns,
            [even, odd]: [&mut [L::Sums; N]; 2],
            _: &mut [(); N],
        ) {
            /// Group `G`, and its products with all rows of activations.
            #[inline(always)]
            unsafe fn add_group<L: Lanes, B: SuperBlock, const G: usize, const N: usize>(
                block: *const u8,
                scales: &[f32; GROUP],
                columns: Columns,
                sums: &mut [L::Sums; N],
            ) {
                // SAFETY: the caller's promise.
                unsafe {
                    let group = L::scaled(B::group::<G>(block), scales[G]);
                    for n in 0..N {
                        sums[n] = L::add_group(group, columns.x.add(n * columns.cols + G * GROUP), sums[n]);
                    }
                }
            }

            // SAFETY: the caller's promise.
            unsafe {
                let factors = B::factors::<true>(std::slice::from_raw_parts(block, B::BYTES));
                let scales = L::scaled(_mm_loadu_si128(factors.scales.as_ptr().cast()), factors.scale);
                if B::OFFSET != Some(0.0) {
                    let offsets = match B::OFFSET {
                        Some(_) => scales,
                        None => L::scaled(_mm_loadu_si128(factors.offsets.as_ptr().cast()), factors.offset),
                    };
                    for n in 0..N {
                        even[n] = L::add_group(offsets, columns.sums.add(n * columns.num_groups), even[n]);
                    }
                }
                let scales = L::store_group(scales);
                macro_rules! add_groups {
                    ($($even:literal $odd:literal)*) => {
                        $(
                            add_group::<L, B, $even, N>(block, &scales, columns, even);
                            add_group::<L, B, $odd, N>(block, &scales, columns, odd);
                        )*
                    };
                }
                add_groups!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            }
        }

        #[inline(always)]
        unsafe fn offset((): ()) -> f32 {
            0.0
        }
    }

    /// Computes the products, or gives the work back if `set` has no kernel here.
    pub(super) fn products<K: Kernel>(set: InstructionSet, work: Products<'_>) -> Option<Products<'_>> {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<K: Kernel>(work: Products<'_>) {
            // SAFETY: compiled for all that the function needs.
            unsafe { all_columns::<Eight, K>(work) }
        }
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<K: Kernel>(work: Products<'_>) {
            // SAFETY: compiled for all that the function needs.
            unsafe { all_columns::<Sixteen, K>(work) }
        }
        match set {
            // SAFETY: the set was detected on this processor.
            InstructionSet::Avx512 => unsafe { avx512::<K>(work) },
            // SAFETY: as above.
            InstructionSet::Avx2 => unsafe { avx2::<K>(work) },
            InstructionSet::Portable => return Some(work),
        }
        None
    }

    /// # Safety
    /// The caller is compiled for FMA, F16C and what `L` needs.
    #[inline(always)]
    unsafe fn all_columns<L: Lanes, K: Kernel>(work: Products<'_>) {
        let Products { rows, x, sums, cols, out } = work;
        let (count, num_groups) = (x.len() / cols, cols / K::GROUP);
        for first in (0..count).step_by(4) {
            let width = (count - first).min(4);
            let part = Products {
                rows,
                x: &x[first * cols..(first + width) * cols],
                sums: &sums[first * num_groups..(first + width) * num_groups],
                cols,
                out: &mut out[first * rows.count..(first + width) * rows.count],
            };
            // SAFETY: the caller's promise.
            unsafe {
                match width {
                    1 => some_columns::<L, 1, K>(part),
                    2 => some_columns::<L, 2, K>(part),
                    3 => some_columns::<L, 3, K>(part),
                    _ => some_columns::<L, 4, K>(part),
                }
            }
        }
    }

    /// `N` rows of activations at a time, so that each block is unpacked once for all of them. The result for each does
    /// not depend on `N`.
    ///
    /// # Safety
    /// As [`all_columns`].
    #[inline(always)]
    unsafe fn some_columns<L: Lanes, const N: usize, K: Kernel>(work: Products<'_>) {
        let Products { rows, x, sums: x_sums, cols, out } = work;
        let (num_blocks, num_groups) = (cols / K::NUMBERS, cols / K::GROUP);
        assert!(
            cols == num_blocks * K::NUMBERS
                && x.len() == N * cols
                && x_sums.len() == N * num_groups
                && out.len() == N * rows.count
                && rows.row_bytes == num_blocks * K::BYTES
        );
        for (index, row) in rows.iter().enumerate() {
            // SAFETY: sizes were checked above; blocks stay below `num_blocks`, so that their bytes lie inside of `row`, and
            // their activations and sums inside of those of each row.
            unsafe {
                let [mut even, mut odd] = [[L::zero(); N]; 2];
                let mut offsets = [K::no_offsets(); N];
                for pair in 0..num_blocks / 2 {
                    let (block, columns) = block_at::<K>(row, 2 * pair, x, cols, x_sums, num_groups);
                    K::add_block::<L, N>(block, columns, [&mut even, &mut odd], &mut offsets);
                    let (block, columns) = block_at::<K>(row, 2 * pair + 1, x, cols, x_sums, num_groups);
                    K::add_block::<L, N>(block, columns, [&mut odd, &mut even], &mut offsets);
                }
                if num_blocks % 2 == 1 {
                    let (block, columns) = block_at::<K>(row, num_blocks - 1, x, cols, x_sums, num_groups);
                    K::add_block::<L, N>(block, columns, [&mut even, &mut odd], &mut offsets);
                }
                for n in 0..N {
                    out[n * rows.count + index] = L::total(even[n], odd[n]) + K::offset(offsets[n]);
                }
            }
        }
    }

    /// Block `index` of a row and what it is multiplied by; fetches what comes after it.
    ///
    /// # Safety
    /// There are more than `index` blocks in the row, and as many numbers and sums in rows of activations.
    #[inline(always)]
    unsafe fn block_at<K: Kernel>(
        row: &[u8],
        index: usize,
        x: &[f32],
        cols: usize,
        sums: &[f32],
        num_groups: usize,
    ) -> (*const u8, Columns) {
        // SAFETY: the caller's promise. Fetching ahead may leave the matrix, which a prefetch allows.
        unsafe {
            let block = row.as_ptr().add(index * K::BYTES);
            for line in 0..K::BYTES.div_ceil(LINE) {
                _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(AHEAD + line * LINE).cast());
            }
            let (x, sums) = (x.as_ptr().add(index * K::NUMBERS), sums.as_ptr().add(index * (K::NUMBERS / K::GROUP)));
            (block, Columns { x, cols, sums, num_groups })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::blocks::dequantize_small;
    use super::*;

    /// Blocks of pseudo-random bytes, their scales made small and finite.
    fn random_blocks<B: SmallBlock>(count: usize, halves: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut data: Vec<u8> = (0..count * B::BYTES)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_le_bytes()[3]
            })
            .collect();
        for block in data.chunks_exact_mut(B::BYTES) {
            for half in block[..2 * halves].chunks_exact_mut(2) {
                half[1] = 0x20 | (half[1] & 0x8f); // exponent far from both ends, any sign
            }
        }
        data
    }

    fn check<B: SmallBlock>(dtype: GgmlDType, halves: usize) {
        for (count, num_blocks) in [(1, 5), (2, 1), (3, 4), (7, 18)] {
            let (rows, cols) = (3, num_blocks * BLOCK);
            let data = random_blocks::<B>(rows * num_blocks, halves);
            let row_bytes = data.len() / rows;
            let x: Vec<f32> = (0..count * cols).map(|i| f32::from((i * 7 % 23) as u8) - 11.3).collect();
            let mut wide = vec![0.0; rows * cols];
            dequantize_small::<B>(InstructionSet::Portable, &data, &mut wide);
            let mut activations = Activations::default();
            for set in InstructionSet::available() {
                let mut own_wide = vec![0.0; rows * cols];
                dequantize_small::<B>(set, &data, &mut own_wide);
                for (&own, &portable) in own_wide.iter().zip(&wide) {
                    // One fused rounding apart.
                    assert!((own - portable).abs() <= 1e-6 * portable.abs().max(1e-2), "{set:?}: {own} {portable}");
                }
                let mut out = vec![f32::NAN; count * rows];
                activations.prepare(dtype, &x, cols);
                activations.dot_rows(set, dtype, &data, row_bytes, &mut out);
                for (index, &out) in out.iter().enumerate() {
                    let (n, row) = (index / rows, index % rows);
                    let weights = &wide[row * cols..(row + 1) * cols];
                    let products = weights.iter().zip(&x[n * cols..]).map(|(&w, &x)| f64::from(w) * f64::from(x));
                    let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                    assert!((f64::from(out) - sum).abs() <= 1e-5 * size, "{set:?}, {n} {row}: {out} for {sum}");
                }
            }
        }
    }

    #[test]
    fn block_kernels_agree_on_every_instruction_set() {
        check::<Q4_0>(GgmlDType::Q4_0, 1);
        check::<Q4_1>(GgmlDType::Q4_1, 2);
        check::<Q5_0>(GgmlDType::Q5_0, 1);
        check::<Q5_1>(GgmlDType::Q5_1, 2);
        check::<Q8_0>(GgmlDType::Q8_0, 1);
    }
}
