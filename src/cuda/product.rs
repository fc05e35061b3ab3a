//! [`Product`] and [`ColumnSums`].
//!
//! A product of 16-bit matrices goes to the device's library, if it has one that takes it, else to `kernels/product.cu`.

use super::driver::{Place, PlainProduct};
use super::gemm::{Extents, TILE, blocks, raw_planes, rows_at_a_time, take_planes};
use super::memory::{self, Layout, View, lay_out};
use super::{Argument, Core, Cuda, CudaElement};
use crate::backend::Mat;
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
pub(super) fn row_blocks(rows: usize, planes: u32) -> impl Iterator<Item = std::ops::Range<usize>> {
    let at_a_time = rows_at_a_time(planes);
    let count = rows.div_ceil(at_a_time).max(1);
    (0..count).map(move |i| i * at_a_time..rows.min((i + 1) * at_a_time))
}

/// A product's scratch: of our kernels or of the library, whichever computes it.
struct Scratch {
    left: u64,
    right: u64,
    library: u64,
}

/// What the library's scratch is aligned to.
const LIBRARY_ALIGNMENT: usize = 256;

/// Operands: left and right as they stand, [rows, cols].
fn plan<E: CudaElement>(core: &Core, layout: &mut Layout, left: [usize; 2], right: [usize; 2]) -> Result<Scratch> {
    let ((left, right), library) = layout.either(
        |layout| {
            let mut take = |[rows, cols]: [usize; 2]| take_planes(layout, raw_planes::<E>(), rows, cols);
            Ok((take(left)?, take(right)?))
        },
        |layout| match core.library::<E>() {
            Some((_, bytes)) => layout.take::<u8>(bytes.saturating_add(LIBRARY_ALIGNMENT), 1),
            None => Ok(0),
        },
    )?;
    Ok(Scratch { left, right, library: library.next_multiple_of(LIBRARY_ALIGNMENT as u64) })
}

/// Elements for a product of any layout whose extents are these three, in any order.
pub(super) fn workspace_len<E: CudaElement>(core: &Core, n: usize, d: usize, h: usize) -> Result<usize> {
    let mut most = 0;
    for [left, right] in [[[n, h], [n, d]], [[n, h], [h, d]], [[n, d], [h, d]]] {
        // Both extents rounded up: the same room for the transposed operand.
        let padded = |[rows, cols]: [usize; 2]| [rows.saturating_add(7) / 8 * 8, cols];
        most = most.max(memory::workspace_len(|layout| plan::<E>(core, layout, padded(left), padded(right)))?);
    }
    Ok(most)
}

pub(super) fn product<E: CudaElement>(core: &Core, args: Product<'_, Cuda<E>>) -> Result<()> {
    let (m, n, k) = args.check()?;
    let (left, right, out) = (args.left, args.right, View::of(&args.out));
    let planes = raw_planes::<E>();
    let at_a_time = if args.layout == Transposed::Tn { rows_at_a_time(planes) } else { usize::MAX };
    let shape = |rows: usize, cols: usize| [rows.min(at_a_time), cols];
    let scratch = lay_out(&args.workspace, |layout| {
        plan::<E>(core, layout, shape(left.rows(), left.cols()), shape(right.rows(), right.cols()))
    })?;
    let one = |left: Mat<'_, Cuda<E>, E>, right: Mat<'_, Cuda<E>, E>, k: usize, accumulate: bool| -> Result<()> {
        if let Some((storage, _)) = core.library::<E>()
            && [m, n, k].iter().all(|extent| *extent > 0)
        {
            let place = |matrix: &Mat<'_, Cuda<E>, E>| Place {
                address: matrix.data().address(),
                row_stride: matrix.row_stride(),
            };
            let product = PlainProduct {
                layout: args.layout,
                storage,
                extents: [m, n, k],
                left: place(&left),
                right: place(&right),
                out: Place { address: out.address, row_stride: args.out.row_stride() },
                accumulate,
                workspace: scratch.library,
            };
            // SAFETY: the arguments borrow the matrices, whose extents were checked; the scratch lies in the workspace.
            if unsafe { core.driver.product(&product) }? {
                return Ok(());
            }
        }
        let [nn, nt, tn] = E::PRODUCTS;
        let kernel = match args.layout {
            Transposed::Nn => nn,
            Transposed::Nt => nt,
            Transposed::Tn => tn,
        };
        let (left, right) = (core.raw(&left, scratch.left)?, core.raw(&right, scratch.right)?);
        core.gemm(kernel, Extents::full(m, n, k), left, right, &StoreEpilogue::new(out, accumulate, false))
    };
    if args.layout != Transposed::Tn {
        return one(left, right, k, args.accumulate);
    }
    // The library's sums are of f32 as well, and its algorithms do not promise to cut them: it gets as many rows at a time as our kernels.
    for (index, range) in row_blocks(k, planes).enumerate() {
        let rows = range.len();
        one(left.rows_range(range.clone()), right.rows_range(range), rows, args.accumulate || index > 0)?;
    }
    Ok(())
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
    let grid = [blocks(cols.div_ceil(4 * 256))?, groups.min(65_535) as u32];
    core.launch(E::KERNELS.column_sums, grid, 256, 0, Argument::new(&argument))?;
    core.fold_f32(slots, groups, cols, args.accumulate, args.sums.address())
}
