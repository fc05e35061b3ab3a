//! Buffers with red zones: NaN before, after and between the rows of a view, which no kernel may write. Or with nothing around the view:
//! memory that ends where it ends, so that reads of what lies beyond are caught too.

use sae_kernels::{Element, MatMut, MatRef};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};

/// How a matrix lies in its buffer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// Elements skipped at the start, so that rows do not begin where vectors are aligned.
    pub offset: usize,
    /// Elements between the end of a row and the start of the next, at least.
    pub gap: usize,
    /// What rows are a multiple of apart.
    pub multiple: usize,
    pub around: Around,
}

/// What lies around a matrix, whose memory ends with the last row's last element unless there are red zones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Around {
    RedZones,
    /// An allocation of its own, on a cache line: AddressSanitizer sees what goes beyond it.
    Heap,
    /// A page that cannot be accessed, directly before the first element; there is no offset.
    #[cfg(unix)]
    PageBefore,
    /// The same directly behind the last element, so that it is the shape and the stride that tell where rows begin.
    #[cfg(unix)]
    PageBehind,
}

impl Place {
    pub const DENSE: Self = Self { offset: 0, gap: 0, multiple: 1, around: Around::RedZones };
    pub const STRIDED: Self = Self { offset: 1, gap: 3, ..Self::DENSE };
    pub const ALL: [Self; 2] = [Self::DENSE, Self::STRIDED];

    /// For vectors.
    fn without_gaps(self) -> Self {
        Self { gap: 0, multiple: 1, ..self }
    }
}

const RED_ZONE: usize = 16;

/// Where a buffer's elements are.
enum Memory<T> {
    Vec(Vec<T>),
    Heap(Heap<T>),
    #[cfg(unix)]
    Pages(Pages<T>),
}

/// Exactly so many elements, the first on a cache line.
struct Heap<T> {
    data: *mut T,
    len: usize,
}

impl<T: Element> Heap<T> {
    fn new(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty.
        let data = unsafe { alloc_zeroed(layout) }.cast::<T>();
        if data.is_null() {
            handle_alloc_error(layout);
        }
        Self { data, len }
    }
}

impl<T> Heap<T> {
    fn layout(len: usize) -> Layout {
        // There are no allocations of nothing.
        Layout::from_size_align((len * size_of::<T>()).max(1), 64).unwrap()
    }
}

impl<T> Drop for Heap<T> {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout.
        unsafe { dealloc(self.data.cast(), Self::layout(self.len)) }
    }
}

/// As many whole pages as hold some elements, between two that cannot be accessed.
#[cfg(unix)]
struct Pages<T> {
    data: *mut T,
    bytes: usize,
}

#[cfg(unix)]
impl<T: Element> Pages<T> {
    fn new(len: usize) -> Self {
        let page = page();
        let bytes = (len * size_of::<T>()).next_multiple_of(page).max(page);
        let (none, both) = (libc::PROT_NONE, libc::PROT_READ | libc::PROT_WRITE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new pages, wherever there is room.
        let all = unsafe { libc::mmap(std::ptr::null_mut(), bytes + 2 * page, none, flags, -1, 0) };
        assert_ne!(all, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let data = all.wrapping_byte_add(page);
        // SAFETY: all but the first and the last of these pages, which nothing refers to yet.
        let result = unsafe { libc::mprotect(data, bytes, both) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        Self { data: data.cast(), bytes }
    }
}

#[cfg(unix)]
impl<T> Drop for Pages<T> {
    fn drop(&mut self) {
        let page = page();
        // SAFETY: these are the pages that `new` mapped.
        unsafe { libc::munmap(self.data.wrapping_byte_sub(page).cast(), self.bytes + 2 * page) };
    }
}

#[cfg(unix)]
fn page() -> usize {
    // SAFETY: it only returns a number.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap()
}

impl<T: Element> Deref for Memory<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match self {
            Self::Vec(data) => data,
            // SAFETY: the allocation's elements, zero at first.
            Self::Heap(heap) => unsafe { std::slice::from_raw_parts(heap.data, heap.len) },
            // SAFETY: the pages that may be accessed, zero at first.
            #[cfg(unix)]
            Self::Pages(pages) => unsafe { std::slice::from_raw_parts(pages.data, pages.bytes / size_of::<T>()) },
        }
    }
}

impl<T: Element> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Self::Vec(data) => data,
            // SAFETY: as above.
            Self::Heap(heap) => unsafe { std::slice::from_raw_parts_mut(heap.data, heap.len) },
            // SAFETY: as above.
            #[cfg(unix)]
            Self::Pages(pages) => unsafe { std::slice::from_raw_parts_mut(pages.data, pages.bytes / size_of::<T>()) },
        }
    }
}

/// A matrix, or a vector as its one row, in a guarded buffer.
pub struct Guarded<T> {
    data: Memory<T>,
    start: usize,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<T: Element> Guarded<T> {
    /// A matrix of NaN, for a kernel to overwrite.
    pub fn poisoned(place: Place, rows: usize, cols: usize) -> Self {
        let stride = (cols + place.gap).next_multiple_of(place.multiple);
        let span = span(rows, cols, stride);
        let (mut data, start) = match place.around {
            Around::RedZones => {
                let len = 2 * RED_ZONE + place.offset + rows * stride;
                (Memory::Vec(vec![T::zeroed(); len]), RED_ZONE + place.offset)
            }
            Around::Heap => (Memory::Heap(Heap::new(place.offset + span)), place.offset),
            #[cfg(unix)]
            Around::PageBefore => (Memory::Pages(Pages::new(span)), 0),
            #[cfg(unix)]
            Around::PageBehind => {
                let data = Memory::Pages(Pages::new(span));
                let start = data.len() - span;
                (data, start)
            }
        };
        data.fill(poison());
        Self { data, start, rows, cols, stride }
    }

    /// A matrix of the values, rounded.
    pub fn matrix(place: Place, rows: usize, cols: usize, values: &[f64]) -> Self {
        assert_eq!(values.len(), rows * cols);
        let mut matrix = Self::poisoned(place, rows, cols);
        for i in 0..rows {
            for j in 0..cols {
                matrix.data[matrix.start + i * matrix.stride + j] = T::from_f64(values[i * cols + j]);
            }
        }
        matrix
    }

    /// A vector of the values, rounded.
    pub fn vector(place: Place, values: &[f64]) -> Self {
        Self::matrix(place.without_gaps(), 1, values.len(), values)
    }

    /// The given values, or NaN.
    pub fn vector_or_poison(place: Place, len: usize, values: Option<&[f64]>) -> Self {
        values.map_or_else(|| Self::poisoned(place.without_gaps(), 1, len), |values| Self::vector(place, values))
    }

    /// The given values, or NaN.
    pub fn matrix_or_poison(place: Place, rows: usize, cols: usize, values: Option<&[f64]>) -> Self {
        values.map_or_else(|| Self::poisoned(place, rows, cols), |values| Self::matrix(place, rows, cols, values))
    }

    fn span(&self) -> std::ops::Range<usize> {
        self.start..self.start + span(self.rows, self.cols, self.stride)
    }

    pub fn mat(&self) -> MatRef<'_, T> {
        MatRef::with_stride(&self.data[self.span()], self.rows, self.cols, self.stride).unwrap()
    }
    pub fn mat_mut(&mut self) -> MatMut<'_, T> {
        let span = self.span();
        MatMut::with_stride(&mut self.data[span], self.rows, self.cols, self.stride).unwrap()
    }
    pub fn slice(&self) -> &[T] {
        assert_eq!(self.rows, 1);
        &self.data[self.span()]
    }
    pub fn slice_mut(&mut self) -> &mut [T] {
        assert_eq!(self.rows, 1);
        let span = self.span();
        &mut self.data[span]
    }

    /// The matrix's elements, row by row.
    pub fn values(&self) -> Vec<f64> {
        (0..self.rows * self.cols)
            .map(|at| self.data[self.start + at / self.cols * self.stride + at % self.cols].to_f64())
            .collect()
    }

    /// The elements, after checking that nothing around them was written.
    pub fn checked(&self, context: &str, what: &str) -> Vec<f64> {
        for (at, element) in self.data.iter().enumerate() {
            let inside = self.span().contains(&at) && (at - self.start) % self.stride < self.cols;
            let untouched = bytemuck::bytes_of(element) == bytemuck::bytes_of(&poison::<T>());
            let relative = at as isize - self.start as isize;
            assert!(inside || untouched, "{context}: wrote outside of {what}, at {relative} from its start: {element}");
        }
        self.values()
    }

    /// Panics unless every element and the red zones are still poison.
    pub fn assert_poisoned(&self, context: &str, what: &str) {
        assert!(self.checked(context, what).iter().all(|v| v.is_nan()), "{context}: {what} was written");
    }
}

/// Elements from a matrix's first to its last.
fn span(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

/// NaN with a payload that arithmetic does not make.
fn poison<T: Element>() -> T {
    let mut value = T::from_f64(f64::NAN);
    bytemuck::bytes_of_mut(&mut value)[0] |= 0x2b;
    value
}
