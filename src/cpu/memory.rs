//! Scratch memory, and output that several tasks write disjoint parts of.

use crate::element::Element;
use crate::error::{Error, Result};
use crate::matrix::{Host, MatMut};
use std::marker::PhantomData;
use std::ops::Range;

/// Hands out parts of a workspace whose size was checked.
pub(crate) struct Scratch<'a>(&'a mut [f64]);

impl<'a> Scratch<'a> {
    /// [`Error::Workspace`] unless the workspace has `needed` elements.
    pub(crate) fn new(workspace: &'a mut [f64], needed: usize) -> Result<Self> {
        if workspace.len() < needed {
            return Err(Error::Workspace { needed, found: workspace.len() });
        }
        Ok(Self(workspace))
    }

    pub(crate) fn f64(&mut self, len: usize) -> &'a mut [f64] {
        let (part, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        part
    }

    /// The next `len` elements, which the next call hands out again.
    pub(crate) fn rest(&mut self, len: usize) -> &mut [f64] {
        &mut self.0[..len]
    }

    pub(crate) fn f32(&mut self, len: usize) -> &'a mut [f32] {
        &mut bytemuck::cast_slice_mut(self.f64(f32_len(len)))[..len]
    }
}

/// Elements of a workspace that hold `len` numbers of `f32`.
pub(crate) fn f32_len(len: usize) -> usize {
    len.div_ceil(2)
}

/// Parts of a workspace that begin at a cache line, as numbers of `f32`.
pub(crate) struct Aligned;

impl Aligned {
    const LINE: usize = 64;

    /// Elements of a workspace that hold `len` numbers of `f32` wherever they begin.
    pub(crate) fn len(len: usize) -> usize {
        if len == 0 { 0 } else { f32_len(len) + Self::LINE / size_of::<f64>() }
    }

    /// All that lies behind the first boundary.
    pub(crate) fn of(space: &mut [f64]) -> &mut [f32] {
        let skipped = space.as_ptr().align_offset(Self::LINE).min(space.len());
        bytemuck::cast_slice_mut(&mut space[skipped..])
    }
}

/// A matrix whose parts are written by several tasks, each part by one.
#[derive(Clone, Copy)]
pub(crate) struct Out<'a, T> {
    data: *mut T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: the parts that tasks take are disjoint, which `part` makes its caller promise.
unsafe impl<T: Send> Send for Out<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Out<'_, T> {}

impl<'a, T> Out<'a, T> {
    /// A dense matrix.
    pub(crate) fn dense(data: &'a mut [T], cols: usize) -> Self {
        let rows = data.len().checked_div(cols).unwrap_or(0);
        Self { data: data.as_mut_ptr(), rows, cols, row_stride: cols, life: PhantomData }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Part of a row.
    ///
    /// # Safety
    /// No other task has any of these elements.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, row: usize, cols: Range<usize>) -> &mut [T] {
        debug_assert!(row < self.rows && cols.start <= cols.end && cols.end <= self.cols);
        // SAFETY: within the matrix, and no other task's by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.row_stride + cols.start), cols.len()) }
    }
}

impl<T: Copy> Out<'_, T> {
    /// Writes one element.
    ///
    /// # Safety
    /// No other task has it.
    #[inline(always)]
    pub(crate) unsafe fn set(&self, row: usize, col: usize, value: T) {
        // SAFETY: the caller's promise.
        unsafe { self.part(row, col..col + 1) }.fill(value);
    }
}

impl<'a, T: Element> Out<'a, T> {
    pub(crate) fn new(matrix: &'a mut MatMut<'_, T, Host>) -> Self {
        let (rows, cols, row_stride) = (matrix.rows(), matrix.cols(), matrix.row_stride());
        Self { data: matrix.data_mut().as_mut_ptr(), rows, cols, row_stride, life: PhantomData }
    }
}
