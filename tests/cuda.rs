//! The CUDA kernels on an emulated GPU: all schedules, landings of asynchronous copies and roundings of matrix instructions, with every
//! access checked for races. (The tests of the other files run every operation on the same device, with one schedule.)
#![cfg(sae_kernels_ptx)]

mod common;

use common::anywhere::{Gradients, Step, Training};
use common::captured::{Capturing, Enqueued};
use common::emulated::{Emulated, all_options, cuda, cuda_fused, cuda_sm90};
use common::staged::Staged;
use common::{Place, Under, assert_same_bits, integers, ops, reference, relative, rng, rounded, uniform};
use ptx_emulator::Options;
use sae_kernels::cuda_driver::{PlainProduct, Schedule, Storage};
use sae_kernels::operations::Layout;
use sae_kernels::{
    Activation, Backend, Cuda, CudaElement, DecoderFreeConfig, Element, Error, Form, Objective, Precision, Products,
    Reference, Shape,
};
use std::sync::Arc;

/// A step with the identity: a mask may differ where storage rounds, and the reference does not round.
fn step_of<E: CudaElement>(shape: Shape, form: Form) -> Step {
    let mut rng = rng(shape.latents as u64);
    let objective = Objective { lambda_wr: 0.1, ..Objective::default() };
    let config = DecoderFreeConfig {
        objective,
        activation: Activation::Identity,
        correlation_form: form,
        weight_form: form,
        ..DecoderFreeConfig::new(shape)
    };
    Step {
        config,
        x: rounded::<E>(&uniform(&mut rng, shape.rows * shape.inputs, 1.0)),
        weight: rounded::<E>(&uniform(&mut rng, shape.latents * shape.inputs, 0.4)),
        bias: rounded::<f32>(&uniform(&mut rng, shape.latents, 0.1)),
    }
}

/// Panics unless gradients and losses agree.
fn assert_close(context: &str, bar: f64, found: &Gradients, truth: &Gradients) {
    for (what, found, truth) in
        [("dW", &found.weight, &truth.weight), ("db", &found.bias, &truth.bias), ("dx", &found.x, &truth.x)]
    {
        let error = relative(found, truth);
        assert!(error <= bar, "{context}: {what} is off by {error:e}");
    }
    let error = (found.losses.total - truth.losses.total).abs() / truth.losses.total.abs();
    assert!(error <= bar, "{context}: {:?}, expected {:?}", found.losses, truth.losses);
}

/// A whole step: every kernel of the model, in several tiles each way, in device memory throughout.
fn check<E: CudaElement>(form: Form, precision: Precision) {
    let shape = Shape { rows: 140, inputs: 37, latents: if form == Form::Dual { 150 } else { 133 } };
    let step = step_of::<E>(shape, form);
    let truth = step.run(Reference).unwrap();
    let bar = match precision {
        Precision::Full => (4.0 * E::UNIT_ROUNDOFF).max(1e-5),
        Precision::Storage => 2e-2,
    };
    for options in all_options() {
        // Of 9.0 with warpgroups together and in turn.
        let sm90 = Schedule::ALL.map(|schedule| cuda_sm90::<E>(options.clone(), schedule));
        // And in one launch.
        let fused = cuda_fused::<E>(options.clone(), 3);
        for cuda in [cuda::<E>(options.clone()), fused].into_iter().chain(sm90) {
            let found = step.run(cuda.clone().with_precision(precision)).unwrap();
            assert_close(&format!("{cuda:?} {form:?} {precision:?} {options:?}"), bar, &found, &truth);
        }
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

/// One cluster goes through several squares of each product, symmetric ones among them, and from depth to depth of the ring.
#[test]
fn a_step_of_several_squares() {
    for form in [Form::Primal, Form::Dual] {
        let step = step_of::<sae_kernels::bf16>(Shape { rows: 270, inputs: 70, latents: 290 }, form);
        let truth = step.run(Reference).unwrap();
        for schedule in Schedule::ALL {
            let cuda = cuda_sm90::<sae_kernels::bf16>(Options::default(), schedule).with_precision(Precision::Storage);
            let found = step.run(cuda).unwrap();
            assert_close(&format!("{form:?}, {schedule:?}"), 2e-2, &found, &truth);
        }
    }
}

/// Schedules and multiprocessors decide who computes which tiles, but every sum over the depth has one order. Sums over a tile's columns are
/// cut at other rows.
#[test]
fn schedules_give_the_same_bits() {
    fn check<E: CudaElement>(precision: Precision) {
        let ways: Vec<Under<Staged<E>>> = Schedule::ALL
            .into_iter()
            .flat_map(|schedule| [2, 6].map(|multiprocessors| (schedule, multiprocessors)))
            .map(|(schedule, multiprocessors)| {
                let device = Emulated::with_multiprocessors(plain(), multiprocessors, Some(schedule));
                let cuda = Cuda::<E>::on_driver(Arc::new(device)).with_precision(precision);
                let name = format!("{} {precision:?}, {schedule:?} on {multiprocessors}", E::NAME);
                Under::new(name, move || Staged(cuda.clone()))
            })
            .collect();
        let same = |what: &str, of: &dyn Fn(&Under<Staged<E>>) -> Vec<f64>, truth: Option<Vec<f64>>| {
            let first = of(&ways[0]);
            if let Some(truth) = truth {
                let error = relative(&first, &truth);
                assert!(error <= 2e-2, "{}: {what} is off by {error:e}", ways[0].name);
            }
            for under in &ways[1..] {
                assert_same_bits(&under.name, what, &of(under), &first);
            }
        };
        let mut rng = rng(3);
        // Five tiles each way, the last of them ragged: an odd number of columns of squares.
        let (n, h) = (90, 530);
        let (a, mean) = (rounded::<E>(&uniform(&mut rng, n * h, 1.0)), uniform(&mut rng, h, 0.3));
        let comoments = |under: &Under<Staged<E>>| ops::comoments(under, Place::DENSE, (n, h), &a, &mean, None);
        same("comoments", &comoments, Some(ops::comoments(&reference(), Place::DENSE, (n, h), &a, &mean, None)));

        let (n, d, h) = (530, 70, 390);
        let encode = ops::Encode {
            n,
            d,
            h,
            x: rounded::<E>(&uniform(&mut rng, n * d, 1.0)),
            weight: rounded::<E>(&uniform(&mut rng, h * d, 0.3)),
            bias: uniform(&mut rng, h, 0.2),
            activation: Activation::Softplus,
            shift: Some(uniform(&mut rng, h, 0.5)),
            before: None,
            wanted: [true; 3],
        };
        let truth = encode.run(&reference(), Place::DENSE);
        let run = |under: &Under<Staged<E>>| encode.run(under, Place::DENSE);
        same("activations", &|under| run(under).activations, Some(truth.activations));
        same("row losses", &|under| run(under).row_loss, Some(truth.row_loss));
        for under in &ways {
            let error = relative(&run(under).sum, &truth.sum);
            assert!(error <= 1e-2, "{}: column sums are off by {error:e}", under.name);
        }
        if E::NAME == "f32" {
            return;
        }
        let [m, n, k] = [530, 390, 150];
        let (left, right) = (uniform(&mut rng, m * k, 1.0), uniform(&mut rng, n * k, 1.0));
        for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
            let product =
                |under: &Under<Staged<E>>| ops::product(under, Place::DENSE, layout, [m, n, k], &left, &right, None);
            same(&format!("product {layout:?}"), &product, None);
        }
    }
    check::<f32>(Precision::Full);
    check::<sae_kernels::bf16>(Precision::Storage);
}

/// Where nothing else is said, each product has the schedule that its extents ask for.
#[test]
fn a_step_mixes_schedules() {
    let device = Emulated::with_multiprocessors(plain(), 2, None);
    let device = Arc::new(Capturing::new(device));
    let step = step_of::<f32>(Shape { rows: 600, inputs: 37, latents: 512 }, Form::Primal);
    let mut training = Training::new(Cuda::<f32>::on_driver(device.clone()), step.config).unwrap();
    device.begin();
    training.enqueue().unwrap();
    let mut found = Vec::new();
    for call in device.end() {
        if let Enqueued::Launch(launch) = call
            && launch.cluster == 2
        {
            // After two maps of 128 bytes, eight words and the number of squares.
            found.push((launch.kernel, launch.argument.bytes()[256 + 32 + 4]));
        }
    }
    // One stage for each of six pairs of planes; ten.
    assert!(found.contains(&("encode_f32", 1)), "{found:?}");
    assert!(found.contains(&("gram_primal", 0)), "{found:?}");
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

/// One schedule, and no search for races: what follows is about the host's calls.
fn plain() -> Options {
    Options { check_races: false, ..Options::default() }
}

/// A device whose library takes some products.
fn with_library(takes: fn(&PlainProduct) -> bool) -> Arc<Emulated> {
    Arc::new(Emulated::with_library(plain(), takes))
}

#[test]
fn a_step_whose_products_the_library_computes() {
    fn check<E: CudaElement>(form: Form, block_rows: Option<usize>) {
        let mut step = step_of::<E>(Shape { rows: 70, inputs: 37, latents: 45 }, form);
        step.config.block_rows = block_rows;
        let context = format!("{} {form:?} {block_rows:?}", E::NAME);
        let device = with_library(|_| true);
        let cuda = Cuda::<E>::on_driver(device.clone());
        assert_eq!(cuda.products(), Products::Library);
        let found = step.run(cuda.clone()).unwrap();
        // dW = dZᵀ x and dx = dZ W of each block.
        let layouts: Vec<Layout> = device.asked().iter().map(|product| product.layout).collect();
        let blocks = block_rows.map_or(1, |rows| 70usize.div_ceil(rows));
        assert_eq!(layouts, [Layout::Tn, Layout::Nn].repeat(blocks), "{context}");

        let own = step.run(cuda.with_products(Products::Own)).unwrap();
        assert_eq!(device.asked(), [], "{context}");
        assert_close(&context, 4.0 * E::UNIT_ROUNDOFF, &found, &step.run(Reference).unwrap());
        // The operands are the same bits: only the sums of f32 differ.
        assert_close(&context, 16.0 * f32::UNIT_ROUNDOFF, &found, &own);
    }
    check::<sae_kernels::bf16>(Form::Primal, None);
    check::<sae_kernels::bf16>(Form::Primal, Some(32));
    check::<sae_kernels::f16>(Form::Dual, None);
}

#[test]
fn f32_never_goes_to_the_library() {
    let device = with_library(|_| true);
    let cuda = Cuda::<f32>::on_driver(device.clone());
    assert_eq!(cuda.products(), Products::Own);
    step_of::<f32>(Shape { rows: 20, inputs: 9, latents: 10 }, Form::Primal).run(cuda).unwrap();
    assert_eq!(device.asked(), []);
}

#[test]
fn the_library_enlarges_the_workspace_only_where_it_is_used() {
    let shape = Shape { rows: 3, inputs: 2, latents: 2 };
    let cuda = Cuda::<sae_kernels::bf16>::on_driver(with_library(|_| true));
    let own = cuda.clone().with_products(Products::Own);
    assert!(cuda.workspace_len(shape).unwrap() > own.workspace_len(shape).unwrap());
    let without = common::emulated::cuda::<sae_kernels::bf16>(plain());
    assert_eq!(own.workspace_len(shape).unwrap(), without.workspace_len(shape).unwrap());
    assert_eq!(without.products(), Products::Own);
}

/// All layouts, ragged, dense and strided, overwriting NaN and adding; whole numbers, so that every way of summing is exact.
#[test]
fn the_library_and_our_kernels_compute_the_same_products() {
    fn check<E: CudaElement>(storage: Storage, takes: fn(&PlainProduct) -> bool) {
        let device = with_library(takes);
        let on_device = device.clone();
        let under =
            Under::new(format!("{} with a library", E::NAME), move || Staged(Cuda::<E>::on_driver(on_device.clone())));
        let mut rng = rng(7);
        for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
            for place in Place::ALL {
                for [m, n, k] in [[1, 1, 1], [5, 9, 17], [24, 16, 8], [130, 3, 2], [4, 0, 3], [0, 4, 3], [4, 5, 0]] {
                    let (left, right) = (integers(&mut rng, m * k, 4), integers(&mut rng, n * k, 4));
                    let before = integers(&mut rng, m * n, 9);
                    for before in [None, Some(&before[..])] {
                        let found = ops::product(&under, place, layout, [m, n, k], &left, &right, before);
                        let truth = ops::product(&reference(), place, layout, [m, n, k], &left, &right, before);
                        assert_eq!(found, truth, "{} {layout:?} {place:?} {m}×{n}×{k}", E::NAME);
                        let asked = device.asked();
                        assert_eq!(asked.len(), usize::from(m * n * k > 0), "{m}×{n}×{k}");
                        for product in asked {
                            let strides = product.shapes().map(|[_, cols]| cols + place.gap);
                            let [left, right, out] = [product.left, product.right, product.out];
                            assert_eq!([left, right, out].map(|at| at.row_stride), strides, "{product:?}");
                            assert_eq!((product.extents, product.layout), ([m, n, k], layout));
                            assert_eq!((product.storage, product.accumulate), (storage, before.is_some()));
                        }
                    }
                }
            }
        }
    }
    check::<sae_kernels::bf16>(Storage::Bf16, |_| true);
    check::<sae_kernels::f16>(Storage::F16, |_| true);
    // Our kernels step in where the library has no algorithm.
    check::<sae_kernels::bf16>(Storage::Bf16, |product| {
        [product.left, product.right].iter().all(|operand| operand.row_stride % 8 == 0)
    });
}

/// A sum over rows is cut for the library as for our kernels, and only that.
#[test]
fn the_library_gets_4096_rows_at_a_time() {
    let device = with_library(|product| product.extents[2] > 10);
    let cuda = Cuda::<sae_kernels::bf16>::on_driver(device.clone());
    let under = Under::new("bf16 with a library".into(), move || Staged(cuda.clone()));
    let ([m, n, k], mut rng) = ([3, 5, 2 * 4096 + 10], rng(4096));
    let (left, right) = (integers(&mut rng, m * k, 2), integers(&mut rng, n * k, 2));
    let before = integers(&mut rng, m * n, 9);
    for layout in [Layout::Tn, Layout::Nn, Layout::Nt] {
        for before in [None, Some(&before[..])] {
            let found = ops::product(&under, Place::DENSE, layout, [m, n, k], &left, &right, before);
            assert_eq!(found, ops::product(&reference(), Place::DENSE, layout, [m, n, k], &left, &right, before));
            let cuts: Vec<_> = device.asked().iter().map(|product| (product.extents[2], product.accumulate)).collect();
            let first = before.is_some();
            // The last one is left to our kernel.
            let cut = vec![(4096, first), (4096, true), (10, true)];
            assert_eq!(cuts, if layout == Layout::Tn { cut } else { vec![(k, first)] }, "{layout:?}");
        }
    }
}

/// A step and an update neither allocate nor wait, and what they enqueue depends on no content of memory: enqueued once, it computes
/// every later step.
#[test]
fn a_captured_step_is_replayed() {
    fn check<E: CudaElement>(form: Form, block_rows: Option<usize>, library: bool, blocks_together: u32) {
        let shape = Shape { rows: 70, inputs: 37, latents: 45 };
        let context =
            format!("{} {form:?} {block_rows:?}, library: {library}, {blocks_together} blocks together", E::NAME);
        let device = if library { Emulated::with_library(plain(), |_| true) } else { Emulated::new(plain()) };
        let device = Arc::new(Capturing::new(device.cooperative(blocks_together)));
        let mut first = step_of::<E>(shape, form);
        first.config.block_rows = block_rows;
        let scaled = |values: &[f64], factor: f64| rounded::<E>(&values.iter().map(|v| v * factor).collect::<Vec<_>>());
        let second = Step {
            x: scaled(&first.x, -0.7),
            weight: scaled(&first.weight, 1.3),
            bias: rounded::<f32>(&first.bias.iter().map(|b| b + 0.25).collect::<Vec<_>>()),
            ..first
        };
        let mut eager = Training::new(Cuda::<E>::on_driver(device.clone()), first.config).unwrap();
        let mut captured = Training::new(Cuda::<E>::on_driver(device.clone()), first.config).unwrap();

        device.begin();
        captured.enqueue().unwrap();
        let graph = device.end();
        let products = graph.iter().filter(|call| matches!(call, Enqueued::Product(_))).count();
        let blocks = block_rows.map_or(1, |rows| shape.rows.div_ceil(rows));
        assert_eq!(products, if library { 2 * blocks } else { 0 }, "{context}");
        let before = captured.outcome().unwrap();
        assert!(before.iter().all(|(_, values)| values.iter().all(|v| *v == 0.0)), "{context}: {before:?}");

        for (at, step) in [&first, &second].into_iter().enumerate() {
            eager.load(step).unwrap();
            eager.enqueue().unwrap();
            captured.load(step).unwrap();
            // SAFETY: the buffers are those of the capture.
            unsafe { device.replay(&graph) }.unwrap();
            for ((what, found), (_, expected)) in captured.outcome().unwrap().iter().zip(&eager.outcome().unwrap()) {
                assert_same_bits(&format!("{context}, replay {at}"), what, found, expected);
                assert!(found.iter().any(|v| *v != 0.0), "{context}: {what} is all zeros");
            }
        }
    }
    check::<sae_kernels::bf16>(Form::Primal, None, false, 0);
    check::<sae_kernels::bf16>(Form::Primal, None, false, 3);
    check::<sae_kernels::bf16>(Form::Dual, None, false, 0);
    check::<sae_kernels::bf16>(Form::Primal, Some(32), false, 0);
    check::<sae_kernels::bf16>(Form::Primal, Some(32), true, 0);
    check::<f32>(Form::Primal, Some(32), false, 0);
    check::<f32>(Form::Dual, None, false, 0);
}
