//! [`CorrelationDual`]: K = ÂÂᵀ/(N−1), then KÂ with P and q in its epilogue.

use super::gemm::{Affine, Extents, Source, TILE, derived_planes, take_planes};
use super::memory::{Layout, View, lay_out};
use super::reduce::Base;
use super::{Core, Cuda, CudaElement};
use crate::error::Result;
use crate::operations::CorrelationDual;
use bytemuck::{Pod, Zeroable};

/// `MirrorEpilogue` of `kernels/mirror.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct MirrorEpilogue {
    pub out: View,
    pub slots: u64,
    pub factor: f32,
    pub diagonal: f32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct DualEpilogue {
    activations: View,
    mean: u64,
    inverse_deviation: u64,
    gain: u64,
    diagonal: u64,
    product: View,
    slots: u64,
    cols: i64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct DualVectors {
    variance: u64,
    inverse_deviation: u64,
    gain: u64,
    diagonal: u64,
    latents: i64,
    factor: f64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct DualFinish {
    variance: u64,
    slots: u64,
    scale: u64,
    squares: u64,
    latents: i64,
    row_tiles: i64,
    factor: f64,
    degrees: f64,
}

/// Scratch: vectors over the latents, planes of Â and K, and slots.
pub(super) struct Plan {
    inverse_deviation: u64,
    gain: u64,
    diagonal: u64,
    squares: u64,
    standardized: u64,
    gram: u64,
    norm_slots: u64,
    slots: u64,
}

pub(super) fn plan<E: CudaElement>(core: &Core, layout: &mut Layout, n: usize, h: usize) -> Result<Plan> {
    let planes = derived_planes::<E>(core.precision);
    Ok(Plan {
        inverse_deviation: layout.take::<f32>(h, 1)?,
        gain: layout.take::<f32>(h, 1)?,
        diagonal: layout.take::<f32>(h, 1)?,
        squares: layout.take::<f64>(h, 1)?,
        standardized: take_planes(layout, planes, n, h)?,
        gram: take_planes(layout, planes, n, n)?,
        norm_slots: layout.take::<f64>(Extents::symmetric(n, h).tiles(), 1)?,
        slots: layout.take::<f64>(n.div_ceil(TILE), h)?,
    })
}

pub(super) fn correlation_dual<E: CudaElement>(core: &Core, args: CorrelationDual<'_, Cuda<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let plan = lay_out(&args.workspace, |layout| plan::<E>(core, layout, n, h))?;
    let degrees = n as f64 - 1.0;
    let factor = 4.0 * args.lambda_tc / degrees;
    let (variance, loss) = (args.variance.address(), args.loss.address());
    let vectors = DualVectors {
        variance,
        inverse_deviation: plan.inverse_deviation,
        gain: plan.gain,
        diagonal: plan.diagonal,
        latents: h as i64,
        factor,
    };
    core.each("dual_vectors", h, &vectors)?;

    let planes = derived_planes::<E>(core.precision);
    let standardize = Affine { shift: args.mean.address(), scale: plan.inverse_deviation, row_scale: 0 };
    let standardized = core.derive::<E>(Source::new(&args.activations), standardize, planes, plan.standardized)?;
    let extents = Extents::symmetric(n, h);
    let gram = View::of(&args.gram);
    let mirror = MirrorEpilogue { out: gram, slots: plan.norm_slots, factor: (1.0 / degrees) as f32, diagonal: 0.0 };
    core.gemm("gram_nt", extents, standardized, standardized, &mirror)?;
    core.sum(plan.norm_slots, extents.tiles(), 1.0, Base::Value(0.0), loss)?;

    let left = core.derive::<f32>(Source { view: gram, rows: n, cols: n }, Affine::default(), planes, plan.gram)?;
    let epilogue = DualEpilogue {
        activations: View::new(&args.activations),
        mean: args.mean.address(),
        inverse_deviation: plan.inverse_deviation,
        gain: plan.gain,
        diagonal: plan.diagonal,
        product: View::of(&args.product),
        slots: plan.slots,
        cols: h as i64,
    };
    core.gemm(E::KERNELS.dual_apply, Extents::full(n, h, n), left, standardized, &epilogue)?;
    let finish = DualFinish {
        variance,
        slots: plan.slots,
        scale: args.scale.address(),
        squares: plan.squares,
        latents: h as i64,
        row_tiles: n.div_ceil(TILE) as i64,
        factor,
        degrees,
    };
    core.each("dual_finish", h, &finish)?;
    core.sum(plan.squares, h, -1.0, Base::Out, loss)
}
