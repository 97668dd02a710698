//! One run on many meshes, and from one mesh to the next.

use std::time::Duration;

use safetensors::SafeTensors;
use serde_json::Value;

use super::{EXPERTS, Job, SHARED, assert_same_end, checkpoints, job, metrics, mpirun, shard, weights};
use crate::job::stderr;
use crate::support::Place;

/// Takes the metrics of experts out of a record: sums over layers are added per rank first, so that they
/// may differ in the last bits between meshes.
fn without_layer_sums(mut record: Value) -> (Value, Vec<Value>) {
    let mut sums = Vec::new();
    let object = record.as_object_mut().expect("an object");
    sums.extend(object.remove("moe"));
    if let Some(eval) = object.get_mut("eval").and_then(Value::as_object_mut) {
        sums.extend(eval.remove("moe"));
    }
    (record, sums)
}

/// Two records with the same keys, lists and texts, and numbers that differ by a part of `tolerance`.
fn assert_close(a: &Value, b: &Value, tolerance: f64, at: &str) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            assert!(a.keys().eq(b.keys()), "{at}");
            a.iter().for_each(|(key, value)| assert_close(value, &b[key], tolerance, &format!("{at}.{key}")));
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{at}");
            a.iter().zip(b).for_each(|(a, b)| assert_close(a, b, tolerance, at));
        }
        _ => match (a.as_f64(), b.as_f64()) {
            (Some(x), Some(y)) => {
                assert!((x - y).abs() <= tolerance * x.abs().max(y.abs()), "{at}: {x} {y}");
            }
            _ => assert_eq!(a, b, "{at}"),
        },
    }
}

/// Two runs learned the same, bit for bit, whatever their meshes.
fn assert_learned_the_same(place: &Place, a: &str, b: &str) {
    let (of_a, of_b) = (metrics(place, a), metrics(place, b));
    assert_eq!(of_a.len(), of_b.len(), "{a} {b}");
    for (at, (of_a, of_b)) in of_a.into_iter().zip(of_b).enumerate() {
        let ((of_a, sums_of_a), (of_b, sums_of_b)) = (without_layer_sums(of_a), without_layer_sums(of_b));
        assert_eq!(of_a, of_b, "{a} {b}, line {at}");
        assert_close(&sums_of_a.into(), &sums_of_b.into(), 1e-12, &format!("{a} {b}, line {at}"));
    }
    assert!(weights(place, a) == weights(place, b), "weights of {a} and {b} differ");
}

/// Largest difference between two parameters of the same name.
fn farthest_weight(a: &[u8], b: &[u8]) -> f32 {
    let (a, b) = (SafeTensors::deserialize(a).expect("a file"), SafeTensors::deserialize(b).expect("a file"));
    let numbers = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().expect("four"))).collect()
    };
    let farthest = a.iter().flat_map(|(name, of_a)| {
        let of_b = b.tensor(name).expect("the same parameters");
        let pairs = numbers(of_a.data()).into_iter().zip(numbers(of_b.data()));
        pairs.map(|(a, b)| (a - b).abs()).collect::<Vec<_>>()
    });
    farthest.fold(0.0, f32::max)
}

#[test]
fn four_ranks_learn_what_one_process_learns_and_one_rank_speaks() {
    let place = Place::with_experiment();
    place.run(&format!("{SHARED} --run-dir solo"));
    let command = mpirun(&place, "-n 4", &format!("{SHARED} {EXPERTS} --run-dir spread"));
    let output = Job::start(command).ended();
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    for line in ["parameters,", "expert 3 on rank 3", "step 20: held-out loss"] {
        assert_eq!(said.matches(line).count(), 1, "one rank speaks: {said}");
    }
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(printed.matches("spread/checkpoints/step-000060").count(), 1, "{printed}");
    for rank in 0..4 {
        let log = place.read(&format!("spread/logs/rank-{rank}.log"));
        assert!(log.contains("expert groups of 4"), "rank {rank}: {log}");
        assert!(shard(&place, "spread", 60, &format!("optimizer-{rank:05}")).exists());
    }
    assert!(!place.path("spread/logs/rank-4.log").exists());
    assert_eq!(checkpoints(&place, "spread"), ["step-000020", "step-000040", "step-000060"]);
    assert_learned_the_same(&place, "solo", "spread");
    for (ranks, name) in [(4, "copied"), (2, "halved")] {
        // Every rank with all experts; half of the ranks.
        job(&place, ranks, &format!("{SHARED} --run-dir {name}"), 0);
        assert_learned_the_same(&place, "solo", name);
    }
}

#[test]
fn split_tensors_learn_the_same_within_rounding() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} --max-steps 20");
    place.run(&format!("{run} --run-dir solo"));
    let meshes = [(2, "tensor_parallel_size=2", ""), (8, "tensor_parallel_size=2", "expert_parallel_size=2")];
    for (ranks, tensor, expert) in meshes {
        let name = format!("on-{ranks}");
        let sets = [tensor, expert].map(|set| match set {
            "" => String::new(),
            set => format!("--set parallel.{set}"),
        });
        job(&place, ranks, &format!("{run} {} --run-dir {name}", sets.join(" ")), 0);
        let (solo, split) = (metrics(&place, "solo"), metrics(&place, &name));
        assert_eq!(solo.len(), split.len());
        for (solo, split) in solo.iter().zip(&split) {
            assert_eq!(solo["step"], split["step"]);
            assert_eq!(solo["tokens"], split["tokens"]);
            for path in ["/loss", "/total_loss", "/eval/loss", "/eval/word_loss"] {
                if let Some(value) = solo.pointer(path) {
                    let at = format!("{ranks} ranks, step {}, {path}", solo["step"]);
                    assert_close(value, split.pointer(path).expect("the same records"), 1e-5, &at);
                }
            }
        }
        let far = farthest_weight(&weights(&place, "solo"), &weights(&place, &name));
        assert!(far < 1e-4, "{ranks} ranks: weights differ by {far}");
        place.run(&format!("inspect checkpoint {name}"));
    }
}

#[test]
fn a_run_moves_from_mesh_to_mesh_and_learns_the_same() {
    let place = Place::with_experiment();
    place.run(&format!("{SHARED} --run-dir solo"));
    let moved = format!("{SHARED} --run-dir moved --resume auto");
    job(&place, 4, &format!("{moved} {EXPERTS} --max-steps 20"), 0);
    place.run(&format!("{moved} --max-steps 30"));
    let two = "--set parallel.expert_parallel_size=2";
    job(&place, 2, &format!("{moved} {two} --max-steps 45"), 0);
    job(&place, 4, &moved, 0);
    assert!(weights(&place, "solo") == weights(&place, "moved"));
    let losses = |run: &str| -> Vec<Value> {
        let steps = metrics(&place, run).into_iter().filter(|record| record.get("eval").is_none());
        steps.map(|record| without_layer_sums(record).0).collect()
    };
    assert_eq!(losses("solo"), losses("moved"));
}

#[test]
fn a_run_moves_to_split_tensors_and_back() {
    let place = Place::with_experiment();
    place.run(&format!("{SHARED} --run-dir solo --max-steps 30"));
    let moved = format!("{SHARED} --run-dir moved --resume auto");
    job(&place, 4, &format!("{moved} {EXPERTS} --max-steps 10"), 0);
    job(&place, 2, &format!("{moved} --set parallel.tensor_parallel_size=2 --max-steps 20"), 0);
    job(&place, 4, &format!("{moved} {EXPERTS} --max-steps 30"), 0);
    let steps = |run: &str| -> Vec<Value> {
        metrics(&place, run).into_iter().filter(|record| record.get("eval").is_none()).collect()
    };
    let (solo, moved) = (steps("solo"), steps("moved"));
    assert_eq!((solo.len(), moved.len()), (30, 30));
    for (at, (solo, moved)) in solo.iter().zip(&moved).enumerate() {
        // Up to the split nothing may differ; after it, by rounding.
        let tolerance = if at < 10 { 0.0 } else { 1e-5 };
        assert_close(&solo["loss"], &moved["loss"], tolerance, &format!("step {}", at + 1));
    }
}

#[test]
fn a_job_repeats_itself() {
    let place = Place::with_experiment();
    for name in ["first", "second"] {
        job(&place, 4, &format!("{SHARED} {EXPERTS} --run-dir {name}"), 0);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_same_end(&place, "first", "second");
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
            let output = Job::start(mpirun(&place, "-n 4", &format!("{command} {mesh}"))).ended();
            assert!(output.status.success(), "{}", stderr(&output));
            assert_eq!(String::from_utf8_lossy(&output.stdout), alone, "{command} {mesh}");
        }
    }
}
