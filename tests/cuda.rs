//! The CUDA kernels on an emulated GPU: all schedules, landings of asynchronous copies and roundings of matrix instructions, with every
//! access checked. (The tests of the other files run on the same device with one schedule.)
#![cfg(sae_kernels_ptx)]

mod common;

use common::emulated::{all_options, cuda};
use common::ops::Encode;
use common::staged::Staged;
use common::{Place, Under, assert_same_bits, integers, reference, rng};
use sae_kernels::{Activation, CudaElement};

fn under<E: CudaElement>() -> Vec<Under<Staged<E>>> {
    all_options()
        .into_iter()
        .map(|options| Under::new(format!("{} {options:?}", E::NAME), move || Staged(cuda(options.clone()))))
        .collect()
}

#[test]
fn encode() {
    fn check<E: CudaElement>() {
        for under in under::<E>() {
            for [n, d, h] in [[3, 5, 7], [130, 70, 131]] {
                let mut rng = rng(n as u64);
                let case = Encode {
                    n,
                    d,
                    h,
                    x: integers(&mut rng, n * d, 1),
                    weight: integers(&mut rng, h * d, 1),
                    bias: integers(&mut rng, h, 5),
                    activation: Activation::Relu,
                    shift: Some(integers(&mut rng, h, 3)),
                    before: None,
                    wanted: [true; 3],
                };
                let (found, truth) = (case.run(&under, Place::STRIDED), case.run(&reference(), Place::DENSE));
                let zero = |values: &[f64]| -> Vec<f64> { values.iter().map(|v| v + 0.0).collect() };
                assert_same_bits(&under.name, "activations", &zero(&found.activations), &zero(&truth.activations));
                assert_same_bits(&under.name, "sum", &found.sum, &truth.sum);
                assert_same_bits(&under.name, "sum_squares", &found.sum_squares, &truth.sum_squares);
            }
        }
    }
    check::<f32>();
    check::<sae_kernels::bf16>();
    check::<sae_kernels::f16>();
}
