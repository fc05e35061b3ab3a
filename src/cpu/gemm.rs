//! The matrix product: one register tile, operands read in place where that is as fast, and an epilogue that gets each finished tile
//! while it is in L1.
//!
//! out(i, j) = Σ_k left(i, k)·right(j, k). An operation is an epilogue: it turns a tile into whatever the operation wants of it, and sums
//! over rows or columns stay in its state until the task ends.
//!
//! Geometry: a task is a group of at most 8 or 16 × 8 tiles (AVX-512: 112 or 224 rows × 256 columns). It walks the depth in chunks of 1024
//! steps, whose operands fit into L2; sums of several chunks wait in an L2 buffer. Within a chunk each right panel stays in L1 or L2 while
//! all left panels pass. How the operands get there is told in `pack`. A symmetric product packs its operand once and reads both sides from
//! it. Groups are cut by shape alone, so results do not depend on the number of threads.
//!
//! Measured on 2026-11-21, one Zen 4 core, of the FMA peak: the tile alone 97 % with its right panel in L2, 93 % (groups of 8) and 96 % (of 16)
//! with right panels from L3. Rejected, as they gained nothing: chunks of 256 or 512 steps, fetching ahead what epilogues read and write,
//! fetching packed panels ahead. Rejected, as slower: tasks that copy right panels themselves where there are several groups of rows (with
//! one group it is faster: dW at 4096×512×64 by 15 %), rows at a multiple of 2 KiB read in place.

use super::memory::{Aligned, Out};
use super::pack::{Lanes, Left, Operand, Right, RightPlan, packed_len};
use super::rows;
use super::simd::{Isa, MAX_TILE, Panels, Simd, TILE_VECTORS, Task};
use super::{Core, CpuElement};
use crate::matrix::MatRef;
use std::ops::Range;

/// Panels of columns in a group, and of rows where there are few groups.
pub(crate) const GROUP: usize = 8;
/// Panels of rows in a group where there are [`MANY`] groups: right panels, which may come from memory, are read half as often.
const TALL_GROUP: usize = 16;
/// Groups that several threads can share out evenly.
const MANY: usize = 40;
/// Most rows of a group.
pub(crate) const MAX_GROUP_ROWS: usize = TALL_GROUP * 14;
/// Most columns of a group.
pub(crate) const MAX_GROUP_COLS: usize = GROUP * 32;
/// Steps of a chunk of the depth; a multiple of what the register tile sums at a time.
const CHUNK: usize = 1024;

/// A finished tile: rows of `stride` elements, of which the first `cols` count.
pub(crate) struct Tile<'a> {
    data: &'a [f32],
    stride: usize,
    /// Rows of the output.
    pub rows: Range<usize>,
    /// Columns of the output.
    pub cols: Range<usize>,
}

impl Tile<'_> {
    /// Row `i`, counted within the tile, with its padding.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.stride..(i + 1) * self.stride]
    }
}

/// A group of tiles that one task computes.
pub(crate) struct Group {
    /// Which group of rows.
    pub row_index: usize,
    /// Which group of columns.
    pub col_index: usize,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

/// What becomes of the tiles. `tile` and its like are `inline(always)`, to be compiled for the instruction set.
pub(crate) trait Epilogue: Sync {
    /// Sums that live as long as a task.
    type State;
    fn begin(&self, group: &Group) -> Self::State;
    fn tile<S: Simd>(&self, s: S, state: &mut Self::State, group: &Group, tile: Tile<'_>);
    fn end(&self, state: &Self::State, group: &Group);
}

/// How the rows or columns of an output are cut into panels and groups of panels.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    len: usize,
    width: usize,
    /// Width of the first panel.
    first: usize,
    /// Panels that a width is divided into.
    split: usize,
    groups: usize,
}

impl Cut {
    fn new(len: usize, width: usize, first: usize, split: usize, group: usize) -> Self {
        let mut cut = Self { len, width, first, split, groups: 0 };
        cut.groups = cut.panels().div_ceil(group);
        cut
    }
    /// The rows of an output of `cols` columns, in as few panels as the tile allows, all of about the same size: no tile is nearly empty.
    pub(crate) fn rows(isa: Isa, rows: usize, cols: usize) -> Self {
        let panels = rows.div_ceil(isa.tile().0).max(1);
        let width = rows.div_ceil(panels).max(1);
        let many = panels.div_ceil(TALL_GROUP).saturating_mul(Self::cols(isa, cols).groups) >= MANY;
        Self::new(rows, width, width, 1, if many { TALL_GROUP } else { GROUP })
    }
    /// The most groups that an output of this many rows may have, symmetric or not. Grows with the rows, which the number itself does not.
    pub(crate) fn most_row_groups(isa: Isa, rows: usize) -> usize {
        Self::rows(isa, rows, 0).groups.max(Self::divided_cols(isa, rows).groups)
    }
    /// The columns of an output.
    pub(crate) fn cols(isa: Isa, cols: usize) -> Self {
        Self::new(cols, isa.tile().1, isa.tile().1, 1, GROUP)
    }
    /// The columns of an output, the first panel of which has `first`. What depends on how columns are grouped must not be cut so, for
    /// results may not depend on where matrices lie.
    pub(crate) fn cols_from(isa: Isa, cols: usize, first: usize) -> Self {
        Self::new(cols, isa.tile().1, first, 1, GROUP)
    }
    /// The rows of a symmetric output: each panel of columns, divided.
    pub(crate) fn divided_cols(isa: Isa, len: usize) -> Self {
        let (rows, cols) = isa.tile();
        Self::new(len, cols, cols, cols.div_ceil(rows), GROUP)
    }
    /// Width of a panel.
    pub(crate) fn width(&self) -> usize {
        self.width
    }
    pub(crate) fn panels(&self) -> usize {
        let wide = if self.len == 0 { 0 } else { (self.len + self.width - self.first).div_ceil(self.width) };
        wide * self.split
    }
    /// Number of groups.
    pub(crate) fn groups(&self) -> usize {
        self.groups
    }
    /// First panel of a group; groups differ by one panel at most.
    pub(crate) fn first_panel(&self, group: usize) -> usize {
        let panels = self.panels();
        group * (panels / self.groups.max(1)) + group.min(panels % self.groups.max(1))
    }
    /// Where a panel begins; the end for the one after the last.
    fn start(&self, panel: usize) -> usize {
        let (wide, part) = (panel / self.split, panel % self.split);
        let start = if wide == 0 { 0 } else { self.first + (wide - 1) * self.width };
        (start + (part * self.width).div_ceil(self.split)).min(self.len)
    }
    /// Rows or columns of a panel.
    pub(crate) fn panel(&self, panel: usize) -> Range<usize> {
        self.start(panel)..self.start(panel + 1)
    }
    /// Panels of a group.
    fn group_panels(&self, group: usize) -> Range<usize> {
        self.first_panel(group)..self.first_panel(group + 1)
    }
    /// Rows or columns of a group.
    fn group(&self, group: usize) -> Range<usize> {
        let panels = self.group_panels(group);
        self.start(panels.start)..self.start(panels.end)
    }
}

/// Sizes of what each thread needs beside the operands, in elements of `f32`.
struct Scratch {
    left: usize,
    right: usize,
    sums: usize,
}

impl Scratch {
    /// Grows with every extent, so that a workspace for a shape serves every smaller one.
    fn of(isa: Isa, rows: usize, cols: usize, depth: usize) -> Self {
        let (tile_rows, tile_cols) = isa.tile();
        let chunk = depth.min(CHUNK);
        let row_panels = Cut::divided_cols(isa, rows).panels().min(TALL_GROUP);
        // A first panel that is not whole may make one more.
        let col_panels = (cols.div_ceil(tile_cols) + 1).min(GROUP);
        Self {
            left: Left::<f32>::len(row_panels * tile_rows, chunk),
            right: tile_cols * chunk.next_multiple_of(tile_cols),
            sums: if depth > CHUNK { row_panels * col_panels * MAX_TILE } else { 0 },
        }
    }

    /// Elements of the workspace for one thread.
    fn len(&self) -> usize {
        [self.left, self.right, self.sums].map(Aligned::len).into_iter().sum()
    }
}

/// Elements of a packed operand, beyond which it is packed in parts: more for a symmetric product, whose other operand needs no copy if all
/// of this one is packed at once.
pub(crate) fn pack_limit(symmetric: bool) -> usize {
    if symmetric { 32 << 20 } else { 4 << 20 }
}

/// Elements of a workspace that a product takes, at most.
pub(crate) fn workspace_len(core: &Core, rows: usize, cols: usize, depth: usize) -> usize {
    any_workspace_len(core, false, rows, cols, depth)
}

/// Elements of a workspace that a symmetric product takes, at most.
pub(crate) fn symmetric_workspace_len(core: &Core, side: usize, depth: usize) -> usize {
    any_workspace_len(core, true, side, side, depth)
}

fn any_workspace_len(core: &Core, symmetric: bool, rows: usize, cols: usize, depth: usize) -> usize {
    Aligned::len(packed_len(Cut::cols(core.isa, cols), depth, pack_limit(symmetric)))
        + core.threads.count() * Scratch::of(core.isa, rows, cols, depth).len()
}

/// A product and what limits it.
pub(crate) struct Gemm<'a, L: CpuElement, R: CpuElement> {
    left: Operand<'a, L>,
    right: Operand<'a, R>,
    symmetric: bool,
    cut_anywhere: bool,
}

impl<'a, E: CpuElement> Gemm<'a, E, E> {
    /// An operand with itself. Only tiles that touch the upper triangle (row ≤ column) are computed.
    pub(crate) fn symmetric(operand: Operand<'a, E>) -> Self {
        Self { symmetric: true, ..Self::new(operand, operand) }
    }
}

impl<'a, L: CpuElement, R: CpuElement> Gemm<'a, L, R> {
    pub(crate) fn new(left: Operand<'a, L>, right: Operand<'a, R>) -> Self {
        Self { left, right, symmetric: false, cut_anywhere: false }
    }

    /// Lets columns be cut where the right operand's vectors begin, for results that do not depend on how columns are grouped: they must
    /// not depend on where a matrix lies.
    pub(crate) fn cut_anywhere(self) -> Self {
        Self { cut_anywhere: true, ..self }
    }

    /// Computes the product; `workspace` has [`workspace_len`] or [`symmetric_workspace_len`] elements.
    pub(crate) fn run<X: Epilogue>(&self, core: &Core, workspace: &mut [f64], epilogue: &X) {
        let isa = core.isa;
        let (rows, cols, depth) = (self.left.len(), self.right.len(), self.left.depth());
        debug_assert_eq!(depth, self.right.depth());
        let lanes = Lanes::of(isa, &self.left, &self.right);
        let plan = RightPlan::new(isa, self.right, lanes, rows, self.symmetric, self.cut_anywhere);
        let col_cut = plan.cut;
        let shared = self.symmetric && plan.is_packed_at_once();
        let row_cut = if shared { Cut::divided_cols(isa, rows) } else { Cut::rows(isa, rows, cols) };
        let sizes = Scratch::of(isa, rows, cols, depth);
        let (packed, scratch) = workspace.split_at_mut(Aligned::len(plan.packed_len()));
        for part in plan.parts() {
            let right = plan.pack(core, &part, Aligned::of(packed));
            let left = Left::new(&self.left, lanes, if shared { right.packed() } else { None });
            let part_cols = col_cut.group(part.start).start..col_cut.group(part.end - 1).end;
            let work = rows.saturating_mul(part_cols.len()).saturating_mul(depth.max(16));
            let tasks = row_cut.groups * part.len();
            core.threads.for_each_with(
                tasks,
                work,
                scratch,
                sizes.len(),
                |scratch| Worker::new(&sizes, scratch),
                |worker, task| {
                    let (row_index, col_index) = (task / part.len(), part.start + task % part.len());
                    let (rows, cols) = (row_cut.group(row_index), col_cut.group(col_index));
                    if self.symmetric && rows.start >= cols.end {
                        return;
                    }
                    let group = Group { row_index, col_index, rows, cols };
                    let mut state = epilogue.begin(&group);
                    core.isa.run(GroupTask {
                        epilogue,
                        state: &mut state,
                        group: &group,
                        left,
                        right,
                        worker,
                        lanes,
                        depth,
                        row_cut,
                        col_cut,
                        symmetric: self.symmetric,
                    });
                    epilogue.end(&state, &group);
                },
            );
        }
    }
}

/// A thread's memory.
struct Worker<'a> {
    left: &'a mut [f32],
    /// The group of rows and the chunk of the depth that were copied there.
    copied: Option<(usize, usize)>,
    right: &'a mut [f32],
    sums: &'a mut [f32],
}

impl<'a> Worker<'a> {
    fn new(sizes: &Scratch, scratch: &'a mut [f64]) -> Self {
        let (left, rest) = scratch.split_at_mut(Aligned::len(sizes.left));
        let (right, sums) = rest.split_at_mut(Aligned::len(sizes.right));
        Self { left: Aligned::of(left), copied: None, right: Aligned::of(right), sums: Aligned::of(sums) }
    }
}

struct GroupTask<'a, 'b, 'p, 'w, X: Epilogue, L: CpuElement, R: CpuElement> {
    epilogue: &'a X,
    state: &'a mut X::State,
    group: &'a Group,
    left: Left<'b, 'p, L>,
    right: Right<'b, 'p, R>,
    worker: &'a mut Worker<'w>,
    lanes: Lanes,
    depth: usize,
    row_cut: Cut,
    col_cut: Cut,
    symmetric: bool,
}

/// Aligned to a cache line.
#[repr(align(64))]
struct TileBuffer([f32; MAX_TILE]);

impl<X: Epilogue, L: CpuElement, R: CpuElement> Task for GroupTask<'_, '_, '_, '_, X, L, R> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let tile_cols = TILE_VECTORS * S::LANES;
        let mut buffer = TileBuffer([0.0; MAX_TILE]);
        let group = self.group;
        let (row_panels, col_panels) =
            (self.row_cut.group_panels(group.row_index), self.col_cut.group_panels(group.col_index));
        // A depth of 0 has one chunk too, of no steps: the epilogue gets zeros.
        for start in (0..self.depth.max(1)).step_by(CHUNK) {
            let chunk = start..self.depth.min(start + CHUNK);
            let last = chunk.end == self.depth;
            let here = Some((group.row_index, start));
            let copy = self.worker.copied != here;
            self.worker.copied = here;
            let left = self.left.place(s, &group.rows, &chunk, self.worker.left, copy);
            for (j, col_panel) in col_panels.clone().enumerate() {
                let cols = self.col_cut.panel(col_panel);
                if self.symmetric && cols.end <= group.rows.start {
                    continue;
                }
                let right = self.right.place(s, col_panel, &cols, &chunk, self.worker.right);
                let next = if cols.end < group.cols.end { (start, cols.end) } else { (chunk.end, group.cols.start) };
                for (i, row_panel) in row_panels.clone().enumerate() {
                    let mut rows = self.row_cut.panel(row_panel);
                    if self.symmetric {
                        rows.end = rows.end.min(cols.end);
                    }
                    if rows.is_empty() {
                        break;
                    }
                    let tile = if self.depth > CHUNK {
                        &mut self.worker.sums[(j * row_panels.len() + i) * MAX_TILE..][..MAX_TILE]
                    } else {
                        &mut buffer.0[..]
                    };
                    let product_tile = self.lanes.tiles::<S>().of(left.layout)[rows.len() - 1];
                    let (next, next_step) = self.right.line(&next, i);
                    let panels = Panels {
                        steps: self.lanes.steps(chunk.len()),
                        left: left.panel(rows.start),
                        left_step: left.step,
                        right: right.data,
                        right_step: right.step,
                        next,
                        next_step,
                    };
                    // SAFETY: the panels are in the operands or their copies, a tile's place has room for the largest tile, and
                    // `Isa::run` came here.
                    unsafe {
                        match self.lanes {
                            Lanes::Dots => S::DOT_TILE(&panels, rows.len(), cols.len(), tile.as_mut_ptr(), start > 0),
                            _ => product_tile(&panels, tile.as_mut_ptr(), start > 0),
                        }
                    }
                    if last {
                        let tile = Tile { data: tile, stride: tile_cols, rows, cols: cols.clone() };
                        self.epilogue.tile(s, self.state, group, tile);
                    }
                }
            }
        }
    }
}

/// Hands the tiles of a matrix that is there already, or of zeros, to an epilogue: the same epilogue with and without a product.
pub(crate) struct Pointwise<'a, E: CpuElement> {
    pub rows: usize,
    pub cols: usize,
    pub source: Source<'a, E>,
}

/// What stands for the product.
pub(crate) enum Source<'a, E: CpuElement> {
    Zeros,
    Given(MatRef<'a, E>),
    /// What the epilogue writes: a tile is read before it is handed over.
    Written(Out<'a, E>),
}

impl<E: CpuElement> Pointwise<'_, E> {
    pub(crate) fn run<X: Epilogue>(&self, core: &Core, epilogue: &X) {
        let (row_cut, col_cut) = (Cut::rows(core.isa, self.rows, self.cols), Cut::cols(core.isa, self.cols));
        let work = self.rows.saturating_mul(self.cols).saturating_mul(16);
        core.threads.for_each(row_cut.groups * col_cut.groups, work, |task| {
            let (row_index, col_index) = (task / col_cut.groups, task % col_cut.groups);
            let group = Group { row_index, col_index, rows: row_cut.group(row_index), cols: col_cut.group(col_index) };
            let mut state = epilogue.begin(&group);
            // The tiles that a product has, so that sums over rows have the same bits.
            let tile_rows = row_cut.width();
            core.isa.run(PointwiseTask { epilogue, state: &mut state, group: &group, tile_rows, source: &self.source });
            epilogue.end(&state, &group);
        });
    }
}

struct PointwiseTask<'a, X: Epilogue, E: CpuElement> {
    epilogue: &'a X,
    state: &'a mut X::State,
    group: &'a Group,
    tile_rows: usize,
    source: &'a Source<'a, E>,
}

impl<X: Epilogue, E: CpuElement> Task for PointwiseTask<'_, X, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (tile_rows, tile_cols) = (self.tile_rows, TILE_VECTORS * S::LANES);
        let mut buffer = TileBuffer([0.0; MAX_TILE]);
        let (all_rows, all_cols) = (&self.group.rows, &self.group.cols);
        for row in all_rows.clone().step_by(tile_rows) {
            let rows = row..all_rows.end.min(row + tile_rows);
            for col in all_cols.clone().step_by(tile_cols) {
                let cols = col..all_cols.end.min(col + tile_cols);
                for (row, tile_row) in rows.clone().zip(buffer.0.chunks_mut(tile_cols)) {
                    let part: &[E] = match self.source {
                        Source::Zeros => break,
                        Source::Given(matrix) => &matrix.row(row)[cols.clone()],
                        // SAFETY: groups are disjoint, and the part is given back before the epilogue takes it.
                        Source::Written(out) => unsafe { out.part(row, cols.clone()) },
                    };
                    rows::store(s, tile_row, rows::widen(s, part));
                }
                let tile = Tile { data: &buffer.0, stride: tile_cols, rows: rows.clone(), cols };
                self.epilogue.tile(s, self.state, self.group, tile);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::parallel::Threads;

    #[test]
    fn groups_cover_everything_once_in_nearly_equal_parts() {
        for isa in Isa::available() {
            for len in (0..700).chain([4096, 6145]) {
                let wide = Cut::rows(isa, len, 4096);
                for cut in [
                    Cut::rows(isa, len, 1),
                    wide,
                    Cut::cols(isa, len),
                    Cut::divided_cols(isa, len),
                    Cut::cols_from(isa, len, 3),
                ] {
                    let sizes: Vec<usize> = (0..cut.groups()).map(|group| cut.group(group).len()).collect();
                    let covered: Vec<usize> = (0..cut.groups()).flat_map(|group| cut.group(group)).collect();
                    assert_eq!(covered, (0..len).collect::<Vec<_>>(), "{isa:?}, {len}");
                    let largest = sizes.iter().max().copied().unwrap_or(0);
                    assert!(largest <= cut.width * TALL_GROUP && largest <= MAX_GROUP_COLS.max(MAX_GROUP_ROWS));
                    // All but the last differ by one panel at most.
                    assert!(
                        sizes.iter().rev().skip(1).all(|size| size + cut.width >= largest),
                        "{isa:?}, {len}: {sizes:?}"
                    );
                }
            }
        }
    }

    /// The groups of a product as `threads` threads take them, in order: the longest share over the mean share.
    fn imbalance(isa: Isa, rows: usize, cols: usize, threads: usize) -> f64 {
        let (row_cut, col_cut) = (Cut::rows(isa, rows, cols), Cut::cols(isa, cols));
        let mut shares = vec![0; threads];
        for task in 0..row_cut.groups() * col_cut.groups() {
            let (row, col) = (task / col_cut.groups(), task % col_cut.groups());
            let free = shares.iter_mut().min().expect("there are threads");
            *free += row_cut.group(row).len() * col_cut.group(col).len();
        }
        shares.iter().max().copied().unwrap_or(0) as f64 * threads as f64 / (rows * cols) as f64
    }

    #[test]
    fn threads_get_equal_shares_of_work_that_is_worth_it() {
        for isa in Isa::available() {
            // Tens of milliseconds on a few cores, seconds on many.
            for (rows, cols) in [(4096, 256), (1024, 4096), (1024, 1024), (256, 784), (6144, 768)] {
                for threads in [1, 2, 4] {
                    let imbalance = imbalance(isa, rows, cols, threads);
                    assert!(imbalance < 1.25, "{isa:?}, {rows}x{cols}, {threads} threads: {imbalance:.2}");
                }
            }
            for (rows, cols) in [(4096, 6144), (4096, 4096), (16384, 4096), (8192, 16384)] {
                for threads in [8, 16, 64] {
                    let imbalance = imbalance(isa, rows, cols, threads);
                    assert!(imbalance < 1.25, "{isa:?}, {rows}x{cols}, {threads} threads: {imbalance:.2}");
                }
            }
        }
    }

    #[test]
    fn a_workspace_for_a_shape_serves_every_smaller_one() {
        let extents = [0, 1, 9, 14, 15, 16, 17, 28, 29, 100, 128, 500, 784, 1000, 2000, 3000, 4096, 5000, 8192, 20_000];
        for isa in Isa::available() {
            let core = Core { isa, threads: Threads::One };
            for pair in extents.windows(2) {
                for [a, b] in extents.iter().flat_map(|a| extents.iter().map(|b| [*a, *b])) {
                    let len =
                        |x: usize| [[x, a, b], [a, x, b], [a, b, x]].map(|[m, n, k]| workspace_len(&core, m, n, k));
                    let (smaller, larger) = (len(pair[0]), len(pair[1]));
                    assert!(smaller.iter().zip(&larger).all(|(s, l)| s <= l), "{isa:?}, {pair:?}, {a}, {b}");
                }
            }
        }
    }
}
