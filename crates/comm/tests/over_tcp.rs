//! Jobs of processes that are told where rank 0 is, as torchrun tells them, without any launcher.

use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use job::{Job, PATIENCE, stderr};

#[allow(dead_code, reason = "other tests need more of it")]
#[path = "../../../tests/job.rs"]
mod job;

/// What the ranks of `tests/suite/rank.rs` give a collective.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Ranks that have not been waited for, and the port at which they meet.
struct Ranks(Vec<Option<Job>>, u16);

impl Ranks {
    /// Starts a rank for each of `sizes`, which says how many ranks it believes in.
    fn start(sizes: &[usize], arguments: &[&str]) -> Self {
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
        let rank = |(rank, size): (usize, &usize)| Some(start(rank, *size, port, arguments));
        Self(sizes.iter().enumerate().map(rank).collect(), port)
    }

    /// Waits for the end of one rank.
    fn ended(&mut self, rank: usize) -> Output {
        self.0[rank].take().expect("a rank that has not been waited for").ended()
    }
}

fn start(rank: usize, size: usize, port: u16, arguments: &[&str]) -> Job {
    let mut command = Command::new(env!("CARGO_BIN_EXE_switchyard-comm-rank"));
    command
        .args(arguments)
        .envs([("RANK", rank.to_string()), ("WORLD_SIZE", size.to_string())])
        .envs([("MASTER_ADDR", "localhost".to_owned()), ("MASTER_PORT", port.to_string())]);
    Job::start(command)
}

#[test]
fn processes_do_all_operations() {
    for ranks in [2, 3, 4] {
        let mut job = Ranks::start(&vec![ranks; ranks], &["suite"]);
        for rank in 0..ranks {
            let ended = job.ended(rank);
            assert_eq!(ended.status.code(), Some(0), "rank {rank} of {ranks}: {}", stderr(&ended));
        }
    }
}

#[test]
fn a_killed_rank_ends_all() {
    let began = Instant::now();
    let mut job = Ranks::start(&[3; 3], &["kill", "2"]);
    let said: String = (0..3)
        .map(|rank| {
            let ended = job.ended(rank);
            assert_ne!(ended.status.code(), Some(0), "rank {rank}: {}", stderr(&ended));
            stderr(&ended)
        })
        .collect();
    assert!(said.contains("rank 2 "), "it is named: {said}");
    assert!(began.elapsed() < TIMEOUT * 4, "took {:?}", began.elapsed());
}

#[test]
fn a_stopped_rank_is_named_and_the_others_end() {
    let mut job = Ranks::start(&[4; 4], &["stop", "2"]);
    let first = job.ended(0);
    assert_eq!(first.status.code(), Some(75), "{}", stderr(&first));
    let report = stderr(&first);
    assert!(report.contains("report: all_reduce of group `world` (its call "), "{report}");
    assert!(report.contains("missing: rank 2 (host "), "{report}");
    for rank in [1, 3] {
        assert_ne!(job.ended(rank).status.code(), Some(0), "rank {rank}");
    }
}

#[test]
fn ranks_that_wait_for_their_devices_are_counted_as_waiting() {
    let mut job = Ranks::start(&[4; 4], &["device", "2"]);
    let first = job.ended(0);
    assert_eq!(first.status.code(), Some(75), "{}", stderr(&first));
    let report = stderr(&first);
    assert!(
        report.contains("report: a step of group `world` (its call 1) has not finished for 3"),
        "{report}"
    );
    assert!(report.contains("ranks 0, 1 and 3 wait in it; missing: rank 2 is busy: step 17"), "{report}");
    for rank in 1..4 {
        assert_ne!(job.ended(rank).status.code(), Some(0), "rank {rank}");
    }
}

#[test]
fn a_lost_rank_ends_ranks_whose_devices_never_answer() {
    let mut job = Ranks::start(&[3; 3], &["driver", "2"]);
    let first = job.ended(0);
    assert_eq!(first.status.code(), Some(75), "{}", stderr(&first));
    assert!(stderr(&first).contains("rank 2 (host "), "{}", stderr(&first));
    assert_eq!(job.ended(1).status.code(), Some(75));
    assert_ne!(job.ended(2).status.code(), Some(0));
}

#[test]
fn a_thread_may_end_the_job() {
    let mut job = Ranks::start(&[3; 3], &["abort"]);
    assert_eq!(job.ended(1).status.code(), Some(75));
    for rank in [0, 2] {
        assert_ne!(job.ended(rank).status.code(), Some(0), "rank {rank}");
    }
}

#[test]
fn ranks_of_another_job_are_refused() {
    let mut job = Ranks::start(&[2, 3], &["suite"]);
    for rank in [0, 1] {
        let ended = job.ended(rank);
        assert_eq!(ended.status.code(), Some(2), "{}", stderr(&ended));
        let expected = "rank 1 of 3 called a job of 2 ranks";
        assert!(stderr(&ended).contains(expected), "{}", stderr(&ended));
    }
}

#[test]
fn strangers_are_hung_up_on() {
    let mut job = Ranks::start(&[2], &["suite"]);
    // Rank 0 alone waits for rank 1; somebody else calls first.
    let port = job.1;
    let began = Instant::now();
    let mut stranger = loop {
        match TcpStream::connect(("localhost", port)) {
            Ok(stream) => break stream,
            Err(error) => assert!(began.elapsed() < PATIENCE, "rank 0 does not listen: {error}"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("it listens");
    let second = start(1, 2, port, &["suite"]).ended();
    assert_eq!(second.status.code(), Some(0), "{}", stderr(&second));
    let first = job.ended(0);
    assert_eq!(first.status.code(), Some(0), "{}", stderr(&first));
}
