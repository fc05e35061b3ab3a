//! How a step is spread over ranks. With another engine than MPI, this is what to copy: it needs a sum, a gather and a broadcast.

use crate::{Error, agree, sum};
use mpi::topology::Rank;
use mpi::traits::*;
use sae_kernels::{
    Backend, DecoderFree, DecoderFreeStep, Element, Error as KernelError, Host, Losses, Mat, MatMut, Shape, Statistics,
};
use std::hash::{DefaultHasher, Hasher};

/// Losses and gradients of the batch whose rows are those of all ranks' `x`, on every rank, to the bit the same.
///
/// `x` \[N,D\]: this rank's rows, up to the plan's, and none if need be. `weight` \[H,D\] and `bias` \[H\]: the same on all ranks. `gradients`
/// \[H·D + H\] are overwritten: ∂L/∂W row by row, then ∂L/∂b. A mean over rows is one over the rows of all ranks.
///
/// Every rank of `world` must call this. Sent: 16 bytes, gathered; H numbers, broadcast; 2 + H + H(H+1)/2 statistics and H·D + H gradients,
/// each [summed](sum()).
///
/// # Errors
/// [`Error::Disagreement`], on all ranks, if models, objectives or parameters are not the same on all of them; [`Error::Kernels`], as
/// [`DecoderFree::statistics`] and [`DecoderFree::backward`], after which the other ranks wait for this one.
pub fn step<B>(
    world: &impl Communicator,
    model: &mut DecoderFree<B>,
    x: Mat<'_, B, B::Element>,
    weight: Mat<'_, B, B::Element>,
    bias: &[B::Real],
    gradients: &mut [B::Real],
) -> Result<Losses, Error>
where
    B: Backend<Memory = Host>,
    B::Real: Equivalence,
{
    let Shape { inputs: d, latents: h, .. } = model.config().shape;
    if gradients.len() != h * d + h {
        return Err(KernelError::Length { operand: "gradients", expected: h * d + h, found: gradients.len() }.into());
    }

    // First half: what the objective needs to know of the batch. Only the correlation term needs all comoments.
    let mut statistics = Statistics::new(h, model.config().objective.lambda_tc != 0.0);
    model.statistics(x, weight, bias, &mut statistics)?;
    agree(world, &describe(model, weight, bias))?;
    share_shift(world, &mut statistics);
    sum(world, statistics.sums_mut());

    // Second half: these rows' gradients, given the statistics of all rows. The weight term is no sum over rows, so one rank adds it.
    gradients.fill(B::Real::from_f64(0.0));
    let (grad_weight, grad_bias) = gradients.split_at_mut(h * d);
    let grad_weight = MatMut::new(grad_weight, h, d)?;
    let (grad_x, activations, row_loss) = (None, None, None);
    let step = DecoderFreeStep { x, weight, bias, grad_weight, grad_bias, grad_x, activations, row_loss };
    model.backward(step, &statistics, world.rank() == 0)?;
    sum(world, gradients);
    Ok(model.losses()?)
}

/// All statistics about the shift of the first rank that has rows. Sums about different shifts do not add up, and about a shift far from the
/// rows, as 0 may be, they lose digits.
fn share_shift(world: &impl Communicator, statistics: &mut Statistics) {
    let mut counts = vec![0u64; world.size() as usize];
    world.all_gather_into(&statistics.count(), &mut counts[..]);
    let Some(first) = counts.iter().position(|count| *count > 0) else { return };
    let mut shift = statistics.shift().to_vec();
    world.process_at_rank(first as Rank).broadcast_into(&mut shift[..]);
    statistics.rebase(&shift);
}

/// What must be the same on all ranks, for [`agree`]. How many rows there are, and in which blocks and forms they are processed, is a rank's own.
fn describe<B: Backend<Memory = Host>>(
    model: &DecoderFree<B>,
    weight: Mat<'_, B, B::Element>,
    bias: &[B::Real],
) -> String {
    let config = model.config();
    let Shape { inputs, latents, .. } = config.shape;
    let mut parameters = DefaultHasher::new();
    (0..weight.rows()).for_each(|row| parameters.write(bytemuck::cast_slice(weight.row(row))));
    parameters.write(bytemuck::cast_slice(bias));
    format!(
        "computes a step of {inputs} inputs and {latents} latents in {}, {:?}, {:?}, with the parameters of checksum {:016x}",
        B::Element::NAME,
        config.activation,
        config.objective,
        parameters.finish(),
    )
}
