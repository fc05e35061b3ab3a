//! Encoder: the fused pass, with row losses alone and with statistics; the sums of given activations, and the
//! responsibilities.

use crate::harness::{Bench, Data, SHAPES, Work, cpu, product_flops, typed};
use sae_kernels::operations::{ActivationSums, Encode, Moments, Responsibilities};
use sae_kernels::{Activation, Backend, CpuElement, MatMut, MatRef, Shape, bf16};

pub fn run(bench: &mut Bench) {
    for shape in SHAPES {
        for threads in bench.threads.clone() {
            encode::<f32>(bench, shape, threads);
            encode::<bf16>(bench, shape, threads);
            activation_sums(bench, shape, threads);
            responsibilities(bench, shape, threads);
        }
    }
}

fn encode<E: CpuElement>(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let data = Data::<E>::new(shape);
    let (cpu, mut workspace) = cpu::<E>(shape, threads);
    let (mut a, mut row_loss) = (vec![E::zeroed(); n * h], vec![0.0; n]);
    let (mut row_loss_sum, mut sum, mut sum_squares) = ([0.0], vec![0.0; h], vec![0.0; h]);
    for statistics in [false, true] {
        let name = typed::<E>(if statistics { "encode with a and statistics" } else { "encode, row loss only" });
        bench.time("encode", &name, shape, threads, product_flops(n, h, d), || {
            cpu.encode(Encode {
                x: MatRef::new(&data.x, n, d).unwrap(),
                weight: MatRef::new(&data.weight, h, d).unwrap(),
                bias: &data.bias,
                activation: Activation::Relu,
                activations: statistics.then(|| MatMut::new(&mut a, n, h).unwrap()),
                row_loss: Some(&mut row_loss),
                moments: statistics.then_some(Moments {
                    shift: None,
                    accumulate: false,
                    row_loss_sum: &mut row_loss_sum,
                    sum: &mut sum,
                    sum_squares: &mut sum_squares,
                }),
                workspace: &mut workspace,
            })
            .unwrap();
        });
    }
}

fn activation_sums(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, latents: h, .. } = shape;
    let (cpu, mut workspace) = cpu::<f32>(shape, threads);
    let (a, mut row_loss) = (vec![1.0; n * h], vec![0.0; n]);
    let (mut row_loss_sum, mut sum, mut sum_squares) = ([0.0], vec![0.0; h], vec![0.0; h]);
    bench.time("encode", "activation_sums f32", shape, threads, Work::Bytes((4 * n * h) as f64), || {
        cpu.activation_sums(ActivationSums {
            activations: MatRef::new(&a, n, h).unwrap(),
            row_loss: Some(&mut row_loss),
            moments: Some(Moments {
                shift: None,
                accumulate: false,
                row_loss_sum: &mut row_loss_sum,
                sum: &mut sum,
                sum_squares: &mut sum_squares,
            }),
            workspace: &mut workspace,
        })
        .unwrap();
    });
}

fn responsibilities(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, latents: h, .. } = shape;
    let (cpu, _) = cpu::<f32>(shape, threads);
    let (a, row_loss, mut r) = (vec![1.0; n * h], vec![-1.0; n], vec![0.0; n * h]);
    bench.time("encode", "responsibilities f32", shape, threads, Work::Bytes((8 * n * h) as f64), || {
        cpu.responsibilities(Responsibilities {
            activations: MatRef::new(&a, n, h).unwrap(),
            row_loss: &row_loss,
            responsibilities: MatMut::new(&mut r, n, h).unwrap(),
        })
        .unwrap();
    });
}
