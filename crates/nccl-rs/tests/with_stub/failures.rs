//! What becomes of each call's errors.

use std::panic::{AssertUnwindSafe, catch_unwind};

use nccl_rs::{Code, Communicator, Config, Deadline, Error, Failure, ReduceOp, State, Stream, UniqueId};

use crate::stub::{LONG, Stub, lend, lend_mut};

const STREAM: Stream = Stream::DEFAULT;

/// What the library said, wherever in the error it is.
fn failure(error: &Error) -> &Failure {
    match error {
        Error::Library(failure)
        | Error::Communicator { failure, .. }
        | Error::Asynchronous { failure, .. } => failure,
        other => panic!("not of the library: {other}"),
    }
}

type Call = fn(&Communicator) -> Result<(), Error>;

/// Operations by the function that they call.
const OPERATIONS: [(&str, Call); 8] = [
    ("ncclAllReduce", |rank| rank.all_reduce_in_place(lend_mut(&mut [1_u8]), ReduceOp::Sum, STREAM)),
    ("ncclReduceScatter", |rank| rank.reduce_scatter_in_place(lend_mut(&mut [1_u8]), ReduceOp::Sum, STREAM)),
    ("ncclAllGather", |rank| rank.all_gather_in_place(lend_mut(&mut [1_u8]), STREAM)),
    ("ncclBroadcast", |rank| rank.broadcast(lend_mut(&mut [1_u8]), 0, STREAM)),
    ("ncclReduce", |rank| rank.reduce_in_place(lend_mut(&mut [1_u8]), (ReduceOp::Sum, 0), STREAM)),
    ("ncclSend", |rank| rank.send(lend(&[1_u8]), 0, STREAM)),
    ("ncclRecv", |rank| rank.recv(lend_mut(&mut [1_u8]), 0, STREAM)),
    ("ncclSend", |rank| rank.all_to_all(lend(&[1_u8]), lend_mut(&mut [1_u8]), STREAM)),
];

#[test]
fn an_operation_that_fails_says_which_and_why() {
    for config in [Config::new().name("dense"), Config::new().name("dense").non_blocking(LONG)] {
        for (call, operation) in OPERATIONS {
            let stub = Stub::new();
            let communicator = stub.alone(&config);
            stub.fail(call, 3);
            let error = operation(&communicator).expect_err("it was told to fail");
            assert_eq!(failure(&error).call, call);
            assert_eq!(failure(&error).code, Code::InternalError);
            assert!(error.is_fatal());
            let text = error.to_string();
            let expected =
                format!("{call} failed: internal error; the library's last warning: {call} was told");
            assert!(text.starts_with("NCCL, rank 0 of 1 in `dense`: ") && text.contains(&expected), "{text}");
            assert_eq!(stub.open_groups(), 0, "{call} left its group open");
        }
    }
}

#[test]
fn an_argument_that_was_refused_leaves_the_communicator_whole() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new());
    let (call, operation) = OPERATIONS[0];
    stub.fail(call, 4);
    let error = operation(&communicator).expect_err("it was told to fail");
    assert_eq!(failure(&error).code, Code::InvalidArgument);
    assert!(!error.is_fatal());
    stub.fail(call, 0);
    operation(&communicator).expect("it goes on");
}

#[test]
fn numbers_of_errors_are_those_of_the_header() {
    let stub = Stub::new();
    let library = stub.library();
    assert_eq!(library.last_error(), None);
    for (answer, code) in [
        (1, Code::UnhandledCudaError),
        (2, Code::SystemError),
        (3, Code::InternalError),
        (4, Code::InvalidArgument),
        (5, Code::InvalidUsage),
        (6, Code::RemoteError),
        (8, Code::Timeout),
        (9, Code::Other(9)),
    ] {
        stub.fail("ncclGetUniqueId", answer);
        let error = UniqueId::new(&library).expect_err("it was told to fail");
        assert_eq!(failure(&error).code, code);
    }
    assert_eq!(library.last_error().as_deref(), Some("ncclGetUniqueId was told to fail"));
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    let stub = Stub::new();
    let library = stub.library();
    let id = UniqueId::new(&library).expect("no failure is asked for");
    stub.fail("ncclCommInitRankConfig", 2);
    let error = Communicator::init(&library, &id, 0, 1, &Config::new()).expect_err("it was told to fail");
    assert_eq!(failure(&error).call, "ncclCommInitRankConfig");
    let error = Communicator::init(&library, &id, 2, 2, &Config::new()).expect_err("ranks are 0 and 1");
    assert_eq!(error.to_string(), "joining the communicator: there is no rank 2 among 2");
    assert_eq!(stub.calls("ncclCommAbort"), 0, "there is nothing to abort");
    stub.fail("ncclCommInitRankConfig", 0);
    stub.fail("joining", 6);
    let error = Communicator::init(&library, &id, 0, 1, &Config::new()).expect_err("it was told to fail");
    assert_eq!(failure(&error).code, Code::RemoteError);
    assert_eq!(stub.calls("ncclCommAbort"), 1, "what was begun is given up");
}

#[test]
fn groups_that_cannot_start_or_end_say_so() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new().name("dense"));
    let (_, operation) = OPERATIONS[0];
    for (call, fatal, start) in [
        ("ncclGroupStart", false, "ncclGroupStart failed: "),
        // Where the operation fails: it was only queued before.
        ("ncclGroupEnd", true, "NCCL, rank 0 of 1 in `dense`: ncclGroupEnd failed: "),
    ] {
        stub.fail(call, 1);
        let error = operation(&communicator).expect_err("it was told to fail");
        assert_eq!(failure(&error).call, call);
        assert_eq!(error.is_fatal(), fatal, "{error}");
        assert!(error.to_string().starts_with(start), "{error}");
        stub.fail(call, 0);
        operation(&communicator).expect("the next group is whole");
    }
    stub.fail("ncclGroupEnd", 1);
    let error = communicator.library().group(|_| Ok(())).expect_err("it was told to fail");
    assert!(matches!(error, Error::Library(_)), "no communicator was used: {error}");
}

#[test]
fn splits_that_fail_say_where() {
    for call in ["ncclCommSplit", "ncclCommUserRank", "ncclCommCount"] {
        let stub = Stub::new();
        let communicator = stub.alone(&Config::new());
        stub.fail(call, 1);
        let error = communicator.split(Some(0), 0, None).expect_err("it was told to fail");
        assert_eq!(failure(&error).call, call);
        let aborted = i32::from(call != "ncclCommSplit");
        assert_eq!(stub.calls("ncclCommAbort"), aborted, "a part without numbers is given up");
    }
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new());
    stub.set_endless(true);
    stub.fail("ncclCommSplit", 1);
    let error = communicator.split(Some(0), 0, None).expect_err("it was told to fail");
    assert_eq!(failure(&error).call, "ncclCommSplit");
    let error = communicator.split(Some(u32::MAX), 0, None).expect_err("the library counts to 31 bits");
    assert!(error.to_string().starts_with("color cannot be 4294967295"), "{error}");
}

#[test]
fn a_device_that_is_not_known_stops_operations() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new());
    stub.fail("ncclCommCuDevice", 1);
    let (_, operation) = OPERATIONS[0];
    let error = operation(&communicator).expect_err("it was told to fail");
    assert_eq!(failure(&error).call, "ncclCommCuDevice");
    stub.fail("ncclCommCuDevice", 0);
    assert_eq!(communicator.device().expect("no failure is asked for"), 0);
}

#[test]
fn ends_that_fail_say_so_and_are_ends() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new());
    stub.fail("ncclCommFinalize", 6);
    let error = communicator.finalize().expect_err("it was told to fail");
    assert_eq!(failure(&error).call, "ncclCommFinalize");
    stub.fail("ncclCommAbort", 3);
    let error = communicator.abort().expect_err("it was told to fail");
    assert_eq!(failure(&error).call, "ncclCommAbort");
    let error = communicator.abort().expect_err("it is gone");
    assert_eq!(error.to_string(), "NCCL, rank 0 of 1: abort came after the communicator was aborted");

    let communicator = stub.alone(&Config::new());
    stub.fail("ncclCommDestroy", 3);
    let error = communicator.destroy().expect_err("it was told to fail");
    assert_eq!(failure(&error).call, "ncclCommDestroy");
    assert_eq!(stub.calls("ncclCommAbort"), 1, "what was destroyed is not aborted");
}

#[test]
fn faults_in_the_background_are_told() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new().name("dense"));
    assert_eq!(communicator.state().expect("no failure is asked for"), State::Ready);
    stub.set_async_error(6);
    for result in [communicator.state().map(|_| ()), communicator.wait(Deadline::never())] {
        let error = result.expect_err("it was told to fail");
        assert!(error.is_fatal());
        assert!(matches!(&error, Error::Asynchronous { failure, .. } if failure.code == Code::RemoteError));
        let expected = "NCCL, rank 0 of 1 in `dense`: an operation broke in the background: \
                        remote process exited or there was a network error";
        assert_eq!(error.to_string(), expected);
    }
    stub.set_async_error(0);
    stub.fail("ncclCommGetAsyncError", 4);
    let error = communicator.state().expect_err("it was told to fail");
    assert!(matches!(error, Error::Communicator { .. }), "{error}");
    assert_eq!(failure(&error).call, "ncclCommGetAsyncError");
}

#[test]
fn registrations_that_fail_say_so() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new());
    let memory = [0_f32; 4];
    // SAFETY: the stand-in does not use the memory.
    let register = || unsafe { communicator.register(lend(&memory)) };
    stub.fail("ncclCommRegister", 5);
    assert_eq!(failure(&register().expect_err("it was told to fail")).call, "ncclCommRegister");
    stub.fail("ncclCommRegister", 0);
    let registration = register().expect("no failure is asked for");
    stub.fail("ncclCommDeregister", 5);
    let error = registration.release().expect_err("it was told to fail");
    assert_eq!(failure(&error).call, "ncclCommDeregister");
    assert_eq!(stub.calls("ncclCommDeregister"), 1, "not tried again");
}

#[test]
fn a_group_ends_when_its_body_fails_or_panics() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new());
    let library = communicator.library();
    let error = library.group(|group| group.send(&communicator, lend(&[1_u8]), 1, STREAM));
    assert!(matches!(error, Err(Error::NoSuchRank { rank: 1, .. })));
    assert_eq!(stub.open_groups(), 0);

    let mut sum = [2_u8];
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        library.group::<()>(|group| {
            group.all_reduce_in_place(&communicator, lend_mut(&mut sum), ReduceOp::Sum, STREAM)?;
            panic!("in the body");
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(stub.open_groups(), 0);
    assert_eq!(stub.calls("ncclGroupEnd"), 2);
    OPERATIONS.iter().take(5).for_each(|(_, operation)| operation(&communicator).expect("it goes on"));
}

#[test]
fn a_group_has_only_its_own_operations() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new());
    let library = communicator.library();
    let id = UniqueId::new(library).expect("no failure is asked for");
    let memory = [0_u8];
    library
        .group(|_| {
            let refused = |result: Result<(), Error>, expected| {
                let error = result.expect_err("a group is open");
                assert_eq!(error, Error::InsideGroup { operation: expected });
            };
            let (_, operation) = OPERATIONS[0];
            refused(operation(&communicator), "group");
            refused(library.group(|_| Ok(())), "group");
            refused(communicator.split(None, 0, None).map(|_| ()), "split");
            refused(communicator.wait(Deadline::never()), "wait");
            refused(communicator.finalize(), "finalize");
            refused(communicator.abort(), "abort");
            let init = Communicator::init(library, &id, 0, 1, &Config::new());
            refused(init.map(|_| ()), "joining the communicator");
            // SAFETY: refused before the memory is used.
            let registered = unsafe { communicator.register(lend(&memory)) };
            refused(registered.map(|_| ()), "register");
            Ok(())
        })
        .expect("nothing was done");
    assert_eq!(stub.calls("ncclGroupStart"), 1);
}
