//! The main job on several processes: trains the decoder-free model on the digits in `data/`, a part of each batch's rows on each rank.
//!
//! ```text
//! cargo build --release -p sae-kernels-mpi --example distributed
//! mpirun -n 4 target/release/examples/distributed
//! ```

#[allow(dead_code)]
#[path = "../../../examples/common/data.rs"]
mod data;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use sae_kernels::operations::{Adam, AdamConfig};
use sae_kernels::{Backend, Cpu, DecoderFree, DecoderFreeConfig, Element, Host, Isa, Losses, MatRef, Reference, Shape};
use sae_kernels_mpi::mpi::traits::*;
use safetensors::{Dtype, tensor::TensorView};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Trains the decoder-free sparse autoencoder on the ranks of MPI.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Options {
    /// Directory of MNIST-format files (plain or .gz), or a .npy or .safetensors file with one matrix of activations
    #[arg(long, value_name = "PATH", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data"), hide_default_value = true)]
    data: PathBuf,
    /// Number of latents
    #[arg(long, value_name = "H", default_value_t = 64)]
    latents: usize,
    /// Rows in a batch, on all ranks together
    #[arg(long, value_name = "ROWS", default_value_t = 128)]
    batch: usize,
    /// Rows of a batch on each rank, such as 100,0,28 [default: as many on each as on the others, give or take one]
    #[arg(long, value_name = "ROWS", value_delimiter = ',')]
    shards: Option<Vec<usize>>,
    /// Number of steps
    #[arg(long, default_value_t = 100)]
    steps: usize,
    /// Learning rate of Adam
    #[arg(long, value_name = "RATE", default_value_t = 1e-3)]
    lr: f64,
    /// Seed of the initial parameters and of the order of the rows
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads of each rank
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    threads: usize,
    /// Computes in float64, by plain loops
    #[arg(long)]
    float64: bool,
    /// Each rank leaves its weight, bias and losses there, in rank-<number>.safetensors
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

fn main() {
    let options = Options::parse();
    sae_kernels_mpi::run(|world| {
        if options.float64 {
            train(world, Reference, &options)
        } else {
            train(world, Cpu::<f32>::with(Isa::detect(), options.threads)?, &options)
        }
    });
}

fn train<R, B>(world: &impl Communicator, backend: B, options: &Options) -> Result<()>
where
    R: Element + Equivalence,
    B: Backend<Memory = Host, Element = R, Real = R> + Clone,
{
    let &Options { latents: h, batch, steps, seed, .. } = options;
    let (rank, ranks) = (world.rank() as usize, world.size() as usize);
    let data = data::load(&options.data)?;
    let d = data.inputs;
    if let Some(shards) = &options.shards {
        ensure!(shards.len() == ranks, "--shards has {} numbers, but there are {ranks} ranks", shards.len());
        ensure!(shards.iter().sum::<usize>() == batch, "the numbers of --shards must add up to --batch, {batch}");
    }
    ensure!(batch >= 2, "--batch is {batch}; a variance needs at least 2 rows");

    let config = DecoderFreeConfig::new(Shape { rows: batch, inputs: d, latents: h });
    let mut model = DecoderFree::new(backend.clone(), config)?;
    // Weight [H,D] and bias [H] in one vector, as their gradients are: one update for both.
    let mut parameters = initial::<R>(h * d + h, d, seed);
    world.process_at_rank(0).broadcast_into(&mut parameters[..]);
    let mut gradients = vec![R::from_f64(0.0); parameters.len()];
    let (mut first_moment, mut second_moment) = (gradients.clone(), gradients.clone());
    let mut history = Vec::new();
    let start = Instant::now();
    for (step, batch) in (1..=steps as u64).zip(batches(data.train.rows, batch, seed)) {
        let mine = &batch[shard(batch.len(), rank, ranks, options.shards.as_deref())];
        let x: Vec<R> =
            mine.iter().flat_map(|row| &data.train.x[row * d..(row + 1) * d]).map(|x| R::from_f32(*x)).collect();

        let (weight, bias) = parameters.split_at(h * d);
        let (x, weight) = (MatRef::new(&x, mine.len(), d)?, MatRef::new(weight, h, d)?);
        let losses = sae_kernels_mpi::step(world, &mut model, x, weight, bias, &mut gradients)?;
        // All ranks have the gradient of the whole batch, to the bit the same: what they update stays the same.
        let config = AdamConfig { learning_rate: options.lr, ..AdamConfig::default() };
        let (first_moment, second_moment) = (&mut first_moment[..], &mut second_moment[..]);
        let (gradient, parameters) = (&gradients[..], &mut parameters[..]);
        backend.adam(Adam { config, step, gradient, first_moment, second_moment, parameters, storage: None })?;

        ensure!(losses.total.is_finite(), "the loss is not finite in step {step}: {losses:?}; a lower --lr may help");
        if rank == 0 && (step == 1 || step.is_multiple_of(10)) {
            let Losses { lse, var, tc, total, .. } = losses;
            println!("step {step}: {total:.1} = lse {lse:.1} + var {var:.1} + tc {tc:.1}");
        }
        history.extend([losses.lse, losses.var, losses.tc, losses.wr, losses.total]);
    }
    if rank == 0 {
        println!("{} rows a batch on {ranks} ranks, {:.2} s", batch, start.elapsed().as_secs_f64());
    }
    options
        .out
        .as_ref()
        .map_or(Ok(()), |out| write(&out.join(format!("rank-{rank}.safetensors")), &parameters, d, &history))
}

/// Uniform in ±1/√D, as PyTorch's `Linear`.
fn initial<R: Element>(len: usize, inputs: usize, seed: u64) -> Vec<R> {
    let bound = 1.0 / (inputs as f64).sqrt();
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    (0..len).map(|_| R::from_f64(rng.random_range(-bound..=bound))).collect()
}

/// Numbers of the rows of each batch, the same on all ranks: each epoch in a fresh order. A single row that is left over makes no batch.
fn batches(rows: usize, batch: usize, seed: u64) -> impl Iterator<Item = Vec<usize>> {
    (1..).flat_map(move |epoch| {
        let mut order: Vec<usize> = (0..rows).collect();
        order.shuffle(&mut Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_add(epoch)));
        order.chunks(batch).filter(|rows| rows.len() > 1).map(<[usize]>::to_vec).collect::<Vec<_>>()
    })
}

/// Which of a batch's rows a rank has. A last batch that is shorter ends before the shards of all ranks do.
fn shard(rows: usize, rank: usize, ranks: usize, shards: Option<&[usize]>) -> Range<usize> {
    match shards {
        None => rank * rows / ranks..(rank + 1) * rows / ranks,
        Some(shards) => {
            let start: usize = shards[..rank].iter().sum();
            start.min(rows)..(start + shards[rank]).min(rows)
        }
    }
}

fn write<R: Element>(path: &Path, parameters: &[R], inputs: usize, history: &[f64]) -> Result<()> {
    let bytes = |values: &[f64]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let widened: Vec<f64> = parameters.iter().map(|p| p.to_f64()).collect();
    let latents = widened.len() / (inputs + 1);
    let (weight, bias) = widened.split_at(latents * inputs);
    let tensors = [
        ("weight", vec![latents, inputs], bytes(weight)),
        ("bias", vec![latents], bytes(bias)),
        ("losses", vec![history.len() / 5, 5], bytes(history)),
    ];
    let views =
        tensors.iter().map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F64, shape.clone(), bytes)?)));
    let file = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None)?;
    std::fs::write(path, file).with_context(|| format!("cannot write {}", path.display()))
}
