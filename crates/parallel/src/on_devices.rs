//! Values where LibTorch has them, as collectives on devices take them.

use switchyard_comm::{DeviceSlice, DeviceStream, ElementType};
use switchyard_kernels::{DeviceFormat, DeviceValues};

/// The values, for the work of their [`stream`].
pub(crate) fn slice(values: &DeviceValues) -> DeviceSlice {
    let element = match values.format() {
        DeviceFormat::F32 => ElementType::F32,
        DeviceFormat::Bf16 => ElementType::Bf16,
        DeviceFormat::I32 => ElementType::I32,
    };
    // SAFETY: the values own their memory. LibTorch gives it to others in the order of the stream, and nobody
    // else writes to values that an operation has not handed on yet.
    unsafe { DeviceSlice::from_raw_parts(values.address(), values.len(), element) }
}

/// The stream of work on the values.
pub(crate) fn stream(values: &DeviceValues) -> DeviceStream {
    DeviceStream(values.stream())
}
