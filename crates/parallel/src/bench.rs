//! Measures how fast the ranks' devices exchange.

use burn::tensor::Device;
use switchyard_comm::bench::{MeasuredDevice, Measurement, collectives_on_devices};
use switchyard_comm::{CommError, Communicator, DeviceSlice, DeviceStream, ElementType};
use switchyard_kernels::{DeviceFormat, DeviceMark, DeviceValues, device_zeros};

use crate::on_devices::{WorldError, devices_of, slice, stream};

/// The device's time for `work`, in seconds; all that it was asked for before is done then as well.
///
/// # Collective
/// Over `world`, which waits for the device.
///
/// # Errors
/// What `work` returns, and what the ranks meet while they wait.
pub fn device_time(
    world: &dyn Communicator,
    device: &Device,
    work: impl FnOnce() -> Result<(), CommError>,
) -> Result<f64, CommError> {
    let wait = |mark: &DeviceMark| world.wait_for("measured work", &mut || mark.is_past());
    wait(&DeviceMark::after(device))?;
    let before = DeviceMark::after(device);
    work()?;
    let after = DeviceMark::after(device);
    wait(&after)?;
    Ok(after.seconds_since(&before))
}

/// Measures sums, all-to-alls and all-gathers of `bytes` of bf16 and f32 between the ranks' devices, `rounds` times
/// each, on GPUs beside NCCL itself; nothing where the ranks have main memory alone.
///
/// # Collective
/// Over `world`, which is one of ranks that compute on `device`.
///
/// # Errors
/// [`WorldError`].
pub fn measure_collectives(
    world: &dyn Communicator,
    device: &Device,
    bytes: &[usize],
    rounds: usize,
) -> Result<Option<Vec<Measurement>>, WorldError> {
    let (Some(_), Some(devices)) = (world.on_devices(), devices_of(device)?) else { return Ok(None) };
    let mut measured = Measured { world, device, kept: Vec::new() };
    Ok(Some(collectives_on_devices(world, &devices, &mut measured, bytes, rounds)?))
}

struct Measured<'a> {
    world: &'a dyn Communicator,
    device: &'a Device,
    kept: Vec<DeviceValues>,
}

impl MeasuredDevice for Measured<'_> {
    fn zeros(&mut self, element: ElementType, len: usize) -> DeviceSlice {
        let format = match element {
            ElementType::F32 => DeviceFormat::F32,
            ElementType::Bf16 => DeviceFormat::Bf16,
            other => unreachable!("{other:?} is no format of activations"),
        };
        let values = device_zeros(self.device, len, format).expect("ranks with devices have memory there");
        let zeros = slice(&values);
        self.kept.push(values);
        zeros
    }

    fn stream(&self) -> DeviceStream {
        stream(self.kept.last().expect("asked for after memory"))
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<(), CommError>) -> Result<f64, CommError> {
        device_time(self.world, self.device, work)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use switchyard_comm::threads;
    use switchyard_kernels::test_device;

    use super::*;
    use crate::world_on;

    #[test]
    fn every_size_and_format_is_measured_where_libtorch_has_memory() {
        let ranks = threads(2, Duration::from_secs(60)).into_iter().map(|world| {
            thread::spawn(move || {
                let device = test_device();
                let world = world_on(world, &device).unwrap();
                measure_collectives(&*world, &device, &[6, 4096], 2).unwrap()
            })
        });
        let ranks: Vec<_> = ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect();
        assert_eq!(ranks[0], ranks[1]);
        let has_devices = devices_of(&test_device()).unwrap().is_some();
        assert_eq!(ranks[0].is_some(), has_devices);
        let rows = ranks[0].iter().flatten();
        let found: Vec<_> = rows.map(|row| (row.operation, row.element, row.bytes)).collect();
        let sizes = [(ElementType::Bf16, [8, 4096]), (ElementType::F32, [8, 4096])];
        let of = |(element, sizes): (ElementType, [usize; 2])| {
            sizes.into_iter().flat_map(move |bytes| {
                ["all_reduce", "all_to_all", "all_gather"].map(|operation| (operation, element, bytes))
            })
        };
        let expected: Vec<_> = sizes.into_iter().filter(|_| has_devices).flat_map(of).collect();
        assert_eq!(found, expected);
        assert!(ranks[0].iter().flatten().all(|row| row.seconds > 0.0));
    }
}
