//! Folds of slots in a fixed order.

use super::Core;
use super::driver::Argument;
use crate::error::Result;
use bytemuck::{Pod, Zeroable};

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct FoldArgument {
    slots: u64,
    out: u64,
    out_f32: u64,
    groups: i64,
    cols: i64,
    accumulate: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct SumArgument {
    values: u64,
    out: u64,
    count: i64,
    factor: f64,
    base: f64,
    accumulate: u32,
    padding: u32,
}

/// What a sum is added to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Base {
    Value(f64),
    /// What stands there.
    Out,
}

impl Base {
    pub(super) fn accumulate(accumulate: bool) -> Self {
        if accumulate { Base::Out } else { Base::Value(0.0) }
    }
}

impl Core {
    /// out_j (+)= Σ_g slots_gj.
    pub(super) fn fold(&self, slots: u64, groups: usize, cols: usize, accumulate: bool, out: u64) -> Result<()> {
        self.fold_into(slots, groups, cols, accumulate, out, 0)
    }

    /// As [`fold`](Self::fold), into `f32`.
    pub(super) fn fold_f32(&self, slots: u64, groups: usize, cols: usize, accumulate: bool, out: u64) -> Result<()> {
        self.fold_into(slots, groups, cols, accumulate, 0, out)
    }

    fn fold_into(
        &self,
        slots: u64,
        groups: usize,
        cols: usize,
        accumulate: bool,
        out: u64,
        out_f32: u64,
    ) -> Result<()> {
        let (groups, accumulate) = (groups as i64, u32::from(accumulate));
        let argument = FoldArgument { slots, out, out_f32, groups, cols: cols as i64, accumulate, padding: 0 };
        self.each("fold", cols, &argument)
    }

    /// *out = base + factor·Σ values.
    pub(super) fn sum(&self, values: u64, count: usize, factor: f64, base: Base, out: u64) -> Result<()> {
        let (accumulate, base) = match base {
            Base::Out => (1, 0.0),
            Base::Value(base) => (0, base),
        };
        let argument = SumArgument { values, out, count: count as i64, factor, base, accumulate, padding: 0 };
        self.launch("sum", [1, 1], 1024, 0, Argument::new(&argument))
    }
}
