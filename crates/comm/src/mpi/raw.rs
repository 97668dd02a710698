//! The calls of the MPI library as safe functions. All `unsafe` of the crate is here.
//!
//! Owns no policy: what is called when, and in which pieces, is decided in `group.rs`.

use std::ffi::{c_int, c_void};

use half::bf16;
use mpi::ffi;

use crate::buffer::Element;

/// The library's words about a failed call.
pub(crate) type Fault = String;

/// A communicator of the library. Never freed before the end: freeing is collective, and groups are
/// dropped at different times on different ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Handle(ffi::MPI_Comm);

// SAFETY: a handle is a name for the library, not memory of ours; the library is started with
// MPI_THREAD_MULTIPLE, so any thread may use it.
unsafe impl Send for Handle {}
// SAFETY: as above; a group makes one call at a time.
unsafe impl Sync for Handle {}

/// Types that the library moves.
pub(crate) trait Wire: Element {
    /// The library's name of the type.
    fn datatype() -> ffi::MPI_Datatype;
}

macro_rules! wire {
    ($($type:ty: $name:ident),+ $(,)?) => {$(
        impl Wire for $type {
            fn datatype() -> ffi::MPI_Datatype {
                // SAFETY: a constant of the library's C shim, written once at load time.
                unsafe { ffi::$name }
            }
        }
    )+};
}

// MPI knows no bf16: it travels as the integer of its bits, and is never combined by the library.
wire!(f32: RSMPI_FLOAT, f64: RSMPI_DOUBLE, bf16: RSMPI_UINT16_T, i32: RSMPI_INT32_T, u64: RSMPI_UINT64_T, u8: RSMPI_UINT8_T);

/// Lengths and places of the parts of a buffer, one a rank.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parts {
    counts: Vec<c_int>,
    places: Vec<c_int>,
}

impl Parts {
    /// Parts one after the other.
    pub(crate) fn packed(counts: &[usize]) -> Self {
        let mut start = 0;
        Self::new(counts.iter().map(|&count| {
            start += count;
            (start - count, count)
        }))
    }

    /// Parts given as place and length.
    pub(crate) fn new(parts: impl Iterator<Item = (usize, usize)>) -> Self {
        let (places, counts) = parts.map(|(place, count)| (int(place), int(count))).unzip();
        Self { counts, places }
    }

    /// Asserts what makes it right to hand the parts to the library.
    fn check(&self, size: usize, values: usize) {
        assert_eq!(self.counts.len(), size, "one part a rank");
        let end = |(place, count): (&c_int, &c_int)| *place as usize + *count as usize;
        assert!(self.places.iter().zip(&self.counts).map(end).all(|end| end <= values), "parts within");
    }
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
        let world = Self(unsafe { ffi::RSMPI_COMM_WORLD });
        world.return_errors()?;
        Ok(world)
    }

    fn return_errors(self) -> Result<(), Fault> {
        // SAFETY: the handle is a live communicator; the handler is a constant.
        check(unsafe { ffi::MPI_Comm_set_errhandler(self.0, ffi::RSMPI_ERRORS_RETURN) })
    }

    pub(crate) fn rank(self) -> Result<usize, Fault> {
        let mut rank = 0;
        // SAFETY: the handle is a live communicator.
        check(unsafe { ffi::MPI_Comm_rank(self.0, &raw mut rank) })?;
        Ok(rank as usize)
    }

    pub(crate) fn size(self) -> Result<usize, Fault> {
        let mut size = 0;
        // SAFETY: the handle is a live communicator.
        check(unsafe { ffi::MPI_Comm_size(self.0, &raw mut size) })?;
        Ok(size as usize)
    }

    pub(crate) fn split(self, color: usize, rank: usize) -> Result<Self, Fault> {
        let mut group = self;
        // SAFETY: the handle is a live communicator, and the result is written before it is read.
        check(unsafe { ffi::MPI_Comm_split(self.0, int(color), int(rank), &raw mut group.0) })?;
        group.return_errors()?;
        Ok(group)
    }

    pub(crate) fn broadcast<T: Wire>(self, buffer: &mut [T], root: usize) -> Result<(), Fault> {
        // SAFETY: the library writes as many values of this type as the slice has.
        check(unsafe { ffi::MPI_Bcast(output(buffer), int(buffer.len()), T::datatype(), int(root), self.0) })
    }

    /// The library's own sum, in any order: only to compare speeds with.
    pub(crate) fn sum<T: Wire>(self, from: &[T], to: &mut [T]) -> Result<(), Fault> {
        assert_eq!(from.len(), to.len(), "room for the result");
        let count = int(from.len());
        // SAFETY: the library reads and writes as many values of this type as both slices have; the
        // operation is a constant of the library's C shim.
        check(unsafe {
            ffi::MPI_Allreduce(input(from), output(to), count, T::datatype(), ffi::RSMPI_SUM, self.0)
        })
    }

    pub(crate) fn all_gather<T: Wire>(self, from: &[T], to: &mut [T]) -> Result<(), Fault> {
        assert_eq!(from.len() * self.size()?, to.len(), "room for every rank's values");
        let (count, datatype) = (int(from.len()), T::datatype());
        // SAFETY: the library reads `count` values and writes `count` of each rank, as asserted.
        check(unsafe {
            ffi::MPI_Allgather(input(from), count, datatype, output(to), count, datatype, self.0)
        })
    }

    pub(crate) fn all_gather_v<T: Wire>(self, from: &[T], to: &mut [T], parts: &Parts) -> Result<(), Fault> {
        parts.check(self.size()?, to.len());
        let datatype = T::datatype();
        // SAFETY: the library reads the whole input and writes within the output, as checked.
        check(unsafe {
            ffi::MPI_Allgatherv(
                input(from),
                int(from.len()),
                datatype,
                output(to),
                parts.counts.as_ptr(),
                parts.places.as_ptr(),
                datatype,
                self.0,
            )
        })
    }

    pub(crate) fn all_to_all<T: Wire>(self, from: &[T], to: &mut [T]) -> Result<(), Fault> {
        let count = from.len() / self.size()?;
        assert!(count * self.size()? == from.len() && from.len() == to.len(), "equal parts");
        let (count, datatype) = (int(count), T::datatype());
        // SAFETY: the library reads and writes `count` values for each rank: the whole slices.
        check(unsafe { ffi::MPI_Alltoall(input(from), count, datatype, output(to), count, datatype, self.0) })
    }

    pub(crate) fn all_to_all_v<T: Wire>(
        self,
        (from, sends): (&[T], &Parts),
        (to, receives): (&mut [T], &Parts),
    ) -> Result<(), Fault> {
        sends.check(self.size()?, from.len());
        receives.check(self.size()?, to.len());
        let datatype = T::datatype();
        // SAFETY: all parts lie within the slices, as checked.
        check(unsafe {
            ffi::MPI_Alltoallv(
                input(from),
                sends.counts.as_ptr(),
                sends.places.as_ptr(),
                datatype,
                output(to),
                receives.counts.as_ptr(),
                receives.places.as_ptr(),
                datatype,
                self.0,
            )
        })
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
