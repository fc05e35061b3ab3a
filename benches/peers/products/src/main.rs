//! Our plain products beside those of the crates `gemm`, `faer` and `matrixmultiply`, in turns in one process on the same data.
//!
//! ```sh
//! cargo run --release -p product-peers                        # one thread
//! cargo run --release -p product-peers -- --threads 2 --write benches/results/cpu.md
//! ```
//!
//! A round is a block of calls of each, and the order moves on from round to round. Times are medians over rounds. The peak, fused
//! multiply-adds in registers, is measured in every round. Each peer's product must agree with ours to be in the table.

#[path = "../../../kernels/peak.rs"]
#[allow(dead_code)]
mod peak;
mod peers;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use peers::{Call, Job, PEERS};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sae_kernels::Shape;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The shapes of `benches/kernels`, a batch of a thousand, and one where N and H are large.
const SHAPES: [Shape; 5] = [
    Shape { rows: 128, inputs: 784, latents: 64 },
    Shape { rows: 1024, inputs: 784, latents: 64 },
    Shape { rows: 4096, inputs: 784, latents: 256 },
    Shape { rows: 1024, inputs: 768, latents: 4096 },
    Shape { rows: 4096, inputs: 768, latents: 1024 },
];
const BLOCK: Duration = Duration::from_millis(5);
/// Threads that still spin after a block end in this time.
const PAUSE: Duration = Duration::from_millis(2);

#[derive(Parser)]
#[command(about = "Times our plain products beside other crates'")]
struct Options {
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Seconds of rounds for each product
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// A Markdown file, whose part on this number of threads is replaced
    #[arg(long)]
    write: Option<PathBuf>,
    /// One tiny shape, to see that everything runs and agrees
    #[arg(long)]
    quick: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    // SAFETY: no other thread runs yet. matrixmultiply reads it once.
    unsafe { std::env::set_var("MATMUL_NUM_THREADS", options.threads.to_string()) };
    let tiny = [Shape { rows: 33, inputs: 20, latents: 17 }];
    let shapes = if options.quick { &tiny[..] } else { &SHAPES };
    let seconds = if options.quick { 0.02 } else { options.seconds };

    let names: Vec<_> = PEERS.iter().map(|(name, _)| *name).collect();
    let mut table = format!("| product | N×D×H | {} | best peer / ours |\n", names.join(" | "));
    writeln!(table, "|{}", "---|".repeat(names.len() + 3))?;
    for &shape in shapes {
        for mut job in jobs(shape, options.threads)? {
            let row = run(&mut job, seconds)?;
            print!("{row}");
            table += &row;
        }
    }
    if let Some(path) = &options.write {
        replace_block(path, options.threads, &table)?;
    }
    Ok(())
}

/// The products of a step: x Wᵀ, dZ W and dZᵀ x.
fn jobs(shape: Shape, threads: usize) -> Result<Vec<Job>> {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let mut random = StdRng::seed_from_u64(0);
    let mut uniform = |len: usize| -> Vec<f32> { (0..len).map(|_| random.random_range(-1.0..1.0)).collect() };
    let (x, weight, dz) = (uniform(n * d), uniform(h * d), uniform(n * h));
    [
        Job::new("x·Wᵀ", shape, threads, x.clone(), weight.clone(), [n, h, d], [false, true]),
        Job::new("dZ·W", shape, threads, dz.clone(), weight, [n, d, h], [false, false]),
        Job::new("dZᵀ·x", shape, threads, dz, x, [h, d, n], [true, false]),
    ]
    .into_iter()
    .collect()
}

/// Times everyone at one product, and makes a row of the table.
fn run(job: &mut Job, seconds: f64) -> Result<String> {
    let calls = PEERS.iter().map(|(name, call)| check(job, name, *call)).collect::<Result<Vec<_>>>()?;
    let mut times = vec![Vec::new(); PEERS.len()];
    let mut peaks = Vec::new();
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    for round in 0.. {
        if round >= 3 && (Instant::now() > end || round == 60) {
            break;
        }
        peaks.push(peak::flops(job.threads));
        for turn in 0..PEERS.len() {
            let which = (round + turn) % PEERS.len();
            times[which].push(block(job, PEERS[which].1, calls[which]));
        }
    }
    let peak = median(&mut peaks);
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    let [m, n, k] = job.extents;
    let flops = 2.0 * m as f64 * n as f64 * k as f64;
    let Shape { rows, inputs, latents } = job.shape;
    let mut row = format!("| {} | {rows}×{inputs}×{latents} |", job.name);
    for time in &medians {
        write!(row, " {:.1} GFLOP/s, {:.0} % |", flops / time / 1e9, 100.0 * flops / time / peak)?;
    }
    let best = medians[1..].iter().copied().fold(f64::INFINITY, f64::min);
    writeln!(row, " {:.2} × |", best / medians[0])?;
    Ok(row)
}

/// How many calls make a block; an error if the product is not ours, which is the first to be called.
fn check(job: &mut Job, name: &str, call: Call) -> Result<usize> {
    job.out.fill(f32::NAN);
    call(job);
    let depth = job.extents[2] as f32;
    match &job.expected {
        None => {
            check_ours(job)?;
            job.expected = Some(job.out.clone());
        }
        Some(expected) => {
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * depth.sqrt() + 1e-6 * depth;
            ensure!(job.out.iter().zip(expected).all(near), "{name} has another {}", job.name);
        }
    }
    let start = Instant::now();
    call(job);
    Ok((BLOCK.as_secs_f64() / start.elapsed().as_secs_f64()).ceil() as usize)
}

/// Some elements of our product against sums in f64.
fn check_ours(job: &Job) -> Result<()> {
    let [m, n, k] = job.extents;
    let (left, right) = (job.left_strides(), job.right_strides());
    for (i, j) in (0..m).step_by(m.div_ceil(8)).zip((0..n).step_by(n.div_ceil(8))) {
        let term = |p: usize| {
            let (l, r) = (job.left[i * left[0] + p * left[1]], job.right[p * right[0] + j * right[1]]);
            f64::from(l) * f64::from(r)
        };
        let (expected, found) = ((0..k).map(term).sum::<f64>(), f64::from(job.out[i * n + j]));
        ensure!((expected - found).abs() <= 1e-6 * k as f64, "our {} is {found} where {expected} is right", job.name);
    }
    Ok(())
}

/// Seconds of one call.
fn block(job: &mut Job, call: Call, calls: usize) -> f64 {
    std::thread::sleep(PAUSE);
    if calls > 1 {
        call(job);
    }
    let start = Instant::now();
    (0..calls).for_each(|_| call(job));
    start.elapsed().as_secs_f64() / calls as f64
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

fn replace_block(path: &Path, threads: usize, table: &str) -> Result<()> {
    let name = format!("product-peers-{threads}");
    let (begin, end) = (format!("<!-- {name}: generated -->"), format!("<!-- {name}: end -->"));
    let plural = if threads == 1 { "" } else { "s" };
    let block = format!(
        "{begin}\n## Plain products beside other crates', {threads} thread{plural}\n\nf32, by `cargo run --release -p product-peers`: all \
         in one process in turns, on the same data; medians, and the share of the peak\n(fused multiply-adds in registers) of the \
         same rounds. gemm 0.19 with its AVX-512 kernels, faer 0.24, matrixmultiply 0.3.\n\n{table}{end}"
    );
    let old = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let new = match (old.find(&begin), old.find(&end)) {
        (Some(from), Some(to)) => format!("{}{block}{}", &old[..from], &old[to + end.len()..]),
        _ => format!("{}\n\n{block}\n", old.trim_end()),
    };
    std::fs::write(path, new).with_context(|| format!("writing {}", path.display()))
}
