//! What a token cache says about itself, and the identity of what it was made from.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;
use xxhash_rust::xxh3::Xxh3;

use super::CacheError;
use crate::durable;
use crate::source::ReadOptions;
use crate::tokenizer::{EncodeCounts, Tokenizer};

/// Version of the format; raised whenever the same source would give other files.
pub(super) const VERSION: u32 = 2;

pub(super) const MANIFEST: &str = "manifest.json";

/// Files up to this size are identified by all of their bytes, larger ones by both ends.
const FULLY_HASHED_BYTES: u64 = 64 << 20;
const HASHED_END_BYTES: u64 = 64 << 10;

/// One file of text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// File name, without its directory.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// xxh3 of the content; of files above 64 MiB, of the first and last 64 KiB.
    pub xxh3: String,
}

/// One file of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenFile {
    /// File name within the cache.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// xxh3 of the content.
    pub xxh3: String,
}

/// `manifest.json` of a token cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format.
    pub version: u32,
    /// Digest of everything that decides the tokens.
    pub fingerprint: String,
    /// Bytes of a token, little-endian: 2 or 4.
    pub token_bytes: usize,
    /// Tokens of all files.
    pub tokens: u64,
    /// Tokens of every file but the last.
    pub tokens_per_file: u64,
    /// Documents with at least one token.
    pub documents: u64,
    /// Seed of the order of documents.
    pub document_order_seed: u64,
    /// Ids of the tokenizer.
    pub tokenizer_size: usize,
    /// SHA-256 of the tokenizer.
    pub tokenizer_sha256: String,
    /// Counts over all tokens.
    pub counts: EncodeCounts,
    /// Records left out, by kind.
    pub skipped: BTreeMap<String, u64>,
    /// The text.
    pub sources: Vec<SourceFile>,
    /// The tokens.
    pub files: Vec<TokenFile>,
}

impl Manifest {
    /// Reads the manifest of the cache at `directory`.
    pub(super) fn read(directory: &Path) -> Result<Self, CacheError> {
        let path = directory.join(MANIFEST);
        let bytes = std::fs::read(&path).map_err(CacheError::io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|error| CacheError::corrupt(path, error.to_string()))
    }

    /// Writes the manifest into `directory`.
    pub(super) fn write(&self, directory: &Path) -> Result<(), CacheError> {
        write_json(&directory.join(MANIFEST), self)
    }
}

/// Writes a value as JSON, whole or not at all.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), CacheError> {
    let text =
        serde_json::to_vec_pretty(value).map_err(|error| CacheError::corrupt(path, error.to_string()))?;
    durable::write(path, &text).map_err(CacheError::io("write", path))
}

/// How tokens are grouped; fixed but for tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Layout {
    /// Tokens of a file.
    pub(super) tokens_per_file: u64,
    /// Tokens after which a segment is shuffled and written.
    pub(super) segment_tokens: usize,
    /// Seed of the order of documents within a segment.
    pub(super) document_order_seed: u64,
}

impl Default for Layout {
    fn default() -> Self {
        Self { tokens_per_file: 1 << 30, segment_tokens: 1 << 25, document_order_seed: 0 }
    }
}

/// Identities of files, in their order.
///
/// # Errors
/// [`CacheError::Io`].
pub fn identify(files: &[PathBuf]) -> Result<Vec<SourceFile>, CacheError> {
    files.iter().map(|path| identify_file(path)).collect()
}

fn identify_file(path: &Path) -> Result<SourceFile, CacheError> {
    let file = File::open(path).map_err(CacheError::io("open", path))?;
    let bytes = file.metadata().map_err(CacheError::io("read", path))?.len();
    let xxh3 = if bytes <= FULLY_HASHED_BYTES {
        hash_file(path)?
    } else {
        let mut end = vec![0; HASHED_END_BYTES as usize];
        let mut hasher = Xxh3::new();
        for start in [0, bytes - HASHED_END_BYTES] {
            file.read_exact_at(&mut end, start).map_err(CacheError::io("read", path))?;
            hasher.update(&end);
        }
        hex(&hasher)
    };
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(SourceFile { name, bytes, xxh3 })
}

/// xxh3 of a file's content.
pub(super) fn hash_file(path: &Path) -> Result<String, CacheError> {
    let mut file = File::open(path).map_err(CacheError::io("open", path))?;
    let mut hasher = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(CacheError::io("read", path))? {
            0 => return Ok(hex(&hasher)),
            read => hasher.update(&buffer[..read]),
        }
    }
}

fn hex(hasher: &Xxh3) -> String {
    format!("{:016x}", hasher.digest())
}

/// Digest of everything that decides the tokens of a cache.
pub(super) fn fingerprint(
    sources: &[SourceFile],
    options: &ReadOptions,
    tokenizer: &Tokenizer,
    layout: &Layout,
) -> String {
    let identity = json!({
        "version": VERSION,
        "sources": sources,
        "text_column": options.text_column,
        "text_document": options.text_document,
        "on_corrupt": options.on_corrupt,
        "tokenizer": tokenizer.sha256(),
        "layout": layout,
    });
    durable::sha256_hex(identity.to_string().as_bytes())
}
