//! Token files, written in order and cut at a fixed number of tokens.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::CacheError;
use super::manifest::{TokenFile, hash_file};

const BUFFER_BYTES: usize = 1 << 20;

pub(super) fn file_name(index: u64) -> String {
    format!("tokens-{index:05}.bin")
}

/// Appends tokens to the files of a cache under construction.
pub(super) struct TokenWriter {
    directory: PathBuf,
    token_bytes: usize,
    tokens_per_file: u64,
    written: u64,
    file: Option<BufWriter<File>>,
}

fn encoded(tokens: &[u32], token_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(tokens.len() * token_bytes);
    for token in tokens {
        bytes.extend_from_slice(&token.to_le_bytes()[..token_bytes]);
    }
    bytes
}

impl TokenWriter {
    /// Goes on behind the first `written` tokens in `directory`; what lies behind them is cut off.
    ///
    /// Returns `None` when fewer tokens are there.
    pub(super) fn resume(
        directory: &Path,
        token_bytes: usize,
        tokens_per_file: u64,
        written: u64,
    ) -> Result<Option<Self>, CacheError> {
        let writer =
            Self { directory: directory.to_path_buf(), token_bytes, tokens_per_file, written, file: None };
        for index in 0.. {
            let path = directory.join(file_name(index));
            let expected = writer.bytes_of_file(index);
            let found = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            if found < expected {
                return Ok(None);
            }
            if expected > 0 {
                let file = File::options().write(true).open(&path).map_err(CacheError::io("open", &path))?;
                file.set_len(expected).map_err(CacheError::io("cut", &path))?;
            } else if path.exists() {
                fs::remove_file(&path).map_err(CacheError::io("remove", &path))?;
            } else {
                break;
            }
        }
        Ok(Some(writer))
    }

    /// Bytes that file `index` holds of the tokens written so far.
    fn bytes_of_file(&self, index: u64) -> u64 {
        let before = index * self.tokens_per_file;
        self.written.saturating_sub(before).min(self.tokens_per_file) * self.token_bytes as u64
    }

    /// Appends tokens, little-endian; ids must fit `token_bytes`.
    pub(super) fn write(&mut self, mut tokens: &[u32]) -> Result<(), CacheError> {
        while !tokens.is_empty() {
            let room = self.tokens_per_file - self.written % self.tokens_per_file;
            let (now, later) = tokens.split_at(tokens.len().min(room as usize));
            let bytes = encoded(now, self.token_bytes);
            let path = self.current_path();
            self.current_file()?.write_all(&bytes).map_err(CacheError::io("write", path))?;
            self.written += now.len() as u64;
            if self.written.is_multiple_of(self.tokens_per_file) {
                self.sync()?;
                self.file = None;
            }
            tokens = later;
        }
        Ok(())
    }

    fn current_path(&self) -> PathBuf {
        self.directory.join(file_name(self.written / self.tokens_per_file))
    }

    fn current_file(&mut self) -> Result<&mut BufWriter<File>, CacheError> {
        let file = match self.file.take() {
            Some(file) => file,
            None => {
                let path = self.current_path();
                let options = File::options().create(true).append(true).open(&path);
                BufWriter::with_capacity(BUFFER_BYTES, options.map_err(CacheError::io("create", path))?)
            }
        };
        Ok(self.file.insert(file))
    }

    /// Tokens written so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Brings everything written to the disk.
    pub(super) fn sync(&mut self) -> Result<(), CacheError> {
        let directory = self.directory.clone();
        if let Some(file) = &mut self.file {
            file.flush().map_err(CacheError::io("write to", &directory))?;
            file.get_ref().sync_data().map_err(CacheError::io("write to", &directory))?;
        }
        Ok(())
    }

    /// Closes the last file and hashes all.
    pub(super) fn finish(mut self) -> Result<Vec<TokenFile>, CacheError> {
        self.sync()?;
        (0..self.written.div_ceil(self.tokens_per_file))
            .map(|index| {
                let name = file_name(index);
                let xxh3 = hash_file(&self.directory.join(&name))?;
                Ok(TokenFile { name, bytes: self.bytes_of_file(index), xxh3 })
            })
            .collect()
    }
}
