//! The paper's three experiments: which trainings each needs, and what is measured of them.

use crate::common::trainer::{Model, Optimizer, Settings};
use crate::published::{ABLATION, BENCHMARK, Published, SWEEP};
use crate::runs::{LATENTS, Outcome, Runs, settings};
use crate::table::{Line, Measured};

/// A configuration: its trainings, one a seed, and what is compared.
pub struct Configuration {
    /// Name.
    pub name: String,
    /// One for each seed.
    pub trainings: Vec<Settings>,
    /// What is measured.
    pub measures: Vec<Measure>,
}

/// Something measured of a training.
pub struct Measure {
    /// Name, with its unit.
    pub name: &'static str,
    /// What is published.
    pub published: Option<Published>,
    /// Decimals to show.
    pub decimals: usize,
    /// The value.
    pub of: fn(&Outcome) -> f64,
}

impl Measure {
    fn new(name: &'static str, published: Option<Published>, decimals: usize, of: fn(&Outcome) -> f64) -> Self {
        Self { name, published, decimals, of }
    }
}

impl Configuration {
    /// A measure over the seeds, or why there is none.
    pub fn measured(&self, measure: &Measure, runs: &Runs) -> Result<Measured, String> {
        let outcomes = runs.of(&self.trainings).map_err(|error| format!("{error:#}"))?;
        Ok(Measured::of(&outcomes.into_iter().map(measure.of).collect::<Vec<_>>()))
    }

    /// A line for each measure.
    pub fn lines<'a>(&'a self, runs: &'a Runs) -> impl Iterator<Item = Line> + 'a {
        self.measures.iter().map(|measure| Line {
            configuration: self.name.clone(),
            measure: measure.name,
            published: measure.published,
            measured: self.measured(measure, runs),
            decimals: measure.decimals,
        })
    }
}

/// The paper's experiments.
pub struct Experiments {
    /// Which terms of the loss are needed.
    pub ablation: Vec<Configuration>,
    /// Decoder-free against standard.
    pub benchmark: Vec<Configuration>,
    /// Optimisers and learning rates.
    pub sweep: Vec<Configuration>,
}

impl Experiments {
    /// All trainings, one that stands in several tables as often as it stands there.
    pub fn trainings(&self) -> impl Iterator<Item = &Settings> {
        self.ablation.iter().chain(&self.benchmark).chain(&self.sweep).flat_map(|c| &c.trainings)
    }

    /// Names of pictures with the benchmark's first trainings, if those succeeded.
    pub fn features<'a>(&self, runs: &'a Runs) -> Option<Vec<(&'static str, &'a Outcome)>> {
        let names = ["features-decoder-free.png", "features-standard.png"];
        let first = |c: &Configuration| runs.of(&c.trainings[..1]).ok().and_then(|outcomes| outcomes.first().copied());
        names.into_iter().zip(&self.benchmark).map(|(name, c)| Some((name, first(c)?))).collect()
    }
}

/// All experiments on rows of `inputs` numbers, with the paper's number of seeds or `seeds`.
pub fn all(inputs: usize, seeds: Option<u64>) -> Experiments {
    let trainings = |model: Model, optimizer: Optimizer, published_seeds: u64| -> Vec<Settings> {
        (0..seeds.unwrap_or(published_seeds)).map(|seed| settings(model, optimizer, inputs, seed)).collect()
    };
    let decoder_free = |[lambda_lse, lambda_var, lambda_tc]: [f64; 3]| Model::DecoderFree {
        lambda_lse,
        lambda_var,
        lambda_tc,
        lambda_wr: 0.0,
    };
    let full = decoder_free([1.0; 3]);
    let adam = Optimizer::Adam { learning_rate: 1e-3 };

    let ablation = ABLATION
        .iter()
        .map(|published| Configuration {
            name: published.name.to_owned(),
            trainings: trainings(decoder_free(published.lambdas), adam, 3),
            measures: vec![
                Measure::new("dead units, of 64", published.dead_units, 1, |o| o.evaluation.metrics.dead_units as f64),
                Measure::new("redundancy", published.redundancy, 2, |o| o.evaluation.metrics.redundancy),
                Measure::new("responsibility entropy, nats", published.entropy, 3, |o| {
                    o.evaluation.metrics.responsibility_entropy
                }),
            ],
        })
        .collect();

    let models = [full, Model::Standard { lambda_l1: 0.01 }];
    let benchmark = BENCHMARK
        .iter()
        .zip(models)
        .map(|(published, model)| Configuration {
            name: published.name.to_owned(),
            trainings: trainings(model, adam, 5),
            measures: vec![
                Measure::new("linear probe, %", published.probe, 2, accuracy),
                Measure::new("L0, of 64", published.l0, 2, |o| o.evaluation.metrics.l0),
                Measure::new("reconstruction MSE", published.reconstruction, 4, |o| {
                    o.evaluation.metrics.reconstruction_mse
                }),
                Measure::new(
                    "parameters",
                    published.parameters,
                    0,
                    match model {
                        Model::DecoderFree { .. } => |o| (inputs_of(o) * LATENTS + LATENTS) as f64,
                        Model::Standard { .. } => |o| (2 * inputs_of(o) * LATENTS + LATENTS + inputs_of(o)) as f64,
                    },
                ),
            ],
        })
        .collect();

    let sweep = SWEEP
        .iter()
        .map(|published| {
            let (name, optimizer) = match published.adam {
                true => ("Adam", Optimizer::Adam { learning_rate: published.rate }),
                false => ("SGD", Optimizer::Sgd { learning_rate: published.rate, momentum: 0.0 }),
            };
            Configuration {
                name: format!("{name} {:e}", published.rate),
                trainings: trainings(full, optimizer, 3),
                measures: vec![
                    Measure::new("final loss", published.loss, 1, |o| o.final_loss),
                    Measure::new("linear probe, %", published.probe, 2, accuracy),
                ],
            }
        })
        .collect();
    Experiments { ablation, benchmark, sweep }
}

fn accuracy(outcome: &Outcome) -> f64 {
    100.0 * outcome.evaluation.metrics.probe_accuracy.unwrap_or(f64::NAN)
}

fn inputs_of(outcome: &Outcome) -> usize {
    outcome.features.len() / LATENTS
}
