//! The call of losses of given activations, for any backend.

use super::argument::{self, matrix, product, write_losses};
use super::buffer::{Buffers, Input};
use super::context::{ContextBackend, context_at};
use super::{call, saek_context, saek_losses, saek_objective};
use crate::backend::Shape;
use crate::decoder_free::{ActivationLosses, ActivationStep};
use crate::matrix::MatRef;

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
        let (entries, weights) = (product("n*h", rows, latents)?, product("h*d", latents, inputs)?);
        let mut buffers = Buffers::default();
        // SAFETY: the caller's promise.
        let context = unsafe { context_at(context) }?;
        let backend = B::of(context)?;
        let objective = buffers.input("objective", objective, 1)?;
        let activations = buffers.input("activations", activations, span)?;
        // Its gradient is made of the weight.
        let weight = if grad_weight.is_null() || weights == 0 {
            buffers.optional_input("weight", weight, weights)?
        } else {
            Some(buffers.input("weight", weight, weights)?)
        };
        let grad_activations = buffers.optional_output("grad_activations", grad_activations, entries)?;
        let grad_weight = buffers.optional_output("grad_weight", grad_weight, weights)?;
        let responsibilities = buffers.optional_output("responsibilities", responsibilities, entries)?;
        let row_loss = buffers.optional_output("row_loss", row_loss, rows)?;
        let losses = buffers.output("losses", losses, 1)?;
        // SAFETY: all buffers are taken, so no output is another buffer too; the rest is the caller's promise.
        unsafe {
            let objective = argument::objective(objective)?;
            let mut plans = context.lock();
            let model: &mut ActivationLosses<B> =
                context.plan(&mut plans, &backend, shape, objective, |planned| *planned == objective)?;
            model.step(ActivationStep {
                activations: MatRef::from_memory(activations.slice::<B::Memory>(), rows, latents, lda)?,
                // A weight without elements may be NULL.
                weight: (weight.or((inputs == 0).then_some(Input::EMPTY)))
                    .map(|weight| MatRef::from_memory(weight.slice::<B::Memory>(), latents, inputs, inputs))
                    .transpose()?,
                grad_activations: grad_activations.map(|to| matrix::<B, _>(to, rows, latents)).transpose()?,
                grad_weight: grad_weight.map(|to| matrix::<B, _>(to, latents, inputs)).transpose()?,
                responsibilities: responsibilities.map(|to| matrix::<B, _>(to, rows, latents)).transpose()?,
                row_loss: row_loss.map(|to| to.slice::<B::Memory>()),
            })?;
            write_losses(losses, model.losses()?);
        }
        Ok(())
    })
}
