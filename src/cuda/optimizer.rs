//! [`Sgd`] and [`Adam`]: each buffer is read and written once.

use super::{Argument, Core, Cuda, CudaElement};
use crate::error::Result;
use crate::operations::{Adam, Sgd};
use bytemuck::{Pod, Zeroable};

/// Blocks of a loop over all elements.
const MAX_BLOCKS: usize = 1 << 16;

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct SgdArgument {
    gradient: u64,
    velocity: u64,
    parameters: u64,
    storage: u64,
    count: i64,
    learning_rate: f32,
    momentum: f32,
    weight_decay: f32,
    padding: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct AdamArgument {
    gradient: u64,
    first: u64,
    second: u64,
    parameters: u64,
    storage: u64,
    count: i64,
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    keep: f32,
    step: f32,
    eps: f32,
    padding: u32,
}

fn grid(count: usize) -> [u32; 2] {
    // Four elements a thread.
    [count.div_ceil(4 * 256).min(MAX_BLOCKS) as u32, 1]
}

pub(super) fn sgd<E: CudaElement>(core: &Core, args: Sgd<'_, Cuda<E>>) -> Result<()> {
    let count = args.check()?;
    let argument = SgdArgument {
        gradient: args.gradient.address(),
        velocity: if args.config.momentum == 0.0 { 0 } else { args.velocity.address() },
        parameters: args.parameters.address(),
        storage: args.storage.as_ref().map_or(0, |storage| storage.address()),
        count: count as i64,
        learning_rate: args.config.learning_rate as f32,
        momentum: args.config.momentum as f32,
        weight_decay: args.config.weight_decay as f32,
        padding: 0,
    };
    core.launch(E::KERNELS.sgd, grid(count), 256, 0, Argument::new(&argument))
}

pub(super) fn adam<E: CudaElement>(core: &Core, args: Adam<'_, Cuda<E>>) -> Result<()> {
    let count = args.check()?;
    let config = args.config;
    let t = args.step as f64;
    // The bias corrections go into the step size and eps: m̂/(√û + eps) = (√c₂/c₁)·m/(√u + √c₂·eps).
    let root = (1.0 - config.beta2.powf(t)).sqrt();
    let argument = AdamArgument {
        gradient: args.gradient.address(),
        first: args.first_moment.address(),
        second: args.second_moment.address(),
        parameters: args.parameters.address(),
        storage: args.storage.as_ref().map_or(0, |storage| storage.address()),
        count: count as i64,
        beta1: config.beta1 as f32,
        beta2: config.beta2 as f32,
        rest1: (1.0 - config.beta1) as f32,
        rest2: (1.0 - config.beta2) as f32,
        keep: (1.0 - config.learning_rate * config.weight_decay) as f32,
        step: (config.learning_rate * root / (1.0 - config.beta1.powf(t))) as f32,
        eps: (config.eps * root) as f32,
        padding: 0,
    };
    core.launch(E::KERNELS.adam, grid(count), 256, 0, Argument::new(&argument))
}
