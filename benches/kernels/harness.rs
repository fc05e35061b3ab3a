//! What the groups share: shapes, data, and a criterion benchmark that also prints its share of the peak.

use crate::peak;
use criterion::{BenchmarkId, Criterion, Throughput};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sae_kernels::{Backend, Cpu, CpuElement, Element, Isa, Shape};
use std::cell::Cell;
use std::io::Write;
use std::time::{Duration, Instant};

/// The paper's batch, a wider one with N > H, and one in the dual regime.
pub const SHAPES: [Shape; 3] = [
    Shape { rows: 128, inputs: 784, latents: 64 },
    Shape { rows: 4096, inputs: 784, latents: 256 },
    Shape { rows: 1024, inputs: 768, latents: 4096 },
];

/// What bounds an operation, and how much of it one call does.
#[derive(Clone, Copy)]
pub enum Work {
    /// Floating-point operations, a multiply-add counting 2.
    Flops(f64),
    /// Bytes read and written.
    Bytes(f64),
}

pub struct Bench<'a> {
    criterion: &'a mut Criterion,
    pub threads: Vec<usize>,
}

impl<'a> Bench<'a> {
    pub fn new(criterion: &'a mut Criterion) -> Self {
        let all = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if all == 1 { vec![1] } else { vec![1, all] };
        Self { criterion, threads }
    }

    /// Times `call` as `group/name/shape threads`, and returns whether it was to be timed.
    pub fn time(
        &mut self,
        group: &str,
        name: &str,
        shape: Shape,
        threads: usize,
        work: Work,
        mut call: impl FnMut(),
    ) -> bool {
        self.measure(group, name, &format!("{} {threads}t", shape_name(shape)), work, |calls| {
            let peak = match work {
                Work::Flops(_) => peak::flops(threads),
                Work::Bytes(_) => peak::copy(threads),
            };
            let start = Instant::now();
            (0..calls).for_each(|_| call());
            (peak, start.elapsed())
        })
    }

    /// Shows what `sample` tells: the peak a second, NaN if there is none, and the time that so many calls took. Criterion's files have
    /// the times; `SAE_KERNELS_PEAKS=FILE` also keeps the peaks and what a call does, a line of JSON each. Returns whether there was a peak.
    pub fn measure(
        &mut self,
        group_name: &str,
        name: &str,
        parameter: &str,
        work: Work,
        mut sample: impl FnMut(u64) -> (f64, Duration),
    ) -> bool {
        let mut group = self.criterion.benchmark_group(group_name);
        group.throughput(match work {
            Work::Flops(flops) => Throughput::Elements(flops as u64),
            Work::Bytes(bytes) => Throughput::Bytes(bytes as u64),
        });
        // The peak is measured before each sample, so that both see the same machine.
        let (peak, time) = (Cell::new(f64::NAN), Cell::new(f64::NAN));
        group.bench_function(BenchmarkId::new(name, parameter), |bencher| {
            bencher.iter_custom(|calls| {
                let (now, elapsed) = sample(calls);
                peak.set(peak.get().max(now));
                time.set(time.get().min(elapsed.as_secs_f64() / calls as f64));
                elapsed.max(Duration::from_nanos(1))
            });
        });
        group.finish();
        if peak.get().is_finite() {
            let (done, unit) = match work {
                Work::Flops(flops) => (flops, "FLOP/s"),
                Work::Bytes(bytes) => (bytes, "B/s"),
            };
            let (rate, peak) = (done / time.get(), peak.get());
            if let Some(path) = std::env::var_os("SAE_KERNELS_PEAKS") {
                let line = serde_json::json!({
                    "group": group_name, "name": name, "shape": parameter, "work": done, "unit": unit, "peak": peak,
                });
                let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
                file.and_then(|mut file| writeln!(file, "{line}"))
                    .expect("SAE_KERNELS_PEAKS names a file to append to");
            }
            println!(
                "      best {:.1} of {:.1} G{unit}: {:.0} % of the peak",
                rate / 1e9,
                peak / 1e9,
                100.0 * rate / peak
            );
        }
        peak.get().is_finite()
    }
}

/// Data of one shape, in storage type `E`.
pub struct Data<E> {
    pub x: Vec<E>,
    pub weight: Vec<E>,
    pub bias: Vec<f32>,
}

impl<E: CpuElement> Data<E> {
    /// Inputs like digits (sparse, in [0, 1)) and weights as they are initialised.
    pub fn new(shape: Shape) -> Self {
        let mut random = StdRng::seed_from_u64(0);
        let Shape { rows, inputs, latents } = shape;
        let scale = 1.0 / (inputs as f32).sqrt();
        let mut digit = || if random.random_bool(0.3) { random.random::<f32>() } else { 0.0 };
        let x = (0..rows * inputs).map(|_| E::from_f32(digit())).collect();
        let mut uniform = || random.random_range(-scale..scale);
        let weight = (0..latents * inputs).map(|_| E::from_f32(uniform())).collect();
        let bias = (0..latents).map(|_| uniform()).collect();
        Self { x, weight, bias }
    }
}

/// A backend and its workspace for a shape.
pub fn cpu<E: CpuElement>(shape: Shape, threads: usize) -> (Cpu<E>, Vec<f64>) {
    let cpu = Cpu::with(Isa::detect(), threads).expect("this machine has the instruction set it detects");
    let workspace = cpu.workspace_len(shape).expect("the benchmark's shapes fit");
    (cpu, vec![0.0; workspace])
}

/// A shape as the benchmarks' names have it.
pub fn shape_name(shape: Shape) -> String {
    let Shape { rows, inputs, latents } = shape;
    format!("{rows}x{inputs}x{latents}")
}

/// 2·m·n·k.
pub fn product_flops(m: usize, n: usize, k: usize) -> Work {
    Work::Flops(2.0 * m as f64 * n as f64 * k as f64)
}

/// A name with the storage type.
pub fn typed<E: Element>(name: &str) -> String {
    format!("{name} {}", E::NAME)
}
