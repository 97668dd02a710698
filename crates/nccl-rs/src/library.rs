//! Finding and loading the library.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Attempt, Error};
use crate::ffi::{Api, OpenError};
use crate::version::{Feature, Version};

/// Names the library's file where neither the process nor the system has it.
pub const ENVIRONMENT_VARIABLE: &str = "NCCL_RS_LIBRARY";

/// The name that the library has had since 2.0.
const FILE_NAME: &str = "libnccl.so.2";

/// NCCL, loaded. Cheap to clone; stays loaded until the process ends, as it runs threads of its own.
#[derive(Clone)]
pub struct Library {
    api: Arc<Api>,
    origin: Origin,
}

/// Where a library comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// The process had loaded it: LibTorch's, mostly.
    Process,
    /// The file that [`ENVIRONMENT_VARIABLE`] names.
    Environment(PathBuf),
    /// Where the system looks for libraries: `LD_LIBRARY_PATH` and the linker's cache.
    System,
    /// The file that the caller named.
    Path(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process => write!(f, "{FILE_NAME} among the process's libraries"),
            Self::Environment(path) => write!(f, "{} of {ENVIRONMENT_VARIABLE}", path.display()),
            Self::System => write!(f, "{FILE_NAME} of the system"),
            Self::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Library {
    /// Takes the library that the process has loaded already; else the file that [`ENVIRONMENT_VARIABLE`]
    /// names, where it is set; else the system's.
    ///
    /// The first comes first as two copies in one process would each keep threads and memory of their own.
    ///
    /// What is found is trusted, as by [`Library::open`]: it is for who starts the program to set
    /// [`ENVIRONMENT_VARIABLE`] and `LD_LIBRARY_PATH` to an NCCL.
    ///
    /// # Errors
    /// [`Error::NotFound`] says what was tried; [`Error::TooOld`] and [`Error::MissingSymbol`] when what was
    /// found does not do. There is no going on to the next then, so that nothing else runs than one thinks.
    pub fn load() -> Result<Self, Error> {
        search(FILE_NAME, std::env::var_os(ENVIRONMENT_VARIABLE))
    }

    /// Loads the library in file `path`.
    ///
    /// Loading runs the file's initialisers, and its functions are taken for those of `nccl.h`; nobody can
    /// check either. Name an NCCL, and no file that somebody else can choose or write.
    ///
    /// # Errors
    /// As [`Library::load`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let origin = Origin::Path(path.to_owned());
        open(path.as_os_str(), false, origin)?.map_err(|attempt| Error::NotFound { tried: vec![attempt] })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.api.version()
    }

    /// Where it was found.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The file that it was loaded from, where the system can tell.
    pub fn file(&self) -> Option<PathBuf> {
        self.api.file()
    }

    /// Whether it is new enough for `feature`.
    pub fn supports(&self, feature: Feature) -> bool {
        self.require(feature).is_ok()
    }

    /// The last warning of the library in this process, of whatever communicator; `None` before the first.
    pub fn last_error(&self) -> Option<String> {
        self.api.last_error()
    }

    pub(crate) fn require(&self, feature: Feature) -> Result<(), Error> {
        let found = self.version();
        if found < feature.since() { Err(Error::Unsupported { feature, found }) } else { Ok(()) }
    }

    pub(crate) fn api(&self) -> &Arc<Api> {
        &self.api
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library")
            .field("version", &self.version())
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

fn search(file_name: &str, named: Option<OsString>) -> Result<Library, Error> {
    let mut tried = Vec::new();
    match open(file_name.as_ref(), true, Origin::Process)? {
        Ok(library) => return Ok(library),
        Err(attempt) => tried.push(attempt),
    }
    let last = match named {
        Some(path) => open(&path, false, Origin::Environment(PathBuf::from(&path))),
        None => open(file_name.as_ref(), false, Origin::System),
    };
    last?.map_err(|attempt| {
        tried.push(attempt);
        Error::NotFound { tried }
    })
}

/// A library that is not there is an attempt, one that does not do an error.
fn open(name: &OsStr, only_loaded: bool, origin: Origin) -> Result<Result<Library, Attempt>, Error> {
    match Api::open(name, only_loaded) {
        Ok(api) => Ok(Ok(Library { api: Arc::new(api), origin })),
        Err(OpenError::NotLoaded { problem }) => Ok(Err(Attempt { place: origin, problem })),
        Err(OpenError::MissingSymbol { symbol }) => Err(Error::MissingSymbol { symbol, origin }),
        Err(OpenError::TooOld { found }) => Err(Error::TooOld { found, origin }),
        Err(OpenError::NoVersion(failure)) => Err(Error::Library(failure)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOWHERE: &str = "libnccl-of-no-machine.so.2";

    #[test]
    fn what_was_tried_and_what_helps_is_told() {
        let error = search(NOWHERE, None).expect_err("no machine has it");
        let Error::NotFound { tried } = &error else { panic!("{error}") };
        let places: Vec<_> = tried.iter().map(|attempt| attempt.place.clone()).collect();
        assert_eq!(places, [Origin::Process, Origin::System]);
        let text = error.to_string();
        for part in [NOWHERE, "nvidia-nccl-cu12", "LD_LIBRARY_PATH", ENVIRONMENT_VARIABLE] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn a_file_that_was_named_is_not_passed_over() {
        let path = PathBuf::from("/no/such/libnccl.so.2");
        let error = search(NOWHERE, Some(path.clone().into())).expect_err("no machine has it");
        let Error::NotFound { tried } = &error else { panic!("{error}") };
        assert_eq!(tried.last().map(|attempt| &attempt.place), Some(&Origin::Environment(path)));
        assert_eq!(tried.len(), 2);
        assert!(error.to_string().contains("/no/such/libnccl.so.2 of NCCL_RS_LIBRARY"), "{error}");
    }
}
