//! How the allocator treats the large buffers of tensors.

use switchyard_kernels::CacheLines;

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
