//! Measures of a trained model, by the paper's conventions.

use super::matmul::{Operand, matmul};
use sae_kernels::Statistics;

/// A latent whose variance over the evaluation set is below this is dead.
pub const DEAD_VARIANCE: f64 = 0.01;
/// An activation above this is active.
pub const ACTIVE: f32 = 0.01;
/// Rows that are reconstructed at a time.
const BLOCK: usize = 512;

/// Latents with a variance below [`DEAD_VARIANCE`].
pub fn dead_units(statistics: &Statistics) -> usize {
    (0..statistics.latents()).filter(|j| statistics.variance(*j) < DEAD_VARIANCE).count()
}

/// Σ_{i≠j} C_ij²: L_tc of the evaluation set's activations. Needs full statistics.
pub fn redundancy(statistics: &Statistics) -> f64 {
    let h = statistics.latents();
    let deviation: Vec<f64> = (0..h).map(|j| statistics.variance(j).sqrt() + 1e-8).collect();
    let pairs = (0..h).flat_map(|i| (i + 1..h).map(move |j| (i, j)));
    2.0 * pairs.map(|(i, j)| (statistics.covariance(i, j) / (deviation[i] * deviation[j])).powi(2)).sum::<f64>()
}

/// Mean over the rows of −Σ_j r log(r + 1e-8), r = softmax(−a); `activations` is \[N,H\], the result is in nats.
pub fn responsibility_entropy(activations: &[f32], latents: usize) -> f64 {
    let rows = activations.len() / latents;
    let entropy = |a: &[f32]| -> f64 {
        let least = a.iter().copied().fold(f32::INFINITY, f32::min);
        let weight: Vec<f64> = a.iter().map(|a| f64::from(least - a).exp()).collect();
        let sum: f64 = weight.iter().sum();
        weight.iter().map(|w| -(w / sum) * (w / sum + 1e-8).ln()).sum()
    };
    activations.chunks_exact(latents).map(entropy).sum::<f64>() / rows as f64
}

/// Mean over the rows of the number of |a| above [`ACTIVE`].
pub fn l0(activations: &[f32], latents: usize) -> f64 {
    let active = activations.iter().filter(|a| a.abs() > ACTIVE).count();
    active as f64 / (activations.len() / latents) as f64
}

/// Mean over rows and inputs of (x̂ − x)², x̂ = (a/‖a‖)·W rescaled to ‖x‖; a row without direction has x̂ = 0.
///
/// `x` is \[N,D\], `activations` \[N,H\], `weight` \[H,D\]. (The first norm cancels in the second.)
pub fn normalised_reconstruction_mse(x: &[f32], activations: &[f32], weight: &[f32], latents: usize) -> f64 {
    mean_squared_error(x, activations, weight, latents, |x, product| {
        let norm = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let length = norm(product);
        let scale = if length == 0.0 { 0.0 } else { norm(x) / length };
        product.iter_mut().for_each(|p| *p = (f64::from(*p) * scale) as f32);
    })
}

/// Mean over rows and inputs of (x̂ − x)², x̂ = a·W + b with the decoder's weight \[H,D\] and bias \[D\].
pub fn decoder_mse(x: &[f32], activations: &[f32], weight: &[f32], bias: &[f32], latents: usize) -> f64 {
    mean_squared_error(x, activations, weight, latents, |_, product| {
        product.iter_mut().zip(bias).for_each(|(p, b)| *p += b);
    })
}

/// Mean of (x̂ − x)², x̂ made of x and a·W by `finish`, row by row.
fn mean_squared_error(
    x: &[f32],
    activations: &[f32],
    weight: &[f32],
    latents: usize,
    finish: impl Fn(&[f32], &mut [f32]),
) -> f64 {
    let inputs = weight.len() / latents;
    let mut sum = 0.0;
    for (x, a) in x.chunks(BLOCK * inputs).zip(activations.chunks(BLOCK * latents)) {
        let rows = a.len() / latents;
        let mut product = vec![0.0; rows * inputs];
        matmul(Operand::new(a, rows, latents), Operand::new(weight, latents, inputs), false, &mut product);
        for (x, product) in x.chunks_exact(inputs).zip(product.chunks_exact_mut(inputs)) {
            finish(x, product);
            sum += x.iter().zip(&*product).map(|(x, p)| f64::from(p - x).powi(2)).sum::<f64>();
        }
    }
    sum / x.len() as f64
}
