//! Packing: an operand's panels laid out as the register tile reads them, widened, centred and scaled on the way.

use super::CpuElement;
use super::simd::{MAX_TILE_WIDTH, Simd, TRANSPOSE};
use crate::matrix::MatRef;

/// Which index of an operand a feature vector belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axis {
    /// The output's row or column.
    Panel,
    /// The summed index.
    Depth,
}

/// (value − shift_f)·scale_f, with f the index along an axis.
#[derive(Clone, Copy)]
pub(crate) struct Affine<'a> {
    pub axis: Axis,
    pub shift: Option<&'a [f32]>,
    pub scale: Option<&'a [f32]>,
}

/// One side of a product, as a matrix (panel index, depth).
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a, E: CpuElement> {
    matrix: MatRef<'a, E>,
    /// Whether the matrix's rows run along the depth, so that the panel index is its column.
    transposed: bool,
    affine: Option<Affine<'a>>,
}

/// Steps of the depth that are staged at a time.
const STAGE: usize = 128;

impl<'a, E: CpuElement> Operand<'a, E> {
    /// Panel index = row, depth = column.
    pub(crate) fn rows(matrix: MatRef<'a, E>) -> Self {
        Self { matrix, transposed: false, affine: None }
    }
    /// Panel index = column, depth = row.
    pub(crate) fn cols(matrix: MatRef<'a, E>) -> Self {
        Self { matrix, transposed: true, affine: None }
    }
    pub(crate) fn with(self, affine: Affine<'a>) -> Self {
        Self { affine: Some(affine), ..self }
    }
    /// Extent along the panels.
    pub(crate) fn len(&self) -> usize {
        if self.transposed { self.matrix.cols() } else { self.matrix.rows() }
    }
    /// Extent along the sum.
    pub(crate) fn depth(&self) -> usize {
        if self.transposed { self.matrix.rows() } else { self.matrix.cols() }
    }

    /// Packs the panel of `width` indices from `start` on: for each step of the depth, `width` values, 0 beyond the end.
    /// A multiple of 8 is written, so `width` is one.
    #[inline(always)]
    pub(crate) fn pack<S: Simd>(&self, s: S, start: usize, width: usize, panel: &mut [f32]) {
        let valid = width.min(self.len() - start);
        if self.transposed {
            self.pack_cols(start, width, valid, panel);
        } else {
            self.pack_rows(s, start, width, valid, panel);
        }
    }

    /// Each step's values lie side by side.
    #[inline(always)]
    fn pack_cols(&self, start: usize, width: usize, valid: usize, panel: &mut [f32]) {
        let indices = start..start + valid;
        for (k, step) in panel.chunks_exact_mut(width).enumerate() {
            let (values, padding) = step.split_at_mut(valid);
            E::widen(&self.matrix.row(k)[indices.clone()], values);
            padding.fill(0.0);
            if let Some(affine) = &self.affine {
                affine.apply(values, indices.clone(), k, Axis::Panel);
            }
        }
    }

    /// Each index's values lie side by side: transposed in blocks of 8×8, from the matrix itself if it holds `f32` as they are,
    /// else from a stage.
    #[inline(always)]
    fn pack_rows<S: Simd>(&self, s: S, start: usize, width: usize, valid: usize, panel: &mut [f32]) {
        let depth = self.depth();
        let mut stage = [0.0f32; TRANSPOSE * STAGE];
        for group in (0..width).step_by(TRANSPOSE) {
            let rows = valid.saturating_sub(group).min(TRANSPOSE);
            let direct = match E::as_f32(self.matrix.data()) {
                Some(data) if rows == TRANSPOSE && self.affine.is_none() => Some(data),
                _ => None,
            };
            for first in (0..depth).step_by(STAGE) {
                let steps = STAGE.min(depth - first);
                let (from, stride) = match direct {
                    Some(data) => {
                        (&data[(start + group) * self.matrix.row_stride() + first..], self.matrix.row_stride())
                    }
                    None => {
                        for (i, values) in stage.chunks_exact_mut(STAGE).enumerate() {
                            let values = &mut values[..steps];
                            if i < rows {
                                let row = start + group + i;
                                E::widen(&self.matrix.row(row)[first..first + steps], values);
                                if let Some(affine) = &self.affine {
                                    affine.apply(values, first..first + steps, row, Axis::Depth);
                                }
                            } else {
                                values.fill(0.0);
                            }
                        }
                        (&stage[..], STAGE)
                    }
                };
                let to = &mut panel[first * width + group..];
                let whole = steps - steps % TRANSPOSE;
                for k in (0..whole).step_by(TRANSPOSE) {
                    assert!(from.len() >= k + 7 * stride + 8 && to.len() >= (k + 7) * width + 8);
                    // SAFETY: 8 rows of 8 elements are there, as just asserted.
                    unsafe { s.transpose(from.as_ptr().add(k), stride, to.as_mut_ptr().add(k * width), width) };
                }
                for k in whole..steps {
                    for i in 0..TRANSPOSE {
                        to[k * width + i] = from[i * stride + k];
                    }
                }
            }
        }
    }
}

impl Affine<'_> {
    /// Applies itself to `values`, which lie at `indices` along the axis `along` and at `fixed` along the other.
    #[inline(always)]
    fn apply(&self, values: &mut [f32], indices: std::ops::Range<usize>, fixed: usize, along: Axis) {
        if self.axis == along {
            if let Some(shift) = self.shift {
                for (value, shift) in values.iter_mut().zip(&shift[indices.clone()]) {
                    *value -= shift;
                }
            }
            if let Some(scale) = self.scale {
                for (value, scale) in values.iter_mut().zip(&scale[indices]) {
                    *value *= scale;
                }
            }
        } else {
            let (shift, scale) = (self.shift.map_or(0.0, |s| s[fixed]), self.scale.map_or(1.0, |s| s[fixed]));
            for value in values {
                *value = (*value - shift) * scale;
            }
        }
    }
}

const _: () = assert!(MAX_TILE_WIDTH.is_multiple_of(TRANSPOSE));
