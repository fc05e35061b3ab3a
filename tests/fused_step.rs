//! The step of a small batch in one cooperative launch: when it is taken, and that it is right at every edge, however many blocks run.
#![cfg(sae_kernels_ptx)]

mod common;

use common::anywhere::{Gradients, Step, Training};
use common::captured::{Capturing, Enqueued};
use common::emulated::{Emulated, all_options, cuda_fused};
use common::{assert_same_bits, rng, rounded, uniform};
use ptx_emulator::Options;
use sae_kernels::cuda_driver::Launch;
use sae_kernels::operations::{AdamConfig, Optimizer, SgdConfig};
use sae_kernels::{
    Activation, Backend, Cuda, CudaElement, CudaMemory, DecoderFree, DecoderFreeConfig, DecoderFreeStep,
    DecoderFreeTrainStep, Form, MatMut, MatRef, Memory, Objective, Reduction, Reference, Shape, Trained, bf16, f16,
};
use std::sync::Arc;

fn plain() -> Options {
    Options { check_races: false, ..Options::default() }
}

/// A batch whose columns lie about `offset`.
fn step_of<E: CudaElement>([rows, inputs, latents]: [usize; 3], objective: Objective, offset: f64) -> Step {
    let mut rng = rng((rows + 3 * inputs + 7 * latents) as u64);
    let bias: Vec<f64> = uniform(&mut rng, latents, 0.1).iter().map(|b| b + offset).collect();
    let scale = 1.0 / (inputs.max(1) as f64).sqrt();
    Step {
        config: DecoderFreeConfig {
            objective,
            // A mask may differ where storage rounds, and the reference does not round.
            activation: Activation::Identity,
            ..DecoderFreeConfig::new(Shape { rows, inputs, latents })
        },
        x: rounded::<E>(&uniform(&mut rng, rows * inputs, 1.0)),
        weight: rounded::<E>(&uniform(&mut rng, latents * inputs, 2.0 * scale)),
        bias: rounded::<f32>(&bias),
    }
}

fn parts(found: &Gradients) -> [(&'static str, Vec<f64>); 4] {
    let losses = found.losses;
    [
        ("dW", found.weight.clone()),
        ("db", found.bias.clone()),
        ("dx", found.x.clone()),
        ("losses", vec![losses.lse, losses.var, losses.tc, losses.total]),
    ]
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Panics unless gradients and losses agree. The terms of statistics do not change when a column moves: with the identity their share of db
/// cancels to nothing, and its error is that of a sum of as large numbers as dW is made of.
fn assert_close(context: &str, bar: f64, found: &Gradients, truth: &Gradients) {
    let floor = norm(&truth.weight);
    for ((what, found), (_, truth)) in parts(found).into_iter().zip(parts(truth)) {
        let size = norm(&truth).max(if what == "db" { floor } else { 0.0 });
        let error = norm(&found.iter().zip(&truth).map(|(f, t)| f - t).collect::<Vec<_>>());
        assert!(
            error <= bar * size,
            "{context}: {what} is off by {error:e} of {size:e}: {found:?}, expected {truth:?}"
        );
    }
}

/// Each extent around what a warp, a block and the grid take of it; more latents than rows, and one of them; no inputs.
#[test]
fn every_edge() {
    fn check<E: CudaElement>(shapes: &[[usize; 3]]) {
        for &shape in shapes {
            let step = step_of::<E>(shape, Objective::default(), 0.0);
            let found = step.run(cuda_fused::<E>(plain(), 3)).unwrap();
            let truth = step.run(Reference).unwrap();
            assert_close(&format!("{} {shape:?}", E::NAME), (8.0 * E::UNIT_ROUNDOFF).max(1e-5), &found, &truth);
        }
    }
    check::<f32>(&[
        [2, 1, 1],
        [3, 5, 2],
        [4, 4, 4],
        [5, 127, 5],
        [7, 128, 3],
        [8, 129, 8],
        [9, 132, 9],
        [17, 260, 7],
        [33, 3, 129],
        [6, 8, 127],
        [12, 9, 255],
        [10, 16, 256],
        [8, 0, 4],
        [100, 4, 6],
    ]);
    check::<bf16>(&[[9, 132, 9], [17, 256, 130]]);
    check::<f16>(&[[9, 132, 9], [17, 256, 130]]);
}

/// Objectives whose terms are missing, one after the other.
#[test]
fn every_objective() {
    let all = Objective { lambda_lse: 0.7, lambda_var: 0.3, lambda_tc: 1.5, ..Objective::default() };
    for objective in [
        all,
        Objective { reduction: Reduction::Mean, ..all },
        Objective { lambda_lse: 0.0, ..all },
        Objective { lambda_var: 0.0, ..all },
        Objective { lambda_tc: 0.0, ..all },
        Objective { lambda_var: 0.0, lambda_tc: 0.0, ..all },
        Objective { lambda_wr: 0.4, ..all },
    ] {
        let step = step_of::<f32>([13, 21, 10], objective, 0.0);
        let found = step.run(cuda_fused::<f32>(plain(), 3)).unwrap();
        assert_close(&format!("{objective:?}"), 1e-5, &found, &step.run(Reference).unwrap());
    }
    // One row is enough for the log-sum-exp, none gives zeros.
    for rows in [0, 1] {
        let step = step_of::<f32>([rows, 5, 6], Objective { lambda_var: 0.0, lambda_tc: 0.0, ..all }, 0.0);
        let found = step.run(cuda_fused::<f32>(plain(), 3)).unwrap();
        assert_close(&format!("{rows} rows"), 1e-5, &found, &step.run(Reference).unwrap());
    }
}

/// A thousand deviations from 0: what the shift is for. The inputs are rounded, so the truth has the same columns.
#[test]
fn columns_far_from_zero() {
    let step = step_of::<f32>([40, 8, 9], Objective { lambda_lse: 0.0, ..Objective::default() }, 300.0);
    let found = step.run(cuda_fused::<f32>(plain(), 3)).unwrap();
    // z itself is rounded at 300: 1.5e-5 of a deviation.
    assert_close("far from zero", 1e-3, &found, &step.run(Reference).unwrap());
    // The centred columns add up to nothing only about the mean itself, of which the shift lacks what f32 has no digits for.
    let (bias, weight) = (norm(&found.bias), norm(&found.weight));
    assert!(bias < 1e-6 * weight, "{bias:e} of {weight:e}");
    let (var, truth) = (found.losses.var, step.run(Reference).unwrap().losses.var);
    assert!((var - truth).abs() < 1e-4 * truth.abs(), "{var}, expected {truth}");
}

#[test]
fn any_number_of_blocks_gives_the_same_bits() {
    for shape in [[21, 140, 18], [10, 5, 131]] {
        let step = step_of::<f32>(shape, Objective::default(), 0.0);
        let one = step.run(cuda_fused::<f32>(plain(), 1)).unwrap();
        for blocks in [2, 3, 7, 100] {
            let found = step.run(cuda_fused::<f32>(plain(), blocks)).unwrap();
            for ((what, found), (_, expected)) in parts(&found).iter().zip(&parts(&one)) {
                assert_same_bits(&format!("{shape:?} on {blocks} blocks"), what, found, expected);
            }
        }
    }
}

/// Every schedule, with a search for races.
#[test]
fn no_schedule_matters() {
    let step = step_of::<bf16>([21, 140, 18], Objective::default(), 0.0);
    let expected = step.run(cuda_fused::<bf16>(plain(), 3)).unwrap();
    for options in all_options() {
        for blocks in [1, 4] {
            let found = step.run(cuda_fused::<bf16>(options.clone(), blocks)).unwrap();
            for ((what, found), (_, expected)) in parts(&found).iter().zip(&parts(&expected)) {
                // dx is a product on tensor cores, which round as the options say.
                if *what != "dx" {
                    assert_same_bits(&format!("{options:?} {blocks}"), what, found, expected);
                }
            }
        }
    }
}

/// The launches of a step, of which none runs.
fn launches<E: CudaElement>(config: DecoderFreeConfig, rows: usize, blocks: u32, training: bool) -> Vec<Launch> {
    let device = Arc::new(Capturing::new(Emulated::new(plain()).cooperative(blocks)));
    let cuda = Cuda::<E>::on_driver(device.clone());
    let Shape { inputs: d, latents: h, .. } = config.shape;
    let mut model = DecoderFree::new(cuda.clone(), config).unwrap();
    let x = cuda.alloc::<E>(rows * d).unwrap();
    let mut storage = cuda.alloc::<E>(h * d).unwrap();
    let [mut weight, mut first_moment, mut second_moment] = [0; 3].map(|_| cuda.alloc::<f32>(h * d).unwrap());
    let [mut bias, mut velocity] = [h, 0].map(|len| cuda.alloc::<f32>(len).unwrap());
    let x = MatRef::from_memory(CudaMemory::slice(&x), rows, d, d).unwrap();
    device.begin();
    let adam = AdamConfig::default();
    let sgd = SgdConfig { learning_rate: 0.1, momentum: 0.0, weight_decay: 0.0 };
    if training {
        let optimizer = Optimizer::Adam {
            config: adam,
            step: 1,
            first_moment: CudaMemory::slice_mut(&mut first_moment),
            second_moment: CudaMemory::slice_mut(&mut second_moment),
        };
        let weight = Trained {
            parameters: CudaMemory::slice_mut(&mut weight),
            storage: Some(CudaMemory::slice_mut(&mut storage)),
            optimizer,
        };
        let optimizer = Optimizer::Sgd { config: sgd, velocity: CudaMemory::slice_mut(&mut velocity) };
        let bias = Trained { parameters: CudaMemory::slice_mut(&mut bias), storage: None, optimizer };
        model.train_step(DecoderFreeTrainStep { x, weight, bias, activations: None, row_loss: None }).unwrap();
    } else {
        model
            .step(DecoderFreeStep {
                x,
                weight: MatRef::from_memory(CudaMemory::slice(&storage), h, d, d).unwrap(),
                bias: CudaMemory::slice(&bias),
                grad_weight: MatMut::from_memory(CudaMemory::slice_mut(&mut weight), h, d, d).unwrap(),
                grad_bias: CudaMemory::part_mut(CudaMemory::slice_mut(&mut first_moment), 0..h),
                grad_x: None,
                activations: None,
                row_loss: None,
            })
            .unwrap();
    }
    let launch = |call: Enqueued| match call {
        Enqueued::Launch(launch) => *launch,
        Enqueued::Product(_) => unreachable!("there is no library"),
    };
    device.end().into_iter().map(launch).collect()
}

/// Within the bounds and beyond them; the grid holds what the phase with most units has, or what the device can.
#[test]
fn one_launch_within_the_bounds() {
    fn is_one<E: CudaElement>(config: DecoderFreeConfig, rows: usize, blocks: u32) -> bool {
        let launches = launches::<E>(config, rows, blocks, false);
        let one = launches.len() == 1;
        assert_eq!(launches[0].kernel == format!("tiny_step_{}", E::NAME), one);
        assert!(launches.iter().all(|launch| launch.cooperative == one));
        one
    }
    let plan = |rows, inputs, latents| DecoderFreeConfig::new(Shape { rows, inputs, latents });
    assert!(is_one::<f32>(plan(128, 784, 64), 128, 264));
    assert!(is_one::<bf16>(plan(512, 1024, 256), 512, 264));
    assert!(is_one::<f16>(plan(512, 1024, 256), 300, 264));
    assert!(!is_one::<f32>(plan(513, 16, 16), 513, 264));
    assert!(!is_one::<f32>(plan(16, 1025, 16), 16, 264));
    assert!(!is_one::<f32>(plan(16, 16, 257), 16, 264));
    // The batch decides, not the plan.
    assert!(is_one::<f32>(plan(2000, 16, 16), 512, 264));
    assert!(is_one::<f32>(DecoderFreeConfig { block_rows: Some(20), ..plan(50, 16, 16) }, 20, 264));
    assert!(!is_one::<f32>(DecoderFreeConfig { block_rows: Some(20), ..plan(50, 16, 16) }, 21, 264));
    // What it does not do, and where it cannot.
    assert!(!is_one::<f32>(DecoderFreeConfig { correlation_form: Form::Dual, ..plan(16, 16, 16) }, 16, 264));
    assert!(!is_one::<f32>(plan(128, 784, 64), 128, 0));
    let grid = |config, blocks| launches::<f32>(config, 128, blocks, false)[0].grid;
    assert_eq!(grid(plan(128, 784, 64), 264), [128, 1]);
    assert_eq!(grid(plan(128, 784, 64), 40), [40, 1]);
    assert_eq!(grid(plan(128, 784, 256), 1000), [512, 1]);
    // Updates and all.
    for name in
        [launches::<f32>(plan(128, 784, 64), 128, 264, true), launches::<bf16>(plan(128, 784, 64), 128, 264, true)]
            .map(|launches| launches.iter().map(|launch| launch.kernel).collect::<Vec<_>>())
    {
        assert!(matches!(name[..], ["tiny_step_f32"] | ["tiny_step_bf16"]), "{name:?}");
    }
}

/// The barrier is as it was after each launch: of few blocks, of many, once more.
#[test]
fn launches_follow_each_other() {
    let step = step_of::<f32>([21, 30, 18], Objective::default(), 0.0);
    let device = Arc::new(Emulated::new(plain()).cooperative(5));
    let mut training = Training::new(Cuda::<f32>::on_driver(device), step.config).unwrap();
    let mut first = None;
    for _ in 0..3 {
        training.load(&step).unwrap();
        training.enqueue().unwrap();
        let outcome = training.outcome().unwrap();
        let first = first.get_or_insert_with(|| outcome.clone());
        for ((what, found), (_, expected)) in outcome.iter().zip(first.iter()) {
            assert_same_bits("again", what, found, expected);
        }
    }
}
