//! Optimiser updates: bound by memory.

use crate::harness::{Bench, SHAPES, Work, cpu};
use sae_kernels::operations::{Adam, AdamConfig, Sgd, SgdConfig};
use sae_kernels::{Backend, Shape};

pub fn run(bench: &mut Bench) {
    for shape in SHAPES {
        for threads in bench.threads.clone() {
            update(bench, shape, threads);
        }
    }
}

fn update(bench: &mut Bench, shape: Shape, threads: usize) {
    let len = shape.inputs * shape.latents;
    let (cpu, _) = cpu::<f32>(Shape { rows: 1, ..shape }, threads);
    let gradient = vec![1e-3; len];
    let (mut first, mut second, mut parameters) = (vec![0.0; len], vec![0.0; len], vec![0.1; len]);
    // Momentum: 3 reads, 2 writes. Adam: 4 reads, 3 writes.
    bench.time("optimizer", "sgd with momentum f32", shape, threads, Work::Bytes((20 * len) as f64), || {
        cpu.sgd(Sgd {
            config: SgdConfig { learning_rate: 1e-6, momentum: 0.9, weight_decay: 0.0 },
            gradient: &gradient,
            velocity: &mut first,
            parameters: &mut parameters,
            storage: None,
        })
        .unwrap();
    });
    bench.time("optimizer", "adam f32", shape, threads, Work::Bytes((28 * len) as f64), || {
        cpu.adam(Adam {
            config: AdamConfig::default(),
            step: 10,
            gradient: &gradient,
            first_moment: &mut first,
            second_moment: &mut second,
            parameters: &mut parameters,
            storage: None,
        })
        .unwrap();
    });
}
