//! Products of matrices, with ReLU on what comes out, by cuBLASLt.
//!
//! Which of the library's algorithms computes a product is decided once for each kind of product and GPU,
//! in `tuning.rs`, and never by anything that changes between two calls: equal inputs give equal bits.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::PoisonError;

use crate::address::{Address, Format};
use crate::blas_lt::{Algorithm, BlasLt, Described};
use crate::error::CudaError;
use crate::gpu::{Gpu, Queue};
use crate::size::count;
use crate::tuning;

/// How the matrices of a stack lie in memory: row by row, the values of a row side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rows {
    /// Values from a row to the next.
    pub stride: usize,
    /// Values from a matrix to the next, 0 where all are the same one; 0 in a stack of one.
    pub step: usize,
}

/// A factor of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Factor {
    /// Where its values lie.
    pub rows: Rows,
    /// Whether the matrices in memory are the transposes of the factor's.
    pub transposed: bool,
}

/// What is done to the sums of a product before they are rounded and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// `max(x, 0)`, which makes NaN 0.
    Relu,
}

/// `out[i] = epilogue(onto[i] + a[i] b[i])` for a stack of matrices, summed in float32; the library may round a
/// product to the format before it is added to `onto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Product {
    /// Matrices in the stack.
    pub count: usize,
    /// Rows of `a` and `out`.
    pub rows: usize,
    /// Columns of `a` and rows of `b`, 1 at least.
    pub inner: usize,
    /// Columns of `b` and `out`.
    pub cols: usize,
    /// Format of all values.
    pub format: Format,
    /// Whether factors in float32 may be rounded to TF32.
    pub tf32: bool,
    /// `[count, rows, inner]`
    pub a: Factor,
    /// `[count, inner, cols]`
    pub b: Factor,
    /// `[count, rows, cols]`
    pub out: Rows,
    /// What is added to, nothing without. `[count, rows, cols]`
    pub onto: Option<Rows>,
    /// What is done to the sums.
    pub epilogue: Epilogue,
}

/// Where a product finds and leaves its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProductAt {
    /// First factor.
    pub a: Address,
    /// Second factor.
    pub b: Address,
    /// What is added to, or [`Address::NONE`]; may be `out` if it lies in the same way.
    pub onto: Address,
    /// Takes the product.
    pub out: Address,
    /// [`PRODUCT_WORKSPACE`] bytes, aligned to 256, that nothing else on another stream uses.
    pub workspace: Address,
}

/// Bytes of workspace of every product: what NVIDIA advises for Hopper.
pub const PRODUCT_WORKSPACE: usize = 32 << 20;

/// Algorithms that are compared when a product is tuned.
const ALGORITHMS: usize = 16;

const OPERATION: &str = "product";

impl Product {
    /// Values from the first of `out` to behind its last.
    pub(crate) fn out_extent(&self) -> usize {
        (self.count - 1) * self.out.step + (self.rows - 1) * self.out.stride + self.cols
    }

    /// Multiplications of values.
    pub(crate) fn multiplications(&self) -> usize {
        self.count * self.rows * self.inner * self.cols
    }

    fn is_empty(&self) -> bool {
        self.count == 0 || self.rows == 0 || self.cols == 0
    }

    fn check(&self) -> Result<(), CudaError> {
        let refused = |reason: String| Err(CudaError::Size { operation: OPERATION, reason });
        for (what, size) in [
            ("matrices of a stack", self.count),
            ("rows", self.rows),
            ("inner dimension", self.inner),
            ("columns", self.cols),
        ] {
            count(OPERATION, what, size)?;
        }
        if self.inner == 0 {
            return refused("nothing is summed: the inner dimension is 0".to_owned());
        }
        let lie =
            |factor: Factor, rows, cols| (factor.rows.stride, if factor.transposed { rows } else { cols });
        let out = |rows: Rows| (rows.stride, self.cols);
        for (what, (stride, width)) in [
            ("the first factor", lie(self.a, self.rows, self.inner)),
            ("the second factor", lie(self.b, self.inner, self.cols)),
            ("the product", out(self.out)),
            ("what is added to", out(self.onto.unwrap_or(self.out))),
        ] {
            if stride < width {
                return refused(format!("rows of {width} values of {what} overlap, {stride} apart"));
            }
        }
        if self.count > 1 && self.out.step < (self.rows - 1) * self.out.stride + self.cols {
            return refused(format!("matrices of the product overlap, {} values apart", self.out.step));
        }
        Ok(())
    }
}

/// What a device knows of products.
pub(crate) struct Products {
    pub(crate) lt: BlasLt,
    known: HashMap<Product, Known>,
}

/// A product that was asked for.
struct Known {
    described: Described,
    /// In the order of the library's expectations.
    algorithms: Vec<Algorithm>,
    chosen: Option<Algorithm>,
}

impl Products {
    fn known(&mut self, product: &Product) -> Result<(&BlasLt, &mut Known), CudaError> {
        let known = match self.known.entry(*product) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let described = Described::new(product)?;
                let algorithms = self.lt.algorithms(&described, PRODUCT_WORKSPACE, ALGORITHMS)?;
                place.insert(Known { described, algorithms, chosen: None })
            }
        };
        Ok((&self.lt, known))
    }
}

/// Calls `with` with what `gpu` knows of products, the device bound to this thread.
fn with_products<T>(
    gpu: &Gpu,
    with: impl FnOnce(&mut Products) -> Result<T, CudaError>,
) -> Result<T, CudaError> {
    let mut products = gpu.products().lock().unwrap_or_else(PoisonError::into_inner);
    gpu.bind()?;
    let products = match &mut *products {
        Some(products) => products,
        none => none.insert(Products { lt: BlasLt::open()?, known: HashMap::new() }),
    };
    with(products)
}

fn no_algorithm(product: &Product) -> CudaError {
    let Product { count, rows, inner, cols, format, epilogue, .. } = product;
    let reason = format!(
        "cuBLASLt has no algorithm for {count} x [{rows}, {inner}] x [{inner}, {cols}] in {} with \
         epilogue {epilogue:?}",
        format.suffix()
    );
    CudaError::Size { operation: OPERATION, reason }
}

/// Whether [`product`] can compute this: not without the library, nor what it has no algorithm for.
///
/// # Errors
/// When the library fails.
pub fn has_product(gpu: &Gpu, product: &Product) -> Result<bool, CudaError> {
    if !BlasLt::is_there() || product.check().is_err() {
        return Ok(false);
    }
    if product.is_empty() {
        return Ok(true);
    }
    with_products(gpu, |products| Ok(!products.known(product)?.1.algorithms.is_empty()))
}

/// The library's algorithms for a product, those first that it expects to be fastest.
///
/// # Errors
/// [`CudaError::Size`] for strides that do not fit the sizes, [`CudaError::NoBlas`], or when the library fails.
pub fn product_algorithms(gpu: &Gpu, product: &Product) -> Result<Vec<Algorithm>, CudaError> {
    product.check()?;
    if product.is_empty() {
        return Ok(Vec::new());
    }
    with_products(gpu, |products| Ok(products.known(product)?.1.algorithms.clone()))
}

/// Computes a product.
///
/// The first call for a kind of product that is large may time the library's algorithms on these very values
/// and wait for the device, but not while the queue is being captured into a graph.
///
/// # Errors
/// [`CudaError::Size`] where [`has_product`] is false, [`CudaError::NoBlas`] without the library.
///
/// # Safety
/// As the crate's documentation demands, for as many values as the strides of `product` span.
pub unsafe fn product(queue: Queue<'_>, at: ProductAt, product: &Product) -> Result<(), CudaError> {
    product.check()?;
    if product.is_empty() {
        return Ok(());
    }
    with_products(queue.gpu, |products| {
        let (lt, known) = products.known(product)?;
        let algorithm = match known.chosen {
            Some(algorithm) => algorithm,
            None => {
                let Known { described, algorithms, .. } = &*known;
                // SAFETY: promised by the caller.
                let chosen = unsafe { tuning::choose(queue, lt, described, algorithms, at, product)? };
                *known.chosen.insert(chosen.ok_or_else(|| no_algorithm(product))?)
            }
        };
        // SAFETY: promised by the caller; the algorithm is one for this product.
        unsafe { lt.launch(&known.described, &algorithm, at, queue.stream) }
    })
}

/// Computes a product by one of its [`product_algorithms`], without a choice.
///
/// # Errors
/// As [`product`], and when the library finds that the algorithm does not fit.
///
/// # Safety
/// As for [`product`].
pub unsafe fn product_by(
    queue: Queue<'_>,
    algorithm: &Algorithm,
    at: ProductAt,
    product: &Product,
) -> Result<(), CudaError> {
    product.check()?;
    if product.is_empty() {
        return Ok(());
    }
    with_products(queue.gpu, |products| {
        let (lt, known) = products.known(product)?;
        // SAFETY: promised by the caller.
        unsafe { lt.launch(&known.described, algorithm, at, queue.stream) }
    })
}

/// The algorithm that [`product`] has taken for a product, if it was called for it.
///
/// # Errors
/// As [`product_algorithms`].
pub fn product_choice(gpu: &Gpu, product: &Product) -> Result<Option<Algorithm>, CudaError> {
    with_products(gpu, |products| Ok(products.known.get(product).and_then(|known| known.chosen)))
}
