//! [`CorrelationDual`].

use super::{Reference, dot};
use crate::error::Result;
use crate::operations::CorrelationDual;

pub(super) fn correlation_dual(mut args: CorrelationDual<'_, Reference>) -> Result<()> {
    let (n, h) = args.check()?;
    let degrees = n as f64 - 1.0;
    let v = args.variance;
    let s: Vec<f64> = v.iter().map(|v| v.sqrt() + 1e-8).collect();
    let standardized = |row: usize, j: usize| {
        if v[j] == 0.0 { 0.0 } else { (args.activations.row(row)[j] - args.mean[j]) / s[j] }
    };
    let mut norm = 0.0;
    for m in 0..n {
        for row in 0..n {
            let k = dot(h, |j| standardized(m, j), |j| standardized(row, j)) / degrees;
            args.gram.row_mut(m)[row] = k;
            norm += k * k;
        }
    }
    args.loss[0] = norm;
    for j in 0..h {
        let c = v[j] / (s[j] * s[j]);
        let mut q = 0.0;
        for row in 0..n {
            let k = args.gram.row_mut(row);
            let product = dot(n, |m| k[m], |m| standardized(m, j)) - standardized(row, j) * c;
            q += standardized(row, j) * product / degrees;
            args.product.row_mut(row)[j] = 4.0 * args.lambda_tc / (degrees * s[j]) * product;
        }
        args.loss[0] -= c * c;
        if v[j] != 0.0 {
            args.scale[j] -= 4.0 * args.lambda_tc / degrees * q / (s[j] * v[j].sqrt());
        }
    }
    Ok(())
}
