//! From the unpacked sources of a package to documents.

use std::fs;
use std::path::{Path, PathBuf};

use super::markdown;
use super::prose;
use super::rustdoc;
use crate::error::DataError;

/// Folders whose comments describe tests rather than the package.
const SKIPPED_FOLDERS: [&str; 4] = ["benches", "examples", "target", "tests"];
/// Beginnings of the names of legal and social documents.
const SKIPPED_FILES: [&str; 7] =
    ["license", "licence", "copying", "copyright", "notice", "code_of_conduct", "unlicense"];

/// The prose of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceText {
    /// Path inside the package, with `/`.
    pub(super) path: String,
    /// Paragraphs, in the order of the file.
    pub(super) paragraphs: Vec<String>,
}

/// Prose of every Markdown and Rust file of a package, sorted by path.
pub(super) fn package_texts(directory: &Path) -> Result<Vec<SourceText>, DataError> {
    let mut files = Vec::new();
    list_files(directory, &mut files)?;
    let mut texts = Vec::new();
    for file in files {
        let bytes = fs::read(&file).map_err(DataError::io("read", &file))?;
        let paragraphs = prose_of(&file, &String::from_utf8_lossy(&bytes));
        if !paragraphs.is_empty() {
            let relative = file.strip_prefix(directory).unwrap_or(&file);
            let parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy()).collect();
            texts.push(SourceText { path: parts.join("/"), paragraphs });
        }
    }
    texts.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(texts)
}

fn list_files(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    for entry in fs::read_dir(directory).map_err(DataError::io("read", directory))? {
        let entry = entry.map_err(DataError::io("read", directory))?;
        let name = entry.file_name().to_string_lossy().to_ascii_lowercase();
        let kind = entry.file_type().map_err(DataError::io("read", directory))?;
        if kind.is_dir() && !name.starts_with('.') && !SKIPPED_FOLDERS.contains(&name.as_str()) {
            list_files(&entry.path(), files)?;
        } else if kind.is_file() && is_documentation(&name) {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn is_documentation(name: &str) -> bool {
    let legal = SKIPPED_FILES.iter().any(|start| name.starts_with(start));
    !legal && (name.ends_with(".rs") || name.ends_with(".md"))
}

fn prose_of(file: &Path, source: &str) -> Vec<String> {
    let paragraphs = if file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("rs")) {
        let comments = rustdoc::doc_comments(source);
        comments.into_iter().flat_map(markdown::paragraphs).collect()
    } else {
        markdown::paragraphs(source.lines())
    };
    paragraphs.into_iter().filter(|paragraph| prose::is_prose(paragraph)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_package_yields_its_prose_sorted_by_path() {
        let package = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let file = package.path().join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        let sentence = "This is one of the sentences that the extractor has to keep.";
        write("src/lib.rs", &format!("//! {sentence}\r\n//! And so is this one.\r\nfn f() {{}}\r\n"));
        write("README.md", &format!("# Name\n\n{sentence}\n\nShort.\n"));
        write("LICENSE.md", sentence);
        write("tests/all.rs", &format!("/// {sentence}\n"));
        write("notes.txt", sentence);
        write("src/data.bin", "\0\0");
        let texts = package_texts(package.path()).unwrap();
        let paths: Vec<_> = texts.iter().map(|text| text.path.as_str()).collect();
        assert_eq!(paths, ["README.md", "src/lib.rs"]);
        assert_eq!(texts[0].paragraphs, [sentence]);
        assert_eq!(texts[1].paragraphs, [format!("{sentence} And so is this one.")]);
    }
}
