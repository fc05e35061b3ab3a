//! [`Sgd`] and [`Adam`].

use super::Reference;
use crate::error::Result;
use crate::operations::{Adam, Sgd};

pub(super) fn sgd(args: Sgd<'_, Reference>) -> Result<()> {
    let len = args.check()?;
    let config = args.config;
    for i in 0..len {
        let gradient = args.gradient[i] + config.weight_decay * args.parameters[i];
        let velocity = if config.momentum == 0.0 {
            gradient
        } else {
            args.velocity[i] = config.momentum * args.velocity[i] + gradient;
            args.velocity[i]
        };
        args.parameters[i] -= config.learning_rate * velocity;
    }
    if let Some(storage) = args.storage {
        storage.copy_from_slice(args.parameters);
    }
    Ok(())
}

pub(super) fn adam(args: Adam<'_, Reference>) -> Result<()> {
    let len = args.check()?;
    let config = args.config;
    let (t, lr) = (args.step as f64, config.learning_rate);
    for i in 0..len {
        let gradient = args.gradient[i];
        args.parameters[i] -= lr * config.weight_decay * args.parameters[i];
        args.first_moment[i] = config.beta1 * args.first_moment[i] + (1.0 - config.beta1) * gradient;
        args.second_moment[i] = config.beta2 * args.second_moment[i] + (1.0 - config.beta2) * gradient * gradient;
        let first = args.first_moment[i] / (1.0 - config.beta1.powf(t));
        let second = args.second_moment[i] / (1.0 - config.beta2.powf(t));
        args.parameters[i] -= lr * first / (second.sqrt() + config.eps);
    }
    if let Some(storage) = args.storage {
        storage.copy_from_slice(args.parameters);
    }
    Ok(())
}
