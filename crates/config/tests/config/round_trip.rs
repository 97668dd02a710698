//! A resolved run, written and read back, is the same run.

use proptest::prelude::*;
use switchyard_config::{RunPlan, branch_conflicts, differences, resolve_str, resume_conflicts};

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9/_.*-]{1,20}", "\\PC{1,12}", "[\"'\\\\\\n\\t#= a-z]{1,12}"]
}

fn toml_text(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn choice(words: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop::sample::select(words).prop_map(|word| format!("\"{word}\""))
}

fn number(range: std::ops::Range<f64>) -> impl Strategy<Value = String> {
    range.prop_map(|number| toml::Value::Float(number).to_string())
}

/// A `--set` argument that is valid whatever the others are.
fn setting() -> impl Strategy<Value = String> {
    let presets = &["tiny", "t5-small", "mt5-base", "switch-xxl-128", "t5-efficient-tiny-nl3-kv7"];
    let key = |key: &'static str| move |value: String| format!("{key}={value}");
    prop_oneof![
        choice(presets).prop_map(key("model.preset")),
        any::<u64>().prop_map(|seed| format!("seed={seed}")),
        text().prop_map(|name| format!("data.text_column={}", toml_text(&name))),
        text().prop_map(|path| format!("data.tokenizer={}", toml_text(&path))),
        (text(), 0.001..1e6).prop_map(|(path, weight)| {
            format!("data.sources=[{{path={}, weight={weight}}}]", toml_text(&path))
        }),
        number(1e-3..1e3).prop_map(key("data.mixture_temperature")),
        number(1e-300..1e300).prop_map(key("optimizer.learning_rate")),
        number(0.0..0.999).prop_map(key("trainer.dropout_rate")),
        number(1e-12..1e-3).prop_map(key("model.layer_norm_epsilon")),
        number(0.01..9.0).prop_map(key("routing.capacity_factor")),
        choice(&["adafactor", "adamw"]).prop_map(key("optimizer.kind")),
        choice(&["inverse_sqrt", "linear", "cosine", "constant"]).prop_map(key("schedule.kind")),
        choice(&["ceil", "floor", "multiple_of_8"]).prop_map(key("routing.capacity_rounding")),
        choice(&["line", "paragraph", "file"]).prop_map(key("data.text_document")),
        choice(&["relu", "gelu_tanh", "gelu", "silu"]).prop_map(key("model.activation")),
        choice(&["paper", "hf"]).prop_map(key("routing.semantics")),
        any::<bool>().prop_map(|on| format!("precision.allow_tf32={on}")),
        any::<bool>().prop_map(|on| format!("debug.force_balanced_routing={on}")),
        (1_usize..40).prop_map(|rows| format!("data.batch_rows={}", 64 * rows)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn written_runs_read_back_equal(sets in prop::collection::vec(setting(), 0..12)) {
        let first = resolve_str("name = \"x\"\nmodel.preset = \"tiny\"\n", &sets)
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
        let written = first.to_toml();
        let second = resolve_str(&written, &[])
            .map_err(|error| TestCaseError::fail(format!("{error}\n{written}")))?;
        prop_assert_eq!(&first.plan, &second.plan);
        prop_assert!(differences(&first.plan, &second.plan).is_empty());
    }
}

#[test]
fn origins_are_written_beside_the_values() {
    let written =
        resolve_str("name = \"x\"\nmodel.preset = \"tiny\"\n", &["seed=5".to_owned()]).unwrap().to_toml();
    for line in [
        "name = \"x\"  # config.toml:1:8",
        "seed = 5  # --set seed=5",
        "d_model = 256  # preset tiny",
        "eps = 1e-30  # the default",
        "sources = [{ path = \"sample\", name = \"sample\", weight = 1.0 }]  # the default",
    ] {
        assert!(written.lines().any(|found| found == line), "{line} is not in\n{written}");
    }
}

fn resolved(sets: &[&str]) -> RunPlan {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    resolve_str("name = \"x\"\nmodel.preset = \"tiny\"\n", &sets).unwrap().plan
}

#[test]
fn data_that_moved_and_a_new_name_can_be_resumed() {
    let before = resolved(&[]);
    let moved = resolved(&[
        "name=y",
        "data.sources=[{path=\"elsewhere/*.json\", weight=2}]",
        "data.eval_sources=[]",
        "data.tokenizer=elsewhere/tokenizer.json",
        "data.train_tokenizer_vocab_size=500",
        "data.text_column=content",
        "data.text_document=file",
        "data.on_corrupt=skip",
        "data.cache_dir=elsewhere",
    ]);
    assert_eq!(differences(&before, &moved).len(), 9);
    assert_eq!(resume_conflicts(&before, &moved), []);
    for set in ["data.mixture_temperature=2", "data.inputs_length=256", "seed=2", "trainer.z_loss=0"] {
        let conflicts = resume_conflicts(&before, &resolved(&[set]));
        assert_eq!(conflicts.len(), 1, "{set}");
        assert!(set.starts_with(&conflicts[0].key), "{conflicts:?}");
    }
}

#[test]
fn a_branch_keeps_the_model_the_optimizer_and_the_format() {
    let before = resolved(&[]);
    let free = resolved(&[
        "name=y",
        "seed=2",
        "data.inputs_length=256",
        "data.mixture_temperature=2",
        "optimizer.learning_rate=0.5",
        "schedule.kind=constant",
        "routing.capacity_factor=2",
        "trainer.dropout_rate=0.1",
    ]);
    assert_eq!(branch_conflicts(&before, &free), []);
    for (set, key) in [
        ("model.d_ff=512", "model.d_ff"),
        ("model.layer_norm_epsilon=1e-5", "model.layer_norm_epsilon"),
        ("model.init_scale=1", "model.init_scale"),
        ("optimizer.kind=adamw", "optimizer.kind"),
    ] {
        let keys: Vec<String> =
            branch_conflicts(&before, &resolved(&[set])).into_iter().map(|found| found.key).collect();
        assert_eq!(keys, [key]);
    }
}

#[test]
fn differences_name_keys_and_values() {
    let (before, after) = (resolved(&[]), resolved(&["checkpoint.keep_last=9", "optimizer.kind=adamw"]));
    let found: Vec<_> = differences(&before, &after)
        .into_iter()
        .map(|difference| (difference.key, difference.before, difference.after))
        .collect();
    let expected = [
        ("optimizer.kind", "\"adafactor\"", "\"adamw\""),
        ("optimizer.learning_rate", "1.0", "0.1"),
        ("optimizer.parameter_scale", "true", "false"),
        ("optimizer.eps", "1e-30", "1e-8"),
        ("checkpoint.keep_last", "3", "9"),
    ];
    assert_eq!(found, expected.map(|(k, b, a)| (k.to_owned(), b.to_owned(), a.to_owned())));
    let conflicts = resume_conflicts(&before, &after);
    assert_eq!(conflicts.len(), 4, "keep_last may change");
}
