//! [`Encode`] and [`Responsibilities`].

use super::gemm::{Extents, TILE, elementwise, raw_planes, take_planes};
use super::memory::{Layout, View, lay_out};
use super::reduce::Base;
use super::{Argument, Core, Cuda, CudaElement, activation};
use crate::error::Result;
use crate::operations::{Encode, Responsibilities};
use bytemuck::{Pod, Zeroable};

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct EncodeEpilogue {
    bias: u64,
    shift: u64,
    activations: View,
    row_slots: u64,
    sums: u64,
    squares: u64,
    cols: i64,
    col_tiles: i64,
    activation: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct FinishRows {
    slots: u64,
    losses: u64,
    row_loss: u64,
    rows: i64,
    col_tiles: i64,
}

/// Scratch: operands, and slots for rows and columns.
pub(super) struct Plan {
    x: u64,
    weight: u64,
    row_slots: u64,
    losses: u64,
    sums: u64,
    squares: u64,
}

pub(super) fn plan<E: CudaElement>(layout: &mut Layout, n: usize, d: usize, h: usize) -> Result<Plan> {
    Ok(Plan {
        x: take_planes(layout, raw_planes::<E>(), n, d)?,
        weight: take_planes(layout, raw_planes::<E>(), h, d)?,
        // (m, s) in f32.
        row_slots: layout.take::<[f32; 2]>(n, h.div_ceil(TILE))?,
        losses: layout.take::<f64>(n, 1)?,
        sums: layout.take::<f64>(n.div_ceil(TILE), h)?,
        squares: layout.take::<f64>(n.div_ceil(TILE), h)?,
    })
}

pub(super) fn encode<E: CudaElement>(core: &Core, args: Encode<'_, Cuda<E>>) -> Result<()> {
    let (n, d, h) = args.check()?;
    let plan = lay_out(&args.workspace, |layout| plan::<E>(layout, n, d, h))?;
    let wants_rows = args.row_loss.is_some() || args.moments.is_some();
    let col_tiles = h.div_ceil(TILE) as i64;
    let epilogue = EncodeEpilogue {
        bias: args.bias.address(),
        shift: args.moments.as_ref().and_then(|moments| moments.shift).map_or(0, |shift| shift.address()),
        activations: args.activations.as_ref().map_or(View::NONE, View::of),
        row_slots: if wants_rows { plan.row_slots } else { 0 },
        sums: if args.moments.is_some() { plan.sums } else { 0 },
        squares: plan.squares,
        cols: h as i64,
        col_tiles,
        activation: activation(args.activation),
        padding: 0,
    };
    let x = core.raw(&args.x, plan.x)?;
    let weight = core.raw(&args.weight, plan.weight)?;
    core.gemm(E::KERNELS.encode, Extents::full(n, h, d), x, weight, &epilogue)?;
    if wants_rows {
        let row_loss = args.row_loss.as_ref().map_or(0, |loss| loss.address());
        let finish = FinishRows { slots: plan.row_slots, losses: plan.losses, row_loss, rows: n as i64, col_tiles };
        core.each_row("finish_rows", n, &finish)?;
    }
    if let Some(moments) = args.moments {
        let groups = n.div_ceil(TILE);
        core.sum(plan.losses, n, 1.0, Base::accumulate(moments.accumulate), moments.row_loss_sum.address())?;
        core.fold(plan.sums, groups, h, moments.accumulate, moments.sum.address())?;
        core.fold(plan.squares, groups, h, moments.accumulate, moments.sum_squares.address())?;
    }
    Ok(())
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct ResponsibilitiesArgument {
    activations: View,
    row_loss: u64,
    out: View,
    rows: i64,
    cols: i64,
}

pub(super) fn responsibilities<E: CudaElement>(core: &Core, args: Responsibilities<'_, Cuda<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let argument = ResponsibilitiesArgument {
        activations: View::new(&args.activations),
        row_loss: args.row_loss.address(),
        out: View::of(&args.responsibilities),
        rows: n as i64,
        cols: h as i64,
    };
    core.launch(E::KERNELS.responsibilities, elementwise(n, h)?, 256, 0, Argument::new(&argument))
}
