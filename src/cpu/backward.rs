//! [`BackwardDz`]: the product (a − μ)·M, or none, with the whole gradient in its epilogue.

use super::gemm::{Cut, Epilogue, Gemm, Group, Pointwise, Source, Tile, workspace_len as gemm_len};
use super::memory::{Out, Scratch};
use super::pack::{Affine, Axis, Operand};
use super::rows::{self, ColumnSums};
use super::simd::{Simd, TILE_VECTORS};
use super::{Core, Cpu, CpuElement, math};
use crate::error::Result;
use crate::matrix::MatRef;
use crate::objective::Activation;
use crate::operations::{BackwardDz, CorrelationTerm};

pub(super) fn workspace_len(core: &Core, n: usize, h: usize, coupled: bool) -> usize {
    Cut::most_row_groups(core.isa, n) * h + if coupled { gemm_len(core, n, h, h) } else { 0 }
}

pub(super) fn backward_dz<E: CpuElement>(core: &Core, mut args: BackwardDz<'_, Cpu<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let coupled = matches!(&args.statistics, Some(s) if matches!(s.correlation, CorrelationTerm::Primal { .. }));
    let gemm = if coupled { gemm_len(core, n, h, h) } else { 0 };
    let slots_len = Cut::rows(core.isa, n, h).groups() * h;
    let mut scratch = Scratch::new(args.workspace, slots_len + gemm)?;
    let slots = scratch.f64(slots_len);
    let dz = Out::new(&mut args.dz);
    let mut epilogue = GradientEpilogue {
        activations: args.activations,
        activation: args.activation,
        lse: (args.row_weight != 0.0).then_some((args.row_loss, args.row_weight as f32)),
        statistics: args.statistics.as_ref().map(|s| (s.mean, s.scale)),
        offset: None,
        l1: 0.0,
        dz,
        slots: Out::dense(&mut *slots, h),
    };
    match args.statistics.map(|s| (s.mean, s.correlation)) {
        Some((mean, CorrelationTerm::Primal { coupling, offset })) => {
            epilogue.offset = Some(offset);
            let centre = Affine { axis: Axis::Column, shift: Some(mean), scale: None };
            let left = Operand::rows(args.activations).with(centre);
            Gemm::new(left, Operand::cols(coupling)).run(core, scratch.f64(gemm), &epilogue);
        }
        Some((_, CorrelationTerm::Dual)) => {
            Pointwise { rows: n, cols: h, source: Source::Written(dz) }.run(core, &epilogue);
        }
        Some((_, CorrelationTerm::None)) | None => {
            Pointwise::<E> { rows: n, cols: h, source: Source::Zeros }.run(core, &epilogue);
        }
    }
    rows::fold_f32(slots, args.accumulate, args.grad_bias);
    Ok(())
}

/// dA from the product in the tile, dZ = dA ⊙ f', and its column sums.
pub(super) struct GradientEpilogue<'a, E: CpuElement> {
    pub activations: MatRef<'a, E>,
    pub activation: Activation,
    /// (ℓ, w): adds w·exp(ℓ − a).
    pub lse: Option<(&'a [f32], f32)>,
    /// (μ, d): adds (a − μ)·d.
    pub statistics: Option<(&'a [f32], &'a [f32])>,
    /// Subtracted.
    pub offset: Option<&'a [f32]>,
    /// Adds l1·sign(a).
    pub l1: f32,
    pub dz: Out<'a, E>,
    /// Column sums of each group of rows.
    pub slots: Out<'a, f64>,
}

impl<E: CpuElement> Epilogue for GradientEpilogue<'_, E> {
    type State = ColumnSums;

    fn begin(&self, _: &Group) -> ColumnSums {
        ColumnSums::new()
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, s: S, state: &mut ColumnSums, group: &Group, tile: Tile<'_>) {
        let part = |vector: Option<&[f32]>| match vector {
            Some(vector) => rows::load(s, &vector[tile.cols.clone()]),
            None => rows::splat(s, 0.0),
        };
        let (mean, scale) = (part(self.statistics.map(|s| s.0)), part(self.statistics.map(|s| s.1)));
        let offset = part(self.offset);
        let mut sums = rows::splat(s, 0.0);
        for (i, row) in tile.rows.clone().enumerate() {
            let product = rows::load(s, tile.row(i));
            let a = rows::widen(s, &self.activations.row(row)[tile.cols.clone()]);
            let mut dz = product;
            for v in 0..TILE_VECTORS {
                let mut da = product[v];
                if self.statistics.is_some() {
                    da = s.fma(s.sub(a[v], mean[v]), scale[v], s.sub(da, offset[v]));
                }
                if let Some((loss, weight)) = self.lse {
                    let r = math::exp(s, s.sub(s.splat(loss[row]), a[v]));
                    da = s.fma(s.splat(weight), r, da);
                }
                if self.l1 != 0.0 {
                    da = s.fma(s.splat(self.l1), sign(s, a[v]), da);
                }
                dz[v] = match self.activation {
                    Activation::Relu => s.zero_unless_positive(a[v], da),
                    Activation::Identity => da,
                    Activation::Softplus => {
                        let slope = math::softplus_slope(s, a[v]);
                        s.zero_unless_positive(slope, s.mul(da, slope))
                    }
                };
                sums[v] = s.add(sums[v], dz[v]);
            }
            // SAFETY: this tile's part of the row.
            rows::narrow::<S, E>(s, unsafe { self.dz.part(row, tile.cols.clone()) }, dz);
        }
        state.add(s, tile.cols.start - group.cols.start, sums);
    }

    fn end(&self, state: &ColumnSums, group: &Group) {
        // SAFETY: these columns' slots for this group of rows are this task's.
        unsafe { state.write(&self.slots, group.row_index, group.cols.clone()) };
    }
}

/// −1, 0, 1 or NaN: grown beyond 1 whatever it was, then cut off.
#[inline(always)]
fn sign<S: Simd>(s: S, x: S::Vector) -> S::Vector {
    let grown = s.mul(s.mul(x, s.splat(1e38)), s.splat(1e38));
    s.max(s.splat(-1.0), s.min(s.splat(1.0), grown))
}
