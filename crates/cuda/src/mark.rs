//! Places in the work of a device, and the time between them.

use std::sync::Arc;

use cudarc::driver::sys::{CUevent, CUevent_flags, CUevent_wait_flags, CUresult};
use cudarc::driver::{CudaContext, result};

use crate::error::CudaError;
use crate::gpu::{Queue, failed};

/// The end of what a stream was asked for at some time.
#[derive(Debug)]
pub struct Mark {
    context: Arc<CudaContext>,
    event: CUevent,
}

// SAFETY: the event belongs to this value alone, and the driver takes it from any thread.
unsafe impl Send for Mark {}
// SAFETY: as above; shared references only ask.
unsafe impl Sync for Mark {}

impl Mark {
    /// Behind all that the queue has been asked for until now.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn after(queue: Queue<'_>) -> Result<Self, CudaError> {
        let doing = "marking work";
        queue.gpu.bind()?;
        let event = result::event::create(CUevent_flags::CU_EVENT_DEFAULT).map_err(failed(doing))?;
        let mark = Self { context: Arc::clone(queue.gpu.context()), event };
        // SAFETY: the event was just made; streams live as long as the process.
        unsafe { result::event::record(mark.event, queue.stream.0) }.map_err(failed(doing))?;
        Ok(mark)
    }

    /// Lets what the queue is asked for from here on wait until the device has come past; the host does not.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn holds(&self, queue: Queue<'_>) -> Result<(), CudaError> {
        queue.gpu.bind()?;
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event lives as long as this value; a wait that was asked for needs it no more.
        unsafe { result::stream::wait_event(queue.stream.0, self.event, flags) }
            .map_err(failed("waiting for work on another stream"))
    }

    /// Whether the device has come past; does not wait.
    ///
    /// # Errors
    /// When something failed on the device.
    pub fn is_past(&self) -> Result<bool, CudaError> {
        // SAFETY: the event lives as long as this value.
        unsafe { has_happened(&self.context, self.event, "waiting for work") }
    }

    /// Seconds that the device needed from `earlier` to here; both are past.
    ///
    /// # Errors
    /// When one is not, or something failed on the device.
    pub fn seconds_since(&self, earlier: &Self) -> Result<f64, CudaError> {
        let doing = "timing work";
        self.context.bind_to_thread().map_err(failed(doing))?;
        // SAFETY: both events live, and take times.
        let milliseconds =
            unsafe { result::event::elapsed(earlier.event, self.event) }.map_err(failed(doing))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

/// Whether the device has come past an event; does not wait.
///
/// # Safety
/// The event is one of the context and lives.
pub(crate) unsafe fn has_happened(
    context: &CudaContext,
    event: CUevent,
    doing: &str,
) -> Result<bool, CudaError> {
    context.bind_to_thread().map_err(failed(doing))?;
    // SAFETY: promised by the caller.
    match unsafe { result::event::query(event) } {
        Ok(()) => Ok(true),
        Err(error) if error.0 == CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        Err(error) => Err(failed(doing)(error)),
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // An error leaves nothing to be done, here as below.
        let _ = self.context.bind_to_thread();
        // SAFETY: made in `after`, destroyed once; the driver waits by itself for what has not come past.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}
