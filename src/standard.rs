//! The standard sparse autoencoder: ReLU encoder, linear decoder, mean squared error and L1.

use crate::backend::{Backend, Buffer, Mat, MatOut, Shape, Slice, SliceMut};
use crate::error::{Error, Result, check_len};
use crate::matrix::{MatMut, Memory};
use crate::objective::Activation;
use crate::operations::*;

/// What a [`StandardSae`] plan is made for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StandardConfig {
    /// Largest batch, inputs, latents.
    pub shape: Shape,
    /// Weight of the L1 term, the mean over all activations of |a|; 0.01 in the paper's baseline.
    pub lambda_l1: f64,
}

/// Parameters of the standard sparse autoencoder.
pub struct StandardParameters<'a, B: Backend + ?Sized> {
    /// Encoder weight \[H,D\].
    pub encoder_weight: Mat<'a, B, B::Element>,
    /// Encoder bias \[H\].
    pub encoder_bias: Slice<'a, B, B::Real>,
    /// Decoder weight \[H,D\]: row j is what latent j writes.
    pub decoder_weight: Mat<'a, B, B::Element>,
    /// Decoder bias \[D\].
    pub decoder_bias: Slice<'a, B, B::Real>,
}

impl<B: Backend + ?Sized> Clone for StandardParameters<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend + ?Sized> Copy for StandardParameters<'_, B> {}

/// Gradients of the parameters; overwritten by a step.
pub struct StandardGradients<'a, B: Backend + ?Sized> {
    /// \[H,D\].
    pub encoder_weight: MatOut<'a, B, B::Real>,
    /// \[H\].
    pub encoder_bias: SliceMut<'a, B, B::Real>,
    /// \[H,D\].
    pub decoder_weight: MatOut<'a, B, B::Real>,
    /// \[D\].
    pub decoder_bias: SliceMut<'a, B, B::Real>,
}

/// Terms of the standard loss, L = mse + λ·l1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StandardLosses {
    /// Mean over rows and inputs of (x̂ − x)².
    pub mse: f64,
    /// Mean over rows and latents of |a|, not weighted.
    pub l1: f64,
    /// The weighted sum.
    pub total: f64,
}

/// Losses and gradients of the standard sparse autoencoder (the baseline of Oursland 2026):
///
/// a = relu(x W_eᵀ + b_e), x̂ = a W_d + b_d, L = mean (x̂ − x)² + λ·mean |a|.
///
/// A plan that owns all memory a step needs: two N×H and one N×D matrix, and the workspace.
pub struct StandardSae<B: Backend> {
    backend: B,
    config: StandardConfig,
    activations: Buffer<B, B::Element>,
    dz: Buffer<B, B::Element>,
    residual: Buffer<B, B::Element>,
    row_loss_sum: Buffer<B, f64>,
    sum: Buffer<B, f64>,
    sum_squares: Buffer<B, f64>,
    squared_error: Buffer<B, f64>,
    workspace: Buffer<B, f64>,
    rows: usize,
}

impl<B: Backend> StandardSae<B> {
    /// Makes a plan and all its memory.
    ///
    /// # Errors
    /// [`Error::NoLatents`], [`Error::Configuration`], [`Error::Overflow`], and what the backend's allocation may return.
    pub fn new(backend: B, config: StandardConfig) -> Result<Self> {
        let Shape { rows, inputs, latents } = config.shape;
        if latents == 0 {
            return Err(Error::NoLatents);
        }
        if !config.lambda_l1.is_finite() {
            return Err(Error::Configuration { name: "lambda_l1", value: config.lambda_l1, requirement: "finite" });
        }
        let size = |cols: usize| rows.checked_mul(cols).ok_or(Error::Overflow { what: "the batch" });
        let operations = [
            Operation::Encode,
            Operation::Decode,
            Operation::DecodeBackward,
            Operation::Product,
            Operation::ColumnSums,
        ];
        let workspace = backend.workspace_len_for(&operations.map(|operation| (operation, config.shape)))?;
        Ok(Self {
            activations: backend.alloc(size(latents)?)?,
            dz: backend.alloc(size(latents)?)?,
            residual: backend.alloc(size(inputs)?)?,
            row_loss_sum: backend.alloc(1)?,
            sum: backend.alloc(latents)?,
            sum_squares: backend.alloc(latents)?,
            squared_error: backend.alloc(1)?,
            workspace: backend.alloc(workspace)?,
            rows: 0,
            backend,
            config,
        })
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Losses and gradients of a batch of N rows; N may be anything up to the plan's rows.
    ///
    /// # Errors
    /// [`Error::TooManyRows`] and shape errors.
    pub fn step(
        &mut self,
        x: Mat<'_, B, B::Element>,
        parameters: StandardParameters<'_, B>,
        mut gradients: StandardGradients<'_, B>,
    ) -> Result<()> {
        let Shape { inputs: d, latents: h, .. } = self.config.shape;
        let n = x.rows();
        gradients.encoder_weight.expect("gradients.encoder_weight", h, d)?;
        check_len("gradients.encoder_bias", h, B::Memory::len_mut::<B::Real>(&gradients.encoder_bias))?;
        gradients.decoder_weight.expect("gradients.decoder_weight", h, d)?;
        check_len("gradients.decoder_bias", d, B::Memory::len_mut::<B::Real>(&gradients.decoder_bias))?;
        self.forward(x, parameters, None, None)?;

        let activations = matrix::<B>(&mut self.activations, n, h)?;
        let residual = matrix::<B>(&mut self.residual, n, d)?;
        let mut dz = matrix::<B>(&mut self.dz, n, h)?;
        let per_activation = 1.0 / (n.max(1) * h) as f64;
        self.backend.decode_backward(DecodeBackward {
            residual: residual.as_ref(),
            weight: parameters.decoder_weight,
            activations: activations.as_ref(),
            activation: Activation::Relu,
            l1: self.config.lambda_l1 * per_activation,
            dz: dz.reborrow(),
            accumulate: false,
            grad_bias: B::Memory::reborrow(&mut gradients.encoder_bias),
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })?;
        self.backend.product(Product {
            layout: Layout::Tn,
            left: activations.as_ref(),
            right: residual.as_ref(),
            accumulate: false,
            out: gradients.decoder_weight.reborrow(),
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })?;
        self.backend.product(Product {
            layout: Layout::Tn,
            left: dz.as_ref(),
            right: x,
            accumulate: false,
            out: gradients.encoder_weight.reborrow(),
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })?;
        self.backend.column_sums(ColumnSums {
            matrix: residual.as_ref(),
            accumulate: false,
            sums: B::Memory::reborrow(&mut gradients.decoder_bias),
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })
    }

    /// Losses alone, and activations \[N,H\] and reconstruction \[N,D\] if wanted.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn forward(
        &mut self,
        x: Mat<'_, B, B::Element>,
        parameters: StandardParameters<'_, B>,
        mut activations: Option<MatOut<'_, B, B::Element>>,
        mut reconstruction: Option<MatOut<'_, B, B::Real>>,
    ) -> Result<()> {
        let Shape { rows, inputs: d, latents: h } = self.config.shape;
        let n = x.rows();
        if n > rows {
            return Err(Error::TooManyRows { planned: rows, found: n });
        }
        x.expect("x", n, d)?;
        parameters.encoder_weight.expect("encoder_weight", h, d)?;
        check_len("encoder_bias", h, B::Memory::len::<B::Real>(&parameters.encoder_bias))?;
        parameters.decoder_weight.expect("decoder_weight", h, d)?;
        check_len("decoder_bias", d, B::Memory::len::<B::Real>(&parameters.decoder_bias))?;
        if let Some(activations) = &activations {
            activations.expect("activations", n, h)?;
        }
        if let Some(reconstruction) = &reconstruction {
            reconstruction.expect("reconstruction", n, d)?;
        }
        self.rows = n;

        // A step needs the activations in our buffer; a caller that wants them gets them instead.
        let mut a = match &mut activations {
            Some(given) => given.reborrow(),
            None => matrix::<B>(&mut self.activations, n, h)?,
        };
        self.backend.encode(Encode {
            x,
            weight: parameters.encoder_weight,
            bias: B::Memory::shorten(parameters.encoder_bias),
            activation: Activation::Relu,
            activations: Some(a.reborrow()),
            row_loss: None,
            moments: Some(Moments {
                shift: None,
                accumulate: false,
                row_loss_sum: B::Memory::slice_mut(&mut self.row_loss_sum),
                sum: B::Memory::slice_mut(&mut self.sum),
                sum_squares: B::Memory::slice_mut(&mut self.sum_squares),
            }),
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })?;
        self.backend.decode(Decode {
            activations: a.as_ref(),
            weight: parameters.decoder_weight,
            bias: B::Memory::shorten(parameters.decoder_bias),
            x,
            reconstruction: reconstruction.as_mut().map(MatMut::reborrow),
            residual_weight: 2.0 / (n * d).max(1) as f64,
            residual: Some(matrix::<B>(&mut self.residual, n, d)?),
            accumulate: false,
            squared_error: B::Memory::slice_mut(&mut self.squared_error),
            workspace: B::Memory::slice_mut(&mut self.workspace),
        })
    }

    /// Losses of the last batch. Waits for the device.
    ///
    /// # Errors
    /// What the backend's download may return.
    pub fn losses(&self) -> Result<StandardLosses> {
        let Shape { inputs: d, latents: h, .. } = self.config.shape;
        let (mut squared_error, mut sum) = ([0.0], vec![0.0; h]);
        self.backend.download(B::Memory::slice(&self.squared_error), &mut squared_error)?;
        self.backend.download(B::Memory::slice(&self.sum), &mut sum)?;
        // a ≥ 0 after ReLU, so Σ|a| = Σa.
        let mse = squared_error[0] / (self.rows * d).max(1) as f64;
        let l1 = sum.iter().sum::<f64>() / (self.rows * h).max(1) as f64;
        Ok(StandardLosses { mse, l1, total: mse + self.config.lambda_l1 * l1 })
    }
}

/// The first rows×cols elements of a buffer.
fn matrix<B: Backend>(
    buffer: &mut Buffer<B, B::Element>,
    rows: usize,
    cols: usize,
) -> Result<MatOut<'_, B, B::Element>> {
    MatMut::from_memory(B::Memory::part_mut(B::Memory::slice_mut(buffer), 0..rows * cols), rows, cols, cols)
}
