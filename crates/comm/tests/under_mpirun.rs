//! Jobs of several processes: the suite, and how jobs end that cannot go on.

use std::process::Command;
use std::time::{Duration, Instant};

use job::{Job, exit_code, stderr};

#[allow(dead_code, reason = "other tests need more of it")]
#[path = "../../../tests/job.rs"]
mod job;

/// What the ranks of `tests/suite/rank.rs` give a collective.
const TIMEOUT: Duration = Duration::from_secs(3);

struct Ended {
    code: Option<i32>,
    errors: String,
    /// Unless mpirun failed to end in order.
    took: Option<Duration>,
}

/// Runs `ranks` ranks; several jobs at a time would only slow each other down.
fn mpirun(ranks: usize, options: &[&str], arguments: &[&str]) -> Ended {
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut command = Command::new("mpirun");
    command
        .args(["--allow-run-as-root", "--oversubscribe", "-n", &ranks.to_string()])
        .args(options)
        .arg(env!("CARGO_BIN_EXE_switchyard-comm-rank"))
        .args(arguments);
    let began = Instant::now();
    let output = Job::start(command).ended();
    let took = output.status.code().map(|_| began.elapsed());
    Ended { code: exit_code(&output), errors: stderr(&output), took }
}

impl Ended {
    /// The only report of the watchdog.
    fn report(&self) -> &str {
        let reports: Vec<&str> = self.errors.lines().filter(|line| line.starts_with("report: ")).collect();
        assert_eq!(reports.len(), 1, "one rank reports: {}", self.errors);
        reports[0]
    }

    fn took_less_than(&self, limit: Duration) {
        assert!(self.took.is_none_or(|took| took < limit), "took {:?}: {}", self.took, self.errors);
    }

    fn ended_by_watchdog(&self) {
        assert_eq!(self.code, Some(75), "{}", self.errors);
        self.took_less_than(TIMEOUT * 2 + Duration::from_secs(2));
    }
}

#[test]
fn processes_do_all_operations() {
    for ranks in [2, 3, 4] {
        let ended = mpirun(ranks, &[], &["suite"]);
        assert_eq!(ended.code, Some(0), "{ranks} ranks: {}", ended.errors);
    }
}

#[test]
fn a_panic_ends_the_job_at_once() {
    let ended = mpirun(4, &[], &["panic"]);
    assert_eq!(ended.code, Some(41), "{}", ended.errors);
    assert!(ended.errors.contains("as planned"), "{}", ended.errors);
    assert!(!ended.errors.contains("report: "), "the watchdog is not needed: {}", ended.errors);
}

#[test]
fn a_thread_may_end_the_job() {
    let ended = mpirun(4, &[], &["abort"]);
    assert_eq!(ended.code, Some(75), "{}", ended.errors);
    assert!(!ended.errors.contains("report: "), "the watchdog is not needed: {}", ended.errors);
}

#[test]
fn a_stopped_rank_is_named() {
    let ended = mpirun(4, &[], &["stop", "2"]);
    ended.ended_by_watchdog();
    let report = ended.report();
    assert!(report.contains("all_reduce of group `world` (its call "), "{report}");
    assert!(report.contains("ranks 0, 1 and 3 wait in it; missing: rank 2 (host "), "{report}");
    assert!(report.contains("has been silent for"), "{report}");
}

#[test]
fn a_stopped_rank_0_is_named_by_the_next() {
    let ended = mpirun(4, &[], &["stop", "0"]);
    ended.ended_by_watchdog();
    let report = ended.report();
    assert!(report.contains("ranks 1, 2 and 3 wait in it; missing: rank 0 (host "), "{report}");
    assert!(report.contains("has been silent for"), "{report}");
}

#[test]
fn a_busy_rank_is_named_with_its_mark() {
    let ended = mpirun(3, &[], &["busy", "1"]);
    ended.ended_by_watchdog();
    let report = ended.report();
    assert!(report.contains("ranks 0 and 2 wait in it; missing: rank 1 is busy: step 17"), "{report}");
}

#[test]
fn a_rank_in_another_collective_is_named_with_it() {
    let ended = mpirun(4, &[], &["elsewhere", "1"]);
    ended.ended_by_watchdog();
    let report = ended.report();
    assert!(
        report.contains("barrier of group `world`") || report.contains("barrier of group `pair`"),
        "{report}"
    );
    assert!(report.contains("waits in barrier of group"), "{report}");
}

#[test]
fn a_killed_rank_ends_the_job() {
    let ended = mpirun(3, &[], &["kill", "2"]);
    assert_ne!(ended.code, Some(0), "{}", ended.errors);
    ended.took_less_than(TIMEOUT * 2);
}

#[test]
fn a_launcher_that_ignores_deaths_leaves_them_to_the_watchdog() {
    // With this option mpirun itself always ends with 0, and an abort ends one rank.
    let ended = mpirun(3, &["--enable-recovery"], &["kill", "2"]);
    assert!(ended.errors.contains("report: rank 2 (host "), "{}", ended.errors);
    assert!(ended.errors.contains("has ended without a word"), "{}", ended.errors);
    ended.took_less_than(Duration::from_secs(20));
}

#[test]
fn long_work_is_no_trouble_while_nobody_waits_too_long() {
    for scenario in ["patient", "short-pause"] {
        let ended = mpirun(2, &[], &[scenario]);
        assert_eq!(ended.code, Some(0), "{scenario}: {}", ended.errors);
        assert!(!ended.errors.contains("report: "), "{scenario}: {}", ended.errors);
    }
}

#[test]
fn a_rank_that_exits_early_ends_the_job_with_its_code() {
    let ended = mpirun(2, &[], &["return-early"]);
    assert_eq!(ended.code, Some(75), "{}", ended.errors);
}

#[test]
fn copies_without_a_common_world_refuse() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_switchyard-comm-rank"));
    command.arg("suite").envs([("RANK", "1"), ("WORLD_SIZE", "4")]);
    let output = Job::start(command).ended();
    let errors = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{errors}");
    let expected = "RANK and WORLD_SIZE announce 4 ranks but the MPI library sees 1; set MASTER_ADDR and MASTER_PORT too";
    assert!(errors.contains(expected), "{errors}");
}
