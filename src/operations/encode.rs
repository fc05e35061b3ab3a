//! The encoder's forward pass and the responsibilities.

use super::{check_slice, check_slice_mut};
use crate::backend::{Backend, Mat, MatOut, Slice, SliceMut};
use crate::error::{Error, Result};
use crate::objective::Activation;

/// The encoder in one pass: linear map, activation, row log-sum-exp and column moments.
///
/// ```text
/// z = x Wᵀ + b        a = f(z), rounded to the storage type; all below is of the rounded a
/// ℓ_n = −log Σ_j exp(−a_nj)
/// row_loss_sum = Σ_n ℓ_n     sum_j = Σ_n (a_nj − c_j)     sum_squares_j = Σ_n (a_nj − c_j)²
/// ```
///
/// The log-sum-exp is shifted by the row's minimum, so that it neither overflows nor underflows. A row's outputs do not
/// depend on the other rows. D = 0 is allowed (z = b), N = 0 too (all sums are 0).
///
/// Source: Oursland 2026, arXiv 2601.06478, eq. of L_lse. Errors: [`Error::NoLatents`] for H = 0.
pub struct Encode<'a, B: Backend + ?Sized> {
    /// Input \[N,D\].
    pub x: Mat<'a, B, B::Element>,
    /// Weight \[H,D\].
    pub weight: Mat<'a, B, B::Element>,
    /// Bias \[H\].
    pub bias: Slice<'a, B, B::Real>,
    /// f.
    pub activation: Activation,
    /// Activations \[N,H\], written if given.
    pub activations: Option<MatOut<'a, B, B::Element>>,
    /// ℓ \[N\], written if given.
    pub row_loss: Option<SliceMut<'a, B, B::Real>>,
    /// Sums over the rows, if wanted.
    pub moments: Option<Moments<'a, B>>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

/// Row log-sum-exp and column moments of activations that are there already: what [`Encode`] leaves, without its product.
///
/// ```text
/// ℓ_n = −log Σ_j exp(−a_nj)
/// row_loss_sum = Σ_n ℓ_n     sum_j = Σ_n (a_nj − c_j)     sum_squares_j = Σ_n (a_nj − c_j)²
/// ```
///
/// Activations may have any sign; the log-sum-exp is shifted by the row's minimum. A row's loss does not depend on the other rows.
///
/// Source: as [`Encode`]. Errors: [`Error::NoLatents`] for H = 0.
pub struct ActivationSums<'a, B: Backend + ?Sized> {
    /// a \[N,H\].
    pub activations: Mat<'a, B, B::Element>,
    /// ℓ \[N\], written if given.
    pub row_loss: Option<SliceMut<'a, B, B::Real>>,
    /// Sums over the rows, if wanted.
    pub moments: Option<Moments<'a, B>>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> ActivationSums<'_, B> {
    /// Checks shapes and returns (N, H).
    pub fn check(&self) -> Result<(usize, usize)> {
        let (n, h) = (self.activations.rows(), self.activations.cols());
        if h == 0 {
            return Err(Error::NoLatents);
        }
        if let Some(row_loss) = &self.row_loss {
            check_slice_mut::<B, _>("row_loss", n, row_loss)?;
        }
        if let Some(moments) = &self.moments {
            moments.check(h)?;
        }
        Ok((n, h))
    }
}

/// Sums over the rows of a block, about a shift c. They add up over blocks that share the shift.
pub struct Moments<'a, B: Backend + ?Sized> {
    /// c \[H\]; 0 if not given. The closer to the mean, the smaller the rounding error of the sums.
    pub shift: Option<Slice<'a, B, B::Real>>,
    /// Whether to add to the sums or to overwrite them.
    pub accumulate: bool,
    /// Σ_n ℓ_n \[1\].
    pub row_loss_sum: SliceMut<'a, B, f64>,
    /// Σ_n (a_nj − c_j) \[H\].
    pub sum: SliceMut<'a, B, f64>,
    /// Σ_n (a_nj − c_j)² \[H\].
    pub sum_squares: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> Encode<'_, B> {
    /// Checks shapes and returns (N, D, H).
    pub fn check(&self) -> Result<(usize, usize, usize)> {
        let (n, d, h) = (self.x.rows(), self.x.cols(), self.weight.rows());
        if h == 0 {
            return Err(Error::NoLatents);
        }
        self.weight.expect("weight", h, d)?;
        check_slice::<B, _>("bias", h, &self.bias)?;
        if let Some(a) = &self.activations {
            a.expect("activations", n, h)?;
        }
        if let Some(row_loss) = &self.row_loss {
            check_slice_mut::<B, _>("row_loss", n, row_loss)?;
        }
        if let Some(moments) = &self.moments {
            moments.check(h)?;
        }
        Ok((n, d, h))
    }
}

impl<B: Backend + ?Sized> Moments<'_, B> {
    fn check(&self, h: usize) -> Result<()> {
        if let Some(shift) = &self.shift {
            check_slice::<B, _>("shift", h, shift)?;
        }
        check_slice_mut::<B, _>("row_loss_sum", 1, &self.row_loss_sum)?;
        check_slice_mut::<B, _>("sum", h, &self.sum)?;
        check_slice_mut::<B, _>("sum_squares", h, &self.sum_squares)
    }
}

/// Responsibilities r = softmax(−a) by row, from the stored row losses: r_nj = exp(ℓ_n − a_nj).
///
/// Also the gradient of L_lse = Σ_n ℓ_n with respect to a, exactly: ∂L_lse/∂a = +r (Oursland 2026).
pub struct Responsibilities<'a, B: Backend + ?Sized> {
    /// a \[N,H\].
    pub activations: Mat<'a, B, B::Element>,
    /// ℓ \[N\].
    pub row_loss: Slice<'a, B, B::Real>,
    /// r \[N,H\], written.
    pub responsibilities: MatOut<'a, B, B::Real>,
}

impl<B: Backend + ?Sized> Responsibilities<'_, B> {
    /// Checks shapes and returns (N, H).
    pub fn check(&self) -> Result<(usize, usize)> {
        let (n, h) = (self.activations.rows(), self.activations.cols());
        check_slice::<B, _>("row_loss", n, &self.row_loss)?;
        self.responsibilities.expect("responsibilities", n, h)?;
        Ok((n, h))
    }
}
