//! The command line: every command, its options and a worked example.

mod bench;

use std::path::PathBuf;

use clap::builder::{RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use switchyard_comm::Choice;
use switchyard_config::HierarchicalAllToAll;
use switchyard_config::plan::ParallelPlan;
use switchyard_kernels::DeviceName;
use switchyard_parallel::TokenTravel;

pub(crate) use self::bench::{
    BenchCheckpointArguments, BenchCommand, BenchGemmArguments, BenchLayerArguments, BenchStepArguments,
};

/// Pretrains, evaluates and runs Switch Transformers and T5.
#[derive(Debug, Parser)]
#[command(
    name = "switchyard",
    version,
    propagate_version = true,
    after_help = "\
Examples:
  switchyard train configs/quickstart.toml           train a small model on real text, minutes on two cores
  switchyard generate --model runs/quickstart --prompt \"The <extra_id_0> is read from the file.\"
  switchyard export runs/quickstart --out exported   write a checkpoint that transformers loads

Exit codes: 0 done, 1 wrong input, 75 interrupted with everything saved (run again with --resume auto)."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub command: Command,
    /// Where to compute: `cpu`; in builds with LibTorch also `cuda`, `cuda:N` and `libtorch`, its CPU device.
    ///
    /// `cuda` is the first GPU; in a job of several ranks each takes the GPU of its number on its machine.
    #[arg(long, global = true, default_value = "cpu")]
    pub device: DeviceName,
    /// Who says which rank this process is: `auto` asks the environment (torchrun's variables, Open MPI,
    /// PMIx, PMI, Slurm), `mpi` the MPI library, `none` makes it one process alone.
    ///
    /// With RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as torchrun sets them, the ranks meet over TCP
    /// and need no MPI.
    #[arg(long, global = true, default_value = "auto")]
    pub launcher: LauncherChoice,
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Values of `--launcher`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LauncherChoice {
    /// The environment.
    Auto,
    /// The MPI library.
    Mpi,
    /// Nobody.
    None,
}

impl From<LauncherChoice> for Choice {
    fn from(choice: LauncherChoice) -> Self {
        match choice {
            LauncherChoice::Auto => Self::Automatic,
            LauncherChoice::Mpi => Self::Mpi,
            LauncherChoice::None => Self::Solo,
        }
    }
}

/// A size from 1 that memory may hold.
fn count() -> impl TypedValueParser<Value = usize> {
    count_from(1)
}

/// A size from `least` that memory may hold.
fn count_from(least: u64) -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::<usize>::new().range(least..=1 << 24)
}

/// A size in MiB.
fn mebibytes(text: &str) -> Result<f64, String> {
    let size: f64 = text.parse().map_err(|_| format!("`{text}` is no number"))?;
    if size > 0.0 && size <= 65536.0 { Ok(size) } else { Err("must be above 0 and at most 65536".to_owned()) }
}

/// How much is said on the terminal.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Verbosity {
    /// Say more; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Say errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Train(TrainArguments),
    Eval(EvalArguments),
    Generate(GenerateArguments),
    Export(ExportArguments),
    Verify(VerifyArguments),
    /// Corpora: build the sample corpus, look at batches.
    #[command(subcommand)]
    Data(DataCommand),
    /// Tokenizers: train and inspect.
    #[command(subcommand)]
    Tokenizer(TokenizerCommand),
    Check(CheckArguments),
    /// What is inside a checkpoint.
    #[command(subcommand)]
    Inspect(InspectCommand),
    /// Measure this machine: training steps, dispatch, data, checkpoints.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// What this machine and build can do, and what is missing; under mpirun also the ranks.
    #[command(after_help = "Examples:\n  switchyard doctor\n  mpirun -n 4 switchyard doctor")]
    Doctor {
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// Train a model from an experiment file: evaluates, saves and resumes exactly.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  switchyard train configs/quickstart.toml
  switchyard train configs/quickstart.toml --set optimizer.learning_rate=1e-2 --run-dir runs/lr1e-2
  switchyard train configs/quickstart.toml --resume auto")]
pub(crate) struct TrainArguments {
    /// Experiment file.
    pub config: PathBuf,
    /// Change a key, such as model.num_experts=64; may be given many times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// `auto` continues from the newest complete checkpoint or starts; `never` refuses a used
    /// directory; anything else is a checkpoint, or a run with one, to continue from.
    #[arg(long, value_name = "auto|never|DIR", default_value = "never")]
    pub resume: String,
    /// Directory of the run [default: runs/NAME].
    #[arg(long)]
    pub run_dir: Option<PathBuf>,
    /// Stop after this many steps, counted from the start of the run.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_steps: Option<u64>,
}

/// How the ranks of a job share a model.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct MeshArguments {
    /// Under mpirun or srun: ranks over which the experts are spread.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    pub expert_parallel_size: usize,
    /// Under mpirun or srun: ranks over which every matrix is split.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    pub tensor_parallel_size: usize,
    /// Under mpirun or srun on several machines: whether tokens travel machine by machine.
    #[arg(long, value_name = "WAY", default_value = "auto")]
    pub hierarchical_all_to_all: TokenRoute,
}

/// How tokens travel to their experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TokenRoute {
    /// Machine by machine where the ranks stand so.
    Auto,
    /// Straight.
    Never,
}

impl From<TokenRoute> for TokenTravel {
    fn from(way: TokenRoute) -> Self {
        let hierarchical = match way {
            TokenRoute::Auto => HierarchicalAllToAll::Auto,
            TokenRoute::Never => HierarchicalAllToAll::Never,
        };
        Self { hierarchical, ..Self::default() }
    }
}

impl MeshArguments {
    /// The sizes as an experiment file would hold them.
    pub(crate) fn plan(self) -> ParallelPlan {
        let Self { expert_parallel_size, tensor_parallel_size, .. } = self;
        ParallelPlan { data_parallel_size: 0, expert_parallel_size, tensor_parallel_size }
    }
}

/// Loss, negative log perplexity, accuracy and router metrics of a model on text.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  switchyard eval --model runs/quickstart --data sample:validation
  switchyard eval --model exported --data 'c4/en/c4-validation.*.json.gz' --batches 50 --json
  mpirun -n 4 switchyard eval --model runs/large --data sample:validation --expert-parallel-size 4")]
pub(crate) struct EvalArguments {
    /// Run, checkpoint or Hugging Face directory.
    #[arg(long)]
    pub model: PathBuf,
    /// File, directory or glob of text; `sample:validation` for the held-out sample corpus.
    #[arg(long)]
    pub data: String,
    /// Batches of `--rows` rows.
    #[arg(long, default_value_t = 20, value_parser = count())]
    pub batches: usize,
    /// Rows of a batch, which share the slots of experts [default: the micro-batch of the model's
    /// training, else 32].
    #[arg(long, value_parser = count())]
    pub rows: Option<usize>,
    /// Encoder length [default: that of the model's training, else 512].
    #[arg(long, value_parser = count_from(4))]
    pub inputs_length: Option<usize>,
    /// Column or JSON key that holds the text [default: that of the model's training, else `text`].
    #[arg(long)]
    pub text_column: Option<String>,
    /// Directory for tokenised text and the sample corpus.
    #[arg(long, default_value = "cache")]
    pub cache_dir: PathBuf,
    #[command(flatten)]
    pub mesh: MeshArguments,
    /// Print a JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Fill the sentinels of a text.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  switchyard generate --model runs/quickstart --prompt \"This function <extra_id_0> the length of the slice.\"
  switchyard generate --model exported --input prompts.txt --max-new-tokens 64 --json
  mpirun -n 4 switchyard generate --model runs/large --input prompts.txt --expert-parallel-size 2")]
pub(crate) struct GenerateArguments {
    /// Run, checkpoint or Hugging Face directory.
    #[arg(long)]
    pub model: PathBuf,
    /// Text with <extra_id_0>, <extra_id_1>, … where words are missing.
    #[arg(long, required_unless_present = "input", conflicts_with = "input")]
    pub prompt: Option<String>,
    /// File with one text a line; 32 are decoded at a time.
    #[arg(long)]
    pub input: Option<PathBuf>,
    /// Most tokens to write.
    #[arg(long, default_value_t = 64, value_parser = count())]
    pub max_new_tokens: usize,
    #[command(flatten)]
    pub mesh: MeshArguments,
    /// Print a JSON object for each text.
    #[arg(long)]
    pub json: bool,
}

/// Write a Hugging Face directory that transformers loads.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  switchyard export runs/quickstart --out exported
  switchyard export runs/base/checkpoints/step-100000 --out exported --dtype bf16 --max-shard-size 4GB")]
pub(crate) struct ExportArguments {
    /// Run, checkpoint or Hugging Face directory.
    pub model: PathBuf,
    /// Directory to write; must not exist, or be empty.
    #[arg(long)]
    pub out: PathBuf,
    /// Number format of all tensors.
    #[arg(long, value_enum, default_value_t = ExportDtype::Fp32)]
    pub dtype: ExportDtype,
    /// Split the tensors into files of at most this size, such as 500MB or 5GB.
    #[arg(long)]
    pub max_shard_size: Option<String>,
    /// Tokens of a row from which Hugging Face's fixed `expert_capacity` is computed
    /// [default: the inputs length that the model was trained with].
    #[arg(long, value_parser = count())]
    pub inputs_length: Option<usize>,
}

/// Number formats of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportDtype {
    /// 32 bits.
    Fp32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    Fp16,
}

/// Compare a model's numbers with those that another implementation recorded.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints the largest difference for every expected array of the fixture; exit code 1 past the tolerance.

Example:
  switchyard verify --model tests/fixtures/parity/mt5_like --fixture tests/fixtures/parity/mt5_like/expected.safetensors")]
pub(crate) struct VerifyArguments {
    /// Run, checkpoint or Hugging Face directory.
    #[arg(long)]
    pub model: PathBuf,
    /// File of inputs and expected arrays.
    #[arg(long)]
    pub fixture: PathBuf,
    /// Largest allowed difference of hidden states and logits.
    #[arg(long, default_value_t = 2e-4)]
    pub tolerance: f64,
    /// Largest allowed difference of losses.
    #[arg(long, default_value_t = 5e-5)]
    pub loss_tolerance: f64,
    /// Print a JSON object.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Build the sample corpus: documentation text of the packages this program was built from.
    #[command(after_help = "Example:\n  switchyard data build --cache-dir cache")]
    Build {
        /// Directory that holds the corpus in its folder `sample`; data.cache_dir of the runs that use it.
        #[arg(long, default_value = "cache")]
        cache_dir: PathBuf,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Print rows of the batch of one step as JSON: ids and text of inputs and targets.
    #[command(after_help = "Example:\n  switchyard data preview configs/quickstart.toml --step 100 --rows 2")]
    Preview {
        /// Experiment file.
        config: PathBuf,
        /// Change a key.
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
        /// Step, counted from 0.
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..1 << 40))]
        step: u64,
        /// Rows to print.
        #[arg(long, default_value_t = 4, value_parser = count())]
        rows: usize,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenizerCommand {
    /// Train a Unigram tokenizer with sentinels on text.
    #[command(
        after_help = "Example:\n  switchyard tokenizer train --data sample --vocab-size 8192 --out tokenizer"
    )]
    Train {
        /// File, directory or glob of text; `sample` for the sample corpus.
        #[arg(long)]
        data: String,
        /// Pieces, `<pad>`, `</s>` and `<unk>` included; 100 sentinels come on top.
        #[arg(long, default_value_t = 32_000)]
        vocab_size: usize,
        /// Directory to write tokenizer.json and its companions to.
        #[arg(long)]
        out: PathBuf,
        /// Column or JSON key that holds the text.
        #[arg(long, default_value = "text")]
        text_column: String,
        /// Directory of the sample corpus.
        #[arg(long, default_value = "cache")]
        cache_dir: PathBuf,
    },
    /// Show what a tokenizer holds and how it cuts a text.
    #[command(
        after_help = "Example:\n  switchyard tokenizer inspect tokenizer/tokenizer.json --text \"Hello world\""
    )]
    Inspect {
        /// tokenizer.json.
        tokenizer: PathBuf,
        /// Text to cut into tokens.
        #[arg(long)]
        text: Option<String>,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// Check an experiment file and print what it means, without starting it.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  switchyard check configs/switch-base-8-c4.toml --set data.micro_batch_rows=32\n  switchyard check configs/switch-base-8-c4.toml --ranks 16 --set parallel.expert_parallel_size=8"
)]
pub(crate) struct CheckArguments {
    /// Experiment file.
    pub config: PathBuf,
    /// Change a key.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Ranks of the job: also checks and prints the mesh and the memory of a rank.
    #[arg(long, value_parser = count())]
    pub ranks: Option<usize>,
    /// Print a JSON object.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum InspectCommand {
    /// Tensors with the moments kept beside them, shards, ranks of experts, sizes of a checkpoint.
    #[command(after_help = "Example:\n  switchyard inspect checkpoint runs/quickstart")]
    Checkpoint {
        /// Run or checkpoint directory.
        path: PathBuf,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Which rank of a job would hold which experts, and how much memory it would need.
    #[command(
        after_help = "Example:\n  switchyard inspect topology configs/switch-base-8-c4.toml --ranks 8 --set parallel.expert_parallel_size=4"
    )]
    Topology {
        /// Experiment file.
        config: PathBuf,
        /// Change a key.
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
        /// Ranks of the job.
        #[arg(long, value_parser = count())]
        ranks: usize,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
}
