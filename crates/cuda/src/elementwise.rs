//! Sums and conversions of whole buffers.

use crate::address::{Address, Format};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::size::count;
use crate::source::ELEMENTWISE;

/// Values that a block handles: 256 threads, two pieces of 8 each.
const BLOCK_VALUES: usize = 256 * 2 * 8;

fn grid(operation: &'static str, len: usize) -> Result<Grid, CudaError> {
    Ok(Grid::new(count(operation, "blocks of 4096 values", len.div_ceil(BLOCK_VALUES))?, 256))
}

/// Writes `a + b` to `out`, which may be one of them. `[len]`
///
/// # Errors
/// [`CudaError::Size`] for more values than a launch can have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn add(
    queue: Queue<'_>,
    a: Address,
    b: Address,
    out: Address,
    len: usize,
    format: Format,
) -> Result<(), CudaError> {
    if len == 0 {
        return Ok(());
    }
    let args = [a.into(), b.into(), out.into(), (len as u64).into()];
    let name = format!("add_{}", format.suffix());
    // SAFETY: the arguments are those of the kernel in `elementwise.cu`; the addresses are promised by the
    // caller.
    unsafe { queue.gpu.launch(&ELEMENTWISE, &name, grid("add", len)?, queue.stream, &args) }
}

/// Writes `from`, float32, to `to`, bfloat16, rounded to nearest. `[len]`
///
/// # Errors
/// [`CudaError::Size`] for more values than a launch can have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn narrow(queue: Queue<'_>, from: Address, to: Address, len: usize) -> Result<(), CudaError> {
    // SAFETY: passed on.
    unsafe { convert(queue, "convert_f32_bf16", from, to, len) }
}

/// Writes `from`, bfloat16, to `to`, float32. `[len]`
///
/// # Errors
/// [`CudaError::Size`] for more values than a launch can have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn widen(queue: Queue<'_>, from: Address, to: Address, len: usize) -> Result<(), CudaError> {
    // SAFETY: passed on.
    unsafe { convert(queue, "convert_bf16_f32", from, to, len) }
}

unsafe fn convert(
    queue: Queue<'_>,
    name: &str,
    from: Address,
    to: Address,
    len: usize,
) -> Result<(), CudaError> {
    if len == 0 {
        return Ok(());
    }
    let args = [from.into(), to.into(), (len as u64).into()];
    // SAFETY: as in `add`.
    unsafe { queue.gpu.launch(&ELEMENTWISE, name, grid("convert", len)?, queue.stream, &args) }
}
