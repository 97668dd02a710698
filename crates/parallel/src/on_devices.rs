//! Values where LibTorch has them, as collectives on devices take them.

use std::sync::Arc;

use burn::tensor::Device;
use switchyard_comm::{
    CommError, Communicator, DeviceSlice, DeviceStream, Devices, DevicesError, ElementType, with_devices,
};
use switchyard_kernels::{DeviceFormat, DeviceValues, Place, bind_device, place_of};

/// Ranks that cannot exchange what is on their devices.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorldError {
    /// Not from this machine, or with this build.
    #[error("{0}")]
    Devices(#[from] DevicesError),
    /// They do not meet.
    #[error("{0}")]
    Comm(#[from] CommError),
}

/// Through what several ranks that compute on `device` exchange what lies there: LibTorch's CPU device has main
/// memory, GPUs have NCCL. `None` for those that exchange slices of main memory in any case.
///
/// # Errors
/// [`DevicesError`] for GPUs without NCCL.
pub fn devices_of(device: &Device) -> Result<Option<Devices>, DevicesError> {
    match place_of(device) {
        Place::Host => Ok(None),
        Place::LibTorch => Ok(Some(Devices::MainMemory)),
        Place::Gpu(_) => {
            let device = device.clone();
            let bind = move || bind_device(&device).map_err(|error| error.to_string());
            Devices::gpus(Arc::new(bind)).map(Some)
        }
    }
}

/// `world` for ranks that compute on `device`, each on its own if it is a GPU. Alone a rank needs nothing.
///
/// # Collective
/// Over `world`; all ranks compute on devices of one kind.
///
/// # Errors
/// When the ranks cannot.
pub fn world_on(world: Arc<dyn Communicator>, device: &Device) -> Result<Arc<dyn Communicator>, WorldError> {
    if world.size() == 1 {
        return Ok(world);
    }
    match devices_of(device)? {
        Some(devices) => Ok(with_devices(world, &devices)?),
        None => Ok(world),
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
    // SAFETY: the values own their memory. LibTorch gives it to others in the order of the stream it was asked for on;
    // work beside that keeps the values until that stream waits for it. Nobody else writes to values that an
    // operation has not handed on yet.
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
