//! How the operands of a product get to the register tile: read in place, or copied in the layout that it reads.
//!
//! The tile broadcasts values of the left operand, so any layout will do and only what has to be widened, centred or scaled is copied. It
//! loads vectors of the right operand, which must run along the output's columns and begin where vectors do: unless the matrix lies like that
//! already, all of it is packed into panels before the tasks, transposed if need be; or, if one task only reads a panel, by that task.
//!
//! A step of the depth is one `f32`, or a pair of `bf16` where the instruction set multiplies pairs: both are lanes of 32 bits.

use super::gemm::{Cut, GROUP, pack_limit};
use super::memory::Out;
use super::rows;
use super::simd::{Isa, LeftLayout, MAX_TILE_WIDTH, ProductTiles, Simd, TILE_VECTORS, TRANSPOSE, Task};
use super::{Core, CpuElement};
use crate::matrix::MatRef;
use std::ops::Range;

/// What runs along a matrix's rows or columns: (value − shift)·scale.
#[derive(Clone, Copy)]
pub(crate) struct Affine<'a> {
    pub axis: Axis,
    pub shift: Option<&'a [f32]>,
    pub scale: Option<&'a [f32]>,
}

/// Which index of a matrix a vector belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Axis {
    Row,
    Column,
}

/// One side of a product, as a matrix (panel index, depth).
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a, E: CpuElement> {
    matrix: MatRef<'a, E>,
    /// Whether the matrix's rows run along the depth, so that the panel index is its column.
    transposed: bool,
    affine: Option<Affine<'a>>,
}

impl<'a, E: CpuElement> Operand<'a, E> {
    /// Panel index = row, depth = column.
    pub(crate) fn rows(matrix: MatRef<'a, E>) -> Self {
        Self { matrix, transposed: false, affine: None }
    }
    /// Panel index = column, depth = row.
    pub(crate) fn cols(matrix: MatRef<'a, E>) -> Self {
        Self { matrix, transposed: true, affine: None }
    }
    pub(crate) fn with(self, affine: Affine<'a>) -> Self {
        Self { affine: Some(affine), ..self }
    }
    /// Extent along the panels.
    pub(crate) fn len(&self) -> usize {
        if self.transposed { self.matrix.cols() } else { self.matrix.rows() }
    }
    /// Extent along the sum.
    pub(crate) fn depth(&self) -> usize {
        if self.transposed { self.matrix.rows() } else { self.matrix.cols() }
    }

    /// The matrix itself, if what it holds is the lanes that the tile multiplies.
    fn in_place(&self, lanes: Lanes) -> Option<InPlace<'a>> {
        let step = self.matrix.row_stride();
        match lanes {
            _ if self.affine.is_some() => None,
            Lanes::Floats | Lanes::Dots => E::as_f32(self.matrix.data()).map(|data| InPlace { data, step }),
            // Pairs lie side by side along the rows.
            Lanes::Pairs if self.transposed || !(step | self.matrix.cols()).is_multiple_of(2) => None,
            Lanes::Pairs => {
                let data = self.matrix.data();
                let data = bytemuck::try_cast_slice(&data[..data.len() - data.len() % 2]).ok()?;
                Some(InPlace { data, step: step / 2 })
            }
        }
    }

    /// Copies a part of the matrix, one row after another, `step` lanes apart; columns are padded with zeros to whole register rows.
    #[inline(always)]
    fn copy<S: Simd>(&self, s: S, rows: Range<usize>, cols: Range<usize>, to: &mut [f32], step: usize) {
        let width = TILE_VECTORS * S::LANES;
        // Rows that are fetched ahead: many, where the processor itself does not fetch what lies pages apart.
        let pages_apart = self.matrix.row_stride() * size_of::<E>() >= 4096;
        let ahead = if cols.len() <= width && pages_apart { 32 } else { 4 };
        for (row, to) in rows.zip(to.chunks_mut(step)) {
            let from = &self.matrix.row(row)[cols.clone()];
            let ahead = from.as_ptr().wrapping_add(ahead * self.matrix.row_stride());
            for (index, (from, to)) in from.chunks(width).zip(to.chunks_mut(width)).enumerate() {
                for line in 0..(width * size_of::<E>()).div_ceil(64) {
                    s.prefetch(ahead.wrapping_add(index * width).cast::<u8>().wrapping_add(64 * line));
                }
                let mut values = rows::widen(s, from);
                if let Some(affine) = &self.affine {
                    let first = cols.start + index * width;
                    values = affine.apply(s, row, first..first + from.len(), values);
                }
                rows::store(s, to, values);
            }
        }
    }

    /// A part of a row of 16-bit numbers.
    fn bits(&self, row: usize, cols: &Range<usize>) -> &[u16] {
        bytemuck::cast_slice(&self.matrix.row(row)[cols.clone()])
    }

    /// As [`copy`](Self::copy), but pairs of columns make a lane.
    fn copy_pairs_of_columns(&self, rows: Range<usize>, cols: Range<usize>, to: &mut [f32], step: usize) {
        for (row, to) in rows.zip(to.chunks_mut(step)) {
            let to: &mut [u16] = bytemuck::cast_slice_mut(&mut to[..cols.len().div_ceil(2)]);
            to[cols.len() - cols.len() % 2..].fill(0);
            to[..cols.len()].copy_from_slice(self.bits(row, &cols));
        }
    }

    /// As [`copy`](Self::copy), but pairs of rows make a lane.
    #[inline(always)]
    fn copy_pairs_of_rows(&self, rows: Range<usize>, cols: Range<usize>, to: &mut [f32], step: usize) {
        for (row, to) in rows.clone().step_by(2).zip(to.chunks_mut(step)) {
            let to: &mut [u32] = bytemuck::cast_slice_mut(to);
            let (pairs, padding) = to.split_at_mut(cols.len());
            if row + 1 < rows.end {
                for ((pair, first), second) in
                    pairs.iter_mut().zip(self.bits(row, &cols)).zip(self.bits(row + 1, &cols))
                {
                    *pair = u32::from(*first) | u32::from(*second) << 16;
                }
            } else {
                for (pair, first) in pairs.iter_mut().zip(self.bits(row, &cols)) {
                    *pair = u32::from(*first);
                }
            }
            padding.fill(0);
        }
    }

    /// Copies a part of a transposed operand: for each step of the depth, the values of some panel indices.
    #[inline(always)]
    fn copy_steps<S: Simd>(
        &self,
        s: S,
        lanes: Lanes,
        depth: &Range<usize>,
        cols: &Range<usize>,
        to: &mut [f32],
        step: usize,
    ) {
        match lanes {
            Lanes::Floats | Lanes::Dots => self.copy(s, depth.clone(), cols.clone(), to, step),
            Lanes::Pairs => self.copy_pairs_of_rows(depth.clone(), cols.clone(), to, step),
        }
    }

    /// Copies a part of an operand that is not transposed: for each panel index, its values along the depth.
    #[inline(always)]
    fn copy_indices<S: Simd>(
        &self,
        s: S,
        lanes: Lanes,
        rows: Range<usize>,
        depth: &Range<usize>,
        to: &mut [f32],
        step: usize,
    ) {
        match lanes {
            Lanes::Floats | Lanes::Dots => self.copy(s, rows, depth.clone(), to, step),
            Lanes::Pairs => self.copy_pairs_of_columns(rows, depth.clone(), to, step),
        }
    }

    /// Packs the panel of `width` indices from `start` on, of an operand that is not transposed: for each step of the depth, `width`
    /// lanes, 0 beyond the end. Blocks of 8×8 are transposed, from the matrix itself if it holds the lanes as they are.
    #[inline(always)]
    fn pack<S: Simd>(&self, s: S, lanes: Lanes, start: usize, width: usize, panel: &mut [f32]) {
        /// Steps of the depth that are staged at a time.
        const STAGE: usize = 64;
        let steps = lanes.steps(self.depth());
        let valid = width.min(self.len() - start);
        let direct = self.in_place(lanes).filter(|_| valid == width);
        let mut stage = [0.0f32; MAX_TILE_WIDTH * STAGE];
        for first in (0..steps).step_by(STAGE) {
            let count = STAGE.min(steps - first);
            let (from, stride) = match direct {
                Some(InPlace { data, step }) => (&data[start * step + first..], step),
                None => {
                    let range = lanes.depth(first)..lanes.depth(first + count).min(self.depth());
                    self.copy_indices(s, lanes, start..start + valid, &range, &mut stage, STAGE);
                    stage[valid * STAGE..].fill(0.0);
                    (&stage[..], STAGE)
                }
            };
            let to = &mut panel[first * width..(first + count) * width];
            assert!(from.len() >= (width - 1) * stride + count);
            let whole = count - count % TRANSPOSE;
            for k in (0..whole).step_by(TRANSPOSE) {
                // All of a step's lanes before the next: cache lines are written once.
                for group in (0..width).step_by(TRANSPOSE) {
                    let (from, to) = (from[group * stride + k..].as_ptr(), to[k * width + group..].as_mut_ptr());
                    // SAFETY: `from` has `width` rows of `count` elements, as just asserted, `to` has `count` rows of `width`.
                    unsafe { s.transpose(from, stride, to, width) };
                }
            }
            for k in whole..count {
                for i in 0..width {
                    to[k * width + i] = from[i * stride + k];
                }
            }
        }
    }
}

impl Affine<'_> {
    /// Applies itself to a row's values in `cols`.
    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: usize, cols: Range<usize>, mut values: rows::Row<S>) -> rows::Row<S> {
        let part = |vector: &[f32]| match self.axis {
            Axis::Row => rows::splat(s, vector[row]),
            Axis::Column => rows::load(s, &vector[cols.clone()]),
        };
        if let Some(shift) = self.shift.map(part) {
            values = [s.sub(values[0], shift[0]), s.sub(values[1], shift[1])];
        }
        if let Some(scale) = self.scale.map(part) {
            values = [s.mul(values[0], scale[0]), s.mul(values[1], scale[1])];
        }
        values
    }
}

/// A matrix's rows as lanes.
#[derive(Clone, Copy)]
struct InPlace<'a> {
    data: &'a [f32],
    step: usize,
}

/// What a step of the depth is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lanes {
    /// One `f32`.
    Floats,
    /// One `f32`; both operands lie along the depth and there are few columns, so the tile sums along the depth.
    Dots,
    /// Two `bf16`.
    Pairs,
}

impl Lanes {
    /// Pairs need operands that are multiplied as they are stored: what is computed from them would lose its digits.
    pub(crate) fn of<L: CpuElement, R: CpuElement>(isa: Isa, left: &Operand<'_, L>, right: &Operand<'_, R>) -> Self {
        let stored = left.affine.is_none() && right.affine.is_none();
        let few = isa.tile().1 / TILE_VECTORS;
        if !left.transposed && !right.transposed && right.len() <= few {
            Lanes::Dots
        } else if isa == Isa::Avx512Bf16 && L::PAIRS && R::PAIRS && stored {
            Lanes::Pairs
        } else {
            Lanes::Floats
        }
    }
    /// Values of a lane.
    fn depth(self, steps: usize) -> usize {
        if self == Lanes::Pairs { 2 * steps } else { steps }
    }
    /// Lanes of a depth.
    pub(crate) fn steps(self, depth: usize) -> usize {
        if self == Lanes::Pairs { depth.div_ceil(2) } else { depth }
    }
    /// The register tiles.
    #[inline(always)]
    pub(crate) fn tiles<S: Simd>(self) -> &'static ProductTiles {
        match self {
            Lanes::Floats | Lanes::Dots => S::TILES,
            Lanes::Pairs => S::PAIR_TILES.expect("`of` chooses pairs for the instruction set that has them"),
        }
    }
}

/// How the left operand gets to the tile.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a, 'p, E: CpuElement> {
    operand: Operand<'a, E>,
    lanes: Lanes,
    source: LeftSource<'p>,
}

#[derive(Clone, Copy)]
enum LeftSource<'p> {
    InPlace(InPlace<'p>),
    /// Tasks copy their part.
    Copied,
    /// All of it is the packed right operand.
    Shared(&'p [f32]),
}

/// A group's part of the left operand.
pub(crate) struct PlacedLeft {
    data: *const f32,
    pub step: usize,
    pub layout: LeftLayout,
    /// The index whose values `data` begins with.
    first: usize,
    /// Width and elements of the packed panels that it lies in.
    packed: Option<(usize, usize)>,
}

impl PlacedLeft {
    /// Where the panel begins whose first index is `index`.
    pub(crate) fn panel(&self, index: usize) -> *const f32 {
        let offset = match (self.packed, self.layout) {
            (Some((width, panel_len)), _) => index / width * panel_len + index % width,
            (None, LeftLayout::Across) => (index - self.first) * self.step,
            (None, LeftLayout::Along) => index - self.first,
        };
        self.data.wrapping_add(offset)
    }
}

impl<'a: 'p, 'p, E: CpuElement> Left<'a, 'p, E> {
    /// `shared` is the right operand as it was packed, if both are the same.
    pub(crate) fn new(operand: &Operand<'a, E>, lanes: Lanes, shared: Option<&'p [f32]>) -> Self {
        // Rows at a multiple of this distance share few places in the caches, and a panel reads many at once.
        const FAR: usize = 2048 / size_of::<f32>();
        let source = match (shared, operand.in_place(lanes)) {
            (Some(packed), _) => LeftSource::Shared(packed),
            (None, Some(at)) if lanes == Lanes::Dots || !at.step.is_multiple_of(FAR) => LeftSource::InPlace(at),
            (None, _) => LeftSource::Copied,
        };
        Self { operand: *operand, lanes, source }
    }

    /// Elements that the copy of a group may take.
    pub(crate) fn len(rows: usize, chunk: usize) -> usize {
        (rows * Self::row_step(chunk)).max(rows.next_multiple_of(MAX_TILE_WIDTH) * chunk)
    }

    /// Not a multiple of a large power of two, as above.
    fn row_step(steps: usize) -> usize {
        steps.next_multiple_of(MAX_TILE_WIDTH) + MAX_TILE_WIDTH / 2
    }

    /// A group's indices in a chunk of the depth. If they have to be copied, `space` takes the copy, or has it already unless `copy`.
    #[inline(always)]
    pub(crate) fn place<S: Simd>(
        &self,
        s: S,
        rows: &Range<usize>,
        depth: &Range<usize>,
        space: &mut [f32],
        copy: bool,
    ) -> PlacedLeft {
        let width = TILE_VECTORS * S::LANES;
        let transposed = self.operand.transposed;
        let layout = if transposed { LeftLayout::Along } else { LeftLayout::Across };
        let start = self.lanes.steps(depth.start);
        match self.source {
            LeftSource::Shared(data) => {
                let packed = Some((width, width * self.lanes.steps(self.operand.depth())));
                let data = data.as_ptr().wrapping_add(width * start);
                PlacedLeft { data, step: width, layout: LeftLayout::Along, first: 0, packed }
            }
            LeftSource::InPlace(InPlace { data, step }) => {
                let offset = if transposed { start * step + rows.start } else { rows.start * step + start };
                let data = data.as_ptr().wrapping_add(offset);
                PlacedLeft { data, step, layout, first: rows.start, packed: None }
            }
            LeftSource::Copied => {
                let step = match layout {
                    LeftLayout::Along => rows.len().next_multiple_of(width),
                    LeftLayout::Across => Self::row_step(self.lanes.steps(depth.len())),
                };
                match layout {
                    _ if !copy => (),
                    LeftLayout::Along => self.operand.copy_steps(s, self.lanes, depth, rows, space, step),
                    LeftLayout::Across => {
                        self.operand.copy_indices(s, self.lanes, rows.clone(), depth, space, step);
                    }
                }
                PlacedLeft { data: space.as_ptr(), step, layout, first: rows.start, packed: None }
            }
        }
    }
}

/// How the right operand gets to the tile.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, 'p, E: CpuElement> {
    operand: Operand<'a, E>,
    lanes: Lanes,
    source: Source<'p>,
}

#[derive(Clone, Copy)]
enum Source<'p> {
    /// Tasks copy panels that are not whole.
    InPlace(InPlace<'p>),
    /// Tasks copy their panels: each is one task's.
    Copied,
    /// Of [`Lanes::Dots`]: rows in place, or copied by tasks.
    Rows(Option<InPlace<'p>>),
    /// Panels from `first_panel` on.
    Packed { data: &'p [f32], first_panel: usize },
}

/// A panel of the right operand: step `k` is at `k·step`.
pub(crate) struct PlacedRight {
    pub data: *const f32,
    pub step: usize,
}

/// Elements that packed panels may take. Grows with the length, so that a workspace for a shape serves every smaller one.
pub(crate) fn packed_len(cut: Cut, depth: usize, limit: usize) -> usize {
    let panel = cut.width().saturating_mul(depth);
    cut.panels().saturating_mul(panel).min(limit.max(panel.saturating_mul(GROUP)))
}

/// How the right operand of a product will be read, decided before any of it is packed.
pub(crate) struct RightPlan<'a, E: CpuElement> {
    operand: Operand<'a, E>,
    lanes: Lanes,
    /// How its columns are cut.
    pub cut: Cut,
    in_place: Option<InPlace<'a>>,
    /// Whether there is one group of rows, whose tasks copy what cannot be read in place.
    copied: bool,
    limit: usize,
}

impl<'a, E: CpuElement> RightPlan<'a, E> {
    /// For a product of `rows` rows. `symmetric`: with the operand itself, when all tasks share one copy. `cut_anywhere`: columns may be cut
    /// where the vectors of an operand begin that is read in place.
    pub(crate) fn new(
        isa: Isa,
        operand: Operand<'a, E>,
        lanes: Lanes,
        rows: usize,
        symmetric: bool,
        cut_anywhere: bool,
    ) -> Self {
        /// Multiply-adds that take as long as packing an element.
        const PACKING: usize = 16;
        /// Rows at a multiple of this distance share few places in the caches.
        const FAR: usize = 1024 / size_of::<f32>();
        let (tile_rows, width) = isa.tile();
        let vector = width / TILE_VECTORS;
        let cut = Cut::cols(isa, operand.len());
        let copied = operand.transposed && rows <= GROUP * tile_rows && !symmetric;
        let plan = |cut, in_place| Self { operand, lanes, cut, in_place, copied, limit: pack_limit(symmetric) };
        let Some(at) = operand.in_place(lanes) else { return plan(cut, None) };
        // Dot products read rows. A panel that is read once or twice is better read than copied.
        if lanes == Lanes::Dots || (operand.transposed && rows <= 2 * tile_rows) {
            return plan(cut, Some(at));
        }
        if !operand.transposed || !at.step.is_multiple_of(vector) || at.step.is_multiple_of(FAR) {
            return plan(cut, None);
        }
        let skipped = at.data.as_ptr().addr() / size_of::<f32>() % vector;
        let shifted = Cut::cols_from(isa, operand.len(), width - skipped);
        let extra = (shifted.panels() - cut.panels()) * width * rows;
        match skipped {
            0 => plan(cut, Some(at)),
            _ if cut_anywhere && extra <= PACKING * operand.len() => plan(shifted, Some(at)),
            _ => plan(cut, None),
        }
    }

    fn is_packed(&self) -> bool {
        self.in_place.is_none() && self.lanes != Lanes::Dots && !self.copied
    }

    /// Elements that packed panels may take.
    pub(crate) fn packed_len(&self) -> usize {
        if self.is_packed() { packed_len(self.cut, self.operand.depth(), self.limit) } else { 0 }
    }

    /// The groups of columns that are packed at a time.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        let panel = self.cut.width().saturating_mul(self.lanes.steps(self.operand.depth()));
        let at_once = if self.is_packed() { self.limit / (panel * GROUP).max(1) } else { usize::MAX };
        let (groups, step) = (self.cut.groups(), at_once.clamp(1, self.cut.groups().max(1)));
        (0..groups).step_by(step).map(move |start| start..groups.min(start + step))
    }

    /// Whether all of it will be packed, in one part.
    pub(crate) fn is_packed_at_once(&self) -> bool {
        self.is_packed() && self.parts().count() == 1
    }

    /// Packs the groups of a part into `space`, if the operand has to be.
    pub(crate) fn pack<'p>(&self, core: &Core, part: &Range<usize>, space: &'p mut [f32]) -> Right<'a, 'p, E>
    where
        'a: 'p,
    {
        let &Self { operand, lanes, cut, in_place, .. } = self;
        let right = |source| Right { operand, lanes, source };
        if !self.is_packed() {
            return right(match in_place {
                Some(at) if lanes != Lanes::Dots => Source::InPlace(at),
                None if lanes != Lanes::Dots => Source::Copied,
                rows => Source::Rows(rows),
            });
        }
        let (first_panel, end) = (cut.first_panel(part.start), cut.first_panel(part.end));
        let steps = lanes.steps(operand.depth());
        let panel_len = cut.width() * steps;
        let data = &mut space[..(end - first_panel) * panel_len];
        if panel_len > 0 {
            let panels = Out::dense(&mut *data, panel_len);
            // Packing an element costs about as much as a few multiply-adds.
            let work = (end - first_panel).saturating_mul(panel_len).saturating_mul(8);
            let task = PackTask { operand: &operand, lanes, cut, first_panel, panels };
            if operand.transposed {
                let blocks = steps.div_ceil(PackTask::<E>::STEPS);
                core.threads.for_each(blocks, work, |block| core.isa.run(PackSteps(&task, block)));
            } else {
                core.threads.for_each(end - first_panel, work, |panel| core.isa.run(PackPanel(&task, panel)));
            }
        }
        right(Source::Packed { data, first_panel })
    }
}

impl<'p, E: CpuElement> Right<'_, 'p, E> {
    /// The packed panels, if they are all there.
    pub(crate) fn packed(&self) -> Option<&'p [f32]> {
        match self.source {
            Source::Packed { data, first_panel: 0 } => Some(data),
            _ => None,
        }
    }

    /// Where the tiles should prefetch from, a cache line a step, and bytes between steps: part `part` of the panel that begins at
    /// `(depth, col)`.
    #[inline(always)]
    pub(crate) fn line(&self, &(depth, col): &(usize, usize), part: usize) -> (*const u8, usize) {
        const LINE: usize = 64;
        let matrix = &self.operand.matrix;
        let row_bytes = matrix.row_stride() * size_of::<E>();
        let rows = self.lanes.depth(1);
        let data = matrix.data().as_ptr().cast::<u8>();
        if !matches!(self.source, Source::InPlace(_)) || part >= 3 * rows {
            return (data, 0);
        }
        let row = depth + part % rows;
        (data.wrapping_add(row * row_bytes + col * size_of::<E>() + part / rows * LINE), rows * row_bytes)
    }

    /// A panel's columns in a chunk of the depth; `space` is used if they are copied.
    #[inline(always)]
    pub(crate) fn place<S: Simd>(
        &self,
        s: S,
        panel: usize,
        cols: &Range<usize>,
        depth: &Range<usize>,
        space: &mut [f32],
    ) -> PlacedRight {
        let width = TILE_VECTORS * S::LANES;
        match self.source {
            Source::Rows(Some(InPlace { data, step })) => {
                PlacedRight { data: data.as_ptr().wrapping_add(cols.start * step + depth.start), step }
            }
            Source::Rows(None) => {
                let step = depth.len().max(1).next_multiple_of(width);
                self.operand.copy_indices(s, self.lanes, cols.clone(), depth, space, step);
                PlacedRight { data: space.as_ptr(), step }
            }
            Source::Copied => {
                self.operand.copy_steps(s, self.lanes, depth, cols, space, width);
                PlacedRight { data: space.as_ptr(), step: width }
            }
            Source::Packed { data, first_panel } => {
                let panel_len = width * self.lanes.steps(self.operand.depth());
                let start = (panel - first_panel) * panel_len + width * self.lanes.steps(depth.start);
                PlacedRight { data: data.as_ptr().wrapping_add(start), step: width }
            }
            Source::InPlace(InPlace { data, step }) => {
                if cols.len() == width {
                    return PlacedRight { data: data.as_ptr().wrapping_add(depth.start * step + cols.start), step };
                }
                self.operand.copy_steps(s, self.lanes, depth, cols, space, width);
                PlacedRight { data: space.as_ptr(), step: width }
            }
        }
    }
}

/// Packs a right operand.
struct PackTask<'a, 'b, E: CpuElement> {
    operand: &'a Operand<'b, E>,
    lanes: Lanes,
    cut: Cut,
    first_panel: usize,
    panels: Out<'a, f32>,
}

impl<E: CpuElement> PackTask<'_, '_, E> {
    /// Steps of a block.
    const STEPS: usize = 16;
}

/// One panel of an operand that has to be transposed.
struct PackPanel<'a, 'b, 'c, E: CpuElement>(&'a PackTask<'b, 'c, E>, usize);

impl<E: CpuElement> Task for PackPanel<'_, '_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(PackTask { operand, lanes, cut, first_panel, panels }, panel) = self;
        let width = cut.width();
        // SAFETY: each panel is packed by one task.
        let target = unsafe { panels.part(panel, 0..width * lanes.steps(operand.depth())) };
        operand.pack(s, *lanes, (first_panel + panel) * width, width, target);
    }
}

/// A block of steps of an operand whose rows run along the panels: the rows are read as they lie.
struct PackSteps<'a, 'b, 'c, E: CpuElement>(&'a PackTask<'b, 'c, E>, usize);

impl<E: CpuElement> Task for PackSteps<'_, '_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(PackTask { operand, lanes, cut, first_panel, panels }, block) = self;
        let (width, steps) = (cut.width(), PackTask::<E>::STEPS);
        let steps = block * steps..lanes.steps(operand.depth()).min((block + 1) * steps);
        let depth = lanes.depth(steps.start)..lanes.depth(steps.end).min(operand.depth());
        for panel in 0..panels.rows() {
            let cols = cut.panel(first_panel + panel);
            // SAFETY: each block of steps is packed by one task.
            let target = unsafe { panels.part(panel, steps.start * width..steps.end * width) };
            operand.copy_steps(s, *lanes, &depth, &cols, target, width);
        }
    }
}

const _: () = assert!(MAX_TILE_WIDTH.is_multiple_of(TRANSPOSE));
