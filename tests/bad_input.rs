//! Whatever a user can get wrong: exit code 1, a message with place and mend, nothing harmed.

use std::process::Command;

use crate::job::stderr;
use crate::support::{Place, gzip, json_lines};

const TRAIN: &str = "train run.toml --max-steps 5";

#[test]
fn configs_that_cannot_be() {
    let place = Place::with_experiment();
    place.refused_with("train no.toml", &["no.toml"]);
    place.refused_with(
        "train run.toml --set data.inputs_lenght=8",
        &["inputs_lenght", "did you mean `inputs_length`"],
    );
    place.refused_with("train run.toml --set model.d_model=wide", &["model.d_model", "whole number"]);
    place.refused_with(
        "train run.toml --set data.micro_batch_rows=3",
        &["data.micro_batch_rows", "data.batch_rows", "8"],
    );
    place.refused_with("train run.toml --set model.vocab_size=100", &["model.vocab_size", "sentinels"]);
    place
        .refused_with("train run.toml --set model.preset=switch-bass-8", &["switch-bass-8", "switch-base-8"]);
    assert!(!place.path("runs").exists(), "nothing was begun");
}

#[test]
fn text_that_is_not_there_or_empty() {
    let place = Place::with_experiment();
    let source = |path: &str| format!("{TRAIN} --set data.sources=[{{path=\"{path}\"}}]");
    place
        .refused_with(&source("nothing/*.json.gz"), &["no file matches", "nothing/*.json.gz", "looked from"]);
    place.write("empty.json", b"");
    place.refused_with(&source("empty.json"), &["empty.json", "empty"]);
    place.write("blank.json", b"{\"text\": \"\"}\n\n");
    place.refused_with(&source("blank.json"), &["blank.json", "no text"]);
    place.write("short.txt", b"Just a few words.\n");
    place.refused_with(
        &(source("short.txt") + " --set data.train_tokenizer_vocab_size=30"),
        &["short.txt", "data.inputs_length"],
    );
}

#[test]
fn text_that_is_broken() {
    let place = Place::with_experiment();
    let source = |path: &str| format!("{TRAIN} --set data.sources=[{{path=\"{path}\"}}]");
    let whole = gzip(&json_lines(0..300));
    place.write("cut.json.gz", &whole[..whole.len() / 2]);
    place.refused_with(&source("cut.json.gz"), &["cut.json.gz", "truncated"]);
    place.write("broken.json", (json_lines(0..3) + "{\"text\": \"no end\n").as_bytes());
    place.refused_with(&source("broken.json"), &["broken.json", "4", "data.on_corrupt"]);
    let mut bytes = json_lines(0..2).into_bytes();
    bytes.extend_from_slice(b"{\"text\": \"\xff\xfe\"}\n");
    place.write("bytes.json", &bytes);
    place.refused_with(&source("bytes.json"), &["bytes.json", "3", "UTF-8"]);
    place.write("columns.json", b"{\"content\": \"some words\"}\n");
    place.refused_with(&source("columns.json"), &["columns.json", "text", "content"]);
    place.write("table.parquet", b"PAR1 this is no Parquet file PAR1");
    place.refused_with(&source("table.parquet"), &["table.parquet"]);
}

#[test]
fn corrupt_records_can_be_skipped() {
    let place = Place::with_experiment();
    place.write("corpus.json", (json_lines(0..300) + "{\"text\": \"no end\n").as_bytes());
    place.run(&format!("{TRAIN} --set data.sources=[{{path=\"corpus.json\"}}] --set data.on_corrupt=skip"));
}

#[test]
fn parquet_without_the_column() {
    let place = Place::with_experiment();
    let corpus = place.json("data build --json");
    let file = corpus["train"].as_str().expect("a path");
    place.refused_with(
        &format!("{TRAIN} --set data.sources=[{{path=\"{file}\"}}] --set data.text_column=body"),
        &["body", "text", "data.text_column"],
    );
}

#[test]
fn tokenizers_that_do_not_serve() {
    let place = Place::with_experiment();
    place.refused_with(
        &format!("{TRAIN} --set data.train_tokenizer_vocab_size=0"),
        &["tokenizer.json", "train_tokenizer_vocab_size"],
    );
    place.write("tokenizer.json", b"{\"version\": ");
    place.refused_with(TRAIN, &["tokenizer.json"]);
    place.run("tokenizer train --data corpus.json.gz --vocab-size 150 --out tok");
    let text = place.read("tok/tokenizer.json").replace("extra_id_", "other_id_");
    place.write("tokenizer.json", text.as_bytes());
    place.refused_with(TRAIN, &["tokenizer.json", "sentinel"]);
    place.run("tokenizer train --data corpus.json.gz --vocab-size 180 --out larger");
    place.refused_with(&format!("{TRAIN} --set data.tokenizer=larger --set data.train_tokenizer_vocab_size=0 --set model.vocab_size=160"), &["model.vocab_size"]);
}

#[test]
fn models_that_cannot_be_read() {
    let place = Place::with_experiment();
    place.run("train run.toml --max-steps 20 --set checkpoint.export=true");
    let copy = |name: &str| {
        let copied =
            Command::new("cp").arg("-r").arg(place.path("runs/small/export")).arg(place.path(name)).status();
        assert!(copied.expect("cp runs").success());
        place.path(name).join("model.safetensors")
    };
    let generate = |name: &str| format!("generate --model {name} --prompt The<extra_id_0>.");
    place.refused_with(&generate("nowhere"), &["nowhere", "No such file"]);

    let file = copy("truncated");
    let bytes = std::fs::read(&file).expect("a file");
    std::fs::write(&file, &bytes[..bytes.len() - 100]).expect("a file");
    place.refused_with(&generate("truncated"), &["truncated/model.safetensors"]);

    let file = copy("absurd");
    let mut absurd = bytes.clone();
    absurd[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&file, absurd).expect("a file");
    place.refused_with(&generate("absurd"), &["absurd/model.safetensors"]);

    copy("wider");
    let config = place.read("wider/config.json").replace("\"d_ff\": 64", "\"d_ff\": 48");
    place.write("wider/config.json", config.as_bytes());
    place.refused_with(&generate("wider"), &["wi", "[64, 32]", "[48, 32]"]);

    copy("deeper");
    let config = place.read("deeper/config.json").replace("\"num_layers\": 2", "\"num_layers\": 3");
    place.write("deeper/config.json", config.as_bytes());
    place.refused_with(&generate("deeper"), &["encoder.block.2"]);

    copy("other");
    let config = place.read("other/config.json").replace("switch_transformers", "bert");
    place.write("other/config.json", config.as_bytes());
    place.refused_with(&generate("other"), &["config.json", "bert", "switch_transformers"]);

    place.refused_with("export runs/small --out runs", &["runs exists already"]);
}

#[test]
fn a_run_directory_that_cannot_be_written() {
    let place = Place::with_experiment();
    place.write("occupied", b"a file");
    place.refused_with(&format!("{TRAIN} --run-dir occupied"), &["occupied", "--run-dir"]);
    place.refused_with(&format!("{TRAIN} --run-dir /proc/switchyard"), &["/proc/switchyard", "--run-dir"]);
}

#[test]
fn a_full_disk_keeps_the_earlier_checkpoint() {
    let place = Place::with_experiment();
    place.run("train run.toml --max-steps 20");
    // Room for one checkpoint and a half.
    let output = place.on_disk_of(
        "700k",
        "cp -r runs/small full/run && \"$PROGRAM\" train run.toml --run-dir full/run --resume auto --max-steps 40; \
         code=$?; ls full/run/checkpoints > left; cp -r full/run kept; exit $code",
    );
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("step-000040") && said.contains("No space left") && said.contains("free some space"),
        "{said}"
    );
    assert_eq!(place.read("left"), "step-000020\n");
    place.run("train run.toml --run-dir kept --resume auto --max-steps 40");
}

#[test]
fn a_last_checkpoint_that_cannot_be_written_is_an_error() {
    let place = Place::with_experiment();
    let output = place.on_disk_of(
        "300k",
        "\"$PROGRAM\" train run.toml --run-dir full/run --set 'checkpoint.on_error=\"warn\"' \
         --set checkpoint.every_steps=30",
    );
    let said = stderr(&output);
    assert!(said.contains("checkpoint not written"), "{said}");
    assert!(said.contains("error: cannot write") && said.contains("step-000060"), "{said}");
    assert_eq!(output.status.code(), Some(1), "{said}");
}

#[test]
fn an_export_that_cannot_be_is_refused_before_training() {
    let place = Place::with_experiment();
    let set = "--set checkpoint.export=true --set routing.router=top2";
    for command in ["train", "check"] {
        place.refused_with(&format!("{command} run.toml {set}"), &["top2", "top1"]);
    }
    assert!(!place.path("runs").exists());
    place.refused_with("check run.toml --set data.targets_length=7", &["targets_length", "8"]);
}

#[test]
fn options_are_called_by_their_names() {
    let place = Place::with_experiment();
    place.refused_with("tokenizer train --data corpus.json.gz --vocab-size 2 --out t", &["--vocab-size"]);
    place
        .refused_with("tokenizer train --data corpus.json.gz --text-column body --out t", &["--text-column"]);
    place.refused_with("bench step --preset nope", &["nope", "switch-"]);
    place.refused_with("bench step --rows 6 --micro-batches 4", &["--rows 6", "4 micro-batches"]);
    place.refused_with("bench dispatch --tokens 100000000000", &["--tokens"]);
    place.refused_with("train run.toml --device cuda", &["cuda", "cpu"]);
}

#[test]
fn prompts_that_are_empty() {
    let place = Place::with_experiment();
    place.run("train run.toml --max-steps 5");
    place.write("prompts.txt", b"\n  \n");
    place.refused_with("generate --model runs/small --input prompts.txt", &["prompts.txt", "no text"]);
    place.refused_with("eval --model runs/small --data held-out.txt --rows 0", &["--rows"]);
    place.refused_with("eval --model runs/small --data missing.txt", &["missing.txt"]);
}
