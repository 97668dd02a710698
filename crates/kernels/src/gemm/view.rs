//! Matrices inside slices.

use std::ops::Range;

use super::pack::Lines;

/// A matrix inside a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a, E> {
    data: &'a [E],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, E> View<'a, E> {
    /// A row-major matrix that fills the front of `data`.
    pub(crate) fn new(data: &'a [E], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows of `cols` values, `row_stride` apart.
    pub(crate) fn strided(data: &'a [E], rows: usize, cols: usize, row_stride: usize) -> Self {
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

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(super) fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Some rows of a row-major view.
    pub(super) fn part(self, rows: Range<usize>) -> Self {
        Self::strided(self.row(rows.start), rows.len(), self.cols, self.row_stride)
    }

    pub(super) fn is_row_major(&self) -> bool {
        self.col_stride == 1
    }

    /// The slice from row `row` of a row-major view on.
    pub(super) fn row(&self, row: usize) -> &'a [E] {
        &self.data[row * self.row_stride..]
    }

    /// As a left factor.
    pub(super) fn lines(self) -> Lines<'a, E> {
        Lines {
            data: self.data,
            inner: self.cols,
            inner_stride: self.col_stride,
            line_stride: self.row_stride,
        }
    }

    /// As a right factor.
    pub(super) fn columns(self) -> Lines<'a, E> {
        self.t().lines()
    }
}

/// A row-major matrix inside a slice, for writing.
#[derive(Debug)]
pub(crate) struct ViewMut<'a, E> {
    data: &'a mut [E],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, E> ViewMut<'a, E> {
    /// A row-major matrix that fills the front of `data`.
    pub(crate) fn new(data: &'a mut [E], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows of `cols` values, `row_stride` apart.
    pub(crate) fn strided(data: &'a mut [E], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(fits(data.len(), rows, cols, row_stride), "matrix view leaves its slice");
        Self { data, rows, cols, row_stride }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    pub(super) fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// All rows, the first one first.
    pub(super) fn into_rows(self) -> impl Iterator<Item = &'a mut [E]> {
        self.data.chunks_mut(self.row_stride.max(1)).take(self.rows).map(move |row| &mut row[..self.cols])
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut E {
        self.data.as_mut_ptr()
    }
}

fn fits(len: usize, rows: usize, cols: usize, row_stride: usize) -> bool {
    rows == 0 || cols == 0 || (cols <= row_stride && (rows - 1) * row_stride + cols <= len)
}
