//! A run with everything decided: what the trainer receives.
//!
//! `RunPlan` has no optional key. It is made by `resolve` only, after every check passed; the
//! text that a user wrote is `RunConfig` (`schema.rs`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use crate::precision::{AccumulationDtype, PrecisionMode};

use crate::model::ModelConfig;

/// Which router assigns tokens to experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterKind {
    /// Each token to its best expert (Switch Transformer).
    Top1,
    /// Each token to its two best experts (GShard).
    Top2,
    /// Each expert takes its best tokens (Zhou et al. 2022).
    ExpertChoice,
}

/// Whose rules for groups, capacity and losses apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoutingSemantics {
    /// The paper's and Mesh TensorFlow's.
    Paper,
    /// Hugging Face transformers': one group a row, fixed capacity, padding counts.
    Hf,
}

/// How a fractional expert capacity becomes a whole number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapacityRounding {
    /// Up.
    Ceil,
    /// Down.
    Floor,
    /// Up to a multiple of eight.
    #[serde(rename = "multiple_of_8")]
    MultipleOf8,
}

/// Routing of tokens to experts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingConfig {
    /// The router.
    pub router: RouterKind,
    /// Whose rules.
    pub semantics: RoutingSemantics,
    /// Slots of all experts together, relative to tokens, in training.
    pub capacity_factor: f64,
    /// The same in evaluation.
    pub eval_capacity_factor: f64,
    /// Least slots of an expert.
    pub min_expert_capacity: usize,
    /// Rounding of the capacity.
    pub capacity_rounding: CapacityRounding,
    /// Fixed slots of an expert in each row; used by `semantics = "hf"` only.
    pub expert_capacity: usize,
    /// Half width of the multiplicative noise on the router's input in training; 0 for none.
    pub router_jitter_noise: f64,
    /// Weight of the load-balancing loss of each layer.
    pub load_balancing_loss_coef: f64,
    /// Weight of the router z-loss of each layer.
    pub router_z_loss_coef: f64,
    /// Batch rows of a routing group; 0 for the whole micro-batch.
    pub group_rows: usize,
    /// Assign tokens round robin, for benchmarks.
    pub force_balanced: bool,
}

impl RoutingConfig {
    /// `expert_capacity` of a group of `tokens`, padding included in the count.
    ///
    /// # Source
    /// Switch Transformer, section 2.2: `tokens / num_experts * capacity_factor`.
    pub fn capacity(&self, tokens: usize, num_experts: usize, training: bool) -> usize {
        if self.semantics == RoutingSemantics::Hf {
            return self.expert_capacity.min(tokens);
        }
        let factor = if training { self.capacity_factor } else { self.eval_capacity_factor };
        // More slots than tokens are never used; the bound also keeps the rounding from overflowing.
        let exact = (tokens as f64 * factor / num_experts as f64).min(tokens as f64);
        let rounded = match self.capacity_rounding {
            CapacityRounding::Ceil => exact.ceil() as usize,
            CapacityRounding::Floor => exact.floor() as usize,
            CapacityRounding::MultipleOf8 => (exact.ceil() as usize).next_multiple_of(8),
        };
        rounded.max(self.min_expert_capacity).min(tokens)
    }
}

/// Which optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// Factored second moments, updates relative to the parameter's size (T5's).
    Adafactor,
    /// Adam with decoupled weight decay.
    Adamw,
}

/// The optimizer and its constants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerPlan {
    /// Which.
    pub kind: OptimizerKind,
    /// Peak learning rate; multiplied by the schedule's factor.
    pub learning_rate: f64,
    /// Largest global gradient norm; 0 for no clipping.
    pub clip_norm: f64,
    /// Multiply every update by the root mean square of the matrix it changes (at least `eps2`).
    pub parameter_scale: bool,
    /// AdamW: decay of the first moment.
    pub beta1: f64,
    /// AdamW: decay of the second moment.
    pub beta2: f64,
    /// AdamW: added to the root of the second moment. Adafactor: `eps1`, added to squared gradients.
    pub eps: f64,
    /// Adafactor, and AdamW with `parameter_scale`: floor of the parameter scale.
    pub eps2: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
    /// Adafactor: second-moment decay is `1 - step^-decay_exponent`.
    pub decay_exponent: f64,
    /// Adafactor: largest root mean square of an update.
    pub update_clip: f64,
}

/// Shape of the learning rate over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// `1 / sqrt(max(step, warmup_steps))`.
    InverseSqrt,
    /// Linear warm-up, then linearly to `final_fraction`.
    Linear,
    /// Linear warm-up, then a half cosine to `final_fraction`.
    Cosine,
    /// Linear warm-up, then constant.
    Constant,
}

/// Learning-rate schedule and length of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchedulePlan {
    /// Shape.
    pub kind: ScheduleKind,
    /// Steps until the peak (`inverse_sqrt`: until decay starts).
    pub warmup_steps: u64,
    /// Steps of the run.
    pub total_steps: u64,
    /// Learning rate at the end, relative to the peak (`linear`, `cosine`).
    pub final_fraction: f64,
}

/// What the model learns from text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// T5's span corruption.
    SpanCorruption,
}

/// What to do with a record that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnCorrupt {
    /// Stop with an error.
    Fail,
    /// Leave it out and count it.
    Skip,
}

/// How a plain-text file splits into documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextDocument {
    /// One document a line.
    Line,
    /// Blocks between blank lines.
    Paragraph,
    /// The whole file.
    File,
}

/// One source of text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourcePlan {
    /// File, directory, glob or list of these; `sample` for the documentation corpus of this machine.
    pub path: String,
    /// Name of the source in logs; of a mixture it also keys the random streams.
    pub name: String,
    /// Size, relative to the other sources; with `mixture_temperature` it gives the share in the mixture.
    pub weight: f64,
}

/// Where text comes from and how it becomes batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataPlan {
    /// Training text.
    pub sources: Vec<SourcePlan>,
    /// Held-out text for evaluation; empty for none.
    pub eval_sources: Vec<SourcePlan>,
    /// Sources are mixed in proportion to `weight^(1 / mixture_temperature)`.
    pub mixture_temperature: f64,
    /// `tokenizer.json` or its directory; when missing and `train_tokenizer_vocab_size` is not 0, one is trained.
    pub tokenizer: PathBuf,
    /// Pieces of a tokenizer trained on the sources, sentinels not counted; 0 to require `tokenizer`.
    pub train_tokenizer_vocab_size: usize,
    /// Column or JSON key that holds the text.
    pub text_column: String,
    /// How plain text splits into documents.
    pub text_document: TextDocument,
    /// The objective.
    pub objective: Objective,
    /// Share of tokens that is masked.
    pub noise_density: f64,
    /// Mean length of a masked span, in tokens.
    pub mean_noise_span_length: f64,
    /// Encoder length, EOS included.
    pub inputs_length: usize,
    /// Decoder length, EOS included.
    pub targets_length: usize,
    /// Rows of a global batch.
    pub batch_rows: usize,
    /// Rows computed at once; divides `batch_rows`.
    pub micro_batch_rows: usize,
    /// Unreadable records.
    pub on_corrupt: OnCorrupt,
    /// Where tokenised text is kept.
    pub cache_dir: PathBuf,
    /// Batches made ahead of the trainer.
    pub prefetch_batches: usize,
}

/// How a job's ranks divide the run; `MeshShape` has the sizes of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParallelPlan {
    /// Ranks that learn from different rows; 0 for what the launcher gives.
    pub data_parallel_size: usize,
    /// Data-parallel ranks over which one set of experts is spread.
    pub expert_parallel_size: usize,
    /// Ranks over which every matrix is split.
    pub tensor_parallel_size: usize,
}

/// Communication between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommPlan {
    /// Longest time in a collective.
    pub timeout_s: u64,
    /// Sum gradients micro-batch by micro-batch, in the order of the global batch.
    pub deterministic: bool,
    /// How tokens travel between machines; plans of earlier versions do not say.
    #[serde(default)]
    pub hierarchical_all_to_all: HierarchicalAllToAll,
    /// Chunks in which tokens travel between GPUs while experts compute others, 0 for all before and after; plans of
    /// earlier versions do not say.
    #[serde(default)]
    pub dispatch_chunks: usize,
    /// What goes on while gradients and values travel between GPUs; plans of earlier versions do not say.
    #[serde(default)]
    pub overlap: ExchangeOverlap,
}

/// What goes on while gradients and values travel between GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExchangeOverlap {
    /// Nothing.
    Nothing,
    /// What comes before and after an exchange, for other buckets.
    #[default]
    Exchanges,
    /// The backward pass.
    Backward,
}

/// Whether tokens travel between machines in one message a machine, by way of the ranks inside it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HierarchicalAllToAll {
    /// In each expert group that stands on its machines so that they can.
    #[default]
    Auto,
    /// They must: ranks that stand otherwise are refused.
    Always,
    /// Every rank sends to every other.
    Never,
}

/// Checkpoints of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointPlan {
    /// Steps between checkpoints; 0 for the end only.
    pub every_steps: u64,
    /// Newest checkpoints kept; 0 for all.
    pub keep_last: usize,
    /// Checkpoints of steps that are a multiple of this are kept for good; 0 for none.
    pub keep_every: u64,
    /// What a failed write does to the run.
    pub on_error: OnCheckpointError,
    /// Write the model to `RUN/export` at the end.
    pub export: bool,
}

/// What a failed checkpoint write does to the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnCheckpointError {
    /// Stop with an error.
    Stop,
    /// Log it and go on.
    Warn,
}

/// Evaluation during training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalPlan {
    /// Steps between evaluations; 0 for the end only.
    pub every_steps: u64,
    /// Batches of an evaluation.
    pub batches: usize,
    /// Texts with sentinels that the trained model fills at the end.
    pub prompts: Vec<String>,
}

fn yes() -> bool {
    true
}

/// Training constants beside the optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerPlan {
    /// Dropout everywhere T5 has it.
    pub dropout_rate: f64,
    /// Dropout on the hidden activations of experts.
    pub expert_dropout: f64,
    /// Weight of `log(Z)^2` of the output softmax.
    pub z_loss: f64,
    /// Blocks run again in the backward pass instead of keeping their activations; plans of earlier
    /// versions do not say.
    #[serde(default)]
    pub recompute_activations: bool,
    /// Steps on a GPU are recorded as a CUDA graph where they can be; plans of earlier versions do not say.
    #[serde(default = "yes")]
    pub cuda_graph: bool,
    /// Steps between lines of `metrics.jsonl`.
    pub log_every_steps: u64,
    /// Non-finite steps in a row after which the run stops.
    pub max_skipped_steps: u64,
}

/// A run, everything decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct RunPlan {
    /// Name of the run and of its directory.
    pub name: String,
    /// Seed of everything random.
    pub seed: u64,
    /// Architecture.
    pub model: ModelConfig,
    /// Routing.
    pub routing: RoutingConfig,
    /// Number formats.
    pub precision: PrecisionMode,
    /// Format of sums of gradients.
    pub accumulation: AccumulationDtype,
    /// Whether matrix products of a float32 model on a GPU may round their factors to TF32; plans of earlier
    /// versions do not say.
    #[serde(default)]
    pub allow_tf32: bool,
    /// Optimizer.
    pub optimizer: OptimizerPlan,
    /// Learning rate and length.
    pub schedule: SchedulePlan,
    /// Data.
    pub data: DataPlan,
    /// Dropout, z-loss, logging.
    pub trainer: TrainerPlan,
    /// Mesh.
    pub parallel: ParallelPlan,
    /// Communication.
    pub comm: CommPlan,
    /// Checkpoints.
    pub checkpoint: CheckpointPlan,
    /// Evaluation.
    pub eval: EvalPlan,
}
