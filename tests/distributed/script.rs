//! Signals to mpirun, and the script that starts again.

use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{ENDLESS, EXPERTS, SHARED, assert_same_end, checkpoints, ends_with, job, mpirun};
use crate::job::{Job, exit_code, stderr};
use crate::support::{Place, for_many_ranks, last_step, lines_logged, wait_for};

const RUN: &str = "run.toml --set comm.deterministic=true";

/// `launch/mpirun.sh` with two ranks, and `arguments` from the experiment on.
fn launch(place: &Place, arguments: &str) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../launch/mpirun.sh");
    let mut command = Command::new("bash");
    command.arg(script).args(["-n", "2", "--mpirun", "--oversubscribe"]).args(arguments.split_whitespace());
    command.env("SWITCHYARD", env!("CARGO_BIN_EXE_switchyard")).env("SWITCHYARD_BACKOFF_S", "0");
    for_many_ranks(&mut command, place);
    command
}

/// Writes a program that stands for ours.
fn program(place: &Place, name: &str, text: &str) -> PathBuf {
    let path = place.path(name);
    place.write(name, text.as_bytes());
    set_permissions(&path, Permissions::from_mode(0o755)).expect("its owner may");
    path
}

#[test]
fn a_signal_to_mpirun_saves_on_all_ranks_and_the_run_goes_on() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} {EXPERTS} {ENDLESS} --set checkpoint.every_steps=0");
    let child = Job::start(mpirun(&place, "-n 4", &format!("{run} --run-dir asked")));
    wait_for("some steps", || lines_logged(&place, "asked") > 3);
    child.signal("-USR1");
    let output = child.ended();
    assert_eq!(exit_code(&output), Some(75), "{}", stderr(&output));
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(printed.matches("continue with: ").count(), 1, "one rank says it: {printed}");
    assert_eq!(checkpoints(&place, "asked").len(), 1);
    let end = last_step(&place, "asked") + 5;
    job(&place, 4, &format!("{run} --run-dir asked --resume auto --max-steps {end}"), 0);
    job(&place, 4, &format!("{run} --run-dir whole --max-steps {end}"), 0);
    assert_same_end(&place, "whole", "asked");
}

#[test]
fn the_launch_script_hands_signals_on_and_does_not_restart() {
    let place = Place::with_experiment();
    let run = format!("{RUN} {ENDLESS} --set checkpoint.every_steps=0");
    for name in ["-TERM", "-INT"] {
        let before = lines_logged(&place, "asked");
        let child = Job::start(launch(&place, &format!("{run} --run-dir asked")));
        wait_for("some steps", || lines_logged(&place, "asked") > before + 3);
        child.signal(name);
        let output = child.ended();
        assert_eq!(exit_code(&output), Some(75), "{name}: {}", stderr(&output));
        assert!(!stderr(&output).contains("starting again"), "{name}: {}", stderr(&output));
    }
    let end = last_step(&place, "asked") + 5;
    let said = ends_with(launch(&place, &format!("{run} --run-dir asked --max-steps {end}")), 0);
    assert!(said.contains("continuing at step"), "{said}");
    job(&place, 2, &format!("train {run} --run-dir whole --max-steps {end}"), 0);
    assert_same_end(&place, "whole", "asked");
}

#[test]
fn the_launch_script_restarts_what_was_lost_and_nothing_else() {
    let place = Place::with_experiment();
    let run = format!(
        "{RUN} --set schedule.total_steps=1000 --set eval.every_steps=0 --set checkpoint.every_steps=20"
    );
    job(&place, 2, &format!("train {run} --run-dir whole"), 0);
    // The second rank of the first start is killed once there is something to continue from.
    let killed = format!(
        "#!/bin/sh\nif [ \"$OMPI_COMM_WORLD_RANK\" = 1 ] && mkdir begun 2>/dev/null; then\n\
         (until [ -d lost/checkpoints/step-000020 ]; do sleep 0.01; done; kill -KILL $$) &\nfi\n\
         exec {} \"$@\"\n",
        env!("CARGO_BIN_EXE_switchyard")
    );
    let mut command = launch(&place, &format!("{run} --run-dir lost"));
    command.env("SWITCHYARD", program(&place, "killed.sh", &killed));
    let said = ends_with(command, 0);
    assert_eq!(said.matches("starting again in 0 s (attempt 1 of 5").count(), 1, "{said}");
    assert!(said.contains("continuing at step"), "{said}");
    assert_same_end(&place, "whole", "lost");

    let moved = format!("{run} --set parallel.expert_parallel_size=2 --run-dir lost");
    ends_with(launch(&place, &moved), 0);
    for wrong in ["--set optimizer.learning_rate=0.5", "--set parallel.expert_parallel_size=3"] {
        let said = ends_with(launch(&place, &format!("{run} {wrong} --run-dir lost")), 1);
        assert!(said.contains("exit code 1: not restarted"), "{said}");
        assert!(!said.contains("starting again"), "{said}");
    }
}

#[test]
fn the_launch_script_gives_up_without_progress() {
    let place = Place::with_experiment();
    // Its ranks are lost at once, every time.
    let program = program(&place, "lost.sh", "#!/bin/sh\nexit 75\n");
    let mut command = launch(&place, "run.toml --run-dir run");
    command.env("SWITCHYARD", &program).env("SWITCHYARD_RESTARTS", "2");
    let said = ends_with(command, 75);
    assert_eq!(said.matches("starting again").count(), 2, "{said}");
    assert_eq!(said.matches("without a new checkpoint: giving up").count(), 1, "{said}");
}
