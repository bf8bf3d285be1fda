//! Devices: which one to compute on, in which numbers, and how much of its memory is taken.
//!
//! Indices of CUDA devices are the driver's, so `CUDA_VISIBLE_DEVICES` hides and reorders them as everywhere.
//!
//! Not for: computing (see [`crate::ops`]).

use std::str::FromStr;

use candle_core::{DType, Device};

use crate::error::{Error, Result};

/// The device that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU that this build supports, or the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index.
    Cuda(usize),
    /// The first Metal device.
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let index = text.strip_prefix("cuda:").and_then(|index| index.parse().ok());
        match (text, index) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            ("metal", _) => Ok(Self::Metal),
            (_, Some(index)) => Ok(Self::Cuda(index)),
            _ => {
                let error = Error::input(format!("unknown device `{text}`"));
                Err(error.with_hint("expected auto, cpu, cuda, cuda:N or metal"))
            }
        }
    }
}

impl DeviceChoice {
    /// Opens the device.
    ///
    /// Also returns why it is the CPU, if a GPU was looked for and could not be opened.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if this build knows no such device, or it cannot be opened; never for `Auto`.
    pub fn open(self) -> Result<(Device, Option<String>)> {
        match self {
            Self::Cpu => Ok((Device::Cpu, None)),
            Self::Cuda(index) => {
                let name = if index == 0 { "cuda".to_owned() } else { format!("cuda:{index}") };
                built_with(cfg!(feature = "cuda"), &name, "cuda")?;
                Ok((Device::new_cuda(index).map_err(|source| refused(&name, &source))?, None))
            }
            Self::Metal => {
                built_with(cfg!(feature = "metal"), "metal", "metal")?;
                Ok((Device::new_metal(0).map_err(|source| refused("metal", &source))?, None))
            }
            Self::Auto => {
                let gpu = if cfg!(feature = "cuda") {
                    Self::Cuda(0)
                } else if cfg!(feature = "metal") {
                    Self::Metal
                } else {
                    return Ok((Device::Cpu, None));
                };
                Ok(or_cpu(gpu.open()))
            }
        }
    }
}

/// Whatever keeps a GPU from being used, there is always the CPU: with the reason, in one line.
fn or_cpu(gpu: Result<(Device, Option<String>)>) -> (Device, Option<String>) {
    gpu.unwrap_or_else(|error| (Device::Cpu, Some(error.to_string())))
}

fn built_with(is_built: bool, device: &str, feature: &str) -> Result<()> {
    if is_built {
        return Ok(());
    }
    let error = Error::unsupported(format!("device `{device}` in this build"));
    Err(error.with_hint(format!("build with --features {feature}, or use --device cpu")))
}

fn refused(device: &str, source: &candle_core::Error) -> Error {
    // The first line: candle appends a backtrace where there is one.
    let reason = source.to_string();
    let reason = reason.lines().next().unwrap_or_default();
    Error::unsupported(format!("device `{device}`, which cannot be opened ({reason}),"))
        .with_hint("look at its driver and at CUDA_VISIBLE_DEVICES, or use --device cpu")
}

/// The name in reports, as `--device` takes it.
#[must_use]
pub fn name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".to_owned(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { .. } => "metal".to_owned(),
    }
}

/// In which numbers weights that are floats are held on a device if nothing else is asked for: bf16 on CUDA from compute
/// capability 8.0 on, which computes with it, and f16 below and on Metal; f32 on the CPU.
///
/// # Errors
/// [`Error::Unsupported`] if the driver does not tell.
pub fn float_dtype(device: &Device) -> Result<DType> {
    match device {
        Device::Cpu => Ok(DType::F32),
        Device::Metal(_) => Ok(DType::F16),
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            let (major, _) = cuda.cuda_stream().context().compute_capability().map_err(|error| {
                Error::unsupported(format!("a CUDA device whose driver tells no compute capability ({error})"))
                    .with_hint("name the numbers with --dtype")
            })?;
            Ok(if major >= 8 { DType::BF16 } else { DType::F16 })
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => Err(Error::unsupported("a CUDA device in this build")),
    }
}

/// Memory of a device, as its driver counts it: that of all processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes that are taken.
    pub used: usize,
    /// Bytes that there are.
    pub total: usize,
}

/// Reads a device's memory; `None` for the CPU, and where the driver does not tell.
///
/// Waits for what the device is computing: only then has its driver back what was freed.
#[must_use]
pub fn memory(device: &Device) -> Option<DeviceMemory> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => {
            device.synchronize().ok()?;
            let (free, total) = cuda.cuda_stream().context().mem_get_info().ok()?;
            Some(DeviceMemory { used: total - free, total })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_by_name() {
        let parse = |text: &str| text.parse::<DeviceChoice>().ok();
        assert_eq!(parse("auto"), Some(DeviceChoice::Auto));
        assert_eq!(parse("cpu"), Some(DeviceChoice::Cpu));
        assert_eq!(parse("cuda"), Some(DeviceChoice::Cuda(0)));
        assert_eq!(parse("cuda:3"), Some(DeviceChoice::Cuda(3)));
        assert_eq!(parse("metal"), Some(DeviceChoice::Metal));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "metal:0", "CUDA"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_cpu_is_always_there() {
        let (device, note) = DeviceChoice::Cpu.open().unwrap();
        assert_eq!((name(&device), note), ("cpu".to_owned(), None));
        assert_eq!(float_dtype(&device).unwrap(), DType::F32);
        assert_eq!(memory(&device), None);
        DeviceChoice::Auto.open().unwrap();
    }

    #[test]
    fn a_gpu_that_cannot_be_opened_leaves_the_cpu_and_one_line() {
        let source = candle_core::Error::Msg("no device\n  0: a backtrace".to_owned());
        let (device, note) = or_cpu(Err(refused("cuda", &source)));
        assert_eq!(name(&device), "cpu");
        let expected = "device `cuda`, which cannot be opened (no device), is not supported";
        assert_eq!(note.as_deref(), Some(expected));
        assert_eq!(or_cpu(Ok((Device::Cpu, None))).1, None);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_device_of_another_build_is_refused_by_its_feature() {
        let error = DeviceChoice::Cuda(0).open().unwrap_err();
        assert_eq!(error.to_string(), "device `cuda` in this build is not supported");
        assert!(error.hint().unwrap().contains("--features cuda"), "{error:?}");
    }
}
