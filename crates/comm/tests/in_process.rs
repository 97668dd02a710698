//! The suite on one rank and on threads, and what only threads can show.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use switchyard_comm::{Buffer, BufferMut, CommError, Communicator, ReduceOp, Solo, threads, threads_on};

mod suite;

const PATIENCE: Duration = Duration::from_secs(60);

fn on_threads(size: usize, timeout: Duration, rank: impl Fn(Arc<dyn Communicator>) + Sync) {
    thread::scope(|scope| {
        for comm in threads(size, timeout) {
            scope.spawn(|| rank(comm));
        }
    });
}

#[test]
fn one_rank_does_all_operations() {
    suite::all_operations(&Solo::new("world"));
    on_threads(1, PATIENCE, |comm| suite::all_operations(&*comm));
}

#[test]
fn threads_do_all_operations() {
    for size in [2, 3, 4] {
        on_threads(size, PATIENCE, |comm| suite::all_operations(&*comm));
    }
}

#[test]
fn threads_are_on_the_machines_that_they_are_told() {
    const MACHINES: [usize; 5] = [3, 3, 0, 7, 0];
    thread::scope(|scope| {
        for comm in threads_on(&MACHINES, PATIENCE) {
            scope.spawn(move || {
                assert_eq!(comm.machines(), MACHINES);
                suite::all_operations(&*comm);
            });
        }
    });
}

#[test]
fn buffers_that_do_not_fit_are_refused() {
    let solo = Solo::new("world");
    let wrong = |found: Result<(), CommError>| {
        assert!(matches!(found, Err(CommError::WrongBuffer { .. })), "{found:?}");
    };
    let (four, mut three) = ([1.0_f32; 4], [0.0_f32; 3]);
    wrong(solo.broadcast(BufferMut::F32(&mut three), 1));
    wrong(solo.all_gather(Buffer::F32(&four), BufferMut::F32(&mut three)));
    wrong(solo.all_gather(Buffer::F64(&[0.0; 3]), BufferMut::F32(&mut three)));
    wrong(solo.all_to_all(Buffer::F32(&four), BufferMut::F32(&mut three)));
    wrong(solo.reduce_scatter(Buffer::F32(&four), BufferMut::F32(&mut three), ReduceOp::Sum));
    wrong(solo.all_gather_v(Buffer::F32(&four[..3]), BufferMut::F32(&mut three), &[2]));
    wrong(solo.all_gather_v(Buffer::F32(&four[..3]), BufferMut::F32(&mut three), &[]));
    wrong(solo.all_to_all_v(Buffer::F32(&four[..3]), &[3, 0], BufferMut::F32(&mut three), &[3]));
    wrong(solo.all_to_all_v(Buffer::F32(&four[..3]), &[3], BufferMut::F32(&mut three), &[usize::MAX]));
}

#[test]
fn disagreements_break_the_group_for_all() {
    for size in [2, 3, 4] {
        on_threads(size, PATIENCE, |comm| suite::disagreement_in_operation(&*comm));
        on_threads(size, PATIENCE, |comm| suite::disagreement_in_length(&*comm));
        on_threads(size, PATIENCE, |comm| suite::disagreement_in_counts(&*comm));
        on_threads(size, PATIENCE, |comm| suite::wrong_buffer(&*comm));
    }
}

#[test]
fn the_missing_are_named_when_the_deadline_passes() {
    on_threads(4, Duration::from_secs(1), |comm| {
        let pair = comm.split(comm.rank() / 2, "pair").expect("all come");
        if comm.rank() == 3 {
            thread::sleep(Duration::from_secs(3));
            // Too late: the others have given up.
            assert!(matches!(pair.barrier(), Err(CommError::Timeout { .. })));
        } else if comm.rank() == 2 {
            let began = Instant::now();
            let error = pair.barrier().expect_err("rank 3 does not come");
            assert!(began.elapsed() >= Duration::from_secs(1));
            assert!(matches!(error, CommError::Timeout { .. }));
            assert!(error.to_string().contains("barrier of group `pair`"), "{error}");
            assert!(error.to_string().contains("rank 3 did not come"), "{error}");
            assert_eq!(pair.barrier(), Err(error));
        } else {
            pair.barrier().expect("the other pair is whole");
        }
    });
}

#[test]
fn a_rank_that_ends_is_lost_at_once() {
    on_threads(3, PATIENCE, |comm| {
        let began = Instant::now();
        if comm.rank() != 1 {
            let error = comm.all_reduce(BufferMut::U8(&mut [1]), ReduceOp::Sum).expect_err("rank 1 is gone");
            assert!(matches!(error, CommError::PeerLost { .. }));
            assert!(error.to_string().contains("rank 1 ended or gave up"), "{error}");
            assert_eq!(comm.split(0, "later").err(), Some(error));
        }
        assert!(began.elapsed() < PATIENCE / 2);
    });
}

#[test]
fn waits_are_for_what_the_caller_sees() {
    let thousandth = |comm: &dyn Communicator| {
        let mut asked = 0;
        let mut done = || {
            asked += 1;
            asked == 1000
        };
        comm.wait_for("a step", &mut done).expect("nothing fails");
        assert_eq!(asked, 1000);
    };
    thousandth(&Solo::new("world"));
    on_threads(2, PATIENCE, |comm| thousandth(&*comm));
}

#[test]
fn a_rank_may_end_once_all_have_come() {
    for _ in 0..200 {
        on_threads(3, PATIENCE, |comm| comm.barrier().expect("all come"));
    }
}

#[test]
fn a_group_that_breaks_wakes_those_who_wait_in_its_parts() {
    on_threads(3, PATIENCE, |comm| {
        let pair = comm.split(comm.rank().min(1), "pair").expect("all come");
        let began = Instant::now();
        match comm.rank() {
            // Waits for rank 2 in the pair, which waits for it in the world.
            1 => assert!(matches!(pair.barrier(), Err(CommError::PeerLost { .. }))),
            2 => assert!(matches!(comm.barrier(), Err(CommError::PeerLost { .. }))),
            _ => {}
        }
        assert!(began.elapsed() < PATIENCE / 2);
    });
}
