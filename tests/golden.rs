//! The models against golden vectors of the published objective. More files: `SAE_KERNELS_GOLDEN_DIR=dir[:dir...]`.
//!
//! The reference must agree to 1e-10. Other backends round z, so their gradients are compared with those of the reference from
//! the activations that they stored, mask and all, and the activations with the truth.

#[macro_use]
mod common;

use common::golden::Golden;
use common::step::{self, Outcome, Plan, Problem};
use common::{HostBackend, Place, Under, Where, assert_within, naive, ops, reference, relative};
use sae_kernels::{Element, Objective, Shape, Statistics};
use std::cell::RefCell;
use std::ops::Range;

on_every_backend!(
    steps_agree,
    all_four_terms_agree,
    shards_agree,
    statistics_agree,
    responsibilities_agree,
    rounded_inputs_agree,
);

/// Agreement that `f64` arithmetic in another order still has.
const EXACT: f64 = 1e-10;

/// Files that an emulated GPU has time for: forms, ragged tiles, redundancy, dead columns, columns far from zero.
const FEW: [&str; 6] =
    ["odd_2x3x5", "odd_33x130x97", "odd_65x1x17", "wide_24x48x160_wr", "dead_columns", "large_offset"];

fn all_files<B: HostBackend>(under: &Under<B>) -> Vec<Golden> {
    let few = |golden: &Golden| under.device != Where::EmulatedGpu || FEW.contains(&golden.name.as_str());
    Golden::all().into_iter().filter(few).collect()
}

fn golden_files<B: HostBackend>(under: &Under<B>) -> Vec<Golden> {
    // The inputs are f32: other storage types would round them, and the truth be another.
    let holds_f32 = B::Element::UNIT_ROUNDOFF <= f32::UNIT_ROUNDOFF;
    if holds_f32 { all_files(under) } else { Vec::new() }
}

fn is_exact<B: HostBackend>() -> bool {
    B::Real::NAME == "f64" && B::Element::NAME == "f64"
}

/// Relative to the largest value, or to 1.
fn assert_exact(context: &str, what: &str, found: &[f64], truth: &[f64]) {
    let scale = truth.iter().fold(1f64, |scale, v| scale.max(v.abs()));
    assert_within(context, what, found, truth, |_| EXACT * scale);
}

fn steps_agree<B: HostBackend>(under: &Under<B>) {
    for golden in golden_files(under) {
        let yardstick = Yardstick::new::<B>(&golden.problem, !golden.own);
        for plan in Plan::all(under, golden.problem.shape) {
            let context = format!("{}: {} {plan:?}", under.name, golden.name);
            let found = golden.problem.step(under, &plan).unwrap_or_else(|e| panic!("{context}: {e}"));
            compare(under, &context, &golden, &yardstick, &found, &plan);
        }
    }
}

fn shards_agree<B: HostBackend>(under: &Under<B>) {
    for golden in golden_files(under) {
        let n = golden.problem.shape.rows;
        let yardstick = Yardstick::new::<B>(&golden.problem, !golden.own);
        for (at, shards) in under.cases(shardings(n), shardings(n).into_iter().take(1)).into_iter().enumerate() {
            let block_rows = Some([n, 5, 16][at % 3]);
            let plan = Plan { block_rows, place: Place::ALL[at % 2], outputs: at % 2 == 0, ..Plan::default() };
            let context = format!("{}: {} shards {shards:?} {plan:?}", under.name, golden.name);
            let (found, statistics) =
                golden.problem.sharded(under, &plan, &shards).unwrap_or_else(|e| panic!("{context}: {e}"));
            assert_eq!(statistics.count(), n as u64, "{context}");
            compare(under, &context, &golden, &yardstick, &found, &plan);
        }
    }
}

/// The files' inputs in storage types that round them, against the reference on the rounded inputs.
fn rounded_inputs_agree<B: HostBackend>(under: &Under<B>) {
    if !golden_files(under).is_empty() {
        return;
    }
    for golden in all_files(under) {
        let problem = golden.problem.rounded_for::<B>();
        let yardstick = Yardstick::new::<B>(&problem, !golden.own);
        let truth = problem.step(&reference(), &Plan::default()).unwrap();
        let bound = encoder_bound(under, &problem);
        for plan in Plan::all(under, problem.shape) {
            let context = format!("{}: {} rounded {plan:?}", under.name, golden.name);
            let found = problem.step(under, &plan).unwrap_or_else(|e| panic!("{context}: {e}"));
            assert_within(&context, "activations", &found.activations, &truth.activations, |at| {
                bound[at] + under.storage(truth.activations[at] + bound[at])
            });
            compare_rounded::<B>(&context, &yardstick, &found, &plan);
        }
    }
}

/// What a plain implementation makes of a problem, and what the reference makes of stored activations.
struct Yardstick<'a> {
    problem: &'a Problem,
    /// Whether more than the bars of quality is allowed, for problems of unknown condition.
    lenient: bool,
    /// Errors of the gradients in the primal and in the dual form.
    plain_errors: [[f64; 3]; 2],
    /// The last activations and their outcome: most plans store the same.
    last: RefCell<Option<Outcome>>,
}

impl<'a> Yardstick<'a> {
    fn new<B: HostBackend>(problem: &'a Problem, lenient: bool) -> Self {
        let mut yardstick = Self { problem, lenient, plain_errors: [[0.0; 3]; 2], last: RefCell::default() };
        if !is_exact::<B>() {
            yardstick.plain_errors = [false, true].map(|dual| {
                let plain = naive::step::<B::Element>(problem, dual);
                let truth = yardstick.truth(&plain.activations);
                [0, 1, 2].map(|at| relative(plain.gradients()[at].1, truth.gradients()[at].1))
            });
        }
        yardstick
    }

    fn truth(&self, activations: &[f64]) -> Outcome {
        let mut last = self.last.borrow_mut();
        match last.as_ref() {
            Some(outcome) if outcome.activations == activations => outcome.clone(),
            _ => last.insert(self.problem.given_activations(activations)).clone(),
        }
    }
}

/// Uneven parts, some of them empty.
fn shardings(n: usize) -> Vec<Vec<Range<usize>>> {
    [vec![0, 1, 1, n], vec![0, 0, n / 3, n / 2, n, n], vec![0, n - 1, n]]
        .iter()
        .map(|cuts| step::shards(cuts))
        .collect()
}

fn all_four_terms_agree<B: HostBackend>(under: &Under<B>) {
    for golden in golden_files(under) {
        let objective =
            Objective { lambda_lse: 1.0, lambda_var: 1.0, lambda_tc: 1.0, lambda_wr: 1.0, ..golden.problem.objective };
        let problem = Problem { objective, ..golden.problem.clone() };
        let yardstick = Yardstick::new::<B>(&problem, !golden.own);
        for plan in Plan::all(under, problem.shape).into_iter().take(under.cases([3], [1])[0]) {
            let context = format!("{}: {} all terms {plan:?}", under.name, golden.name);
            let found = problem.step(under, &plan).unwrap_or_else(|e| panic!("{context}: {e}"));
            compare_terms(under, &context, &golden, &yardstick, &found);
            compare_rounded::<B>(&context, &yardstick, &found, &plan);
        }
    }
}

/// A whole outcome against the file.
fn compare<B: HostBackend>(
    under: &Under<B>,
    context: &str,
    golden: &Golden,
    yardstick: &Yardstick<'_>,
    found: &Outcome,
    plan: &Plan,
) {
    compare_activations(under, context, golden, found);
    compare_terms(under, context, golden, yardstick, found);
    if is_exact::<B>() {
        for (name, gradient) in found.gradients() {
            assert_exact(context, name, gradient, golden.tensor(name));
        }
    } else {
        compare_rounded::<B>(context, yardstick, found, plan);
    }
}

fn compare_activations<B: HostBackend>(under: &Under<B>, context: &str, golden: &Golden, found: &Outcome) {
    let h = golden.problem.shape.latents;
    let bound = encoder_bound(under, &golden.problem);
    let activations = golden.tensor("activations");
    assert_within(context, "activations", &found.activations, activations, |at| bound[at]);
    let row_loss = golden.tensor("row_loss");
    assert_within(context, "row_loss", &found.row_loss, row_loss, |row| {
        let shift = (row * h..(row + 1) * h).map(|at| (found.activations[at] - activations[at]).abs());
        common::ROW_LOSS_BAR * (under.real() * (row_loss[row].abs() + 1.0) + shift.fold(0.0, f64::max))
    });
}

/// Bound on every activation's error: z's, for activations that do not stretch, and the rounding of what is stored.
fn encoder_bound<B: HostBackend>(under: &Under<B>, problem: &Problem) -> Vec<f64> {
    let Shape { rows: n, inputs: d, latents: h } = problem.shape;
    let scale = common::abs_nt(n, h, d, &problem.x, &problem.weight);
    let factor = common::z_factor(d) * under.real();
    (0..n * h).map(|at| factor * (scale[at] + problem.bias[at % h].abs())).collect()
}

/// Each term with weight, and the total, against the file: exactly, or as far apart as the stored activations explain.
fn compare_terms<B: HostBackend>(
    under: &Under<B>,
    context: &str,
    golden: &Golden,
    yardstick: &Yardstick<'_>,
    found: &Outcome,
) {
    let problem = yardstick.problem;
    let objective = problem.objective;
    let weights = [objective.lambda_lse, objective.lambda_var, objective.lambda_tc, objective.lambda_wr];
    let explained = if is_exact::<B>() { None } else { Some(yardstick.truth(&found.activations)) };
    let mut total = 0.0;
    for (at, (name, term)) in found.terms().into_iter().enumerate() {
        let truth = match weights.get(at) {
            Some(0.0) => 0.0,
            Some(_) => golden.tensor(&format!("loss_{name}"))[0],
            None => total,
        };
        total += weights.get(at).map_or(0.0, |weight| weight * truth);
        let tolerance = match &explained {
            None => EXACT * (1.0 + truth.abs()),
            Some(explained) => {
                (explained.terms()[at].1 - truth).abs() + term_bound(under, problem, &explained.terms()[..=at])
            }
        };
        assert!(
            (term - truth).abs() <= tolerance,
            "{context}: {name} is {term:e}, truth {truth:e}, allowed {tolerance:e}"
        );
    }
    if objective == golden.problem.objective {
        let truth = golden.tensor("loss_total")[0];
        assert!((total - truth).abs() <= 1e-9 * (1.0 + truth.abs()), "{context}: total in the file");
    }
}

/// Rounding of a loss term made of sums over rows, latents or pairs of latents; `terms` ends with it.
fn term_bound<B: HostBackend>(under: &Under<B>, problem: &Problem, terms: &[(&str, f64)]) -> f64 {
    let Shape { rows: n, latents: h, .. } = problem.shape;
    let objective = &problem.objective;
    let (name, value) = terms[terms.len() - 1];
    let per_term = common::VARIANCE_BAR * under.real();
    let rows = Objective { lambda_lse: 1.0, ..*objective }.row_weight(n as u64) * n as f64;
    let (n, h) = (n as f64, h as f64);
    match name {
        // Every row within its own bound.
        "lse" => common::ROW_LOSS_BAR * under.real() * rows * (1.0 + (value / rows).abs() + 300.0 / n.sqrt()),
        // Every logarithm of a variance that is off by a factor 1 ± bar·u.
        "var" => per_term * (h + value.abs()),
        // 2|C|δ for every pair, δ the bar of a correlation, at most h − 1 of them a latent; diag and square by themselves.
        "tc" => 4.0 * common::CORRELATION_BAR * under.real() * (value.abs() + (value.abs() * h * h).sqrt() + h),
        "wr" => 4.0 * common::CORRELATION_BAR * under.real() * (value.abs() + h * h.min(n) + h),
        _ => {
            let weights = [objective.lambda_lse, objective.lambda_var, objective.lambda_tc, objective.lambda_wr];
            let parts = terms.len() - 1;
            (0..parts).map(|at| weights[at].abs() * term_bound(under, problem, &terms[..=at])).sum::<f64>()
                + per_term * value.abs()
        }
    }
}

/// Gradients against the reference's from the same stored activations: no worse than twice a plain implementation.
fn compare_rounded<B: HostBackend>(context: &str, yardstick: &Yardstick<'_>, found: &Outcome, plan: &Plan) {
    let shape = yardstick.problem.shape;
    let truth = yardstick.truth(&found.activations);
    for (at, (name, gradient)) in found.gradients().into_iter().enumerate() {
        let truth = truth.gradients()[at].1;
        if is_exact::<B>() {
            assert_exact(context, name, gradient, truth);
            continue;
        }
        let merged = plan.block_rows.is_some_and(|block_rows| block_rows < shape.rows);
        let dual = !merged && plan.correlation_form.is_dual(shape.latents, shape.rows);
        let (error, plain_error) = (relative(gradient, truth), yardstick.plain_errors[usize::from(dual)][at]);
        // The dual form where it is not the cheaper one has the longer sums.
        let slack = merged || (dual && shape.rows >= shape.latents);
        let allowed = common::gradient_bar::<B>(plain_error, slack);
        if error > allowed && yardstick.lenient {
            // A plain implementation may be lucky where most of the gradient cancels, or all of it.
            let norm = truth.iter().map(|v| v * v).sum::<f64>().sqrt();
            let u = B::Real::UNIT_ROUNDOFF.max(B::Element::UNIT_ROUNDOFF);
            let off = gradient.iter().zip(truth).map(|(g, t)| (g - t).powi(2)).sum::<f64>().sqrt();
            let magnitude = yardstick.problem.magnitudes(&found.activations)[at];
            if off <= allowed * norm + common::CORRELATION_BAR * u * magnitude {
                continue;
            }
        }
        assert!(error <= allowed, "{context}: {name} is off by {error:e}; a plain implementation by {plain_error:e}");
    }
}

fn statistics_agree<B: HostBackend>(under: &Under<B>) {
    for golden in golden_files(under) {
        let problem = &golden.problem;
        let Shape { rows: n, latents: h, .. } = problem.shape;
        for block_rows in under.cases([None, Some(3)], [None]) {
            let context = format!("{}: {} statistics {block_rows:?}", under.name, golden.name);
            let plan = Plan { block_rows, ..Plan::default() };
            let found = problem.step(under, &plan).unwrap();
            let full = problem.objective.lambda_tc != 0.0;
            let mut statistics = Statistics::new(h, full);
            let buffers = step::Buffers::<B>::new(problem, Place::STRIDED);
            let (x, weight, bias) = (buffers.x.mat(), buffers.weight.mat(), buffers.bias.slice());
            problem.model(under, &plan).unwrap().statistics(x, weight, bias, &mut statistics).unwrap();
            let variance: Vec<f64> = (0..h).map(|j| statistics.variance(j)).collect();
            if is_exact::<B>() {
                assert_exact(&context, "mean", &statistics.mean(), golden.tensor("mean"));
                assert_exact(&context, "variance", &variance, golden.tensor("variance"));
            }
            // The moments are of the activations as stored.
            let truth = step::finish(&found.activations, n, h, Objective::default());
            let (u, bar) = (under.real(), common::VARIANCE_BAR);
            assert_within(&context, "mean", &statistics.mean(), &truth.mean, |j| {
                bar * u * (truth.variance[j].sqrt() + u * truth.mean[j].abs())
            });
            assert_within(&context, "variance", &variance, &truth.variance, |j| {
                bar * u * truth.variance[j] + (bar * u * u * truth.mean[j]).powi(2)
            });
        }
    }
}

fn responsibilities_agree<B: HostBackend>(under: &Under<B>) {
    for golden in golden_files(under) {
        let problem = &golden.problem;
        let Shape { rows: n, latents: h, .. } = problem.shape;
        let context = format!("{}: {}", under.name, golden.name);
        let found = problem.step(under, &Plan::default()).unwrap();
        let r = ops::responsibilities(under, Place::STRIDED, (n, h), &found.activations, &found.row_loss);
        let truth = golden.tensor("responsibilities");
        let bound = encoder_bound(under, problem);
        assert_within(&context, "responsibilities", &r, truth, |at| {
            // Off by a factor exp(δ), δ the errors of ℓ and a.
            let row = at / h * h..(at / h + 1) * h;
            let largest = row.map(|at| bound[at]).fold(0.0, f64::max);
            let exponent = golden.tensor("row_loss")[at / h].abs() + golden.tensor("activations")[at].abs() + 1.0;
            let relative = 4.0 * largest + 8.0 * under.real() * exponent;
            truth[at] * (relative.exp_m1()) + f64::from(f32::MIN_POSITIVE)
        });
        for row in r.chunks(h) {
            assert!(
                (row.iter().sum::<f64>() - 1.0).abs() <= 64.0 * under.real() * (300.0 + h as f64),
                "{context}: sum of a row"
            );
        }
    }
}
