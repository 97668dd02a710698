//! `switchyard generate`: fills the sentinels of texts.

use anyhow::Context;
use burn::tensor::Device;

use super::model_directory::LoadedModel;
use super::output;
use crate::Outcome;
use crate::args::GenerateArguments;

/// Texts of a file that are decoded together; more at once would not be faster.
const ROWS_AT_ONCE: usize = 32;

pub(crate) fn run(arguments: &GenerateArguments, device: &Device) -> anyhow::Result<Outcome> {
    let prompts = prompts(arguments)?;
    let loaded = LoadedModel::open(&arguments.model, device)?;
    let tokenizer = loaded.tokenizer()?;
    let filler = loaded.filler(&tokenizer);
    let streams = arguments.prompt.is_some() && !arguments.json;
    for prompts in prompts.chunks(ROWS_AT_ONCE) {
        let mut shown = String::new();
        let filled = filler.fill(prompts, arguments.max_new_tokens, |text| {
            // The end of a text may change while a word is being written, never what is before it.
            match text.strip_prefix(shown.as_str()) {
                Some(more) if streams && !more.is_empty() => {
                    output::piece(more)?;
                    shown = text.to_owned();
                }
                _ => {}
            }
            Ok(())
        })?;
        if streams {
            output::line("")?;
        }
        for filled in &filled {
            if arguments.json {
                output::json_line(filled)?;
            } else {
                output::line(&filled.filled)?;
            }
        }
    }
    Ok(Outcome::Done)
}

fn prompts(arguments: &GenerateArguments) -> anyhow::Result<Vec<String>> {
    if let Some(prompt) = &arguments.prompt {
        anyhow::ensure!(!prompt.trim().is_empty(), "--prompt is empty; write a text with <extra_id_0> in it");
        return Ok(vec![prompt.clone()]);
    }
    let path = arguments.input.as_deref().context("one of --prompt and --input is needed")?;
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let prompts: Vec<String> =
        text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
    anyhow::ensure!(!prompts.is_empty(), "{} holds no text; write one text a line", path.display());
    Ok(prompts)
}
