//! [`BackwardDz`].

use super::{Reference, derivative, dot};
use crate::error::Result;
use crate::operations::{BackwardDz, CorrelationTerm};

pub(super) fn backward_dz(mut args: BackwardDz<'_, Reference>) -> Result<()> {
    let (n, h) = args.check()?;
    if !args.accumulate {
        args.grad_bias.fill(0.0);
    }
    for row in 0..n {
        let a = args.activations.row(row);
        for j in 0..h {
            let mut da = if args.row_weight == 0.0 { 0.0 } else { args.row_weight * (args.row_loss[row] - a[j]).exp() };
            if let Some(statistics) = &args.statistics {
                let mean = statistics.mean;
                da += (a[j] - mean[j]) * statistics.scale[j];
                da += match &statistics.correlation {
                    CorrelationTerm::None => 0.0,
                    CorrelationTerm::Primal { coupling, offset } => {
                        dot(h, |i| a[i] - mean[i], |i| coupling.row(i)[j]) - offset[j]
                    }
                    CorrelationTerm::Dual => args.dz.row_mut(row)[j],
                };
            }
            // A unit that is off passes nothing, not even what is not a number.
            let slope = derivative(args.activation, a[j]);
            let dz = if slope == 0.0 { 0.0 } else { da * slope };
            args.dz.row_mut(row)[j] = dz;
            args.grad_bias[j] += dz;
        }
    }
    Ok(())
}
