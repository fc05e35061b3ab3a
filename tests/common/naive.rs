//! A plain implementation of the step in `f32`, storing in `E`: the yardstick for a backend's rounding errors.
//!
//! Straight loops, one accumulator a sum, the formulas as they stand; nothing is done for speed or accuracy but the two-pass
//! variance and the shift of the log-sum-exp.

use super::step::{Outcome, Problem};
use sae_kernels::{Element, Losses, Objective, Shape};

///
/// `dual`: as the operations of the dual form have it, the term's product is stored, with what the diagonal contributes to it.
pub fn step<E: Element>(problem: &Problem, dual: bool) -> Outcome {
    let Shape { rows: n, inputs: d, latents: h } = problem.shape;
    let store = |v: f32| E::from_f32(v).to_f32();
    let narrow = |v: &[f64]| v.iter().map(|v| *v as f32).collect::<Vec<f32>>();
    let (x, w, b) = (narrow(&problem.x), narrow(&problem.weight), narrow(&problem.bias));
    let Objective { lambda_var, lambda_tc, lambda_wr, variance_eps, .. } = problem.objective;
    let sum = |len: usize, f: &dyn Fn(usize) -> f32| (0..len).fold(0f32, |sum, k| sum + f(k));

    let mut a = vec![0f32; n * h];
    let mut row_loss = vec![0f32; n];
    for row in 0..n {
        for j in 0..h {
            let z = sum(d, &|k| x[row * d + k] * w[j * d + k]) + b[j];
            a[row * h + j] = store(z.max(0.0));
        }
        let least = a[row * h..][..h].iter().copied().fold(f32::INFINITY, f32::min);
        row_loss[row] = least - sum(h, &|j| (least - a[row * h + j]).exp()).ln();
    }

    let mut da = vec![0f32; n * h];
    let weight = problem.objective.row_weight(n as u64) as f32;
    for row in 0..n {
        for j in 0..h {
            da[row * h + j] = weight * (row_loss[row] - a[row * h + j]).exp();
        }
    }
    if problem.objective.needs_statistics() {
        let degrees = n as f32 - 1.0;
        let mean: Vec<f32> = (0..h).map(|j| sum(n, &|row| a[row * h + j]) / n as f32).collect();
        let centred: Vec<f32> = (0..n * h).map(|at| a[at] - mean[at % h]).collect();
        let v: Vec<f32> = (0..h).map(|j| sum(n, &|row| centred[row * h + j].powi(2)) / degrees).collect();
        let s: Vec<f32> = v.iter().map(|v| v.sqrt() + 1e-8).collect();
        let mut m = vec![0f32; h * h];
        let mut q = vec![0f32; h];
        for i in 0..h {
            for j in (0..h).filter(|j| *j != i) {
                let c = sum(n, &|row| centred[row * h + i] * centred[row * h + j]) / degrees / (s[i] * s[j]);
                m[i * h + j] = 4.0 * lambda_tc as f32 / degrees * c / (s[i] * s[j]);
                q[i] += c * c;
            }
        }
        for j in 0..h {
            let tc = if v[j] == 0.0 { 0.0 } else { 4.0 * lambda_tc as f32 * q[j] / (s[j] * v[j].sqrt()) };
            let scale = -(tc + 2.0 * lambda_var as f32 / (v[j] + variance_eps as f32)) / degrees;
            let diagonal = if dual { 4.0 * lambda_tc as f32 / degrees * v[j] / s[j].powi(4) } else { 0.0 };
            for row in 0..n {
                let own = centred[row * h + j];
                let product = sum(h, &|i| centred[row * h + i] * m[i * h + j]) + diagonal * own;
                da[row * h + j] += if dual { store(product) } else { product } + own * (scale - diagonal);
            }
        }
    }
    let dz: Vec<f32> = (0..n * h).map(|at| store(if a[at] > 0.0 { da[at] } else { 0.0 })).collect();
    let mut grad_weight: Vec<f32> =
        (0..h * d).map(|at| sum(n, &|row| dz[row * h + at / d] * x[row * d + at % d])).collect();
    let grad_bias: Vec<f32> = (0..h).map(|j| sum(n, &|row| dz[row * h + j])).collect();
    let grad_x: Vec<f32> = (0..n * d).map(|at| sum(h, &|j| dz[at / d * h + j] * w[j * d + at % d])).collect();
    if lambda_wr != 0.0 {
        let norm: Vec<f32> = (0..h).map(|j| sum(d, &|k| w[j * d + k].powi(2)).sqrt()).collect();
        let divisor = |j: usize| if problem.objective.normalize_weight { norm[j] + 1e-8 } else { 1.0 };
        let unit: Vec<f32> = (0..h * d).map(|at| w[at] / divisor(at / d)).collect();
        for j in 0..h {
            let g: Vec<f32> =
                (0..h).map(|i| sum(d, &|k| unit[j * d + k] * unit[i * d + k]) - f32::from(u8::from(i == j))).collect();
            let du: Vec<f32> = (0..d).map(|k| 4.0 * sum(h, &|i| g[i] * unit[i * d + k])).collect();
            let along = if problem.objective.normalize_weight && norm[j] > 0.0 {
                sum(d, &|k| du[k] * w[j * d + k]) / (norm[j] * divisor(j).powi(2))
            } else {
                0.0
            };
            for k in 0..d {
                grad_weight[j * d + k] += lambda_wr as f32 * (du[k] / divisor(j) - w[j * d + k] * along);
            }
        }
    }
    let widen = |v: Vec<f32>| v.into_iter().map(f64::from).collect();
    Outcome {
        activations: widen(a),
        row_loss: widen(row_loss),
        losses: Losses::default(),
        grad_weight: widen(grad_weight),
        grad_bias: widen(grad_bias),
        grad_x: widen(grad_x),
    }
}
