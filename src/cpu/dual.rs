//! [`CorrelationDual`]: K = ÂÂᵀ/(N−1), then KÂ with P and q in its epilogue. Â is made while packing and never stored.

use super::gemm::{Cut, Epilogue, Gemm, Group, Tile, symmetric_workspace_len, workspace_len as gemm_len};
use super::memory::{Out, Scratch, f32_len};
use super::pack::{Affine, Axis, Operand};
use super::rows::{self, ColumnSums};
use super::simd::{Simd, TILE_VECTORS};
use super::statistics::inverse_of_deviation;
use super::symmetric::{self, Symmetric};
use super::{Core, Cpu, CpuElement};
use crate::error::Result;
use crate::matrix::MatRef;
use crate::operations::CorrelationDual;

pub(super) fn workspace_len(core: &Core, n: usize, h: usize) -> usize {
    let isa = core.isa;
    3 * f32_len(h)
        + 2 * h
        + symmetric::slots_len(isa, n)
        + 2 * Cut::most_row_groups(isa, n) * h
        + symmetric_workspace_len(core, n, h).max(gemm_len(core, n, h, n))
}

pub(super) fn correlation_dual<E: CpuElement>(core: &Core, mut args: CorrelationDual<'_, Cpu<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let isa = core.isa;
    let mut scratch = Scratch::new(args.workspace, workspace_len(core, n, h))?;
    let degrees = n as f64 - 1.0;
    let (inverse_deviation, gain, diagonal) = (scratch.f32(h), scratch.f32(h), scratch.f32(h));
    let (squares, coupled) = (scratch.f64(h), scratch.f64(h));
    let factor = 4.0 * args.lambda_tc / degrees;
    for j in 0..h {
        let v = f64::from(args.variance[j]);
        let inverse = inverse_of_deviation(v);
        inverse_deviation[j] = inverse as f32;
        gain[j] = (factor * inverse) as f32;
        diagonal[j] = (v * inverse * inverse) as f32;
    }
    let standardize = Affine { axis: Axis::Column, shift: Some(args.mean), scale: Some(&*inverse_deviation) };

    let norm = Symmetric {
        operand: Operand::rows(args.activations).with(standardize),
        factor: (1.0 / degrees) as f32,
        diagonal: 0.0,
    }
    .run(
        core,
        Out::new(&mut args.gram),
        scratch.f64(symmetric::slots_len(isa, n)),
        &mut *scratch.rest(symmetric_workspace_len(core, n, h)),
    );

    let slots_len = Cut::rows(isa, n, h).groups() * h;
    let (square_slots, coupled_slots) = (scratch.f64(slots_len), scratch.f64(slots_len));
    let epilogue = DualEpilogue {
        activations: args.activations,
        mean: args.mean,
        inverse_deviation,
        gain,
        diagonal,
        product: Out::new(&mut args.product),
        square_slots: Out::dense(&mut *square_slots, h),
        coupled_slots: Out::dense(&mut *coupled_slots, h),
    };
    let right = Operand::cols(args.activations).with(standardize);
    Gemm::new(Operand::rows(args.gram.as_ref()), right).run(core, scratch.f64(gemm_len(core, n, h, n)), &epilogue);
    rows::fold(square_slots, false, squares);
    rows::fold(coupled_slots, false, coupled);

    args.loss[0] = norm;
    for j in 0..h {
        // All of the rounded numbers that the product was made of, c and 1/√v too: its part along a − μ is large where columns are
        // correlated, and must leave it to the last digit.
        let (inverse, gain) = (f64::from(inverse_deviation[j]), f64::from(gain[j]));
        let c = squares[j] / degrees;
        let (left, taken) = (coupled[j] / degrees, f64::from(diagonal[j]));
        let q = left + (taken - c) * c;
        args.loss[0] -= c * c;
        if inverse != 0.0 {
            // 1/√v = inverse/√c, as c = v·inverse².
            args.scale[j] = (f64::from(args.scale[j]) - gain * inverse * (q / c.sqrt() + (c - taken))) as f32;
        }
    }
    Ok(())
}

/// g·(KÂ − Â·diag(c)), and the column sums of Â² and of Â times what is left of KÂ.
struct DualEpilogue<'a, E: CpuElement> {
    activations: MatRef<'a, E>,
    mean: &'a [f32],
    inverse_deviation: &'a [f32],
    gain: &'a [f32],
    /// c.
    diagonal: &'a [f32],
    product: Out<'a, E>,
    square_slots: Out<'a, f64>,
    coupled_slots: Out<'a, f64>,
}

impl<E: CpuElement> Epilogue for DualEpilogue<'_, E> {
    type State = (ColumnSums, ColumnSums);

    fn begin(&self, _: &Group) -> Self::State {
        (ColumnSums::new(), ColumnSums::new())
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, s: S, state: &mut Self::State, group: &Group, tile: Tile<'_>) {
        let mean = rows::load(s, &self.mean[tile.cols.clone()]);
        let inverse = rows::load(s, &self.inverse_deviation[tile.cols.clone()]);
        let gain = rows::load(s, &self.gain[tile.cols.clone()]);
        let diagonal = rows::load(s, &self.diagonal[tile.cols.clone()]);
        let (mut squares, mut coupled) = (rows::splat(s, 0.0), rows::splat(s, 0.0));
        for (i, row) in tile.rows.clone().enumerate() {
            let mut product = rows::load(s, tile.row(i));
            let a = rows::widen(s, &self.activations.row(row)[tile.cols.clone()]);
            for v in 0..TILE_VECTORS {
                let standardized = s.mul(s.sub(a[v], mean[v]), inverse[v]);
                product[v] = s.sub(product[v], s.mul(standardized, diagonal[v]));
                squares[v] = s.fma(standardized, standardized, squares[v]);
                coupled[v] = s.fma(standardized, product[v], coupled[v]);
                product[v] = s.mul(product[v], gain[v]);
            }
            // SAFETY: this tile's part of the row.
            rows::narrow::<S, E>(s, unsafe { self.product.part(row, tile.cols.clone()) }, product);
        }
        let col = tile.cols.start - group.cols.start;
        state.0.add(s, col, squares);
        state.1.add(s, col, coupled);
    }

    fn end(&self, (squares, coupled): &Self::State, group: &Group) {
        // SAFETY: these columns' slots for this group of rows are this task's.
        unsafe {
            squares.write(&self.square_slots, group.row_index, group.cols.clone());
            coupled.write(&self.coupled_slots, group.row_index, group.cols.clone());
        }
    }
}
