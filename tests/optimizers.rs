//! Optimisers: trajectories against PyTorch's formulas, here and as numbers that a script of its documentation's algorithms gave; the
//! copy in the storage type.

#[macro_use]
mod common;

use common::{Guarded, HostBackend, Place, Under, assert_within, rng, rounded, uniform};
use sae_kernels::operations::{Adam, AdamConfig, Sgd, SgdConfig};

on_every_backend!(sgd_follows_the_formula, adam_follows_the_formula, sgd_gives_known_numbers, adam_gives_known_numbers);

/// A parameter vector with its optimiser's two state vectors, in guarded memory, on a backend.
struct State<B: HostBackend> {
    parameters: Guarded<B::Real>,
    first: Guarded<B::Real>,
    second: Guarded<B::Real>,
    storage: Guarded<B::Element>,
}

impl<B: HostBackend> State<B> {
    fn new(place: Place, parameters: &[f64]) -> Self {
        let zeros = vec![0.0; parameters.len()];
        Self {
            parameters: Guarded::vector(place, parameters),
            first: Guarded::vector(place, &zeros),
            second: Guarded::vector(place, &zeros),
            storage: Guarded::vector_or_poison(place, parameters.len(), None),
        }
    }

    fn sgd(&mut self, under: &Under<B>, config: SgdConfig, gradient: &[f64]) {
        let gradient = Guarded::<B::Real>::vector(Place::STRIDED, gradient);
        let velocity = if config.momentum == 0.0 { &mut [][..] } else { self.first.slice_mut() };
        let storage = Some(self.storage.slice_mut());
        let parameters = self.parameters.slice_mut();
        under.backend.sgd(Sgd { config, gradient: gradient.slice(), velocity, parameters, storage }).unwrap();
        self.check(under, "sgd");
    }

    fn adam(&mut self, under: &Under<B>, config: AdamConfig, step: u64, gradient: &[f64]) {
        let gradient = Guarded::<B::Real>::vector(Place::STRIDED, gradient);
        let args = Adam {
            config,
            step,
            gradient: gradient.slice(),
            first_moment: self.first.slice_mut(),
            second_moment: self.second.slice_mut(),
            parameters: self.parameters.slice_mut(),
            storage: Some(self.storage.slice_mut()),
        };
        under.backend.adam(args).unwrap();
        self.check(under, "adam");
    }

    /// The copy is the parameters, rounded; nothing else was written.
    fn check(&self, under: &Under<B>, context: &str) {
        let context = format!("{}: {context}", under.name);
        let parameters = self.parameters.checked(&context, "parameters");
        let storage = self.storage.checked(&context, "storage");
        common::assert_same_bits(&context, "storage", &storage, &rounded::<B::Element>(&parameters));
        self.first.checked(&context, "first state");
        self.second.checked(&context, "second state");
    }
}

const LENGTHS: [usize; 12] = [0, 1, 3, 7, 8, 9, 15, 16, 17, 33, 65, 1000];

fn sgd_follows_the_formula<B: HostBackend>(under: &Under<B>) {
    for len in LENGTHS {
        for (momentum, weight_decay) in [(0.0, 0.0), (0.9, 0.0), (0.0, 0.1), (0.5, 0.01)] {
            let config = SgdConfig { learning_rate: 0.05, momentum, weight_decay };
            let mut rng = rng(len as u64);
            let mut theta = rounded::<B::Real>(&uniform(&mut rng, len, 1.0));
            let mut velocity = vec![0.0; len];
            let mut state = State::<B>::new(Place::STRIDED, &theta);
            for step in 1..=6 {
                let gradient = rounded::<B::Real>(&uniform(&mut rng, len, 1.0));
                for i in 0..len {
                    velocity[i] = momentum * velocity[i] + gradient[i] + weight_decay * theta[i];
                    theta[i] -= 0.05 * velocity[i];
                }
                state.sgd(under, config, &gradient);
                let context = format!("{}: sgd of {len}, step {step}, {config:?}", under.name);
                let u = 8.0 * f64::from(step) * under.real();
                assert_within(&context, "parameters", &state.parameters.values(), &theta, |i| {
                    u * (theta[i].abs() + 1.0)
                });
                if momentum != 0.0 {
                    let found = state.first.values();
                    assert_within(&context, "velocity", &found, &velocity, |i| u * (velocity[i].abs() + 1.0));
                }
            }
        }
    }
}

fn adam_follows_the_formula<B: HostBackend>(under: &Under<B>) {
    for len in LENGTHS {
        for (eps, weight_decay, scale) in [(1e-8, 0.0, 1.0), (1e-3, 0.1, 1.0), (1e-8, 0.0, 1e-4)] {
            let config = AdamConfig { learning_rate: 0.01, beta1: 0.8, beta2: 0.99, eps, weight_decay };
            let mut rng = rng(len as u64);
            let mut theta = rounded::<B::Real>(&uniform(&mut rng, len, 1.0));
            let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
            let mut state = State::<B>::new(Place::STRIDED, &theta);
            for step in 1..=6 {
                let gradient = rounded::<B::Real>(&uniform(&mut rng, len, scale));
                for i in 0..len {
                    theta[i] *= 1.0 - 0.01 * weight_decay;
                    m[i] = 0.8 * m[i] + 0.2 * gradient[i];
                    v[i] = 0.99 * v[i] + 0.01 * gradient[i] * gradient[i];
                    let (m_hat, v_hat) = (m[i] / (1.0 - 0.8f64.powi(step)), v[i] / (1.0 - 0.99f64.powi(step)));
                    theta[i] -= 0.01 * m_hat / (v_hat.sqrt() + eps);
                }
                state.adam(under, config, step as u64, &gradient);
                let context = format!("{}: adam of {len}, step {step}, {config:?}", under.name);
                let u = 16.0 * f64::from(step) * under.real();
                assert_within(&context, "parameters", &state.parameters.values(), &theta, |i| {
                    u * (theta[i].abs() + 0.05)
                });
                assert_within(&context, "first moment", &state.first.values(), &m, |_| u * scale);
                assert_within(&context, "second moment", &state.second.values(), &v, |_| u * scale * scale);
            }
        }
    }
}

/// Parameters and the gradients of four steps for the numbers below.
const THETA: [f64; 3] = [0.5, -1.25, 2.0];
const GRADIENTS: [[f64; 3]; 4] = [[0.25, -0.5, 1.0], [-0.75, 0.125, 0.5], [0.5, 0.5, -2.0], [1.5, -1.0, 0.0]];

fn sgd_gives_known_numbers<B: HostBackend>(under: &Under<B>) {
    // The algorithm of torch.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.01).
    let expected = [0.3677480941754999, -1.09598475667625, 1.8834220267019999];
    let mut state = State::<B>::new(Place::DENSE, &THETA);
    for gradient in GRADIENTS {
        state.sgd(under, SgdConfig { learning_rate: 0.1, momentum: 0.9, weight_decay: 0.01 }, &gradient);
    }
    assert_within(&under.name, "parameters", &state.parameters.values(), &expected, |_| 64.0 * under.real());
}

fn adam_gives_known_numbers<B: HostBackend>(under: &Under<B>) {
    // The algorithm of torch.optim.AdamW(lr=0.05, betas=(0.9, 0.98), eps=1e-6); without decay it is Adam's.
    for (weight_decay, expected) in [
        (0.0, [0.4488478172660207, -1.166610543825261, 1.9219641932472495]),
        (0.1, [0.439427972287779, -1.1427326486540799, 1.8834244121178068]),
    ] {
        let mut state = State::<B>::new(Place::DENSE, &THETA);
        let config = AdamConfig { learning_rate: 0.05, beta1: 0.9, beta2: 0.98, eps: 1e-6, weight_decay };
        for (step, gradient) in GRADIENTS.iter().enumerate() {
            state.adam(under, config, step as u64 + 1, gradient);
        }
        assert_within(&under.name, "parameters", &state.parameters.values(), &expected, |_| 64.0 * under.real());
    }
}

#[test]
fn defaults_are_pytorchs() {
    let AdamConfig { learning_rate, beta1, beta2, eps, weight_decay } = AdamConfig::default();
    assert_eq!((learning_rate, beta1, beta2, eps, weight_decay), (1e-3, 0.9, 0.999, 1e-8, 0.0));
    let SgdConfig { momentum, weight_decay, .. } = SgdConfig::default();
    assert_eq!((momentum, weight_decay), (0.0, 0.0));
}
