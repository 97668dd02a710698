//! Jobs of several ranks under mpirun: the same run on any mesh, and nothing lost by any fault.

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Place, stderr, timeless};

/// Micro-batches that four ranks can share, and sums that no mesh changes.
const SHARED: &str = "train run.toml --set data.micro_batch_rows=2 --set comm.deterministic=true";
const EXPERTS: &str = "--set parallel.expert_parallel_size=4";

/// Longest time that anything here may take: far more than it does, so that only a hang exceeds it.
const PATIENCE: Duration = Duration::from_secs(120);

/// `mpirun` with `options` before the program and `arguments` after it.
fn mpirun(place: &Place, options: &str, arguments: &str) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe"]).args(options.split_whitespace());
    command.arg(env!("CARGO_BIN_EXE_switchyard")).args(arguments.split_whitespace());
    prepared(command, place)
}

/// A command as root may run it, on machines with fewer cores than ranks.
fn prepared(mut command: Command, place: &Place) -> Command {
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("RAYON_NUM_THREADS", "1");
    command.current_dir(place.root()).stdin(Stdio::null());
    command
}

/// Waits for the end, with what was said; panics when it does not come.
fn ended(child: Child) -> Output {
    let pid = child.id();
    let waiter = std::thread::spawn(move || child.wait_with_output().expect("a child"));
    let started = Instant::now();
    while !waiter.is_finished() {
        if started.elapsed() > PATIENCE {
            let _ = Command::new("pkill").args(["-KILL", "-P", &pid.to_string()]).status();
            panic!("no end within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    waiter.join().expect("no panic")
}

fn start(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("mpirun of Open MPI")
}

/// Runs a job to exit code `code`; what it said on standard error.
fn job(place: &Place, ranks: usize, arguments: &str, code: i32) -> String {
    let output = ended(start(mpirun(place, &format!("-n {ranks}"), arguments)));
    assert_eq!(output.status.code(), Some(code), "{arguments}\n{}", stderr(&output));
    stderr(&output)
}

/// Processes of a job by rank, once all have begun.
fn ranks_of(job: &Child, count: usize) -> Vec<u32> {
    let mut found = Vec::new();
    wait_for("all ranks", || {
        let listed = Command::new("pgrep").args(["-P", &job.id().to_string()]).output().expect("pgrep");
        let text = String::from_utf8_lossy(&listed.stdout);
        let pids = text.lines().filter_map(|line| line.parse().ok());
        let mut ranks: Vec<(usize, u32)> = pids.filter_map(|pid| Some((rank_of(pid)?, pid))).collect();
        ranks.sort_unstable();
        found = ranks.into_iter().map(|(_, pid)| pid).collect();
        found.len() == count
    });
    found
}

fn rank_of(pid: u32) -> Option<usize> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut variables = environment.split(|&byte| byte == 0);
    let value = variables.find_map(|variable| variable.strip_prefix(b"OMPI_COMM_WORLD_RANK="))?;
    std::str::from_utf8(value).ok()?.parse().ok()
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status().expect("kill runs");
    assert!(sent.success(), "{name} to {pid}");
}

fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let started = Instant::now();
    while !ready() {
        assert!(started.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn lines_logged(place: &Place, run: &str) -> usize {
    std::fs::read_to_string(place.path(run).join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// The run's parameters as one file, whatever ranks wrote them.
fn weights(place: &Place, run: &str) -> Vec<u8> {
    let out = format!("{run}-exported");
    let _ = std::fs::remove_dir_all(place.path(&out));
    place.run(&format!("export {run} --out {out}"));
    std::fs::read(place.path(&out).join("model.safetensors")).expect("an export")
}

fn assert_same_end(place: &Place, a: &str, b: &str) {
    let metrics = |run: &str| timeless(&place.read(&format!("{run}/metrics.jsonl")));
    let without_sums = |run: &str| -> Vec<serde_json::Value> {
        let mut lines = metrics(run);
        // Sums over layers are added per rank first: they may differ in the last bit between meshes.
        for line in &mut lines {
            let object = line.as_object_mut().expect("an object");
            object.remove("moe");
            if let Some(eval) = object.get_mut("eval").and_then(|eval| eval.as_object_mut()) {
                eval.remove("moe");
            }
        }
        lines
    };
    assert_eq!(without_sums(a), without_sums(b), "{a} {b}");
    assert!(weights(place, a) == weights(place, b), "weights of {a} and {b} differ");
}

fn checkpoints(place: &Place, run: &str) -> Vec<String> {
    let listing = std::fs::read_dir(place.path(run).join("checkpoints"));
    let names = listing.into_iter().flatten().flatten();
    names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn any_mesh_trains_the_same_and_any_other_goes_on() {
    let place = Place::with_experiment();
    place.run(&format!("{SHARED} --run-dir solo"));
    let said = job(&place, 4, &format!("{SHARED} {EXPERTS} --run-dir spread"), 0);
    assert_eq!(said.matches("parameters,").count(), 1, "one rank speaks: {said}");
    assert!(said.contains("experts 3..=3 on ranks 3"), "{said}");
    for rank in 0..4 {
        assert!(place.path(&format!("spread/logs/rank-{rank}.log")).exists());
    }
    assert_same_end(&place, "solo", "spread");

    // From four ranks to one, to two that split experts, and back to four: the checkpoints fit all.
    job(&place, 4, &format!("{SHARED} {EXPERTS} --run-dir moved --max-steps 20"), 0);
    place.run(&format!("{SHARED} --run-dir moved --resume auto --max-steps 30"));
    let two = "--set parallel.expert_parallel_size=2";
    job(&place, 2, &format!("{SHARED} {two} --run-dir moved --resume auto --max-steps 45"), 0);
    job(&place, 4, &format!("{SHARED} --run-dir moved --resume auto"), 0);
    assert!(weights(&place, "solo") == weights(&place, "moved"));

    let tensor = "--set parallel.tensor_parallel_size=2 --set parallel.expert_parallel_size=2";
    job(&place, 4, &format!("{SHARED} {tensor} --run-dir split --max-steps 20"), 0);
    let losses = |run: &str| -> Vec<f64> {
        let lines = timeless(&place.read(&format!("{run}/metrics.jsonl")));
        lines.iter().filter_map(|line| line["loss"].as_f64()).take(20).collect()
    };
    for (split, solo) in losses("split").into_iter().zip(losses("solo")) {
        assert!((split / solo - 1.0).abs() < 1e-5, "{split} {solo}");
    }
    place.run("inspect checkpoint split");
}

#[test]
fn evaluation_and_generation_run_on_many_ranks() {
    let place = Place::with_experiment();
    place.run("train run.toml");
    place.write("prompts.txt", b"The <extra_id_0> the file.\nThe reader <extra_id_0> it.\nA <extra_id_0>.\n");
    let commands = [
        "eval --model runs/small --data held-out.txt --rows 2 --json",
        "generate --model runs/small --input prompts.txt --max-new-tokens 8",
    ];
    for command in commands {
        let alone = place.run(command);
        for mesh in ["--expert-parallel-size 4", "--expert-parallel-size 2"] {
            let output = ended(start(mpirun(&place, "-n 4", &format!("{command} {mesh}"))));
            assert!(output.status.success(), "{}", stderr(&output));
            assert_eq!(String::from_utf8_lossy(&output.stdout), alone, "{command} {mesh}");
        }
    }
}

/// Kills ranks of a run at random moments until it has been killed `kills` times, then lets it end.
fn killed_and_restarted(place: &Place, kills: usize, log: bool) {
    let run = format!("{SHARED} {EXPERTS} --set schedule.total_steps=300 --set checkpoint.every_steps=5");
    job(place, 4, &format!("{run} --run-dir whole"), 0);
    let mut random = 4_711_u64;
    let mut next = move |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for kill in 0..kills {
        let before = lines_logged(place, "killed");
        let child = start(mpirun(place, "-n 4", &format!("{run} --run-dir killed --resume auto")));
        let ranks = ranks_of(&child, 4);
        // Some kills hit the start, the others a moment within or between steps and saves.
        if kill % 4 != 0 {
            wait_for("a step", || lines_logged(place, "killed") != before);
        }
        let pause = Duration::from_micros(next(150_000));
        std::thread::sleep(pause);
        let rank = next(4) as usize;
        signal(ranks[rank], "-KILL");
        let killed = Instant::now();
        let output = ended(child);
        let code = output.status.code();
        assert!(matches!(code, Some(75 | 137)), "{code:?} {}", stderr(&output));
        if log {
            let (steps, seconds) = (lines_logged(place, "killed"), killed.elapsed().as_secs_f64());
            let newest = checkpoints(place, "killed").into_iter().max().unwrap_or_default();
            let mut out = std::io::stdout();
            let said = writeln!(
                out,
                "kill {kill}: rank {rank} after {pause:?}, {steps} lines logged, ended with {code:?} in {seconds:.1} s, \
                 newest of checkpoints {newest}"
            );
            said.expect("a terminal");
        }
    }
    job(place, 4, &format!("{run} --run-dir killed --resume auto"), 0);
    assert_same_end(place, "whole", "killed");
    let left = checkpoints(place, "killed");
    assert!(left.iter().all(|name| name.starts_with("step-")), "{left:?}");
}

#[test]
fn kills_of_any_rank_at_any_moment_change_nothing() {
    killed_and_restarted(&Place::with_experiment(), 4, false);
}

#[test]
#[ignore = "ten minutes; `cargo xtask test -- --ignored fifty_kills --nocapture` prints its log"]
fn fifty_kills_change_nothing() {
    killed_and_restarted(&Place::with_experiment(), 50, true);
}

#[test]
fn a_rank_that_stops_is_named_and_the_job_ends() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} {EXPERTS} --set schedule.total_steps=5000 --set comm.timeout_s=3");
    for stopped in [2, 0] {
        let name = format!("stopped-{stopped}");
        let child = start(mpirun(&place, "-n 4", &format!("{run} --run-dir {name}")));
        let ranks = ranks_of(&child, 4);
        wait_for("some steps", || lines_logged(&place, &name) > 3);
        signal(ranks[stopped], "-STOP");
        let output = ended(child);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(75), "{said}");
        assert!(said.contains(&format!("rank {stopped} ")) && said.contains("silent"), "{said}");
        assert!(said.contains("all_") || said.contains("barrier"), "names the operation: {said}");
    }
}

#[test]
fn a_rank_that_is_slow_but_alive_changes_nothing() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} {EXPERTS} --set comm.timeout_s=20");
    job(&place, 4, &format!("{run} --run-dir quick"), 0);
    let child = start(mpirun(&place, "-n 4", &format!("{run} --run-dir slow")));
    let ranks = ranks_of(&child, 4);
    wait_for("a step", || lines_logged(&place, "slow") > 0);
    signal(ranks[1], "-STOP");
    std::thread::sleep(Duration::from_secs(2));
    signal(ranks[1], "-CONT");
    let output = ended(child);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_same_end(&place, "quick", "slow");
}

#[test]
fn ranks_with_another_experiment_are_refused_before_anything_happens() {
    let place = Place::with_experiment();
    let program = env!("CARGO_BIN_EXE_switchyard");
    let mut command = Command::new("mpirun");
    let same = "train run.toml --set data.micro_batch_rows=4";
    command.args(["--oversubscribe", "-n", "1", program]).args(same.split_whitespace());
    command.args([":", "-n", "1", program]).args(same.split_whitespace());
    command.args(["--set", "optimizer.learning_rate=0.5"]);
    let output = ended(start(prepared(command, &place)));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("optimizer.learning_rate = 0.02 on rank 0, 0.5 on rank 1"), "{said}");
    assert_eq!(said.matches("would not train the same").count(), 1, "said once: {said}");
    assert!(!place.path("runs").exists());
}

#[test]
fn copies_that_do_not_know_of_each_other_are_refused() {
    let place = Place::with_experiment();
    let mut command = place.command("train run.toml");
    command.env("RANK", "0").env("WORLD_SIZE", "4");
    let output = ended(start(prepared(command, &place)));
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("4 ranks") && said.contains("mpirun"), "{said}");
    assert!(!place.path("runs").exists());
}

#[test]
fn sizes_that_do_not_fit_are_refused_once() {
    let place = Place::with_experiment();
    let refused = |ranks, sets: &str, words: &[&str]| {
        let said = job(&place, ranks, &format!("train run.toml {sets}"), 1);
        for word in words {
            assert_eq!(said.matches(word).count(), 1, "{word}: {said}");
        }
    };
    refused(3, "--set data.micro_batch_rows=2", &["which 3 data-parallel ranks cannot share evenly"]);
    refused(2, "--set parallel.expert_parallel_size=4", &["does not divide the 2 data-parallel ranks"]);
    refused(3, "--set parallel.tensor_parallel_size=2", &["3 ranks cannot be cut into groups"]);
    refused(2, "--set model.num_expert=4", &["unknown key `model.num_expert`"]);
    assert!(!place.path("runs").exists());
}

#[test]
fn a_signal_to_mpirun_saves_on_all_ranks_and_the_run_goes_on() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} {EXPERTS} --set schedule.total_steps=200 --set checkpoint.every_steps=0");
    job(&place, 4, &format!("{run} --run-dir whole"), 0);
    let child = start(mpirun(&place, "-n 4", &format!("{run} --run-dir asked")));
    ranks_of(&child, 4);
    wait_for("some steps", || lines_logged(&place, "asked") > 3);
    signal(child.id(), "-USR1");
    let output = ended(child);
    assert_eq!(output.status.code(), Some(75), "{}", stderr(&output));
    assert_eq!(checkpoints(&place, "asked").len(), 1);
    job(&place, 4, &format!("{run} --run-dir asked --resume auto"), 0);
    assert_same_end(&place, "whole", "asked");
}

#[test]
fn the_launch_script_restarts_what_was_lost_and_nothing_else() {
    let place = Place::with_experiment();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../launch/mpirun.sh");
    let launch = |arguments: &str| {
        let mut command = Command::new("bash");
        command
            .arg(&script)
            .args(["-n", "2", "--mpirun", "--oversubscribe"])
            .args(arguments.split_whitespace());
        command.env("SWITCHYARD", env!("CARGO_BIN_EXE_switchyard")).env("SWITCHYARD_BACKOFF_S", "0");
        prepared(command, &place)
    };
    let run = "run.toml --set comm.deterministic=true --set schedule.total_steps=150 --set checkpoint.every_steps=5";
    job(&place, 2, &format!("train {run} --run-dir whole"), 0);
    let child = start(launch(&format!("{run} --run-dir lost")));
    wait_for("a checkpoint", || !checkpoints(&place, "lost").is_empty() && lines_logged(&place, "lost") > 8);
    let found =
        Command::new("pgrep").args(["-f", "switchyard train .*--run-dir lost"]).output().expect("pgrep");
    let pids: Vec<u32> =
        String::from_utf8_lossy(&found.stdout).lines().filter_map(|pid| pid.parse().ok()).collect();
    let rank = pids.into_iter().find(|&pid| rank_of(pid) == Some(1)).expect("rank 1");
    signal(rank, "-KILL");
    let output = ended(child);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("starting again in 0 s"), "{}", stderr(&output));
    assert_same_end(&place, "whole", "lost");

    let refused = ended(start(launch("run.toml --set parallel.expert_parallel_size=2 --run-dir lost")));
    assert!(refused.status.success(), "a mesh of its own may go on: {}", stderr(&refused));
    let wrong = ended(start(launch(&format!("{run} --set optimizer.learning_rate=0.5 --run-dir lost"))));
    assert_eq!(wrong.status.code(), Some(1), "{}", stderr(&wrong));
    assert!(!stderr(&wrong).contains("starting again"), "{}", stderr(&wrong));
}

#[test]
fn damaged_checkpoints_are_refused_on_all_ranks() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} {EXPERTS} --run-dir run");
    job(&place, 4, &format!("{run} --max-steps 20"), 0);
    let shard = place.path("run/checkpoints/step-000020/optimizer-00002.safetensors");
    let whole = std::fs::read(&shard).expect("a shard");
    let mut flipped = whole.clone();
    *flipped.last_mut().expect("bytes") ^= 1;
    std::fs::write(&shard, &flipped).expect("writable");
    let refused = |ranks| job(&place, ranks, &format!("{run} --resume auto"), 1);
    let said = refused(4);
    assert_eq!(said.matches("optimizer-00002.safetensors is damaged: checksum").count(), 1, "{said}");
    std::fs::remove_file(&shard).expect("removable");
    assert!(refused(4).contains("optimizer-00002.safetensors"));
    std::fs::write(&shard, &whole).expect("writable");
    let other = format!("{run} --resume auto --set model.d_ff=32");
    let said = job(&place, 4, &other, 1);
    assert_eq!(said.matches("model.d_ff was 64, is now 32").count(), 1, "{said}");
    job(&place, 4, &format!("{run} --resume auto --max-steps 25"), 0);
}

#[test]
fn a_full_disk_under_shards_keeps_the_earlier_checkpoint() {
    let place = Place::with_experiment();
    let sets = "--set model.d_ff=1024 --set model.num_experts=16 --set checkpoint.keep_last=0";
    let script = |on_error: &str| {
        format!(
            "mpirun --oversubscribe -n 2 $PROGRAM {SHARED} {sets} --set checkpoint.every_steps=10 \
             --run-dir full/{on_error} --set checkpoint.on_error=\\\"{on_error}\\\"; code=$?; ls -A full/{on_error}/checkpoints; exit $code"
        )
    };
    let output = place.on_disk_of(
        "24m",
        &format!(
            "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 RAYON_NUM_THREADS=1; {}",
            script("stop")
        ),
    );
    let said = stderr(&output);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("No space left") && said.contains("free some space"), "{said}");
    let left = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(left.contains("step-000010"), "{left}");
}
