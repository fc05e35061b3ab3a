//! [`Recentre`], [`Comoments`] and [`FinishStatistics`].

use super::Reference;
use crate::error::Result;
use crate::matrix::{MatMut, MatRef};
use crate::operations::{Comoments, Covariance, FinishStatistics, Recentre};

pub(super) fn recentre(args: Recentre<'_, Reference>) -> Result<()> {
    let (n, h) = args.check()?;
    for j in 0..h {
        args.shift[j] = if n == 0 { 0.0 } else { args.sum[j] / n as f64 };
        let centred = |row: usize| args.activations.row(row)[j] - args.shift[j];
        args.sum[j] = (0..n).map(centred).sum();
        args.sum_squares[j] = (0..n).map(|row| centred(row) * centred(row)).sum();
    }
    Ok(())
}

pub(super) fn comoments(mut args: Comoments<'_, Reference>) -> Result<()> {
    let (n, h) = args.check()?;
    for i in 0..h {
        for j in i..h {
            let centred = |row: usize, j: usize| args.activations.row(row)[j] - args.shift[j];
            let sum: f64 = (0..n).map(|row| centred(row, i) * centred(row, j)).sum();
            let before = if args.accumulate { args.comoments.row_mut(i)[j] } else { 0.0 };
            args.comoments.row_mut(i)[j] = before + sum;
        }
    }
    Ok(())
}

pub(super) fn finish_statistics(args: FinishStatistics<'_, Reference>) -> Result<()> {
    let h = args.check()?;
    let objective = &args.objective;
    let n = args.count as f64;
    let mut sums = Vec::new();
    let comoments = match &args.primal {
        None => None,
        Some(primal) => {
            match primal.covariance {
                Covariance::InPlace => (0..h).for_each(|j| sums.extend(primal.coupling.as_ref().row(j))),
                Covariance::Activations(activations) => {
                    sums.resize(h * h, 0.0);
                    let (shift, comoments) = (args.shift, MatMut::new(&mut sums, h, h)?);
                    let workspace = &mut [];
                    self::comoments(Comoments { activations, shift, accumulate: false, comoments, workspace })?;
                }
            }
            Some(MatRef::new(&sums, h, h)?)
        }
    };
    for j in 0..h {
        let sum_squares = comoments.map_or(args.sum_squares[j], |comoments| comoments.row(j)[j]);
        args.mean[j] = args.shift[j] + args.sum[j] / n;
        args.variance[j] = ((sum_squares - args.sum[j] * args.sum[j] / n) / (n - 1.0)).clamp(0.0, f64::INFINITY);
    }
    let v = &*args.variance;
    let s: Vec<f64> = v.iter().map(|v| v.sqrt() + 1e-8).collect();
    let mut q = vec![0.0; h];
    if let (Some(mut primal), Some(comoments)) = (args.primal, comoments) {
        for i in 0..h {
            primal.offset[i] = 0.0;
            for j in 0..h {
                let comoment = comoments.row(i.min(j))[i.max(j)];
                let covariance = (comoment - args.sum[i] * args.sum[j] / n) / (n - 1.0);
                let dead = v[i] == 0.0 || v[j] == 0.0;
                let correlation = if i == j || dead { 0.0 } else { covariance / (s[i] * s[j]) };
                let m = if i == j { 0.0 } else { 4.0 * objective.lambda_tc / (n - 1.0) * correlation / (s[i] * s[j]) };
                q[i] += correlation * correlation;
                primal.coupling.row_mut(i)[j] = m;
                // The product is taken of a − mean, and mean is μ to the last bit but one.
                primal.offset[i] += m * (args.shift[j] + args.sum[j] / n - args.mean[j]);
            }
        }
    }
    args.losses[0] = -v.iter().map(|v| (v + objective.variance_eps).ln()).sum::<f64>();
    args.losses[1] = q.iter().sum();
    for j in 0..h {
        let correlation = if v[j] == 0.0 { 0.0 } else { 4.0 * objective.lambda_tc * q[j] / (s[j] * v[j].sqrt()) };
        let variance = 2.0 * objective.lambda_var / (v[j] + objective.variance_eps);
        args.scale[j] = -(correlation + variance) / (n - 1.0);
    }
    Ok(())
}
