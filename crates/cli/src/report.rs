//! One error on the terminal: what is wrong, where, and the mend.

use std::io::{IsTerminal, Write};
use std::panic::PanicHookInfo;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};
use switchyard_config::ConfigError;
use switchyard_kernels::gpu_failure;

/// Prints `error` and its causes to standard error.
pub(crate) fn print(error: &anyhow::Error) {
    let text = match error.downcast_ref::<ConfigError>() {
        Some(error) => config_error(error),
        None => chain(error),
    };
    // Nothing is left to do when the terminal is gone.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Prints one line to standard error.
pub(crate) fn line(text: &str) {
    // As above.
    let _ = writeln!(std::io::stderr(), "error: {text}");
}

/// Ends the program with one line when a GPU fails; what else panics is told as ever.
pub(crate) fn tell_failures_of_gpus() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| match gpu_failure_of(panic) {
        Some(failure) => {
            line(&failure);
            std::process::exit(1);
        }
        None => print(panic),
    }));
}

/// What to say of a panic that comes from a GPU.
pub(crate) fn gpu_failure_of(panic: &PanicHookInfo<'_>) -> Option<String> {
    gpu_failure(panic.payload_as_str()?)
}

fn renderer() -> Renderer {
    if std::io::stderr().is_terminal() { Renderer::styled() } else { Renderer::plain() }
}

fn config_error(error: &ConfigError) -> String {
    let title = error.kind().to_string();
    let Some(place) = error.place() else {
        let notes = error.notes().iter().map(|note| format!("\n  = note: {note}"));
        let mend = error.mend().map(|mend| format!("\n  = help: {mend}"));
        return notes.chain(mend).fold(format!("error: {title}"), |text, line| text + &line);
    };
    let path = place.file.path.display().to_string();
    let snippet = Snippet::source(place.file.text.as_str())
        .path(path.as_str())
        .annotation(AnnotationKind::Primary.span(place.span.clone()));
    let mut group = Group::with_title(Level::ERROR.primary_title(title.as_str())).element(snippet);
    for note in error.notes() {
        group = group.element(Level::NOTE.message(note.as_str()));
    }
    if let Some(mend) = error.mend() {
        group = group.element(Level::HELP.message(mend));
    }
    renderer().render(&[group])
}

/// Options of commands without an experiment file, and the keys that they stand for.
const OPTIONS: [(&str, &str); 7] = [
    ("parallel.expert_parallel_size", "--expert-parallel-size"),
    ("parallel.tensor_parallel_size", "--tensor-parallel-size"),
    ("data.text_column", "--text-column"),
    ("data.inputs_length", "--inputs-length"),
    ("data.train_tokenizer_vocab_size", "--vocab-size"),
    ("data.eval_sources", "--data"),
    ("data.sources", "--data"),
];

/// `error` with the names of options in place of keys.
pub(crate) fn in_options(error: impl std::fmt::Display) -> anyhow::Error {
    let text = OPTIONS.iter().fold(error.to_string(), |text, (key, option)| text.replace(key, option));
    anyhow::Error::msg(text)
}

/// The error and, below it, each cause that it does not already quote.
fn chain(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !last.contains(&cause) {
            text.push_str(&format!("\n  = note: {cause}"));
        }
        last = cause;
    }
    text
}
