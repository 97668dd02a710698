//! The pages of docs/ that are made from code.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::say;

const NOTE: &str = "<!-- Written by `cargo xtask docs` from crates/config/src/schema.rs; edit there. -->\n\n";

/// Writes `docs/config.md`, or with `check` compares it.
pub(crate) fn run(root: &Path, check: bool) -> anyhow::Result<()> {
    let path = root.join("docs/config.md");
    let wanted = format!("{NOTE}{}", switchyard_config::reference());
    if check {
        // A page that is missing or unreadable is as wrong as one that differs.
        if fs::read_to_string(&path).ok().as_ref() != Some(&wanted) {
            bail!("docs/config.md is out of date; run `cargo xtask docs` and commit the result");
        }
    } else {
        fs::write(&path, wanted).with_context(|| format!("cannot write {}", path.display()))?;
        say("wrote docs/config.md");
    }
    Ok(())
}
