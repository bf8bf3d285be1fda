//! Operations on tensors of any device, each of which is counted.
//!
//! What runs on a GPU costs a launch for each operation, however small its tensors are. So all tensor arithmetic of the
//! candle-operations path goes through an [`Ops`], and tests hold what it counted against a bound. Views (narrowing,
//! reshaping or transposing what lies in order) are no operations: they launch nothing.
//!
//! Not for: the kernels on slices (see [`crate::kernels`]), nor for loading weights.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{D, DType, Device, Tensor};

use crate::error::Result;

/// Added to the scores of keys that a row does not see: finite, so that no difference of infinities arises, and so low
/// that the exponential of what is below a row's maximum by it is 0.
pub const MASKED: f64 = -1e30;

/// What attends from a new token over a layer's cache on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeWith {
    /// Operations on heads that are grouped by how many rows they keep (see [`mod@crate::attention::device::decode`]).
    Groups,
    /// One launch over all heads, each with exactly its own rows (see [`crate::attention::ragged`]): for the CPU and CUDA.
    /// Layers with heads of more than 256 numbers, or more than 16 query heads for a KV head, are grouped all the same.
    Ragged,
}

/// A device, and how many operations were handed to it.
///
/// Clones count together.
#[derive(Debug, Clone)]
pub struct Ops {
    device: Device,
    decode_with: DecodeWith,
    /// `[1]` [`MASKED`]
    masked: Tensor,
    launches: Arc<AtomicU64>,
}

impl Ops {
    /// Operations on a device: on CUDA, new tokens attend with [`DecodeWith::Ragged`], elsewhere with
    /// [`DecodeWith::Groups`].
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if the device refuses.
    pub fn new(device: Device) -> Result<Self> {
        #[expect(clippy::cast_possible_truncation)]
        let masked = Tensor::new(&[MASKED as f32], &device)?;
        let decode_with = if device.is_cuda() { DecodeWith::Ragged } else { DecodeWith::Groups };
        Ok(Self { device, decode_with, masked, launches: Arc::default() })
    }

    /// The same with another way to attend from new tokens. Caches made afterwards hold their rows for it.
    #[must_use]
    #[doc(hidden)]
    pub fn with_decode(self, decode_with: DecodeWith) -> Self {
        Self { decode_with, ..self }
    }

    /// What attends from new tokens.
    #[must_use]
    pub fn decode_with(&self) -> DecodeWith {
        self.decode_with
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Operations so far. One that moves or computes numbers counts as one, whatever its size; joining `n` tensors counts
    /// as `n`, and a tensor that is of the wanted type or order already as none.
    #[must_use]
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Counts operations that are handed to the device elsewhere.
    pub(crate) fn count(&self, operations: usize) {
        self.launches.fetch_add(operations as u64, Ordering::Relaxed);
    }

    /// A tensor on this device.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn bring(&self, x: &Tensor) -> Result<Tensor> {
        if !x.device().same_device(&self.device) {
            self.count(1);
        }
        Ok(x.to_device(&self.device)?)
    }

    /// Numbers of the host as a tensor.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if the device refuses, or `shape` is of another size; so do all others.
    pub fn upload<T: candle_core::WithDType>(
        &self,
        numbers: &[T],
        shape: impl Into<candle_core::Shape>,
    ) -> Result<Tensor> {
        self.count(1);
        Ok(Tensor::from_slice(numbers, shape, &self.device)?)
    }

    /// A tensor's numbers on the host, row after row, as f32.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        self.count(1);
        Ok(self.cast(x, DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// Zeros.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn zeros(&self, shape: impl Into<candle_core::Shape>, dtype: DType) -> Result<Tensor> {
        self.count(1);
        Ok(Tensor::zeros(shape, dtype, &self.device)?)
    }

    /// Ones, f32.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn ones(&self, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
        self.count(1);
        Ok(Tensor::ones(shape, DType::F32, &self.device)?)
    }

    /// `0..len` as f32, `[len]`; exact below 2^24.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    #[expect(clippy::cast_precision_loss)]
    pub fn indices(&self, len: usize) -> Result<Tensor> {
        self.count(1);
        Ok(Tensor::arange(0.0, len as f32, &self.device)?)
    }

    /// The same numbers in another type.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        if x.dtype() != dtype {
            self.count(1);
        }
        Ok(x.to_dtype(dtype)?)
    }

    /// The same numbers in order of their indices.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn contiguous(&self, x: &Tensor) -> Result<Tensor> {
        if !x.is_contiguous() {
            self.count(1);
        }
        Ok(x.contiguous()?)
    }

    /// A copy that shares nothing with the original.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn copy(&self, x: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(x.copy()?)
    }

    /// Products of matrices, batch by batch.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn matmul(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(a.matmul(b)?)
    }

    /// Sums, number by number.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(a.broadcast_add(b)?)
    }

    /// Differences, number by number.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn sub(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(a.broadcast_sub(b)?)
    }

    /// Products, number by number.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn mul(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(a.broadcast_mul(b)?)
    }

    /// Quotients, number by number.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn div(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(a.broadcast_div(b)?)
    }

    /// The larger of two, number by number.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn maximum(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(a.maximum(b)?)
    }

    /// 0 in the place of what is below.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn relu(&self, x: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(x.relu()?)
    }

    /// `x * factor`.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn scale(&self, x: &Tensor, factor: f64) -> Result<Tensor> {
        self.count(1);
        Ok(x.affine(factor, 0.0)?)
    }

    /// `x + by`.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn shift(&self, x: &Tensor, by: f64) -> Result<Tensor> {
        self.count(1);
        Ok(x.affine(1.0, by)?)
    }

    /// 1 where `a` is larger than `b`, else 0, as f32.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn is_larger(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.count(1);
        self.cast(&a.broadcast_gt(b)?, DType::F32)
    }

    /// Sums over the last dimension, which stays, of size 1.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn sum_last(&self, x: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(x.sum_keepdim(D::Minus1)?)
    }

    /// Largest numbers over the last dimension, which stays, of size 1.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn max_last(&self, x: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(x.max_keepdim(D::Minus1)?)
    }

    /// Exponentials.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn exp(&self, x: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(x.exp()?)
    }

    /// Natural logarithms.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn ln(&self, x: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(x.log()?)
    }

    /// Softmax over the last dimension.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn softmax(&self, x: &Tensor) -> Result<Tensor> {
        self.count(1);
        Ok(candle_nn::ops::softmax_last_dim(x)?)
    }

    /// Root-mean-square norm over the last dimension.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        self.count(1);
        #[expect(clippy::cast_possible_truncation)]
        let eps = eps as f32;
        Ok(candle_nn::ops::rms_norm(x, weight, eps)?)
    }

    /// `silu(gate) * up`.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn silu_mul(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        self.count(2);
        Ok((gate.silu()? * up)?)
    }

    /// Scores, and [`MASKED`] where nothing is visible.
    ///
    /// * `visible`: u8, of a shape that stretches to that of the scores
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn mask(&self, scores: &Tensor, visible: &Tensor) -> Result<Tensor> {
        self.count(1);
        let visible = visible.broadcast_as(scores.shape())?;
        Ok(visible.where_cond(scores, &self.masked.broadcast_as(scores.shape())?)?)
    }

    /// Joins tensors.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn cat(&self, parts: &[Tensor], dim: usize) -> Result<Tensor> {
        self.count(if parts.len() > 1 { parts.len() } else { 0 });
        Ok(Tensor::cat(parts, dim)?)
    }

    /// Picks entries of a dimension.
    ///
    /// * `indices`: `[n]`, u32
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn index_select(&self, x: &Tensor, indices: &Tensor, dim: usize) -> Result<Tensor> {
        self.count(1);
        Ok(x.index_select(indices, dim)?)
    }

    /// Writes `part` into `x`, in place, from index `first` of a dimension on.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn write(&self, x: &Tensor, part: &Tensor, dim: usize, first: usize) -> Result<()> {
        self.count(1);
        Ok(x.slice_set(part, dim, first)?)
    }

    /// Counts an operation that a caller hands to candle itself.
    pub(crate) fn counted<T>(&self, operation: candle_core::Result<T>) -> Result<T> {
        self.count(1);
        Ok(operation?)
    }
}
