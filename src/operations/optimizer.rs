//! Optimisers: one read and one write of each buffer.

use super::{check_slice, check_slice_mut};
use crate::backend::{Backend, Mat, Slice, SliceMut};
use crate::error::{Error, Result, check_len};
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

impl SgdConfig {
    fn check(&self) -> Result<()> {
        finite("learning_rate", self.learning_rate)?;
        finite("weight_decay", self.weight_decay)?;
        fraction("momentum", self.momentum)
    }
    /// Length of the velocity of `len` parameters.
    fn velocity_len(&self, len: usize) -> usize {
        if self.momentum == 0.0 { 0 } else { len }
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
        check_slice_mut::<B, _>("velocity", self.config.velocity_len(len), &self.velocity)?;
        if let Some(storage) = &self.storage {
            check_slice_mut::<B, _>("storage", len, storage)?;
        }
        self.config.check()?;
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

impl AdamConfig {
    fn check(&self, step: u64) -> Result<()> {
        finite("learning_rate", self.learning_rate)?;
        finite("weight_decay", self.weight_decay)?;
        fraction("beta1", self.beta1)?;
        fraction("beta2", self.beta2)?;
        if !(self.eps >= 0.0 && self.eps.is_finite()) {
            return Err(Error::Configuration { name: "eps", value: self.eps, requirement: "finite and not negative" });
        }
        if step == 0 {
            return Err(Error::Configuration { name: "step", value: 0.0, requirement: "at least 1" });
        }
        Ok(())
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
        self.config.check(self.step)?;
        Ok(len)
    }
}

/// An optimiser and its state for P parameters: [`Sgd`] or [`Adam`], but for gradient and parameters.
pub enum Optimizer<'a, B: Backend + ?Sized> {
    /// [`Sgd`].
    Sgd {
        /// Settings.
        config: SgdConfig,
        /// u \[P\]; zeros at first. Empty if momentum is 0.
        velocity: SliceMut<'a, B, B::Real>,
    },
    /// [`Adam`].
    Adam {
        /// Settings.
        config: AdamConfig,
        /// t, which counts from 1.
        step: u64,
        /// m \[P\]; zeros at first.
        first_moment: SliceMut<'a, B, B::Real>,
        /// u \[P\]; zeros at first.
        second_moment: SliceMut<'a, B, B::Real>,
    },
}

impl<B: Backend + ?Sized> Optimizer<'_, B> {
    /// A shorter borrow.
    pub fn reborrow(&mut self) -> Optimizer<'_, B> {
        match self {
            Optimizer::Sgd { config, velocity } => {
                Optimizer::Sgd { config: *config, velocity: B::Memory::reborrow(velocity) }
            }
            Optimizer::Adam { config, step, first_moment, second_moment } => Optimizer::Adam {
                config: *config,
                step: *step,
                first_moment: B::Memory::reborrow(first_moment),
                second_moment: B::Memory::reborrow(second_moment),
            },
        }
    }

    /// Checks the settings and the state of `len` parameters.
    pub fn check(&self, len: usize) -> Result<()> {
        match self {
            Optimizer::Sgd { config, velocity } => {
                check_slice_mut::<B, _>("velocity", config.velocity_len(len), velocity)?;
                config.check()
            }
            Optimizer::Adam { config, step, first_moment, second_moment } => {
                check_slice_mut::<B, _>("first_moment", len, first_moment)?;
                check_slice_mut::<B, _>("second_moment", len, second_moment)?;
                config.check(*step)
            }
        }
    }
}

/// A product whose result is a gradient, with the optimiser's step: θ updated by g = leftᵀ · right (dW = dZᵀ x).
///
/// The same numbers as a [`Product`](super::Product) and then [`Sgd`] or [`Adam`], but a backend need not write the gradient: the CPU's
/// kernels update parameters while a tile of it is in L1.
pub struct ProductUpdate<'a, B: Backend + ?Sized> {
    /// \[K,M\].
    pub left: Mat<'a, B, B::Element>,
    /// \[K,N\].
    pub right: Mat<'a, B, B::Element>,
    /// Whether g is the product plus what `gradient` holds.
    pub accumulate: bool,
    /// \[M·N\]; undefined afterwards.
    pub gradient: SliceMut<'a, B, B::Real>,
    /// The optimiser and its state.
    pub optimizer: Optimizer<'a, B>,
    /// θ \[M·N\], row by row.
    pub parameters: SliceMut<'a, B, B::Real>,
    /// θ rounded to the storage type \[M·N\], written if given.
    pub storage: Option<SliceMut<'a, B, B::Element>>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> ProductUpdate<'_, B> {
    /// Checks shapes and settings and returns (M, N, K).
    pub fn check(&self) -> Result<(usize, usize, usize)> {
        let (m, n, k) = (self.left.cols(), self.right.cols(), self.left.rows());
        self.right.expect("right", k, n)?;
        let len = m.checked_mul(n).ok_or(Error::Overflow { what: "the gradient" })?;
        check_len("gradient", len, B::Memory::len_mut::<B::Real>(&self.gradient))?;
        check_len("parameters", len, B::Memory::len_mut::<B::Real>(&self.parameters))?;
        if let Some(storage) = &self.storage {
            check_slice_mut::<B, _>("storage", len, storage)?;
        }
        self.optimizer.check(len)?;
        Ok((m, n, k))
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
