//! A run from raw text to an exported model.

use serde_json::Value;

use crate::support::{Place, timeless};

#[test]
fn a_run_learns_and_leaves_everything_behind() {
    let place = Place::with_experiment();
    let out = place.run(
        "train run.toml --set checkpoint.export=true --set schedule.total_steps=300 \
         --set eval.prompts=[\"The<extra_id_0>file.\"]",
    );
    for part in [
        "loss of the model",
        "unigram entropy",
        "→",
        "runs/small/checkpoints/step-000300",
        "runs/small/export",
    ] {
        assert!(out.contains(part), "{part} is not in\n{out}");
    }

    let records = timeless(&place.read("runs/small/metrics.jsonl"));
    let (evaluations, steps): (Vec<&Value>, Vec<&Value>) =
        records.iter().partition(|r| r.get("eval").is_some());
    assert_eq!(steps.len(), 300);
    assert_eq!(evaluations.len(), 15);
    let first = steps[0]["loss"].as_f64().expect("a number");
    let last = steps[299]["loss"].as_f64().expect("a number");
    assert!(last < first - 1.0, "{first} to {last}");
    let eval = &evaluations[14]["eval"];
    let number = |key: &str| eval[key].as_f64().expect("a number");
    assert!(number("word_loss") < number("word_unigram_entropy"));
    assert!((number("loss") + number("negative_log_perplexity")).abs() < 1e-12);
    let layer = &steps[299]["moe"]["encoder.1"];
    assert_eq!(layer["tokens_per_expert"].as_array().expect("a list").len(), 4);
    for key in [
        "fraction_tokens_dropped",
        "expert_usage",
        "load_cv",
        "router_entropy",
        "router_confidence",
        "load_balancing_loss",
        "router_z_loss",
    ] {
        assert!(layer[key].is_f64(), "{key}");
    }
    let numbers = ["step", "loss", "total_loss", "learning_rate", "grad_norm", "tokens", "skipped_steps"];
    assert!(numbers.iter().all(|key| steps[0][key].is_number()));

    let kept = std::fs::read_dir(place.path("runs/small/checkpoints")).expect("a directory").count();
    assert_eq!(kept, 3);
    assert!(place.read("runs/small/logs/rank-0.log").contains("saved"));
    place.run("check runs/small/config.toml");
    for file in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        assert!(place.path("runs/small/export").join(file).exists(), "{file}");
    }
}

#[test]
fn the_same_experiment_gives_the_same_losses() {
    let place = Place::with_experiment();
    place.run("train run.toml --run-dir a --max-steps 12");
    place.run("train run.toml --run-dir b --max-steps 12");
    assert_eq!(timeless(&place.read("a/metrics.jsonl")), timeless(&place.read("b/metrics.jsonl")));
    place.run("train run.toml --run-dir c --max-steps 12 --set seed=4");
    assert_ne!(timeless(&place.read("a/metrics.jsonl")), timeless(&place.read("c/metrics.jsonl")));
}

#[test]
fn adamw_top2_and_expert_choice_train_too() {
    let place = Place::with_experiment();
    for (name, set) in [
        ("adamw", "--set optimizer.kind=adamw --set optimizer.learning_rate=3e-3"),
        ("top2", "--set routing.router=top2"),
        ("choice", "--set routing.router=expert_choice"),
        ("hf", "--set routing.semantics=hf --set routing.expert_capacity=16"),
        (
            "dense",
            "--set model.num_experts=0 --set model.encoder_expert_layer_every=0 --set model.decoder_expert_layer_every=0",
        ),
        (
            "gated",
            "--set model.gated=true --set model.activation=gelu_tanh --set model.tie_word_embeddings=false",
        ),
    ] {
        place.run(&format!("train run.toml --run-dir {name} {set}"));
        let records = timeless(&place.read(&format!("{name}/metrics.jsonl")));
        let losses: Vec<f64> = records.iter().filter_map(|r| r.get("loss")?.as_f64()).collect();
        assert!(losses[59] < losses[0] - 0.5, "{name}: {} to {}", losses[0], losses[59]);
    }
}

#[test]
fn a_model_of_a_run_evaluates_generates_and_exports() {
    let place = Place::with_experiment();
    place.run("train run.toml --set schedule.total_steps=200 --set data.noise_density=0.2 --set data.targets_length=12");
    let of_run = place.json("eval --model runs/small --data held-out.txt --batches 4 --json");
    let records = timeless(&place.read("runs/small/metrics.jsonl"));
    let last = records.iter().rev().find_map(|r| r.get("eval")).expect("an evaluation");
    assert_eq!(&of_run, last);

    place.run("export runs/small --out exported");
    place.run("export runs/small --out sharded --dtype bf16 --max-shard-size 100000B");
    assert!(place.path("sharded/model.safetensors.index.json").exists());
    let of_export = place
        .json("eval --model exported --data held-out.txt --rows 4 --batches 4 --inputs-length 32 --json");
    // Of an export nothing tells how its text was cut, and one group a row drops other tokens.
    let loss = |v: &Value| v["loss"].as_f64().expect("a number");
    assert!((loss(&of_run) - loss(&of_export)).abs() < 0.5, "{of_run} {of_export}");

    let filled = place.json("generate --model runs/small --prompt The<extra_id_0>file. --json");
    assert!(filled["output"].as_str().expect("text").contains("<extra_id_0>"), "{filled}");
    assert!(filled["tokens"].as_u64().is_some_and(|n| n > 0), "{filled}");
    place.write(
        "prompts.txt",
        b"The reader <extra_id_0> the file.\n\nThe <extra_id_0> opens the <extra_id_1>.\n",
    );
    let together = place.run("generate --model runs/small --input prompts.txt --json");
    let rows: Vec<Value> = together.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(rows.len(), 2);
    place.write("prompts.txt", b"The <extra_id_0> opens the <extra_id_1>.\n");
    let alone = place.run("generate --model runs/small --input prompts.txt --json");
    let alone: Value = serde_json::from_str(&alone).expect("JSON");
    assert_eq!(alone, rows[1], "a row does not depend on the others");

    let listed = place.run("inspect checkpoint runs/small");
    assert!(listed.contains("encoder.block.1.moe.experts.wi") && listed.contains("[4, 32, 64]"), "{listed}");
}
