//! The calls of the MPI library as safe functions. All `unsafe` of the crate is here.

use std::ffi::{c_int, c_void};

use mpi::ffi;

use crate::buffer::{Element, ElementType};
use crate::transport::{Fault, Parts, Transport};

/// A communicator of the library. Never freed before the end: freeing is collective, and groups are
/// dropped at different times on different ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Handle {
    communicator: ffi::MPI_Comm,
    rank: usize,
    size: usize,
}

// SAFETY: a handle is a name for the library, not memory of ours; the library is started with
// MPI_THREAD_MULTIPLE, so any thread may use it.
unsafe impl Send for Handle {}
// SAFETY: as above; a group makes one call at a time.
unsafe impl Sync for Handle {}

/// The library's name of a type. It knows no bf16: that travels as the integer of its bits, and is never
/// combined by the library.
fn datatype<T: Element>() -> ffi::MPI_Datatype {
    // SAFETY: constants of the library's C shim, written once at load time.
    unsafe {
        match T::TYPE {
            ElementType::F32 => ffi::RSMPI_FLOAT,
            ElementType::F64 => ffi::RSMPI_DOUBLE,
            ElementType::Bf16 => ffi::RSMPI_UINT16_T,
            ElementType::I32 => ffi::RSMPI_INT32_T,
            ElementType::U64 => ffi::RSMPI_UINT64_T,
            ElementType::U8 => ffi::RSMPI_UINT8_T,
        }
    }
}

/// Parts as the library wants them: lengths, then places.
fn counts_and_places(parts: &Parts) -> (Vec<c_int>, Vec<c_int>) {
    parts.iter().map(|(place, count)| (int(count), int(place))).unzip()
}

/// A length as the library counts.
fn int(value: usize) -> c_int {
    c_int::try_from(value).expect("the group cuts or refuses what is too long for the library")
}

fn check(code: c_int) -> Result<(), Fault> {
    // MPI_SUCCESS is 0 by the standard.
    if code == 0 {
        return Ok(());
    }
    const MAX_ERROR_STRING: usize = 1024;
    let mut text = vec![0_u8; MAX_ERROR_STRING];
    let mut length = 0;
    // SAFETY: the room is longer than MPI_MAX_ERROR_STRING of any library (Open MPI 256, MPICH 512).
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &raw mut length) };
    text.truncate(usize::try_from(length).unwrap_or(0));
    Err(String::from_utf8_lossy(&text).into_owned())
}

/// Addresses of empty buffers. Those of empty slices may be 1, which is how Open MPI writes
/// `MPI_IN_PLACE`, and the library wants input and output to differ.
static NOTHING: [u64; 2] = [0; 2];

fn input<T>(values: &[T]) -> *const c_void {
    if values.is_empty() { (&raw const NOTHING[0]).cast() } else { values.as_ptr().cast() }
}

fn output<T>(values: &mut [T]) -> *mut c_void {
    // Nobody writes to the address of an empty buffer.
    if values.is_empty() { (&raw const NOTHING[1]).cast_mut().cast() } else { values.as_mut_ptr().cast() }
}

impl Handle {
    /// The group of all ranks; its errors are returned, not fatal.
    pub(crate) fn world() -> Result<Self, Fault> {
        // SAFETY: a constant of the library's C shim.
        Self::new(unsafe { ffi::RSMPI_COMM_WORLD })
    }

    fn new(communicator: ffi::MPI_Comm) -> Result<Self, Fault> {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the communicator is live, the handler is a constant, the results are ours.
        unsafe {
            check(ffi::MPI_Comm_set_errhandler(communicator, ffi::RSMPI_ERRORS_RETURN))?;
            check(ffi::MPI_Comm_rank(communicator, &raw mut rank))?;
            check(ffi::MPI_Comm_size(communicator, &raw mut size))?;
        }
        Ok(Self { communicator, rank: rank as usize, size: size as usize })
    }

    /// The library's own sum, in any order: only to compare speeds with.
    pub(crate) fn sum<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<(), Fault> {
        assert_eq!(from.len(), to.len(), "room for the result");
        let count = int(from.len());
        // SAFETY: the library reads and writes as many values of this type as both slices have; the
        // operation is a constant of the library's C shim.
        check(unsafe {
            let sum = ffi::RSMPI_SUM;
            ffi::MPI_Allreduce(input(from), output(to), count, datatype::<T>(), sum, self.communicator)
        })
    }
}

impl Transport for Handle {
    const LIMIT: usize = c_int::MAX as usize;

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn broadcast<T: Element>(&self, buffer: &mut [T], root: usize) -> Result<(), Fault> {
        let (count, root) = (int(buffer.len()), int(root));
        // SAFETY: the library writes as many values of this type as the slice has.
        check(unsafe { ffi::MPI_Bcast(output(buffer), count, datatype::<T>(), root, self.communicator) })
    }

    fn all_gather<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<(), Fault> {
        assert_eq!(from.len() * self.size, to.len(), "room for every rank's values");
        let (count, of) = (int(from.len()), datatype::<T>());
        // SAFETY: the library reads `count` values and writes `count` of each rank, as asserted.
        check(unsafe { ffi::MPI_Allgather(input(from), count, of, output(to), count, of, self.communicator) })
    }

    fn all_gather_v<T: Element>(&self, from: &[T], to: &mut [T], parts: &Parts) -> Result<(), Fault> {
        parts.check(self.size, to.len());
        let (of, (counts, places)) = (datatype::<T>(), counts_and_places(parts));
        // SAFETY: the library reads the whole input and writes within the output, as checked.
        check(unsafe {
            ffi::MPI_Allgatherv(
                input(from),
                int(from.len()),
                of,
                output(to),
                counts.as_ptr(),
                places.as_ptr(),
                of,
                self.communicator,
            )
        })
    }

    fn all_to_all<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<(), Fault> {
        let count = from.len() / self.size;
        assert!(count * self.size == from.len() && from.len() == to.len(), "equal parts");
        let (count, of) = (int(count), datatype::<T>());
        // SAFETY: the library reads and writes `count` values for each rank: the whole slices.
        check(unsafe { ffi::MPI_Alltoall(input(from), count, of, output(to), count, of, self.communicator) })
    }

    fn all_to_all_v<T: Element>(
        &self,
        (from, sends): (&[T], &Parts),
        (to, receives): (&mut [T], &Parts),
    ) -> Result<(), Fault> {
        sends.check(self.size, from.len());
        receives.check(self.size, to.len());
        let (send_counts, send_places) = counts_and_places(sends);
        let (receive_counts, receive_places) = counts_and_places(receives);
        let of = datatype::<T>();
        // SAFETY: all parts lie within the slices, as checked.
        check(unsafe {
            ffi::MPI_Alltoallv(
                input(from),
                send_counts.as_ptr(),
                send_places.as_ptr(),
                of,
                output(to),
                receive_counts.as_ptr(),
                receive_places.as_ptr(),
                of,
                self.communicator,
            )
        })
    }

    fn split(&self, colors: &[usize], _: u64) -> Result<Self, Fault> {
        let (color, rank) = (int(colors[self.rank]), int(self.rank));
        let mut group = self.communicator;
        // SAFETY: the communicator is live, and the result is written before it is read.
        check(unsafe { ffi::MPI_Comm_split(self.communicator, color, rank, &raw mut group) })?;
        Self::new(group)
    }
}

/// Whether calls are possible: the library is started and not ended.
pub(crate) fn is_running() -> bool {
    mpi::is_initialized() && !mpi::is_finalized()
}

/// Ends all ranks of the job with exit code `code`.
pub(crate) fn abort(code: i32) {
    // SAFETY: the standard allows the call from any thread between start and end of the library.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
}
