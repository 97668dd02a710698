//! Files that are whole or absent: written beside, synced, renamed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::CheckpointError;

/// Prefix of directories that are not complete yet, or no longer.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// A directory that becomes visible under its name only when complete.
#[derive(Debug)]
pub(crate) struct PendingDirectory {
    temporary: PathBuf,
    target: PathBuf,
    done: bool,
}

impl PendingDirectory {
    /// Begins a directory that will be called `target`.
    pub(crate) fn new(target: &Path) -> Result<Self, CheckpointError> {
        let name = target
            .file_name()
            .ok_or_else(|| {
                CheckpointError::bad(target, "is not the name of a directory; write its name out")
            })?
            .to_string_lossy();
        let parent = parent(target);
        create_directories(&parent)?;
        let temporary = parent.join(format!("{TEMPORARY}{name}-{}", std::process::id()));
        remove(&temporary)?;
        fs::create_dir(&temporary).map_err(CheckpointError::io("create", &temporary))?;
        Ok(Self { temporary, target: target.to_owned(), done: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Syncs and renames; a directory that was there before is deleted once this one is in its place.
    pub(crate) fn commit(mut self) -> Result<(), CheckpointError> {
        sync_directory(&self.temporary)?;
        let replaced = if self.target.exists() { Some(hide(&self.target)?) } else { None };
        fs::rename(&self.temporary, &self.target).map_err(CheckpointError::io("rename", &self.temporary))?;
        self.done = true;
        sync_directory(&parent(&self.target))?;
        replaced.map_or(Ok(()), |old| remove(&old))
    }
}

impl Drop for PendingDirectory {
    fn drop(&mut self) {
        if !self.done {
            // The next start of the run clears what cannot be removed now.
            drop(remove(&self.temporary));
        }
    }
}

/// Whether `name` names a file of a directory itself: no path, nothing above or below.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

/// The directory that holds `path`.
pub(crate) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Takes a directory out of sight, then deletes it: a crash leaves no half of it under its name.
pub(crate) fn retire(path: &Path) -> Result<(), CheckpointError> {
    remove(&hide(path)?)
}

/// Gives a directory a name that nobody looks for.
fn hide(path: &Path) -> Result<PathBuf, CheckpointError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let hidden = parent(path).join(format!("{TEMPORARY}old-{name}-{}", std::process::id()));
    remove(&hidden)?;
    fs::rename(path, &hidden).map_err(CheckpointError::io("rename", path))?;
    Ok(hidden)
}

/// Makes a directory with all above it, each one on the disk before anything in it is.
fn create_directories(path: &Path) -> Result<(), CheckpointError> {
    if path.is_dir() {
        return Ok(());
    }
    let above = parent(path);
    if above != path {
        create_directories(&above)?;
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(CheckpointError::io("create", path)(error))
        }
        _ => sync_directory(&above),
    }
}

/// Removes a directory if it is there.
pub(crate) fn remove(path: &Path) -> Result<(), CheckpointError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(CheckpointError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Writes `bytes` to `path` and syncs them.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let mut file = File::create(path).map_err(CheckpointError::io("create", path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(CheckpointError::io("write", path))
}

/// Writes `value` to `path` as JSON with a line feed at the end, and syncs it.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), CheckpointError> {
    write_synced(path, &json_bytes(path, value)?)
}

/// `value` as JSON for `path`, with a line feed at the end.
pub(crate) fn json_bytes(path: &Path, value: &impl Serialize) -> Result<Vec<u8>, CheckpointError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|e| CheckpointError::bad(path, format!("has no JSON form: {e}")))?;
    text.push(b'\n');
    Ok(text)
}

/// Reads JSON from `path`.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    let text = fs::read_to_string(path).map_err(CheckpointError::io("read", path))?;
    serde_json::from_str(&text).map_err(|e| CheckpointError::bad(path, format!("not as expected: {e}")))
}

/// Copies a file and syncs the copy.
pub(crate) fn copy_synced(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    fs::copy(from, to).map_err(CheckpointError::io("copy", from))?;
    File::open(to).and_then(|file| file.sync_all()).map_err(CheckpointError::io("write", to))
}

fn sync_directory(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(CheckpointError::io("sync", path))
}

/// Size and xxh3 of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    pub(crate) size: u64,
    pub(crate) xxh3: u64,
}

impl Fingerprint {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self { size: bytes.len() as u64, xxh3: xxh3_64(bytes) }
    }
}

/// Reads a file for its fingerprint.
pub(crate) fn fingerprint(path: &Path) -> Result<Fingerprint, CheckpointError> {
    let mut file = File::open(path).map_err(CheckpointError::io("read", path))?;
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let read = file.read(&mut buffer).map_err(CheckpointError::io("read", path))?;
        if read == 0 {
            return Ok(Fingerprint { size, xxh3: hash.digest() });
        }
        hash.update(&buffer[..read]);
        size += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_directory_appears_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("deep/x");
        let pending = PendingDirectory::new(&target).unwrap();
        write_synced(&pending.path().join("a"), b"1").unwrap();
        assert!(!target.exists());
        drop(pending);
        assert_eq!(names(&root.path().join("deep")), Vec::<String>::new());
        for content in [b"1", b"2"] {
            let pending = PendingDirectory::new(&target).unwrap();
            write_synced(&pending.path().join("a"), content).unwrap();
            pending.commit().unwrap();
            assert_eq!(fs::read(target.join("a")).unwrap(), content);
            assert_eq!(names(&root.path().join("deep")), ["x"]);
        }
        assert!(PendingDirectory::new(&root.path().join("..")).is_err());
    }

    #[test]
    fn only_names_within_the_directory_are_plain() {
        assert!(is_plain_name("model-00001-of-00002.safetensors"));
        for name in ["", ".", "..", "/etc/passwd", "../x", "a/b", "a/", "./a"] {
            assert!(!is_plain_name(name), "{name}");
        }
    }
}
