//! The standard sparse autoencoder's decoder, forward and backward.

use crate::harness::{Bench, Data, SHAPES, cpu, product_flops};
use sae_kernels::operations::{Decode, DecodeBackward};
use sae_kernels::{Activation, Backend, MatMut, MatRef, Shape};

pub fn run(bench: &mut Bench) {
    for shape in SHAPES {
        for threads in bench.threads.clone() {
            decode(bench, shape, threads);
        }
    }
}

fn decode(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let (cpu, mut workspace) = cpu::<f32>(shape, threads);
    let data = Data::<f32>::new(shape);
    let (a, bias) = (vec![0.1; n * h], vec![0.0; d]);
    let (mut residual, mut squared_error) = (vec![0.0; n * d], [0.0]);
    bench.time("decode", "decode f32", shape, threads, product_flops(n, d, h), || {
        cpu.decode(Decode {
            activations: MatRef::new(&a, n, h).unwrap(),
            weight: MatRef::new(&data.weight, h, d).unwrap(),
            bias: &bias,
            x: MatRef::new(&data.x, n, d).unwrap(),
            reconstruction: None,
            residual_weight: 1e-3,
            residual: Some(MatMut::new(&mut residual, n, d).unwrap()),
            accumulate: false,
            squared_error: &mut squared_error,
            workspace: &mut workspace,
        })
        .unwrap();
    });
    let (mut dz, mut grad_bias) = (vec![0.0; n * h], vec![0.0; h]);
    bench.time("decode", "decode_backward f32", shape, threads, product_flops(n, h, d), || {
        cpu.decode_backward(DecodeBackward {
            residual: MatRef::new(&residual, n, d).unwrap(),
            weight: MatRef::new(&data.weight, h, d).unwrap(),
            activations: MatRef::new(&a, n, h).unwrap(),
            activation: Activation::Relu,
            l1: 1e-3,
            dz: MatMut::new(&mut dz, n, h).unwrap(),
            accumulate: false,
            grad_bias: &mut grad_bias,
            workspace: &mut workspace,
        })
        .unwrap();
    });
}
