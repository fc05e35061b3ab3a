//! [`Encode`]: the encoder's product with bias, activation, row log-sum-exp and column moments in its epilogue; [`ActivationSums`]: that
//! epilogue without the product.
//!
//! A row's log-sum-exp is kept as (m, s) with Σ exp(−a) = s·exp(−m), m the least a so far, s a vector of partial sums: a lower a lowers m,
//! which rescales s, mostly in the row's first tile alone. m is kept finite, so that infinite a need no case of their own. Each group of
//! columns leaves one (m, s) a row, and each group of rows one sum a column; they are folded in order.

use super::gemm::{Cut, Epilogue, Gemm, Group, MAX_GROUP_ROWS, Pointwise, Source, Tile, workspace_len as gemm_len};
use super::memory::{Out, Scratch, f32_len};
use super::pack::Operand;
use super::rows::{self, ColumnSums};
use super::simd::{MAX_LANES, Simd, TILE_VECTORS, Task};
use super::{Core, Cpu, CpuElement, math};
use crate::error::Result;
use crate::matrix::MatRef;
use crate::objective::Activation;
use crate::operations::{ActivationSums, Encode, Moments, Responsibilities};
use std::ops::Range;

pub(super) fn workspace_len(core: &Core, n: usize, d: usize, h: usize) -> usize {
    sums_workspace_len(core, n, h) + gemm_len(core, n, h, d)
}

pub(super) fn sums_workspace_len(core: &Core, n: usize, h: usize) -> usize {
    // The number of groups of rows does not grow with the rows; the most that there may be does.
    row_slots_len(core, n, h) + 2 * Cut::most_row_groups(core.isa, n) * h
}

/// Rows whose losses are finished, and summed, together.
const ROWS: usize = 256;

/// Elements of the workspace for the (m, s) of the rows, and for the sums of their losses.
fn row_slots_len(core: &Core, n: usize, h: usize) -> usize {
    f32_len(2 * Cut::cols(core.isa, h).groups() * n) + n.div_ceil(ROWS)
}

pub(super) fn encode<E: CpuElement>(core: &Core, mut args: Encode<'_, Cpu<E>>) -> Result<()> {
    let (n, d, h) = args.check()?;
    let mut scratch = Scratch::new(args.workspace, workspace_len(core, n, d, h))?;
    let mut slots = Slots::take(core, &mut scratch, n, h);
    let epilogue = EncodeEpilogue {
        bias: Some(args.bias),
        activation: args.activation,
        activations: args.activations.as_mut().map(Out::new),
        ..slots.epilogue(args.row_loss.is_some(), args.moments.as_ref())
    };
    Gemm::new(Operand::rows(args.x), Operand::rows(args.weight)).run(
        core,
        scratch.f64(gemm_len(core, n, h, d)),
        &epilogue,
    );
    slots.finish(core, args.row_loss, args.moments);
    Ok(())
}

/// The same epilogue on tiles that are read instead of computed.
pub(super) fn activation_sums<E: CpuElement>(core: &Core, args: ActivationSums<'_, Cpu<E>>) -> Result<()> {
    let (n, h) = args.check()?;
    let mut scratch = Scratch::new(args.workspace, Slots::len(core, n, h))?;
    let mut slots = Slots::take(core, &mut scratch, n, h);
    let epilogue = slots.epilogue(args.row_loss.is_some(), args.moments.as_ref());
    Pointwise { rows: n, cols: h, source: Source::Given(args.activations) }.run(core, &epilogue);
    slots.finish(core, args.row_loss, args.moments);
    Ok(())
}

/// What groups of tiles leave for rows and columns.
struct Slots<'a> {
    /// For each group of columns, the rows' m, then their s.
    rows: &'a mut [f32],
    /// Sums of the losses of each block of rows.
    losses: &'a mut [f64],
    sums: &'a mut [f64],
    squares: &'a mut [f64],
    batch: usize,
    latents: usize,
}

impl<'a> Slots<'a> {
    fn len(core: &Core, n: usize, h: usize) -> usize {
        row_slots_len(core, n, h) + 2 * Cut::rows(core.isa, n, h).groups() * h
    }
    fn take(core: &Core, scratch: &mut Scratch<'a>, n: usize, h: usize) -> Self {
        let cols = Cut::rows(core.isa, n, h).groups() * h;
        Self {
            rows: scratch.f32(2 * Cut::cols(core.isa, h).groups() * n),
            losses: scratch.f64(n.div_ceil(ROWS)),
            sums: scratch.f64(cols),
            squares: scratch.f64(cols),
            batch: n,
            latents: h,
        }
    }

    /// The epilogue that fills what is wanted, of tiles that are activations already.
    fn epilogue<'b, E: CpuElement>(
        &'b mut self,
        row_loss: bool,
        moments: Option<&'b Moments<'_, Cpu<E>>>,
    ) -> EncodeEpilogue<'b, E> {
        EncodeEpilogue {
            bias: None,
            activation: Activation::Identity,
            activations: None,
            row_slots: (row_loss || moments.is_some()).then(|| Out::dense(&mut *self.rows, self.batch)),
            column_slots: moments.map(|moments| ColumnSlots {
                shift: moments.shift,
                sum: Out::dense(&mut *self.sums, self.latents),
                squares: Out::dense(&mut *self.squares, self.latents),
            }),
        }
    }

    /// Folds what the epilogue left.
    fn finish<E: CpuElement>(self, core: &Core, row_loss: Option<&mut [f32]>, moments: Option<Moments<'_, Cpu<E>>>) {
        if row_loss.is_none() && moments.is_none() {
            return;
        }
        finish_rows(core, self.rows, self.batch, self.losses, row_loss);
        if let Some(moments) = moments {
            let before = if moments.accumulate { moments.row_loss_sum[0] } else { 0.0 };
            moments.row_loss_sum[0] = before + self.losses.iter().sum::<f64>();
            rows::fold(self.sums, moments.accumulate, moments.sum);
            rows::fold(self.squares, moments.accumulate, moments.sum_squares);
        }
    }
}

/// Folds each row's (m, s) into ℓ = m − log s, and adds up the losses of each block of rows.
fn finish_rows(core: &Core, slots: &[f32], n: usize, loss_slots: &mut [f64], row_loss: Option<&mut [f32]>) {
    let loss_slots = Out::dense(loss_slots, 1);
    let row_loss = row_loss.map(|row_loss| Out::dense(row_loss, n));
    core.threads.for_each(n.div_ceil(ROWS), slots.len() * 8, |block| {
        let rows = block * ROWS..n.min((block + 1) * ROWS);
        // SAFETY: each row belongs to one block.
        let row_loss = row_loss.as_ref().map(|row_loss| unsafe { row_loss.part(0, rows.clone()) });
        let sum = core.isa.run(RowLosses { slots, n, rows, row_loss });
        // SAFETY: this block's slot.
        unsafe { loss_slots.set(block, 0, sum) };
    });
}

struct RowLosses<'a> {
    slots: &'a [f32],
    n: usize,
    rows: Range<usize>,
    row_loss: Option<&'a mut [f32]>,
}

impl Task for RowLosses<'_> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        let groups = self.slots.len() / (2 * self.n);
        let mut row_loss = self.row_loss;
        let mut total = 0.0;
        for start in self.rows.clone().step_by(S::LANES) {
            let rows = start..self.rows.end.min(start + S::LANES);
            let slot = |group: usize, which: usize| {
                s.load(&self.slots[(2 * group + which) * self.n..][..self.n][rows.clone()])
            };
            let least = (0..groups).fold(s.splat(f32::MAX), |least, group| s.min(least, slot(group, 0)));
            // Many groups' sums lose nothing to their number: what rounding cut off is added to the next.
            let (mut sum, mut lost) = (s.splat(0.0), s.splat(0.0));
            for group in 0..groups {
                let term = s.mul(slot(group, 1), math::exp(s, s.sub(least, slot(group, 0))));
                let term = s.sub(term, lost);
                let larger = s.add(sum, term);
                // An infinite sum has lost nothing.
                lost = s.where_less(larger, s.splat(f32::INFINITY), s.sub(s.sub(larger, sum), term), s.splat(0.0));
                sum = larger;
            }
            let (mut m, mut log) = ([0.0f32; MAX_LANES], [0.0f32; MAX_LANES]);
            s.store(&mut m, least);
            s.store(&mut log, math::ln(s, sum));
            for (i, row) in rows.enumerate() {
                let loss = f64::from(m[i]) - f64::from(log[i]);
                total += loss;
                if let Some(row_loss) = &mut row_loss {
                    row_loss[row - self.rows.start] = loss as f32;
                }
            }
        }
        total
    }
}

struct EncodeEpilogue<'a, E> {
    /// Added to the tile, if given.
    bias: Option<&'a [f32]>,
    activation: Activation,
    activations: Option<Out<'a, E>>,
    /// For each group of columns, the rows' m, then their s.
    row_slots: Option<Out<'a, f32>>,
    column_slots: Option<ColumnSlots<'a>>,
}

struct ColumnSlots<'a> {
    shift: Option<&'a [f32]>,
    sum: Out<'a, f64>,
    squares: Out<'a, f64>,
}

struct EncodeState {
    least: [f32; MAX_GROUP_ROWS],
    exp_sum: [[f32; MAX_LANES]; MAX_GROUP_ROWS],
    sum: ColumnSums,
    squares: ColumnSums,
}

impl<E: CpuElement> Epilogue for EncodeEpilogue<'_, E> {
    type State = EncodeState;

    fn begin(&self, _: &Group) -> EncodeState {
        EncodeState {
            least: [f32::MAX; MAX_GROUP_ROWS],
            exp_sum: [[0.0; MAX_LANES]; MAX_GROUP_ROWS],
            sum: ColumnSums::new(),
            squares: ColumnSums::new(),
        }
    }

    #[inline(always)]
    fn tile<S: Simd>(&self, s: S, state: &mut EncodeState, group: &Group, tile: Tile<'_>) {
        let cols = tile.cols.len();
        let bias = match self.bias {
            Some(bias) => rows::load(s, &bias[tile.cols.clone()]),
            None => rows::splat(s, 0.0),
        };
        let shift = match &self.column_slots {
            Some(ColumnSlots { shift: Some(shift), .. }) => rows::load(s, &shift[tile.cols.clone()]),
            _ => rows::splat(s, 0.0),
        };
        let (mut sums, mut squares) = (rows::splat(s, 0.0), rows::splat(s, 0.0));
        for (i, row) in tile.rows.clone().enumerate() {
            let z = rows::load(s, tile.row(i));
            let mut a = [s.add(z[0], bias[0]), s.add(z[1], bias[1])];
            for a in &mut a {
                *a = match self.activation {
                    Activation::Relu => s.max(s.splat(0.0), *a),
                    Activation::Identity => *a,
                    Activation::Softplus => math::softplus(s, *a),
                };
            }
            a = match &self.activations {
                // SAFETY: this tile's part of the row.
                Some(out) => rows::narrow::<S, E>(s, unsafe { out.part(row, tile.cols.clone()) }, a),
                None => rows::round::<S, E>(s, a, cols),
            };
            if self.column_slots.is_some() {
                for v in 0..TILE_VECTORS {
                    let centred = s.sub(a[v], shift[v]);
                    sums[v] = s.add(sums[v], centred);
                    squares[v] = s.fma(centred, centred, squares[v]);
                }
            }
            if self.row_slots.is_some() {
                let infinity = s.splat(f32::INFINITY);
                let a =
                    [s.first_lanes(cols, a[0], infinity), s.first_lanes(cols.saturating_sub(S::LANES), a[1], infinity)];
                let at = row - group.rows.start;
                let (least, lowest) = (&mut state.least[at], s.min(a[0], a[1]));
                let sums = &mut state.exp_sum[at][..S::LANES];
                let mut sum = s.load(sums);
                if s.any_less(lowest, s.splat(*least)) {
                    let before = *least;
                    *least = before.min(s.horizontal_min(lowest)).max(-f32::MAX);
                    sum = s.mul(sum, math::exp(s, s.splat(*least - before)));
                }
                let least = s.splat(*least);
                let e = s.add(math::exp(s, s.sub(least, a[0])), math::exp(s, s.sub(least, a[1])));
                s.store(sums, s.add(sum, e));
            }
        }
        let col = tile.cols.start - group.cols.start;
        if self.column_slots.is_some() {
            state.sum.add(s, col, sums);
            state.squares.add(s, col, squares);
        }
    }

    fn end(&self, state: &EncodeState, group: &Group) {
        if let Some(slots) = &self.row_slots {
            // SAFETY: these rows' slots for this group of columns are this task's.
            let (least, sum) = unsafe {
                (
                    slots.part(2 * group.col_index, group.rows.clone()),
                    slots.part(2 * group.col_index + 1, group.rows.clone()),
                )
            };
            least.copy_from_slice(&state.least[..group.rows.len()]);
            for (sum, lanes) in sum.iter_mut().zip(&state.exp_sum) {
                *sum = lanes.iter().map(|lane| f64::from(*lane)).sum::<f64>() as f32;
            }
        }
        if let Some(slots) = &self.column_slots {
            // SAFETY: these columns' slots for this group of rows are this task's.
            unsafe {
                state.sum.write(&slots.sum, group.row_index, group.cols.clone());
                state.squares.write(&slots.squares, group.row_index, group.cols.clone());
            }
        }
    }
}

pub(super) fn responsibilities<E: CpuElement>(core: &Core, mut args: Responsibilities<'_, Cpu<E>>) -> Result<()> {
    const BLOCK: usize = 16;
    let (n, h) = args.check()?;
    let out = Out::new(&mut args.responsibilities);
    core.threads.for_each(n.div_ceil(BLOCK), n * h * 16, |block| {
        for row in block * BLOCK..n.min((block + 1) * BLOCK) {
            // SAFETY: each row belongs to one block.
            let out = unsafe { out.part(row, 0..h) };
            core.isa.run(ResponsibilityRow { activations: args.activations, row, loss: args.row_loss[row], out });
        }
    });
    Ok(())
}

struct ResponsibilityRow<'a, E: CpuElement> {
    activations: MatRef<'a, E>,
    row: usize,
    loss: f32,
    out: &'a mut [f32],
}

impl<E: CpuElement> Task for ResponsibilityRow<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = TILE_VECTORS * S::LANES;
        for (a, r) in self.activations.row(self.row).chunks(width).zip(self.out.chunks_mut(width)) {
            let a = rows::widen(s, a);
            let loss = s.splat(self.loss);
            rows::store(s, r, [math::exp(s, s.sub(loss, a[0])), math::exp(s, s.sub(loss, a[1]))]);
        }
    }
}
