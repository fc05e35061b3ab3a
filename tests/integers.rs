//! The integer gate: sums of small whole numbers are exact in any order, so every backend, instruction set, tile and storage type
//! must give the very bits of the reference. It catches dropped tails, races and double counts at once.

#[macro_use]
mod common;

use common::ops::{self, ActivationSums, Backward, Correlation, Decode, DecodeBackward, Encode, StatisticsPart};
use common::{HostBackend, Place, Under, Where, assert_same_bits, integers, reference, rng, rounded};
use sae_kernels::operations::Layout;
use sae_kernels::{Activation, Element};

on_every_backend!(
    encode,
    activation_sums,
    comoments,
    product,
    column_sums,
    backward_dz,
    decode,
    decode_backward,
    large_products
);

const EDGES: [usize; 21] = [1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 28, 31, 32, 33, 48, 64, 65];

fn shapes<B: HostBackend>(under: &Under<B>) -> Vec<[usize; 3]> {
    let mut all =
        vec![[65, 257, 130], [13, 1103, 17], [301, 33, 65], [9, 70, 259], [1030, 9, 33], [0, 4, 4], [4, 0, 4]];
    for s in EDGES {
        all.extend([[s, 7, 9], [9, s, 7], [7, 9, s], [s, s, s]]);
    }
    under.cases(all, [[0, 4, 4], [4, 0, 4], [1, 1, 1], [127, 65, 129], [129, 128, 31], [257, 300, 9], [9, 31, 260]])
}

/// +0 and −0 are the same number.
fn unsigned_zero(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| v + 0.0).collect()
}

fn assert_equal(context: &str, what: &str, found: &[f64], expected: &[f64]) {
    assert_same_bits(context, what, &unsigned_zero(found), &unsigned_zero(expected));
}

fn encode<B: HostBackend>(under: &Under<B>) {
    for [n, d, h] in shapes(under) {
        for activation in [Activation::Relu, Activation::Identity] {
            let mut rng = rng((n + d + h) as u64);
            let case = Encode {
                n,
                d,
                h,
                x: integers(&mut rng, n * d, 2),
                weight: integers(&mut rng, h * d, 2),
                bias: integers(&mut rng, h, 5),
                activation,
                shift: Some(integers(&mut rng, h, 3)),
                before: None,
                wanted: [true; 3],
            };
            for place in Place::ALL {
                let context = format!("{}: encode {n}×{d}×{h} {activation:?} {place:?}", under.name);
                let found = case.run(under, place);
                let truth = case.run(&reference(), place);
                // z is exact; storage may round it, once.
                let stored = rounded::<B::Element>(&truth.activations);
                assert_equal(&context, "activations", &found.activations, &stored);
                let shift = case.shift.as_ref().unwrap();
                let sums = |f: &dyn Fn(f64) -> f64| -> Vec<f64> {
                    (0..h).map(|j| (0..n).map(|row| f(stored[row * h + j] - shift[j])).sum()).collect()
                };
                let (sum, squares) = (sums(&|a| a), sums(&|a| a * a));
                assert_equal(&context, "sum", &found.sum, &sum);
                if squares.iter().all(|s| *s < 2f64.powi(24)) {
                    assert_equal(&context, "sum_squares", &found.sum_squares, &squares);
                }
            }
        }
    }
}

fn activation_sums<B: HostBackend>(under: &Under<B>) {
    for [n, _, h] in shapes(under) {
        let mut rng = rng((n + h) as u64);
        let shift = Some(integers(&mut rng, h, 3));
        let before = Some((2.0, integers(&mut rng, h, 9), integers(&mut rng, h, 9)));
        let activations = integers(&mut rng, n * h, 9);
        let case = ActivationSums { n, h, activations, shift, before, wanted: [false, true] };
        for place in Place::ALL {
            let context = format!("{}: activation_sums {n}×{h} {place:?}", under.name);
            let (found, truth) = (case.run(under, place), case.run(&reference(), place));
            assert_equal(&context, "sum", &found.sum, &truth.sum);
            assert_equal(&context, "sum_squares", &found.sum_squares, &truth.sum_squares);
        }
    }
}

fn comoments<B: HostBackend>(under: &Under<B>) {
    for [n, _, h] in shapes(under) {
        let mut rng = rng((n + h) as u64);
        let a = integers(&mut rng, n * h, 8);
        let shift = integers(&mut rng, h, 4);
        let before = integers(&mut rng, h * h, 100);
        for (place, before) in [(Place::DENSE, None), (Place::STRIDED, Some(before.as_slice()))] {
            let context = format!("{}: comoments {n}×{h} {place:?}", under.name);
            let found = ops::comoments(under, place, (n, h), &a, &shift, before);
            assert_equal(
                &context,
                "comoments",
                &found,
                &ops::comoments(&reference(), place, (n, h), &a, &shift, before),
            );
        }
    }
}

fn product<B: HostBackend>(under: &Under<B>) {
    for [m, n, k] in shapes(under) {
        let mut rng = rng((m + n + k) as u64);
        let (left, right) = (integers(&mut rng, m * k, 2), integers(&mut rng, n * k, 2));
        let before = integers(&mut rng, m * n, 1000);
        for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
            for (place, before) in [(Place::DENSE, None), (Place::STRIDED, Some(before.as_slice()))] {
                let context = format!("{}: product {layout:?} {m}×{n}×{k} {place:?}", under.name);
                let found = ops::product(under, place, layout, [m, n, k], &left, &right, before);
                let truth = ops::product(&reference(), place, layout, [m, n, k], &left, &right, before);
                assert_equal(&context, "out", &found, &truth);
            }
        }
    }
}

/// Freivalds' check of products that cross every cache block: (L Rᵀ) v = L (Rᵀ v), exact in whole numbers.
fn large_products<B: HostBackend>(under: &Under<B>) {
    if B::Real::NAME == "f64" || under.device == Where::EmulatedGpu {
        // The reference has no blocks to cross, and takes long; so does the emulator, whose tiles the other shapes cross.
        return;
    }
    for [m, n, k] in [[1100, 1300, 300], [270, 260, 2100]] {
        let mut rng = rng(k as u64);
        let (left, right) = (integers(&mut rng, m * k, 2), integers(&mut rng, n * k, 2));
        let v = integers(&mut rng, n, 9);
        let inner: Vec<f64> = (0..k).map(|l| (0..n).map(|j| right[j * k + l] * v[j]).sum()).collect();
        let truth: Vec<f64> = left.chunks(k).map(|row| row.iter().zip(&inner).map(|(l, r)| l * r).sum()).collect();
        for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
            let out = ops::product(under, Place::STRIDED, layout, [m, n, k], &left, &right, None);
            let found: Vec<f64> = out.chunks(n).map(|row| row.iter().zip(&v).map(|(o, v)| o * v).sum()).collect();
            assert_equal(&format!("{}: product {layout:?} {m}×{n}×{k}", under.name), "out · v", &found, &truth);
        }
    }
}

fn column_sums<B: HostBackend>(under: &Under<B>) {
    for [n, _, h] in shapes(under) {
        let mut rng = rng((n + h) as u64);
        let (matrix, before) = (integers(&mut rng, n * h, 50), integers(&mut rng, h, 50));
        for (place, before) in [(Place::DENSE, None), (Place::STRIDED, Some(before.as_slice()))] {
            let context = format!("{}: column_sums {n}×{h} {place:?}", under.name);
            let found = ops::column_sums(under, place, (n, h), &matrix, before);
            assert_equal(&context, "sums", &found, &ops::column_sums(&reference(), place, (n, h), &matrix, before));
        }
    }
}

fn backward_dz<B: HostBackend>(under: &Under<B>) {
    for [n, _, h] in shapes(under) {
        let mut rng = rng((n + h) as u64);
        // A coupling that is symmetric, as its operation leaves it. Few of its numbers are not 0, for dz to be exact in bf16.
        let mut coupling = vec![0.0; h * h];
        for i in 0..h {
            let j = (i + 1) % h;
            if i != j {
                (coupling[i * h + j], coupling[j * h + i]) = (2.0, 2.0);
            }
        }
        let activations: Vec<f64> = integers(&mut rng, n * h, 4).iter().map(|a| a.max(0.0)).collect();
        let product = integers(&mut rng, n * h, 9);
        let primal = Correlation::Primal { coupling, offset: integers(&mut rng, h, 9) };
        let (mean, scale) = (integers(&mut rng, h, 2), integers(&mut rng, h, 3));
        let before = Some(integers(&mut rng, h, 9));
        for correlation in [Correlation::None, Correlation::Dual { product }, primal] {
            let statistics = Some(StatisticsPart { mean: mean.clone(), scale: scale.clone(), correlation });
            let (activations, row_loss, before) = (activations.clone(), vec![0.0; n], before.clone());
            let activation = Activation::Relu;
            let case = Backward { n, h, activations, activation, row_loss, row_weight: 0.0, statistics, before };
            for place in Place::ALL {
                let context = format!("{}: backward_dz {n}×{h} {place:?} {:?}", under.name, case.statistics);
                let ((dz, bias), (true_dz, true_bias)) = (case.run(under, place), case.run(&reference(), place));
                assert_equal(&context, "dz", &dz, &true_dz);
                assert_equal(&context, "grad_bias", &bias, &true_bias);
            }
        }
    }
}

fn decode<B: HostBackend>(under: &Under<B>) {
    for [n, d, h] in shapes(under) {
        let mut rng = rng((n + d + h) as u64);
        let case = Decode {
            n,
            d,
            h,
            activations: integers(&mut rng, n * h, 2),
            weight: integers(&mut rng, h * d, 2),
            bias: integers(&mut rng, d, 5),
            x: integers(&mut rng, n * d, 5),
            residual_weight: 2.0,
            before: Some(7.0),
            wanted: [true, true],
        };
        for place in Place::ALL {
            let context = format!("{}: decode {n}×{d}×{h} {place:?}", under.name);
            let (found, truth) = (case.run(under, place), case.run(&reference(), place));
            assert_equal(&context, "reconstruction", &found.reconstruction, &truth.reconstruction);
            assert_equal(&context, "residual", &found.residual, &rounded::<B::Element>(&truth.residual));
            if truth.squared_error[0] < 2f64.powi(24) {
                assert_equal(&context, "squared_error", &found.squared_error, &truth.squared_error);
            }
        }
    }
}

fn decode_backward<B: HostBackend>(under: &Under<B>) {
    for [n, d, h] in shapes(under) {
        for activation in [Activation::Relu, Activation::Identity] {
            let mut rng = rng((n + d + h) as u64);
            let case = DecodeBackward {
                n,
                d,
                h,
                residual: integers(&mut rng, n * d, 2),
                weight: integers(&mut rng, h * d, 2),
                activations: integers(&mut rng, n * h, 3),
                activation,
                l1: 3.0,
                before: None,
            };
            for place in Place::ALL {
                let context = format!("{}: decode_backward {n}×{d}×{h} {activation:?} {place:?}", under.name);
                let ((dz, bias), (true_dz, true_bias)) = (case.run(under, place), case.run(&reference(), place));
                let stored = rounded::<B::Element>(&true_dz);
                assert_equal(&context, "dz", &dz, &stored);
                // Where storage rounds, the sum may be of either.
                if stored == true_dz {
                    assert_equal(&context, "grad_bias", &bias, &true_bias);
                }
            }
        }
    }
}
