//! Matrices in other numbers than their file's: widened, rounded, or quantised to blocks, over threads.
//!
//! Not for: which numbers a matrix is wanted in (see [`super::weights`]), or how blocks are rounded
//! (see [`crate::kernels::rounding`], and candle for the formats that are not there).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::tensors::aligned_buffer;
use crate::error::{Error, Result};
use crate::kernels::quant::{WeightFormat, WeightMatrix};
use crate::kernels::rounding;
use crate::kernels::vector::instruction_set;

/// Rows that are converted at a time, on each thread: bounds what is held as f32.
const CONVERTED_ROWS: usize = 4;

/// Numbers above this are not quantised: the scale of their block is at most an eighth, and must be finite in f16.
const LARGEST_QUANTISED: f32 = 8.0 * 65_504.0;

/// A matrix in other numbers, in memory; `None` if a number is not finite there.
///
/// * `dtype`: plain floats, or blocks that divide the matrix's columns
///
/// # Errors
/// [`Error::Tensor`] and [`Error::Unsupported`] for blocks that nothing rounds to.
pub(super) fn converted(matrix: &WeightMatrix, dtype: WeightFormat) -> Result<Option<WeightMatrix>> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let row_bytes = cols / dtype.block_size() * dtype.block_bytes();
    let (mut buffer, range) = aligned_buffer(rows * row_bytes);
    let is_finite = AtomicBool::new(true);
    let tasks = buffer[range.clone()].par_chunks_mut(CONVERTED_ROWS * row_bytes).enumerate();
    tasks.try_for_each_init(Vec::new, |wide: &mut Vec<f32>, (task, out)| {
        let first = task * CONVERTED_ROWS;
        let count = out.len() / row_bytes;
        wide.resize(count * cols, 0.0);
        matrix.dequantize_rows(first..first + count, wide);
        if !write(wide, cols, dtype, out)? {
            is_finite.store(false, Ordering::Relaxed);
        }
        Ok::<(), Error>(())
    })?;
    if !is_finite.into_inner() {
        return Ok(None);
    }
    WeightMatrix::new(Arc::new(buffer), range, dtype, rows, cols).map(Some)
}

/// Writes rows in other numbers; whether all of them are finite there.
fn write(wide: &[f32], cols: usize, dtype: WeightFormat, out: &mut [u8]) -> Result<bool> {
    match dtype {
        WeightFormat::F16 => {
            return Ok(write_floats(wide, out, |value| {
                let rounded = f16::from_f32(value);
                (rounded.to_le_bytes(), rounded.is_finite())
            }));
        }
        WeightFormat::BF16 => {
            return Ok(write_floats(wide, out, |value| {
                let rounded = bf16::from_f32(value);
                (rounded.to_le_bytes(), rounded.is_finite())
            }));
        }
        // A number that is none is found where it is computed with.
        WeightFormat::F32 => return Ok(write_floats(wide, out, |value| (value.to_le_bytes(), true))),
        _ => {}
    }
    // No number that is none is at most that.
    if !wide.iter().fold(true, |all, number| all & (number.abs() <= LARGEST_QUANTISED)) {
        return Ok(false);
    }
    match dtype {
        WeightFormat::Q8_0 => rounding::q8_0(instruction_set(), wide, out),
        WeightFormat::Q4_0 => rounding::q4_0(instruction_set(), wide, out),
        WeightFormat::Q4K => rounding::q4_k(instruction_set(), wide, out),
        WeightFormat::Q6K => rounding::q6_k(instruction_set(), wide, out),
        _ => {
            let dtype = dtype.candle().ok_or_else(|| Error::unsupported(format!("rounding to {dtype}")))?;
            let rows = Tensor::from_slice(wide, (wide.len() / cols, cols), &Device::Cpu)?;
            out.copy_from_slice(&QTensor::quantize(&rows, dtype)?.data()?);
        }
    }
    Ok(true)
}

fn write_floats<const BYTES: usize>(
    wide: &[f32],
    out: &mut [u8],
    convert: impl Fn(f32) -> ([u8; BYTES], bool),
) -> bool {
    let mut all_finite = true;
    for (out, &value) in out.as_chunks_mut::<BYTES>().0.iter_mut().zip(wide) {
        let (bytes, is_finite) = convert(value);
        all_finite &= is_finite;
        *out = bytes;
    }
    all_finite
}
