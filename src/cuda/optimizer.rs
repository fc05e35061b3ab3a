//! [`Sgd`] and [`Adam`]: each buffer is read and written once.

use super::{Argument, Core, Cuda, CudaElement, CudaRefMut};
use crate::error::Result;
use crate::operations::{Adam, AdamConfig, Sgd, SgdConfig};
use bytemuck::{Pod, Zeroable};

/// Blocks of a loop over all elements.
const MAX_BLOCKS: usize = 1 << 16;

/// `Update` of `kernels/optimizer.cu`, before the rule.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Update {
    gradient: u64,
    count: i64,
}

/// `Sgd` of `kernels/optimizer.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct SgdRule {
    velocity: u64,
    parameters: u64,
    storage: u64,
    learning_rate: f32,
    momentum: f32,
    weight_decay: f32,
    padding: u32,
}

/// `Adam` of `kernels/optimizer.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct AdamRule {
    first: u64,
    second: u64,
    parameters: u64,
    storage: u64,
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    keep: f32,
    step: f32,
    eps: f32,
    padding: u32,
}

impl SgdRule {
    pub(super) fn new<E: CudaElement>(
        config: &SgdConfig,
        velocity: &CudaRefMut<'_, f32>,
        parameters: &CudaRefMut<'_, f32>,
        storage: Option<&CudaRefMut<'_, E>>,
    ) -> Self {
        Self {
            velocity: if config.momentum == 0.0 { 0 } else { velocity.address() },
            parameters: parameters.address(),
            storage: storage.map_or(0, |storage| storage.address()),
            learning_rate: config.learning_rate as f32,
            momentum: config.momentum as f32,
            weight_decay: config.weight_decay as f32,
            padding: 0,
        }
    }
}

impl AdamRule {
    pub(super) fn new<E: CudaElement>(
        config: &AdamConfig,
        step: u64,
        [first, second]: [&CudaRefMut<'_, f32>; 2],
        parameters: &CudaRefMut<'_, f32>,
        storage: Option<&CudaRefMut<'_, E>>,
    ) -> Self {
        let t = step as f64;
        // The bias corrections go into the step size and eps: m̂/(√û + eps) = (√c₂/c₁)·m/(√u + √c₂·eps).
        let root = (1.0 - config.beta2.powf(t)).sqrt();
        Self {
            first: first.address(),
            second: second.address(),
            parameters: parameters.address(),
            storage: storage.map_or(0, |storage| storage.address()),
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            rest1: (1.0 - config.beta1) as f32,
            rest2: (1.0 - config.beta2) as f32,
            keep: (1.0 - config.learning_rate * config.weight_decay) as f32,
            step: (config.learning_rate * root / (1.0 - config.beta1.powf(t))) as f32,
            eps: (config.eps * root) as f32,
            padding: 0,
        }
    }
}

fn grid(count: usize) -> [u32; 2] {
    // Four elements a thread.
    [count.div_ceil(4 * 256).min(MAX_BLOCKS) as u32, 1]
}

pub(super) fn sgd<E: CudaElement>(core: &Core, args: Sgd<'_, Cuda<E>>) -> Result<()> {
    let count = args.check()?;
    let rule = SgdRule::new(&args.config, &args.velocity, &args.parameters, args.storage.as_ref());
    let argument = Argument::new(&Update { gradient: args.gradient.address(), count: count as i64 }).then(&rule);
    core.launch(E::KERNELS.sgd, grid(count), 256, 0, argument)
}

pub(super) fn adam<E: CudaElement>(core: &Core, args: Adam<'_, Cuda<E>>) -> Result<()> {
    let count = args.check()?;
    let moments = [&args.first_moment, &args.second_moment];
    let rule = AdamRule::new(&args.config, args.step, moments, &args.parameters, args.storage.as_ref());
    let argument = Argument::new(&Update { gradient: args.gradient.address(), count: count as i64 }).then(&rule);
    core.launch(E::KERNELS.adam, grid(count), 256, 0, argument)
}
