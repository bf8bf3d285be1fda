//! The formats in which keys and values are stored.

use candle_core::DType;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::kernels::blocks::{BLOCK, BlockFormat, Q4_0, Q8_0};
use crate::kernels::vector::MAX_HEAD_DIM;

/// The format in which keys and values are stored; scores and statistics are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// 4 bytes a number, exact.
    F32,
    /// 2 bytes a number; the default.
    F16,
    /// 8 bits a number, and a scale in f16 for every 32 numbers of a row: 34 bytes a block, as ggml's `Q8_0`.
    Q8_0,
    /// 4 bits a number, and a scale in f16 for every 32 numbers of a row: 18 bytes a block, as ggml's `Q4_0`.
    Q4_0,
}

impl KvDtype {
    /// All formats, from the most exact to the smallest.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Q8_0, Self::Q4_0];

    /// Bytes of one stored key or value of `head_dim` numbers, scales included.
    #[must_use]
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => 4 * head_dim,
            Self::F16 => 2 * head_dim,
            Self::Q8_0 => head_dim / BLOCK * Q8_0::BYTES,
            Self::Q4_0 => head_dim / BLOCK * Q4_0::BYTES,
        }
    }

    /// Checks that rows of `head_dim` numbers can be stored.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if they are more than attention can take, or not whole blocks of a quantised format.
    pub fn check(self, head_dim: usize) -> Result<()> {
        if head_dim > MAX_HEAD_DIM {
            return Err(Error::unsupported(format!("a head dimension of {head_dim} (the most is {MAX_HEAD_DIM})")));
        }
        if matches!(self, Self::F32 | Self::F16) || head_dim.is_multiple_of(BLOCK) {
            return Ok(());
        }
        let what = format!("a {} KV cache for heads of {head_dim} numbers (not a multiple of {BLOCK})", self.name());
        Err(Error::unsupported(what).with_hint("store this model's cache as f16"))
    }

    /// In which numbers tensors hold this format.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a quantised format, which is no type of tensors.
    pub fn tensor_dtype(self) -> Result<DType> {
        match self {
            Self::F32 => Ok(DType::F32),
            Self::F16 => Ok(DType::F16),
            Self::Q8_0 | Self::Q4_0 => {
                let what = format!("a {} KV cache in tensors of candle", self.name());
                Err(Error::unsupported(what).with_hint("use --kv-dtype f16 or f32, or --backend kernels"))
            }
        }
    }

    /// The name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }
}
