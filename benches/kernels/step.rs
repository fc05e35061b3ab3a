//! Whole steps: losses and gradients (without dx) of both models, and a step of training with Adam.
//!
//! The work of a decoder-free step is counted as what it needs, forward and dW 2·N·D·H each and the correlation term
//! 3·N·H·min(N, H), whatever the form used. Below it stands the memory in use at its peak: nothing is allocated in a step.

use crate::harness::{Bench, Data, SHAPES, Work, cpu, typed};
use sae_kernels::operations::{AdamConfig, Optimizer};
use sae_kernels::{
    Cpu, CpuElement, DecoderFree, DecoderFreeConfig, DecoderFreeStep, DecoderFreeTrainStep, MatMut, MatRef, PlanMemory,
    Shape, StandardConfig, StandardGradients, StandardParameters, StandardSae, Trained, bf16,
};

pub fn run(bench: &mut Bench) {
    for shape in SHAPES {
        for threads in bench.threads.clone() {
            decoder_free::<f32>(bench, shape, threads);
            decoder_free::<bf16>(bench, shape, threads);
            training(bench, shape, threads);
            standard(bench, shape, threads);
        }
    }
}

fn decoder_free_flops(Shape { rows: n, inputs: d, latents: h }: Shape) -> f64 {
    4.0 * (n * d * h) as f64 + 3.0 * (n * h * n.min(h)) as f64
}

fn decoder_free<E: CpuElement>(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let data = Data::<E>::new(shape);
    let mut model = DecoderFree::new(cpu::<E>(shape, threads).0, DecoderFreeConfig::new(shape)).unwrap();
    let memory = model.memory();
    let (mut grad_weight, mut grad_bias) = (vec![0.0; h * d], vec![0.0; h]);
    let flops = Work::Flops(decoder_free_flops(shape));
    let timed = bench.time("step", &typed::<E>("decoder-free"), shape, threads, flops, || {
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
    if timed {
        let operands = size_of_val(&data.x[..]) + size_of_val(&data.weight[..]) + size_of_val(&data.bias[..]);
        print_memory(operands, size_of_val(&grad_weight[..]) + size_of_val(&grad_bias[..]), memory);
    }
}

fn print_memory(operands: usize, gradients: usize, memory: PlanMemory) {
    let [all, operands, gradients, block, correlation, workspace] = [
        operands + gradients + memory.total(),
        operands,
        gradients,
        memory.block,
        memory.correlation + memory.redundancy + memory.vectors,
        memory.workspace,
    ]
    .map(|bytes| bytes as f64 / (1 << 20) as f64);
    println!(
        "      peak memory {all:.1} MiB: x, W and b {operands:.1}, gradients {gradients:.1}, a and dZ {block:.1}, statistics {correlation:.1}, \
         workspace {workspace:.1}"
    );
}

/// The same FLOPs with Adam on top: the share of the peak says what updating the parameters costs.
fn training(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let data = Data::<f32>::new(shape);
    let mut model = DecoderFree::new(cpu::<f32>(shape, threads).0, DecoderFreeConfig::new(shape)).unwrap();
    let (mut weight, mut bias) = (data.weight.clone(), data.bias.clone());
    let mut state = [h * d, h * d, h, h].map(|len| vec![0.0; len]);
    let mut step = 0;
    let flops = Work::Flops(decoder_free_flops(shape));
    bench.time("step", "decoder-free with adam f32", shape, threads, flops, || {
        step += 1;
        // So small that the model stays what it was.
        let config = AdamConfig { learning_rate: 1e-9, ..AdamConfig::default() };
        let [weight_first, weight_second, bias_first, bias_second] = &mut state;
        model
            .train_step(DecoderFreeTrainStep {
                x: MatRef::new(&data.x, n, d).unwrap(),
                weight: Trained {
                    parameters: &mut weight,
                    storage: None,
                    optimizer: Optimizer::Adam {
                        config,
                        step,
                        first_moment: weight_first,
                        second_moment: weight_second,
                    },
                },
                bias: Trained {
                    parameters: &mut bias,
                    storage: None,
                    optimizer: Optimizer::Adam { config, step, first_moment: bias_first, second_moment: bias_second },
                },
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
