//! Checkpoints: a safetensors file of parameters and optimiser state; settings, counters and history are in its metadata.

use super::files;
use super::trainer::Settings;
use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// A training, stopped between two epochs.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// What the training depends on.
    pub settings: Settings,
    /// Type of the numbers: `f32` or `f64`.
    pub real: String,
    /// Epochs done.
    pub epoch: u64,
    /// Steps done.
    pub step: u64,
    /// Mean loss terms of every epoch done.
    pub history: Vec<Vec<f64>>,
    /// Parameters and optimiser state.
    pub tensors: Vec<StoredTensor>,
}

/// A matrix with its name.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor {
    /// `weight`, `weight.first_moment`, …
    pub name: String,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Row by row; f64 holds every f32 exactly.
    pub values: Vec<f64>,
}

/// Name of the metadata entry.
const ENTRY: &str = "training";

/// What is in the metadata, as JSON.
#[derive(Serialize, Deserialize)]
struct Training {
    settings: Settings,
    real: String,
    epoch: u64,
    step: u64,
    history: Vec<Vec<f64>>,
}

impl Checkpoint {
    /// Values of the tensor of that name, which must have that shape.
    pub fn values(&self, name: &str, shape: [usize; 2]) -> Result<&[f64]> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name);
        let tensor = tensor.with_context(|| format!("the checkpoint has no tensor \"{name}\""))?;
        ensure!(
            tensor.shape == shape,
            "the checkpoint's \"{name}\" is {:?}, but its settings say {shape:?}",
            tensor.shape
        );
        Ok(&tensor.values)
    }

    /// Writes it, replacing the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let dtype = dtype(&self.real)?;
        let data: Vec<(&StoredTensor, Vec<u8>)> =
            self.tensors.iter().map(|t| (t, to_bytes(&t.values, dtype))).collect();
        let views = data
            .iter()
            .map(|(tensor, bytes)| Ok((&tensor.name, TensorView::new(dtype, tensor.shape.to_vec(), bytes)?)))
            .collect::<Result<Vec<_>>>()?;
        let training = Training {
            settings: self.settings.clone(),
            real: self.real.clone(),
            epoch: self.epoch,
            step: self.step,
            history: self.history.clone(),
        };
        // One entry: the order of several would change from file to file.
        let metadata = HashMap::from([(ENTRY.to_owned(), serde_json::to_string(&training)?)]);
        files::write(path, &safetensors::serialize(views, Some(metadata))?)
    }

    /// Reads what [`write`](Self::write) wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read the checkpoint {}", path.display()))?;
        Self::parse(&bytes).with_context(|| format!("{} is not a checkpoint of this program", path.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let metadata = header.metadata().as_ref().context("it has no metadata")?;
        let training = metadata.get(ENTRY).with_context(|| format!("its metadata lacks \"{ENTRY}\""))?;
        let Training { settings, real, epoch, step, history } = serde_json::from_str(training)?;
        let dtype = dtype(&real)?;
        let tensors = SafeTensors::deserialize(bytes)?
            .iter()
            .map(|(name, view)| {
                ensure!(view.dtype() == dtype, "\"{name}\" is {:?}, not {real}", view.dtype());
                let shape = view.shape().try_into().with_context(|| format!("\"{name}\" is not a matrix"))?;
                Ok(StoredTensor { name: name.to_owned(), shape, values: from_bytes(view.data(), dtype) })
            })
            .collect::<Result<_>>()?;
        Ok(Self { settings, real, epoch, step, history, tensors })
    }
}

fn dtype(real: &str) -> Result<Dtype> {
    match real {
        "f32" => Ok(Dtype::F32),
        "f64" => Ok(Dtype::F64),
        other => bail!("its numbers are {other}, not f32 or f64"),
    }
}

fn to_bytes(values: &[f64], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

fn from_bytes(bytes: &[u8], dtype: Dtype) -> Vec<f64> {
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
        _ => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
    }
}
