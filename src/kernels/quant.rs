//! Weight matrices as files store them, in GGUF block formats or plain floats: products with them without unpacking
//! them to memory first.
//!
//! Block layouts: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md> and ggml's `ggml-common.h`. A block holds
//! 32 numbers (`Q4_0` .. `Q8_0`) or 256 (`Q2_K` .. `Q8_K`) of one row.
//!
//! One row of activations ([`WeightMatrix::matvec`], decoding) runs on the blocks: the 32-number formats and plain
//! floats are widened to f32 in registers, so that the result equals the product with dequantised weights up to the
//! order of additions; the 256-number formats use candle's integer dot products, which round the activations to 8 bits.
//! Several rows ([`WeightMatrix::matmul`], prefill) go through panels of dequantised weights.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8_1, BlockQ8K, GgmlType,
};
use half::{bf16, f16};
use rayon::prelude::*;

use super::element::Element;
use super::gemm::{Matrix, MatrixMut};
use super::simd::{InstructionSet, fma, multiversion};
use super::vector::{self, instruction_set};
use crate::error::{Error, Result};

/// Numbers in a block of the small formats.
const BLOCK: usize = 32;

/// How many f32 a dequantised panel may hold: it should stay in a core's cache while it is used.
const PANEL_NUMBERS: usize = 96 * 1024;

/// Rows that one thread takes at a time in a matrix-vector product.
const ROWS_PER_TASK: usize = 32;

/// Bytes that somebody owns: a memory-mapped file, or memory.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A matrix `[rows, cols]` of weights, row after row, in a GGUF block format or in plain floats (blocks of one number).
#[derive(Clone)]
pub struct WeightMatrix {
    owner: SharedBytes,
    range: Range<usize>,
    dtype: GgmlDType,
    rows: usize,
    cols: usize,
}

impl std::fmt::Debug for WeightMatrix {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "WeightMatrix({:?} {} x {})", self.dtype, self.rows, self.cols)
    }
}

impl WeightMatrix {
    /// A matrix over `owner[range]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `cols` is not a whole number of blocks, or `range` has not the size of the matrix or lies
    /// outside of the bytes; [`Error::Unsupported`] if the bytes are not aligned for their block type.
    pub fn new(owner: SharedBytes, range: Range<usize>, dtype: GgmlDType, rows: usize, cols: usize) -> Result<Self> {
        let block = dtype.block_size();
        if cols == 0 || !cols.is_multiple_of(block) {
            return Err(Error::shape("a weight matrix", format!("columns in multiples of {block}"), cols));
        }
        let expected = (cols / block).checked_mul(dtype.type_size()).and_then(|row| row.checked_mul(rows));
        let bytes = (*owner).as_ref().get(range.clone());
        match (expected, bytes) {
            (Some(expected), Some(bytes)) if expected == bytes.len() => {
                let align = Self::alignment(dtype);
                if !(bytes.as_ptr() as usize).is_multiple_of(align) {
                    return Err(Error::unsupported(format!("a {dtype:?} tensor that is not aligned to {align} bytes")));
                }
            }
            _ => return Err(Error::shape("a weight matrix's bytes", expected, range)),
        }
        Ok(Self { owner, range, dtype, rows, cols })
    }

    /// A multiple of this, in bytes, is where the bytes of a matrix must begin in memory: floats and the large blocks are
    /// read in place as their own type.
    #[must_use]
    pub fn alignment(dtype: GgmlDType) -> usize {
        if matches!(dtype, GgmlDType::F32 | GgmlDType::Q8K) { 4 } else { 2 }
    }

    /// Number of output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The block format.
    #[must_use]
    pub fn dtype(&self) -> GgmlDType {
        self.dtype
    }

    /// Size in bytes, scales included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    fn row_bytes(&self) -> usize {
        self.cols / self.dtype.block_size() * self.dtype.type_size()
    }

    fn data(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }

    fn row_data(&self, rows: Range<usize>) -> &[u8] {
        let row_bytes = self.row_bytes();
        &self.data()[rows.start * row_bytes..rows.end * row_bytes]
    }

    /// Writes rows `rows` as f32 to `out`, `[rows.len(), cols]`.
    ///
    /// # Panics
    /// If `rows` is out of range or `out` has another size.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * self.cols, "size of the dequantised rows");
        dequantize(self.dtype, self.row_data(rows), out);
    }

    /// `out = W x`, over threads.
    ///
    /// * `x`: `[cols]`
    /// * `out`: `[rows]`
    ///
    /// # Panics
    /// If a size does not fit.
    pub fn matvec(&self, x: &[f32], out: &mut [f32]) {
        assert_eq!((x.len(), out.len()), (self.cols, self.rows), "sizes of a matrix-vector product");
        let activation = Activation::new(self.dtype, x);
        let set = instruction_set();
        out.par_chunks_mut(ROWS_PER_TASK).enumerate().for_each(|(task, out)| {
            let first = task * ROWS_PER_TASK;
            let data = self.row_data(first..first + out.len());
            activation.dot_rows(set, self.dtype, data, self.row_bytes(), out);
        });
    }

    /// `out = X W^T`, over threads.
    ///
    /// * `x`: `[seq_len, cols]`
    /// * `out`: `[seq_len, rows]`
    ///
    /// # Panics
    /// If a size does not fit.
    pub fn matmul(&self, x: &[f32], seq_len: usize, out: &mut [f32]) {
        assert_eq!((x.len(), out.len()), (seq_len * self.cols, seq_len * self.rows), "sizes of a matrix product");
        if seq_len == 1 {
            return self.matvec(x, out);
        }
        let panel_rows = (PANEL_NUMBERS / self.cols).clamp(8, self.rows.max(8));
        let x = Matrix::new(x, seq_len, self.cols, self.cols);
        let views = MatrixMut::new(out, seq_len, self.rows, self.rows).split_columns(panel_rows);
        views.into_par_iter().enumerate().for_each_init(Vec::new, |panel: &mut Vec<f32>, (index, mut view)| {
            let rows = index * panel_rows..((index + 1) * panel_rows).min(self.rows);
            panel.resize(rows.len() * self.cols, 0.0);
            self.dequantize_rows(rows.clone(), panel);
            view.set_product(x, Matrix::new(panel, rows.len(), self.cols, self.cols).transposed(), 1.0);
        });
    }
}

/// Reads a slice of bytes as blocks of one type.
fn blocks<T>(data: &[u8]) -> &[T] {
    // SAFETY: only used with ggml's block structures and floats, for which every bit pattern is valid.
    let (before, blocks, after) = unsafe { data.align_to::<T>() };
    assert!(before.is_empty() && after.is_empty(), "block data was checked for its alignment and size");
    blocks
}

fn dequantize(dtype: GgmlDType, data: &[u8], out: &mut [f32]) {
    let set = instruction_set();
    match dtype {
        GgmlDType::F32 => out.copy_from_slice(blocks(data)),
        GgmlDType::F16 => vector::widen::<f16>(set, blocks(data), out),
        GgmlDType::BF16 => vector::widen::<bf16>(set, blocks(data), out),
        GgmlDType::Q4_0 => dequantize_small::<Q4_0>(set, data, out),
        GgmlDType::Q4_1 => dequantize_small::<Q4_1>(set, data, out),
        GgmlDType::Q5_0 => dequantize_small::<Q5_0>(set, data, out),
        GgmlDType::Q5_1 => dequantize_small::<Q5_1>(set, data, out),
        GgmlDType::Q8_0 => dequantize_small::<Q8_0>(set, data, out),
        GgmlDType::Q8_1 => BlockQ8_1::to_float(blocks(data), out),
        GgmlDType::Q2K => BlockQ2K::to_float(blocks(data), out),
        GgmlDType::Q3K => BlockQ3K::to_float(blocks(data), out),
        GgmlDType::Q4K => BlockQ4K::to_float(blocks(data), out),
        GgmlDType::Q5K => BlockQ5K::to_float(blocks(data), out),
        GgmlDType::Q6K => BlockQ6K::to_float(blocks(data), out),
        GgmlDType::Q8K => BlockQ8K::to_float(blocks(data), out),
    }
}

/// One row of activations, prepared once for the products with every row of a matrix.
enum Activation<'a> {
    /// As it is.
    Plain { x: &'a [f32] },
    /// With the sum of each run of 32, by which a block's offset is multiplied.
    Blocked { x: &'a [f32], sums: Vec<f32> },
    /// Rounded to 8 bits in blocks of 256, as candle's dot products of the large formats want it.
    Rounded { x: Vec<BlockQ8K> },
}

impl<'a> Activation<'a> {
    fn new(dtype: GgmlDType, x: &'a [f32]) -> Self {
        match dtype {
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_1 => Self::Plain { x },
            GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1 | GgmlDType::Q8_0 => {
                Self::Blocked { x, sums: x.chunks_exact(BLOCK).map(|chunk| chunk.iter().sum()).collect() }
            }
            GgmlDType::Q2K | GgmlDType::Q3K | GgmlDType::Q4K | GgmlDType::Q5K | GgmlDType::Q6K | GgmlDType::Q8K => {
                let mut rounded = vec![BlockQ8K::zeros(); x.len() / BlockQ8K::BLCK_SIZE];
                BlockQ8K::from_float(x, &mut rounded);
                Self::Rounded { x: rounded }
            }
        }
    }

    fn dot_rows(&self, set: InstructionSet, dtype: GgmlDType, data: &[u8], row_bytes: usize, out: &mut [f32]) {
        match self {
            Self::Plain { x } => match dtype {
                GgmlDType::F32 => plain_dot_rows::<f32>(set, data, row_bytes, x, out),
                GgmlDType::F16 => plain_dot_rows::<f16>(set, data, row_bytes, x, out),
                GgmlDType::BF16 => plain_dot_rows::<bf16>(set, data, row_bytes, x, out),
                _ => unpacked_dot_rows(set, dtype, data, row_bytes, x, out),
            },
            Self::Blocked { x, sums } => {
                let work = SmallDot { data, row_bytes, x, sums, out };
                match dtype {
                    GgmlDType::Q4_1 => small_dot_rows::<Q4_1>(set, work),
                    GgmlDType::Q5_0 => small_dot_rows::<Q5_0>(set, work),
                    GgmlDType::Q5_1 => small_dot_rows::<Q5_1>(set, work),
                    GgmlDType::Q8_0 => small_dot_rows::<Q8_0>(set, work),
                    _ => small_dot_rows::<Q4_0>(set, work),
                }
            }
            Self::Rounded { x } => match dtype {
                GgmlDType::Q2K => large_dot_rows::<BlockQ2K>(data, row_bytes, x, out),
                GgmlDType::Q3K => large_dot_rows::<BlockQ3K>(data, row_bytes, x, out),
                GgmlDType::Q4K => large_dot_rows::<BlockQ4K>(data, row_bytes, x, out),
                GgmlDType::Q5K => large_dot_rows::<BlockQ5K>(data, row_bytes, x, out),
                GgmlDType::Q6K => large_dot_rows::<BlockQ6K>(data, row_bytes, x, out),
                _ => large_dot_rows::<BlockQ8K>(data, row_bytes, x, out),
            },
        }
    }
}

/// Products with rows of plain floats, read in place.
fn plain_dot_rows<T: Element>(set: InstructionSet, data: &[u8], row_bytes: usize, x: &[f32], out: &mut [f32]) {
    for (out, row) in out.iter_mut().zip(data.chunks_exact(row_bytes)) {
        *out = vector::dot_stored::<T>(set, x, blocks(row));
    }
}

/// Products with rows of a format that has no kernel of its own: each row is unpacked first.
fn unpacked_dot_rows(set: InstructionSet, dtype: GgmlDType, data: &[u8], row_bytes: usize, x: &[f32], out: &mut [f32]) {
    let mut wide = vec![0.0; x.len()];
    for (out, row) in out.iter_mut().zip(data.chunks_exact(row_bytes)) {
        dequantize(dtype, row, &mut wide);
        *out = vector::dot(set, x, &wide);
    }
}

fn large_dot_rows<T: GgmlType<VecDotType = BlockQ8K>>(data: &[u8], row_bytes: usize, x: &[BlockQ8K], out: &mut [f32]) {
    for (out, row) in out.iter_mut().zip(data.chunks_exact(row_bytes)) {
        *out = T::vec_dot(x.len() * BlockQ8K::BLCK_SIZE, blocks(row), x);
    }
}

/// A format of 32 numbers a block: `number = scale * quant + offset`.
trait SmallBlock: 'static {
    /// Size of a block.
    const BYTES: usize;

    /// Scale, offset and the 32 quants of a block. `bytes` has at least [`BYTES`](Self::BYTES).
    fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]);
}

struct Q4_0;
struct Q4_1;
struct Q5_0;
struct Q5_1;
struct Q8_0;

/// The f16 at `bytes[at..at + 2]`, widened.
#[inline(always)]
fn half_at<const SIMD: bool>(bytes: &[u8], at: usize) -> f32 {
    let bits = u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    #[cfg(target_arch = "x86_64")]
    if SIMD {
        use std::arch::x86_64::{_mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32};
        // SAFETY: register operations only; the caller promises F16C with `SIMD`.
        return unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) };
    }
    f16::from_bits(bits).to_f32()
}

/// 16 bytes of nibbles: the low ones are quants 0..16, the high ones 16..32.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [i8; BLOCK] {
    let mut quants = [0i8; BLOCK];
    for i in 0..BLOCK / 2 {
        #[expect(clippy::cast_possible_wrap)]
        {
            quants[i] = (bytes[i] & 0x0f) as i8;
            quants[i + BLOCK / 2] = (bytes[i] >> 4) as i8;
        }
    }
    quants
}

/// Nibbles with a fifth bit from `bits`, one for each quant.
#[inline(always)]
fn nibbles_and_bits(bytes: &[u8], bits: &[u8]) -> [i8; BLOCK] {
    let bits = u32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]);
    let mut quants = nibbles(bytes);
    for (i, quant) in quants.iter_mut().enumerate() {
        *quant |= i8::from((bits >> i) & 1 != 0) << 4;
    }
    quants
}

impl SmallBlock for Q4_0 {
    const BYTES: usize = 18;

    #[inline(always)]
    fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        let scale = half_at::<SIMD>(bytes, 0);
        (scale, -8.0 * scale, nibbles(&bytes[2..18]))
    }
}

impl SmallBlock for Q4_1 {
    const BYTES: usize = 20;

    #[inline(always)]
    fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        (half_at::<SIMD>(bytes, 0), half_at::<SIMD>(bytes, 2), nibbles(&bytes[4..20]))
    }
}

impl SmallBlock for Q5_0 {
    const BYTES: usize = 22;

    #[inline(always)]
    fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        let scale = half_at::<SIMD>(bytes, 0);
        (scale, -16.0 * scale, nibbles_and_bits(&bytes[6..22], &bytes[2..6]))
    }
}

impl SmallBlock for Q5_1 {
    const BYTES: usize = 24;

    #[inline(always)]
    fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        (half_at::<SIMD>(bytes, 0), half_at::<SIMD>(bytes, 2), nibbles_and_bits(&bytes[8..24], &bytes[4..8]))
    }
}

impl SmallBlock for Q8_0 {
    const BYTES: usize = 34;

    #[inline(always)]
    fn unpack<const SIMD: bool>(bytes: &[u8]) -> (f32, f32, [i8; BLOCK]) {
        let mut quants = [0i8; BLOCK];
        for (quant, &byte) in quants.iter_mut().zip(&bytes[2..34]) {
            *quant = byte.cast_signed();
        }
        (half_at::<SIMD>(bytes, 0), 0.0, quants)
    }
}

multiversion! {
    fn dequantize_small<B: SmallBlock>(data: &[u8], out: &mut [f32]) = dequantize_small_body;
}

#[inline(always)]
fn dequantize_small_body<const SIMD: bool, B: SmallBlock>(data: &[u8], out: &mut [f32]) {
    let (chunks, _) = out.as_chunks_mut::<BLOCK>();
    for (block, out) in data.chunks_exact(B::BYTES).zip(chunks) {
        let (scale, offset, quants) = B::unpack::<SIMD>(block);
        for i in 0..BLOCK {
            out[i] = fma::<SIMD>(f32::from(quants[i]), scale, offset);
        }
    }
}

/// Dot products of one row of activations with several rows of blocks.
struct SmallDot<'a> {
    data: &'a [u8],
    row_bytes: usize,
    x: &'a [f32],
    sums: &'a [f32],
    out: &'a mut [f32],
}

multiversion! {
    fn small_dot_rows<B: SmallBlock>(work: SmallDot<'_>) = small_dot_rows_body;
}

#[inline(always)]
#[expect(
    clippy::needless_pass_by_value,
    clippy::needless_range_loop,
    reason = "the shape that the compiler turns into vectors"
)]
fn small_dot_rows_body<const SIMD: bool, B: SmallBlock>(work: SmallDot<'_>) {
    const WIDTH: usize = 8;
    let (x, _) = work.x.as_chunks::<BLOCK>();
    for (out, row) in work.out.iter_mut().zip(work.data.chunks_exact(work.row_bytes)) {
        // Two sets of partial sums hide the latency of the multiply-add.
        let mut sums = [[0.0f32; WIDTH]; 2];
        let mut offsets = 0.0f32;
        for ((block, x), &x_sum) in row.chunks_exact(B::BYTES).zip(x).zip(work.sums) {
            let (scale, offset, quants) = B::unpack::<SIMD>(block);
            let mut block_sums = [[0.0f32; WIDTH]; 2];
            for part in 0..BLOCK / WIDTH {
                for lane in 0..WIDTH {
                    let i = part * WIDTH + lane;
                    block_sums[part % 2][lane] = fma::<SIMD>(f32::from(quants[i]), x[i], block_sums[part % 2][lane]);
                }
            }
            for half in 0..2 {
                for lane in 0..WIDTH {
                    sums[half][lane] = fma::<SIMD>(block_sums[half][lane], scale, sums[half][lane]);
                }
            }
            offsets = fma::<SIMD>(offset, x_sum, offsets);
        }
        *out = offsets + (0..WIDTH).map(|lane| sums[0][lane] + sums[1][lane]).sum::<f32>();
    }
}

#[cfg(test)]
mod tests {
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

    fn check<B: SmallBlock>(halves: usize) {
        let (rows, cols) = (3, 5 * BLOCK);
        let data = random_blocks::<B>(rows * cols / BLOCK, halves);
        let x: Vec<f32> = (0u8..160).map(|i| f32::from(i % 23) - 11.0).collect();
        let sums: Vec<f32> = x.chunks_exact(BLOCK).map(|chunk| chunk.iter().sum()).collect();
        let run = |set| {
            let (mut wide, mut out) = (vec![0.0; rows * cols], vec![0.0; rows]);
            dequantize_small::<B>(set, &data, &mut wide);
            let work = SmallDot { data: &data, row_bytes: data.len() / rows, x: &x, sums: &sums, out: &mut out };
            small_dot_rows::<B>(set, work);
            (wide, out)
        };
        let (wide, _) = run(InstructionSet::Portable);
        for set in InstructionSet::available() {
            let (own_wide, out) = run(set);
            for (&own, &portable) in own_wide.iter().zip(&wide) {
                // One fused rounding apart.
                assert!((own - portable).abs() <= 1e-6 * portable.abs().max(1e-2), "{set:?}: {own} {portable}");
            }
            for (row, &out) in out.iter().enumerate() {
                let products = wide[row * cols..(row + 1) * cols].iter().zip(&x).map(|(&w, &x)| f64::from(w * x));
                let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                assert!((f64::from(out) - sum).abs() <= 1e-5 * size, "{set:?}, row {row}: {out} for {sum}");
            }
        }
    }

    #[test]
    fn block_kernels_agree_on_every_instruction_set() {
        check::<Q4_0>(1);
        check::<Q4_1>(2);
        check::<Q5_0>(1);
        check::<Q5_1>(2);
        check::<Q8_0>(1);
    }
}
