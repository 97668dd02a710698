//! One file a command.

mod bench;
mod check;
mod data;
mod doctor;
mod eval;
mod export;
mod fill;
mod generate;
mod inspect;
mod model_directory;
pub(crate) mod output;
mod progress;
mod tokenizer;
mod train;
mod verify;

use switchyard_comm::Choice;
use switchyard_kernels::DeviceName;

use crate::Outcome;
use crate::args::{Command, Verbosity};
use crate::logging;

/// Runs one command.
pub(crate) fn run(
    command: &Command,
    device: DeviceName,
    launcher: Choice,
    verbosity: Verbosity,
) -> anyhow::Result<Outcome> {
    if !matches!(command, Command::Train(_)) {
        logging::start(verbosity, None)?;
    }
    match command {
        Command::Train(arguments) => train::run(arguments, device, launcher, verbosity),
        Command::Eval(arguments) => eval::run(arguments, device, launcher, verbosity),
        Command::Generate(arguments) => generate::run(arguments, device, launcher),
        Command::Export(arguments) => export::run(arguments),
        Command::Verify(arguments) => verify::run(arguments, &device.open()?),
        Command::Data(command) => data::run(command, verbosity),
        Command::Tokenizer(command) => tokenizer::run(command, verbosity),
        Command::Check(arguments) => check::run(arguments, verbosity),
        Command::Inspect(command) => inspect::run(command),
        Command::Doctor { json } => doctor::run(*json, launcher),
        Command::Bench(command) => bench::run(command, device, launcher, verbosity),
    }
}
