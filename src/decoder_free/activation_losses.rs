//! The decoder-free objective of given activations: behind any encoder, a framework's among them.

use super::{Correlation, DecoderFree, DecoderFreeConfig, PlanMemory, lengthen, rows_of, statistics_term};
use crate::backend::{Backend, Buffer, Mat, MatOut, Shape, SliceMut};
use crate::error::{Error, Result, check_len};
use crate::matrix::{MatMut, MatRef, Memory};
use crate::objective::{Activation, Losses, Objective};
use crate::operations::*;

/// Inputs and outputs of one call; N may be anything up to the plan's rows. What is not given is not computed.
pub struct ActivationStep<'a, B: Backend + ?Sized> {
    /// Activations a \[N,H\], of any sign.
    pub activations: Mat<'a, B, B::Element>,
    /// Weight \[H,D\], for the weight-redundancy term.
    pub weight: Option<Mat<'a, B, B::Element>>,
    /// ∂L/∂a \[N,H\].
    pub grad_activations: Option<MatOut<'a, B, B::Element>>,
    /// ∂L/∂W \[H,D\], of the weight-redundancy term; only with a weight.
    pub grad_weight: Option<MatOut<'a, B, B::Real>>,
    /// r = softmax(−a) by row \[N,H\].
    pub responsibilities: Option<MatOut<'a, B, B::Real>>,
    /// Row losses ℓ \[N\].
    pub row_loss: Option<SliceMut<'a, B, B::Real>>,
}

/// Losses of given activations, and their gradient: a plan that owns all memory that a call needs, but for the scratch of a dual correlation
/// term without gradient, which is made when first needed.
///
/// Memory: min(N,H)² numbers for the correlation term, min(H,D)² for weight redundancy, and the workspace.
pub struct ActivationLosses<B: Backend> {
    plan: DecoderFree<B>,
    /// Σ_n ∂L/∂a, which nobody wants.
    column_sums: Buffer<B, B::Real>,
}

impl<B: Backend> ActivationLosses<B> {
    /// Makes a plan for batches up to `shape`; the forms of the correlation and weight-redundancy terms are chosen by cost.
    ///
    /// # Errors
    /// As [`DecoderFree::new`].
    pub fn new(backend: B, shape: Shape, objective: Objective) -> Result<Self> {
        let config = DecoderFreeConfig { objective, activation: Activation::Identity, ..DecoderFreeConfig::new(shape) };
        let column_sums = backend.alloc(shape.latents)?;
        Ok(Self { plan: DecoderFree::with_encoder(backend, config, false)?, column_sums })
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        self.plan.backend()
    }
    /// What the plan was made for.
    pub fn shape(&self) -> Shape {
        self.plan.config.shape
    }
    /// Weights of the loss terms.
    pub fn objective(&self) -> &Objective {
        &self.plan.config.objective
    }
    /// The memory that the plan owns now.
    pub fn memory(&self) -> PlanMemory {
        let memory = self.plan.memory();
        let column_sums = B::Memory::len::<B::Real>(&B::Memory::slice(&self.column_sums)) * size_of::<B::Real>();
        PlanMemory { vectors: memory.vectors + column_sums, ..memory }
    }
    /// Losses of the last call. Waits for the device.
    ///
    /// # Errors
    /// What the backend's download may return.
    pub fn losses(&self) -> Result<Losses> {
        self.plan.losses()
    }

    /// Losses of a batch, and what else is wanted, which is overwritten.
    ///
    /// # Errors
    /// [`Error::TooManyRows`], [`Error::TooFewRows`], [`Error::Configuration`] for a weight-redundancy term without a weight, and shape errors.
    pub fn step(&mut self, step: ActivationStep<'_, B>) -> Result<()> {
        let correlation = self.check(&step)?;
        let ActivationStep { activations, weight, mut grad_activations, grad_weight, mut responsibilities, .. } = step;
        let (n, h) = (activations.rows(), activations.cols());
        let mut row_loss = step.row_loss;
        // Before anything is written.
        if grad_activations.is_none() && correlation == Correlation::Dual {
            lengthen(&self.plan.backend, &mut self.plan.dz, n * h)?;
        }
        self.sums(activations, &mut row_loss)?;
        self.plan.finish(n as u64, Some(activations), correlation)?;
        self.plan.dual(n, Some(activations), grad_activations.as_mut().map(MatMut::reborrow), correlation)?;
        self.weight_term(activations, weight, grad_weight)?;
        let plan = &mut self.plan;
        let row_loss = rows_of::<B>(&mut row_loss, &mut plan.row_loss, &(0..n));
        if let Some(responsibilities) = &mut responsibilities {
            plan.backend.responsibilities(Responsibilities {
                activations,
                row_loss: B::Memory::as_ref(&row_loss),
                responsibilities: responsibilities.reborrow(),
            })?;
        }
        if let Some(dz) = &mut grad_activations {
            let objective = plan.config.objective;
            let statistics = objective
                .needs_statistics()
                .then(|| statistics_term::<B>(correlation, &plan.mean, &plan.scale, &plan.coupling, &plan.offset));
            plan.backend.backward_dz(BackwardDz {
                activations,
                activation: Activation::Identity,
                row_loss: B::Memory::as_ref(&row_loss),
                row_weight: objective.row_weight(n as u64),
                statistics: statistics.transpose()?,
                dz: dz.reborrow(),
                accumulate: false,
                grad_bias: B::Memory::slice_mut(&mut self.column_sums),
                workspace: B::Memory::slice_mut(&mut plan.workspace),
            })?;
        }
        Ok(())
    }

    fn check(&self, step: &ActivationStep<'_, B>) -> Result<Correlation> {
        let DecoderFreeConfig { shape: Shape { rows, inputs, latents }, objective, .. } = self.plan.config;
        let n = step.activations.rows();
        if n > rows {
            return Err(Error::TooManyRows { planned: rows, found: n });
        }
        step.activations.expect("activations", n, latents)?;
        match &step.weight {
            Some(weight) => weight.expect("weight", latents, inputs)?,
            None if objective.lambda_wr != 0.0 => {
                let requirement = "0 where no weight is given";
                return Err(Error::Configuration { name: "lambda_wr", value: objective.lambda_wr, requirement });
            }
            // A gradient of what is not there.
            None if step.grad_weight.is_some() => check_len("weight", latents * inputs, 0)?,
            None => {}
        }
        if let Some(grad_activations) = &step.grad_activations {
            grad_activations.expect("grad_activations", n, latents)?;
        }
        if let Some(grad_weight) = &step.grad_weight {
            grad_weight.expect("grad_weight", latents, inputs)?;
        }
        if let Some(responsibilities) = &step.responsibilities {
            responsibilities.expect("responsibilities", n, latents)?;
        }
        self.plan.check_outputs(n, None, step.row_loss.as_ref())?;
        self.plan.check_batch(n)
    }

    /// Row losses and the batch's moments about its mean.
    fn sums(
        &mut self,
        activations: Mat<'_, B, B::Element>,
        row_loss: &mut Option<SliceMut<'_, B, B::Real>>,
    ) -> Result<()> {
        let plan = &mut self.plan;
        let moments = &mut plan.moments;
        plan.backend.activation_sums(ActivationSums {
            activations,
            row_loss: Some(rows_of::<B>(row_loss, &mut plan.row_loss, &(0..activations.rows()))),
            moments: Some(Moments {
                shift: None,
                accumulate: false,
                row_loss_sum: B::Memory::slice_mut(&mut moments.row_loss_sum),
                sum: B::Memory::slice_mut(&mut moments.sum),
                sum_squares: B::Memory::slice_mut(&mut moments.sum_squares),
            }),
            workspace: B::Memory::slice_mut(&mut plan.workspace),
        })?;
        plan.backend.recentre(Recentre {
            activations,
            shift: B::Memory::slice_mut(&mut moments.shift),
            sum: B::Memory::slice_mut(&mut moments.sum),
            sum_squares: B::Memory::slice_mut(&mut moments.sum_squares),
        })
    }

    fn weight_term(
        &mut self,
        activations: Mat<'_, B, B::Element>,
        weight: Option<Mat<'_, B, B::Element>>,
        mut grad_weight: Option<MatOut<'_, B, B::Real>>,
    ) -> Result<()> {
        let Some(weight) = weight else { return Ok(()) };
        if let Some(grad_weight) = &mut grad_weight {
            // The term adds its gradient to what stands there: a product over no rows is 0.
            self.plan.backend.product(Product {
                layout: Layout::Tn,
                left: activations.rows_range(0..0),
                right: MatRef::from_memory(B::Memory::part(weight.data(), 0..0), 0, weight.cols(), weight.cols())?,
                accumulate: false,
                out: grad_weight.reborrow(),
                workspace: B::Memory::slice_mut(&mut self.plan.workspace),
            })?;
        }
        self.plan.weight_term(weight, grad_weight)
    }
}
