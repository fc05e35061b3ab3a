//! Losses of given activations, behind any encoder.

use crate::argument::{Stored, check_like, check_matrix, for_type_of, rows, with_dense_rows};
use crate::node::loss;
use crate::{Error, Kernels, Result};
use candle_core::{DType, Device, Tensor};
use sae_kernels::{ActivationLosses, ActivationStep, Backend, Losses, MatMut, MatRef, Objective, Shape};

/// What [`Kernels::combined_loss`] returns.
#[derive(Debug, Clone)]
pub struct CombinedLoss {
    /// The objective's value, differentiable with respect to a and W; a scalar of their type.
    pub total: Tensor,
    /// All terms, in f64: not weighted but for the total, and 0 for a term without weight.
    pub losses: Losses,
    /// softmax(−a) by row \[N,H\], detached.
    pub responsibilities: Tensor,
}

const NO_TERMS: Objective = Objective {
    lambda_lse: 0.0,
    lambda_var: 0.0,
    lambda_tc: 0.0,
    lambda_wr: 0.0,
    variance_eps: 1e-6,
    reduction: sae_kernels::Reduction::Sum,
    normalize_weight: true,
};

/// Losses, and ∂L/∂a, ∂L/∂W and responsibilities if wanted, which no graph has yet.
struct Found {
    losses: Losses,
    grad_a: Option<Tensor>,
    grad_weight: Option<Tensor>,
    responsibilities: Option<Tensor>,
}

/// What to compute.
#[derive(Default)]
struct Wanted {
    grad_a: bool,
    grad_weight: bool,
    responsibilities: bool,
}

/// Of the losses below, activations a \[N,H\] may be of any sign, and one gradient for each argument that is tracked is computed with the loss and
/// kept as [`decoder_free_loss`](Self::decoder_free_loss) does; errors are the same, too.
impl Kernels {
    /// (−Σ_n logsumexp(−a_n), softmax(−a) by row \[N,H\]): a differentiable scalar, and the responsibilities, detached. They are the loss's gradient.
    pub fn lse_loss(&self, a: &Tensor) -> Result<(Tensor, Tensor)> {
        check_matrix("a", a, "[N,H]")?;
        let objective = Objective { lambda_lse: 1.0, ..NO_TERMS };
        let wanted = Wanted { grad_a: true, ..Wanted::default() };
        let found = self.activation_losses("lse_loss", Some(a), None, &objective, wanted)?;
        let responsibilities = found.grad_a.clone().expect("it was wanted");
        let total = loss("sae-lse-loss", [a], found.losses.lse, a.dtype(), [found.grad_a])?;
        Ok((total, responsibilities))
    }

    /// −Σ_j log(v_j + eps), v the unbiased variance over the batch; eps positive (1e-6 in the paper).
    pub fn variance_loss(&self, a: &Tensor, eps: f64) -> Result<Tensor> {
        let objective = Objective { lambda_var: 1.0, variance_eps: eps, ..NO_TERMS };
        self.statistics_loss("sae-variance-loss", a, &objective)
    }

    /// Σ_{i≠j} C_ij², C_ij = S_ij/(s_i s_j), S the unbiased covariance and s = √v + 1e-8.
    pub fn correlation_loss(&self, a: &Tensor) -> Result<Tensor> {
        self.statistics_loss("sae-correlation-loss", a, &Objective { lambda_tc: 1.0, ..NO_TERMS })
    }

    /// ‖Ŵ Ŵᵀ − I‖_F², Ŵ_j = W_j/(‖W_j‖ + 1e-8), of a weight W \[H,D\].
    pub fn weight_redundancy_loss(&self, weight: &Tensor) -> Result<Tensor> {
        check_matrix("weight", weight, "[H,D]")?;
        let objective = Objective { lambda_wr: 1.0, ..NO_TERMS };
        let wanted = Wanted { grad_weight: weight.track_op(), ..Wanted::default() };
        let found = self.activation_losses("weight_redundancy_loss", None, Some(weight), &objective, wanted)?;
        let gradients = [found.grad_weight];
        Ok(loss("sae-weight-redundancy-loss", [weight], found.losses.total, weight.dtype(), gradients)?)
    }

    /// The weighted sum of the four losses, of activations a \[N,H\] and the weight W \[H,D\] of what has made them.
    ///
    /// W is part of the graph only if the weight-redundancy term has a weight.
    pub fn combined_loss(&self, a: &Tensor, weight: &Tensor, objective: &Objective) -> Result<CombinedLoss> {
        let (_, latents) = check_matrix("a", a, "[N,H]")?;
        let (_, inputs) = check_matrix("weight", weight, "[H,D]")?;
        check_like("weight", weight, &[latents, inputs], "[H,D] of a [N,H]", &[a.dtype()])?;
        let weight = (objective.lambda_wr != 0.0).then_some(weight);
        let wanted =
            Wanted { grad_a: a.track_op(), grad_weight: weight.is_some_and(Tensor::track_op), responsibilities: true };
        let found = self.activation_losses("combined_loss", Some(a), weight, objective, wanted)?;
        let (name, value, dtype) = ("sae-combined-loss", found.losses.total, a.dtype());
        let total = match weight {
            Some(weight) => loss(name, [a, weight], value, dtype, [found.grad_a, found.grad_weight])?,
            None => loss(name, [a], value, dtype, [found.grad_a])?,
        };
        let responsibilities = found.responsibilities.expect("they were wanted");
        Ok(CombinedLoss { total, losses: found.losses, responsibilities })
    }

    /// A single term that is one of the batch's statistics.
    fn statistics_loss(&self, name: &'static str, a: &Tensor, objective: &Objective) -> Result<Tensor> {
        check_matrix("a", a, "[N,H]")?;
        let wanted = Wanted { grad_a: a.track_op(), ..Wanted::default() };
        let found = self.activation_losses(name, Some(a), None, objective, wanted)?;
        Ok(loss(name, [a], found.losses.total, a.dtype(), [found.grad_a])?)
    }

    /// Of matrices that have been checked, at least one of them.
    fn activation_losses(
        &self,
        name: &'static str,
        a: Option<&Tensor>,
        weight: Option<&Tensor>,
        objective: &Objective,
        wanted: Wanted,
    ) -> Result<Found> {
        let (operand, tensor) = a.map(|a| ("a", a)).or(weight.map(|weight| ("weight", weight))).expect("one of them");
        for_type_of!(operand, tensor, T => self.activation_losses_of::<T>(name, a, weight, objective, wanted))
    }

    fn activation_losses_of<T: Stored>(
        &self,
        name: &'static str,
        a: Option<&Tensor>,
        weight: Option<&Tensor>,
        objective: &Objective,
        wanted: Wanted,
    ) -> Result<Found> {
        let a = a.map(with_dense_rows).transpose()?;
        let weight = weight.map(with_dense_rows).transpose()?;
        let (a, weight) = (a.as_ref().map(Tensor::storage_and_layout), weight.as_ref().map(Tensor::storage_and_layout));
        let a = a.as_ref().map(|(storage, layout)| rows::<T>(storage, layout)).transpose()?;
        let weight = weight.as_ref().map(|(storage, layout)| rows::<T>(storage, layout)).transpose()?;
        // The weight's term alone is that of no rows.
        let latents = a.map_or_else(|| weight.map_or(0, |weight| weight.rows()), |a| a.cols());
        let activations = a.map_or_else(|| MatRef::new(&[], 0, latents), Ok)?;
        let shape = Shape { rows: activations.rows(), inputs: weight.map_or(0, |weight| weight.cols()), latents };
        let Shape { rows: n, inputs: d, latents: h } = shape;
        let work = |plan: &mut ActivationLosses<T::Backend>| {
            let mut grad_a = wanted.grad_a.then(|| plan.backend().alloc::<T>(n * h)).transpose()?;
            let mut grad_weight = wanted.grad_weight.then(|| plan.backend().alloc::<T::Real>(h * d)).transpose()?;
            let mut r = wanted.responsibilities.then(|| plan.backend().alloc::<T::Real>(n * h)).transpose()?;
            plan.step(ActivationStep {
                activations,
                weight,
                grad_activations: grad_a.as_mut().map(|grad| MatMut::new(grad, n, h)).transpose()?,
                grad_weight: grad_weight.as_mut().map(|grad| MatMut::new(grad, h, d)).transpose()?,
                responsibilities: r.as_mut().map(|r| MatMut::new(r, n, h)).transpose()?,
                row_loss: None,
            })?;
            Ok((plan.losses()?, grad_a, grad_weight, r))
        };
        let (losses, grad_a, grad_weight, r) = self.plans().with(name, shape, objective, T::backend, work)?;
        let r = r.map(|r| Tensor::from_vec(r, (n, h), &Device::Cpu)?.to_dtype(T::DTYPE));
        Ok(Found {
            losses,
            grad_a: grad_a.map(|grad| Tensor::from_vec(grad, (n, h), &Device::Cpu)).transpose()?,
            grad_weight: grad_weight.map(|grad| Tensor::from_vec(grad, (h, d), &Device::Cpu)).transpose()?,
            responsibilities: r.transpose()?,
        })
    }
}
