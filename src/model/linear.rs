//! Linear layers and the embedding, over dense tensors, weights as a file stores them, or weights on a device.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{DType, Device, Module, Tensor};

use super::host;
use crate::error::{Error, Result};
use crate::kernels::quant::WeightMatrix;
use crate::kernels::vector::{self, instruction_set};
use crate::ops::Ops;
use crate::stop;

/// Weights `[out_features, in_features]`.
#[derive(Debug, Clone)]
enum Weights {
    Dense(Tensor),
    Stored(Arc<WeightMatrix>),
    /// Blocks that candle computes on.
    Quantised(Arc<QTensor>),
}

/// `y = x W^T + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    weights: Weights,
    bias: Option<Tensor>,
}

impl Linear {
    /// A layer with a dense weight `[out_features, in_features]`.
    #[must_use]
    pub fn dense(weight: Tensor) -> Self {
        Self { weights: Weights::Dense(weight), bias: None }
    }

    /// A layer that computes on the stored blocks or floats.
    #[must_use]
    pub fn stored(weight: Arc<WeightMatrix>) -> Self {
        Self { weights: Weights::Stored(weight), bias: None }
    }

    /// A layer with quantised weights `[out_features, in_features]` that only candle operations compute on.
    #[must_use]
    pub fn quantised(weight: QTensor) -> Self {
        Self { weights: Weights::Quantised(Arc::new(weight)), bias: None }
    }

    /// Adds a bias `[out_features]`.
    #[must_use]
    pub fn with_bias(mut self, bias: Option<Tensor>) -> Self {
        self.bias = bias;
        self
    }

    /// The stored matrix and the bias; `None` for a dense weight.
    pub(super) fn stored_parts(&self) -> Option<(&Arc<WeightMatrix>, Option<&Tensor>)> {
        match &self.weights {
            Weights::Dense(_) | Weights::Quantised(_) => None,
            Weights::Stored(matrix) => Some((matrix, self.bias.as_ref())),
        }
    }

    /// Applies the layer.
    ///
    /// * `x`: `[seq_len, in_features]`, f32
    ///
    /// Returns `[seq_len, out_features]`, f32.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Tensor`] if the shapes do not fit; [`Error::Interrupted`] if a [stop] is requested while
    /// it works on several rows.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let seq_len = x.dim(0)?;
        let y = host::with_slice(x, |x| self.apply(x, seq_len))?;
        let out_features = y.len() / seq_len.max(1);
        host::matrix(y, seq_len, out_features)
    }

    /// Applies the layer to numbers in memory.
    ///
    /// * `x`: `[seq_len, in_features]`
    ///
    /// Returns `[seq_len, out_features]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub(super) fn apply(&self, x: &[f32], seq_len: usize) -> Result<Vec<f32>> {
        let mut y = match &self.weights {
            Weights::Dense(weight) => {
                let x = host::matrix(x.to_vec(), seq_len, x.len() / seq_len.max(1))?;
                host::to_vec(&x.matmul(&weight.t()?)?)?
            }
            Weights::Stored(weight) => {
                if x.len() != seq_len * weight.cols() {
                    return Err(Error::shape("a linear layer's input", seq_len * weight.cols(), x.len()));
                }
                let mut y = vec![0.0; seq_len * weight.rows()];
                weight.matmul(x, seq_len, &mut y);
                if seq_len > 1 {
                    stop::check()?; // or the product may not be whole
                }
                y
            }
            Weights::Quantised(_) => {
                return Err(Error::unsupported("computing on candle's quantised tensors by slices"));
            }
        };
        if let Some(bias) = &self.bias {
            host::with_slice(bias, |bias| {
                if y.len() != seq_len * bias.len() {
                    return Err(Error::shape("a linear layer's bias", y.len() / seq_len.max(1), bias.len()));
                }
                for row in y.chunks_exact_mut(bias.len().max(1)) {
                    vector::add_assign(instruction_set(), row, bias);
                }
                Ok(())
            })?;
        }
        Ok(y)
    }
}

impl Linear {
    /// Applies several layers to the same input as candle operations.
    ///
    /// * `x`: `[seq_len, in_features]`, f32, on the device of the weights
    ///
    /// Returns `[seq_len, out_features]` of each, f32.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for weights that only the kernels compute on; [`Error::Tensor`] if shapes do not fit.
    pub(super) fn forward_on<const N: usize>(ops: &Ops, x: &Tensor, layers: [&Self; N]) -> Result<[Tensor; N]> {
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
                Weights::Stored(_) => {
                    return Err(Error::unsupported("computing on mapped weights by candle operations"));
                }
            };
            outputs.push(match &layer.bias {
                Some(bias) => ops.add(&y, bias)?,
                None => y,
            });
        }
        outputs.try_into().map_err(|outputs: Vec<Tensor>| Error::shape("linear layers", N, outputs.len()))
    }

    /// The weights as f32, `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a device does not hand them out.
    pub(super) fn widened(&self) -> Result<Vec<f32>> {
        match &self.weights {
            Weights::Dense(weight) => Ok(weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?),
            Weights::Quantised(weight) => Ok(weight.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?),
            Weights::Stored(weight) => {
                let mut wide = vec![0.0; weight.rows() * weight.cols()];
                weight.dequantize_rows(0..weight.rows(), &mut wide);
                Ok(wide)
            }
        }
    }
}

/// The table that turns token ids into vectors, `[vocab_size, hidden_size]`.
#[derive(Debug, Clone)]
pub struct Embedding(Weights);

impl Embedding {
    /// A dense table.
    #[must_use]
    pub fn dense(table: Tensor) -> Self {
        Self(Weights::Dense(table))
    }

    /// A table as it is stored; rows are widened as they are looked up.
    #[must_use]
    pub fn stored(table: Arc<WeightMatrix>) -> Self {
        Self(Weights::Stored(table))
    }

    /// The output layer that shares this table (`tie_word_embeddings`).
    #[must_use]
    pub fn tied_output(&self) -> Linear {
        Linear { weights: self.0.clone(), bias: None }
    }

    /// Whether the table is used as it is stored.
    pub(super) fn is_stored(&self) -> bool {
        matches!(self.0, Weights::Stored(_))
    }

    /// Looks up ids.
    ///
    /// Returns `[ids.len(), hidden_size]`, f32.
    ///
    /// # Errors
    /// [`Error::Input`] for an id outside of the vocabulary.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        match &self.0 {
            Weights::Dense(table) => {
                check_ids(ids, table.dim(0)?)?;
                let ids = Tensor::new(ids, table.device())?;
                Ok(table.index_select(&ids, 0)?.to_dtype(DType::F32)?)
            }
            Weights::Stored(table) => {
                let mut out = vec![0.0; ids.len() * table.cols()];
                self.look_up(ids, &mut out)?;
                host::matrix(out, ids.len(), table.cols())
            }
            Weights::Quantised(_) => Err(Error::unsupported("looking up rows of candle's quantised tensors")),
        }
    }

    /// Looks up ids in a stored table.
    ///
    /// * `out`: overwritten with `[ids.len(), hidden_size]`
    ///
    /// # Errors
    /// [`Error::Input`] for an id outside of the vocabulary; [`Error::Unsupported`] for a dense table.
    pub(super) fn look_up(&self, ids: &[u32], out: &mut [f32]) -> Result<()> {
        let Weights::Stored(table) = &self.0 else {
            return Err(Error::unsupported("looking up rows of a dense table in place"));
        };
        check_ids(ids, table.rows())?;
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(table.cols())) {
            table.dequantize_rows(id as usize..id as usize + 1, row);
        }
        Ok(())
    }
}

fn check_ids(ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(Error::input(format!("token id `{id}` is outside of the vocabulary of {vocab_size}"))),
        None => Ok(()),
    }
}
