//! Expected values of seqio and of the counter-based design, for tests.

use std::path::PathBuf;

use serde_json::Value;

pub(crate) fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(path)
}

pub(crate) fn section(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture("data-vectors.json")).expect("the fixture is there");
    let mut vectors: Value = serde_json::from_str(&text).expect("the fixture is JSON");
    vectors[name].take()
}

pub(crate) fn u64_list(value: &Value) -> Vec<u64> {
    value.as_array().expect("a list").iter().map(|v| v.as_u64().expect("a number")).collect()
}

pub(crate) fn i32_list(value: &Value) -> Vec<i32> {
    u64_list(value).into_iter().map(|v| v as i32).collect()
}

pub(crate) fn mask(value: &Value) -> Vec<bool> {
    u64_list(value).into_iter().map(|bit| bit == 1).collect()
}
