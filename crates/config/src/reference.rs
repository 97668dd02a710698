//! The reference of experiment files as Markdown, made from the schema itself.

use std::fmt::Write as _;

use crate::keys::{DefaultValue, Key, Table};
use crate::presets::preset_names;
use crate::schema::{RunConfig, SourceTable};

const INTRODUCTION: &str = "\
# Experiment files

An experiment is one TOML file. A key takes its value from the last of these layers that sets it:

1. the defaults below,
2. the preset that `model.preset` names,
3. the files in `extends`, in order, each with what it extends in turn,
4. the file itself,
5. `--set key=value` on the command line, in order; a value that is not TOML is taken as text.

Misspelled keys, wrong types and sizes that do not fit each other are refused before anything starts.
`switchyard check FILE` shows what a file gives; the run directory keeps it as `config.toml`, with the
origin of every value.
";

/// The reference: a table of keys for each section, and the names of all presets.
pub fn reference() -> String {
    let mut text = INTRODUCTION.to_owned();
    section(&mut text, "Top level", &RunConfig::TABLE);
    for table in RunConfig::TABLE.subtables {
        section(&mut text, &format!("`[{}]`", table.name), table);
        if table.name == "data" {
            section(&mut text, "`[[data.sources]]`, `[[data.eval_sources]]`", &SourceTable::TABLE);
        }
    }
    text.push_str("\n## Presets\n\n");
    for name in preset_names() {
        let _ = writeln!(text, "- `{name}`");
    }
    text.push_str(
        "\nNames of the T5-Efficient family take any of `-nlN` (layers of both stacks), `-elN` (encoder layers), \
         `-dlN` (decoder layers), `-ffN` (`d_ff`), `-dmN` (`d_model`), `-kvN` (`d_kv`) and `-nhN` (heads), as in \
         `t5-efficient-small-el16-dl4`.\n",
    );
    text
}

fn section(text: &mut String, title: &str, table: &Table) {
    let _ = write!(text, "\n## {title}\n\n{}\n\n", table.about.trim());
    text.push_str("| key | type | default | meaning |\n|---|---|---|---|\n");
    for key in table.keys {
        let cells =
            [format!("`{}`", key.name), (key.describe)(), default(key), key.meaning.trim().to_owned()];
        let _ = writeln!(text, "| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
}

fn default(key: &Key) -> String {
    match key.default {
        DefaultValue::Value(value) => format!("`{value}`"),
        DefaultValue::Derived(words) => words.to_owned(),
        DefaultValue::Required => "required".to_owned(),
    }
}
