//! The weight-redundancy term.

use super::check_slice_mut;
use crate::backend::{Backend, Mat, MatOut, SliceMut};
use crate::error::Result;
use crate::objective::Form;

/// L_wr = ‖Ŵ Ŵᵀ − I‖_F² and, added to a gradient, λ·∂L_wr/∂W. Ŵ_j = W_j/(‖W_j‖ + 1e-8), or W_j itself if not normalised.
///
/// ```text
/// primal (H×H):  G = Ŵ Ŵᵀ − I     L = ‖G‖²                              dŴ = 4 G Ŵ
/// dual (D×D):    P = Ŵᵀ Ŵ         L = ‖P‖² − 2 Σ_j ‖Ŵ_j‖² + H           dŴ = 4 (Ŵ P − Ŵ)
/// dW_j = dŴ_j/(‖W_j‖+1e-8) − W_j (dŴ_j·W_j)/(‖W_j‖ (‖W_j‖+1e-8)²)       (normalised)
/// ```
///
/// A zero row has Ŵ_j = 0 and gets no second term. Source: the authors' code (normalised), their derivation (not normalised).
pub struct WeightRedundancy<'a, B: Backend + ?Sized> {
    /// W \[H,D\].
    pub weight: Mat<'a, B, B::Element>,
    /// Whether to normalise the rows first.
    pub normalize: bool,
    /// H×H, D×D, or the smaller.
    pub form: Form,
    /// λ_wr, the factor of the gradient (the loss is not weighted).
    pub lambda: f64,
    /// L_wr \[1\]; written.
    pub loss: SliceMut<'a, B, f64>,
    /// \[H,D\]; λ·∂L_wr/∂W is added, if given.
    pub grad_weight: Option<MatOut<'a, B, B::Real>>,
    /// G \[H,H\] in the primal form, P \[D,D\] in the dual; written.
    pub gram: MatOut<'a, B, B::Real>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> WeightRedundancy<'_, B> {
    /// Checks shapes and returns (H, D).
    pub fn check(&self) -> Result<(usize, usize)> {
        let (h, d) = (self.weight.rows(), self.weight.cols());
        check_slice_mut::<B, _>("loss", 1, &self.loss)?;
        if let Some(grad) = &self.grad_weight {
            grad.expect("grad_weight", h, d)?;
        }
        let side = if self.form.is_dual(h, d) { d } else { h };
        self.gram.expect("gram", side, side)?;
        Ok((h, d))
    }
}
