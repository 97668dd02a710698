//! Measures how fast collectives are, through the trait and beside the library's own: MPI's or NCCL.

use std::time::Instant;

use crate::buffer::{Buffer, BufferMut, ElementType};
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CommError;

mod on_devices;

pub use on_devices::{MeasuredDevice, collectives_on_devices};

/// How long one operation takes at one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    /// The operation.
    pub operation: &'static str,
    /// Type of the values.
    pub element: ElementType,
    /// Bytes of the largest buffer of a rank.
    pub bytes: usize,
    /// Ranks.
    pub ranks: usize,
    /// Median time of the slowest rank.
    pub seconds: f64,
    /// The same with the library's own operation, called between the others.
    pub bare_seconds: Option<f64>,
}

impl Measurement {
    /// Bytes of the buffer in a second, in GB.
    ///
    /// # Source
    /// The algorithm bandwidth of nccl-tests (doc/PERFORMANCE.md).
    pub fn algorithm_gb_per_s(&self) -> f64 {
        self.bytes as f64 / self.seconds / 1e9
    }

    /// Bytes that had to leave each rank in a second, in GB: what a link can be compared with, whatever the number
    /// of ranks.
    ///
    /// # Source
    /// The bus bandwidth of nccl-tests (doc/PERFORMANCE.md).
    pub fn bus_gb_per_s(&self) -> f64 {
        let others = (self.ranks - 1) as f64 / self.ranks as f64;
        let share = if self.operation == ALL_REDUCE { 2.0 * others } else { others };
        self.algorithm_gb_per_s() * share
    }
}

const ALL_REDUCE: &str = "all_reduce";
const ALL_TO_ALL: &str = "all_to_all";
const ALL_GATHER: &str = "all_gather";

/// Something to measure on a buffer to read and one to write.
type Operation<'a> = &'a dyn Fn(&[f32], &mut [f32]) -> Result<(), CommError>;

/// Measures sums, all-to-alls and all-gathers of `bytes` of f32, `rounds` times each.
///
/// # Collective
/// Every rank of `comm` must call it alike; all get the same results.
/// # Errors
/// What the operations return.
pub fn collectives(
    comm: &dyn Communicator,
    bytes: &[usize],
    rounds: usize,
) -> Result<Vec<Measurement>, CommError> {
    measure(comm, bytes, rounds, &[None, None, None])
}

/// As [`collectives`], in turns with `MPI_Allreduce`, `MPI_Alltoall` and `MPI_Allgather` on the same
/// buffers.
///
/// # Collective
/// Every rank of `world` must call it alike; all get the same results.
/// # Errors
/// What the operations return.
#[cfg(feature = "mpi")]
pub fn collectives_beside_bare(
    world: &crate::World,
    bytes: &[usize],
    rounds: usize,
) -> Result<Vec<Measurement>, CommError> {
    use crate::transport::{Fault, Transport as _};

    let comm = world.communicator();
    let Some(handle) = world.mpi_handle() else { return collectives(&**comm, bytes, rounds) };
    let fault = |operation, result: Result<(), Fault>| {
        result.map_err(|message| CommError::Library { operation, group: "world".to_owned(), message })
    };
    measure(
        &**comm,
        bytes,
        rounds,
        &[
            Some(&|from, to| fault("MPI_Allreduce", handle.sum(from, to))),
            Some(&|from, to| fault("MPI_Alltoall", handle.all_to_all(from, to))),
            Some(&|from, to| fault("MPI_Allgather", handle.all_gather(&from[..to.len() / comm.size()], to))),
        ],
    )
}

fn measure(
    comm: &dyn Communicator,
    bytes: &[usize],
    rounds: usize,
    bare: &[Option<Operation<'_>>; 3],
) -> Result<Vec<Measurement>, CommError> {
    let size = comm.size();
    let operations: [(&'static str, Operation<'_>); 3] = [
        (ALL_REDUCE, &|_, to| comm.all_reduce(BufferMut::F32(to), ReduceOp::Sum)),
        (ALL_TO_ALL, &|from, to| comm.all_to_all(Buffer::F32(from), BufferMut::F32(to))),
        (ALL_GATHER, &|from, to| comm.all_gather(Buffer::F32(&from[..to.len() / size]), BufferMut::F32(to))),
    ];
    let mut measurements = Vec::new();
    for &bytes in bytes {
        let length = length(bytes, ElementType::F32, size);
        let input = vec![1.0; length];
        let mut output = vec![1.0; length];
        for ((name, operation), bare) in operations.iter().zip(bare) {
            let mut contenders = vec![*operation];
            contenders.extend(bare);
            let medians = in_turns(comm, rounds, contenders.len(), |contender| {
                let began = Instant::now();
                contenders[contender](&input, &mut output)?;
                let seconds = began.elapsed().as_secs_f64();
                // Sums must stay numbers of ordinary size.
                output.fill(1.0);
                Ok(seconds)
            })?;
            measurements.push(Measurement {
                operation: name,
                element: ElementType::F32,
                bytes: length * size_of::<f32>(),
                ranks: size,
                seconds: medians[0],
                bare_seconds: medians.get(1).copied(),
            });
        }
    }
    Ok(measurements)
}

/// Values of about `bytes` that every operation can cut into equal parts.
fn length(bytes: usize, element: ElementType, ranks: usize) -> usize {
    (bytes / element.bytes()).next_multiple_of(ranks)
}

/// The median time of the slowest rank for each of so many contenders, measured in turns, `rounds` times each.
fn in_turns(
    comm: &dyn Communicator,
    rounds: usize,
    contenders: usize,
    mut seconds: impl FnMut(usize) -> Result<f64, CommError>,
) -> Result<Vec<f64>, CommError> {
    let mut times = vec![Vec::with_capacity(rounds); contenders];
    // The first round touches fresh memory.
    for round in 0..=rounds {
        for turn in 0..contenders {
            // Who comes first changes, since what a call leaves in the caches helps the next.
            let contender = (turn + round) % contenders;
            comm.barrier()?;
            let seconds = seconds(contender)?;
            if round > 0 {
                times[contender].push(seconds);
            }
        }
    }
    let slowest = |mut times: Vec<f64>| {
        comm.all_reduce(BufferMut::F64(&mut times), ReduceOp::Max)?;
        Ok(median(times))
    };
    times.into_iter().map(slowest).collect()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_measured_at_every_size() {
        let found =
            collectives(&crate::Solo::new("world"), &[0, 10, 1 << 16], 3).expect("solo does not fail");
        let sizes: Vec<usize> = found.iter().map(|measurement| measurement.bytes).collect();
        assert_eq!(sizes, [0, 0, 0, 8, 8, 8, 65_536, 65_536, 65_536]);
        assert!(found.iter().all(|measurement| measurement.seconds >= 0.0));
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }

    #[test]
    fn bandwidths_are_those_of_nccl_tests() {
        let of = |operation| {
            let (element, bytes, seconds) = (ElementType::Bf16, 8_000_000_000, 2.0);
            let found = Measurement { operation, element, bytes, ranks: 4, seconds, bare_seconds: None };
            (found.algorithm_gb_per_s(), found.bus_gb_per_s())
        };
        assert_eq!([ALL_REDUCE, ALL_TO_ALL, ALL_GATHER].map(of), [(4.0, 6.0), (4.0, 3.0), (4.0, 3.0)]);
    }
}
