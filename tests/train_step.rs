//! Products and steps that update parameters: bit for bit the product or step, and then the optimiser.

#[macro_use]
mod common;

use common::{Guarded, HostBackend, Place, Under, assert_same_bits, ops, rng, rounded, uniform};
use sae_kernels::operations::{Adam, AdamConfig, Layout, Optimizer, Product, ProductUpdate, Sgd, SgdConfig};
use sae_kernels::{
    DecoderFree, DecoderFreeConfig, DecoderFreeStep, DecoderFreeTrainStep, Element, Error, MatMut, MatRef, Objective,
    Shape, Trained,
};

on_every_backend!(product_update_is_product_and_optimizer, train_step_is_step_and_optimizer, storage_may_be_needed);

/// What the parameters are updated by.
#[derive(Debug, Clone, Copy)]
enum Rule {
    Sgd(SgdConfig),
    Adam(AdamConfig),
}

const RULES: [Rule; 3] = [
    Rule::Sgd(SgdConfig { learning_rate: 0.05, momentum: 0.0, weight_decay: 0.0 }),
    Rule::Sgd(SgdConfig { learning_rate: 0.05, momentum: 0.9, weight_decay: 0.01 }),
    Rule::Adam(AdamConfig { learning_rate: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 }),
];

/// Parameters with an optimiser's state.
struct Parameters<B: HostBackend> {
    rule: Rule,
    values: Guarded<B::Real>,
    storage: Guarded<B::Element>,
    first: Guarded<B::Real>,
    second: Guarded<B::Real>,
}

impl<B: HostBackend> Parameters<B> {
    fn new(rule: Rule, values: &[f64]) -> Self {
        let zeros = vec![0.0; values.len()];
        let velocity = if matches!(rule, Rule::Sgd(SgdConfig { momentum: 0.0, .. })) { &[][..] } else { &zeros };
        Self {
            rule,
            values: Guarded::vector(Place::STRIDED, values),
            storage: Guarded::vector(Place::STRIDED, values),
            first: Guarded::vector(Place::STRIDED, velocity),
            second: Guarded::vector(Place::STRIDED, &zeros),
        }
    }

    fn trained(&mut self, step: u64, with_storage: bool) -> Trained<'_, B> {
        Trained {
            parameters: self.values.slice_mut(),
            storage: with_storage.then(|| self.storage.slice_mut()),
            optimizer: match self.rule {
                Rule::Sgd(config) => Optimizer::Sgd { config, velocity: self.first.slice_mut() },
                Rule::Adam(config) => Optimizer::Adam {
                    config,
                    step,
                    first_moment: self.first.slice_mut(),
                    second_moment: self.second.slice_mut(),
                },
            },
        }
    }

    fn update(&mut self, under: &Under<B>, step: u64, gradient: &[B::Real]) {
        let (parameters, storage) = (self.values.slice_mut(), Some(self.storage.slice_mut()));
        let (first, second_moment) = (self.first.slice_mut(), self.second.slice_mut());
        match self.rule {
            Rule::Sgd(config) => {
                under.backend.sgd(Sgd { config, gradient, velocity: first, parameters, storage }).unwrap();
            }
            Rule::Adam(config) => {
                let args = Adam { config, step, gradient, first_moment: first, second_moment, parameters, storage };
                under.backend.adam(args).unwrap();
            }
        }
    }

    fn assert_same(&self, context: &str, other: &Self, with_storage: bool) {
        let pairs = [
            ("parameters", &self.values, &other.values),
            ("first state", &self.first, &other.first),
            ("second state", &self.second, &other.second),
        ];
        for (name, found, expected) in pairs {
            assert_same_bits(context, name, &found.checked(context, name), &expected.checked(context, name));
        }
        if with_storage {
            let (found, expected) =
                (self.storage.checked(context, "storage"), other.storage.checked(context, "storage"));
            assert_same_bits(context, "storage", &found, &expected);
        }
    }
}

fn product_update_is_product_and_optimizer<B: HostBackend>(under: &Under<B>) {
    // The last two: more rows than are summed at a time, and more parameters than stay in cache.
    let all = [[0, 0, 0], [1, 1, 1], [3, 5, 0], [7, 33, 9], [64, 100, 17], [30, 40, 4100], [260, 300, 5]];
    for [m, n, k] in under.cases(all, [[9, 20, 7]]) {
        for (rule, accumulate) in RULES.into_iter().zip([true, false, true]).chain([(RULES[2], false)]) {
            let context = format!("{}: {m}×{n}×{k}, {rule:?}, accumulate {accumulate}", under.name);
            let mut rng = rng((m + n + k) as u64);
            let start = rounded::<B::Real>(&uniform(&mut rng, m * n, 1.0));
            let (mut found, mut expected) = (Parameters::<B>::new(rule, &start), Parameters::<B>::new(rule, &start));
            let mut scratch = ops::workspace(under, k, n, m);
            for step in 1..=3 {
                let left = Guarded::<B::Element>::matrix(Place::STRIDED, k, m, &uniform(&mut rng, k * m, 1.0));
                let right = Guarded::<B::Element>::matrix(Place::STRIDED, k, n, &uniform(&mut rng, k * n, 1.0));
                let before = rounded::<B::Real>(&uniform(&mut rng, m * n, 1.0));
                let before = accumulate.then_some(&before[..]);
                let mut gradient = Guarded::<B::Real>::vector_or_poison(Place::STRIDED, m * n, before);
                let (left, right) = (left.mat(), right.mat());
                let out = MatMut::new(gradient.slice_mut(), m, n).unwrap();
                let product =
                    Product { layout: Layout::Tn, left, right, accumulate, out, workspace: scratch.slice_mut() };
                under.backend.product(product).unwrap();
                expected.update(under, step, gradient.slice());

                let mut gradient = Guarded::<B::Real>::vector_or_poison(Place::STRIDED, m * n, before);
                let Trained { parameters, storage, optimizer } = found.trained(step, true);
                let args = ProductUpdate {
                    left,
                    right,
                    accumulate,
                    gradient: gradient.slice_mut(),
                    optimizer,
                    parameters,
                    storage,
                    workspace: scratch.slice_mut(),
                };
                under.backend.product_update(args).unwrap();
                found.assert_same(&context, &expected, true);
            }
        }
    }
}

fn train_step_is_step_and_optimizer<B: HostBackend>(under: &Under<B>) {
    let same_type = B::Element::NAME == B::Real::NAME;
    let plans = [(None, 0.0), (Some(7), 0.0), (None, 0.3), (Some(7), 0.3)];
    let few = [(Some(7), 0.0), (None, 0.0), (None, 0.3)];
    for (index, (block_rows, lambda_wr)) in under.cases(plans, few).into_iter().enumerate() {
        for Shape { rows: n, inputs: d, latents: h } in under.cases(
            [
                Shape { rows: 20, inputs: 33, latents: 17 },
                Shape { rows: 9, inputs: 5, latents: 40 },
                Shape { rows: 12, inputs: 300, latents: 230 },
            ],
            [Shape { rows: 9, inputs: 20, latents: 5 }],
        ) {
            // Not the same for weight and bias.
            let (rule, bias_rule) = (RULES[2 - index % 3], RULES[index % 3]);
            let with_storage = !same_type || index % 2 == 0;
            let context =
                format!("{}: {n}×{d}×{h}, {block_rows:?}, λ_wr {lambda_wr}, {rule:?} {bias_rule:?}", under.name);
            let mut rng = rng((n + d + h) as u64);
            let objective = Objective { lambda_wr, ..Objective::default() };
            let shape = Shape { rows: n, inputs: d, latents: h };
            let config = DecoderFreeConfig { objective, block_rows, ..DecoderFreeConfig::new(shape) };
            let mut model = DecoderFree::new(under.fresh(), config).unwrap();
            // As they are stored, so that both ways read the same from the start.
            let weight = rounded::<B::Element>(&uniform(&mut rng, h * d, 0.3));
            let bias = rounded::<B::Real>(&uniform(&mut rng, h, 0.3));
            let [mut found_weight, mut expected_weight] = [0; 2].map(|_| Parameters::<B>::new(rule, &weight));
            let [mut found_bias, mut expected_bias] = [0; 2].map(|_| Parameters::<B>::new(bias_rule, &bias));
            for step in 1..=3 {
                // A batch smaller than the plan's in between.
                let n = if step == 2 { n - 1 } else { n };
                let x = Guarded::<B::Element>::matrix(Place::STRIDED, n, d, &uniform(&mut rng, n * d, 1.0));
                let mut grad_weight = Guarded::<B::Real>::vector_or_poison(Place::STRIDED, h * d, None);
                let mut grad_bias = Guarded::<B::Real>::vector_or_poison(Place::STRIDED, h, None);
                let [mut activations, mut expected_activations] =
                    [0; 2].map(|_| Guarded::<B::Element>::poisoned(Place::STRIDED, n, h));
                let wanted = step != 3;
                model
                    .step(DecoderFreeStep {
                        x: x.mat(),
                        weight: MatRef::new(expected_weight.storage.slice(), h, d).unwrap(),
                        bias: expected_bias.values.slice(),
                        grad_weight: MatMut::new(grad_weight.slice_mut(), h, d).unwrap(),
                        grad_bias: grad_bias.slice_mut(),
                        grad_x: None,
                        activations: wanted.then(|| expected_activations.mat_mut()),
                        row_loss: None,
                    })
                    .unwrap();
                let expected_losses = model.losses().unwrap();
                expected_weight.update(under, step, grad_weight.slice());
                expected_bias.update(under, step, grad_bias.slice());
                model
                    .train_step(DecoderFreeTrainStep {
                        x: x.mat(),
                        weight: found_weight.trained(step, with_storage),
                        bias: found_bias.trained(step, false),
                        activations: wanted.then(|| activations.mat_mut()),
                        row_loss: None,
                    })
                    .unwrap();
                assert_eq!(format!("{:?}", model.losses().unwrap()), format!("{expected_losses:?}"), "{context}");
                found_weight.assert_same(&context, &expected_weight, with_storage);
                found_bias.assert_same(&context, &expected_bias, false);
                if wanted {
                    let found = activations.checked(&context, "activations");
                    let expected = expected_activations.checked(&context, "activations");
                    assert_same_bits(&context, "activations", &found, &expected);
                }
            }
        }
    }
}

fn storage_may_be_needed<B: HostBackend>(under: &Under<B>) {
    let shape = Shape { rows: 4, inputs: 3, latents: 2 };
    let mut model = DecoderFree::new(under.fresh(), DecoderFreeConfig::new(shape)).unwrap();
    let x = Guarded::<B::Element>::matrix(Place::DENSE, 4, 3, &uniform(&mut rng(1), 12, 1.0));
    let start = [0.5, -0.25, 0.125, 1.0, 0.75, -0.5];
    let mut weight = Parameters::<B>::new(RULES[2], &start);
    let mut bias = Parameters::<B>::new(RULES[2], &[0.5, 0.25]);
    let mut step = |at, weight: &mut Parameters<B>| {
        model.train_step(DecoderFreeTrainStep {
            x: x.mat(),
            weight: weight.trained(at, false),
            bias: bias.trained(at, false),
            activations: None,
            row_loss: None,
        })
    };
    let result = step(1, &mut weight);
    if B::Element::NAME == B::Real::NAME {
        result.unwrap();
        assert_ne!(weight.values.values(), start, "{}", under.name);
    } else {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::NoStorage { .. }), "{}: {error}", under.name);
        assert!(error.to_string().contains(B::Element::NAME), "{}: {error}", under.name);
        assert_eq!(weight.values.values(), start, "{}", under.name);
    }
    // Settings are checked before anything is written.
    let before = weight.values.values();
    if B::Element::NAME == B::Real::NAME {
        assert!(matches!(step(0, &mut weight), Err(Error::Configuration { name: "step", .. })), "{}", under.name);
        assert_eq!(weight.values.values(), before, "{}", under.name);
    }
}
