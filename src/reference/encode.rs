//! [`Encode`], [`ActivationSums`] and [`Responsibilities`].

use super::{Reference, activate, dot};
use crate::error::Result;
use crate::operations::{ActivationSums, Encode, Moments, Responsibilities};

pub(super) fn encode(mut args: Encode<'_, Reference>) -> Result<()> {
    let (n, d, h) = args.check()?;
    let mut sums = Sums::new(args.row_loss, args.moments);
    for row in 0..n {
        let x = args.x.row(row);
        let a: Vec<f64> = (0..h)
            .map(|j| activate(args.activation, args.bias[j] + dot(d, |k| x[k], |k| args.weight.row(j)[k])))
            .collect();
        if let Some(activations) = &mut args.activations {
            activations.row_mut(row).copy_from_slice(&a);
        }
        sums.add(row, &a);
    }
    Ok(())
}

pub(super) fn activation_sums(args: ActivationSums<'_, Reference>) -> Result<()> {
    let (n, _) = args.check()?;
    let mut sums = Sums::new(args.row_loss, args.moments);
    (0..n).for_each(|row| sums.add(row, args.activations.row(row)));
    Ok(())
}

/// What is summed over a row, and over the rows.
struct Sums<'a> {
    row_loss: Option<&'a mut [f64]>,
    moments: Option<Moments<'a, Reference>>,
}

impl<'a> Sums<'a> {
    fn new(row_loss: Option<&'a mut [f64]>, mut moments: Option<Moments<'a, Reference>>) -> Self {
        if let Some(moments) = &mut moments
            && !moments.accumulate
        {
            moments.row_loss_sum.fill(0.0);
            moments.sum.fill(0.0);
            moments.sum_squares.fill(0.0);
        }
        Self { row_loss, moments }
    }

    fn add(&mut self, row: usize, a: &[f64]) {
        let loss = row_loss(a);
        if let Some(row_loss) = &mut self.row_loss {
            row_loss[row] = loss;
        }
        if let Some(moments) = &mut self.moments {
            moments.row_loss_sum[0] += loss;
            for (j, a) in a.iter().enumerate() {
                let centred = a - moments.shift.map_or(0.0, |c| c[j]);
                moments.sum[j] += centred;
                moments.sum_squares[j] += centred * centred;
            }
        }
    }
}

/// ℓ = −log Σ_j exp(−a_j) = m − log Σ_j exp(m − a_j), with m = min_j a_j (or 0 where that is infinite).
fn row_loss(a: &[f64]) -> f64 {
    let least = a.iter().copied().fold(f64::INFINITY, f64::min);
    let shift = if least.is_finite() { least } else { 0.0 };
    shift - a.iter().map(|a| (shift - a).exp()).sum::<f64>().ln()
}

pub(super) fn responsibilities(mut args: Responsibilities<'_, Reference>) -> Result<()> {
    let (n, h) = args.check()?;
    for row in 0..n {
        for j in 0..h {
            args.responsibilities.row_mut(row)[j] = (args.row_loss[row] - args.activations.row(row)[j]).exp();
        }
    }
    Ok(())
}
