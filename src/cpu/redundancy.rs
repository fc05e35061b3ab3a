//! [`WeightRedundancy`], in both forms: a symmetric product, then G·Ŵ or Ŵ·P added to the gradient by its epilogue.

use super::gemm::{
    Cut, Epilogue, Gemm, Group, MAX_GROUP_ROWS, Tile, symmetric_workspace_len, workspace_len as gemm_len,
};
use super::memory::{Out, Scratch, f32_len};
use super::pack::{Affine, Axis, Operand};
use super::rows;
use super::simd::{Loop, Simd, TILE_VECTORS};
use super::symmetric::{self, Symmetric};
use super::{Core, Cpu, CpuElement};
use crate::error::Result;
use crate::matrix::{MatMut, MatRef};
use crate::operations::WeightRedundancy;

pub(super) fn workspace_len(core: &Core, h: usize, d: usize, dual: bool) -> usize {
    let isa = core.isa;
    let (side, other) = if dual { (d, h) } else { (h, d) };
    h + f32_len(h)
        + symmetric::slots_len(isa, side)
        + h * Cut::cols(isa, d).groups()
        + symmetric_workspace_len(core, side, other).max(gemm_len(core, h, d, side))
}

pub(super) fn weight_redundancy<E: CpuElement>(core: &Core, mut args: WeightRedundancy<'_, Cpu<E>>) -> Result<()> {
    let (h, d) = args.check()?;
    let (isa, w) = (core.isa, args.weight);
    let dual = args.form.is_dual(h, d);
    let side = if dual { d } else { h };
    let mut scratch = Scratch::new(args.workspace, workspace_len(core, h, d, dual))?;
    let (norm, inverse) = (scratch.f64(h), scratch.f32(h));
    let norms = Out::dense(&mut *norm, 1);
    core.threads.for_each(h, h * d, |j| {
        // SAFETY: each row has its own norm.
        let norm = unsafe { norms.part(j, 0..1) };
        core.isa.run(Loop(|| norm[0] = w.row(j).iter().map(|w| w.to_f64() * w.to_f64()).sum::<f64>().sqrt()));
    });
    for (inverse, norm) in inverse.iter_mut().zip(&*norm) {
        *inverse = if args.normalize { (1.0 / (norm + 1e-8)) as f32 } else { 1.0 };
    }
    let unit = Affine { axis: Axis::Row, shift: None, scale: Some(&*inverse) };

    // G = Ŵ Ŵᵀ − I, or P = Ŵᵀ Ŵ.
    let operand = if dual { Operand::cols(w).with(unit) } else { Operand::rows(w).with(unit) };
    let squares = Symmetric { operand, factor: 1.0, diagonal: if dual { 0.0 } else { 1.0 } }.run(
        core,
        Out::new(&mut args.gram),
        scratch.f64(symmetric::slots_len(isa, side)),
        &mut *scratch.rest(symmetric_workspace_len(core, side, operand.depth())),
    );
    let trace: f64 = norm.iter().zip(&*inverse).map(|(norm, inverse)| (norm * f64::from(*inverse)).powi(2)).sum();
    args.loss[0] = if dual { squares - 2.0 * trace + h as f64 } else { squares };

    let Some(mut grad_weight) = args.grad_weight else { return Ok(()) };
    let groups = Cut::cols(isa, d).groups();
    let slots = scratch.f64(h * groups);
    let epilogue = RedundancyEpilogue {
        weight: w,
        inverse,
        less_unit: dual,
        lambda: args.lambda as f32,
        grad_weight: Out::new(&mut grad_weight),
        slots: Out::dense(&mut *slots, groups),
    };
    let square = args.gram.as_ref();
    let workspace = scratch.f64(gemm_len(core, h, d, side));
    if dual {
        let left = Operand::rows(w).with(unit);
        Gemm::new(left, Operand::cols(square)).run(core, workspace, &epilogue);
    } else {
        let right = Operand::cols(w).with(unit);
        Gemm::new(Operand::rows(square), right).run(core, workspace, &epilogue);
    }
    if args.normalize {
        through_norms(core, args.lambda, w, norm, slots, groups, &mut grad_weight);
    }
    Ok(())
}

/// grad_j −= λ W_j (dŴ_j·W_j)/(‖W_j‖ (‖W_j‖ + 1e-8)²): the part of the gradient that goes through the norms.
fn through_norms<E: CpuElement>(
    core: &Core,
    lambda: f64,
    w: MatRef<'_, E>,
    norm: &[f64],
    slots: &[f64],
    groups: usize,
    grad_weight: &mut MatMut<'_, f32>,
) {
    let d = w.cols();
    let grad = Out::new(grad_weight);
    core.threads.for_each(w.rows(), w.rows() * d, |j| {
        if norm[j] == 0.0 {
            return;
        }
        let along: f64 = slots[j * groups..(j + 1) * groups].iter().sum();
        let factor = (lambda * along / (norm[j] * (norm[j] + 1e-8) * (norm[j] + 1e-8))) as f32;
        // SAFETY: each row is one task's.
        let grad = unsafe { grad.part(j, 0..d) };
        core.isa.run(Loop(|| {
            for (grad, w) in grad.iter_mut().zip(w.row(j)) {
                *grad -= factor * w.to_f32();
            }
        }));
    });
}

/// Adds λ·dŴ_j/divisor_j to the gradient and leaves dŴ_j·W_j, in parts, in the slots.
struct RedundancyEpilogue<'a, E: CpuElement> {
    weight: MatRef<'a, E>,
    /// 1/divisor.
    inverse: &'a [f32],
    /// Whether the product still lacks −Ŵ.
    less_unit: bool,
    lambda: f32,
    grad_weight: Out<'a, f32>,
    slots: Out<'a, f64>,
}

impl<E: CpuElement> Epilogue for RedundancyEpilogue<'_, E> {
    type State = [f64; MAX_GROUP_ROWS];

    fn begin(&self, _: &Group) -> Self::State {
        [0.0; MAX_GROUP_ROWS]
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, s: S, along: &mut Self::State, group: &Group, tile: Tile<'_>) {
        for (i, row) in tile.rows.clone().enumerate() {
            let product = rows::load(s, tile.row(i));
            let w = rows::widen(s, &self.weight.row(row)[tile.cols.clone()]);
            // SAFETY: this tile's part of the row.
            let out = unsafe { self.grad_weight.part(row, tile.cols.clone()) };
            let mut grad = rows::load(s, out);
            let inverse = s.splat(self.inverse[row]);
            let mut dot = s.splat(0.0);
            for v in 0..TILE_VECTORS {
                let unit = if self.less_unit { s.mul(w[v], inverse) } else { s.splat(0.0) };
                let grad_unit = s.mul(s.splat(4.0), s.sub(product[v], unit));
                grad[v] = s.fma(s.mul(grad_unit, inverse), s.splat(self.lambda), grad[v]);
                dot = s.fma(grad_unit, w[v], dot);
            }
            rows::store(s, out, grad);
            along[row - group.rows.start] += f64::from(s.horizontal_sum(dot));
        }
    }

    fn end(&self, along: &Self::State, group: &Group) {
        for (row, along) in group.rows.clone().zip(along) {
            // SAFETY: this row's slot for this group of columns is this task's.
            unsafe { self.slots.set(row, group.col_index, *along) };
        }
    }
}
