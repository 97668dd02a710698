//! The script that measures Switchyard and PyTorch in turn, with programs that only pretend to be PyTorch.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::job::stderr;
use crate::support::Place;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/bench/against_pytorch.py");

/// Prints as the baselines do, and repeats its arguments.
const BASELINE: &str = r#"
import json, sys
print("a word before")
print(json.dumps({"step_ms": 1000.0, "peak_GB": 2.0 * 1.048576, "arguments": sys.argv[1:]}))
"#;

/// What `switchyard bench step --json` says of a GPU.
const OURS: &str = r#"#!/bin/sh
printf '{\n"step_ms": 400.0, "device_memory": {"peak_allocated_bytes": 1048576000}\n}\n'
"#;

/// Runs the script in `place`; `None` where there is no Python.
fn compared(place: &Place, arguments: &str) -> Option<Output> {
    Command::new("python3").arg("--version").output().ok()?;
    let mut command = Command::new("python3");
    command.arg(SCRIPT).args(["--baselines", "baselines"]).args(arguments.split_whitespace());
    Some(command.current_dir(place.root()).output().expect("python3 starts"))
}

fn with_baselines() -> Place {
    let place = Place::new();
    for name in ["switch_torch.py", "switch_hf.py"] {
        place.write(&format!("baselines/{name}"), BASELINE.as_bytes());
    }
    place
}

fn executable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("a file");
}

#[test]
fn on_the_cpu_both_sides_are_measured_and_a_failure_is_a_row() {
    let place = with_baselines();
    place.write("baselines/switch_hf.py", b"raise SystemExit('transformers is too old')");
    let program = env!("CARGO_BIN_EXE_switchyard");
    let arguments =
        format!("--switchyard {program} --models tiny-0 --precisions fp32 --rounds 1 --steps 1 --threads 1");
    let Some(output) = compared(&place, &arguments) else { return };
    let said = stderr(&output);
    assert!(said.contains("transformers is too old"), "{said}");
    assert_eq!(output.status.code(), Some(1), "{said}");
    let table = String::from_utf8(output.stdout).expect("UTF-8");
    let rows: Vec<&str> = table.lines().skip(2).collect();
    assert_eq!(rows.len(), 3, "{table}\n{said}");
    assert!(rows[0].starts_with("| tiny-0, adamw | Switchyard fp32 | ") && rows[0].ends_with(" 1.00 |"));
    assert!(rows[1].starts_with("| tiny-0, adamw | torch compile fp32 | 1000.0 (1000.0 to 1000.0) | "));
    assert_eq!(rows[2], "| tiny-0, adamw | transformers fp32 | failed | – | – |");
}

#[test]
fn on_a_gpu_models_take_turns_and_memory_is_that_of_tensors() {
    let place = with_baselines();
    place.write("ours", OURS.as_bytes());
    executable(&place.path("ours"));
    let arguments = "--switchyard ./ours --device cuda --models t5-base,switch-base-32 --against compile,eager,hf \
                     --rounds 2 --steps 3";
    let Some(output) = compared(&place, &format!("{arguments} --json out.json")) else { return };
    assert!(output.status.success(), "{}", stderr(&output));
    let table = String::from_utf8(output.stdout).expect("UTF-8");
    for row in [
        "| t5-base, adamw | Switchyard selective | 400.0 (400.0 to 400.0) | 1000 | 1.00 |",
        "| t5-base, adamw | torch compile + graph bf16 | 1000.0 (1000.0 to 1000.0) | 2000 | 2.50 |",
        "| t5-base, adamw | torch eager bf16 | 1000.0 (1000.0 to 1000.0) | 2000 | 2.50 |",
        "| switch-base-32, adafactor | transformers bf16 | 1000.0 (1000.0 to 1000.0) | 2000 | 2.50 |",
    ] {
        assert!(table.contains(row), "{row} is not in\n{table}");
    }
    let document: Value = serde_json::from_str(&place.read("out.json")).expect("JSON");
    let rows = document["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 8);
    let command = |row: &Value| {
        let words = row["command"].as_array().expect("words").iter();
        words.map(|word| word.as_str().expect("a word").to_owned()).collect::<Vec<_>>().join(" ")
    };
    let ours = command(&rows[4]);
    assert!(
        ours.contains("--device cuda --preset switch-base-8 --experts 32 --optimizer adafactor"),
        "{ours}"
    );
    let theirs = command(&rows[1]);
    assert!(theirs.contains("--experts 0 --device cuda --dtype bf16 --mode compile --graph"), "{theirs}");
    assert_eq!(rows[7]["times_ours"]["selective"], 2.5);
    assert_eq!(rows[7]["step_ms"].as_array().map(Vec::len), Some(2));
}

#[test]
fn unknown_models_and_programs_are_refused() {
    let place = with_baselines();
    for (arguments, word) in
        [("--models t5-huge", "t5-huge"), ("--against jax", "jax"), ("--rounds 0", "--rounds")]
    {
        let Some(output) = compared(&place, arguments) else { return };
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
}
