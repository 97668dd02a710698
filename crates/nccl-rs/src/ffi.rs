//! The calls of the library as safe functions, but for one that cannot be. All `unsafe` blocks of the crate
//! are here, but for the one of `registration.rs` that passes a promise on.

use std::cell::Cell;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::os::unix;

use crate::config::RawConfig;
use crate::error::{Code, Failure};
use crate::memory::{DeviceSlice, DeviceSliceMut, Region, Stream};
use crate::types::ReduceOp;
use crate::unique_id::UniqueId;
use crate::version::Version;

/// `ncclResult_t`.
type Answer = c_int;

/// `ncclComm_t`.
type Comm = *mut c_void;

const SUCCESS: Answer = 0;
const IN_PROGRESS: Answer = 7;

/// `NCCL_SPLIT_NOCOLOR`.
const NO_COLOR: c_int = -1;

/// `ncclUniqueId`, which calls take by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawId([u8; UniqueId::BYTES]);

/// Declares the table of functions: those that every version since [`Version::MINIMUM`] has, and later ones.
macro_rules! functions {
    (
        always { $($always:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)+ }
        later { $($later:ident = $later_symbol:literal: fn($($later_argument:ty),*);)+ }
    ) => {
        struct Functions {
            $($always: unsafe extern "C" fn($($argument),*) -> $result,)+
            $($later: Option<unsafe extern "C" fn($($later_argument),*) -> Answer>,)+
        }

        impl Functions {
            /// Finds them, or names the first that is missing.
            fn find(library: &unix::Library) -> Result<Self, &'static str> {
                // SAFETY: the types are those of `nccl.h`, and the library is never unloaded.
                unsafe {
                    Ok(Self {
                        $($always: *library.get($symbol).map_err(|_| $symbol)?,)+
                        $($later: library.get($later_symbol).ok().map(|found| *found),)+
                    })
                }
            }
        }
    };
}

functions! {
    always {
        get_unique_id = "ncclGetUniqueId": fn(*mut RawId) -> Answer;
        get_error_string = "ncclGetErrorString": fn(Answer) -> *const c_char;
        get_last_error = "ncclGetLastError": fn(Comm) -> *const c_char;
        group_start = "ncclGroupStart": fn() -> Answer;
        group_end = "ncclGroupEnd": fn() -> Answer;
        comm_init_rank_config = "ncclCommInitRankConfig":
            fn(*mut Comm, c_int, RawId, c_int, *mut RawConfig) -> Answer;
        comm_split = "ncclCommSplit": fn(Comm, c_int, c_int, *mut Comm, *mut RawConfig) -> Answer;
        comm_finalize = "ncclCommFinalize": fn(Comm) -> Answer;
        comm_destroy = "ncclCommDestroy": fn(Comm) -> Answer;
        comm_abort = "ncclCommAbort": fn(Comm) -> Answer;
        comm_get_async_error = "ncclCommGetAsyncError": fn(Comm, *mut Answer) -> Answer;
        comm_count = "ncclCommCount": fn(Comm, *mut c_int) -> Answer;
        comm_user_rank = "ncclCommUserRank": fn(Comm, *mut c_int) -> Answer;
        comm_cu_device = "ncclCommCuDevice": fn(Comm, *mut c_int) -> Answer;
        all_reduce = "ncclAllReduce":
            fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> Answer;
        reduce_scatter = "ncclReduceScatter":
            fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> Answer;
        all_gather = "ncclAllGather":
            fn(*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> Answer;
        broadcast = "ncclBroadcast":
            fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> Answer;
        reduce = "ncclReduce":
            fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, Comm, *mut c_void) -> Answer;
        send = "ncclSend": fn(*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> Answer;
        recv = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> Answer;
    }
    later {
        comm_register = "ncclCommRegister": fn(Comm, *mut c_void, usize, *mut *mut c_void);
        comm_deregister = "ncclCommDeregister": fn(Comm, *mut c_void);
    }
}

/// What a call without an error says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// All is done, or on its stream.
    Done,
    /// The library works on it in the background.
    Running,
}

/// What the library says of what it does in the background.
#[derive(Debug)]
pub(crate) enum Background {
    /// It does nothing.
    Idle,
    /// It works.
    Running,
    /// It met a fault, and does nothing more.
    Broken(Failure),
}

/// Why a call on a communicator did not happen or failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// There is no communicator any more.
    Gone,
    /// The library lacks this function, which its version should have.
    Missing(&'static str),
    /// The library says so.
    Failed(Failure),
}

/// Why a library cannot be used.
#[derive(Debug)]
pub(crate) enum OpenError {
    NotLoaded { problem: String },
    MissingSymbol { symbol: &'static str },
    TooOld { found: Version },
    NoVersion(Failure),
}

/// The library's functions.
pub(crate) struct Api {
    functions: Functions,
    version: Version,
}

impl Api {
    /// Loads `name`, or finds it among the libraries of the process.
    pub(crate) fn open(name: &OsStr, only_loaded: bool) -> Result<Self, OpenError> {
        let mode = unix::RTLD_NOW | unix::RTLD_LOCAL | if only_loaded { libc::RTLD_NOLOAD } else { 0 };
        // SAFETY: NCCL's initialisers need nothing, and its functions have the types below. That the file is
        // an NCCL cannot be checked: it is the exception that the README names under "What is safe", for
        // `Library::open` and for `NCCL_RS_LIBRARY` and the search path, which are the user's to set.
        let library = unsafe { unix::Library::open(Some(name), mode) }.map_err(|error| {
            let problem = if only_loaded { "not loaded".to_owned() } else { chain(&error) };
            OpenError::NotLoaded { problem }
        })?;
        let version = version_of(&library)?;
        if version < Version::MINIMUM {
            return Err(OpenError::TooOld { found: version });
        }
        let functions = Functions::find(&library).map_err(|symbol| OpenError::MissingSymbol { symbol })?;
        // Its threads may run when the last communicator is gone: unloading would take their code away.
        std::mem::forget(library);
        Ok(Self { functions, version })
    }

    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// The file that holds the functions.
    pub(crate) fn file(&self) -> Option<PathBuf> {
        let mut found = MaybeUninit::<libc::Dl_info>::zeroed();
        let inside = self.functions.get_unique_id as *const c_void;
        // SAFETY: the system looks the address up and writes one description.
        let known = unsafe { libc::dladdr(inside, found.as_mut_ptr()) } != 0;
        // SAFETY: zeros are valid in it, and the text lives as long as the library, which is never unloaded.
        let name = unsafe { found.assume_init() }.dli_fname;
        // SAFETY: as above; it is null or ends with a zero byte.
        let name = (known && !name.is_null()).then(|| unsafe { CStr::from_ptr(name) })?;
        Some(PathBuf::from(OsStr::from_bytes(name.to_bytes())))
    }

    pub(crate) fn unique_id(&self) -> Result<[u8; UniqueId::BYTES], Failure> {
        let mut id = RawId([0; UniqueId::BYTES]);
        // SAFETY: the library writes one id.
        self.check("ncclGetUniqueId", unsafe { (self.functions.get_unique_id)(&raw mut id) })?;
        Ok(id.0)
    }

    pub(crate) fn group_start(&self) -> Result<Progress, Failure> {
        // SAFETY: has no requirements; counts for this thread alone.
        self.check("ncclGroupStart", unsafe { (self.functions.group_start)() })
    }

    pub(crate) fn group_end(&self) -> Result<Progress, Failure> {
        // SAFETY: has no requirements; what was called since the start is still lent, see `Group`.
        self.check("ncclGroupEnd", unsafe { (self.functions.group_end)() })
    }

    pub(crate) fn last_error(&self) -> Option<String> {
        // SAFETY: no version looks at the communicator, so it may be null. The answer is a static buffer that
        // always ends with a zero; a warning of another thread in this moment mixes two texts at worst.
        let text = unsafe { text((self.functions.get_last_error)(ptr::null_mut())) };
        text.filter(|text| !text.is_empty())
    }

    fn check(&self, call: &'static str, answer: Answer) -> Result<Progress, Failure> {
        match answer {
            SUCCESS => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::Running),
            answer => Err(self.failure(call, answer)),
        }
    }

    fn failure(&self, call: &'static str, answer: Answer) -> Failure {
        // SAFETY: takes any number and gives a constant.
        let meaning = unsafe { text((self.functions.get_error_string)(answer)) };
        let meaning = meaning.unwrap_or_else(|| format!("error {answer}"));
        Failure { call, code: Code::from_raw(answer), meaning, last_error: self.last_error() }
    }
}

/// Asks for the version before anything else: old libraries lack other functions.
fn version_of(library: &unix::Library) -> Result<Version, OpenError> {
    const CALL: &str = "ncclGetVersion";
    let mut code = 0;
    // SAFETY: the type is that of `nccl.h`, of all versions; the library writes one number.
    let answer = unsafe {
        let get_version = library.get::<unsafe extern "C" fn(*mut c_int) -> Answer>(CALL);
        get_version.map_err(|_| OpenError::MissingSymbol { symbol: CALL })?(&raw mut code)
    };
    match u32::try_from(code) {
        Ok(code) if answer == SUCCESS => Ok(Version::from_code(code)),
        _ => Err(OpenError::NoVersion(Failure {
            call: CALL,
            code: Code::from_raw(answer),
            meaning: format!("answer {answer}, version {code}"),
            last_error: None,
        })),
    }
}

/// What the system says: the error of the loader hides it in its source.
fn chain(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// A text of the library; `None` for null.
///
/// # Safety
/// `text` is null or ends with a zero byte.
unsafe fn text(text: *const c_char) -> Option<String> {
    // SAFETY: promised by the caller.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// A communicator of the library, until it is destroyed or aborted.
pub(crate) struct Handle {
    api: Arc<Api>,
    /// Null when it is gone.
    comm: Cell<Comm>,
}

// SAFETY: the library lets any thread use a communicator, one at a time (user guide, "Thread Safety"): a
// handle can move between threads, and is not `Sync`.
unsafe impl Send for Handle {}

impl Handle {
    /// Joins a communicator on the thread's current device.
    ///
    /// `size` ranks and `rank` fit 31 bits.
    pub(crate) fn init(
        api: &Arc<Api>,
        id: &UniqueId,
        (rank, size): (c_int, c_int),
        mut config: RawConfig,
    ) -> Result<(Self, Progress), Failure> {
        let mut comm = ptr::null_mut();
        // SAFETY: the library copies id and configuration, but for texts, which live for ever; it writes the
        // communicator before it returns, also when it goes on in the background.
        let answer = unsafe {
            let id = RawId(*id.as_bytes());
            (api.functions.comm_init_rank_config)(&raw mut comm, size, id, rank, &raw mut config)
        };
        let handle = Self { api: Arc::clone(api), comm: Cell::new(comm) };
        // What is left of a failed start goes with the handle.
        Ok((handle, api.check("ncclCommInitRankConfig", answer)?))
    }

    /// Makes a communicator of those ranks of this one that name the same color; none for no color.
    ///
    /// `settle` is called when the library goes on in the background: it waits until that has ended, or
    /// aborts this communicator and fails.
    pub(crate) fn split<E: From<Fault>>(
        &self,
        color: Option<c_int>,
        key: c_int,
        config: Option<RawConfig>,
        settle: impl FnOnce() -> Result<(), E>,
    ) -> Result<Option<Self>, E> {
        // A thread of the library may write here until the split has ended.
        let slot = Box::new(AtomicPtr::new(ptr::null_mut()));
        let mut config = config;
        let config = config.as_mut().map_or(ptr::null_mut(), ptr::from_mut);
        let color = color.unwrap_or(NO_COLOR);
        let made = self.call("ncclCommSplit", |functions, comm| {
            // SAFETY: the communicator lives; the library copies the configuration, but for texts, which live
            // for ever; the slot lives until the split has ended, see below.
            unsafe { (functions.comm_split)(comm, color, key, slot.as_ptr(), config) }
        });
        let ended = match made {
            Ok(Progress::Done) => Ok(()),
            Ok(Progress::Running) => settle(),
            Err(fault) => Err(fault.into()),
        };
        if ended.is_err() && self.is_running() {
            // Nobody knows when the library writes: the slot has to stay.
            Box::leak(slot);
            return ended.map(|()| None);
        }
        let comm = slot.load(Ordering::Acquire);
        let child = (!comm.is_null()).then(|| Self { api: Arc::clone(&self.api), comm: Cell::new(comm) });
        ended.map(|()| child)
    }

    /// Whether there is a communicator.
    pub(crate) fn is_live(&self) -> bool {
        !self.comm.get().is_null()
    }

    fn is_running(&self) -> bool {
        matches!(self.background(), Ok(Background::Running))
    }

    pub(crate) fn background(&self) -> Result<Background, Fault> {
        const CALL: &str = "ncclCommGetAsyncError";
        let mut state = SUCCESS;
        self.call(CALL, |functions, comm| {
            // SAFETY: the communicator lives; the library writes one number.
            unsafe { (functions.comm_get_async_error)(comm, &raw mut state) }
        })?;
        Ok(match self.api.check(CALL, state) {
            Ok(Progress::Done) => Background::Idle,
            Ok(Progress::Running) => Background::Running,
            Err(failure) => Background::Broken(failure),
        })
    }

    pub(crate) fn finalize(&self) -> Result<Progress, Fault> {
        // SAFETY: the communicator lives.
        self.call("ncclCommFinalize", |functions, comm| unsafe { (functions.comm_finalize)(comm) })
    }

    /// Frees the communicator; whatever the answer, it is gone then.
    pub(crate) fn destroy(&self) -> Result<Progress, Fault> {
        self.end("ncclCommDestroy", self.api.functions.comm_destroy)
    }

    /// Stops the communicator and frees it; whatever the answer, it is gone then.
    pub(crate) fn abort(&self) -> Result<Progress, Fault> {
        self.end("ncclCommAbort", self.api.functions.comm_abort)
    }

    fn end(&self, call: &'static str, end: unsafe extern "C" fn(Comm) -> Answer) -> Result<Progress, Fault> {
        let comm = self.comm.replace(ptr::null_mut());
        if comm.is_null() {
            return Err(Fault::Gone);
        }
        // SAFETY: the communicator lives, and from here on nobody can name it.
        self.api.check(call, unsafe { end(comm) }).map_err(Fault::Failed)
    }

    pub(crate) fn count(&self) -> Result<c_int, Fault> {
        self.number("ncclCommCount", self.api.functions.comm_count)
    }

    pub(crate) fn rank(&self) -> Result<c_int, Fault> {
        self.number("ncclCommUserRank", self.api.functions.comm_user_rank)
    }

    pub(crate) fn device(&self) -> Result<c_int, Fault> {
        self.number("ncclCommCuDevice", self.api.functions.comm_cu_device)
    }

    fn number(
        &self,
        call: &'static str,
        ask: unsafe extern "C" fn(Comm, *mut c_int) -> Answer,
    ) -> Result<c_int, Fault> {
        let mut number = 0;
        // SAFETY: the communicator lives; the library writes one number.
        self.call(call, |_, comm| unsafe { ask(comm, &raw mut number) })?;
        Ok(number)
    }

    /// Input and output have as many values of one type.
    pub(crate) fn all_reduce(
        &self,
        from: DeviceSlice<'_>,
        to: &DeviceSliceMut<'_>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<Progress, Fault> {
        let (count, of, op) = (to.len(), to.data_type().code(), op.code());
        self.call("ncclAllReduce", |functions, comm| {
            // SAFETY: the communicator lives. The library reads and writes `count` values, which both slices
            // have; their makers promised that the memory outlives the work, as the stream's maker did.
            unsafe {
                let (from, to) = (pointer(from.region), pointer(to.region));
                (functions.all_reduce)(from, to, count, of, op, comm, stream.as_raw())
            }
        })
    }

    /// The input has the output's number of values for each rank, of one type.
    pub(crate) fn reduce_scatter(
        &self,
        from: DeviceSlice<'_>,
        to: &DeviceSliceMut<'_>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<Progress, Fault> {
        let (count, of, op) = (to.len(), to.data_type().code(), op.code());
        self.call("ncclReduceScatter", |functions, comm| {
            // SAFETY: as in `all_reduce`, but for `count` values for each rank in the input.
            unsafe {
                let (from, to) = (pointer(from.region), pointer(to.region));
                (functions.reduce_scatter)(from, to, count, of, op, comm, stream.as_raw())
            }
        })
    }

    /// The output has the input's number of values for each rank, of one type.
    pub(crate) fn all_gather(
        &self,
        from: DeviceSlice<'_>,
        to: &DeviceSliceMut<'_>,
        stream: Stream,
    ) -> Result<Progress, Fault> {
        let (count, of) = (from.len(), from.data_type().code());
        self.call("ncclAllGather", |functions, comm| {
            // SAFETY: as in `all_reduce`, but for `count` values of each rank in the output.
            unsafe {
                let (from, to) = (pointer(from.region), pointer(to.region));
                (functions.all_gather)(from, to, count, of, comm, stream.as_raw())
            }
        })
    }

    /// `root` is a rank.
    pub(crate) fn broadcast(
        &self,
        buffer: &DeviceSliceMut<'_>,
        root: c_int,
        stream: Stream,
    ) -> Result<Progress, Fault> {
        let (count, of) = (buffer.len(), buffer.data_type().code());
        self.call("ncclBroadcast", |functions, comm| {
            // SAFETY: as in `all_reduce`, in place.
            unsafe {
                let buffer = pointer(buffer.region);
                (functions.broadcast)(buffer, buffer, count, of, root, comm, stream.as_raw())
            }
        })
    }

    /// `root` is a rank, and this one only where there is an output; it is as the input.
    pub(crate) fn reduce(
        &self,
        from: DeviceSlice<'_>,
        to: Option<&DeviceSliceMut<'_>>,
        op: ReduceOp,
        root: c_int,
        stream: Stream,
    ) -> Result<Progress, Fault> {
        let (count, of, op) = (from.len(), from.data_type().code(), op.code());
        self.call("ncclReduce", |functions, comm| {
            // SAFETY: as in `all_reduce`; the output may be null where this rank is not the root.
            unsafe {
                let to = to.map_or(ptr::null_mut(), |to| pointer(to.region));
                (functions.reduce)(pointer(from.region), to, count, of, op, root, comm, stream.as_raw())
            }
        })
    }

    /// `peer` is a rank.
    pub(crate) fn send(&self, from: DeviceSlice<'_>, peer: c_int, stream: Stream) -> Result<Progress, Fault> {
        let (count, of) = (from.len(), from.data_type().code());
        self.call("ncclSend", |functions, comm| {
            // SAFETY: as in `all_reduce`.
            unsafe { (functions.send)(pointer(from.region), count, of, peer, comm, stream.as_raw()) }
        })
    }

    /// `peer` is a rank.
    pub(crate) fn recv(
        &self,
        to: &DeviceSliceMut<'_>,
        peer: c_int,
        stream: Stream,
    ) -> Result<Progress, Fault> {
        let (count, of) = (to.len(), to.data_type().code());
        self.call("ncclRecv", |functions, comm| {
            // SAFETY: as in `all_reduce`.
            unsafe { (functions.recv)(pointer(to.region), count, of, peer, comm, stream.as_raw()) }
        })
    }

    /// Tells the library of memory that operations will use again and again.
    ///
    /// # Safety
    /// The memory stays until it is given to [`Self::deregister`] or the communicator is gone.
    pub(crate) unsafe fn register(&self, memory: DeviceSlice<'_>) -> Result<Registered, Fault> {
        let register = self.api.functions.comm_register.ok_or(Fault::Missing("ncclCommRegister"))?;
        let (address, bytes) = (pointer(memory.region), memory.len() * memory.data_type().bytes());
        let mut handle = ptr::null_mut();
        self.call("ncclCommRegister", |_, comm| {
            // SAFETY: the communicator lives; the memory does, as promised; the library writes one handle.
            unsafe { register(comm, address, bytes, &raw mut handle) }
        })?;
        Ok(Registered(handle))
    }

    /// Takes back what [`Self::register`] of this communicator gave.
    pub(crate) fn deregister(&self, registered: Registered) -> Result<Progress, Fault> {
        let deregister = self.api.functions.comm_deregister.ok_or(Fault::Missing("ncclCommDeregister"))?;
        // SAFETY: the communicator lives, and its handle is used once.
        self.call("ncclCommDeregister", |_, comm| unsafe { deregister(comm, registered.0) })
    }

    /// Calls `call` on the communicator.
    fn call(
        &self,
        call: &'static str,
        ask: impl FnOnce(&Functions, Comm) -> Answer,
    ) -> Result<Progress, Fault> {
        if !self.is_live() {
            return Err(Fault::Gone);
        }
        self.api.check(call, ask(&self.api.functions, self.comm.get())).map_err(Fault::Failed)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Nobody is there to tell when it fails, or when it was gone before.
        let _ = self.abort();
    }
}

/// The library's handle of registered memory.
#[derive(Debug)]
pub(crate) struct Registered(*mut c_void);

fn pointer(region: Region) -> *mut c_void {
    ptr::with_exposed_provenance_mut(region.address as usize)
}
