//! The trainings: which there are, and all of them at once.

use crate::common::data::Dataset;
use crate::common::device::Storage;
use crate::common::evaluate::{Evaluation, evaluate};
use crate::common::trainer::{Model, Optimizer, Settings, Trainer};
use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use sae_kernels::{Cpu, Isa};
use std::time::Instant;

/// The paper's size: latents, and rows in a batch.
pub const LATENTS: usize = 64;
/// Rows in a batch.
pub const BATCH: usize = 128;

/// What one training ended with.
pub struct Outcome {
    /// Mean total loss of the last epoch's batches.
    pub final_loss: f64,
    /// Measures on the test set.
    pub evaluation: Evaluation,
    /// Features \[H,D\]: the encoder's weight, or the decoder's of the standard model.
    pub features: Vec<f32>,
    /// Seconds on one thread, measures included.
    pub seconds: f64,
}

/// A model, an optimiser and a seed at the paper's size.
pub fn settings(model: Model, optimizer: Optimizer, inputs: usize, seed: u64) -> Settings {
    Settings {
        model,
        inputs,
        latents: LATENTS,
        batch: BATCH,
        micro_batch: None,
        optimizer,
        seed,
        storage: Storage::F32,
    }
}

/// Trainings with their outcomes. Each is done once, however many tables it stands in.
pub struct Runs {
    done: Vec<(Settings, Result<Outcome>)>,
}

impl Runs {
    /// Does them all, each on one thread, as many at once as rayon has threads.
    pub fn new(wanted: &[Settings], data: &Dataset, epochs: u64) -> Result<Self> {
        let mut unique: Vec<&Settings> = Vec::new();
        for settings in wanted {
            if !unique.contains(&settings) {
                unique.push(settings);
            }
        }
        let bar = ProgressBar::new(unique.len() as u64 * epochs);
        let style = "{bar:30.cyan/blue} {pos}/{len} epochs of all trainings, {elapsed} gone, {eta} left  {msg}";
        bar.set_style(ProgressStyle::with_template(style)?);
        let done = unique
            .par_iter()
            // One at a time: they take different times.
            .with_max_len(1)
            .map(|settings| {
                let outcome = train((*settings).clone(), data, epochs, &bar);
                let result = match &outcome {
                    Ok(outcome) => format!("loss {:.4}, {:.0} s", outcome.final_loss, outcome.seconds),
                    Err(error) => format!("FAILED: {error:#}"),
                };
                let line = format!("{}: {result}", describe(settings));
                if bar.is_hidden() {
                    eprintln!("{line}");
                } else {
                    bar.println(line);
                }
                ((*settings).clone(), outcome)
            })
            .collect();
        bar.finish_and_clear();
        Ok(Self { done })
    }

    /// The outcomes of the given trainings.
    pub fn of(&self, settings: &[Settings]) -> Result<Vec<&Outcome>> {
        let find = |wanted: &Settings| match self.done.iter().find(|(settings, _)| settings == wanted) {
            Some((_, Ok(outcome))) => Ok(outcome),
            Some((_, Err(error))) => bail!("{error:#}"),
            None => bail!("not run"),
        };
        settings.iter().map(find).collect()
    }

    /// Number of trainings done.
    pub fn len(&self) -> usize {
        self.done.len()
    }
}

fn train(settings: Settings, data: &Dataset, epochs: u64, bar: &ProgressBar) -> Result<Outcome> {
    let start = Instant::now();
    let features = match settings.model {
        Model::DecoderFree { .. } => "weight",
        Model::Standard { .. } => "decoder_weight",
    };
    let mut trainer = Trainer::new(Cpu::<f32>::with(Isa::detect(), 1)?, settings)?;
    for _ in 0..epochs {
        trainer.train_epoch(&data.train.x, |_| ())?;
        bar.inc(1);
    }
    Ok(Outcome {
        final_loss: trainer.history().last().and_then(|terms| terms.last()).copied().unwrap_or(f64::NAN),
        evaluation: evaluate(&trainer, data)?,
        features: trainer.parameter(features)?,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// A training in a few words.
fn describe(settings: &Settings) -> String {
    let model = match settings.model {
        Model::DecoderFree { lambda_lse, lambda_var, lambda_tc, .. } => {
            format!("decoder-free, λ_lse {lambda_lse}, λ_var {lambda_var}, λ_tc {lambda_tc}")
        }
        Model::Standard { lambda_l1 } => format!("standard, λ_l1 {lambda_l1}"),
    };
    let optimizer = match settings.optimizer {
        Optimizer::Adam { learning_rate } => format!("Adam {learning_rate:e}"),
        Optimizer::Sgd { learning_rate, .. } => format!("SGD {learning_rate:e}"),
    };
    format!("{model}, {optimizer}, seed {}", settings.seed)
}
