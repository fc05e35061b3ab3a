//! [`Recentre`], [`Comoments`] and [`FinishStatistics`].

use super::gemm::{Affine, Extents, Planes, Region, Source, TILE, blocks, derived_planes, rows_at_a_time, take_planes};
use super::memory::{CudaMemory, Layout, View, lay_out};
use super::product::{StoreEpilogue, row_blocks};
use super::reduce::Base;
use super::{Argument, Core, Cuda, CudaElement};
use crate::error::Result;
use crate::matrix::MatRef;
use crate::operations::{Comoments, Covariance, FinishStatistics, Recentre};
use bytemuck::{Pod, Zeroable};

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct RecentreArgument {
    activations: View,
    shift: u64,
    sum: u64,
    squares: u64,
    rows: i64,
    cols: i64,
    limit: f64,
}

pub(super) fn recentre<E: CudaElement>(core: &Core, args: Recentre<'_, Cuda<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let argument = RecentreArgument {
        activations: View::new(&args.activations),
        shift: args.shift.address(),
        sum: args.sum.address(),
        squares: args.sum_squares.address(),
        rows: n as i64,
        cols: h as i64,
        limit: Recentre::<Cuda<E>>::LIMIT,
    };
    core.launch(E::KERNELS.recentre, [blocks(h.div_ceil(32))?, 1], 256, 0, Argument::new(&argument))
}

/// Planes of a block of centred rows.
pub(super) fn comoments_plan<E: CudaElement>(core: &Core, layout: &mut Layout, n: usize, h: usize) -> Result<u64> {
    let planes = derived_planes::<E>(core.precision);
    take_planes(layout, planes, n.min(rows_at_a_time(planes)), h)
}

pub(super) fn comoments<E: CudaElement>(core: &Core, args: Comoments<'_, Cuda<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let planes = lay_out(&args.workspace, |layout| comoments_plan::<E>(core, layout, n, h))?;
    let out = View::of(&args.comoments);
    for (index, rows) in row_blocks(n, derived_planes::<E>(core.precision)).enumerate() {
        let operand = centred(core, args.activations.rows_range(rows.clone()), args.shift.address(), planes)?;
        let epilogue = StoreEpilogue::new(out, args.accumulate || index > 0, true);
        core.gemm("comoments", Extents::symmetric(h, rows.len()), operand, operand, &epilogue)?;
    }
    Ok(())
}

fn centred<E: CudaElement>(
    core: &Core,
    activations: MatRef<'_, E, CudaMemory>,
    shift: u64,
    planes: u64,
) -> Result<Planes> {
    let centre = Affine { shift, ..Affine::default() };
    core.derive::<E>(Source::new(&activations), centre, derived_planes::<E>(core.precision), planes)
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Variances {
    shift: u64,
    sum: u64,
    squares: u64,
    comoments: View,
    mean: u64,
    variance: u64,
    scale: u64,
    variance_f64: u64,
    inverse_deviation: u64,
    residue: u64,
    loss: u64,
    latents: i64,
    count: f64,
    eps: f64,
    lambda_var: f64,
}

/// Slots of `CoupleEpilogue` of `kernels/statistics.cu`: a row for each tile, a column for each latent.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct PairSlots {
    q_rows: u64,
    q_cols: u64,
    offset_rows: u64,
    offset_cols: u64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct CoupleEpilogue {
    diagonal: View,
    before: View,
    coupling: View,
    sum: u64,
    inverse_deviation: u64,
    residue: u64,
    slots: PairSlots,
    latents: i64,
    inverse_count: f64,
    inverse_degrees: f64,
    factor: f64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct FinishPrimal {
    slots: PairSlots,
    variance: u64,
    inverse_deviation: u64,
    residue: u64,
    q: u64,
    offset: u64,
    scale: u64,
    latents: i64,
    count: f64,
    eps: f64,
    lambda_var: f64,
    lambda_tc: f64,
}

/// Scratch: vectors over the latents, sums of tiles, and planes of a block of centred rows.
pub(super) struct FinishPlan {
    variance: u64,
    inverse_deviation: u64,
    residue: u64,
    loss: u64,
    q: u64,
    slots: PairSlots,
    planes: u64,
}

/// With a primal correlation from the activations of so many rows, none if comoments are given; or without one.
pub(super) fn finish_plan<E: CudaElement>(
    core: &Core,
    layout: &mut Layout,
    primal: Option<usize>,
    h: usize,
) -> Result<FinishPlan> {
    let tiles = primal.map_or(0, |_| h.div_ceil(TILE));
    Ok(FinishPlan {
        variance: layout.take::<f64>(h, 1)?,
        inverse_deviation: layout.take::<f64>(h, 1)?,
        residue: layout.take::<f64>(h, 1)?,
        loss: layout.take::<f64>(h, 1)?,
        q: layout.take::<f64>(h, 1)?,
        slots: PairSlots {
            q_rows: layout.take::<f64>(tiles, h)?,
            q_cols: layout.take::<f64>(tiles, h)?,
            offset_rows: layout.take::<f64>(tiles, h)?,
            offset_cols: layout.take::<f64>(tiles, h)?,
        },
        planes: comoments_plan::<E>(core, layout, primal.unwrap_or(0), h)?,
    })
}

pub(super) fn finish_statistics<E: CudaElement>(core: &Core, args: FinishStatistics<'_, Cuda<E>>) -> Result<()> {
    let h = args.check()?;
    let activations = match args.primal.as_ref().map(|primal| &primal.covariance) {
        Some(Covariance::Activations(activations)) => Some(*activations),
        _ => None,
    };
    let rows = activations.map_or(0, |activations| activations.rows());
    let primal_rows = args.primal.as_ref().map(|_| rows);
    let plan = lay_out(&args.workspace, |layout| finish_plan::<E>(core, layout, primal_rows, h))?;
    let (count, objective, shift) = (args.count as f64, args.objective, args.shift.address());
    let (var_loss, tc_loss) = (args.losses.address(), args.losses.address() + 8);
    let coupling = args.primal.as_ref().map_or(View::NONE, |primal| View::of(&primal.coupling));

    // Comoments of all rows, where M will stand: those of the last rows on the diagonal only, the rest of them below.
    let (mut before, mut last) = (coupling, (Planes::NONE, 0));
    if let Some(activations) = activations {
        for (index, range) in row_blocks(rows, derived_planes::<E>(core.precision)).enumerate() {
            let (len, is_last) = (range.len(), range.end == rows);
            let operand = centred(core, activations.rows_range(range), shift, plan.planes)?;
            let region = if is_last { Region::Diagonal } else { Region::Upper };
            let epilogue = StoreEpilogue::new(coupling, index > 0, true);
            core.gemm("comoments", Extents::symmetric(h, len).only(region), operand, operand, &epilogue)?;
            last = (operand, len);
            before = if index > 0 { coupling } else { View::NONE };
        }
    }
    let variances = Variances {
        shift,
        sum: args.sum.address(),
        squares: args.sum_squares.address(),
        comoments: coupling,
        mean: args.mean.address(),
        variance: args.variance.address(),
        scale: args.scale.address(),
        variance_f64: plan.variance,
        inverse_deviation: plan.inverse_deviation,
        residue: plan.residue,
        loss: plan.loss,
        latents: h as i64,
        count,
        eps: objective.variance_eps,
        lambda_var: objective.lambda_var,
    };
    core.each("variances", h, &variances)?;
    core.sum(plan.loss, h, 1.0, Base::Value(0.0), var_loss)?;
    let Some(primal) = &args.primal else {
        return core.sum(plan.loss, 0, 1.0, Base::Value(0.0), tc_loss);
    };
    let couple = CoupleEpilogue {
        diagonal: coupling,
        before,
        coupling,
        sum: args.sum.address(),
        inverse_deviation: plan.inverse_deviation,
        residue: plan.residue,
        slots: plan.slots,
        latents: h as i64,
        inverse_count: 1.0 / count,
        inverse_degrees: 1.0 / (count - 1.0),
        factor: 4.0 * objective.lambda_tc / (count - 1.0),
    };
    let (operand, depth) = last;
    core.gemm("gram_primal", Extents::symmetric(h, depth).only(Region::AboveDiagonal), operand, operand, &couple)?;
    let finish = FinishPrimal {
        slots: plan.slots,
        variance: plan.variance,
        inverse_deviation: plan.inverse_deviation,
        residue: plan.residue,
        q: plan.q,
        offset: primal.offset.address(),
        scale: args.scale.address(),
        latents: h as i64,
        count,
        eps: objective.variance_eps,
        lambda_var: objective.lambda_var,
        lambda_tc: objective.lambda_tc,
    };
    core.each("finish_primal", h, &finish)?;
    core.sum(plan.q, h, 1.0, Base::Value(0.0), tc_loss)
}
