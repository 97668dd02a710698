//! GPUs that exchange through NCCL.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nccl_rs::{Config, DataType, Deadline, Error, Library, UniqueId};

use super::{DeviceCommunicator, DeviceSlice, DeviceStream, Piece};
use crate::buffer::ElementType;
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CommError;

/// One rank's place in a group of GPUs.
#[derive(Debug)]
pub(super) struct Nccl {
    label: String,
    ranks: usize,
    communicator: Mutex<nccl_rs::Communicator>,
    /// Its GPU, by the CUDA runtime's number.
    device: i32,
}

impl Nccl {
    /// Meets the other ranks of `group`.
    ///
    /// # Errors
    /// When the library fails or the ranks do not meet.
    pub(super) fn join(
        group: &dyn Communicator,
        library: &Library,
        bind: &Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
        timeout: Duration,
    ) -> Result<Self, CommError> {
        const JOIN: &str = "joining NCCL";
        let failed = |message: String| {
            let group = group.label().to_owned();
            CommError::Library { operation: JOIN, group, message }
        };
        let id = unique_id(group, library, &failed)?;
        let config = Config::new().name(group.label());
        let (rank, count, library, bind) = (group.rank(), group.size(), library.clone(), Arc::clone(bind));
        let (told, joined) = mpsc::channel();
        // The library waits for the other ranks as long as it takes.
        thread::spawn(move || {
            let join = || {
                bind()?;
                let joined = nccl_rs::Communicator::init(&library, &id, rank, count, &config);
                let joined = joined.and_then(|communicator| {
                    communicator.wait(Deadline::after(timeout))?;
                    let device = communicator.device()?;
                    Ok((communicator, device))
                });
                joined.map_err(|error| error.to_string())
            };
            // Whoever does not wait any more has given the job up.
            let _ = told.send(join());
        });
        match joined.recv_timeout(timeout) {
            Ok(Ok((communicator, device))) => {
                let label = group.label().to_owned();
                Ok(Self { label, ranks: count, communicator: Mutex::new(communicator), device })
            }
            Ok(Err(error)) => Err(failed(error)),
            Err(RecvTimeoutError::Timeout) => Err(CommError::Timeout {
                operation: JOIN,
                group: group.label().to_owned(),
                after: timeout,
                blame: "a rank has not come, or its network does not let it".to_owned(),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(failed("the thread that joined has ended".to_owned())),
        }
    }

    /// Asks the library for `operation`.
    fn ask(
        &self,
        operation: &'static str,
        ask: impl FnOnce(&nccl_rs::Communicator) -> Result<(), Error>,
    ) -> Result<(), CommError> {
        let communicator = self.communicator.lock().unwrap_or_else(PoisonError::into_inner);
        ask(&communicator).map_err(|error| {
            let (group, message) = (self.label.clone(), error.to_string());
            CommError::Library { operation, group, message }
        })
    }

    fn read<'a>(&self, values: DeviceSlice) -> nccl_rs::DeviceSlice<'a> {
        let DeviceSlice { address, len, element } = values;
        // SAFETY: promised when the slice was made.
        unsafe { nccl_rs::DeviceSlice::from_raw_parts(address, len, data_type(element), self.device) }
    }

    fn write<'a>(&self, values: DeviceSlice) -> nccl_rs::DeviceSliceMut<'a> {
        let DeviceSlice { address, len, element } = values;
        // SAFETY: as above.
        unsafe { nccl_rs::DeviceSliceMut::from_raw_parts(address, len, data_type(element), self.device) }
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
        self.ask("all_reduce", |group| group.all_reduce_in_place(self.write(values), op, stream(on)))
    }

    fn all_gather(&self, input: DeviceSlice, output: DeviceSlice, on: DeviceStream) -> Result<(), CommError> {
        self.ask("all_gather", |group| group.all_gather(self.read(input), self.write(output), stream(on)))
    }

    fn exchange(&self, sends: &[Piece], receives: &[Piece], on: DeviceStream) -> Result<(), CommError> {
        let within = |piece: &Piece| piece.peer < self.ranks;
        assert!(sends.iter().chain(receives).all(within), "pieces are for ranks of the group");
        self.ask("exchange", |group| {
            group.library().group(|all| {
                for piece in sends {
                    all.send(group, self.read(piece.values), piece.peer, stream(on))?;
                }
                for piece in receives {
                    all.recv(group, self.write(piece.values), piece.peer, stream(on))?;
                }
                Ok(())
            })
        })
    }
}
