//! [`Sgd`], [`Adam`] and [`ProductUpdate`]: each buffer is read and written once.

use super::gemm::{Epilogue, Gemm, Group, Tile, workspace_len as gemm_len};
use super::memory::{Out, Scratch};
use super::pack::Operand;
use super::product::{ROWS_AT_A_TIME, Store, row_blocks};
use super::rows::{self, Row};
use super::simd::{Simd, TILE_VECTORS, Task};
use super::{Core, Cpu, CpuElement};
use crate::error::Result;
use crate::operations::{Adam, AdamConfig, Optimizer, ProductUpdate, Sgd, SgdConfig};
use std::ops::Range;

/// Parameters of one task.
const BLOCK: usize = 1 << 14;

pub(super) fn sgd<E: CpuElement>(core: &Core, args: Sgd<'_, Cpu<E>>) -> Result<()> {
    args.check()?;
    let optimizer = Optimizer::Sgd { config: args.config, velocity: args.velocity };
    let update = Update::<E>::new(optimizer, args.parameters, args.storage, args.gradient.len());
    update.all(core, args.gradient);
    Ok(())
}

pub(super) fn adam<E: CpuElement>(core: &Core, args: Adam<'_, Cpu<E>>) -> Result<()> {
    args.check()?;
    let Adam { config, step, first_moment, second_moment, .. } = args;
    let optimizer = Optimizer::Adam { config, step, first_moment, second_moment };
    let update = Update::<E>::new(optimizer, args.parameters, args.storage, args.gradient.len());
    update.all(core, args.gradient);
    Ok(())
}

/// Whether parameters, state and gradient stay in L2. Measured on 2026-11-21, one Zen 4 core with 1 MiB, against the product and Adam one after
/// the other: 6 % faster at 128×784×64; 1 % slower with 4 times as many parameters and 5 % with 60 times, which are better read from end to end
/// than tile by tile.
pub(super) fn fits_l2<E: CpuElement>(args: &ProductUpdate<'_, Cpu<E>>) -> bool {
    args.parameters.len() <= 1 << 16
}

pub(super) fn product_update<E: CpuElement>(core: &Core, args: ProductUpdate<'_, Cpu<E>>) -> Result<()> {
    let (m, n, k) = args.check()?;
    let len = gemm_len(core, m, n, k.min(ROWS_AT_A_TIME));
    let workspace = Scratch::new(args.workspace, len)?.f64(len);
    let gradient = Out::dense(args.gradient, n);
    let update = Update::<E>::new(args.optimizer, args.parameters, args.storage, n);
    let blocks = row_blocks(k).count();
    for (index, range) in row_blocks(k).enumerate() {
        let accumulate = args.accumulate || index > 0;
        let (left, right) = (args.left.rows_range(range.clone()), args.right.rows_range(range));
        let product = Gemm::new(Operand::cols(left), Operand::cols(right)).cut_anywhere();
        if index + 1 < blocks {
            product.run(core, workspace, &Store { out: gradient, accumulate, upper: false });
        } else {
            product.run(core, workspace, &UpdateEpilogue { before: accumulate.then_some(gradient), update: &update });
        }
    }
    Ok(())
}

/// An optimiser's arithmetic in `f32`.
enum Rule {
    Sgd {
        learning_rate: f32,
        momentum: f32,
        decay: f32,
    },
    /// The bias corrections go into the step size and eps: m̂/(√û + eps) = (√c₂/c₁)·m/(√u + √c₂·eps).
    Adam {
        step: f32,
        keep: f32,
        beta: [f32; 2],
        rest: [f32; 2],
        eps: f32,
    },
}

/// Parameters and state as matrices, and how they are updated.
struct Update<'a, E> {
    rule: Rule,
    /// Velocity, or first and second moment; empty where the rule has none.
    state: [Out<'a, f32>; 2],
    parameters: Out<'a, f32>,
    storage: Option<Out<'a, E>>,
}

impl<'a, E: CpuElement> Update<'a, E> {
    fn new(
        optimizer: Optimizer<'a, Cpu<E>>,
        parameters: &'a mut [f32],
        storage: Option<&'a mut [E]>,
        cols: usize,
    ) -> Self {
        let (rule, state): (Rule, [&'a mut [f32]; 2]) = match optimizer {
            Optimizer::Sgd { config: SgdConfig { learning_rate, momentum, weight_decay }, velocity } => (
                Rule::Sgd {
                    learning_rate: learning_rate as f32,
                    momentum: momentum as f32,
                    decay: weight_decay as f32,
                },
                [velocity, &mut []],
            ),
            Optimizer::Adam { config, step, first_moment, second_moment } => {
                let AdamConfig { learning_rate, beta1, beta2, eps, weight_decay } = config;
                let t = step as f64;
                let root = (1.0 - beta2.powf(t)).sqrt();
                let rule = Rule::Adam {
                    step: (learning_rate * root / (1.0 - beta1.powf(t))) as f32,
                    keep: (1.0 - learning_rate * weight_decay) as f32,
                    beta: [beta1 as f32, beta2 as f32],
                    rest: [(1.0 - beta1) as f32, (1.0 - beta2) as f32],
                    eps: (eps * root) as f32,
                };
                (rule, [first_moment, second_moment])
            }
        };
        Self {
            rule,
            state: state.map(|state| Out::dense(state, cols)),
            parameters: Out::dense(parameters, cols),
            storage: storage.map(|storage| Out::dense(storage, cols)),
        }
    }

    /// Updates one row's parameters, as many as two vectors hold, by their gradient.
    ///
    /// # Safety
    /// No other task has these parameters.
    #[inline(always)]
    unsafe fn apply<S: Simd>(&self, s: S, row: usize, cols: Range<usize>, g: Row<S>) {
        // SAFETY: the caller's promise.
        let parameters = unsafe { self.parameters.part(row, cols.clone()) };
        let mut p = rows::load(s, parameters);
        match self.rule {
            Rule::Sgd { learning_rate, momentum, decay } => {
                let step = s.splat(-learning_rate);
                let g = [s.fma(s.splat(decay), p[0], g[0]), s.fma(s.splat(decay), p[1], g[1])];
                let u = if self.state[0].rows() == 0 {
                    g
                } else {
                    // SAFETY: as above.
                    let velocity = unsafe { self.state[0].part(row, cols.clone()) };
                    let u = rows::load(s, velocity);
                    let u = [s.fma(s.splat(momentum), u[0], g[0]), s.fma(s.splat(momentum), u[1], g[1])];
                    rows::store(s, velocity, u);
                    u
                };
                p = [s.fma(step, u[0], p[0]), s.fma(step, u[1], p[1])];
            }
            Rule::Adam { step, keep, beta, rest, eps } => {
                // SAFETY: as above.
                let [first, second] =
                    unsafe { [self.state[0].part(row, cols.clone()), self.state[1].part(row, cols.clone())] };
                let (mut m, mut u) = (rows::load(s, first), rows::load(s, second));
                for v in 0..TILE_VECTORS {
                    m[v] = s.fma(s.splat(rest[0]), g[v], s.mul(s.splat(beta[0]), m[v]));
                    u[v] = s.fma(s.mul(s.splat(rest[1]), g[v]), g[v], s.mul(s.splat(beta[1]), u[v]));
                    let ratio = s.over_root(m[v], u[v], s.splat(eps));
                    p[v] = s.fma(s.splat(-step), ratio, s.mul(s.splat(keep), p[v]));
                }
                rows::store(s, first, m);
                rows::store(s, second, u);
            }
        }
        rows::store(s, parameters, p);
        if let Some(storage) = &self.storage {
            // SAFETY: as above.
            rows::narrow::<S, E>(s, unsafe { storage.part(row, cols) }, p);
        }
    }

    /// Updates one row of parameters by a gradient that lies in memory.
    fn all(&self, core: &Core, gradient: &[f32]) {
        core.threads.for_each(gradient.len().div_ceil(BLOCK), gradient.len() * 8, |block| {
            let range = block * BLOCK..gradient.len().min((block + 1) * BLOCK);
            core.isa.run(UpdateBlock { update: self, gradient, range });
        });
    }
}

struct UpdateBlock<'a, 'b, E> {
    update: &'a Update<'b, E>,
    gradient: &'a [f32],
    range: Range<usize>,
}

impl<E: CpuElement> Task for UpdateBlock<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for start in self.range.clone().step_by(TILE_VECTORS * S::LANES) {
            let cols = start..self.range.end.min(start + TILE_VECTORS * S::LANES);
            let g = rows::load(s, &self.gradient[cols.clone()]);
            // SAFETY: each block of parameters is one task's.
            unsafe { self.update.apply(s, 0, cols, g) };
        }
    }
}

/// Updates parameters by a gradient tile.
struct UpdateEpilogue<'a, 'b, E> {
    /// What is added to the gradient.
    before: Option<Out<'b, f32>>,
    update: &'a Update<'b, E>,
}

impl<E: CpuElement> Epilogue for UpdateEpilogue<'_, '_, E> {
    type State = ();
    fn begin(&self, _: &Group) {}
    #[inline(always)]
    fn tile<S: Simd>(&self, s: S, _: &mut (), _: &Group, tile: Tile<'_>) {
        for (i, row) in tile.rows.clone().enumerate() {
            let mut g = rows::load(s, tile.row(i));
            if let Some(before) = &self.before {
                // SAFETY: this tile's part of the row.
                let before = rows::load(s, unsafe { before.part(row, tile.cols.clone()) });
                g = [s.add(before[0], g[0]), s.add(before[1], g[1])];
            }
            // SAFETY: as above.
            unsafe { self.update.apply(s, row, tile.cols.clone(), g) };
        }
    }
    fn end(&self, _: &(), _: &Group) {}
}
