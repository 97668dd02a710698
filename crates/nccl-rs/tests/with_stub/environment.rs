//! Communicators whose blocking the environment has decided, against their configuration.

use std::thread;

use nccl_rs::{Communicator, Config, Deadline, Error, ReduceOp, State, Stream, UniqueId};

use crate::stub::{LONG, SHORT, Stub, lend_mut};

const STREAM: Stream = Stream::DEFAULT;

/// Lets rank 1 come after rank 0: when `function` has been called, or rank 0 is lost.
fn come_last(stub: &Stub, communicator: &Communicator, function: &str) {
    while communicator.rank() == 1 && stub.calls(function) == 0 && stub.calls("ncclCommAbort") == 0 {
        thread::yield_now();
    }
}

#[test]
fn what_goes_on_in_the_background_without_being_asked_to_is_waited_for() {
    let stub = Stub::new();
    stub.set_blocking(false);
    let results = stub.ranks(2, &Config::new(), |communicator| {
        let mut sums = [1_i32; 4];
        come_last(&stub, &communicator, "ncclGroupEnd");
        communicator.all_reduce_in_place(lend_mut(&mut sums), ReduceOp::Sum, STREAM)?;
        assert_eq!(sums, [2; 4]);

        come_last(&stub, &communicator, "ncclCommSplit");
        let part = communicator.split(Some(0), -(communicator.rank() as i32), None)?;
        let part = part.expect("every rank has a color");
        assert_eq!((part.rank(), part.count()), (1 - communicator.rank(), 2));

        let (mut sum, mut greatest) = ([1_u8], [communicator.rank() as u8]);
        communicator.library().group(|group| {
            group.all_reduce_in_place(&communicator, lend_mut(&mut sum), ReduceOp::Sum, STREAM)?;
            group.all_reduce_in_place(&part, lend_mut(&mut greatest), ReduceOp::Max, STREAM)
        })?;
        assert_eq!((sum, greatest), ([2], [1]));
        part.close(Deadline::after(LONG))?;
        communicator.close(Deadline::after(LONG))
    });
    for result in results {
        result.expect("all ranks call the same");
    }
}

#[test]
fn a_group_of_another_library_does_not_end_too_early() {
    let (stub, other) = (Stub::new(), Stub::new());
    stub.set_blocking(false);
    let results = stub.ranks(2, &Config::new(), |communicator| {
        let mut sums = [1_i32; 4];
        // The other library has nothing to end, so only the operation itself says that it goes on.
        come_last(&stub, &communicator, "ncclAllReduce");
        other.library().group(|group| {
            group.all_reduce_in_place(&communicator, lend_mut(&mut sums), ReduceOp::Sum, STREAM)
        })?;
        assert_eq!(sums, [2; 4]);
        Ok::<_, Error>(())
    });
    for result in results {
        result.expect("all ranks call the same");
    }
}

#[test]
fn a_start_that_does_not_block_can_be_waited_for() {
    let stub = Stub::new();
    stub.set_blocking(false);
    let library = stub.library();
    let id = UniqueId::new(&library).expect("no failure is asked for");
    let init = |rank| Communicator::init(&library, &id, rank, 2, &Config::new()).expect("it does not wait");
    let first = init(0);
    assert_eq!(first.state().expect("no failure is asked for"), State::InProgress);
    let busy = first.finalize().expect_err("rank 1 is not there");
    assert!(matches!(busy, Error::Busy { .. }), "{busy}");
    let second = init(1);
    for communicator in [&first, &second] {
        communicator.wait(Deadline::after(LONG)).expect("both are there");
    }
}

#[test]
fn calls_that_block_without_being_asked_to_know_no_patience() {
    let stub = Stub::new();
    stub.set_blocking(true);
    let results = stub.ranks(2, &Config::new().non_blocking(SHORT), |communicator| {
        come_last(&stub, &communicator, "ncclGroupStart");
        if communicator.rank() == 1 {
            // Longer than rank 0 would have waited.
            thread::sleep(2 * SHORT);
        }
        let mut sum = [1_u8];
        communicator.all_reduce_in_place(lend_mut(&mut sum), ReduceOp::Sum, STREAM)?;
        assert_eq!(sum, [2]);
        communicator.close(Deadline::after(LONG))
    });
    for result in results {
        result.expect("all ranks call the same");
    }
}
