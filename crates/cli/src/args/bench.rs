//! Arguments of `switchyard bench`.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{MeshArguments, TokenRoute, count, count_from, mebibytes};

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
        hierarchical_all_to_all: TokenRoute,
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
    /// What goes on while gradients and new values travel between GPUs.
    #[arg(long, value_name = "WHAT", default_value = "exchanges")]
    pub overlap: Overlap,
    /// Chunks in which tokens travel between GPUs while the experts compute others; 0: all before and after them.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub dispatch_chunks: usize,
    #[command(flatten)]
    pub mesh: MeshArguments,
    /// Print a JSON object.
    #[arg(long)]
    pub json: bool,
}

/// What goes on while gradients and values travel between GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Overlap {
    /// Nothing.
    Nothing,
    /// Those of the next bucket are brought together, those of the one before taken in.
    Exchanges,
    /// For gradients, the rest of the backward pass.
    Backward,
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Exchanges => "exchanges",
            Self::Backward => "backward",
        })
    }
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
