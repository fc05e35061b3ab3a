//! The encoder a = max(x Wᵀ + b, 0), and the step that has it within.

use crate::argument::{At, MemoryOf, check_like, check_matrix, with_dense_rows};
use crate::node::{Arguments, copied, gradient, loss};
use crate::place::{Place, at_place_of};
use crate::plans::Scratch;
use crate::{Kernels, Result};
use candle_core::{Tensor, WithDType};
use sae_kernels::operations::{ColumnSums, Encode, Layout as ProductLayout, Product, Responsibilities};
use sae_kernels::{Activation, Backend, DecoderFree, DecoderFreeStep, Losses, Memory, Objective, Shape};

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
    /// [`Error::Shape`], [`Error::DType`], [`Error::DTypeMismatch`], [`Error::Device`], [`Error::DeviceMismatch`]; [`Error::Kernels`] for an objective that is out of range,
    /// for fewer than two rows where a variance is needed, and for no latents.
    pub fn decoder_free_loss(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        objective: &Objective,
    ) -> Result<DecoderFreeLoss> {
        at_place_of!("x", x, place => {
            let shape = check_encoder(&place, x, weight, bias)?;
            self.decoder_free_loss_at(&place, [x, weight, bias], shape, objective)
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
        at_place_of!("x", x, place => {
            let shape = check_encoder(&place, x, weight, bias)?;
            self.encode_lse_at(&place, [x, weight, bias], shape)
        })
    }

    fn decoder_free_loss_at<P: Place>(
        &self,
        place: &P,
        arguments: [&Tensor; 3],
        shape: Shape,
        objective: &Objective,
    ) -> Result<DecoderFreeLoss> {
        let Shape { rows: n, inputs: d, latents: h } = shape;
        let arguments_read = readable(place, arguments)?;
        let [x, weight, bias] = arguments_read.each_ref().map(Tensor::storage_and_layout);
        let tracked = arguments.map(Tensor::track_op);
        let wanted = tracked.contains(&true);
        let work = |plan: &mut DecoderFree<P::Backend>| {
            let at = At { place, backend: plan.backend() };
            let (mut activations, mut row_loss) = (at.room(true, n * h)?, at.room::<P::Real>(true, n)?);
            let (mut grad_weight, mut grad_bias) = (at.room(wanted, h * d)?, at.room(wanted, h)?);
            let mut grad_x = at.room(tracked[0], n * d)?;
            {
                let (x, weight) = (at.rows(&x)?, at.rows(&weight)?);
                let bias = at.elements(&bias)?;
                let activations = at.matrix::<P::Stored>(&mut activations, n, h)?;
                let row_loss = at.slice(&mut row_loss, n)?;
                let gradients = (at.matrix(&mut grad_weight, h, d)?, at.slice(&mut grad_bias, h)?);
                let grad_x = at.matrix(&mut grad_x, n, d)?;
                if let (Some(grad_weight), Some(grad_bias)) = gradients {
                    let step =
                        DecoderFreeStep { x, weight, bias, grad_weight, grad_bias, grad_x, activations, row_loss };
                    plan.step(step)?;
                } else {
                    plan.forward(x, weight, bias, activations, row_loss)?;
                }
            }
            let tensor = |room: Option<P::Array<P::Real>>, of: &Tensor| room.map(|room| place.tensor(room, of.shape()));
            let [x, weight, bias] = arguments;
            let gradients = [tensor(grad_x, x), tensor(grad_weight, weight), tensor(grad_bias, bias)];
            Ok((plan.losses()?, activations, row_loss, gradients))
        };
        let (losses, activations, row_loss, mut gradients) =
            self.plans().with("decoder_free_loss", place, shape, objective, work)?;
        for (gradient, tracked) in gradients.iter_mut().zip(tracked) {
            gradient.take_if(|_| !tracked);
        }
        let (activations, row_loss) = (activations.expect("wanted"), row_loss.expect("wanted"));
        Ok(DecoderFreeLoss {
            total: loss("sae-decoder-free-loss", arguments, losses.total, P::Stored::DTYPE, gradients)?,
            losses,
            activations: place.tensor(activations, (n, h)),
            row_loss: place.tensor(row_loss, n).to_dtype(P::Stored::DTYPE)?,
        })
    }

    fn encode_lse_at<P: Place>(&self, place: &P, arguments: [&Tensor; 3], shape: Shape) -> Result<(Tensor, Tensor)> {
        let Shape { rows: n, latents: h, .. } = shape;
        let arguments_read = readable(place, arguments)?;
        let [x, weight, bias] = arguments_read.each_ref().map(Tensor::storage_and_layout);
        let (activations, row_loss) = self.with_scratch(place, shape, |scratch| {
            let at = At { place, backend: &scratch.backend };
            let (mut activations, mut row_loss) = (at.room(true, n * h)?, at.room(true, n)?);
            scratch.backend.encode(Encode {
                x: at.rows(&x)?,
                weight: at.rows(&weight)?,
                bias: at.elements(&bias)?,
                activation: Activation::Relu,
                activations: at.matrix::<P::Stored>(&mut activations, n, h)?,
                row_loss: at.slice::<P::Real>(&mut row_loss, n)?,
                moments: None,
                workspace: MemoryOf::<P>::slice_mut(&mut scratch.workspace),
            })?;
            Ok((activations.expect("wanted"), row_loss.expect("wanted")))
        })?;
        let (kernels, here) = (self.clone(), place.clone());
        let activations = arguments.attach(
            "sae-encode",
            place.storage(activations),
            (n, h).into(),
            Box::new(move |arguments, a, grad| Ok(kernels.encode_backward(&here, arguments, a, grad, shape)?)),
        )?;
        // ℓ before it is rounded: its error is a relative error of exp(ℓ − a).
        let kept = place.tensor(row_loss, n);
        let rounded = kept.to_dtype(P::Stored::DTYPE)?;
        let (kernels, here) = (self.clone(), place.clone());
        let row_loss = [&activations].attach(
            "sae-row-loss",
            copied(&rounded)?,
            n.into(),
            Box::new(move |[a], _, grad| Ok([Some(kernels.row_loss_backward(&here, a, &kept, grad, shape)?)])),
        )?;
        Ok((activations, row_loss))
    }

    /// dZ = dA ⊙ \[a > 0\], dx = dZ W, dW = dZᵀ x, db = Σ_n dZ.
    fn encode_backward<P: Place>(
        &self,
        place: &P,
        arguments: [&Tensor; 3],
        a: &Tensor,
        grad: &Tensor,
        shape: Shape,
    ) -> Result<[Option<Tensor>; 3]> {
        let Shape { rows: n, inputs: d, latents: h } = shape;
        let tracked = arguments.map(Tensor::track_op);
        let grad = grad.detach();
        // NaN is not hidden: it is no number that is at most 0.
        let dz = a.detach().le(0.0)?.where_cond(&grad.zeros_like()?, &grad)?;
        let arguments_read = readable(place, arguments)?;
        let [x, weight, _] = arguments_read.each_ref().map(Tensor::storage_and_layout);
        let dz = dz.storage_and_layout();
        let gradients = self.with_scratch(place, shape, |Scratch { backend, workspace, .. }| {
            let at = At { place, backend: &*backend };
            let dz = at.rows::<P::Stored>(&dz)?;
            let mut product = |wanted: bool, layout, right, rows, cols| {
                let mut out = at.room::<P::Real>(wanted, rows * cols)?;
                if let Some(out) = at.matrix(&mut out, rows, cols)? {
                    let workspace = MemoryOf::<P>::slice_mut(workspace);
                    backend.product(Product { layout, left: dz, right, accumulate: false, out, workspace })?;
                }
                Result::Ok(out.map(|out| place.tensor(out, (rows, cols))))
            };
            let dx = product(tracked[0], ProductLayout::Nn, at.rows(&weight)?, n, d)?;
            let dw = product(tracked[1], ProductLayout::Tn, at.rows(&x)?, h, d)?;
            let mut db = at.room::<P::Real>(tracked[2], h)?;
            if let Some(sums) = at.slice(&mut db, h)? {
                let workspace = MemoryOf::<P>::slice_mut(workspace);
                backend.column_sums(ColumnSums { matrix: dz, accumulate: false, sums, workspace })?;
            }
            Ok([dx, dw, db.map(|db| place.tensor(db, h))])
        })?;
        let mut rounded = [const { None }; 3];
        for ((rounded, gradient), argument) in rounded.iter_mut().zip(gradients).zip(arguments) {
            *rounded = gradient.map(|gradient| self::gradient(argument, &gradient)).transpose()?;
        }
        Ok(rounded)
    }

    /// dA = diag(dℓ) r, with the responsibilities r_nj = exp(ℓ_n − a_nj).
    fn row_loss_backward<P: Place>(
        &self,
        place: &P,
        a: &Tensor,
        row_loss: &Tensor,
        grad: &Tensor,
        shape: Shape,
    ) -> Result<Tensor> {
        let Shape { rows: n, latents: h, .. } = shape;
        let responsibilities = {
            let [a, row_loss] = [a, row_loss].map(Tensor::storage_and_layout);
            self.with_scratch(place, shape, |scratch| {
                let at = At { place, backend: &scratch.backend };
                let mut responsibilities = at.room::<P::Real>(true, n * h)?;
                if let Some(responsibilities) = at.matrix(&mut responsibilities, n, h)? {
                    let (activations, row_loss) = (at.rows(&a)?, at.elements(&row_loss)?);
                    scratch.backend.responsibilities(Responsibilities { activations, row_loss, responsibilities })?;
                }
                Ok(place.tensor(responsibilities.expect("wanted"), (n, h)))
            })?
        };
        let grad = grad.detach().to_dtype(P::Real::DTYPE)?.reshape((n, 1))?;
        Ok(gradient(a, &responsibilities.broadcast_mul(&grad)?)?)
    }

    fn with_scratch<P: Place, R>(
        &self,
        place: &P,
        shape: Shape,
        work: impl FnOnce(&mut Scratch<P::Backend>) -> Result<R>,
    ) -> Result<R> {
        self.plans().with("encoder", place, shape, &Objective::default(), work)
    }
}

/// Extents of x \[N,D\], weight \[H,D\] and bias \[H\], of which the bias may be of the type that gradients are computed in, too.
fn check_encoder<P: Place>(_: &P, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Shape> {
    let (rows, inputs) = check_matrix("x", x, "[N,D]")?;
    let (latents, _) = check_matrix("weight", weight, "[H,D]")?;
    check_like("weight", weight, x, &[latents, inputs], "[H,D] of x [N,D]", &[P::Stored::DTYPE])?;
    let of_bias = [P::Stored::DTYPE, P::Real::DTYPE];
    check_like("bias", bias, x, &[latents], "[H] of weight [H,D]", &of_bias)?;
    Ok(Shape { rows, inputs, latents })
}

/// The arguments as kernels read them.
fn readable<P: Place>(_: &P, [x, weight, bias]: [&Tensor; 3]) -> Result<[Tensor; 3]> {
    let bias = bias.detach().to_dtype(P::Real::DTYPE)?.contiguous()?;
    Ok([with_dense_rows(x)?, with_dense_rows(weight)?, bias])
}
