//! The calls of the step, of its forward pass, and of its two phases, for any backend.

use super::argument::{self, Extents, Gradients, Inputs, matrix, statistics_len, write_losses};
use super::buffer::Buffers;
use super::context::{ContextBackend, context_at};
use super::{call, saek_context, saek_losses, saek_objective};
use crate::backend::Shape;
use crate::decoder_free::DecoderFree;
use crate::objective::Objective;

/// # Safety
/// What the header says of pointers.
pub(super) unsafe fn step<B: ContextBackend>(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const B::Element,
    ldx: i64,
    weight: *const B::Element,
    bias: *const B::Real,
    activations: *mut B::Element,
    row_loss: *mut B::Real,
    grad_weight: *mut B::Real,
    grad_bias: *mut B::Real,
    grad_x: *mut B::Real,
    losses: *mut saek_losses,
) -> i32 {
    call::status(|| {
        let extents = Extents::new(n, d, h, ldx)?;
        let mut buffers = Buffers::default();
        // SAFETY: the caller's promise.
        let context = unsafe { context_at(context) }?;
        let backend = B::of(context)?;
        let objective = buffers.input("objective", objective, 1)?;
        let inputs = Inputs::<B>::take(&mut buffers, &extents, x, weight, bias)?;
        let activations = buffers.optional_output("activations", activations, extents.activations)?;
        let row_loss = buffers.optional_output("row_loss", row_loss, extents.shape.rows)?;
        let gradients = Gradients::take(&mut buffers, &extents, grad_weight, grad_bias, grad_x)?;
        let losses = buffers.output("losses", losses, 1)?;
        // SAFETY: all buffers are taken, so no output is another buffer too; the rest is the caller's promise.
        unsafe {
            let objective = argument::objective(objective)?;
            let mut plans = context.lock();
            let model: &mut DecoderFree<B> =
                context.plan(&mut plans, &backend, extents.shape, objective, |planned| *planned == objective)?;
            model.step(gradients.step(&extents, inputs, activations, row_loss)?)?;
            write_losses(losses, model.losses()?);
        }
        Ok(())
    })
}

/// # Safety
/// What the header says of pointers.
pub(super) unsafe fn forward<B: ContextBackend>(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const B::Element,
    ldx: i64,
    weight: *const B::Element,
    bias: *const B::Real,
    activations: *mut B::Element,
    row_loss: *mut B::Real,
    losses: *mut saek_losses,
) -> i32 {
    call::status(|| {
        let extents = Extents::new(n, d, h, ldx)?;
        let mut buffers = Buffers::default();
        // SAFETY: the caller's promise.
        let context = unsafe { context_at(context) }?;
        let backend = B::of(context)?;
        let objective = buffers.input("objective", objective, 1)?;
        let inputs = Inputs::<B>::take(&mut buffers, &extents, x, weight, bias)?;
        let activations = buffers.optional_output("activations", activations, extents.activations)?;
        let row_loss = buffers.optional_output("row_loss", row_loss, extents.shape.rows)?;
        let losses = buffers.output("losses", losses, 1)?;
        // SAFETY: all buffers are taken, so no output is another buffer too; the rest is the caller's promise.
        unsafe {
            let objective = argument::objective(objective)?;
            let mut plans = context.lock();
            let model: &mut DecoderFree<B> =
                context.plan(&mut plans, &backend, extents.shape, objective, |planned| *planned == objective)?;
            let (x, weight, bias) = inputs.views(&extents)?;
            let Shape { rows, latents, .. } = extents.shape;
            let activations = activations.map(|to| matrix::<B, _>(to, rows, latents)).transpose()?;
            let row_loss = row_loss.map(|to| to.slice::<B::Memory>());
            model.forward(x, weight, bias, activations, row_loss)?;
            write_losses(losses, model.losses()?);
        }
        Ok(())
    })
}

/// # Safety
/// What the header says of pointers.
pub(super) unsafe fn statistics<B: ContextBackend>(
    context: *mut saek_context,
    n: i64,
    d: i64,
    h: i64,
    x: *const B::Element,
    ldx: i64,
    weight: *const B::Element,
    bias: *const B::Real,
    shift: *const B::Real,
    statistics: *mut f64,
) -> i32 {
    call::status(|| {
        let extents = Extents::new(n, d, h, ldx)?;
        let len = statistics_len(h)?;
        let mut buffers = Buffers::default();
        // SAFETY: the caller's promise.
        let context = unsafe { context_at(context) }?;
        let backend = B::of(context)?;
        let inputs = Inputs::<B>::take(&mut buffers, &extents, x, weight, bias)?;
        let shift = buffers.optional_input("shift", shift, extents.shape.latents)?;
        let statistics = buffers.output("statistics", statistics, len)?;
        let mut plans = context.lock();
        // Whatever the objective, statistics are the same; but without a correlation term there are no comoments.
        let model: &mut DecoderFree<B> =
            context
                .plan(&mut plans, &backend, extents.shape, Objective::default(), |planned| planned.lambda_tc != 0.0)?;
        // SAFETY: all buffers are taken, so no output is another buffer too; the rest is the caller's promise.
        unsafe {
            let (x, weight, bias) = inputs.views(&extents)?;
            let shift = shift.map(|shift| shift.slice::<B::Memory>());
            model.statistics_packed(x, weight, bias, shift, statistics.slice::<B::Memory>())?;
        }
        Ok(())
    })
}

/// # Safety
/// What the header says of pointers.
pub(super) unsafe fn backward<B: ContextBackend>(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const B::Element,
    ldx: i64,
    weight: *const B::Element,
    bias: *const B::Real,
    shift: *const B::Real,
    statistics: *const f64,
    add_weight_term: i32,
    grad_weight: *mut B::Real,
    grad_bias: *mut B::Real,
    grad_x: *mut B::Real,
    losses: *mut saek_losses,
) -> i32 {
    call::status(|| {
        let extents = Extents::new(n, d, h, ldx)?;
        let len = statistics_len(h)?;
        let mut buffers = Buffers::default();
        // SAFETY: the caller's promise.
        let context = unsafe { context_at(context) }?;
        let backend = B::of(context)?;
        let objective = buffers.input("objective", objective, 1)?;
        let inputs = Inputs::<B>::take(&mut buffers, &extents, x, weight, bias)?;
        let shift = buffers.optional_input("shift", shift, extents.shape.latents)?;
        let sums = buffers.input("statistics", statistics, len)?;
        let gradients = Gradients::take(&mut buffers, &extents, grad_weight, grad_bias, grad_x)?;
        let losses = buffers.output("losses", losses, 1)?;
        // SAFETY: all buffers are taken, so no output is another buffer too; the rest is the caller's promise.
        unsafe {
            let objective = argument::objective(objective)?;
            let mut plans = context.lock();
            let model: &mut DecoderFree<B> =
                context.plan(&mut plans, &backend, extents.shape, objective, |planned| *planned == objective)?;
            let step = gradients.step(&extents, inputs, None, None)?;
            let shift = shift.map(|shift| shift.slice::<B::Memory>());
            model.backward_packed(step, shift, sums.slice::<B::Memory>(), add_weight_term != 0)?;
            write_losses(losses, model.losses()?);
        }
        Ok(())
    })
}
