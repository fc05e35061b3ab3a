//! Pieces of rows as pairs of vectors: what epilogues load, store and add up.

use super::CpuElement;
use super::gemm::MAX_GROUP_COLS;
use super::memory::Out;
use super::simd::{MAX_TILE_WIDTH, Simd, TILE_VECTORS};
use std::ops::Range;

/// A row of a register tile.
pub(super) type Row<S> = [<S as Simd>::Vector; TILE_VECTORS];

/// One value in every lane.
#[inline(always)]
pub(super) fn splat<S: Simd>(s: S, x: f32) -> Row<S> {
    [s.splat(x); TILE_VECTORS]
}

/// The first elements of a slice, 0 beyond its end.
#[inline(always)]
pub(super) fn load<S: Simd>(s: S, from: &[f32]) -> Row<S> {
    let split = from.len().min(S::LANES);
    [s.load(&from[..split]), s.load(&from[split..])]
}

/// As [`load`], from any storage type.
#[inline(always)]
pub(super) fn widen<S: Simd, E: CpuElement>(s: S, from: &[E]) -> Row<S> {
    if let Some(from) = E::as_f32(from) {
        return load(s, from);
    }
    let padded: [E; MAX_TILE_WIDTH];
    let from = if from.len() >= TILE_VECTORS * S::LANES {
        from
    } else {
        let mut copy = [E::zeroed(); MAX_TILE_WIDTH];
        copy[..from.len()].copy_from_slice(from);
        padded = copy;
        &padded
    };
    // SAFETY: two vectors are there.
    unsafe { [E::load_vector(s, from.as_ptr()), E::load_vector(s, from.as_ptr().add(S::LANES))] }
}

/// Stores as many elements as there is room for.
#[inline(always)]
pub(super) fn store<S: Simd>(s: S, to: &mut [f32], row: Row<S>) {
    let split = to.len().min(S::LANES);
    let (first, second) = to.split_at_mut(split);
    s.store(first, row[0]);
    s.store(second, row[1]);
}

/// Rounds to the storage type, stores, and returns what was stored.
#[inline(always)]
pub(super) fn narrow<S: Simd, E: CpuElement>(s: S, to: &mut [E], row: Row<S>) -> Row<S> {
    if let Some(to) = E::as_f32_mut(to) {
        store(s, to, row);
        return row;
    }
    let mut rounded = [E::zeroed(); MAX_TILE_WIDTH];
    let whole = to.len() >= TILE_VECTORS * S::LANES;
    let target = if whole { to.as_mut_ptr() } else { rounded.as_mut_ptr() };
    // SAFETY: there is room for two vectors.
    let stored = unsafe {
        for (v, vector) in row.into_iter().enumerate() {
            E::store_vector(s, target.add(v * S::LANES), vector);
        }
        [E::load_vector(s, target), E::load_vector(s, target.add(S::LANES))]
    };
    if !whole {
        to.copy_from_slice(&rounded[..to.len()]);
    }
    stored
}

/// Rounds to the storage type.
#[inline(always)]
pub(super) fn round<S: Simd, E: CpuElement>(s: S, row: Row<S>, cols: usize) -> Row<S> {
    narrow::<S, E>(s, &mut [E::zeroed(); MAX_TILE_WIDTH][..cols], row)
}

/// Sums over the rows of a group, for each of its columns. Each group of rows has its own row of slots, folded in order.
pub(super) struct ColumnSums([f64; MAX_GROUP_COLS]);

impl ColumnSums {
    pub(super) fn new() -> Self {
        Self([0.0; MAX_GROUP_COLS])
    }

    /// Adds a tile's sums; `col` counts within the group.
    #[inline(always)]
    pub(super) fn add<S: Simd>(&mut self, s: S, col: usize, sums: Row<S>) {
        let mut wide = [0.0; MAX_TILE_WIDTH];
        store(s, &mut wide, sums);
        for (sum, term) in self.0[col..].iter_mut().zip(&wide[..TILE_VECTORS * S::LANES]) {
            *sum += f64::from(*term);
        }
    }

    /// Writes the group's slots.
    ///
    /// # Safety
    /// The slots at (`row_group`, `cols`) are this task's.
    pub(super) unsafe fn write(&self, slots: &Out<'_, f64>, row_group: usize, cols: Range<usize>) {
        let len = cols.len();
        // SAFETY: the caller's promise.
        unsafe { slots.part(row_group, cols) }.copy_from_slice(&self.0[..len]);
    }
}

/// Adds up the rows of slots in order: sums_j (+)= Σ_g slots_gj.
pub(super) fn fold(slots: &[f64], accumulate: bool, sums: &mut [f64]) {
    if !accumulate {
        sums.fill(0.0);
    }
    if sums.is_empty() {
        return;
    }
    for row in slots.chunks_exact(sums.len()) {
        for (sum, term) in sums.iter_mut().zip(row) {
            *sum += term;
        }
    }
}

/// As [`fold`], into `f32`; the first row of slots is used up.
pub(super) fn fold_f32(slots: &mut [f64], accumulate: bool, sums: &mut [f32]) {
    if slots.is_empty() {
        if !accumulate {
            sums.fill(0.0);
        }
        return;
    }
    let (first, rest) = slots.split_at_mut(sums.len());
    fold(rest, true, first);
    for (sum, term) in sums.iter_mut().zip(first) {
        *sum = if accumulate { (f64::from(*sum) + *term) as f32 } else { *term as f32 };
    }
}
