//! Which values are possible and which fit each other: one function a rule.
//!
//! Every rule looks at the plan alone and names the keys that it weighed; where they came from is
//! added here once. Rules that need the tokenizer or the text are the data crate's.

mod sizes;

use std::collections::BTreeMap;

use crate::error::{ConfigError, ErrorKind};
use crate::keys::Word;
use crate::mesh;
use crate::model::StackKind;
use crate::plan::{
    AccumulationDtype, PrecisionMode, RouterKind, RoutingSemantics, RunPlan, ScheduleKind, SourcePlan,
};
use crate::provenance::{Origin, Provenance};
use crate::schema::RunConfig;

/// A broken rule: what is wrong, the keys concerned (the first is the one to look at), the mend.
pub(crate) struct Conflict {
    pub(crate) message: String,
    pub(crate) keys: Vec<&'static str>,
    pub(crate) help: String,
}

type Rule = fn(&RunPlan) -> Result<(), Conflict>;

/// In an order in which each rule may rely on those before it.
const RULES: &[Rule] = &[
    name_is_a_directory_name,
    sizes::counts_are_positive,
    sizes::counts_are_bounded,
    numbers_are_in_range,
    sizes::model_is_countable,
    sizes::batches_fit_in_memory,
    sizes::samples_are_countable,
    relative_buckets_cover_the_distance,
    experts_and_sparse_layers_go_together,
    micro_batches_divide_the_batch,
    groups_divide_the_micro_batch,
    mesh::axes_divide_the_model,
    mesh::timeout_is_positive,
    sums_are_not_narrower_than_their_gradients,
    tf32_is_for_float32_models,
    hf_semantics_are_consistent,
    fixed_capacity_needs_hf_semantics,
    warmup_fits_the_run,
    tokenizer_fits_the_vocabulary,
    sources_are_distinct,
    evaluation_text_is_held_out,
];

/// Checks every rule; the first that is broken is reported with the origins of its keys.
pub(crate) fn validate(plan: &RunPlan, provenance: &Provenance) -> Result<(), ConfigError> {
    RULES.iter().try_for_each(|rule| rule(plan).map_err(|conflict| located(conflict, plan, provenance)))
}

pub(crate) fn located(conflict: Conflict, plan: &RunPlan, provenance: &Provenance) -> ConfigError {
    let values: BTreeMap<String, String> = RunConfig::of(plan).entries().into_iter().collect();
    let in_file = |key: &&str| matches!(provenance.origin(key), Origin::File(_));
    let placed = conflict.keys.iter().copied().find(in_file);
    let mut error = ConfigError::new(ErrorKind::Conflict { message: conflict.message }).help(conflict.help);
    if let Some(key) = placed {
        error = error.at(provenance.origin(key));
    }
    for key in conflict.keys.into_iter().filter(|key| Some(*key) != placed) {
        let value = values.get(key).map_or("", String::as_str);
        error = error.note(match provenance.origin(key) {
            Origin::Default => format!("{key} = {value} is the default"),
            origin => format!("{key} = {value} came from {origin}"),
        });
    }
    error
}

fn name_is_a_directory_name(plan: &RunPlan) -> Result<(), Conflict> {
    let name = plan.name.as_str();
    let unfit = name.is_empty()
        || name.starts_with('.')
        || name.contains(|c: char| c == '/' || c == '\\' || c.is_control());
    if !unfit {
        return Ok(());
    }
    Err(Conflict {
        message: format!("name = {name:?} cannot be the name of a directory"),
        keys: vec!["name"],
        help: "use letters, digits, `-` and `_`".to_owned(),
    })
}

/// Numbers that a key may hold; NaN is in none of them.
#[derive(Clone, Copy)]
enum Range {
    /// Finite and above 0.
    Positive,
    /// Finite and at least 0.
    NotNegative,
    /// At least 0 and below 1.
    Rate,
    /// As [`Self::Rate`], in float32 too, in which what is left is divided by 1 less the rate.
    Dropout,
    /// Above 0 and below 1.
    Share,
    /// From 0 to 1.
    Fraction,
    /// Finite and at least 1.
    AtLeastOne,
}

impl Range {
    fn contains(self, number: f64) -> bool {
        number.is_finite()
            && match self {
                Self::Positive => number > 0.0,
                Self::NotNegative => number >= 0.0,
                Self::Rate => (0.0..1.0).contains(&number),
                Self::Dropout => number >= 0.0 && (number as f32) < 1.0,
                Self::Share => number > 0.0 && number < 1.0,
                Self::Fraction => (0.0..=1.0).contains(&number),
                Self::AtLeastOne => number >= 1.0,
            }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Positive => "finite and greater than 0",
            Self::NotNegative => "finite and not negative",
            Self::Rate => "at least 0 and below 1",
            Self::Dropout => "at least 0 and below 1, also when rounded to float32",
            Self::Share => "greater than 0 and below 1",
            Self::Fraction => "between 0 and 1",
            Self::AtLeastOne => "finite and at least 1",
        }
    }
}

fn numbers_are_in_range(plan: &RunPlan) -> Result<(), Conflict> {
    use Range::{AtLeastOne, Dropout, Fraction, NotNegative, Positive, Rate, Share};
    let (routing, optimizer, trainer) = (&plan.routing, &plan.optimizer, &plan.trainer);
    let numbers = [
        ("model.layer_norm_epsilon", plan.model.layer_norm_epsilon, Positive),
        ("model.init_scale", plan.model.init_scale, Positive),
        ("routing.capacity_factor", routing.capacity_factor, Positive),
        ("routing.eval_capacity_factor", routing.eval_capacity_factor, Positive),
        ("routing.router_jitter_noise", routing.router_jitter_noise, Rate),
        ("routing.load_balancing_loss_coef", routing.load_balancing_loss_coef, NotNegative),
        ("routing.router_z_loss_coef", routing.router_z_loss_coef, NotNegative),
        ("optimizer.learning_rate", optimizer.learning_rate, Positive),
        ("optimizer.clip_norm", optimizer.clip_norm, NotNegative),
        ("optimizer.beta1", optimizer.beta1, Rate),
        ("optimizer.beta2", optimizer.beta2, Rate),
        ("optimizer.eps", optimizer.eps, Positive),
        ("optimizer.eps2", optimizer.eps2, Positive),
        ("optimizer.weight_decay", optimizer.weight_decay, NotNegative),
        ("optimizer.decay_exponent", optimizer.decay_exponent, Positive),
        ("optimizer.update_clip", optimizer.update_clip, Positive),
        ("schedule.final_fraction", plan.schedule.final_fraction, Fraction),
        ("data.mixture_temperature", plan.data.mixture_temperature, Positive),
        ("data.noise_density", plan.data.noise_density, Share),
        ("data.mean_noise_span_length", plan.data.mean_noise_span_length, AtLeastOne),
        ("trainer.dropout_rate", trainer.dropout_rate, Dropout),
        ("trainer.expert_dropout", trainer.expert_dropout, Dropout),
        ("trainer.z_loss", trainer.z_loss, NotNegative),
    ];
    match numbers.into_iter().find(|(_, number, range)| !range.contains(*number)) {
        None => Ok(()),
        Some((key, number, range)) => Err(Conflict {
            message: format!("{key} = {number} must be {}", range.words()),
            keys: vec![key],
            help: format!("set {key} to a number that is {}", range.words()),
        }),
    }
}

fn relative_buckets_cover_the_distance(plan: &RunPlan) -> Result<(), Conflict> {
    let buckets = plan.model.relative_attention_num_buckets;
    let distance = plan.model.relative_attention_max_distance;
    let keys = vec!["model.relative_attention_num_buckets", "model.relative_attention_max_distance"];
    if buckets < 4 || !buckets.is_multiple_of(2) {
        return Err(Conflict {
            message: format!("model.relative_attention_num_buckets = {buckets} must be even and at least 4"),
            keys,
            help: "half of the buckets look back, half ahead; T5 uses 32".to_owned(),
        });
    }
    if distance <= buckets / 2 {
        return Err(Conflict {
            message: format!(
                "model.relative_attention_max_distance = {distance} must be more than half of \
                 model.relative_attention_num_buckets = {buckets}"
            ),
            keys,
            help: "the first half of the buckets holds one distance each; T5 uses 32 buckets up to 128"
                .to_owned(),
        });
    }
    Ok(())
}

fn experts_and_sparse_layers_go_together(plan: &RunPlan) -> Result<(), Conflict> {
    let model = &plan.model;
    let keys =
        vec!["model.num_experts", "model.encoder_expert_layer_every", "model.decoder_expert_layer_every"];
    let sparse =
        [StackKind::Encoder, StackKind::Decoder].iter().any(|&stack| !model.sparse_layers(stack).is_empty());
    match model.num_experts {
        0 => Ok(()),
        1 => Err(Conflict {
            message: "model.num_experts = 1 leaves the router nothing to choose".to_owned(),
            keys,
            help: "use 2 or more, or 0 for a dense model".to_owned(),
        }),
        _ if sparse => Ok(()),
        experts => Err(Conflict {
            message: format!("model.num_experts = {experts}, but no layer has experts"),
            keys,
            help: "set model.expert_layer_every = 2 for every second layer (which needs two layers in a stack), \
                   or model.num_experts = 0"
                .to_owned(),
        }),
    }
}

fn micro_batches_divide_the_batch(plan: &RunPlan) -> Result<(), Conflict> {
    let (whole, part) = (plan.data.batch_rows, plan.data.micro_batch_rows);
    if whole.is_multiple_of(part) {
        return Ok(());
    }
    Err(Conflict {
        message: format!("data.batch_rows = {whole} is not a multiple of data.micro_batch_rows = {part}"),
        keys: vec!["data.micro_batch_rows", "data.batch_rows"],
        help: format!("data.micro_batch_rows = {} fits", nearest_divisor(whole, part)),
    })
}

fn groups_divide_the_micro_batch(plan: &RunPlan) -> Result<(), Conflict> {
    let (whole, part) = (plan.data.micro_batch_rows, plan.routing.group_rows);
    if part == 0 || whole.is_multiple_of(part) {
        return Ok(());
    }
    Err(Conflict {
        message: format!("data.micro_batch_rows = {whole} is not a multiple of routing.group_rows = {part}"),
        keys: vec!["routing.group_rows", "data.micro_batch_rows"],
        help: format!("routing.group_rows = {} fits", nearest_divisor(whole, part)),
    })
}

/// The divisor of `whole` that is nearest to `part`, the smaller of two equally near.
fn nearest_divisor(whole: usize, part: usize) -> usize {
    let part = part.min(whole);
    let below = (1..=part).rev().find(|n| whole.is_multiple_of(*n)).unwrap_or(1);
    let above = (part..=whole).take(part - below).find(|n| whole.is_multiple_of(*n));
    above.unwrap_or(below)
}

fn sums_are_not_narrower_than_their_gradients(plan: &RunPlan) -> Result<(), Conflict> {
    if plan.accumulation == AccumulationDtype::Fp32 || plan.precision != PrecisionMode::Fp32 {
        return Ok(());
    }
    Err(Conflict {
        message: "precision.accumulation_dtype = \"bf16\" would round the sums of float32 gradients"
            .to_owned(),
        keys: vec!["precision.accumulation_dtype", "precision.mode"],
        help: "leave it out, or set precision.mode = \"selective\", whose gradients are bfloat16".to_owned(),
    })
}

fn tf32_is_for_float32_models(plan: &RunPlan) -> Result<(), Conflict> {
    if !plan.allow_tf32 || plan.precision == PrecisionMode::Fp32 {
        return Ok(());
    }
    let mode = Word(&plan.precision);
    Err(Conflict {
        message: format!(
            "precision.allow_tf32 = true is for precision.mode = \"fp32\" only: what \"{mode}\" keeps in \
             float32, above all a router, is meant to be exact"
        ),
        keys: vec!["precision.allow_tf32", "precision.mode"],
        help: "leave it out, or set precision.mode = \"fp32\"".to_owned(),
    })
}

fn hf_semantics_are_consistent(plan: &RunPlan) -> Result<(), Conflict> {
    let routing = &plan.routing;
    if routing.semantics != RoutingSemantics::Hf {
        return Ok(());
    }
    let (key, message, help) = if routing.router != RouterKind::Top1 {
        let message = "routing.semantics = \"hf\" knows only routing.router = \"top1\"";
        ("routing.router", message.to_owned(), "use routing.semantics = \"paper\", or the top1 router")
    } else if routing.expert_capacity == 0 {
        let message = "routing.semantics = \"hf\" needs routing.expert_capacity of at least 1";
        ("routing.expert_capacity", message.to_owned(), "Hugging Face's default is 64")
    } else if routing.group_rows > 1 {
        let message = format!(
            "routing.semantics = \"hf\" has one row a group, not routing.group_rows = {}",
            routing.group_rows
        );
        ("routing.group_rows", message, "leave routing.group_rows out, or use routing.semantics = \"paper\"")
    } else {
        return Ok(());
    };
    Err(Conflict { message, keys: vec![key, "routing.semantics"], help: help.to_owned() })
}

fn fixed_capacity_needs_hf_semantics(plan: &RunPlan) -> Result<(), Conflict> {
    let routing = &plan.routing;
    if routing.semantics == RoutingSemantics::Hf || routing.expert_capacity == 0 {
        return Ok(());
    }
    Err(Conflict {
        message: format!(
            "routing.expert_capacity = {} has no effect with routing.semantics = \"paper\"",
            routing.expert_capacity
        ),
        keys: vec!["routing.expert_capacity", "routing.semantics"],
        help: "set routing.capacity_factor instead, or routing.semantics = \"hf\"".to_owned(),
    })
}

fn warmup_fits_the_run(plan: &RunPlan) -> Result<(), Conflict> {
    let schedule = &plan.schedule;
    if schedule.kind == ScheduleKind::InverseSqrt || schedule.warmup_steps <= schedule.total_steps {
        return Ok(());
    }
    Err(Conflict {
        message: format!(
            "schedule.warmup_steps = {} is more than schedule.total_steps = {}: the learning rate would never \
             reach its peak",
            schedule.warmup_steps, schedule.total_steps
        ),
        keys: vec!["schedule.warmup_steps", "schedule.total_steps"],
        help: format!("a warm-up of {} steps is a common choice", schedule.total_steps.div_ceil(20)),
    })
}

fn tokenizer_fits_the_vocabulary(plan: &RunPlan) -> Result<(), Conflict> {
    let (pieces, vocabulary) = (plan.data.train_tokenizer_vocab_size, plan.model.vocab_size);
    if pieces < vocabulary {
        return Ok(());
    }
    Err(Conflict {
        message: format!(
            "data.train_tokenizer_vocab_size = {pieces} leaves no id for sentinels in model.vocab_size = {vocabulary}"
        ),
        keys: vec!["data.train_tokenizer_vocab_size", "model.vocab_size"],
        help: "make model.vocab_size larger by the number of sentinels, 100, or train fewer pieces"
            .to_owned(),
    })
}

fn sources_are_distinct(plan: &RunPlan) -> Result<(), Conflict> {
    if plan.data.sources.is_empty() {
        return Err(Conflict {
            message: "data.sources is empty: there is nothing to train on".to_owned(),
            keys: vec!["data.sources"],
            help: "name a source, such as data.sources = [{ path = \"c4/en/c4-train.*.json.gz\" }]"
                .to_owned(),
        });
    }
    for (key, sources) in
        [("data.sources", &plan.data.sources), ("data.eval_sources", &plan.data.eval_sources)]
    {
        for (index, source) in sources.iter().enumerate() {
            if let Some((message, help)) = fault_of_source(key, source, &sources[..index]) {
                return Err(Conflict { message, keys: vec![key], help: help.to_owned() });
            }
        }
    }
    Ok(())
}

fn fault_of_source(key: &str, source: &SourcePlan, earlier: &[SourcePlan]) -> Option<(String, &'static str)> {
    let SourcePlan { path, name, weight } = source;
    if path.is_empty() || name.is_empty() {
        let message = format!("{key} holds a source with an empty path or name");
        return Some((message, "write the path of a file, a directory or a glob"));
    }
    if !Range::Positive.contains(*weight) {
        let message = format!("{key}: the weight {weight} of {path:?} must be {}", Range::Positive.words());
        return Some((message, "leave a source out to give it no share"));
    }
    let taken = earlier.iter().any(|other| other.name == *name);
    taken.then(|| (format!("{key} holds two sources named {name:?}"), "give each source a `name` of its own"))
}

fn evaluation_text_is_held_out(plan: &RunPlan) -> Result<(), Conflict> {
    let data = &plan.data;
    let shared =
        data.sources.iter().find(|source| data.eval_sources.iter().any(|held| held.path == source.path));
    match shared {
        None => Ok(()),
        Some(source) => Err(Conflict {
            message: format!("{:?} is both in data.sources and in data.eval_sources", source.path),
            keys: vec!["data.eval_sources", "data.sources"],
            help: "evaluate on text that the model is not trained on".to_owned(),
        }),
    }
}
