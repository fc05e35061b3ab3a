//! Where data lives ([`Memory`]) and views of it ([`MatRef`], [`MatMut`]): rows, columns, row stride.
//!
//! All matrices are row-major: element (i, j) of a view is at `i * row_stride + j`. A view borrows; nothing here copies.

use crate::element::Element;
use crate::error::{Error, Result, check_len};
use std::any::TypeId;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

/// A kind of memory that a backend computes in: [`Host`], or a device's.
///
/// It says what owns a buffer and what borrows one, so that operations and models are written once for all of them.
pub trait Memory: Copy + Send + Sync + 'static {
    /// Owns elements.
    type Buffer<T: Element>: Send;
    /// Borrows elements.
    type Slice<'a, T: Element>: Copy;
    /// Borrows elements for writing.
    type SliceMut<'a, T: Element>;
    /// Where a slice begins.
    type Pointer<T: Element>: Copy + Send + Sync;

    /// All of a buffer.
    fn slice<T: Element>(buffer: &Self::Buffer<T>) -> Self::Slice<'_, T>;
    /// All of a buffer, for writing.
    fn slice_mut<T: Element>(buffer: &mut Self::Buffer<T>) -> Self::SliceMut<'_, T>;
    /// Elements in a slice.
    fn len<T: Element>(slice: &Self::Slice<'_, T>) -> usize;
    /// Elements in a mutable slice.
    fn len_mut<T: Element>(slice: &Self::SliceMut<'_, T>) -> usize;
    /// Part of a slice.
    fn part<'a, T: Element>(slice: Self::Slice<'a, T>, range: Range<usize>) -> Self::Slice<'a, T>;
    /// Part of a mutable slice.
    fn part_mut<'a, T: Element>(slice: Self::SliceMut<'a, T>, range: Range<usize>) -> Self::SliceMut<'a, T>;
    /// Reads through a mutable slice.
    fn as_ref<'a, T: Element>(slice: &'a Self::SliceMut<'_, T>) -> Self::Slice<'a, T>;
    /// A shorter borrow of a mutable slice.
    fn reborrow<'a, T: Element>(slice: &'a mut Self::SliceMut<'_, T>) -> Self::SliceMut<'a, T>;
    /// Where a slice begins.
    fn pointer<T: Element>(slice: Self::Slice<'_, T>) -> Self::Pointer<T>;
    /// The slice of `len` elements from `pointer` on.
    ///
    /// # Safety
    /// Those elements must be borrowed for `'a`.
    unsafe fn from_pointer<'a, T: Element>(pointer: Self::Pointer<T>, len: usize) -> Self::Slice<'a, T>;
    /// The same address.
    #[doc(hidden)]
    fn cast<T: Element, U: Element>(pointer: Self::Pointer<T>) -> Self::Pointer<U>;
    /// The slice itself as one of `U`, if that is `T`.
    fn as_type<'a, T: Element, U: Element>(slice: Self::Slice<'a, T>) -> Option<Self::Slice<'a, U>> {
        let same = TypeId::of::<T>() == TypeId::of::<U>();
        // SAFETY: the same elements, of the same type, borrowed as long.
        same.then(|| unsafe { Self::from_pointer(Self::cast(Self::pointer(slice)), Self::len(&slice)) })
    }
    /// A shorter borrow of a slice: the compiler cannot know that it is covariant.
    fn shorten<'a, 'long: 'a, T: Element>(slice: Self::Slice<'long, T>) -> Self::Slice<'a, T> {
        // SAFETY: the elements are borrowed for 'long, which outlives 'a.
        unsafe { Self::from_pointer(Self::pointer(slice), Self::len(&slice)) }
    }
}

/// The host's memory: vectors and slices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host;

impl Host {
    /// A zeroed buffer. Its pages are mapped now, which takes many times as long as writing them again would, and not in a hot call.
    pub(crate) fn alloc<T: Element>(len: usize) -> Result<Vec<T>> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|bytes| isize::try_from(*bytes).is_ok());
        let bytes = bytes.ok_or(Error::Overflow { what: "the size of a buffer" })?;
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).map_err(|_| Error::Allocation { bytes })?;
        buffer.resize(len, T::zeroed());
        Ok(buffer)
    }

    /// Upload and download.
    pub(crate) fn copy<T: Element>(source: &[T], target: &mut [T]) -> Result<()> {
        check_len("target", source.len(), target.len())?;
        target.copy_from_slice(source);
        Ok(())
    }
}

/// Where a slice in the host's memory begins.
#[derive(Clone, Copy)]
pub struct HostPointer<T>(*const T);

// SAFETY: it is only dereferenced as the shared slice that it came from, and elements are `Sync`.
unsafe impl<T: Element> Send for HostPointer<T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for HostPointer<T> {}

impl Memory for Host {
    type Buffer<T: Element> = Vec<T>;
    type Slice<'a, T: Element> = &'a [T];
    type SliceMut<'a, T: Element> = &'a mut [T];
    type Pointer<T: Element> = HostPointer<T>;

    fn slice<T: Element>(buffer: &Vec<T>) -> &[T] {
        buffer
    }
    fn slice_mut<T: Element>(buffer: &mut Vec<T>) -> &mut [T] {
        buffer
    }
    fn len<T: Element>(slice: &&[T]) -> usize {
        slice.len()
    }
    fn len_mut<T: Element>(slice: &&mut [T]) -> usize {
        slice.len()
    }
    fn part<'a, T: Element>(slice: Self::Slice<'a, T>, range: Range<usize>) -> Self::Slice<'a, T> {
        &slice[range]
    }
    fn part_mut<'a, T: Element>(slice: Self::SliceMut<'a, T>, range: Range<usize>) -> Self::SliceMut<'a, T> {
        &mut slice[range]
    }
    fn as_ref<'a, T: Element>(slice: &'a &mut [T]) -> &'a [T] {
        slice
    }
    fn reborrow<'a, T: Element>(slice: &'a mut &mut [T]) -> &'a mut [T] {
        slice
    }
    fn pointer<T: Element>(slice: &[T]) -> HostPointer<T> {
        HostPointer(slice.as_ptr())
    }
    fn cast<T: Element, U: Element>(pointer: HostPointer<T>) -> HostPointer<U> {
        HostPointer(pointer.0.cast())
    }
    unsafe fn from_pointer<'a, T: Element>(pointer: HostPointer<T>, len: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(pointer.0, len) }
    }
}

/// Rows, columns and row stride of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl Extent {
    /// Checks that rows do not overlap and that `len` elements hold the view.
    fn new(rows: usize, cols: usize, row_stride: usize, len: usize) -> Result<Self> {
        if row_stride < cols {
            return Err(Error::Stride { row_stride, cols });
        }
        let extent = Self { rows, cols, row_stride };
        let needed = extent.span(rows).ok_or(Error::Overflow { what: "the extent of a matrix view" })?;
        if needed > len {
            return Err(Error::ViewTooShort { rows, cols, row_stride, needed, found: len });
        }
        Ok(extent)
    }

    /// Elements from the first to the last of `rows` rows.
    fn span(&self, rows: usize) -> Option<usize> {
        if rows == 0 || self.cols == 0 {
            return Some(0);
        }
        (rows - 1).checked_mul(self.row_stride)?.checked_add(self.cols)
    }

    /// Where in the slice the given rows lie.
    fn rows(&self, range: &Range<usize>) -> Range<usize> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let count = range.end - range.start;
        if count == 0 || self.cols == 0 {
            return 0..0;
        }
        let start = range.start * self.row_stride;
        start..start + self.span(count).expect("part of a view that fits")
    }
}

/// A matrix that is read: `rows × cols`, row-major, with a row stride.
///
/// It keeps where its slice begins rather than the slice, so that a view of a longer life goes where a shorter one is asked for.
pub struct MatRef<'a, T: Element, M: Memory = Host> {
    pointer: M::Pointer<T>,
    len: usize,
    extent: Extent,
    life: PhantomData<&'a T>,
}

/// A matrix that is written: `rows × cols`, row-major, with a row stride.
pub struct MatMut<'a, T: Element, M: Memory = Host> {
    data: M::SliceMut<'a, T>,
    extent: Extent,
}

impl<T: Element, M: Memory> Clone for MatRef<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T: Element, M: Memory> Copy for MatRef<'_, T, M> {}

impl<T: Element, M: Memory> fmt::Debug for MatRef<'_, T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MatRef<{}>({:?})", T::NAME, self.extent)
    }
}
impl<T: Element, M: Memory> fmt::Debug for MatMut<'_, T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MatMut<{}>({:?})", T::NAME, self.extent)
    }
}

impl<'a, T: Element, M: Memory> MatRef<'a, T, M> {
    /// A view in any memory, whose rows start `row_stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Stride`], [`Error::ViewTooShort`], [`Error::Overflow`].
    pub fn from_memory(data: M::Slice<'a, T>, rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        let extent = Extent::new(rows, cols, row_stride, M::len::<T>(&data))?;
        Ok(Self::from_slice(data, extent))
    }

    fn from_slice(data: M::Slice<'a, T>, extent: Extent) -> Self {
        Self { pointer: M::pointer(data), len: M::len(&data), extent, life: PhantomData }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.extent.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.extent.cols
    }
    /// Elements between the starts of two neighbouring rows.
    pub fn row_stride(&self) -> usize {
        self.extent.row_stride
    }
    /// The elements, from the first of row 0 on; between rows may lie elements that are not the view's.
    pub fn data(&self) -> M::Slice<'a, T> {
        // SAFETY: pointer and length are those of a slice borrowed for 'a.
        unsafe { M::from_pointer(self.pointer, self.len) }
    }
    /// The rows in `range`.
    ///
    /// # Panics
    /// If the range is not within the rows.
    pub fn rows_range(&self, range: Range<usize>) -> Self {
        let data = M::part(self.data(), self.extent.rows(&range));
        Self::from_slice(data, Extent { rows: range.end - range.start, ..self.extent })
    }
    /// [`Error::Shape`] unless the view is `rows × cols`.
    pub(crate) fn expect(&self, operand: &'static str, rows: usize, cols: usize) -> Result<()> {
        self.extent.expect(operand, rows, cols)
    }
}

impl<'a, T: Element> MatRef<'a, T, Host> {
    /// A dense view: the row stride is `cols`.
    ///
    /// # Errors
    /// [`Error::ViewTooShort`], [`Error::Overflow`].
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Result<Self> {
        Self::from_memory(data, rows, cols, cols)
    }

    /// A view whose rows start `row_stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Stride`], [`Error::ViewTooShort`], [`Error::Overflow`].
    pub fn with_stride(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        Self::from_memory(data, rows, cols, row_stride)
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn row(&self, i: usize) -> &'a [T] {
        &self.data()[self.extent.rows(&(i..i + 1))]
    }
}

impl<'a, T: Element, M: Memory> MatMut<'a, T, M> {
    /// A view in any memory, whose rows start `row_stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Stride`], [`Error::ViewTooShort`], [`Error::Overflow`].
    pub fn from_memory(data: M::SliceMut<'a, T>, rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        let extent = Extent::new(rows, cols, row_stride, M::len_mut::<T>(&data))?;
        Ok(Self { data, extent })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.extent.rows
    }
    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.extent.cols
    }
    /// Elements between the starts of two neighbouring rows.
    pub fn row_stride(&self) -> usize {
        self.extent.row_stride
    }
    /// The elements, from the first of row 0 on; between rows may lie elements that are not the view's.
    pub fn data_mut(&mut self) -> M::SliceMut<'_, T> {
        M::reborrow(&mut self.data)
    }
    /// The same matrix, read.
    pub fn as_ref(&self) -> MatRef<'_, T, M> {
        MatRef::from_slice(M::as_ref(&self.data), self.extent)
    }
    /// A shorter borrow of the same matrix.
    pub fn reborrow(&mut self) -> MatMut<'_, T, M> {
        MatMut { data: M::reborrow(&mut self.data), extent: self.extent }
    }
    /// The rows in `range`.
    ///
    /// # Panics
    /// If the range is not within the rows.
    pub fn rows_range(self, range: Range<usize>) -> Self {
        let data = M::part_mut(self.data, self.extent.rows(&range));
        Self { data, extent: Extent { rows: range.end - range.start, ..self.extent } }
    }
    /// [`Error::Shape`] unless the view is `rows × cols`.
    pub(crate) fn expect(&self, operand: &'static str, rows: usize, cols: usize) -> Result<()> {
        self.extent.expect(operand, rows, cols)
    }
}

impl<'a, T: Element> MatMut<'a, T, Host> {
    /// A dense view: the row stride is `cols`.
    ///
    /// # Errors
    /// [`Error::ViewTooShort`], [`Error::Overflow`].
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Result<Self> {
        Self::from_memory(data, rows, cols, cols)
    }

    /// A view whose rows start `row_stride` elements apart.
    ///
    /// # Errors
    /// [`Error::Stride`], [`Error::ViewTooShort`], [`Error::Overflow`].
    pub fn with_stride(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        Self::from_memory(data, rows, cols, row_stride)
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        &mut self.data[self.extent.rows(&(i..i + 1))]
    }
}

impl Extent {
    fn expect(&self, operand: &'static str, rows: usize, cols: usize) -> Result<()> {
        if (self.rows, self.cols) == (rows, cols) {
            Ok(())
        } else {
            Err(Error::Shape { operand, rows, cols, found_rows: self.rows, found_cols: self.cols })
        }
    }
}
