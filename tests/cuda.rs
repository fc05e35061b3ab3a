//! The CUDA kernels on an emulated GPU: all schedules, landings of asynchronous copies and roundings of matrix instructions, with every
//! access checked for races. (The tests of the other files run every operation on the same device, with one schedule.)
#![cfg(sae_kernels_ptx)]

mod common;

use common::anywhere::Step;
use common::emulated::{all_options, cuda};
use common::{relative, rng, rounded, uniform};
use sae_kernels::{
    Activation, Backend, Cuda, CudaElement, DecoderFreeConfig, Error, Form, Objective, Precision, Reference, Shape,
};

/// A whole step: every kernel of the model, in several tiles each way, in device memory throughout.
fn check<E: CudaElement>(form: Form, precision: Precision) {
    let shape = Shape { rows: 140, inputs: 37, latents: if form == Form::Dual { 150 } else { 133 } };
    let mut rng = rng(shape.latents as u64);
    let objective = Objective { lambda_wr: 0.1, ..Objective::default() };
    let config =
        DecoderFreeConfig { objective, correlation_form: form, weight_form: form, ..DecoderFreeConfig::new(shape) };
    let step = Step {
        config,
        x: rounded::<E>(&uniform(&mut rng, shape.rows * shape.inputs, 1.0)),
        weight: rounded::<E>(&uniform(&mut rng, shape.latents * shape.inputs, 0.4)),
        bias: rounded::<f32>(&uniform(&mut rng, shape.latents, 0.1)),
    };
    // The identity: a mask may differ where storage rounds, and the reference does not round.
    let step = Step { config: DecoderFreeConfig { activation: Activation::Identity, ..step.config }, ..step };
    let truth = step.run(Reference).unwrap();
    let bar = match precision {
        Precision::Full => (4.0 * E::UNIT_ROUNDOFF).max(1e-5),
        Precision::Storage => 2e-2,
    };
    for options in all_options() {
        let found = step.run(cuda::<E>(options.clone()).with_precision(precision)).unwrap();
        for (what, found, truth) in
            [("dW", &found.weight, &truth.weight), ("db", &found.bias, &truth.bias), ("dx", &found.x, &truth.x)]
        {
            let error = relative(found, truth);
            assert!(error <= bar, "{} {form:?} {precision:?} {options:?}: {what} is off by {error:e}", E::NAME);
        }
        let error = (found.losses.total - truth.losses.total).abs() / truth.losses.total.abs();
        assert!(error <= bar, "{:?}, expected {:?}", found.losses, truth.losses);
    }
}

#[test]
fn step_f32_primal() {
    check::<f32>(Form::Primal, Precision::Full);
}
#[test]
fn step_f32_dual() {
    check::<f32>(Form::Dual, Precision::Full);
}
#[test]
fn step_bf16_primal() {
    check::<sae_kernels::bf16>(Form::Primal, Precision::Full);
}
#[test]
fn step_f16_dual() {
    check::<sae_kernels::f16>(Form::Dual, Precision::Full);
}
#[test]
fn step_bf16_in_storage_precision() {
    check::<sae_kernels::bf16>(Form::Primal, Precision::Storage);
    check::<sae_kernels::bf16>(Form::Dual, Precision::Storage);
}

/// There is no such device anywhere, and mostly no driver either: an error that says so, not a panic.
#[test]
fn a_missing_device_is_an_error() {
    let error = Cuda::<f32>::new(usize::MAX).unwrap_err();
    assert!(
        matches!(error, Error::NoDriver { .. } | Error::NoDevice { .. } | Error::KernelsNotBuilt { .. }),
        "{error}"
    );
    println!("{error}");
}

#[test]
fn a_workspace_that_is_too_small_is_refused() {
    let cuda = cuda::<f32>(Default::default());
    let shape = Shape { rows: 200, inputs: 30, latents: 40 };
    assert!(cuda.workspace_len(shape).unwrap() > 0);
    let huge = Shape { rows: usize::MAX / 2, ..shape };
    assert!(matches!(cuda.workspace_len(huge), Err(Error::Overflow { .. })));
}
