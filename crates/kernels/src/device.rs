//! Devices by their names.

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
                device(&format!("cuda:{index}")).and_then(|_| Ok(crate::torch::gpu(index)?.describe()?));
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

/// The device called `name`: `cpu`, or in builds with LibTorch also `libtorch`, its CPU device, `cuda` and
/// `cuda:N`.
///
/// # Errors
/// When this build or this machine does not have it.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
    match (kind, index.parse::<usize>()) {
        ("cpu", Ok(0)) => Ok(Device::flex()),
        #[cfg(feature = "libtorch")]
        ("libtorch", Ok(0)) => Ok(Device::libtorch()),
        #[cfg(feature = "libtorch")]
        ("cuda", Ok(index)) => {
            crate::torch::gpu(index)?;
            if !tch::Cuda::is_available() {
                return Err(DeviceError::TorchWithoutCuda);
            }
            Ok(Device::libtorch_cuda(index))
        }
        #[cfg(not(feature = "libtorch"))]
        ("libtorch" | "cuda", Ok(_)) => Err(DeviceError::NotInThisBuild(name.to_owned())),
        _ => Err(DeviceError::Unknown(name.to_owned())),
    }
}

/// Where this crate's tests compute: what `SWITCHYARD_TEST_DEVICE` names, else the CPU.
#[cfg(test)]
pub(crate) fn test_device() -> Device {
    let name = std::env::var("SWITCHYARD_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    device(&name).unwrap_or_else(|error| panic!("SWITCHYARD_TEST_DEVICE: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_devices_or_errors_that_list_them() {
        assert!(device("cpu").is_ok());
        for name in ["gpu", "", "cpu:1", "cuda:x", "cuda:-1"] {
            let error = device(name).unwrap_err().to_string();
            assert!(error.contains("none of `cpu`"), "{name}: {error}");
        }
    }

    #[cfg(not(feature = "libtorch"))]
    #[test]
    fn what_another_build_has_is_said() {
        for name in ["libtorch", "cuda", "cuda:3"] {
            let error = device(name).unwrap_err().to_string();
            assert!(error.contains("--features switchyard-cli/libtorch"), "{name}: {error}");
        }
    }
}
