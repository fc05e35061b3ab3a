//! [`BackwardDz`]: the product (a − μ)·M, or none, with the whole gradient in its epilogue.

use super::gemm::{Affine, Extents, Source, THREADS, TILE, TILE_BYTES, blocks, derived_planes, extent, take_planes};
use super::memory::{Layout, View, lay_out};
use super::{Argument, Core, Cuda, CudaElement, activation};
use crate::error::Result;
use crate::operations::{BackwardDz, CorrelationTerm};
use bytemuck::{Pod, Zeroable};

/// `GradientEpilogue` of `kernels/gradient.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct GradientEpilogue {
    pub activations: View,
    pub row_loss: u64,
    pub mean: u64,
    pub scale: u64,
    pub offset: u64,
    pub dz: View,
    pub slots: u64,
    pub cols: i64,
    pub row_weight: f32,
    pub l1: f32,
    pub activation: u32,
    pub padding: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Pointwise {
    source: View,
    epilogue: GradientEpilogue,
    rows: i32,
    cols: i32,
}

/// Scratch: slots, and the operands of the product if there is one.
pub(super) struct Plan {
    slots: u64,
    centred: u64,
    coupling: u64,
}

pub(super) fn plan<E: CudaElement>(
    core: &Core,
    layout: &mut Layout,
    n: usize,
    h: usize,
    coupled: bool,
) -> Result<Plan> {
    let planes = if coupled { derived_planes::<E>(core.precision) } else { 0 };
    Ok(Plan {
        slots: layout.take::<f64>(n.div_ceil(TILE), h)?,
        centred: take_planes(layout, planes, n, h)?,
        coupling: take_planes(layout, planes, h, h)?,
    })
}

pub(super) fn backward_dz<E: CudaElement>(core: &Core, args: BackwardDz<'_, Cuda<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let coupled = matches!(&args.statistics, Some(s) if matches!(s.correlation, CorrelationTerm::Primal { .. }));
    let plan = lay_out(&args.workspace, |layout| plan::<E>(core, layout, n, h, coupled))?;
    let dz = View::of(&args.dz);
    let mut epilogue = GradientEpilogue {
        activations: View::new(&args.activations),
        row_loss: if args.row_weight != 0.0 { args.row_loss.address() } else { 0 },
        mean: args.statistics.as_ref().map_or(0, |statistics| statistics.mean.address()),
        scale: args.statistics.as_ref().map_or(0, |statistics| statistics.scale.address()),
        offset: 0,
        dz,
        slots: plan.slots,
        cols: h as i64,
        row_weight: args.row_weight as f32,
        l1: 0.0,
        activation: activation(args.activation),
        padding: 0,
    };
    let mut source = View::NONE;
    match args.statistics.map(|statistics| (statistics.mean, statistics.correlation)) {
        Some((mean, CorrelationTerm::Primal { coupling, offset })) => {
            epilogue.offset = offset.address();
            let planes = derived_planes::<E>(core.precision);
            let centre = Affine { shift: mean.address(), ..Affine::default() };
            let left = core.derive::<E>(Source::new(&args.activations), centre, planes, plan.centred)?;
            // M is symmetric: its rows are its columns.
            let right = core.derive::<f32>(Source::new(&coupling), Affine::default(), planes, plan.coupling)?;
            core.gemm(E::KERNELS.backward, Extents::full(n, h, h), left, right, &epilogue)?;
            return core.fold_f32(plan.slots, n.div_ceil(TILE), h, args.accumulate, args.grad_bias.address());
        }
        Some((_, CorrelationTerm::Dual)) => source = dz,
        Some((_, CorrelationTerm::None)) | None => {}
    }
    let pointwise = Pointwise { source, epilogue, rows: extent(n)?, cols: extent(h)? };
    let grid = [blocks(Extents::full(n, h, 0).tiles())?, 1];
    core.launch(E::KERNELS.pointwise, grid, THREADS, TILE_BYTES, Argument::new(&pointwise))?;
    core.fold_f32(plan.slots, n.div_ceil(TILE), h, args.accumulate, args.grad_bias.address())
}
