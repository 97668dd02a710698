//! cuBLASLt as products need it: descriptors, algorithms and launches.
//!
//! The library counts matrices column by column. A matrix that lies row by row is its own transpose to
//! it, so `out = a b` is asked for as `out^T = b^T a^T`: what is called A there is our second factor.

use std::ffi::c_void;
use std::fmt::{self, Display};
use std::mem::zeroed;
use std::ptr;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys;
use cudarc::cublaslt::sys::cublasLtMatmulAlgoConfigAttributes_t as Config;
use cudarc::cublaslt::sys::cublasLtMatmulDescAttributes_t as Operation;
use cudarc::cublaslt::sys::cublasLtMatmulPreferenceAttributes_t as Preferred;
use cudarc::cublaslt::sys::cublasLtMatrixLayoutAttribute_t as Laid;

use crate::address::{Address, Format};
use crate::error::CudaError;
use crate::gpu::Stream;
use crate::product::{Epilogue, Factor, Product, ProductAt, Rows};

/// What every address is a multiple of, bytes.
pub(crate) const ALIGNMENT: u32 = 16;

/// The library, opened for one device.
pub(crate) struct BlasLt(sys::cublasLtHandle_t);

// SAFETY: the library lets any thread use a handle.
unsafe impl Send for BlasLt {}

/// A way to compute a product, of those that the library has.
///
/// Its bytes mean something to the version of the library that made them, and to no other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Algorithm {
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

/// A product as the library is told of it.
pub(crate) struct Described {
    operation: OperationDescriptor,
    first: Layout,
    second: Layout,
    onto: Layout,
    out: Layout,
    adds: bool,
}

impl BlasLt {
    /// Whether the library can be loaded; where LibTorch runs on a GPU, it has loaded it.
    pub(crate) fn is_there() -> bool {
        static THERE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        // SAFETY: only looks whether a library can be loaded; its initialisers have no requirements.
        *THERE.get_or_init(|| unsafe { sys::is_culib_present() })
    }

    /// Opens the library for the device that is bound to this thread.
    pub(crate) fn open() -> Result<Self, CudaError> {
        if !Self::is_there() {
            return Err(CudaError::NoBlas);
        }
        let mut handle = ptr::null_mut();
        // SAFETY: `handle` takes one handle.
        check("opening cuBLASLt", unsafe { sys::cublasLtCreate(&raw mut handle) })?;
        Ok(Self(handle))
    }

    /// The library's version.
    pub(crate) fn version(&self) -> usize {
        // SAFETY: the library is open.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// Up to `most` algorithms for a product, those first that the library expects to be fastest; none
    /// where it cannot compute the product.
    ///
    /// Partial sums of algorithms that cut the inner dimension are float32 in the workspace and added in a fixed
    /// order: those that round them to the output's format, or let them race, are not asked for.
    pub(crate) fn algorithms(
        &self,
        described: &Described,
        workspace: usize,
        most: usize,
    ) -> Result<Vec<Algorithm>, CudaError> {
        let preference = Preference::new()?;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace as u64)?;
        let reduction = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Preferred::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction)?;
        for operand in [
            Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preferred::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(operand, ALIGNMENT)?;
        }
        // SAFETY: the structure is plain numbers, for which 0 stands for success.
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = vec![unsafe { zeroed() }; most];
        let mut count = 0;
        // SAFETY: the descriptors are alive, and `found` has room for `most` results.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.0,
                described.operation.0,
                described.first.0,
                described.second.0,
                described.onto.0,
                described.out.0,
                preference.0,
                most as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        if is_unsupported(status) {
            return Ok(Vec::new());
        }
        check("asking for algorithms", status)?;
        found.truncate(usize::try_from(count).unwrap_or_default());
        let usable = found.iter().filter(|result| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(usable.map(Algorithm::of).filter(|algorithm| algorithm.workspace <= workspace).collect())
    }

    /// The algorithm of these bytes, if it can compute the product with that much workspace.
    pub(crate) fn algorithm_of(
        &self,
        described: &Described,
        data: [u64; 8],
        workspace: usize,
    ) -> Option<Algorithm> {
        let algorithm = sys::cublasLtMatmulAlgo_t { data };
        // SAFETY: the structure is plain numbers, for which 0 stands for success.
        let mut result: sys::cublasLtMatmulHeuristicResult_t = unsafe { zeroed() };
        // SAFETY: the descriptors are alive; the library checks what the bytes say.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.0,
                described.operation.0,
                described.first.0,
                described.second.0,
                described.onto.0,
                described.out.0,
                &raw const algorithm,
                &raw mut result,
            )
        };
        let usable =
            status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= workspace;
        usable.then_some(Algorithm { algorithm, workspace: result.workspaceSize })
    }

    /// Starts a product.
    ///
    /// # Safety
    /// The addresses must be as [`crate::product`] demands, and the algorithm one for this product.
    pub(crate) unsafe fn launch(
        &self,
        described: &Described,
        algorithm: &Algorithm,
        at: ProductAt,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let (one, beta) = (1.0_f32, if described.adds { 1.0_f32 } else { 0.0 });
        let onto = if described.adds { at.onto } else { at.out };
        let address = |at: Address| at.0 as *mut c_void;
        // SAFETY: the descriptors are alive, factors are float32 in main memory as the operation's default
        // says, and the addresses are promised by the caller.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.0,
                described.operation.0,
                (&raw const one).cast(),
                address(at.b),
                described.first.0,
                address(at.a),
                described.second.0,
                (&raw const beta).cast(),
                address(onto),
                described.onto.0,
                address(at.out),
                described.out.0,
                &raw const algorithm.algorithm,
                address(at.workspace),
                algorithm.workspace,
                stream.0.cast(),
            )
        };
        check("starting a product", status)
    }
}

impl Drop for BlasLt {
    fn drop(&mut self) {
        // SAFETY: opened once and closed once. An error leaves nothing to be done.
        let _ = unsafe { sys::cublasLtDestroy(self.0) };
    }
}

impl Algorithm {
    fn of(result: &sys::cublasLtMatmulHeuristicResult_t) -> Self {
        Self { algorithm: result.algo, workspace: result.workspaceSize }
    }

    /// What [`BlasLt::algorithm_of`] makes it from.
    pub(crate) fn data(&self) -> [u64; 8] {
        self.algorithm.data
    }

    /// Bytes of workspace that it uses.
    pub fn workspace(&self) -> usize {
        self.workspace
    }

    /// One setting, 0 where the library does not know it.
    fn config<T: Into<u32> + Default>(&self, attribute: Config) -> u32 {
        let (mut value, mut written) = (T::default(), 0);
        // SAFETY: `value` has as many bytes as are named, all of which are a number.
        let status = unsafe {
            sys::cublasLtMatmulAlgoConfigGetAttribute(
                &raw const self.algorithm,
                attribute,
                ptr::from_mut(&mut value).cast(),
                size_of::<T>(),
                &raw mut written,
            )
        };
        if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS { value.into() } else { 0 }
    }
}

/// Its settings, numbered as in `cublasLt.h`.
impl Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "id {} tile {} stages {} split-k {} reduction {} swizzling {} custom {} inner {} cluster {}, \
             {} KiB",
            self.config::<u32>(Config::CUBLASLT_ALGO_CONFIG_ID),
            self.config::<u32>(Config::CUBLASLT_ALGO_CONFIG_TILE_ID),
            self.config::<u32>(Config::CUBLASLT_ALGO_CONFIG_STAGES_ID),
            self.config::<u32>(Config::CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
            self.config::<u32>(Config::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME),
            self.config::<u32>(Config::CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING),
            self.config::<u32>(Config::CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION),
            self.config::<u16>(Config::CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID),
            self.config::<u16>(Config::CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID),
            self.workspace.div_ceil(1024),
        )
    }
}

impl Described {
    pub(crate) fn new(product: &Product) -> Result<Self, CudaError> {
        let Product { count, rows, inner, cols, format, a, b, out, onto, epilogue, .. } = *product;
        let operation = OperationDescriptor::new(product)?;
        operation.set(Operation::CUBLASLT_MATMUL_DESC_TRANSA, transposition(b.transposed))?;
        operation.set(Operation::CUBLASLT_MATMUL_DESC_TRANSB, transposition(a.transposed))?;
        operation.set(Operation::CUBLASLT_MATMUL_DESC_EPILOGUE, code(epilogue) as u32)?;
        let factor = |factor: Factor, rows, cols| {
            let (rows, cols) = if factor.transposed { (cols, rows) } else { (rows, cols) };
            Layout::new(format, count, rows, cols, factor.rows)
        };
        Ok(Self {
            operation,
            first: factor(b, inner, cols)?,
            second: factor(a, rows, inner)?,
            onto: Layout::new(format, count, rows, cols, onto.unwrap_or(out))?,
            out: Layout::new(format, count, rows, cols, out)?,
            adds: onto.is_some(),
        })
    }
}

// SAFETY: descriptors are memory of their own that one owner at a time changes.
unsafe impl Send for Described {}

/// `CUBLAS_OP_T` or `CUBLAS_OP_N` of `cublas_api.h`.
fn transposition(transposed: bool) -> i32 {
    i32::from(transposed)
}

fn code(epilogue: Epilogue) -> sys::cublasLtEpilogue_t {
    match epilogue {
        Epilogue::None => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
        Epilogue::Relu => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_RELU,
    }
}

fn data_type(format: Format) -> sys::cudaDataType {
    match format {
        Format::F32 => sys::cudaDataType::CUDA_R_32F,
        Format::Bf16 => sys::cudaDataType::CUDA_R_16BF,
    }
}

struct OperationDescriptor(sys::cublasLtMatmulDesc_t);

impl OperationDescriptor {
    /// Sums are float32 whatever the factors are.
    fn new(product: &Product) -> Result<Self, CudaError> {
        let compute = if product.tf32 && product.format == Format::F32 {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
        } else {
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let mut made = ptr::null_mut();
        // SAFETY: `made` takes one descriptor.
        let status =
            unsafe { sys::cublasLtMatmulDescCreate(&raw mut made, compute, sys::cudaDataType::CUDA_R_32F) };
        check("describing a product", status)?;
        Ok(Self(made))
    }

    fn set<T: Copy>(&self, attribute: Operation, value: T) -> Result<(), CudaError> {
        // SAFETY: the descriptor is alive, and `value` has as many bytes as are named, which the library
        // compares with what it takes.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(
                self.0,
                attribute,
                ptr::from_ref(&value).cast(),
                size_of::<T>(),
            )
        };
        check("describing a product", status)
    }
}

impl Drop for OperationDescriptor {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once. An error leaves nothing to be done.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// Of `count` matrices that lie row by row, each of which the library sees transposed.
    fn new(format: Format, count: usize, rows: usize, cols: usize, lie: Rows) -> Result<Self, CudaError> {
        let mut made = ptr::null_mut();
        // SAFETY: `made` takes one descriptor.
        let status = unsafe {
            let (rows, cols) = (cols as u64, rows as u64);
            sys::cublasLtMatrixLayoutCreate(&raw mut made, data_type(format), rows, cols, lie.stride as i64)
        };
        check("describing a matrix", status)?;
        let layout = Self(made);
        if count > 1 {
            layout.set(Laid::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count as i32)?;
            layout.set(Laid::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, lie.step as i64)?;
        }
        Ok(layout)
    }

    fn set<T: Copy>(&self, attribute: Laid, value: T) -> Result<(), CudaError> {
        // SAFETY: as for an operation.
        let status = unsafe {
            sys::cublasLtMatrixLayoutSetAttribute(
                self.0,
                attribute,
                ptr::from_ref(&value).cast(),
                size_of::<T>(),
            )
        };
        check("describing a matrix", status)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once. An error leaves nothing to be done.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CudaError> {
        let mut made = ptr::null_mut();
        // SAFETY: `made` takes one descriptor.
        check("asking for algorithms", unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut made) })?;
        Ok(Self(made))
    }

    fn set<T: Copy>(&self, attribute: Preferred, value: T) -> Result<(), CudaError> {
        // SAFETY: as for an operation.
        let status = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(
                self.0,
                attribute,
                ptr::from_ref(&value).cast(),
                size_of::<T>(),
            )
        };
        check("asking for algorithms", status)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once. An error leaves nothing to be done.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

/// Statuses by which the library says that it has nothing for a product.
fn is_unsupported(status: sys::cublasStatus_t) -> bool {
    matches!(
        status,
        sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE
    )
}

fn check(doing: &'static str, status: sys::cublasStatus_t) -> Result<(), CudaError> {
    match status {
        sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        _ => Err(CudaError::Blas { doing, source: CublasError(status) }),
    }
}
