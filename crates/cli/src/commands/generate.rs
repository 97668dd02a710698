//! `switchyard generate`: fills the sentinels of texts.

use anyhow::Context;
use burn::tensor::Device;
use switchyard_checkpoint::open_model;
use switchyard_comm::Choice;
use switchyard_kernels::DeviceName;

use super::fill::Filler;
use super::model_directory::LoadedModel;
use super::output;
use crate::Outcome;
use crate::args::GenerateArguments;
use crate::job::{Job, TIMEOUT};

/// Texts of a file that are decoded together; more at once would not be faster.
const ROWS_AT_ONCE: usize = 32;

pub(crate) fn run(
    arguments: &GenerateArguments,
    device: DeviceName,
    launcher: Choice,
) -> anyhow::Result<Outcome> {
    let job = Job::join(launcher, TIMEOUT)?;
    let generated = job.device(device).and_then(|device| generate_together(arguments, &device, &job));
    job.end(generated.map(|()| Outcome::Done))
}

fn generate_together(arguments: &GenerateArguments, device: &Device, job: &Job) -> anyhow::Result<()> {
    let prompts = job.agree(prompts(arguments))?;
    let directory = job.agree(open_model(&arguments.model).map_err(Into::into))?;
    let mesh = job.mesh(directory.model(), arguments.mesh, device)?;
    let prepared = LoadedModel::of(directory, device, mesh).and_then(|loaded| {
        let tokenizer = loaded.tokenizer()?;
        Ok((loaded, tokenizer))
    });
    let (loaded, tokenizer) = job.agree(prepared)?;
    let (filler, mesh) = (loaded.filler(&tokenizer), &loaded.mesh);
    // The ranks that share a model write the same texts together; other groups write others.
    let groups = mesh.shape().data / mesh.shape().expert;
    let group = mesh.at().data / mesh.shape().expert;
    let speaks = mesh.at().expert == 0 && mesh.at().tensor == 0;
    let streams = arguments.prompt.is_some() && !arguments.json;
    let batches: Vec<&[String]> = prompts.chunks(ROWS_AT_ONCE).collect();
    for batches in batches.chunks(groups) {
        let filled = match batches.get(group) {
            Some(prompts) => filled(&filler, prompts, arguments, streams && job.is_first()),
            None => Ok(String::new()),
        };
        let written = job.agree(filled)?;
        let all = mesh.gather_text(if speaks { &written } else { "" })?;
        if job.is_first() && !streams {
            all.iter().try_for_each(|text| output::piece(text))?;
        }
    }
    Ok(())
}

/// The lines to print of one batch; streamed to the terminal at once if `streams`.
fn filled(
    filler: &Filler<'_>,
    prompts: &[String],
    arguments: &GenerateArguments,
    streams: bool,
) -> anyhow::Result<String> {
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
    let mut lines = String::new();
    for filled in &filled {
        if arguments.json {
            lines.push_str(&serde_json::to_string(filled).context("a result has no JSON form")?);
        } else {
            lines.push_str(&filled.filled);
        }
        lines.push('\n');
    }
    if streams {
        output::piece(&format!("\n{lines}"))?;
    }
    Ok(lines)
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
