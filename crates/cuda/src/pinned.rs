//! Memory of the host that a device reads itself.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result};

use crate::address::Address;
use crate::error::CudaError;
use crate::gpu::{Gpu, Queue, Stream, failed};

/// Integers on their way to a device.
#[derive(Debug)]
pub struct PinnedIntegers {
    context: Arc<CudaContext>,
    at: NonNull<i64>,
    len: usize,
    /// Where the last copy of them went.
    sent_by: Option<Stream>,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for PinnedIntegers {}
// SAFETY: shared references read nothing.
unsafe impl Sync for PinnedIntegers {}

impl PinnedIntegers {
    /// Room for `len` of them, 1 at least.
    ///
    /// # Errors
    /// When the driver has none.
    pub fn new(gpu: &Gpu, len: usize) -> Result<Self, CudaError> {
        let doing = "taking memory of the host";
        gpu.context().bind_to_thread().map_err(failed(doing))?;
        // SAFETY: the context is bound; the memory is freed when this is dropped.
        let at = unsafe { result::malloc_host(len.max(1) * size_of::<i64>(), 0) }.map_err(failed(doing))?;
        let at = NonNull::new(at.cast()).expect("the driver has said that it succeeded");
        // SAFETY: there is room for so many, aligned to pages.
        unsafe { slice::from_raw_parts_mut(at.as_ptr(), len) }.fill(0);
        Ok(Self { context: Arc::clone(gpu.context()), at, len, sent_by: None })
    }

    /// Waits for the copy before, then puts one of `values` to `to` into the queue.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Panics
    /// When there are more values than there is room for.
    ///
    /// # Safety
    /// As the crate's documentation demands: `to` has room for `values` as int64.
    pub unsafe fn send(&mut self, queue: Queue<'_>, values: &[i32], to: Address) -> Result<(), CudaError> {
        assert!(values.len() <= self.len, "{} values do not fit into {}", values.len(), self.len);
        let doing = "sending integers";
        self.context.bind_to_thread().map_err(failed(doing))?;
        if let Some(earlier) = self.sent_by.replace(queue.stream) {
            // SAFETY: streams live as long as the process.
            unsafe { result::stream::synchronize(earlier.0) }.map_err(failed(doing))?;
        }
        // SAFETY: there are at least so many, written when they were made, which no copy reads any more.
        let room = unsafe { slice::from_raw_parts_mut(self.at.as_ptr(), values.len()) };
        room.iter_mut().zip(values).for_each(|(room, &value)| *room = value.into());
        // SAFETY: the memory stays as it is until the next call has waited; the rest is promised.
        unsafe { result::memcpy_htod_async(to.0, room, queue.stream.0) }.map_err(failed(doing))
    }
}

impl Drop for PinnedIntegers {
    fn drop(&mut self) {
        // An error leaves nothing to be done, here as below.
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated in `new` and freed once; the driver waits for copies from it.
        let _ = unsafe { result::free_host(self.at.as_ptr().cast::<c_void>()) };
    }
}
