//! Collectives between the memories of devices, beside NCCL called without anything of ours between.

use super::{ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Measurement, in_turns, length};
use crate::buffer::{BufferMut, ElementType};
use crate::communicator::{Communicator, ReduceOp};
use crate::device::{Bare, DeviceSlice, DeviceStream, Devices, Piece};
use crate::error::CommError;

/// How long a device should be at work between two looks at it, so that looking costs nothing beside.
const AT_WORK_S: f64 = 0.01;

/// Most operations between two looks.
const MOST_AT_ONCE: f64 = 1000.0;

/// Formats that are measured.
const FORMATS: [ElementType; 2] = [ElementType::Bf16, ElementType::F32];

/// Something to measure.
type Operation<'a> = &'a dyn Fn() -> Result<(), CommError>;

/// A rank's device, as measurements need it.
pub trait MeasuredDevice {
    /// So many zeros, which stay where they are as long as the device is measured.
    fn zeros(&mut self, element: ElementType, len: usize) -> DeviceSlice;

    /// Where operations go.
    fn stream(&self) -> DeviceStream;

    /// Asks for `work` and waits for it; seconds that the device was at it.
    ///
    /// # Errors
    /// What `work` returns, and what the ranks meet while they wait.
    fn time(&self, work: &mut dyn FnMut() -> Result<(), CommError>) -> Result<f64, CommError>;
}

/// Measures sums, all-to-alls and all-gathers of `bytes` of bf16 and f32 in the memory of the ranks' devices,
/// `rounds` times each. On GPUs every second time NCCL is called bare, on the same memory.
///
/// # Collective
/// Every rank of `comm` must call it alike; all get the same results.
///
/// # Errors
/// What the operations return.
///
/// # Panics
/// When the ranks of `comm` have no `devices`.
pub fn collectives_on_devices(
    comm: &dyn Communicator,
    devices: &Devices,
    device: &mut dyn MeasuredDevice,
    bytes: &[usize],
    rounds: usize,
) -> Result<Vec<Measurement>, CommError> {
    let ranks = comm.size();
    let group = comm.on_devices().expect("the ranks have devices");
    let bare = devices.bare(comm)?;
    let longest = bytes.iter().copied().max().unwrap_or(0);
    let mut measurements = Vec::new();
    for element in FORMATS {
        // Sums of zeros stay zeros, however often they are taken.
        let [all_from, all_to] = [0; 2].map(|_| device.zeros(element, length(longest, element, ranks)));
        for &bytes in bytes {
            let length = length(bytes, element, ranks);
            let (from, to, stream) = (all_from.part(0..length), all_to.part(0..length), device.stream());
            let share = |of: DeviceSlice, rank| of.part(rank * length / ranks..(rank + 1) * length / ranks);
            let pieces = |of: DeviceSlice| -> Vec<Piece> {
                (0..ranks).map(|peer| Piece { peer, values: share(of, peer) }).collect()
            };
            let ours: [(&str, Operation<'_>); 3] = [
                (ALL_REDUCE, &|| group.all_reduce(to, ReduceOp::Sum, stream)),
                (ALL_TO_ALL, &|| group.exchange(&pieces(from), &pieces(to), stream)),
                (ALL_GATHER, &|| group.all_gather(share(from, 0), to, stream)),
            ];
            let of_library = |at: usize, bare: &dyn Bare| match ours[at].0 {
                ALL_REDUCE => bare.all_reduce(to, stream),
                ALL_TO_ALL => bare.all_to_all(from, to, stream),
                _ => bare.all_gather(share(from, 0), to, stream),
            };
            for (at, (operation, work)) in ours.into_iter().enumerate() {
                let bare = bare.as_deref().map(|bare| move || of_library(at, bare));
                let medians = match &bare {
                    Some(bare) => medians(comm, device, rounds, &[work, bare])?,
                    None => medians(comm, device, rounds, &[work])?,
                };
                measurements.push(Measurement {
                    operation,
                    element,
                    bytes: length * element.bytes(),
                    ranks,
                    seconds: medians[0],
                    bare_seconds: medians.get(1).copied(),
                });
            }
        }
    }
    Ok(measurements)
}

fn medians(
    comm: &dyn Communicator,
    device: &dyn MeasuredDevice,
    rounds: usize,
    contenders: &[Operation<'_>],
) -> Result<Vec<f64>, CommError> {
    let time = |contender: usize, times: usize| {
        device.time(&mut || (0..times).try_for_each(|_| contenders[contender]()))
    };
    let mut once = [0.0];
    // The first time of all connects the ranks.
    for _ in 0..2 {
        for contender in 0..contenders.len() {
            comm.barrier()?;
            once = [time(contender, 1)?];
        }
    }
    comm.all_reduce(BufferMut::F64(&mut once), ReduceOp::Max)?;
    let times = (AT_WORK_S / once[0]).clamp(1.0, MOST_AT_ONCE) as usize;
    in_turns(comm, rounds, contenders.len(), |contender| Ok(time(contender, times)? / times as f64))
}
