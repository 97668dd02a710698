//! Jobs of several ranks under mpirun: the same run on any mesh, and nothing lost by any fault.
//!
//! Here is how a job is started, watched and ended; the tests are beside.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{
    PATIENCE, Place, for_many_ranks, lines_logged, metrics, stderr, wait_for, wait_often_for,
};

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

/// A job under way; what is left of it ends with this value, also when a test fails.
struct Job {
    /// Gone once its end has been waited for.
    child: Option<Child>,
}

impl Job {
    fn start(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { child: Some(command.spawn().expect("it starts")) }
    }

    /// The process that was started: mpirun, or the script that starts it.
    fn pid(&self) -> u32 {
        self.child.as_ref().expect("a job that has not ended").id()
    }

    /// Processes of its ranks in rank order, once all `count` have begun.
    fn ranks(&self, count: usize) -> Vec<u32> {
        let mut found = Vec::new();
        wait_for("the start of all ranks", || {
            let ranked = descendants(self.pid()).into_iter().filter_map(|pid| Some((rank_of(pid)?, pid)));
            found = ranked.collect();
            found.sort_unstable();
            found.len() == count
        });
        found.into_iter().map(|(_, pid)| pid).collect()
    }

    /// Waits for the end, with what was said; panics when it does not come.
    fn ended(mut self) -> Output {
        let child = self.child.take().expect("a job that has not ended");
        let pid = child.id();
        let waiter = std::thread::spawn(move || child.wait_with_output().expect("a child"));
        let started = Instant::now();
        while !waiter.is_finished() {
            if started.elapsed() > PATIENCE {
                end_all_below(pid);
                let output = waiter.join().expect("no panic");
                panic!("no end within {PATIENCE:?}\n{}", stderr(&output));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        waiter.join().expect("no panic")
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end_all_below(child.id());
            // It has been sent a signal that nothing survives.
            drop(child.wait());
        }
    }
}

/// Ends a child that has not been waited for, and all that descends from it.
fn end_all_below(child: u32) {
    let below = descendants(child);
    for pid in std::iter::once(child).chain(below) {
        // One that has ended meanwhile needs no signal.
        drop(Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status());
    }
}

/// Processes that descend from process `ancestor`.
fn descendants(ancestor: u32) -> Vec<u32> {
    let listing = std::fs::read_dir("/proc").expect("Linux").flatten();
    let pids = listing.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let parents: Vec<(u32, u32)> = pids.filter_map(|pid| Some((pid, parent_of(pid)?))).collect();
    let (mut found, mut next) = (vec![ancestor], 0);
    while let Some(&parent) = found.get(next) {
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| pid));
        next += 1;
    }
    found.split_off(1)
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // `PID (NAME) STATE PARENT …`: the name may hold anything.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

fn rank_of(pid: u32) -> Option<usize> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut variables = environment.split(|&byte| byte == 0);
    let value = variables.find_map(|variable| variable.strip_prefix(b"OMPI_COMM_WORLD_RANK="))?;
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// No rank outlives its job.
fn assert_gone(ranks: &[u32]) {
    wait_for("the end of all ranks", || ranks.iter().all(|&pid| rank_of(pid).is_none()));
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
    assert_eq!(output.status.code(), Some(code), "{told}\n{said}");
    assert!(!said.contains("panicked"), "{told}\n{said}");
    said
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status().expect("kill runs");
    assert!(sent.success(), "{name} to {pid}");
}

/// Step of the last whole line of the run's metrics, 0 without one.
fn last_step(place: &Place, run: &str) -> u64 {
    let text = std::fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap_or_default();
    let records = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    records.filter_map(|record| record["step"].as_u64()).next().unwrap_or(0)
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
