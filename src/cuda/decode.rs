//! [`Decode`] and [`DecodeBackward`]: the standard sparse autoencoder's decoder.

use super::backward::GradientEpilogue;
use super::gemm::{Extents, TILE, raw_planes, take_planes};
use super::memory::{Layout, View, lay_out};
use super::reduce::Base;
use super::{Core, Cuda, CudaElement, activation};
use crate::error::Result;
use crate::operations::{Decode, DecodeBackward};
use bytemuck::{Pod, Zeroable};

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct DecodeEpilogue {
    bias: u64,
    x: View,
    reconstruction: View,
    residual: View,
    slots: u64,
    residual_weight: f32,
    padding: u32,
}

/// Scratch: operands and slots.
pub(super) struct Plan {
    left: u64,
    weight: u64,
    slots: u64,
}

pub(super) fn plan<E: CudaElement>(layout: &mut Layout, n: usize, d: usize, h: usize) -> Result<Plan> {
    Ok(Plan {
        left: take_planes(layout, raw_planes::<E>(), n, h)?,
        weight: take_planes(layout, raw_planes::<E>(), h, d)?,
        slots: layout.take::<f64>(Extents::full(n, d, h).tiles(), 1)?,
    })
}

pub(super) fn backward_plan<E: CudaElement>(layout: &mut Layout, n: usize, d: usize, h: usize) -> Result<Plan> {
    Ok(Plan {
        left: take_planes(layout, raw_planes::<E>(), n, d)?,
        weight: take_planes(layout, raw_planes::<E>(), h, d)?,
        slots: layout.take::<f64>(n.div_ceil(TILE), h)?,
    })
}

pub(super) fn decode<E: CudaElement>(core: &Core, args: Decode<'_, Cuda<E>>) -> Result<()> {
    let (n, d, h) = args.check()?;
    let plan = lay_out(&args.workspace, |layout| plan::<E>(layout, n, d, h))?;
    let epilogue = DecodeEpilogue {
        bias: args.bias.address(),
        x: View::new(&args.x),
        reconstruction: args.reconstruction.as_ref().map_or(View::NONE, View::of),
        residual: args.residual.as_ref().map_or(View::NONE, View::of),
        slots: plan.slots,
        residual_weight: args.residual_weight as f32,
        padding: 0,
    };
    let left = core.raw(&args.activations, plan.left)?;
    let weight = core.raw(&args.weight, plan.weight)?;
    let extents = Extents::full(n, d, h);
    core.gemm(E::KERNELS.decode, extents, left, weight, &epilogue)?;
    core.sum(plan.slots, extents.tiles(), 1.0, Base::accumulate(args.accumulate), args.squared_error.address())
}

pub(super) fn decode_backward<E: CudaElement>(core: &Core, args: DecodeBackward<'_, Cuda<E>>) -> Result<()> {
    let (n, d, h) = args.check()?;
    let plan = lay_out(&args.workspace, |layout| backward_plan::<E>(layout, n, d, h))?;
    let epilogue = GradientEpilogue {
        activations: View::new(&args.activations),
        row_loss: 0,
        mean: 0,
        scale: 0,
        offset: 0,
        dz: View::of(&args.dz),
        slots: plan.slots,
        cols: h as i64,
        row_weight: 0.0,
        l1: args.l1 as f32,
        activation: activation(args.activation),
        padding: 0,
    };
    let left = core.raw(&args.residual, plan.left)?;
    let weight = core.raw(&args.weight, plan.weight)?;
    core.gemm(E::KERNELS.decode_backward, Extents::full(n, h, d), left, weight, &epilogue)?;
    core.fold_f32(plan.slots, n.div_ceil(TILE), h, args.accumulate, args.grad_bias.address())
}
