//! [`Recentre`], [`Comoments`] and [`FinishStatistics`].

use super::gemm::{Gemm, symmetric_workspace_len};
use super::memory::{Out, Scratch};
use super::pack::{Affine, Axis, Operand};
use super::product::{ROWS_AT_A_TIME, Store, row_blocks};
use super::simd::Loop;
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
        for row in 0..n {
            for (j, a) in args.activations.row(row)[cols.clone()].iter().enumerate() {
                let centred = f64::from(a.to_f32()) - f64::from(shift[j]);
                sum_again[j] += centred;
                square_again[j] += centred * centred;
            }
        }
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
    add_comoments(core, args.activations, args.shift, args.accumulate, out, workspace);
    Ok(())
}

fn add_comoments<E: CpuElement>(
    core: &Core,
    activations: MatRef<'_, E>,
    shift: &[f32],
    accumulate: bool,
    out: Out<'_, f32>,
    workspace: &mut [f64],
) {
    let centre = Affine { axis: Axis::Column, shift: Some(shift), scale: None };
    for (index, range) in row_blocks(activations.rows()).enumerate() {
        let operand = Operand::cols(activations.rows_range(range)).with(centre);
        let epilogue = Store { out, accumulate: accumulate || index > 0, upper: true };
        Gemm::symmetric(operand).run(core, workspace, &epilogue);
    }
}

/// Side of the blocks in which the correlation matrix is finished.
const SIDE: usize = 64;

/// For batches of up to `n` rows.
pub(super) fn finish_workspace_len(core: &Core, n: usize, h: usize) -> usize {
    3 * h + 2 * h.div_ceil(SIDE) * h + comoments_workspace_len(core, n, h)
}

/// 1/s of a variance v; 0 for a dead column.
pub(super) fn inverse_of_deviation(v: f64) -> f64 {
    if v == 0.0 { 0.0 } else { 1.0 / (v.sqrt() + 1e-8) }
}

pub(super) fn finish_statistics<E: CpuElement>(core: &Core, mut args: FinishStatistics<'_, Cpu<E>>) -> Result<()> {
    let h = args.check()?;
    let block = match &args.primal {
        Some(PrimalCorrelation { covariance: Covariance::Activations(activations), .. }) => Some(*activations),
        _ => None,
    };
    let rows = block.map_or(0, |activations| activations.rows());
    let mut scratch = Scratch::new(args.workspace, finish_workspace_len(core, rows, h))?;
    let (n, objective) = (args.count as f64, args.objective);
    let (variance, inverse_deviation, residue) = (scratch.f64(h), scratch.f64(h), scratch.f64(h));
    args.losses.fill(0.0);
    if let (Some(primal), Some(activations)) = (&mut args.primal, block) {
        // The comoments stand where M will.
        let workspace = scratch.f64(comoments_workspace_len(core, rows, h));
        add_comoments(core, activations, args.shift, false, Out::new(&mut primal.coupling), workspace);
    }
    for j in 0..h {
        let squares = match &mut args.primal {
            Some(PrimalCorrelation { covariance: Covariance::Comoments(comoments), .. }) => {
                f64::from(comoments.row(j)[j])
            }
            Some(primal) => f64::from(primal.coupling.row_mut(j)[j]),
            None => args.sum_squares[j],
        };
        let mean = f64::from(args.shift[j]) + args.sum[j] / n;
        let v = ((squares - args.sum[j] * args.sum[j] / n) / (n - 1.0)).clamp(0.0, f64::INFINITY);
        variance[j] = v;
        inverse_deviation[j] = inverse_of_deviation(v);
        args.mean[j] = mean as f32;
        args.variance[j] = v as f32;
        residue[j] = mean - f64::from(args.mean[j]);
        args.losses[0] -= (v + objective.variance_eps).ln();
        args.scale[j] = (-2.0 * objective.lambda_var / (v + objective.variance_eps) / (n - 1.0)) as f32;
    }
    let Some(primal) = &mut args.primal else { return Ok(()) };
    let slots_len = h.div_ceil(SIDE) * h;
    let (q_slots, offset_slots) = (scratch.f64(slots_len), scratch.f64(slots_len));
    let coupling = Coupling {
        comoments: match primal.covariance {
            Covariance::Comoments(comoments) => Some(comoments),
            Covariance::Activations(_) => None,
        },
        sum: args.sum,
        count: n,
        inverse_deviation,
        residue,
        factor: 4.0 * objective.lambda_tc / (n - 1.0),
        coupling: Out::new(&mut primal.coupling),
        q_slots: Out::dense(&mut *q_slots, h),
        offset_slots: Out::dense(&mut *offset_slots, h),
    };
    // Pairs of blocks (i, j) with i ≤ j.
    let blocks = h.div_ceil(SIDE);
    core.threads.for_each(blocks * blocks, h * h * 4, |pair| {
        let (i, j) = (pair / blocks, pair % blocks);
        if i <= j {
            core.isa.run(Loop(|| coupling.block(i, j)));
        }
    });
    for j in 0..h {
        let column = |slots: &[f64]| slots[j..].iter().step_by(h).sum::<f64>();
        let q = column(q_slots);
        args.losses[1] += q;
        // The term with 1/√v of d; the other is there already.
        if variance[j] != 0.0 {
            let term = 4.0 * objective.lambda_tc * q * inverse_deviation[j] / variance[j].sqrt();
            let other = 2.0 * objective.lambda_var / (variance[j] + objective.variance_eps);
            args.scale[j] = (-(term + other) / (n - 1.0)) as f32;
        }
        primal.offset[j] = (column(offset_slots) + f64::from(args.scale[j]) * residue[j]) as f32;
    }
    Ok(())
}

/// Comoments to M, block by block: each pair of latents is visited once, its M written twice, its C² added to both columns' q.
struct Coupling<'a> {
    /// None if they stand in `coupling`.
    comoments: Option<MatRef<'a, f32>>,
    /// Σ(a − c).
    sum: &'a [f64],
    count: f64,
    /// 1/s, 0 for a dead column.
    inverse_deviation: &'a [f64],
    /// μ less its rounded value.
    residue: &'a [f64],
    /// 4 λ_tc/(N−1).
    factor: f64,
    coupling: Out<'a, f32>,
    /// Row b holds what the pairs with block b add to each column's q.
    q_slots: Out<'a, f64>,
    /// The same for M(μ − mean).
    offset_slots: Out<'a, f64>,
}

impl Coupling<'_> {
    #[inline(always)]
    fn block(&self, block_i: usize, block_j: usize) {
        let h = self.sum.len();
        let range = |block: usize| block * SIDE..h.min((block + 1) * SIDE);
        let (rows, cols) = (range(block_i), range(block_j));
        let width = cols.len();
        let (mut q_i, mut q_j) = ([0.0; SIDE], [0.0; SIDE]);
        let (mut offset_i, mut offset_j) = ([0.0; SIDE], [0.0; SIDE]);
        let mut m = [[0.0f32; SIDE]; SIDE];
        let sum_j = &self.sum[cols.clone()];
        let inverse_j = &self.inverse_deviation[cols.clone()];
        let residue_j = &self.residue[cols.clone()];
        for (row, i) in rows.clone().enumerate() {
            let comoments = match &self.comoments {
                Some(comoments) => &comoments.row(i)[cols.clone()],
                // SAFETY: the elements of a pair of blocks are this task's, and written only below.
                None => unsafe { self.coupling.part(i, cols.clone()) },
            };
            let (mean_i, inverse_i) = (self.sum[i] / self.count, self.inverse_deviation[i]);
            let scale = inverse_i / (self.count - 1.0);
            // On the diagonal block only j > i.
            let first = if block_i == block_j { row + 1 } else { 0 };
            for j in first..width {
                // A dead column has correlation 0 whatever rounding left in the comoment.
                let c = (f64::from(comoments[j]) - mean_i * sum_j[j]) * scale * inverse_j[j];
                let value = self.factor * c * inverse_i * inverse_j[j];
                m[row][j] = value as f32;
                q_i[row] += c * c;
                q_j[j] += c * c;
                offset_i[row] += value * residue_j[j];
                offset_j[j] += value * self.residue[i];
            }
        }
        for (row, i) in rows.clone().enumerate() {
            let first = if block_i == block_j { row + 1 } else { 0 };
            // SAFETY: the elements of a pair of blocks are this task's, on both sides of the diagonal.
            unsafe {
                self.coupling.part(i, cols.start + first..cols.end).copy_from_slice(&m[row][first..width]);
                if block_i == block_j {
                    self.coupling.set(i, i, 0.0);
                }
            }
        }
        for (col, j) in cols.clone().enumerate() {
            let last = if block_i == block_j { col } else { rows.len() };
            // SAFETY: as above.
            let mirrored = unsafe { self.coupling.part(j, rows.start..rows.start + last) };
            for (out, m) in mirrored.iter_mut().zip(&m) {
                *out = m[col];
            }
        }
        if block_i == block_j {
            for k in 0..SIDE {
                q_i[k] += q_j[k];
                offset_i[k] += offset_j[k];
            }
        }
        // SAFETY: slot row b at block c's columns belongs to the pair {b, c}.
        unsafe {
            self.q_slots.part(block_j, rows.clone()).copy_from_slice(&q_i[..rows.len()]);
            self.offset_slots.part(block_j, rows.clone()).copy_from_slice(&offset_i[..rows.len()]);
            if block_i != block_j {
                self.q_slots.part(block_i, cols.clone()).copy_from_slice(&q_j[..width]);
                self.offset_slots.part(block_i, cols).copy_from_slice(&offset_j[..width]);
            }
        }
    }
}
