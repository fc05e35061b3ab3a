//! The backward pass of the decoder-free objective as far as z.

use super::{check_slice, check_slice_mut};
use crate::backend::{Backend, Mat, MatOut, Slice, SliceMut};
use crate::error::Result;
use crate::objective::Activation;

/// ∂L/∂z and ∂L/∂b: one product with an epilogue.
///
/// ```text
/// dA = w·exp(ℓ − a) + (a − c')·M − 1·offsetᵀ + (a − 1·meanᵀ)·diag(d)
/// dZ = dA ⊙ f'(z)        db = Σ_n dZ
/// ```
///
/// w is [`Objective::row_weight`](crate::Objective::row_weight). The gradient through the mean is identically zero. f' is taken from the stored a:
/// 1 unless a ≤ 0 for ReLU (so NaN passes), 1 for the identity, 1 − exp(−a) for softplus.
///
/// Source: the gradient of the authors' objective, written out; ∂L_lse/∂a = +r (Oursland 2026).
pub struct BackwardDz<'a, B: Backend + ?Sized> {
    /// a \[N,H\].
    pub activations: Mat<'a, B, B::Element>,
    /// f.
    pub activation: Activation,
    /// ℓ \[N\].
    pub row_loss: Slice<'a, B, B::Real>,
    /// w, the weight of ∂ℓ_n/∂a; 0 leaves the term out.
    pub row_weight: f64,
    /// The batch statistics' part, if a term uses them.
    pub statistics: Option<StatisticsTerm<'a, B>>,
    /// dZ \[N,H\]; written. With [`CorrelationTerm::Dual`] it holds `product` of [`CorrelationDual`](super::CorrelationDual) before.
    pub dz: MatOut<'a, B, B::Element>,
    /// Whether to add to `grad_bias` or to overwrite it.
    pub accumulate: bool,
    /// ∂L/∂b \[H\].
    pub grad_bias: SliceMut<'a, B, B::Real>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

/// What [`FinishStatistics`](super::FinishStatistics) found, for the backward pass.
pub struct StatisticsTerm<'a, B: Backend + ?Sized> {
    /// μ \[H\].
    pub mean: Slice<'a, B, B::Real>,
    /// d \[H\].
    pub scale: Slice<'a, B, B::Real>,
    /// The off-diagonal part.
    pub correlation: CorrelationTerm<'a, B>,
}

/// The off-diagonal part of the correlation term's gradient.
pub enum CorrelationTerm<'a, B: Backend + ?Sized> {
    /// λ_tc = 0.
    None,
    /// (a − c')·M − offset.
    Primal {
        /// M \[H,H\].
        coupling: Mat<'a, B, B::Real>,
        /// M(μ − c') + d·(μ − mean) \[H\].
        offset: Slice<'a, B, B::Real>,
    },
    /// It stands in `dz` already.
    Dual,
}

impl<B: Backend + ?Sized> BackwardDz<'_, B> {
    /// Checks shapes and returns (N, H).
    pub fn check(&self) -> Result<(usize, usize)> {
        let (n, h) = (self.activations.rows(), self.activations.cols());
        check_slice::<B, _>("row_loss", n, &self.row_loss)?;
        if let Some(statistics) = &self.statistics {
            check_slice::<B, _>("mean", h, &statistics.mean)?;
            check_slice::<B, _>("scale", h, &statistics.scale)?;
            if let CorrelationTerm::Primal { coupling, offset } = &statistics.correlation {
                coupling.expect("coupling", h, h)?;
                check_slice::<B, _>("offset", h, offset)?;
            }
        }
        self.dz.expect("dz", n, h)?;
        check_slice_mut::<B, _>("grad_bias", h, &self.grad_bias)?;
        Ok((n, h))
    }
}
