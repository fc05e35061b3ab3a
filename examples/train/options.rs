//! The command line, and the run that it and a checkpoint ask for.

use crate::common::checkpoint::Checkpoint;
use crate::common::data;
use crate::common::device::{Device, Storage};
use crate::common::trainer::{Model, Optimizer, Settings};
use anyhow::{Result, bail, ensure};
use clap::{Parser, ValueEnum};
use serde_json::json;
use std::fmt::Debug;
use std::path::PathBuf;
use std::thread;

/// Trains a sparse autoencoder and leaves features.png, losses.png, checkpoint.safetensors, config.json and metrics.json in
/// a run folder.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Options {
    /// Directory of MNIST-format files (plain or .gz), or a .npy or .safetensors file with one matrix of activations
    #[arg(long, value_name = "PATH", default_value_os_t = data::default_directory(), hide_default_value = true)]
    pub data: PathBuf,
    /// What to train [default: decoder-free]
    #[arg(long)]
    model: Option<ModelKind>,
    /// Number of latents [default: 64]
    #[arg(long, value_name = "H")]
    latents: Option<usize>,
    /// Passes over the training set, in total: a resumed run counts those already done
    #[arg(long, default_value_t = 50)]
    epochs: u64,
    /// Rows in a batch [default: 128]
    #[arg(long, value_name = "ROWS")]
    batch: Option<usize>,
    /// Rows in a block of a batch: less memory, the same gradient (decoder-free model only)
    #[arg(long, value_name = "ROWS")]
    micro_batch: Option<usize>,
    /// How parameters are updated [default: adam]
    #[arg(long)]
    optimizer: Option<OptimizerKind>,
    /// Learning rate [default: 1e-3]
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// Momentum of sgd [default: 0]
    #[arg(long, value_name = "SHARE")]
    momentum: Option<f64>,
    /// Weight of the log-sum-exp term, decoder-free model [default: 1]
    #[arg(long, value_name = "WEIGHT", allow_negative_numbers = true)]
    lambda_lse: Option<f64>,
    /// Weight of the variance term, decoder-free model [default: 1]
    #[arg(long, value_name = "WEIGHT", allow_negative_numbers = true)]
    lambda_var: Option<f64>,
    /// Weight of the correlation term, decoder-free model [default: 1]
    #[arg(long, value_name = "WEIGHT", allow_negative_numbers = true)]
    lambda_tc: Option<f64>,
    /// Weight of the weight-redundancy term, decoder-free model [default: 0]
    #[arg(long, value_name = "WEIGHT", allow_negative_numbers = true)]
    lambda_wr: Option<f64>,
    /// Weight of the L1 term, standard model [default: 0.01]
    #[arg(long, value_name = "WEIGHT", allow_negative_numbers = true)]
    lambda_l1: Option<f64>,
    /// Seed of the initial parameters and of the order of the rows [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// Threads; the result does not depend on it [default: one for each core]
    #[arg(long, value_name = "COUNT")]
    threads: Option<usize>,
    /// Goes on with a checkpoint.safetensors, exactly as if it had never stopped; its settings apply, and need not be given again
    #[arg(long, value_name = "CHECKPOINT")]
    pub resume: Option<PathBuf>,
    /// Run folder [default: runs/<date-time>]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Storage of inputs, weights and activations; sums and parameters stay f32 [default: f32]
    #[arg(long)]
    dtype: Option<Storage>,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum ModelKind {
    /// Oursland's decoder-free objective
    DecoderFree,
    /// ReLU encoder, linear decoder, mean squared error and L1
    Standard,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum OptimizerKind {
    /// Adam, β 0.9 and 0.999
    Adam,
    /// Gradient descent
    Sgd,
}

/// What to do, with nothing left open.
pub struct Run {
    /// What the result depends on.
    pub settings: Settings,
    /// Epochs in total.
    pub epochs: u64,
    /// Where to compute.
    pub device: Device,
    /// On how many threads.
    pub threads: usize,
    /// The run folder.
    pub out: PathBuf,
    data: PathBuf,
    resume: Option<PathBuf>,
}

impl Run {
    /// `inputs` is the width of the data.
    pub fn new(options: Options, checkpoint: Option<&Checkpoint>, inputs: usize) -> Result<Self> {
        let storage = options.device.storage(options.dtype.or(checkpoint.map(|c| c.settings.storage)))?;
        let settings = match checkpoint {
            None => options.settings(inputs, storage)?,
            Some(checkpoint) => {
                ensure!(
                    checkpoint.settings.inputs == inputs,
                    "the checkpoint is of rows of {} numbers, but {} has rows of {inputs}",
                    checkpoint.settings.inputs,
                    options.data.display()
                );
                options.check_against(&checkpoint.settings)?;
                checkpoint.settings.clone()
            }
        };
        ensure!(settings.latents > 0, "--latents is 0; it must be at least 1");
        ensure!(settings.batch > 0, "--batch is 0; it must be at least 1");
        ensure!(settings.micro_batch != Some(0), "--micro-batch is 0; it must be at least 1");
        ensure!(options.epochs > 0, "--epochs is 0; it must be at least 1");
        ensure!(options.threads != Some(0), "--threads is 0; it must be at least 1");
        let out = options
            .out
            .unwrap_or_else(|| PathBuf::from("runs").join(jiff::Zoned::now().strftime("%Y-%m-%d-%H%M%S").to_string()));
        let threads = options.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, Into::into));
        let (epochs, device, data, resume) = (options.epochs, options.device, options.data, options.resume);
        Ok(Self { settings, epochs, device, threads, out, data, resume })
    }

    /// For `config.json`.
    pub fn config(&self) -> serde_json::Value {
        json!({
            "settings": self.settings,
            "epochs": self.epochs,
            "device": self.device,
            "threads": self.threads,
            "data": self.data,
            "resume": self.resume,
            "version": env!("CARGO_PKG_VERSION"),
        })
    }
}

impl Options {
    fn settings(&self, inputs: usize, storage: Storage) -> Result<Settings> {
        let model = match self.model.unwrap_or(ModelKind::DecoderFree) {
            ModelKind::DecoderFree => {
                ensure!(self.lambda_l1.is_none(), "--lambda-l1 is of the standard model");
                Model::DecoderFree {
                    lambda_lse: self.lambda_lse.unwrap_or(1.0),
                    lambda_var: self.lambda_var.unwrap_or(1.0),
                    lambda_tc: self.lambda_tc.unwrap_or(1.0),
                    lambda_wr: self.lambda_wr.unwrap_or(0.0),
                }
            }
            ModelKind::Standard => {
                let lambdas = [self.lambda_lse, self.lambda_var, self.lambda_tc, self.lambda_wr];
                ensure!(lambdas.iter().all(Option::is_none), "the standard model has --lambda-l1 alone");
                Model::Standard { lambda_l1: self.lambda_l1.unwrap_or(0.01) }
            }
        };
        let learning_rate = self.lr.unwrap_or(1e-3);
        let optimizer = match self.optimizer.unwrap_or(OptimizerKind::Adam) {
            OptimizerKind::Adam => {
                ensure!(self.momentum.is_none(), "--momentum is of --optimizer sgd");
                Optimizer::Adam { learning_rate }
            }
            OptimizerKind::Sgd => Optimizer::Sgd { learning_rate, momentum: self.momentum.unwrap_or(0.0) },
        };
        Ok(Settings {
            model,
            inputs,
            latents: self.latents.unwrap_or(64),
            batch: self.batch.unwrap_or(128),
            micro_batch: self.micro_batch,
            optimizer,
            seed: self.seed.unwrap_or(0),
            storage,
        })
    }

    /// An option that is given although a checkpoint settles it must say the same.
    fn check_against(&self, settings: &Settings) -> Result<()> {
        let (kind, lambdas, l1) = match settings.model {
            Model::DecoderFree { lambda_lse, lambda_var, lambda_tc, lambda_wr } => {
                (ModelKind::DecoderFree, [lambda_lse, lambda_var, lambda_tc, lambda_wr].map(Some), None)
            }
            Model::Standard { lambda_l1 } => (ModelKind::Standard, [None; 4], Some(lambda_l1)),
        };
        let (optimizer, lr, momentum) = match settings.optimizer {
            Optimizer::Adam { learning_rate } => (OptimizerKind::Adam, learning_rate, None),
            Optimizer::Sgd { learning_rate, momentum } => (OptimizerKind::Sgd, learning_rate, Some(momentum)),
        };
        same("--model", self.model, Some(kind))?;
        same("--latents", self.latents, Some(settings.latents))?;
        same("--batch", self.batch, Some(settings.batch))?;
        same("--micro-batch", self.micro_batch, settings.micro_batch)?;
        same("--optimizer", self.optimizer, Some(optimizer))?;
        same("--lr", self.lr, Some(lr))?;
        same("--momentum", self.momentum, momentum)?;
        same("--lambda-lse", self.lambda_lse, lambdas[0])?;
        same("--lambda-var", self.lambda_var, lambdas[1])?;
        same("--lambda-tc", self.lambda_tc, lambdas[2])?;
        same("--lambda-wr", self.lambda_wr, lambdas[3])?;
        same("--lambda-l1", self.lambda_l1, l1)?;
        same("--seed", self.seed, Some(settings.seed))?;
        same("--dtype", self.dtype, Some(settings.storage))
    }
}

fn same<T: PartialEq + Debug>(option: &str, given: Option<T>, settled: Option<T>) -> Result<()> {
    match (given, settled) {
        (Some(given), Some(settled)) if given != settled => {
            bail!("{option} is {given:?}, but the checkpoint was trained with {settled:?}; leave the option out")
        }
        (Some(given), None) => {
            bail!("{option} is {given:?}, but the checkpoint was trained without; leave the option out")
        }
        _ => Ok(()),
    }
}
