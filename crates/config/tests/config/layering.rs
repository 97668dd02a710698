//! Which layer wins, and what is remembered about it.

use std::fs;
use std::path::Path;

use switchyard_config::plan::{OptimizerKind, RoutingSemantics, ScheduleKind};
use switchyard_config::{Origin, Resolved, resolve, resolve_str};
use tempfile::TempDir;

fn files(pairs: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in pairs {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

fn with_sets(text: &str, sets: &[&str]) -> Resolved {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    resolve_str(text, &sets).unwrap_or_else(|error| panic!("{error}"))
}

fn tiny(sets: &[&str]) -> Resolved {
    with_sets("name = \"x\"\n[model]\npreset = \"tiny\"\n", sets)
}

#[test]
fn later_layers_win_key_by_key() {
    let folder = files(&[
        ("exp/run.toml", "extends = [\"../base/a.toml\", \"b.toml\"]\nname = \"run\"\nseed = 4\n"),
        (
            "base/a.toml",
            "extends = [\"root.toml\"]\nseed = 2\n[schedule]\ntotal_steps = 20\nwarmup_steps = 5\n",
        ),
        (
            "base/root.toml",
            "seed = 1\n[model]\npreset = \"tiny\"\n[schedule]\nkind = \"linear\"\ntotal_steps = 10\n",
        ),
        ("exp/b.toml", "seed = 3\n[schedule]\ntotal_steps = 30\n"),
    ]);
    let resolved =
        resolve(&folder.path().join("exp/run.toml"), &["schedule.warmup_steps=6".to_owned()]).unwrap();
    let plan = &resolved.plan;
    assert_eq!(plan.seed, 4, "the file wins over what it extends");
    assert_eq!(plan.schedule.total_steps, 30, "later extended files win");
    assert_eq!(plan.schedule.kind, ScheduleKind::Linear, "extended files extend in turn");
    assert_eq!(plan.schedule.warmup_steps, 6, "--set wins over all");
    let Origin::File(place) = resolved.provenance.origin("schedule.total_steps") else {
        panic!("a file's key")
    };
    assert!(place.file.path.ends_with("exp/b.toml"));
    assert_eq!(place.line_column(), (3, 15));
    assert_eq!(&place.file.text[place.span.clone()], "30");
    assert_eq!(
        *resolved.provenance.origin("schedule.warmup_steps"),
        Origin::CommandLine("schedule.warmup_steps=6".to_owned())
    );
    assert_eq!(*resolved.provenance.origin("model.d_model"), Origin::Preset("tiny".to_owned()));
    assert_eq!(*resolved.provenance.origin("routing.router"), Origin::Default);
}

#[test]
fn the_same_file_may_be_extended_twice() {
    let folder = files(&[
        ("run.toml", "extends = [\"a.toml\", \"b.toml\"]\nname = \"run\"\n"),
        ("a.toml", "extends = [\"root.toml\"]\n"),
        ("b.toml", "extends = [\"root.toml\"]\n"),
        ("root.toml", "model.preset = \"tiny\"\n"),
    ]);
    assert_eq!(resolve(&folder.path().join("run.toml"), &[]).unwrap().plan.model.d_model, 256);
}

#[test]
fn set_takes_toml_or_bare_text_and_the_last_wins() {
    let plan = tiny(&[
        "optimizer.kind=adamw",
        "seed=2",
        "seed = 3",
        "data.tokenizer=some dir/tok.json",
        "data.sources=[{path=\"a.txt\"}, {path='b.txt', weight=2}]",
        "routing.capacity_factor=2",
        "name=7",
    ])
    .plan;
    assert_eq!(plan.optimizer.kind, OptimizerKind::Adamw);
    assert_eq!(plan.seed, 3);
    assert_eq!(plan.data.tokenizer, Path::new("some dir/tok.json"));
    assert_eq!(plan.data.sources[1].name, "b.txt");
    assert_eq!((plan.data.sources[0].weight, plan.data.sources[1].weight), (1.0, 2.0));
    assert_eq!(plan.routing.capacity_factor, 2.0);
    assert_eq!(plan.name, "7");
}

#[test]
fn set_cannot_smuggle_in_further_keys() {
    assert_eq!(tiny(&["data.text_column=a\nseed = 9"]).plan.data.text_column, "a\nseed = 9");
    assert_eq!(tiny(&[]).plan.seed, 1);
}

#[test]
fn preset_lies_under_every_written_key() {
    let folder = files(&[
        ("run.toml", "extends = [\"base.toml\"]\nname = \"run\"\nmodel.preset = \"switch-base-8\"\n"),
        ("base.toml", "[model]\npreset = \"t5-small\"\nnum_experts = 16\nd_ff = 64\n"),
    ]);
    let model = resolve(&folder.path().join("run.toml"), &[]).unwrap().plan.model;
    assert_eq!((model.num_experts, model.d_ff, model.d_model, model.num_layers), (16, 64, 768, 12));
}

#[test]
fn expert_layer_every_sets_both_stacks_in_its_own_layer() {
    let text =
        "name = \"x\"\n[model]\npreset = \"tiny\"\nexpert_layer_every = 1\ndecoder_expert_layer_every = 0\n";
    let both = |sets: &[&str]| {
        let model = with_sets(text, sets).plan.model;
        (model.encoder_expert_layer_every, model.decoder_expert_layer_every)
    };
    assert_eq!(both(&[]), (1, 0), "the narrower key wins beside it");
    assert_eq!(both(&["model.expert_layer_every=2"]), (2, 2), "a later layer wins over both");
    assert_eq!(both(&["model.encoder_expert_layer_every=4"]), (4, 0));
}

#[test]
fn defaults_follow_from_other_keys() {
    let adafactor = tiny(&[]).plan.optimizer;
    assert_eq!((adafactor.learning_rate, adafactor.parameter_scale, adafactor.eps), (1.0, true, 1e-30));
    let adamw = tiny(&["optimizer.kind=adamw", "schedule.kind=cosine"]).plan.optimizer;
    assert_eq!((adamw.learning_rate, adamw.parameter_scale, adamw.eps), (0.001, false, 1e-8));
    assert_eq!(tiny(&[]).plan.model.init_scale, 0.1);
    assert_eq!(tiny(&["model.num_experts=0"]).plan.model.init_scale, 1.0);
    assert_eq!(tiny(&["model.init=hf"]).plan.model.init_scale, 1.0);
    assert_eq!(tiny(&["model.init_scale=0.5"]).plan.model.init_scale, 0.5);
    assert_eq!(tiny(&["routing.semantics=hf"]).plan.routing.expert_capacity, 64);
    assert_eq!(tiny(&[]).plan.routing.semantics, RoutingSemantics::Paper);
    assert_eq!(tiny(&[]).plan.data.eval_sources[0].path, "sample:validation");
    assert!(tiny(&["data.sources=[{path=\"a.txt\"}]"]).plan.data.eval_sources.is_empty());
    assert!(tiny(&["debug.force_balanced_routing=true"]).plan.routing.force_balanced);
}

#[test]
fn a_model_can_be_written_by_hand() {
    let model = with_sets(
        "name = \"x\"\n[model]\nd_model = 8\nd_ff = 16\nd_kv = 4\nnum_heads = 2\nnum_layers = 3\n\
         tie_word_embeddings = false\n",
        &[],
    )
    .plan
    .model;
    assert_eq!((model.num_decoder_layers, model.vocab_size, model.num_experts), (3, 32128, 0));
    assert!(!model.scale_decoder_outputs, "follows tie_word_embeddings");
}
