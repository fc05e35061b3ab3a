//! The reference's gradients against central differences of its losses, and the exact identities: primal and dual form, micro-batches,
//! shards, and ∂L_lse/∂a = r.

mod common;

use common::ops::{self, Backward};
use common::{Outcome, Place, Plan, Problem, assert_within, reference, rng, uniform};
use sae_kernels::{
    Activation, Form, Losses, MatMut, MatRef, Objective, Reduction, Reference, Shape, StandardConfig,
    StandardGradients, StandardLosses, StandardParameters, StandardSae,
};

const STEP: f64 = 1e-5;

/// A problem with no z within 100 steps of ReLU's kink.
fn problem([rows, inputs, latents]: [usize; 3], objective: Objective, activation: Activation) -> Problem {
    for seed in 0.. {
        let mut rng = rng(seed);
        let problem = Problem {
            shape: Shape { rows, inputs, latents },
            x: uniform(&mut rng, rows * inputs, 1.0),
            weight: uniform(&mut rng, latents * inputs, 1.0),
            bias: uniform(&mut rng, latents, 1.0),
            objective,
            activation,
        };
        let linear = Problem { activation: Activation::Identity, ..problem.clone() };
        let z = linear.step(&reference(), &Plan::default()).unwrap().activations;
        if z.iter().all(|z| z.abs() > 100.0 * STEP) {
            return problem;
        }
    }
    unreachable!()
}

fn objectives() -> Vec<Objective> {
    let none = Objective { lambda_lse: 0.0, lambda_var: 0.0, lambda_tc: 0.0, lambda_wr: 0.0, ..Objective::default() };
    let all =
        Objective { lambda_lse: 0.9, lambda_var: 0.8, lambda_tc: 0.7, lambda_wr: 0.6, variance_eps: 1e-2, ..none };
    vec![
        Objective { lambda_lse: 1.0, ..none },
        Objective { lambda_var: 1.0, ..none },
        Objective { lambda_tc: 1.0, ..none },
        Objective { lambda_wr: 1.0, ..none },
        Objective { lambda_wr: 1.0, normalize_weight: false, ..none },
        all,
        Objective { reduction: Reduction::Mean, normalize_weight: false, lambda_var: -0.5, ..all },
    ]
}

fn total(problem: &Problem, plan: &Plan) -> f64 {
    let mut model = problem.model(&reference(), plan).unwrap();
    let Shape { rows, inputs, latents } = problem.shape;
    let x = MatRef::new(&problem.x[..], rows, inputs).unwrap();
    let weight = MatRef::new(&problem.weight[..], latents, inputs).unwrap();
    model.forward(x, weight, &problem.bias, None, None).unwrap();
    model.losses().unwrap().total
}

/// (f(v + h) − f(v − h))/2h for every element of what `field` picks.
fn differences<T: Clone>(of: &T, field: impl Fn(&mut T) -> &mut Vec<f64>, loss: impl Fn(&T) -> f64) -> Vec<f64> {
    let mut moved = of.clone();
    (0..field(&mut moved).len())
        .map(|at| {
            let value = field(&mut moved)[at];
            field(&mut moved)[at] = value + STEP;
            let above = loss(&moved);
            field(&mut moved)[at] = value - STEP;
            let below = loss(&moved);
            field(&mut moved)[at] = value;
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

fn assert_close(context: &str, what: &str, found: &[f64], truth: &[f64], tolerance: f64) {
    let scale = truth.iter().fold(1e-3f64, |scale, v| scale.max(v.abs()));
    assert_within(context, what, found, truth, |_| tolerance * scale);
}

#[test]
fn gradients_are_the_derivatives_of_the_losses() {
    for shape in [[7, 3, 4], [4, 3, 6], [2, 2, 3], [5, 4, 1]] {
        for objective in objectives() {
            for activation in [Activation::Relu, Activation::Identity, Activation::Softplus] {
                for form in [Form::Primal, Form::Dual] {
                    let problem = problem(shape, objective, activation);
                    let plan = Plan { correlation_form: form, weight_form: form, ..Plan::default() };
                    let context = format!("{shape:?} {objective:?} {activation:?} {form:?}");
                    let found = problem.step(&reference(), &plan).unwrap();
                    let loss = |problem: &Problem| total(problem, &plan);
                    assert_eq!(loss(&problem), found.losses.total, "{context}");
                    let of_weight = differences(&problem, |p| &mut p.weight, loss);
                    assert_close(&context, "grad_weight", &found.grad_weight, &of_weight, 1e-5);
                    assert_close(
                        &context,
                        "grad_bias",
                        &found.grad_bias,
                        &differences(&problem, |p| &mut p.bias, loss),
                        1e-5,
                    );
                    assert_close(&context, "grad_x", &found.grad_x, &differences(&problem, |p| &mut p.x, loss), 1e-5);
                }
            }
        }
    }
}

fn assert_same(context: &str, found: &Outcome, expected: &Outcome, tolerance: f64) {
    for (at, (name, gradient)) in found.gradients().into_iter().enumerate() {
        assert_close(context, name, gradient, expected.gradients()[at].1, tolerance);
    }
    for (at, (name, term)) in found.terms().into_iter().enumerate() {
        let truth = expected.terms()[at].1;
        assert!((term - truth).abs() <= tolerance * (1.0 + truth.abs()), "{context}: {name} {term:e}, {truth:e}");
    }
    assert_close(context, "activations", &found.activations, &expected.activations, tolerance);
    assert_close(context, "row_loss", &found.row_loss, &expected.row_loss, tolerance);
}

/// However a step is computed, it is the step of the whole batch.
#[test]
fn forms_blocks_and_shards_make_no_difference() {
    for shape in [[13, 5, 7], [7, 5, 13], [31, 2, 4], [2, 3, 5]] {
        for objective in objectives() {
            for activation in [Activation::Relu, Activation::Softplus] {
                let problem = problem(shape, objective, activation);
                let n = shape[0];
                let primal = Plan { correlation_form: Form::Primal, weight_form: Form::Primal, ..Plan::default() };
                // Two rows correlate wholly, whatever they are: a gradient of 0, to rounding.
                let tolerance = if n == 2 { 1e-10 } else { 1e-12 };
                let expected = problem.step(&reference(), &primal).unwrap();
                assert_same(
                    "given activations",
                    &problem.given_activations(&expected.activations),
                    &expected,
                    tolerance,
                );
                for plan in Plan::all(&reference(), problem.shape) {
                    let context = format!("{shape:?} {objective:?} {activation:?} {plan:?}");
                    assert_same(&context, &problem.step(&reference(), &plan).unwrap(), &expected, tolerance);
                    if plan.correlation_form == Form::Dual {
                        continue;
                    }
                    for cuts in [vec![0, n], vec![0, 1, 1, n], vec![0, n / 2, n - 1, n, n]] {
                        let shards = common::step::shards(&cuts);
                        let (found, _) = problem.sharded(&reference(), &plan, &shards).unwrap();
                        assert_same(&format!("{context} {shards:?}"), &found, &expected, tolerance);
                    }
                }
            }
        }
    }
}

/// The identity that the paper is about: the gradient of L_lse with respect to the activations is the responsibilities.
#[test]
fn responsibilities_are_the_gradient_of_the_log_sum_exp() {
    let (n, h) = (5, 7);
    let activations = uniform(&mut rng(1), n * h, 3.0);
    let losses = |a: &Vec<f64>| a.chunks(h).map(common::step::row_loss).sum::<f64>();
    let row_loss: Vec<f64> = activations.chunks(h).map(common::step::row_loss).collect();
    let r = ops::responsibilities(&reference(), Place::DENSE, (n, h), &activations, &row_loss);
    assert_close("r", "∂L/∂a", &r, &differences(&activations, |a| a, losses), 1e-8);
    let softmax: Vec<f64> = (0..n * h)
        .map(|at| (-activations[at]).exp() / activations[at / h * h..][..h].iter().map(|a| (-a).exp()).sum::<f64>())
        .collect();
    assert_close("r", "softmax(−a)", &r, &softmax, 1e-14);
    let backward = Backward {
        n,
        h,
        activations,
        activation: Activation::Identity,
        row_loss,
        row_weight: 1.0,
        statistics: None,
        before: None,
    };
    assert_close("r", "dz", &backward.run(&reference(), Place::DENSE).0, &r, 1e-15);
}

/// The standard autoencoder's parameters and batch.
#[derive(Clone)]
struct Standard {
    shape: Shape,
    lambda_l1: f64,
    x: Vec<f64>,
    encoder_weight: Vec<f64>,
    encoder_bias: Vec<f64>,
    decoder_weight: Vec<f64>,
    decoder_bias: Vec<f64>,
}

impl Standard {
    fn new([rows, inputs, latents]: [usize; 3], lambda_l1: f64) -> Self {
        let problem = problem(
            [rows, inputs, latents],
            Objective { lambda_var: 0.0, lambda_tc: 0.0, ..Objective::default() },
            Activation::Relu,
        );
        let mut rng = rng(rows as u64);
        Self {
            shape: problem.shape,
            lambda_l1,
            x: problem.x,
            encoder_weight: problem.weight,
            encoder_bias: problem.bias,
            decoder_weight: uniform(&mut rng, latents * inputs, 1.0),
            decoder_bias: uniform(&mut rng, inputs, 1.0),
        }
    }

    fn run(&self) -> (StandardLosses, [Vec<f64>; 4]) {
        let Shape { rows, inputs: d, latents: h } = self.shape;
        let config = StandardConfig { shape: self.shape, lambda_l1: self.lambda_l1 };
        let mut model = StandardSae::new(Reference, config).unwrap();
        let parameters = StandardParameters {
            encoder_weight: MatRef::new(&self.encoder_weight[..], h, d).unwrap(),
            encoder_bias: &self.encoder_bias[..],
            decoder_weight: MatRef::new(&self.decoder_weight[..], h, d).unwrap(),
            decoder_bias: &self.decoder_bias[..],
        };
        let mut out = [vec![f64::NAN; h * d], vec![f64::NAN; h], vec![f64::NAN; h * d], vec![f64::NAN; d]];
        let [a, b, c, e] = &mut out;
        let gradients = StandardGradients {
            encoder_weight: MatMut::new(&mut a[..], h, d).unwrap(),
            encoder_bias: &mut b[..],
            decoder_weight: MatMut::new(&mut c[..], h, d).unwrap(),
            decoder_bias: &mut e[..],
        };
        model.step(MatRef::new(&self.x[..], rows, d).unwrap(), parameters, gradients).unwrap();
        (model.losses().unwrap(), out)
    }
}

#[test]
fn standard_gradients_are_the_derivatives_of_the_loss() {
    for (shape, lambda_l1) in [([6, 3, 5], 0.3), ([1, 4, 2], 0.0), ([5, 1, 7], 1.5)] {
        let standard = Standard::new(shape, lambda_l1);
        let (losses, [encoder_weight, encoder_bias, decoder_weight, decoder_bias]) = standard.run();
        let context = format!("{shape:?} λ {lambda_l1}");
        // The losses, written out.
        let Shape { rows: n, inputs: d, latents: h } = standard.shape;
        let a = |row: usize, j: usize| {
            let z: f64 = (0..d).map(|k| standard.x[row * d + k] * standard.encoder_weight[j * d + k]).sum();
            (z + standard.encoder_bias[j]).max(0.0)
        };
        let reconstruction = |row: usize, k: usize| {
            (0..h).map(|j| a(row, j) * standard.decoder_weight[j * d + k]).sum::<f64>() + standard.decoder_bias[k]
        };
        let error = |at: usize| (reconstruction(at / d, at % d) - standard.x[at]).powi(2);
        let mse = (0..n * d).map(error).sum::<f64>() / (n * d) as f64;
        let l1 = (0..n * h).map(|at| a(at / h, at % h)).sum::<f64>() / (n * h) as f64;
        assert_close(
            &context,
            "losses",
            &[losses.mse, losses.l1, losses.total],
            &[mse, l1, mse + lambda_l1 * l1],
            1e-13,
        );

        let loss = |standard: &Standard| standard.run().0.total;
        let of = |field: fn(&mut Standard) -> &mut Vec<f64>| differences(&standard, field, loss);
        assert_close(&context, "encoder_weight", &encoder_weight, &of(|s| &mut s.encoder_weight), 1e-6);
        assert_close(&context, "encoder_bias", &encoder_bias, &of(|s| &mut s.encoder_bias), 1e-6);
        assert_close(&context, "decoder_weight", &decoder_weight, &of(|s| &mut s.decoder_weight), 1e-6);
        assert_close(&context, "decoder_bias", &decoder_bias, &of(|s| &mut s.decoder_bias), 1e-6);
    }
}

/// Losses written out from activations, one formula a line.
#[test]
fn losses_are_their_formulas() {
    for [n, d, h] in [[9, 4, 5], [2, 3, 4], [5, 2, 8]] {
        for reduction in [Reduction::Sum, Reduction::Mean] {
            for normalize_weight in [true, false] {
                let objective = Objective {
                    lambda_wr: 0.5,
                    lambda_tc: 2.0,
                    variance_eps: 0.01,
                    reduction,
                    normalize_weight,
                    ..Objective::default()
                };
                let problem = problem([n, d, h], objective, Activation::Relu);
                let found = problem.step(&reference(), &Plan::default()).unwrap();
                let a = |row: usize, j: usize| found.activations[row * h + j];
                let sum = |f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>();
                let mean: Vec<f64> = (0..h).map(|j| sum(&|row| a(row, j)) / n as f64).collect();
                let covariance =
                    |i: usize, j: usize| sum(&|row| (a(row, i) - mean[i]) * (a(row, j) - mean[j])) / (n as f64 - 1.0);
                let s = |j: usize| covariance(j, j).sqrt() + 1e-8;
                let pairs = || (0..h * h).map(|at| (at / h, at % h));
                let lse = -sum(&|row| (0..h).map(|j| (-a(row, j)).exp()).sum::<f64>().ln());
                let lse = if reduction == Reduction::Mean { lse / n as f64 } else { lse };
                let var = -(0..h).map(|j| (covariance(j, j) + 0.01).ln()).sum::<f64>();
                let tc = pairs()
                    .filter(|(i, j)| i != j)
                    .map(|(i, j)| (covariance(i, j) / (s(i) * s(j))).powi(2))
                    .sum::<f64>();
                let row = |j: usize| &problem.weight[j * d..(j + 1) * d];
                let norm = |j: usize| {
                    if normalize_weight { row(j).iter().map(|w| w * w).sum::<f64>().sqrt() + 1e-8 } else { 1.0 }
                };
                let gram = |i: usize, j: usize| {
                    row(i).iter().zip(row(j)).map(|(v, w)| v * w).sum::<f64>() / (norm(i) * norm(j))
                };
                let wr = pairs().map(|(i, j)| (gram(i, j) - f64::from(u8::from(i == j))).powi(2)).sum::<f64>();
                let expected = Losses { lse, var, tc, wr, total: lse + var + 2.0 * tc + 0.5 * wr };
                let terms = |losses: Losses| [losses.lse, losses.var, losses.tc, losses.wr, losses.total];
                assert_close(&format!("{n}×{d}×{h}"), "losses", &terms(found.losses), &terms(expected), 1e-12);
            }
        }
    }
}
