//! The tables of Oursland 2026 (arXiv 2601.06478), trained again and set beside the published values.
//!
//! ```text
//! cargo run --release --example paper -- --data DIR --quick     one seed, 10 epochs: a look at it
//! cargo run --release --example paper -- --data DIR             as published
//! ```
//!
//! DIR holds MNIST's four files. The report is printed and written, with its figures, to `--out`.

#[path = "../common/mod.rs"]
mod common;
mod experiments;
mod identity;
mod machine;
mod published;
mod report;
mod runs;
mod table;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use common::data;
use common::trainer::{Model, Optimizer, Trainer};
use common::{figures, files};
use runs::{BATCH, Runs, settings};
use sae_kernels::{Cpu, Isa};
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

/// Trains the paper's ablation, benchmark and sweep over optimisers, and sets them beside the published values.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Options {
    /// Directory of MNIST's four files, plain or .gz. The default has the 10 000 test images alone, too few to compare with what is
    /// published
    #[arg(long, value_name = "DIR", default_value_os_t = data::default_directory(), hide_default_value = true)]
    data: PathBuf,
    /// Where to write the report, README.md, and its figures
    #[arg(long, value_name = "DIR", default_value = "runs/paper")]
    out: PathBuf,
    /// One seed and 10 epochs
    #[arg(long)]
    quick: bool,
    /// Trainings done at once, each on one thread [default: one for each core]
    #[arg(long, value_name = "COUNT")]
    threads: Option<usize>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let data = data::load(&options.data)?;
    ensure!(data.train.labels.is_some(), "{}: the paper's tables need labels", options.data.display());
    let threads = options.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, Into::into));
    ensure!(threads > 0, "--threads is 0; it must be at least 1");
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("cannot start the threads")?;

    // The identity, on the first batch under fresh parameters.
    let fresh = settings(
        Model::DecoderFree { lambda_lse: 1.0, lambda_var: 1.0, lambda_tc: 1.0, lambda_wr: 0.0 },
        Optimizer::Adam { learning_rate: 1e-3 },
        data.inputs,
        0,
    );
    let fresh = Trainer::new(Cpu::<f32>::with(Isa::detect(), 1)?, fresh)?;
    let batch = &data.train.x[..BATCH.min(data.train.rows) * data.inputs];
    let identity = identity::check(batch, &fresh.parameter("weight")?, &fresh.parameter("bias")?)?;
    let identity = identity.to_string();
    println!("{identity}");

    let (epochs, seeds) = if options.quick { (10, Some(1)) } else { (100, None) };
    let experiments = experiments::all(data.inputs, seeds);
    let wanted: Vec<_> = experiments.trainings().cloned().collect();
    let start = Instant::now();
    let runs = Runs::new(&wanted, &data, epochs)?;

    let context = report::Context {
        identity,
        data: format!("{} training rows, {} test rows, {} inputs", data.train.rows, data.test.rows, data.inputs),
        command: format!(
            "cargo run --release --example paper -- --data DIR{}{}",
            if options.quick { " --quick" } else { "" },
            options.threads.map_or(String::new(), |threads| format!(" --threads {threads}"))
        ),
        machine: machine::summary(threads),
        seconds: start.elapsed().as_secs_f64(),
        as_published: !options.quick && data.train.rows == 60_000,
        wanted: wanted.len(),
        epochs,
    };
    files::make_directory(&options.out)?;
    let markdown = report::markdown(&context, &experiments, &runs);
    files::write(&options.out.join("README.md"), markdown.as_bytes())?;
    report::figures(&options.out, &experiments, &runs)?;
    if let (Some(size), Some(features)) = (data.image, experiments.features(&runs)) {
        for (name, outcome) in features {
            let variance = &outcome.evaluation.variance;
            let mut order: Vec<usize> = (0..variance.len()).collect();
            order.sort_by(|l, r| variance[*r].total_cmp(&variance[*l]));
            figures::tiles(&options.out.join(name), &outcome.features, size, &order)?;
        }
    }
    println!("\n{markdown}\n{}", options.out.join("README.md").display());
    Ok(())
}
