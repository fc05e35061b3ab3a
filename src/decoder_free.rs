//! The decoder-free sparse autoencoder: losses and gradients of a batch, over any backend.

mod activation_losses;
mod memory;

pub use activation_losses::{ActivationLosses, ActivationStep};
pub use memory::PlanMemory;

use crate::backend::{Backend, Buffer, Mat, MatOut, Shape, Slice, SliceMut, update};
use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::matrix::{MatMut, MatRef, Memory};
use crate::objective::{Activation, Form, Losses, Objective};
use crate::operations::*;
use crate::statistics::{Kind, Statistics};
use memory::{Lens, primal_operations};
use std::borrow::Cow;
use std::ops::Range;

/// What a [`DecoderFree`] plan is made for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecoderFreeConfig {
    /// Largest batch, inputs, latents.
    pub shape: Shape,
    /// Weights of the loss terms.
    pub objective: Objective,
    /// Activation of the encoder.
    pub activation: Activation,
    /// Form of the correlation term. Batches of several blocks always use the primal form.
    pub correlation_form: Form,
    /// Form of the weight-redundancy term.
    pub weight_form: Form,
    /// Rows of a block, for exact micro-batching: a batch of more rows is processed in blocks, in memory for one block, and
    /// gives the gradient of the whole batch. Each block but the last is encoded twice. `None`: one block.
    pub block_rows: Option<usize>,
}

impl DecoderFreeConfig {
    /// The paper's objective, ReLU, whole batches, forms chosen by cost.
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            objective: Objective::default(),
            activation: Activation::Relu,
            correlation_form: Form::Auto,
            weight_form: Form::Auto,
            block_rows: None,
        }
    }
}

/// Inputs and outputs of one step; N may be anything up to the plan's rows.
pub struct DecoderFreeStep<'a, B: Backend + ?Sized> {
    /// Input \[N,D\].
    pub x: Mat<'a, B, B::Element>,
    /// Weight \[H,D\].
    pub weight: Mat<'a, B, B::Element>,
    /// Bias \[H\].
    pub bias: Slice<'a, B, B::Real>,
    /// ∂L/∂W \[H,D\].
    pub grad_weight: MatOut<'a, B, B::Real>,
    /// ∂L/∂b \[H\].
    pub grad_bias: SliceMut<'a, B, B::Real>,
    /// ∂L/∂x \[N,D\], if wanted.
    pub grad_x: Option<MatOut<'a, B, B::Real>>,
    /// Activations \[N,H\], if wanted. A batch of several blocks is then encoded once instead of twice.
    pub activations: Option<MatOut<'a, B, B::Element>>,
    /// Row losses ℓ \[N\], if wanted.
    pub row_loss: Option<SliceMut<'a, B, B::Real>>,
}

/// Inputs and outputs of one step of training; N may be anything up to the plan's rows.
pub struct DecoderFreeTrainStep<'a, B: Backend + ?Sized> {
    /// Input \[N,D\].
    pub x: Mat<'a, B, B::Element>,
    /// Weight \[H,D\], updated.
    pub weight: Trained<'a, B>,
    /// Bias \[H\], updated. It needs no copy in the storage type.
    pub bias: Trained<'a, B>,
    /// Activations \[N,H\] before the update, if wanted.
    pub activations: Option<MatOut<'a, B, B::Element>>,
    /// Row losses ℓ \[N\] before the update, if wanted.
    pub row_loss: Option<SliceMut<'a, B, B::Real>>,
}

/// P parameters in training.
pub struct Trained<'a, B: Backend + ?Sized> {
    /// θ \[P\], row by row; updated.
    pub parameters: SliceMut<'a, B, B::Real>,
    /// θ rounded to the storage type \[P\]: what the products read; rounded again after the update. May be left out where the storage type
    /// is that of the parameters.
    pub storage: Option<SliceMut<'a, B, B::Element>>,
    /// The optimiser and its state.
    pub optimizer: Optimizer<'a, B>,
}

impl<B: Backend + ?Sized> Trained<'_, B> {
    /// What the products read.
    pub(crate) fn matrix(&self, rows: usize, cols: usize) -> Result<Mat<'_, B, B::Element>> {
        let stored = match &self.storage {
            Some(storage) => B::Memory::as_ref(storage),
            None => B::Memory::as_type(B::Memory::as_ref::<B::Real>(&self.parameters))
                .ok_or(Error::NoStorage { storage: B::Element::NAME, parameters: B::Real::NAME })?,
        };
        MatRef::from_memory(stored, rows, cols, cols)
    }

    /// A shorter borrow.
    pub(crate) fn reborrow(&mut self) -> Trained<'_, B> {
        Trained {
            parameters: B::Memory::reborrow(&mut self.parameters),
            storage: self.storage.as_mut().map(B::Memory::reborrow),
            optimizer: self.optimizer.reborrow(),
        }
    }
}

/// Losses and gradients of the decoder-free objective: a plan that owns all memory that a step needs.
///
/// [`step`](Self::step) is the whole of it on one device, [`train_step`](Self::train_step) updates the parameters too. Hosts that shard rows
/// use its two phases: [`statistics`](Self::statistics), a sum over hosts, [`backward`](Self::backward), a sum of the gradients over hosts; or, where
/// the sums stay in the backend's memory, [`statistics_packed`](Self::statistics_packed) and [`backward_packed`](Self::backward_packed).
///
/// A batch of one block may be computed at once, where the backend has a way to: see [`FusedStep`].
///
/// Memory: block·H activations and as many gradients; min(N,H)² numbers for the correlation term, or H² for a batch of several
/// blocks; min(H,D)² for weight redundancy; H·(D+1) for the gradients once it trains; the workspace. [`DecoderFreeConfig::memory`] tells the
/// bytes before, [`memory`](Self::memory) afterwards.
pub struct DecoderFree<B: Backend> {
    backend: B,
    config: DecoderFreeConfig,
    block_rows: usize,
    activations: Buffer<B, B::Element>,
    dz: Buffer<B, B::Element>,
    row_loss: Buffer<B, B::Real>,
    moments: MomentBuffers<B>,
    mean: Buffer<B, B::Real>,
    variance: Buffer<B, B::Real>,
    scale: Buffer<B, B::Real>,
    offset: Buffer<B, B::Real>,
    /// M, over several blocks the comoments until all are summed; or K.
    coupling: Buffer<B, B::Real>,
    weight_gram: Buffer<B, B::Real>,
    /// L_var, L_tc, L_wr.
    terms: Buffer<B, f64>,
    /// For statistics in the host's memory; made when first needed.
    packed: Option<PackedBuffers<B>>,
    /// What [`FusedStep`] keeps from call to call.
    fused: Buffer<B, f64>,
    /// Gradients of weight and bias in training; made when first needed.
    gradients: Option<Gradients<B>>,
    workspace: Buffer<B, f64>,
    /// Rows of the batch that the losses are of.
    count: u64,
}

/// Shift and sums of [`Moments`].
struct MomentBuffers<B: Backend> {
    shift: Buffer<B, B::Real>,
    row_loss_sum: Buffer<B, f64>,
    sum: Buffer<B, f64>,
    sum_squares: Buffer<B, f64>,
}

/// A host's [`Statistics`] in the backend's memory.
struct PackedBuffers<B: Backend> {
    sums: Buffer<B, f64>,
    shift: Buffer<B, B::Real>,
}

struct Gradients<B: Backend> {
    weight: Buffer<B, B::Real>,
    bias: Buffer<B, B::Real>,
}

/// How the correlation term of a batch is computed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Correlation {
    None,
    /// Primal, from one block.
    Block,
    /// Primal, from comoments summed over blocks.
    Comoments,
    Dual,
}

impl<B: Backend> DecoderFree<B> {
    /// Makes a plan and all its memory.
    ///
    /// # Errors
    /// [`Error::NoLatents`], [`Error::Configuration`], [`Error::Overflow`], and what the backend's allocation may return.
    pub fn new(backend: B, config: DecoderFreeConfig) -> Result<Self> {
        Self::with_encoder(backend, config, true)
    }

    fn with_encoder(backend: B, config: DecoderFreeConfig, encoder: bool) -> Result<Self> {
        let Shape { rows, latents, .. } = config.shape;
        let lens = Lens::new(&backend, &config, encoder)?;
        Ok(Self {
            activations: backend.alloc(lens.block)?,
            dz: backend.alloc(lens.block)?,
            row_loss: backend.alloc(rows)?,
            moments: MomentBuffers {
                shift: backend.alloc(latents)?,
                row_loss_sum: backend.alloc(1)?,
                sum: backend.alloc(latents)?,
                sum_squares: backend.alloc(latents)?,
            },
            mean: backend.alloc(latents)?,
            variance: backend.alloc(latents)?,
            scale: backend.alloc(latents)?,
            offset: backend.alloc(latents)?,
            coupling: backend.alloc(lens.coupling)?,
            weight_gram: backend.alloc(lens.weight_gram)?,
            terms: backend.alloc(3)?,
            packed: None,
            fused: backend.alloc(1)?,
            gradients: None,
            workspace: backend.alloc(lens.workspace)?,
            count: 0,
            backend,
            config,
            block_rows: lens.block_rows,
        })
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }
    /// What the plan was made for.
    pub fn config(&self) -> &DecoderFreeConfig {
        &self.config
    }

    /// The memory that the plan owns now: that of [`DecoderFreeConfig::memory`], the gradients once it has trained, and what the two-phase calls
    /// have added.
    pub fn memory(&self) -> PlanMemory {
        fn bytes<B: Backend, T: Element>(buffer: &Buffer<B, T>) -> usize {
            B::Memory::len::<T>(&B::Memory::slice(buffer)) * size_of::<T>()
        }
        let moments = &self.moments;
        let reals = [&self.row_loss, &moments.shift, &self.mean, &self.variance, &self.scale, &self.offset];
        let sums = [&moments.row_loss_sum, &moments.sum, &moments.sum_squares, &self.terms, &self.fused];
        let packed = self.packed.as_ref();
        let gradients = self.gradients.as_ref().map(|gradients| [&gradients.weight, &gradients.bias]);
        PlanMemory {
            block: bytes::<B, B::Element>(&self.activations) + bytes::<B, B::Element>(&self.dz),
            correlation: bytes::<B, B::Real>(&self.coupling),
            redundancy: bytes::<B, B::Real>(&self.weight_gram),
            vectors: reals.into_iter().map(bytes::<B, B::Real>).sum::<usize>()
                + sums.into_iter().map(bytes::<B, f64>).sum::<usize>(),
            gradients: gradients.into_iter().flatten().map(bytes::<B, B::Real>).sum(),
            packed: packed.map_or(0, |packed| bytes::<B, f64>(&packed.sums) + bytes::<B, B::Real>(&packed.shift)),
            workspace: bytes::<B, f64>(&self.workspace),
        }
    }

    /// Losses and gradients of a whole batch. Gradients are overwritten.
    ///
    /// # Errors
    /// [`Error::TooManyRows`], [`Error::TooFewRows`], [`Error::DualNeedsOneBlock`], and shape errors.
    pub fn step(&mut self, mut step: DecoderFreeStep<'_, B>) -> Result<()> {
        self.check_step(&step)?;
        let correlation = self.check_batch(step.x.rows())?;
        self.whole_batch(&mut step, correlation, true)?;
        self.weight_term(step.weight, Some(step.grad_weight))
    }

    /// A step and the optimiser's update with its gradients, of weight and bias. The gradients are the plan's own; where they need not be
    /// stored ([`ProductUpdate`]) they are not.
    ///
    /// Parameters are updated even if the losses are not finite.
    ///
    /// # Errors
    /// As [`step`](Self::step); [`Error::NoStorage`], [`Error::Configuration`].
    pub fn train_step(&mut self, mut step: DecoderFreeTrainStep<'_, B>) -> Result<()> {
        let Shape { inputs: d, latents: h, .. } = self.config.shape;
        let x = step.x;
        let bias = B::Memory::as_ref::<B::Real>(&step.bias.parameters);
        self.check_inputs(x, step.weight.matrix(h, d)?, bias)?;
        self.check_outputs(x.rows(), step.activations.as_ref(), step.row_loss.as_ref())?;
        step.weight.optimizer.check(h.checked_mul(d).ok_or(Error::Overflow { what: "the gradient" })?)?;
        step.bias.optimizer.check(h)?;
        let correlation = self.check_batch(x.rows())?;
        // The weight term needs the gradient in memory.
        if self.config.objective.lambda_wr == 0.0 {
            let parameters = FusedParameters::Trained { weight: step.weight.reborrow(), bias: step.bias.reborrow() };
            if self.fused(x, parameters, &mut step.activations, &mut step.row_loss, false)? {
                return Ok(());
            }
        }
        // Taken, as the plan's methods borrow all of it.
        let mut gradients = match self.gradients.take() {
            Some(gradients) => gradients,
            None => Gradients { weight: self.backend.alloc(h * d)?, bias: self.backend.alloc(h)? },
        };
        let result = self.train(&mut step, &mut gradients, correlation);
        self.gradients = Some(gradients);
        result
    }

    fn train(
        &mut self,
        step: &mut DecoderFreeTrainStep<'_, B>,
        gradients: &mut Gradients<B>,
        correlation: Correlation,
    ) -> Result<()> {
        let Shape { inputs: d, latents: h, .. } = self.config.shape;
        let x = step.x;
        // The weight term is added to the gradient, which has to be whole then.
        let redundancy = self.config.objective.lambda_wr != 0.0;
        {
            let weight = step.weight.matrix(h, d)?;
            let mut gradient_step = DecoderFreeStep {
                x,
                weight,
                bias: B::Memory::as_ref::<B::Real>(&step.bias.parameters),
                grad_weight: MatMut::from_memory(B::Memory::slice_mut(&mut gradients.weight), h, d, d)?,
                grad_bias: B::Memory::slice_mut(&mut gradients.bias),
                grad_x: None,
                activations: step.activations.as_mut().map(MatMut::reborrow),
                row_loss: step.row_loss.as_mut().map(B::Memory::reborrow),
            };
            self.whole_batch(&mut gradient_step, correlation, redundancy)?;
            self.weight_term(weight, Some(gradient_step.grad_weight))?;
        }
        let Trained { parameters, storage, optimizer } = &mut step.weight;
        if redundancy {
            update(&self.backend, optimizer, B::Memory::slice(&gradients.weight), parameters, storage)?;
        } else {
            let first = 0..x.rows().min(self.block_rows);
            let dz = B::Memory::part(B::Memory::slice(&self.dz), 0..first.len() * h);
            self.backend.product_update(ProductUpdate {
                left: MatRef::from_memory(dz, first.len(), h, h)?,
                right: x.rows_range(first.clone()),
                accumulate: first.len() < x.rows(),
                gradient: B::Memory::slice_mut(&mut gradients.weight),
                optimizer: optimizer.reborrow(),
                parameters: B::Memory::reborrow(parameters),
                storage: storage.as_mut().map(B::Memory::reborrow),
                workspace: B::Memory::slice_mut(&mut self.workspace),
            })?;
        }
        let Trained { parameters, storage, optimizer } = &mut step.bias;
        update(&self.backend, optimizer, B::Memory::slice(&gradients.bias), parameters, storage)
    }

    /// Losses and gradients of a whole batch, but for the weight term; and without ∂L/∂W of the first block, which comes last, unless
    /// `whole_product`.
    fn whole_batch(
        &mut self,
        step: &mut DecoderFreeStep<'_, B>,
        correlation: Correlation,
        whole_product: bool,
    ) -> Result<()> {
        // Where the last product is the caller's to make, the backend has already said no.
        if whole_product && self.fused_gradients(step)? {
            return Ok(());
        }
        let count = step.x.rows() as u64;
        self.first_pass(step.x, step.weight, step.bias, &mut step.activations, &mut step.row_loss, correlation)?;
        let activations = step.activations.as_ref().map(MatMut::as_ref);
        self.finish(count, activations, correlation)?;
        self.dual(step.x.rows(), activations, None, correlation)?;
        // All activations are there if the caller keeps them, else those of the last block.
        let last = blocks(step.x.rows(), self.block_rows).next_back().map_or(0, |block| block.start);
        let encoded_from = if step.activations.is_some() { 0 } else { last };
        self.second_pass(step, correlation, SecondPass { encoded_from, accumulate: false, whole_product })
    }

    /// Losses alone, and activations and row losses if wanted.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn forward(
        &mut self,
        x: Mat<'_, B, B::Element>,
        weight: Mat<'_, B, B::Element>,
        bias: Slice<'_, B, B::Real>,
        mut activations: Option<MatOut<'_, B, B::Element>>,
        mut row_loss: Option<SliceMut<'_, B, B::Real>>,
    ) -> Result<()> {
        self.check_inputs(x, weight, bias)?;
        self.check_outputs(x.rows(), activations.as_ref(), row_loss.as_ref())?;
        let correlation = self.check_batch(x.rows())?;
        let parameters = FusedParameters::Fixed { weight, bias: B::Memory::shorten(bias) };
        if !self.fused(x, parameters, &mut activations, &mut row_loss, false)? {
            self.first_pass(x, weight, bias, &mut activations, &mut row_loss, correlation)?;
            let activations = activations.as_ref().map(MatMut::as_ref);
            self.finish(x.rows() as u64, activations, correlation)?;
            self.dual(x.rows(), activations, None, correlation)?;
        }
        self.weight_term(weight, None)
    }

    /// A batch of one block at once, but for the weight term; false if the backend does it in parts. `dz`: whether dZ is kept.
    fn fused(
        &mut self,
        x: Mat<'_, B, B::Element>,
        mut parameters: FusedParameters<'_, B>,
        activations: &mut Option<MatOut<'_, B, B::Element>>,
        row_loss: &mut Option<SliceMut<'_, B, B::Real>>,
        dz: bool,
    ) -> Result<bool> {
        let (rows, h) = (x.rows(), self.config.shape.latents);
        // Always in the primal form: the dual one may be asked for.
        if rows > self.block_rows || self.config.correlation_form == Form::Dual {
            return Ok(false);
        }
        let (block, mut own) = (0..rows, None);
        let is_fused = self.backend.fused_step(FusedStep {
            x,
            parameters: parameters.reborrow(),
            activation: self.config.activation,
            objective: self.config.objective,
            activations: activations.as_mut().map(MatMut::reborrow),
            row_loss: rows_of::<B>(row_loss, &mut self.row_loss, &block),
            dz: if dz { Some(block_of(&mut own, &mut self.dz, &block, h)?) } else { None },
            row_loss_sum: B::Memory::slice_mut(&mut self.moments.row_loss_sum),
            losses: B::Memory::part_mut(B::Memory::slice_mut(&mut self.terms), 0..2),
            state: B::Memory::slice_mut(&mut self.fused),
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })?;
        if is_fused {
            self.count = rows as u64;
        }
        Ok(is_fused)
    }

    /// Gradients of a batch of one block at once, but for the weight term; false if the backend does it in parts.
    fn fused_gradients(&mut self, step: &mut DecoderFreeStep<'_, B>) -> Result<bool> {
        let DecoderFreeStep { x, weight, bias, grad_weight, grad_bias, grad_x, activations, row_loss } = step;
        let parameters = FusedParameters::Gradients {
            weight: *weight,
            bias: B::Memory::shorten(*bias),
            grad_weight: grad_weight.reborrow(),
            grad_bias: B::Memory::reborrow(grad_bias),
        };
        if !self.fused(*x, parameters, activations, row_loss, grad_x.is_some())? {
            return Ok(false);
        }
        if let Some(grad_x) = grad_x {
            let (rows, h) = (x.rows(), self.config.shape.latents);
            let dz = B::Memory::part(B::Memory::slice(&self.dz), 0..rows * h);
            self.backend.product(Product {
                layout: Layout::Nn,
                left: MatRef::from_memory(dz, rows, h, h)?,
                right: *weight,
                accumulate: false,
                out: grad_x.reborrow(),
                workspace: B::Memory::slice_mut(&mut self.workspace),
            })?;
        }
        Ok(true)
    }

    /// Losses of the last batch. Waits for the device.
    ///
    /// # Errors
    /// What the backend's download may return.
    pub fn losses(&self) -> Result<Losses> {
        let objective = &self.config.objective;
        let (mut lse, mut terms) = ([0.0], [0.0; 3]);
        self.backend.download(B::Memory::slice(&self.moments.row_loss_sum), &mut lse)?;
        self.backend.download(B::Memory::slice(&self.terms), &mut terms)?;
        // A term without weight is neither computed nor shown.
        let shown = |lambda: f64, value: f64| if lambda == 0.0 { 0.0 } else { value };
        let weight = Objective { lambda_lse: 1.0, ..*objective }.row_weight(self.count);
        let mut losses = Losses {
            lse: shown(objective.lambda_lse, weight * lse[0]),
            var: shown(objective.lambda_var, terms[0]),
            tc: shown(objective.lambda_tc, terms[1]),
            wr: shown(objective.lambda_wr, terms[2]),
            total: 0.0,
        };
        losses.total = objective.lambda_lse * losses.lse
            + objective.lambda_var * losses.var
            + objective.lambda_tc * losses.tc
            + objective.lambda_wr * losses.wr;
        Ok(losses)
    }

    /// Phase 1 of a step whose rows are spread over hosts: adds these rows to `statistics`. No rows add nothing.
    ///
    /// Empty statistics take the mean of the first block as their shift; others keep theirs, rounded if [`Backend::Real`] does not hold it.
    ///
    /// # Errors
    /// [`Error::Statistics`] if they have another width, or comoments unless the objective needs them; shape errors.
    pub fn statistics(
        &mut self,
        x: Mat<'_, B, B::Element>,
        weight: Mat<'_, B, B::Element>,
        bias: Slice<'_, B, B::Real>,
        statistics: &mut Statistics,
    ) -> Result<()> {
        self.check_inputs(x, weight, bias)?;
        let needed = self.needed_statistics();
        if statistics.kind() != needed {
            // Comoments that nobody sums would be wrong from here on.
            return Err(Error::Statistics { expected: needed.to_string(), found: statistics.kind().to_string() });
        }
        if x.rows() == 0 {
            return Ok(());
        }
        let first = statistics.count() == 0;
        self.sums(x, weight, bias)?;
        let mut packed = if first {
            self.packed_buffers(statistics.sums().len())?
        } else {
            self.upload_statistics(statistics.round_shift::<B::Real>())?
        };
        let shift = B::Memory::slice(if first { &self.moments.shift } else { &packed.shift });
        self.pack(x.rows(), Some(shift), !first, B::Memory::slice_mut(&mut packed.sums))?;
        if first {
            let mut shift = vec![B::Real::from_f64(0.0); needed.latents];
            self.backend.download(B::Memory::slice(&self.moments.shift), &mut shift)?;
            statistics.set_shift(shift.iter().map(|c| c.to_f64()).collect());
        }
        self.backend.download(B::Memory::slice(&packed.sums), statistics.sums_mut())?;
        self.packed = Some(packed);
        Ok(())
    }

    /// [`statistics`](Self::statistics) for sums in the backend's memory: adds these rows' to `sums`, which are laid out as
    /// [`Statistics::sums`], with comoments if λ_tc ≠ 0, about `shift` (0 if not given). Only enqueues.
    ///
    /// # Errors
    /// Shape errors.
    pub fn statistics_packed(
        &mut self,
        x: Mat<'_, B, B::Element>,
        weight: Mat<'_, B, B::Element>,
        bias: Slice<'_, B, B::Real>,
        shift: Option<Slice<'_, B, B::Real>>,
        sums: SliceMut<'_, B, f64>,
    ) -> Result<()> {
        self.check_inputs(x, weight, bias)?;
        self.check_packed(shift.as_ref(), B::Memory::len_mut::<f64>(&sums), false)?;
        if x.rows() == 0 {
            return Ok(());
        }
        self.sums(x, weight, bias)?;
        self.pack(x.rows(), shift, true, sums)
    }

    /// Moments of these rows and, if they are needed, comoments, in the plan's buffers.
    fn sums(
        &mut self,
        x: Mat<'_, B, B::Element>,
        weight: Mat<'_, B, B::Element>,
        bias: Slice<'_, B, B::Real>,
    ) -> Result<()> {
        let correlation = self.sharded_correlation()?;
        self.first_pass(x, weight, bias, &mut None, &mut None, correlation)
    }

    /// Packs what [`sums`](Self::sums) has left.
    fn pack(
        &self,
        rows: usize,
        shift: Option<Slice<'_, B, B::Real>>,
        accumulate: bool,
        mut sums: SliceMut<'_, B, f64>,
    ) -> Result<()> {
        let Kind { latents: h, full } = self.needed_statistics();
        let comoments = full.then(|| B::Memory::part(B::Memory::slice(&self.coupling), 0..h * h));
        self.backend.pack_statistics(PackStatistics {
            count: rows as u64,
            row_loss_sum: B::Memory::slice(&self.moments.row_loss_sum),
            shift: B::Memory::slice(&self.moments.shift),
            sum: B::Memory::slice(&self.moments.sum),
            sum_squares: B::Memory::slice(&self.moments.sum_squares),
            comoments: comoments.map(|comoments| MatRef::from_memory(comoments, h, h, h)).transpose()?,
            packed_shift: shift.map(B::Memory::shorten::<B::Real>),
            accumulate,
            packed: B::Memory::reborrow(&mut sums),
        })
    }

    /// Phase 2 of a step whose rows are spread over hosts: *adds* these rows' gradients, given the statistics of all rows.
    ///
    /// The weight-redundancy term must enter once over all hosts; `add_weight_term` says whether here. Afterwards
    /// [`losses`](Self::losses) are those of the whole batch. `activations` and `row_loss` are written, if given.
    ///
    /// # Errors
    /// [`Error::Statistics`], [`Error::Count`], [`Error::TooFewRows`], and shape errors.
    pub fn backward(
        &mut self,
        step: DecoderFreeStep<'_, B>,
        statistics: &Statistics,
        add_weight_term: bool,
    ) -> Result<()> {
        self.check_step(&step)?;
        let needed = self.needed_statistics();
        if ![needed, needed.full()].contains(&statistics.kind()) {
            return Err(Error::Statistics { expected: needed.to_string(), found: statistics.kind().to_string() });
        }
        let mut rounded = Cow::Borrowed(statistics);
        if !statistics.has_shift_of::<B::Real>() {
            rounded.to_mut().round_shift::<B::Real>();
        }
        let packed = self.upload_statistics(&rounded)?;
        let (shift, sums) = (Some(B::Memory::slice(&packed.shift)), B::Memory::slice(&packed.sums));
        self.second_phase(step, Some(statistics.sums()[0]), shift, sums, add_weight_term)?;
        self.packed = Some(packed);
        Ok(())
    }

    /// [`backward`](Self::backward) with sums in the backend's memory, as [`statistics_packed`](Self::statistics_packed) and a sum over all
    /// hosts leave them. Waits for their number of rows.
    ///
    /// # Errors
    /// [`Error::Count`], [`Error::TooFewRows`], and shape errors.
    pub fn backward_packed(
        &mut self,
        step: DecoderFreeStep<'_, B>,
        shift: Option<Slice<'_, B, B::Real>>,
        sums: Slice<'_, B, f64>,
        add_weight_term: bool,
    ) -> Result<()> {
        self.check_step(&step)?;
        self.check_packed(shift.as_ref(), B::Memory::len::<f64>(&sums), true)?;
        self.second_phase(step, None, shift, sums, add_weight_term)
    }

    /// `count`: the sums' first number, if the host knows it.
    fn second_phase(
        &mut self,
        mut step: DecoderFreeStep<'_, B>,
        count: Option<f64>,
        shift: Option<Slice<'_, B, B::Real>>,
        sums: Slice<'_, B, f64>,
        add_weight_term: bool,
    ) -> Result<()> {
        // Before anything is read: where memory lacks, the sums may be nowhere.
        let correlation = self.sharded_correlation()?;
        let mut read = [count.unwrap_or(0.0)];
        if count.is_none() {
            self.backend.download(B::Memory::part(B::Memory::shorten::<f64>(sums), 0..1), &mut read)?;
        }
        let count = self.whole_count(read[0], step.x.rows())?;
        let h = self.config.shape.latents;
        let comoments = match correlation {
            Correlation::Comoments => Some(square::<B, _>(&mut self.coupling, h)?),
            _ => None,
        };
        self.backend.unpack_statistics(UnpackStatistics {
            packed: B::Memory::shorten::<f64>(sums),
            packed_shift: shift.map(B::Memory::shorten::<B::Real>),
            row_loss_sum: B::Memory::slice_mut(&mut self.moments.row_loss_sum),
            shift: B::Memory::slice_mut(&mut self.moments.shift),
            sum: B::Memory::slice_mut(&mut self.moments.sum),
            sum_squares: B::Memory::slice_mut(&mut self.moments.sum_squares),
            comoments,
        })?;
        self.finish(count, None, correlation)?;
        let pass = SecondPass { encoded_from: usize::MAX, accumulate: true, whole_product: true };
        self.second_pass(&mut step, correlation, pass)?;
        self.weight_term(step.weight, add_weight_term.then_some(step.grad_weight))
    }

    /// Room for a host's statistics, to be given back to the plan.
    fn packed_buffers(&mut self, len: usize) -> Result<PackedBuffers<B>> {
        let fits = |packed: &PackedBuffers<B>| B::Memory::len(&B::Memory::slice(&packed.sums)) == len;
        match self.packed.take().filter(fits) {
            Some(packed) => Ok(packed),
            None => Ok(PackedBuffers {
                shift: self.backend.alloc(self.config.shape.latents)?,
                sums: self.backend.alloc(len)?,
            }),
        }
    }

    /// A host's statistics in the backend's memory.
    fn upload_statistics(&mut self, statistics: &Statistics) -> Result<PackedBuffers<B>> {
        let shift: Vec<B::Real> = statistics.shift().iter().map(|c| B::Real::from_f64(*c)).collect();
        let mut packed = self.packed_buffers(statistics.sums().len())?;
        self.backend.upload(&shift, B::Memory::slice_mut(&mut packed.shift))?;
        self.backend.upload(statistics.sums(), B::Memory::slice_mut(&mut packed.sums))?;
        Ok(packed)
    }

    /// The number of rows of a whole batch, of which a call has `rows`. A host that averages instead of summing, or forgets to set the sums to
    /// 0 first, mostly shows it here.
    fn whole_count(&self, count: f64, rows: usize) -> Result<u64> {
        if !(count >= rows as f64 && count.fract() == 0.0 && count <= 2f64.powi(53)) {
            return Err(Error::Count { count, rows });
        }
        if self.config.objective.needs_statistics() && count < 2.0 {
            return Err(Error::TooFewRows { rows: count as u64 });
        }
        Ok(count as u64)
    }

    /// Whether packed sums are as long as the objective needs, or longer, if comoments that are not needed may be there.
    fn check_packed(&self, shift: Option<&Slice<'_, B, B::Real>>, sums: usize, more: bool) -> Result<()> {
        let needed = self.needed_statistics();
        if !(more && sums == needed.full().len()) {
            check_len("sums", needed.len(), sums)?;
        }
        shift.map_or(Ok(()), |shift| check_len("shift", needed.latents, B::Memory::len::<B::Real>(shift)))
    }

    fn check_inputs(
        &self,
        x: Mat<'_, B, B::Element>,
        weight: Mat<'_, B, B::Element>,
        bias: Slice<'_, B, B::Real>,
    ) -> Result<()> {
        let Shape { rows, inputs, latents } = self.config.shape;
        if x.rows() > rows {
            return Err(Error::TooManyRows { planned: rows, found: x.rows() });
        }
        x.expect("x", x.rows(), inputs)?;
        weight.expect("weight", latents, inputs)?;
        check_len("bias", latents, B::Memory::len::<B::Real>(&bias))
    }

    fn check_outputs(
        &self,
        rows: usize,
        activations: Option<&MatOut<'_, B, B::Element>>,
        row_loss: Option<&SliceMut<'_, B, B::Real>>,
    ) -> Result<()> {
        if let Some(activations) = activations {
            activations.expect("activations", rows, self.config.shape.latents)?;
        }
        if let Some(row_loss) = row_loss {
            check_len("row_loss", rows, B::Memory::len_mut::<B::Real>(row_loss))?;
        }
        Ok(())
    }

    fn check_step(&self, step: &DecoderFreeStep<'_, B>) -> Result<()> {
        let Shape { inputs, latents, .. } = self.config.shape;
        self.check_inputs(step.x, step.weight, step.bias)?;
        self.check_outputs(step.x.rows(), step.activations.as_ref(), step.row_loss.as_ref())?;
        step.grad_weight.expect("grad_weight", latents, inputs)?;
        check_len("grad_bias", latents, B::Memory::len_mut::<B::Real>(&step.grad_bias))?;
        if let Some(grad_x) = &step.grad_x {
            grad_x.expect("grad_x", step.x.rows(), inputs)?;
        }
        Ok(())
    }

    /// Whether the batch can be processed, and in which form.
    fn check_batch(&self, rows: usize) -> Result<Correlation> {
        let DecoderFreeConfig { shape, objective, correlation_form, .. } = self.config;
        if objective.needs_statistics() && rows < 2 {
            return Err(Error::TooFewRows { rows: rows as u64 });
        }
        if objective.lambda_tc == 0.0 {
            return Ok(Correlation::None);
        }
        if rows > self.block_rows {
            return match correlation_form {
                Form::Dual => Err(Error::DualNeedsOneBlock { rows, block_rows: self.block_rows }),
                Form::Auto | Form::Primal => Ok(Correlation::Comoments),
            };
        }
        Ok(if correlation_form.is_dual(shape.latents, rows) { Correlation::Dual } else { Correlation::Block })
    }

    /// Of which width and kind statistics must be.
    fn needed_statistics(&self) -> Kind {
        Kind { latents: self.config.shape.latents, full: self.config.objective.lambda_tc != 0.0 }
    }

    /// Sharded batches use the primal form, whose buffers are made when first needed.
    fn sharded_correlation(&mut self) -> Result<Correlation> {
        if self.config.objective.lambda_tc == 0.0 {
            return Ok(Correlation::None);
        }
        let shape = self.config.shape;
        let len = memory::square(shape.latents)?;
        let workspace = self.backend.workspace_len_for(&primal_operations(shape, self.block_rows))?;
        lengthen(&self.backend, &mut self.coupling, len)?;
        lengthen(&self.backend, &mut self.workspace, workspace)?;
        Ok(Correlation::Comoments)
    }

    /// Encodes every block and adds up row losses, moments and comoments. The shift is the first block's mean.
    fn first_pass(
        &mut self,
        x: Mat<'_, B, B::Element>,
        weight: Mat<'_, B, B::Element>,
        bias: Slice<'_, B, B::Real>,
        activations: &mut Option<MatOut<'_, B, B::Element>>,
        row_loss: &mut Option<SliceMut<'_, B, B::Real>>,
        correlation: Correlation,
    ) -> Result<()> {
        let h = self.config.shape.latents;
        self.count = x.rows() as u64;
        for block in blocks(x.rows(), self.block_rows) {
            let first = block.start == 0;
            // Those of other blocks are read by nobody before the second pass has computed them again.
            let stored =
                activations.is_some() || correlation == Correlation::Comoments || first || block.end == x.rows();
            let mut a = block_of(activations, &mut self.activations, &block, h)?;
            let moments = &mut self.moments;
            self.backend.encode(Encode {
                x: x.rows_range(block.clone()),
                weight,
                bias: B::Memory::shorten(bias),
                activation: self.config.activation,
                activations: stored.then(|| a.reborrow()),
                row_loss: Some(rows_of::<B>(row_loss, &mut self.row_loss, &block)),
                moments: Some(Moments {
                    shift: (!first).then_some(B::Memory::slice(&moments.shift)),
                    accumulate: !first,
                    row_loss_sum: B::Memory::slice_mut(&mut moments.row_loss_sum),
                    sum: B::Memory::slice_mut(&mut moments.sum),
                    sum_squares: B::Memory::slice_mut(&mut moments.sum_squares),
                }),
                workspace: B::Memory::slice_mut(&mut self.workspace),
            })?;
            if first {
                self.backend.recentre(Recentre {
                    activations: a.as_ref(),
                    shift: B::Memory::slice_mut(&mut moments.shift),
                    sum: B::Memory::slice_mut(&mut moments.sum),
                    sum_squares: B::Memory::slice_mut(&mut moments.sum_squares),
                })?;
            }
            if correlation == Correlation::Comoments {
                self.backend.comoments(Comoments {
                    activations: a.as_ref(),
                    shift: B::Memory::slice(&moments.shift),
                    accumulate: !first,
                    comoments: square::<B, _>(&mut self.coupling, h)?,
                    workspace: B::Memory::slice_mut(&mut self.workspace),
                })?;
            }
        }
        Ok(())
    }

    /// Variance and correlation losses and coefficients of the batch whose sums are in the buffers.
    fn finish(
        &mut self,
        count: u64,
        activations: Option<Mat<'_, B, B::Element>>,
        correlation: Correlation,
    ) -> Result<()> {
        self.count = count;
        if !self.config.objective.needs_statistics() {
            return Ok(());
        }
        let h = self.config.shape.latents;
        let covariance = match correlation {
            Correlation::None | Correlation::Dual => None,
            Correlation::Block => {
                Some(Covariance::Activations(all_of(activations, &self.activations, count as usize, h)?))
            }
            Correlation::Comoments => Some(Covariance::InPlace),
        };
        let primal = match covariance {
            None => None,
            Some(covariance) => Some(PrimalCorrelation {
                covariance,
                coupling: square::<B, _>(&mut self.coupling, h)?,
                offset: B::Memory::slice_mut(&mut self.offset),
            }),
        };
        self.backend.finish_statistics(FinishStatistics {
            count,
            objective: self.config.objective,
            shift: B::Memory::slice(&self.moments.shift),
            sum: B::Memory::slice(&self.moments.sum),
            sum_squares: B::Memory::slice(&self.moments.sum_squares),
            primal,
            mean: B::Memory::slice_mut(&mut self.mean),
            variance: B::Memory::slice_mut(&mut self.variance),
            scale: B::Memory::slice_mut(&mut self.scale),
            losses: B::Memory::part_mut(B::Memory::slice_mut(&mut self.terms), 0..2),
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })
    }

    /// The correlation term in its dual form, if that is chosen: loss, coefficients, and the product where dZ will be.
    fn dual(
        &mut self,
        rows: usize,
        activations: Option<Mat<'_, B, B::Element>>,
        mut dz: Option<MatOut<'_, B, B::Element>>,
        correlation: Correlation,
    ) -> Result<()> {
        if correlation != Correlation::Dual {
            return Ok(());
        }
        let h = self.config.shape.latents;
        let block = 0..rows;
        self.backend.correlation_dual(CorrelationDual {
            activations: all_of(activations, &self.activations, rows, h)?,
            mean: B::Memory::slice(&self.mean),
            variance: B::Memory::slice(&self.variance),
            lambda_tc: self.config.objective.lambda_tc,
            gram: square::<B, _>(&mut self.coupling, rows)?,
            product: block_of(&mut dz, &mut self.dz, &block, h)?,
            scale: B::Memory::slice_mut(&mut self.scale),
            loss: B::Memory::part_mut(B::Memory::slice_mut(&mut self.terms), 1..2),
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })
    }

    /// The backward pass, block by block, last block first: its activations may still be there.
    fn second_pass(
        &mut self,
        step: &mut DecoderFreeStep<'_, B>,
        correlation: Correlation,
        pass: SecondPass,
    ) -> Result<()> {
        let SecondPass { encoded_from, accumulate, whole_product } = pass;
        let h = self.config.shape.latents;
        let objective = self.config.objective;
        for block in blocks(step.x.rows(), self.block_rows).rev() {
            let x = step.x.rows_range(block.clone());
            let accumulate = accumulate || block.end < step.x.rows();
            let mut a = block_of(&mut step.activations, &mut self.activations, &block, h)?;
            let mut row_loss = rows_of::<B>(&mut step.row_loss, &mut self.row_loss, &block);
            if block.start < encoded_from {
                self.backend.encode(Encode {
                    x,
                    weight: step.weight,
                    bias: B::Memory::shorten(step.bias),
                    activation: self.config.activation,
                    activations: Some(a.reborrow()),
                    row_loss: Some(B::Memory::reborrow(&mut row_loss)),
                    moments: None,
                    workspace: B::Memory::slice_mut(&mut self.workspace),
                })?;
            }
            let mut dz: MatOut<'_, B, B::Element> = MatMut::from_memory(
                B::Memory::part_mut(B::Memory::slice_mut(&mut self.dz), 0..block.len() * h),
                block.len(),
                h,
                h,
            )?;
            let statistics = objective
                .needs_statistics()
                .then(|| statistics_term::<B>(correlation, &self.mean, &self.scale, &self.coupling, &self.offset));
            self.backend.backward_dz(BackwardDz {
                activations: a.as_ref(),
                activation: self.config.activation,
                row_loss: B::Memory::as_ref(&row_loss),
                row_weight: objective.row_weight(self.count),
                statistics: statistics.transpose()?,
                dz: dz.reborrow(),
                accumulate,
                grad_bias: B::Memory::reborrow(&mut step.grad_bias),
                workspace: B::Memory::slice_mut(&mut self.workspace),
            })?;
            if whole_product || block.start > 0 {
                self.backend.product(Product {
                    layout: Layout::Tn,
                    left: dz.as_ref(),
                    right: x,
                    accumulate,
                    out: step.grad_weight.reborrow(),
                    workspace: B::Memory::slice_mut(&mut self.workspace),
                })?;
            }
            if let Some(grad_x) = &mut step.grad_x {
                self.backend.product(Product {
                    layout: Layout::Nn,
                    left: dz.as_ref(),
                    right: step.weight,
                    accumulate: false,
                    out: grad_x.reborrow().rows_range(block),
                    workspace: B::Memory::slice_mut(&mut self.workspace),
                })?;
            }
        }
        Ok(())
    }

    /// The weight-redundancy loss and, if wanted, its gradient.
    fn weight_term(
        &mut self,
        weight: Mat<'_, B, B::Element>,
        mut grad_weight: Option<MatOut<'_, B, B::Real>>,
    ) -> Result<()> {
        let objective = &self.config.objective;
        if objective.lambda_wr == 0.0 {
            return Ok(());
        }
        let Shape { inputs, latents, .. } = self.config.shape;
        let side = if self.config.weight_form.is_dual(latents, inputs) { inputs } else { latents };
        self.backend.weight_redundancy(WeightRedundancy {
            weight,
            normalize: objective.normalize_weight,
            form: self.config.weight_form,
            lambda: objective.lambda_wr,
            loss: B::Memory::part_mut(B::Memory::slice_mut(&mut self.terms), 2..3),
            grad_weight: grad_weight.as_mut().map(MatMut::reborrow),
            gram: square::<B, _>(&mut self.weight_gram, side)?,
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })
    }
}

/// Which parts of the backward pass there are.
struct SecondPass {
    /// Rows before this one are encoded again.
    encoded_from: usize,
    /// Whether the first block processed adds to the gradients, as the others do.
    accumulate: bool,
    /// Whether the block processed last adds its ∂L/∂W.
    whole_product: bool,
}

/// What the backward pass needs of the statistics, from the buffers that [`DecoderFree::finish`] and [`DecoderFree::dual`] have filled.
fn statistics_term<'a, B: Backend>(
    correlation: Correlation,
    mean: &'a Buffer<B, B::Real>,
    scale: &'a Buffer<B, B::Real>,
    coupling: &'a Buffer<B, B::Real>,
    offset: &'a Buffer<B, B::Real>,
) -> Result<StatisticsTerm<'a, B>> {
    let (mean, scale) = (B::Memory::slice(mean), B::Memory::slice(scale));
    let h = B::Memory::len::<B::Real>(&mean);
    let correlation = match correlation {
        Correlation::None => CorrelationTerm::None,
        Correlation::Dual => CorrelationTerm::Dual,
        Correlation::Block | Correlation::Comoments => CorrelationTerm::Primal {
            coupling: MatRef::from_memory(B::Memory::part(B::Memory::slice(coupling), 0..h * h), h, h, h)?,
            offset: B::Memory::slice(offset),
        },
    };
    Ok(StatisticsTerm { mean, scale, correlation })
}

/// The blocks of a batch; one empty block for no rows.
fn blocks(rows: usize, block_rows: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    let block_rows = block_rows.max(1);
    (0..rows.div_ceil(block_rows).max(1)).map(move |b| b * block_rows..rows.min((b + 1) * block_rows))
}

/// Replaces a buffer that is too short; what it held is lost.
fn lengthen<B: Backend, T: Element>(backend: &B, buffer: &mut Buffer<B, T>, len: usize) -> Result<()> {
    if B::Memory::len::<T>(&B::Memory::slice(buffer)) < len {
        *buffer = backend.alloc(len)?;
    }
    Ok(())
}

/// A block's rows of the caller's matrix, or as many rows of our own buffer.
fn block_of<'a, T: Element, M: Memory>(
    given: &'a mut Option<MatMut<'_, T, M>>,
    own: &'a mut M::Buffer<T>,
    block: &Range<usize>,
    cols: usize,
) -> Result<MatMut<'a, T, M>> {
    match given {
        Some(given) => Ok(given.reborrow().rows_range(block.clone())),
        None => MatMut::from_memory(M::part_mut(M::slice_mut(own), 0..block.len() * cols), block.len(), cols, cols),
    }
}

/// The activations of a batch of one block, the caller's or ours.
fn all_of<'a, T: Element, M: Memory>(
    given: Option<MatRef<'a, T, M>>,
    own: &'a M::Buffer<T>,
    rows: usize,
    cols: usize,
) -> Result<MatRef<'a, T, M>> {
    match given {
        Some(given) => Ok(given),
        None => MatRef::from_memory(M::part(M::slice(own), 0..rows * cols), rows, cols, cols),
    }
}

/// A block's part of the caller's row losses, or of ours.
fn rows_of<'a, B: Backend>(
    given: &'a mut Option<SliceMut<'_, B, B::Real>>,
    own: &'a mut Buffer<B, B::Real>,
    block: &Range<usize>,
) -> SliceMut<'a, B, B::Real> {
    let all = match given {
        Some(given) => B::Memory::reborrow(given),
        None => B::Memory::slice_mut(own),
    };
    B::Memory::part_mut(all, block.clone())
}

/// The first side×side elements of a buffer.
fn square<B: Backend, T: Element>(buffer: &mut Buffer<B, T>, side: usize) -> Result<MatOut<'_, B, T>> {
    MatMut::from_memory(B::Memory::part_mut(B::Memory::slice_mut(buffer), 0..side * side), side, side, side)
}
