//! The formats in which keys and values are stored.

use candle_core::DType;

use crate::error::{Error, Result};
use crate::kernels::blocks::{BLOCK, BlockFormat, Q4_0, Q8_0};
use crate::kernels::vector::MAX_HEAD_DIM;

/// The format in which keys and values are stored; scores and statistics are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    /// 4 bytes a number, exact.
    F32,
    /// 2 bytes a number; the default.
    F16,
    /// Keys as in [`F16`](Self::F16), values as in [`Q8_0`](Self::Q8_0).
    F16Q8_0,
    /// Keys as in [`F16`](Self::F16), values as in [`Q4_0`](Self::Q4_0).
    F16Q4_0,
    /// 8 bits a number, and a scale in f16 for every 32 numbers of a row: 34 bytes a block, as ggml's `Q8_0`. The mean of a
    /// head's first prompt is subtracted from keys, and what is left is rotated by a Hadamard matrix, before they are
    /// rounded; attention takes both into account.
    Q8_0,
    /// Keys as in [`Q8_0`](Self::Q8_0), values as in [`Q4_0`](Self::Q4_0): keys lose more by rounding than values.
    Q8_0Q4_0,
    /// 4 bits a number, and a scale in f16 for every 32 numbers of a row: 18 bytes a block, as ggml's `Q4_0`. Keys are
    /// prepared as for [`Q8_0`](Self::Q8_0).
    Q4_0,
    /// What a prompt leaves as in [`Q8_0Q4_0`](Self::Q8_0Q4_0), what comes later as in [`Q8_0`](Self::Q8_0) until the next
    /// prompt decides about it: the newest tokens are looked at most.
    Mixed,
}

impl KvDtype {
    /// All formats.
    pub const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::F16Q8_0, Self::F16Q4_0, Self::Q8_0, Self::Q8_0Q4_0, Self::Q4_0, Self::Mixed];

    /// Those whose keys and values are in the same numbers, as which they can be named apart.
    pub const UNIFORM: [Self; 4] = [Self::F32, Self::F16, Self::Q8_0, Self::Q4_0];

    /// Keys and values, each in numbers of their own.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a pair that is not in [`ALL`](Self::ALL).
    pub fn of(keys: Self, values: Self) -> Result<Self> {
        let pair = Self::ALL.into_iter().find(|dtype| (dtype.keys(), dtype.values()) == (keys, values));
        pair.ok_or_else(|| {
            let what = format!("a KV cache with keys in {} and values in {}", keys.name(), values.name());
            let pairs = Self::ALL.iter().map(|dtype| dtype.name()).filter(|name| name.contains('/'));
            let pairs: Vec<_> = pairs.collect();
            Error::unsupported(what).with_hint(format!("pairs are {}; others are the same for both", pairs.join(", ")))
        })
    }

    /// The format of what a prompt leaves.
    #[must_use]
    pub fn settled(self) -> Self {
        if self == Self::Mixed { Self::Q8_0Q4_0 } else { self }
    }

    /// The format of what comes after a prompt, until the next one.
    #[must_use]
    pub fn newest(self) -> Self {
        if self == Self::Mixed { Self::Q8_0 } else { self }
    }

    /// The numbers of keys that a prompt leaves, one of [`UNIFORM`](Self::UNIFORM).
    #[must_use]
    pub fn keys(self) -> Self {
        match self.settled() {
            Self::F16Q8_0 | Self::F16Q4_0 => Self::F16,
            Self::Q8_0Q4_0 => Self::Q8_0,
            uniform => uniform,
        }
    }

    /// The numbers of values that a prompt leaves, one of [`UNIFORM`](Self::UNIFORM).
    #[must_use]
    pub fn values(self) -> Self {
        match self.settled() {
            Self::F16Q8_0 => Self::Q8_0,
            Self::F16Q4_0 | Self::Q8_0Q4_0 => Self::Q4_0,
            uniform => uniform,
        }
    }

    /// Bytes of one stored key of `head_dim` numbers and its value that a prompt leaves, scales included.
    #[must_use]
    pub fn token_bytes(self, head_dim: usize) -> usize {
        let row = |dtype: Self| match dtype {
            Self::F32 => 4 * head_dim,
            Self::Q8_0 => head_dim / BLOCK * Q8_0::BYTES,
            Self::Q4_0 => head_dim / BLOCK * Q4_0::BYTES,
            _ => 2 * head_dim,
        };
        row(self.keys()) + row(self.values())
    }

    /// Whether keys are in blocks, and so gain by what they have in common being subtracted first.
    #[must_use]
    pub fn has_key_blocks(self) -> bool {
        self.keys().is_blocks()
    }

    /// Bytes that a head takes beside its rows: what keys have in common, twice where there are two kinds of rows.
    #[must_use]
    pub fn head_bytes(self, head_dim: usize) -> usize {
        let kinds = if self.settled() == self.newest() { 1 } else { 2 };
        if self.has_key_blocks() { kinds * head_dim * size_of::<f32>() } else { 0 }
    }

    /// Of [`UNIFORM`](Self::UNIFORM) formats.
    fn is_blocks(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0)
    }

    /// Checks that rows of `head_dim` numbers can be stored.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if they are more than attention can take, or not whole blocks of a quantised format.
    pub fn check(self, head_dim: usize) -> Result<()> {
        if head_dim > MAX_HEAD_DIM {
            return Err(Error::unsupported(format!("a head dimension of {head_dim} (the most is {MAX_HEAD_DIM})")));
        }
        if !self.values().is_blocks() || head_dim.is_multiple_of(BLOCK) {
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
            _ => {
                let what = format!("a {} KV cache in tensors of candle", self.name());
                Err(Error::unsupported(what).with_hint("use --kv-dtype f16 or f32, or --backend kernels"))
            }
        }
    }

    /// The name in options and reports: of the keys' numbers and, if they are others, of the values'.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::F16Q8_0 => "f16/q8_0",
            Self::F16Q4_0 => "f16/q4_0",
            Self::Q8_0 => "q8_0",
            Self::Q8_0Q4_0 => "q8_0/q4_0",
            Self::Q4_0 => "q4_0",
            Self::Mixed => "mixed",
        }
    }
}
