//! Collectives on the memory of the ranks' devices: put on a stream, not waited for.

mod main_memory;
#[cfg(feature = "nccl")]
mod nccl;
mod siblings;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use self::siblings::{DeviceGroup, Siblings};
use crate::buffer::{Buffer, BufferMut, ElementType};
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CommError;

/// Values in the memory of a rank's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlice {
    address: u64,
    len: usize,
    element: ElementType,
}

impl DeviceSlice {
    /// The `len` values of type `element` at `address`.
    ///
    /// # Safety
    /// The memory is there, aligned for the type, and stays until the stream of every operation that it is given
    /// to has done it. The device of the group's rank can read and write it, and nothing but the work of that
    /// stream does meanwhile. What an operation reads holds values, and what it writes overlaps nothing else
    /// that it is given.
    pub const unsafe fn from_raw_parts(address: u64, len: usize, element: ElementType) -> Self {
        Self { address, len, element }
    }

    /// Where the first value lies.
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// Number of values.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the values.
    pub const fn element_type(&self) -> ElementType {
        self.element
    }

    /// Bytes of all values.
    pub const fn bytes(&self) -> usize {
        self.len * self.element.bytes()
    }

    /// Some of the values.
    ///
    /// # Panics
    /// When `range` reaches beyond them.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} values", self.len);
        let address = self.address + (range.start * self.element.bytes()) as u64;
        Self { address, len: range.len(), element: self.element }
    }
}

/// A stream of a device, by its handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceStream(u64);

impl DeviceStream {
    /// The default one.
    pub const DEFAULT: Self = Self(0);

    /// The stream with this handle.
    ///
    /// # Safety
    /// It is a stream of the device of the rank that uses it, and lives until all work that is put on it has
    /// run.
    pub const unsafe fn from_raw(handle: u64) -> Self {
        Self(handle)
    }
}

/// Values on their way to or from a rank of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The other rank; this one for values that stay.
    pub peer: usize,
    /// The values.
    pub values: DeviceSlice,
}

/// A group whose ranks have a device each.
///
/// Operations join the work of a stream and return at once; what a stream does afterwards sees the results.
///
/// # Collective
/// All ranks of the group call the same operations in the same order, with types and sizes that fit each other.
/// Devices do not compare them.
///
/// # Errors
/// Every method: [`CommError::Library`] when the library beneath refuses or fails; in main memory as every
/// collective.
pub trait DeviceCommunicator: fmt::Debug + Send + Sync {
    /// Combines the values of all ranks in place; every rank gets the same bits. The order of sums is the
    /// library's, the same whenever the same ranks sum as many values.
    fn all_reduce(&self, values: DeviceSlice, op: ReduceOp, stream: DeviceStream) -> Result<(), CommError>;

    /// Concatenates the equally long inputs in rank order.
    fn all_gather(
        &self,
        input: DeviceSlice,
        output: DeviceSlice,
        stream: DeviceStream,
    ) -> Result<(), CommError>;

    /// Sends and receives all pieces as one operation. What one rank sends another arrives in the order of the
    /// pieces, each as long as its sender has it.
    ///
    /// # Panics
    /// When a piece is for a rank that the group does not have.
    fn exchange(&self, sends: &[Piece], receives: &[Piece], stream: DeviceStream) -> Result<(), CommError>;

    /// Asks whether the devices have met a fault in the background, after which operations never end.
    /// [`Communicator::wait_for`] does so for all groups of a job.
    fn check(&self) -> Result<(), CommError>;
}

/// What ranks on GPUs do to have the calling thread's work on theirs; the error is what keeps them from it.
pub type Bind = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The library beneath, without anything of ours between, to compare speeds with.
pub(crate) trait Bare {
    fn all_reduce(&self, values: DeviceSlice, stream: DeviceStream) -> Result<(), CommError>;
    fn all_to_all(&self, from: DeviceSlice, to: DeviceSlice, stream: DeviceStream) -> Result<(), CommError>;
    fn all_gather(&self, from: DeviceSlice, to: DeviceSlice, stream: DeviceStream) -> Result<(), CommError>;
}

/// What the devices of a job are.
#[derive(Clone)]
#[non_exhaustive]
pub enum Devices {
    /// Memory that the processor reads itself; operations are done when they return.
    MainMemory,
    /// NVIDIA's GPUs, one a rank.
    #[cfg(feature = "nccl")]
    Nccl {
        /// NCCL itself.
        library: nccl_rs::Library,
        /// Makes the rank's GPU the current one of the thread that calls it.
        bind: Bind,
    },
}

/// Devices that ranks cannot exchange between here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DevicesError {
    /// There is no NCCL in this build.
    #[error(
        "several ranks on GPUs exchange through NCCL, which this build does without; build with \
         `--features switchyard-cli/libtorch`, see docs/gpu.md"
    )]
    NotInThisBuild,
    /// There is no NCCL on this machine that would do.
    #[cfg(feature = "nccl")]
    #[error("several ranks on GPUs exchange through NCCL: {0}")]
    Nccl(#[from] nccl_rs::Error),
    /// LibTorch is told to take memory in a way in which recorded steps of several ranks never end.
    #[cfg(feature = "nccl")]
    #[error(
        "PYTORCH_CUDA_ALLOC_CONF asks for expandable segments, which NCCL cannot register for steps that are \
         recorded: the ranks would wait for ever; set NCCL_GRAPH_REGISTER=0 as well"
    )]
    ExpandableSegments,
}

impl Devices {
    /// GPUs that exchange through the NCCL that is loaded already, with LibTorch mostly, or that is found.
    ///
    /// # Errors
    /// [`DevicesError`], where there is none.
    pub fn gpus(bind: Bind) -> Result<Self, DevicesError> {
        #[cfg(feature = "nccl")]
        {
            if nccl::registers_expandable_segments(|name| std::env::var(name).ok()) {
                return Err(DevicesError::ExpandableSegments);
            }
            Ok(Self::Nccl { library: nccl_rs::Library::load()?, bind })
        }
        #[cfg(not(feature = "nccl"))]
        {
            let _ = bind;
            Err(DevicesError::NotInThisBuild)
        }
    }

    /// The library among the ranks of `group`, where there is one.
    ///
    /// # Collective
    /// Over `group`.
    pub(crate) fn bare(&self, group: &dyn Communicator) -> Result<Option<Box<dyn Bare>>, CommError> {
        match self {
            #[cfg(feature = "nccl")]
            Self::Nccl { library, bind } => Ok(Some(Box::new(nccl::Bare::join(group, library, bind)?))),
            Self::MainMemory => {
                let _ = group;
                Ok(None)
            }
        }
    }
}

/// Version and file of the NCCL that ranks on GPUs would exchange through here.
///
/// # Errors
/// [`DevicesError`], where there is none.
pub fn nccl_version() -> Result<String, DevicesError> {
    #[cfg(feature = "nccl")]
    {
        let library = nccl_rs::Library::load()?;
        let file =
            library.file().map_or_else(|| library.origin().to_string(), |file| file.display().to_string());
        Ok(format!("{}, {file}", library.version()))
    }
    #[cfg(not(feature = "nccl"))]
    Err(DevicesError::NotInThisBuild)
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MainMemory => "MainMemory",
            #[cfg(feature = "nccl")]
            Self::Nccl { .. } => "Nccl",
        })
    }
}

/// `group`, and all groups split from it, with collectives on its ranks' devices. A group of one has none.
///
/// Where a device has recorded operations of a group to repeat them, the recording goes before the group.
///
/// # Collective
/// Over `group`.
///
/// # Errors
/// When the ranks do not meet, or a rank's device or library cannot be used.
pub fn with_devices(
    group: Arc<dyn Communicator>,
    devices: &Devices,
) -> Result<Arc<dyn Communicator>, CommError> {
    joined(group, devices, &Arc::default())
}

fn joined(
    group: Arc<dyn Communicator>,
    devices: &Devices,
    siblings: &Arc<Siblings>,
) -> Result<Arc<dyn Communicator>, CommError> {
    if group.size() == 1 {
        return Ok(group);
    }
    let on_devices: Arc<dyn DeviceGroup> = match devices {
        Devices::MainMemory => Arc::new(main_memory::MainMemory::new(Arc::clone(&group))),
        #[cfg(feature = "nccl")]
        Devices::Nccl { library, bind } => Arc::new(nccl::Nccl::join(Arc::clone(&group), library, bind)?),
    };
    siblings.add(&on_devices);
    let (devices, siblings) = (devices.clone(), Arc::clone(siblings));
    Ok(Arc::new(WithDevices { group, devices, on_devices, siblings }))
}

/// A group of processes, and the same ranks' group of devices.
#[derive(Debug)]
struct WithDevices {
    group: Arc<dyn Communicator>,
    devices: Devices,
    on_devices: Arc<dyn DeviceGroup>,
    siblings: Arc<Siblings>,
}

impl Communicator for WithDevices {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn label(&self) -> &str {
        self.group.label()
    }

    fn machines(&self) -> &[usize] {
        self.group.machines()
    }

    fn timeout(&self) -> Option<Duration> {
        self.group.timeout()
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.group.barrier()
    }

    fn broadcast(&self, buffer: BufferMut<'_>, root: usize) -> Result<(), CommError> {
        self.group.broadcast(buffer, root)
    }

    fn all_reduce(&self, buffer: BufferMut<'_>, op: ReduceOp) -> Result<(), CommError> {
        self.group.all_reduce(buffer, op)
    }

    fn reduce_scatter(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Result<(), CommError> {
        self.group.reduce_scatter(input, output, op)
    }

    fn all_gather(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        self.group.all_gather(input, output)
    }

    fn all_gather_v(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        counts: &[usize],
    ) -> Result<(), CommError> {
        self.group.all_gather_v(input, output, counts)
    }

    fn all_to_all(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        self.group.all_to_all(input, output)
    }

    fn all_to_all_v(
        &self,
        input: Buffer<'_>,
        sends: &[usize],
        output: BufferMut<'_>,
        receives: &[usize],
    ) -> Result<(), CommError> {
        self.group.all_to_all_v(input, sends, output, receives)
    }

    fn split(&self, color: usize, label: &str) -> Result<Arc<dyn Communicator>, CommError> {
        joined(self.group.split(color, label)?, &self.devices, &self.siblings)
    }

    fn wait_for(&self, what: &'static str, done: &mut dyn FnMut() -> bool) -> Result<(), CommError> {
        self.siblings.watch(&*self.group, what, done)
    }

    fn on_devices(&self) -> Option<&dyn DeviceCommunicator> {
        Some(&*self.on_devices)
    }
}
