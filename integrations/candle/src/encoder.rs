//! The encoder a = max(x Wᵀ + b, 0), and the step that has it within.

use crate::argument::{Stored, check_like, check_matrix, elements, for_type_of, rows, with_dense_rows};
use crate::node::{Arguments, gradient, loss};
use crate::plans::Scratch;
use crate::{Error, Kernels, Result};
use candle_core::backend::BackendStorage;
use candle_core::{DType, Device, Layout, Tensor, WithDType};
use sae_kernels::operations::{ColumnSums, Encode, Layout as ProductLayout, Product, Responsibilities};
use sae_kernels::{Activation, Backend, DecoderFree, DecoderFreeStep, Losses, MatMut, MatRef, Objective, Shape};

/// What [`Kernels::decoder_free_loss`] returns.
#[derive(Debug, Clone)]
pub struct DecoderFreeLoss {
    /// The objective's value, differentiable with respect to x, weight and bias; a scalar of the type of x.
    pub total: Tensor,
    /// All terms, in f64: not weighted but for the total, and 0 for a term without weight.
    pub losses: Losses,
    /// Activations \[N,H\], detached.
    pub activations: Tensor,
    /// Row losses ℓ \[N\], detached.
    pub row_loss: Tensor,
}

impl Kernels {
    /// The loss of a step of the decoder-free autoencoder, with a = max(x Wᵀ + b, 0).
    ///
    /// x \[N,D\], weight \[H,D\], bias \[H\]. Loss and gradients are computed together, here; `backward` only scales them by the gradient of what
    /// was made of the loss. That is the least time, for memory: until the last tensor of the graph is dropped it keeps one gradient for each
    /// argument that is tracked. Where none is, no gradient is computed.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::DTypeMismatch`], [`Error::Device`]; [`Error::Kernels`] for an objective that is out of range,
    /// for fewer than two rows where a variance is needed, and for no latents.
    pub fn decoder_free_loss(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        objective: &Objective,
    ) -> Result<DecoderFreeLoss> {
        for_type_of!("x", x, T => {
            let shape = check_encoder::<T>(x, weight, bias)?;
            self.decoder_free_loss_of::<T>([x, weight, bias], shape, objective)
        })
    }

    /// (a, ℓ): activations a = max(x Wᵀ + b, 0) \[N,H\] and row losses ℓ_n = −log Σ_j exp(−a_nj) \[N\], both differentiable.
    ///
    /// x \[N,D\], weight \[H,D\], bias \[H\]. Both come from one pass, and are of the type of x. `backward` multiplies by the weight and by x then:
    /// nothing is kept but ℓ, and what candle keeps anyway.
    ///
    /// # Errors
    /// As [`decoder_free_loss`](Self::decoder_free_loss), but any number of rows will do.
    pub fn encode_lse(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<(Tensor, Tensor)> {
        for_type_of!("x", x, T => {
            let shape = check_encoder::<T>(x, weight, bias)?;
            self.encode_lse_of::<T>([x, weight, bias], shape)
        })
    }

    fn decoder_free_loss_of<T: Stored>(
        &self,
        arguments: [&Tensor; 3],
        shape: Shape,
        objective: &Objective,
    ) -> Result<DecoderFreeLoss> {
        let Shape { rows: n, inputs: d, latents: h } = shape;
        let [x, weight, bias] = readable::<T>(arguments)?;
        let (x, weight, bias) = (x.storage_and_layout(), weight.storage_and_layout(), bias.storage_and_layout());
        let (x, weight) = (rows::<T>(&x.0, x.1)?, rows::<T>(&weight.0, weight.1)?);
        let bias = elements::<T::Real>(&bias.0, bias.1)?;
        let tracked = arguments.map(Tensor::track_op);
        let work = |plan: &mut DecoderFree<T::Backend>| {
            let (mut activations, mut row_loss) =
                (plan.backend().alloc::<T>(n * h)?, plan.backend().alloc::<T::Real>(n)?);
            if !tracked.contains(&true) {
                let activations_out = MatMut::new(&mut activations, n, h)?;
                plan.forward(x, weight, bias, Some(activations_out), Some(&mut row_loss))?;
                return Ok((plan.losses()?, activations, row_loss, [const { None }; 3]));
            }
            let alloc = |len| plan.backend().alloc::<T::Real>(len);
            let (mut grad_weight, mut grad_bias) = (alloc(h * d)?, alloc(h)?);
            let mut grad_x = tracked[0].then(|| alloc(n * d)).transpose()?;
            plan.step(DecoderFreeStep {
                x,
                weight,
                bias,
                grad_weight: MatMut::new(&mut grad_weight, h, d)?,
                grad_bias: &mut grad_bias,
                grad_x: grad_x.as_mut().map(|grad_x| MatMut::new(grad_x, n, d)).transpose()?,
                activations: Some(MatMut::new(&mut activations, n, h)?),
                row_loss: Some(&mut row_loss),
            })?;
            let gradients = [grad_x, tracked[1].then_some(grad_weight), tracked[2].then_some(grad_bias)];
            Ok((plan.losses()?, activations, row_loss, gradients))
        };
        let (losses, activations, row_loss, gradients) =
            self.plans().with("decoder_free_loss", shape, objective, T::backend, work)?;
        let mut kept = [const { None }; 3];
        for ((kept, gradient), argument) in kept.iter_mut().zip(gradients).zip(arguments) {
            *kept = gradient.map(|values| Tensor::from_vec(values, argument.shape(), &Device::Cpu)).transpose()?;
        }
        Ok(DecoderFreeLoss {
            total: loss("sae-decoder-free-loss", arguments, losses.total, T::DTYPE, kept)?,
            losses,
            activations: Tensor::from_vec(activations, (n, h), &Device::Cpu)?,
            row_loss: Tensor::from_vec(row_loss, n, &Device::Cpu)?.to_dtype(T::DTYPE)?,
        })
    }

    fn encode_lse_of<T: Stored>(&self, arguments: [&Tensor; 3], shape: Shape) -> Result<(Tensor, Tensor)> {
        let Shape { rows: n, latents: h, .. } = shape;
        let [x, weight, bias] = readable::<T>(arguments)?;
        let (x, weight, bias) = (x.storage_and_layout(), weight.storage_and_layout(), bias.storage_and_layout());
        let (x, weight) = (rows::<T>(&x.0, x.1)?, rows::<T>(&weight.0, weight.1)?);
        let bias = elements::<T::Real>(&bias.0, bias.1)?;
        let (activations, row_loss) = self.with_scratch::<T, _>(shape, |scratch| {
            let mut activations = scratch.backend.alloc::<T>(n * h)?;
            let mut row_loss = scratch.backend.alloc::<T::Real>(n)?;
            scratch.backend.encode(Encode {
                x,
                weight,
                bias,
                activation: Activation::Relu,
                activations: Some(MatMut::new(&mut activations, n, h)?),
                row_loss: Some(&mut row_loss),
                moments: None,
                workspace: &mut scratch.workspace,
            })?;
            Ok((activations, row_loss))
        })?;
        let kernels = self.clone();
        let activations = arguments.attach(
            "sae-encode",
            T::to_cpu_storage_owned(activations),
            (n, h).into(),
            Box::new(move |arguments, a, grad| Ok(kernels.encode_backward::<T>(arguments, a, grad, shape)?)),
        )?;
        // ℓ before it is rounded: its error is a relative error of exp(ℓ − a).
        let kept: Vec<T::Real> = row_loss.clone();
        let row_loss = T::Real::to_cpu_storage_owned(row_loss).to_dtype(&Layout::contiguous(n), T::DTYPE)?;
        let kernels = self.clone();
        let row_loss = [&activations].attach(
            "sae-row-loss",
            row_loss,
            n.into(),
            Box::new(move |[a], _, grad| Ok([Some(kernels.row_loss_backward::<T>(a, &kept, grad, shape)?)])),
        )?;
        Ok((activations, row_loss))
    }

    /// dZ = dA ⊙ \[a > 0\], dx = dZ W, dW = dZᵀ x, db = Σ_n dZ.
    fn encode_backward<T: Stored>(
        &self,
        arguments: [&Tensor; 3],
        a: &Tensor,
        grad: &Tensor,
        shape: Shape,
    ) -> Result<[Option<Tensor>; 3]> {
        let Shape { rows: n, inputs: d, latents: h } = shape;
        let tracked = arguments.map(Tensor::track_op);
        let grad = grad.contiguous()?;
        let dz = {
            let ((a, a_layout), (grad, grad_layout)) = (a.storage_and_layout(), grad.storage_and_layout());
            let pairs = elements::<T>(&a, a_layout)?.iter().zip(elements::<T>(&grad, grad_layout)?);
            // NaN is not hidden: it is no number that is at most 0.
            pairs.map(|(a, grad)| if *a <= T::zeroed() { T::zeroed() } else { *grad }).collect::<Vec<T>>()
        };
        let [x, weight, _] = readable::<T>(arguments)?;
        let (x, weight) = (x.storage_and_layout(), weight.storage_and_layout());
        let (x, weight) = (rows::<T>(&x.0, x.1)?, rows::<T>(&weight.0, weight.1)?);
        let dz = MatRef::new(&dz, n, h)?;
        let values = self.with_scratch::<T, _>(shape, |Scratch { backend, workspace, .. }| {
            let mut product = |layout, right, rows, cols| {
                let mut out = backend.alloc::<T::Real>(rows * cols)?;
                backend.product(Product {
                    layout,
                    left: dz,
                    right,
                    accumulate: false,
                    out: MatMut::new(&mut out, rows, cols)?,
                    workspace: &mut *workspace,
                })?;
                sae_kernels::Result::Ok(out)
            };
            let dx = tracked[0].then(|| product(ProductLayout::Nn, weight, n, d)).transpose()?;
            let dw = tracked[1].then(|| product(ProductLayout::Tn, x, h, d)).transpose()?;
            let mut db = tracked[2].then(|| backend.alloc::<T::Real>(h)).transpose()?;
            if let Some(sums) = &mut db {
                backend.column_sums(ColumnSums { matrix: dz, accumulate: false, sums, workspace })?;
            }
            Ok([dx, dw, db])
        })?;
        let mut gradients = [const { None }; 3];
        for ((to, values), argument) in gradients.iter_mut().zip(values).zip(arguments) {
            *to = values.map(|values| gradient(argument, T::Real::to_cpu_storage_owned(values))).transpose()?;
        }
        Ok(gradients)
    }

    /// dA = diag(dℓ) r, with the responsibilities r_nj = exp(ℓ_n − a_nj).
    fn row_loss_backward<T: Stored>(
        &self,
        a: &Tensor,
        row_loss: &[T::Real],
        grad: &Tensor,
        shape: Shape,
    ) -> Result<Tensor> {
        let Shape { rows: n, latents: h, .. } = shape;
        let mut values = {
            let (storage, layout) = a.storage_and_layout();
            let activations = MatRef::new(elements::<T>(&storage, layout)?, n, h)?;
            self.with_scratch::<T, _>(shape, |scratch| {
                let mut values = scratch.backend.alloc::<T::Real>(n * h)?;
                let responsibilities = MatMut::new(&mut values, n, h)?;
                scratch.backend.responsibilities(Responsibilities { activations, row_loss, responsibilities })?;
                Ok(values)
            })?
        };
        let grad = grad.to_dtype(T::Real::DTYPE)?.to_vec1::<T::Real>()?;
        for (row, grad) in values.chunks_exact_mut(h).zip(grad) {
            row.iter_mut().for_each(|value| *value *= grad);
        }
        Ok(gradient(a, T::Real::to_cpu_storage_owned(values))?)
    }

    fn with_scratch<T: Stored, R>(
        &self,
        shape: Shape,
        work: impl FnOnce(&mut Scratch<T::Backend>) -> sae_kernels::Result<R>,
    ) -> Result<R> {
        Ok(self.plans().with("encoder", shape, &Objective::default(), T::backend, work)?)
    }
}

/// Extents of x \[N,D\], weight \[H,D\] and bias \[H\], of which the bias may be of the type that gradients are computed in, too.
fn check_encoder<T: Stored>(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Shape> {
    let (rows, inputs) = check_matrix("x", x, "[N,D]")?;
    let (latents, _) = check_matrix("weight", weight, "[H,D]")?;
    check_like("weight", weight, &[latents, inputs], "[H,D] of x [N,D]", &[T::DTYPE])?;
    check_like("bias", bias, &[latents], "[H] of weight [H,D]", &[T::DTYPE, T::Real::DTYPE])?;
    Ok(Shape { rows, inputs, latents })
}

/// The arguments as kernels read them.
fn readable<T: Stored>([x, weight, bias]: [&Tensor; 3]) -> Result<[Tensor; 3]> {
    let bias = bias.detach().to_dtype(<T::Real as WithDType>::DTYPE)?.contiguous()?;
    Ok([with_dense_rows(x)?, with_dense_rows(weight)?, bias])
}
