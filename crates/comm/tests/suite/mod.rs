//! What every backend must do, seen from one rank: called by all ranks of a group at once.

use std::fmt::Debug;
use std::sync::Arc;

use half::bf16;
use switchyard_comm::{Buffer, BufferMut, CommError, Communicator, Element, ReduceOp};

/// Runs everything that leaves the communicator whole.
pub(crate) fn all_operations(comm: &dyn Communicator) {
    every_type(comm);
    sums_in_rank_order(comm);
    splits(comm);
}

/// A type whose values the suite can make up.
trait Sample: Element + PartialOrd {
    fn sample(number: usize) -> Self;
    fn add(self, other: Self) -> Self;
}

macro_rules! samples {
    ($($type:ty: $make:expr, $add:expr;)+) => {$(
        impl Sample for $type {
            fn sample(number: usize) -> Self {
                $make(number)
            }
            fn add(self, other: Self) -> Self {
                $add(self, other)
            }
        }
    )+};
}

samples! {
    f32: |n| n as f32, |a, b| a + b;
    f64: |n| n as f64, |a, b| a + b;
    bf16: |n| bf16::from_f32((n % 32) as f32), |a: bf16, b: bf16| bf16::from_f32(a.to_f32() + b.to_f32());
    i32: |n| n as i32 - 50, |a: i32, b: i32| a.wrapping_add(b);
    u64: |n| n as u64, |a: u64, b: u64| a.wrapping_add(b);
    u8: |n| n as u8, |a: u8, b: u8| a.wrapping_add(b);
}

fn every_type(comm: &dyn Communicator) {
    every_length::<f32>(comm);
    every_length::<f64>(comm);
    every_length::<bf16>(comm);
    every_length::<i32>(comm);
    every_length::<u64>(comm);
    every_length::<u8>(comm);
}

fn every_length<T: Sample>(comm: &dyn Communicator)
where
    for<'a> Buffer<'a>: From<&'a [T]>,
    for<'a> BufferMut<'a>: From<&'a mut [T]>,
{
    // The longest are above what a backend may take for small.
    for length in [0, 1, 3, 7, 1000, 70_001] {
        one_length::<T>(comm, length);
    }
    variable_counts::<T>(comm);
    comm.barrier().expect("all come");
}

/// `length` values of rank `rank`, told apart by `salt`.
fn values<T: Sample>(rank: usize, length: usize, salt: usize) -> Vec<T> {
    (0..length).map(|i| T::sample((rank * 7 + i * 3 + salt) % 101)).collect()
}

fn one_length<T: Sample>(comm: &dyn Communicator, length: usize)
where
    for<'a> Buffer<'a>: From<&'a [T]>,
    for<'a> BufferMut<'a>: From<&'a mut [T]>,
{
    let (rank, size) = (comm.rank(), comm.size());
    for root in 0..size {
        let mut buffer = values::<T>(rank, length, root);
        comm.broadcast((&mut *buffer).into(), root).expect("all come");
        same(&buffer, &values(root, length, root));
    }
    for op in [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min] {
        let mut buffer = values::<T>(rank, length, 1);
        comm.all_reduce((&mut *buffer).into(), op).expect("all come");
        same(&buffer, &combined(size, length, op));

        let input = values::<T>(rank, length * size, 1);
        let mut output = vec![T::default(); length];
        comm.reduce_scatter((&*input).into(), (&mut *output).into(), op).expect("all come");
        same(&output, &combined(size, length * size, op)[rank * length..(rank + 1) * length]);
    }
    let mut output = vec![T::default(); length * size];
    comm.all_gather((&*values::<T>(rank, length, 2)).into(), (&mut *output).into()).expect("all come");
    let expected: Vec<T> = (0..size).flat_map(|from| values(from, length, 2)).collect();
    same(&output, &expected);

    let input: Vec<T> = (0..size).flat_map(|to| values(rank, length, 10 * to)).collect();
    comm.all_to_all((&*input).into(), (&mut *output).into()).expect("all come");
    let expected: Vec<T> = (0..size).flat_map(|from| values(from, length, 10 * rank)).collect();
    same(&output, &expected);
}

fn combined<T: Sample>(size: usize, length: usize, op: ReduceOp) -> Vec<T> {
    let parts: Vec<Vec<T>> = (0..size).map(|rank| values(rank, length, 1)).collect();
    let combine = |a: T, b: T| match op {
        ReduceOp::Sum => a.add(b),
        ReduceOp::Max => {
            if a < b {
                b
            } else {
                a
            }
        }
        ReduceOp::Min => {
            if b < a {
                b
            } else {
                a
            }
        }
    };
    (0..length).map(|i| parts[1..].iter().fold(parts[0][i], |all, part| combine(all, part[i]))).collect()
}

fn variable_counts<T: Sample>(comm: &dyn Communicator)
where
    for<'a> Buffer<'a>: From<&'a [T]>,
    for<'a> BufferMut<'a>: From<&'a mut [T]>,
{
    let (rank, size) = (comm.rank(), comm.size());
    // Some ranks send nothing at all, some nothing to some.
    for scale in [0, 1, 1001] {
        let count = |from: usize, to: usize| (from * 3 + to * 5) % 4 * scale;
        let counts: Vec<usize> = (0..size).map(|from| count(from, 1)).collect();
        let mut output = vec![T::default(); counts.iter().sum()];
        let input = values::<T>(rank, counts[rank], 3);
        comm.all_gather_v((&*input).into(), (&mut *output).into(), &counts).expect("all come");
        let expected: Vec<T> = (0..size).flat_map(|from| values(from, counts[from], 3)).collect();
        same(&output, &expected);

        let sends: Vec<usize> = (0..size).map(|to| count(rank, to)).collect();
        let receives: Vec<usize> = (0..size).map(|from| count(from, rank)).collect();
        let input: Vec<T> = (0..size).flat_map(|to| values(rank, sends[to], to)).collect();
        let mut output = vec![T::default(); receives.iter().sum()];
        comm.all_to_all_v((&*input).into(), &sends, (&mut *output).into(), &receives).expect("all come");
        let expected: Vec<T> = (0..size).flat_map(|from| values(from, receives[from], rank)).collect();
        same(&output, &expected);
    }
}

/// `assert_eq` that does not print thousands of values.
fn same<T: PartialEq + Debug>(found: &[T], expected: &[T]) {
    assert_eq!(found.len(), expected.len());
    if let Some(i) = (0..found.len()).find(|&i| found[i] != expected[i]) {
        panic!("value {i} of {}: {:?} instead of {:?}", found.len(), found[i], expected[i]);
    }
}

/// Values whose sum depends on the order and on the type of the running sum.
fn awkward(rank: usize, index: usize) -> f64 {
    let scale = [1e8, 1.0, -1e8, 3e-5][(rank + index) % 4];
    scale * (1.0 + (index % 1000) as f64 / 1000.0 + rank as f64 / 7.0)
}

fn sums_in_rank_order(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    for length in [5, 3001, 300_007] {
        let mut f32s: Vec<f32> = (0..length).map(|i| awkward(rank, i) as f32).collect();
        let mut f64s: Vec<f64> = (0..length).map(|i| awkward(rank, i)).collect();
        let mut bf16s: Vec<bf16> = f64s.iter().map(|value| bf16::from_f64(*value)).collect();
        comm.all_reduce(BufferMut::F32(&mut f32s), ReduceOp::Sum).expect("all come");
        comm.all_reduce(BufferMut::F64(&mut f64s), ReduceOp::Sum).expect("all come");
        comm.all_reduce(BufferMut::Bf16(&mut bf16s), ReduceOp::Sum).expect("all come");
        for i in 0..length {
            let terms = (0..size).map(|rank| awkward(rank, i));
            let sum = terms.clone().map(|x| x as f32).reduce(|a, b| a + b).expect("a rank");
            assert_eq!(f32s[i].to_bits(), sum.to_bits(), "f32 {i} of {length}");
            let sum = terms.clone().reduce(|a, b| a + b).expect("a rank");
            assert_eq!(f64s[i].to_bits(), sum.to_bits(), "f64 {i} of {length}");
            let sum = terms.map(|x| bf16::from_f64(x).to_f32()).reduce(|a, b| a + b).expect("a rank");
            assert_eq!(bf16s[i].to_bits(), bf16::from_f32(sum).to_bits(), "bf16 {i} of {length}");
        }
    }
}

fn splits(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    let half = comm.split(rank % 2 + 40, "half").expect("all come");
    assert_eq!((half.label(), half.rank(), half.size()), ("half", rank / 2, (size + 1 - rank % 2) / 2));
    let machines = comm.machines().iter().skip(rank % 2).step_by(2).copied().collect::<Vec<_>>();
    assert_eq!(half.machines(), machines);
    let mut sum = [rank as u64];
    half.all_reduce(BufferMut::U64(&mut sum), ReduceOp::Sum).expect("all come");
    assert_eq!(sum[0] as usize, (0..size).filter(|other| other % 2 == rank % 2).sum::<usize>());

    let alone = half.split(half.rank(), "alone").expect("all come");
    assert_eq!((alone.rank(), alone.size()), (0, 1));
    every_length::<f32>(&*alone);
    alone.barrier().expect("all come");
    let whole = comm.split(0, "whole").expect("all come");
    assert_eq!((whole.rank(), whole.size()), (rank, size));
    // Calls on several groups may interleave as long as each group sees one order.
    half.barrier().expect("all come");
    whole.barrier().expect("all come");
    every_length::<i32>(&*half);
}

/// Leaves the communicator broken: the last rank calls another operation.
pub(crate) fn disagreement_in_operation(comm: &dyn Communicator) {
    let last = comm.rank() + 1 == comm.size();
    let child = comm.split(0, "child").expect("all come");
    let found =
        if last { comm.barrier() } else { comm.all_reduce(BufferMut::F32(&mut [0.0; 4]), ReduceOp::Sum) };
    let error = found.expect_err("calls differ");
    let text = error.to_string();
    assert!(matches!(error, CommError::Disagreement { .. }), "{text}");
    let caller = format!("rank {} called barrier", comm.size() - 1);
    assert!(text.contains("all_reduce (Sum) of 4 F32 values") && text.contains(&caller), "{text}");
    broken(comm, &child, &error);
}

/// Leaves the communicator broken: the last rank has another length.
pub(crate) fn disagreement_in_length(comm: &dyn Communicator) {
    let last = comm.rank() + 1 == comm.size();
    let child = comm.split(0, "child").expect("all come");
    let mut values = vec![bf16::ONE; if last { 5 } else { 4 }];
    let error = comm.all_reduce(BufferMut::Bf16(&mut values), ReduceOp::Max).expect_err("lengths differ");
    let text = error.to_string();
    assert!(matches!(error, CommError::Disagreement { .. }), "{text}");
    assert!(text.contains("of 4 Bf16 values") && text.contains("of 5 Bf16 values"), "{text}");
    broken(comm, &child, &error);
}

/// Leaves the communicator broken: rank 0 sends the last rank less than that expects.
pub(crate) fn disagreement_in_counts(comm: &dyn Communicator) {
    let (rank, last) = (comm.rank(), comm.size() - 1);
    let child = comm.split(0, "child").expect("all come");
    let mut sends = vec![2; comm.size()];
    if rank == 0 {
        sends[last] = 1;
    }
    let receives = vec![2; comm.size()];
    let input = vec![0_u8; sends.iter().sum()];
    let mut output = vec![0_u8; receives.iter().sum()];
    let found = comm.all_to_all_v(Buffer::U8(&input), &sends, BufferMut::U8(&mut output), &receives);
    let error = found.expect_err("counts differ");
    let text = error.to_string();
    assert!(matches!(error, CommError::Disagreement { .. }), "{text}");
    assert!(text.contains(&format!("rank 0 sends rank {last} 1 values, rank {last} expects 2")), "{text}");
    broken(comm, &child, &error);
}

/// Leaves the communicator broken: the last rank's buffers do not fit its own call.
pub(crate) fn wrong_buffer(comm: &dyn Communicator) {
    let last = comm.rank() + 1 == comm.size();
    let child = comm.split(0, "child").expect("all come");
    let input = [0.0_f32; 4];
    let mut output = vec![0.0_f32; 4 * comm.size() + usize::from(last)];
    let error =
        comm.all_gather(Buffer::F32(&input), BufferMut::F32(&mut output)).expect_err("a buffer does not fit");
    assert!(!last || matches!(error, CommError::WrongBuffer { .. }), "{error}");
    broken(comm, &child, &error);
}

fn broken(comm: &dyn Communicator, child: &Arc<dyn Communicator>, error: &CommError) {
    assert_eq!(comm.barrier().as_ref(), Err(error));
    assert_eq!(child.barrier().as_ref(), Err(error));
    assert_eq!(comm.split(0, "later").err().as_ref(), Some(error));
}
