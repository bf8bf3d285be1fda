//! Where a model is computed, and by what.

use adaptive_kvcache::backend::BackendKind;
use adaptive_kvcache::device::DeviceChoice;
use adaptive_kvcache::kernels::quant::Compute;
use adaptive_kvcache::ops::Ops;
use adaptive_kvcache::{Error, Result};
use candle_core::Device;

use super::args::{BackendChoice, DeviceArgs};
use super::terminal::note;

/// Opens what the user asks for, and has the kernels use the instructions that the user asks for. If a GPU was looked for
/// in vain, one line on standard error says so.
///
/// # Errors
/// [`Error::Input`] for an unknown device, or if a kernel has run already with other instructions; as
/// [`DeviceChoice::open`]; [`Error::Unsupported`] for CPU kernels on another device than the CPU.
pub fn backend(args: &DeviceArgs) -> Result<BackendKind> {
    if let Some(set) = args.isa {
        set.use_everywhere()?;
    }
    let choice: DeviceChoice = args.device.parse()?;
    let kernels = BackendKind::Kernels(args.compute.map_or_else(Compute::default, Compute::from));
    if args.backend == BackendChoice::Kernels {
        return match choice {
            DeviceChoice::Auto | DeviceChoice::Cpu => Ok(kernels),
            DeviceChoice::Cuda(_) | DeviceChoice::Metal => {
                Err(Error::unsupported(format!("--backend kernels on device `{}`", args.device))
                    .with_hint("use --backend candle or auto, or --device cpu"))
            }
        };
    }
    let (device, fallback) = choice.open()?;
    if let Some(reason) = fallback {
        note(format_args!("computing on the CPU: {reason}"));
    }
    match device {
        Device::Cpu if args.backend == BackendChoice::Auto => Ok(kernels),
        _ if args.compute.is_some() => Err(Error::unsupported("--compute with candle operations".to_owned())
            .with_hint("leave it out, or compute with --backend kernels on the CPU")),
        device => Ok(BackendKind::Candle(Ops::new(device)?)),
    }
}
