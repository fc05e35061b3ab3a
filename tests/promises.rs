//! What every backend promises beyond being right: the same bits for any number of threads, any batch a row comes in and any
//! leftovers in its memory; NaN and infinities where the reference has them; accuracy where sums cancel.

#[macro_use]
mod common;

use common::ops::{
    self, ActivationSums, Backward, Correlation, Covariance, Decode, DecodeBackward, Dual, Encode, Finish, Redundancy,
    StatisticsPart,
};
use common::step::{self, Buffers};
use common::{
    HostBackend, Outcome, Place, Plan, Problem, Under, assert_same_bits, assert_within, reference, rng, rounded,
    uniform,
};
use rand::RngExt;
use sae_kernels::operations::Layout;
use sae_kernels::{
    Activation, CpuElement, Element, Form, Isa, Losses, Objective, Shape, StandardConfig, StandardGradients,
    StandardParameters, StandardSae, Statistics, bf16, f16,
};

on_every_backend!(
    same_call_same_bits,
    rows_do_not_depend_on_their_batch,
    a_plan_may_be_larger_than_the_batch,
    encode_propagates_what_is_not_finite,
    operations_propagate_what_is_not_finite,
    a_step_propagates_nan,
    row_loss_far_from_zero,
    variance_far_from_zero,
    dead_and_constant_columns,
);

const ALL_TERMS: Objective = Objective {
    lambda_lse: 1.0,
    lambda_var: 0.5,
    lambda_tc: 0.25,
    lambda_wr: 0.125,
    variance_eps: 1e-6,
    reduction: sae_kernels::Reduction::Sum,
    normalize_weight: true,
};

fn problem<B: HostBackend>([rows, inputs, latents]: [usize; 3], activation: Activation) -> Problem {
    let mut rng = rng((rows + 3 * inputs + 7 * latents) as u64);
    let scale = 1.0 / (inputs.max(1) as f64).sqrt();
    let problem = Problem {
        shape: Shape { rows, inputs, latents },
        x: uniform(&mut rng, rows * inputs, 1.0),
        weight: uniform(&mut rng, latents * inputs, 3.0 * scale),
        bias: uniform(&mut rng, latents, 0.5),
        objective: ALL_TERMS,
        activation,
    };
    problem.rounded_for::<B>()
}

fn assert_same_outcome(context: &str, found: &Outcome, expected: &Outcome) {
    assert_same_bits(context, "activations", &found.activations, &expected.activations);
    assert_same_bits(context, "row_loss", &found.row_loss, &expected.row_loss);
    for (at, (name, gradient)) in found.gradients().into_iter().enumerate() {
        assert_same_bits(context, name, gradient, expected.gradients()[at].1);
    }
    let terms = |outcome: &Outcome| outcome.terms().map(|(_, term)| term);
    assert_same_bits(context, "losses", &terms(found), &terms(expected));
}

/// Everything that a backend computes in a step of either model, two-phase calls and every form.
fn everything<B: HostBackend>(under: &Under<B>) -> Vec<(String, Vec<f64>)> {
    let mut results = Vec::new();
    let all = [
        ([513, 70, 33], Activation::Relu),
        ([40, 33, 130], Activation::Relu),
        ([130, 17, 65], Activation::Softplus),
        ([3, 5, 2], Activation::Identity),
    ];
    for (shape, activation) in under.cases(all, [([131, 17, 130], Activation::Softplus)]) {
        let problem = problem::<B>(shape, activation);
        for form in [Form::Primal, Form::Dual] {
            let plan = Plan { correlation_form: form, weight_form: form, ..Plan::default() };
            push(&mut results, &format!("{shape:?} {form:?}"), problem.step(under, &plan).unwrap());
        }
        let plan = Plan { block_rows: Some(64), place: Place::STRIDED, ..Plan::default() };
        push(&mut results, &format!("{shape:?} in blocks"), problem.step(under, &plan).unwrap());
        let n = shape[0];
        let (outcome, statistics) = problem.sharded(under, &plan, &[0..n / 3, n / 3..n]).unwrap();
        push(&mut results, &format!("{shape:?} sharded"), outcome);
        results.push(("statistics".into(), statistics.sums().to_vec()));
        results.push((format!("{shape:?} standard"), standard_step(under, &problem)));
    }
    results
}

fn push(results: &mut Vec<(String, Vec<f64>)>, name: &str, outcome: Outcome) {
    for (gradient, values) in outcome.gradients() {
        results.push((format!("{name} {gradient}"), values.to_vec()));
    }
    results.push((format!("{name} losses"), outcome.terms().iter().map(|t| t.1).collect()));
    results.push((format!("{name} activations"), outcome.activations));
    results.push((format!("{name} row_loss"), outcome.row_loss));
}

/// Gradients and losses of the standard sparse autoencoder, its decoder the encoder's weight.
fn standard_step<B: HostBackend>(under: &Under<B>, problem: &Problem) -> Vec<f64> {
    let shape = problem.shape;
    let mut buffers = Buffers::<B>::new(problem, Place::STRIDED);
    let decoder_bias = common::Guarded::<B::Real>::vector(Place::STRIDED, &vec![0.125; shape.inputs]);
    let mut decoder_grad = common::Guarded::<B::Real>::poisoned(Place::STRIDED, shape.latents, shape.inputs);
    let mut decoder_bias_grad = common::Guarded::<B::Real>::vector_or_poison(Place::STRIDED, shape.inputs, None);
    let mut model = StandardSae::new(under.fresh(), StandardConfig { shape, lambda_l1: 0.01 }).unwrap();
    let parameters = StandardParameters {
        encoder_weight: buffers.weight.mat(),
        encoder_bias: buffers.bias.slice(),
        decoder_weight: buffers.weight.mat(),
        decoder_bias: decoder_bias.slice(),
    };
    let gradients = StandardGradients {
        encoder_weight: buffers.grad_weight.mat_mut(),
        encoder_bias: buffers.grad_bias.slice_mut(),
        decoder_weight: decoder_grad.mat_mut(),
        decoder_bias: decoder_bias_grad.slice_mut(),
    };
    model.step(buffers.x.mat(), parameters, gradients).unwrap();
    let losses = model.losses().unwrap();
    let mut all = vec![losses.mse, losses.l1, losses.total];
    all.extend(buffers.grad_weight.checked(&under.name, "encoder_weight"));
    all.extend(buffers.grad_bias.checked(&under.name, "encoder_bias"));
    all.extend(decoder_grad.checked(&under.name, "decoder_weight"));
    all.extend(decoder_bias_grad.checked(&under.name, "decoder_bias"));
    all
}

fn same_call_same_bits<B: HostBackend>(under: &Under<B>) {
    for ((name, first), (_, second)) in everything(under).into_iter().zip(everything(under)) {
        assert_same_bits(&format!("{}: again", under.name), &name, &second, &first);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    fn check<E: CpuElement>() {
        for isa in Isa::available() {
            let one = everything(&common::cpu::<E>(isa, 1));
            for threads in [2, 3, 4, 7] {
                let under = common::cpu::<E>(isa, threads);
                for ((name, expected), (_, found)) in one.iter().zip(everything(&under)) {
                    assert_same_bits(&format!("{} against 1", under.name), name, &found, expected);
                }
            }
        }
    }
    check::<f32>();
    check::<bf16>();
    check::<f16>();
}

fn rows_do_not_depend_on_their_batch<B: HostBackend>(under: &Under<B>) {
    for (n, d, h) in under.cases([(67, 19, 33), (35, 300, 65), (16, 8, 16)], [(67, 19, 33)]) {
        for activation in [Activation::Relu, Activation::Softplus] {
            let problem = problem::<B>([n, d, h], activation);
            let encode = |rows: std::ops::Range<usize>| Encode {
                n: rows.len(),
                d,
                h,
                x: problem.x[rows.start * d..rows.end * d].to_vec(),
                weight: problem.weight.clone(),
                bias: problem.bias.clone(),
                activation,
                shift: None,
                before: None,
                wanted: [true; 3],
            };
            let whole = encode(0..n).run(under, Place::DENSE);
            for size in [1, 2, 5, 8, 13, n - 1] {
                for start in (0..n).step_by(size) {
                    let rows = start..n.min(start + size);
                    let context = format!("{}: rows {rows:?} of {n}×{d}×{h} {activation:?}", under.name);
                    let part = encode(rows.clone()).run(under, Place::STRIDED);
                    let activations = &whole.activations[rows.start * h..rows.end * h];
                    assert_same_bits(&context, "activations", &part.activations, activations);
                    assert_same_bits(&context, "row_loss", &part.row_loss, &whole.row_loss[rows.clone()]);
                    let given = ActivationSums {
                        n: rows.len(),
                        h,
                        activations: activations.to_vec(),
                        shift: None,
                        before: None,
                        wanted: [true, false],
                    };
                    let given = given.run(under, Place::STRIDED);
                    assert_same_bits(&context, "row_loss of given activations", &given.row_loss, &part.row_loss);
                }
            }
        }
    }
}

/// A model that has run, and whose buffers are larger than needed, gives the bits of a new one made to measure.
fn a_plan_may_be_larger_than_the_batch<B: HostBackend>(under: &Under<B>) {
    for (d, h) in under.cases([(9, 20), (20, 9)], [(9, 20)]) {
        let large = problem::<B>([50, d, h], Activation::Relu);
        for block_rows in under.cases([None, Some(8)], [None, Some(25)]) {
            let plan = Plan { block_rows, ..Plan::default() };
            let mut model = large.model(under, &plan).unwrap();
            for n in under.cases([50, 20, 7, 2, 50, 15], [50, 20, 50]) {
                let small = Problem {
                    shape: Shape { rows: n, inputs: d, latents: h },
                    x: large.x[..n * d].to_vec(),
                    ..large.clone()
                };
                let mut buffers = Buffers::new(&small, Place::STRIDED);
                model.step(buffers.step(0..n, true)).unwrap();
                let found = buffers.outcome(&under.name, model.losses().unwrap());
                let expected = small.step(under, &plan).unwrap();
                let context = format!("{}: {n} rows in a plan of 50, {block_rows:?}", under.name);
                assert_same_outcome(&context, &found, &expected);
            }
        }
    }
}

/// NaN, infinite or finite.
fn class(value: f64) -> i8 {
    match value {
        v if v.is_nan() => 2,
        f64::INFINITY => 1,
        f64::NEG_INFINITY => -1,
        _ => 0,
    }
}

fn assert_same_class(context: &str, what: &str, found: &[f64], truth: &[f64]) {
    assert_eq!(found.len(), truth.len(), "{context}: length of {what}");
    for (at, (f, t)) in found.iter().zip(truth).enumerate() {
        assert_eq!(class(*f), class(*t), "{context}: {what}[{at}] is {f}, the reference has {t}");
    }
}

const NOT_FINITE: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

fn encode_propagates_what_is_not_finite<B: HostBackend>(under: &Under<B>) {
    let shapes = [(1, 1, 1), (5, 3, 7), (19, 33, 35), (37, 18, 66)];
    // All of them are one tile of the emulated kernels.
    for (n, d, h) in under.cases(shapes, [shapes[3]]) {
        for activation in [Activation::Relu, Activation::Identity, Activation::Softplus] {
            let problem = problem::<B>([n, d, h], activation);
            let mut rng = rng(n as u64);
            for value in NOT_FINITE {
                for operand in 0..3 {
                    for spread in 0..4 {
                        let mut case = Encode {
                            n,
                            d,
                            h,
                            x: problem.x.clone(),
                            weight: problem.weight.clone(),
                            bias: problem.bias.clone(),
                            activation,
                            shift: None,
                            before: None,
                            wanted: [true; 3],
                        };
                        let [x, weight, bias] = [&mut case.x, &mut case.weight, &mut case.bias];
                        let target = [x, weight, bias].into_iter().nth(operand).unwrap();
                        // The last, the first, or some.
                        let len = target.len();
                        for _ in 0..spread.max(1) {
                            let at = [len - 1, 0][..].get(spread).copied().unwrap_or_else(|| rng.random_range(0..len));
                            target[at] = value;
                        }
                        let context = format!(
                            "{}: {value} in {} of {n}×{d}×{h} {activation:?}",
                            under.name,
                            ["x", "weight", "bias"][operand]
                        );
                        let (found, truth) = (case.run(under, Place::STRIDED), case.run(&reference(), Place::DENSE));
                        assert_same_class(&context, "activations", &found.activations, &truth.activations);
                        assert_same_class(&context, "row_loss", &found.row_loss, &truth.row_loss);
                        assert_same_class(&context, "row_loss_sum", &found.row_loss_sum, &truth.row_loss_sum);
                        assert_same_class(&context, "sum", &found.sum, &truth.sum);
                        assert_same_class(&context, "sum_squares", &found.sum_squares, &truth.sum_squares);
                        let (a, losses) = (&found.activations, &found.row_loss);
                        let r = ops::responsibilities(under, Place::STRIDED, (n, h), a, losses);
                        let truth = ops::responsibilities(&reference(), Place::DENSE, (n, h), a, losses);
                        assert_same_class(&context, "responsibilities", &r, &truth);
                    }
                }
            }
        }
    }
}

/// Every other operation, with one value that is not finite in each operand in turn.
fn operations_propagate_what_is_not_finite<B: HostBackend>(under: &Under<B>) {
    let (reference, place) = (reference(), Place::STRIDED);
    for (n, d, h) in under.cases([(2, 1, 1), (5, 3, 7), (19, 35, 33), (37, 18, 66)], [(37, 18, 66)]) {
        let problem = problem::<B>([n, d, h], Activation::Relu);
        let mut rng = rng(h as u64);
        // Softplus is never negative.
        let activations: Vec<f64> = uniform(&mut rng, n * h, 1.0).iter().map(|a| a.max(-0.5) + 0.5).collect();
        let activations = rounded::<B::Element>(&activations);
        let row_loss = vec![-1.0; n];
        let vector = rounded::<B::Real>(&uniform(&mut rng, h, 1.0));
        for value in NOT_FINITE {
            for tail in [false, true] {
                let spoil = |values: &[f64]| {
                    let mut values = values.to_vec();
                    let at = if tail { values.len() - 1 } else { values.len() / 2 };
                    values[at] = value;
                    values
                };
                let context = format!("{}: {value} in {n}×{d}×{h}, in the tail: {tail}", under.name);
                let same =
                    |what: &str, found: Vec<f64>, truth: Vec<f64>| assert_same_class(&context, what, &found, &truth);

                for (a, shift) in [(spoil(&activations), vector.clone()), (activations.clone(), spoil(&vector))] {
                    let run = (
                        ops::comoments(under, place, (n, h), &a, &shift, None),
                        ops::comoments(&reference, place, (n, h), &a, &shift, None),
                    );
                    same("comoments", run.0, run.1);
                }
                for (a, shift) in [(spoil(&activations), vector.clone()), (activations.clone(), spoil(&vector))] {
                    let (shift, before) = (Some(shift), None);
                    let case = ActivationSums { n, h, activations: a, shift, before, wanted: [true; 2] };
                    let (found, truth) = (case.run(under, place), case.run(&reference, place));
                    same("row_loss", found.row_loss, truth.row_loss);
                    same("row_loss_sum", found.row_loss_sum, truth.row_loss_sum);
                    same("sum", found.sum, truth.sum);
                    same("sum_squares", found.sum_squares, truth.sum_squares);
                }
                let sums = |a: &[f64], f: &dyn Fn(f64) -> f64| -> Vec<f64> {
                    (0..h).map(|j| (0..n).map(|row| f(a[row * h + j])).sum()).collect()
                };
                let a = spoil(&activations);
                let (sum, squares) = (sums(&a, &|a| a), sums(&a, &|a| a * a));
                let found = ops::recentre(under, place, (n, h), &a, &sum, &squares);
                let truth = ops::recentre(&reference, place, (n, h), &a, &sum, &squares);
                same("shift", found.0, truth.0);
                same("sum", found.1, truth.1);
                same("sum_squares", found.2, truth.2);

                for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
                    let (x, w) = (&problem.x, &problem.weight);
                    for (left, right) in [(spoil(x), w.clone()), (x.clone(), spoil(w))] {
                        let run = |at: usize| match at {
                            0 => ops::product(under, place, layout, [n, h, d], &left, &right, None),
                            _ => ops::product(&reference, place, layout, [n, h, d], &left, &right, None),
                        };
                        same("product", run(0), run(1));
                    }
                }
                let run = (
                    ops::column_sums(under, place, (n, h), &a, None),
                    ops::column_sums(&reference, place, (n, h), &a, None),
                );
                same("column_sums", run.0, run.1);

                let coupling = rounded::<B::Real>(&uniform(&mut rng, h * h, 1.0));
                let symmetric: Vec<f64> =
                    (0..h * h).map(|at| coupling[(at / h).max(at % h) * h + (at / h).min(at % h)]).collect();
                for operand in 0..5 {
                    for correlation in 0..3 {
                        let given =
                            |this: usize, values: &[f64]| if operand == this { spoil(values) } else { values.to_vec() };
                        let correlation = match correlation {
                            0 => Correlation::None,
                            1 => Correlation::Dual { product: given(4, &activations) },
                            _ => Correlation::Primal { coupling: symmetric.clone(), offset: given(4, &vector) },
                        };
                        let case = Backward {
                            n,
                            h,
                            activations: given(0, &activations),
                            activation: [Activation::Relu, Activation::Identity, Activation::Softplus][operand % 3],
                            row_loss: given(1, &row_loss),
                            row_weight: 1.0,
                            statistics: Some(StatisticsPart {
                                mean: given(2, &vector),
                                scale: given(3, &vector),
                                correlation,
                            }),
                            before: None,
                        };
                        let (found, truth) = (case.run(under, place), case.run(&reference, place));
                        same(&format!("dz, operand {operand}, {:?}", case.activation), found.0, truth.0);
                        same(&format!("grad_bias, operand {operand}"), found.1, truth.1);
                    }
                }

                let decode = |a: Vec<f64>, x: Vec<f64>| Decode {
                    n,
                    d,
                    h,
                    activations: a,
                    weight: problem.weight.clone(),
                    bias: vec![0.5; d],
                    x,
                    residual_weight: 1.0,
                    before: None,
                    wanted: [true, true],
                };
                for case in
                    [decode(spoil(&activations), problem.x.clone()), decode(activations.clone(), spoil(&problem.x))]
                {
                    let (found, truth) = (case.run(under, place), case.run(&reference, place));
                    same("reconstruction", found.reconstruction, truth.reconstruction);
                    same("residual", found.residual, truth.residual);
                    same("squared_error", found.squared_error, truth.squared_error);
                }
                for (residual, a) in
                    [(spoil(&problem.x), activations.clone()), (problem.x.clone(), spoil(&activations))]
                {
                    let weight = problem.weight.clone();
                    let activation = Activation::Relu;
                    let case =
                        DecodeBackward { n, d, h, residual, weight, activations: a, activation, l1: 0.5, before: None };
                    let (found, truth) = (case.run(under, place), case.run(&reference, place));
                    same("dz of decode_backward", found.0, truth.0);
                    same("grad_bias of decode_backward", found.1, truth.1);
                }

                if value.is_nan() {
                    nan_in_statistics(under, &context, n, h, &activations, &spoil);
                    for (form, normalize) in
                        [(Form::Primal, true), (Form::Dual, true), (Form::Primal, false), (Form::Dual, false)]
                    {
                        let weight = spoil(&problem.weight);
                        let case =
                            Redundancy { h, d, weight, normalize, form, lambda: 1.0, before: Some(vec![0.0; h * d]) };
                        let (loss, ..) = case.run(under, place);
                        assert!(loss.is_nan(), "{context}: L_wr is {loss} {form:?}");
                    }
                }
            }
        }
    }
}

fn nan_in_statistics<B: HostBackend>(
    under: &Under<B>,
    context: &str,
    n: usize,
    h: usize,
    activations: &[f64],
    spoil: &dyn Fn(&[f64]) -> Vec<f64>,
) {
    let reference = reference();
    let (ones, tens) = (vec![0.5; h], vec![10.0; h]);
    let comoments: Vec<f64> = (0..h * h).map(|at| if at / h == at % h { 10.0 } else { 1.0 }).collect();
    for operand in 0..4 {
        let given = |this: usize, values: &[f64]| if operand == this { spoil(values) } else { values.to_vec() };
        for primal in [false, true] {
            let case = Finish {
                h,
                count: 20,
                objective: ALL_TERMS,
                shift: given(0, &ones),
                sum: given(1, &ones),
                sum_squares: given(2, &tens),
                covariance: if primal { Covariance::Comoments(given(3, &comoments)) } else { Covariance::None },
            };
            let (found, truth) = (case.run(under, Place::DENSE), case.run(&reference, Place::DENSE));
            let context = format!("{context}, operand {operand}, primal {primal}");
            assert_same_class(&context, "mean", &found.mean, &truth.mean);
            assert_same_class(&context, "variance", &found.variance, &truth.variance);
            assert_same_class(&context, "scale", &found.scale, &truth.scale);
            assert_same_class(&context, "losses", &found.losses, &truth.losses);
            assert_same_class(&context, "coupling", &found.coupling, &truth.coupling);
        }
    }
    for operand in 0..3 {
        let given = |this: usize, values: &[f64]| if operand == this { spoil(values) } else { values.to_vec() };
        let (activations, mean, variance) = (given(0, activations), given(1, &ones), given(2, &tens));
        let case = Dual { n, h, activations, mean, variance, lambda_tc: 1.0, scale: ones.clone() };
        let (found, truth) = (case.run(under, Place::DENSE), case.run(&reference, Place::DENSE));
        let context = format!("{context}, dual, operand {operand}");
        assert_same_class(&context, "gram", &found.gram, &truth.gram);
        assert_same_class(&context, "product", &found.product, &truth.product);
        assert_same_class(&context, "scale", &found.scale, &truth.scale);
        assert_same_class(&context, "loss", &found.loss, &truth.loss);
    }
}

fn a_step_propagates_nan<B: HostBackend>(under: &Under<B>) {
    for shape in [[9, 4, 5], [6, 4, 20]] {
        let mut problem = problem::<B>(shape, Activation::Relu);
        // In the last row alone, for a micro-batch to hold it.
        *problem.x.last_mut().unwrap() = f64::NAN;
        for plan in Plan::all(under, problem.shape) {
            let found = problem.step(under, &plan).unwrap();
            let context = format!("{}: NaN in x of {shape:?} {plan:?}", under.name);
            let Losses { lse, var, tc, wr, total } = found.losses;
            assert!(lse.is_nan() && var.is_nan() && tc.is_nan() && total.is_nan(), "{context}: {:?}", found.losses);
            assert!(wr.is_finite(), "{context}: the weight term knows nothing of x");
            assert!(found.grad_bias.iter().all(|g| g.is_nan()), "{context}: grad_bias {:?}", found.grad_bias);
            assert!(found.grad_weight.iter().all(|g| g.is_nan()), "{context}: grad_weight {:?}", found.grad_weight);
        }
    }
}

/// All units of a row far from 0, on either side: exp(−a) underflows, or overflows, without the row's shift.
fn row_loss_far_from_zero<B: HostBackend>(under: &Under<B>) {
    for (n, d, h) in [(3, 2, 1), (17, 5, 33), (8, 3, 300)] {
        for (offset, activation) in [
            (300.0, Activation::Relu),
            (3000.0, Activation::Relu),
            (80.0, Activation::Softplus),
            (300.0, Activation::Identity),
            (-300.0, Activation::Identity),
            (-300.0, Activation::Softplus),
        ] {
            let mut problem = problem::<B>([n, d, h], activation);
            problem.bias = vec![offset; h];
            let Problem { x, weight, bias, .. } = problem;
            let case = Encode { n, d, h, x, weight, bias, activation, shift: None, before: None, wanted: [true; 3] };
            let found = case.run(under, Place::DENSE);
            let context = format!("{}: {activation:?} near {offset} {n}×{d}×{h}", under.name);
            let truth: Vec<f64> = found.activations.chunks(h).map(step::row_loss).collect();
            assert_within(&context, "row_loss", &found.row_loss, &truth, |row| {
                common::ROW_LOSS_BAR * under.real() * (truth[row].abs() + 1.0)
            });
            let r = ops::responsibilities(under, Place::DENSE, (n, h), &found.activations, &found.row_loss);
            for row in r.chunks(h) {
                let sum: f64 = row.iter().sum();
                assert!((sum - 1.0).abs() < 8.0 * under.real() * (offset.abs() + 8.0), "{context}: Σr = {sum}");
            }
        }
    }
}

/// Columns whose mean is 100 and 10 000 deviations from 0.
fn variance_far_from_zero<B: HostBackend>(under: &Under<B>) {
    for (n, d, h) in under.cases([(50, 6, 9), (700, 4, 33)], [(50, 6, 9)]) {
        for ratio in [1.0, 100.0, 1e4] {
            let mut problem = problem::<B>([n, d, h], Activation::Relu);
            problem.bias = vec![ratio; h];
            for block_rows in under.cases([None, Some(9)], [Some(25)]) {
                let plan = Plan { block_rows, ..Plan::default() };
                let context = format!("{}: {n}×{d}×{h}, mean/deviation {ratio}, {block_rows:?}", under.name);
                let mut statistics = Statistics::new(h, true);
                let buffers = Buffers::<B>::new(&problem, Place::DENSE);
                let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
                problem.model(under, &plan).unwrap().statistics(x, weight, bias, &mut statistics).unwrap();
                let activations = problem.step(under, &plan).unwrap().activations;
                let truth = step::finish(&activations, n, h, Objective::default());
                let variance: Vec<f64> = (0..h).map(|j| statistics.variance(j)).collect();
                assert_within(&context, "variance", &variance, &truth.variance, |j| {
                    // Blocks about the first block's mean.
                    let merging = if block_rows.is_some() { 2.0 } else { 1.0 };
                    merging * common::VARIANCE_BAR * under.real() * truth.variance[j]
                });
            }
        }
    }
}

fn dead_and_constant_columns<B: HostBackend>(under: &Under<B>) {
    for shape in under.cases([[20, 5, 9], [9, 5, 40], [300, 5, 9]], [[20, 5, 9], [9, 5, 40]]) {
        let mut problem = problem::<B>(shape, Activation::Relu);
        let [n, d, h] = shape;
        // Dead, constant, constant and large, dead for all rows but one.
        for (j, bias) in [(0, -1.0), (1, 3.3), (2, 3e4)] {
            problem.weight[j * d..(j + 1) * d].fill(0.0);
            problem.bias[j] = rounded::<B::Real>(&[bias])[0];
        }
        problem.objective.lambda_wr = 1.0;
        for plan in Plan::all(under, problem.shape) {
            let context = format!("{}: dead columns {shape:?} {plan:?}", under.name);
            let found = problem.step(under, &plan).unwrap();
            for (name, gradient) in found.gradients() {
                assert!(gradient.iter().all(|g| g.is_finite()), "{context}: {name} {gradient:?}");
            }
            assert!(found.terms().iter().all(|t| t.1.is_finite()), "{context}: {:?}", found.losses);
            // The dead unit gets nothing; correlations of both are 0, so the others' gradients are as the reference has them.
            assert_eq!(found.grad_bias[0], 0.0, "{context}: gradient of a dead unit");
            let truth = problem.given_activations(&found.activations);
            let error = common::relative(&found.grad_bias[3..], &truth.grad_bias[3..]);
            assert!(error <= 1e-4 + 4.0 * B::Element::UNIT_ROUNDOFF * 8.0, "{context}: grad_bias is off by {error:e}");
            let term = (found.losses.tc - truth.losses.tc).abs();
            assert!(term <= 1e-5 * (1.0 + truth.losses.tc) * h as f64, "{context}: L_tc {term:e} off, N = {n}");
        }
    }
}
