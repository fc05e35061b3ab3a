//! [`Encode`]: the encoder's product with bias, activation, row log-sum-exp and column moments in its epilogue; [`ActivationSums`]: that
//! epilogue without the product.
//!
//! A row's log-sum-exp is kept as (m, s) with Σ exp(−a) = s·exp(−m), m the least a so far, s a vector of partial sums: a lower a lowers m,
//! which rescales s, mostly in the row's first tile alone. m is kept finite, so that infinite a need no case of their own. Each group of
//! columns leaves one (m, s) a row, and each group of rows one sum a column; they are folded in order.

use super::gemm::{Cut, Epilogue, Gemm, Group, MAX_GROUP_ROWS, Pointwise, Source, Tile, workspace_len as gemm_len};
use super::memory::{Out, Scratch};
use super::pack::Operand;
use super::rows::{self, ColumnSums};
use super::simd::{MAX_LANES, Simd, TILE_VECTORS, Task};
use super::{Core, Cpu, CpuElement, math};
use crate::error::Result;
use crate::matrix::MatRef;
use crate::objective::Activation;
use crate::operations::{ActivationSums, Encode, Moments, Responsibilities};
use std::marker::PhantomData;

pub(super) fn workspace_len(core: &Core, n: usize, d: usize, h: usize) -> usize {
    n * 2 * Cut::cols(core.isa, h).groups() + 2 * Cut::most_row_groups(core.isa, n) * h + gemm_len(core, n, h, d)
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
    let mut scratch = Scratch::new(args.workspace, Slots::<E>::len(core, n, h))?;
    let mut slots = Slots::take(core, &mut scratch, n, h);
    let epilogue = slots.epilogue(args.row_loss.is_some(), args.moments.as_ref());
    Pointwise { rows: n, cols: h, source: Source::Given(args.activations) }.run(core, &epilogue);
    slots.finish(core, args.row_loss, args.moments);
    Ok(())
}

/// What groups of tiles leave for rows and columns.
struct Slots<'a, E> {
    /// (m, s) for each row and group of columns.
    rows: &'a mut [f64],
    row_len: usize,
    sums: &'a mut [f64],
    squares: &'a mut [f64],
    latents: usize,
    element: PhantomData<E>,
}

impl<'a, E: CpuElement> Slots<'a, E> {
    /// Elements of the row slots and of one set of column slots.
    fn lens(core: &Core, n: usize, h: usize) -> (usize, usize) {
        (n * 2 * Cut::cols(core.isa, h).groups(), Cut::rows(core.isa, n, h).groups() * h)
    }
    fn len(core: &Core, n: usize, h: usize) -> usize {
        let (rows, cols) = Self::lens(core, n, h);
        rows + 2 * cols
    }
    fn take(core: &Core, scratch: &mut Scratch<'a>, n: usize, h: usize) -> Self {
        let (rows, cols) = Self::lens(core, n, h);
        Self {
            rows: scratch.f64(rows),
            row_len: 2 * Cut::cols(core.isa, h).groups(),
            sums: scratch.f64(cols),
            squares: scratch.f64(cols),
            latents: h,
            element: PhantomData,
        }
    }

    /// The epilogue that fills what is wanted, of tiles that are activations already.
    fn epilogue<'b>(&'b mut self, row_loss: bool, moments: Option<&'b Moments<'_, Cpu<E>>>) -> EncodeEpilogue<'b, E> {
        EncodeEpilogue {
            bias: None,
            activation: Activation::Identity,
            activations: None,
            row_slots: (row_loss || moments.is_some()).then(|| Out::dense(&mut *self.rows, self.row_len)),
            column_slots: moments.map(|moments| ColumnSlots {
                shift: moments.shift,
                sum: Out::dense(&mut *self.sums, self.latents),
                squares: Out::dense(&mut *self.squares, self.latents),
            }),
        }
    }

    /// Folds what the epilogue left.
    fn finish(self, core: &Core, row_loss: Option<&mut [f32]>, moments: Option<Moments<'_, Cpu<E>>>) {
        if row_loss.is_none() && moments.is_none() {
            return;
        }
        finish_rows(core, self.rows, self.row_len);
        let losses = self.rows.chunks_exact(self.row_len).map(|slot| slot[0]);
        if let Some(row_loss) = row_loss {
            row_loss.iter_mut().zip(losses.clone()).for_each(|(to, loss)| *to = loss as f32);
        }
        if let Some(moments) = moments {
            let before = if moments.accumulate { moments.row_loss_sum[0] } else { 0.0 };
            moments.row_loss_sum[0] = before + losses.sum::<f64>();
            rows::fold(self.sums, moments.accumulate, moments.sum);
            rows::fold(self.squares, moments.accumulate, moments.sum_squares);
        }
    }
}

/// Folds each row's (m, s) into ℓ = m − log s, which takes the slot's first place.
fn finish_rows(core: &Core, slots: &mut [f64], slot_len: usize) {
    const BLOCK: usize = 256;
    let blocks = Out::dense(slots, slot_len);
    let rows = blocks.rows();
    core.threads.for_each(rows.div_ceil(BLOCK), rows * slot_len * 8, |block| {
        for row in block * BLOCK..rows.min((block + 1) * BLOCK) {
            // SAFETY: each row belongs to one block.
            let slot = unsafe { blocks.part(row, 0..slot_len) };
            let least = slot.chunks_exact(2).map(|group| group[0]).fold(f64::INFINITY, f64::min);
            let sum: f64 = slot.chunks_exact(2).map(|group| group[1] * (least - group[0]).exp()).sum();
            slot[0] = least - sum.ln();
        }
    });
}

struct EncodeEpilogue<'a, E> {
    /// Added to the tile, if given.
    bias: Option<&'a [f32]>,
    activation: Activation,
    activations: Option<Out<'a, E>>,
    /// (m, s) for each row and group of columns.
    row_slots: Option<Out<'a, f64>>,
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

    fn end(&self, state: EncodeState, group: &Group) {
        if let Some(slots) = &self.row_slots {
            let at = 2 * group.col_index;
            for (i, row) in group.rows.clone().enumerate() {
                // SAFETY: these rows' slots for this group of columns are this task's.
                let slot = unsafe { slots.part(row, at..at + 2) };
                let sum = state.exp_sum[i].iter().map(|lane| f64::from(*lane)).sum();
                slot.copy_from_slice(&[f64::from(state.least[i]), sum]);
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
