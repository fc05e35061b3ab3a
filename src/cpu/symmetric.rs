//! A symmetric product: one triangle computed, both written, with the sum of squares of all.

use super::gemm::{Cut, Epilogue, Gemm, Group, Tile};
use super::memory::Out;
use super::pack::Operand;
use super::simd::{Isa, Simd};
use super::{Core, CpuElement};

/// `out` = factor·operand·operandᵀ − diagonal·I.
pub(super) struct Symmetric<'a, E: CpuElement> {
    pub operand: Operand<'a, E>,
    pub factor: f32,
    pub diagonal: f32,
}

/// Slots for the partial sums of squares.
pub(super) fn slots_len(isa: Isa, side: usize) -> usize {
    Cut::most_row_groups(isa, side) * Cut::cols(isa, side).groups()
}

impl<E: CpuElement> Symmetric<'_, E> {
    /// Writes `out` and returns ‖out‖²; `slots` has [`slots_len`] elements, `workspace` what the product takes.
    pub(super) fn run(&self, core: &Core, out: Out<'_, f32>, slots: &mut [f64], workspace: &mut [f64]) -> f64 {
        // Groups below the diagonal are never computed.
        slots.fill(0.0);
        let cols = Cut::cols(core.isa, self.operand.len()).groups();
        let epilogue =
            Mirror { out, factor: self.factor, diagonal: self.diagonal, slots: Out::dense(&mut *slots, cols) };
        Gemm::symmetric(self.operand).run(core, workspace, &epilogue);
        slots.iter().sum()
    }
}

struct Mirror<'a> {
    out: Out<'a, f32>,
    factor: f32,
    diagonal: f32,
    slots: Out<'a, f64>,
}

impl Epilogue for Mirror<'_> {
    type State = f64;

    fn begin(&self, _: &Group) -> f64 {
        0.0
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, _: S, squares: &mut f64, _: &Group, tile: Tile<'_>) {
        for (i, row) in tile.rows.clone().enumerate() {
            let first = tile.cols.start.max(row);
            if first >= tile.cols.end {
                continue;
            }
            let sums = &tile.row(i)[first - tile.cols.start..tile.cols.len()];
            // SAFETY: (row, col) with row ≤ col is this tile's, and so is its mirror image.
            let out = unsafe { self.out.part(row, first..tile.cols.end) };
            let mut off_diagonal = 0.0;
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum * self.factor;
                off_diagonal += f64::from(*out) * f64::from(*out);
            }
            if first == row {
                off_diagonal -= f64::from(out[0]) * f64::from(out[0]);
                out[0] -= self.diagonal;
                *squares += f64::from(out[0]) * f64::from(out[0]);
            }
            *squares += 2.0 * off_diagonal;
            for (col, value) in (first..tile.cols.end).zip(&*out) {
                if col > row {
                    // SAFETY: as above.
                    unsafe { self.out.set(col, row, *value) };
                }
            }
        }
    }

    fn end(&self, squares: &f64, group: &Group) {
        // SAFETY: this group's slot.
        unsafe { self.slots.set(group.row_index, group.col_index, *squares) };
    }
}
