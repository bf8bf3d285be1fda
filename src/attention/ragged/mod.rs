//! Attention from one new token over ragged heads on any device: one launch for a whole layer.
//!
//! A layer's rows lie in two places. The *kept* rows of all heads are one tensor, each head's in a span of its own, with or
//! without padding between spans; they do not change while tokens are generated. The *tail* has the tokens since, which
//! every head gets. On CUDA a kernel of this project reads both where they are, each key and value once for all query
//! heads that share it (see `kernels/ragged_decode.cuh`); on the CPU the same is computed plainly.
//!
//! Not for: the CPU's own cache, which is faster there (see [`super::decode`]), or prompts.

#[cfg(feature = "cuda")]
mod cuda;
mod host;
#[doc(hidden)]
pub mod launch;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, StorageRef, Tensor, WithDType};
use half::{bf16, f16};

use super::HeadLayout;
use crate::error::{Error, Result};
use crate::kernels::element::Element;
use host::Piece;
use launch::{Format, Work};

/// Largest head dimension.
pub const MAX_HEAD_DIM: usize = 256;

/// Most query heads that share a KV head.
pub const MAX_GROUP_SIZE: usize = 16;

/// Whether this build attends over ragged heads on the device in one launch.
#[must_use]
pub fn supports(device: &Device) -> bool {
    match device {
        Device::Cpu => true,
        Device::Cuda(_) => cfg!(feature = "cuda"),
        Device::Metal(_) => false,
    }
}

/// Whether heads are within the sizes that the kernels are made for.
#[must_use]
pub fn fits(layout: HeadLayout) -> bool {
    layout.head_dim <= MAX_HEAD_DIM
        && layout.group_size() <= MAX_GROUP_SIZE
        && layout.num_kv_heads <= launch::MAX_KV_HEADS
}

/// One KV head's place: heads may be stored in any order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its rows among the kept ones; may be empty.
    pub rows: Range<usize>,
    /// Which KV head it is, and so whose queries attend to it.
    pub kv_head: usize,
}

/// What a layer kept of a prompt, on a device.
///
/// Tensors are shared, not copied. A value must not be used from two streams of a device at once.
#[derive(Debug)]
pub struct RaggedRows {
    layout: HeadLayout,
    dtype: DType,
    /// Keys and values, `[rows, head_dim]`; `None` if no head keeps any.
    kept: Option<(Tensor, Tensor)>,
    slots: Vec<Slot>,
    /// u32 `[num_kv_heads, 3]`: first row, rows, KV head.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    device_slots: Tensor,
    /// u32 `[num_kv_heads]`: what a launch's blocks count in; zeros between launches.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    counters: Tensor,
    launches: AtomicU64,
}

impl RaggedRows {
    /// Takes a layer's kept rows.
    ///
    /// * `device`: where queries and rows are
    /// * `dtype`: of kept rows and tail: f32, f16 or bf16
    /// * `kept`: keys and values, each `[rows, head_dim]` and contiguous; rows outside every slot are never read. `None` if
    ///   no head keeps any
    /// * `slots`: `[num_kv_heads]`; every KV head has one
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the head dimension is above [`MAX_HEAD_DIM`], the group size above [`MAX_GROUP_SIZE`], or
    /// the dtype another one; [`Error::Shape`] if sizes do not fit; [`Error::Tensor`] if the device refuses.
    pub fn new(
        device: &Device,
        layout: HeadLayout,
        dtype: DType,
        kept: Option<(Tensor, Tensor)>,
        slots: Vec<Slot>,
    ) -> Result<Self> {
        let HeadLayout { num_kv_heads, head_dim, .. } = layout;
        Format::of(dtype)?;
        layout.check()?;
        if head_dim > MAX_HEAD_DIM {
            return Err(Error::unsupported(format!("a head dimension of {head_dim} (the most is {MAX_HEAD_DIM})")));
        }
        let group_size = layout.group_size();
        if group_size > MAX_GROUP_SIZE {
            let what = format!("a KV head with {group_size} query heads (the most is {MAX_GROUP_SIZE})");
            return Err(Error::unsupported(what));
        }
        let mut num_rows = 0;
        if let Some((keys, values)) = &kept {
            num_rows = keys.dim(0)?;
            for (what, rows) in [("kept keys", keys), ("kept values", values)] {
                if rows.dims() != [num_rows, head_dim] {
                    return Err(Error::shape(what, [num_rows, head_dim], rows.dims()));
                }
                expect_like(what, rows, device, dtype)?;
                if !rows.is_contiguous() {
                    return Err(Error::shape(what, "contiguous rows", rows.stride()));
                }
            }
        }
        let mut seen = vec![false; num_kv_heads];
        let mut numbers = Vec::with_capacity(3 * num_kv_heads);
        for Slot { rows, kv_head } in &slots {
            if rows.start > rows.end || rows.end > num_rows {
                return Err(Error::shape("a head's kept rows", 0..num_rows, rows));
            }
            match seen.get_mut(*kv_head) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Error::shape("KV heads of slots", format!("each of 0..{num_kv_heads} once"), kv_head)),
            }
            for number in [rows.start, rows.len(), *kv_head] {
                numbers.push(u32::try_from(number).map_err(|_| Error::shape("kept rows", ..=u32::MAX, number))?);
            }
        }
        if slots.len() != num_kv_heads {
            return Err(Error::shape("slots", num_kv_heads, slots.len()));
        }
        let device_slots = Tensor::from_vec(numbers, (num_kv_heads, 3), device)?;
        let counters = Tensor::zeros(num_kv_heads, DType::U32, device)?;
        Ok(Self { layout, dtype, kept, slots, device_slots, counters, launches: AtomicU64::new(0) })
    }

    /// Attends from one token over every head's kept rows and tail.
    ///
    /// * `queries`: `[num_heads, head_dim]` or `[num_kv_heads, group_size, head_dim]`, in the heads' own order, rotated;
    ///   f32, f16 or bf16
    /// * `tail`: keys and values since, `[num_kv_heads, tail_len, head_dim]`, in the order of the slots; a view of the
    ///   first rows of a larger buffer will do. `None` if there are none
    ///
    /// Returns the queries' shape and dtype. Sums are f32. On a GPU this is one launch, whatever the heads keep, as long as
    /// the queries are contiguous.
    ///
    /// # Errors
    /// [`Error::Shape`] if sizes, dtypes or devices do not fit, or a head has no rows; [`Error::Unsupported`] if the
    /// queries' dtype is another one; [`Error::Tensor`] if the device refuses, or has no kernel (see [`supports`]).
    pub fn attend(&self, queries: &Tensor, tail: Option<(&Tensor, &Tensor)>) -> Result<Tensor> {
        let HeadLayout { num_heads, num_kv_heads, head_dim } = self.layout;
        let group_size = self.layout.group_size();
        Format::of(queries.dtype())?;
        if queries.dims() != [num_heads, head_dim] && queries.dims() != [num_kv_heads, group_size, head_dim] {
            return Err(Error::shape("queries", [num_heads, head_dim], queries.dims()));
        }
        if !queries.device().same_device(self.device_slots.device()) {
            return Err(Error::shape("the queries' device", self.device_slots.device(), queries.device()));
        }
        let mut tail_len = 0;
        let mut tail_capacity = 0;
        if let Some((keys, values)) = tail {
            tail_len = keys.dims().get(1).copied().unwrap_or(0);
            for (what, rows) in [("tail keys", keys), ("tail values", values)] {
                if rows.dims() != [num_kv_heads, tail_len, head_dim] {
                    return Err(Error::shape(what, [num_kv_heads, tail_len, head_dim], rows.dims()));
                }
                expect_like(what, rows, queries.device(), self.dtype)?;
            }
            tail_capacity = capacity("tail keys", keys)?;
            if tail_capacity != capacity("tail values", values)? {
                return Err(Error::shape("tail values", keys.stride(), values.stride()));
            }
        }
        let lens = || self.slots.iter().map(|slot| slot.rows.len() + tail_len);
        if lens().any(|len| len == 0) {
            return Err(Error::shape("cached rows", "at least one row of each head", 0));
        }
        let work = Work {
            num_kv_heads,
            group_size,
            head_dim,
            total_rows: lens().sum(),
            longest: lens().max().unwrap_or(0),
            tail_capacity,
            tail_len,
            format: Format::of(self.dtype)?,
            query_format: Format::of(queries.dtype())?,
        };
        let out = queries.contiguous()?.apply_op1_no_bwd(&Attend { rows: self, tail, work })?;
        self.launches.fetch_add(1, Ordering::Relaxed);
        Ok(out)
    }

    /// Bytes on the device beside the rows: where each head's are, and a counter for each.
    #[must_use]
    pub fn index_bytes(&self) -> usize {
        (self.device_slots.elem_count() + self.counters.elem_count()) * size_of::<u32>()
    }

    /// Launches so far: one for each [`attend`](Self::attend) that succeeded.
    #[must_use]
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }
}

fn expect_like(what: &'static str, rows: &Tensor, device: &Device, dtype: DType) -> Result<()> {
    if rows.dtype() != dtype {
        return Err(Error::shape(what, dtype, rows.dtype()));
    }
    if rows.device().same_device(device) { Ok(()) } else { Err(Error::shape(what, device, rows.device())) }
}

/// Rows from one head of a tail to the next, for a view whose heads have their rows in order.
fn capacity(what: &'static str, rows: &Tensor) -> Result<usize> {
    let (num_kv_heads, tail_len, head_dim) = rows.dims3()?;
    let &[head, row, number] = rows.stride() else { return Err(Error::shape(what, "three strides", rows.stride())) };
    let in_order = (number == 1 || head_dim == 1) && (row == head_dim || tail_len <= 1);
    if num_kv_heads == 1 && in_order {
        return Ok(tail_len);
    }
    if in_order && head.is_multiple_of(head_dim) && head >= tail_len * head_dim {
        return Ok(head / head_dim);
    }
    Err(Error::shape(what, "the first rows of a contiguous buffer", rows.stride()))
}

/// One launch.
struct Attend<'a> {
    rows: &'a RaggedRows,
    tail: Option<(&'a Tensor, &'a Tensor)>,
    work: Work,
}

impl CustomOp1 for Attend<'_> {
    fn name(&self) -> &'static str {
        "ragged-decode"
    }

    fn cpu_fwd(&self, queries: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let numbers = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
        let scale = self.rows.layout.scale();
        let out = match queries {
            CpuStorage::F32(queries) => CpuStorage::F32(self.on_host(scale, &queries[numbers])?),
            CpuStorage::F16(queries) => CpuStorage::F16(self.on_host(scale, &queries[numbers])?),
            CpuStorage::BF16(queries) => CpuStorage::BF16(self.on_host(scale, &queries[numbers])?),
            _ => candle_core::bail!("ragged attention takes queries in f32, f16 or bf16"),
        };
        Ok((out, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        queries: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        cuda::attend(self, queries, layout)
    }
}

impl Attend<'_> {
    fn on_host<Q: Element>(&self, scale: f32, queries: &[Q]) -> candle_core::Result<Vec<Q>> {
        let queries: Vec<f32> = queries.iter().map(|query| query.widen() * scale).collect();
        let out = match self.work.format {
            Format::F32 => self.over_host_rows::<f32>(&queries)?,
            Format::F16 => self.over_host_rows::<f16>(&queries)?,
            Format::BF16 => self.over_host_rows::<bf16>(&queries)?,
        };
        Ok(out.into_iter().map(Q::narrow).collect())
    }

    /// * `queries`, and what is returned: `[num_kv_heads, group_size, head_dim]`
    fn over_host_rows<T: Element + WithDType>(&self, queries: &[f32]) -> candle_core::Result<Vec<f32>> {
        let Work { group_size, head_dim, tail_capacity, tail_len, .. } = self.work;
        let kept =
            self.rows.kept.as_ref().map(|(keys, values)| (keys.storage_and_layout(), values.storage_and_layout()));
        let tail = self.tail.map(|(keys, values)| (keys.storage_and_layout(), values.storage_and_layout()));
        let empty = Piece::<T> { keys: &[], values: &[] };
        let kept = match &kept {
            Some((keys, values)) => Piece { keys: numbers(keys)?, values: numbers(values)? },
            None => empty,
        };
        let tail = match &tail {
            Some((keys, values)) => Piece { keys: numbers(keys)?, values: numbers(values)? },
            None => empty,
        };
        let mut heads = vec![[empty; 2]; self.rows.slots.len()];
        for (place, slot) in self.rows.slots.iter().enumerate() {
            let first = place * tail_capacity;
            let pieces = [kept.rows(slot.rows.clone(), head_dim), tail.rows(first..first + tail_len, head_dim)];
            heads[slot.kv_head] = pieces;
        }
        Ok(host::attend(queries, group_size, head_dim, &heads))
    }
}

/// A tensor's numbers on the host, from its first one on.
fn numbers<'a, T: WithDType>((storage, layout): &'a (StorageRef<'_>, &Layout)) -> candle_core::Result<&'a [T]> {
    match &**storage {
        Storage::Cpu(storage) => Ok(&T::cpu_storage_as_slice(storage)?[layout.start_offset()..]),
        _ => candle_core::bail!("rows of a ragged head are on another device than the queries"),
    }
}
