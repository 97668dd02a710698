//! The command line: every command, its options and a worked example.

use std::path::PathBuf;

use clap::builder::{RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use switchyard_comm::Choice;
use switchyard_config::HierarchicalAllToAll;
use switchyard_config::plan::ParallelPlan;
use switchyard_kernels::DeviceName;

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
    pub hierarchical_all_to_all: TokensTravel,
}

/// How tokens travel to their experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TokensTravel {
    /// Machine by machine where the ranks stand so.
    Auto,
    /// Straight.
    Never,
}

impl From<TokensTravel> for HierarchicalAllToAll {
    fn from(way: TokensTravel) -> Self {
        match way {
            TokensTravel::Auto => Self::Auto,
            TokensTravel::Never => Self::Never,
        }
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

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Whole training steps on synthetic tokens.
    #[command(
        after_help = "Examples:\n  switchyard bench step --preset tiny --experts 8 --optimizer adamw --json\n  switchyard bench step --device cuda --preset t5-base --experts 0 --precision selective --rows 64 --inputs-length 512 --targets-length 114\n  switchyard bench step --device cuda --preset t5-base --experts 0 --precision fp32 --allow-tf32"
    )]
    Step(BenchStepArguments),
    /// The operations of a model one by one, forward and backward, and the optimizers.
    #[command(after_help = "Example:\n  switchyard bench layer --preset tiny --precision selective")]
    Layer(BenchLayerArguments),
    /// Matrix products of a model's sizes, as shares of the measured peak of the multipliers.
    #[command(after_help = "Example:\n  switchyard bench gemm --preset tiny --precision bf16")]
    Gemm(BenchGemmArguments),
    /// Sums, all-to-alls and all-gathers of the ranks of a job, beside the MPI library's own, or on the ranks'
    /// GPUs beside NCCL's own.
    #[command(
        after_help = "Examples:\n  mpirun -n 4 switchyard bench collectives --mebibytes 1,64\n  mpirun -n 8 switchyard bench collectives --device cuda --mebibytes 1,64,1024"
    )]
    Collectives {
        /// Sizes of a rank's buffer.
        #[arg(long, value_delimiter = ',', default_value = "0.0625,1,64", value_parser = mebibytes)]
        mebibytes: Vec<f64>,
        /// Times that each is measured.
        #[arg(long, default_value_t = 15, value_parser = count())]
        rounds: usize,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Plan, dispatch and combine of one sparse layer, by number of experts; under mpirun the experts
    /// are spread over the ranks, and every rank has the tokens.
    #[command(
        after_help = "Examples:\n  switchyard bench dispatch --tokens 2048 --experts 8,128\n  mpirun -n 4 switchyard bench dispatch --experts 8,128\n  mpirun -n 4 switchyard bench dispatch --device cuda --experts 8,128"
    )]
    Dispatch {
        /// Tokens of the layer.
        #[arg(long, default_value_t = 2048, value_parser = count())]
        tokens: usize,
        /// Width of a token.
        #[arg(long, default_value_t = 256, value_parser = count())]
        d_model: usize,
        /// Numbers of experts.
        #[arg(long, value_delimiter = ',', default_value = "8,32,128", value_parser = count_from(2))]
        experts: Vec<usize>,
        /// Under mpirun or srun on several machines: whether tokens travel machine by machine.
        #[arg(long, value_name = "WAY", default_value = "auto")]
        hierarchical_all_to_all: TokensTravel,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Corrupted samples from cached tokens, on one core.
    #[command(after_help = "Example:\n  switchyard bench data configs/quickstart.toml")]
    Data {
        /// Experiment file.
        config: PathBuf,
        /// Change a key.
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Shards of a synthetic checkpoint beside plain writes of as many bytes, and reading them.
    #[command(after_help = "Example:\n  switchyard bench checkpoint --megabytes 300 --dir runs")]
    Checkpoint(BenchCheckpointArguments),
    /// Greedy decoding with cached keys and values.
    #[command(after_help = "Example:\n  switchyard bench generate --preset tiny --batch 8")]
    Generate {
        /// Model preset.
        #[arg(long, default_value = "tiny")]
        preset: String,
        /// Rows decoded at once.
        #[arg(long, default_value_t = 1, value_parser = count())]
        batch: usize,
        /// Tokens of each input.
        #[arg(long, default_value_t = 128, value_parser = count())]
        inputs_length: usize,
        /// Tokens to write.
        #[arg(long, default_value_t = 64, value_parser = count())]
        new_tokens: usize,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// Sizes of a benchmark step.
#[derive(Debug, Args)]
pub(crate) struct BenchStepArguments {
    /// Model preset.
    #[arg(long, default_value = "tiny")]
    pub preset: String,
    /// Experts of each sparse layer; 0 for a dense model.
    #[arg(long, default_value_t = 8)]
    pub experts: usize,
    /// Optimizer.
    #[arg(long, default_value = "adamw", value_parser = ["adamw", "adafactor"])]
    pub optimizer: String,
    /// Number formats.
    #[arg(long, default_value = "fp32", value_parser = ["fp32", "bf16", "selective"])]
    pub precision: String,
    /// On a GPU with `--precision fp32`: round the factors of matrix products to TF32.
    #[arg(long)]
    pub allow_tf32: bool,
    /// Slots of all experts together, relative to tokens.
    #[arg(long, default_value_t = 1.25)]
    pub capacity_factor: f64,
    /// Rows of a batch, which data-parallel ranks share evenly.
    #[arg(long, default_value_t = 16, value_parser = count())]
    pub rows: usize,
    /// Parts of a rank's rows that go forward and backward one after the other, before one update.
    #[arg(long, default_value_t = 1, value_parser = count())]
    pub micro_batches: usize,
    /// Encoder length.
    #[arg(long, default_value_t = 128, value_parser = count())]
    pub inputs_length: usize,
    /// Decoder length.
    #[arg(long, default_value_t = 32, value_parser = count())]
    pub targets_length: usize,
    /// Steps that are measured, after three that are not.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..1 << 20))]
    pub steps: u64,
    /// Run blocks again in the backward pass instead of keeping their activations.
    #[arg(long)]
    pub recompute: bool,
    /// On a GPU, let the host ask for every kernel of every step instead of recording a step as a CUDA graph.
    #[arg(long)]
    pub no_cuda_graph: bool,
    #[command(flatten)]
    pub mesh: MeshArguments,
    /// Print a JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Sizes of operations.
#[derive(Debug, Args)]
pub(crate) struct BenchLayerArguments {
    /// Model preset.
    #[arg(long, default_value = "tiny")]
    pub preset: String,
    /// Experts of a sparse layer.
    #[arg(long, default_value_t = 8, value_parser = count())]
    pub experts: usize,
    /// Number formats.
    #[arg(long, default_value = "selective", value_parser = ["fp32", "bf16", "selective"])]
    pub precision: String,
    /// Rows of a batch.
    #[arg(long, default_value_t = 16, value_parser = count())]
    pub rows: usize,
    /// Tokens of a row; the head gets a quarter of all.
    #[arg(long, default_value_t = 128, value_parser = count())]
    pub inputs_length: usize,
    /// Times that each is measured.
    #[arg(long, default_value_t = 15, value_parser = count())]
    pub rounds: usize,
    /// Print a JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Sizes of matrix products.
#[derive(Debug, Args)]
pub(crate) struct BenchGemmArguments {
    /// Model preset.
    #[arg(long, default_value = "tiny")]
    pub preset: String,
    /// Format of the factors.
    #[arg(long, default_value = "bf16", value_parser = ["fp32", "bf16"])]
    pub precision: String,
    /// Tokens; an expert gets an eighth of them or its share, the head 512 at most.
    #[arg(long, default_value_t = 2048, value_parser = count())]
    pub tokens: usize,
    /// Times that each is measured.
    #[arg(long, default_value_t = 25, value_parser = count())]
    pub rounds: usize,
    /// Print a JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Size and place of a checkpoint that is written and read.
#[derive(Debug, Args)]
pub(crate) struct BenchCheckpointArguments {
    /// Size, about.
    #[arg(long, default_value_t = 300, value_parser = count_from(32))]
    pub megabytes: usize,
    /// Times that each way is measured.
    #[arg(long, default_value_t = 7, value_parser = count())]
    pub rounds: usize,
    /// Directory on the disk to measure; what is written there is removed.
    #[arg(long, default_value = ".")]
    pub dir: PathBuf,
    /// Print a JSON object.
    #[arg(long)]
    pub json: bool,
}
