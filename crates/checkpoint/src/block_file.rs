//! A file written in large aligned blocks, its checksum taken while the bytes pass.

use std::fs::File;
use std::io::Write;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use crate::error::CheckpointError;
use crate::files::Fingerprint;

/// Bytes of a write: few calls, yet hashed and copied while they lie in the second cache.
const BLOCK: usize = 1 << 20;

/// Bytes after which the disk is set to work, while the next are copied.
#[cfg(target_os = "linux")]
const STRETCH: u64 = 8 << 20;

/// A file that is being written.
pub(crate) struct BlockFile {
    path: PathBuf,
    file: File,
    /// The beginning of a block.
    pending: Vec<u8>,
    size: u64,
    hash: Xxh3,
}

impl BlockFile {
    pub(crate) fn create(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::create(path).map_err(CheckpointError::io("create", path))?;
        let pending = Vec::with_capacity(BLOCK);
        Ok(Self { path: path.to_owned(), file, pending, size: 0, hash: Xxh3::new() })
    }

    /// Appends `bytes`; whole blocks go to the system from where they lie.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let mut rest = bytes;
        if !self.pending.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(BLOCK - self.pending.len()));
            self.pending.extend_from_slice(now);
            if self.pending.len() < BLOCK {
                return Ok(());
            }
            self.emit_pending()?;
            rest = later;
        }
        let blocks = rest.chunks_exact(BLOCK);
        self.pending.extend_from_slice(blocks.remainder());
        blocks.into_iter().try_for_each(|block| self.emit(block))
    }

    fn emit_pending(&mut self) -> Result<(), CheckpointError> {
        let pending = std::mem::take(&mut self.pending);
        self.emit(&pending)?;
        self.pending = pending;
        self.pending.clear();
        Ok(())
    }

    fn emit(&mut self, block: &[u8]) -> Result<(), CheckpointError> {
        self.hash.update(block);
        self.size += block.len() as u64;
        self.file.write_all(block).map_err(CheckpointError::io("write", &self.path))?;
        self.start_disk();
        Ok(())
    }

    /// Has the system begin with what it would else keep until [`Self::finish`] waits for it.
    #[cfg(target_os = "linux")]
    fn start_disk(&self) {
        if self.size > 0 && self.size.is_multiple_of(STRETCH) {
            let begin = (self.size - STRETCH) as libc::off64_t;
            // SAFETY: the descriptor is open; the call reads no memory of this process. Its result is
            // of no interest: what fails here fails again in `finish`.
            unsafe {
                libc::sync_file_range(
                    self.file.as_raw_fd(),
                    begin,
                    STRETCH as libc::off64_t,
                    libc::SYNC_FILE_RANGE_WRITE,
                );
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn start_disk(&self) {}

    /// Writes what is left and waits until all is on the disk.
    pub(crate) fn finish(mut self) -> Result<Fingerprint, CheckpointError> {
        self.emit_pending()?;
        self.file.sync_all().map_err(CheckpointError::io("write", &self.path))?;
        Ok(Fingerprint { size: self.size, xxh3: self.hash.digest() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files;

    #[test]
    fn pieces_of_any_size_arrive_whole_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let bytes: Vec<u8> = (0..17 * BLOCK + 17).map(|i| (i * 31 / 7) as u8).collect();
        for piece in [1000, BLOCK - 1, BLOCK, 2 * BLOCK + 5, bytes.len()] {
            let mut file = BlockFile::create(&path).unwrap();
            bytes.chunks(piece).for_each(|piece| file.write(piece).unwrap());
            let written = file.finish().unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes, "pieces of {piece}");
            assert_eq!(written, files::fingerprint(&path).unwrap());
            assert_eq!(written, Fingerprint::of(&bytes));
        }
    }
}
