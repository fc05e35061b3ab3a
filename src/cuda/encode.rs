//! [`Encode`], [`ActivationSums`] and [`Responsibilities`].

use super::gemm::{Extents, TILE, elementwise, raw_planes, take_planes};
use super::memory::{Layout, View, lay_out};
use super::reduce::Base;
use super::{Argument, Core, Cuda, CudaElement, CudaRefMut, activation};
use crate::error::Result;
use crate::objective::Activation;
use crate::operations::{ActivationSums, Encode, Moments, Responsibilities};
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
    slots: Slots,
}

pub(super) fn plan<E: CudaElement>(layout: &mut Layout, n: usize, d: usize, h: usize) -> Result<Plan> {
    Ok(Plan {
        x: take_planes(layout, raw_planes::<E>(), n, d)?,
        weight: take_planes(layout, raw_planes::<E>(), h, d)?,
        slots: sums_plan(layout, n, h)?,
    })
}

pub(super) fn sums_plan(layout: &mut Layout, n: usize, h: usize) -> Result<Slots> {
    Slots::take(layout, n, h)
}

pub(super) fn encode<E: CudaElement>(core: &Core, args: Encode<'_, Cuda<E>>) -> Result<()> {
    let (n, d, h) = args.check()?;
    let plan = lay_out(&args.workspace, |layout| plan::<E>(layout, n, d, h))?;
    let epilogue = EncodeEpilogue {
        bias: args.bias.address(),
        activations: args.activations.as_ref().map_or(View::NONE, View::of),
        activation: activation(args.activation),
        ..plan.slots.epilogue::<E>(args.row_loss.is_some(), args.moments.as_ref())
    };
    let x = core.raw(&args.x, plan.x)?;
    let weight = core.raw(&args.weight, plan.weight)?;
    core.gemm(E::KERNELS.encode, Extents::full(n, h, d), x, weight, &epilogue)?;
    plan.slots.finish(core, args.row_loss, args.moments)
}

pub(super) fn activation_sums<E: CudaElement>(core: &Core, args: ActivationSums<'_, Cuda<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let slots = lay_out(&args.workspace, |layout| sums_plan(layout, n, h))?;
    let epilogue = slots.epilogue::<E>(args.row_loss.is_some(), args.moments.as_ref());
    core.pointwise(E::KERNELS.activation_sums, View::new(&args.activations), [n, h], &epilogue)?;
    slots.finish(core, args.row_loss, args.moments)
}

/// What tiles leave for rows and columns.
pub(super) struct Slots {
    n: usize,
    h: usize,
    /// (m, s) in f32.
    rows: u64,
    losses: u64,
    sums: u64,
    squares: u64,
}

impl Slots {
    fn take(layout: &mut Layout, n: usize, h: usize) -> Result<Self> {
        Ok(Self {
            n,
            h,
            rows: layout.take::<[f32; 2]>(n, h.div_ceil(TILE))?,
            losses: layout.take::<f64>(n, 1)?,
            sums: layout.take::<f64>(n.div_ceil(TILE), h)?,
            squares: layout.take::<f64>(n.div_ceil(TILE), h)?,
        })
    }

    /// The epilogue that fills what is wanted, of tiles that are activations already.
    fn epilogue<E: CudaElement>(&self, row_loss: bool, moments: Option<&Moments<'_, Cuda<E>>>) -> EncodeEpilogue {
        EncodeEpilogue {
            bias: 0,
            shift: moments.and_then(|moments| moments.shift).map_or(0, |shift| shift.address()),
            activations: View::NONE,
            row_slots: if row_loss || moments.is_some() { self.rows } else { 0 },
            sums: if moments.is_some() { self.sums } else { 0 },
            squares: self.squares,
            cols: self.h as i64,
            col_tiles: self.h.div_ceil(TILE) as i64,
            activation: activation(Activation::Identity),
            padding: 0,
        }
    }

    /// Folds what the epilogue left.
    fn finish<E: CudaElement>(
        &self,
        core: &Core,
        row_loss: Option<CudaRefMut<'_, f32>>,
        moments: Option<Moments<'_, Cuda<E>>>,
    ) -> Result<()> {
        let (n, h) = (self.n, self.h);
        if row_loss.is_some() || moments.is_some() {
            let finish = FinishRows {
                slots: self.rows,
                losses: self.losses,
                row_loss: row_loss.as_ref().map_or(0, |loss| loss.address()),
                rows: n as i64,
                col_tiles: h.div_ceil(TILE) as i64,
            };
            core.each_row("finish_rows", n, &finish)?;
        }
        if let Some(moments) = moments {
            let groups = n.div_ceil(TILE);
            core.sum(self.losses, n, 1.0, Base::accumulate(moments.accumulate), moments.row_loss_sum.address())?;
            core.fold(self.sums, groups, h, moments.accumulate, moments.sum.address())?;
            core.fold(self.squares, groups, h, moments.accumulate, moments.sum_squares.address())?;
        }
        Ok(())
    }
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
