//! A place to run in, a small text and a small experiment.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::job::{Job, PATIENCE, stderr};

/// An empty directory in which the program runs.
pub(crate) struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a temporary directory") }
    }

    /// A place with `corpus.json.gz`, `held-out.txt` and `run.toml`.
    pub(crate) fn with_experiment() -> Self {
        let place = Self::new();
        place.write_gz("corpus.json.gz", &json_lines(0..300));
        place.write("held-out.txt", documents(1000..1040).join("\n").as_bytes());
        place.write("run.toml", EXPERIMENT.as_bytes());
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn root(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        std::fs::write(path, bytes).expect("a file");
    }

    pub(crate) fn write_gz(&self, name: &str, text: &str) {
        self.write(name, &gzip(text));
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The program with `arguments`, separated by spaces.
    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_switchyard"));
        command.args(arguments.split_whitespace()).current_dir(self.root());
        command
    }

    /// Runs a shell script with a disk of `size` at `full`, in a mount namespace of its own; the script
    /// finds the program as `$PROGRAM`.
    pub(crate) fn on_disk_of(&self, size: &str, script: &str) -> Output {
        std::fs::create_dir(self.path("full")).expect("a directory");
        let script = format!("mount -t tmpfs -o size={size} none full && {script}");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--map-root-user", "sh", "-c", &script])
            .env("PROGRAM", env!("CARGO_BIN_EXE_switchyard"))
            .envs(MPIRUN_HERE)
            .current_dir(self.root());
        Job::start(command).ended()
    }

    /// Runs to success and returns standard output.
    pub(crate) fn run(&self, arguments: &str) -> String {
        let output = Job::start(self.command(arguments)).ended();
        assert!(output.status.success(), "{arguments}\n{}", stderr(&output));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs to success and parses standard output.
    pub(crate) fn json(&self, arguments: &str) -> Value {
        let text = self.run(arguments);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments}: {e}\n{text}"))
    }

    /// Runs to exit code 1 and returns standard error.
    pub(crate) fn refused(&self, arguments: &str) -> String {
        let output = Job::start(self.command(arguments)).ended();
        assert_eq!(output.status.code(), Some(1), "{arguments}\n{}", stderr(&output));
        stderr(&output)
    }

    /// Runs to exit code 1; standard error must hold all of `parts`.
    pub(crate) fn refused_with(&self, arguments: &str, parts: &[&str]) {
        let text = self.refused(arguments);
        for part in parts {
            assert!(text.contains(part), "{arguments}: {part:?} is not in\n{text}");
        }
        assert!(!text.contains("panicked"), "{text}");
    }
}

/// What mpirun asks of root, and of machines with fewer cores than ranks of all tests that run at once; users
/// decide that themselves.
pub(crate) const MPIRUN_HERE: [(&str, &str); 6] = [
    ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
    ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
    ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
    ("OMPI_MCA_mpi_yield_when_idle", "1"),
    ("OMPI_MCA_hwloc_base_binding_policy", "none"),
    ("RAYON_NUM_THREADS", "1"),
];

/// Lets `command` start many ranks in `place`.
#[cfg(feature = "mpi")]
pub(crate) fn for_many_ranks(command: &mut Command, place: &Place) {
    command.envs(MPIRUN_HERE).current_dir(place.root());
}

pub(crate) fn wait_for(what: &str, ready: impl FnMut() -> bool) {
    wait_often_for(what, Duration::from_millis(2), ready);
}

pub(crate) fn wait_often_for(what: &str, pause: Duration, mut ready: impl FnMut() -> bool) {
    let started = Instant::now();
    while !ready() {
        assert!(started.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::sleep(pause);
    }
}

pub(crate) fn lines_logged(place: &Place, run: &str) -> usize {
    std::fs::read_to_string(place.path(run).join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Step of the last whole line of the run's metrics, 0 without one.
pub(crate) fn last_step(place: &Place, run: &str) -> u64 {
    let text = std::fs::read_to_string(place.path(run).join("metrics.jsonl")).unwrap_or_default();
    let records = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    records.filter_map(|record| record["step"].as_u64()).next().unwrap_or(0)
}

pub(crate) fn metrics(place: &Place, run: &str) -> Vec<Value> {
    timeless(&place.read(&format!("{run}/metrics.jsonl")))
}

/// Lines of `metrics.jsonl` without what depends on the clock.
pub(crate) fn timeless(metrics: &str) -> Vec<Value> {
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).expect("a JSON object a line");
        let object = value.as_object_mut().expect("an object");
        for clock in ["tokens_per_second", "step_ms", "data_wait_ms"] {
            object.remove(clock);
        }
        value
    };
    metrics.lines().map(line).collect()
}

pub(crate) fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).expect("memory");
    encoder.finish().expect("memory")
}

/// C4-shaped lines of [`documents`].
pub(crate) fn json_lines(numbers: std::ops::Range<u32>) -> String {
    let line =
        |text: String| serde_json::json!({"text": text, "url": "https://example.org"}).to_string() + "\n";
    documents(numbers).into_iter().map(line).collect()
}

/// Sentences of a small grammar: the same for the same numbers.
pub(crate) fn documents(numbers: std::ops::Range<u32>) -> Vec<String> {
    const WHO: [&str; 8] = ["reader", "writer", "parser", "server", "client", "worker", "router", "expert"];
    const DOES: [&str; 8] = ["opens", "closes", "sends", "reads", "checks", "counts", "drops", "keeps"];
    const WHAT: [&str; 8] = ["file", "token", "buffer", "message", "batch", "layer", "stream", "record"];
    let document = |number: u32| {
        let mut state = number.wrapping_mul(2_654_435_761) | 1;
        let mut pick = |words: &[&'static str; 8]| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            words[(state >> 29) as usize]
        };
        let mut text = String::new();
        for _ in 0..6 {
            let (who, does, what) = (pick(&WHO), pick(&DOES), pick(&WHAT));
            text.push_str(&format!(
                "The {who} {does} the {what} before the {} {does} it again. ",
                pick(&WHO)
            ));
        }
        text
    };
    numbers.map(document).collect()
}

/// A run of a fraction of a second on [`documents`].
pub(crate) const EXPERIMENT: &str = r#"
name = "small"
seed = 3

[model]
vocab_size = 256
d_model = 32
d_ff = 64
d_kv = 8
num_heads = 4
num_layers = 2
num_experts = 4
expert_layer_every = 2

[optimizer]
kind = "adafactor"
learning_rate = 2e-2

[schedule]
kind = "cosine"
warmup_steps = 10
total_steps = 60

[data]
sources = [{ path = "corpus.json.gz" }]
eval_sources = [{ path = "held-out.txt" }]
tokenizer = "tokenizer.json"
train_tokenizer_vocab_size = 150
inputs_length = 32
targets_length = 8
batch_rows = 8
micro_batch_rows = 4

[trainer]
dropout_rate = 0.1
log_every_steps = 1

[checkpoint]
every_steps = 20

[eval]
every_steps = 20
batches = 2
"#;
