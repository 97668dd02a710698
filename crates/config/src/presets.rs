//! Models by name. Names of the T5-Efficient family are parsed, the others listed.
//!
//! # Source
//! Sizes: the published configurations of T5, T5 v1.1, mT5, T5-Efficient (Tay et al. 2021) and
//! Switch; `-paper` presets are Table 9 of the Switch Transformer paper (GEGLU).

use crate::model::{Activation, Initialization, ModelConfig};
use crate::nearest::nearest;

/// Why a preset cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PresetError {
    /// No preset has this name.
    #[error(
        "unknown preset `{name}`; {}",
        nearest.as_ref().map_or(FAMILIES.to_owned(), |nearest| format!("did you mean `{nearest}`?"))
    )]
    Unknown {
        /// The name.
        name: String,
        /// The preset that it resembles, if any.
        nearest: Option<String>,
    },
    /// A part of a T5-Efficient name is not understood.
    #[error(
        "preset `{name}`: `{part}` is not one of nlN, elN, dlN, ffN, dmN, kvN, nhN, each at most once and with N > 0"
    )]
    BadPart {
        /// The name.
        name: String,
        /// The part between dashes.
        part: String,
    },
    /// The variant shares heads or ties keys to values.
    #[error(
        "preset `{name}`: `{part}` variants (shared heads, tied keys and values) have no public definition \
         that their weights could be checked against; leave `-{part}` out"
    )]
    NoDefinition {
        /// The name.
        name: String,
        /// `sh` or `skv`.
        part: String,
    },
}

/// What to say of names that resemble none.
const FAMILIES: &str = "names are `tiny` and those of the families `t5-`, `t5-v1.1-`, `t5-efficient-`, `mt5-` and \
     `switch-`, such as `switch-base-8`; docs/config.md lists all";

/// Which of the T5 recipes a model follows.
#[derive(Clone, Copy)]
enum Recipe {
    /// T5 v1.0 and Switch: ReLU, tied.
    ReluTied,
    /// T5 v1.1 and mT5: gated GELU, untied.
    GatedUntied,
    /// Switch with gated experts: gated GELU, tied.
    GatedTied,
}

use Recipe::{GatedTied, GatedUntied, ReluTied};

/// Layers of each stack, d_model, d_ff, d_kv, heads.
type Sizes = [usize; 5];

const VOCAB: usize = 32128;
const MT5_VOCAB: usize = 250_112;

const SMALL: Sizes = [6, 512, 2048, 64, 8];
const BASE: Sizes = [12, 768, 3072, 64, 12];
const LARGE: Sizes = [24, 1024, 4096, 64, 16];
const XL: Sizes = [24, 1024, 16384, 128, 32];
const XXL: Sizes = [24, 1024, 65536, 128, 128];

const V1_1_SMALL: Sizes = [8, 512, 1024, 64, 6];
const V1_1_BASE: Sizes = [12, 768, 2048, 64, 12];
const V1_1_LARGE: Sizes = [24, 1024, 2816, 64, 16];
const V1_1_XL: Sizes = [24, 2048, 5120, 64, 32];
const V1_1_XXL: Sizes = [24, 4096, 10240, 64, 64];

/// Name, recipe, sizes, vocabulary, experts, every n-th layer sparse.
type Listed = (&'static str, Recipe, Sizes, usize, usize, usize);

const LISTED: &[Listed] = &[
    ("tiny", ReluTied, [4, 256, 1024, 64, 4], VOCAB, 8, 2),
    ("t5-small", ReluTied, SMALL, VOCAB, 0, 0),
    ("t5-base", ReluTied, BASE, VOCAB, 0, 0),
    ("t5-large", ReluTied, LARGE, VOCAB, 0, 0),
    ("t5-xl", ReluTied, XL, VOCAB, 0, 0),
    ("t5-xxl", ReluTied, XXL, VOCAB, 0, 0),
    ("t5-v1.1-small", GatedUntied, V1_1_SMALL, VOCAB, 0, 0),
    ("t5-v1.1-base", GatedUntied, V1_1_BASE, VOCAB, 0, 0),
    ("t5-v1.1-large", GatedUntied, V1_1_LARGE, VOCAB, 0, 0),
    ("t5-v1.1-xl", GatedUntied, V1_1_XL, VOCAB, 0, 0),
    ("t5-v1.1-xxl", GatedUntied, V1_1_XXL, VOCAB, 0, 0),
    ("mt5-small", GatedUntied, V1_1_SMALL, MT5_VOCAB, 0, 0),
    ("mt5-base", GatedUntied, V1_1_BASE, MT5_VOCAB, 0, 0),
    ("mt5-large", GatedUntied, V1_1_LARGE, MT5_VOCAB, 0, 0),
    ("mt5-xl", GatedUntied, V1_1_XL, MT5_VOCAB, 0, 0),
    ("mt5-xxl", GatedUntied, V1_1_XXL, MT5_VOCAB, 0, 0),
    ("switch-base-8", ReluTied, BASE, VOCAB, 8, 2),
    ("switch-base-16", ReluTied, BASE, VOCAB, 16, 2),
    ("switch-base-32", ReluTied, BASE, VOCAB, 32, 2),
    ("switch-base-64", ReluTied, BASE, VOCAB, 64, 2),
    ("switch-base-128", ReluTied, BASE, VOCAB, 128, 2),
    ("switch-base-256", ReluTied, BASE, VOCAB, 256, 2),
    ("switch-large-128", ReluTied, LARGE, VOCAB, 128, 2),
    ("switch-xxl-128", GatedTied, V1_1_XXL, VOCAB, 128, 2),
    ("switch-c-2048", ReluTied, [15, 2080, 6144, 64, 32], VOCAB, 2048, 1),
    ("switch-base-128-paper", GatedTied, V1_1_BASE, VOCAB, 128, 2),
    ("switch-large-128-paper", GatedTied, V1_1_LARGE, VOCAB, 128, 2),
];

const EFFICIENT_PREFIX: &str = "t5-efficient-";

const EFFICIENT: &[(&str, Sizes)] = &[
    ("tiny", [4, 256, 1024, 64, 4]),
    ("mini", [4, 384, 1536, 64, 8]),
    ("small", SMALL),
    ("base", BASE),
    ("large", LARGE),
    ("xl", XL),
    ("xxl", XXL),
];

/// The model named `name`.
///
/// # Errors
/// [`PresetError::Unknown`] suggests the nearest name; names of the T5-Efficient family with parts
/// that are not understood, or that have no public definition, are refused with the part.
pub fn preset(name: &str) -> Result<ModelConfig, PresetError> {
    if let Some(variant) = name.strip_prefix(EFFICIENT_PREFIX)
        && let Some(model) = efficient(name, variant)?
    {
        return Ok(model);
    }
    LISTED.iter().find(|listed| listed.0 == name).map(model).ok_or_else(|| PresetError::Unknown {
        name: name.to_owned(),
        nearest: nearest(name, preset_names().iter().map(String::as_str)).map(str::to_owned),
    })
}

/// Every listed name, and every size of the T5-Efficient family without its variants.
pub fn preset_names() -> Vec<String> {
    let listed = LISTED.iter().map(|listed| listed.0.to_owned());
    listed.chain(EFFICIENT.iter().map(|(size, _)| format!("{EFFICIENT_PREFIX}{size}"))).collect()
}

/// The scale of fresh weights that goes with a rule: 0.1 for Switch, 1.0 for dense models and for HF's rule.
///
/// # Source
/// Switch Transformer, section 2.4 and Table 3.
pub fn default_init_scale(init: Initialization, num_experts: usize) -> f64 {
    if init == Initialization::Paper && num_experts > 0 { 0.1 } else { 1.0 }
}

fn model(listed: &Listed) -> ModelConfig {
    let &(_, recipe, [layers, d_model, d_ff, d_kv, num_heads], vocab_size, num_experts, every) = listed;
    let gated = !matches!(recipe, ReluTied);
    let tied = !matches!(recipe, GatedUntied);
    ModelConfig {
        vocab_size,
        d_model,
        d_ff,
        d_kv,
        num_heads,
        num_layers: layers,
        num_decoder_layers: layers,
        relative_attention_num_buckets: 32,
        relative_attention_max_distance: 128,
        activation: if gated { Activation::GeluTanh } else { Activation::Relu },
        gated,
        tie_word_embeddings: tied,
        scale_decoder_outputs: tied,
        layer_norm_epsilon: 1e-6,
        num_experts,
        encoder_expert_layer_every: every,
        decoder_expert_layer_every: every,
        router_bias: false,
        init: Initialization::Paper,
        init_scale: default_init_scale(Initialization::Paper, num_experts),
        pad_token_id: 0,
        eos_token_id: 1,
    }
}

/// `variant` is what follows `t5-efficient-`; `None` when its size is unknown.
fn efficient(name: &str, variant: &str) -> Result<Option<ModelConfig>, PresetError> {
    let mut parts = variant.split('-');
    let size = parts.next().unwrap_or_default();
    let Some((_, sizes)) = EFFICIENT.iter().find(|(known, _)| *known == size) else {
        return Ok(None);
    };
    let mut model = model(&("", ReluTied, *sizes, VOCAB, 0, 0));
    let mut seen = Vec::new();
    for part in parts {
        let bad = || PresetError::BadPart { name: name.to_owned(), part: part.to_owned() };
        let (tag, number) = part.split_at(part.find(|c: char| c.is_ascii_digit()).unwrap_or(part.len()));
        if matches!(tag, "sh" | "skv") {
            return Err(PresetError::NoDefinition { name: name.to_owned(), part: part.to_owned() });
        }
        let number: usize = number.parse().ok().filter(|&n| n > 0).ok_or_else(bad)?;
        if seen.contains(&tag) {
            return Err(bad());
        }
        seen.push(tag);
        match tag {
            "nl" => (model.num_layers, model.num_decoder_layers) = (number, number),
            "el" => model.num_layers = number,
            "dl" => model.num_decoder_layers = number,
            "ff" => model.d_ff = number,
            "dm" => model.d_model = number,
            "kv" => model.d_kv = number,
            "nh" => model.num_heads = number,
            _ => return Err(bad()),
        }
    }
    Ok(Some(model))
}
