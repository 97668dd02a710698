//! How far a device is with its work, and memory on it that belongs to no model.

use std::time::Instant;

use burn::tensor::Device;

use crate::DeviceValues;
use crate::host::DeviceFormat;

/// The end of what this thread has asked a device for until some time.
#[derive(Debug)]
pub struct DeviceMark {
    /// When it was asked for. Where there is no GPU, it was done then.
    asked: Instant,
    #[cfg(feature = "libtorch")]
    on_gpu: Option<switchyard_cuda::Mark>,
}

impl DeviceMark {
    /// Behind all that `device` has been asked for until now.
    ///
    /// # Panics
    /// When the GPU fails, as below.
    pub fn after(device: &Device) -> Self {
        #[cfg(feature = "libtorch")]
        let on_gpu = crate::torch::mark(device);
        let _ = device;
        Self {
            asked: Instant::now(),
            #[cfg(feature = "libtorch")]
            on_gpu,
        }
    }

    /// Behind all that this thread has asked for in main memory.
    pub(crate) fn of_host() -> Self {
        Self {
            asked: Instant::now(),
            #[cfg(feature = "libtorch")]
            on_gpu: None,
        }
    }

    /// A mark that a GPU has, if one has it.
    #[cfg(feature = "libtorch")]
    pub(crate) fn behind(on_gpu: Option<switchyard_cuda::Mark>) -> Self {
        Self { on_gpu, ..Self::of_host() }
    }

    /// Lets what this thread asks of the device of some values from here on wait until the mark is past; the host does
    /// not.
    pub fn holds(&self, values: &DeviceValues) {
        #[cfg(feature = "libtorch")]
        if let Some(mark) = &self.on_gpu {
            crate::torch::hold(mark, values);
        }
        let _ = values;
    }

    /// Whether the device has come past; does not wait.
    pub fn is_past(&self) -> bool {
        #[cfg(feature = "libtorch")]
        if let Some(mark) = &self.on_gpu {
            return crate::torch::started(mark.is_past());
        }
        true
    }

    /// Seconds that the device needed from `earlier`, a mark of its own, to here; both are past.
    pub fn seconds_since(&self, earlier: &Self) -> f64 {
        #[cfg(feature = "libtorch")]
        if let (Some(mark), Some(earlier)) = (&self.on_gpu, &earlier.on_gpu) {
            return crate::torch::started(mark.seconds_since(earlier));
        }
        self.asked.duration_since(earlier.asked).as_secs_f64()
    }
}

/// What is done beside other work; one kind does not wait for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SideKind {
    /// Gradients and new values travel.
    Exchange,
    /// Tokens travel to their experts and back.
    Tokens,
}

/// While it lives, what this thread asks of the device of some values is done beside what it had asked for before.
///
/// Values that were there before and are used meanwhile must live until other work has
/// [waited](DeviceMark::holds) for its end.
#[derive(Debug)]
#[must_use = "work goes beside other work while it lives"]
pub struct SideWork {
    #[cfg(feature = "libtorch")]
    on_gpu: Option<crate::torch::recording::SideStream>,
}

impl SideWork {
    /// Behind `mark` and earlier work of the same `kind`, where the values are. In main memory work is done when it
    /// is asked for.
    pub fn behind(mark: &DeviceMark, values: &DeviceValues, kind: SideKind) -> Self {
        #[cfg(feature = "libtorch")]
        let on_gpu = crate::torch::recording::SideStream::beside(values, kind);
        let _ = (values, kind);
        let side = Self {
            #[cfg(feature = "libtorch")]
            on_gpu,
        };
        mark.holds(values);
        side
    }

    /// Ends it; the mark is behind all of it.
    pub fn leave(self) -> DeviceMark {
        #[cfg(feature = "libtorch")]
        if let Some(side) = self.on_gpu {
            return DeviceMark::behind(Some(side.leave()));
        }
        DeviceMark::of_host()
    }
}

/// So many zeros on `device`, where LibTorch has its memory; `None` elsewhere.
pub fn device_zeros(device: &Device, len: usize, format: DeviceFormat) -> Option<DeviceValues> {
    #[cfg(feature = "libtorch")]
    return crate::torch::zeros(device, len, format);
    #[cfg(not(feature = "libtorch"))]
    {
        let _ = (device, len, format);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Place, Values, place_of, test_device};

    #[test]
    fn marks_are_past_when_the_work_before_them_is_done() {
        let device = test_device();
        let first = DeviceMark::after(&device);
        let values = burn::tensor::Tensor::<2>::ones([64, 64], &device);
        let product = values.clone().matmul(values);
        let second = DeviceMark::after(&device);
        while !second.is_past() {}
        assert!(first.is_past(), "what comes before is done before");
        let seconds = second.seconds_since(&first);
        assert!((0.0..60.0).contains(&seconds), "{seconds} s");
        assert_eq!(crate::with_values(product, |values| values[0]), 64.0);
    }

    #[test]
    fn zeros_are_where_libtorch_has_memory() {
        let device = test_device();
        let of = |format| device_zeros(&device, 3, format);
        if place_of(&device) == Place::Host {
            assert_eq!(of(DeviceFormat::F32), None);
            return;
        }
        let there = |format| of(format).unwrap();
        assert_eq!(there(DeviceFormat::F32).to_host(), Values::F32(vec![0.0; 3]));
        let (narrow, integers) = (there(DeviceFormat::Bf16), there(DeviceFormat::I32));
        assert_eq!(narrow.to_host(), Values::Bf16(vec![crate::bf16::default(); 3]));
        assert_eq!((integers.format(), integers.len()), (DeviceFormat::I32, 3));
    }
}
