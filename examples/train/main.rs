//! Trains a sparse autoencoder and leaves figures, a checkpoint and measures in a run folder.
//!
//! ```text
//! cargo run --release --example train
//! cargo run --release --example train -- --data activations.safetensors --latents 512 --epochs 10
//! cargo run --release --example train -- --resume runs/…/checkpoint.safetensors --epochs 60
//! ```
//!
//! Without arguments: the decoder-free model of Oursland 2026 (arXiv 2601.06478) on the images that come with the repository.

#[path = "../common/mod.rs"]
mod common;
mod options;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use comfy_table::{Table, presets};
use common::checkpoint::Checkpoint;
use common::data::{self, Dataset};
use common::device::Job;
use common::evaluate::{Evaluation, evaluate};
use common::trainer::{Model, Trainer};
use common::{figures, files};
use indicatif::{ProgressBar, ProgressStyle};
use options::{Options, Run};
use sae_kernels::Backend;
use serde_json::json;
use std::time::{Duration, Instant};

/// While training goes on, a checkpoint is written after an epoch if the last is older than this.
const CHECKPOINT_AFTER: Duration = Duration::from_secs(10);
/// More latents than this do not fit in a picture that can be looked at.
const MOST_TILES: usize = 1024;

fn main() -> Result<()> {
    let options = Options::parse();
    let checkpoint = options.resume.as_deref().map(Checkpoint::read).transpose()?;
    let data = data::load(&options.data)?;
    let run = Run::new(options, checkpoint.as_ref(), data.inputs)?;
    println!("{}", data.source);
    let (device, storage, threads) = (run.device, run.settings.storage, run.threads);
    device.run(storage, threads, Training { run, data, checkpoint })
}

/// The whole run, on any backend.
struct Training {
    run: Run,
    data: Dataset,
    checkpoint: Option<Checkpoint>,
}

impl Job for Training {
    type Output = ();

    fn run<B: Backend + Clone>(self, backend: B) -> Result<()> {
        let Training { run, data, checkpoint } = self;
        let mut trainer = match &checkpoint {
            Some(checkpoint) => Trainer::resume(backend, checkpoint)?,
            None => Trainer::new(backend, run.settings.clone())?,
        };
        ensure!(
            trainer.epoch() <= run.epochs,
            "the checkpoint has {} epochs behind it already; --epochs is the total and must not be less",
            trainer.epoch()
        );
        files::make_directory(&run.out)?;
        files::write(&run.out.join("config.json"), &serde_json::to_vec_pretty(&run.config())?)?;

        let start = Instant::now();
        train(&mut trainer, &run, &data)?;
        let train_seconds = start.elapsed().as_secs_f64();
        trainer.checkpoint()?.write(&run.out.join("checkpoint.safetensors"))?;

        let evaluation = evaluate(&trainer, &data).context("cannot measure the model")?;
        let seconds = start.elapsed().as_secs_f64();
        draw(&trainer, &run, &data, &evaluation)?;
        report(&trainer, &run, &evaluation, train_seconds, seconds)
    }
}

/// All epochs that are still to do, with a progress bar.
fn train<B: Backend + Clone>(trainer: &mut Trainer<B>, run: &Run, data: &Dataset) -> Result<()> {
    let steps = trainer.batches(data.train.rows).count() as u64;
    let done = trainer.epoch() * steps;
    let bar = ProgressBar::new(run.epochs * steps).with_position(done);
    bar.set_style(ProgressStyle::with_template("{bar:16.cyan/blue} {percent:>3} %, {eta} left  {wide_msg}")?);
    let terms = run.settings.model.terms();
    let mut written = Instant::now();
    while trainer.epoch() < run.epochs {
        let epoch = trainer.epoch() + 1;
        let mut step = 0u64;
        trainer.train_epoch(&data.train.x, |losses| {
            step += 1;
            bar.inc(1);
            if step.is_multiple_of(16) {
                bar.set_message(message(epoch, terms, losses));
            }
        })?;
        // Where there is no terminal there is no bar: about ten lines tell of the progress instead.
        if bar.is_hidden() && (epoch.is_multiple_of(run.epochs.div_ceil(10)) || epoch == run.epochs) {
            eprintln!("{}", message(epoch, terms, &trainer.history()[epoch as usize - 1]));
        }
        if written.elapsed() > CHECKPOINT_AFTER {
            trainer.checkpoint()?.write(&run.out.join("checkpoint.safetensors"))?;
            written = Instant::now();
        }
    }
    bar.finish();
    Ok(())
}

/// Loss terms in a line, the total first: a narrow terminal cuts the end off.
fn message(epoch: u64, terms: &[&str], losses: &[f64]) -> String {
    let terms: Vec<String> =
        terms.iter().zip(losses).rev().map(|(name, loss)| format!("{name} {}", short(*loss))).collect();
    format!("epoch {epoch}: {}", terms.join("  "))
}

/// A loss with as many decimals as its size asks for.
fn short(loss: f64) -> String {
    let decimals = if loss == 0.0 || loss.abs() >= 100.0 { 1 } else { 4 };
    format!("{loss:.decimals$}")
}

fn draw<B: Backend + Clone>(trainer: &Trainer<B>, run: &Run, data: &Dataset, evaluation: &Evaluation) -> Result<()> {
    figures::losses(&run.out.join("losses.png"), run.settings.model.terms(), trainer.history())?;
    let Some(size) = data.image else {
        println!("The rows of the data are no images: no features.png");
        return Ok(());
    };
    // The latents that vary most come first.
    let mut order: Vec<usize> = (0..run.settings.latents).collect();
    order.sort_by(|l, r| evaluation.variance[*r].total_cmp(&evaluation.variance[*l]));
    if order.len() > MOST_TILES {
        println!("features.png shows the {MOST_TILES} latents with the largest variance of {}", order.len());
        order.truncate(MOST_TILES);
    }
    // What a latent of the standard model stands for is what it writes.
    let weight = match run.settings.model {
        Model::DecoderFree { .. } => "weight",
        Model::Standard { .. } => "decoder_weight",
    };
    figures::tiles(&run.out.join("features.png"), &trainer.parameter(weight)?, size, &order)
}

/// Writes `metrics.json` and prints the same as a table.
fn report<B: Backend + Clone>(
    trainer: &Trainer<B>,
    run: &Run,
    evaluation: &Evaluation,
    train_seconds: f64,
    seconds: f64,
) -> Result<()> {
    let terms = run.settings.model.terms();
    let losses = trainer.history().last().cloned().unwrap_or_default();
    let mut metrics = serde_json::to_value(&evaluation.metrics)?;
    for (name, loss) in terms.iter().zip(&losses) {
        metrics[name] = json!(loss);
    }
    metrics["epochs"] = json!(trainer.epoch());
    metrics["train_seconds"] = json!(train_seconds);
    metrics["seconds"] = json!(seconds);
    metrics["config"] = run.config();
    files::write(&run.out.join("metrics.json"), &serde_json::to_vec_pretty(&metrics)?)?;

    let measures = &evaluation.metrics;
    let latents = run.settings.latents;
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header(["measure", "value", "on"]);
    let mut row = |name: &str, value: String, on: &str| {
        table.add_row([name, &value, on]);
    };
    row("dead units", format!("{}/{latents}", measures.dead_units), "test");
    row("redundancy", format!("{:.3}", measures.redundancy), "test");
    row("responsibility entropy", format!("{:.4} nats", measures.responsibility_entropy), "test");
    row("L0", format!("{:.2}/{latents}", measures.l0), "test");
    let accuracy = measures.probe_accuracy.map_or("no labels".to_owned(), |a| format!("{:.2} %", 100.0 * a));
    row("probe accuracy", accuracy, "test");
    row("reconstruction MSE", format!("{:.5}", measures.reconstruction_mse), "test");
    for (name, loss) in terms.iter().zip(&losses) {
        row(&format!("loss {name}"), format!("{loss:.4}"), "training, mean over the last epoch's batches");
    }
    row("training", format!("{train_seconds:.1} s"), "");
    row("training and measuring", format!("{seconds:.1} s"), "");
    println!("{table}\n{}", run.out.display());
    Ok(())
}
