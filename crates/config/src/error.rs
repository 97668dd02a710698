//! What can be wrong with a configuration, with everything needed to show the user where.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::presets::PresetError;
use crate::provenance::{Origin, Place};

/// The fault itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Files extend each other in a circle.
    #[error("files extend each other in a circle: {}", chain.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" -> "))]
    ExtendsCycle {
        /// The files, each extending the next; the last is the first again.
        chain: Vec<PathBuf>,
    },
    /// The text is not TOML.
    #[error("not valid TOML: {detail}")]
    Syntax {
        /// What the parser says.
        detail: String,
    },
    /// No such key.
    #[error("unknown key `{key}`")]
    UnknownKey {
        /// The key, dotted.
        key: String,
    },
    /// The value has the wrong type or is not one of the accepted words.
    #[error("`{key}` must be {expected}, found {found}")]
    WrongValue {
        /// The key, dotted.
        key: String,
        /// The type in words.
        expected: String,
        /// The value as written.
        found: String,
    },
    /// An argument of `--set` is not `key=value`.
    #[error("--set {argument} {reason}")]
    BadSet {
        /// The argument.
        argument: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A key without default is not written anywhere.
    #[error("`{key}` is not set")]
    Missing {
        /// The key, dotted.
        key: String,
    },
    /// The preset cannot be had.
    #[error(transparent)]
    Preset(#[from] PresetError),
    /// A value is out of range, or values do not fit each other.
    #[error("{message}")]
    Conflict {
        /// The rule with the values.
        message: String,
    },
}

/// A fault in a configuration: what, where, what else matters, and the mend.
///
/// `Display` gives all of it as plain text; the parts are there for a richer rendering.
#[derive(Debug)]
pub struct ConfigError {
    details: Box<Details>,
}

#[derive(Debug)]
struct Details {
    kind: ErrorKind,
    place: Option<Place>,
    notes: Vec<String>,
    help: Option<String>,
}

impl ConfigError {
    pub(crate) fn new(kind: ErrorKind) -> Self {
        Self { details: Box::new(Details { kind, place: None, notes: Vec::new(), help: None }) }
    }

    /// Points at the file, or adds a note when the value came from elsewhere.
    pub(crate) fn at(mut self, origin: &Origin) -> Self {
        match origin {
            Origin::File(place) => self.details.place = Some(place.clone()),
            Origin::CommandLine(argument) => self.details.notes.push(format!("in --set {argument}")),
            Origin::Preset(_) | Origin::Default => {}
        }
        self
    }

    pub(crate) fn note(mut self, note: String) -> Self {
        self.details.notes.push(note);
        self
    }

    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.details.help = Some(help.into());
        self
    }

    /// The fault; its `Display` is the message on one line.
    pub fn kind(&self) -> &ErrorKind {
        &self.details.kind
    }

    /// Where in a file, when the value at fault was written in one.
    pub fn place(&self) -> Option<&Place> {
        self.details.place.as_ref()
    }

    /// Further facts, such as where the other value came from.
    pub fn notes(&self) -> &[String] {
        &self.details.notes
    }

    /// The mend.
    pub fn mend(&self) -> Option<&str> {
        self.details.help.as_deref()
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.details.kind.fmt(f)?;
        if let Some(place) = &self.details.place {
            write!(f, "\n --> {place}")?;
        }
        for note in &self.details.notes {
            write!(f, "\n  = note: {note}")?;
        }
        if let Some(help) = &self.details.help {
            write!(f, "\n  = help: {help}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.details.kind)
    }
}
