//! The memory that C's pointers are to: the host's, or a device's.

use crate::element::Element;
use crate::matrix::{Host, Memory};
use std::slice;

/// Memory whose slices are made of addresses.
pub(super) trait Addressed: Memory {
    /// # Safety
    /// `len` elements of this memory from the pointer on, which is aligned, readable for `'a`, and nobody writes them meanwhile; or none.
    unsafe fn slice_at<'a, T: Element>(pointer: *const T, len: usize) -> Self::Slice<'a, T>;

    /// # Safety
    /// As [`slice_at`](Self::slice_at), and writable, and nobody else reads or writes them meanwhile.
    unsafe fn slice_mut_at<'a, T: Element>(pointer: *mut T, len: usize) -> Self::SliceMut<'a, T>;
}

impl Addressed for Host {
    unsafe fn slice_at<'a, T: Element>(pointer: *const T, len: usize) -> &'a [T] {
        // SAFETY: the caller's promise. Where there is none, the pointer may be NULL.
        if len == 0 { &[] } else { unsafe { slice::from_raw_parts(pointer, len) } }
    }
    unsafe fn slice_mut_at<'a, T: Element>(pointer: *mut T, len: usize) -> &'a mut [T] {
        // SAFETY: as above.
        if len == 0 { &mut [] } else { unsafe { slice::from_raw_parts_mut(pointer, len) } }
    }
}

#[cfg(feature = "cuda")]
mod device {
    use super::Addressed;
    use crate::cuda::{CudaMemory, CudaRef, CudaRefMut, NOWHERE};
    use crate::element::Element;

    /// Where no elements lie is nowhere: a kernel takes NULL for a missing argument.
    fn address<T>(pointer: *const T, len: usize) -> u64 {
        if len == 0 { NOWHERE } else { pointer.addr() as u64 }
    }

    impl Addressed for CudaMemory {
        unsafe fn slice_at<'a, T: Element>(pointer: *const T, len: usize) -> CudaRef<'a, T> {
            // SAFETY: the caller's promise.
            unsafe { CudaRef::from_raw(address(pointer, len), len) }
        }
        unsafe fn slice_mut_at<'a, T: Element>(pointer: *mut T, len: usize) -> CudaRefMut<'a, T> {
            // SAFETY: the caller's promise.
            unsafe { CudaRefMut::from_raw(address(pointer, len), len) }
        }
    }
}
