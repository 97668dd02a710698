//! LibTorch's own settings and counters that its Rust bindings do not have.

use tch::Device;

use crate::device::DeviceMemory;

// `settings.cpp`
unsafe extern "C" {
    fn switchyard_set_allow_tf32(allow: bool);
    fn switchyard_allows_tf32() -> bool;
    fn switchyard_device_memory(device: i32, now: *mut i64, most: *mut i64, most_held: *mut i64) -> bool;
}

/// Whether products of float32 matrices on GPUs may round their factors to TF32, for the whole process.
/// Returns whether they now do as asked.
pub(crate) fn allow_tf32(allow: bool) -> bool {
    // SAFETY: both take and return plain values, throw nothing, and set or read one flag of LibTorch's.
    unsafe {
        switchyard_set_allow_tf32(allow);
        switchyard_allows_tf32() == allow
    }
}

/// What LibTorch has counted of a GPU's memory.
pub(crate) fn device_memory(device: Device) -> Option<DeviceMemory> {
    let Device::Cuda(index) = device else { return None };
    let index = i32::try_from(index).ok()?;
    let [mut now, mut most, mut most_held] = [0_i64; 3];
    // SAFETY: the three pointers take one number each; it throws nothing.
    let known = unsafe { switchyard_device_memory(index, &raw mut now, &raw mut most, &raw mut most_held) };
    let [allocated, peak_allocated, peak_reserved] =
        [now, most, most_held].map(|bytes| u64::try_from(bytes).unwrap_or(0));
    known.then_some(DeviceMemory { allocated, peak_allocated, peak_reserved })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tf32_is_allowed_and_forbidden_again() {
        if tch::Cuda::is_available() {
            // Other tests multiply in float32 at the same time.
            assert!(allow_tf32(false));
            return;
        }
        assert!(allow_tf32(true));
        assert!(allow_tf32(false));
    }

    #[test]
    fn only_gpus_are_counted() {
        assert_eq!(device_memory(Device::Cpu), None);
        if !tch::Cuda::is_available() {
            assert_eq!(device_memory(Device::Cuda(0)), None);
            return;
        }
        let kept = tch::Tensor::zeros([1 << 20], (tch::Kind::Float, Device::Cuda(0)));
        let memory = device_memory(kept.device()).unwrap();
        assert!(memory.allocated >= 4 << 20, "{memory:?}");
        assert!(memory.peak_allocated >= memory.allocated, "{memory:?}");
        assert!(memory.peak_reserved >= memory.peak_allocated, "{memory:?}");
    }
}
