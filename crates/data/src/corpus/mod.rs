//! The sample corpus: real English text that is on the machine after a build.
//!
//! It is the prose of the README files, changelogs and documentation comments of exactly the
//! packages this program was built from, found where cargo keeps their sources. Nothing is
//! downloaded, and the list of packages, fixed by `Cargo.lock`, fixes the text.
//!
//! Owns the choice of packages, the extraction and the files it writes; reading them back is
//! `source`'s.

mod extract;
mod markdown;
mod packages;
mod prose;
mod rustdoc;
mod write;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use md5::{Digest as _, Md5};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::extract::SourceText;
use self::packages::Package;
use crate::durable;
use crate::error::DataError;

/// Changes whenever the same sources give another text.
const EXTRACTOR_VERSION: u32 = 1;
/// Largest part of the corpus that one package may be: 1 in 20.
const MAX_SHARE_OF_A_PACKAGE: usize = 20;
/// One package in 20 is held out.
const VALIDATION_MODULUS: u128 = 20;
/// Folder of the corpus below the cache.
const FOLDER: &str = "sample";

/// The sample corpus on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleCorpus {
    /// Parquet file of the training split.
    pub train: PathBuf,
    /// Parquet file of the held-out packages.
    pub validation: PathBuf,
    /// What it holds.
    pub summary: CorpusSummary,
}

/// What the corpus holds; stored beside it as `corpus.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusSummary {
    /// Version of the rules that turn sources into text.
    pub extractor_version: u32,
    /// SHA-256 of the list of packages, in hexadecimal.
    pub packages_sha256: String,
    /// SHA-256 of all texts, each followed by a zero byte, training first; in hexadecimal.
    pub sha256: String,
    /// Packages that contributed text.
    pub packages: usize,
    /// Training split.
    pub train: SplitSummary,
    /// Held-out split: whole packages.
    pub validation: SplitSummary,
}

/// Size of a split.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitSummary {
    /// Documents, one a source file.
    pub documents: usize,
    /// Bytes of their texts.
    pub bytes: usize,
    /// Bytes of the Parquet file.
    pub file_bytes: u64,
}

/// A document of the corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CorpusDocument {
    text: String,
    url: String,
}

/// The two splits.
#[derive(Debug, Default, PartialEq, Eq)]
struct Splits {
    train: Vec<CorpusDocument>,
    validation: Vec<CorpusDocument>,
    /// Packages that contributed text.
    packages: usize,
}

/// Finds the sample corpus below `cache_dir`, and builds it if it is not there or is of another
/// list of packages.
///
/// Building takes a few seconds. Whatever ends it early leaves no file that a later call would
/// take for the corpus.
///
/// # Errors
/// [`DataError::NoPackageList`] and [`DataError::NoPackageSources`] say how to bring other text;
/// [`DataError::Io`] if sources cannot be read or the corpus cannot be written.
pub fn ensure(cache_dir: &Path) -> Result<SampleCorpus, DataError> {
    let packages = packages::embedded()?;
    let directory = cache_dir.join(FOLDER);
    let packages_sha256 = hash_of_list(&packages);
    if let Some(corpus) = write::find(&directory, &packages_sha256) {
        return Ok(corpus);
    }
    let located = packages::locate(&packages, &packages::source_roots())?;
    tracing::info!(packages = located.len(), directory = %directory.display(), "building the sample corpus");
    let splits = build(&located)?;
    let corpus = write::write(&directory, &splits, packages_sha256)?;
    tracing::info!(
        packages = corpus.summary.packages,
        train_bytes = corpus.summary.train.bytes,
        validation_bytes = corpus.summary.validation.bytes,
        sha256 = corpus.summary.sha256,
        "sample corpus built"
    );
    Ok(corpus)
}

fn hash_of_list(packages: &[Package<'_>]) -> String {
    let lines = packages.iter().map(|package| {
        let Package { name, version, license } = package;
        format!("{name}\t{version}\t{license}\n")
    });
    durable::sha256_hex(lines.collect::<String>().as_bytes())
}

/// Extracts the text of all packages and splits it.
fn build(packages: &[(Package<'_>, PathBuf)]) -> Result<Splits, DataError> {
    let texts = packages.par_iter().map(|(_, directory)| extract::package_texts(directory));
    let mut texts = texts.collect::<Result<Vec<_>, _>>()?;
    remove_duplicates(&mut texts);
    let total: usize = texts.iter().flatten().map(bytes).sum();
    let mut splits = Splits::default();
    for ((package, _), texts) in packages.iter().zip(texts) {
        let split = if is_validation(package.name) { &mut splits.validation } else { &mut splits.train };
        let before = split.len();
        let mut left = total / MAX_SHARE_OF_A_PACKAGE;
        for text in texts {
            match left.checked_sub(bytes(&text)) {
                Some(remaining) => left = remaining,
                None => continue,
            }
            let Package { name, version, .. } = package;
            split.push(CorpusDocument {
                url: format!("https://docs.rs/crate/{name}/{version}/source/{}", text.path),
                text: text.paragraphs.join("\n"),
            });
        }
        splits.packages += usize::from(split.len() > before);
    }
    Ok(splits)
}

/// Bytes of a document: its paragraphs and the line ends between them.
fn bytes(text: &SourceText) -> usize {
    text.paragraphs.iter().map(|paragraph| paragraph.len() + 1).sum::<usize>().saturating_sub(1)
}

/// Keeps the first of equal paragraphs over all packages, and no file without any.
///
/// Paragraphs are equal if their letters are: numbers and punctuation tell generated
/// documentation apart, but teach nothing new.
fn remove_duplicates(texts: &mut [Vec<SourceText>]) {
    let mut seen = HashSet::new();
    for package in texts {
        for text in package.iter_mut() {
            text.paragraphs.retain(|paragraph| {
                let letters = paragraph.bytes().filter(u8::is_ascii_alphabetic);
                let letters: Vec<u8> = letters.map(|byte| byte.to_ascii_lowercase()).collect();
                seen.insert(xxhash_rust::xxh3::xxh3_128(&letters))
            });
        }
        package.retain(|text| !text.paragraphs.is_empty());
    }
}

/// Whole packages are held out, whatever their version.
fn is_validation(name: &str) -> bool {
    let digest: [u8; 16] = Md5::digest(name).into();
    u128::from_be_bytes(digest).is_multiple_of(VALIDATION_MODULUS)
}
