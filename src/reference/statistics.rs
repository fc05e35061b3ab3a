//! [`Recentre`], [`Comoments`], [`PackStatistics`], [`UnpackStatistics`] and [`FinishStatistics`].

use super::Reference;
use crate::error::Result;
use crate::matrix::{MatMut, MatRef};
use crate::operations::{Comoments, Covariance, FinishStatistics, PackStatistics, Recentre, UnpackStatistics};

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

/// Σ(a_i − c'_i)(a_j − c'_j) less Σ(a_i − c_i)(a_j − c_j), for δ = c − c'.
fn moved(count: f64, sum: &[f64], delta: &[f64], i: usize, j: usize) -> f64 {
    delta[i] * sum[j] + sum[i] * delta[j] + count * delta[i] * delta[j]
}

pub(super) fn pack_statistics(args: PackStatistics<'_, Reference>) -> Result<()> {
    let h = args.check()?;
    let n = args.count as f64;
    let delta: Vec<f64> = (0..h).map(|j| args.shift[j] - args.packed_shift.map_or(0.0, |shift| shift[j])).collect();
    let mut packed = vec![n, args.row_loss_sum[0]];
    packed.extend((0..h).map(|j| args.sum[j] + n * delta[j]));
    for i in 0..h {
        for j in i..if args.comoments.is_some() { h } else { i + 1 } {
            let product = args.comoments.map_or(args.sum_squares[i], |comoments| comoments.row(i)[j]);
            packed.push(product + moved(n, args.sum, &delta, i, j));
        }
    }
    for (sum, term) in args.packed.iter_mut().zip(packed) {
        *sum = term + if args.accumulate { *sum } else { 0.0 };
    }
    Ok(())
}

pub(super) fn unpack_statistics(mut args: UnpackStatistics<'_, Reference>) -> Result<()> {
    let (h, full) = args.check()?;
    let n = args.packed[0];
    args.row_loss_sum[0] = args.packed[1];
    let (sum, products) = args.packed[2..].split_at(h);
    let before = |j: usize| args.packed_shift.map_or(0.0, |shift| shift[j]);
    for (j, shift) in args.shift.iter_mut().enumerate() {
        *shift = if n == 0.0 { 0.0 } else { before(j) + sum[j] / n };
    }
    let delta: Vec<f64> = (0..h).map(|j| before(j) - args.shift[j]).collect();
    let mut products = products.iter();
    for i in 0..h {
        args.sum[i] = sum[i] + n * delta[i];
        for (j, product) in (i..if full { h } else { i + 1 }).zip(&mut products) {
            let product = product + moved(n, sum, &delta, i, j);
            if i == j {
                args.sum_squares[i] = product;
            }
            if let Some(comoments) = &mut args.comoments {
                comoments.row_mut(i)[j] = product;
            }
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
