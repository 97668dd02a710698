//! The directory of a run: where its files are and who may start in it.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// File that the process of a run holds locked.
const LOCK: &str = "lock";

/// How to treat what an earlier run left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// Refuse a directory that exists.
    Never,
    /// Continue from the newest complete checkpoint, or start when there is none.
    Auto,
    /// Continue from this checkpoint.
    From(PathBuf),
}

/// Why a run cannot use its directory.
#[derive(Debug, thiserror::Error)]
pub enum RunDirectoryError {
    /// Something is there and `--resume` was not given.
    #[error(
        "run directory {} exists already; continue it with `--resume auto`, or choose another with `--run-dir`",
        path.display()
    )]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// Another process trains in it.
    #[error("run directory {} is in use by another process; stop that one, or choose another with `--run-dir`", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// It cannot be made or written.
    #[error("cannot use run directory {}: {source}; choose a writable one with `--run-dir`", path.display())]
    Unwritable {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// Paths inside a run directory, which no other process uses meanwhile.
#[derive(Debug)]
pub struct RunDirectory {
    root: PathBuf,
    /// Locked while the run lives, by its first rank.
    _lock: Option<File>,
}

impl RunDirectory {
    /// Makes the directory, or opens it when `resume` allows.
    ///
    /// # Errors
    /// [`RunDirectoryError`] when it exists unasked or cannot be written.
    pub fn open(root: &Path, resume: &Resume) -> Result<Self, RunDirectoryError> {
        if *resume == Resume::Never && holds_a_run(root) {
            return Err(RunDirectoryError::Exists { path: root.to_owned() });
        }
        let unwritable = |source| RunDirectoryError::Unwritable { path: root.to_owned(), source };
        std::fs::create_dir_all(root).map_err(unwritable)?;
        let lock = File::create(root.join(LOCK)).map_err(unwritable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(RunDirectoryError::InUse { path: root.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(unwritable(source)),
        }
        let directory = Self { root: root.to_owned(), _lock: Some(lock) };
        for path in [directory.checkpoints(), directory.logs()] {
            std::fs::create_dir_all(&path).map_err(unwritable)?;
        }
        Ok(directory)
    }

    /// The directory that the first rank of this job has opened.
    pub fn join(root: &Path) -> Self {
        Self { root: root.to_owned(), _lock: None }
    }

    /// Writes `config.toml`.
    ///
    /// # Errors
    /// [`RunDirectoryError::Unwritable`].
    pub(crate) fn write_config(&self, text: &str) -> Result<(), RunDirectoryError> {
        std::fs::write(self.config(), text)
            .map_err(|source| RunDirectoryError::Unwritable { path: self.root.clone(), source })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved config.
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// Files of the tokenizer, as transformers names them.
    pub fn tokenizer(&self) -> PathBuf {
        self.root.join("tokenizer")
    }

    /// One line a logged step.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// One directory a checkpoint.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Logs.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }
}

/// Whether there is anything but what a start that failed early leaves.
fn holds_a_run(root: &Path) -> bool {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    entries(root).any(|entry| match entry.file_name().to_str() {
        Some("logs" | LOCK) => false,
        Some("checkpoints") => entries(&entry.path()).next().is_some(),
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_existing_run_needs_resume() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("run");
        let run = RunDirectory::open(&root, &Resume::Never).unwrap();
        let second = RunDirectory::open(&root, &Resume::Auto).unwrap_err();
        assert!(matches!(second, RunDirectoryError::InUse { .. }), "{second}");
        drop(run);
        let run = RunDirectory::open(&root, &Resume::Never).expect("nothing has happened in it");
        std::fs::write(run.config(), "").unwrap();
        drop(run);
        let refused = RunDirectory::open(&root, &Resume::Never).unwrap_err();
        assert!(refused.to_string().contains("--resume auto"));
        RunDirectory::open(&root, &Resume::Auto).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let refused = RunDirectory::open(&file, &Resume::Never).unwrap_err();
        assert!(matches!(refused, RunDirectoryError::Unwritable { .. }));
    }
}
