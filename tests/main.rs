//! The whole program, from the command line: one test binary.

mod bad_input;
mod cli;
mod comparison;
#[cfg(feature = "mpi")]
mod distributed;
mod job;
mod resume;
mod support;
mod torchrun;
mod train;

#[test]
fn what_a_crashed_launcher_leaves_behind_ends_with_its_job() {
    let mut launcher = std::process::Command::new("sh");
    launcher.args(["-c", "sleep 1000 & kill -STOP $!; echo $!; echo with errorcode 75. >&2; kill -KILL $$"]);
    let output = job::Job::start(launcher).ended();
    assert_eq!((output.status.code(), job::exit_code(&output)), (None, Some(75)));
    let left = String::from_utf8(output.stdout).expect("a number");
    let state = std::fs::read_to_string(format!("/proc/{}/stat", left.trim())).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "{state}");
}
