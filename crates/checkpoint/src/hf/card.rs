//! The model card of an export: what the files themselves do not say.

use switchyard_config::plan::{RoutingConfig, RoutingSemantics};
use switchyard_config::{ModelConfig, StackKind};

use super::{ExportOptions, ExportSummary};

/// `README.md`.
pub(super) fn write(
    model: &ModelConfig,
    routing: &RoutingConfig,
    options: &ExportOptions,
    summary: &ExportSummary,
) -> String {
    let title = if summary.expert_capacity.is_some() { "Switch Transformer" } else { "T5" };
    let sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text2text-generation\n---\n".to_owned(),
        format!("# {title}, {} parameters\n", grouped(summary.num_parameters)),
        format!("Exported by Switchyard {}.\n", env!("CARGO_PKG_VERSION")),
        sizes(model, options, summary),
        usage(options),
        notes(model, routing, options, summary),
    ];
    sections.into_iter().filter(|section| !section.is_empty()).collect::<Vec<_>>().join("\n")
}

fn sizes(model: &ModelConfig, options: &ExportOptions, summary: &ExportSummary) -> String {
    let mut rows = vec![
        ("model_type", summary.model_type.to_owned()),
        ("encoder / decoder layers", format!("{} / {}", model.num_layers, model.num_decoder_layers)),
        ("d_model / d_ff", format!("{} / {}", model.d_model, model.d_ff)),
        ("heads x d_kv", format!("{} x {}", model.num_heads, model.d_kv)),
        ("vocab_size", model.vocab_size.to_string()),
        ("stored as", options.dtype.name().to_owned()),
    ];
    if summary.expert_capacity.is_some() {
        rows.push(("experts a sparse layer", model.num_experts.to_string()));
        for (label, stack) in
            [("sparse encoder layers", StackKind::Encoder), ("sparse decoder layers", StackKind::Decoder)]
        {
            let layers: Vec<String> = model.sparse_layers(stack).iter().map(usize::to_string).collect();
            rows.push((label, if layers.is_empty() { "none".to_owned() } else { layers.join(", ") }));
        }
    }
    let rows: String = rows.into_iter().map(|(label, value)| format!("| {label} | {value} |\n")).collect();
    format!("| | |\n|---|---|\n{rows}")
}

fn usage(options: &ExportOptions) -> String {
    let tokenizer = !options.tokenizer_files.is_empty();
    let import = if tokenizer { "AutoModelForSeq2SeqLM, AutoTokenizer" } else { "AutoModelForSeq2SeqLM" };
    let load = if tokenizer { "tokenizer = AutoTokenizer.from_pretrained(\".\")\n" } else { "" };
    format!(
        "## Use\n\n```python\nfrom transformers import {import}\n\n\
         model = AutoModelForSeq2SeqLM.from_pretrained(\".\")\n{load}```\n"
    )
}

fn notes(
    model: &ModelConfig,
    routing: &RoutingConfig,
    options: &ExportOptions,
    summary: &ExportSummary,
) -> String {
    let mut notes = String::new();
    if let Some(capacity) = summary.expert_capacity
        && routing.semantics == RoutingSemantics::Paper
    {
        notes += &format!(
            "`expert_capacity` = {capacity} slots of an expert in each row: the capacity of a row of {} tokens \
             under capacity factor {}. transformers does not adapt it to the length of a row, and counts \
             padding; where tokens are dropped, its outputs differ from those in training.\n",
            options.row_tokens, routing.eval_capacity_factor
        );
    }
    if model.num_decoder_layers > model.num_layers {
        notes += "The decoder has more layers than the encoder: call `generate` with `use_cache=False`.\n";
    }
    if notes.is_empty() { notes } else { format!("## Notes\n\n{notes}") }
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
