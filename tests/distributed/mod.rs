//! Jobs of several ranks under mpirun: the same run on any mesh, and nothing lost by any fault.
//!
//! Here is how a job is started, watched and ended; the tests are beside.

use std::path::PathBuf;
use std::process::Command;

use crate::job::{Job, exit_code, stderr};
use crate::support::{Place, for_many_ranks, metrics, wait_for};

mod faults;
mod meshes;
mod refusals;
mod script;
mod storage;

/// Micro-batches that four ranks can share, and sums that no mesh changes.
const SHARED: &str = "train run.toml --set data.micro_batch_rows=2 --set comm.deterministic=true";
/// No run that is interrupted may end before, however late the interruption comes: the end is chosen
/// afterwards.
const ENDLESS: &str = "--set schedule.total_steps=1000000";
const EXPERTS: &str = "--set parallel.expert_parallel_size=4";

impl Job {
    /// Processes of its ranks in rank order, once all `count` have begun.
    fn ranks(&self, count: usize) -> Vec<u32> {
        let mut found = Vec::new();
        wait_for("the start of all ranks", || {
            let ranked =
                self.processes().into_iter().filter_map(|(pid, variables)| Some((rank(&variables)?, pid)));
            found = ranked.collect();
            found.sort_unstable();
            found.len() == count
        });
        found.into_iter().map(|(_, pid)| pid).collect()
    }
}

/// The rank that mpirun gave a process, of its environment.
fn rank(variables: &[Vec<u8>]) -> Option<usize> {
    let value = variables.iter().find_map(|variable| variable.strip_prefix(b"OMPI_COMM_WORLD_RANK="))?;
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// `mpirun` with `options` before the program and `arguments` after it.
fn mpirun(place: &Place, options: &str, arguments: &str) -> Command {
    mpirun_each(place, &[(options, arguments)])
}

/// `mpirun` of ranks that differ: options and arguments of each part.
fn mpirun_each(place: &Place, parts: &[(&str, &str)]) -> Command {
    let mut command = Command::new("mpirun");
    command.arg("--oversubscribe");
    for (at, (options, arguments)) in parts.iter().enumerate() {
        command.args((at > 0).then_some(":")).args(options.split_whitespace());
        command.arg(env!("CARGO_BIN_EXE_switchyard")).args(arguments.split_whitespace());
    }
    for_many_ranks(&mut command, place);
    command
}

/// Runs a job to exit code `code`; what it said on standard error.
fn job(place: &Place, ranks: usize, arguments: &str, code: i32) -> String {
    ends_with(mpirun(place, &format!("-n {ranks}"), arguments), code)
}

/// Runs a command to exit code `code`; what it said on standard error.
fn ends_with(command: Command, code: i32) -> String {
    let told = format!("{command:?}");
    let output = Job::start(command).ended();
    let said = stderr(&output);
    assert_eq!(exit_code(&output), Some(code), "{told}\n{said}");
    assert!(!said.contains("panicked"), "{told}\n{said}");
    said
}

/// What is in the run's directory of checkpoints.
fn checkpoints(place: &Place, run: &str) -> Vec<String> {
    let listing = std::fs::read_dir(place.path(run).join("checkpoints"));
    let mut names: Vec<String> = listing
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn shard(place: &Place, run: &str, step: u64, name: &str) -> PathBuf {
    place.path(&format!("{run}/checkpoints/step-{step:06}/{name}.safetensors"))
}

/// The run's parameters as one file, whatever ranks wrote them.
fn weights(place: &Place, run: &str) -> Vec<u8> {
    let out = format!("{run}-exported");
    let _ = std::fs::remove_dir_all(place.path(&out));
    place.run(&format!("export {run} --out {out}"));
    std::fs::read(place.path(&out).join("model.safetensors")).expect("an export")
}

/// Every number and every weight of two runs of one mesh is the same, bit for bit.
fn assert_same_end(place: &Place, a: &str, b: &str) {
    assert_eq!(metrics(place, a), metrics(place, b), "{a} {b}");
    assert!(weights(place, a) == weights(place, b), "weights of {a} and {b} differ");
}
