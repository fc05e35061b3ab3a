//! [`WeightRedundancy`], in both forms.

use super::{Reference, dot};
use crate::error::Result;
use crate::matrix::MatMut;
use crate::operations::WeightRedundancy;

pub(super) fn weight_redundancy(mut args: WeightRedundancy<'_, Reference>) -> Result<()> {
    let (h, d) = args.check()?;
    let w = |j: usize, k: usize| args.weight.row(j)[k];
    let norm: Vec<f64> = (0..h).map(|j| dot(d, |k| w(j, k), |k| w(j, k)).sqrt()).collect();
    let divisor: Vec<f64> = norm.iter().map(|norm| if args.normalize { norm + 1e-8 } else { 1.0 }).collect();
    let unit = |j: usize, k: usize| w(j, k) / divisor[j];

    // dŴ = 4 G Ŵ = 4 (Ŵ P − Ŵ)
    let (loss, grad_unit): (f64, Box<dyn Fn(usize, usize) -> f64>) = if args.form.is_dual(h, d) {
        let p: Vec<Vec<f64>> =
            (0..d).map(|k| (0..d).map(|l| dot(h, |j| unit(j, k), |j| unit(j, l))).collect()).collect();
        write(&mut args.gram, &p);
        let squares: f64 = p.iter().flatten().map(|p| p * p).sum();
        let trace: f64 = (0..h).map(|j| dot(d, |k| unit(j, k), |k| unit(j, k))).sum();
        let grad = move |j: usize, k: usize| 4.0 * (dot(d, |l| unit(j, l), |l| p[l][k]) - unit(j, k));
        (squares - 2.0 * trace + h as f64, Box::new(grad))
    } else {
        let g: Vec<Vec<f64>> = (0..h)
            .map(|i| (0..h).map(|j| dot(d, |k| unit(i, k), |k| unit(j, k)) - f64::from(u8::from(i == j))).collect())
            .collect();
        write(&mut args.gram, &g);
        let squares = g.iter().flatten().map(|g| g * g).sum();
        (squares, Box::new(move |j: usize, k: usize| 4.0 * dot(h, |i| g[j][i], |i| unit(i, k))))
    };
    args.loss[0] = loss;

    if let Some(grad_weight) = &mut args.grad_weight {
        for j in 0..h {
            let along = dot(d, |k| grad_unit(j, k), |k| w(j, k));
            for (k, grad) in grad_weight.row_mut(j).iter_mut().enumerate() {
                let through_norm = if args.normalize && norm[j] > 0.0 {
                    w(j, k) * along / (norm[j] * divisor[j] * divisor[j])
                } else {
                    0.0
                };
                *grad += args.lambda * (grad_unit(j, k) / divisor[j] - through_norm);
            }
        }
    }
    Ok(())
}

fn write(gram: &mut MatMut<'_, f64>, values: &[Vec<f64>]) {
    for (i, row) in values.iter().enumerate() {
        gram.row_mut(i).copy_from_slice(row);
    }
}
