//! Matrix products on strided views: the one place that calls the GEMM library.

/// A matrix inside a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix that fills the front of `data`.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows of `cols` values, `row_stride` apart.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride), "matrix view leaves its slice");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transposed view.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix inside a slice, for writing.
#[derive(Debug)]
pub(crate) struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> ViewMut<'a> {
    /// A row-major matrix that fills the front of `data`.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows of `cols` values, `row_stride` apart.
    pub(crate) fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride), "matrix view leaves its slice");
        Self { data, rows, cols, row_stride }
    }
}

fn fits(len: usize, rows: usize, cols: usize, row_stride: usize) -> bool {
    rows == 0 || cols == 0 || (cols <= row_stride && (rows - 1) * row_stride + cols <= len)
}

/// What happens to the old values of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    Overwrite,
    Add,
}

/// Who shares the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread alone: the caller already runs on many.
    One,
    /// All threads, when the product is large enough to pay for it.
    All,
}

/// Products smaller than this many multiplications run on one thread.
const PARALLEL_THRESHOLD: usize = 128 * 128 * 128;

/// `out = a * b`, or `out += a * b`.
pub(crate) fn matmul(out: ViewMut<'_>, a: View<'_>, b: View<'_>, write: Write, threads: Threads) {
    assert!(a.cols == b.rows && out.rows == a.rows && out.cols == b.cols, "matrix shapes do not fit");
    let parallelism = match threads {
        Threads::All if out.rows * out.cols * a.cols >= PARALLEL_THRESHOLD => gemm::Parallelism::Rayon(0),
        _ => gemm::Parallelism::None,
    };
    // SAFETY: the views were checked against their slices when made, the shapes agree, and the
    // exclusive borrow of `out` keeps it apart from `a` and `b`.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.data.as_mut_ptr(),
            1,
            out.row_stride as isize,
            write == Write::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0_f32,
            1.0_f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_and_transposed_products() {
        let a: Vec<f32> = (0..6).map(|v| v as f32).collect();
        let mut out = vec![1.0; 8];
        let view = View::new(&a, 2, 3);
        matmul(ViewMut::strided(&mut out, 2, 2, 4), view, view.t(), Write::Add, Threads::One);
        assert_eq!(out, [6.0, 15.0, 1.0, 1.0, 15.0, 51.0, 1.0, 1.0]);
    }

    #[test]
    #[should_panic(expected = "matrix view leaves its slice")]
    fn views_outside_their_slice_are_refused() {
        View::strided(&[0.0; 5], 2, 2, 4);
    }
}
