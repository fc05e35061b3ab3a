//! Backward: dZ with and without the correlation term's product, and weight redundancy.

use crate::harness::{Bench, Data, SHAPES, Work, cpu, product_flops};
use sae_kernels::operations::{BackwardDz, CorrelationTerm, StatisticsTerm, WeightRedundancy};
use sae_kernels::{Activation, Backend, Cpu, Form, MatMut, MatRef, Shape};

pub fn run(bench: &mut Bench) {
    for shape in SHAPES {
        for threads in bench.threads.clone() {
            backward_dz(bench, shape, threads);
            weight_redundancy(bench, shape, threads);
        }
    }
}

fn backward_dz(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, latents: h, .. } = shape;
    let (cpu, mut workspace) = cpu::<f32>(shape, threads);
    let (a, row_loss, coupling) = (vec![0.5; n * h], vec![-4.0; n], vec![1e-3; h * h]);
    let (mean, scale, offset) = (vec![0.25; h], vec![-0.1; h], vec![0.0; h]);
    let (mut dz, mut grad_bias) = (vec![0.0; n * h], vec![0.0; h]);
    for primal in [false, true] {
        let (name, work) = match primal {
            false => ("backward_dz, no correlation f32", Work::Bytes((8 * n * h) as f64)),
            true => ("backward_dz, primal f32", product_flops(n, h, h)),
        };
        bench.time("backward", name, shape, threads, work, || {
            let correlation: CorrelationTerm<Cpu> = match primal {
                false => CorrelationTerm::None,
                true => CorrelationTerm::Primal { coupling: MatRef::new(&coupling, h, h).unwrap(), offset: &offset },
            };
            cpu.backward_dz(BackwardDz {
                activations: MatRef::new(&a, n, h).unwrap(),
                activation: Activation::Relu,
                row_loss: &row_loss,
                row_weight: 1.0,
                statistics: Some(StatisticsTerm { mean: &mean, scale: &scale, correlation }),
                dz: MatMut::new(&mut dz, n, h).unwrap(),
                accumulate: false,
                grad_bias: &mut grad_bias,
                workspace: &mut workspace,
            })
            .unwrap();
        });
    }
}

fn weight_redundancy(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { inputs: d, latents: h, .. } = shape;
    let (cpu, mut workspace) = cpu::<f32>(shape, threads);
    let data = Data::<f32>::new(shape);
    let (mut loss, mut grad_weight) = ([0.0], vec![0.0; h * d]);
    // A symmetric half product of the smaller side, then a whole one.
    let side = h.min(d);
    let mut gram = vec![0.0; side * side];
    let work = Work::Flops(3.0 * side as f64 * (h * d) as f64);
    bench.time("backward", "weight_redundancy f32", shape, threads, work, || {
        cpu.weight_redundancy(WeightRedundancy {
            weight: MatRef::new(&data.weight, h, d).unwrap(),
            normalize: true,
            form: Form::Auto,
            lambda: 1.0,
            loss: &mut loss,
            grad_weight: Some(MatMut::new(&mut grad_weight, h, d).unwrap()),
            gram: MatMut::new(&mut gram, side, side).unwrap(),
            workspace: &mut workspace,
        })
        .unwrap();
    });
}
