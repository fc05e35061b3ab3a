//! [`PackStatistics`] and [`UnpackStatistics`].

use super::gemm::blocks;
use super::memory::View;
use super::{Argument, Core, Cuda, CudaElement};
use crate::error::Result;
use crate::operations::{PackStatistics, UnpackStatistics};
use bytemuck::{Pod, Zeroable};

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct PackArgument {
    row_loss_sum: u64,
    shift: u64,
    sum: u64,
    squares: u64,
    comoments: View,
    packed_shift: u64,
    packed: u64,
    latents: i64,
    count: f64,
    accumulate: u32,
    padding: u32,
}

pub(super) fn pack_statistics<E: CudaElement>(core: &Core, args: PackStatistics<'_, Cuda<E>>) -> Result<()> {
    let h = args.check()?;
    let argument = PackArgument {
        row_loss_sum: args.row_loss_sum.address(),
        shift: args.shift.address(),
        sum: args.sum.address(),
        squares: args.sum_squares.address(),
        comoments: args.comoments.as_ref().map_or(View::NONE, View::new),
        packed_shift: args.packed_shift.as_ref().map_or(0, |shift| shift.address()),
        packed: args.packed.address(),
        latents: h as i64,
        count: args.count as f64,
        accumulate: u32::from(args.accumulate),
        padding: 0,
    };
    core.launch("pack_statistics", [blocks(h)?, 1], 256, 0, Argument::new(&argument))
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct UnpackArgument {
    packed: u64,
    packed_shift: u64,
    row_loss_sum: u64,
    shift: u64,
    sum: u64,
    squares: u64,
    comoments: View,
    latents: i64,
    full: u32,
    padding: u32,
}

pub(super) fn unpack_statistics<E: CudaElement>(core: &Core, args: UnpackStatistics<'_, Cuda<E>>) -> Result<()> {
    let (h, full) = args.check()?;
    let argument = UnpackArgument {
        packed: args.packed.address(),
        packed_shift: args.packed_shift.as_ref().map_or(0, |shift| shift.address()),
        row_loss_sum: args.row_loss_sum.address(),
        shift: args.shift.address(),
        sum: args.sum.address(),
        squares: args.sum_squares.address(),
        comoments: args.comoments.as_ref().map_or(View::NONE, View::of),
        latents: h as i64,
        full: u32::from(full),
        padding: 0,
    };
    core.launch("unpack_statistics", [blocks(h)?, 1], 256, 0, Argument::new(&argument))
}
