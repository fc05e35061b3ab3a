//! Laws that hold for any batch: of merged statistics, of the losses, of the responsibilities. Few, random, small cases.

mod common;

use common::{Outcome, Plan, Problem, reference, rng, uniform};
use proptest::prelude::*;
use sae_kernels::{Activation, Objective, Shape, Statistics};

/// Statistics of random rows, about a shift of their own.
fn statistics(rows: usize, h: usize, full: bool, seed: u64) -> (Statistics, Vec<Vec<f64>>) {
    let mut rng = rng(seed);
    let mut statistics = Statistics::new(h, full);
    statistics.rebase(&uniform(&mut rng, h, 2.0));
    let batch: Vec<Vec<f64>> = (0..rows).map(|_| uniform(&mut rng, h, 1.0)).collect();
    for row in &batch {
        statistics.add_row(row[0] - 0.5, row);
    }
    (statistics, batch)
}

/// What statistics say of a batch, whatever their shift: count, Σℓ, means, and (co)variances and correlations.
fn summary(statistics: &Statistics) -> Vec<f64> {
    let h = statistics.latents();
    let mut summary = vec![statistics.count() as f64, statistics.row_loss_sum()];
    summary.extend(statistics.mean());
    for i in 0..h {
        summary.push(statistics.variance(i));
        for j in 0..if statistics.is_full() { h } else { 0 } {
            summary.extend([statistics.covariance(i, j), statistics.correlation(i, j)]);
        }
    }
    summary
}

fn close(left: &[f64], right: &[f64], tolerance: f64) -> Result<(), TestCaseError> {
    prop_assert_eq!(left.len(), right.len());
    for (at, (l, r)) in left.iter().zip(right).enumerate() {
        let same = (l - r).abs() <= tolerance * (1.0 + l.abs().max(r.abs())) || (l.is_nan() && r.is_nan());
        prop_assert!(same, "[{}]: {} and {}", at, l, r);
    }
    Ok(())
}

fn merged(parts: &[&Statistics]) -> Statistics {
    let mut all = parts[0].clone();
    parts[1..].iter().for_each(|part| all.merge(part).unwrap());
    all
}

fn problem([rows, inputs, latents]: [usize; 3], activation: Activation, seed: u64) -> Problem {
    let mut rng = rng(seed);
    Problem {
        shape: Shape { rows, inputs, latents },
        x: uniform(&mut rng, rows * inputs, 1.0),
        weight: uniform(&mut rng, latents * inputs, 1.0),
        bias: uniform(&mut rng, latents, 1.0),
        objective: Objective { variance_eps: 1e-3, lambda_wr: 0.5, ..Objective::default() },
        activation,
    }
}

fn step(problem: &Problem, plan: &Plan) -> Outcome {
    problem.step(&reference(), plan).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn merging_statistics_is_associative_and_commutative(
        sizes in prop::array::uniform3(0usize..6), h in 1usize..6, full: bool, seed: u64,
    ) {
        let [a, b, c] = [0, 1, 2].map(|at| statistics(sizes[at], h, full, seed.wrapping_add(at as u64)).0);
        let left = merged(&[&merged(&[&a, &b]), &c]);
        let right = merged(&[&a, &merged(&[&b, &c])]);
        let turned = merged(&[&c, &b, &a]);
        prop_assert_eq!(left.count(), sizes.iter().sum::<usize>() as u64);
        close(&summary(&left), &summary(&right), 1e-12)?;
        close(&summary(&left), &summary(&turned), 1e-12)?;
    }

    #[test]
    fn statistics_are_those_of_the_rows(rows in 0usize..9, h in 1usize..5, full: bool, seed: u64) {
        let (statistics, batch) = statistics(rows, h, full, seed);
        let n = rows as f64;
        let mean: Vec<f64> = (0..h).map(|j| batch.iter().map(|row| row[j]).sum::<f64>() / n).collect();
        close(&statistics.mean(), &mean, 1e-13)?;
        close(&[statistics.row_loss_sum()], &[batch.iter().map(|row| row[0] - 0.5).sum()], 1e-13)?;
        let sum: Vec<f64> = (0..h).map(|j| batch.iter().map(|row| row[j] - statistics.shift()[j]).sum()).collect();
        close(statistics.sum(), &sum, 1e-13)?;
        for i in 0..h {
            for j in if full { 0..h } else { i..i + 1 } {
                let product = |row: &Vec<f64>| (row[i] - mean[i]) * (row[j] - mean[j]);
                let covariance = if rows < 2 { f64::NAN } else { batch.iter().map(product).sum::<f64>() / (n - 1.0) };
                close(&[statistics.covariance(i, j)], &[covariance], 1e-12)?;
                let s = |k: usize| statistics.variance(k).sqrt() + 1e-8;
                close(&[statistics.correlation(i, j)], &[statistics.covariance(i, j) / s(i) / s(j)], 1e-14)?;
                let shift = statistics.shift();
                let comoment = batch.iter().map(|row| (row[i] - shift[i]) * (row[j] - shift[j])).sum::<f64>();
                close(&[statistics.comoment(i, j)], &[comoment], 1e-13)?;
            }
        }
        // The layout that hosts sum over.
        let expected = 2 + h + if full { h * (h + 1) / 2 } else { h };
        prop_assert_eq!(statistics.sums().len(), expected);
        prop_assert_eq!(Statistics::len(h, full), expected);
        prop_assert_eq!(statistics.sums()[0], n);
        let upper = (0..h).flat_map(|i| (i..if full { h } else { i + 1 }).map(move |j| (i, j)));
        let comoments: Vec<f64> = upper.map(|(i, j)| statistics.comoment(i, j)).collect();
        prop_assert_eq!(&statistics.sums()[2 + h..], &comoments[..]);
    }

    #[test]
    fn a_shift_is_of_no_consequence(rows in 2usize..9, h in 1usize..5, full: bool, seed: u64) {
        let (before, _) = statistics(rows, h, full, seed);
        let mut after = before.clone();
        let shift = uniform(&mut rng(seed ^ 1), h, 3.0);
        after.rebase(&shift);
        prop_assert_eq!(after.shift(), &shift[..]);
        close(&summary(&before), &summary(&after), 1e-11)?;
        // About a common shift, statistics are summed by adding their sums.
        let (mut other, _) = statistics(rows + 1, h, full, seed ^ 2);
        other.rebase(&shift);
        let whole = merged(&[&after, &other]);
        after.sums_mut().iter_mut().zip(other.sums()).for_each(|(sum, term)| *sum += term);
        prop_assert_eq!(whole, after);
    }

    #[test]
    fn merging_with_nothing_changes_nothing(rows in 0usize..4, h in 1usize..4, full: bool, seed: u64) {
        let (some, _) = statistics(rows, h, full, seed);
        let nothing = Statistics::new(h, full);
        close(&summary(&merged(&[&some, &nothing])), &summary(&some), 0.0)?;
        let other = merged(&[&nothing, &some]);
        close(&summary(&other), &summary(&some), 1e-15)?;
    }

    #[test]
    fn the_order_of_rows_is_of_no_consequence(n in 2usize..9, d in 1usize..5, h in 1usize..6, turn in 0usize..9, seed: u64) {
        let problem = problem([n, d, h], Activation::Relu, seed);
        let mut turned = problem.clone();
        turned.x.rotate_left(turn % n * d);
        let (a, b) = (step(&problem, &Plan::default()), step(&turned, &Plan::default()));
        close(&a.terms().map(|t| t.1), &b.terms().map(|t| t.1), 1e-11)?;
    }

    #[test]
    fn row_losses_and_responsibilities_are_bounded(n in 1usize..6, h in 1usize..9, seed: u64, softplus: bool) {
        let activation = if softplus { Activation::Softplus } else { Activation::Identity };
        let objective = Objective { lambda_var: 0.0, lambda_tc: 0.0, ..Objective::default() };
        let problem = Problem { objective, ..problem([n, 3, h], activation, seed) };
        let found = step(&problem, &Plan::default());
        let r = common::ops::responsibilities(
            &reference(), common::Place::STRIDED, (n, h), &found.activations, &found.row_loss,
        );
        for row in 0..n {
            let least = found.activations[row * h..][..h].iter().copied().fold(f64::INFINITY, f64::min);
            let loss = found.row_loss[row];
            prop_assert!(loss <= least + 1e-12 && loss >= least - (h as f64).ln() - 1e-12, "{} {}", loss, least);
            let r = &r[row * h..][..h];
            prop_assert!(r.iter().all(|r| *r > 0.0 && *r <= 1.0 + 1e-12));
            prop_assert!((r.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    /// L_tc knows neither a column's scale nor its offset; L_var moves by a logarithm. With the identity, a column of
    /// activations is scaled by its row of W and b, and moved by b.
    #[test]
    fn correlations_know_no_scale_and_no_offset(
        n in 3usize..9, h in 2usize..6, seed: u64, scale in 0.5f64..4.0, offset in -3.0f64..3.0, dual: bool,
    ) {
        let objective = Objective { lambda_lse: 0.0, variance_eps: 1e-12, ..Objective::default() };
        let problem = Problem { objective, ..problem([n, 4, h], Activation::Identity, seed) };
        let mut moved = problem.clone();
        moved.weight[..4].iter_mut().for_each(|w| *w *= scale);
        moved.bias[0] = moved.bias[0] * scale + offset;
        let form = if dual { sae_kernels::Form::Dual } else { sae_kernels::Form::Primal };
        let plan = Plan { correlation_form: form, ..Plan::default() };
        let (a, b) = (step(&problem, &plan).losses, step(&moved, &plan).losses);
        // The 1e-8 in s is of little consequence.
        close(&[a.tc], &[b.tc], 1e-6)?;
        close(&[a.var - 2.0 * scale.ln()], &[b.var], 1e-8)?;
        prop_assert!(a.tc >= 0.0 && a.tc <= (h * (h - 1)) as f64 + 1e-9);
    }

    #[test]
    fn micro_batches_are_of_no_consequence(n in 2usize..20, h in 1usize..7, block in 1usize..22, seed: u64, softplus: bool) {
        let activation = if softplus { Activation::Softplus } else { Activation::Relu };
        let problem = problem([n, 3, h], activation, seed);
        let whole = step(&problem, &Plan::default());
        let found = step(&problem, &Plan { block_rows: Some(block), ..Plan::default() });
        // A unit that is nearly dead has no well-determined correlations.
        let variances = common::step::finish(&whole.activations, n, h, problem.objective).variance;
        prop_assume!(variances.iter().all(|v| *v == 0.0 || *v > 1e-6));
        for (at, (_, gradient)) in found.gradients().into_iter().enumerate() {
            close(gradient, whole.gradients()[at].1, 1e-9)?;
        }
        close(&found.terms().map(|t| t.1), &whole.terms().map(|t| t.1), 1e-10)?;
    }
}

/// The settings' own arithmetic, which no backend sees.
#[test]
fn objectives_know_what_they_need() {
    use sae_kernels::{Form, Reduction};
    let only = |lambda_var, lambda_tc| Objective { lambda_var, lambda_tc, lambda_lse: 3.0, ..Objective::default() };
    assert!(!only(0.0, 0.0).needs_statistics());
    assert!(
        only(1.0, 0.0).needs_statistics() && only(0.0, 1.0).needs_statistics() && only(-1.0, 1.0).needs_statistics()
    );
    assert_eq!(only(0.0, 0.0).row_weight(6), 3.0);
    let mean = Objective { reduction: Reduction::Mean, ..only(0.0, 0.0) };
    assert_eq!((mean.row_weight(6), mean.row_weight(1), mean.row_weight(0)), (0.5, 3.0, 3.0));
    for (form, expected) in [(Form::Primal, [false; 3]), (Form::Dual, [true; 3]), (Form::Auto, [true, false, false])] {
        assert_eq!([7, 8, 9].map(|dual| form.is_dual(8, dual)), expected, "{form:?}");
    }
    let default = Objective::default();
    assert_eq!((default.lambda_lse, default.lambda_var, default.lambda_tc, default.lambda_wr), (1.0, 1.0, 1.0, 0.0));
    assert_eq!((default.variance_eps, default.reduction, default.normalize_weight), (1e-6, Reduction::Sum, true));
}
