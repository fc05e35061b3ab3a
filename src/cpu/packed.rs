//! [`PackStatistics`] and [`UnpackStatistics`].

use super::memory::Out;
use super::simd::Loop;
use super::{Core, Cpu, CpuElement};
use crate::error::Result;
use crate::operations::{PackStatistics, UnpackStatistics};
use crate::statistics::Kind;

/// Rows of comoments that a task has.
const ROWS: usize = 16;
/// Of each comoment, a load of 4 bytes and a load and a store of 8: as long as so many multiply-adds from memory.
const WORK: usize = 4;

/// Sums about a shift c, to be told about another, c'.
struct Moved<'a, C> {
    count: f64,
    sum: &'a [f64],
    /// c − c'.
    delta: C,
}

impl<C: Fn(usize) -> f64> Moved<'_, C> {
    fn sum(&self, i: usize) -> f64 {
        self.sum[i] + self.count * (self.delta)(i)
    }

    /// What is added to Σ(a_i − c_i)(a_j − c_j).
    #[inline(always)]
    fn product(&self, i: usize) -> impl Fn(usize) -> f64 {
        let (of_i, sum_i) = ((self.delta)(i), self.sum(i));
        move |j| of_i * self.sum[j] + sum_i * (self.delta)(j)
    }
}

pub(super) fn pack_statistics<E: CpuElement>(core: &Core, args: PackStatistics<'_, Cpu<E>>) -> Result<()> {
    let h = args.check()?;
    let before = |sum: f64| if args.accumulate { sum } else { 0.0 };
    let delta =
        |j: usize| f64::from(args.shift[j]) - args.packed_shift.map_or(0.0, |packed_shift| f64::from(packed_shift[j]));
    let moved = Moved { count: args.count as f64, sum: args.sum, delta };
    args.packed[0] = before(args.packed[0]) + moved.count;
    args.packed[1] = before(args.packed[1]) + args.row_loss_sum[0];
    for (j, sum) in args.packed[2..2 + h].iter_mut().enumerate() {
        *sum = before(*sum) + moved.sum(j);
    }
    let len = args.packed.len();
    let packed = Out::dense(args.packed, len);
    let kind = Kind { latents: h, full: args.comoments.is_some() };
    core.threads.for_each(h.div_ceil(ROWS), if kind.full { WORK * h * h / 2 } else { 0 }, |task| {
        core.isa.run(Loop(|| {
            for i in task * ROWS..h.min((task + 1) * ROWS) {
                // SAFETY: this task's latents are no other's.
                let to = unsafe { packed.part(0, kind.products(i)) };
                let product = moved.product(i);
                match &args.comoments {
                    Some(comoments) => {
                        for (at, (to, comoment)) in to.iter_mut().zip(&comoments.row(i)[i..]).enumerate() {
                            *to = before(*to) + (f64::from(*comoment) + product(i + at));
                        }
                    }
                    None => to[0] = before(to[0]) + (args.sum_squares[i] + product(i)),
                }
            }
        }));
    });
    Ok(())
}

pub(super) fn unpack_statistics<E: CpuElement>(core: &Core, mut args: UnpackStatistics<'_, Cpu<E>>) -> Result<()> {
    let (h, full) = args.check()?;
    let kind = Kind { latents: h, full };
    let (count, sum) = (args.packed[0], &args.packed[2..2 + h]);
    args.row_loss_sum[0] = args.packed[1];
    let packed_shift = |j: usize| args.packed_shift.map_or(0.0, |packed_shift| f64::from(packed_shift[j]));
    for (j, shift) in args.shift.iter_mut().enumerate() {
        *shift = if count == 0.0 { 0.0 } else { (packed_shift(j) + sum[j] / count) as f32 };
    }
    let shift = &*args.shift;
    let moved = Moved { count, sum, delta: |j: usize| packed_shift(j) - f64::from(shift[j]) };
    for i in 0..h {
        args.sum[i] = moved.sum(i);
        args.sum_squares[i] = args.packed[kind.products(i).start] + moved.product(i)(i);
    }
    let Some(comoments) = &mut args.comoments else { return Ok(()) };
    let out = Out::new(comoments);
    core.threads.for_each(h.div_ceil(ROWS), WORK * h * h / 2, |task| {
        core.isa.run(Loop(|| {
            for i in task * ROWS..h.min((task + 1) * ROWS) {
                let product = moved.product(i);
                // SAFETY: this task's latents are no other's.
                let to = unsafe { out.part(i, i..h) };
                for (at, (to, sum)) in to.iter_mut().zip(&args.packed[kind.products(i)]).enumerate() {
                    *to = (sum + product(i + at)) as f32;
                }
            }
        }));
    });
    Ok(())
}
