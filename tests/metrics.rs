//! Measures of a trained model against their definitions, on small cases that can be checked by hand.

#[path = "../examples/common/mod.rs"]
mod common;

use common::lbfgs;
use common::matmul::{Operand, matmul};
use common::metrics::{dead_units, decoder_mse, l0, normalised_reconstruction_mse, redundancy, responsibility_entropy};
use common::probe::{Labelled, probe};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use sae_kernels::Statistics;

fn statistics(rows: &[&[f64]]) -> Statistics {
    let mut statistics = Statistics::new(rows[0].len(), true);
    rows.iter().for_each(|row| statistics.add_row(0.0, row));
    statistics
}

fn close(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance, "{found} is not {expected} ± {tolerance}");
}

#[test]
fn dead_units_are_those_of_small_variance() {
    // Unbiased variances of two rows ±t are 2t²: 0, 0.0098, 0.0102 and 2.
    let found = statistics(&[&[5.0, 0.07, 0.0714, 1.0], &[5.0, -0.07, -0.0714, -1.0]]);
    assert_eq!(dead_units(&found), 2);
}

#[test]
fn redundancy_is_the_sum_of_squared_correlations() {
    // Columns 0 and 1 have correlation −1/2, the dead column 2 none; both (i, j) and (j, i) count.
    let found = statistics(&[&[0.0, 1.0, 3.0], &[1.0, 1.0, 3.0], &[2.0, 0.0, 3.0], &[1.0, 0.0, 3.0], &[1.0, 0.5, 3.0]]);
    let correlation = -0.25 / (0.5f64.sqrt() * 0.25f64.sqrt());
    close(redundancy(&found), 2.0 * correlation * correlation, 1e-6);
    // Two copies of a column: C_ij = 1 twice.
    close(redundancy(&statistics(&[&[1.0, 1.0], &[2.0, 2.0], &[4.0, 4.0]])), 2.0, 1e-6);
}

#[test]
fn entropy_of_responsibilities() {
    // Equal activations: log 4, whatever they are.
    close(responsibility_entropy(&[0.0; 8], 4), 4f64.ln(), 1e-6);
    close(responsibility_entropy(&[300.0; 4], 4), 4f64.ln(), 1e-6);
    // One latent far below the others takes all; r = softmax(−a), so it is the smallest that does.
    close(responsibility_entropy(&[0.0, 50.0, 50.0], 3), 0.0, 1e-6);
    // r = (2/3, 1/3).
    let expected = -(2.0 / 3.0) * (2.0f64 / 3.0).ln() - (1.0 / 3.0) * (1.0f64 / 3.0).ln();
    close(responsibility_entropy(&[0.0, 2f32.ln()], 2), expected, 1e-6);
    // The mean over rows.
    close(responsibility_entropy(&[0.0, 0.0, 0.0, 90.0], 2), 2f64.ln() / 2.0, 1e-6);
}

#[test]
fn l0_counts_what_is_above_a_hundredth() {
    close(l0(&[0.0, 0.009, 0.011, 1.0, -0.5, 0.0, 0.0, 0.0], 4), 1.5, 0.0);
}

#[test]
fn reconstructions() {
    // D = 2, H = 2, W = [[3, 0], [0, 4]].
    let weight = [3.0, 0.0, 0.0, 4.0];
    // Row 0: a = (1, 0) gives the direction (1, 0), rescaled to ‖x‖ = 5 against x = (3, 4): error (2, −4).
    // Row 1: a = 0 has no direction: x̂ = 0 against x = (0, 2).
    let (x, a) = ([3.0, 4.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0]);
    close(normalised_reconstruction_mse(&x, &a, &weight, 2), (4.0 + 16.0 + 4.0) / 4.0, 1e-6);
    // The decoder: x̂ = (3, 0) + b and b, b = (1, −1).
    close(decoder_mse(&x, &a, &weight, &[1.0, -1.0], 2), (1.0 + 25.0 + 1.0 + 9.0) / 4.0, 1e-6);
}

#[test]
fn reconstruction_in_blocks() {
    // 1030 rows make three blocks; each row is reconstructed wholly wrong by 1 in one of two inputs.
    let (x, a) = (vec![0.0; 2 * 1030], vec![1.0; 1030]);
    close(decoder_mse(&x, &a, &[1.0, 0.0], &[0.0, 0.0], 1), 0.5, 1e-9);
}

#[test]
fn products_of_every_orientation() {
    let (left, right) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, 2.0, 1.0, 0.0, 3.0]);
    let mut out = [10.0; 4];
    matmul(Operand::new(&left, 2, 3), Operand::new(&right, 3, 2), false, &mut out);
    assert_eq!(out, [5.0, 11.0, 14.0, 23.0]);
    matmul(Operand::new(&left, 3, 2).transposed(), Operand::new(&right, 2, 3).transposed(), true, &mut out);
    assert_eq!(out, [5.0 + 11.0, 11.0 + 16.0, 14.0 + 14.0, 23.0 + 20.0]);
}

#[test]
fn lbfgs_finds_the_minimum_of_a_hard_valley() {
    // Rosenbrock's function in 6 variables: the minimum is 0 at (1, …, 1), behind a curved valley.
    let found = lbfgs::minimise(vec![-1.2, 1.0, -1.2, 1.0, -1.2, 1.0], 1e-9, 1000, |x, gradient| {
        gradient.fill(0.0);
        let mut value = 0.0;
        for i in 0..x.len() - 1 {
            let (a, b) = (1.0 - x[i], x[i + 1] - x[i] * x[i]);
            value += a * a + 100.0 * b * b;
            gradient[i] += -2.0 * a - 400.0 * x[i] * b;
            gradient[i + 1] += 200.0 * b;
        }
        value
    });
    assert!(found.converged && found.value < 1e-15, "{found:?}");
    assert!(found.point.iter().all(|x| (x - 1.0).abs() < 1e-8), "{found:?}");
}

#[test]
fn lbfgs_stops_at_its_limits() {
    let square = |x: &[f64], gradient: &mut [f64]| {
        gradient[0] = 2.0 * x[0];
        x[0] * x[0]
    };
    let found = lbfgs::minimise(vec![3.0], 0.0, 2, square);
    assert!(found.iterations <= 2);
    assert_eq!(lbfgs::minimise(vec![0.0], 1e-9, 5, square).iterations, 0);
}

/// Three classes around three corners of a cube, with a constant third feature.
fn corners(rows: usize, seed: u64) -> (Vec<f32>, Vec<u8>) {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let (mut features, mut labels) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let label = (row % 3) as u8;
        let centre = [[0.0, 0.0], [300.0, 0.0], [0.0, 0.3]][usize::from(label)];
        features.push(centre[0] + rng.random_range(-60.0f32..60.0));
        features.push(centre[1] + rng.random_range(-0.06f32..0.06));
        features.push(7.0);
        labels.push(label);
    }
    (features, labels)
}

#[test]
fn probe_separates_classes_whatever_the_scale_of_the_features() {
    let ((train, train_labels), (test, test_labels)) = (corners(600, 1), corners(300, 2));
    let train = Labelled { features: &train, labels: &train_labels };
    let test = Labelled { features: &test, labels: &test_labels };
    let found = probe(train, test, 3).unwrap();
    assert!(found.converged);
    assert_eq!(found.accuracy, 1.0);
    assert_eq!(probe(train, test, 3).unwrap().accuracy, found.accuracy);
}

#[test]
fn probe_of_features_that_say_nothing_guesses_the_commonest_class() {
    let labels: Vec<u8> = (0..100).map(|i| u8::from(i % 4 == 0)).collect();
    let part = Labelled { features: &[1.0; 200], labels: &labels };
    close(probe(part, part, 2).unwrap().accuracy, 0.75, 0.0);
}

#[test]
fn probe_refuses_sets_that_do_not_fit() {
    let (features, labels) = corners(30, 1);
    let whole = Labelled { features: &features, labels: &labels };
    assert!(probe(Labelled { features: &[], labels: &[] }, whole, 3).is_err());
    assert!(probe(whole, Labelled { features: &features[1..], labels: &labels }, 3).is_err());
}
