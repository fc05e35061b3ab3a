//! The dual form of the correlation term.

use super::{check_slice, check_slice_mut};
use crate::backend::{Backend, Mat, MatOut, Slice, SliceMut};
use crate::error::{Error, Result};

/// The correlation term over pairs of rows: exact, at a cost of N²·H instead of N·H². No H×H matrix exists.
///
/// With Â = (a − μ)/s, s = √v + 1e-8 (a column with v = 0 has Â = 0), ‖ÂᵀÂ‖_F = ‖ÂÂᵀ‖_F gives
///
/// ```text
/// K = Â Âᵀ/(N−1)       c_j = Σ_n Â_nj²/(N−1) = v_j/s_j²        L_tc = ‖K‖_F² − Σ_j c_j²
/// P = KÂ − Â·diag(c)                q_j = Σ_n Â_nj P_nj/(N−1)
/// product_nj = 4 λ_tc/((N−1) s_j) · P_nj          scale_j −= 4 λ_tc/(N−1) · q_j/(s_j √v_j)
/// ```
///
/// so that the term's gradient is `product + (a − μ)·diag(scale)`, which [`BackwardDz`](super::BackwardDz) finishes. The diagonal
/// part Â·diag(c) leaves the product before it is rounded to the storage type: it may be much larger than what is left.
/// With 16-bit storage that rounding still makes the gradient's error up to 7 times that of the primal form, for few rows or strongly
/// correlated latents; [`Form::Primal`](crate::Form::Primal) avoids it.
///
/// The block must be the whole batch. Errors: [`Error::TooFewRows`] for N < 2.
pub struct CorrelationDual<'a, B: Backend + ?Sized> {
    /// a \[N,H\], the whole batch.
    pub activations: Mat<'a, B, B::Element>,
    /// μ \[H\].
    pub mean: Slice<'a, B, B::Real>,
    /// v \[H\].
    pub variance: Slice<'a, B, B::Real>,
    /// λ_tc.
    pub lambda_tc: f64,
    /// K \[N,N\], symmetric; written.
    pub gram: MatOut<'a, B, B::Real>,
    /// 4 λ_tc/((N−1) s_j) · P_nj \[N,H\]; written. The buffer that will hold dZ.
    pub product: MatOut<'a, B, B::Element>,
    /// d \[H\]; the term's part is added.
    pub scale: SliceMut<'a, B, B::Real>,
    /// L_tc \[1\], not weighted; written.
    pub loss: SliceMut<'a, B, f64>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> CorrelationDual<'_, B> {
    /// Checks shapes and returns (N, H).
    pub fn check(&self) -> Result<(usize, usize)> {
        let (n, h) = (self.activations.rows(), self.activations.cols());
        if n < 2 {
            return Err(Error::TooFewRows { rows: n as u64 });
        }
        check_slice::<B, _>("mean", h, &self.mean)?;
        check_slice::<B, _>("variance", h, &self.variance)?;
        self.gram.expect("gram", n, n)?;
        self.product.expect("product", n, h)?;
        check_slice_mut::<B, _>("scale", h, &self.scale)?;
        check_slice_mut::<B, _>("loss", 1, &self.loss)?;
        Ok((n, h))
    }
}
