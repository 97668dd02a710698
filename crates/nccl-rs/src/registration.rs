//! Memory that a communicator knows, so that peers read and write it without a copy.

use crate::communicator::Communicator;
use crate::error::Error;
use crate::ffi::Registered;
use crate::group::refuse_inside;
use crate::memory::DeviceSlice;
use crate::version::Feature;

/// Memory that is registered with a communicator until this is dropped.
#[derive(Debug)]
#[must_use = "the memory is registered only as long as this is kept"]
pub struct Registration<'communicator> {
    communicator: &'communicator Communicator,
    /// `None` when it has been taken back.
    registered: Option<Registered>,
}

impl Communicator {
    /// Registers memory, so that the library can do without copies of its own. It should come from
    /// `ncclMemAlloc` or CUDA's virtual memory (`cuMemCreate`), on which most ways of doing without copies
    /// depend. One large registration serves for all slices of it.
    ///
    /// # Safety
    /// - The memory stays allocated until the registration is released, dropped, or the communicator has
    ///   ended; a registration is not leaked while its memory is given back.
    /// - When one rank uses registered memory in an operation, all do: NCCL gives no meaning to a mixture.
    ///
    /// # Errors
    /// [`Error::Unsupported`] before NCCL 2.19; [`Error::InsideGroup`] in a group; [`Error::Busy`] and
    /// [`Error::Ended`] when the communicator is not ready; [`Error::Buffer`] for memory of another device;
    /// [`Error::Communicator`] when the library fails.
    ///
    /// # Source
    /// "User Buffer Registration" in NCCL's user guide.
    pub unsafe fn register(&self, memory: DeviceSlice<'_>) -> Result<Registration<'_>, Error> {
        const REGISTER: &str = "register";
        self.library().require(Feature::BufferRegistration)?;
        self.require_ready(REGISTER)?;
        refuse_inside(REGISTER)?;
        self.require_device(REGISTER, memory)?;
        // SAFETY: promised by the caller.
        let registered = unsafe { self.handle().register(memory) };
        let registered = self.explain(REGISTER, registered)?;
        Ok(Registration { communicator: self, registered: Some(registered) })
    }
}

impl Registration<'_> {
    /// Takes the registration back, and says what dropping it would not.
    ///
    /// # Errors
    /// [`Error::Communicator`] when the library fails; [`Error::Ended`] after the communicator was aborted,
    /// which takes all registrations back.
    pub fn release(mut self) -> Result<(), Error> {
        self.take_back()
    }

    fn take_back(&mut self) -> Result<(), Error> {
        let Some(registered) = self.registered.take() else { return Ok(()) };
        let taken = self.communicator.handle().deregister(registered);
        self.communicator.explain("release", taken).map(|_| ())
    }
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        // `release` is there for who wants to know.
        let _ = self.take_back();
    }
}
