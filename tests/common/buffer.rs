//! Buffers with red zones: NaN before, after and between the rows of a view, which no kernel may write.

use sae_kernels::{Element, MatMut, MatRef};

/// How a matrix lies in its buffer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// Elements skipped at the start, so that rows do not begin where vectors are aligned.
    pub offset: usize,
    /// Elements between the end of a row and the start of the next.
    pub gap: usize,
}

impl Place {
    pub const DENSE: Self = Self { offset: 0, gap: 0 };
    pub const STRIDED: Self = Self { offset: 1, gap: 3 };
    pub const ALL: [Self; 2] = [Self::DENSE, Self::STRIDED];
}

const RED_ZONE: usize = 16;

/// A matrix, or a vector as its one row, in a buffer with red zones.
pub struct Guarded<T> {
    data: Vec<T>,
    start: usize,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<T: Element> Guarded<T> {
    /// A matrix of NaN, for a kernel to overwrite.
    pub fn poisoned(place: Place, rows: usize, cols: usize) -> Self {
        let stride = cols + place.gap;
        let len = 2 * RED_ZONE + place.offset + rows * stride;
        Self { data: vec![poison(); len], start: RED_ZONE + place.offset, rows, cols, stride }
    }

    /// A matrix of the values, rounded.
    pub fn matrix(place: Place, rows: usize, cols: usize, values: &[f64]) -> Self {
        assert_eq!(values.len(), rows * cols);
        let mut matrix = Self::poisoned(place, rows, cols);
        for i in 0..rows {
            for j in 0..cols {
                matrix.data[matrix.start + i * matrix.stride + j] = super::store(values[i * cols + j]);
            }
        }
        matrix
    }

    /// A vector of the values, rounded.
    pub fn vector(place: Place, values: &[f64]) -> Self {
        Self::matrix(Place { gap: 0, ..place }, 1, values.len(), values)
    }

    /// The given values, or NaN.
    pub fn vector_or_poison(place: Place, len: usize, values: Option<&[f64]>) -> Self {
        values.map_or_else(|| Self::poisoned(Place { gap: 0, ..place }, 1, len), |values| Self::vector(place, values))
    }

    /// The given values, or NaN.
    pub fn matrix_or_poison(place: Place, rows: usize, cols: usize, values: Option<&[f64]>) -> Self {
        values.map_or_else(|| Self::poisoned(place, rows, cols), |values| Self::matrix(place, rows, cols, values))
    }

    fn span(&self) -> std::ops::Range<usize> {
        let len = if self.rows == 0 || self.cols == 0 { 0 } else { (self.rows - 1) * self.stride + self.cols };
        self.start..self.start + len
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

/// NaN with a payload that arithmetic does not make.
fn poison<T: Element>() -> T {
    let mut value = T::from_f64(f64::NAN);
    bytemuck::bytes_of_mut(&mut value)[0] |= 0x2b;
    value
}
