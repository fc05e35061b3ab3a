//! A call's buffers: each is checked as it is taken, by itself and against all before it, so nothing is written until
//! all are right.

use super::call::Failure;
use super::memory::Addressed;
use super::{SAEK_ERROR_NULL, SAEK_ERROR_POINTER};
use crate::element::Element;
use crate::error::Error;
use std::ops::Range;

/// The buffers of a call. An output may share memory with no other of them.
#[derive(Default)]
pub(super) struct Buffers {
    /// As many as a call has at most: an array, for a call not to allocate.
    seen: [Span; 10],
    count: usize,
}

#[derive(Default)]
struct Span {
    name: &'static str,
    bytes: Range<usize>,
    written: bool,
}

/// Elements to read, from a pointer that was checked.
pub(super) struct Input<T> {
    pointer: *const T,
    len: usize,
}

/// Elements to write, from a pointer that was checked.
pub(super) struct Output<T> {
    pointer: *mut T,
    len: usize,
}

impl Buffers {
    /// A required input.
    pub(super) fn input<T>(&mut self, name: &'static str, pointer: *const T, len: usize) -> Result<Input<T>, Failure> {
        self.add::<T>(name, pointer.addr(), len, false)?;
        Ok(Input { pointer, len })
    }

    /// A required output.
    pub(super) fn output<T>(&mut self, name: &'static str, pointer: *mut T, len: usize) -> Result<Output<T>, Failure> {
        self.add::<T>(name, pointer.addr(), len, true)?;
        Ok(Output { pointer, len })
    }

    /// An input that NULL leaves out.
    pub(super) fn optional_input<T>(
        &mut self,
        name: &'static str,
        pointer: *const T,
        len: usize,
    ) -> Result<Option<Input<T>>, Failure> {
        if pointer.is_null() { Ok(None) } else { self.input(name, pointer, len).map(Some) }
    }

    /// An output that NULL leaves out.
    pub(super) fn optional_output<T>(
        &mut self,
        name: &'static str,
        pointer: *mut T,
        len: usize,
    ) -> Result<Option<Output<T>>, Failure> {
        if pointer.is_null() { Ok(None) } else { self.output(name, pointer, len).map(Some) }
    }

    fn add<T>(&mut self, name: &'static str, address: usize, len: usize, written: bool) -> Result<(), Failure> {
        // Nothing is read or written there, wherever it points.
        if len == 0 {
            return Ok(());
        }
        check_pointer::<T>(name, address, len)?;
        let bytes = len.checked_mul(size_of::<T>()).filter(|bytes| isize::try_from(*bytes).is_ok());
        let end = bytes.and_then(|bytes| address.checked_add(bytes));
        let bytes = address..end.ok_or_else(|| Failure::of(name, Error::Overflow { what: "the size of a buffer" }))?;
        for other in &self.seen[..self.count] {
            if (written || other.written) && bytes.start < other.bytes.end && other.bytes.start < bytes.end {
                let text = format!("{name} overlaps {}; what a call writes needs memory of its own", other.name);
                return Err(Failure::new(SAEK_ERROR_POINTER, text));
            }
        }
        self.seen[self.count] = Span { name, bytes, written };
        self.count += 1;
        Ok(())
    }
}

/// That `len > 0` elements may lie at an address.
pub(super) fn check_pointer<T>(name: &str, address: usize, len: usize) -> Result<(), Failure> {
    if address == 0 {
        let text = format!("{name} is NULL, but {len} element(s) of {} bytes are needed there", size_of::<T>());
        return Err(Failure::new(SAEK_ERROR_NULL, text));
    }
    if !address.is_multiple_of(align_of::<T>()) {
        let text = format!("{name} is at {address:#x}, but its address must be a multiple of {}", align_of::<T>());
        return Err(Failure::new(SAEK_ERROR_POINTER, text));
    }
    Ok(())
}

impl<T> Input<T> {
    /// A structure, which is in the host's memory whatever the context.
    ///
    /// # Safety
    /// There is one; it is readable for `'a`, and nobody writes it meanwhile.
    pub(super) unsafe fn host<'a>(self) -> &'a T {
        // SAFETY: not NULL and aligned, as checked; the rest is the caller's promise.
        unsafe { &*self.pointer }
    }
}

impl<T: Element> Input<T> {
    /// No elements.
    pub(super) const EMPTY: Self = Self { pointer: std::ptr::null(), len: 0 };

    /// # Safety
    /// The elements are in the memory, readable for `'a`, and nobody writes them meanwhile.
    pub(super) unsafe fn slice<'a, M: Addressed>(self) -> M::Slice<'a, T> {
        // SAFETY: not NULL, aligned and not too long, as checked; the rest is the caller's promise.
        unsafe { M::slice_at(self.pointer, self.len) }
    }
}

impl<T> Output<T> {
    /// As [`Input::host`].
    ///
    /// # Safety
    /// There is one; it is readable and writable for `'a`, and nobody else reads or writes it meanwhile.
    pub(super) unsafe fn host<'a>(self) -> &'a mut T {
        // SAFETY: not NULL, aligned and no other buffer's, as checked; the rest is the caller's promise.
        unsafe { &mut *self.pointer }
    }
}

impl<T: Element> Output<T> {
    /// # Safety
    /// The elements are in the memory, readable and writable for `'a`, and nobody else reads or writes them meanwhile.
    pub(super) unsafe fn slice<'a, M: Addressed>(self) -> M::SliceMut<'a, T> {
        // SAFETY: not NULL, aligned, not too long and no other buffer's, as checked; the rest is the caller's promise.
        unsafe { M::slice_mut_at(self.pointer, self.len) }
    }
}
