//! How communicators end.

use std::sync::Mutex;
use std::thread;

use nccl_rs::{Config, Deadline, Error, ReduceOp, Stream};

use crate::stub::{LONG, Stub, lend, lend_mut};

const STREAM: Stream = Stream::DEFAULT;

/// How often the stand-in was asked to finalize, destroy and abort.
fn ends(stub: &Stub) -> [i32; 3] {
    ["ncclCommFinalize", "ncclCommDestroy", "ncclCommAbort"].map(|call| stub.calls(call))
}

fn both() -> [Config; 2] {
    [Config::new(), Config::new().non_blocking(LONG)]
}

#[test]
fn close_ends_in_order() {
    for config in both() {
        let stub = Stub::new();
        for result in stub.ranks(2, &config, |communicator| communicator.close(Deadline::after(LONG))) {
            result.expect("all ranks close");
        }
        assert_eq!(ends(&stub), [2, 2, 0]);
    }
}

#[test]
fn what_is_dropped_is_aborted_and_what_is_finalized_destroyed() {
    for config in both() {
        let stub = Stub::new();
        drop(stub.alone(&config));
        assert_eq!(ends(&stub), [0, 0, 1]);

        let communicator = stub.alone(&config);
        communicator.finalize().expect("no failure is asked for");
        communicator.wait(Deadline::after(LONG)).expect("no other rank is needed");
        drop(communicator);
        assert_eq!(ends(&stub), [1, 1, 1]);
    }
}

#[test]
fn what_is_still_finalizing_is_aborted() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new().non_blocking(LONG));
    stub.set_endless(true);
    communicator.finalize().expect("it goes on in the background");
    drop(communicator);
    assert_eq!(ends(&stub), [1, 0, 1]);
}

#[test]
fn destroy_finalizes_by_itself() {
    let stub = Stub::new();
    stub.alone(&Config::new()).destroy().expect("no failure is asked for");
    assert_eq!(ends(&stub), [0, 1, 0]);
}

#[test]
fn nothing_is_possible_after_the_end() {
    let stub = Stub::new();
    let aborted = stub.alone(&Config::new());
    aborted.abort().expect("no failure is asked for");
    let finalized = stub.alone(&Config::new());
    finalized.finalize().expect("no failure is asked for");
    for (communicator, expected) in [(&aborted, "aborted"), (&finalized, "finalized")] {
        let memory = [0_u8];
        let results = [
            communicator.all_reduce_in_place(lend_mut(&mut [0_u8]), ReduceOp::Sum, STREAM),
            communicator.send(lend(&memory), 0, STREAM),
            communicator.split(Some(0), 0, None).map(|_| ()),
            communicator.finalize(),
            communicator.device().map(|_| ()),
            // SAFETY: refused before the memory is used.
            unsafe { communicator.register(lend(&memory)) }.map(|_| ()),
        ];
        for result in results {
            let error = result.expect_err("it has ended");
            assert!(matches!(error, Error::Ended { end, .. } if end == expected), "{error}");
        }
    }
    let error = aborted.state().expect_err("it has ended");
    assert!(matches!(error, Error::Ended { end: "aborted", .. }), "{error}");
    aborted.destroy().expect_err("it has ended");
    assert_eq!(ends(&stub), [1, 0, 1]);
    drop(finalized);
    assert_eq!(ends(&stub), [1, 1, 1]);
}

#[test]
fn registrations_end_with_their_guard_or_the_communicator() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new());
    let memory = [0_f32; 4];
    // SAFETY: the stand-in does not use the memory.
    let register = || unsafe { communicator.register(lend(&memory)) }.expect("no failure is asked for");
    drop(register());
    assert_eq!(stub.calls("ncclCommDeregister"), 1);
    register().release().expect("no failure is asked for");
    assert_eq!(stub.calls("ncclCommDeregister"), 2);
    let late = register();
    communicator.abort().expect("no failure is asked for");
    drop(late);
    assert_eq!(stub.calls("ncclCommDeregister"), 2, "the library has taken it back");
}

#[test]
fn another_thread_can_use_and_abort_it() {
    let stub = Stub::new();
    let communicator = Mutex::new(stub.alone(&Config::new()));
    thread::scope(|scope| {
        scope.spawn(|| {
            let communicator = communicator.lock().expect("nobody panics");
            let mut value = [5_i32];
            let summed = communicator.all_reduce_in_place(lend_mut(&mut value), ReduceOp::Sum, STREAM);
            summed.expect("no other rank is needed");
            communicator.abort().expect("no failure is asked for");
        });
    });
    drop(communicator);
    assert_eq!(ends(&stub), [0, 0, 1]);
}
