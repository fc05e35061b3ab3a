//! The product that carries every family: operands in 16-bit planes, and the launch of `kernels/gemm.cuh` with an epilogue.

use super::driver::{Argument, Launch, Mainloop, Tensor, TensorMap};
use super::memory::{CudaMemory, Layout, View};
use super::schedule::{CLUSTER, Schedule};
use super::{Core, CudaElement, Precision};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::matrix::MatRef;
use bytemuck::{Pod, Zeroable};

/// Rows and columns of a block's tile.
pub(super) const TILE: usize = 128;
/// Threads that finish a tile, and of most blocks.
pub(super) const THREADS: u32 = 256;
/// Shared memory of a tile.
pub(super) const TILE_BYTES: u32 = (TILE * (TILE + 8) * 4) as u32;
/// Shared memory of a product's block; the most that any kernel asks for.
pub(super) fn shared_bytes(mainloop: Mainloop) -> u32 {
    match mainloop {
        // The tile takes the place of the stages.
        Mainloop::Sm80 => TILE_BYTES,
        // Stages, tile, barriers.
        Mainloop::Sm90 { .. } => (144 << 10) + TILE_BYTES + 12 * 8,
    }
}
/// Rows that a product over rows sums at a time, by the planes of its operands: it bounds the scratch and the length of `f32` sums. Tensor
/// cores may cut a sum instead of rounding it, once for 16 rows: within a thousand rows that costs no more than a hundred units in the last
/// place, which rounding to one plane hides four times over.
pub(super) fn rows_at_a_time(planes: u32) -> usize {
    if planes > 1 { 1024 } else { 4096 }
}

/// A 16-bit operand, as `Operand` of `kernels/gemm_sm80.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct OperandArgument {
    address: u64,
    row_stride: i64,
    plane_stride: i64,
}

/// What `Gemm` of `kernels/gemm_sm80.cuh` and of `kernels/gemm_sm90.cuh` have in common, after the operands.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct GemmArgument {
    rows: i32,
    cols: i32,
    depth: i32,
    segments: u32,
    left_planes: u32,
    right_planes: u32,
    region: u32,
    padding: u32,
}

/// `Prepare` of `kernels/prepare.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct PrepareArgument {
    source: View,
    affine: Affine,
    out: u64,
    row_stride: i64,
    plane_stride: i64,
    rows: i64,
    cols: i64,
    planes: u32,
    padding: u32,
}

/// Addresses of a shift and scales; 0 where there is none.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct Affine {
    /// Subtracted from each column.
    pub shift: u64,
    /// Factor of each column.
    pub scale: u64,
    /// Factor of each row.
    pub row_scale: u64,
}

/// A matrix in planes: it is their sum.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planes {
    argument: OperandArgument,
    count: u32,
    /// Of a plane, as it stands in memory.
    rows: usize,
    cols: usize,
}

impl Planes {
    /// An operand of a product of depth 0.
    pub(super) const NONE: Self =
        Self { argument: OperandArgument { address: 0, row_stride: 0, plane_stride: 0 }, count: 0, rows: 0, cols: 0 };

    /// The planes as bulk copies see them.
    fn tensor(&self) -> Tensor {
        let OperandArgument { address, row_stride, plane_stride } = self.argument;
        // A single row or plane has a stride of any length, but bulk copies want one.
        let row = (row_stride as u64 * 2).next_multiple_of(16);
        let plane = if self.count > 1 { plane_stride as u64 * 2 } else { row };
        let planes = stored_planes(self.count);
        Tensor { address, extents: [self.cols as u64, self.rows as u64, planes.into()], strides: [row, plane] }
    }
}

/// A matrix as an operation has it: any storage type, any stride.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    pub view: View,
    pub rows: usize,
    pub cols: usize,
}

impl Source {
    pub(super) fn new<T: Element>(matrix: &MatRef<'_, T, CudaMemory>) -> Self {
        Self { view: View::new(matrix), rows: matrix.rows(), cols: matrix.cols() }
    }
}

/// Tiles that a product computes, as the kernels number them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Region {
    Full = 0,
    /// On and above the diagonal.
    Upper = 1,
    Diagonal = 2,
    /// As `Upper`, but tiles on the diagonal are zero before the epilogue.
    AboveDiagonal = 3,
}

/// Extents of a product, and the part of it that is computed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extents {
    pub rows: usize,
    pub cols: usize,
    pub depth: usize,
    pub region: Region,
}

impl Extents {
    pub(super) fn full(rows: usize, cols: usize, depth: usize) -> Self {
        Self { rows, cols, depth, region: Region::Full }
    }
    pub(super) fn symmetric(side: usize, depth: usize) -> Self {
        Self { rows: side, cols: side, depth, region: Region::Upper }
    }
    pub(super) fn only(self, region: Region) -> Self {
        Self { region, ..self }
    }
    /// Tiles of the product.
    pub(super) fn tiles(&self) -> usize {
        let (rows, cols) = (self.rows.div_ceil(TILE), self.cols.div_ceil(TILE));
        match self.region {
            Region::Full => rows * cols,
            Region::Upper | Region::AboveDiagonal => rows * (rows + 1) / 2,
            Region::Diagonal => rows,
        }
    }
}

/// Elements between the rows of a plane: rows start at multiples of 16 bytes.
fn plane_row(cols: usize) -> Result<usize> {
    cols.checked_next_multiple_of(8).ok_or(Error::Overflow { what: "the workspace" })
}

/// Planes in memory: the first once more without what is not finite if there are several.
fn stored_planes(planes: u32) -> u32 {
    if planes > 1 { planes + 1 } else { planes }
}

/// Takes the room of a matrix in planes.
pub(super) fn take_planes(layout: &mut Layout, planes: u32, rows: usize, cols: usize) -> Result<u64> {
    let rows = rows.checked_mul(stored_planes(planes) as usize).ok_or(Error::Overflow { what: "the workspace" })?;
    layout.take::<u16>(rows, plane_row(cols)?)
}

/// Planes of a matrix in its storage type.
pub(super) fn raw_planes<E: CudaElement>() -> u32 {
    if E::IS_16_BIT { 1 } else { 3 }
}

/// Planes of a matrix that an operation computed: centred, scaled, or a matrix of `f32`.
pub(super) fn derived_planes<E: CudaElement>(precision: Precision) -> u32 {
    match precision {
        Precision::Storage if E::IS_16_BIT => 1,
        _ => 3,
    }
}

/// An extent as the kernels take it.
pub(super) fn extent(value: usize) -> Result<i32> {
    // Tiles reach beyond the end.
    i32::try_from(value)
        .ok()
        .filter(|value| *value <= i32::MAX - 256)
        .ok_or(Error::Overflow { what: "an extent in 32 bits" })
}

/// A number of blocks.
pub(super) fn blocks(count: usize) -> Result<u32> {
    u32::try_from(count)
        .ok()
        .filter(|count| *count <= i32::MAX as u32)
        .ok_or(Error::Overflow { what: "a grid in 31 bits" })
}

/// Blocks of 32×8 threads with four columns a lane; rows in a loop.
pub(super) fn elementwise(rows: usize, cols: usize) -> Result<[u32; 2]> {
    Ok([blocks(cols.div_ceil(128))?, rows.div_ceil(8).min(65_535) as u32])
}

impl Core {
    /// Splits a matrix of type `T` into bf16 planes at `out`.
    pub(super) fn derive<T: CudaElement>(
        &self,
        source: Source,
        affine: Affine,
        count: u32,
        out: u64,
    ) -> Result<Planes> {
        self.split(T::KERNELS.prepare, source, affine, count, out)
    }

    /// A matrix in its storage type as an operand of a product in that type: as it stands where its rows start at multiples of 16 bytes,
    /// else copied to `out`.
    pub(super) fn raw<E: CudaElement>(&self, matrix: &MatRef<'_, E, CudaMemory>, out: u64) -> Result<Planes> {
        let source = Source::new(matrix);
        let View { address, row_stride } = source.view;
        if E::IS_16_BIT && address % 16 == 0 && (row_stride % 8 == 0 || source.rows <= 1) {
            let argument = OperandArgument { address, row_stride, plane_stride: 0 };
            return Ok(Planes { argument, count: 1, rows: source.rows, cols: source.cols });
        }
        self.split(E::RAW_KERNEL, source, Affine::default(), raw_planes::<E>(), out)
    }

    fn split(&self, kernel: &'static str, source: Source, affine: Affine, count: u32, out: u64) -> Result<Planes> {
        let Source { view, rows, cols } = source;
        let row_stride = plane_row(cols)?;
        let plane_stride = (row_stride * rows) as i64;
        let argument = PrepareArgument {
            source: view,
            affine,
            out,
            row_stride: row_stride as i64,
            plane_stride,
            rows: rows as i64,
            cols: cols as i64,
            planes: count,
            padding: 0,
        };
        self.launch(kernel, elementwise(rows, row_stride)?, THREADS, 0, Argument::new(&argument))?;
        let argument = OperandArgument { address: out, row_stride: row_stride as i64, plane_stride };
        Ok(Planes { argument, count, rows, cols })
    }

    /// left·right with an epilogue.
    pub(super) fn gemm<T: Pod>(
        &self,
        kernel: &'static str,
        extents: Extents,
        left: Planes,
        right: Planes,
        epilogue: &T,
    ) -> Result<()> {
        // The pairs (i, j) with i + j ≤ 2: what is left out is less than the rounding of f32. The smallest come first, so that only the
        // last, i = j = 0, is added to a sum of full size. Lower planes meet the first without what is not finite, which stands after
        // the last plane.
        let (mut segments, mut left_planes, mut right_planes) = (0, 0, 0);
        for order in (0..=2).rev() {
            for i in (0..=order).filter(|i| *i < left.count && order - i < right.count) {
                let j = order - i;
                left_planes |= (if i == 0 && j > 0 { left.count } else { i }) << (4 * segments);
                right_planes |= (if j == 0 && i > 0 { right.count } else { j }) << (4 * segments);
                segments += 1;
            }
        }
        let gemm = GemmArgument {
            rows: extent(extents.rows)?,
            cols: extent(extents.cols)?,
            depth: extent(extents.depth)?,
            segments,
            left_planes,
            right_planes,
            region: extents.region as u32,
            padding: 0,
        };
        let mainloop = self.driver.mainloop();
        let (grid, cluster, threads, argument) = match mainloop {
            Mainloop::Sm80 => {
                let operands = Argument::new(&left.argument).then(&right.argument);
                (blocks(extents.tiles())?, 1, THREADS, operands.then(&gemm).then(epilogue))
            }
            Mainloop::Sm90 { multiprocessors, schedule } => {
                // Nothing is copied of operands that have no elements.
                let is_empty = extents.rows == 0 || extents.cols == 0 || extents.depth == 0;
                let map = |planes: Planes| -> Result<TensorMap> {
                    if is_empty { Ok([0; 16]) } else { self.driver.tensor_map(&planes.tensor()) }
                };
                let operands = Argument::new(&map(left)?).then(&map(right)?);
                let schedule = schedule.unwrap_or_else(|| Schedule::of(&extents, segments, multiprocessors));
                let squares = blocks(schedule.squares(&extents))?;
                let in_turn = u32::from(schedule == Schedule::InTurn);
                let argument = operands.then(&gemm).then(&[squares, in_turn]).aligned(64).then(epilogue).aligned(64);
                let cluster = CLUSTER as u32;
                (cluster * squares.min(multiprocessors / cluster), cluster, THREADS + 128, argument)
            }
        };
        let (grid, shared_bytes) = ([grid, 1], shared_bytes(mainloop));
        self.enqueue(Launch { kernel, grid, cluster, cooperative: false, threads, shared_bytes, argument })
    }

    /// A kernel with one thread for each of `count` elements.
    pub(super) fn each<T: Pod>(&self, kernel: &'static str, count: usize, argument: &T) -> Result<()> {
        self.launch(kernel, [blocks(count.div_ceil(256))?, 1], 256, 0, Argument::new(argument))
    }

    /// A kernel with one warp for each of `rows` rows.
    pub(super) fn each_row<T: Pod>(&self, kernel: &'static str, rows: usize, argument: &T) -> Result<()> {
        self.launch(kernel, [blocks(rows.div_ceil(8))?, 1], 256, 0, Argument::new(argument))
    }

    /// Enqueues a kernel without clusters.
    pub(super) fn launch(
        &self,
        kernel: &'static str,
        grid: [u32; 2],
        threads: u32,
        shared_bytes: u32,
        argument: Argument,
    ) -> Result<()> {
        self.enqueue(Launch { kernel, grid, cluster: 1, cooperative: false, threads, shared_bytes, argument })
    }

    /// Enqueues a kernel whose blocks wait for each other, at most [`Driver::cooperative_blocks`](super::driver::Driver::cooperative_blocks).
    pub(super) fn launch_together(
        &self,
        kernel: &'static str,
        blocks: u32,
        threads: u32,
        shared_bytes: u32,
        argument: Argument,
    ) -> Result<()> {
        let grid = [blocks, 1];
        self.enqueue(Launch { kernel, grid, cluster: 1, cooperative: true, threads, shared_bytes, argument })
    }

    /// Enqueues a kernel, unless there is nothing to do.
    fn enqueue(&self, launch: Launch) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: the operations pass each kernel the struct of its name, made of addresses that their arguments borrow or that lie in
        // the workspace, within the extents that were checked.
        unsafe { self.driver.launch(&launch) }
    }
}
