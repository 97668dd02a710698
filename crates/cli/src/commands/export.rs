//! `switchyard export`: a Hugging Face directory.

use std::path::Path;

use anyhow::Context;
use switchyard_checkpoint::hf::{ExportOptions, ExportSummary, StoredDtype, export};
use switchyard_checkpoint::{ModelDirectory, open_model};

use super::output;
use crate::Outcome;
use crate::args::{ExportArguments, ExportDtype};

/// Row length assumed for a model that does not say what it was trained with.
const ROW_TOKENS: usize = 512;

pub(crate) fn run(arguments: &ExportArguments) -> anyhow::Result<Outcome> {
    let max_shard_bytes = arguments.max_shard_size.as_deref().map(parse_size).transpose()?;
    let dtype = match arguments.dtype {
        ExportDtype::Fp32 => StoredDtype::F32,
        ExportDtype::Bf16 => StoredDtype::Bf16,
        ExportDtype::Fp16 => StoredDtype::F16,
    };
    let model = open_model(&arguments.model)?;
    let summary = write(&model, &arguments.out, dtype, max_shard_bytes, arguments.inputs_length)?;
    output::line(format!(
        "{}: {} tensors, {} in {} file{}",
        arguments.out.display(),
        output::grouped(summary.num_tensors as u64),
        output::bytes(summary.tensor_bytes),
        summary.shards.len(),
        if summary.shards.len() == 1 { "" } else { "s" },
    ))?;
    if let Some(capacity) = summary.expert_capacity {
        output::line(format!("expert_capacity {capacity}: an expert takes so many tokens of each row"))?;
    }
    Ok(Outcome::Done)
}

/// Writes `model` to `out`.
pub(crate) fn write(
    model: &ModelDirectory,
    out: &Path,
    dtype: StoredDtype,
    max_shard_bytes: Option<u64>,
    inputs_length: Option<usize>,
) -> anyhow::Result<ExportSummary> {
    let options = ExportOptions {
        dtype,
        max_shard_bytes,
        row_tokens: inputs_length.or(model.inputs_length()).unwrap_or(ROW_TOKENS),
        tokenizer_files: model.tokenizer_files(),
    };
    Ok(export(model, model.model(), model.routing(), &options, out)?)
}

/// `500MB` or `5GB`, in powers of ten as transformers reads them, `MiB` and `GiB` in powers of two.
fn parse_size(text: &str) -> anyhow::Result<u64> {
    let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("GB", 1_000_000_000), ("MB", 1_000_000), ("B", 1)];
    let parsed = units.iter().find_map(|(unit, factor)| {
        let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        (number > 0.0 && number.is_finite()).then_some((number * *factor as f64) as u64)
    });
    parsed
        .filter(|&size| size > 0)
        .with_context(|| format!("--max-shard-size {text:?} is not a size; write it as 500MB or 5GB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("500MB").unwrap(), 500_000_000);
        assert_eq!(parse_size("1.5 GiB").unwrap(), 3 << 29);
        assert_eq!(parse_size("20000B").unwrap(), 20_000);
        for bad in ["", "5", "-1GB", "0MB", "1TB", "infGB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
