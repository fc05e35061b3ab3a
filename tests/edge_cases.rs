//! Degenerate sizes and wrong arguments: what is allowed works, what is not is a typed error that names the argument, and after an
//! error every output is as it was.

#[macro_use]
mod common;

use common::step::Buffers;
use common::{Guarded, HostBackend, Outcome, Place, Plan, Problem, Under, reference, rng, uniform};
use sae_kernels::operations::*;
use sae_kernels::{
    Activation, DecoderFree, Error, Form, MatMut, MatRef, Objective, Reduction, Shape, StandardConfig,
    StandardGradients, StandardParameters, StandardSae, Statistics,
};

on_every_backend!(
    no_rows,
    one_row,
    too_few_rows,
    too_few_rows_over_all_shards,
    no_latents,
    no_inputs,
    empty_shards_add_nothing,
    a_rank_without_rows,
    a_plan_for_more_rows_is_needed,
    dual_needs_one_block,
    statistics_of_another_kind,
    configuration,
    overflow,
    wrong_arguments_of_a_step,
    wrong_arguments_of_statistics,
    wrong_arguments_of_the_standard_model,
    wrong_arguments_of_encode,
    wrong_arguments_of_statistics_operations,
    wrong_arguments_of_products,
    wrong_arguments_of_the_decoder,
    wrong_arguments_of_optimizers,
    too_small_a_workspace,
);

const LSE_ALONE: Objective = Objective {
    lambda_lse: 1.0,
    lambda_var: 0.0,
    lambda_tc: 0.0,
    lambda_wr: 0.0,
    variance_eps: 1e-6,
    reduction: Reduction::Sum,
    normalize_weight: true,
};

fn problem([rows, inputs, latents]: [usize; 3], objective: Objective) -> Problem {
    let mut rng = rng((rows + inputs + latents) as u64);
    Problem {
        shape: Shape { rows, inputs, latents },
        x: uniform(&mut rng, rows * inputs, 1.0),
        weight: uniform(&mut rng, latents * inputs, 1.0),
        bias: uniform(&mut rng, latents, 1.0),
        objective,
        activation: Activation::Relu,
    }
}

fn objectives_with_statistics() -> [Objective; 3] {
    let only = |lambda_var, lambda_tc| Objective { lambda_var, lambda_tc, ..LSE_ALONE };
    [only(1.0, 0.0), only(0.0, 1.0), only(1.0, 1.0)]
}

fn zeros(values: &[f64]) -> bool {
    values.iter().all(|v| *v == 0.0)
}

fn no_rows<B: HostBackend>(under: &Under<B>) {
    for reduction in [Reduction::Sum, Reduction::Mean] {
        for lambda_wr in [0.0, 1.0] {
            let problem = problem([0, 3, 4], Objective { reduction, lambda_wr, ..LSE_ALONE });
            let found = problem.step(under, &Plan::default()).unwrap();
            assert_eq!(found.losses.lse, 0.0, "{}", under.name);
            assert!(zeros(&found.grad_bias), "{}: {:?}", under.name, found.grad_bias);
            assert_eq!(zeros(&found.grad_weight), lambda_wr == 0.0, "{}: {:?}", under.name, found.grad_weight);
            assert!(found.activations.is_empty() && found.grad_x.is_empty());
        }
    }
}

fn one_row<B: HostBackend>(under: &Under<B>) {
    for reduction in [Reduction::Sum, Reduction::Mean] {
        let problem = problem([1, 3, 4], Objective { reduction, ..LSE_ALONE }).rounded_for::<B>();
        let found = problem.step(under, &Plan::default()).unwrap();
        let truth = problem.given_activations(&found.activations);
        common::assert_within(&under.name, "grad_bias", &found.grad_bias, &truth.grad_bias, |j| {
            4.0 * under.storage(truth.grad_bias[j]) + 16.0 * under.real()
        });
        assert!((found.losses.total - truth.losses.total).abs() <= 8.0 * under.real());
    }
}

fn too_few_rows<B: HostBackend>(under: &Under<B>) {
    for objective in objectives_with_statistics() {
        for rows in [0, 1] {
            for form in [Form::Primal, Form::Dual, Form::Auto] {
                let problem = problem([rows, 3, 4], objective);
                let plan = Plan { correlation_form: form, ..Plan::default() };
                let mut buffers = Buffers::<B>::new(&problem, Place::STRIDED);
                let mut model = problem.model(under, &plan).unwrap();
                let expected = Err(Error::TooFewRows { rows: rows as u64 });
                assert_eq!(model.step(buffers.step(0..rows, true)), expected, "{}: {form:?}", under.name);
                assert_untouched(&under.name, &buffers);
                let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
                let outputs = (Some(buffers.activations.mat_mut()), Some(buffers.row_loss.slice_mut()));
                assert_eq!(model.forward(x, weight, bias, outputs.0, outputs.1), expected, "{}", under.name);
                assert_untouched(&under.name, &buffers);
            }
        }
        // Two are enough.
        problem([2, 3, 4], objective).step(under, &Plan::default()).unwrap();
    }
}

fn too_few_rows_over_all_shards<B: HostBackend>(under: &Under<B>) {
    for objective in objectives_with_statistics() {
        for rows in [0, 1] {
            let problem = problem([rows, 3, 4], objective);
            let mut statistics = Statistics::new(4, objective.lambda_tc != 0.0);
            let mut buffers = Buffers::<B>::new(&problem, Place::DENSE);
            let mut model = problem.model(under, &Plan::default()).unwrap();
            let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
            model.statistics(x, weight, bias, &mut statistics).unwrap();
            assert_eq!(statistics.count(), rows as u64);
            let found = model.backward(buffers.step(0..rows, true), &statistics, true);
            assert_eq!(found, Err(Error::TooFewRows { rows: rows as u64 }), "{}", under.name);
            assert_untouched(&under.name, &buffers);
        }
    }
}

fn assert_untouched<B: HostBackend>(context: &str, buffers: &Buffers<B>) {
    buffers.grad_weight.assert_poisoned(context, "grad_weight");
    buffers.grad_bias.assert_poisoned(context, "grad_bias");
    buffers.grad_x.assert_poisoned(context, "grad_x");
    buffers.activations.assert_poisoned(context, "activations");
    buffers.row_loss.assert_poisoned(context, "row_loss");
}

fn no_latents<B: HostBackend>(under: &Under<B>) {
    let problem = problem([3, 2, 0], LSE_ALONE);
    assert_eq!(problem.model(under, &Plan::default()).err(), Some(Error::NoLatents), "{}", under.name);
    let standard = StandardSae::new(under.fresh(), StandardConfig { shape: problem.shape, lambda_l1: 0.0 });
    assert_eq!(standard.err(), Some(Error::NoLatents), "{}", under.name);
    let buffers = Buffers::<B>::new(&problem, Place::DENSE);
    let encode = under.backend.encode(Encode {
        x: buffers.x.mat(),
        weight: buffers.weight.mat(),
        bias: buffers.bias.slice(),
        activation: Activation::Relu,
        activations: None,
        row_loss: None,
        moments: None,
        workspace: &mut [],
    });
    assert_eq!(encode, Err(Error::NoLatents), "{}", under.name);
}

/// D = 0: z = b, the same for every row, so every column is constant and only the log-sum-exp has a gradient.
fn no_inputs<B: HostBackend>(under: &Under<B>) {
    for objective in [LSE_ALONE, Objective::default(), Objective { lambda_wr: 1.0, ..Objective::default() }] {
        let problem = problem([5, 0, 4], objective).rounded_for::<B>();
        for plan in Plan::all(under, problem.shape) {
            let context = format!("{}: D = 0 {plan:?}", under.name);
            let found = problem.step(under, &plan).unwrap();
            assert!(found.grad_weight.is_empty() && found.grad_x.is_empty());
            for (at, a) in found.activations.iter().enumerate() {
                let z = problem.bias[at % 4].max(0.0);
                assert!((a - z).abs() <= under.storage(z), "{context}: a = {a}, b = {z}");
            }
            let truth = problem.given_activations(&found.activations);
            common::assert_within(&context, "grad_bias", &found.grad_bias, &truth.grad_bias, |j| {
                8.0 * under.storage(truth.grad_bias[j]) + 64.0 * under.real()
            });
            assert_eq!(found.losses.tc, 0.0, "{context}: constant columns do not correlate");
            // Every row of W is zero: Ŵ = 0, and ‖0 − I‖² = H.
            assert_eq!(found.losses.wr, if objective.lambda_wr == 0.0 { 0.0 } else { 4.0 }, "{context}");
        }
    }
}

fn empty_shards_add_nothing<B: HostBackend>(under: &Under<B>) {
    let problem = problem([6, 3, 4], Objective::default()).rounded_for::<B>();
    let plan = Plan::default();
    let (whole, _) = problem.sharded(under, &plan, &[0..3, 3..6]).unwrap();
    for shards in [vec![0..0, 0..3, 3..6], vec![0..3, 3..3, 3..6, 6..6]] {
        let (found, statistics) = problem.sharded(under, &plan, &shards).unwrap();
        assert_eq!(statistics.count(), 6);
        assert_eq!(found, whole, "{}: {shards:?}", under.name);
    }
}

/// A host that never has rows makes a plan for none, and takes part.
fn a_rank_without_rows<B: HostBackend>(under: &Under<B>) {
    let whole = problem([6, 3, 4], Objective { lambda_wr: 1.0, ..Objective::default() });
    let (_, statistics) = whole.sharded(under, &Plan::default(), &common::step::shards(&[0, 6])).unwrap();
    let empty = Problem { shape: Shape { rows: 0, ..whole.shape }, x: Vec::new(), ..whole.clone() };
    let mut model = empty.model(under, &Plan::default()).unwrap();
    let mut mine = Statistics::new(4, true);
    let mut buffers = Buffers::<B>::new(&empty, Place::DENSE);
    let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
    model.statistics(x, weight, bias, &mut mine).unwrap();
    assert_eq!(mine, Statistics::new(4, true), "{}", under.name);
    buffers.grad_bias = Guarded::vector(Place::DENSE, &[1.0, 2.0, 3.0, 4.0]);
    buffers.grad_weight = Guarded::matrix(Place::DENSE, 4, 3, &[5.0; 12]);
    model.backward(buffers.step(0..0, true), &statistics, false).unwrap();
    assert_eq!(buffers.grad_bias.values(), [1.0, 2.0, 3.0, 4.0], "{}: gradients are added to", under.name);
    assert_eq!(buffers.grad_weight.values(), [5.0; 12], "{}: gradients are added to", under.name);
    let losses = model.losses().unwrap();
    let expected = whole.step(under, &Plan::default()).unwrap().losses;
    assert!(
        (losses.total - expected.total).abs() <= 1e-4 * expected.total.abs(),
        "{}: {losses:?} {expected:?}",
        under.name
    );
}

fn a_plan_for_more_rows_is_needed<B: HostBackend>(under: &Under<B>) {
    let large = problem([7, 3, 4], Objective::default());
    let small = Problem { shape: Shape { rows: 6, ..large.shape }, ..large.clone() };
    let mut buffers = Buffers::<B>::new(&large, Place::DENSE);
    let mut model = small.model(under, &Plan::default()).unwrap();
    let expected = Err(Error::TooManyRows { planned: 6, found: 7 });
    assert_eq!(model.step(buffers.step(0..7, true)), expected, "{}", under.name);
    let mut statistics = Statistics::new(4, true);
    let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
    assert_eq!(model.statistics(x, weight, bias, &mut statistics), expected, "{}", under.name);
    assert_eq!(statistics, Statistics::new(4, true), "{}", under.name);
    assert_untouched(&under.name, &buffers);
}

fn dual_needs_one_block<B: HostBackend>(under: &Under<B>) {
    let problem = problem([7, 3, 9], Objective::default());
    let plan = Plan { correlation_form: Form::Dual, block_rows: Some(4), ..Plan::default() };
    let mut buffers = Buffers::<B>::new(&problem, Place::DENSE);
    let mut model = problem.model(under, &plan).unwrap();
    let expected = Err(Error::DualNeedsOneBlock { rows: 7, block_rows: 4 });
    assert_eq!(model.step(buffers.step(0..7, true)), expected, "{}", under.name);
    assert_untouched(&under.name, &buffers);
    // A batch of one block will do, and so does no correlation term.
    model.step(buffers.step(0..4, true)).unwrap();
    let variance = Problem { objective: objectives_with_statistics()[0], ..problem };
    variance.step(under, &plan).unwrap();
}

fn statistics_of_another_kind<B: HostBackend>(under: &Under<B>) {
    let problem = problem([5, 3, 4], Objective::default());
    let mut model = problem.model(under, &Plan::default()).unwrap();
    for (latents, full) in [(3, true), (5, true), (4, false)] {
        let mut statistics = Statistics::new(latents, full);
        statistics.add_row(0.0, &vec![1.0; latents]);
        let before = statistics.clone();
        let mut buffers = Buffers::<B>::new(&problem, Place::DENSE);
        let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
        let found = model.statistics(x, weight, bias, &mut statistics);
        assert!(matches!(found, Err(Error::Statistics { .. })), "{}: {found:?}", under.name);
        assert_eq!(statistics, before, "{}", under.name);
        let found = model.backward(buffers.step(0..5, true), &statistics, true);
        assert!(matches!(found, Err(Error::Statistics { .. })), "{}: {found:?}", under.name);
        assert_untouched(&under.name, &buffers);
        let message = Statistics::new(4, true).merge(&statistics).unwrap_err().to_string();
        assert!(message.contains(&latents.to_string()), "{message}");
    }
    // Where squares alone are needed, comoments would not be summed.
    let variance = Problem { objective: objectives_with_statistics()[0], ..problem };
    let buffers = Buffers::<B>::new(&variance, Place::DENSE);
    let mut statistics = Statistics::new(4, false);
    let mut model = variance.model(under, &Plan::default()).unwrap();
    model.statistics(buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice(), &mut statistics).unwrap();
    assert_eq!(statistics.count(), 5);
    let mut full = Statistics::new(4, true);
    let found = model.statistics(buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice(), &mut full);
    assert!(matches!(found, Err(Error::Statistics { .. })), "{}: {found:?}", under.name);
    assert_eq!(full, Statistics::new(4, true), "{}", under.name);
}

fn configuration<B: HostBackend>(under: &Under<B>) {
    let refused = |name: &str, objective: Objective| {
        let found = problem([4, 3, 2], objective).model(under, &Plan::default()).err();
        assert!(
            matches!(&found, Some(Error::Configuration { name: n, .. }) if *n == name),
            "{}: {name}: {found:?}",
            under.name
        );
    };
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        refused("lambda_lse", Objective { lambda_lse: bad, ..Objective::default() });
        refused("lambda_var", Objective { lambda_var: bad, ..Objective::default() });
        refused("lambda_tc", Objective { lambda_tc: bad, ..Objective::default() });
        refused("lambda_wr", Objective { lambda_wr: bad, ..Objective::default() });
        refused("variance_eps", Objective { variance_eps: bad, ..Objective::default() });
        let shape = Shape { rows: 4, inputs: 3, latents: 2 };
        let found = StandardSae::new(under.fresh(), StandardConfig { shape, lambda_l1: bad }).err();
        assert!(matches!(found, Some(Error::Configuration { name: "lambda_l1", .. })), "{}: {found:?}", under.name);
    }
    refused("variance_eps", Objective { variance_eps: 0.0, ..Objective::default() });
    refused("variance_eps", Objective { variance_eps: -1e-6, ..Objective::default() });
    let plan = Plan { block_rows: Some(0), ..Plan::default() };
    let found = problem([4, 3, 2], LSE_ALONE).model(under, &plan).err();
    assert!(matches!(found, Some(Error::Configuration { name: "block_rows", .. })), "{}: {found:?}", under.name);
    problem([0, 3, 2], LSE_ALONE).model(under, &plan).unwrap();
    // A negative weight is unusual, not wrong.
    problem([4, 3, 2], Objective { lambda_var: -1.0, ..Objective::default() }).step(under, &Plan::default()).unwrap();
}

/// Extents whose products do not fit, in elements or in bytes.
fn overflow<B: HostBackend>(under: &Under<B>) {
    let half = 1 << (usize::BITS / 2);
    for (rows, inputs, latents, objective) in [
        (half, 1, half, LSE_ALONE),
        (usize::MAX, 1, 2, LSE_ALONE),
        (half, 1, half / 4, LSE_ALONE),
        (2, 1, half, Objective { lambda_var: 0.0, ..Objective::default() }),
        (usize::MAX / 2, 1, 1, LSE_ALONE),
    ] {
        let plan = Plan { correlation_form: Form::Primal, ..Plan::default() };
        let shape = Shape { rows, inputs, latents };
        let config = Problem { shape, objective, ..problem([1, 1, 1], objective) }.config(&plan);
        let found = DecoderFree::new(under.fresh(), config).err();
        assert!(matches!(found, Some(Error::Overflow { .. })), "{}: {shape:?}: {found:?}", under.name);
        if objective == LSE_ALONE {
            let found = StandardSae::new(under.fresh(), StandardConfig { shape, lambda_l1: 0.0 }).err();
            assert!(matches!(found, Some(Error::Overflow { .. })), "{}: standard {shape:?}: {found:?}", under.name);
        }
    }
    let found = MatRef::<f32>::with_stride(&[0.0; 4], usize::MAX, 1, 2).err();
    assert!(matches!(found, Some(Error::Overflow { .. })), "{found:?}");
}

#[test]
fn views() {
    let mut data = [0f32; 11];
    // Two rows of 4, 7 apart, end at the last element.
    assert!(MatRef::<f32>::with_stride(&data[..], 2, 4, 7).is_ok());
    let short = Err(Error::ViewTooShort { rows: 2, cols: 4, row_stride: 7, needed: 11, found: 10 });
    assert_eq!(MatRef::<f32>::with_stride(&data[..10], 2, 4, 7).map(|_| ()), short);
    assert_eq!(MatMut::<f32>::with_stride(&mut data[..10], 2, 4, 7).map(|_| ()), short);
    let stride = Err(Error::Stride { row_stride: 3, cols: 4 });
    assert_eq!(MatRef::<f32>::with_stride(&data[..], 2, 4, 3).map(|_| ()), stride);
    assert_eq!(MatMut::<f32>::with_stride(&mut data[..], 2, 4, 3).map(|_| ()), stride);
    // Nothing needs nothing.
    for (rows, cols, row_stride) in [(0, 4, 4), (4, 0, 0), (usize::MAX, 0, 3), (0, usize::MAX, usize::MAX)] {
        let view = MatRef::<f32>::with_stride(&[], rows, cols, row_stride).unwrap();
        assert_eq!((view.rows(), view.cols(), view.row_stride()), (rows, cols, row_stride));
    }
    let numbers: Vec<f32> = (0..11).map(|i| i as f32).collect();
    let view = MatRef::<f32>::with_stride(&numbers[..], 2, 4, 7).unwrap();
    assert_eq!(view.row(1), [7.0, 8.0, 9.0, 10.0]);
    assert_eq!(view.rows_range(1..2).row(0), view.row(1));
    assert_eq!(view.rows_range(1..1).rows(), 0);
    assert_eq!(view.rows_range(2..2).rows(), 0);
}

/// Runs a step in which the named argument has one row, column or element too many, and expects that name in the error.
fn wrong_arguments_of_a_step<B: HostBackend>(under: &Under<B>) {
    let names = [
        "x",
        "weight",
        "weight rows",
        "bias",
        "grad_weight",
        "grad_weight rows",
        "grad_bias",
        "grad_x",
        "activations",
        "row_loss",
    ];
    for name in names {
        let objective = Objective { lambda_wr: 1.0, ..Objective::default() };
        let [n, d, h] = [5, 3, 4];
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let mut model = problem([n, d, h], objective).model(under, &Plan::default()).unwrap();
        let x = Guarded::<B::Element>::matrix(Place::DENSE, n, size("x", d), &vec![1.0; n * size("x", d)]);
        let (rows, cols) = (size("weight rows", h), size("weight", d));
        let weight = Guarded::<B::Element>::matrix(Place::DENSE, rows, cols, &vec![1.0; rows * cols]);
        let bias = Guarded::<B::Real>::vector(Place::DENSE, &vec![1.0; size("bias", h)]);
        let mut statistics = Statistics::new(h, true);
        for row in 0..5 {
            statistics.add_row(0.0, &vec![f64::from(row); h]);
        }
        for phase in 0..3 {
            let mut grad_weight =
                Guarded::<B::Real>::poisoned(Place::DENSE, size("grad_weight rows", h), size("grad_weight", d));
            let mut grad_bias = Guarded::<B::Real>::vector_or_poison(Place::DENSE, size("grad_bias", h), None);
            let mut grad_x = Guarded::<B::Real>::poisoned(Place::DENSE, n, size("grad_x", d));
            let mut activations = Guarded::<B::Element>::poisoned(Place::DENSE, n, size("activations", h));
            let mut row_loss = Guarded::<B::Real>::vector_or_poison(Place::DENSE, size("row_loss", n), None);
            let is_gradient = name.starts_with("grad");
            let result = if phase == 2 {
                if is_gradient {
                    continue;
                }
                let outputs = (Some(activations.mat_mut()), Some(row_loss.slice_mut()));
                model.forward(x.mat(), weight.mat(), bias.slice(), outputs.0, outputs.1)
            } else {
                let step = sae_kernels::DecoderFreeStep {
                    x: x.mat(),
                    weight: weight.mat(),
                    bias: bias.slice(),
                    grad_weight: grad_weight.mat_mut(),
                    grad_bias: grad_bias.slice_mut(),
                    grad_x: Some(grad_x.mat_mut()),
                    activations: Some(activations.mat_mut()),
                    row_loss: Some(row_loss.slice_mut()),
                };
                if phase == 0 { model.step(step) } else { model.backward(step, &statistics, true) }
            };
            let context = format!("{}: {name}, phase {phase}", under.name);
            assert_names(&context, name, result);
            grad_weight.assert_poisoned(&context, "grad_weight");
            grad_bias.assert_poisoned(&context, "grad_bias");
            grad_x.assert_poisoned(&context, "grad_x");
            activations.assert_poisoned(&context, "activations");
            row_loss.assert_poisoned(&context, "row_loss");
        }
    }
}

/// The error is one of shape or length and names the argument, of which `name` is the first word.
fn assert_names(context: &str, name: &str, result: sae_kernels::Result<()>) {
    let name = name.split(' ').next().unwrap();
    let operand = match &result {
        Err(Error::Shape { operand, .. } | Error::Length { operand, .. }) => *operand,
        other => panic!("{context}: {other:?}"),
    };
    let last = operand.rsplit('.').next().unwrap();
    assert!(operand == name || last == name, "{context}: {result:?}");
    let message = result.unwrap_err().to_string();
    assert!(message.contains(name), "{context}: {message}");
}

fn wrong_arguments_of_statistics<B: HostBackend>(under: &Under<B>) {
    for name in ["x", "weight", "weight rows", "bias"] {
        let [n, d, h] = [5, 3, 4];
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let mut model = problem([n, d, h], Objective::default()).model(under, &Plan::default()).unwrap();
        let x = Guarded::<B::Element>::matrix(Place::DENSE, n, size("x", d), &vec![1.0; n * size("x", d)]);
        let (rows, cols) = (size("weight rows", h), size("weight", d));
        let weight = Guarded::<B::Element>::matrix(Place::DENSE, rows, cols, &vec![1.0; rows * cols]);
        let bias = Guarded::<B::Real>::vector(Place::DENSE, &vec![1.0; size("bias", h)]);
        let mut statistics = Statistics::new(h, true);
        let result = model.statistics(x.mat(), weight.mat(), bias.slice(), &mut statistics);
        assert_names(&format!("{}: {name}", under.name), name, result);
        assert_eq!(statistics, Statistics::new(h, true), "{}: {name}", under.name);
    }
}

fn wrong_arguments_of_the_standard_model<B: HostBackend>(under: &Under<B>) {
    let inputs =
        ["x", "encoder_weight", "encoder_bias", "decoder_weight", "decoder_bias", "activations", "reconstruction"];
    let gradients =
        ["gradients.encoder_weight", "gradients.encoder_bias", "gradients.decoder_weight", "gradients.decoder_bias"];
    for name in inputs.into_iter().chain(gradients) {
        let [n, d, h] = [5, 3, 4];
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let element =
            |rows: usize, cols: usize| Guarded::<B::Element>::matrix(Place::DENSE, rows, cols, &vec![1.0; rows * cols]);
        let real = |len: usize| Guarded::<B::Real>::vector(Place::DENSE, &vec![1.0; len]);
        let (x, encoder_weight) = (element(n, size("x", d)), element(h, size("encoder_weight", d)));
        let (encoder_bias, decoder_weight) = (real(size("encoder_bias", h)), element(h, size("decoder_weight", d)));
        let decoder_bias = real(size("decoder_bias", d));
        let poisoned = |rows: usize, cols: usize| Guarded::<B::Real>::poisoned(Place::DENSE, rows, cols);
        let mut activations = Guarded::<B::Element>::poisoned(Place::DENSE, n, size("activations", h));
        let mut reconstruction = poisoned(n, size("reconstruction", d));
        let mut outputs = [
            poisoned(h, size("gradients.encoder_weight", d)),
            poisoned(1, size("gradients.encoder_bias", h)),
            poisoned(h, size("gradients.decoder_weight", d)),
            poisoned(1, size("gradients.decoder_bias", d)),
        ];
        let shape = Shape { rows: n, inputs: d, latents: h };
        let mut model = StandardSae::new(under.fresh(), StandardConfig { shape, lambda_l1: 0.1 }).unwrap();
        let parameters = StandardParameters {
            encoder_weight: encoder_weight.mat(),
            encoder_bias: encoder_bias.slice(),
            decoder_weight: decoder_weight.mat(),
            decoder_bias: decoder_bias.slice(),
        };
        let context = format!("{}: {name}", under.name);
        let word = name.rsplit('.').next().unwrap();
        if !name.starts_with("gradients") {
            let result =
                model.forward(x.mat(), parameters, Some(activations.mat_mut()), Some(reconstruction.mat_mut()));
            assert_names(&context, word, result);
        }
        if name != "activations" && name != "reconstruction" {
            let [a, b, c, d] = &mut outputs;
            let gradients = StandardGradients {
                encoder_weight: a.mat_mut(),
                encoder_bias: b.slice_mut(),
                decoder_weight: c.mat_mut(),
                decoder_bias: d.slice_mut(),
            };
            assert_names(&context, word, model.step(x.mat(), parameters, gradients));
        }
        activations.assert_poisoned(&context, "activations");
        reconstruction.assert_poisoned(&context, "reconstruction");
        outputs.iter().for_each(|output| output.assert_poisoned(&context, "gradients"));
    }
}

/// Matrices and vectors of ones, and poisoned outputs, for the tests below.
fn ones<T: sae_kernels::Element>(rows: usize, cols: usize) -> Guarded<T> {
    Guarded::matrix(Place::DENSE, rows, cols, &vec![1.0; rows * cols])
}

fn poisoned<T: sae_kernels::Element>(rows: usize, cols: usize) -> Guarded<T> {
    Guarded::poisoned(Place::DENSE, rows, cols)
}

fn wrong_arguments_of_encode<B: HostBackend>(under: &Under<B>) {
    let [n, d, h] = [5, 3, 4];
    for name in
        ["weight", "bias", "activations", "activations rows", "row_loss", "shift", "row_loss_sum", "sum", "sum_squares"]
    {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let (x, weight) = (ones::<B::Element>(n, d), ones::<B::Element>(h, size("weight", d)));
        let (bias, shift) = (ones::<B::Real>(1, size("bias", h)), ones::<B::Real>(1, size("shift", h)));
        let mut activations = poisoned::<B::Element>(size("activations rows", n), size("activations", h));
        let mut row_loss = poisoned::<B::Real>(1, size("row_loss", n));
        let mut row_loss_sum = poisoned::<f64>(1, size("row_loss_sum", 1));
        let mut sums = [poisoned::<f64>(1, size("sum", h)), poisoned::<f64>(1, size("sum_squares", h))];
        let mut scratch = common::ops::workspace(under, n, d, h);
        let [sum, sum_squares] = &mut sums;
        let result = under.backend.encode(Encode {
            x: x.mat(),
            weight: weight.mat(),
            bias: bias.slice(),
            activation: Activation::Relu,
            activations: Some(activations.mat_mut()),
            row_loss: Some(row_loss.slice_mut()),
            moments: Some(Moments {
                shift: Some(shift.slice()),
                accumulate: false,
                row_loss_sum: row_loss_sum.slice_mut(),
                sum: sum.slice_mut(),
                sum_squares: sum_squares.slice_mut(),
            }),
            workspace: scratch.slice_mut(),
        });
        let context = format!("{}: encode, {name}", under.name);
        assert_names(&context, name, result);
        activations.assert_poisoned(&context, "activations");
        row_loss.assert_poisoned(&context, "row_loss");
        row_loss_sum.assert_poisoned(&context, "row_loss_sum");
        sums.iter().for_each(|sum| sum.assert_poisoned(&context, "sums"));
    }
    for name in ["row_loss", "shift", "row_loss_sum", "sum", "sum_squares"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let (activations, shift) = (ones::<B::Element>(n, h), ones::<B::Real>(1, size("shift", h)));
        let mut row_loss = poisoned::<B::Real>(1, size("row_loss", n));
        let mut sums = [("row_loss_sum", 1), ("sum", h), ("sum_squares", h)]
            .map(|(this, len)| poisoned::<f64>(1, size(this, len)));
        let mut scratch = common::ops::workspace(under, n, 0, h);
        let [row_loss_sum, sum, sum_squares] = &mut sums;
        let result = under.backend.activation_sums(ActivationSums {
            activations: activations.mat(),
            row_loss: Some(row_loss.slice_mut()),
            moments: Some(Moments {
                shift: Some(shift.slice()),
                accumulate: false,
                row_loss_sum: row_loss_sum.slice_mut(),
                sum: sum.slice_mut(),
                sum_squares: sum_squares.slice_mut(),
            }),
            workspace: scratch.slice_mut(),
        });
        let context = format!("{}: activation_sums, {name}", under.name);
        assert_names(&context, name, result);
        row_loss.assert_poisoned(&context, "row_loss");
        sums.iter().for_each(|sum| sum.assert_poisoned(&context, "sums"));
    }
    for name in ["row_loss", "responsibilities", "responsibilities rows"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let (activations, row_loss) = (ones::<B::Element>(n, h), ones::<B::Real>(1, size("row_loss", n)));
        let mut out = poisoned::<B::Real>(size("responsibilities rows", n), size("responsibilities", h));
        let args = Responsibilities {
            activations: activations.mat(),
            row_loss: row_loss.slice(),
            responsibilities: out.mat_mut(),
        };
        let result = under.backend.responsibilities(args);
        assert_names(&format!("{}: responsibilities, {name}", under.name), name, result);
        out.assert_poisoned(&under.name, "responsibilities");
    }
}

fn wrong_arguments_of_statistics_operations<B: HostBackend>(under: &Under<B>) {
    let [n, h] = [5, 4];
    for name in ["shift", "sum", "sum_squares"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let activations = ones::<B::Element>(n, h);
        let mut shift = poisoned::<B::Real>(1, size("shift", h));
        let (mut sum, mut sum_squares) =
            (poisoned::<f64>(1, size("sum", h)), poisoned::<f64>(1, size("sum_squares", h)));
        let result = under.backend.recentre(Recentre {
            activations: activations.mat(),
            shift: shift.slice_mut(),
            sum: sum.slice_mut(),
            sum_squares: sum_squares.slice_mut(),
        });
        assert_names(&format!("{}: recentre, {name}", under.name), name, result);
        shift.assert_poisoned(&under.name, "shift");
        sum.assert_poisoned(&under.name, "sum");
        sum_squares.assert_poisoned(&under.name, "sum_squares");
    }
    for name in ["shift", "comoments", "comoments rows"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let (activations, shift) = (ones::<B::Element>(n, h), ones::<B::Real>(1, size("shift", h)));
        let mut comoments = poisoned::<B::Real>(size("comoments rows", h), size("comoments", h));
        let mut scratch = common::ops::workspace(under, n, 0, h);
        let result = under.backend.comoments(Comoments {
            activations: activations.mat(),
            shift: shift.slice(),
            accumulate: false,
            comoments: comoments.mat_mut(),
            workspace: scratch.slice_mut(),
        });
        assert_names(&format!("{}: comoments, {name}", under.name), name, result);
        comoments.assert_poisoned(&under.name, "comoments");
    }
    for name in ["row_loss_sum", "sum", "sum_squares", "comoments", "packed_shift", "packed"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let (row_loss_sum, shift) = (ones::<f64>(1, size("row_loss_sum", 1)), ones::<B::Real>(1, h));
        let (sum, sum_squares) = (ones::<f64>(1, size("sum", h)), ones::<f64>(1, size("sum_squares", h)));
        let comoments = ones::<B::Real>(h, size("comoments", h));
        let packed_shift = ones::<B::Real>(1, size("packed_shift", h));
        let len = size("packed", Statistics::len(h, true));
        let mut packed = poisoned::<f64>(1, len);
        let result = under.backend.pack_statistics(PackStatistics {
            count: 5,
            row_loss_sum: row_loss_sum.slice(),
            shift: shift.slice(),
            sum: sum.slice(),
            sum_squares: sum_squares.slice(),
            comoments: Some(comoments.mat()),
            packed_shift: Some(packed_shift.slice()),
            accumulate: false,
            packed: packed.slice_mut(),
        });
        assert_names(&format!("{}: pack_statistics, {name}", under.name), name, result);
        packed.assert_poisoned(&under.name, "packed");
        let packed = ones::<f64>(1, len);
        let mut row_loss_sum = poisoned::<f64>(1, size("row_loss_sum", 1));
        let mut shift = poisoned::<B::Real>(1, h);
        let mut sums = ["sum", "sum_squares"].map(|this| poisoned::<f64>(1, size(this, h)));
        let mut comoments = poisoned::<B::Real>(h, size("comoments", h));
        let [sum, sum_squares] = &mut sums;
        let result = under.backend.unpack_statistics(UnpackStatistics {
            packed: packed.slice(),
            packed_shift: Some(packed_shift.slice()),
            row_loss_sum: row_loss_sum.slice_mut(),
            shift: shift.slice_mut(),
            sum: sum.slice_mut(),
            sum_squares: sum_squares.slice_mut(),
            comoments: Some(comoments.mat_mut()),
        });
        let context = format!("{}: unpack_statistics, {name}", under.name);
        assert_names(&context, name, result);
        row_loss_sum.assert_poisoned(&context, "row_loss_sum");
        shift.assert_poisoned(&context, "shift");
        sums.iter().for_each(|sum| sum.assert_poisoned(&context, "sums"));
        comoments.assert_poisoned(&context, "comoments");
    }
    for name in
        ["sum", "sum_squares", "activations", "coupling", "offset", "mean", "variance", "scale", "losses", "count"]
    {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let (shift, sum) = (ones::<B::Real>(1, h), ones::<f64>(1, size("sum", h)));
        let sum_squares = ones::<f64>(1, size("sum_squares", h));
        let activations = ones::<B::Element>(size("activations", 5), h);
        let mut coupling = poisoned::<B::Real>(h, size("coupling", h));
        let mut outputs = ["offset", "mean", "variance", "scale"].map(|this| poisoned::<B::Real>(1, size(this, h)));
        let mut losses = poisoned::<f64>(1, size("losses", 2));
        let mut scratch = common::ops::workspace(under, 0, 0, h);
        let [offset, mean, variance, scale] = &mut outputs;
        let result = under.backend.finish_statistics(FinishStatistics {
            count: if name == "count" { 1 } else { 5 },
            objective: Objective::default(),
            shift: shift.slice(),
            sum: sum.slice(),
            sum_squares: sum_squares.slice(),
            primal: Some(PrimalCorrelation {
                covariance: match name {
                    "activations" => Covariance::Activations(activations.mat()),
                    _ => Covariance::InPlace,
                },
                coupling: coupling.mat_mut(),
                offset: offset.slice_mut(),
            }),
            mean: mean.slice_mut(),
            variance: variance.slice_mut(),
            scale: scale.slice_mut(),
            losses: losses.slice_mut(),
            workspace: scratch.slice_mut(),
        });
        let context = format!("{}: finish_statistics, {name}", under.name);
        if name == "count" {
            assert_eq!(result, Err(Error::TooFewRows { rows: 1 }), "{context}");
        } else {
            assert_names(&context, name, result);
        }
        coupling.assert_poisoned(&context, "coupling");
        outputs.iter().for_each(|output| output.assert_poisoned(&context, "outputs"));
        losses.assert_poisoned(&context, "losses");
    }
    for name in ["mean", "variance", "gram", "product", "product rows", "scale", "loss", "rows"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let n = if name == "rows" { 1 } else { n };
        let (activations, mean) = (ones::<B::Element>(n, h), ones::<B::Real>(1, size("mean", h)));
        let variance = ones::<B::Real>(1, size("variance", h));
        let mut gram = poisoned::<B::Real>(n, size("gram", n));
        let mut product = poisoned::<B::Element>(size("product rows", n), size("product", h));
        let (mut scale, mut loss) = (poisoned::<B::Real>(1, size("scale", h)), poisoned::<f64>(1, size("loss", 1)));
        let mut scratch = common::ops::workspace(under, n, 0, h);
        let result = under.backend.correlation_dual(CorrelationDual {
            activations: activations.mat(),
            mean: mean.slice(),
            variance: variance.slice(),
            lambda_tc: 1.0,
            gram: gram.mat_mut(),
            product: product.mat_mut(),
            scale: scale.slice_mut(),
            loss: loss.slice_mut(),
            workspace: scratch.slice_mut(),
        });
        let context = format!("{}: correlation_dual, {name}", under.name);
        if name == "rows" {
            assert_eq!(result, Err(Error::TooFewRows { rows: 1 }), "{context}");
        } else {
            assert_names(&context, name, result);
        }
        gram.assert_poisoned(&context, "gram");
        product.assert_poisoned(&context, "product");
        scale.assert_poisoned(&context, "scale");
        loss.assert_poisoned(&context, "loss");
    }
    for name in ["row_loss", "mean", "scale", "coupling", "offset", "dz", "dz rows", "grad_bias"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let (activations, row_loss) = (ones::<B::Element>(n, h), ones::<B::Real>(1, size("row_loss", n)));
        let [mean, scale, offset] = ["mean", "scale", "offset"].map(|this| ones::<B::Real>(1, size(this, h)));
        let coupling = ones::<B::Real>(h, size("coupling", h));
        let mut dz = poisoned::<B::Element>(size("dz rows", n), size("dz", h));
        let mut grad_bias = poisoned::<B::Real>(1, size("grad_bias", h));
        let mut scratch = common::ops::workspace(under, n, 0, h);
        let result = under.backend.backward_dz(BackwardDz {
            activations: activations.mat(),
            activation: Activation::Relu,
            row_loss: row_loss.slice(),
            row_weight: 1.0,
            statistics: Some(StatisticsTerm {
                mean: mean.slice(),
                scale: scale.slice(),
                correlation: CorrelationTerm::Primal { coupling: coupling.mat(), offset: offset.slice() },
            }),
            dz: dz.mat_mut(),
            accumulate: false,
            grad_bias: grad_bias.slice_mut(),
            workspace: scratch.slice_mut(),
        });
        assert_names(&format!("{}: backward_dz, {name}", under.name), name, result);
        dz.assert_poisoned(&under.name, "dz");
        grad_bias.assert_poisoned(&under.name, "grad_bias");
    }
}

fn wrong_arguments_of_products<B: HostBackend>(under: &Under<B>) {
    let [m, n, k] = [5, 3, 4];
    for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
        for name in ["right", "out", "out rows"] {
            let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
            let left = if layout == Layout::Tn { ones::<B::Element>(k, m) } else { ones(m, k) };
            let right =
                if layout == Layout::Nt { ones::<B::Element>(n, size("right", k)) } else { ones(size("right", k), n) };
            let mut out = poisoned::<B::Real>(size("out rows", m), size("out", n));
            let mut scratch = common::ops::workspace(under, 9, 9, 9);
            let (left, right, workspace) = (left.mat(), right.mat(), scratch.slice_mut());
            let result = under.backend.product(Product {
                layout,
                left,
                right,
                accumulate: false,
                out: out.mat_mut(),
                workspace,
            });
            assert_names(&format!("{}: product {layout:?}, {name}", under.name), name, result);
            out.assert_poisoned(&under.name, "out");
        }
    }
    let matrix = ones::<B::Element>(m, n);
    let mut sums = poisoned::<B::Real>(1, n + 1);
    let mut scratch = common::ops::workspace(under, m, n, n);
    let (matrix, workspace) = (matrix.mat(), scratch.slice_mut());
    let result = under.backend.column_sums(ColumnSums { matrix, accumulate: false, sums: sums.slice_mut(), workspace });
    assert_names(&format!("{}: column_sums", under.name), "sums", result);
    sums.assert_poisoned(&under.name, "sums");
    for name in ["gram", "loss", "grad_weight", "grad_weight rows"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let weight = ones::<B::Element>(m, n);
        let mut gram = poisoned::<B::Real>(n, size("gram", n));
        let mut loss = poisoned::<f64>(1, size("loss", 1));
        let mut grad_weight = poisoned::<B::Real>(size("grad_weight rows", m), size("grad_weight", n));
        let mut scratch = common::ops::workspace(under, 0, n, m);
        let result = under.backend.weight_redundancy(WeightRedundancy {
            weight: weight.mat(),
            normalize: true,
            form: Form::Auto,
            lambda: 1.0,
            gram: gram.mat_mut(),
            loss: loss.slice_mut(),
            grad_weight: Some(grad_weight.mat_mut()),
            workspace: scratch.slice_mut(),
        });
        assert_names(&format!("{}: weight_redundancy, {name}", under.name), name, result);
        gram.assert_poisoned(&under.name, "gram");
        loss.assert_poisoned(&under.name, "loss");
        grad_weight.assert_poisoned(&under.name, "grad_weight");
    }
}

fn wrong_arguments_of_the_decoder<B: HostBackend>(under: &Under<B>) {
    let [n, d, h] = [5, 3, 4];
    for name in ["weight rows", "bias", "x", "reconstruction", "residual", "squared_error"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let (activations, weight) = (ones::<B::Element>(n, h), ones::<B::Element>(size("weight rows", h), d));
        let (bias, x) = (ones::<B::Real>(1, size("bias", d)), ones::<B::Element>(n, size("x", d)));
        let mut reconstruction = poisoned::<B::Real>(n, size("reconstruction", d));
        let mut residual = poisoned::<B::Element>(n, size("residual", d));
        let mut squared_error = poisoned::<f64>(1, size("squared_error", 1));
        let mut scratch = common::ops::workspace(under, n, d, h);
        let result = under.backend.decode(Decode {
            activations: activations.mat(),
            weight: weight.mat(),
            bias: bias.slice(),
            x: x.mat(),
            reconstruction: Some(reconstruction.mat_mut()),
            residual_weight: 1.0,
            residual: Some(residual.mat_mut()),
            accumulate: false,
            squared_error: squared_error.slice_mut(),
            workspace: scratch.slice_mut(),
        });
        assert_names(&format!("{}: decode, {name}", under.name), name, result);
        reconstruction.assert_poisoned(&under.name, "reconstruction");
        residual.assert_poisoned(&under.name, "residual");
        squared_error.assert_poisoned(&under.name, "squared_error");
    }
    for name in ["weight", "activations", "dz", "dz rows", "grad_bias"] {
        let size = |this: &str, len: usize| if name == this { len + 1 } else { len };
        let (residual, weight) = (ones::<B::Element>(n, d), ones::<B::Element>(h, size("weight", d)));
        let activations = ones::<B::Element>(n, size("activations", h));
        let mut dz = poisoned::<B::Element>(size("dz rows", n), size("dz", h));
        let mut grad_bias = poisoned::<B::Real>(1, size("grad_bias", h));
        let mut scratch = common::ops::workspace(under, n, d, h);
        let result = under.backend.decode_backward(DecodeBackward {
            residual: residual.mat(),
            weight: weight.mat(),
            activations: activations.mat(),
            activation: Activation::Relu,
            l1: 1.0,
            dz: dz.mat_mut(),
            accumulate: false,
            grad_bias: grad_bias.slice_mut(),
            workspace: scratch.slice_mut(),
        });
        assert_names(&format!("{}: decode_backward, {name}", under.name), name, result);
        dz.assert_poisoned(&under.name, "dz");
        grad_bias.assert_poisoned(&under.name, "grad_bias");
    }
}

fn wrong_arguments_of_optimizers<B: HostBackend>(under: &Under<B>) {
    let len = 5;
    for name in ["gradient", "velocity", "storage", "momentum", "learning_rate", "weight_decay"] {
        let size = |this: &str| if name == this { len + 1 } else { len };
        let gradient = ones::<B::Real>(1, size("gradient"));
        let (mut velocity, mut parameters) = (poisoned::<B::Real>(1, size("velocity")), poisoned::<B::Real>(1, len));
        let mut storage = poisoned::<B::Element>(1, size("storage"));
        let config = SgdConfig {
            learning_rate: if name == "learning_rate" { f64::NAN } else { 0.1 },
            momentum: if name == "momentum" { 1.0 } else { 0.5 },
            weight_decay: if name == "weight_decay" { f64::INFINITY } else { 0.0 },
        };
        let result = under.backend.sgd(Sgd {
            config,
            gradient: gradient.slice(),
            velocity: velocity.slice_mut(),
            parameters: parameters.slice_mut(),
            storage: Some(storage.slice_mut()),
        });
        assert_refused(&format!("{}: sgd, {name}", under.name), name, result);
        velocity.assert_poisoned(&under.name, "velocity");
        parameters.assert_poisoned(&under.name, "parameters");
        storage.assert_poisoned(&under.name, "storage");
    }
    let lengths = ["gradient", "first_moment", "second_moment", "storage"];
    for name in lengths.into_iter().chain(["step", "beta1", "beta2", "eps", "learning_rate", "weight_decay"]) {
        let size = |this: &str| if name == this { len + 1 } else { len };
        let number = |this: &str, good: f64, bad: f64| if name == this { bad } else { good };
        let gradient = ones::<B::Real>(1, size("gradient"));
        let mut outputs =
            [poisoned::<B::Real>(1, size("first_moment")), poisoned(1, size("second_moment")), poisoned(1, len)];
        let mut storage = poisoned::<B::Element>(1, size("storage"));
        let [first_moment, second_moment, parameters] = &mut outputs;
        let result = under.backend.adam(Adam {
            config: AdamConfig {
                learning_rate: number("learning_rate", 0.1, f64::NAN),
                beta1: number("beta1", 0.9, -0.1),
                beta2: number("beta2", 0.9, 1.0),
                eps: number("eps", 1e-8, -1e-8),
                weight_decay: number("weight_decay", 0.0, f64::NAN),
            },
            step: if name == "step" { 0 } else { 1 },
            gradient: gradient.slice(),
            first_moment: first_moment.slice_mut(),
            second_moment: second_moment.slice_mut(),
            parameters: parameters.slice_mut(),
            storage: Some(storage.slice_mut()),
        });
        assert_refused(&format!("{}: adam, {name}", under.name), name, result);
        outputs.iter().for_each(|output| output.assert_poisoned(&under.name, "outputs"));
        storage.assert_poisoned(&under.name, "storage");
    }
    // Plain descent has no velocity.
    let (gradient, mut velocity, mut parameters) =
        (ones::<B::Real>(1, 2), ones::<B::Real>(1, 2), ones::<B::Real>(1, 2));
    let result = under.backend.sgd(Sgd {
        config: SgdConfig::default(),
        gradient: gradient.slice(),
        velocity: velocity.slice_mut(),
        parameters: parameters.slice_mut(),
        storage: None,
    });
    assert_eq!(result, Err(Error::Length { operand: "velocity", expected: 0, found: 2 }), "{}", under.name);
}

/// As [`assert_names`], or a setting of that name.
fn assert_refused(context: &str, name: &str, result: sae_kernels::Result<()>) {
    match result {
        Err(Error::Configuration { name: found, .. }) => assert_eq!(found, name, "{context}"),
        other => assert_names(context, name, other),
    }
}

/// With too small a workspace an operation says how much it needs, which is no more than was promised, and writes nothing.
fn too_small_a_workspace<B: HostBackend>(under: &Under<B>) {
    for [n, d, h] in [[1, 1, 1], [5, 3, 4], [70, 33, 65]] {
        let promised = under.backend.workspace_len(Shape { rows: n, inputs: d, latents: h }).unwrap();
        for operation in OPERATIONS {
            let context = format!("{}: {} {n}×{d}×{h}", under.name, operation);
            match with_workspace(under, operation, [n, d, h], 0, &context) {
                Ok(()) => (),
                Err(Error::Workspace { needed, found: 0 }) => {
                    assert!(needed <= promised, "{context}: needs {needed}, of {promised} promised");
                    assert_eq!(with_workspace(under, operation, [n, d, h], needed, &context), Ok(()), "{context}");
                    let less = with_workspace(under, operation, [n, d, h], needed - 1, &context);
                    assert_eq!(less, Err(Error::Workspace { needed, found: needed - 1 }), "{context}");
                }
                other => panic!("{context}: {other:?}"),
            }
        }
    }
}

const OPERATIONS: [&str; 10] = [
    "encode",
    "activation_sums",
    "comoments",
    "finish_statistics",
    "correlation_dual",
    "backward_dz",
    "product",
    "column_sums",
    "weight_redundancy",
    "decode",
];

/// Runs an operation in a workspace of that length and, after an error, checks that its outputs are as they were.
fn with_workspace<B: HostBackend>(
    under: &Under<B>,
    operation: &str,
    [n, d, h]: [usize; 3],
    len: usize,
    context: &str,
) -> sae_kernels::Result<()> {
    let mut scratch = poisoned::<f64>(1, len);
    let (x, weight, activations) = (ones::<B::Element>(n, d), ones::<B::Element>(h, d), ones::<B::Element>(n, h));
    let (latents, rows, inputs) = (ones::<B::Real>(1, h), ones::<B::Real>(1, n), ones::<B::Real>(1, d));
    let wide = ones::<f64>(1, h);
    let mut out = [poisoned::<B::Element>(n, h), poisoned::<B::Element>(n, d)];
    let mut real = [poisoned::<B::Real>(1, h), poisoned(1, h), poisoned(1, h), poisoned(1, h)];
    let mut matrices = [poisoned::<B::Real>(h, h), poisoned(h, d)];
    let mut coupling = [poisoned::<B::Real>(h, h), poisoned(n, n)];
    let mut one = poisoned::<f64>(1, 1);
    let mut two = poisoned::<f64>(1, 2);
    let mut real_rows = poisoned::<B::Real>(1, n);
    let mut sums = [0, 1].map(|_| poisoned::<f64>(1, h));
    let n = n as u64;
    let backend = &under.backend;
    let [nh, nd] = &mut out;
    let [r0, r1, r2, r3] = &mut real;
    let [hh, hd] = &mut matrices;
    let [mhh, mnn] = &mut coupling;
    let [sum, sum_squares] = &mut sums;
    let workspace = scratch.slice_mut();
    let result = match operation {
        "encode" => backend.encode(Encode {
            x: x.mat(),
            weight: weight.mat(),
            bias: latents.slice(),
            activation: Activation::Relu,
            activations: Some(nh.mat_mut()),
            row_loss: None,
            moments: None,
            workspace,
        }),
        "activation_sums" => backend.activation_sums(ActivationSums {
            activations: activations.mat(),
            row_loss: Some(real_rows.slice_mut()),
            moments: Some(Moments {
                shift: None,
                accumulate: false,
                row_loss_sum: one.slice_mut(),
                sum: sum.slice_mut(),
                sum_squares: sum_squares.slice_mut(),
            }),
            workspace,
        }),
        "comoments" => backend.comoments(Comoments {
            activations: activations.mat(),
            shift: latents.slice(),
            accumulate: false,
            comoments: hh.mat_mut(),
            workspace,
        }),
        "finish_statistics" => backend.finish_statistics(FinishStatistics {
            count: n + 1,
            objective: Objective::default(),
            shift: latents.slice(),
            sum: wide.slice(),
            sum_squares: wide.slice(),
            primal: Some(PrimalCorrelation {
                covariance: Covariance::InPlace,
                coupling: mhh.mat_mut(),
                offset: r0.slice_mut(),
            }),
            mean: r1.slice_mut(),
            variance: r2.slice_mut(),
            scale: r3.slice_mut(),
            losses: two.slice_mut(),
            workspace,
        }),
        "correlation_dual" if n < 2 => Ok(()),
        "correlation_dual" => backend.correlation_dual(CorrelationDual {
            activations: activations.mat(),
            mean: latents.slice(),
            variance: latents.slice(),
            lambda_tc: 1.0,
            gram: mnn.mat_mut(),
            product: nh.mat_mut(),
            scale: r0.slice_mut(),
            loss: one.slice_mut(),
            workspace,
        }),
        "backward_dz" => backend.backward_dz(BackwardDz {
            activations: activations.mat(),
            activation: Activation::Relu,
            row_loss: rows.slice(),
            row_weight: 1.0,
            statistics: None,
            dz: nh.mat_mut(),
            accumulate: false,
            grad_bias: r0.slice_mut(),
            workspace,
        }),
        "product" => backend.product(Product {
            layout: Layout::Tn,
            left: activations.mat(),
            right: x.mat(),
            accumulate: false,
            out: hd.mat_mut(),
            workspace,
        }),
        "column_sums" => backend.column_sums(ColumnSums {
            matrix: activations.mat(),
            accumulate: false,
            sums: r0.slice_mut(),
            workspace,
        }),
        "weight_redundancy" => backend.weight_redundancy(WeightRedundancy {
            weight: weight.mat(),
            normalize: true,
            form: Form::Primal,
            lambda: 1.0,
            gram: mhh.mat_mut(),
            loss: one.slice_mut(),
            grad_weight: Some(hd.mat_mut()),
            workspace,
        }),
        _ => backend.decode(Decode {
            activations: activations.mat(),
            weight: weight.mat(),
            bias: inputs.slice(),
            x: x.mat(),
            reconstruction: None,
            residual_weight: 1.0,
            residual: Some(nd.mat_mut()),
            accumulate: false,
            squared_error: one.slice_mut(),
            workspace,
        }),
    };
    if result.is_err() {
        out.iter().for_each(|output| output.assert_poisoned(context, "an output"));
        real.iter().for_each(|output| output.assert_poisoned(context, "an output"));
        matrices.iter().for_each(|output| output.assert_poisoned(context, "an output"));
        coupling.iter().for_each(|output| output.assert_poisoned(context, "an output"));
        one.assert_poisoned(context, "an output");
        two.assert_poisoned(context, "an output");
        real_rows.assert_poisoned(context, "an output");
        sums.iter().for_each(|output| output.assert_poisoned(context, "an output"));
    }
    result
}

#[test]
fn buffers() {
    use sae_kernels::{Backend, Cpu, Reference};
    fn check<B: HostBackend>(backend: &B) {
        assert!(matches!(backend.upload(&[1f32; 3], &mut [0.0; 2]), Err(Error::Length { .. })));
        assert!(matches!(backend.download(&[1f32; 2], &mut [0.0; 3]), Err(Error::Length { .. })));
        // Past isize::MAX bytes, past usize::MAX.
        for len in [1 << 60, 1 << 61, usize::MAX] {
            assert!(matches!(backend.alloc::<f64>(len), Err(Error::Overflow { .. })), "{len}");
        }
        let mut buffer = backend.alloc::<f32>(5000).unwrap();
        assert!(buffer.len() == 5000 && buffer.iter().all(|v| *v == 0.0));
        backend.upload(&vec![2.0; 5000], &mut buffer).unwrap();
        let mut back = vec![0.0; 5000];
        backend.download(&buffer, &mut back).unwrap();
        assert_eq!(back, buffer);
    }
    check(&Reference);
    check(&Cpu::<f32>::new().unwrap());
    let _ = Reference.workspace_len(Shape { rows: 1, inputs: 1, latents: 1 }).unwrap();
}

/// An objective whose terms are all off is no error: everything is 0.
#[test]
fn no_terms() {
    let problem = problem([4, 3, 2], Objective { lambda_lse: 0.0, ..LSE_ALONE });
    let Outcome { losses, grad_weight, grad_bias, grad_x, .. } = problem.step(&reference(), &Plan::default()).unwrap();
    assert_eq!(losses.total, 0.0);
    assert!(zeros(&grad_weight) && zeros(&grad_bias) && zeros(&grad_x));
}
