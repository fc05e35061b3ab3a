//! Optimisers: one read and one write of each buffer.

use super::{check_slice, check_slice_mut};
use crate::backend::{Backend, Slice, SliceMut};
use crate::error::{Error, Result};
use crate::matrix::Memory;

/// Settings of [`Sgd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdConfig {
    /// Step size.
    pub learning_rate: f64,
    /// Share of the velocity kept from step to step; 0 for plain gradient descent.
    pub momentum: f64,
    /// Weight decay, added to the gradient (L2).
    pub weight_decay: f64,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self { learning_rate: 1e-2, momentum: 0.0, weight_decay: 0.0 }
    }
}

/// Stochastic gradient descent with momentum, as PyTorch's `SGD` (dampening 0, not Nesterov).
///
/// ```text
/// g = gradient + weight_decay·θ        u = momentum·u + g        θ −= learning_rate·u
/// ```
pub struct Sgd<'a, B: Backend + ?Sized> {
    /// Settings.
    pub config: SgdConfig,
    /// ∂L/∂θ \[P\].
    pub gradient: Slice<'a, B, B::Real>,
    /// u \[P\]; zeros at first. Empty if momentum is 0.
    pub velocity: SliceMut<'a, B, B::Real>,
    /// θ \[P\].
    pub parameters: SliceMut<'a, B, B::Real>,
    /// θ rounded to the storage type \[P\], written if given (a low-precision copy for the products).
    pub storage: Option<SliceMut<'a, B, B::Element>>,
}

impl<B: Backend + ?Sized> Sgd<'_, B> {
    /// Checks shapes and settings and returns P.
    pub fn check(&self) -> Result<usize> {
        let len = B::Memory::len_mut::<B::Real>(&self.parameters);
        check_slice::<B, _>("gradient", len, &self.gradient)?;
        let velocity = if self.config.momentum == 0.0 { 0 } else { len };
        check_slice_mut::<B, _>("velocity", velocity, &self.velocity)?;
        if let Some(storage) = &self.storage {
            check_slice_mut::<B, _>("storage", len, storage)?;
        }
        finite("learning_rate", self.config.learning_rate)?;
        finite("weight_decay", self.config.weight_decay)?;
        fraction("momentum", self.config.momentum)?;
        Ok(len)
    }
}

/// Settings of [`Adam`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConfig {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay (AdamW); 0 for plain Adam.
    pub weight_decay: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), as PyTorch's `Adam` and `AdamW`.
///
/// ```text
/// θ −= learning_rate·weight_decay·θ
/// m = β₁ m + (1 − β₁) g        u = β₂ u + (1 − β₂) g²
/// θ −= learning_rate · m/(1 − β₁ᵗ) / (√(u/(1 − β₂ᵗ)) + eps)
/// ```
pub struct Adam<'a, B: Backend + ?Sized> {
    /// Settings.
    pub config: AdamConfig,
    /// t, which counts from 1.
    pub step: u64,
    /// g = ∂L/∂θ \[P\].
    pub gradient: Slice<'a, B, B::Real>,
    /// m \[P\]; zeros at first.
    pub first_moment: SliceMut<'a, B, B::Real>,
    /// u \[P\]; zeros at first.
    pub second_moment: SliceMut<'a, B, B::Real>,
    /// θ \[P\].
    pub parameters: SliceMut<'a, B, B::Real>,
    /// θ rounded to the storage type \[P\], written if given (a low-precision copy for the products).
    pub storage: Option<SliceMut<'a, B, B::Element>>,
}

impl<B: Backend + ?Sized> Adam<'_, B> {
    /// Checks shapes and settings and returns P.
    pub fn check(&self) -> Result<usize> {
        let len = B::Memory::len_mut::<B::Real>(&self.parameters);
        check_slice::<B, _>("gradient", len, &self.gradient)?;
        check_slice_mut::<B, _>("first_moment", len, &self.first_moment)?;
        check_slice_mut::<B, _>("second_moment", len, &self.second_moment)?;
        if let Some(storage) = &self.storage {
            check_slice_mut::<B, _>("storage", len, storage)?;
        }
        finite("learning_rate", self.config.learning_rate)?;
        finite("weight_decay", self.config.weight_decay)?;
        fraction("beta1", self.config.beta1)?;
        fraction("beta2", self.config.beta2)?;
        if !(self.config.eps >= 0.0 && self.config.eps.is_finite()) {
            return Err(Error::Configuration {
                name: "eps",
                value: self.config.eps,
                requirement: "finite and not negative",
            });
        }
        if self.step == 0 {
            return Err(Error::Configuration { name: "step", value: 0.0, requirement: "at least 1" });
        }
        Ok(len)
    }
}

fn finite(name: &'static str, value: f64) -> Result<()> {
    if value.is_finite() { Ok(()) } else { Err(Error::Configuration { name, value, requirement: "finite" }) }
}

fn fraction(name: &'static str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        Ok(())
    } else {
        Err(Error::Configuration { name, value, requirement: "in [0, 1)" })
    }
}
