//! Communicators that do not block, and ranks that do not come.

use std::thread;
use std::time::Instant;

use nccl_rs::{Communicator, Config, Deadline, Error, ReduceOp, State, Stream, UniqueId};

use crate::stub::{LONG, SHORT, Stub, lend_mut};

const STREAM: Stream = Stream::DEFAULT;

#[test]
fn a_rank_can_come_late() {
    let stub = Stub::new();
    let library = stub.library();
    let id = UniqueId::new(&library).expect("no failure is asked for");
    let config = Config::new().name("late").non_blocking(LONG);
    let init = |rank| Communicator::init(&library, &id, rank, 2, &config).expect("it does not wait");
    let first = init(0);
    assert_eq!(first.state().expect("no failure is asked for"), State::InProgress);
    let started = Instant::now();
    let error = first.wait(Deadline::after(SHORT)).expect_err("rank 1 is not there");
    assert!(started.elapsed() >= SHORT);
    assert!(!error.is_fatal(), "it can be waited for again");
    let Error::Timeout { who, operation, after, aborted } = &error else { panic!("{error}") };
    assert_eq!((who.rank, *operation, *aborted), (0, "joining the communicator", false));
    assert!(*after >= SHORT);
    assert!(
        error.to_string().starts_with("NCCL, rank 0 of 2 in `late`: joining the communicator"),
        "{error}"
    );

    let busy = first.all_reduce_in_place(lend_mut(&mut [0_u8]), ReduceOp::Sum, STREAM);
    let expected = "NCCL, rank 0 of 2 in `late`: all_reduce has to wait until joining the communicator is \
                    through: call `wait` first";
    assert_eq!(busy.expect_err("rank 1 is not there").to_string(), expected);
    let device = first.device().expect_err("rank 1 is not there");
    assert!(matches!(device, Error::Busy { .. }), "{device}");

    let second = init(1);
    for communicator in [&first, &second] {
        communicator.wait(Deadline::after(LONG)).expect("both are there");
        assert_eq!(communicator.state().expect("no failure is asked for"), State::Ready);
        assert_eq!(communicator.device().expect("it is ready"), 0);
    }
}

#[test]
fn a_start_without_others_can_be_given_up() {
    let stub = Stub::new();
    let library = stub.library();
    let id = UniqueId::new(&library).expect("no failure is asked for");
    let config = Config::new().non_blocking(LONG);
    let alone = Communicator::init(&library, &id, 0, 2, &config).expect("it does not wait");
    let error = alone.destroy().expect_err("it has not begun");
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    assert_eq!((stub.calls("ncclCommDestroy"), stub.calls("ncclCommAbort")), (0, 1));
}

#[test]
fn an_operation_without_others_is_named_and_aborted() {
    let stub = Stub::new();
    let config = Config::new().name("dense").non_blocking(SHORT);
    let results = stub.ranks(2, &config, |communicator| {
        if communicator.rank() == 1 {
            // Does something else until rank 0 has lost its patience.
            while stub.calls("ncclCommAbort") == 0 {
                thread::sleep(SHORT / 10);
            }
            return None;
        }
        let mut value = [1_u8];
        let result = communicator.all_reduce_in_place(lend_mut(&mut value), ReduceOp::Sum, STREAM);
        let next = communicator.finalize().expect_err("it was aborted");
        assert!(matches!(next, Error::Ended { end: "aborted", .. }), "{next}");
        Some(result.expect_err("rank 1 does something else"))
    });
    let error = results[0].as_ref().expect("rank 0 has one");
    assert!(error.is_fatal());
    assert!(matches!(error, Error::Timeout { after, .. } if *after >= SHORT), "{error}");
    let text = error.to_string();
    assert!(
        text.starts_with("NCCL, rank 0 of 2 in `dense`: all_reduce did not come about within "),
        "{text}"
    );
    assert!(text.ends_with("this rank gave the communicator up"), "{text}");
    assert_eq!(stub.calls("ncclCommAbort"), 2, "each rank once, and not again when dropped");
}

#[test]
fn a_split_without_others_gives_both_communicators_up() {
    let stub = Stub::new();
    let config = Config::new().non_blocking(SHORT);
    stub.ranks(2, &config, |communicator| {
        if communicator.rank() == 1 {
            while stub.calls("ncclCommAbort") == 0 {
                thread::sleep(SHORT / 10);
            }
            return;
        }
        let error = communicator.split(Some(0), 0, None).expect_err("rank 1 does something else");
        assert!(matches!(error, Error::Timeout { operation: "split", aborted: true, .. }), "{error}");
    });
}

#[test]
fn a_group_without_others_waits_for_each_communicator_once() {
    let stub = Stub::new();
    let config = Config::new().non_blocking(SHORT);
    let (first, second) = (stub.alone(&config), stub.alone(&config));
    stub.set_endless(true);
    let (mut one, mut two) = ([1_u8], [2_u8]);
    let error = first.library().group(|group| {
        group.broadcast(&first, lend_mut(&mut one), 0, STREAM)?;
        group.all_reduce_in_place(&second, lend_mut(&mut two), ReduceOp::Sum, STREAM)?;
        group.all_gather_in_place(&first, lend_mut::<u8>(&mut []), STREAM)
    });
    let error = error.expect_err("it never ends");
    let operation = "a group of operations";
    assert!(matches!(error, Error::Timeout { operation: found, aborted: true, .. } if found == operation));
    assert_eq!(stub.calls("ncclCommAbort"), 2, "what was lent to either is free again");
}

#[test]
fn an_operation_whose_end_cannot_be_seen_is_aborted() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new().non_blocking(LONG));
    communicator.device().expect("no failure is asked for");
    stub.fail("ncclCommGetAsyncError", 3);
    let error = communicator.all_reduce_in_place(lend_mut(&mut [1_u8]), ReduceOp::Sum, STREAM);
    assert!(matches!(error, Err(Error::Communicator { .. })), "{error:?}");
    assert_eq!(stub.calls("ncclCommAbort"), 1, "what was lent is free again");
}

#[test]
fn a_fault_in_the_background_names_the_operation() {
    let stub = Stub::new();
    let mut value = [1_u8];
    let communicator = stub.alone(&Config::new().non_blocking(LONG));
    stub.set_async_error(6);
    let error = communicator.broadcast(lend_mut(&mut value), 0, STREAM).expect_err("it was told to fail");
    assert!(matches!(error, Error::Asynchronous { operation: "broadcast", .. }), "{error}");
    assert_eq!(stub.calls("ncclCommAbort"), 1, "what was lent is free again");
    let next = communicator.state().expect_err("it was aborted");
    assert!(matches!(next, Error::Ended { end: "aborted", .. }), "{next}");
}

#[test]
fn a_split_that_breaks_in_the_background_is_given_up() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new().non_blocking(LONG));
    stub.set_async_error(1);
    let error = communicator.split(Some(0), 0, None).expect_err("it was told to fail");
    assert!(matches!(error, Error::Asynchronous { operation: "split", .. }), "{error}");
    assert_eq!(stub.calls("ncclCommAbort"), 2, "the whole and its part");
}
