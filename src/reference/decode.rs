//! [`Decode`] and [`DecodeBackward`].

use super::{Reference, derivative, dot};
use crate::error::Result;
use crate::operations::{Decode, DecodeBackward};

pub(super) fn decode(mut args: Decode<'_, Reference>) -> Result<()> {
    let (n, d, h) = args.check()?;
    if !args.accumulate {
        args.squared_error[0] = 0.0;
    }
    for row in 0..n {
        let a = args.activations.row(row);
        for k in 0..d {
            let reconstruction = args.bias[k] + dot(h, |j| a[j], |j| args.weight.row(j)[k]);
            let error = reconstruction - args.x.row(row)[k];
            args.squared_error[0] += error * error;
            if let Some(out) = &mut args.reconstruction {
                out.row_mut(row)[k] = reconstruction;
            }
            if let Some(out) = &mut args.residual {
                out.row_mut(row)[k] = args.residual_weight * error;
            }
        }
    }
    Ok(())
}

pub(super) fn decode_backward(mut args: DecodeBackward<'_, Reference>) -> Result<()> {
    let (n, d, h) = args.check()?;
    if !args.accumulate {
        args.grad_bias.fill(0.0);
    }
    for row in 0..n {
        let residual = args.residual.row(row);
        for j in 0..h {
            let a = args.activations.row(row)[j];
            let sign = if a == 0.0 { 0.0 } else { a.signum() };
            let da = dot(d, |k| residual[k], |k| args.weight.row(j)[k]) + args.l1 * sign;
            let slope = derivative(args.activation, a);
            let dz = if slope == 0.0 { 0.0 } else { da * slope };
            args.dz.row_mut(row)[j] = dz;
            args.grad_bias[j] += dz;
        }
    }
    Ok(())
}
