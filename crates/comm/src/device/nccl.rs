//! GPUs that exchange through NCCL.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread;

use nccl_rs::{Config, DataType, Deadline, Error, Library, UniqueId};

use super::siblings::DeviceGroup;
use super::{Bind, DeviceCommunicator, DeviceSlice, DeviceStream, Piece};
use crate::buffer::ElementType;
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CommError;

/// What the library says where ranks share a GPU.
const TWO_ON_ONE: &str = "Duplicate GPU";

/// Whether NCCL would register memory that LibTorch takes in expandable segments, in an environment where `get`
/// tells the variables. Seen on two H100 with NCCL 2.28 and LibTorch 2.11: the first recorded step does not end.
pub(super) fn registers_expandable_segments(get: impl Fn(&str) -> Option<String>) -> bool {
    let expandable = ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"]
        .into_iter()
        .any(|name| get(name).is_some_and(|value| value.contains("expandable_segments:True")));
    expandable && get("NCCL_GRAPH_REGISTER").as_deref() != Some("0")
}

/// One rank's place in a group of GPUs.
#[derive(Debug)]
pub(super) struct Nccl {
    group: Arc<dyn Communicator>,
    /// It, or why it was given up.
    communicator: Mutex<Result<nccl_rs::Communicator, CommError>>,
    device: GpuNumber,
}

/// A GPU, by the CUDA runtime's number.
#[derive(Debug, Clone, Copy)]
struct GpuNumber(i32);

impl GpuNumber {
    fn read<'a>(self, values: DeviceSlice) -> nccl_rs::DeviceSlice<'a> {
        let DeviceSlice { address, len, element } = values;
        // SAFETY: promised when the slice was made.
        unsafe { nccl_rs::DeviceSlice::from_raw_parts(address, len, data_type(element), self.0) }
    }

    fn write<'a>(self, values: DeviceSlice) -> nccl_rs::DeviceSliceMut<'a> {
        let DeviceSlice { address, len, element } = values;
        // SAFETY: as above.
        unsafe { nccl_rs::DeviceSliceMut::from_raw_parts(address, len, data_type(element), self.0) }
    }
}

/// Meets the other ranks of `group`.
///
/// # Errors
/// When the library fails or the ranks do not meet.
fn join(
    group: &dyn Communicator,
    library: &Library,
    bind: &Bind,
) -> Result<(nccl_rs::Communicator, GpuNumber), CommError> {
    const JOIN: &str = "joining NCCL";
    let failed = |message: String| {
        let group = group.label().to_owned();
        match message.contains(TWO_ON_ONE) {
            true => CommError::SharedDevice { group, message },
            false => CommError::Library { operation: JOIN, group, message },
        }
    };
    let id = unique_id(group, library, &failed)?;
    let config = Config::new().name(group.label());
    let (rank, count, library, bind) = (group.rank(), group.size(), library.clone(), Arc::clone(bind));
    let timeout = group.timeout();
    let (told, joined) = mpsc::channel();
    // The library waits for the other ranks as long as it takes.
    thread::spawn(move || {
        let join = || {
            bind()?;
            let joined = nccl_rs::Communicator::init(&library, &id, rank, count, &config);
            let joined = joined.and_then(|communicator| {
                communicator.wait(timeout.map_or_else(Deadline::never, Deadline::after))?;
                let device = communicator.device()?;
                Ok((communicator, GpuNumber(device)))
            });
            joined.map_err(|error| error.to_string())
        };
        // Whoever does not wait any more has given the job up.
        let _ = told.send(join());
    });
    let ended = || failed("the thread that joined has ended".to_owned());
    let joined = match timeout {
        None => joined.recv().map_err(|_| ended())?,
        Some(after) => joined.recv_timeout(after).map_err(|missing| match missing {
            RecvTimeoutError::Timeout => CommError::Timeout {
                operation: JOIN,
                group: group.label().to_owned(),
                after,
                blame: "a rank has not come, or its network does not let it".to_owned(),
            },
            RecvTimeoutError::Disconnected => ended(),
        })?,
    };
    joined.map_err(failed)
}

fn library_error(group: &str, operation: &'static str, error: &Error) -> CommError {
    CommError::Library { operation, group: group.to_owned(), message: error.to_string() }
}

impl Nccl {
    pub(super) fn join(
        group: Arc<dyn Communicator>,
        library: &Library,
        bind: &Bind,
    ) -> Result<Self, CommError> {
        let (communicator, device) = join(&*group, library, bind)?;
        Ok(Self { group, communicator: Mutex::new(Ok(communicator)), device })
    }

    /// Asks the library for `operation`.
    fn ask(
        &self,
        operation: &'static str,
        ask: impl FnOnce(&nccl_rs::Communicator) -> Result<(), Error>,
    ) -> Result<(), CommError> {
        let mut ask = Some(ask);
        let mut answer = Ok(());
        // The first operations with a peer wait for it on the host, which the watchdog has to know.
        self.group.wait_for(operation, &mut || {
            let Some(ask) = ask.take() else { return true };
            let communicator = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
            answer = match &*communicator {
                Ok(communicator) => ask(communicator).map_err(|error| self.failed(operation, &error)),
                Err(error) => Err(error.clone()),
            };
            true
        })?;
        answer
    }

    fn failed(&self, operation: &'static str, error: &Error) -> CommError {
        library_error(self.group.label(), operation, error)
    }
}

/// An id that rank 0 makes and all get.
fn unique_id(
    group: &dyn Communicator,
    library: &Library,
    failed: &impl Fn(String) -> CommError,
) -> Result<UniqueId, CommError> {
    let own = match group.rank() {
        0 => UniqueId::new(library).map_err(|error| error.to_string()).map(Some),
        _ => Ok(None),
    };
    let mut shared = [0_u8; 1 + UniqueId::BYTES];
    if let Ok(Some(id)) = &own {
        shared[0] = 1;
        shared[1..].copy_from_slice(id.as_bytes());
    }
    group.broadcast(shared.as_mut_slice().into(), 0)?;
    own.map_err(failed)?;
    match shared.split_first() {
        Some((1, bytes)) => UniqueId::try_from(bytes).map_err(|error| failed(error.to_string())),
        _ => Err(failed("rank 0 could not begin it".to_owned())),
    }
}

fn data_type(element: ElementType) -> DataType {
    match element {
        ElementType::F32 => DataType::F32,
        ElementType::F64 => DataType::F64,
        ElementType::Bf16 => DataType::Bf16,
        ElementType::I32 => DataType::I32,
        ElementType::U64 => DataType::U64,
        ElementType::U8 => DataType::U8,
    }
}

fn stream(stream: DeviceStream) -> nccl_rs::Stream {
    // SAFETY: promised when it was made.
    unsafe { nccl_rs::Stream::from_raw(std::ptr::with_exposed_provenance_mut(stream.0 as usize)) }
}

impl DeviceCommunicator for Nccl {
    fn all_reduce(&self, values: DeviceSlice, op: ReduceOp, on: DeviceStream) -> Result<(), CommError> {
        let op = match op {
            ReduceOp::Sum => nccl_rs::ReduceOp::Sum,
            ReduceOp::Max => nccl_rs::ReduceOp::Max,
            ReduceOp::Min => nccl_rs::ReduceOp::Min,
        };
        self.ask("all_reduce on GPUs", |group| {
            group.all_reduce_in_place(self.device.write(values), op, stream(on))
        })
    }

    fn all_gather(&self, input: DeviceSlice, output: DeviceSlice, on: DeviceStream) -> Result<(), CommError> {
        self.ask("all_gather on GPUs", |group| {
            group.all_gather(self.device.read(input), self.device.write(output), stream(on))
        })
    }

    fn exchange(&self, sends: &[Piece], receives: &[Piece], on: DeviceStream) -> Result<(), CommError> {
        let within = |piece: &Piece| piece.peer < self.group.size();
        assert!(sends.iter().chain(receives).all(within), "pieces are for ranks of the group");
        self.ask("exchange on GPUs", |group| {
            group.library().group(|all| {
                for piece in sends {
                    all.send(group, self.device.read(piece.values), piece.peer, stream(on))?;
                }
                for piece in receives {
                    all.recv(group, self.device.write(piece.values), piece.peer, stream(on))?;
                }
                Ok(())
            })
        })
    }

    fn check(&self) -> Result<(), CommError> {
        let communicator = match self.communicator.try_lock() {
            Ok(communicator) => communicator,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // A call is under way, which tells of faults itself.
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        match &*communicator {
            Ok(communicator) => {
                let state = communicator.state().map(drop);
                state.map_err(|error| self.failed("an operation on GPUs", &error))
            }
            Err(error) => Err(error.clone()),
        }
    }
}

impl DeviceGroup for Nccl {
    fn give_up(&self, error: &CommError) {
        // A thread that is in a call of the library keeps it.
        let Ok(mut communicator) = self.communicator.try_lock() else { return };
        let given_up = std::mem::replace(&mut *communicator, Err(error.clone()));
        // Dropping it stops its streams at once, then waits for recordings, which this thread may have.
        let _ = thread::Builder::new().spawn(move || drop(given_up));
    }
}

/// The library without anything of ours between.
#[derive(Debug)]
pub(super) struct Bare {
    communicator: nccl_rs::Communicator,
    device: GpuNumber,
    label: String,
}

impl Bare {
    pub(super) fn join(group: &dyn Communicator, library: &Library, bind: &Bind) -> Result<Self, CommError> {
        let (communicator, device) = join(group, library, bind)?;
        Ok(Self { communicator, device, label: group.label().to_owned() })
    }

    fn told(&self, call: &'static str, answer: Result<(), Error>) -> Result<(), CommError> {
        answer.map_err(|error| library_error(&self.label, call, &error))
    }
}

impl super::Bare for Bare {
    fn all_reduce(&self, values: DeviceSlice, on: DeviceStream) -> Result<(), CommError> {
        let (values, sum) = (self.device.write(values), nccl_rs::ReduceOp::Sum);
        self.told("ncclAllReduce", self.communicator.all_reduce_in_place(values, sum, stream(on)))
    }

    fn all_to_all(&self, from: DeviceSlice, to: DeviceSlice, on: DeviceStream) -> Result<(), CommError> {
        let (from, to) = (self.device.read(from), self.device.write(to));
        self.told("ncclSend and ncclRecv", self.communicator.all_to_all(from, to, stream(on)))
    }

    fn all_gather(&self, from: DeviceSlice, to: DeviceSlice, on: DeviceStream) -> Result<(), CommError> {
        let (from, to) = (self.device.read(from), self.device.write(to));
        self.told("ncclAllGather", self.communicator.all_gather(from, to, stream(on)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expandable_segments_are_not_to_be_registered() {
        let registers = |variables: &[(&str, &str)]| {
            registers_expandable_segments(|name| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert!(!registers(&[]));
        for name in ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"] {
            let asked = (name, "max_split_size_mb:64,expandable_segments:True");
            assert!(registers(&[asked]));
            assert!(registers(&[asked, ("NCCL_GRAPH_REGISTER", "1")]));
            assert!(!registers(&[asked, ("NCCL_GRAPH_REGISTER", "0")]));
            assert!(!registers(&[(name, "expandable_segments:False")]));
        }
    }
}
