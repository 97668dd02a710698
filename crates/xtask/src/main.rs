//! `cargo xtask`: chores of this repository that need no other tool than cargo.

mod bench;
mod ci;
mod docs;
mod test;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Parser, Subcommand};

/// Chores of this repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every check that a change must pass, and print how long each took.
    Ci,
    /// Run every test, those under mpirun included; installs Open MPI and libclang where it may.
    #[command(after_help = "Examples:\n  cargo xtask test\n  cargo xtask test -- resume")]
    Test(test::Options),
    /// Write the generated pages of docs/.
    Docs {
        /// Write nothing; fail when a page is out of date.
        #[arg(long)]
        check: bool,
    },
    /// Measure Switchyard and transformers in turn on this machine; prints Markdown tables.
    #[command(
        after_help = "Example:\n  cargo xtask bench --python target/venv/bin/python --rounds 5 --experts 8,32,128"
    )]
    Bench(bench::Options),
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let root = repository()?;
    match arguments.command {
        Command::Ci => ci::run(&root),
        Command::Test(options) => test::run(&root, &options),
        Command::Docs { check } => docs::run(&root, check),
        Command::Bench(options) => bench::run(&root, &options),
    }
}

/// The directory of the workspace, wherever cargo was called.
fn repository() -> anyhow::Result<PathBuf> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = package.ancestors().nth(2).context("xtask must stand two directories below the workspace")?;
    Ok(root.to_owned())
}

/// Prints one line. The only place of xtask that writes to the terminal.
#[expect(clippy::print_stdout, reason = "xtask is a program, not a library")]
fn say(line: impl std::fmt::Display) {
    println!("{line}");
}
