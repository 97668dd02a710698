//! Every command: its help, its output and its exit code.

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::job::{Job, stderr};
use crate::support::Place;

const COMMANDS: [&str; 18] = [
    "train",
    "eval",
    "generate",
    "export",
    "verify",
    "data build",
    "data preview",
    "tokenizer train",
    "tokenizer inspect",
    "check",
    "inspect checkpoint",
    "bench step",
    "bench dispatch",
    "bench data",
    "bench checkpoint",
    "bench generate",
    "bench",
    "data",
];

/// The folder of fixtures and experiments.
const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

#[test]
fn every_command_has_help_with_an_example() {
    let place = Place::new();
    let all = place.run("--help");
    for command in COMMANDS {
        let help = place.run(&format!("{command} --help"));
        assert!(help.contains("Usage: switchyard"), "{command}");
        let first = command.split(' ').next().expect("a word");
        assert!(all.contains(&format!("\n  {first} ")), "{first} is not in\n{all}");
        if !matches!(command, "data" | "bench") {
            assert!(help.contains("Example"), "{command} has no example");
            assert!(help.contains(&format!("switchyard {command}")), "{command}: the example is of another");
        }
    }
    assert!(place.run("--version").starts_with("switchyard 0."));
}

#[test]
fn wrong_words_exit_with_1_and_say_what_is_right() {
    let place = Place::new();
    place.refused_with("trian run.toml", &["unrecognized subcommand 'trian'", "train"]);
    place.refused_with("generate --model x", &["--prompt"]);
    place.refused_with("export x", &["--out"]);
    place.refused_with("train", &["<CONFIG>"]);
}

#[test]
fn every_experiment_checks() {
    let place = Place::new();
    let mut seen = 0;
    for entry in std::fs::read_dir(format!("{REPOSITORY}/configs")).expect("the experiments") {
        let path = entry.expect("an entry").path();
        let checked = place.json(&format!("check {} --json", path.display()));
        assert!(checked["summary"]["total_parameters"].as_u64().is_some_and(|n| n > 0), "{}", path.display());
        let text = place.run(&format!("check {}", path.display()));
        assert!(text.contains("global batch"), "{text}");
        seen += 1;
    }
    assert!(seen >= 5, "{seen} experiments");
    let checked = place.json(&format!("check {REPOSITORY}/configs/switch-base-8-c4.toml --json"));
    assert_eq!(checked["summary"]["total_parameters"], 619_339_008);
}

#[test]
fn a_misspelled_key_is_shown_in_its_line() {
    let place = Place::with_experiment();
    let text = place.read("run.toml").replace("num_heads", "num_head");
    place.write("wrong.toml", text.as_bytes());
    insta::assert_snapshot!(place.refused("train wrong.toml").replace('\\', "/"), @r#"
    error: unknown key `model.num_head`
      --> wrong.toml:10:1
       |
    10 | num_head = 4
       | ^^^^^^^^
       |
       = help: did you mean `num_heads`?
    "#);
}

#[test]
fn fixtures_verify_and_survive_an_export() {
    let place = Place::new();
    let mut seen = 0;
    for entry in std::fs::read_dir(format!("{REPOSITORY}/tests/fixtures/parity")).expect("the fixtures") {
        let path = entry.expect("an entry").path();
        let fixture = path.join("expected.safetensors");
        if !fixture.exists() {
            continue;
        }
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let verified =
            place.json(&format!("verify --model {} --fixture {} --json", path.display(), fixture.display()));
        assert_eq!(verified["passed"], true, "{name}: {verified}");
        place.run(&format!("export {} --out {name} --max-shard-size 50000B", path.display()));
        let again = place.run(&format!("verify --model {name} --fixture {}", fixture.display()));
        assert!(again.contains("arrays within tolerance") && !again.contains("FAIL"), "{again}");
        seen += 1;
    }
    assert!(seen >= 6, "{seen} fixtures");
}

#[test]
fn a_wrong_model_fails_its_verification() {
    let place = Place::new();
    let fixtures = format!("{REPOSITORY}/tests/fixtures/parity");
    let arguments = format!(
        "verify --model {fixtures}/switch_step2_drop --fixture {fixtures}/switch_step2_nodrop/expected.safetensors"
    );
    let output = Job::start(place.command(&arguments)).ended();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("FAIL"));
    place.refused_with(
        &format!("verify --model {fixtures}/mt5_like --fixture nothing.safetensors"),
        &["nothing.safetensors"],
    );
}

#[test]
fn fixtures_that_cannot_be_used_or_hold_nan() {
    let place = Place::new();
    let model = format!("{REPOSITORY}/tests/fixtures/parity/mt5_like");
    let verify = |fixture: &str| format!("verify --model {model} --fixture {fixture}");
    let bytes = std::fs::read(format!("{model}/expected.safetensors")).expect("a fixture");
    let whole = SafeTensors::deserialize(&bytes).expect("safetensors");
    let with = |file: &str, name: &str, shape: Vec<usize>, data: &[u8]| {
        let mut tensors = whole.tensors();
        let (_, array) = tensors.iter_mut().find(|(found, _)| found == name).expect("an array");
        *array = TensorView::new(array.dtype(), shape, data).expect("data of that shape");
        place.write(file, &safetensors::serialize(tensors, None).expect("safetensors"));
    };
    let ids = |ids: &[i64]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();

    with("flat.safetensors", "greedy_ids", vec![2], &ids(&[0, 5]));
    place.refused_with(&verify("flat.safetensors"), &["flat.safetensors", "`greedy_ids`", "shape [2]"]);
    with("steps.safetensors", "greedy_ids", vec![2, 1], &ids(&[0, 0]));
    place.refused_with(&verify("steps.safetensors"), &["`greedy_ids`", "shape [2, 1]"]);
    with("negative.safetensors", "input_ids", vec![2, 18], &ids(&[-100; 36]));
    place.refused_with(&verify("negative.safetensors"), &["`input_ids`", "holds -100", "0 to 111"]);
    with("mask.safetensors", "decoder_attention_mask", vec![2, 1], &ids(&[1, 1]));
    place.refused_with(&verify("mask.safetensors"), &["`decoder_attention_mask`", "[2, 1]", "[2, 8]"]);

    let nan: Vec<u8> = std::iter::repeat_n(f32::NAN.to_le_bytes(), 2 * 8 * 112).flatten().collect();
    with("nan.safetensors", "logits", vec![2, 8, 112], &nan);
    let output = Job::start(place.command(&verify("nan.safetensors"))).ended();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("FAIL logits "), "{text}");
    assert_eq!(text.matches("FAIL").count(), 1, "{text}");
}

#[test]
fn tokenizers_train_and_show_themselves() {
    let place = Place::with_experiment();
    place.run("tokenizer train --data corpus.json.gz --vocab-size 120 --out tok");
    let shown = place.json("tokenizer inspect tok --text reader --json");
    let size = shown["size"].as_u64().expect("a number");
    assert!(size <= 220 && shown["num_sentinels"] == 100, "{shown}");
    assert_eq!(shown["ids"].as_array().expect("ids").last().expect("an id"), 1);
    assert!(place.run("tokenizer inspect tok/tokenizer.json --text reader").contains("</s>"));
    place.refused_with(
        "tokenizer train --data corpus.json.gz --vocab-size 120 --out tok",
        &["exists already"],
    );
}

#[test]
fn the_batch_of_a_step_can_be_read() {
    let place = Place::with_experiment();
    let shown = place.json("data preview run.toml --step 3 --rows 2");
    let rows = shown["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2);
    assert!(rows[0]["inputs"].as_str().expect("text").contains("<extra_id_0>"));
    assert!(rows[0]["targets"].as_str().expect("text").starts_with("<extra_id_0>"));
    assert_eq!(rows[0]["input_ids"].as_array().expect("ids").len(), 32);
    assert_eq!(shown, place.json("data preview run.toml --step 3 --rows 2"), "a function of the step alone");
}

#[test]
fn the_sample_corpus_is_built_once_and_alike() {
    let place = Place::new();
    let first = place.json("data build --json");
    assert!(first["summary"]["train"]["bytes"].as_u64().is_some_and(|n| n > 4_000_000), "{first}");
    assert!(first["summary"]["validation"]["documents"].as_u64().is_some_and(|n| n > 20), "{first}");
    let other = place.json("data build --cache-dir elsewhere --json");
    assert_eq!(first["summary"], other["summary"]);
    assert!(place.run("data build").contains("sha256"));
}

#[test]
fn without_package_sources_the_sample_corpus_says_what_to_do() {
    let place = Place::new();
    let mut command = place.command("data build");
    command.env("CARGO_HOME", place.path("empty"));
    let output = Job::start(command).ended();
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("cargo fetch --locked") && said.contains("data.sources"), "{said}");
}

#[test]
fn benchmarks_print_their_numbers() {
    let place = Place::with_experiment();
    let step = place.json(
        "bench step --preset t5-efficient-tiny-nl1-dm32-ff64-kv8 --experts 0 --rows 4 --micro-batches 2 --inputs-length 16 --targets-length 8 --steps 2 --json",
    );
    for key in ["step_ms", "tokens_per_second", "peak_memory_bytes", "loss"] {
        assert!(step[key].as_f64().is_some_and(|n| n > 0.0), "{key}: {step}");
    }
    for key in ["parameter_bytes", "gradient_bytes", "optimizer_bytes"] {
        assert!(step["planned_memory"][key].as_u64().is_some_and(|n| n > 0), "{key}: {step}");
    }
    assert_eq!(step["micro_batches"], 2);
    assert!(step["device_memory"].is_null(), "tensors in main memory are not counted: {step}");
    place.refused_with(
        "bench step --precision selective --allow-tf32",
        &["precision.allow_tf32", "precision.mode = \"fp32\""],
    );
    let dispatch = place.json("bench dispatch --tokens 64 --d-model 16 --experts 2,8 --json");
    assert_eq!(dispatch.as_array().expect("a row for each").len(), 2);
    assert_eq!(dispatch[0]["hierarchical_all_to_all"], false);
    let generate = place.json(
        "bench generate --preset t5-efficient-tiny-nl1-dm32-ff64-kv8 --inputs-length 8 --new-tokens 4 --json",
    );
    assert!(generate["tokens_per_second"].as_f64().is_some_and(|n| n > 0.0));
    let checkpoint = place.json("bench checkpoint --megabytes 32 --rounds 1 --json");
    for key in ["ratio", "bytes"] {
        assert!(checkpoint[key].as_f64().is_some_and(|n| n > 0.0), "{key}: {checkpoint}");
    }
    let data = place.json("bench data run.toml --json");
    assert!(data["tokens_per_second"].as_f64().is_some_and(|n| n > 0.0));
}

#[test]
fn quiet_says_nothing_but_results() {
    let place = Place::with_experiment();
    let output = Job::start(place.command("train run.toml -q --max-steps 5")).ended();
    assert!(output.status.success());
    assert_eq!(stderr(&output), "");
}
