//! What can go wrong between here and the device.

use std::path::PathBuf;

/// Why the device could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver's library is not on this machine.
    #[error(
        "no NVIDIA driver: libcuda.so.1 could not be loaded; install the driver, or train with --device cpu"
    )]
    NoDriver,

    /// The driver is there, devices are not, or not that many.
    #[error("no CUDA device {ordinal}: the driver sees {count}; check nvidia-smi and CUDA_VISIBLE_DEVICES")]
    NoDevice {
        /// The device that was asked for.
        ordinal: usize,
        /// Devices that the driver sees.
        count: usize,
    },

    /// The device is too old for the kernels.
    #[error("{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer")]
    Capability {
        /// The device's name.
        name: String,
        /// Its capability.
        major: i32,
        /// Its capability.
        minor: i32,
    },

    /// NVRTC, which compiles the kernels, was not found.
    #[error(
        "libnvrtc.so.13 could not be loaded: install `nvidia-cuda-nvrtc` (PyPI) or the CUDA toolkit and name \
         the directory of the library in LD_LIBRARY_PATH, or compile the kernels ahead on another machine"
    )]
    NoCompiler,

    /// A kernel does not compile.
    #[error("kernels/{source_name}.cu does not compile for {architecture}:\n{log}")]
    Compile {
        /// The source.
        source_name: &'static str,
        /// The device's architecture, such as `sm_90a`.
        architecture: String,
        /// What the compiler says.
        log: String,
    },

    /// A call to the driver failed.
    #[error("CUDA: {doing}: {source}")]
    Driver {
        /// What was being done.
        doing: String,
        /// What the driver says.
        source: cudarc::driver::DriverError,
    },

    /// cuBLASLt, which multiplies matrices, was not found.
    #[error(
        "libcublasLt.so.13 could not be loaded: name the directory of LibTorch's or of the CUDA toolkit's in \
         LD_LIBRARY_PATH"
    )]
    NoBlas,

    /// A call to cuBLASLt failed.
    #[error("cuBLASLt: {doing}: {source}")]
    Blas {
        /// What was being done.
        doing: &'static str,
        /// What the library says.
        source: cudarc::cublaslt::result::CublasError,
    },

    /// An operation was asked for sizes that its kernels do not have.
    #[error("{operation} on CUDA: {reason}")]
    Size {
        /// The operation.
        operation: &'static str,
        /// Which size, and what would do.
        reason: String,
    },

    /// Compiled kernels or the choice of an algorithm could not be kept.
    #[error("{}: what is kept of kernels could not be written: {source}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}
