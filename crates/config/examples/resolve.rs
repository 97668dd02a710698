//! Resolves an experiment file and prints every key with where it came from, then what the run needs.
//!
//! `cargo run -p switchyard-config --example resolve -- configs/quickstart.toml model.num_experts=16`
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::Path;
use std::process::ExitCode;

use switchyard_config::{resolve, summarize};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(file) = arguments.next() else {
        eprintln!("usage: resolve FILE [KEY=VALUE]...");
        return ExitCode::FAILURE;
    };
    match resolve(Path::new(&file), &arguments.collect::<Vec<_>>()) {
        Ok(resolved) => {
            println!("{}\n{:#?}", resolved.to_toml(), summarize(&resolved.plan));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
