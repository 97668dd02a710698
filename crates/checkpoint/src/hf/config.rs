//! `config.json`: architecture and routing, from and to the fields of transformers.
//!
//! # Source
//! `T5Config`, `MT5Config` and `SwitchTransformersConfig` of transformers 4.57 and 5.24; a field
//! that is missing has the default of its class.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use switchyard_config::plan::{CapacityRounding, RouterKind, RoutingConfig, RoutingSemantics};
use switchyard_config::{Activation, Initialization, ModelConfig, StackKind};

use super::fields::Fields;
use super::{Family, StoredDtype, TRANSFORMERS_VERSION};
use crate::error::CheckpointError;
use crate::files::read_json;

/// Larger sizes are slips, and their products could not be counted.
const MOST: u64 = 1 << 31;
const MOST_LAYERS: u64 = 1 << 12;
const MOST_EXPERTS: u64 = 1 << 14;
/// Of all layers together.
const MOST_EXPERTS_IN_ALL: usize = 1 << 22;

/// Vocabulary of the published mT5 models, which marks a model as one of them.
const MT5_VOCAB_SIZE: usize = 250_112;

/// What a `config.json` says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HfConfig {
    pub(super) family: Family,
    pub(super) model: ModelConfig,
    pub(super) routing: RoutingConfig,
    /// `tie_word_embeddings`, where it is written.
    pub(super) tie: Option<bool>,
    /// `scale_decoder_outputs`, where it is written.
    scale: Option<bool>,
}

impl HfConfig {
    /// Reads the file at `path`.
    pub(super) fn read(path: &Path) -> Result<Self, CheckpointError> {
        let map: Map<String, Value> = read_json(path)?;
        let fields = Fields::new(path, &map);
        if fields.has("quantization_config") {
            return Err(fields.wrong("quantization_config", "none: only float tensors can be read"));
        }
        let model_type = fields.text("model_type")?;
        let family = Family::ALL.into_iter().find(|family| Some(family.model_type()) == model_type);
        let family =
            family.ok_or_else(|| fields.wrong("model_type", "\"t5\", \"mt5\" or \"switch_transformers\""))?;
        let mut config = Self {
            family,
            model: read_model(&fields, family)?,
            routing: read_routing(&fields)?,
            tie: fields.flag("tie_word_embeddings")?,
            scale: fields.flag("scale_decoder_outputs")?,
        };
        config.decide_head(family == Family::Mt5);
        Ok(config)
    }

    /// Decides tying and scaling of the head, which depend on the tensors too: whether there is a
    /// head that differs from the embedding.
    ///
    /// transformers 5 saves untied T5 and mT5 models with `tie_word_embeddings: true`, so the
    /// field alone does not tell.
    pub(super) fn decide_head(&mut self, untied: bool) {
        self.model.tie_word_embeddings = !untied;
        self.model.scale_decoder_outputs =
            self.scale.unwrap_or(!(self.family == Family::Mt5 && untied) && self.tie.unwrap_or(true));
    }
}

fn read_model(fields: &Fields<'_>, family: Family) -> Result<ModelConfig, CheckpointError> {
    // Defaults of T5, mT5 and Switch.
    let size = |key: &str, defaults: [usize; 3], most: u64| -> Result<usize, CheckpointError> {
        match fields.count(key, most)?.unwrap_or(defaults[family as usize]) {
            0 => Err(fields.wrong(key, "at least 1")),
            size => Ok(size),
        }
    };
    let num_layers = size("num_layers", [6, 8, 12], MOST_LAYERS)?;
    // Switch has a default of its own, and takes the encoder's layers only where it says null.
    let as_encoder = family != Family::Switch || fields.has("num_decoder_layers");
    let decoder_default = if as_encoder { num_layers } else { 12 };
    let num_decoder_layers = size("num_decoder_layers", [decoder_default; 3], MOST_LAYERS)?;
    let (activation, gated) = read_activation(fields, family)?;
    let mut model = ModelConfig {
        vocab_size: size("vocab_size", [32128, MT5_VOCAB_SIZE, 32128], MOST)?,
        d_model: size("d_model", [512, 512, 768], MOST)?,
        d_ff: size("d_ff", [2048, 1024, 2048], MOST)?,
        d_kv: size("d_kv", [64; 3], MOST)?,
        num_heads: size("num_heads", [8, 6, 12], MOST)?,
        num_layers,
        num_decoder_layers,
        relative_attention_num_buckets: size("relative_attention_num_buckets", [32; 3], MOST)?,
        relative_attention_max_distance: size("relative_attention_max_distance", [128; 3], MOST)?,
        activation,
        gated,
        // Decided with the tensors.
        tie_word_embeddings: true,
        scale_decoder_outputs: true,
        layer_norm_epsilon: fields.number("layer_norm_epsilon", 1e-6)?,
        num_experts: 0,
        encoder_expert_layer_every: 0,
        decoder_expert_layer_every: 0,
        router_bias: false,
        init: Initialization::Hf,
        init_scale: fields.number("initializer_factor", 1.0)?,
        pad_token_id: fields.count("pad_token_id", MOST)?.unwrap_or(0) as u32,
        eos_token_id: fields.count("eos_token_id", MOST)?.unwrap_or(1) as u32,
    };
    if family == Family::Switch {
        read_experts(fields, &mut model)?;
    }
    check_model(fields, &model)?;
    Ok(model)
}

fn check_model(fields: &Fields<'_>, model: &ModelConfig) -> Result<(), CheckpointError> {
    let buckets = model.relative_attention_num_buckets;
    if buckets < 4 || !buckets.is_multiple_of(2) {
        return Err(fields.wrong("relative_attention_num_buckets", "an even number from 4"));
    }
    if model.relative_attention_max_distance <= buckets / 2 {
        let expected = format!("more than half of the {buckets} relative_attention_num_buckets");
        return Err(fields.wrong("relative_attention_max_distance", expected));
    }
    for (key, id) in [("pad_token_id", model.pad_token_id), ("eos_token_id", model.eos_token_id)] {
        if id as usize >= model.vocab_size {
            return Err(fields.wrong(key, format!("an id below vocab_size {}", model.vocab_size)));
        }
    }
    let pad = model.pad_token_id;
    match fields.count("decoder_start_token_id", MOST)? {
        Some(start) if start != pad as usize => {
            Err(fields
                .wrong("decoder_start_token_id", format!("pad_token_id {pad}, with which decoding starts")))
        }
        _ => Ok(()),
    }
}

/// Activation and gating: `feed_forward_proj` gives both, but where `dense_act_fn` or
/// `is_gated_act` are written too, transformers follows those.
fn read_activation(fields: &Fields<'_>, family: Family) -> Result<(Activation, bool), CheckpointError> {
    let projection = match family {
        Family::T5 => fields.text("feed_forward_proj")?.unwrap_or("relu"),
        Family::Mt5 => fields.text("feed_forward_proj")?.unwrap_or("gated-gelu"),
        Family::Switch => "relu",
    };
    let (derived, gated) = match projection.strip_prefix("gated-") {
        // transformers means the tanh approximation by this spelling alone.
        Some("gelu") => ("gelu_new", true),
        Some(name) => (name, true),
        None => (projection, false),
    };
    let gated = if family == Family::Switch { false } else { fields.flag("is_gated_act")?.unwrap_or(gated) };
    let written = fields.text("dense_act_fn")?;
    let key = if written.is_some() { "dense_act_fn" } else { "feed_forward_proj" };
    let activation = match written.unwrap_or(derived) {
        "relu" => Activation::Relu,
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "gelu" | "gelu_python" => Activation::Gelu,
        "silu" | "swish" => Activation::Silu,
        _ => return Err(fields.wrong(key, "the activation relu, gelu_new, gelu_pytorch_tanh, gelu or silu")),
    };
    Ok((activation, gated))
}

fn read_experts(fields: &Fields<'_>, model: &mut ModelConfig) -> Result<(), CheckpointError> {
    let num_experts = fields.count("num_experts", MOST_EXPERTS)?.unwrap_or(8);
    if num_experts == 0 {
        return Err(fields.wrong("num_experts", "at least 1"));
    }
    if (model.num_layers + model.num_decoder_layers) * num_experts > MOST_EXPERTS_IN_ALL {
        return Err(
            fields.wrong("num_experts", format!("at most {MOST_EXPERTS_IN_ALL} in all layers together"))
        );
    }
    // The step wins over the number of layers from which it was once derived. With 0 sparse layers
    // transformers derives a step of all layers, which leaves layer 1 sparse.
    let every = |step_key: &str, count_key: &str, layers: usize| -> Result<usize, CheckpointError> {
        let count = fields.count(count_key, MOST_LAYERS)?.unwrap_or(3);
        let derived = layers.checked_div(count).unwrap_or(layers);
        Ok(fields.count(step_key, MOST_LAYERS)?.unwrap_or(derived))
    };
    model.num_experts = num_experts;
    model.encoder_expert_layer_every =
        every("encoder_sparse_step", "num_sparse_encoder_layers", model.num_layers)?;
    model.decoder_expert_layer_every =
        every("decoder_sparse_step", "num_sparse_decoder_layers", model.num_decoder_layers)?;
    model.router_bias = fields.flag("router_bias")?.unwrap_or(false);
    if !is_sparse(model) {
        // The plain form of a dense model.
        (model.num_experts, model.router_bias) = (0, false);
        (model.encoder_expert_layer_every, model.decoder_expert_layer_every) = (0, 0);
    }
    Ok(())
}

/// The rules of transformers; for a dense model they stand for nothing.
fn read_routing(fields: &Fields<'_>) -> Result<RoutingConfig, CheckpointError> {
    let router_jitter_noise = fields.number("router_jitter_noise", 0.01)?;
    if router_jitter_noise >= 1.0 {
        return Err(fields.wrong("router_jitter_noise", "a number below 1"));
    }
    Ok(RoutingConfig {
        router: RouterKind::Top1,
        semantics: RoutingSemantics::Hf,
        capacity_factor: 1.25,
        eval_capacity_factor: 2.0,
        min_expert_capacity: 4,
        capacity_rounding: CapacityRounding::Ceil,
        expert_capacity: fields.count("expert_capacity", MOST)?.unwrap_or(64),
        router_jitter_noise,
        load_balancing_loss_coef: fields.number("router_aux_loss_coef", 0.001)?,
        router_z_loss_coef: fields.number("router_z_loss_coef", 0.001)?,
        group_rows: 0,
        force_balanced: false,
    })
}

/// The class of transformers that computes what `model` computes.
///
/// # Errors
/// [`CheckpointError::NotRepresentable`] names the first part that no class can do.
pub(super) fn representable(model: &ModelConfig, routing: &RoutingConfig) -> Result<Family, CheckpointError> {
    let sparse = is_sparse(model);
    let mt5 = model.vocab_size == MT5_VOCAB_SIZE && model.gated && !model.tie_word_embeddings;
    let scale_with_tie =
        "train with model.scale_decoder_outputs equal to model.tie_word_embeddings to export";
    let refusals = [
        (
            sparse && routing.router == RouterKind::Top2,
            "the top2 router",
            "train with routing.router = \"top1\" to export",
        ),
        (
            sparse && routing.router == RouterKind::ExpertChoice,
            "the expert_choice router",
            "train with routing.router = \"top1\" to export",
        ),
        (sparse && routing.force_balanced, "round-robin routing", "turn debug.force_balanced_routing off"),
        (sparse && model.gated, "gated experts", "train with model.gated = false to export"),
        (
            model.tie_word_embeddings && !model.scale_decoder_outputs,
            "a tied head that does not scale its input",
            scale_with_tie,
        ),
        (
            !model.tie_word_embeddings && model.scale_decoder_outputs,
            "an untied head that scales its input",
            scale_with_tie,
        ),
    ];
    match refusals.into_iter().find(|(refused, ..)| *refused) {
        Some((_, what, mend)) => Err(CheckpointError::NotRepresentable { what, mend }),
        None if sparse => Ok(Family::Switch),
        None => Ok(if mt5 { Family::Mt5 } else { Family::T5 }),
    }
}

/// Whether any layer has experts.
fn is_sparse(model: &ModelConfig) -> bool {
    [StackKind::Encoder, StackKind::Decoder].iter().any(|&stack| !model.sparse_layers(stack).is_empty())
}

/// The fields of `config.json`, every one that the class has.
///
/// `expert_capacity` is the fixed capacity of a sparse model.
pub(super) fn write(
    family: Family,
    model: &ModelConfig,
    routing: &RoutingConfig,
    expert_capacity: Option<usize>,
    dtype: StoredDtype,
) -> BTreeMap<&'static str, Value> {
    let dtype = match dtype {
        StoredDtype::F32 => "float32",
        StoredDtype::Bf16 => "bfloat16",
        StoredDtype::F16 => "float16",
    };
    let factor = if model.init == Initialization::Hf { model.init_scale } else { 1.0 };
    let mut fields = BTreeMap::from([
        ("architectures", json!([family.architecture()])),
        ("d_ff", json!(model.d_ff)),
        ("d_kv", json!(model.d_kv)),
        ("d_model", json!(model.d_model)),
        ("decoder_start_token_id", json!(model.pad_token_id)),
        ("dropout_rate", json!(0.1)),
        ("dtype", json!(dtype)),
        ("eos_token_id", json!(model.eos_token_id)),
        ("initializer_factor", json!(factor)),
        ("is_encoder_decoder", json!(true)),
        ("layer_norm_epsilon", json!(model.layer_norm_epsilon)),
        ("model_type", json!(family.model_type())),
        ("num_decoder_layers", json!(model.num_decoder_layers)),
        ("num_heads", json!(model.num_heads)),
        ("num_layers", json!(model.num_layers)),
        ("pad_token_id", json!(model.pad_token_id)),
        ("relative_attention_max_distance", json!(model.relative_attention_max_distance)),
        ("relative_attention_num_buckets", json!(model.relative_attention_num_buckets)),
        ("tie_word_embeddings", json!(model.tie_word_embeddings)),
        ("transformers_version", json!(TRANSFORMERS_VERSION)),
        ("use_cache", json!(true)),
        ("vocab_size", json!(model.vocab_size)),
    ]);
    if !model.tie_word_embeddings {
        // transformers 4 reads the one, transformers 5 the other.
        fields.insert("scale_decoder_outputs", json!(false));
    }
    match expert_capacity {
        Some(capacity) => fields.extend(expert_fields(model, routing, capacity)),
        None => fields.extend(dense_fields(family, model)),
    }
    fields
}

fn dense_fields(family: Family, model: &ModelConfig) -> BTreeMap<&'static str, Value> {
    let (activation, projection) = match (model.activation, model.gated) {
        (Activation::GeluTanh, true) => ("gelu_new", "gated-gelu"),
        // "gated-gelu" is taken by the approximation; this is the exact function's other name.
        (Activation::Gelu, true) => ("gelu_python", "gated-gelu_python"),
        (Activation::Relu, true) => ("relu", "gated-relu"),
        (Activation::Silu, true) => ("silu", "gated-silu"),
        (activation, false) => (activation_name(activation), activation_name(activation)),
    };
    let mut fields = BTreeMap::from([
        ("classifier_dropout", json!(0.0)),
        ("dense_act_fn", json!(activation)),
        ("feed_forward_proj", json!(projection)),
        ("is_gated_act", json!(model.gated)),
    ]);
    if family == Family::Mt5 {
        fields.insert("tokenizer_class", json!("T5Tokenizer"));
    }
    fields
}

fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Relu => "relu",
        Activation::GeluTanh => "gelu_new",
        Activation::Gelu => "gelu",
        Activation::Silu => "silu",
    }
}

fn expert_fields(
    model: &ModelConfig,
    routing: &RoutingConfig,
    expert_capacity: usize,
) -> BTreeMap<&'static str, Value> {
    // The count must not be 0, whatever the step: readers without the step divide by it.
    let sparse_layers = |stack| model.sparse_layers(stack).len().max(1);
    BTreeMap::from([
        ("add_router_probs", json!(false)),
        ("decoder_sparse_step", json!(model.decoder_expert_layer_every)),
        ("dense_act_fn", json!(activation_name(model.activation))),
        ("encoder_sparse_step", json!(model.encoder_expert_layer_every)),
        ("expert_capacity", json!(expert_capacity)),
        ("num_experts", json!(model.num_experts)),
        ("num_sparse_decoder_layers", json!(sparse_layers(StackKind::Decoder))),
        ("num_sparse_encoder_layers", json!(sparse_layers(StackKind::Encoder))),
        ("router_aux_loss_coef", json!(routing.load_balancing_loss_coef)),
        ("router_bias", json!(model.router_bias)),
        ("router_dtype", json!("float32")),
        ("router_ignore_padding_tokens", json!(false)),
        ("router_jitter_noise", json!(routing.router_jitter_noise)),
        ("router_z_loss_coef", json!(routing.router_z_loss_coef)),
    ])
}

/// `generation_config.json`.
pub(super) fn generation(model: &ModelConfig) -> Value {
    json!({
        "_from_model_config": true,
        "decoder_start_token_id": model.pad_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
        "transformers_version": TRANSFORMERS_VERSION,
    })
}
