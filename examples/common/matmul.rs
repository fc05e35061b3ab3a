//! Matrix products of the evaluation.
//!
//! They come from the `gemm` crate rather than from the backend, so that a fault in a kernel cannot hide itself in the
//! measure of it.

use gemm::Parallelism;

/// A row-major matrix, or its transpose: `rows × cols` as the product sees it.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Operand<'a> {
    /// `data` holds the matrix row by row.
    ///
    /// # Panics
    /// If it has another length than `rows · cols`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows}×{cols} matrix");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transpose of the same data.
    pub fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// out = left · right, or out += left · right; `out` is row-major. One thread, so the same bits each time.
///
/// # Panics
/// If the shapes do not fit.
pub fn matmul(left: Operand<'_>, right: Operand<'_>, accumulate: bool, out: &mut [f32]) {
    assert_eq!(left.cols, right.rows, "inner extents of a product");
    assert_eq!(out.len(), left.rows * right.cols, "the result of a product");
    // SAFETY: both operands hold rows·cols elements under their strides (checked when made), and `out`, which borrows
    // nothing of theirs, holds left.rows × right.cols.
    unsafe {
        gemm::gemm(
            left.rows,
            right.cols,
            left.cols,
            out.as_mut_ptr(),
            1,
            right.cols as isize,
            accumulate,
            left.data.as_ptr(),
            left.col_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.col_stride as isize,
            right.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
