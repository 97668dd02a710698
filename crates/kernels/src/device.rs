//! Devices by their names.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;
#[cfg(feature = "libtorch")]
use switchyard_cuda::CudaError;

/// Why there is no device of a name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// This build has the CPU only.
    #[error(
        "this build computes on `cpu` only, not on `{0}`; for GPUs build with \
         `--features switchyard-cli/libtorch`, see docs/gpu.md"
    )]
    NotInThisBuild(String),

    /// No device has that name.
    #[error("`{0}` is none of `cpu`, `libtorch`, `cuda` and `cuda:N`")]
    Unknown(String),

    /// The GPU cannot be used.
    #[cfg(feature = "libtorch")]
    #[error(transparent)]
    Gpu(#[from] CudaError),

    /// LibTorch was built without CUDA, or does not find the driver that is there.
    #[cfg(feature = "libtorch")]
    #[error(
        "there is a GPU, but this LibTorch does not see it: it was built for CPUs, or for a newer driver; \
         launch/install-libtorch.sh installs one with CUDA"
    )]
    TorchWithoutCuda,

    /// LibTorch keeps its own mind about TF32.
    #[cfg(feature = "libtorch")]
    #[error(
        "this LibTorch does not take precision.allow_tf32; does a TORCH_ variable of the environment set it?"
    )]
    Tf32,
}

/// What `--device` may name here, each with what it is or why it cannot be used.
pub fn devices() -> Vec<(String, Result<String, DeviceError>)> {
    let mut devices = vec![("cpu".to_owned(), Ok("kernels in Rust".to_owned()))];
    #[cfg(not(feature = "libtorch"))]
    devices.push(("cuda".to_owned(), Err(DeviceError::NotInThisBuild("cuda".to_owned()))));
    #[cfg(feature = "libtorch")]
    {
        devices.push(("libtorch".to_owned(), Ok("LibTorch's CPU device".to_owned())));
        for index in 0.. {
            let described =
                DeviceName::CudaNumber(index).open().and_then(|_| Ok(crate::torch::gpu(index)?.describe()?));
            let none_there =
                matches!(&described, Err(DeviceError::Gpu(CudaError::NoDevice { .. }))) && index > 0;
            if none_there {
                break;
            }
            let ends = described.is_err();
            devices.push((format!("cuda:{index}"), described));
            if ends {
                break;
            }
        }
    }
    devices
}

/// What `--device` may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// `cpu`.
    Cpu,
    /// `libtorch`: LibTorch's CPU device.
    LibTorch,
    /// `cuda`: the GPU of this process, the first if it is alone.
    Cuda,
    /// `cuda:N`.
    CudaNumber(usize),
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::LibTorch => f.write_str("libtorch"),
            Self::Cuda => f.write_str("cuda"),
            Self::CudaNumber(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = DeviceError;

    /// Whether the device is there is not looked for yet.
    fn from_str(name: &str) -> Result<Self, DeviceError> {
        let found = match name.split_once(':').map(|(kind, number)| (kind, number.parse::<usize>())) {
            None if name == "cpu" => Self::Cpu,
            None if name == "libtorch" => Self::LibTorch,
            None if name == "cuda" => Self::Cuda,
            Some(("cuda", Ok(number))) => Self::CudaNumber(number),
            _ => return Err(DeviceError::Unknown(name.to_owned())),
        };
        if found == Self::Cpu || cfg!(feature = "libtorch") {
            Ok(found)
        } else {
            Err(DeviceError::NotInThisBuild(name.to_owned()))
        }
    }
}

impl DeviceName {
    /// The device.
    ///
    /// # Errors
    /// When this build or this machine does not have it.
    pub fn open(self) -> Result<Device, DeviceError> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "libtorch")]
            Self::LibTorch => Ok(Device::libtorch()),
            #[cfg(feature = "libtorch")]
            Self::Cuda => Self::CudaNumber(0).open(),
            #[cfg(feature = "libtorch")]
            Self::CudaNumber(number) => {
                crate::torch::gpu(number)?;
                if !tch::Cuda::is_available() {
                    return Err(DeviceError::TorchWithoutCuda);
                }
                // Float32 is float32 unless a run says otherwise, whatever the environment has told LibTorch.
                static TOLD: std::sync::Once = std::sync::Once::new();
                let mut told = Ok(());
                TOLD.call_once(|| told = allow_tf32(false));
                told?;
                Ok(Device::libtorch_cuda(number))
            }
            #[cfg(not(feature = "libtorch"))]
            name => Err(DeviceError::NotInThisBuild(name.to_string())),
        }
    }
}

/// GPUs that this process sees.
///
/// # Errors
/// When there is no driver for them, or this build has no use for them.
pub fn gpus() -> Result<usize, DeviceError> {
    #[cfg(feature = "libtorch")]
    return Ok(switchyard_cuda::Gpu::count()?);
    #[cfg(not(feature = "libtorch"))]
    Err(DeviceError::NotInThisBuild(DeviceName::Cuda.to_string()))
}

/// Makes a GPU that of the calling thread, as libraries ask for that work on a thread's GPU; other devices need
/// nothing.
///
/// # Errors
/// When the GPU cannot be used.
pub fn bind_device(device: &Device) -> Result<(), DeviceError> {
    #[cfg(feature = "libtorch")]
    if let Place::Gpu(number) = place_of(device) {
        crate::torch::gpu(number)?.bind()?;
    }
    let _ = device;
    Ok(())
}

/// Whose memory a device's tensors lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Main memory.
    Host,
    /// Main memory as LibTorch has it.
    LibTorch,
    /// That of the GPU with this number.
    Gpu(usize),
}

/// Where the tensors of a device lie.
pub fn place_of(device: &Device) -> Place {
    #[cfg(feature = "libtorch")]
    match crate::torch::place(device) {
        Some(tch::Device::Cuda(index)) => return Place::Gpu(index),
        Some(_) => return Place::LibTorch,
        None => {}
    }
    let _ = device;
    Place::Host
}

/// A device's memory as LibTorch counts it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What tensors occupy now.
    pub allocated: u64,
    /// The most that they have occupied so far.
    pub peak_allocated: u64,
    /// The most that LibTorch has held for them, what lay free between them included. The driver's context and
    /// compiled kernels are not in it.
    pub peak_reserved: u64,
}

/// What tensors of this process occupy on a GPU; `None` for other devices, on which tensors are not counted.
pub fn device_memory(device: &Device) -> Option<DeviceMemory> {
    #[cfg(feature = "libtorch")]
    return crate::torch::settings::device_memory(crate::torch::place(device)?);
    #[cfg(not(feature = "libtorch"))]
    {
        let _ = device;
        None
    }
}

/// Whether float32 matrix products on GPUs may round their factors to TF32, for the whole process; devices
/// without TF32 take no notice. Not allowed until this allows it.
///
/// # Errors
/// When LibTorch does not do as it is told.
pub fn allow_tf32(allow: bool) -> Result<(), DeviceError> {
    #[cfg(feature = "libtorch")]
    if !crate::torch::settings::allow_tf32(allow) {
        return Err(DeviceError::Tf32);
    }
    let _ = allow;
    Ok(())
}

/// Where tests compute: what `SWITCHYARD_TEST_DEVICE` names, else LibTorch's CPU device in builds that have it,
/// else the CPU.
///
/// # Panics
/// When that device is not there.
#[doc(hidden)]
pub fn test_device() -> Device {
    let default = if cfg!(feature = "libtorch") { "libtorch" } else { "cpu" };
    let name = std::env::var("SWITCHYARD_TEST_DEVICE").unwrap_or_else(|_| default.to_owned());
    let device = name.parse().and_then(DeviceName::open);
    device.unwrap_or_else(|error| panic!("SWITCHYARD_TEST_DEVICE: {error}"))
}

/// How panics begin that come from a GPU: operations inside automatic differentiation cannot return errors.
pub(crate) const GPU_FAILED: &str = "the GPU failed: ";

/// One line for the user if a panic with this text comes from a GPU and not from a fault of the program.
pub fn gpu_failure(panic: &str) -> Option<String> {
    let of_torch = || panic.split_once("Torch(\"").map(|(_, error)| error);
    let error = panic.strip_prefix(GPU_FAILED).or_else(of_torch)?;
    let line = error.split('\n').next()?.split("\\n").next()?.trim_end_matches("\")");
    let memory = line.contains("out of memory");
    if !(panic.starts_with(GPU_FAILED) || memory || line.contains("CUDA") || line.contains("CUBLAS")) {
        return None;
    }
    // What follows is advice for PyTorch's own settings.
    let said = line.split(" Of the allocated memory").next()?.trim_end_matches('.');
    let mend = "; lower data.micro_batch_rows, or set trainer.recompute_activations = true";
    Some(format!("{GPU_FAILED}{said}{}", if memory { mend } else { "" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_devices_or_errors_that_list_them() {
        assert!(DeviceName::Cpu.open().is_ok());
        for name in ["gpu", "", "cpu:0", "cpu:1", "libtorch:0", "cuda:", "cuda:x", "cuda:-1"] {
            let error = name.parse::<DeviceName>().unwrap_err().to_string();
            assert!(error.contains("none of `cpu`"), "{name}: {error}");
        }
    }

    #[cfg(feature = "libtorch")]
    #[test]
    fn names_are_read_as_they_are_written() {
        for (text, name) in [
            ("cpu", DeviceName::Cpu),
            ("libtorch", DeviceName::LibTorch),
            ("cuda", DeviceName::Cuda),
            ("cuda:0", DeviceName::CudaNumber(0)),
            ("cuda:12", DeviceName::CudaNumber(12)),
        ] {
            assert_eq!(text.parse::<DeviceName>().unwrap(), name);
            assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn failures_of_a_gpu_are_told_from_faults_of_the_program() {
        let torch = |text: &str| format!("called `Result::unwrap()` on an `Err` value: Torch(\"{text}\")");
        let full =
            "CUDA out of memory. Tried to allocate 1 GiB. Of the allocated memory much\\nframe #0: c10";
        let said = gpu_failure(&torch(full)).unwrap();
        assert!(
            said.starts_with("the GPU failed: CUDA out of memory. Tried to allocate 1 GiB; lower"),
            "{said}"
        );
        let said = gpu_failure(&format!("{GPU_FAILED}CUDA: counting devices: unknown")).unwrap();
        assert_eq!(said, "the GPU failed: CUDA: counting devices: unknown");
        for fault in [torch("shapes cannot be multiplied"), "index out of bounds".to_owned(), String::new()] {
            assert_eq!(gpu_failure(&fault), None);
        }
    }

    #[cfg(not(feature = "libtorch"))]
    #[test]
    fn what_another_build_has_is_said() {
        for name in ["libtorch", "cuda", "cuda:3"] {
            let error = name.parse::<DeviceName>().unwrap_err().to_string();
            assert!(error.contains("--features switchyard-cli/libtorch"), "{name}: {error}");
        }
    }
}
