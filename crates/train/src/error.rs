//! What can end a run.

use switchyard_checkpoint::CheckpointError;
use switchyard_comm::CommError;
use switchyard_data::LoadError;
use switchyard_data::loader::StateMismatch;

use crate::metrics::MetricsError;
use crate::run_directory::RunDirectoryError;

/// Why a run stopped before its end.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Text could not be read or turned into batches.
    #[error(transparent)]
    Data(#[from] LoadError),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The run directory cannot be used.
    #[error(transparent)]
    RunDirectory(#[from] RunDirectoryError),
    /// `metrics.jsonl` could not be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A checkpoint lacks a moment of this run's optimizer.
    #[error(
        "optimizer state `{name}` is missing in the checkpoint; was it written with another optimizer.kind?"
    )]
    OtherOptimizer {
        /// The tensor.
        name: String,
    },
    /// The ranks could not finish something together.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Ranks were started with different experiments or programs.
    #[error(
        "the ranks would not train the same:{differences}\nstart all ranks with one program, one experiment file and the same --set"
    )]
    RanksDiffer {
        /// Keys with the values of two ranks, a line each.
        differences: String,
    },
    /// Met by this rank first, and the end of all ranks alike.
    #[error(transparent)]
    OnAllRanks(Box<TrainError>),
    /// Another rank failed and has said why.
    #[error("rank {rank} failed: {message}")]
    OnRank {
        /// The rank.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// The system refuses a thread.
    #[error("cannot write checkpoints beside training: {0}")]
    Thread(std::io::Error),
    /// Too many steps in a row were not finite.
    #[error(
        "loss or gradient was not finite for {steps} steps in a row, at last in `{place}`; go on from the newest \
         checkpoint in another directory (--resume CHECKPOINT --run-dir DIR) with a lower \
         optimizer.learning_rate or a longer schedule.warmup_steps"
    )]
    NotFinite {
        /// Steps in a row.
        steps: u64,
        /// A parameter, a block such as `encoder.block.3`, or `loss`.
        place: String,
    },
    /// The run that a checkpoint belongs to computed something else.
    #[error(
        "cannot resume from {}, its run had other settings:{differences}\nrestore these keys, or start a new run from there, which may \
         change all but the model, the data and the kind of optimizer: --resume CHECKPOINT --run-dir DIR",
        checkpoint.display()
    )]
    OtherRun {
        /// The checkpoint.
        checkpoint: std::path::PathBuf,
        /// Keys with both values.
        differences: String,
    },
    /// The run has gone on from there already.
    #[error(
        "cannot continue from {}: this run has gone on to {}; continue that with `--resume auto`, or start \
         another run from here with `--run-dir`",
        checkpoint.display(),
        newest.display()
    )]
    NewerCheckpoint {
        /// The checkpoint asked for.
        checkpoint: std::path::PathBuf,
        /// The newest one of the run.
        newest: std::path::PathBuf,
    },
    /// The text of the run has changed since the checkpoint.
    #[error("cannot resume from {}: {difference}", checkpoint.display())]
    OtherData {
        /// The checkpoint.
        checkpoint: std::path::PathBuf,
        /// What differs, and the mend.
        difference: StateMismatch,
    },
    /// The tokenizer has ids that the model has no row for.
    #[error(
        "data.tokenizer has {tokenizer} ids and model.vocab_size is {model}; raise model.vocab_size to {tokenizer} or \
         more (a multiple of 128 is fastest), or use a smaller tokenizer"
    )]
    VocabularyTooSmall {
        /// Ids of the tokenizer.
        tokenizer: usize,
        /// Rows of the embedding.
        model: usize,
    },
    /// Counters that JSON cannot hold.
    #[error("the state of the run has no JSON form: {0}")]
    NoJson(serde_json::Error),
}

impl TrainError {
    /// Whether a checkpoint could not be written, here or on another rank, and nothing else is amiss.
    pub(crate) fn is_about_saving(&self) -> bool {
        match self {
            Self::OnAllRanks(error) => error.is_about_saving(),
            Self::Checkpoint(_) | Self::OnRank { .. } | Self::Thread(_) => true,
            _ => false,
        }
    }
}
