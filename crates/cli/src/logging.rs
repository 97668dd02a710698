//! Logs: warnings to the terminal, everything of a run to its log file as JSON lines.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Mutex;

use anyhow::Context;
use indicatif::ProgressBar;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::Verbosity;

/// Starts logging to the terminal and, when given, to `file`.
pub(crate) fn start(verbosity: Verbosity, file: Option<&Path>) -> anyhow::Result<()> {
    let level = match verbosity {
        Verbosity { quiet: true, .. } => LevelFilter::ERROR,
        Verbosity { verbose: 0, .. } => LevelFilter::WARN,
        Verbosity { verbose: 1, .. } => LevelFilter::INFO,
        Verbosity { .. } => LevelFilter::DEBUG,
    };
    let terminal = tracing_subscriber::fmt::layer()
        .with_target(false)
        .without_time()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(AboveProgress)
        .with_filter(level)
        // What ends a job is told by whoever joined it, also before logs have begun.
        .with_filter(filter_fn(|event| !event.target().starts_with("switchyard_comm")));
    let file = match file {
        Some(path) => {
            let file = File::options()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot open the log file {}", path.display()))?;
            let layer = tracing_subscriber::fmt::layer().json().with_writer(Mutex::new(file));
            Some(layer.with_filter(LevelFilter::INFO))
        }
        None => None,
    };
    tracing_subscriber::registry().with(terminal).with(file).init();
    Ok(())
}

/// The progress bar on the terminal, which log lines must not tear.
static PROGRESS: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Names the bar that is on the terminal now.
pub(crate) fn set_progress(bar: Option<ProgressBar>) {
    *PROGRESS.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = bar;
}

/// Writes whole log lines to standard error, above the progress bar if there is one.
struct AboveProgress;

impl<'a> MakeWriter<'a> for AboveProgress {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Vec::new())
    }
}

struct Line(Vec<u8>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let bar = PROGRESS.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        // A log line that cannot be shown must not stop the run.
        let write = || drop(std::io::stderr().write_all(&self.0));
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}
