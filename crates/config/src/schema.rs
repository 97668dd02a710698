//! What a user may write: every table and key of an experiment file, with its meaning and default.
//!
//! Owns the list of keys. Does not own how files are layered (`layers.rs`), what a preset holds
//! (`presets.rs`), the defaults that depend on other keys (`decide.rs`) or which values fit
//! together (`validate.rs`). `docs/config.md` is generated from here (`reference.rs`).

use std::path::PathBuf;

use crate::keys::DefaultValue::{Derived, Required, Value};
use crate::keys::{KeyType, Table, choice_keys, list, table};
use crate::model::{Activation, Initialization};
use crate::plan::{
    AccumulationDtype, CapacityRounding, ExchangeOverlap, HierarchicalAllToAll, Objective, OnCheckpointError,
    OnCorrupt, OptimizerKind, PrecisionMode, RouterKind, RoutingSemantics, ScheduleKind, TextDocument,
};

choice_keys!(
    AccumulationDtype,
    Activation,
    CapacityRounding,
    ExchangeOverlap,
    HierarchicalAllToAll,
    Initialization,
    Objective,
    OnCheckpointError,
    OnCorrupt,
    OptimizerKind,
    PrecisionMode,
    RouterKind,
    RoutingSemantics,
    ScheduleKind,
    TextDocument,
);

table! {
    /// An experiment file. These keys stand before its first table.
    pub struct RunConfig in "" {
        /// Files whose keys hold unless this file sets them; later ones win over earlier ones. Paths are
        /// relative to the file that names them.
        extends: Vec<String> = Value("[]"),
        /// Name of the run and of its directory under `runs/`.
        name: String = Required,
        /// Seed of everything random: fresh weights, batches, dropout and router jitter.
        seed: u64 = Value("1"),
    }
    tables {
        model: ModelTable,
        routing: RoutingTable,
        precision: PrecisionTable,
        optimizer: OptimizerTable,
        schedule: ScheduleTable,
        data: DataTable,
        trainer: TrainerTable,
        parallel: ParallelTable,
        comm: CommTable,
        checkpoint: CheckpointTable,
        eval: EvalTable,
        debug: DebugTable,
    }
}

table! {
    /// The architecture. A preset decides every size; keys written beside it, in any layer, win over it.
    /// Without one, the defaults hold, and `d_model`, `d_ff`, `d_kv`, `num_heads` and `num_layers` must be written.
    pub struct ModelTable in "model" {
        /// A model by name; the names are listed below.
        preset: String = Derived("none"),
        /// Rows of the embedding. At least the tokenizer's size, sentinels included.
        vocab_size: usize = Value("32128"),
        /// Width of the residual stream.
        d_model: usize = Derived("the preset's"),
        /// Width inside a feed-forward layer or an expert.
        d_ff: usize = Derived("the preset's"),
        /// Width of one attention head.
        d_kv: usize = Derived("the preset's"),
        /// Attention heads. `num_heads * d_kv` need not equal `d_model`.
        num_heads: usize = Derived("the preset's"),
        /// Encoder layers.
        num_layers: usize = Derived("the preset's"),
        /// Decoder layers.
        num_decoder_layers: usize = Derived("the preset's, else `num_layers`"),
        /// Buckets of the relative position bias.
        relative_attention_num_buckets: usize = Value("32"),
        /// Distance in tokens from which all positions share the last bucket.
        relative_attention_max_distance: usize = Value("128"),
        /// Pointwise function of the feed-forward layers.
        activation: Activation = Value("\"relu\""),
        /// Feed-forward layers compute `activation(x wi_0) * (x wi_1)` before `wo`.
        gated: bool = Value("false"),
        /// The output head shares the embedding.
        tie_word_embeddings: bool = Value("true"),
        /// The head multiplies its input by `d_model^-0.5`.
        scale_decoder_outputs: bool = Derived("the preset's, else `tie_word_embeddings`"),
        /// Added to the mean square in every norm.
        layer_norm_epsilon: f64 = Value("1e-6"),
        /// Experts of each sparse layer; 0 makes the model dense.
        num_experts: usize = Value("0"),
        /// Sets `encoder_expert_layer_every` and `decoder_expert_layer_every` together.
        expert_layer_every: usize = Derived("none"),
        /// Encoder layer `i`, counted from 0, has experts when this is 1 or `i % every == 1`; 0 for none.
        encoder_expert_layer_every: usize = Value("0"),
        /// The same for the decoder.
        decoder_expert_layer_every: usize = Value("0"),
        /// The router has a bias vector.
        router_bias: bool = Value("false"),
        /// How fresh weights are drawn: `paper` is a truncated normal of variance `init_scale / fan_in`,
        /// `hf` the rule of Hugging Face transformers.
        init: Initialization = Value("\"paper\""),
        /// Scale of the initial variance (`paper`), or `initializer_factor` (`hf`).
        init_scale: f64 = Derived("0.1 with experts and `init = \"paper\"`, else 1.0"),
    }
}

table! {
    /// How tokens find experts. Without experts these keys have no effect.
    pub struct RoutingTable in "routing" {
        /// `top1` sends each token to its best expert (Switch), `top2` to its two best (GShard), and in
        /// `expert_choice` each expert takes its best tokens. Expert choice is not causal: whether a
        /// decoder token is taken depends on later tokens of its group.
        router: RouterKind = Value("\"top1\""),
        /// `paper`: groups of `group_rows` rows, capacity from the factors, padding takes no slot. `hf`: one
        /// group a row, fixed `expert_capacity`, padding takes slots, as in Hugging Face transformers.
        semantics: RoutingSemantics = Value("\"paper\""),
        /// Slots of all experts together, relative to the tokens of a group, in training.
        capacity_factor: f64 = Value("1.25"),
        /// The same in evaluation.
        eval_capacity_factor: f64 = Value("2.0"),
        /// Least slots of an expert.
        min_expert_capacity: usize = Value("4"),
        /// How a fractional capacity becomes a whole number.
        capacity_rounding: CapacityRounding = Value("\"ceil\""),
        /// Slots of an expert in each row; with `semantics = "hf"` only.
        expert_capacity: usize = Derived("64 with `semantics = \"hf\"`, else 0"),
        /// In training the router sees its input times a uniform number in `1 ± this`; 0 for none.
        router_jitter_noise: f64 = Value("0.01"),
        /// Weight of the load-balancing loss of each sparse layer.
        load_balancing_loss_coef: f64 = Value("0.01"),
        /// Weight of the router z-loss of each sparse layer (ST-MoE uses 0.001).
        router_z_loss_coef: f64 = Value("0.0"),
        /// Batch rows of a routing group; 0 for the whole micro-batch.
        group_rows: usize = Value("0"),
    }
}

table! {
    /// Number formats.
    pub struct PrecisionTable in "precision" {
        /// Formats of weights, activations and gradients: float32; bfloat16 but for the router
        /// (`selective`); or bfloat16 with the router, which may diverge. Masters are float32 in all.
        mode: PrecisionMode = Value("\"fp32\""),
        /// Format of sums of gradients over micro-batches and ranks. `bf16` halves the memory and the
        /// traffic of sums of bfloat16 gradients, which then lose summands below their spacing.
        accumulation_dtype: AccumulationDtype = Value("\"fp32\""),
        /// With mode `fp32` on a GPU: round the factors of matrix products to TF32, 10 bits of fraction, for
        /// several times the speed; the router's too. Attention and all that is no such product stay float32.
        /// Other devices compute as without it.
        allow_tf32: bool = Value("false"),
    }
}

table! {
    /// The optimizer and its constants.
    pub struct OptimizerTable in "optimizer" {
        /// Adafactor as T5 uses it (no momentum, factored second moment), or AdamW.
        kind: OptimizerKind = Value("\"adafactor\""),
        /// Learning rate; the schedule multiplies it.
        learning_rate: f64 = Derived("with `inverse_sqrt` 1.0 (adafactor) or 0.1 (adamw), else 0.01 or 0.001"),
        /// Largest global norm of the gradient; 0 for no clipping.
        clip_norm: f64 = Value("1.0"),
        /// Multiply each update by the root mean square of the matrix that it changes, at least `eps2`.
        parameter_scale: bool = Derived("`true` for adafactor, `false` for adamw"),
        /// AdamW: decay of the first moment.
        beta1: f64 = Value("0.9"),
        /// AdamW: decay of the second moment.
        beta2: f64 = Value("0.999"),
        /// Adafactor: added to squared gradients. AdamW: added to the root of the second moment.
        eps: f64 = Derived("1e-30 for adafactor, 1e-8 for adamw"),
        /// Least parameter scale.
        eps2: f64 = Value("1e-3"),
        /// Decoupled weight decay, times the learning rate.
        weight_decay: f64 = Value("0.0"),
        /// Adafactor: the second moment decays by `1 - step^-decay_exponent`.
        decay_exponent: f64 = Value("0.8"),
        /// Adafactor: largest root mean square of an update, before the learning rate.
        update_clip: f64 = Value("1.0"),
    }
}

table! {
    /// Learning rate over time, and the length of the run.
    pub struct ScheduleTable in "schedule" {
        /// `inverse_sqrt` multiplies the learning rate by `1 / sqrt(max(step, warmup_steps))`; the others warm
        /// up linearly to 1, then go down to `final_fraction` on a line or half a cosine, or stay.
        kind: ScheduleKind = Value("\"inverse_sqrt\""),
        /// Steps of the warm-up.
        warmup_steps: u64 = Value("10000"),
        /// Steps of the run.
        total_steps: u64 = Value("524288"),
        /// Factor at the end of the run (`linear`, `cosine`).
        final_fraction: f64 = Value("0.0"),
    }
}

table! {
    /// Text, and how it becomes batches. Paths are relative to the working directory.
    pub struct DataTable in "data" {
        /// Training text; several sources are mixed by their weights and `mixture_temperature`.
        sources: Vec<SourceTable> = Value("[{ path = \"sample\" }]"),
        /// Held-out text for evaluation; none by default, but for the path `sample` its held-out crates.
        eval_sources: Vec<SourceTable> = Derived("`[{ path = \"sample:validation\" }]` for `sample`, else `[]`"),
        /// Sources are mixed in proportion to `weight^(1 / mixture_temperature)`: at 1 by their weights, above it
        /// small sources are seen more often. mT5 used 3.33 (its alpha = 0.3) with the number of pages
        /// of a language as its weight (arXiv:2010.11934, section 3.2). A tokenizer that is trained on the
        /// sources sees them in the same proportion.
        mixture_temperature: f64 = Value("1.0"),
        /// A `tokenizer.json`, or the directory that holds one. When it is missing and
        /// `train_tokenizer_vocab_size` is not 0, one is trained on the sources and kept in `cache_dir`.
        tokenizer: PathBuf = Value("\"tokenizer.json\""),
        /// Pieces of a tokenizer trained on the sources, sentinels not counted; 0 to require `tokenizer`.
        train_tokenizer_vocab_size: usize = Value("0"),
        /// Column (Parquet) or key (JSON lines) that holds the text.
        text_column: String = Value("\"text\""),
        /// How a plain-text file splits into documents: lines, blocks between blank lines, or the whole file.
        text_document: TextDocument = Value("\"line\""),
        /// What the model learns.
        objective: Objective = Value("\"span_corruption\""),
        /// Share of the tokens that is masked.
        noise_density: f64 = Value("0.15"),
        /// Mean length of a masked span in tokens.
        mean_noise_span_length: f64 = Value("3.0"),
        /// Encoder tokens of a row, EOS included.
        inputs_length: usize = Value("512"),
        /// Decoder tokens of a row, EOS included.
        targets_length: usize = Value("114"),
        /// Rows of a global batch.
        batch_rows: usize = Value("2048"),
        /// Rows computed at once; divides `batch_rows`.
        micro_batch_rows: usize = Value("64"),
        /// What to do with a record that cannot be read: stop, or leave it out and count it.
        on_corrupt: OnCorrupt = Value("\"fail\""),
        /// Directory for tokenised text.
        cache_dir: PathBuf = Value("\"cache\""),
        /// Batches made ahead of the trainer, at most 1024.
        prefetch_batches: usize = Value("4"),
    }
}

table! {
    /// One element of `data.sources` or `data.eval_sources`.
    pub struct SourceTable in "data.sources" {
        /// JSON lines, plain text (both bare, gzip or zstd) or Parquet: a file, a directory (with all below it),
        /// a glob (`*`, `?`, `[a-z]`, `**`), any of these with brace lists (`{en,de}`) and ranges
        /// (`{00000..00127}`), several separated by commas (`[,]` is a comma within a glob), or `@list.txt` for
        /// a file that holds one of them a line. `sample` is the corpus made of the documentation of the crates
        /// on this machine, `sample:validation` its held-out part.
        path: String = Required,
        /// Name in logs; in a mixture it also keys the random streams.
        name: String = Derived("`path`"),
        /// Share in the mixture, relative to the other sources, or their size when `data.mixture_temperature`
        /// makes shares of it.
        weight: f64 = Derived("1.0"),
    }
}

table! {
    /// Training constants beside the optimizer.
    pub struct TrainerTable in "trainer" {
        /// Dropout wherever T5 has it.
        dropout_rate: f64 = Value("0.0"),
        /// Dropout on the hidden activations of experts.
        expert_dropout: f64 = Value("0.0"),
        /// Keep the states between blocks alone and run every block again in the backward pass: less
        /// memory, about a fifth more time.
        recompute_activations: bool = Value("false"),
        /// On a GPU, record one of the first steps and repeat the recording (a CUDA graph), so that the GPU never waits
        /// for the host to say what is next. Nothing is computed otherwise; steps that cannot be recorded are
        /// not, and the log says why.
        cuda_graph: bool = Value("true"),
        /// Weight of `log(Z)^2` of the output softmax; 0 for none.
        z_loss: f64 = Value("1e-4"),
        /// Steps between lines of `metrics.jsonl`.
        log_every_steps: u64 = Value("10"),
        /// Steps in a row with a non-finite gradient after which the run stops.
        max_skipped_steps: u64 = Value("10"),
    }
}

table! {
    /// How the ranks of a job (`mpirun -n N`, `srun`) divide the run: `data_parallel_size *
    /// tensor_parallel_size` of them.
    pub struct ParallelTable in "parallel" {
        /// Ranks that learn from different micro-batches; 0 for as many as the launcher gives.
        data_parallel_size: usize = Value("0"),
        /// Consecutive data-parallel ranks over which the experts of a layer are spread; divides the
        /// data-parallel ranks and `model.num_experts`. Tokens travel to their expert and back.
        expert_parallel_size: usize = Value("1"),
        /// Ranks over which attention heads, `d_ff` and the vocabulary are split; divides all three.
        tensor_parallel_size: usize = Value("1"),
    }
}

table! {
    /// Communication between ranks.
    pub struct CommTable in "comm" {
        /// Seconds after which ranks that wait in a collective give up: the job ends with exit code 75 and
        /// the missing ranks are named. Must exceed the slowest step, evaluation or save.
        timeout_s: u64 = Value("600"),
        /// Sum gradients micro-batch by micro-batch in the order of the global batch, so that any number of
        /// data-parallel and expert-parallel ranks gives the same bits. Costs an exchange a micro-batch and,
        /// with expert parallelism, gradients of all experts on every rank.
        deterministic: bool = Value("false"),
        /// Let tokens travel between machines in one message from a rank to each other machine, which is handed
        /// on inside, instead of one to each of its ranks: `auto` where the ranks of an expert group stand machine
        /// after machine, as many on each, and more than one; `always` refuses ranks that stand otherwise; `never`.
        /// Nothing is computed otherwise.
        hierarchical_all_to_all: HierarchicalAllToAll = Value("\"auto\""),
        /// Chunks in which tokens travel between GPUs to their experts and back, so that those of one travel while the
        /// experts compute another: as many parts of each rank's experts, or of the slots of its only one. Gradients of
        /// the experts' weights are computed while the last travels back. 0: tokens travel at once, before and after
        /// the experts. The same is computed, sums perhaps in another order; with `deterministic` all is one chunk.
        dispatch_chunks: usize = Value("2"),
        /// What goes on between GPUs while gradients travel to their owners and new values back: `exchanges`: those of
        /// the next bucket are brought together and those of the one before are taken in; `backward`: the rest of
        /// the backward pass, of steps of one micro-batch without recomputation; `nothing`. Nothing is computed
        /// otherwise.
        overlap: ExchangeOverlap = Value("\"exchanges\""),
    }
}

table! {
    /// Checkpoints.
    pub struct CheckpointTable in "checkpoint" {
        /// Steps between checkpoints; 0 for one at the end only.
        every_steps: u64 = Value("1000"),
        /// Newest checkpoints kept; 0 for all.
        keep_last: usize = Value("3"),
        /// Checkpoints of steps that are a multiple of this are never removed; 0 for none.
        keep_every: u64 = Value("0"),
        /// What a failed write does to the run: stop it, or log the failure and go on.
        on_error: OnCheckpointError = Value("\"stop\""),
        /// Write the model to `RUN/export` at the end, as a Hugging Face directory.
        export: bool = Value("false"),
    }
}

table! {
    /// Evaluation while training.
    pub struct EvalTable in "eval" {
        /// Steps between evaluations; 0 for one at the end only.
        every_steps: u64 = Value("1000"),
        /// Batches of an evaluation, of `data.batch_rows` rows each.
        batches: usize = Value("20"),
        /// Texts with sentinels such as `<extra_id_0>` that the trained model fills and shows at the end.
        prompts: Vec<String> = Value("[]"),
    }
}

table! {
    /// Switches for benchmarks and debugging.
    pub struct DebugTable in "debug" {
        /// Assign tokens to experts round robin, whatever the router says.
        force_balanced_routing: bool = Value("false"),
    }
}

impl KeyType for Vec<SourceTable> {
    const ITEMS: Option<&'static Table> = Some(&SourceTable::TABLE);

    fn describe() -> String {
        "list of tables such as `[{ path = \"c4/*.json.gz\" }]`".to_owned()
    }

    fn to_toml(&self) -> String {
        list(self.iter().map(|source| {
            let pairs: Vec<String> =
                source.entries().iter().map(|(key, value)| format!("{key} = {value}")).collect();
            format!("{{ {} }}", pairs.join(", "))
        }))
    }
}
