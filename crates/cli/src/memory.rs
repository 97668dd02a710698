//! How the allocator treats the large buffers of tensors, and how much memory there was need of.

use switchyard_config::MemorySummary;
use switchyard_kernels::{CacheLines, DeviceMemory};

use crate::commands::output::bytes;

#[global_allocator]
static ALLOCATOR: CacheLines = CacheLines;

/// Keeps freed buffers mapped instead of handing them back after every operation.
///
/// A training step frees and allocates the same large buffers over and over; returning them to the
/// system makes each step fault all its pages in again (measured: a fifth of a small step).
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn keep_freed_pages() {
    // SAFETY: mallopt only sets parameters of the allocator and is called before any thread starts.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// Other allocators keep their pages by themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn keep_freed_pages() {}

/// Largest resident size of this process so far, in bytes.
pub(crate) fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// What a GPU's memory was needed for, beside what the plan foresees: between steps parameters and optimizer are
/// there, and gradients where the step is recorded; at the peak gradients, activations and workspace as well.
pub(crate) fn on_device(memory: DeviceMemory, planned: MemorySummary) -> String {
    format!(
        "{} between steps (planned: parameters {}, optimizer {}), {} at the peak with activations (planned: \
         gradients {}), {} held by LibTorch",
        bytes(memory.allocated),
        bytes(planned.parameter_bytes),
        bytes(planned.optimizer_bytes - planned.gpu_saves_bytes),
        bytes(memory.peak_allocated),
        bytes(planned.gradient_bytes),
        bytes(memory.peak_reserved),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_and_planned_memory_stand_side_by_side() {
        let mebi = |n: u64| n << 20;
        let memory = DeviceMemory { allocated: mebi(31), peak_allocated: mebi(90), peak_reserved: mebi(100) };
        let planned = MemorySummary {
            parameter_bytes: mebi(5),
            gradient_bytes: mebi(5),
            optimizer_bytes: mebi(27),
            gpu_saves_bytes: mebi(2),
        };
        assert_eq!(
            on_device(memory, planned),
            "31.0 MiB between steps (planned: parameters 5.0 MiB, optimizer 25.0 MiB), 90.0 MiB at the peak with \
             activations (planned: gradients 5.0 MiB), 100.0 MiB held by LibTorch"
        );
    }
}
