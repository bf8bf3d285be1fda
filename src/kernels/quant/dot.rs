//! Products of activations with rows of weights, on the stored numbers.
//!
//! Activations are prepared once for all rows of a matrix. Plain floats, the block formats of 32 numbers and `IQ4_XS` are
//! widened to f32 in registers, so that a product equals the one with dequantised weights up to the order of additions; a
//! block's offset is multiplied by the sum of its activations. The K-quants use candle's integer products, which round the
//! activations to 8 bits. Where the processor has sums of products of bytes, `Q4_0`, `Q4_1`, `Q8_0`, `IQ4_NL` and `MXFP4`
//! use them, with activations as exact as f32, and `Q4_K`, `Q5_K`, `Q6_K` and `IQ4_XS`, with activations of 8 bits
//! (`digits.rs`).
//!
//! Not for: threads, or many activations at a time (then dequantised panels are faster, see
//! [`WeightMatrix::matmul`](super::WeightMatrix::matmul)).

use candle_core::quantized::k_quants::{BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8K, GgmlType};
use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::digits::DigitRows;
use super::rounded;
use super::widened::{BlockDot, block_dot_rows};
use super::{Compute, Rows, Stored, WeightFormat, blocks_of, dequantize};
use crate::kernels::blocks::{BLOCK, BlockFormat, Iq4Nl, Iq4Xs, Mxfp4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use crate::kernels::element::Element;
use crate::kernels::simd::InstructionSet;
#[cfg(target_arch = "x86_64")]
use crate::kernels::simd::Vnni;
use crate::kernels::vector;

/// Rows of activations, prepared for products with the rows of a matrix of one format. Buffers are kept for reuse.
#[derive(Default)]
pub struct Activations {
    form: Form,
    dtype: Option<WeightFormat>,
    set: InstructionSet,
    count: usize,
    cols: usize,
    /// `[count, cols]`; used by the forms `Plain` and `Blocked`.
    plain: Vec<f32>,
    /// `[count, cols / 32]`: what a block's stored offset, or its scale if it has none, is multiplied by; `Blocked`.
    sums: Vec<f32>,
    /// `[count, cols / 256]`; `Rounded`.
    large: Vec<BlockQ8K>,
    /// `Digits`.
    #[cfg(target_arch = "x86_64")]
    digits: DigitRows,
}

/// How activations are prepared.
#[derive(Default, Clone, Copy)]
enum Form {
    /// As they are.
    #[default]
    Plain,
    /// As they are, with the sum of each block.
    Blocked,
    /// Rounded to 8 bits in blocks of 256, as candle's dot products of the large formats want it.
    Rounded,
    /// As whole numbers, for sums of products of bytes.
    #[cfg(target_arch = "x86_64")]
    Digits(Vnni),
}

impl std::fmt::Debug for Activations {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Activations({:?} {} x {})", self.dtype, self.count, self.cols)
    }
}

impl Activations {
    /// Prepares rows for matrices of `dtype`; what was prepared before is overwritten.
    ///
    /// * `set`, `compute`: what products are computed with
    /// * `x`: `[count, cols]`
    ///
    /// # Panics
    /// If `x` is not a whole number of rows, or `cols` no whole number of the format's blocks.
    pub fn prepare(&mut self, set: InstructionSet, compute: Compute, dtype: WeightFormat, x: &[f32], cols: usize) {
        assert!(
            cols > 0 && x.len().is_multiple_of(cols) && cols.is_multiple_of(dtype.block_size()),
            "{} activations in rows of {cols} for {dtype:?}",
            x.len()
        );
        self.count = x.len() / cols;
        self.cols = cols;
        self.form = Form::of(set, compute, dtype);
        (self.set, self.dtype) = (set, Some(dtype));
        match self.form {
            Form::Plain => x.clone_into(&mut self.plain),
            Form::Blocked => {
                let factor = offset_factor(dtype);
                x.clone_into(&mut self.plain);
                self.sums.clear();
                self.sums.extend(x.chunks_exact(BLOCK).map(|block| factor * block.iter().sum::<f32>()));
            }
            Form::Rounded => {
                self.large.resize(x.len() / BlockQ8K::BLCK_SIZE, BlockQ8K::zeros());
                rounded::round(set, x, &mut self.large);
            }
            #[cfg(target_arch = "x86_64")]
            Form::Digits(vnni) => self.digits.prepare(vnni, dtype, x, cols, offset_factor(dtype)),
        }
    }

    /// Puts together what was prepared in parts, with the same outcome as if it had been prepared at once; what was prepared
    /// before is overwritten.
    ///
    /// * `count`: number of rows
    /// * `parts`: of one row each, all for the same format: those of the first row in the order of its columns, then those
    ///   of the next. All but the last of a row are of whole [`PART`](Self::PART)s of columns
    ///
    /// # Panics
    /// If the parts are for several formats, or there are none.
    pub fn join<'a>(&mut self, count: usize, parts: impl Iterator<Item = &'a Self>) {
        self.plain.clear();
        self.sums.clear();
        self.large.clear();
        #[cfg(target_arch = "x86_64")]
        self.digits.clear();
        let mut numbers = 0;
        for part in parts {
            assert!(numbers == 0 || self.dtype == part.dtype, "parts for {:?} and {:?}", self.dtype, part.dtype);
            (self.form, self.dtype, self.set) = (part.form, part.dtype, part.set);
            numbers += part.count * part.cols;
            match part.form {
                Form::Plain => self.plain.extend_from_slice(&part.plain),
                Form::Blocked => {
                    self.plain.extend_from_slice(&part.plain);
                    self.sums.extend_from_slice(&part.sums);
                }
                Form::Rounded => self.large.extend_from_slice(&part.large),
                #[cfg(target_arch = "x86_64")]
                Form::Digits(_) => self.digits.append(&part.digits),
            }
        }
        assert!(numbers > 0 && numbers.is_multiple_of(count), "{numbers} activations in {count} rows");
        (self.count, self.cols) = (count, numbers / count);
        #[cfg(target_arch = "x86_64")]
        self.digits.set_count(count);
    }

    /// Columns that are prepared together, whatever the format.
    pub const PART: usize = 256;

    /// About how long a number takes to prepare, in picoseconds: on a core of an Intel Xeon (Sapphire or Emerald Rapids),
    /// the best of 2,000 runs of [`prepare`](Self::prepare) with rows of 576 to 11,008 numbers.
    #[must_use]
    pub fn picoseconds(set: InstructionSet, compute: Compute, dtype: WeightFormat) -> usize {
        match Form::of(set, compute, dtype) {
            Form::Plain => 50,
            Form::Blocked => 330,
            Form::Rounded => 630,
            #[cfg(target_arch = "x86_64")]
            Form::Digits(_) => 600,
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

    /// Products with some rows of weights of the format they were prepared for.
    ///
    /// * `data`: the rows' blocks, `row_bytes` each
    /// * `out`: `[count, rows]`
    ///
    /// # Panics
    /// If the format is another.
    pub(super) fn dot_rows(&self, dtype: WeightFormat, data: &[u8], row_bytes: usize, out: &mut [f32]) {
        assert!(self.dtype == Some(dtype), "activations for {:?}, weights in {dtype:?}", self.dtype);
        let set = self.set;
        let rows = Rows { data, row_bytes, count: data.len() / row_bytes };
        if rows.count == 0 {
            return;
        }
        match self.form {
            Form::Plain => {
                for (x, out) in self.plain.chunks_exact(self.cols).zip(out.chunks_exact_mut(rows.count)) {
                    match dtype {
                        WeightFormat::F32 => plain_dot_rows::<f32>(set, rows, x, out),
                        WeightFormat::F16 => plain_dot_rows::<f16>(set, rows, x, out),
                        WeightFormat::BF16 => plain_dot_rows::<bf16>(set, rows, x, out),
                        _ => unpacked_dot_rows(set, dtype, rows, x, out),
                    }
                }
            }
            Form::Blocked => {
                let work = BlockDot { rows, x: &self.plain, sums: &self.sums, cols: self.cols, out };
                match dtype {
                    WeightFormat::Iq4Nl => block_dot_rows::<Iq4Nl>(set, work),
                    WeightFormat::Iq4Xs => block_dot_rows::<Iq4Xs>(set, work),
                    WeightFormat::Mxfp4 => block_dot_rows::<Mxfp4>(set, work),
                    WeightFormat::Q4_1 => block_dot_rows::<Q4_1>(set, work),
                    WeightFormat::Q5_0 => block_dot_rows::<Q5_0>(set, work),
                    WeightFormat::Q5_1 => block_dot_rows::<Q5_1>(set, work),
                    WeightFormat::Q8_0 => block_dot_rows::<Q8_0>(set, work),
                    _ => block_dot_rows::<Q4_0>(set, work),
                }
            }
            #[cfg(target_arch = "x86_64")]
            Form::Digits(vnni) => self.digits.dot_rows(vnni, dtype, rows, out),
            Form::Rounded => {
                let x = self.large.chunks_exact(self.cols / BlockQ8K::BLCK_SIZE);
                for (x, out) in x.zip(out.chunks_exact_mut(rows.count)) {
                    match dtype {
                        WeightFormat::Q2K => large_dot_rows::<BlockQ2K>(rows, x, out),
                        WeightFormat::Q3K => large_dot_rows::<BlockQ3K>(rows, x, out),
                        WeightFormat::Q4K => large_dot_rows::<BlockQ4K>(rows, x, out),
                        WeightFormat::Q5K => large_dot_rows::<BlockQ5K>(rows, x, out),
                        WeightFormat::Q6K => large_dot_rows::<BlockQ6K>(rows, x, out),
                        _ => large_dot_rows::<BlockQ8K>(rows, x, out),
                    }
                }
            }
        }
    }
}

impl Form {
    fn of(set: InstructionSet, compute: Compute, dtype: WeightFormat) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let (true, Compute::Fast, Some(vnni)) = (DigitRows::has(dtype), compute, set.vnni()) {
            return Self::Digits(vnni);
        }
        let _ = set;
        match dtype {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 | WeightFormat::Q8_1 => Self::Plain,
            WeightFormat::Q4_0
            | WeightFormat::Q4_1
            | WeightFormat::Q5_0
            | WeightFormat::Q5_1
            | WeightFormat::Q8_0
            | WeightFormat::Iq4Nl
            | WeightFormat::Iq4Xs
            | WeightFormat::Mxfp4 => Self::Blocked,
            WeightFormat::Q2K
            | WeightFormat::Q3K
            | WeightFormat::Q4K
            | WeightFormat::Q5K
            | WeightFormat::Q6K
            | WeightFormat::Q8K => {
                if compute == Compute::Fast {
                    Self::Rounded
                } else {
                    Self::Plain
                }
            }
        }
    }
}

/// What a block's offset is in its scale, or in its stored offset.
fn offset_factor(dtype: WeightFormat) -> f32 {
    let offset = match dtype {
        WeightFormat::Q4_0 => Q4_0::OFFSET,
        WeightFormat::Q5_0 => Q5_0::OFFSET,
        WeightFormat::Q8_0 => Q8_0::OFFSET,
        WeightFormat::Q4K | WeightFormat::Q5K => Some(-1.0), // minima are subtracted
        _ => None,
    };
    offset.unwrap_or(1.0)
}

/// Products with rows of plain floats, read in place.
fn plain_dot_rows<T: Element + Stored>(set: InstructionSet, rows: Rows<'_>, x: &[f32], out: &mut [f32]) {
    for (out, row) in out.iter_mut().zip(rows.iter()) {
        *out = vector::dot_stored::<T>(set, x, blocks_of(row));
    }
}

/// Products with rows of a format that has no kernel of its own: each row is unpacked first.
fn unpacked_dot_rows(set: InstructionSet, dtype: WeightFormat, rows: Rows<'_>, x: &[f32], out: &mut [f32]) {
    let mut wide = vec![0.0; x.len()];
    for (out, row) in out.iter_mut().zip(rows.iter()) {
        dequantize(dtype, row, &mut wide);
        *out = vector::dot(set, x, &wide);
    }
}

fn large_dot_rows<T: GgmlType<VecDotType = BlockQ8K> + Stored>(rows: Rows<'_>, x: &[BlockQ8K], out: &mut [f32]) {
    for (out, row) in out.iter_mut().zip(rows.iter()) {
        *out = T::vec_dot(x.len() * BlockQ8K::BLCK_SIZE, blocks_of(row), x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::blocks;
    use crate::kernels::quant::samples::{expect_products, random_blocks};

    fn check<B: BlockFormat>(dtype: WeightFormat, compute: Compute) {
        for (count, num_blocks) in [(1, 5), (2, 1), (3, 4), (7, 18)] {
            let (rows, cols) = (3, num_blocks * dtype.block_size());
            let data = random_blocks(dtype, rows * num_blocks);
            let row_bytes = data.len() / rows;
            let x: Vec<f32> = (0..count * cols).map(|i| [-11.3, -4.2, 2.9, 0.0, 7.1, -0.6, 11.7][i * 5 % 7]).collect();
            let mut wide = vec![0.0; rows * cols];
            blocks::dequantize::<B>(InstructionSet::PORTABLE, &data, &mut wide);
            let mut activations = Activations::default();
            for set in InstructionSet::available() {
                let mut own_wide = vec![0.0; rows * cols];
                blocks::dequantize::<B>(set, &data, &mut own_wide);
                for (&own, &portable) in own_wide.iter().zip(&wide) {
                    // One fused rounding apart.
                    assert!((own - portable).abs() <= 1e-6 * portable.abs().max(1e-2), "{set:?}: {own} {portable}");
                }
                let mut out = vec![f32::NAN; count * rows];
                activations.prepare(set, compute, dtype, &x, cols);
                activations.dot_rows(dtype, &data, row_bytes, &mut out);
                expect_products(&format!("{set:?}"), &out, &wide, &x, cols);
            }
        }
    }

    #[test]
    fn block_kernels_agree_on_every_instruction_set() {
        check::<Q4_0>(WeightFormat::Q4_0, Compute::Fast);
        check::<Q4_1>(WeightFormat::Q4_1, Compute::Fast);
        check::<Q5_0>(WeightFormat::Q5_0, Compute::Fast);
        check::<Q5_1>(WeightFormat::Q5_1, Compute::Fast);
        check::<Q8_0>(WeightFormat::Q8_0, Compute::Fast);
        check::<Iq4Nl>(WeightFormat::Iq4Nl, Compute::Fast);
        check::<Mxfp4>(WeightFormat::Mxfp4, Compute::Fast);
        // Otherwise activations are of 8 bits where the processor sums products of bytes.
        check::<Iq4Xs>(WeightFormat::Iq4Xs, Compute::Exact);
    }

    /// Rows of any bits but for the scales, on processors that have the kernel. Activations are such that 8 bits hold
    /// them, so that products must be exact.
    fn check_large(dtype: WeightFormat) {
        if InstructionSet::detect().vnni().is_none() {
            return;
        }
        let mut activations = Activations::default();
        for (count, num_blocks) in [(1, 1), (2, 3), (5, 4)] {
            let (rows, cols) = (3, num_blocks * 256);
            let data = random_blocks(dtype, rows * num_blocks);
            let mut wide = vec![0.0; rows * cols];
            dequantize(dtype, &data, &mut wide);
            let number = |i: usize| if i % 128 == 5 { -127_i8 } else { [-113, -42, 29, 0, 71, -6, 117][i * 5 % 7] };
            let x: Vec<f32> = (0..count * cols).map(|i| f32::from(number(i)) / 64.0).collect();
            let mut out = vec![f32::NAN; count * rows];
            activations.prepare(InstructionSet::detect(), Compute::Fast, dtype, &x, cols);
            activations.dot_rows(dtype, &data, data.len() / rows, &mut out);
            expect_products(&format!("{dtype:?}"), &out, &wide, &x, cols);
        }
    }

    #[test]
    fn kernels_of_large_blocks_agree_with_dequantised_ones() {
        for dtype in [WeightFormat::Q4K, WeightFormat::Q5K, WeightFormat::Q6K, WeightFormat::Iq4Xs] {
            check_large(dtype);
        }
    }

    /// Weights of 34 bytes a block with scale 1 and all quants alike.
    fn q8_0_row(quant: i8, num_blocks: usize) -> Vec<u8> {
        let mut block = [quant.cast_unsigned(); Q8_0::BYTES];
        block[..2].copy_from_slice(&f16::ONE.to_le_bytes());
        block.repeat(num_blocks)
    }

    #[test]
    fn the_largest_and_the_smallest_numbers_neither_overflow_nor_vanish() {
        let (num_blocks, mut activations) = (7, Activations::default());
        let cols = num_blocks * BLOCK;
        for set in InstructionSet::available() {
            for quant in [-128, -127, 127] {
                let row = q8_0_row(quant, num_blocks);
                for value in [3e30, -3e30, 1.0, -1.0, 1e-25, 0.0] {
                    activations.prepare(set, Compute::Fast, WeightFormat::Q8_0, &vec![value; cols], cols);
                    let mut out = [f32::NAN];
                    activations.dot_rows(WeightFormat::Q8_0, &row, row.len(), &mut out);
                    let expected = f32::from(quant) * value * 224.0;
                    assert!((out[0] - expected).abs() <= 1e-6 * expected.abs(), "{set:?}: {} for {expected}", out[0]);
                }
            }
        }
    }

    #[test]
    fn scales_are_powers_down_to_the_smallest() {
        let mut activations = Activations::default();
        for set in InstructionSet::available() {
            for (exponent, value) in [(0, 1e30), (1, 1e30), (2, 1e30), (127, -1.0), (254, 1e-6)] {
                let mut row = [0x77; Mxfp4::BYTES]; // quants of 12
                row[0] = exponent;
                activations.prepare(set, Compute::Fast, WeightFormat::Mxfp4, &[value; BLOCK], BLOCK);
                let mut out = [f32::NAN];
                activations.dot_rows(WeightFormat::Mxfp4, &row, row.len(), &mut out);
                let expected = 32.0 * 12.0 * f64::from(value) * 2_f64.powi(i32::from(exponent) - 128);
                let is_close = (f64::from(out[0]) - expected).abs() <= 1e-6 * expected.abs();
                assert!(is_close, "{set:?} {exponent}: {} for {expected}", out[0]);
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let (num_blocks, mut activations) = (9, Activations::default());
        let cols = num_blocks * BLOCK;
        let row = q8_0_row(3, num_blocks);
        for set in InstructionSet::available() {
            for value in [f32::NAN, f32::INFINITY] {
                for at in [0, 130, cols - 1] {
                    let mut x = vec![0.5; cols];
                    x[at] = value;
                    activations.prepare(set, Compute::Fast, WeightFormat::Q8_0, &x, cols);
                    let mut out = [0.0];
                    activations.dot_rows(WeightFormat::Q8_0, &row, row.len(), &mut out);
                    assert!(!out[0].is_finite(), "{set:?}: {}", out[0]);
                }
            }
        }
    }
}
