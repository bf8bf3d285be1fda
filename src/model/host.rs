//! Passage between tensors and slices, for kernels that run on the CPU.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};

use crate::error::{Error, Result};

/// Calls `f` with a tensor's numbers, without a copy if it is contiguous f32 on the CPU.
pub(super) fn with_slice<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(numbers)), Some((start, end))) => f(&numbers[start..end]),
        _ => Err(Error::unsupported("attention on a device other than the CPU")),
    }
}

/// A tensor's numbers as a vector of their own.
pub(super) fn to_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    with_slice(tensor, |numbers| Ok(numbers.to_vec()))
}

/// A tensor `[rows, cols]` on the CPU.
pub(super) fn matrix(numbers: Vec<f32>, rows: usize, cols: usize) -> Result<Tensor> {
    Ok(Tensor::from_vec(numbers, (rows, cols), &Device::Cpu)?)
}
