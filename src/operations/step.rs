//! The whole step of a batch at once.

use super::check_slice_mut;
use crate::backend::{Backend, Mat, MatOut, Slice, SliceMut};
use crate::decoder_free::Trained;
use crate::error::{Error, Result, check_len};
use crate::matrix::Memory;
use crate::objective::{Activation, Objective};

/// Losses, and gradients or updated parameters, of a batch in one block: what [`Encode`](super::Encode), [`Recentre`](super::Recentre),
/// [`FinishStatistics`](super::FinishStatistics), [`BackwardDz`](super::BackwardDz), [`Product`](super::Product) and the optimiser's
/// step give one after the other, in the primal form, but for rounding: sums may be made in another order.
///
/// The weight-redundancy term has no part in it.
pub struct FusedStep<'a, B: Backend + ?Sized> {
    /// x \[N,D\].
    pub x: Mat<'a, B, B::Element>,
    /// W and b, and what is wanted of them.
    pub parameters: FusedParameters<'a, B>,
    /// f.
    pub activation: Activation,
    /// Weights of the terms.
    pub objective: Objective,
    /// a \[N,H\], if wanted.
    pub activations: Option<MatOut<'a, B, B::Element>>,
    /// ℓ \[N\]; written.
    pub row_loss: SliceMut<'a, B, B::Real>,
    /// ∂L/∂z \[N,H\], if wanted; not written where the losses alone are.
    pub dz: Option<MatOut<'a, B, B::Element>>,
    /// Σ_n ℓ_n \[1\]; written.
    pub row_loss_sum: SliceMut<'a, B, f64>,
    /// (L_var, L_tc) \[2\], not weighted; written if the objective needs statistics.
    pub losses: SliceMut<'a, B, f64>,
    /// \[1\], zero before the first call and otherwise left from call to call; calls with the same one do not overlap.
    pub state: SliceMut<'a, B, f64>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

/// W \[H,D\] and b \[H\] of a [`FusedStep`], and what becomes of their gradients.
pub enum FusedParameters<'a, B: Backend + ?Sized> {
    /// The losses alone are wanted.
    Fixed {
        /// W \[H,D\].
        weight: Mat<'a, B, B::Element>,
        /// b \[H\].
        bias: Slice<'a, B, B::Real>,
    },
    /// Gradients are written.
    Gradients {
        /// W \[H,D\].
        weight: Mat<'a, B, B::Element>,
        /// b \[H\].
        bias: Slice<'a, B, B::Real>,
        /// ∂L/∂W \[H,D\].
        grad_weight: MatOut<'a, B, B::Real>,
        /// ∂L/∂b \[H\].
        grad_bias: SliceMut<'a, B, B::Real>,
    },
    /// Parameters are updated, and gradients stored nowhere.
    Trained {
        /// W, row by row.
        weight: Trained<'a, B>,
        /// b.
        bias: Trained<'a, B>,
    },
}

impl<B: Backend + ?Sized> FusedParameters<'_, B> {
    /// A shorter borrow.
    pub fn reborrow(&mut self) -> FusedParameters<'_, B> {
        match self {
            Self::Fixed { weight, bias } => FusedParameters::Fixed { weight: *weight, bias: B::Memory::shorten(*bias) },
            Self::Gradients { weight, bias, grad_weight, grad_bias } => FusedParameters::Gradients {
                weight: *weight,
                bias: B::Memory::shorten(*bias),
                grad_weight: grad_weight.reborrow(),
                grad_bias: B::Memory::reborrow(grad_bias),
            },
            Self::Trained { weight, bias } => {
                FusedParameters::Trained { weight: weight.reborrow(), bias: bias.reborrow() }
            }
        }
    }

    /// W as it stands, with `inputs` columns.
    pub fn weight(&self, inputs: usize) -> Result<Mat<'_, B, B::Element>> {
        match self {
            Self::Fixed { weight, .. } | Self::Gradients { weight, .. } => Ok(*weight),
            Self::Trained { weight, .. } => weight.matrix(B::Memory::len::<B::Real>(&self.bias()), inputs),
        }
    }

    /// b as it stands.
    pub fn bias(&self) -> Slice<'_, B, B::Real> {
        match self {
            Self::Fixed { bias, .. } | Self::Gradients { bias, .. } => B::Memory::shorten(*bias),
            Self::Trained { bias, .. } => B::Memory::as_ref(&bias.parameters),
        }
    }
}

impl<B: Backend + ?Sized> FusedStep<'_, B> {
    /// Checks shapes and settings and returns (N, D, H).
    pub fn check(&self) -> Result<(usize, usize, usize)> {
        let (n, d) = (self.x.rows(), self.x.cols());
        let (weight, bias) = (self.parameters.weight(d)?, self.parameters.bias());
        let h = weight.rows();
        weight.expect("weight", h, d)?;
        check_len("bias", h, B::Memory::len::<B::Real>(&bias))?;
        if h == 0 {
            return Err(Error::NoLatents);
        }
        self.objective.check()?;
        if self.objective.needs_statistics() && n < 2 {
            return Err(Error::TooFewRows { rows: n as u64 });
        }
        match &self.parameters {
            FusedParameters::Fixed { .. } => {}
            FusedParameters::Gradients { grad_weight, grad_bias, .. } => {
                grad_weight.expect("grad_weight", h, d)?;
                check_slice_mut::<B, _>("grad_bias", h, grad_bias)?;
            }
            FusedParameters::Trained { weight, bias } => {
                let len = h.checked_mul(d).ok_or(Error::Overflow { what: "the gradient" })?;
                check_slice_mut::<B, _>("parameters", len, &weight.parameters)?;
                weight.optimizer.check(len)?;
                bias.optimizer.check(h)?;
                for (trained, len) in [(weight, len), (bias, h)] {
                    if let Some(storage) = &trained.storage {
                        check_slice_mut::<B, _>("storage", len, storage)?;
                    }
                }
            }
        }
        for matrix in [("activations", &self.activations), ("dz", &self.dz)] {
            if let (name, Some(matrix)) = matrix {
                matrix.expect(name, n, h)?;
            }
        }
        check_slice_mut::<B, _>("row_loss", n, &self.row_loss)?;
        check_slice_mut::<B, _>("row_loss_sum", 1, &self.row_loss_sum)?;
        check_slice_mut::<B, _>("losses", 2, &self.losses)?;
        check_slice_mut::<B, _>("state", 1, &self.state)?;
        Ok((n, d, h))
    }
}
