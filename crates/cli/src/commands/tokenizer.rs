//! `switchyard tokenizer`: training and looking at tokenizers.

use std::path::Path;

use switchyard_data::Tokenizer;
use switchyard_data::loader::{TrainingText, train_on_texts};
use switchyard_data::source::{self, ReadOptions};
use switchyard_data::tokenizer::{TrainOptions, UNK_ID};

use super::output;
use super::progress::Work;
use crate::Outcome;
use crate::args::{TokenizerCommand, Verbosity};
use crate::report::in_options;

pub(crate) fn run(command: &TokenizerCommand, verbosity: Verbosity) -> anyhow::Result<Outcome> {
    match command {
        TokenizerCommand::Train { data, vocab_size, out, text_column, cache_dir } => {
            anyhow::ensure!(
                !out.join("tokenizer.json").exists(),
                "{} exists already; choose another directory",
                out.join("tokenizer.json").display()
            );
            let text =
                TrainingText { files: source::resolve(data, cache_dir).map_err(in_options)?, weight: 1.0 };
            let read = ReadOptions::of_column(text_column);
            let tokenizer = {
                let work = Work::new(verbosity.quiet);
                let options = TrainOptions::new(*vocab_size);
                train_on_texts(&[text], &read, &options, &|report| work.data(report)).map_err(in_options)?
            };
            tokenizer.save(out)?;
            output::line(format!(
                "{} ids, {} of them sentinels: {}",
                output::grouped(tokenizer.size() as u64),
                tokenizer.num_sentinels(),
                out.join("tokenizer.json").display()
            ))?;
            Ok(Outcome::Done)
        }
        TokenizerCommand::Inspect { tokenizer, text, json } => inspect(tokenizer, text.as_deref(), *json),
    }
}

fn inspect(path: &Path, text: Option<&str>, json: bool) -> anyhow::Result<Outcome> {
    let tokenizer = Tokenizer::load(path)?;
    let ids = text.map(|text| tokenizer.encode_with_eos(text)).transpose()?;
    let piece = |&id: &u32| tokenizer.id_to_token(id).unwrap_or_default();
    let pieces: Option<Vec<String>> = ids.as_ref().map(|ids| ids.iter().map(piece).collect());
    if json {
        output::json(&serde_json::json!({
            "size": tokenizer.size(), "num_sentinels": tokenizer.num_sentinels(),
            "first_sentinel_id": tokenizer.first_sentinel_id(), "sha256": tokenizer.sha256(),
            "ids": ids, "pieces": pieces,
        }))?;
        return Ok(Outcome::Done);
    }
    output::line(format!("ids        {}", output::grouped(tokenizer.size() as u64)))?;
    let last = tokenizer.size() - 1;
    output::line(match tokenizer.num_sentinels() {
        0 => "sentinels  none".to_owned(),
        n => format!(
            "sentinels  {n}: <extra_id_0> is {last}, counting down to {}",
            tokenizer.first_sentinel_id()
        ),
    })?;
    output::line(format!("sha256     {}", tokenizer.sha256()))?;
    if let (Some(ids), Some(pieces)) = (ids, pieces) {
        let unknown = ids.iter().filter(|&&id| id == UNK_ID).count();
        output::line(format!("{} tokens, {unknown} of them unknown", ids.len()))?;
        for (id, piece) in ids.iter().zip(pieces) {
            output::line(format!("{id:>7}  {piece}"))?;
        }
    }
    Ok(Outcome::Done)
}
