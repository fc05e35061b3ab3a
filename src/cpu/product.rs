//! [`Product`] and [`ColumnSums`](crate::operations::ColumnSums).

use super::gemm::{Epilogue, Gemm, Group, Tile, workspace_len as gemm_len};
use super::memory::{Out, Scratch};
use super::pack::Operand;
use super::rows;
use super::simd::{Loop, Simd, TILE_VECTORS};
use super::{Core, Cpu, CpuElement};
use crate::error::Result;
use crate::operations::{ColumnSums, Layout, Product};
use std::ops::Range;

/// Rows that a product over rows sums at a time: it bounds the packed operand and the length of `f32` sums.
pub(super) const ROWS_AT_A_TIME: usize = 4096;

pub(super) fn workspace_len(core: &Core, n: usize, d: usize, h: usize) -> usize {
    // Whatever the layout, the extents are three of these.
    [[h, d, n], [n, d, h], [n, h, d], [d, h, n]].map(|[m, n, k]| gemm_len(core, m, n, k)).into_iter().max().unwrap_or(0)
}

pub(super) fn product<E: CpuElement>(core: &Core, mut args: Product<'_, Cpu<E>>) -> Result<()> {
    let (m, n, k) = args.check()?;
    let len =
        if args.layout == Layout::Tn { gemm_len(core, m, n, k.min(ROWS_AT_A_TIME)) } else { gemm_len(core, m, n, k) };
    let workspace = Scratch::new(args.workspace, len)?.f64(len);
    let out = Out::new(&mut args.out);
    let mut run = |left, right, accumulate| {
        let epilogue = Store { out, accumulate, upper: false };
        Gemm::new(left, right).cut_anywhere().run(core, workspace, &epilogue);
    };
    match args.layout {
        Layout::Tn => {
            for (index, range) in row_blocks(k).enumerate() {
                let (left, right) = (args.left.rows_range(range.clone()), args.right.rows_range(range));
                run(Operand::cols(left), Operand::cols(right), args.accumulate || index > 0);
            }
        }
        Layout::Nn => run(Operand::rows(args.left), Operand::cols(args.right), args.accumulate),
        Layout::Nt => run(Operand::rows(args.left), Operand::rows(args.right), args.accumulate),
    }
    Ok(())
}

/// Blocks of rows that are summed at a time; one empty block for no rows.
pub(super) fn row_blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let count = rows.div_ceil(ROWS_AT_A_TIME).max(1);
    (0..count).map(move |i| i * ROWS_AT_A_TIME..rows.min((i + 1) * ROWS_AT_A_TIME))
}

/// Stores or adds the product.
pub(super) struct Store<'a> {
    pub out: Out<'a, f32>,
    pub accumulate: bool,
    /// Whether what lies below the diagonal is left alone.
    pub upper: bool,
}

impl Epilogue for Store<'_> {
    type State = ();
    fn begin(&self, _: &Group) {}
    #[inline(always)]
    fn tile<S: Simd>(&self, s: S, _: &mut (), _: &Group, tile: Tile<'_>) {
        for (i, row) in tile.rows.clone().enumerate() {
            let first = if self.upper { tile.cols.start.max(row).min(tile.cols.end) } else { tile.cols.start };
            // SAFETY: this tile's part of the row.
            let out = unsafe { self.out.part(row, first..tile.cols.end) };
            let tile_row = &tile.row(i)[first - tile.cols.start..];
            for (out, sum) in out.chunks_mut(TILE_VECTORS * S::LANES).zip(tile_row.chunks(TILE_VECTORS * S::LANES)) {
                let mut sum = rows::load(s, sum);
                if self.accumulate {
                    let before = rows::load(s, out);
                    sum = [s.add(before[0], sum[0]), s.add(before[1], sum[1])];
                }
                rows::store(s, out, sum);
            }
        }
    }
    fn end(&self, _: &(), _: &Group) {}
}

/// Rows whose sums share a slot.
const SLOT_ROWS: usize = 128;

pub(super) fn column_sums_workspace_len(n: usize, cols: usize) -> usize {
    n.div_ceil(SLOT_ROWS) * cols
}

pub(super) fn column_sums<E: CpuElement>(core: &Core, args: ColumnSums<'_, Cpu<E>>) -> Result<()> {
    let (n, cols) = args.check()?;
    let len = column_sums_workspace_len(n, cols);
    let slots = Scratch::new(args.workspace, len)?.f64(len);
    let out = Out::dense(slots, cols);
    core.threads.for_each(n.div_ceil(SLOT_ROWS), n * cols, |block| {
        // SAFETY: each block has its own row of slots.
        let sums = unsafe { out.part(block, 0..cols) };
        core.isa.run(Loop(|| {
            sums.fill(0.0);
            for row in block * SLOT_ROWS..n.min((block + 1) * SLOT_ROWS) {
                for (sum, value) in sums.iter_mut().zip(args.matrix.row(row)) {
                    *sum += f64::from(value.to_f32());
                }
            }
        }));
    });
    rows::fold_f32(slots, args.accumulate, args.sums);
    Ok(())
}
