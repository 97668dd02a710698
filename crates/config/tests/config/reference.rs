//! The generated reference.

use switchyard_config::{RunConfig, reference, resolve_str};

#[test]
fn every_key_of_a_plan_is_documented() {
    let plan = resolve_str("name = \"x\"\nmodel.preset = \"tiny\"\n", &[]).unwrap();
    let text = reference();
    let mut table = "";
    let written = plan.to_toml();
    for line in written.lines() {
        if let Some(name) = line.strip_prefix('[') {
            table = name.trim_end_matches(']');
            assert!(text.contains(&format!("## `[{table}]`")), "{table} has no section");
        } else if let Some((key, _)) = line.split_once(" = ") {
            assert!(text.contains(&format!("| `{key}` |")), "{table}.{key} is not documented");
        }
    }
    assert_eq!(RunConfig::of(&plan.plan).name.as_deref(), Some("x"));
}

#[test]
fn rows_hold_type_default_and_meaning() {
    let text = reference();
    for row in [
        "| `name` | string | required | Name of the run and of its directory under `runs/`. |",
        "| `capacity_factor` | number | `1.25` | Slots of all experts together, relative to the tokens of a group, in training. |",
        "| `on_error` | `\"stop\"` or `\"warn\"` | `\"stop\"` | What a failed write does to the run: stop it, or log the failure and go on. |",
    ] {
        assert!(text.contains(row), "missing: {row}");
    }
}
