//! Ranks that find each other by torchrun's variables, without MPI.

use std::net::TcpListener;

use crate::job::{Job, stderr};
use crate::support::{Place, last_step, metrics, wait_for};

const RUN: &str = "train run.toml --set data.micro_batch_rows=2 --set comm.deterministic=true";

/// Starts `ranks` ranks with `arguments`.
fn start(place: &Place, ranks: usize, arguments: &str) -> Vec<Job> {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
    let rank = |rank: usize| {
        let mut command = place.command(arguments);
        command
            .envs([("RANK", rank.to_string()), ("WORLD_SIZE", ranks.to_string())])
            .envs([("MASTER_ADDR", "127.0.0.1".to_owned()), ("MASTER_PORT", port.to_string())])
            .env("RAYON_NUM_THREADS", "1");
        Job::start(command)
    };
    (0..ranks).map(rank).collect()
}

/// Lets all ranks end well; what the first printed.
fn ended(ranks: Vec<Job>) -> String {
    let outputs: Vec<_> = ranks.into_iter().map(Job::ended).collect();
    for (rank, output) in outputs.iter().enumerate() {
        assert!(output.status.success(), "rank {rank}: {}", stderr(output));
    }
    String::from_utf8_lossy(&outputs[0].stdout).into_owned()
}

/// Loss and norm of every step that is logged.
fn losses(place: &Place, run: &str) -> Vec<[f64; 2]> {
    let steps = metrics(place, run).into_iter().filter(|line| line["eval"].is_null());
    steps.map(|line| ["loss", "grad_norm"].map(|key| line[key].as_f64().expect("a number"))).collect()
}

#[test]
fn ranks_learn_what_one_process_learns() {
    let place = Place::with_experiment();
    place.run(&format!("{RUN} --run-dir alone"));
    let experts = "--set parallel.expert_parallel_size=2 --run-dir two";
    let said = ended(start(&place, 2, &format!("{RUN} {experts}")));
    assert!(said.contains("two/checkpoints"), "{said}");
    let alone = losses(&place, "alone");
    assert!(alone.len() > 1 && alone == losses(&place, "two"), "{alone:?}");
    let doctor = ended(start(&place, 2, "doctor"));
    assert!(doctor.contains("backend      tcp"), "{doctor}");
}

#[test]
fn collectives_are_measured_between_the_ranks() {
    let place = Place::new();
    // LibTorch's memory counts as that of devices, which are measured in both formats.
    let (device, formats) = match cfg!(feature = "libtorch") {
        true => ("libtorch", &["bf16", "f32"][..]),
        false => ("cpu", &["f32"][..]),
    };
    let arguments = format!("bench collectives --mebibytes 0.0625 --rounds 2 --device {device} --json");
    let said = ended(start(&place, 2, &arguments));
    let rows: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let rows = rows.as_array().expect("a row for each");
    let names = |row: &serde_json::Value| [row["format"].clone(), row["operation"].clone()];
    let expected = formats.iter().flat_map(|format| {
        ["all_reduce", "all_to_all", "all_gather"]
            .map(|operation| [*format, operation].map(serde_json::Value::from))
    });
    assert_eq!(rows.iter().map(names).collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));
        assert_eq!([number("bytes"), number("ranks")], [65_536.0, 2.0]);
        let rate = 65_536.0 / number("median_ms") / 1e6;
        let share = if row["operation"] == "all_reduce" { 1.0 } else { 0.5 };
        for (key, expected) in [("algorithm_gb_per_s", rate), ("bus_gb_per_s", rate * share)] {
            assert!((number(key) / expected - 1.0).abs() < 1e-9, "{key}: {row}");
        }
        assert!(row["bare_ms"].is_null(), "there is no other library: {row}");
    }
}

#[test]
fn a_lost_rank_ends_the_job_as_restartable_and_the_run_goes_on() {
    let place = Place::with_experiment();
    let run = format!("{RUN} --set schedule.total_steps=1000000 --set checkpoint.every_steps=5");
    let mut ranks = start(&place, 2, &format!("{run} --run-dir lost"));
    wait_for("a checkpoint", || place.path("lost/checkpoints/step-000010").exists());
    ranks.remove(1).signal("-KILL");
    let first = ranks.remove(0).ended();
    assert_eq!(first.status.code(), Some(75), "{}", stderr(&first));
    assert!(stderr(&first).contains("rank 1 "), "{}", stderr(&first));

    let end = last_step(&place, "lost") + 5;
    ended(start(&place, 2, &format!("{run} --run-dir lost --resume auto --max-steps {end}")));
    ended(start(&place, 2, &format!("{run} --run-dir whole --max-steps {end}")));
    assert_eq!(metrics(&place, "lost"), metrics(&place, "whole"));
}
