//! [`Product`] and [`ColumnSums`].

use super::gemm::{Extents, ROWS_AT_A_TIME, TILE, blocks, raw_planes, take_planes};
use super::memory::{self, Layout, View, lay_out};
use super::{Argument, Core, Cuda, CudaElement};
use crate::error::Result;
use crate::operations::{ColumnSums, Layout as Transposed, Product};
use bytemuck::{Pod, Zeroable};

/// `StoreEpilogue` of `kernels/store.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct StoreEpilogue {
    out: View,
    accumulate: u32,
    upper: u32,
}

impl StoreEpilogue {
    pub(super) fn new(out: View, accumulate: bool, upper: bool) -> Self {
        Self { out, accumulate: u32::from(accumulate), upper: u32::from(upper) }
    }
}

/// Blocks of rows that are summed at a time; one empty block for no rows.
pub(super) fn row_blocks(rows: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let count = rows.div_ceil(ROWS_AT_A_TIME).max(1);
    (0..count).map(move |i| i * ROWS_AT_A_TIME..rows.min((i + 1) * ROWS_AT_A_TIME))
}

/// Operands: left and right as they stand, [rows, cols].
fn plan<E: CudaElement>(layout: &mut Layout, left: [usize; 2], right: [usize; 2]) -> Result<[u64; 2]> {
    let [left, right] = [left, right].map(|[rows, cols]| take_planes(layout, raw_planes::<E>(), rows, cols));
    Ok([left?, right?])
}

/// Elements for a product of any layout whose extents are these three, in any order.
pub(super) fn workspace_len<E: CudaElement>(n: usize, d: usize, h: usize) -> Result<usize> {
    let mut most = 0;
    for [left, right] in [[[n, h], [n, d]], [[n, h], [h, d]], [[n, d], [h, d]]] {
        // Both extents rounded up: the same room for the transposed operand.
        let padded = |[rows, cols]: [usize; 2]| [rows.saturating_add(7) / 8 * 8, cols];
        most = most.max(memory::workspace_len(|layout| plan::<E>(layout, padded(left), padded(right)))?);
    }
    Ok(most)
}

pub(super) fn product<E: CudaElement>(core: &Core, args: Product<'_, Cuda<E>>) -> Result<()> {
    let (m, n, k) = args.check()?;
    let (left, right, out) = (args.left, args.right, View::of(&args.out));
    let at_once = if args.layout == Transposed::Tn { ROWS_AT_A_TIME } else { usize::MAX };
    let shape = |rows: usize, cols: usize| [rows.min(at_once), cols];
    let [left_at, right_at] = lay_out(&args.workspace, |layout| {
        plan::<E>(layout, shape(left.rows(), left.cols()), shape(right.rows(), right.cols()))
    })?;
    let [nn, nt, tn] = E::PRODUCTS;
    match args.layout {
        Transposed::Tn => {
            for (index, range) in row_blocks(k).enumerate() {
                let (left, right) = (left.rows_range(range.clone()), right.rows_range(range));
                let epilogue = StoreEpilogue::new(out, args.accumulate || index > 0, false);
                let extents = Extents::full(m, n, left.rows());
                let (left, right) = (core.raw(&left, left_at)?, core.raw(&right, right_at)?);
                core.gemm(tn, extents, left, right, &epilogue)?;
            }
            Ok(())
        }
        Transposed::Nn | Transposed::Nt => {
            let kernel = if args.layout == Transposed::Nn { nn } else { nt };
            let (left, right) = (core.raw(&left, left_at)?, core.raw(&right, right_at)?);
            core.gemm(kernel, Extents::full(m, n, k), left, right, &StoreEpilogue::new(out, args.accumulate, false))
        }
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct ColumnSumsArgument {
    matrix: View,
    slots: u64,
    rows: i64,
    cols: i64,
}

pub(super) fn column_sums_plan(layout: &mut Layout, n: usize, cols: usize) -> Result<u64> {
    layout.take::<f64>(n.div_ceil(TILE), cols)
}

pub(super) fn column_sums<E: CudaElement>(core: &Core, args: ColumnSums<'_, Cuda<E>>) -> Result<()> {
    let (n, cols) = args.check()?;
    let slots = lay_out(&args.workspace, |layout| column_sums_plan(layout, n, cols))?;
    let argument = ColumnSumsArgument { matrix: View::new(&args.matrix), slots, rows: n as i64, cols: cols as i64 };
    let groups = n.div_ceil(TILE);
    let grid = [blocks(cols.div_ceil(256))?, groups.min(65_535) as u32];
    core.launch(E::KERNELS.column_sums, grid, 256, 0, Argument::new(&argument))?;
    core.fold_f32(slots, groups, cols, args.accumulate, args.sums.address())
}
