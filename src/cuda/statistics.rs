//! [`Recentre`], [`Comoments`] and [`FinishStatistics`].

use super::gemm::{Affine, Extents, ROWS_AT_A_TIME, Source, blocks, derived_planes, take_planes};
use super::memory::{Layout, View, lay_out};
use super::product::{StoreEpilogue, row_blocks};
use super::reduce::Base;
use super::{Argument, Core, Cuda, CudaElement};
use crate::error::Result;
use crate::operations::{Comoments, FinishStatistics, Recentre};
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
    take_planes(layout, derived_planes::<E>(core.precision), n.min(ROWS_AT_A_TIME), h)
}

pub(super) fn comoments<E: CudaElement>(core: &Core, args: Comoments<'_, Cuda<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let planes = lay_out(&args.workspace, |layout| comoments_plan::<E>(core, layout, n, h))?;
    let centre = Affine { shift: args.shift.address(), ..Affine::default() };
    for (index, range) in row_blocks(n).enumerate() {
        let source = Source::new(&args.activations.rows_range(range));
        let operand = core.derive::<E>(source, centre, derived_planes::<E>(core.precision), planes)?;
        let accumulate = args.accumulate || index > 0;
        let epilogue = StoreEpilogue::new(View::of(&args.comoments), accumulate, true);
        core.gemm("comoments", Extents::symmetric(h, source.rows), operand, operand, &epilogue)?;
    }
    Ok(())
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

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Couple {
    comoments: View,
    sum: u64,
    inverse_deviation: u64,
    residue: u64,
    coupling: View,
    q_slots: u64,
    offset_slots: u64,
    latents: i64,
    inverse_count: f64,
    inverse_degrees: f64,
    factor: f64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct FinishPrimal {
    q_slots: u64,
    offset_slots: u64,
    variance: u64,
    inverse_deviation: u64,
    residue: u64,
    q: u64,
    offset: u64,
    scale: u64,
    latents: i64,
    chunks: i64,
    count: f64,
    eps: f64,
    lambda_var: f64,
    lambda_tc: f64,
}

/// Rows that a block of `couple` finishes, and columns whose sums share a slot.
const SIDE: usize = 32;
const CHUNK: usize = 1024;

/// Scratch: vectors over the latents, and row sums of chunks of columns.
pub(super) struct FinishPlan {
    variance: u64,
    inverse_deviation: u64,
    residue: u64,
    loss: u64,
    q: u64,
    q_slots: u64,
    offset_slots: u64,
}

pub(super) fn finish_plan(layout: &mut Layout, h: usize) -> Result<FinishPlan> {
    Ok(FinishPlan {
        variance: layout.take::<f64>(h, 1)?,
        inverse_deviation: layout.take::<f64>(h, 1)?,
        residue: layout.take::<f64>(h, 1)?,
        loss: layout.take::<f64>(h, 1)?,
        q: layout.take::<f64>(h, 1)?,
        q_slots: layout.take::<f64>(h.div_ceil(CHUNK), h)?,
        offset_slots: layout.take::<f64>(h.div_ceil(CHUNK), h)?,
    })
}

pub(super) fn finish_statistics<E: CudaElement>(core: &Core, args: FinishStatistics<'_, Cuda<E>>) -> Result<()> {
    let h = args.check()?;
    let plan = lay_out(&args.workspace, |layout| finish_plan(layout, h))?;
    let (count, objective) = (args.count as f64, args.objective);
    let (var_loss, tc_loss) = (args.losses.address(), args.losses.address() + 8);
    let comoments = args.primal.as_ref().map_or(View::NONE, |primal| View::new(&primal.comoments));
    let variances = Variances {
        shift: args.shift.address(),
        sum: args.sum.address(),
        squares: args.sum_squares.address(),
        comoments,
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
    let chunks = h.div_ceil(CHUNK);
    let couple = Couple {
        comoments,
        sum: args.sum.address(),
        inverse_deviation: plan.inverse_deviation,
        residue: plan.residue,
        coupling: View::of(&primal.coupling),
        q_slots: plan.q_slots,
        offset_slots: plan.offset_slots,
        latents: h as i64,
        inverse_count: 1.0 / count,
        inverse_degrees: 1.0 / (count - 1.0),
        factor: 4.0 * objective.lambda_tc / (count - 1.0),
    };
    let grid = [blocks(h.div_ceil(SIDE))?, chunks as u32];
    core.launch("couple", grid, 256, 0, Argument::new(&couple))?;
    let finish = FinishPrimal {
        q_slots: plan.q_slots,
        offset_slots: plan.offset_slots,
        variance: plan.variance,
        inverse_deviation: plan.inverse_deviation,
        residue: plan.residue,
        q: plan.q,
        offset: primal.offset.address(),
        scale: args.scale.address(),
        latents: h as i64,
        chunks: chunks as i64,
        count,
        eps: objective.variance_eps,
        lambda_var: objective.lambda_var,
        lambda_tc: objective.lambda_tc,
    };
    core.each("finish_primal", h, &finish)?;
    core.sum(plan.q, h, 1.0, Base::Value(0.0), tc_loss)
}
