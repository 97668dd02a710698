//! Checkpoints of many ranks that are damaged, and disks that are full.

use super::{EXPERTS, SHARED, checkpoints, job, shard};
use crate::job::stderr;
use crate::support::Place;

#[test]
fn damaged_checkpoints_are_refused_on_all_ranks() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} --run-dir run");
    job(&place, 4, &format!("{run} {EXPERTS} --max-steps 20"), 0);
    let metrics = place.read("run/metrics.jsonl");
    let refused = |ranks: usize, file: &str, words: &str| {
        let resume = format!("{run} --resume auto --set parallel.expert_parallel_size={ranks}");
        let said = match ranks {
            1 => place.refused(&resume),
            _ => job(&place, ranks, &resume, 1),
        };
        assert_eq!(said.matches(file).count(), 1, "once, on {ranks} ranks: {said}");
        assert!(said.contains(words), "on {ranks} ranks: {said}");
        assert_eq!(said.matches("error:").count(), 1, "on {ranks} ranks: {said}");
        assert_eq!(place.read("run/metrics.jsonl"), metrics, "nothing is trained");
    };
    // Every rank's shards, on some number of ranks each.
    let cases = [(4, "optimizer-00002"), (2, "model-00000"), (1, "optimizer-00003"), (4, "model-00001")];
    for (ranks, name) in cases {
        let path = shard(&place, "run", 20, name);
        let whole = std::fs::read(&path).expect("a shard");
        let mut flipped = whole.clone();
        *flipped.last_mut().expect("bytes") ^= 1;
        std::fs::write(&path, &flipped).expect("writable");
        refused(ranks, &format!("{name}.safetensors"), "is damaged: checksum");
        std::fs::remove_file(&path).expect("removable");
        refused(ranks, &format!("{name}.safetensors"), "");
        std::fs::write(&path, &whole).expect("writable");
    }
    let other = format!("{run} {EXPERTS} --resume auto --set model.d_ff=32");
    let said = job(&place, 4, &other, 1);
    assert_eq!(said.matches("model.d_ff was 64, is now 32").count(), 1, "{said}");
    job(&place, 4, &format!("{run} {EXPERTS} --resume auto --max-steps 25"), 0);
}

/// Checkpoints of about 9 MiB.
const LARGE: &str = "--set model.d_ff=1024 --set model.num_experts=16 --set checkpoint.keep_last=0 \
                     --set parallel.expert_parallel_size=4";

#[test]
fn a_full_disk_under_shards_keeps_the_earlier_checkpoint() {
    let place = Place::with_experiment();
    // Room for two checkpoints and a part of the third.
    let run = format!("{SHARED} {LARGE} --set checkpoint.every_steps=10");
    let output = place.on_disk_of(
        "24m",
        &format!(
            "mpirun --oversubscribe -n 4 \"$PROGRAM\" {run} --run-dir full/run --set 'checkpoint.on_error=\"stop\"'; \
             code=$?; ls -A full/run/checkpoints > left; cp -r full/run kept; exit $code"
        ),
    );
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.matches("No space left").count(), 1, "one rank says it: {said}");
    assert!(said.contains("free some space"), "{said}");
    let left = place.read("left");
    let complete: Vec<&str> = left.lines().filter(|name| name.starts_with("step-")).collect();
    assert!(complete.contains(&"step-000010"), "{left}");
    job(&place, 4, &format!("{run} --run-dir kept --resume auto --max-steps 31"), 0);
    let kept = checkpoints(&place, "kept");
    assert!(kept.iter().all(|name| name.starts_with("step-")), "{kept:?}");
    assert!(complete.iter().all(|name| kept.iter().any(|k| k == name)), "{kept:?} of {left}");
}

#[test]
fn a_disk_that_is_full_for_a_while_costs_no_more_than_checkpoints() {
    let place = Place::with_experiment();
    let run = format!("{SHARED} {LARGE} --set checkpoint.every_steps=10 --max-steps 120");
    let run = format!("{run} --set schedule.total_steps=120");
    job(&place, 4, &format!("{run} --run-dir whole"), 0);
    // After the first checkpoint a file takes, at one stroke, the room that is left but for some metrics, until a
    // save has failed.
    let output = place.on_disk_of(
        "200m",
        &format!(
            "mpirun --oversubscribe -n 4 \"$PROGRAM\" {run} --run-dir full/run --set 'checkpoint.on_error=\"warn\"' \
             2> said & job=$!; \
             until [ -d full/run/checkpoints/step-000010 ] || ! kill -0 $job; do sleep 0.01; done; \
             until fallocate -l $(($(df -k --output=avail full | tail -n 1) - 512))k full/filler || ! kill -0 $job; \
             do :; done; \
             until grep -q 'checkpoint not written' said || ! kill -0 $job; do sleep 0.01; done; \
             rm full/filler; wait $job; code=$?; cat said >&2; \
             ls -A full/run/checkpoints > left; cp -r full/run kept; exit $code"
        ),
    );
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("checkpoint not written") && said.contains("No space left"), "{said}");
    let left = place.read("left");
    assert!(left.contains("step-000010") && left.contains("step-000120"), "{left}");
    assert!(left.lines().count() < 12, "some are missing: {left}");
    assert!(left.lines().all(|name| name.starts_with("step-")), "{left}");
    super::assert_same_end(&place, "whole", "kept");
}
