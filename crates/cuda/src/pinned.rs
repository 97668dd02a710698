//! Memory of the host that a device reads and writes itself.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use cudarc::driver::sys::{CUevent, CUevent_flags};
use cudarc::driver::{CudaContext, result};

use crate::address::Address;
use crate::error::CudaError;
use crate::gpu::{Gpu, Queue, Stream, failed};
use crate::mark::has_happened;

/// Values in pages that stay where they are, and an event behind the last copy of them.
#[derive(Debug)]
struct Pinned<T> {
    context: Arc<CudaContext>,
    at: NonNull<T>,
    len: usize,
    /// One that has never been recorded counts as past.
    copied: CUevent,
}

// SAFETY: memory and event belong to this value alone.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: as above; shared references only read.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl<T: Copy + Default> Pinned<T> {
    /// So many zeros.
    fn new(gpu: &Gpu, len: usize) -> Result<Self, CudaError> {
        let doing = "taking memory of the host";
        gpu.context().bind_to_thread().map_err(failed(doing))?;
        // SAFETY: the context is bound; the memory is freed when this is dropped.
        let at = unsafe { result::malloc_host(len.max(1) * size_of::<T>(), 0) }.map_err(failed(doing))?;
        let at = NonNull::new(at.cast()).expect("the driver has said that it succeeded");
        // SAFETY: there is room for so many, aligned to pages.
        unsafe { slice::from_raw_parts_mut(at.as_ptr(), len) }.fill(T::default());
        let created = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let context = Arc::clone(gpu.context());
        let mut pinned = Self { context, at, len, copied: std::ptr::null_mut() };
        pinned.copied = created.map_err(failed(doing))?;
        Ok(pinned)
    }

    /// Waits for the last copy.
    fn wait(&self, doing: &str) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(failed(doing))?;
        // SAFETY: the event lives as long as this value.
        unsafe { result::event::synchronize(self.copied) }.map_err(failed(doing))
    }

    /// What `stream` has been asked for until now was the last copy.
    fn copied_by(&self, stream: Stream, doing: &str) -> Result<(), CudaError> {
        // SAFETY: as above; streams live as long as the process.
        unsafe { result::event::record(self.copied, stream.0) }.map_err(failed(doing))
    }

    fn values(&self) -> &[T] {
        // SAFETY: there are so many, written when they were made.
        unsafe { slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }

    fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and nobody else has them.
        unsafe { slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // An error leaves nothing to be done, here as below.
        let _ = self.context.bind_to_thread();
        if !self.copied.is_null() {
            // SAFETY: made in `new`; a copy may be under way.
            let _ = unsafe { result::event::synchronize(self.copied) };
            // SAFETY: as above, and destroyed once.
            let _ = unsafe { result::event::destroy(self.copied) };
        }
        // SAFETY: allocated in `new` and freed once; no copy is under way any more.
        let _ = unsafe { result::free_host(self.at.as_ptr().cast::<c_void>()) };
    }
}

/// Integers on their way to a device.
#[derive(Debug)]
pub struct PinnedIntegers(Pinned<i64>);

impl PinnedIntegers {
    /// Room for `len` of them.
    ///
    /// # Errors
    /// When the driver has none.
    pub fn new(gpu: &Gpu, len: usize) -> Result<Self, CudaError> {
        Pinned::new(gpu, len).map(Self)
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
        let Self(pinned) = self;
        assert!(values.len() <= pinned.len, "{} values do not fit into {}", values.len(), pinned.len);
        let doing = "sending integers";
        pinned.wait(doing)?;
        let room = &mut pinned.values_mut()[..values.len()];
        room.iter_mut().zip(values).for_each(|(room, &value)| *room = value.into());
        // SAFETY: the memory stays as it is until the next call has waited; the rest is promised.
        unsafe { result::memcpy_htod_async(to.0, room, queue.stream.0) }.map_err(failed(doing))?;
        pinned.copied_by(queue.stream, doing)
    }
}

const WAITING: &str = "waiting for results";

/// Words on their way from a device.
#[derive(Debug)]
pub struct PinnedWords(Pinned<u32>);

impl PinnedWords {
    /// Room for `len` of them.
    ///
    /// # Errors
    /// When the driver has none.
    pub fn new(gpu: &Gpu, len: usize) -> Result<Self, CudaError> {
        Pinned::new(gpu, len).map(Self)
    }

    /// Puts copies of so many words from each address into the queue, one behind the other; returns at once.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Panics
    /// When there are more words than there is room for.
    ///
    /// # Safety
    /// As the crate's documentation demands: there are as many words at each address.
    pub unsafe fn fetch(&mut self, queue: Queue<'_>, parts: &[(Address, usize)]) -> Result<(), CudaError> {
        let Self(pinned) = self;
        let doing = "fetching results";
        pinned.wait(doing)?;
        let mut rest = pinned.values_mut();
        for &(from, count) in parts {
            let (part, after) = rest.split_at_mut(count);
            rest = after;
            // SAFETY: nobody reads the memory before `wait` has; the rest is promised.
            unsafe { result::memcpy_dtoh_async(part, from.0, queue.stream.0) }.map_err(failed(doing))?;
        }
        pinned.copied_by(queue.stream, doing)
    }

    /// Whether the last copy is done.
    ///
    /// # Errors
    /// When something failed on the device.
    pub fn are_here(&self) -> Result<bool, CudaError> {
        // SAFETY: the event lives as long as this value.
        unsafe { has_happened(&self.0.context, self.0.copied, WAITING) }
    }

    /// All words, once the last copy is done.
    ///
    /// # Errors
    /// When something failed on the device.
    pub fn wait(&self) -> Result<&[u32], CudaError> {
        self.0.wait(WAITING)?;
        Ok(self.0.values())
    }
}
