//! What a launch of the kernels in `kernels/` needs: its name, its grid and its arguments.
//!
//! Knows nothing of a device, and is public (hidden), so that tests run the kernels on the host with the very numbers that
//! a GPU would get. Not for: users, or checking shapes (see [`super::RaggedRows`]).

use candle_core::DType;

use crate::error::{Error, Result};

/// Threads of a block; as in `kernels/ragged_decode.cuh`.
pub const THREADS: u32 = 128;

/// Most ranges of a head, so that one block can merge them; as in `kernels/ragged_decode.cuh`.
const MAX_RANGES: usize = 64;

/// Most KV heads: places of a grid in its second dimension.
pub const MAX_KV_HEADS: usize = u16::MAX as usize;

/// Ranges are whole multiples of this many rows: below it a block has too little to do.
const RANGE_UNIT: usize = 64;

/// A storage format of numbers, by its number in the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Format {
    F32 = 0,
    F16 = 1,
    BF16 = 2,
}

impl Format {
    /// The format of tensors of a dtype.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if kernels do not read it.
    pub fn of(dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Self::F32),
            DType::F16 => Ok(Self::F16),
            DType::BF16 => Ok(Self::BF16),
            _ => Err(Error::unsupported(format!("ragged attention in `{}`", dtype.as_str()))
                .with_hint("f32, f16 and bf16 are")),
        }
    }

    /// The name in kernels and their files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }
}

/// The sizes of one launch.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    pub num_kv_heads: usize,
    /// At most 16.
    pub group_size: usize,
    /// At most 256.
    pub head_dim: usize,
    /// Rows of all heads, tails included.
    pub total_rows: usize,
    /// Rows of the longest head, tail included.
    pub longest: usize,
    pub tail_capacity: usize,
    pub tail_len: usize,
    /// Of keys and values.
    pub format: Format,
    /// Of queries and output.
    pub query_format: Format,
}

/// How [`Work`] is cut into blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The kernel's name.
    pub kernel: String,
    /// Rows of a head that a block takes.
    pub range_rows: usize,
    /// Ranges of the longest head.
    pub max_ranges: usize,
    /// Numbers in the buffer of unnormalised sums.
    pub partial_sums: usize,
    /// Numbers in the buffer of maxima and sums of exponentials.
    pub partial_stats: usize,
}

impl Plan {
    /// Cuts the rows into about as many ranges as there are places for blocks.
    ///
    /// * `wanted_blocks`: a few for each multiprocessor
    #[must_use]
    pub fn new(work: &Work, wanted_blocks: usize) -> Self {
        let range_rows = work
            .total_rows
            .div_ceil(wanted_blocks.max(1))
            .max(work.longest.div_ceil(MAX_RANGES))
            .max(1)
            .next_multiple_of(RANGE_UNIT);
        let max_ranges = work.longest.div_ceil(range_rows).max(1);
        let stats = work.num_kv_heads * max_ranges * work.group_size;
        // A head of one range writes no partial result.
        let partial = |numbers| if max_ranges == 1 { 1 } else { numbers };
        let width = if work.head_dim <= 64 { 64 } else { work.head_dim.next_power_of_two() };
        let kernel = format!("ragged_decode_{}_w{width}_g{}", work.format.name(), work.group_size.next_power_of_two());
        Self {
            kernel,
            range_rows,
            max_ranges,
            partial_sums: partial(stats * work.head_dim),
            partial_stats: partial(2 * stats),
        }
    }

    /// Blocks: ranges, then KV heads.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are more KV heads than a grid has places.
    pub fn grid(&self, work: &Work) -> Result<(u32, u32)> {
        if work.num_kv_heads > MAX_KV_HEADS {
            return Err(Error::shape("KV heads", ..=MAX_KV_HEADS, work.num_kv_heads));
        }
        Ok((narrow(self.max_ranges)?, narrow(work.num_kv_heads)?))
    }
}

/// Addresses of the buffers, on the device where the kernel runs.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Buffers {
    /// `[num_kv_heads, group_size, head_dim]`, in the heads' order
    pub queries: u64,
    /// `[rows, head_dim]`
    pub kept_keys: u64,
    /// `[rows, head_dim]`
    pub kept_values: u64,
    /// u32 `[num_kv_heads, 3]`
    pub slots: u64,
    /// `[num_kv_heads, tail_capacity, head_dim]`
    pub tail_keys: u64,
    /// `[num_kv_heads, tail_capacity, head_dim]`
    pub tail_values: u64,
    /// As the queries.
    pub out: u64,
    /// f32 [`Plan::partial_sums`]
    pub partial_sums: u64,
    /// f32 [`Plan::partial_stats`]
    pub partial_stats: u64,
    /// u32 `[num_kv_heads]`, zeros
    pub counters: u64,
}

/// The kernel's argument: `struct ragged_decode`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Arguments {
    buffers: Buffers,
    group_size: u32,
    head_dim: u32,
    tail_capacity: u32,
    tail_len: u32,
    range_rows: u32,
    max_ranges: u32,
    query_format: u32,
    aligned: u32,
    scale: f32,
}

impl Arguments {
    /// # Errors
    /// [`Error::Shape`] if a size does not fit 32 bits.
    pub fn new(work: &Work, plan: &Plan, buffers: Buffers) -> Result<Self> {
        const LOAD_BYTES: usize = 16;
        let Buffers { kept_keys, kept_values, tail_keys, tail_values, .. } = buffers;
        let aligned = (work.head_dim * work.format.bytes()).is_multiple_of(LOAD_BYTES)
            && [kept_keys, kept_values, tail_keys, tail_values]
                .iter()
                .all(|address| address.is_multiple_of(LOAD_BYTES as u64));
        narrow(work.longest)?;
        #[expect(clippy::cast_precision_loss, reason = "at most 256")]
        let head_dim = work.head_dim as f32;
        Ok(Self {
            buffers,
            group_size: narrow(work.group_size)?,
            head_dim: narrow(work.head_dim)?,
            tail_capacity: narrow(work.tail_capacity)?,
            tail_len: narrow(work.tail_len)?,
            range_rows: narrow(plan.range_rows)?,
            max_ranges: narrow(plan.max_ranges)?,
            query_format: work.query_format as u32,
            aligned: u32::from(aligned),
            scale: std::f32::consts::LOG2_E / head_dim.sqrt(),
        })
    }
}

fn narrow(size: usize) -> Result<u32> {
    u32::try_from(size).map_err(|_| Error::shape("ragged attention", ..=u32::MAX, size))
}
