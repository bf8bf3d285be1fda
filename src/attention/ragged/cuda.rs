//! Launches the kernels in `kernels/` on an NVIDIA GPU.
//!
//! `nvcc` compiles them to PTX when the program is built: it is there anyway, for candle's own kernels, and users need no
//! compiler. The driver makes machine code of a storage format's module the first time that it is used, and keeps it.
//!
//! Not for: deciding sizes (see [`super::launch`]).

use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg, SyncOnDrop,
};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaStorage, Layout, Shape, Storage, StorageRef};

use super::Attend;
use super::launch::{Arguments, Buffers, Format, Plan, THREADS};

mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ragged_ptx.rs"));
}

/// Blocks wanted of a launch, for each multiprocessor: enough to hide the latency of memory, whatever the lengths.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;

// SAFETY: plain numbers in C's layout, without padding that anybody reads.
unsafe impl DeviceRepr for Arguments {}

/// See [`super::RaggedRows::attend`].
///
/// * `queries`: contiguous
pub(super) fn attend(
    op: &Attend<'_>,
    queries: &CudaStorage,
    layout: &Layout,
) -> candle_core::Result<(CudaStorage, Shape)> {
    let numbers = layout.shape().elem_count();
    let device = &queries.device;
    // SAFETY: the kernel writes every number of the output.
    let slice = unsafe {
        match op.work.query_format {
            Format::F32 => {
                let mut out = device.alloc::<f32>(numbers)?;
                launch(op, queries, layout, &mut out)?;
                CudaStorageSlice::F32(out)
            }
            Format::F16 => {
                let mut out = device.alloc::<half::f16>(numbers)?;
                launch(op, queries, layout, &mut out)?;
                CudaStorageSlice::F16(out)
            }
            Format::BF16 => {
                let mut out = device.alloc::<half::bf16>(numbers)?;
                launch(op, queries, layout, &mut out)?;
                CudaStorageSlice::BF16(out)
            }
        }
    };
    Ok((CudaStorage { slice, device: device.clone() }, layout.shape().clone()))
}

fn launch<T>(
    op: &Attend<'_>,
    queries: &CudaStorage,
    layout: &Layout,
    out: &mut CudaSlice<T>,
) -> candle_core::Result<()> {
    let device = &queries.device;
    let stream = device.cuda_stream();
    let multiprocessors = stream.context().attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).w()?;
    let multiprocessors = usize::try_from(multiprocessors).unwrap_or(1);
    let plan = Plan::new(&op.work, BLOCKS_PER_MULTIPROCESSOR * multiprocessors);
    let ptx = match op.work.format {
        Format::F32 => ptx::RAGGED_DECODE_F32,
        Format::F16 => ptx::RAGGED_DECODE_F16,
        Format::BF16 => ptx::RAGGED_DECODE_BF16,
    };
    let module = format!("adaptive-kvcache-ragged-decode-{}", op.work.format.name());
    let kernel = device.get_or_load_custom_func(&plan.kernel, &module, ptx)?;
    // SAFETY: what the merging block reads of them has been written by the others, here and below.
    let mut partial_sums = unsafe { device.alloc::<f32>(plan.partial_sums)? };
    // SAFETY: as above.
    let mut partial_stats = unsafe { device.alloc::<f32>(plan.partial_stats)? };

    let kept = op.rows.kept.as_ref();
    let kept_keys = kept.map(|(keys, _)| keys.storage_and_layout());
    let kept_values = kept.map(|(_, values)| values.storage_and_layout());
    let tail_keys = op.tail.map(|(keys, _)| keys.storage_and_layout());
    let tail_values = op.tail.map(|(_, values)| values.storage_and_layout());
    let (slots, counters) = (op.rows.device_slots.storage_and_layout(), op.rows.counters.storage_and_layout());
    let (queries, _queries) = address(queries, layout, &stream)?;
    let (kept_keys, _kept_keys) = optional_address(kept_keys.as_ref(), &stream)?;
    let (kept_values, _kept_values) = optional_address(kept_values.as_ref(), &stream)?;
    let (tail_keys, _tail_keys) = optional_address(tail_keys.as_ref(), &stream)?;
    let (tail_values, _tail_values) = optional_address(tail_values.as_ref(), &stream)?;
    let (slots, _slots) = optional_address(Some(&slots), &stream)?;
    let (counters, _counters) = optional_address(Some(&counters), &stream)?;
    let (out, _out) = out.device_ptr_mut(&stream);
    let (partial_sums, _partial_sums) = partial_sums.device_ptr_mut(&stream);
    let (partial_stats, _partial_stats) = partial_stats.device_ptr_mut(&stream);
    let buffers = Buffers {
        queries,
        kept_keys,
        kept_values,
        slots,
        tail_keys,
        tail_values,
        out,
        partial_sums,
        partial_stats,
        counters,
    };
    let arguments = Arguments::new(&op.work, &plan, buffers).map_err(candle_core::Error::wrap)?;
    let (ranges, heads) = plan.grid(&op.work).map_err(candle_core::Error::wrap)?;
    let config = LaunchConfig { grid_dim: (ranges, heads, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
    let mut builder = kernel.builder();
    builder.arg(&arguments);
    // SAFETY: `Arguments` is what the kernel takes, its buffers have the sizes of the plan and live until the end of this
    // function, or longer in the order of the stream. Counters are used by one launch at a time, as a device has one stream.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// Where a tensor begins; 0 for none, which the kernel does not read.
fn optional_address<'a>(
    tensor: Option<&'a (StorageRef<'_>, &Layout)>,
    stream: &'a CudaStream,
) -> candle_core::Result<(u64, Option<SyncOnDrop<'a>>)> {
    let Some((storage, layout)) = tensor else { return Ok((0, None)) };
    let Storage::Cuda(storage) = &**storage else {
        candle_core::bail!("rows of a ragged head are on another device than the queries")
    };
    let (address, guard) = address(storage, layout, stream)?;
    Ok((address, Some(guard)))
}

/// Where a tensor begins, and what records that it was used.
fn address<'a>(
    storage: &'a CudaStorage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> candle_core::Result<(u64, SyncOnDrop<'a>)> {
    fn of<'a, T>(slice: &'a CudaSlice<T>, first: usize, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        let (address, guard) = slice.device_ptr(stream);
        (address + (first * size_of::<T>()) as u64, guard)
    }
    let first = layout.start_offset();
    Ok(match &storage.slice {
        CudaStorageSlice::F32(slice) => of(slice, first, stream),
        CudaStorageSlice::F16(slice) => of(slice, first, stream),
        CudaStorageSlice::BF16(slice) => of(slice, first, stream),
        CudaStorageSlice::U32(slice) => of(slice, first, stream),
        _ => candle_core::bail!("ragged attention takes f32, f16 and bf16"),
    })
}
