//! The `switchyard` binary: reads the command line, runs one command, reports at most one error.
//!
//! Exit codes: 0 done, 1 wrong input (the message names the mend), 75 interrupted and resumable.

mod args;
mod commands;
mod device;
mod job;
mod logging;
mod memory;
mod report;
mod signals;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Arguments;

/// What a command tells the shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All done.
    Done,
    /// Checked and found wanting; everything has been said.
    Failed,
    /// Stopped on request with everything saved.
    Interrupted,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => Self::SUCCESS,
            Outcome::Failed => Self::from(1),
            Outcome::Interrupted => Self::from(75),
        }
    }
}

fn main() -> ExitCode {
    memory::keep_freed_pages();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(message) => {
            let failed = message.use_stderr();
            // Nothing is left to do when the terminal is gone.
            let _ = message.print();
            return ExitCode::from(u8::from(failed));
        }
    };
    report::tell_failures_of_gpus();
    let verbosity = arguments.verbosity;
    match commands::run(&arguments.command, arguments.device, arguments.launcher.into(), verbosity) {
        Ok(outcome) => outcome.into(),
        Err(error) => {
            report::print(&error);
            ExitCode::from(1)
        }
    }
}
