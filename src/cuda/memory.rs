//! A device's memory: buffers that own it, slices that borrow it, and the layout of a workspace.

use super::driver::Driver;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::matrix::{MatMut, MatRef, Memory};
use bytemuck::{Pod, Zeroable};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// Memory of a CUDA device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaMemory;

/// Owns elements in a device's memory.
pub struct CudaBuffer<T> {
    driver: Arc<dyn Driver>,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

/// Borrows elements in a device's memory.
pub struct CudaRef<'a, T> {
    pointer: CudaPointer<T>,
    len: usize,
    life: PhantomData<&'a T>,
}

/// Borrows elements in a device's memory for writing.
pub struct CudaRefMut<'a, T> {
    pointer: CudaPointer<T>,
    len: usize,
    life: PhantomData<&'a mut T>,
}

/// Where elements lie in a device's memory.
pub struct CudaPointer<T> {
    address: u64,
    element: PhantomData<fn() -> T>,
}

/// Address of a buffer without elements: not null, which kernels take for a missing argument.
pub(crate) const NOWHERE: u64 = 256;

impl<T> Clone for CudaPointer<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for CudaPointer<T> {}
impl<T> Clone for CudaRef<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for CudaRef<'_, T> {}

impl<T: Element> CudaBuffer<T> {
    pub(super) fn new(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|bytes| isize::try_from(*bytes).is_ok());
        let bytes = bytes.ok_or(Error::Overflow { what: "the size of a buffer" })?;
        let address = if bytes == 0 { NOWHERE } else { driver.alloc(bytes)? };
        Ok(Self { driver: driver.clone(), address, len, element: PhantomData })
    }
}

impl<T> Drop for CudaBuffer<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: this buffer's own memory, which nobody can borrow any more.
            unsafe { self.driver.free(self.address) };
        }
    }
}

impl<'a, T: Element> CudaRef<'a, T> {
    /// The `len` elements from `address` on.
    ///
    /// # Safety
    /// They are memory of the backend's device, aligned for `T`, written by nobody during `'a`, and ready on the backend's stream.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self { pointer: CudaPointer { address, element: PhantomData }, len, life: PhantomData }
    }
    /// Where the elements lie.
    pub fn address(&self) -> u64 {
        self.pointer.address
    }
}

impl<'a, T: Element> CudaRefMut<'a, T> {
    /// The `len` elements from `address` on.
    ///
    /// # Safety
    /// They are memory of the backend's device, aligned for `T`, used by nobody else during `'a`, and ready on the backend's stream.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self { pointer: CudaPointer { address, element: PhantomData }, len, life: PhantomData }
    }
    /// Where the elements lie.
    pub fn address(&self) -> u64 {
        self.pointer.address
    }
}

/// Address and length of a part.
fn part<T>(address: u64, len: usize, range: &Range<usize>) -> (CudaPointer<T>, usize) {
    assert!(range.start <= range.end && range.end <= len, "elements {range:?} of {len}");
    let address = address + (range.start * size_of::<T>()) as u64;
    (CudaPointer { address, element: PhantomData }, range.end - range.start)
}

impl Memory for CudaMemory {
    type Buffer<T: Element> = CudaBuffer<T>;
    type Slice<'a, T: Element> = CudaRef<'a, T>;
    type SliceMut<'a, T: Element> = CudaRefMut<'a, T>;
    type Pointer<T: Element> = CudaPointer<T>;

    fn slice<T: Element>(buffer: &CudaBuffer<T>) -> CudaRef<'_, T> {
        CudaRef {
            pointer: CudaPointer { address: buffer.address, element: PhantomData },
            len: buffer.len,
            life: PhantomData,
        }
    }
    fn slice_mut<T: Element>(buffer: &mut CudaBuffer<T>) -> CudaRefMut<'_, T> {
        CudaRefMut {
            pointer: CudaPointer { address: buffer.address, element: PhantomData },
            len: buffer.len,
            life: PhantomData,
        }
    }
    fn len<T: Element>(slice: &CudaRef<'_, T>) -> usize {
        slice.len
    }
    fn len_mut<T: Element>(slice: &CudaRefMut<'_, T>) -> usize {
        slice.len
    }
    fn part<'a, T: Element>(slice: Self::Slice<'a, T>, range: Range<usize>) -> Self::Slice<'a, T> {
        let (pointer, len) = part(slice.pointer.address, slice.len, &range);
        CudaRef { pointer, len, life: PhantomData }
    }
    fn part_mut<'a, T: Element>(slice: Self::SliceMut<'a, T>, range: Range<usize>) -> Self::SliceMut<'a, T> {
        let (pointer, len) = part(slice.pointer.address, slice.len, &range);
        CudaRefMut { pointer, len, life: PhantomData }
    }
    fn as_ref<'a, T: Element>(slice: &'a CudaRefMut<'_, T>) -> CudaRef<'a, T> {
        CudaRef { pointer: slice.pointer, len: slice.len, life: PhantomData }
    }
    fn reborrow<'a, T: Element>(slice: &'a mut CudaRefMut<'_, T>) -> CudaRefMut<'a, T> {
        CudaRefMut { pointer: slice.pointer, len: slice.len, life: PhantomData }
    }
    fn pointer<T: Element>(slice: CudaRef<'_, T>) -> CudaPointer<T> {
        slice.pointer
    }
    fn cast<T: Element, U: Element>(pointer: CudaPointer<T>) -> CudaPointer<U> {
        CudaPointer { address: pointer.address, element: PhantomData }
    }
    unsafe fn from_pointer<'a, T: Element>(pointer: CudaPointer<T>, len: usize) -> CudaRef<'a, T> {
        CudaRef { pointer, len, life: PhantomData }
    }
}

/// A matrix as kernels see it; all zero for a missing one.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct View {
    pub address: u64,
    pub row_stride: i64,
}

impl View {
    pub(super) const NONE: Self = Self { address: 0, row_stride: 0 };

    pub(super) fn new<T: Element>(matrix: &MatRef<'_, T, CudaMemory>) -> Self {
        Self { address: matrix.data().address(), row_stride: matrix.row_stride() as i64 }
    }
    pub(super) fn of<T: Element>(matrix: &MatMut<'_, T, CudaMemory>) -> Self {
        Self::new(&matrix.as_ref())
    }
}

/// Hands out parts of a workspace, or, starting from 0, tells how much there must be.
pub(super) struct Layout {
    start: u64,
    next: u64,
}

impl Layout {
    const ALIGNMENT: u64 = 16;

    fn new(start: u64) -> Self {
        Self { start, next: start }
    }

    /// Address of `rows`·`cols` elements.
    pub(super) fn take<T>(&mut self, rows: usize, cols: usize) -> Result<u64> {
        let overflow = Error::Overflow { what: "the workspace" };
        let bytes = rows.checked_mul(cols).and_then(|len| len.checked_mul(size_of::<T>()));
        let bytes =
            bytes.and_then(|bytes| bytes.checked_next_multiple_of(Self::ALIGNMENT as usize)).ok_or(overflow.clone())?;
        let address = self.next;
        self.next = address.checked_add(bytes as u64).filter(|end| *end < i64::MAX as u64).ok_or(overflow)?;
        Ok(address)
    }

    /// Room that holds one thing at one time and another at another time.
    pub(super) fn either<A, B>(
        &mut self,
        one: impl FnOnce(&mut Self) -> Result<A>,
        other: impl FnOnce(&mut Self) -> Result<B>,
    ) -> Result<(A, B)> {
        let start = self.next;
        let one = one(self)?;
        let end = std::mem::replace(&mut self.next, start);
        let other = other(self)?;
        self.next = self.next.max(end);
        Ok((one, other))
    }

    /// Elements of `f64`, with room to align the first.
    fn len(&self) -> usize {
        let bytes = (self.next - self.start) as usize;
        if bytes == 0 { 0 } else { bytes / 8 + 1 }
    }
}

/// Elements of `f64` that `plan` takes.
pub(super) fn workspace_len<P>(plan: impl Fn(&mut Layout) -> Result<P>) -> Result<usize> {
    let mut layout = Layout::new(0);
    plan(&mut layout)?;
    Ok(layout.len())
}

/// Lays `plan` out in a workspace, or [`Error::Workspace`].
pub(super) fn lay_out<P>(workspace: &CudaRefMut<'_, f64>, plan: impl Fn(&mut Layout) -> Result<P>) -> Result<P> {
    let needed = workspace_len(&plan)?;
    if workspace.len < needed {
        return Err(Error::Workspace { needed, found: workspace.len });
    }
    plan(&mut Layout::new(workspace.address().next_multiple_of(Layout::ALIGNMENT)))
}
