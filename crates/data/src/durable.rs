//! Files and directories that are either whole or absent, also after a power cut.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Writes a file under another name, flushes it to the disk and renames it into place.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let partial = with_suffix(path, ".partial");
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    rename(&partial, path)
}

/// Renames a file or directory and makes the new name last.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)?;
    match to.parent() {
        Some(parent) if parent.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// A file operation that the operating system refused; callers turn it into their own error.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) action: &'static str,
    pub(crate) path: PathBuf,
    pub(crate) source: io::Error,
}

impl Refusal {
    fn new(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { action, path: path.to_owned(), source }
    }
}

/// The right to make a directory, held by one process at a time.
///
/// The directory is filled under another name and gets its own when it is whole, so a process
/// that is interrupted leaves nothing that a later one could take for the result.
#[derive(Debug)]
pub(crate) struct Claim {
    target: PathBuf,
    partial: PathBuf,
    /// Released when the file is closed, by whatever ends the process too.
    _lock: File,
}

impl Claim {
    /// Waits for the right to make `target`; `None` if it is whole by then.
    ///
    /// `waiting` is called before waiting for a process that has the right. What stands at `target`
    /// without being whole is removed.
    pub(crate) fn take(
        target: &Path,
        is_whole: impl Fn(&Path) -> bool,
        waiting: impl FnOnce(),
    ) -> Result<Option<Self>, Refusal> {
        let parent = target.parent().unwrap_or(Path::new(""));
        fs::create_dir_all(parent).map_err(Refusal::new("create", parent))?;
        let lock_path = with_suffix(target, ".lock");
        let lock = File::create(&lock_path).map_err(Refusal::new("create", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                lock.lock().map_err(Refusal::new("lock", &lock_path))?;
            }
            Err(TryLockError::Error(error)) => return Err(Refusal::new("lock", &lock_path)(error)),
        }
        if is_whole(target) {
            return Ok(None);
        }
        remove(target)?;
        let partial = with_suffix(target, ".partial");
        Ok(Some(Self { target: target.to_owned(), partial, _lock: lock }))
    }

    /// The directory to fill; an interrupted process may have left something in it.
    pub(crate) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Empties the directory to fill.
    pub(crate) fn clear(&self) -> Result<(), Refusal> {
        remove(&self.partial)?;
        fs::create_dir_all(&self.partial).map_err(Refusal::new("create", &self.partial))
    }

    /// Removes the directory to fill.
    pub(crate) fn abandon(&self) -> Result<(), Refusal> {
        remove(&self.partial)
    }

    /// Gives the filled directory its name.
    pub(crate) fn finish(self) -> Result<(), Refusal> {
        rename(&self.partial, &self.target).map_err(Refusal::new("rename", &self.partial))
    }
}

/// Removes a file or a directory with all that is in it, if there is one.
fn remove(path: &Path) -> Result<(), Refusal> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Refusal::new("remove", path)(error)),
        _ => Ok(()),
    }
}

/// `path` with `suffix` behind its file name.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    PathBuf::from(name)
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::with_capacity(64), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("writing to a string does not fail");
        hex
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    fn is_whole(directory: &Path) -> bool {
        directory.join("whole").exists()
    }

    #[test]
    fn directories_appear_whole_whatever_was_left_before() {
        let place = tempfile::tempdir().expect("a directory");
        let target = place.path().join("deep/made");
        fs::create_dir_all(target.join("half")).expect("writable");
        fs::create_dir_all(with_suffix(&target, ".partial").join("stale")).expect("writable");
        let claim = Claim::take(&target, is_whole, || panic!("nobody holds it"));
        let claim = claim.expect("it works").expect("it is not whole");
        assert!(claim.partial().join("stale").exists() && !target.exists());
        claim.clear().expect("it works");
        fs::write(claim.partial().join("whole"), "x").expect("writable");
        claim.finish().expect("it works");
        let names =
            fs::read_dir(&target).expect("readable").map(|entry| entry.expect("readable").file_name());
        assert_eq!(names.collect::<Vec<_>>(), ["whole"]);
        assert!(Claim::take(&target, is_whole, || {}).expect("it works").is_none());
    }

    #[test]
    fn the_second_waits_says_so_and_finds_what_the_first_made() {
        let place = tempfile::tempdir().expect("a directory");
        let target = place.path().join("made");
        let first = Claim::take(&target, is_whole, || {}).expect("it works").expect("it is not there");
        thread::scope(|scope| {
            let (waits, waiting) = channel();
            let second = scope
                .spawn(|| Claim::take(&target, is_whole, move || waits.send(()).expect("somebody listens")));
            waiting.recv().expect("the second waits");
            first.clear().expect("it works");
            fs::write(first.partial().join("whole"), "x").expect("writable");
            first.finish().expect("it works");
            assert!(second.join().expect("it ends").expect("it works").is_none());
        });
    }
}
