//! The linear probe: multinomial logistic regression on frozen features, as scikit-learn's `LogisticRegression(C=1)`.
//!
//! ```text
//! minimise over V [K,H], c [K]:   (1/N) Σ_n [log Σ_k exp(s_nk) − s_n,y(n)] + ‖V‖²/(2·C·N)        s = f Vᵀ + c
//! ```
//!
//! f are the features, standardised by mean and deviation of the training set; the intercept c is not penalised.
//! scikit-learn writes the same objective times C·N.

use super::lbfgs;
use super::matmul::{Operand, matmul};
use anyhow::{Result, ensure};

/// C of the penalty: scikit-learn's default.
const C: f64 = 1.0;
/// Largest element of the gradient of the mean loss at which the search ends; scikit-learn's default is 1e-4.
const TOLERANCE: f64 = 1e-5;
/// More than any of the searches has needed.
const ITERATIONS: usize = 2000;
/// Rows whose scores are kept at a time: they stay in the cache.
const BLOCK: usize = 512;

/// Features with labels.
#[derive(Clone, Copy)]
pub struct Labelled<'a> {
    /// f \[N,H\], row by row.
    pub features: &'a [f32],
    /// Class of each row \[N\].
    pub labels: &'a [u8],
}

/// What the probe found.
#[derive(Debug, Clone)]
pub struct Probe {
    /// Share of the test rows whose class has the largest score, 0 to 1.
    pub accuracy: f64,
    /// Iterations of L-BFGS.
    pub iterations: usize,
    /// Whether the gradient came below the tolerance.
    pub converged: bool,
}

/// Fits on `train` and measures on `test`; `latents` is H. One thread, and the same bits each time.
pub fn probe(train: Labelled<'_>, test: Labelled<'_>, latents: usize) -> Result<Probe> {
    for (name, part) in [("training", train), ("test", test)] {
        let rows = part.labels.len();
        ensure!(rows > 0, "the probe's {name} set is empty");
        ensure!(part.features.len() == rows * latents, "the probe's {name} set has not one feature row for each label");
    }
    let classes = train.labels.iter().chain(test.labels).copied().max().map_or(0, |last| usize::from(last) + 1);
    let (mean, inverse_deviation) = standardisation(train.features, latents);
    let standardise = |features: &[f32]| -> Vec<f32> {
        let column =
            |(at, f): (usize, &f32)| ((f64::from(*f) - mean[at % latents]) * inverse_deviation[at % latents]) as f32;
        features.iter().enumerate().map(column).collect()
    };
    let features = standardise(train.features);

    let start = vec![0.0; classes * (latents + 1)];
    let minimum = lbfgs::minimise(start, TOLERANCE, ITERATIONS, |parameters, gradient| {
        loss(&features, train.labels, parameters, latents, classes, gradient)
    });
    let features = standardise(test.features);
    let right = correct(&features, test.labels, &minimum.point, latents, classes);
    Ok(Probe {
        accuracy: right as f64 / test.labels.len() as f64,
        iterations: minimum.iterations,
        converged: minimum.converged,
    })
}

/// Mean and 1/deviation of each column; a constant column gets 0, so it is left at 0.
fn standardisation(features: &[f32], latents: usize) -> (Vec<f64>, Vec<f64>) {
    let rows = (features.len() / latents) as f64;
    let mut mean = vec![0.0; latents];
    for row in features.chunks_exact(latents) {
        for (mean, f) in mean.iter_mut().zip(row) {
            *mean += f64::from(*f) / rows;
        }
    }
    let mut variance = vec![0.0; latents];
    for row in features.chunks_exact(latents) {
        for ((variance, f), mean) in variance.iter_mut().zip(row).zip(&mean) {
            *variance += (f64::from(*f) - mean).powi(2) / rows;
        }
    }
    // Rounding of the mean leaves a constant column a variance of about (1e-16·mean)²: that is not a signal.
    let inverse = variance
        .iter()
        .zip(&mean)
        .map(|(variance, mean)| if *variance <= (1e-12 * mean).powi(2) { 0.0 } else { 1.0 / variance.sqrt() });
    (mean.clone(), inverse.collect())
}

/// The objective, and its gradient; parameters are V \[K,H\] and then c \[K\].
fn loss(
    features: &[f32],
    labels: &[u8],
    parameters: &[f64],
    latents: usize,
    classes: usize,
    gradient: &mut [f64],
) -> f64 {
    let (weight, _) = parameters.split_at(classes * latents);
    let rows = labels.len() as f64;
    let mut total = 0.0;
    let mut intercept_gradient = vec![0.0f64; classes];
    let mut weight_gradient = vec![0.0f64; classes * latents];
    let mut block_gradient = vec![0.0f32; classes * latents];
    for_blocks(features, labels, parameters, latents, classes, |features, labels, scores| {
        for (scores, label) in scores.chunks_exact_mut(classes).zip(labels) {
            let label = usize::from(*label);
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let of_label = scores[label] - largest;
            scores.iter_mut().for_each(|s| *s = (*s - largest).exp());
            let sum: f32 = scores.iter().sum();
            total += f64::from(sum.ln() - of_label);
            // From scores to ∂/∂scores.
            scores.iter_mut().for_each(|s| *s /= sum);
            scores[label] -= 1.0;
            for (sum, s) in intercept_gradient.iter_mut().zip(&*scores) {
                *sum += f64::from(*s);
            }
        }
        let scores = Operand::new(scores, labels.len(), classes);
        matmul(scores.transposed(), Operand::new(features, labels.len(), latents), false, &mut block_gradient);
        for (sum, g) in weight_gradient.iter_mut().zip(&block_gradient) {
            *sum += f64::from(*g);
        }
    });
    let penalty = 1.0 / (C * rows);
    let (to_weight, to_intercept) = gradient.split_at_mut(classes * latents);
    for ((to, sum), w) in to_weight.iter_mut().zip(&weight_gradient).zip(weight) {
        *to = sum / rows + penalty * w;
    }
    for (to, sum) in to_intercept.iter_mut().zip(&intercept_gradient) {
        *to = sum / rows;
    }
    total / rows + 0.5 * penalty * weight.iter().map(|w| w * w).sum::<f64>()
}

/// Rows whose largest score is their label's.
fn correct(features: &[f32], labels: &[u8], parameters: &[f64], latents: usize, classes: usize) -> usize {
    let mut right = 0;
    for_blocks(features, labels, parameters, latents, classes, |_, labels, scores| {
        for (scores, label) in scores.chunks_exact(classes).zip(labels) {
            let best = (0..classes).fold(0, |best, k| if scores[k] > scores[best] { k } else { best });
            right += usize::from(best == usize::from(*label));
        }
    });
    right
}

/// Calls `each` with every block's features, labels and scores \[rows,K\].
fn for_blocks(
    features: &[f32],
    labels: &[u8],
    parameters: &[f64],
    latents: usize,
    classes: usize,
    mut each: impl FnMut(&[f32], &[u8], &mut [f32]),
) {
    let parameters: Vec<f32> = parameters.iter().map(|p| *p as f32).collect();
    let (weight, intercept) = parameters.split_at(classes * latents);
    let weight = Operand::new(weight, classes, latents).transposed();
    let mut scores = Vec::new();
    for (features, labels) in features.chunks(BLOCK * latents).zip(labels.chunks(BLOCK)) {
        scores.clear();
        for _ in labels {
            scores.extend_from_slice(intercept);
        }
        matmul(Operand::new(features, labels.len(), latents), weight, true, &mut scores);
        each(features, labels, &mut scores);
    }
}
