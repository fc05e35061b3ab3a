//! A trained model, measured on the test set.

use super::data::{Dataset, Part};
use super::metrics;
use super::probe::{self, Labelled};
use super::trainer::{Model, Trainer};
use anyhow::Result;
use sae_kernels::operations::{Encode, Operation};
use sae_kernels::{
    Activation, Backend, DecoderFree, DecoderFreeConfig, Element, MatMut, MatRef, Memory, Shape, Statistics,
};
use serde::Serialize;

/// Rows that are encoded at a time.
const BLOCK: usize = 512;

/// Measures of a model; all on the test set.
#[derive(Debug, Clone, Serialize)]
pub struct Metrics {
    /// Latents with a variance below 0.01.
    pub dead_units: usize,
    /// Σ_{i≠j} C_ij² of the activations.
    pub redundancy: f64,
    /// Mean entropy of the responsibilities, in nats.
    pub responsibility_entropy: f64,
    /// Mean number of active latents.
    pub l0: f64,
    /// Share of rows, 0 to 1, that a linear probe on the activations classifies rightly; none without labels.
    pub probe_accuracy: Option<f64>,
    /// Mean squared error of the reconstruction, for each input.
    pub reconstruction_mse: f64,
}

/// [`Metrics`], and what the figures need.
pub struct Evaluation {
    /// The measures.
    pub metrics: Metrics,
    /// Variance of each latent's activation on the test set \[H\].
    pub variance: Vec<f64>,
}

/// Measures the model on the data's test set; the probe is trained on the activations of its training set.
pub fn evaluate<B: Backend + Clone>(trainer: &Trainer<B>, data: &Dataset) -> Result<Evaluation> {
    let h = trainer.settings().latents;
    let mut statistics = Statistics::new(h, true);
    let activations = encode(trainer, &data.test, Some(&mut statistics))?;
    let probe_accuracy = match (&data.train.labels, &data.test.labels) {
        (Some(train_labels), Some(test_labels)) => {
            let features = encode(trainer, &data.train, None)?;
            let train = Labelled { features: &features, labels: train_labels };
            let test = Labelled { features: &activations, labels: test_labels };
            Some(probe::probe(train, test, h)?.accuracy)
        }
        _ => None,
    };
    let x = &data.test.x;
    let reconstruction_mse = match trainer.settings().model {
        Model::DecoderFree { .. } => {
            metrics::normalised_reconstruction_mse(x, &activations, &trainer.parameter("weight")?, h)
        }
        Model::Standard { .. } => {
            let (weight, bias) = (trainer.parameter("decoder_weight")?, trainer.parameter("decoder_bias")?);
            metrics::decoder_mse(x, &activations, &weight, &bias, h)
        }
    };
    let metrics = Metrics {
        dead_units: metrics::dead_units(&statistics),
        redundancy: metrics::redundancy(&statistics),
        responsibility_entropy: metrics::responsibility_entropy(&activations, h),
        l0: metrics::l0(&activations, h),
        probe_accuracy,
        reconstruction_mse,
    };
    let variance = (0..h).map(|j| statistics.variance(j)).collect();
    Ok(Evaluation { metrics, variance })
}

/// Activations \[N,H\] of all rows. They are added to `statistics`, if given.
fn encode<B: Backend + Clone>(
    trainer: &Trainer<B>,
    part: &Part,
    mut statistics: Option<&mut Statistics>,
) -> Result<Vec<f32>> {
    let (inputs, latents) = (trainer.settings().inputs, trainer.settings().latents);
    let backend = trainer.backend();
    let (weight, bias) = (trainer.encoder_weight()?, trainer.encoder_bias());
    let shape = Shape { rows: BLOCK.min(part.rows), inputs, latents };
    let mut plan = match &statistics {
        Some(_) => Some(DecoderFree::new(backend.clone(), DecoderFreeConfig::new(shape))?),
        None => None,
    };
    let mut workspace = backend.alloc::<f64>(backend.workspace_len_of(Operation::Encode, shape)?)?;
    let mut x = backend.alloc::<B::Element>(shape.rows * inputs)?;
    let mut a = backend.alloc::<B::Element>(shape.rows * latents)?;
    let mut staging = vec![B::Element::from_f64(0.0); shape.rows * inputs];
    let mut block_activations = vec![B::Element::from_f64(0.0); shape.rows * latents];
    let mut activations = vec![0.0; part.rows * latents];
    for (source, target) in part.x.chunks(shape.rows * inputs).zip(activations.chunks_mut(shape.rows * latents)) {
        let rows = source.len() / inputs;
        B::Element::narrow(source, &mut staging[..source.len()]);
        backend.upload(&staging[..source.len()], B::Memory::part_mut(B::Memory::slice_mut(&mut x), 0..source.len()))?;
        let x = MatRef::from_memory(B::Memory::part(B::Memory::slice(&x), 0..source.len()), rows, inputs, inputs)?;
        let a_len = rows * latents;
        backend.encode(Encode {
            x,
            weight,
            bias: B::Memory::shorten(bias),
            activation: Activation::Relu,
            activations: Some(MatMut::from_memory(
                B::Memory::part_mut(B::Memory::slice_mut(&mut a), 0..a_len),
                rows,
                latents,
                latents,
            )?),
            row_loss: None,
            moments: None,
            workspace: B::Memory::slice_mut(&mut workspace),
        })?;
        backend.download(B::Memory::part(B::Memory::slice(&a), 0..a_len), &mut block_activations[..a_len])?;
        B::Element::widen(&block_activations[..a_len], target);
        if let (Some(statistics), Some(plan)) = (&mut statistics, &mut plan) {
            plan.statistics(x, weight, B::Memory::shorten(bias), statistics)?;
        }
    }
    Ok(activations)
}
