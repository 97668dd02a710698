//! Values where LibTorch has them, as collectives on devices take them.

use std::sync::Arc;

use burn::tensor::Device;
use switchyard_comm::{
    CommError, Communicator, DeviceSlice, DeviceStream, Devices, ElementType, with_devices,
};
use switchyard_kernels::{DeviceFormat, DeviceValues, Place, place_of};

/// `world` for ranks that compute on `device`: those with LibTorch's CPU device exchange activations where it
/// has them, others through slices of main memory.
///
/// # Collective
/// Over `world`; all ranks compute on devices of one kind.
///
/// # Errors
/// When the ranks cannot.
pub fn world_on(world: Arc<dyn Communicator>, device: &Device) -> Result<Arc<dyn Communicator>, CommError> {
    match place_of(device) {
        Place::LibTorch => with_devices(world, &Devices::MainMemory),
        Place::Host | Place::Gpu(_) => Ok(world),
    }
}

/// The values, for the work of their [`stream`].
pub(crate) fn slice(values: &DeviceValues) -> DeviceSlice {
    let element = match values.format() {
        DeviceFormat::F32 => ElementType::F32,
        DeviceFormat::F64 => ElementType::F64,
        DeviceFormat::Bf16 => ElementType::Bf16,
        DeviceFormat::I32 => ElementType::I32,
    };
    // SAFETY: the values own their memory. LibTorch gives it to others in the order of the stream, and nobody
    // else writes to values that an operation has not handed on yet.
    unsafe { DeviceSlice::from_raw_parts(values.address(), values.len(), element) }
}

/// The stream of work on the values.
pub(crate) fn stream(values: &DeviceValues) -> DeviceStream {
    // SAFETY: LibTorch's streams live as long as the process.
    unsafe { DeviceStream::from_raw(values.stream()) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use switchyard_comm::threads;
    use switchyard_kernels::test_device;

    use super::*;

    #[test]
    fn ranks_with_libtorch_reach_its_memory() {
        let reached = place_of(&test_device()) == Place::LibTorch;
        for world in threads(2, Duration::from_secs(10)) {
            let world = world_on(world, &test_device()).expect("nobody is asked");
            assert_eq!(world.on_devices().is_some(), reached);
        }
    }
}
