//! Builds the stand-in with the C compiler on the path, and hands out copies of it.

use std::ffi::{CStr, CString, c_char, c_int, c_long};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use nccl_rs::{
    Communicator, Config, DataType, Deadline, DeviceSlice, DeviceSliceMut, Library, UniqueId, Version,
};
use tempfile::TempDir;

/// Longer than any test takes; ends what would hang.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// Passes in tests that wait for what does not come.
pub(crate) const SHORT: Duration = Duration::from_millis(20);

/// The stand-in as built: tests load copies.
static BUILT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let directory = TempDir::new().expect("a directory for the build");
    let file = build(directory.path(), &[]);
    fs::read(file).expect("the compiler has written it")
});

/// Builds the stand-in into `directory`.
pub(crate) fn build(directory: &Path, arguments: &[&str]) -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/with_stub/stub.c");
    let file = directory.join("libnccl-stub.so");
    let mut compiler = Command::new("cc");
    compiler.args(["-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread", source, "-o"]).arg(&file);
    let output = compiler.args(arguments).output().expect("a C compiler called `cc` is on the path");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    file
}

/// A stand-in of its own for one test.
pub(crate) struct Stub {
    pub(crate) file: PathBuf,
    raw: libloading::Library,
    _directory: TempDir,
}

impl Stub {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new().expect("a directory for a copy");
        let file = directory.path().join("libnccl-copy.so");
        fs::write(&file, BUILT.as_slice()).expect("there is room for a copy");
        // SAFETY: the stand-in's initialisers do nothing.
        let raw = unsafe { libloading::Library::new(&file) }.expect("the stand-in can be loaded");
        Self { file, raw, _directory: directory }
    }

    /// One that says it is of `version`.
    pub(crate) fn of(version: Version) -> Self {
        let stub = Self::new();
        let code = version.major * 10_000 + version.minor * 100 + version.patch;
        // SAFETY: the type is that of `stub.c`.
        unsafe { stub.function::<unsafe extern "C" fn(c_int)>("stub_set_version")(code as c_int) };
        stub
    }

    pub(crate) fn library(&self) -> Library {
        Library::open(&self.file).expect("the stand-in has all functions")
    }

    /// # Safety
    /// `F` is the type of the function in `stub.c`.
    unsafe fn function<F: Copy>(&self, name: &str) -> F {
        // SAFETY: promised by the caller.
        *unsafe { self.raw.get::<F>(name) }.expect("the stand-in has it")
    }

    /// Lets calls of `name` fail from now on; with 0 no longer.
    pub(crate) fn fail(&self, name: &str, answer: c_int) {
        let name = CString::new(name).expect("no zero byte");
        // SAFETY: the type is that of `stub.c`.
        unsafe {
            self.function::<unsafe extern "C" fn(*const c_char, c_int)>("stub_fail")(name.as_ptr(), answer);
        }
    }

    /// How often `name` was called.
    pub(crate) fn calls(&self, name: &str) -> c_int {
        let name = CString::new(name).expect("no zero byte");
        // SAFETY: the type is that of `stub.c`.
        unsafe { self.function::<unsafe extern "C" fn(*const c_char) -> c_int>("stub_calls")(name.as_ptr()) }
    }

    /// Lets communicators be in progress for ever.
    pub(crate) fn set_endless(&self, on: bool) {
        // SAFETY: the type is that of `stub.c`.
        unsafe { self.function::<unsafe extern "C" fn(c_int)>("stub_set_endless")(on.into()) }
    }

    /// Lets communicators that are made from now on block or not, whatever their configuration says, as the
    /// environment variable `NCCL_COMM_BLOCKING` does.
    pub(crate) fn set_blocking(&self, on: bool) {
        // SAFETY: the type is that of `stub.c`.
        unsafe { self.function::<unsafe extern "C" fn(c_int)>("stub_set_blocking")(on.into()) }
    }

    /// Lets communicators meet this fault in the background.
    pub(crate) fn set_async_error(&self, answer: c_int) {
        // SAFETY: the type is that of `stub.c`.
        unsafe {
            let set = self.function::<unsafe extern "C" fn(c_int, *const c_char)>("stub_set_async_error");
            set(answer, std::ptr::null());
        }
    }

    /// Groups that this thread has open.
    pub(crate) fn open_groups(&self) -> c_int {
        // SAFETY: the type is that of `stub.c`.
        unsafe { self.function::<unsafe extern "C" fn() -> c_int>("stub_open_groups")() }
    }

    /// A number of the last configuration that was read.
    pub(crate) fn config(&self, field: &str) -> c_long {
        let field = CString::new(field).expect("no zero byte");
        // SAFETY: the type is that of `stub.c`.
        unsafe {
            self.function::<unsafe extern "C" fn(*const c_char) -> c_long>("stub_config")(field.as_ptr())
        }
    }

    /// A text of the last configuration that was read.
    pub(crate) fn config_text(&self, field: &str) -> Option<String> {
        type Ask = unsafe extern "C" fn(*const c_char) -> *const c_char;
        let field = CString::new(field).expect("no zero byte");
        // SAFETY: the type is that of `stub.c`; the text lives as long as the process.
        unsafe {
            let text = self.function::<Ask>("stub_config_text")(field.as_ptr());
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    }

    /// The only rank of a communicator.
    pub(crate) fn alone(&self, config: &Config) -> Communicator {
        let library = self.library();
        let id = UniqueId::new(&library).expect("no failure is asked for");
        let communicator = Communicator::init(&library, &id, 0, 1, config).expect("no other rank is needed");
        communicator.wait(Deadline::after(LONG)).expect("no other rank is needed");
        communicator
    }

    /// Runs `rank` on each of `count` ranks, with a communicator of them all, and gives what they return.
    pub(crate) fn ranks<T: Send>(
        &self,
        count: usize,
        config: &Config,
        rank: impl Fn(Communicator) -> T + Sync,
    ) -> Vec<T> {
        let library = self.library();
        let id = UniqueId::new(&library).expect("no failure is asked for");
        thread::scope(|scope| {
            let start = |place| {
                let (library, rank) = (&library, &rank);
                scope.spawn(move || {
                    let communicator = Communicator::init(library, &id, place, count, config);
                    let communicator = communicator.expect("no failure is asked for");
                    communicator.wait(Deadline::after(LONG)).expect("all ranks come");
                    rank(communicator)
                })
            };
            let threads: Vec<_> = (0..count).map(start).collect();
            threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
        })
    }
}

/// Types that the stand-in can combine.
pub(crate) trait Value: Copy {
    const TYPE: DataType;
}

macro_rules! values {
    ($($value:ty => $data_type:ident),+) => {
        $(impl Value for $value { const TYPE: DataType = DataType::$data_type; })+
    };
}

values!(i8 => I8, u8 => U8, i32 => I32, u32 => U32, i64 => I64, u64 => U64, f32 => F32, f64 => F64);

/// Values for an operation to read.
pub(crate) fn lend<T: Value>(values: &[T]) -> DeviceSlice<'_> {
    // SAFETY: the stand-in's device memory is the host's, and its operations have ended when they return.
    unsafe { DeviceSlice::from_raw_parts(values.as_ptr() as u64, values.len(), T::TYPE, 0) }
}

/// Values for an operation to write.
pub(crate) fn lend_mut<T: Value>(values: &mut [T]) -> DeviceSliceMut<'_> {
    // SAFETY: as in `lend`.
    unsafe { DeviceSliceMut::from_raw_parts(values.as_mut_ptr() as u64, values.len(), T::TYPE, 0) }
}
