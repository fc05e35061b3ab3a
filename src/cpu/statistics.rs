//! [`Recentre`], [`Comoments`] and [`FinishStatistics`].

use super::gemm::{Cut, Epilogue, Gemm, Group, MAX_GROUP_ROWS, Tile, symmetric_workspace_len};
use super::memory::{Out, Scratch, f32_len};
use super::pack::{Affine, Axis, Operand};
use super::product::{ROWS_AT_A_TIME, Store, row_blocks};
use super::rows::{self, ColumnSums};
use super::simd::{Isa, Loop, MAX_TILE, MAX_TILE_WIDTH, Simd};
use super::{Core, Cpu, CpuElement};
use crate::error::Result;
use crate::matrix::MatRef;
use crate::operations::{Comoments, Covariance, FinishStatistics, PrimalCorrelation, Recentre};

pub(super) fn recentre<E: CpuElement>(core: &Core, args: Recentre<'_, Cpu<E>>) -> Result<()> {
    const BLOCK: usize = 64;
    let (n, h) = args.check()?;
    if n == 0 {
        args.shift.fill(0.0);
        return Ok(());
    }
    let count = n as f64;
    let (shift, sums, squares) = (Out::dense(args.shift, h), Out::dense(args.sum, h), Out::dense(args.sum_squares, h));
    // Cheap unless columns are summed again, which is rare: so it is not spread over threads below that size.
    core.threads.for_each(h.div_ceil(BLOCK), n * h, |block| {
        let cols = block * BLOCK..h.min((block + 1) * BLOCK);
        // SAFETY: each block of columns is one task's.
        let (shift, sum, square) =
            unsafe { (shift.part(0, cols.clone()), sums.part(0, cols.clone()), squares.part(0, cols.clone())) };
        let mut far = [false; BLOCK];
        for j in 0..cols.len() {
            let mean = sum[j] / count;
            shift[j] = mean as f32;
            let centre = f64::from(shift[j]);
            // About the exact mean; clamped, for rounding may take it below 0.
            let about_mean = (square[j] - sum[j] * mean).max(0.0);
            far[j] = mean * mean * count > Recentre::<Cpu<E>>::LIMIT * about_mean && mean != 0.0;
            sum[j] -= count * centre;
            square[j] = about_mean + count * (mean - centre) * (mean - centre);
        }
        if !far.contains(&true) {
            return;
        }
        let (mut sum_again, mut square_again) = ([0.0f64; BLOCK], [0.0f64; BLOCK]);
        core.isa.run(Loop(|| {
            for row in 0..n {
                let sums = sum_again.iter_mut().zip(&mut square_again).zip(&*shift);
                for (a, ((sum, square), shift)) in args.activations.row(row)[cols.clone()].iter().zip(sums) {
                    let centred = f64::from(a.to_f32()) - f64::from(*shift);
                    *sum += centred;
                    *square += centred * centred;
                }
            }
        }));
        for j in (0..cols.len()).filter(|j| far[*j]) {
            (sum[j], square[j]) = (sum_again[j], square_again[j]);
        }
    });
    Ok(())
}

pub(super) fn comoments_workspace_len(core: &Core, n: usize, h: usize) -> usize {
    symmetric_workspace_len(core, h, n.min(ROWS_AT_A_TIME))
}

pub(super) fn comoments<E: CpuElement>(core: &Core, mut args: Comoments<'_, Cpu<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let len = comoments_workspace_len(core, n, h);
    let workspace = Scratch::new(args.workspace, len)?.f64(len);
    let out = Out::new(&mut args.comoments);
    for (index, range) in row_blocks(n).enumerate() {
        let epilogue = Store { out, accumulate: args.accumulate || index > 0, upper: true };
        centred(args.activations.rows_range(range), args.shift).run(core, workspace, &epilogue);
    }
    Ok(())
}

/// Σ_n (a − c)(a − c)ᵀ.
fn centred<'a, E: CpuElement>(activations: MatRef<'a, E>, shift: &'a [f32]) -> Gemm<'a, E, E> {
    let affine = Affine { axis: Axis::Column, shift: Some(shift), scale: None };
    Gemm::symmetric(Operand::cols(activations).with(affine))
}

/// Rows of slots: one for each group of rows of a symmetric product, one for each group of its columns.
fn slot_rows(isa: Isa, h: usize) -> (usize, usize) {
    (Cut::most_row_groups(isa, h), Cut::cols(isa, h).groups())
}

/// With a primal correlation from the activations of up to so many rows, or without one.
pub(super) fn finish_workspace_len(core: &Core, primal: Option<usize>, h: usize) -> usize {
    let vectors = 2 * h + 3 * f32_len(h);
    let (row_groups, col_groups) = slot_rows(core.isa, h);
    vectors + primal.map_or(0, |n| 2 * (row_groups + col_groups) * h + comoments_workspace_len(core, n, h))
}

/// 1/s of a variance v; 0 for a dead column.
pub(super) fn inverse_of_deviation(v: f64) -> f64 {
    if v == 0.0 { 0.0 } else { 1.0 / (v.sqrt() + 1e-8) }
}

pub(super) fn finish_statistics<E: CpuElement>(core: &Core, mut args: FinishStatistics<'_, Cpu<E>>) -> Result<()> {
    let h = args.check()?;
    let rows = match &args.primal {
        Some(PrimalCorrelation { covariance: Covariance::Activations(activations), .. }) => activations.rows(),
        _ => 0,
    };
    let mut scratch = Scratch::new(args.workspace, finish_workspace_len(core, args.primal.as_ref().map(|_| rows), h))?;
    let (n, objective) = (args.count as f64, args.objective);
    let (variance, residue) = (scratch.f64(h), scratch.f64(h));
    let (mean, inverse_deviation, rounded_residue) = (scratch.f32(h), scratch.f32(h), scratch.f32(h));
    args.losses.fill(0.0);
    for j in 0..h {
        let squares = match &args.primal {
            Some(PrimalCorrelation { covariance: Covariance::InPlace, coupling, .. }) => {
                f64::from(coupling.as_ref().row(j)[j])
            }
            _ => args.sum_squares[j],
        };
        let about_shift = args.sum[j] / n;
        let whole = f64::from(args.shift[j]) + about_shift;
        let v = ((squares - args.sum[j] * about_shift) / (n - 1.0)).clamp(0.0, f64::INFINITY);
        variance[j] = v;
        inverse_deviation[j] = inverse_of_deviation(v) as f32;
        mean[j] = about_shift as f32;
        args.mean[j] = whole as f32;
        args.variance[j] = v as f32;
        residue[j] = whole - f64::from(args.mean[j]);
        rounded_residue[j] = residue[j] as f32;
        args.losses[0] -= (v + objective.variance_eps).ln();
        args.scale[j] = (-2.0 * objective.lambda_var / (v + objective.variance_eps) / (n - 1.0)) as f32;
    }
    let Some(primal) = &mut args.primal else { return Ok(()) };
    let (row_groups, col_groups) = slot_rows(core.isa, h);
    let slots_len = (row_groups + col_groups) * h;
    let (q_slots, offset_slots) = (scratch.f64(slots_len), scratch.f64(slots_len));
    // Groups below the diagonal are never computed.
    q_slots.fill(0.0);
    offset_slots.fill(0.0);
    let coupling = Out::new(&mut primal.coupling);
    let mut epilogue = CouplingEpilogue {
        in_place: matches!(primal.covariance, Covariance::InPlace),
        mean,
        inverse_deviation,
        residue: rounded_residue,
        count: n as f32,
        scale: (1.0 / (n - 1.0)) as f32,
        factor: (4.0 * objective.lambda_tc / (n - 1.0)) as f32,
        coupling,
        row_groups,
        q_slots: Out::dense(&mut *q_slots, h),
        offset_slots: Out::dense(&mut *offset_slots, h),
    };
    let workspace = scratch.f64(comoments_workspace_len(core, rows, h));
    match primal.covariance {
        // A product of no rows, to which they are added.
        Covariance::InPlace => centred(MatRef::<E>::new(&[], 0, h)?, args.shift).run(core, workspace, &epilogue),
        Covariance::Activations(activations) => {
            let blocks = row_blocks(rows).count();
            for (index, range) in row_blocks(rows).enumerate() {
                let product = centred(activations.rows_range(range), args.shift);
                if index + 1 < blocks {
                    product.run(core, workspace, &Store { out: coupling, accumulate: index > 0, upper: true });
                    epilogue.in_place = true;
                } else {
                    product.run(core, workspace, &epilogue);
                }
            }
        }
    }
    for j in 0..h {
        let column = |slots: &[f64]| slots[j..].iter().step_by(h).sum::<f64>();
        let q = column(q_slots);
        args.losses[1] += q;
        // The term with 1/√v of d; the other is there already.
        if variance[j] != 0.0 {
            let term = 4.0 * objective.lambda_tc * q * inverse_of_deviation(variance[j]) / variance[j].sqrt();
            let other = 2.0 * objective.lambda_var / (variance[j] + objective.variance_eps);
            args.scale[j] = (-(term + other) / (n - 1.0)) as f32;
        }
        primal.offset[j] = (column(offset_slots) + f64::from(args.scale[j]) * residue[j]) as f32;
    }
    Ok(())
}

/// Comoments to M while they are in L1: each pair of latents is visited once, its M written twice, its C² added to both latents' q.
struct CouplingEpilogue<'a> {
    /// Whether comoments of rows that are not in the product stand above the diagonal of what becomes M.
    in_place: bool,
    /// Mean of a − c.
    mean: &'a [f32],
    /// 1/s, 0 for a dead column: it has correlation 0 whatever rounding left in the comoment.
    inverse_deviation: &'a [f32],
    /// μ less its rounded value.
    residue: &'a [f32],
    /// N.
    count: f32,
    /// 1/(N−1).
    scale: f32,
    /// 4 λ_tc/(N−1).
    factor: f32,
    coupling: Out<'a, f32>,
    row_groups: usize,
    /// What each group of rows, then each group of columns, adds to the latents' q.
    q_slots: Out<'a, f64>,
    /// The same for M(μ − mean).
    offset_slots: Out<'a, f64>,
}

struct CouplingState {
    q_rows: [f64; MAX_GROUP_ROWS],
    offset_rows: [f64; MAX_GROUP_ROWS],
    q_cols: ColumnSums,
    offset_cols: ColumnSums,
}

impl Epilogue for CouplingEpilogue<'_> {
    type State = CouplingState;

    fn begin(&self, _: &Group) -> CouplingState {
        CouplingState {
            q_rows: [0.0; MAX_GROUP_ROWS],
            offset_rows: [0.0; MAX_GROUP_ROWS],
            q_cols: ColumnSums::new(),
            offset_cols: ColumnSums::new(),
        }
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, s: S, state: &mut CouplingState, group: &Group, tile: Tile<'_>) {
        let (rows, cols) = (tile.rows.clone(), tile.cols.clone());
        let width = cols.len();
        let vector = |of: &[f32]| rows::load(s, &of[cols.clone()]);
        let (mean_j, inverse_j, residue_j) = (vector(self.mean), vector(self.inverse_deviation), vector(self.residue));
        let zero = s.splat(0.0);
        let (mut q_cols, mut offset_cols) = ([zero; 2], [zero; 2]);
        let mut m = [0.0f32; MAX_TILE];
        for (i, (row, m)) in rows.clone().zip(m.chunks_exact_mut(MAX_TILE_WIDTH)).enumerate() {
            // Columns of the tile on or below the diagonal.
            let below = (row + 1).saturating_sub(cols.start).min(width);
            let mut sums = rows::load(s, &tile.row(i)[..width]);
            if self.in_place {
                // SAFETY: the elements of a pair of latents are this tile's, on both sides of the diagonal, and written only below.
                let before = unsafe { &*self.coupling.part(row, cols.start + below..cols.end) };
                let mut whole = [0.0; MAX_TILE_WIDTH];
                whole[below..width].copy_from_slice(before);
                let before = rows::load(s, &whole[..width]);
                sums = [s.add(sums[0], before[0]), s.add(sums[1], before[1])];
            }
            let (about_shift, inverse) = (s.splat(-self.count * self.mean[row]), self.inverse_deviation[row]);
            let (scale, factor) = (s.splat(inverse * self.scale), s.splat(inverse * self.factor));
            let residue = s.splat(self.residue[row]);
            let (mut q, mut offset) = (zero, zero);
            for v in 0..2 {
                let comoment = s.fma(about_shift, mean_j[v], sums[v]);
                let c = s.mul(s.mul(comoment, scale), inverse_j[v]);
                // By a select, not a factor: what is not finite must not get through.
                let c = s.first_lanes(width.saturating_sub(v * S::LANES), c, zero);
                let c = s.first_lanes(below.saturating_sub(v * S::LANES), zero, c);
                let value = s.mul(s.mul(c, factor), inverse_j[v]);
                q = s.fma(c, c, q);
                q_cols[v] = s.fma(c, c, q_cols[v]);
                offset = s.fma(value, residue_j[v], offset);
                offset_cols[v] = s.fma(value, residue, offset_cols[v]);
                s.store(&mut m[v * S::LANES..], value);
            }
            state.q_rows[row - group.rows.start] += f64::from(s.horizontal_sum(q));
            state.offset_rows[row - group.rows.start] += f64::from(s.horizontal_sum(offset));
            // SAFETY: as above.
            unsafe {
                self.coupling.part(row, cols.start + below..cols.end).copy_from_slice(&m[below..width]);
                if cols.contains(&row) {
                    self.coupling.set(row, row, 0.0);
                }
            }
        }
        for (at, col) in cols.clone().enumerate() {
            // SAFETY: as above.
            let mirrored = unsafe { self.coupling.part(col, rows.start..rows.end.min(col).max(rows.start)) };
            for (out, m) in mirrored.iter_mut().zip(m.chunks_exact(MAX_TILE_WIDTH)) {
                *out = m[at];
            }
        }
        let col = cols.start - group.cols.start;
        state.q_cols.add(s, col, q_cols);
        state.offset_cols.add(s, col, offset_cols);
    }

    fn end(&self, state: &CouplingState, group: &Group) {
        let rows = group.rows.clone();
        // SAFETY: a group's columns have the group of rows' row of slots to themselves, and its rows that of the group of columns.
        unsafe {
            state.q_cols.write(&self.q_slots, group.row_index, group.cols.clone());
            state.offset_cols.write(&self.offset_slots, group.row_index, group.cols.clone());
            let row = self.row_groups + group.col_index;
            self.q_slots.part(row, rows.clone()).copy_from_slice(&state.q_rows[..rows.len()]);
            self.offset_slots.part(row, rows.clone()).copy_from_slice(&state.offset_rows[..rows.len()]);
        }
    }
}
