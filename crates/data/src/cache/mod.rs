//! Tokenised text on disk, readable at any token.
//!
//! Owns building, opening and checking of token caches. Knows nothing of chunks or objectives:
//! a cache is one long list of tokens, documents following each other without separators.
//!
//! ```text
//! CACHE_DIR/tokens/<fingerprint>/manifest.json
//!                                tokens-00000.bin   little-endian u16 or u32
//! ```

mod build;
mod error;
mod manifest;
mod writer;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub use error::CacheError;
pub use manifest::{Manifest, SourceFile, TokenFile, identify};

use build::Build;
use manifest::{Layout, VERSION, fingerprint, hash_file};

use crate::progress::ProgressFn;
use crate::source::ReadOptions;
use crate::tokenizer::{Tokenizer, UNK_ID};

/// Caches up to this size are hashed whenever they are opened, in bytes.
const HASHED_ON_OPEN_BYTES: u64 = 256 << 20;

/// Characters of the fingerprint that name a cache's directory.
const DIRECTORY_NAME_LENGTH: usize = 16;

/// Text to tokenise.
#[derive(Debug, Clone, Copy)]
pub struct CacheSource<'a> {
    /// Name in messages.
    pub name: &'a str,
    /// Files in the order they are read.
    pub files: &'a [PathBuf],
    /// How they are read.
    pub options: &'a ReadOptions,
}

/// An open token cache.
///
/// Reads with positioned reads instead of a memory map: a file that shrinks underneath is an
/// error and not a signal, and one read of a chunk costs under a microsecond.
#[derive(Debug)]
pub struct TokenCache {
    directory: PathBuf,
    manifest: Manifest,
    files: Vec<File>,
}

impl TokenCache {
    /// Opens the cache of a source below `cache_dir`, building it first if it is not there.
    ///
    /// # Errors
    /// The text cannot be read or encoded or is empty, the cache cannot be written, or the one
    /// that is there is damaged.
    pub fn open_or_build(
        cache_dir: &Path,
        source: &CacheSource<'_>,
        tokenizer: &Tokenizer,
        progress: ProgressFn<'_>,
    ) -> Result<Self, CacheError> {
        Self::open_or_build_with(cache_dir, source, tokenizer, Layout::default(), progress)
    }

    fn open_or_build_with(
        cache_dir: &Path,
        source: &CacheSource<'_>,
        tokenizer: &Tokenizer,
        layout: Layout,
        progress: ProgressFn<'_>,
    ) -> Result<Self, CacheError> {
        let files = identify(source.files)?;
        let fingerprint = fingerprint(&files, source.options, tokenizer, &layout);
        let target = cache_dir.join("tokens").join(&fingerprint[..DIRECTORY_NAME_LENGTH]);
        if !target.exists() {
            let build = Build { source, tokenizer, layout, files, fingerprint };
            build.run(&target, progress)?;
        }
        Self::open(&target)
    }

    /// Opens the cache at `directory` and checks it against its manifest.
    ///
    /// Lengths are always checked, contents of caches up to 256 MiB too.
    ///
    /// # Errors
    /// [`CacheError::Io`] and [`CacheError::Corrupt`].
    pub fn open(directory: &Path) -> Result<Self, CacheError> {
        let manifest = Manifest::read(directory)?;
        let path = directory.join(manifest::MANIFEST);
        if manifest.version != VERSION {
            let message = format!("format {} where this program writes {VERSION}", manifest.version);
            return Err(CacheError::corrupt(path, message));
        }
        let listed: u64 = manifest.files.iter().map(|file| file.bytes).sum();
        if !matches!(manifest.token_bytes, 2 | 4) || listed != manifest.tokens * manifest.token_bytes as u64 {
            return Err(CacheError::corrupt(path, "its token counts contradict each other"));
        }
        let mut files = Vec::with_capacity(manifest.files.len());
        for TokenFile { name, bytes, .. } in &manifest.files {
            let path = directory.join(name);
            let file = File::open(&path).map_err(CacheError::io("open", &path))?;
            let found = file.metadata().map_err(CacheError::io("read", &path))?.len();
            if found != *bytes {
                return Err(CacheError::corrupt(
                    path,
                    format!("{found} bytes where the manifest says {bytes}"),
                ));
            }
            files.push(file);
        }
        let cache = Self { directory: directory.to_path_buf(), manifest, files };
        if listed <= HASHED_ON_OPEN_BYTES {
            cache.verify()?;
        }
        Ok(cache)
    }

    /// Compares every byte with the hashes of the manifest.
    ///
    /// # Errors
    /// [`CacheError::Corrupt`] names the file that differs.
    pub fn verify(&self) -> Result<(), CacheError> {
        for file in &self.manifest.files {
            let path = self.directory.join(&file.name);
            let found = hash_file(&path)?;
            if found != file.xxh3 {
                let message = format!("hash {found} where the manifest says {}", file.xxh3);
                return Err(CacheError::corrupt(path, message));
            }
        }
        Ok(())
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What it says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Fills `tokens` with the tokens from `start` on; `bytes` is a buffer to reuse.
    ///
    /// # Errors
    /// The range lies beyond the end, a file cannot be read, or it holds something that is no
    /// token of its tokenizer.
    pub fn read(&self, start: u64, tokens: &mut [u32], bytes: &mut Vec<u8>) -> Result<(), CacheError> {
        let Manifest { token_bytes, tokens_per_file, tokenizer_size, .. } = self.manifest;
        let mut at = start;
        let mut rest = tokens;
        while !rest.is_empty() {
            let (index, offset) = (at / tokens_per_file, at % tokens_per_file);
            let count = rest.len().min((tokens_per_file - offset) as usize);
            let (now, later) = rest.split_at_mut(count);
            let path = || self.directory.join(writer::file_name(index));
            let Some(file) = self.files.get(index as usize) else {
                return Err(CacheError::corrupt(path(), format!("token {at} lies behind the end")));
            };
            bytes.resize(count * token_bytes, 0);
            file.read_exact_at(bytes, offset * token_bytes as u64)
                .map_err(|source| CacheError::io("read", path())(source))?;
            decode(bytes, token_bytes, now);
            let foreign = |&id: &u32| id < UNK_ID || id as usize >= tokenizer_size;
            if let Some(position) = now.iter().position(foreign) {
                let message =
                    format!("token {} is {}, which no text gives", at + position as u64, now[position]);
                return Err(CacheError::corrupt(path(), message));
            }
            at += count as u64;
            rest = later;
        }
        Ok(())
    }
}

fn decode(bytes: &[u8], token_bytes: usize, tokens: &mut [u32]) {
    if token_bytes == 2 {
        for (token, pair) in tokens.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *token = u32::from(u16::from_le_bytes(*pair));
        }
    } else {
        for (token, quad) in tokens.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *token = u32::from_le_bytes(*quad);
        }
    }
}
