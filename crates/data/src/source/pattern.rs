//! From a file pattern to a sorted list of files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::format::split_compression;
use crate::error::DataError;

/// Most files one pattern may name; a mistyped range must not fill the memory.
const MAX_ALTERNATIVES: usize = 1 << 20;

/// Files that `pattern` names, absolute, each once, sorted bytewise.
///
/// `pattern` is a file, a directory (read recursively; hidden files, unfinished downloads and
/// files that are not data are left out), a glob (`*`, `?`, `[a-z]`, `**`), or any of these with
/// brace lists (`{en,de}`) and ranges (`{00000..00127}`). Several are separated by commas (write
/// `[,]` for one within a glob), or stand in a file named as `@list.txt`, one a line, where blank
/// lines and lines that begin with `#` are left out; paths there too are relative to the working
/// directory. Shards named `NNNNN-of-NNNNN` are checked for completeness, and a warning lists the
/// missing ones.
///
/// # Errors
/// [`DataError::NoMatch`] if nothing matches `pattern` or one of several, [`DataError::BadPattern`]
/// for an unclosed brace, a malformed glob or an empty list, [`DataError::Io`] for a list or
/// directory that cannot be read.
pub fn expand(pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    let files: Vec<PathBuf> = matches_of_any(pattern)?.into_iter().collect();
    if files.len() > 1 {
        for incomplete in incomplete_shards(&files) {
            tracing::warn!(pattern, "{incomplete}");
        }
    }
    Ok(files)
}

/// Files of one pattern, of several between commas, or of a list.
fn matches_of_any(pattern: &str) -> Result<BTreeSet<PathBuf>, DataError> {
    if Path::new(pattern).exists() {
        return matches(pattern);
    }
    let parts = split_at_commas(pattern);
    if parts.len() == 1 {
        return pattern.strip_prefix('@').map_or_else(|| matches(pattern), matches_of_list);
    }
    let mut files = BTreeSet::new();
    for part in parts {
        if part.trim().is_empty() {
            return Err(bad_pattern(pattern, "a path is missing beside a comma"));
        }
        files.append(&mut matches_of_any(part.trim())?);
    }
    Ok(files)
}

/// Files of the patterns in a file, one a line; commas are part of them.
fn matches_of_list(list: &str) -> Result<BTreeSet<PathBuf>, DataError> {
    let text = fs::read_to_string(list).map_err(DataError::io("read", list))?;
    let mut files = BTreeSet::new();
    for (line, number) in text.lines().map(str::trim).zip(1..) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let place = format!("line {number} of {list}");
        if line.starts_with('@') && !Path::new(line).exists() {
            return Err(bad_pattern(line, format!("a list cannot name another ({place})")));
        }
        files.append(&mut matches(line).map_err(|error| placed(error, &place))?);
    }
    if files.is_empty() {
        return Err(bad_pattern(&format!("@{list}"), "the list names no file"));
    }
    Ok(files)
}

/// Adds the line of a list to an error about the pattern on it.
fn placed(error: DataError, place: &str) -> DataError {
    match error {
        DataError::NoMatch { pattern, detail } if detail.is_empty() => {
            DataError::NoMatch { pattern, detail: place.to_owned() }
        }
        DataError::NoMatch { pattern, detail } => {
            DataError::NoMatch { pattern, detail: format!("{place}; {detail}") }
        }
        DataError::BadPattern { pattern, reason } => {
            DataError::BadPattern { pattern, reason: format!("{reason} ({place})") }
        }
        other => other,
    }
}

fn bad_pattern(pattern: &str, reason: impl Into<String>) -> DataError {
    DataError::BadPattern { pattern: pattern.to_owned(), reason: reason.into() }
}

/// Files of one pattern; braces stand for alternatives, and a warning lists those without a file.
fn matches(pattern: &str) -> Result<BTreeSet<PathBuf>, DataError> {
    let alternatives = match Path::new(pattern).exists() {
        true => vec![pattern.to_owned()],
        false => expand_braces(pattern).map_err(|reason| bad_pattern(pattern, reason))?,
    };
    let mut files = BTreeSet::new();
    let mut missing = Vec::new();
    for alternative in &alternatives {
        let mut found = BTreeSet::new();
        add_matches(alternative, &mut found)?;
        if found.is_empty() {
            missing.push(alternative.as_str());
        }
        files.append(&mut found);
    }
    if files.is_empty() {
        let detail = empty_detail(pattern);
        return Err(DataError::NoMatch { pattern: pattern.to_owned(), detail });
    }
    if !missing.is_empty() {
        let shown = missing[..missing.len().min(10)].join(", ");
        tracing::warn!(pattern, missing = missing.len(), "parts of the pattern match no file: {shown}");
    }
    Ok(files)
}

/// A set of shards of which some are not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IncompleteShards {
    /// Path up to the shard's number.
    pub(super) prefix: String,
    /// Shards of the whole set, by their names.
    pub(super) total: u64,
    /// Numbers of the missing ones, ascending.
    pub(super) missing: Vec<u64>,
}

impl std::fmt::Display for IncompleteShards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown: Vec<String> = self.missing.iter().take(10).map(u64::to_string).collect();
        let more = if self.missing.len() > shown.len() { ", ..." } else { "" };
        let present = self.total - self.missing.len() as u64;
        let (prefix, total) = (&self.prefix, self.total);
        write!(f, "{present} of {total} shards of {prefix} present: missing {}{more}", shown.join(", "))
    }
}

/// Sets of shards (`-00017-of-01024` or `.00017-of-01024.`) with gaps.
pub(super) fn incomplete_shards(files: &[PathBuf]) -> Vec<IncompleteShards> {
    let mut sets: BTreeMap<(String, u64), BTreeSet<u64>> = BTreeMap::new();
    for (prefix, index, total) in files.iter().filter_map(|file| shard_of(file)) {
        sets.entry((prefix, total)).or_default().insert(index);
    }
    let gaps = sets.into_iter().map(|((prefix, total), present)| {
        let missing =
            (0..total.min(MAX_ALTERNATIVES as u64)).filter(|index| !present.contains(index)).collect();
        IncompleteShards { prefix, total, missing }
    });
    gaps.filter(|set| !set.missing.is_empty()).collect()
}

/// Path before the shard's number, the number and the total.
fn shard_of(file: &Path) -> Option<(String, u64, u64)> {
    let path = file.to_str()?;
    let name_start = path.len() - file.file_name()?.to_str()?.len();
    let of = name_start + path[name_start..].rfind("-of-")?;
    let total = &path[of + 4..];
    let total = &total[..total.find(|c: char| !c.is_ascii_digit()).unwrap_or(total.len())];
    let index_start = path[..of].rfind(|c: char| !c.is_ascii_digit())? + 1;
    let prefix = path[..index_start].strip_suffix(['-', '.'])?;
    Some((prefix.to_owned(), path[index_start..of].parse().ok()?, total.parse().ok()?))
}

fn empty_detail(pattern: &str) -> String {
    let path = Path::new(pattern);
    if path.is_dir() {
        return "the directory holds no .json, .jsonl, .parquet or .txt file".to_owned();
    }
    let parent = path.ancestors().skip(1).find(|parent| parent.exists() || parent.as_os_str().is_empty());
    match (path.is_relative(), std::env::current_dir()) {
        (true, Ok(directory)) => format!("looked from {}", directory.display()),
        _ => parent.map_or_else(String::new, |parent| format!("{} exists", parent.display())),
    }
}

/// Adds the files of one pattern without braces.
fn add_matches(pattern: &str, files: &mut BTreeSet<PathBuf>) -> Result<(), DataError> {
    let path = Path::new(pattern);
    if path.exists() {
        return add_path(path, files);
    }
    if !pattern.contains(['*', '?', '[']) {
        return Ok(());
    }
    let entries = glob::glob(pattern)
        .map_err(|error| bad_pattern(pattern, format!("{} (character {})", error.msg, error.pos + 1)))?;
    for entry in entries {
        let entry = entry.map_err(|error| {
            let path = error.path().to_owned();
            DataError::Io { action: "read", path, source: error.into() }
        })?;
        if !is_unfinished(&entry) {
            add_path(&entry, files)?;
        }
    }
    Ok(())
}

fn add_path(path: &Path, files: &mut BTreeSet<PathBuf>) -> Result<(), DataError> {
    if path.is_dir() {
        return add_directory(path, files);
    }
    files.insert(std::path::absolute(path).map_err(DataError::io("find", path))?);
    Ok(())
}

fn add_directory(directory: &Path, files: &mut BTreeSet<PathBuf>) -> Result<(), DataError> {
    for entry in fs::read_dir(directory).map_err(DataError::io("read", directory))? {
        let path = entry.map_err(DataError::io("read", directory))?.path();
        if is_unfinished(&path) {
            continue;
        }
        if path.is_dir() {
            add_directory(&path, files)?;
        } else if is_data(&path) {
            add_path(&path, files)?;
        }
    }
    Ok(())
}

/// Hidden files and what download tools leave while they work.
fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let leftover =
        [".incomplete", ".lock", ".tmp", ".part", ".partial"].iter().any(|end| name.ends_with(end));
    leftover || name.starts_with('.')
}

/// Whether a file met in a directory is text to train on, rather than a description of it.
fn is_data(path: &Path) -> bool {
    const DESCRIPTIONS: [&str; 5] =
        ["dataset_info.json", "dataset_infos.json", "state.json", "corpus.json", "readme.md"];
    const DATA: [&str; 8] = ["json", "jsonl", "ndjson", "parquet", "arrow", "txt", "text", "md"];
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    // What bzip2 and xz have compressed is not read, and must be refused rather than overlooked.
    let bare = [".bz2", ".xz"].iter().find_map(|end| name.strip_suffix(end));
    let bare = bare.unwrap_or_else(|| split_compression(&name).0);
    let extension = bare.rsplit_once('.').map(|(_, extension)| extension);
    !DESCRIPTIONS.contains(&name.as_str()) && extension.is_some_and(|extension| DATA.contains(&extension))
}

/// All strings that a pattern with brace lists and ranges stands for.
fn expand_braces(pattern: &str) -> Result<Vec<String>, String> {
    let Some(open) = pattern.find('{') else {
        return Ok(vec![pattern.to_owned()]);
    };
    let close = matching_brace(&pattern[open..]).ok_or("`{` without `}`")? + open;
    let (head, tail) = (&pattern[..open], expand_braces(&pattern[close + 1..])?);
    let mut expanded = Vec::new();
    for choice in choices(&pattern[open + 1..close])? {
        for end in &tail {
            if expanded.len() == MAX_ALTERNATIVES {
                return Err(format!("it names more than {MAX_ALTERNATIVES} files"));
            }
            expanded.push(format!("{head}{choice}{end}"));
        }
    }
    Ok(expanded)
}

/// Byte of the `}` that closes the `{` at the start.
fn matching_brace(pattern: &str) -> Option<usize> {
    let mut depth = 0;
    for (index, byte) in pattern.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => continue,
        }
        if depth == 0 {
            return Some(index);
        }
    }
    None
}

/// What stands between a pair of braces: a range or a list.
fn choices(inner: &str) -> Result<Vec<String>, String> {
    if let Some((first, last)) = inner.split_once("..") {
        return range(first, last)
            .ok_or_else(|| format!("`{{{inner}}}` is not an ascending range of numbers"))?;
    }
    let parts = split_at_commas(inner).into_iter().map(expand_braces);
    Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
}

/// The parts between the commas that stand in no braces and no brackets.
fn split_at_commas(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0_usize);
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// `first..last`, inclusive, as wide as `first` is written; `None` if these are no numbers.
fn range(first: &str, last: &str) -> Option<Result<Vec<String>, String>> {
    let (from, to): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    if from > to {
        return None;
    }
    if to - from >= MAX_ALTERNATIVES as u64 {
        return Some(Err(format!("it names more than {MAX_ALTERNATIVES} files")));
    }
    let width = if first.starts_with('0') { first.len() } else { 0 };
    Some(Ok((from..=to).map(|number| format!("{number:0width$}")).collect()))
}
