//! [`WeightRedundancy`], in both forms: a symmetric product, then G·Ŵ or Ŵ·P added to the gradient by its epilogue.

use super::dual::MirrorEpilogue;
use super::gemm::{Affine, Extents, Source, TILE, derived_planes, take_planes};
use super::memory::{Layout, View, lay_out};
use super::reduce::Base;
use super::{Core, Cuda, CudaElement};
use crate::error::Result;
use crate::operations::WeightRedundancy;
use bytemuck::{Pod, Zeroable};

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct RedundancyEpilogue {
    weight: View,
    inverse: u64,
    grad: View,
    slots: u64,
    col_tiles: i64,
    lambda: f32,
    less_unit: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct RowNorms {
    weight: View,
    norm: u64,
    inverse: u64,
    unit_squares: u64,
    rows: i64,
    cols: i64,
    normalize: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct ThroughNorms {
    weight: View,
    norm: u64,
    slots: u64,
    grad: View,
    rows: i64,
    cols: i64,
    col_tiles: i64,
    lambda: f64,
}

/// Scratch: vectors over the rows, planes of Ŵ and of the square matrix, and slots.
pub(super) struct Plan {
    norm: u64,
    inverse: u64,
    unit_squares: u64,
    unit: u64,
    gram: u64,
    square_slots: u64,
    slots: u64,
}

pub(super) fn plan<E: CudaElement>(core: &Core, layout: &mut Layout, h: usize, d: usize, dual: bool) -> Result<Plan> {
    let planes = derived_planes::<E>(core.precision);
    let side = if dual { d } else { h };
    Ok(Plan {
        norm: layout.take::<f64>(h, 1)?,
        inverse: layout.take::<f32>(h, 1)?,
        unit_squares: layout.take::<f64>(h, 1)?,
        unit: take_planes(layout, planes, h, d)?,
        gram: take_planes(layout, planes, side, side)?,
        square_slots: layout.take::<f64>(Extents::symmetric(side, 0).tiles(), 1)?,
        slots: layout.take::<f64>(h, d.div_ceil(TILE))?,
    })
}

pub(super) fn weight_redundancy<E: CudaElement>(core: &Core, args: WeightRedundancy<'_, Cuda<E>>) -> Result<()> {
    let (h, d) = args.check()?;
    let dual = args.form.is_dual(h, d);
    let (side, other) = if dual { (d, h) } else { (h, d) };
    let plan = lay_out(&args.workspace, |layout| plan::<E>(core, layout, h, d, dual))?;
    let planes = derived_planes::<E>(core.precision);
    let (weight, gram, loss) = (View::new(&args.weight), View::of(&args.gram), args.loss.address());
    let norms = RowNorms {
        weight,
        norm: plan.norm,
        inverse: plan.inverse,
        unit_squares: plan.unit_squares,
        rows: h as i64,
        cols: d as i64,
        normalize: u32::from(args.normalize),
        padding: 0,
    };
    core.each_row(E::KERNELS.row_norms, h, &norms)?;

    // G = Ŵ Ŵᵀ − I, or P = Ŵᵀ Ŵ.
    let scale = Affine { row_scale: plan.inverse, ..Affine::default() };
    let unit = core.derive::<E>(Source::new(&args.weight), scale, planes, plan.unit)?;
    let extents = Extents::symmetric(side, other);
    let diagonal = if dual { 0.0 } else { 1.0 };
    let mirror = MirrorEpilogue { out: gram, slots: plan.square_slots, factor: 1.0, diagonal };
    core.gemm(if dual { "gram_tn" } else { "gram_nt" }, extents, unit, unit, &mirror)?;
    let base = Base::Value(if dual { h as f64 } else { 0.0 });
    core.sum(plan.square_slots, extents.tiles(), 1.0, base, loss)?;
    if dual {
        core.sum(plan.unit_squares, h, -2.0, Base::Out, loss)?;
    }

    let Some(grad_weight) = &args.grad_weight else { return Ok(()) };
    let grad = View::of(grad_weight);
    let col_tiles = d.div_ceil(TILE) as i64;
    let epilogue = RedundancyEpilogue {
        weight,
        inverse: plan.inverse,
        grad,
        slots: plan.slots,
        col_tiles,
        lambda: args.lambda as f32,
        less_unit: u32::from(dual),
    };
    let square = Source { view: gram, rows: side, cols: side };
    let square = core.derive::<f32>(square, Affine::default(), planes, plan.gram)?;
    let extents = Extents::full(h, d, side);
    if dual {
        // P is symmetric: its rows are its columns.
        core.gemm(E::KERNELS.redundancy_dual, extents, unit, square, &epilogue)?;
    } else {
        core.gemm(E::KERNELS.redundancy_primal, extents, square, unit, &epilogue)?;
    }
    if args.normalize {
        let through = ThroughNorms {
            weight,
            norm: plan.norm,
            slots: plan.slots,
            grad,
            rows: h as i64,
            cols: d as i64,
            col_tiles,
            lambda: args.lambda,
        };
        core.each_row(E::KERNELS.through_norms, h, &through)?;
    }
    Ok(())
}
