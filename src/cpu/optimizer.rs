//! [`Sgd`] and [`Adam`]: each buffer is read and written once.

use super::memory::Out;
use super::simd::Loop;
use super::{Core, Cpu, CpuElement};
use crate::error::Result;
use crate::operations::{Adam, Sgd};

/// Parameters of one task.
const BLOCK: usize = 1 << 14;

pub(super) fn sgd<E: CpuElement>(core: &Core, args: Sgd<'_, Cpu<E>>) -> Result<()> {
    let len = args.check()?;
    let (lr, momentum) = (args.config.learning_rate as f32, args.config.momentum as f32);
    let decay = args.config.weight_decay as f32;
    let velocity_len = args.velocity.len();
    let (velocity, parameters) = (Out::dense(args.velocity, velocity_len), Out::dense(args.parameters, len));
    let storage = args.storage.map(|storage| Out::dense(storage, len));
    core.threads.for_each(len.div_ceil(BLOCK), len * 4, |block| {
        let range = block * BLOCK..len.min((block + 1) * BLOCK);
        let gradient = &args.gradient[range.clone()];
        // SAFETY: each block of parameters is one task's.
        let parameters = unsafe { parameters.part(0, range.clone()) };
        if velocity_len == 0 {
            core.isa.run(Loop(|| {
                for (p, g) in parameters.iter_mut().zip(gradient) {
                    *p -= lr * (g + decay * *p);
                }
            }));
        } else {
            // SAFETY: as above.
            let velocity = unsafe { velocity.part(0, range.clone()) };
            core.isa.run(Loop(|| {
                for ((p, g), u) in parameters.iter_mut().zip(gradient).zip(velocity) {
                    *u = momentum * *u + (g + decay * *p);
                    *p -= lr * *u;
                }
            }));
        }
        if let Some(storage) = &storage {
            // SAFETY: as above.
            E::narrow(parameters, unsafe { storage.part(0, range) });
        }
    });
    Ok(())
}

pub(super) fn adam<E: CpuElement>(core: &Core, args: Adam<'_, Cpu<E>>) -> Result<()> {
    let len = args.check()?;
    let config = args.config;
    let t = args.step as f64;
    // The bias corrections go into the step size and eps: m̂/(√û + eps) = (√c₂/c₁)·m/(√u + √c₂·eps).
    let root = (1.0 - config.beta2.powf(t)).sqrt();
    let step = (config.learning_rate * root / (1.0 - config.beta1.powf(t))) as f32;
    let eps = (config.eps * root) as f32;
    let keep = (1.0 - config.learning_rate * config.weight_decay) as f32;
    let (beta1, beta2) = (config.beta1 as f32, config.beta2 as f32);
    let (rest1, rest2) = ((1.0 - config.beta1) as f32, (1.0 - config.beta2) as f32);
    let (first, second) = (Out::dense(args.first_moment, len), Out::dense(args.second_moment, len));
    let parameters = Out::dense(args.parameters, len);
    let storage = args.storage.map(|storage| Out::dense(storage, len));
    core.threads.for_each(len.div_ceil(BLOCK), len * 8, |block| {
        let range = block * BLOCK..len.min((block + 1) * BLOCK);
        let gradient = &args.gradient[range.clone()];
        // SAFETY: each block of parameters is one task's.
        let (first, second, parameters) =
            unsafe { (first.part(0, range.clone()), second.part(0, range.clone()), parameters.part(0, range.clone())) };
        core.isa.run(Loop(|| {
            for (((p, g), m), u) in parameters.iter_mut().zip(gradient).zip(first).zip(second) {
                *m = beta1 * *m + rest1 * g;
                *u = beta2 * *u + rest2 * g * g;
                *p = keep * *p - step * *m / (u.sqrt() + eps);
            }
        }));
        if let Some(storage) = &storage {
            // SAFETY: as above.
            E::narrow(parameters, unsafe { storage.part(0, range) });
        }
    });
    Ok(())
}
