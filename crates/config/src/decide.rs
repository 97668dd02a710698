//! From what was written to a plan: presets, defaults that follow from other keys, no `Option` left.
//!
//! Owns the correspondence of keys and plan fields, in both directions: a plan can be written as
//! the keys that give it again. The compiler checks that neither side misses a field.

use crate::error::{ConfigError, ErrorKind};
use crate::keys::dotted;
use crate::layers::{Layers, built_in_defaults};
use crate::model::ModelConfig;
use crate::plan::{
    CheckpointPlan, CommPlan, DataPlan, EvalPlan, OptimizerKind, OptimizerPlan, ParallelPlan, RoutingConfig,
    RoutingSemantics, RunPlan, ScheduleKind, SchedulePlan, SourcePlan, TrainerPlan,
};
use crate::presets::{default_init_scale, preset};
use crate::provenance::{Origin, Provenance};
use crate::schema::{
    CheckpointTable, CommTable, DataTable, DebugTable, EvalTable, ModelTable, OptimizerTable, ParallelTable,
    PrecisionTable, RoutingTable, RunConfig, ScheduleTable, SourceTable, TrainerTable,
};

/// The corpus made of this machine's crate documentation, and its held-out part.
const SAMPLE: &str = "sample";
const SAMPLE_VALIDATION: &str = "sample:validation";

/// Ids of `<pad>` and `</s>` in every tokenizer that a run can use.
const PAD_TOKEN_ID: u32 = 0;
const EOS_TOKEN_ID: u32 = 1;

/// Fixed slots of an expert in Hugging Face's Switch configuration, when nothing is written.
const HF_EXPERT_CAPACITY: usize = 64;

/// The plan that the layers give, not yet validated, and where its values came from.
pub(crate) fn decide(layers: Layers) -> Result<(RunPlan, Provenance), ConfigError> {
    let Layers { written, mut provenance } = layers;
    let mut config = built_in_defaults();
    if let Some(name) = &written.model.preset {
        let model = preset(name)
            .map_err(|fault| ConfigError::new(fault.into()).at(provenance.origin("model.preset")))?;
        // The scale follows from the number of experts, which the user may change.
        let table = ModelTable { init_scale: None, ..ModelTable::of(&model) };
        record_preset(name, &table, &mut provenance);
        config.model.overlay(table);
    }
    config.overlay(written);
    derive_model(&mut config.model);
    derive_routing(&mut config.routing);
    derive_optimizer(&mut config.optimizer, config.schedule.kind);
    Ok((config.decided()?, provenance))
}

fn record_preset(name: &str, table: &ModelTable, provenance: &mut Provenance) {
    for (key, _) in table.entries() {
        let key = dotted("model", &key);
        if *provenance.origin(&key) == Origin::Default {
            provenance.record(key, Origin::Preset(name.to_owned()));
        }
    }
}

fn derive_model(model: &mut ModelTable) {
    model.num_decoder_layers = model.num_decoder_layers.or(model.num_layers);
    model.scale_decoder_outputs = model.scale_decoder_outputs.or(model.tie_word_embeddings);
    if let (Some(init), Some(num_experts)) = (model.init, model.num_experts) {
        model.init_scale.get_or_insert(default_init_scale(init, num_experts));
    }
}

fn derive_routing(routing: &mut RoutingTable) {
    let fixed = routing.semantics == Some(RoutingSemantics::Hf);
    routing.expert_capacity.get_or_insert(if fixed { HF_EXPERT_CAPACITY } else { 0 });
}

fn derive_optimizer(optimizer: &mut OptimizerTable, schedule: Option<ScheduleKind>) {
    let adafactor = optimizer.kind == Some(OptimizerKind::Adafactor);
    // T5's schedule is not relative to a peak: 1 / sqrt(step) is Adafactor's rate itself.
    let peak = if adafactor { 0.01 } else { 0.001 };
    let absolute = if adafactor { 1.0 } else { 0.1 };
    let rate = if schedule == Some(ScheduleKind::InverseSqrt) { absolute } else { peak };
    optimizer.learning_rate.get_or_insert(rate);
    optimizer.parameter_scale.get_or_insert(adafactor);
    optimizer.eps.get_or_insert(if adafactor { 1e-30 } else { 1e-8 });
}

impl RunConfig {
    fn decided(self) -> Result<RunPlan, ConfigError> {
        Ok(RunPlan {
            name: need(self.name, "", "name")?,
            seed: need(self.seed, "", "seed")?,
            model: self.model.decided(PAD_TOKEN_ID, EOS_TOKEN_ID)?,
            routing: self.routing.decided(need(
                self.debug.force_balanced_routing,
                "debug",
                "force_balanced_routing",
            )?)?,
            precision: need(self.precision.mode, "precision", "mode")?,
            accumulation: need(self.precision.accumulation_dtype, "precision", "accumulation_dtype")?,
            allow_tf32: need(self.precision.allow_tf32, "precision", "allow_tf32")?,
            optimizer: self.optimizer.decided()?,
            schedule: self.schedule.decided()?,
            data: decided_data(self.data)?,
            trainer: self.trainer.decided()?,
            parallel: self.parallel.decided()?,
            comm: self.comm.decided()?,
            checkpoint: self.checkpoint.decided()?,
            eval: self.eval.decided()?,
        })
    }

    /// The keys that give `plan` again, every one written.
    pub fn of(plan: &RunPlan) -> Self {
        Self {
            extends: None,
            name: Some(plan.name.clone()),
            seed: Some(plan.seed),
            model: ModelTable::of(&plan.model),
            routing: RoutingTable::of(&plan.routing),
            precision: PrecisionTable {
                mode: Some(plan.precision),
                accumulation_dtype: Some(plan.accumulation),
                allow_tf32: Some(plan.allow_tf32),
            },
            optimizer: OptimizerTable::of(&plan.optimizer),
            schedule: ScheduleTable::of(&plan.schedule),
            data: DataTable {
                sources: Some(plan.data.sources.iter().map(SourceTable::of).collect()),
                eval_sources: Some(plan.data.eval_sources.iter().map(SourceTable::of).collect()),
                ..DataTable::of(&plan.data)
            },
            trainer: TrainerTable::of(&plan.trainer),
            parallel: ParallelTable::of(&plan.parallel),
            comm: CommTable::of(&plan.comm),
            checkpoint: CheckpointTable::of(&plan.checkpoint),
            eval: EvalTable::of(&plan.eval),
            debug: DebugTable { force_balanced_routing: Some(plan.routing.force_balanced) },
        }
    }
}

fn need<T>(value: Option<T>, table: &str, key: &str) -> Result<T, ConfigError> {
    value.ok_or_else(|| {
        let error = ConfigError::new(ErrorKind::Missing { key: dotted(table, key) });
        match table {
            "model" => {
                error.help("choose a preset, such as model.preset = \"switch-base-8\", or write every size")
            }
            "" => error.help(format!("write `{key} = \"...\"` before the first table")),
            _ => error.help(format!("write `{key}` in [{table}]")),
        }
    })
}

/// Both directions between a table and the plan that has the same keys.
///
/// `given` fields of the plan come from elsewhere; `unset` keys of the table have no field.
macro_rules! same_keys {
    (
        $Table:ident in $section:literal <=> $Plan:ident { $($key:ident),+ $(,)? }
        $(given { $($given:ident: $Given:ty),+ })?
        $(unset { $($unset:ident),+ })?
    ) => {
        impl $Table {
            fn decided(self $(, $($given: $Given),+)?) -> Result<$Plan, ConfigError> {
                Ok($Plan { $($key: need(self.$key, $section, stringify!($key))?,)+ $($($given),+)? })
            }

            fn of(plan: &$Plan) -> Self {
                Self { $($key: Some(plan.$key.clone()),)+ $($($unset: None),+)? }
            }
        }
    };
}

same_keys! {
    ModelTable in "model" <=> ModelConfig {
        vocab_size, d_model, d_ff, d_kv, num_heads, num_layers, num_decoder_layers,
        relative_attention_num_buckets, relative_attention_max_distance, activation, gated,
        tie_word_embeddings, scale_decoder_outputs, layer_norm_epsilon, num_experts,
        encoder_expert_layer_every, decoder_expert_layer_every, router_bias, init, init_scale,
    }
    given { pad_token_id: u32, eos_token_id: u32 }
    unset { preset, expert_layer_every }
}

same_keys! {
    RoutingTable in "routing" <=> RoutingConfig {
        router, semantics, capacity_factor, eval_capacity_factor, min_expert_capacity, capacity_rounding,
        expert_capacity, router_jitter_noise, load_balancing_loss_coef, router_z_loss_coef, group_rows,
    }
    given { force_balanced: bool }
}

same_keys! {
    OptimizerTable in "optimizer" <=> OptimizerPlan {
        kind, learning_rate, clip_norm, parameter_scale, beta1, beta2, eps, eps2, weight_decay,
        decay_exponent, update_clip,
    }
}

same_keys! {
    ScheduleTable in "schedule" <=> SchedulePlan { kind, warmup_steps, total_steps, final_fraction }
}

same_keys! {
    DataTable in "data" <=> DataPlan {
        mixture_temperature, tokenizer, train_tokenizer_vocab_size, text_column, text_document, objective, noise_density,
        mean_noise_span_length, inputs_length, targets_length, batch_rows, micro_batch_rows, on_corrupt,
        cache_dir, prefetch_batches,
    }
    given { sources: Vec<SourcePlan>, eval_sources: Vec<SourcePlan> }
    unset { sources, eval_sources }
}

same_keys! {
    SourceTable in "data.sources" <=> SourcePlan { path, name, weight }
}

same_keys! {
    TrainerTable in "trainer" <=> TrainerPlan {
        dropout_rate, expert_dropout, z_loss, recompute_activations, cuda_graph, log_every_steps, max_skipped_steps,
    }
}

same_keys! {
    ParallelTable in "parallel" <=> ParallelPlan {
        data_parallel_size, expert_parallel_size, tensor_parallel_size,
    }
}

same_keys! {
    CommTable in "comm" <=> CommPlan {
        timeout_s, deterministic, hierarchical_all_to_all, dispatch_chunks, overlap
    }
}

same_keys! {
    CheckpointTable in "checkpoint" <=> CheckpointPlan { every_steps, keep_last, keep_every, on_error, export }
}

same_keys! {
    EvalTable in "eval" <=> EvalPlan { every_steps, batches, prompts }
}

fn decided_data(mut table: DataTable) -> Result<DataPlan, ConfigError> {
    let sources = decided_sources(need(table.sources.take(), "data", "sources")?)?;
    let eval_sources = match table.eval_sources.take() {
        Some(written) => decided_sources(written)?,
        None if sources.iter().any(|source| source.path == SAMPLE) => decided_sources(vec![SourceTable {
            path: Some(SAMPLE_VALIDATION.to_owned()),
            ..SourceTable::default()
        }])?,
        None => Vec::new(),
    };
    table.decided(sources, eval_sources)
}

fn decided_sources(written: Vec<SourceTable>) -> Result<Vec<SourcePlan>, ConfigError> {
    let decide_one = |source: SourceTable| {
        let mut table = SourceTable { path: None, name: source.path.clone(), weight: Some(1.0) };
        table.overlay(source);
        table.decided()
    };
    written.into_iter().map(decide_one).collect()
}
