//! The matrix product: packed panels, one register tile, and an epilogue that gets each finished tile while it is in L1.
//!
//! out(i, j) = Σ_k left(i, k)·right(j, k). Both operands are packed into panels (see `pack`), so layouts, storage types, centring
//! and scaling cost one pass over the operands and nothing in the inner loop. The tile sums the whole depth (in chunks that
//! are added in memory, which bounds rounding), then the epilogue turns it into whatever the operation wants of it: an operation
//! is an epilogue, and sums over rows or columns stay in its state until the task ends.
//!
//! Geometry: a task is a group of at most 8×8 tiles (AVX-512: 112 rows × 256 columns); its left panels stay in L2 while each
//! right panel passes. Groups are cut by shape alone, so results do not depend on the number of threads. Packed operands are
//! limited to about 16 MB each; larger ones are packed a part at a time.

use super::memory::{Out, f32_len};
use super::pack::Operand;
use super::simd::{Isa, MAX_TILE, Simd, TILE_VECTORS, Task, left_width};
use super::{Core, CpuElement};
use std::ops::Range;

/// Tiles along a side of a group.
const GROUP: usize = 8;
/// Most rows of a group.
pub(crate) const MAX_GROUP_ROWS: usize = GROUP * 14;
/// Most columns of a group.
pub(crate) const MAX_GROUP_COLS: usize = GROUP * 32;
/// `f32` elements of a packed operand.
const PACK_LIMIT: usize = 4 << 20;

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
    fn end(&self, state: Self::State, group: &Group);
}

/// How the rows or columns of an output are cut into panels and groups of panels.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    len: usize,
    panel: usize,
    groups: usize,
}

impl Cut {
    fn new(len: usize, panel: usize) -> Self {
        Self { len, panel, groups: len.div_ceil(panel).div_ceil(GROUP) }
    }
    /// The rows of an output, in as few panels as the tile allows, all of about the same size: no tile is nearly empty.
    pub(crate) fn rows(isa: Isa, rows: usize) -> Self {
        let panels = rows.div_ceil(isa.tile().0).max(1);
        Self::new(rows, rows.div_ceil(panels).max(1))
    }
    /// The columns of an output.
    pub(crate) fn cols(isa: Isa, cols: usize) -> Self {
        Self::new(cols, isa.tile().1)
    }
    /// Number of groups.
    pub(crate) fn groups(&self) -> usize {
        self.groups
    }
    /// First panel of a group; groups differ by one panel at most.
    fn first_panel(&self, group: usize) -> usize {
        let panels = self.len.div_ceil(self.panel);
        group * (panels / self.groups.max(1)) + group.min(panels % self.groups.max(1))
    }
    /// Rows or columns of a group.
    fn group(&self, group: usize) -> Range<usize> {
        self.first_panel(group) * self.panel..(self.first_panel(group + 1) * self.panel).min(self.len)
    }
    /// Groups of a packed part, if a panel takes `panel_len` elements.
    fn groups_per_part(&self, panel_len: usize) -> usize {
        (PACK_LIMIT / (panel_len * GROUP).max(1)).clamp(1, self.groups.max(1))
    }
    /// Elements that the largest packed part may take. Grows with the length and the panel, so that a workspace for a shape
    /// serves every smaller one.
    fn part_len(&self, panel_len: usize) -> usize {
        let panels = self.len.div_ceil(self.panel);
        panels.saturating_mul(panel_len).min(PACK_LIMIT.max(panel_len.saturating_mul(GROUP)))
    }
    /// Width of a packed panel of rows.
    fn left_width(&self) -> usize {
        left_width(self.panel)
    }
}

/// Elements of a workspace that a product takes.
pub(crate) fn workspace_len(isa: Isa, rows: usize, cols: usize, depth: usize) -> usize {
    let (row_cut, col_cut) = (Cut::rows(isa, rows), Cut::cols(isa, cols));
    let left = row_cut.part_len(row_cut.left_width().saturating_mul(depth));
    let right = col_cut.part_len(col_cut.panel.saturating_mul(depth));
    f32_len(left) + f32_len(right)
}

/// A product and what limits it.
pub(crate) struct Gemm<'a, L: CpuElement, R: CpuElement> {
    pub left: Operand<'a, L>,
    pub right: Operand<'a, R>,
    /// Whether only tiles that touch the upper triangle (row ≤ column) are computed.
    pub upper: bool,
}

impl<L: CpuElement, R: CpuElement> Gemm<'_, L, R> {
    /// Computes the product; `workspace` has [`workspace_len`] elements.
    pub(crate) fn run<X: Epilogue>(&self, core: &Core, workspace: &mut [f64], epilogue: &X) {
        let isa = core.isa;
        let (rows, cols, depth) = (self.left.len(), self.right.len(), self.left.depth());
        debug_assert_eq!(depth, self.right.depth());
        let (row_cut, col_cut) = (Cut::rows(isa, rows), Cut::cols(isa, cols));
        let (left_panel, right_panel) = (row_cut.left_width() * depth, col_cut.panel * depth);
        let (left_space, right_space) = workspace.split_at_mut(f32_len(row_cut.part_len(left_panel)));
        let left_space: &mut [f32] = bytemuck::cast_slice_mut(left_space);
        let right_space: &mut [f32] = bytemuck::cast_slice_mut(right_space);
        let (row_step, col_step) = (row_cut.groups_per_part(left_panel), col_cut.groups_per_part(right_panel));

        for col_groups in parts(col_cut.groups, col_step) {
            let right = Packed::new(core, &self.right, col_cut, &col_groups, right_panel, col_cut.panel, right_space);
            for row_groups in parts(row_cut.groups, row_step) {
                let left =
                    Packed::new(core, &self.left, row_cut, &row_groups, left_panel, row_cut.left_width(), left_space);
                let tasks = row_groups.len() * col_groups.len();
                let first = (row_groups.start, col_groups.start);
                let part_rows = row_cut.group(row_groups.start).start..row_cut.group(row_groups.end - 1).end;
                let part_cols = col_cut.group(col_groups.start).start..col_cut.group(col_groups.end - 1).end;
                let work = part_rows.len().saturating_mul(part_cols.len()).saturating_mul(depth.max(16));
                core.threads.for_each(tasks, work, |task| {
                    let (row_index, col_index) = (first.0 + task / col_groups.len(), first.1 + task % col_groups.len());
                    let (rows, cols) = (row_cut.group(row_index), col_cut.group(col_index));
                    if self.upper && cols.end <= rows.start {
                        return;
                    }
                    let group = Group { row_index, col_index, rows, cols };
                    let mut state = epilogue.begin(&group);
                    isa.run(GroupTask {
                        epilogue,
                        state: &mut state,
                        group: &group,
                        left: left.panels(row_cut, row_index),
                        right: right.panels(col_cut, col_index),
                        depth,
                        tile_rows: row_cut.panel,
                        upper: self.upper,
                    });
                    epilogue.end(state, &group);
                });
            }
        }
    }
}

/// Ranges of `step` out of `count`.
fn parts(count: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).step_by(step.max(1)).map(move |start| start..count.min(start + step))
}

/// The packed panels of some groups.
struct Packed<'a> {
    data: &'a [f32],
    panel_len: usize,
    first_panel: usize,
}

impl<'a> Packed<'a> {
    fn new<E: CpuElement>(
        core: &Core,
        operand: &Operand<'_, E>,
        cut: Cut,
        groups: &Range<usize>,
        panel_len: usize,
        width: usize,
        space: &'a mut [f32],
    ) -> Self {
        let (first_panel, end) = (cut.first_panel(groups.start), cut.first_panel(groups.end));
        let data = &mut space[..(end - first_panel) * panel_len];
        if panel_len > 0 {
            let panels = Out::dense(data, panel_len);
            // Packing an element costs about as much as a few multiply-adds.
            core.threads.for_each(end - first_panel, panels_work(end - first_panel, panel_len), |panel| {
                // SAFETY: each panel is packed by one task.
                let target = unsafe { panels.part(panel, 0..panel_len) };
                let start = (first_panel + panel) * cut.panel;
                core.isa.run(PackTask { operand, start, width, target });
            });
        }
        Self { data, panel_len, first_panel }
    }

    /// The panels of a group.
    fn panels(&self, cut: Cut, group: usize) -> &'a [f32] {
        let panels = cut.first_panel(group) - self.first_panel..cut.first_panel(group + 1) - self.first_panel;
        &self.data[panels.start * self.panel_len..panels.end * self.panel_len]
    }
}

fn panels_work(panels: usize, panel_len: usize) -> usize {
    panels.saturating_mul(panel_len).saturating_mul(8)
}

struct PackTask<'a, 'b, E: CpuElement> {
    operand: &'a Operand<'b, E>,
    start: usize,
    width: usize,
    target: &'a mut [f32],
}

impl<E: CpuElement> Task for PackTask<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.operand.pack(s, self.start, self.width, self.target);
    }
}

struct GroupTask<'a, X: Epilogue> {
    epilogue: &'a X,
    state: &'a mut X::State,
    group: &'a Group,
    left: &'a [f32],
    right: &'a [f32],
    depth: usize,
    tile_rows: usize,
    upper: bool,
}

/// Aligned to a cache line.
#[repr(align(64))]
struct TileBuffer([f32; MAX_TILE]);

impl<X: Epilogue> Task for GroupTask<'_, X> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (tile_rows, tile_cols) = (self.tile_rows, TILE_VECTORS * S::LANES);
        let (left_panel, right_panel) = (left_width(tile_rows) * self.depth, tile_cols * self.depth);
        let product_tile = S::TILES[tile_rows - 1];
        let mut buffer = TileBuffer([0.0; MAX_TILE]);
        let (all_rows, all_cols) = (&self.group.rows, &self.group.cols);
        for (j, col) in all_cols.clone().step_by(tile_cols).enumerate() {
            let cols = col..all_cols.end.min(col + tile_cols);
            let right = &self.right[j * right_panel..(j + 1) * right_panel];
            for (i, row) in all_rows.clone().step_by(tile_rows).enumerate() {
                if self.upper && cols.end <= row {
                    break;
                }
                let rows = row..all_rows.end.min(row + tile_rows);
                let left = &self.left[i * left_panel..(i + 1) * left_panel];
                // SAFETY: the panels have `depth` steps, the buffer has room for the largest tile, and `Isa::run` came here.
                unsafe { product_tile(self.depth, left.as_ptr(), right.as_ptr(), buffer.0.as_mut_ptr()) };
                let tile = Tile { data: &buffer.0, stride: tile_cols, rows, cols: cols.clone() };
                self.epilogue.tile(s, self.state, self.group, tile);
            }
        }
    }
}

/// Hands the tiles of a matrix that is there already, or of zeros, to an epilogue: the same epilogue with and without a product.
pub(crate) struct Pointwise<'a, E: CpuElement> {
    pub rows: usize,
    pub cols: usize,
    /// May be what the epilogue writes: a tile is read before it is handed over.
    pub source: Option<Out<'a, E>>,
}

impl<E: CpuElement> Pointwise<'_, E> {
    pub(crate) fn run<X: Epilogue>(&self, core: &Core, epilogue: &X) {
        let (row_cut, col_cut) = (Cut::rows(core.isa, self.rows), Cut::cols(core.isa, self.cols));
        let work = self.rows.saturating_mul(self.cols).saturating_mul(16);
        core.threads.for_each(row_cut.groups * col_cut.groups, work, |task| {
            let (row_index, col_index) = (task / col_cut.groups, task % col_cut.groups);
            let group = Group { row_index, col_index, rows: row_cut.group(row_index), cols: col_cut.group(col_index) };
            let mut state = epilogue.begin(&group);
            core.isa.run(PointwiseTask { epilogue, state: &mut state, group: &group, source: self.source });
            epilogue.end(state, &group);
        });
    }
}

struct PointwiseTask<'a, X: Epilogue, E: CpuElement> {
    epilogue: &'a X,
    state: &'a mut X::State,
    group: &'a Group,
    source: Option<Out<'a, E>>,
}

impl<X: Epilogue, E: CpuElement> Task for PointwiseTask<'_, X, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (tile_rows, tile_cols) = (S::ROWS, TILE_VECTORS * S::LANES);
        let mut buffer = TileBuffer([0.0; MAX_TILE]);
        let (all_rows, all_cols) = (&self.group.rows, &self.group.cols);
        for row in all_rows.clone().step_by(tile_rows) {
            let rows = row..all_rows.end.min(row + tile_rows);
            for col in all_cols.clone().step_by(tile_cols) {
                let cols = col..all_cols.end.min(col + tile_cols);
                if let Some(source) = &self.source {
                    for (row, tile_row) in rows.clone().zip(buffer.0.chunks_mut(tile_cols)) {
                        // SAFETY: groups are disjoint, and the part is given back before the epilogue takes it.
                        E::widen(unsafe { source.part(row, cols.clone()) }, &mut tile_row[..cols.len()]);
                    }
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

    #[test]
    fn groups_cover_everything_once_in_nearly_equal_parts() {
        for isa in Isa::available() {
            for len in (0..700).chain([4096, 6145]) {
                for cut in [Cut::rows(isa, len), Cut::cols(isa, len)] {
                    let sizes: Vec<usize> = (0..cut.groups()).map(|group| cut.group(group).len()).collect();
                    let covered: Vec<usize> = (0..cut.groups()).flat_map(|group| cut.group(group)).collect();
                    assert_eq!(covered, (0..len).collect::<Vec<_>>(), "{isa:?}, {len}");
                    let largest = sizes.iter().max().copied().unwrap_or(0);
                    assert!(largest <= cut.panel * GROUP && largest <= MAX_GROUP_COLS.max(MAX_GROUP_ROWS));
                    // All but the last differ by one panel at most.
                    assert!(
                        sizes.iter().rev().skip(1).all(|size| size + cut.panel >= largest),
                        "{isa:?}, {len}: {sizes:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_workspace_for_a_shape_serves_every_smaller_one() {
        let extents = [0, 1, 9, 14, 15, 16, 17, 28, 29, 100, 128, 500, 784, 1000, 2000, 3000, 4096, 5000, 8192, 20_000];
        for isa in Isa::available() {
            for pair in extents.windows(2) {
                for [a, b] in extents.iter().flat_map(|a| extents.iter().map(|b| [*a, *b])) {
                    let len = |x: usize| [[x, a, b], [a, x, b], [a, b, x]].map(|[m, n, k]| workspace_len(isa, m, n, k));
                    let (smaller, larger) = (len(pair[0]), len(pair[1]));
                    assert!(smaller.iter().zip(&larger).all(|(s, l)| s <= l), "{isa:?}, {pair:?}, {a}, {b}");
                }
            }
        }
    }
}
