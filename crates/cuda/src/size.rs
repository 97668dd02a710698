//! Sizes that kernels can do with.

use crate::address::Format;
use crate::error::CudaError;

/// Values of 16 bytes, if `size` is a multiple of that.
pub(crate) fn lanes(
    operation: &'static str,
    what: &str,
    size: usize,
    format: Format,
) -> Result<usize, CudaError> {
    let lanes = 16 / format.bytes();
    if size.is_multiple_of(lanes) {
        return Ok(lanes);
    }
    let reason = format!("{what} is {size}; it must be a multiple of {lanes} in {}", format.suffix());
    Err(CudaError::Size { operation, reason })
}

/// `size` as kernels count.
pub(crate) fn count(operation: &'static str, what: &str, size: usize) -> Result<u32, CudaError> {
    // Half of what a `u32` holds, so that sums of two of them stay within it.
    u32::try_from(size).ok().filter(|&size| size <= i32::MAX as u32).ok_or_else(|| CudaError::Size {
        operation,
        reason: format!("{what} is {size}; it must be below 2^31"),
    })
}
