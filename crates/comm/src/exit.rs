//! The end of this process whatever its threads are at.

/// Ends this process at once, with exit code `code`.
///
/// What libraries have registered for the end of a program does not run: a driver or LibTorch would wait there for
/// work of a device that never ends, or for a lock of the thread that waits for it.
pub(crate) fn end_process(code: i32) -> ! {
    // SAFETY: it has no requirements, and does not return.
    unsafe { libc::_exit(code) }
}
