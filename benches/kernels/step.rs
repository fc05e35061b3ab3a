//! Whole steps: losses and gradients (without dx) of both models.
//!
//! The work of a decoder-free step is counted as what it needs, forward and dW 2·N·D·H each and the correlation term
//! 3·N·H·min(N, H), whatever the form used.

use crate::harness::{Bench, Data, SHAPES, Work, cpu, typed};
use sae_kernels::{
    Cpu, CpuElement, DecoderFree, DecoderFreeConfig, DecoderFreeStep, MatMut, MatRef, Shape, StandardConfig,
    StandardGradients, StandardParameters, StandardSae, bf16,
};

pub fn run(bench: &mut Bench) {
    for shape in SHAPES {
        for threads in bench.threads.clone() {
            decoder_free::<f32>(bench, shape, threads);
            decoder_free::<bf16>(bench, shape, threads);
            standard(bench, shape, threads);
        }
    }
}

fn decoder_free<E: CpuElement>(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let data = Data::<E>::new(shape);
    let mut model = DecoderFree::new(cpu::<E>(shape, threads).0, DecoderFreeConfig::new(shape)).unwrap();
    let (mut grad_weight, mut grad_bias) = (vec![0.0; h * d], vec![0.0; h]);
    let flops = 4.0 * (n * d * h) as f64 + 3.0 * (n * h * n.min(h)) as f64;
    bench.time("step", &typed::<E>("decoder-free"), shape, threads, Work::Flops(flops), || {
        model
            .step(DecoderFreeStep {
                x: MatRef::new(&data.x, n, d).unwrap(),
                weight: MatRef::new(&data.weight, h, d).unwrap(),
                bias: &data.bias,
                grad_weight: MatMut::new(&mut grad_weight, h, d).unwrap(),
                grad_bias: &mut grad_bias,
                grad_x: None,
                activations: None,
                row_loss: None,
            })
            .unwrap();
    });
}

fn standard(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let data = Data::<f32>::new(shape);
    let mut model = StandardSae::new(cpu::<f32>(shape, threads).0, StandardConfig { shape, lambda_l1: 0.01 }).unwrap();
    let decoder_bias = vec![0.0; d];
    let (mut encoder_grad, mut decoder_grad) = (vec![0.0; h * d], vec![0.0; h * d]);
    let (mut encoder_bias_grad, mut decoder_bias_grad) = (vec![0.0; h], vec![0.0; d]);
    bench.time("step", "standard f32", shape, threads, Work::Flops(10.0 * (n * d * h) as f64), || {
        let parameters = StandardParameters::<Cpu> {
            encoder_weight: MatRef::new(&data.weight, h, d).unwrap(),
            encoder_bias: &data.bias,
            decoder_weight: MatRef::new(&data.weight, h, d).unwrap(),
            decoder_bias: &decoder_bias,
        };
        let gradients = StandardGradients::<Cpu> {
            encoder_weight: MatMut::new(&mut encoder_grad, h, d).unwrap(),
            encoder_bias: &mut encoder_bias_grad,
            decoder_weight: MatMut::new(&mut decoder_grad, h, d).unwrap(),
            decoder_bias: &mut decoder_bias_grad,
        };
        model.step(MatRef::new(&data.x, n, d).unwrap(), parameters, gradients).unwrap();
    });
}
