//! The decoder of the standard sparse autoencoder: reconstruction, squared error, L1.

use super::{check_slice, check_slice_mut};
use crate::backend::{Backend, Mat, MatOut, Slice, SliceMut};
use crate::error::Result;
use crate::objective::Activation;

/// x̂ = a W + b, the squared error against x, and the error scaled to a gradient.
///
/// ```text
/// x̂ = a W + b        squared_error = Σ_nd (x̂ − x)²        residual = w (x̂ − x)
/// ```
///
/// With w = 2/(N·D) the residual is ∂MSE/∂x̂.
pub struct Decode<'a, B: Backend + ?Sized> {
    /// a \[N,H\].
    pub activations: Mat<'a, B, B::Element>,
    /// Decoder weight \[H,D\]: row j is what latent j writes.
    pub weight: Mat<'a, B, B::Element>,
    /// Decoder bias \[D\].
    pub bias: Slice<'a, B, B::Real>,
    /// x \[N,D\].
    pub x: Mat<'a, B, B::Element>,
    /// x̂ \[N,D\], written if given.
    pub reconstruction: Option<MatOut<'a, B, B::Real>>,
    /// w.
    pub residual_weight: f64,
    /// w (x̂ − x) \[N,D\], written if given.
    pub residual: Option<MatOut<'a, B, B::Element>>,
    /// Whether to add to `squared_error` or to overwrite it.
    pub accumulate: bool,
    /// Σ (x̂ − x)² \[1\].
    pub squared_error: SliceMut<'a, B, f64>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> Decode<'_, B> {
    /// Checks shapes and returns (N, D, H).
    pub fn check(&self) -> Result<(usize, usize, usize)> {
        let (n, h, d) = (self.activations.rows(), self.activations.cols(), self.weight.cols());
        self.weight.expect("weight", h, d)?;
        check_slice::<B, _>("bias", d, &self.bias)?;
        self.x.expect("x", n, d)?;
        if let Some(reconstruction) = &self.reconstruction {
            reconstruction.expect("reconstruction", n, d)?;
        }
        if let Some(residual) = &self.residual {
            residual.expect("residual", n, d)?;
        }
        check_slice_mut::<B, _>("squared_error", 1, &self.squared_error)?;
        Ok((n, d, h))
    }
}

/// ∂L/∂z and ∂L/∂b of the encoder, from ∂L/∂x̂ and an L1 penalty.
///
/// ```text
/// dA = residual · Wᵀ + l1·sign(a)        dZ = dA ⊙ f'(z)        db = Σ_n dZ
/// ```
pub struct DecodeBackward<'a, B: Backend + ?Sized> {
    /// ∂L/∂x̂ \[N,D\].
    pub residual: Mat<'a, B, B::Element>,
    /// Decoder weight \[H,D\].
    pub weight: Mat<'a, B, B::Element>,
    /// a \[N,H\].
    pub activations: Mat<'a, B, B::Element>,
    /// f.
    pub activation: Activation,
    /// Weight of Σ|a| in the loss.
    pub l1: f64,
    /// dZ \[N,H\]; written.
    pub dz: MatOut<'a, B, B::Element>,
    /// Whether to add to `grad_bias` or to overwrite it.
    pub accumulate: bool,
    /// ∂L/∂b \[H\].
    pub grad_bias: SliceMut<'a, B, B::Real>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> DecodeBackward<'_, B> {
    /// Checks shapes and returns (N, D, H).
    pub fn check(&self) -> Result<(usize, usize, usize)> {
        let (n, d, h) = (self.residual.rows(), self.residual.cols(), self.weight.rows());
        self.weight.expect("weight", h, d)?;
        self.activations.expect("activations", n, h)?;
        self.dz.expect("dz", n, h)?;
        check_slice_mut::<B, _>("grad_bias", h, &self.grad_bias)?;
        Ok((n, d, h))
    }
}
