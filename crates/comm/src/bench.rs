//! Measures how fast collectives are, through the trait and, with MPI, beside the library's own.

use std::time::Instant;

use crate::buffer::{Buffer, BufferMut};
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CommError;

/// How long one operation takes at one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    /// The operation.
    pub operation: &'static str,
    /// Bytes of the largest buffer of a rank.
    pub bytes: usize,
    /// Median time of the slowest rank.
    pub seconds: f64,
    /// The same with the MPI library's own operation, called between the others.
    pub bare_seconds: Option<f64>,
}

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
        ("all_reduce", &|_, to| comm.all_reduce(BufferMut::F32(to), ReduceOp::Sum)),
        ("all_to_all", &|from, to| comm.all_to_all(Buffer::F32(from), BufferMut::F32(to))),
        ("all_gather", &|from, to| {
            comm.all_gather(Buffer::F32(&from[..to.len() / size]), BufferMut::F32(to))
        }),
    ];
    let mut measurements = Vec::new();
    for &bytes in bytes {
        // What every operation can cut into equal parts.
        let length = (bytes / size_of::<f32>()).next_multiple_of(size);
        let input = vec![1.0; length];
        let mut output = vec![1.0; length];
        for ((name, operation), bare) in operations.iter().zip(bare) {
            let mut contenders = vec![*operation];
            contenders.extend(bare);
            let mut times = vec![Vec::with_capacity(rounds); contenders.len()];
            // The first round touches fresh memory.
            for round in 0..=rounds {
                for turn in 0..contenders.len() {
                    // Who comes first changes, since what a call leaves in the caches helps the next.
                    let contender = (turn + round) % contenders.len();
                    comm.barrier()?;
                    let began = Instant::now();
                    contenders[contender](&input, &mut output)?;
                    if round > 0 {
                        times[contender].push(began.elapsed().as_secs_f64());
                    }
                    // Sums must stay numbers of ordinary size.
                    output.fill(1.0);
                }
            }
            let mut medians = Vec::new();
            for mut times in times {
                comm.all_reduce(BufferMut::F64(&mut times), ReduceOp::Max)?;
                medians.push(median(times));
            }
            measurements.push(Measurement {
                operation: name,
                bytes: length * size_of::<f32>(),
                seconds: medians[0],
                bare_seconds: medians.get(1).copied(),
            });
        }
    }
    Ok(measurements)
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
}
