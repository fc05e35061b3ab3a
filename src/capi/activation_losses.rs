//! The call of losses of given activations, for any backend.

use super::argument::{self, product, write_losses};
use super::buffer::Buffers;
use super::context::{ContextBackend, context_at};
use super::{call, saek_context, saek_losses, saek_objective};
use crate::backend::Shape;
use crate::decoder_free::{ActivationLosses, ActivationStep};
use crate::matrix::{MatMut, MatRef};

/// # Safety
/// What the header says of pointers.
pub(super) unsafe fn activation_losses<B: ContextBackend>(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    activations: *const B::Element,
    lda: i64,
    weight: *const B::Element,
    grad_activations: *mut B::Element,
    grad_weight: *mut B::Real,
    responsibilities: *mut B::Real,
    row_loss: *mut B::Real,
    losses: *mut saek_losses,
) -> i32 {
    call::status(|| {
        let shape @ Shape { rows, inputs, latents } = argument::shape(n, d, h)?;
        let (lda, span) = argument::strided(["lda", "n*lda"], rows, latents, lda)?;
        let (matrix, weights) = (product("n*h", rows, latents)?, product("h*d", latents, inputs)?);
        let mut buffers = Buffers::default();
        // SAFETY: the caller's promise.
        let context = unsafe { context_at(context) }?;
        let objective = buffers.input("objective", objective, 1)?;
        let activations = buffers.input("activations", activations, span)?;
        // Its gradient is made of the weight.
        let weight = if grad_weight.is_null() || weights == 0 {
            buffers.optional_input("weight", weight, weights)?
        } else {
            Some(buffers.input("weight", weight, weights)?)
        };
        let grad_activations = buffers.optional_output("grad_activations", grad_activations, matrix)?;
        let grad_weight = buffers.optional_output("grad_weight", grad_weight, weights)?;
        let responsibilities = buffers.optional_output("responsibilities", responsibilities, matrix)?;
        let row_loss = buffers.optional_output("row_loss", row_loss, rows)?;
        let losses = buffers.output("losses", losses, 1)?;
        // SAFETY: all buffers are taken, so no output is another buffer too; the rest is the caller's promise.
        unsafe {
            let objective = argument::objective(objective)?;
            let mut plans = context.lock();
            let model: &mut ActivationLosses<B> =
                context.plan(&mut plans, shape, objective, |planned| *planned == objective)?;
            model.step(ActivationStep {
                activations: MatRef::with_stride(activations.slice(), rows, latents, lda)?,
                // A weight without elements may be NULL.
                weight: match weight {
                    Some(weight) => Some(MatRef::new(weight.slice(), latents, inputs)?),
                    None => (inputs == 0).then(|| MatRef::new(&[], latents, 0)).transpose()?,
                },
                grad_activations: grad_activations.map(|to| MatMut::new(to.slice(), rows, latents)).transpose()?,
                grad_weight: grad_weight.map(|to| MatMut::new(to.slice(), latents, inputs)).transpose()?,
                responsibilities: responsibilities.map(|to| MatMut::new(to.slice(), rows, latents)).transpose()?,
                row_loss: row_loss.map(|to| to.slice()),
            })?;
            write_losses(losses, model.losses()?);
        }
        Ok(())
    })
}
