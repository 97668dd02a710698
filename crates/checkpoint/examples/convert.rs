//! Writes any model directory as a Hugging Face directory, in bfloat16 and files of 1 GB.
//!
//! `cargo run --release --example convert -- runs/quickstart exported`

use std::path::PathBuf;

use switchyard_checkpoint::hf::{ExportOptions, StoredDtype, export};
use switchyard_checkpoint::{CheckpointError, open_model};

fn main() -> Result<(), CheckpointError> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(from), Some(to)) = (arguments.next(), arguments.next()) else {
        panic!("give the directory of a model and a directory to write");
    };
    let opened = open_model(&from)?;
    let options = ExportOptions {
        dtype: StoredDtype::Bf16,
        max_shard_bytes: Some(1_000_000_000),
        row_tokens: opened.inputs_length().unwrap_or(512),
        tokenizer_files: opened.tokenizer_files(),
    };
    export(&opened, opened.model(), opened.routing(), &options, &to)?;
    Ok(())
}
