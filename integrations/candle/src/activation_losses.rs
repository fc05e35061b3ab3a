//! Losses of given activations, behind any encoder.

use crate::argument::{At, check_like, check_matrix, with_dense_rows};
use crate::node::loss;
use crate::place::{Place, at_place_of};
use crate::{Kernels, Result};
use candle_core::{Tensor, WithDType};
use sae_kernels::{ActivationLosses, ActivationStep, Losses, MatRef, Objective, Shape};

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
        check_like("weight", weight, a, &[latents, inputs], "[H,D] of a [N,H]", &[a.dtype()])?;
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
        at_place_of!(operand, tensor, place => self.activation_losses_at(&place, name, a, weight, objective, wanted))
    }

    fn activation_losses_at<P: Place>(
        &self,
        place: &P,
        name: &'static str,
        a: Option<&Tensor>,
        weight: Option<&Tensor>,
        objective: &Objective,
        wanted: Wanted,
    ) -> Result<Found> {
        let (a, weight) = (a.map(with_dense_rows).transpose()?, weight.map(with_dense_rows).transpose()?);
        let extents = |matrix: &Option<Tensor>| matrix.as_ref().map(Tensor::dims2).transpose();
        let ((n, width), (h, d)) = (extents(&a)?.unwrap_or_default(), extents(&weight)?.unwrap_or_default());
        // The weight's term alone is that of no rows.
        let h = if a.is_some() { width } else { h };
        let (a, weight) = (a.as_ref().map(Tensor::storage_and_layout), weight.as_ref().map(Tensor::storage_and_layout));
        let work = |plan: &mut ActivationLosses<P::Backend>| {
            let at = At { place, backend: plan.backend() };
            let a = a.as_ref().map(|a| at.rows::<P::Stored>(a)).transpose()?;
            let weight = weight.as_ref().map(|weight| at.rows::<P::Stored>(weight)).transpose()?;
            let no_rows = || MatRef::from_memory(weight.expect("one of them").data(), 0, h, h);
            let mut grad_a = at.room::<P::Stored>(wanted.grad_a, n * h)?;
            let mut grad_weight = at.room::<P::Real>(wanted.grad_weight, h * d)?;
            let mut responsibilities = at.room::<P::Real>(wanted.responsibilities, n * h)?;
            let step = ActivationStep {
                activations: a.map_or_else(no_rows, Ok)?,
                weight,
                grad_activations: at.matrix(&mut grad_a, n, h)?,
                grad_weight: at.matrix(&mut grad_weight, h, d)?,
                responsibilities: at.matrix(&mut responsibilities, n, h)?,
                row_loss: None,
            };
            plan.step(step)?;
            Ok((plan.losses()?, grad_a, grad_weight, responsibilities))
        };
        let shape = Shape { rows: n, inputs: d, latents: h };
        let (losses, grad_a, grad_weight, responsibilities) = self.plans().with(name, place, shape, objective, work)?;
        let responsibilities = responsibilities.map(|r| place.tensor(r, (n, h)).to_dtype(P::Stored::DTYPE));
        Ok(Found {
            losses,
            grad_a: grad_a.map(|grad| place.tensor(grad, (n, h))),
            grad_weight: grad_weight.map(|grad| place.tensor(grad, (h, d))),
            responsibilities: responsibilities.transpose()?,
        })
    }
}
