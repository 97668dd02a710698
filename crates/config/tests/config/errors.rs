//! What users read when something is wrong.

use std::fs;

use switchyard_config::{ErrorKind, resolve, resolve_str};

const START: &str = "name = \"x\"\nmodel.preset = \"tiny\"\n";

/// The whole text of the error for a file's text and `--set` arguments.
fn refusal(text: &str, sets: &[&str]) -> String {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    match resolve_str(text, &sets) {
        Ok(_) => panic!("accepted: {text} {sets:?}"),
        Err(error) => error.to_string(),
    }
}

fn refusal_of_sets(sets: &[&str]) -> String {
    refusal(START, sets)
}

#[test]
fn misspelled_keys_get_a_suggestion() {
    assert_eq!(
        refusal("name = \"x\"\n[model]\nnum_expert = 8\n", &[]),
        "unknown key `model.num_expert`\n --> config.toml:3:1\n  = help: did you mean `num_experts`?"
    );
    assert_eq!(
        refusal("name = \"x\"\nnum_experts = 8\n", &[]),
        "unknown key `num_experts`\n --> config.toml:2:1\n  = help: `num_experts` belongs to [model]"
    );
    assert_eq!(
        refusal("name = \"x\"\n[modle]\n", &[]),
        "unknown key `modle`\n --> config.toml:2:2\n  = help: did you mean `model`?"
    );
    assert_eq!(
        refusal("name = \"x\"\n[[data.sources]]\npath = \"a\"\nwheight = 2\n", &[]),
        "unknown key `data.sources[0].wheight`\n --> config.toml:4:1\n  = help: did you mean `weight`?"
    );
    assert_eq!(
        refusal_of_sets(&["checkpoint.zzz=1"]),
        "unknown key `checkpoint.zzz`\n  = note: in --set checkpoint.zzz=1\n  \
         = help: keys of [checkpoint] are every_steps, keep_last, keep_every, on_error, export"
    );
}

#[test]
fn keys_of_later_versions_are_unknown() {
    assert!(refusal_of_sets(&["precision.kv_cache_dtype=bf16"]).starts_with("unknown key"));
    assert!(
        refusal_of_sets(&["precision.mode=fp16"])
            .starts_with("`precision.mode` must be `\"fp32\"`, `\"bf16\"` or `\"selective\"`, found")
    );
}

#[test]
fn sums_of_float32_gradients_are_not_rounded() {
    let refused = refusal_of_sets(&["precision.accumulation_dtype=bf16"]);
    assert!(refused.contains("would round the sums of float32 gradients"), "{refused}");
    assert!(refused.contains("precision.mode = \"selective\""), "{refused}");
}

#[test]
fn only_float32_models_take_tf32() {
    for mode in ["selective", "bf16"] {
        let refused = refusal_of_sets(&["precision.allow_tf32=true", &format!("precision.mode={mode}")]);
        assert!(refused.contains("is for precision.mode = \"fp32\" only"), "{refused}");
        assert!(refused.contains(&format!("what \"{mode}\" keeps in float32")), "{refused}");
    }
    let allowed = resolve_str("name = \"x\"\nmodel.preset = \"tiny\"\nprecision.allow_tf32 = true\n", &[]);
    assert!(allowed.unwrap().plan.allow_tf32);
}

#[test]
fn wrong_types_name_key_type_and_place() {
    assert_eq!(
        refusal("name = \"x\"\n[model]\nd_model = \"wide\"\n", &[]),
        "`model.d_model` must be a whole number, found `\"wide\"`\n --> config.toml:3:11"
    );
    assert_eq!(
        refusal("name = \"x\"\n[model]\nd_model = -1\n", &[]),
        "`model.d_model` must be a whole number, found `-1`\n --> config.toml:3:11"
    );
    assert_eq!(
        refusal("name = \"x\"\n[schedule]\nkind = \"cosin\"\n", &[]),
        "`schedule.kind` must be `\"inverse_sqrt\"`, `\"linear\"`, `\"cosine\"` or `\"constant\"`, found \
         `\"cosin\"`\n --> config.toml:3:8\n  = help: did you mean `\"cosine\"`?"
    );
    assert_eq!(
        refusal("name = \"x\"\nmodel = 3\n", &[]),
        "`model` must be a table, `[model]`, found an integer\n --> config.toml:2:9"
    );
    assert_eq!(
        refusal("name = \"x\"\n[[data.sources]]\npath = \"a\"\n[[data.sources]]\npath = 3\n", &[]),
        "`data.sources[1].path` must be a string, found `3`\n --> config.toml:5:8"
    );
    assert_eq!(
        refusal("name = \"x\"\n[data]\nsources = \"c4\"\n", &[]),
        "`data.sources` must be a list of tables such as `[{ path = \"c4/*.json.gz\" }]`, found `\"c4\"`\n \
         --> config.toml:3:11"
    );
    assert_eq!(
        refusal_of_sets(&["model.gated=1"]),
        "`model.gated` must be `true` or `false`, found `1`\n  = note: in --set model.gated=1"
    );
}

#[test]
fn broken_toml_is_placed() {
    let text = refusal("name = \"x\"\n[model\n", &[]);
    assert!(text.starts_with("not valid TOML: ") && text.contains(" --> config.toml:2:"), "{text}");
    let text = refusal("name = \"x\"\nname = \"y\"\n", &[]);
    assert!(text.contains("duplicate key") && text.contains("config.toml:2:1"), "{text}");
}

#[test]
fn faulty_set_arguments_are_refused() {
    assert_eq!(refusal_of_sets(&["seed"]), "--set seed has no value; write --set key=value");
    for argument in ["=3", "a b=3", "model..d_model=3"] {
        assert!(refusal_of_sets(&[argument]).contains("does not begin with a key"), "{argument}");
    }
    assert!(refusal_of_sets(&["extends=[\"a.toml\"]"]).contains("only files can extend"));
    assert!(refusal_of_sets(&["data.sources=[{path=x}]"]).starts_with("not valid TOML: "));
}

#[test]
fn missing_keys_say_what_to_write() {
    assert_eq!(
        refusal("model.preset = \"tiny\"\n", &[]),
        "`name` is not set\n  = help: write `name = \"...\"` before the first table"
    );
    assert!(
        refusal("name = \"x\"\n", &[]).starts_with("`model.d_model` is not set\n  = help: choose a preset")
    );
    assert!(refusal_of_sets(&["data.sources=[{weight=1}]"]).starts_with("`data.sources.path` is not set"));
}

#[test]
fn unknown_presets_are_placed() {
    assert_eq!(
        refusal("name = \"x\"\n[model]\npreset = \"t5-bse\"\n", &[]),
        "unknown preset `t5-bse`; did you mean `t5-base`?\n --> config.toml:3:10"
    );
}

#[test]
fn uneven_sizes_name_both_keys_and_their_origins() {
    assert_eq!(
        refusal(&format!("{START}[data]\nbatch_rows = 100\n"), &["data.micro_batch_rows=32"]),
        "data.batch_rows = 100 is not a multiple of data.micro_batch_rows = 32\n --> config.toml:4:14\n  \
         = note: data.micro_batch_rows = 32 came from --set data.micro_batch_rows=32\n  \
         = help: data.micro_batch_rows = 25 fits"
    );
    assert_eq!(
        refusal_of_sets(&["routing.group_rows=48"]),
        "data.micro_batch_rows = 64 is not a multiple of routing.group_rows = 48\n  \
         = note: routing.group_rows = 48 came from --set routing.group_rows=48\n  \
         = note: data.micro_batch_rows = 64 is the default\n  = help: routing.group_rows = 32 fits"
    );
    let text = refusal("name = \"x\"\n[model]\npreset = \"t5-small\"\nnum_experts = 8\n", &[]);
    assert!(
        text.starts_with("model.num_experts = 8, but no layer has experts\n --> config.toml:4:15"),
        "{text}"
    );
    assert!(text.contains("model.encoder_expert_layer_every = 0 came from preset t5-small"), "{text}");
}

#[test]
fn every_rule_refuses() {
    let cases: &[(&[&str], &str)] = &[
        (&["name=a/b"], "cannot be the name of a directory"),
        (&["name=.."], "cannot be the name of a directory"),
        (&["model.d_kv=0"], "model.d_kv = 0 must be at least 1"),
        (&["data.targets_length=0"], "data.targets_length = 0 must be at least 1"),
        (&["eval.batches=0"], "eval.batches = 0 must be at least 1"),
        (&["routing.capacity_factor=0"], "routing.capacity_factor = 0 must be finite and greater than 0"),
        (&["routing.eval_capacity_factor=inf"], "must be finite"),
        (&["routing.load_balancing_loss_coef=-0.1"], "must be finite and not negative"),
        (&["routing.router_jitter_noise=1.0"], "must be at least 0 and below 1"),
        (&["optimizer.learning_rate=nan"], "optimizer.learning_rate = NaN must be finite"),
        (&["trainer.dropout_rate=1"], "trainer.dropout_rate = 1 must be at least 0 and below 1"),
        (&["trainer.dropout_rate=-0.1"], "trainer.dropout_rate = -0.1 must be at least 0 and below 1"),
        // 1 in float32, of which the rest is divided by nothing.
        (
            &["trainer.dropout_rate=0.99999999"],
            "trainer.dropout_rate = 0.99999999 must be at least 0 and below 1, also when rounded to float32",
        ),
        (&["trainer.expert_dropout=0.99999999"], "also when rounded to float32"),
        (&["data.noise_density=1.0"], "data.noise_density = 1 must be greater than 0 and below 1"),
        (&["data.mean_noise_span_length=0.5"], "must be finite and at least 1"),
        (&["model.d_model=9000000000000000000"], "the model would have about"),
        (&["model.num_layers=1000000000000"], "is more than 65536"),
        (&["data.mixture_temperature=0"], "data.mixture_temperature = 0 must be finite and greater than 0"),
        (&["data.mixture_temperature=inf"], "data.mixture_temperature = inf must be finite"),
        (&["model.relative_attention_num_buckets=7"], "must be even and at least 4"),
        (&["model.relative_attention_max_distance=16"], "must be more than half"),
        (&["model.num_experts=1"], "leaves the router nothing to choose"),
        (&["model.expert_layer_every=0"], "no layer has experts"),
        (&["routing.semantics=hf", "routing.router=top2"], "knows only routing.router = \"top1\""),
        (&["routing.semantics=hf", "routing.router=expert_choice"], "knows only routing.router = \"top1\""),
        (&["routing.semantics=hf", "routing.expert_capacity=0"], "needs routing.expert_capacity"),
        (&["routing.semantics=hf", "routing.group_rows=2"], "has one row a group"),
        (&["routing.expert_capacity=32"], "has no effect with routing.semantics = \"paper\""),
        (&["schedule.kind=cosine", "schedule.total_steps=50"], "would never reach its peak"),
        (&["data.train_tokenizer_vocab_size=32128"], "leaves no id for sentinels"),
        (&["data.sources=[]"], "there is nothing to train on"),
        (&["data.sources=[{path=\"\"}]"], "empty path or name"),
        (&["data.sources=[{path=\"a\", weight=0}]"], "must be finite and greater than 0"),
        (&["data.sources=[{path=\"a\"}, {path=\"a\"}]"], "holds two sources named \"a\""),
        (&["data.eval_sources=[{path=\"sample\"}]"], "is both in data.sources and in data.eval_sources"),
    ];
    for (sets, expected) in cases {
        let text = refusal_of_sets(sets);
        assert!(text.lines().next().unwrap().contains(expected), "{sets:?} gave {text}");
        assert!(text.contains("= help: "), "{sets:?} has no mend: {text}");
    }
}

#[test]
fn absurd_sizes_are_refused_with_the_bound() {
    const HUGE: u64 = 6_400_000_000_000_000_000;
    for (key, most) in [
        ("data.prefetch_batches", 1024),
        ("data.batch_rows", 1 << 20),
        ("data.micro_batch_rows", 1 << 20),
        ("data.inputs_length", 1 << 20),
        ("data.targets_length", 1 << 20),
        ("model.num_decoder_layers", 1 << 16),
        ("model.relative_attention_num_buckets", 1 << 16),
        ("model.relative_attention_max_distance", 1 << 20),
    ] {
        for count in [most + 1, HUGE] {
            let text = refusal_of_sets(&[&format!("{key}={count}")]);
            assert!(text.starts_with(&format!("{key} = {count} is more than {most}\n")), "{text}");
            assert!(text.ends_with(&format!("= help: set {key} to {most} or less")), "{text}");
        }
    }
    let accepted = ["data.prefetch_batches=1024", "data.batch_rows=1048576", "data.micro_batch_rows=1048576"];
    let short = ["data.inputs_length=2", "data.targets_length=1"].map(str::to_owned);
    let sets: Vec<String> = accepted.map(str::to_owned).into_iter().chain(short).collect();
    resolve_str(START, &sets).unwrap();
}

#[test]
fn batches_have_to_fit_in_memory() {
    let text = refusal_of_sets(&["data.inputs_length=1048576", "data.batch_rows=65536"]);
    assert!(text.starts_with("6 batches of 68726947840 tokens would be in memory, "), "{text}");
    assert!(text.ends_with("= help: use fewer rows or shorter ones"), "{text}");
    let text = refusal_of_sets(&["data.prefetch_batches=1024", "data.batch_rows=8192"]);
    assert!(text.ends_with("= help: set data.prefetch_batches to 835 or less"), "{text}");
    resolve_str(START, &["data.prefetch_batches=835".to_owned(), "data.batch_rows=8192".to_owned()]).unwrap();
}

#[test]
fn samples_of_a_run_have_to_be_countable() {
    let steps = format!("schedule.total_steps={}", u64::MAX / 2048 + 1);
    let text = refusal_of_sets(&[&steps]);
    assert!(text.contains("of data.batch_rows = 2048 are more than 2^64 samples"), "{text}");
    assert!(
        text.contains(&format!("= help: set schedule.total_steps to {} or less", u64::MAX / 2048)),
        "{text}"
    );
    resolve_str(START, &[format!("schedule.total_steps={}", u64::MAX / 2048)]).unwrap();
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.toml");
    let text = resolve(&missing, &[]).unwrap_err().to_string();
    assert!(text.starts_with(&format!("cannot read {}: ", missing.display())), "{text}");

    let run = folder.path().join("run.toml");
    fs::write(&run, "extends = [\"none.toml\"]\nname = \"x\"\n").unwrap();
    let error = resolve(&run, &[]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Read { path, .. } if *path == missing));
    assert_eq!(error.place().unwrap().line_column(), (1, 11));

    fs::write(&run, b"name = \"\xff\"\n").unwrap();
    assert!(resolve(&run, &[]).unwrap_err().to_string().contains("UTF-8"));
}

#[test]
fn circles_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a.toml"), folder.path().join("b.toml"));
    fs::write(&a, "extends = [\"b.toml\"]\nname = \"x\"\n").unwrap();
    fs::write(&b, "extends = [\"./a.toml\"]\n").unwrap();
    let error = resolve(&a, &[]).unwrap_err();
    let ErrorKind::ExtendsCycle { chain } = error.kind() else { panic!("{error}") };
    let names: Vec<_> = chain.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["a.toml", "b.toml", "a.toml"]);
    assert!(error.place().unwrap().file.path.ends_with("b.toml"));
}
