//! One device: its kernels, loaded when first used, and launches.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::fmt::{self, Debug};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUfunction_attribute_enum::{
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError, result, sys};
use cudarc::nvrtc::Ptx;

use crate::address::Arg;
use crate::compile::{Compiler, cache_directory};
use crate::error::CudaError;
use crate::product::Products;
use crate::source::Source;

/// Dynamic shared memory that a kernel may use without asking.
const SHARED_WITHOUT_ASKING: usize = 48 << 10;

/// A stream of the driver; the default one is null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub sys::CUstream);

// SAFETY: a stream handle may be used from any thread; the driver serialises what it is given.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// The default stream.
    pub const DEFAULT: Self = Self(ptr::null_mut());
}

/// Where operations go: a device and one of its streams.
#[derive(Debug, Clone, Copy)]
pub struct Queue<'a> {
    /// The device.
    pub gpu: &'a Gpu,
    /// The stream.
    pub stream: Stream,
}

/// Sizes of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Blocks in each direction.
    pub(crate) blocks: [u32; 3],
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block, bytes.
    pub(crate) shared: usize,
}

impl Grid {
    /// `blocks` blocks of `threads` threads without dynamic shared memory.
    pub(crate) const fn new(blocks: u32, threads: u32) -> Self {
        Self { blocks: [blocks, 1, 1], threads, shared: 0 }
    }
}

/// Compute capability of Hopper.
const HOPPER: (i32, i32) = (9, 0);

/// An open device.
pub struct Gpu {
    context: Arc<CudaContext>,
    name: String,
    capability: (i32, i32),
    warpgroup_products: bool,
    multiprocessors: u32,
    one_pass_attention: Option<bool>,
    shared_per_block: usize,
    compiler: Compiler,
    modules: Mutex<HashMap<Source, Arc<CudaModule>>>,
    kernels: Mutex<HashMap<(&'static str, String), Kernel>>,
    products: Mutex<Option<Products>>,
}

/// A loaded kernel and the dynamic shared memory that it may use, bytes.
struct Kernel {
    function: CudaFunction,
    shared: usize,
}

impl Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu")
            .field("name", &self.name)
            .field("compiler", &self.compiler)
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// Opens device `ordinal` in its primary context, which LibTorch uses too.
    ///
    /// # Errors
    /// Whatever keeps the device from running kernels; nothing is compiled yet.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(failed("opening the device"))?;
        let name = context.name().map_err(failed("asking for the device's name"))?;
        let (major, minor) = context.compute_capability().map_err(failed("asking for the capability"))?;
        if major < 8 {
            return Err(CudaError::Capability { name, major, minor });
        }
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(attribute).map_err(failed("counting multiprocessors"))?;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_per_block = context.attribute(attribute).map_err(failed("asking for shared memory"))?;
        Ok(Self {
            context,
            name,
            capability: (major, minor),
            warpgroup_products: (major, minor) == HOPPER,
            multiprocessors: multiprocessors as u32,
            one_pass_attention: None,
            shared_per_block: shared_per_block as usize,
            compiler: Compiler::new(architecture(major, minor), cache_directory()),
            modules: Mutex::default(),
            kernels: Mutex::default(),
            products: Mutex::default(),
        })
    }

    /// Devices that the driver sees.
    ///
    /// # Errors
    /// When there is no driver, or it does not answer.
    pub fn count() -> Result<usize, CudaError> {
        // SAFETY: only looks whether a library can be loaded; the driver's initialisers have no requirements.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        CudaContext::device_count().map(|count| count as usize).map_err(failed("counting devices"))
    }

    /// A stream, as long as the process lives. It waits for the default one, and the default one for it, but for an
    /// urgent one: that waits for marks alone, and its blocks get multiprocessors before those of others.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn new_stream(&self, urgent: bool) -> Result<Stream, CudaError> {
        let doing = "making a stream";
        self.context.bind_to_thread().map_err(failed(doing))?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the context is bound to this thread, and both take one number.
        let range = unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest) };
        range.result().map_err(failed(doing))?;
        let mut stream = ptr::null_mut();
        let (flags, priority) = match urgent {
            true => (sys::CUstream_flags::CU_STREAM_NON_BLOCKING, greatest),
            false => (sys::CUstream_flags::CU_STREAM_DEFAULT, least),
        };
        // SAFETY: the context is bound to this thread, and `stream` takes one.
        let made = unsafe { sys::cuStreamCreateWithPriority(&raw mut stream, flags as u32, priority) };
        made.result().map_err(failed(doing))?;
        Ok(Stream(stream))
    }

    /// Name, capability, memory, and whether kernels can be compiled for it.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn describe(&self) -> Result<String, CudaError> {
        let (free, total) = self.context.mem_get_info().map_err(failed("asking for memory"))?;
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let (major, minor) = self.capability;
        let compiler = match Compiler::is_there() {
            true => "NVRTC found",
            false => "NVRTC not found: put its directory into LD_LIBRARY_PATH",
        };
        Ok(format!(
            "{}, compute capability {major}.{minor}, {:.1} of {:.1} GiB free, {compiler}",
            self.name,
            gib(free),
            gib(total)
        ))
    }

    /// The device's name, such as `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Shared memory that a block can have, bytes: 227 KiB on an H100, 163 on an A100, 99 on others.
    pub fn shared_per_block(&self) -> usize {
        self.shared_per_block
    }

    /// Whether it has Hopper's matrix products of a warpgroup, which no GPU before or after it has.
    pub fn has_warpgroup_products(&self) -> bool {
        self.warpgroup_products
    }

    /// The same device as if it had none of them, to compare kernels.
    #[must_use]
    pub fn without_warpgroup_products(self) -> Self {
        Self { warpgroup_products: false, ..self }
    }

    /// The same device, where attention always goes backward in one pass, if it can, or never, to compare kernels;
    /// by itself it does where heads fill the multiprocessors.
    #[must_use]
    pub fn with_one_pass_attention(self, always: bool) -> Self {
        Self { one_pass_attention: Some(always), ..self }
    }

    /// Whether attention always or never goes backward in one pass, if that was said.
    pub fn one_pass_attention(&self) -> Option<bool> {
        self.one_pass_attention
    }

    /// Multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// The device's primary context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// What is known of products; none before the first.
    pub(crate) fn products(&self) -> &Mutex<Option<Products>> {
        &self.products
    }

    /// Waits until `stream` has done all that it was asked for.
    ///
    /// # Errors
    /// When something failed on the device.
    pub fn finish(&self, stream: Stream) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: streams live as long as the process.
        unsafe { result::stream::synchronize(stream.0) }.map_err(failed("finishing work"))
    }

    /// Waits until all streams are through.
    pub(crate) fn finish_all(&self) -> Result<(), CudaError> {
        self.context.synchronize().map_err(failed("finishing work"))
    }

    /// Makes this the device of the thread, for CUDA's runtime too.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(failed("binding the device"))
    }

    /// Starts kernel `name` of `source`.
    ///
    /// # Errors
    /// When the source does not compile or the driver refuses the launch. What goes wrong on the device
    /// shows in a later call.
    ///
    /// # Safety
    /// `args` must be what the kernel takes, and its addresses as the crate's documentation demands.
    pub(crate) unsafe fn launch(
        &self,
        source: &Source,
        name: &str,
        grid: Grid,
        stream: Stream,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(source, name, grid.shared)?;
        let mut pointers: Vec<*mut c_void> =
            args.iter().map(|arg| ptr::from_ref(&arg.0).cast_mut().cast()).collect();
        let [x, y, z] = grid.blocks;
        self.bind()?;
        // SAFETY: the driver copies arguments before it returns; the rest is promised by the caller.
        let launched = unsafe {
            result::launch_kernel(
                kernel.cu_function(),
                (x, y, z),
                (grid.threads, 1, 1),
                grid.shared as u32,
                stream.0,
                &mut pointers,
            )
        };
        launched.map_err(failed(name))
    }

    fn kernel(&self, source: &Source, name: &str, shared: usize) -> Result<CudaFunction, CudaError> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = match kernels.entry((source.name, name.to_owned())) {
            Entry::Occupied(kernel) => kernel.into_mut(),
            Entry::Vacant(place) => {
                let function = self.module(source)?.load_function(name).map_err(failed(name))?;
                place.insert(Kernel { function, shared: SHARED_WITHOUT_ASKING })
            }
        };
        if shared > kernel.shared {
            let set =
                |attribute, value| kernel.function.set_attribute(attribute, value).map_err(failed(name));
            set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32)?;
            set(CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)?;
            kernel.shared = shared;
        }
        Ok(kernel.function.clone())
    }

    fn module(&self, source: &Source) -> Result<Arc<CudaModule>, CudaError> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(source) {
            return Ok(Arc::clone(module));
        }
        let code = self.compiler.compile(source)?;
        let module = self.context.load_module(Ptx::from_binary(code)).map_err(failed(source.name))?;
        modules.insert(*source, Arc::clone(&module));
        Ok(module)
    }
}

/// Machine code that makes most of a device; `sm_90a` has the instructions that only Hopper has.
fn architecture(major: i32, minor: i32) -> String {
    let own = if major == 9 { "a" } else { "" };
    format!("sm_{major}{minor}{own}")
}

pub(crate) fn failed(doing: &str) -> impl Fn(DriverError) -> CudaError + '_ {
    move |source| CudaError::Driver { doing: doing.to_owned(), source }
}
