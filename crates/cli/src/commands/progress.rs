//! Progress of long work: a bar on a terminal, a line now and then elsewhere.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{bytes, grouped};
use crate::logging;

/// Time between lines where no bar can be drawn.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// One bar that says what is being done.
pub(crate) struct Work {
    bar: ProgressBar,
    quiet: bool,
    last_line: Mutex<Option<Instant>>,
}

impl Work {
    pub(crate) fn new(quiet: bool) -> Self {
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(None, target);
        logging::set_progress(Some(bar.clone()));
        Self { bar, quiet, last_line: Mutex::new(None) }
    }

    /// Moves the bar to `position` of `length`; ETA follows from both.
    pub(crate) fn at(&self, position: u64, length: u64, message: &str) {
        if self.bar.length() != Some(length) {
            self.bar.set_length(length);
            self.bar.set_style(style("{bar:24} {percent:>3} %  {msg}  ETA {eta}"));
        }
        self.bar.set_position(position);
        self.say(message, position == length, || {
            let eta = Duration::from_secs(self.bar.eta().as_secs());
            format!("{position}/{length}  {message}  ETA {eta:?}")
        });
    }

    /// Starts counting anew, from `position`.
    pub(crate) fn restart(&self, position: u64) {
        self.bar.set_position(position);
        self.bar.reset_eta();
    }

    /// Says what is being done while nobody knows how long it takes.
    pub(crate) fn busy(&self, message: &str) {
        if self.bar.length().is_some() || self.bar.message().is_empty() {
            self.bar.unset_length();
            self.bar.set_style(style("{spinner} {msg}"));
        }
        self.bar.tick();
        self.say(message, false, || message.to_owned());
    }

    fn say(&self, message: &str, last: bool, line: impl FnOnce() -> String) {
        self.bar.set_message(message.to_owned());
        if self.quiet || !self.bar.is_hidden() {
            return;
        }
        let mut said = self.last_line.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last || said.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            *said = Some(Instant::now());
            // Work goes on when nobody can read of it.
            let _ = writeln!(std::io::stderr(), "{}", line());
        }
    }

    /// A line that stays on the screen.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            // As above.
            self.bar.suspend(|| drop(writeln!(std::io::stderr(), "{text}")));
        }
    }

    /// What the data crate reports.
    pub(crate) fn data(&self, report: switchyard_data::Progress<'_>) {
        use switchyard_data::Progress;
        match report {
            Progress::Waiting { what } => {
                // It comes once, and `busy` may hold a line back.
                self.note(&format!("waiting for another process that builds {what}"));
            }
            Progress::CountingWords { bytes: read } => {
                self.busy(&format!("tokenizer: counting words, {} of text", bytes(read)));
            }
            Progress::TrainingTokenizer { vocab_size } => {
                self.busy(&format!("tokenizer: training {} pieces", grouped(vocab_size as u64)));
            }
            Progress::Tokenizing { source, tokens, bytes: read, total_bytes, .. } => {
                self.at(read, total_bytes, &format!("tokenizing {source}, {} tokens", grouped(tokens)));
            }
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        logging::set_progress(None);
        self.bar.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates above are well-formed")
}
