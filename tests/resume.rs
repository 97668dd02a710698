//! Interrupted runs end as uninterrupted ones do, bit for bit.

use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use crate::job::{Job, exit_code};
use crate::support::{Place, lines_logged, metrics, timeless, wait_for};

/// Long enough to be killed ten times.
const LONG: &str = "train run.toml --set schedule.total_steps=400 --set checkpoint.every_steps=7";

fn start(place: &Place, arguments: &str) -> Job {
    Job::start(place.command(arguments))
}

fn assert_same_end(place: &Place, a: &str, b: &str) {
    assert_eq!(metrics(place, a), metrics(place, b));
    for file in ["model-00000.safetensors", "optimizer-00000.safetensors"] {
        let bytes = |run: &str| {
            std::fs::read(place.path(run).join("checkpoints/step-000400").join(file)).expect("a checkpoint")
        };
        assert!(bytes(a) == bytes(b), "{file} differs");
    }
}

#[test]
fn ten_kills_change_nothing() {
    let place = Place::with_experiment();
    place.run(&format!("{LONG} --run-dir whole"));
    let mut random = 12_345_u64;
    for kill in 0..10 {
        let before = lines_logged(&place, "killed");
        let mut child = start(&place, &format!("{LONG} --run-dir killed --resume auto"));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // Some kills hit start-up, the others a moment within or between steps and saves.
        if kill % 3 != 0 {
            wait_for("a step", || lines_logged(&place, "killed") != before || !child.is_running());
        }
        std::thread::sleep(Duration::from_micros((random >> 33) % 60_000));
        assert!(child.is_running(), "kill {kill} came after the end");
        child.signal("-KILL");
        child.ended();
    }
    place.run(&format!("{LONG} --run-dir killed --resume auto"));
    assert_same_end(&place, "whole", "killed");
}

#[test]
fn a_bfloat16_run_goes_on_from_its_float32_masters() {
    let place = Place::with_experiment();
    let long = format!("{LONG} --set precision.mode=selective");
    place.run(&format!("{long} --run-dir whole"));
    place.run(&format!("{long} --run-dir halved --max-steps 203"));
    place.run(&format!("{long} --run-dir halved --resume auto"));
    assert_same_end(&place, "whole", "halved");
}

#[test]
fn ctrl_c_and_sigterm_save_and_exit_75() {
    let place = Place::with_experiment();
    place.run(&format!("{LONG} --run-dir whole"));
    for name in ["-INT", "-TERM"] {
        let before = lines_logged(&place, "stopped");
        let child = start(&place, &format!("{LONG} --run-dir stopped --resume auto"));
        wait_for("a step", || lines_logged(&place, "stopped") != before);
        child.signal(name);
        assert_eq!(exit_code(&child.ended()), Some(75));
    }
    place.run(&format!("{LONG} --run-dir stopped --resume auto"));
    assert_same_end(&place, "whole", "stopped");
}

#[test]
fn a_second_ctrl_c_stops_at_once() {
    let place = Place::with_experiment();
    let slow = "train run.toml --set schedule.total_steps=100000 --set data.batch_rows=4096 --set checkpoint.every_steps=0";
    let child = start(&place, slow);
    wait_for("the start", || place.path("runs/small/metrics.jsonl").exists());
    std::thread::sleep(Duration::from_millis(100));
    child.signal("-INT");
    std::thread::sleep(Duration::from_millis(20));
    child.signal("-INT");
    let code = exit_code(&child.ended());
    assert!(matches!(code, Some(130 | 75)), "{code:?}");
    if code == Some(130) {
        assert_eq!(std::fs::read_dir(place.path("runs/small/checkpoints")).expect("a directory").count(), 0);
    }
}

#[test]
fn an_existing_run_and_another_experiment_are_refused() {
    let place = Place::with_experiment();
    place.run("train run.toml --max-steps 20");
    place.refused_with("train run.toml", &["runs/small exists already", "--resume auto"]);
    let config = place.read("runs/small/config.toml");
    let metrics = place.read("runs/small/metrics.jsonl");
    place.refused_with(
        "train run.toml --resume auto --set optimizer.learning_rate=1e-3",
        &["optimizer.learning_rate was 0.02, is now 0.001", "--run-dir"],
    );
    let mut text = place.read("run.toml");
    text = text.replace("corpus.json.gz", "other.json.gz");
    place.write("other.toml", text.as_bytes());
    place.write_gz("other.json.gz", &crate::support::json_lines(5000..5300));
    place.refused_with("train other.toml --resume auto", &["SHA-256 of data.tokenizer"]);
    place.write_gz("corpus.json.gz", &crate::support::json_lines(5000..5300));
    let changed = place.refused("train run.toml --resume auto");
    assert!(changed.contains("tokenizer") || changed.contains("fingerprint"), "{changed}");
    assert_eq!(place.read("runs/small/config.toml"), config);
    assert_eq!(place.read("runs/small/metrics.jsonl"), metrics);
}

#[test]
fn an_incomplete_checkpoint_is_passed_over_and_a_damaged_one_refused() {
    let place = Place::with_experiment();
    place.run("train run.toml --max-steps 40");
    std::fs::remove_file(place.path("runs/small/checkpoints/step-000040/manifest.json")).expect("a manifest");
    let output = Job::start(place.command("train run.toml --resume auto --max-steps 41")).ended();
    let said = crate::job::stderr(&output);
    assert!(output.status.success() && said.contains("continuing at step 20"), "{said}");
    assert!(said.contains("step-000040") && said.contains("not a complete checkpoint"), "{said}");

    let shard = place.path("runs/small/checkpoints/step-000041/model-00000.safetensors");
    let mut bytes = std::fs::read(&shard).expect("a shard");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&shard, bytes).expect("a shard");
    place.refused_with(
        "train run.toml --resume auto",
        &["step-000041/model-00000.safetensors is damaged", "checksum"],
    );
    place.refused_with(
        "train run.toml --resume no-such-checkpoint",
        &["no-such-checkpoint", "neither `auto`"],
    );
    // What does not need the damaged file works, and says what is damaged.
    place.run("export runs/small/checkpoints/step-000020 --out exported");
    let output = Job::start(place.command("inspect checkpoint runs/small")).ended();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("is damaged"));
}

#[test]
fn an_older_checkpoint_starts_another_run() {
    let place = Place::with_experiment();
    place.run("train run.toml --max-steps 40");
    let older = "--resume runs/small/checkpoints/step-000020";
    place.refused_with(&format!("train run.toml {older}"), &["has gone on to", "step-000040", "--run-dir"]);
    place.refused_with(
        &format!("train run.toml {older} --run-dir other --set model.d_ff=32"),
        &["model.d_ff was 64, is now 32"],
    );
    place.run(&format!("train run.toml {older} --run-dir other --set optimizer.learning_rate=1e-3"));
    let steps = timeless(&place.read("other/metrics.jsonl"));
    assert_eq!(steps[0]["step"], 21);
    assert!(steps[0]["learning_rate"].as_f64().is_some_and(|rate| rate < 1e-3));
    place.run("train run.toml --resume runs/small --run-dir third --max-steps 41");
    assert_eq!(timeless(&place.read("third/metrics.jsonl"))[0]["step"], 41);
}

#[test]
fn a_run_directory_has_one_process_at_a_time() {
    let place = Place::with_experiment();
    let endless = "train run.toml --set schedule.total_steps=1000000";
    let child = start(&place, endless);
    wait_for("a step", || lines_logged(&place, "runs/small") > 0);
    place.refused_with(&format!("{endless} --resume auto"), &["runs/small is in use", "--run-dir"]);
    child.signal("-INT");
    assert_eq!(exit_code(&child.ended()), Some(75));
}

#[test]
fn the_command_to_continue_is_complete() {
    let place = Place::with_experiment();
    let mut command = place.command("train run.toml --run-dir odd --set schedule.total_steps=400");
    command.args(["--set", "eval.prompts=[\"The <extra_id_0>.\"]"]);
    let child = Job::start(command);
    wait_for("a step", || lines_logged(&place, "odd") > 0);
    child.signal("-TERM");
    let said = String::from_utf8(child.ended().stdout).expect("UTF-8");
    let expected = "switchyard train run.toml --set schedule.total_steps=400 --set \
                    'eval.prompts=[\"The <extra_id_0>.\"]' --run-dir odd --resume auto";
    assert!(said.contains(expected), "{said}");
}

#[test]
fn ctrl_c_before_the_first_step_ends_at_once_and_harms_nothing() {
    let place = Place::with_experiment();
    place.write_gz("corpus.json.gz", &crate::support::json_lines(0..60_000));
    let child = start(&place, "train run.toml --max-steps 1");
    wait_for("the cache", || place.path("cache/tokens").exists());
    child.signal("-INT");
    // The signal itself ends it: a program that goes on to its end or saves would exit with a code.
    let ended = child.ended().status;
    assert_eq!(ended.signal(), Some(2), "{ended:?}");
    place.run("train run.toml --max-steps 1");
}
