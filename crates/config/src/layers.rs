//! What was written, in order: extended files, then the file itself, then `--set`; later keys win.
//!
//! Owns reading, the check that every key exists and has its type, and where each key came from.
//! Presets and defaults lie underneath and are added by `decide.rs`.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use crate::error::{ConfigError, ErrorKind};
use crate::keys::{DefaultValue, Key, Table, dotted, quoted};
use crate::nearest::nearest;
use crate::provenance::{Origin, Place, Provenance, SourceFile};
use crate::schema::RunConfig;

/// Everything that was written, layers merged.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    pub(crate) written: RunConfig,
    pub(crate) provenance: Provenance,
}

impl Layers {
    /// Adds `path` and, before it, what it extends.
    pub(crate) fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        self.add_extending(path, &mut Vec::new(), &Origin::Default)
    }

    /// Adds a file's text; `path` names it in messages and anchors what it extends.
    pub(crate) fn add_text(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        self.add_file_text(path, text.to_owned(), &mut Vec::new())
    }

    /// `chain` holds the canonical paths of the files that are being extended, outermost first.
    fn add_extending(
        &mut self,
        path: &Path,
        chain: &mut Vec<PathBuf>,
        named_by: &Origin,
    ) -> Result<(), ConfigError> {
        let unreadable = |source| {
            ConfigError::new(ErrorKind::Read { path: path.to_owned(), source })
                .at(named_by)
                .help("check the path; a file in `extends` is looked up beside the file that names it")
        };
        let canonical = fs::canonicalize(path).map_err(unreadable)?;
        if let Some(first) = chain.iter().position(|seen| *seen == canonical) {
            let mut circle = chain.split_off(first);
            circle.push(canonical);
            return Err(ConfigError::new(ErrorKind::ExtendsCycle { chain: circle })
                .at(named_by)
                .help("take one of the files out of `extends`"));
        }
        let text = fs::read_to_string(path).map_err(unreadable)?;
        chain.push(canonical);
        self.add_file_text(path, text, chain)?;
        chain.pop();
        Ok(())
    }

    fn add_file_text(
        &mut self,
        path: &Path,
        text: String,
        chain: &mut Vec<PathBuf>,
    ) -> Result<(), ConfigError> {
        let file = Arc::new(SourceFile { path: path.to_owned(), text });
        let origin_of = |span| Origin::File(Place { file: Arc::clone(&file), span });
        let mut layer = parse(&file.text, &origin_of)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        for base in layer.config.extends.take().unwrap_or_default() {
            self.add_extending(&directory.join(base), chain, &layer.origin("extends"))?;
        }
        self.push(layer);
        Ok(())
    }

    /// Adds `key=value`; a value that is not TOML is taken as text.
    pub(crate) fn add_set(&mut self, argument: &str) -> Result<(), ConfigError> {
        let origin = Origin::CommandLine(argument.to_owned());
        let bad = |reason| ConfigError::new(ErrorKind::BadSet { argument: argument.to_owned(), reason });
        let (key, value) = argument
            .split_once('=')
            .map(|(key, value)| (key.trim(), value.trim()))
            .ok_or_else(|| bad("has no value; write --set key=value"))?;
        if key.is_empty() || !key.split('.').all(is_bare_key) {
            return Err(bad("does not begin with a key such as model.num_experts"));
        }
        if key == "extends" {
            return Err(bad("is not possible: only files can extend files"));
        }
        let origin_of = |_| origin.clone();
        let as_text = || parse(&format!("{key} = {}", quoted(value)), &origin_of);
        let layer = match DeValue::parse(value) {
            // What is TOML of another type may still be meant as text, such as `--set name=7`.
            Ok(_) => parse(&format!("{key} = {value}"), &origin_of)
                .or_else(|first| as_text().map_err(|_| first))?,
            Err(fault) if value.starts_with(['[', '{', '"', '\'']) => {
                let detail = one_line(fault.message());
                return Err(ConfigError::new(ErrorKind::Syntax { detail })
                    .at(&origin)
                    .help("values are written as in a file; mind the quotes that the shell takes away"));
            }
            Err(_) => as_text()?,
        };
        self.push(layer);
        Ok(())
    }

    fn push(&mut self, mut layer: Layer) {
        layer.spread_expert_layer_every();
        self.written.overlay(layer.config);
        for (key, origin) in layer.origins {
            self.provenance.record(key, origin);
        }
    }
}

/// The layer under all others: every default that does not depend on other keys.
pub(crate) fn built_in_defaults() -> RunConfig {
    let mut text = String::new();
    for table in std::iter::once(&RunConfig::TABLE).chain(RunConfig::TABLE.subtables.iter().copied()) {
        if !table.name.is_empty() {
            text.push_str(&format!("[{}]\n", table.name));
        }
        for key in table.keys {
            if let DefaultValue::Value(value) = key.default {
                text.push_str(&format!("{} = {value}\n", key.name));
            }
        }
    }
    toml::from_str(&text).expect("the schema's defaults have the schema's types")
}

/// One file or one `--set`.
struct Layer {
    config: RunConfig,
    origins: Vec<(String, Origin)>,
}

impl Layer {
    fn origin(&self, key: &str) -> Origin {
        let found = self.origins.iter().find(|(recorded, _)| recorded == key);
        found.map_or(Origin::Default, |(_, origin)| origin.clone())
    }

    /// Replaces `expert_layer_every` by the two keys that it stands for, unless they are written too.
    fn spread_expert_layer_every(&mut self) {
        let Some(every) = self.config.model.expert_layer_every.take() else { return };
        let origin = self.origin("model.expert_layer_every");
        let model = &mut self.config.model;
        for (slot, key) in [
            (&mut model.encoder_expert_layer_every, "model.encoder_expert_layer_every"),
            (&mut model.decoder_expert_layer_every, "model.decoder_expert_layer_every"),
        ] {
            if slot.is_none() {
                *slot = Some(every);
                self.origins.push((key.to_owned(), origin.clone()));
            }
        }
    }
}

/// A key that was met, with the bytes of its value.
struct Found {
    name: String,
    key: &'static Key,
    span: Range<usize>,
}

/// Reads one layer; `origin_of` tells the origin of a span of `text`.
fn parse(text: &str, origin_of: &dyn Fn(Range<usize>) -> Origin) -> Result<Layer, ConfigError> {
    let document = DeTable::parse(text).map_err(|fault| {
        let span = fault.span().unwrap_or(0..text.len());
        ConfigError::new(ErrorKind::Syntax { detail: one_line(fault.message()) }).at(&origin_of(span))
    })?;
    let mut found = Vec::new();
    walk(&RunConfig::TABLE, document.get_ref(), "", &mut found, origin_of)?;
    let config = RunConfig::deserialize(toml::Deserializer::from(document))
        .map_err(|fault| wrong_value(&fault, text, &found, origin_of))?;
    let origins = found.into_iter().map(|met| (met.name, origin_of(met.span))).collect();
    Ok(Layer { config, origins })
}

/// Checks that every key of `written` is one of `table`'s, and collects them.
fn walk(
    table: &Table,
    written: &DeTable<'_>,
    prefix: &str,
    found: &mut Vec<Found>,
    origin_of: &dyn Fn(Range<usize>) -> Origin,
) -> Result<(), ConfigError> {
    for (word, value) in written {
        let name = dotted(prefix, word.get_ref());
        if let Some(subtable) = table.subtable(word.get_ref()) {
            let inner = value.get_ref().as_table().ok_or_else(|| {
                let expected = format!("a table, `[{name}]`");
                let found = format!("{} {}", article(value.get_ref()), value.get_ref().type_str());
                ConfigError::new(ErrorKind::WrongValue { key: name.clone(), expected, found })
                    .at(&origin_of(value.span()))
            })?;
            walk(subtable, inner, &name, found, origin_of)?;
        } else if let Some(key) = table.key(word.get_ref()) {
            found.push(Found { name: name.clone(), key, span: value.span() });
            let elements = value.get_ref().as_array().into_iter().flat_map(|array| array.iter());
            for (index, element) in elements.enumerate() {
                if let (Some(items), Some(inner)) = (key.items, element.get_ref().as_table()) {
                    walk(items, inner, &format!("{name}[{index}]"), found, origin_of)?;
                }
            }
        } else {
            return Err(unknown_key(table, word.get_ref(), &name).at(&origin_of(word.span())));
        }
    }
    Ok(())
}

fn unknown_key(table: &Table, word: &str, name: &str) -> ConfigError {
    let error = ConfigError::new(ErrorKind::UnknownKey { key: name.to_owned() });
    let siblings = || table.keys.iter().map(|key| key.name).chain(table.subtables.iter().map(|t| t.name));
    let elsewhere = RunConfig::TABLE.subtables.iter().find(|other| other.key(word).is_some());
    error.help(if let Some(other) = elsewhere {
        format!("`{word}` belongs to [{}]", other.name)
    } else if let Some(near) = nearest(word, siblings()) {
        format!("did you mean `{near}`?")
    } else {
        let place =
            if table.name.is_empty() { "the top level".to_owned() } else { format!("[{}]", table.name) };
        format!("keys of {place} are {}", siblings().collect::<Vec<_>>().join(", "))
    })
}

/// Names the key whose value serde refused.
fn wrong_value(
    fault: &toml::de::Error,
    text: &str,
    found: &[Found],
    origin_of: &dyn Fn(Range<usize>) -> Origin,
) -> ConfigError {
    let span = fault.span().unwrap_or(0..text.len());
    // Elements of a list follow the list itself, so the last match is the innermost.
    let Some(met) = found.iter().rev().find(|met| met.span.start <= span.start && span.end <= met.span.end)
    else {
        return ConfigError::new(ErrorKind::Syntax { detail: one_line(fault.message()) })
            .at(&origin_of(span));
    };
    let value = text.get(met.span.clone()).unwrap_or_default();
    let error = ConfigError::new(ErrorKind::WrongValue {
        key: met.name.clone(),
        expected: expected(met.key),
        found: format!("`{}`", shortened(value)),
    })
    .at(&origin_of(met.span.clone()));
    let word = value.trim_matches(['"', '\'']);
    match nearest(word, (met.key.choices)().iter().copied()) {
        Some(near) => error.help(format!("did you mean `\"{near}\"`?")),
        None => error,
    }
}

fn expected(key: &Key) -> String {
    let description = (key.describe)();
    if (key.choices)().is_empty() && !description.starts_with('`') {
        format!("a {description}")
    } else {
        description
    }
}

fn article(value: &DeValue<'_>) -> &'static str {
    if value.type_str().starts_with(['a', 'i']) { "an" } else { "a" }
}

fn is_bare_key(word: &str) -> bool {
    !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

fn one_line(message: &str) -> String {
    message.trim().replace('\n', "; ")
}

/// The first line of a value, at most 60 characters.
fn shortened(value: &str) -> String {
    let first = value.lines().next().unwrap_or_default();
    let short: String = first.chars().take(60).collect();
    if short.len() < value.len() { format!("{short}…") } else { short }
}
