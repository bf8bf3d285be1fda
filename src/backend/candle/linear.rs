//! Linear layers over tensors on a device.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};

use crate::error::{Error, Result};
use crate::kernels::quant::{WeightFormat, WeightMatrix};
use crate::ops::Ops;
use crate::stop;

/// Weights `[out_features, in_features]` on a device.
#[derive(Debug, Clone)]
enum Weights {
    Dense(Tensor),
    Quantised(Arc<QTensor>),
}

/// `y = x W^T + b`.
#[derive(Debug, Clone)]
pub struct CandleLinear {
    weights: Weights,
    bias: Option<Tensor>,
}

impl CandleLinear {
    /// Copies a matrix to a device, straight from its file.
    pub(super) fn new(ops: &Ops, matrix: &WeightMatrix, bias: Option<Vec<f32>>) -> Result<Self> {
        let (device, shape) = (ops.device(), (matrix.rows(), matrix.cols()));
        let dense = |dtype| Tensor::from_raw_buffer(matrix.data(), dtype, &[shape.0, shape.1], device);
        let weights = match matrix.dtype() {
            WeightFormat::F32 => Weights::Dense(dense(DType::F32)?),
            WeightFormat::F16 => Weights::Dense(dense(DType::F16)?),
            WeightFormat::BF16 => Weights::Dense(dense(DType::BF16)?),
            blocks => {
                let dtype =
                    blocks.candle().ok_or_else(|| Error::unsupported(format!("{blocks} in candle operations")))?;
                let storage = QStorage::from_data(matrix.data().into(), device, dtype)?;
                Weights::Quantised(Arc::new(QTensor::new(storage, shape)?))
            }
        };
        let bias = bias.map(|bias| ops.upload(&bias, bias.len())).transpose()?;
        Ok(Self { weights, bias })
    }

    /// `(out_features, in_features)`
    pub(super) fn shape(&self) -> (usize, usize) {
        let dims = match &self.weights {
            Weights::Dense(weight) => weight.dims(),
            Weights::Quantised(weight) => weight.shape().dims(),
        };
        if let [rows, cols] = dims { (*rows, *cols) } else { (0, 0) }
    }

    /// Applies several layers to the same input.
    ///
    /// * `x`: `[seq_len, in_features]`, f32, on the device of the weights
    ///
    /// Returns `[seq_len, out_features]` of each, f32.
    ///
    /// # Errors
    /// [`Error::Tensor`] if shapes do not fit; [`Error::Interrupted`] if a [stop] is requested.
    pub(super) fn forward<const N: usize>(ops: &Ops, x: &Tensor, layers: [&Self; N]) -> Result<[Tensor; N]> {
        // The input is rounded once for all layers whose weights are of one type.
        let mut inputs: Vec<Tensor> = Vec::with_capacity(1);
        let mut outputs = Vec::with_capacity(N);
        for layer in layers {
            if x.dim(0)? > 1 {
                stop::check()?;
            }
            let y = match &layer.weights {
                Weights::Dense(weight) => {
                    let x = if let Some(input) = inputs.iter().find(|input| input.dtype() == weight.dtype()) {
                        input.clone()
                    } else {
                        let input = ops.cast(x, weight.dtype())?;
                        inputs.push(input.clone());
                        input
                    };
                    // candle's products on the CPU know no bf16: there the rounded numbers are widened again.
                    let widens = weight.dtype() == DType::BF16 && matches!(ops.device(), Device::Cpu);
                    let dtype = if widens { DType::F32 } else { weight.dtype() };
                    let product = ops.matmul(&ops.cast(&x, dtype)?, &ops.cast(weight, dtype)?.t()?)?;
                    ops.cast(&product, DType::F32)?
                }
                Weights::Quantised(weight) => {
                    ops.counted(QMatMul::from_arc(Arc::clone(weight)).and_then(|weight| weight.forward(x)))?
                }
            };
            outputs.push(match &layer.bias {
                Some(bias) => ops.add(&y, bias)?,
                None => y,
            });
        }
        outputs.try_into().map_err(|outputs: Vec<Tensor>| Error::shape("linear layers", N, outputs.len()))
    }

    /// The weights as f32, `[out_features, in_features]`, in memory.
    pub(super) fn widened(&self) -> Result<Vec<f32>> {
        let wide = match &self.weights {
            Weights::Dense(weight) => weight.to_dtype(DType::F32)?,
            Weights::Quantised(weight) => weight.dequantize(&Device::Cpu)?,
        };
        Ok(wide.flatten_all()?.to_vec1()?)
    }
}
