//! Ranks that die, stop, fail or are slow.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use super::{ENDLESS, EXPERTS, SHARED, assert_same_end, checkpoints, ends_with, job, mpirun, mpirun_each};
use crate::job::{Job, exit_code, send, stderr};
use crate::support::{Place, for_many_ranks, last_step, lines_logged, wait_for, wait_often_for};

/// Numbers that look random, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// When a rank is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// As soon as a checkpoint has been begun, after one that this start has completed.
    Saving,
    /// Some steps after this start: within or between steps, evaluations and saves.
    Training,
    /// Any time after the ranks exist.
    Start,
}

/// What kills met.
#[derive(Debug, Default)]
struct Met {
    /// Saves that were left half written.
    half_written: usize,
    /// Starts from a checkpoint.
    resumed: usize,
}

fn is_saving(place: &Place, run: &str) -> bool {
    checkpoints(place, run).iter().any(|name| name.starts_with(".tmp-"))
}

fn newest(place: &Place, run: &str) -> String {
    let complete = checkpoints(place, run).into_iter().filter(|name| name.starts_with("step-"));
    complete.max().unwrap_or_else(|| "none".to_owned())
}

/// Waits for `moment` of a run that was started again from checkpoint `resumed`, after `logged` steps.
fn wait_for_moment(place: &Place, moment: Moment, resumed: &str, logged: u64, random: &mut Random) {
    match moment {
        Moment::Start => {}
        Moment::Training => {
            // Steps that no earlier start has logged.
            let further = logged + 1 + random.below(10);
            wait_for("steps", || last_step(place, "killed") >= further);
        }
        Moment::Saving => {
            wait_for("a save", || newest(place, "killed") != resumed && !is_saving(place, "killed"));
            wait_often_for("another save", Duration::from_micros(100), || is_saving(place, "killed"));
        }
    }
}

/// Kills ranks of a run until it has been killed `kills` times, then lets it end.
fn killed_and_restarted(place: &Place, kills: u64, tell: bool) -> Met {
    // Enough weights that a checkpoint takes a while to write.
    let size = "--set model.d_ff=256 --set model.num_experts=8";
    let run = format!("{SHARED} {EXPERTS} {ENDLESS} {size} --set checkpoint.every_steps=5");
    let again = format!("{run} --run-dir killed --resume auto");
    let mut random = Random(4_711);
    let mut met = Met::default();
    for kill in 0..kills {
        let moment = [Moment::Saving, Moment::Training, Moment::Start][(kill % 3) as usize];
        let (resumed, logged) = (newest(place, "killed"), last_step(place, "killed"));
        let child = Job::start(mpirun(place, "-n 4", &again));
        let ranks = child.ranks(4);
        wait_for_moment(place, moment, &resumed, logged, &mut random);
        let pause = Duration::from_micros(match moment {
            Moment::Saving => random.below(3_000),
            Moment::Training => random.below(30_000),
            Moment::Start => random.below(300_000),
        });
        std::thread::sleep(pause);
        let rank = random.below(4) as usize;
        send("-KILL", ranks[rank]);
        let killed = Instant::now();
        let output = child.ended();
        let seconds = killed.elapsed().as_secs_f64();
        let code = exit_code(&output);
        assert!(matches!(code, Some(75 | 137)), "{code:?} {}", stderr(&output));
        met.half_written += usize::from(is_saving(place, "killed"));
        met.resumed += usize::from(resumed != "none");
        if tell {
            let moment = format!("{moment:?}");
            let left = if is_saving(place, "killed") { ", a save half written" } else { "" };
            let line = format!(
                "kill {kill:2}: {moment:8} + {:5.1} ms, rank {rank}, resumed from {resumed}, exit code {}, ended in \
                 {seconds:.1} s, logged step {}, newest {}{left}",
                pause.as_secs_f64() * 1e3,
                code.expect("checked"),
                last_step(place, "killed"),
                newest(place, "killed"),
            );
            writeln!(std::io::stdout(), "{line}").expect("a terminal");
        }
    }
    let end = last_step(place, "killed") + 5;
    job(place, 4, &format!("{again} --max-steps {end}"), 0);
    job(place, 4, &format!("{run} --run-dir whole --max-steps {end}"), 0);
    assert_same_end(place, "whole", "killed");
    let left = checkpoints(place, "killed");
    assert!(left.iter().all(|name| name.starts_with("step-")), "{left:?}");
    met
}

#[test]
fn kills_of_any_rank_at_any_moment_change_nothing() {
    let met = killed_and_restarted(&Place::with_experiment(), 6, false);
    assert!(met.resumed > 3, "{met:?}");
}

#[test]
#[ignore = "minutes; `cargo xtask test -- fifty_kills -- --ignored --nocapture` prints its log"]
fn fifty_kills_change_nothing() {
    let met = killed_and_restarted(&Place::with_experiment(), 50, true);
    assert!(met.half_written > 10 && met.resumed > 40, "{met:?}");
}

#[test]
fn a_rank_that_stops_is_named_and_the_job_ends() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} {EXPERTS} {ENDLESS} --set comm.timeout_s=3");
    for stopped in [2, 0] {
        let name = format!("stopped-{stopped}");
        let child = Job::start(mpirun(&place, "-n 4", &format!("{run} --run-dir {name}")));
        let ranks = child.ranks(4);
        wait_for("some steps", || lines_logged(&place, &name) > 3);
        send("-STOP", ranks[stopped]);
        let since = Instant::now();
        let output = child.ended();
        let said = stderr(&output);
        let orderly = output.status.code().is_some();
        assert!(!orderly || since.elapsed() < Duration::from_secs(33), "{:?}: {said}", since.elapsed());
        assert_eq!(exit_code(&output), Some(75), "{said}");
        let told: Vec<&str> = said.lines().filter(|line| line.contains("has not finished for")).collect();
        let [line] = told.as_slice() else { panic!("one line says it: {said}") };
        // Others may wait for it elsewhere, in a group that this one waits for.
        let process = format!("pid {}) has been silent for", ranks[stopped]);
        assert!(line.contains(&format!("rank {stopped} (host ")) && line.contains(&process), "{line}");
        assert_eq!(line.matches("silent").count(), 1, "no other rank is blamed: {line}");
        let operation = line.trim_start_matches("error: ").split(' ').next().expect("a word");
        let known = ["all_reduce", "all_gather", "all_to_all", "reduce_scatter", "broadcast", "barrier"];
        assert!(known.iter().any(|name| operation.starts_with(name)), "names the operation: {line}");
    }
}

#[test]
fn a_rank_that_is_slow_but_alive_changes_nothing() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} {EXPERTS} --set comm.timeout_s=30");
    job(&place, 4, &format!("{run} --run-dir quick"), 0);
    for slow in [1, 0] {
        let name = format!("slow-{slow}");
        let child = Job::start(mpirun(&place, "-n 4", &format!("{run} --run-dir {name}")));
        let ranks = child.ranks(4);
        wait_for("a step", || lines_logged(&place, &name) > 0);
        send("-STOP", ranks[slow]);
        std::thread::sleep(Duration::from_secs(2));
        send("-CONT", ranks[slow]);
        let output = child.ended();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_same_end(&place, "quick", &name);
    }
}

#[test]
fn a_signal_to_one_rank_saves_on_all() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} {EXPERTS} {ENDLESS} --set checkpoint.every_steps=0");
    let child = Job::start(mpirun(&place, "-n 4", &format!("{run} --run-dir asked")));
    let ranks = child.ranks(4);
    wait_for("some steps", || lines_logged(&place, "asked") > 3);
    send("-TERM", ranks[2]);
    let output = child.ended();
    assert_eq!(exit_code(&output), Some(75), "{}", stderr(&output));
    assert_eq!(checkpoints(&place, "asked").len(), 1);
    let end = last_step(&place, "asked") + 5;
    job(&place, 4, &format!("{run} --run-dir asked --resume auto --max-steps {end}"), 0);
    job(&place, 4, &format!("{run} --run-dir whole --max-steps {end}"), 0);
    assert_same_end(&place, "whole", "asked");
}

/// Two ranks, of which `limited` may write no file above 8 KiB once the run has logged a few steps. More
/// fails, or, if `deadly`, has the system end that rank.
fn with_a_limit(place: &Place, limited: usize, deadly: bool, run: &str, arguments: &str) -> Output {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "-n", "2"]);
    if !deadly {
        command.args(["sh", "-c", "trap '' XFSZ; exec \"$0\" \"$@\""]);
    }
    command.arg(env!("CARGO_BIN_EXE_switchyard")).args(arguments.split_whitespace());
    for_many_ranks(&mut command, place);
    command.args(["--run-dir", run]);
    let child = Job::start(command);
    let ranks = child.ranks(2);
    wait_for("some steps", || lines_logged(place, run) > 3);
    let pid = ranks[limited].to_string();
    let set = Command::new("prlimit").args(["--pid", &pid, "--fsize=8192:8192"]).status();
    assert!(set.expect("prlimit of util-linux").success());
    child.ended()
}

#[test]
fn a_rank_that_cannot_write_ends_the_job_with_its_reason() {
    let place = Place::with_experiment();
    // The first rank alone writes the metrics, and nobody else learns that it could not.
    let cases = [(1, "00001.safetensors"), (0, "metrics.jsonl")];
    for (rank, file) in cases {
        let run = format!("limited-{rank}");
        let arguments = format!("{SHARED} --set schedule.total_steps=300 --set checkpoint.every_steps=100");
        let output = with_a_limit(&place, rank, false, &run, &arguments);
        let said = stderr(&output);
        assert_eq!(exit_code(&output), Some(1), "{said}");
        assert_eq!(said.matches("File too large").count(), 1, "said once: {said}");
        assert_eq!(said.matches("error:").count(), 1, "said once: {said}");
        assert!(said.contains(file), "names the file: {said}");
        assert!(checkpoints(&place, &run).is_empty(), "{:?}", checkpoints(&place, &run));
    }
}

#[test]
fn a_rank_that_is_ended_while_it_writes_loses_nothing() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} --set schedule.total_steps=300 --set checkpoint.every_steps=100");
    job(&place, 2, &format!("{run} --run-dir whole"), 0);
    let output = with_a_limit(&place, 1, true, "ended", &run);
    let said = stderr(&output);
    // As mpirun reports SIGXFSZ, or the watchdog the lost rank.
    assert!(matches!(exit_code(&output), Some(75 | 153)), "{:?} {said}", output.status);
    assert!(is_saving(&place, "ended"), "it came to the save: {:?}", checkpoints(&place, "ended"));
    assert_eq!(newest(&place, "ended"), "none");
    job(&place, 2, &format!("{run} --run-dir ended --resume auto"), 0);
    assert!(!is_saving(&place, "ended"), "{:?}", checkpoints(&place, "ended"));
    assert_same_end(&place, "whole", "ended");
}

#[test]
fn data_that_one_rank_cannot_read_ends_all_with_its_reason() {
    let place = Place::with_experiment();
    place.run("train run.toml --run-dir caches --max-steps 1");
    place.write("elsewhere/run.toml", crate::support::EXPERIMENT.as_bytes());
    let (here, there) = (place.root(), place.path("elsewhere"));
    let directory = |path: &Path| format!("-n 1 --wdir {}", path.display());
    let run = format!("{SHARED} --run-dir {}", place.path("run").display());
    for (first, second) in [(here, there.as_path()), (there.as_path(), here)] {
        let parts = [(directory(first), &run), (directory(second), &run)];
        let parts = parts.each_ref().map(|(options, run)| (options.as_str(), run.as_str()));
        let said = ends_with(mpirun_each(&place, &parts), 1);
        assert_eq!(said.matches("error:").count(), 1, "one rank says it: {said}");
        assert!(said.contains("corpus.json.gz") || said.contains("tokenizer"), "names the file: {said}");
        assert!(checkpoints(&place, "run").is_empty());
    }
}
