//! Training of either model on any backend: parameters, optimiser state, epochs.

use super::checkpoint::{Checkpoint, StoredTensor};
use super::device::Storage;
use anyhow::{Context, Result, bail, ensure};
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use sae_kernels::operations::{Adam, AdamConfig, Sgd, SgdConfig};
use sae_kernels::{
    Backend, Buffer, DecoderFree, DecoderFreeConfig, DecoderFreeStep, Element, Mat, MatMut, MatOut, MatRef, Memory,
    Objective, Shape, Slice, StandardConfig, StandardGradients, StandardParameters, StandardSae,
};
use serde::{Deserialize, Serialize};

/// A model and its loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Model {
    /// Oursland's decoder-free objective; ReLU.
    DecoderFree {
        /// Weight of the log-sum-exp term, summed over the rows of a batch.
        lambda_lse: f64,
        /// Weight of the variance term.
        lambda_var: f64,
        /// Weight of the correlation term.
        lambda_tc: f64,
        /// Weight of the weight-redundancy term.
        lambda_wr: f64,
    },
    /// ReLU encoder, linear decoder, mean squared error and L1.
    Standard {
        /// Weight of the mean of |a|.
        lambda_l1: f64,
    },
}

impl Model {
    /// Names of the loss terms; the last is the weighted sum of the others.
    pub fn terms(&self) -> &'static [&'static str] {
        match self {
            Model::DecoderFree { .. } => &["lse", "var", "tc", "wr", "total"],
            Model::Standard { .. } => &["mse", "l1", "total"],
        }
    }

    /// Whether a batch needs a variance, so at least 2 rows.
    fn needs_statistics(&self) -> bool {
        match *self {
            Model::DecoderFree { lambda_var, lambda_tc, .. } => lambda_var != 0.0 || lambda_tc != 0.0,
            Model::Standard { .. } => false,
        }
    }
}

/// How parameters are updated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Optimizer {
    /// β 0.9 and 0.999, eps 1e-8.
    Adam {
        /// Step size.
        learning_rate: f64,
    },
    /// Gradient descent.
    Sgd {
        /// Step size.
        learning_rate: f64,
        /// Share of the velocity kept from step to step.
        momentum: f64,
    },
}

impl Optimizer {
    /// Names of what it keeps for each parameter.
    fn state(&self) -> &'static [&'static str] {
        match *self {
            Optimizer::Adam { .. } => &["first_moment", "second_moment"],
            Optimizer::Sgd { momentum: 0.0, .. } => &[],
            Optimizer::Sgd { .. } => &["velocity"],
        }
    }
}

/// All that a training's result depends on, but the data and the backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Model and loss.
    pub model: Model,
    /// D.
    pub inputs: usize,
    /// H.
    pub latents: usize,
    /// Rows in a batch; the last of an epoch may have fewer.
    pub batch: usize,
    /// Rows in a block of a batch, if smaller. Exact: the gradient is the whole batch's.
    pub micro_batch: Option<usize>,
    /// Optimiser.
    pub optimizer: Optimizer,
    /// Of the initial parameters and of the order of the rows.
    pub seed: u64,
    /// Storage of inputs, weights and activations.
    pub storage: Storage,
}

/// A training in progress.
pub struct Trainer<B: Backend> {
    backend: B,
    settings: Settings,
    plan: Plan<B>,
    /// The encoder's weight and bias, then the decoder's, if there is one.
    parameters: Vec<Parameter<B>>,
    /// The batch's rows, on the host and where the backend computes.
    staging: Vec<B::Element>,
    x: Buffer<B, B::Element>,
    epoch: u64,
    step: u64,
    history: Vec<Vec<f64>>,
}

enum Plan<B: Backend> {
    DecoderFree(DecoderFree<B>),
    Standard(StandardSae<B>),
}

/// A weight or a bias (one row) with its gradient and the optimiser's state.
struct Parameter<B: Backend> {
    name: &'static str,
    rows: usize,
    cols: usize,
    /// What the optimiser updates.
    values: Buffer<B, B::Real>,
    /// The same, rounded to the storage type.
    storage: Buffer<B, B::Element>,
    gradient: Buffer<B, B::Real>,
    state: Vec<Buffer<B, B::Real>>,
}

impl<B: Backend + Clone> Trainer<B> {
    /// Fresh parameters: uniform in ±1/√(inputs of the layer), as PyTorch's `Linear`.
    pub fn new(backend: B, settings: Settings) -> Result<Self> {
        let mut trainer = Self::empty(backend, settings)?;
        let Settings { inputs: d, latents: h, seed, .. } = trainer.settings;
        let mut rng = generator(seed, 0);
        for parameter in &mut trainer.parameters {
            let fan_in = if parameter.name.starts_with("decoder") { h } else { d };
            let bound = 1.0 / (fan_in as f64).sqrt();
            let values: Vec<f64> =
                (0..parameter.rows * parameter.cols).map(|_| rng.random_range(-bound..=bound)).collect();
            parameter.set(&trainer.backend, &values)?;
        }
        Ok(trainer)
    }

    /// Goes on where a checkpoint was written.
    pub fn resume(backend: B, checkpoint: &Checkpoint) -> Result<Self> {
        ensure!(
            checkpoint.real == B::Real::NAME,
            "the checkpoint holds {} parameters, but this device keeps {}; use the device that it was written on",
            checkpoint.real,
            B::Real::NAME
        );
        let mut trainer = Self::empty(backend, checkpoint.settings.clone())?;
        let state = trainer.settings.optimizer.state();
        for parameter in &mut trainer.parameters {
            let shape = [parameter.rows, parameter.cols];
            let values = checkpoint.values(parameter.name, shape)?;
            parameter.set(&trainer.backend, values)?;
            for (name, buffer) in state.iter().zip(&mut parameter.state) {
                let values = checkpoint.values(&format!("{}.{name}", parameter.name), shape)?;
                trainer.backend.upload(&reals::<B>(values), B::Memory::slice_mut(buffer))?;
            }
        }
        (trainer.epoch, trainer.step) = (checkpoint.epoch, checkpoint.step);
        trainer.history = checkpoint.history.clone();
        Ok(trainer)
    }

    /// A plan, and zeroed parameters.
    fn empty(backend: B, settings: Settings) -> Result<Self> {
        let Settings { model, inputs, latents, batch, micro_batch, optimizer, .. } = settings;
        ensure!(batch > 0, "the batch is 0 rows; it must be at least 1");
        let shape = Shape { rows: batch, inputs, latents };
        let plan = match model {
            Model::DecoderFree { lambda_lse, lambda_var, lambda_tc, lambda_wr } => {
                let objective = Objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, ..Objective::default() };
                let config = DecoderFreeConfig { objective, block_rows: micro_batch, ..DecoderFreeConfig::new(shape) };
                Plan::DecoderFree(DecoderFree::new(backend.clone(), config)?)
            }
            Model::Standard { lambda_l1 } => {
                ensure!(micro_batch.is_none(), "only the decoder-free model has micro-batches");
                Plan::Standard(StandardSae::new(backend.clone(), StandardConfig { shape, lambda_l1 })?)
            }
        };
        let shapes: &[(&str, usize, usize)] = match model {
            Model::DecoderFree { .. } => &[("weight", latents, inputs), ("bias", 1, latents)],
            Model::Standard { .. } => &[
                ("encoder_weight", latents, inputs),
                ("encoder_bias", 1, latents),
                ("decoder_weight", latents, inputs),
                ("decoder_bias", 1, inputs),
            ],
        };
        let parameters = shapes
            .iter()
            .map(|(name, rows, cols)| Parameter::new(&backend, name, *rows, *cols, optimizer))
            .collect::<Result<_>>()?;
        let len = batch.checked_mul(inputs).context("the batch is too large")?;
        let x = backend.alloc(len)?;
        let staging = vec![B::Element::from_f64(0.0); len];
        Ok(Self { backend, settings, plan, parameters, staging, x, epoch: 0, step: 0, history: Vec::new() })
    }

    /// What the training depends on.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }
    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }
    /// Epochs done.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
    /// Mean over an epoch's batches of each loss term, for every epoch done.
    pub fn history(&self) -> &[Vec<f64>] {
        &self.history
    }

    /// Sizes of an epoch's batches. A last batch of a single row has no variance and is left out where one is needed.
    pub fn batches(&self, rows: usize) -> impl Iterator<Item = usize> + use<B> {
        let batch = self.settings.batch;
        let least = if self.settings.model.needs_statistics() { 2 } else { 1 };
        (0..rows.div_ceil(batch)).map(move |b| batch.min(rows - b * batch)).filter(move |rows| *rows >= least)
    }

    /// One pass over the rows of `x` \[N,D\] in a fresh order, which depends on seed and epoch alone. Calls `after` each step with the
    /// loss terms.
    ///
    /// A loss that is not finite ends the training before it reaches the parameters.
    pub fn train_epoch(&mut self, x: &[f32], mut after: impl FnMut(&[f64])) -> Result<()> {
        let d = self.settings.inputs;
        let rows = x.len() / d;
        let mut order: Vec<usize> = (0..rows).collect();
        order.shuffle(&mut generator(self.settings.seed, self.epoch + 1));
        let sizes: Vec<usize> = self.batches(rows).collect();
        ensure!(!sizes.is_empty(), "{rows} row(s) make no batch that can be trained on");
        let terms = self.settings.model.terms();
        let mut sums = vec![0.0; terms.len()];
        let mut remaining = &order[..];
        for rows in &sizes {
            let (batch, rest) = remaining.split_at(*rows);
            remaining = rest;
            for (row, to) in batch.iter().zip(self.staging.chunks_exact_mut(d)) {
                B::Element::narrow(&x[row * d..(row + 1) * d], to);
            }
            let target = B::Memory::part_mut(B::Memory::slice_mut(&mut self.x), 0..rows * d);
            self.backend.upload(&self.staging[..rows * d], target)?;
            let losses = self.gradients(*rows)?;
            self.step += 1;
            if losses.iter().any(|loss| !loss.is_finite()) {
                let shown: Vec<String> =
                    terms.iter().zip(&losses).map(|(name, loss)| format!("{name} = {loss}")).collect();
                bail!(
                    "the loss is not finite in epoch {}, step {}: {}; a lower learning rate may help",
                    self.epoch + 1,
                    self.step,
                    shown.join(", ")
                );
            }
            self.update()?;
            for (sum, loss) in sums.iter_mut().zip(&losses) {
                *sum += loss;
            }
            after(&losses);
        }
        self.epoch += 1;
        self.history.push(sums.iter().map(|sum| sum / sizes.len() as f64).collect());
        Ok(())
    }

    /// Gradients of the batch in `x`, and its loss terms.
    fn gradients(&mut self, rows: usize) -> Result<Vec<f64>> {
        let Settings { inputs: d, latents: h, .. } = self.settings;
        let x = matrix::<B>(&self.x, rows, d)?;
        match (&mut self.plan, &mut self.parameters[..]) {
            (Plan::DecoderFree(plan), [weight, bias]) => {
                plan.step(DecoderFreeStep {
                    x,
                    weight: matrix::<B>(&weight.storage, h, d)?,
                    bias: B::Memory::slice(&bias.values),
                    grad_weight: matrix_mut::<B>(&mut weight.gradient, h, d)?,
                    grad_bias: B::Memory::slice_mut(&mut bias.gradient),
                    grad_x: None,
                    activations: None,
                    row_loss: None,
                })?;
                let losses = plan.losses()?;
                Ok(vec![losses.lse, losses.var, losses.tc, losses.wr, losses.total])
            }
            (Plan::Standard(plan), [encoder_weight, encoder_bias, decoder_weight, decoder_bias]) => {
                let parameters = StandardParameters {
                    encoder_weight: matrix::<B>(&encoder_weight.storage, h, d)?,
                    encoder_bias: B::Memory::slice(&encoder_bias.values),
                    decoder_weight: matrix::<B>(&decoder_weight.storage, h, d)?,
                    decoder_bias: B::Memory::slice(&decoder_bias.values),
                };
                let gradients = StandardGradients {
                    encoder_weight: matrix_mut::<B>(&mut encoder_weight.gradient, h, d)?,
                    encoder_bias: B::Memory::slice_mut(&mut encoder_bias.gradient),
                    decoder_weight: matrix_mut::<B>(&mut decoder_weight.gradient, h, d)?,
                    decoder_bias: B::Memory::slice_mut(&mut decoder_bias.gradient),
                };
                plan.step(x, parameters, gradients)?;
                let losses = plan.losses()?;
                Ok(vec![losses.mse, losses.l1, losses.total])
            }
            _ => unreachable!("each plan is made with its parameters"),
        }
    }

    /// One step of the optimiser.
    fn update(&mut self) -> Result<()> {
        for parameter in &mut self.parameters {
            let gradient = B::Memory::slice(&parameter.gradient);
            let values = B::Memory::slice_mut(&mut parameter.values);
            let storage = Some(B::Memory::slice_mut(&mut parameter.storage));
            match (self.settings.optimizer, &mut parameter.state[..]) {
                (Optimizer::Adam { learning_rate }, [first, second]) => self.backend.adam(Adam {
                    config: AdamConfig { learning_rate, ..AdamConfig::default() },
                    step: self.step,
                    gradient,
                    first_moment: B::Memory::slice_mut(first),
                    second_moment: B::Memory::slice_mut(second),
                    parameters: values,
                    storage,
                })?,
                (Optimizer::Sgd { learning_rate, momentum }, [velocity]) => {
                    let velocity = B::Memory::slice_mut(velocity);
                    let config = SgdConfig { learning_rate, momentum, weight_decay: 0.0 };
                    self.backend.sgd(Sgd { config, gradient, velocity, parameters: values, storage })?;
                }
                _ => unreachable!("each optimiser is made with its state"),
            }
        }
        Ok(())
    }

    /// All that is needed to go on later, exactly.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let mut tensors = Vec::new();
        for parameter in &self.parameters {
            let state = self.settings.optimizer.state().iter().map(|name| format!("{}.{name}", parameter.name));
            let names = std::iter::once(parameter.name.to_owned()).chain(state);
            for (name, buffer) in names.zip(std::iter::once(&parameter.values).chain(&parameter.state)) {
                let values = self.download(buffer)?;
                tensors.push(StoredTensor { name, shape: [parameter.rows, parameter.cols], values });
            }
        }
        Ok(Checkpoint {
            settings: self.settings.clone(),
            real: B::Real::NAME.to_owned(),
            epoch: self.epoch,
            step: self.step,
            history: self.history.clone(),
            tensors,
        })
    }

    /// Values of a parameter, row by row.
    pub fn parameter(&self, name: &str) -> Result<Vec<f32>> {
        let found = self.parameters.iter().find(|parameter| parameter.name == name);
        let values = self.download(&found.with_context(|| format!("the model has no parameter {name}"))?.values)?;
        Ok(values.into_iter().map(|v| v as f32).collect())
    }

    fn download(&self, buffer: &Buffer<B, B::Real>) -> Result<Vec<f64>> {
        let slice = B::Memory::slice(buffer);
        let mut values = vec![B::Real::from_f64(0.0); B::Memory::len::<B::Real>(&slice)];
        self.backend.download(slice, &mut values)?;
        Ok(values.into_iter().map(Element::to_f64).collect())
    }

    /// The encoder's weight \[H,D\], where the backend computes.
    pub fn encoder_weight(&self) -> Result<Mat<'_, B, B::Element>> {
        let weight = &self.parameters[0];
        matrix::<B>(&weight.storage, weight.rows, weight.cols)
    }

    /// The encoder's bias \[H\], where the backend computes.
    pub fn encoder_bias(&self) -> Slice<'_, B, B::Real> {
        B::Memory::slice(&self.parameters[1].values)
    }
}

impl<B: Backend> Parameter<B> {
    fn new(backend: &B, name: &'static str, rows: usize, cols: usize, optimizer: Optimizer) -> Result<Self> {
        let len = rows.checked_mul(cols).with_context(|| format!("{name} is too large"))?;
        let state: &[usize] = match optimizer {
            Optimizer::Adam { .. } => &[len, len],
            // Plain gradient descent takes an empty velocity.
            Optimizer::Sgd { momentum: 0.0, .. } => &[0],
            Optimizer::Sgd { .. } => &[len],
        };
        Ok(Self {
            name,
            rows,
            cols,
            values: backend.alloc(len)?,
            storage: backend.alloc(len)?,
            gradient: backend.alloc(len)?,
            state: state.iter().map(|len| backend.alloc(*len)).collect::<sae_kernels::Result<_>>()?,
        })
    }

    /// Sets the values, and the storage as the optimiser would: rounded from them.
    fn set(&mut self, backend: &B, values: &[f64]) -> Result<()> {
        let values = reals::<B>(values);
        let storage: Vec<B::Element> = values.iter().map(|v| B::Element::from_f64(v.to_f64())).collect();
        backend.upload(&values, B::Memory::slice_mut(&mut self.values))?;
        backend.upload(&storage, B::Memory::slice_mut(&mut self.storage))?;
        Ok(())
    }
}

fn reals<B: Backend>(values: &[f64]) -> Vec<B::Real> {
    values.iter().map(|v| B::Real::from_f64(*v)).collect()
}

/// The random numbers of one epoch; 0 stands for the initial parameters. No state needs to be kept between epochs.
fn generator(seed: u64, epoch: u64) -> Xoshiro256PlusPlus {
    // An odd constant spreads the epochs of neighbouring seeds apart.
    Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(epoch))
}

/// The first rows×cols elements of a buffer.
fn matrix<B: Backend>(buffer: &Buffer<B, B::Element>, rows: usize, cols: usize) -> Result<Mat<'_, B, B::Element>> {
    Ok(MatRef::from_memory(B::Memory::part(B::Memory::slice(buffer), 0..rows * cols), rows, cols, cols)?)
}

fn matrix_mut<B: Backend>(buffer: &mut Buffer<B, B::Real>, rows: usize, cols: usize) -> Result<MatOut<'_, B, B::Real>> {
    Ok(MatMut::from_memory(B::Memory::slice_mut(buffer), rows, cols, cols)?)
}
