//! The report: Markdown with the three tables, and figures.

use crate::common::figures::{self, Panel, Point, Series};
use crate::experiments::{Configuration, Experiments, Measure};
use crate::runs::Runs;
use crate::table::{self, Line};
use anyhow::Result;
use std::path::Path;

/// What the tables do not tell.
pub struct Context {
    /// The gradient identity, in a line.
    pub identity: String,
    /// The data, in words.
    pub data: String,
    /// How this was made.
    pub command: String,
    /// What it ran on.
    pub machine: String,
    /// Wall time of all trainings, in seconds.
    pub seconds: f64,
    /// Whether seeds, epochs and data are those of the paper.
    pub as_published: bool,
    /// Trainings that the tables ask for; some stand in several.
    pub wanted: usize,
    /// Epochs of each.
    pub epochs: u64,
}

/// The whole report.
pub fn markdown(context: &Context, experiments: &Experiments, runs: &Runs) -> String {
    let lines = |configurations: &[Configuration]| -> Vec<Line> {
        configurations.iter().flat_map(|configuration| configuration.lines(runs)).collect()
    };
    let tables = [&experiments.ablation, &experiments.benchmark, &experiments.sweep].map(|c| lines(c));
    let flagged = tables.iter().flatten().filter(|line| line.is_flagged()).count();
    let [ablation, benchmark, sweep] = tables.map(|lines| table::markdown(&lines));
    let caution = if context.as_published {
        ""
    } else {
        "\n**Fewer epochs, seeds or rows than the paper's: differences from what is published are to be expected, and the flags mean \
         little.**\n"
    };
    format!(
        "# Decoder-free sparse autoencoders, trained again

Published values are those of Oursland 2026 (arXiv 2601.06478).
{caution}
{identity}

## Ablation

{ablation}
![Ablation](ablation.png)

## Benchmark

{benchmark}
![Features of the decoder-free model](features-decoder-free.png)
![Decoder of the standard model](features-standard.png)

## Optimisers

{sweep}
![Optimisers](sweep.png)

## How

* `{command}`
* {machine}; {data}; {date}
* {seconds:.0} s of wall time for {trainings} trainings of {epochs} epochs in f32, each on one thread, with their measures.
* The tables have {wanted} places for trainings; those with the same configuration and seed are one training: \"LSE + var + tc\",
  \"decoder-free\" and \"Adam 1e-3\" share theirs.
* \"here\" is the mean ± standard deviation (n − 1) over seeds. The last column is the difference in published standard deviations,
  or in half units of the last published decimal where that is more; {flagged} of them are beyond 3. Where no deviation is
  published there is nothing to divide by.
* Measures are of the test set. Dead: variance below 0.01. Redundancy: Σ C_ij² over pairs of latents. L0: activations above 0.01.
  Linear probe: multinomial logistic regression (C = 1) on standardised activations. Final loss: mean over the batches of the last
  epoch, each summed over its rows. SGD is without momentum.
",
        identity = context.identity,
        command = context.command,
        machine = context.machine,
        data = context.data,
        date = jiff::Zoned::now().strftime("%Y-%m-%d"),
        seconds = context.seconds,
        trainings = runs.len(),
        epochs = context.epochs,
        wanted = context.wanted,
    )
}

/// `ablation.png` and `sweep.png`.
pub fn figures(out: &Path, experiments: &Experiments, runs: &Runs) -> Result<()> {
    let ablation: Vec<&Configuration> = experiments.ablation.iter().collect();
    let names = || experiments.ablation.iter().map(|c| c.name.clone()).collect();
    let panel = |title: &str, measure: usize, scale: fn(f64) -> f64| Panel {
        title: title.to_owned(),
        horizontal: String::new(),
        places: names(),
        series: series("", &ablation, measure, runs, scale),
    };
    let log = |value: f64| value.max(1e-3).log10();
    figures::points(
        &out.join("ablation.png"),
        &[panel("redundancy, log10", 1, log), panel("responsibility entropy, nats", 2, |value| value)],
    )?;

    let (sgd, adam): (Vec<_>, Vec<_>) = experiments.sweep.iter().partition(|c| c.name.starts_with("SGD"));
    let panel = |title: &str, measure: usize| Panel {
        title: title.to_owned(),
        horizontal: "learning rate".to_owned(),
        places: ["1e-4", "1e-3", "1e-2", "1e-1"].map(str::to_owned).to_vec(),
        series: [("SGD", &sgd), ("Adam", &adam)]
            .into_iter()
            .flat_map(|(name, configurations)| series(name, configurations, measure, runs, |value| value))
            .collect(),
    };
    figures::points(&out.join("sweep.png"), &[panel("final loss", 0), panel("linear probe, %", 1)])
}

/// What was measured, and beside it what is published.
fn series(
    name: &str,
    configurations: &[&Configuration],
    measure: usize,
    runs: &Runs,
    scale: fn(f64) -> f64,
) -> Vec<Series> {
    let point = |at: f64, mean: f64, deviation: Option<f64>| {
        let (low, high) = (scale(mean - deviation.unwrap_or(0.0)), scale(mean + deviation.unwrap_or(0.0)));
        Point { at, mean: scale(mean), deviation: 0.5 * (high - low) }
    };
    // What is not published is not defined either: correlations of dead units.
    let of = |c: &Configuration| -> Option<(f64, Option<f64>)> {
        measure_of(c, measure).published?;
        let measured = c.measured(measure_of(c, measure), runs).ok()?;
        measured.mean.is_finite().then_some((measured.mean, measured.deviation))
    };
    let here = configurations
        .iter()
        .enumerate()
        .filter_map(|(place, c)| of(c).map(|(mean, deviation)| point(place as f64 - 0.08, mean, deviation)));
    let published = configurations.iter().enumerate().filter_map(|(place, c)| {
        measure_of(c, measure).published.map(|p| point(place as f64 + 0.08, p.mean, p.deviation))
    });
    let label = |what: &str| if name.is_empty() { what.to_owned() } else { format!("{name}, {what}") };
    vec![
        Series { name: label("here"), points: here.collect(), published: false },
        Series { name: label("published"), points: published.collect(), published: true },
    ]
}

fn measure_of(configuration: &Configuration, measure: usize) -> &Measure {
    &configuration.measures[measure]
}
