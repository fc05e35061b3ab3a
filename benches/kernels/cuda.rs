//! The CUDA backend's main operations and whole steps, timed by CUDA events around calls that are only enqueued. Not yet run on hardware.
//!
//! The share printed below each figure is of what the same GPU did just before: a copy of 256 MiB within its memory, or cuBLASLt's plain
//! product of bf16, of the same extents and summed in f32. `f32` storage and [`Precision::Full`] multiply six times, so a sixth of that
//! ceiling is the most that their products can reach. Small shapes are bound by the time that launches take, and their data stay in the
//! GPU's cache; nothing is captured into graphs.

use crate::harness::{Bench, Work, product_flops, shape_name, typed};
use anyhow::{Context, Result};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sae_kernels::cudarc::driver::sys::CUevent_flags;
use sae_kernels::cudarc::driver::{CudaEvent, CudaStream};
use sae_kernels::operations::{
    Adam, AdamConfig, BackwardDz, CorrelationDual, CorrelationTerm, Covariance, Encode, FinishStatistics, Layout,
    Moments, Operation, PrimalCorrelation, Product, Recentre, StatisticsTerm,
};
use sae_kernels::{
    Activation, Backend, Cuda, CudaBuffer, CudaElement, CudaMemory, DecoderFree, DecoderFreeConfig, DecoderFreeStep,
    Element, MatMut, MatRef, Memory, Objective, Precision, Products, Shape, bf16,
};
use std::sync::Arc;
use std::time::Duration;

/// The paper's batch, a larger one of the same model, and two models of activations of language models.
const SHAPES: [Shape; 4] = [
    Shape { rows: 128, inputs: 784, latents: 64 },
    Shape { rows: 1024, inputs: 784, latents: 64 },
    Shape { rows: 8192, inputs: 768, latents: 6144 },
    Shape { rows: 16_384, inputs: 2048, latents: 16_384 },
];
/// Larger ones, in bf16 alone: a long batch, and more latents than rows.
const LARGE: [Shape; 2] =
    [Shape { rows: 65_536, inputs: 1024, latents: 4096 }, Shape { rows: 8192, inputs: 4096, latents: 32_768 }];
/// As wide as a vocabulary, for the log-sum-exp alone.
const WIDE: Shape = Shape { rows: 4096, inputs: 4096, latents: 131_072 };
/// Each extent of the product that is known as a GPU's ceiling.
const CUBE: usize = 8192;

/// Bytes that the copy reads, more than the caches hold; it writes as many.
const COPIED: usize = 256 << 20;
/// Time that a ceiling is measured for, at least.
const CEILING_SECONDS: f64 = 5e-3;

/// Enqueues an operation once. It owns the operation's buffers.
type Call = Box<dyn FnMut() -> Result<()>>;

pub fn run(bench: &mut Bench) {
    let cuda = match Cuda::<bf16>::new(0) {
        Ok(cuda) => cuda,
        Err(error) => {
            let required = std::env::var("SAE_KERNELS_REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(!required, "the CUDA benchmarks cannot run: {error}");
            eprintln!("CUDA benchmarks left out: {error}");
            return;
        }
    };
    let gpu = Gpu::new(&cuda).expect("the GPU's stream has events");
    let f32s = Cuda::<f32>::on_stream(gpu.stream.clone()).expect("the kernels load a second time");
    ceilings(bench, &gpu, &cuda);
    for shape in SHAPES {
        operations(bench, &gpu, &cuda, shape);
    }
    if fits(&gpu, bytes_to_encode(&gpu, &cuda, WIDE), "encode", WIDE) {
        encode(bench, &gpu, &cuda, WIDE);
    }
    for shape in LARGE {
        operations(bench, &gpu, &cuda, shape);
    }
    for shape in SHAPES {
        operations(bench, &gpu, &f32s, shape);
    }
}

/// The most that a figure is compared with.
#[derive(Clone, Copy)]
enum Ceiling {
    Copy,
    /// m, n, k.
    Product([usize; 3]),
}

/// A stream, a clock on it, and the ceilings.
struct Gpu {
    stream: Arc<CudaStream>,
    start: CudaEvent,
    end: CudaEvent,
    /// None where cuBLASLt is not found.
    library: Option<Cuda<bf16>>,
}

impl Gpu {
    fn new(cuda: &Cuda<bf16>) -> Result<Self> {
        let stream = cuda.stream().context("a GPU has a stream")?.clone();
        // By default cudarc's events keep no time.
        let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        // A smaller workspace than that of the default precision; plain products do not depend on it.
        let library = cuda.clone().with_products(Products::Library).with_precision(Precision::Storage);
        let library = (library.products() == Products::Library).then_some(library);
        let found = if library.is_some() { "cuBLASLt found" } else { "no cuBLASLt, hence no ceiling of products" };
        eprintln!("CUDA benchmarks on {}: {found}", stream.context().name()?);
        Ok(Self { stream, start, end, library })
    }

    /// What the stream took for so many calls, from the first's start to the last's end.
    fn time(&self, calls: u64, call: &mut Call) -> Result<Duration> {
        self.start.record(&self.stream)?;
        (0..calls).try_for_each(|_| call())?;
        self.end.record(&self.stream)?;
        // It waits for both.
        let milliseconds = self.start.elapsed_ms(&self.end)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }

    /// What one call of a ceiling does, and the call.
    fn ceiling(&self, ceiling: Ceiling) -> Result<Option<(f64, Call)>> {
        match ceiling {
            Ceiling::Copy => {
                let values: Vec<f32> = uniform(1, -1.0..1.0).into_iter().cycle().take(COPIED / 4).collect();
                let from = self.stream.clone_htod(&values)?;
                let mut to = self.stream.alloc_zeros::<f32>(values.len())?;
                let stream = self.stream.clone();
                Ok(Some((2.0 * COPIED as f64, Box::new(move || Ok(stream.memcpy_dtod(&from, &mut to)?)))))
            }
            Ceiling::Product([m, n, k]) => {
                let Some(cuda) = &self.library else { return Ok(None) };
                // Both operands' rows run along the depth: the layout that is never cut into blocks of rows.
                let shapes = [[m, k], [n, k], [m, n]];
                Ok(Some((2.0 * m as f64 * n as f64 * k as f64, product(cuda, Layout::Nt, shapes)?)))
            }
        }
    }

    /// What a ceiling's calls do a second.
    fn rate(&self, done: f64, call: &mut Call) -> Result<f64> {
        let once = self.time(1, call)?.as_secs_f64();
        let calls = (CEILING_SECONDS / once.max(1e-9)).ceil().clamp(1.0, 1000.0);
        Ok(done * calls / self.time(calls as u64, call)?.as_secs_f64())
    }

    /// Times what `prepare` makes as `cuda-group/name/shape`; it is made only if the benchmark is to run.
    #[allow(clippy::too_many_arguments)]
    fn bench(
        &self,
        bench: &mut Bench,
        group: &str,
        name: &str,
        shape: Shape,
        work: Work,
        ceiling: Ceiling,
        prepare: impl Fn() -> Result<Call>,
    ) {
        let mut prepared = None;
        bench.measure(&format!("cuda-{group}"), name, &shape_name(shape), work, |calls| {
            let (call, ceiling) = prepared.get_or_insert_with(|| (prepare().unwrap(), self.ceiling(ceiling).unwrap()));
            let peak = ceiling.as_mut().map_or(f64::NAN, |(done, call)| self.rate(*done, call).unwrap());
            (peak, self.time(calls, call).unwrap())
        });
    }
}

fn operations<E: CudaElement>(bench: &mut Bench, gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) {
    if !fits(gpu, bytes_needed(gpu, cuda, shape), E::NAME, shape) {
        return;
    }
    encode(bench, gpu, cuda, shape);
    products(bench, gpu, cuda, shape);
    adam(bench, gpu, cuda, shape);
    // f32 is multiplied the same way in both.
    let precisions: &[_] = if is_16_bit::<E>() { &[Precision::Storage, Precision::Full] } else { &[Precision::Full] };
    for precision in precisions {
        let cuda = cuda.clone().with_precision(*precision);
        finish_statistics(bench, gpu, &cuda, shape);
        backward_dz(bench, gpu, &cuda, shape);
        correlation_dual(bench, gpu, &cuda, shape);
        step(bench, gpu, &cuda, shape);
    }
}

/// Whether so many bytes are free; says so if not.
fn fits(gpu: &Gpu, needed: Result<usize>, what: &str, shape: Shape) -> bool {
    let (free, _) = gpu.stream.context().mem_get_info().expect("the driver knows the free memory");
    let needed = needed.expect("the sizes of the benchmarks' buffers");
    if needed > free {
        let (name, needed, free) = (shape_name(shape), needed as f64 / 1e9, free as f64 / 1e9);
        eprintln!("CUDA benchmarks left out: {name} {what} needs {needed:.1} GB, {free:.1} GB are free");
    }
    needed <= free
}

/// The copy, and our kernel beside cuBLASLt's at the product by which GPUs are compared.
fn ceilings(bench: &mut Bench, gpu: &Gpu, cuda: &Cuda<bf16>) {
    let cube = Shape { rows: CUBE, inputs: CUBE, latents: CUBE };
    gpu.bench(bench, "ceiling", "copy", cube, Work::Bytes(2.0 * COPIED as f64), Ceiling::Copy, || {
        Ok(gpu.ceiling(Ceiling::Copy)?.expect("a copy needs no library").1)
    });
    let work = product_flops(CUBE, CUBE, CUBE);
    gpu.bench(bench, "ceiling", "product bf16, own", cube, work, Ceiling::Product([CUBE; 3]), || {
        product(&cuda.clone().with_products(Products::Own), Layout::Nt, [[CUBE; 2]; 3])
    });
}

fn is_16_bit<E: Element>() -> bool {
    size_of::<E>() == 2
}

/// No less than any of a shape's benchmarks takes, with its ceiling.
fn bytes_needed<E: CudaElement>(gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) -> Result<usize> {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let side = n.max(h).max(d);
    let operands = size_of::<E>() * (n * d + h * d + 2 * n * h);
    let results = 4 * (n * d + 4 * h * d + n.max(h).pow(2));
    let product = 8 * side * side;
    let mut workspaces = 8 * cuda.clone().with_precision(Precision::Full).workspace_len(shape)?;
    if let Some(library) = &gpu.library {
        workspaces += 8 * library.workspace_len(Shape { rows: side, inputs: side, latents: side })?;
    }
    // The last: small vectors, and what allocations are rounded up by.
    Ok(operands + results + product + workspaces + 2 * COPIED + (256 << 20))
}

/// No less than encoding takes, with its ceiling.
fn bytes_to_encode<E: CudaElement>(gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) -> Result<usize> {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let library = gpu.library.as_ref().map_or(Ok(0), |library| library.workspace_len(shape))?;
    let operands = size_of::<E>() * (2 * n * d + 2 * h * d + n * h) + 4 * n * h;
    Ok(operands + 8 * (cuda.workspace_len_of(Operation::Encode, shape)? + library) + (256 << 20))
}

/// A name with the storage type and, where it makes a difference, the precision.
fn precise<E: CudaElement>(name: &str, cuda: &Cuda<E>) -> String {
    let name = typed::<E>(name);
    match cuda.precision() {
        _ if !is_16_bit::<E>() => name,
        Precision::Storage => name + " storage",
        Precision::Full => name + " full",
    }
}

fn step<E: CudaElement>(bench: &mut Bench, gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    for with_x in [false, true] {
        let name = precise(if with_x { "decoder-free with dx" } else { "decoder-free" }, cuda);
        // As for the CPU: what a step needs, whatever the form used.
        let plain = if with_x { 6.0 } else { 4.0 };
        let work = Work::Flops(plain * (n * d * h) as f64 + 3.0 * (n * h * n.min(h)) as f64);
        gpu.bench(bench, "step", &name, shape, work, Ceiling::Product([n, h, d]), || {
            let mut model = DecoderFree::new(cuda.clone(), DecoderFreeConfig::new(shape))?;
            let Parameters { x, weight, bias } = Parameters::new(cuda, shape)?;
            let (mut grad_weight, mut grad_bias) = (cuda.alloc::<f32>(h * d)?, cuda.alloc::<f32>(h)?);
            let mut grad_x = cuda.alloc::<f32>(if with_x { n * d } else { 0 })?;
            Ok(Box::new(move || {
                Ok(model.step(DecoderFreeStep {
                    x: matrix(&x, n, d)?,
                    weight: matrix(&weight, h, d)?,
                    bias: CudaMemory::slice(&bias),
                    grad_weight: matrix_mut(&mut grad_weight, h, d)?,
                    grad_bias: CudaMemory::slice_mut(&mut grad_bias),
                    grad_x: if with_x { Some(matrix_mut(&mut grad_x, n, d)?) } else { None },
                    activations: None,
                    row_loss: None,
                })?)
            }))
        });
    }
}

fn encode<E: CudaElement>(bench: &mut Bench, gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    for statistics in [false, true] {
        let name = typed::<E>(if statistics { "encode with a and statistics" } else { "encode, row loss only" });
        gpu.bench(bench, "encode", &name, shape, product_flops(n, h, d), Ceiling::Product([n, h, d]), || {
            let parameters = Parameters::new(cuda, shape)?;
            let mut encoded = Encoded::new(cuda, shape, &[Operation::Encode])?;
            let cuda = cuda.clone();
            Ok(Box::new(move || encoded.encode(&cuda, &parameters, statistics)))
        });
    }
}

/// From the activations: half of a product for the comoments, whose other half is the coupling's.
fn finish_statistics<E: CudaElement>(bench: &mut Bench, gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) {
    let Shape { rows: n, latents: h, .. } = shape;
    let name = precise("finish_statistics from a", cuda);
    let work = Work::Flops((n * h * (h + 1)) as f64);
    gpu.bench(bench, "statistics", &name, shape, work, Ceiling::Product([h, h, n]), || {
        let mut encoded = Encoded::filled(cuda, shape)?;
        let mut finished = Finished::new(cuda, h, true)?;
        let cuda = cuda.clone();
        Ok(Box::new(move || finished.finish(&cuda, &mut encoded)))
    });
}

fn correlation_dual<E: CudaElement>(bench: &mut Bench, gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) {
    let Shape { rows: n, latents: h, .. } = shape;
    let name = precise("correlation_dual", cuda);
    let work = Work::Flops((n * (n + 1) * h + 2 * n * n * h) as f64);
    gpu.bench(bench, "statistics", &name, shape, work, Ceiling::Product([n, h, n]), || {
        let mut encoded = Encoded::filled(cuda, shape)?;
        let mut finished = Finished::new(cuda, h, false)?;
        finished.finish(cuda, &mut encoded)?;
        let (mut gram, mut product) = (cuda.alloc::<f32>(n * n)?, cuda.alloc::<E>(n * h)?);
        let mut loss = cuda.alloc::<f64>(1)?;
        let cuda = cuda.clone();
        Ok(Box::new(move || {
            Ok(cuda.correlation_dual(CorrelationDual {
                activations: matrix(&encoded.a, n, h)?,
                mean: CudaMemory::slice(&finished.mean),
                variance: CudaMemory::slice(&finished.variance),
                lambda_tc: 1.0,
                gram: matrix_mut(&mut gram, n, n)?,
                product: matrix_mut(&mut product, n, h)?,
                scale: CudaMemory::slice_mut(&mut finished.scale),
                loss: CudaMemory::slice_mut(&mut loss),
                workspace: CudaMemory::slice_mut(&mut encoded.workspace),
            })?)
        }))
    });
}

fn backward_dz<E: CudaElement>(bench: &mut Bench, gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) {
    let Shape { rows: n, latents: h, .. } = shape;
    let name = precise("backward_dz, primal", cuda);
    gpu.bench(bench, "backward", &name, shape, product_flops(n, h, h), Ceiling::Product([n, h, h]), || {
        let mut encoded = Encoded::filled(cuda, shape)?;
        let mut finished = Finished::new(cuda, h, true)?;
        finished.finish(cuda, &mut encoded)?;
        let (mut dz, mut grad_bias) = (cuda.alloc::<E>(n * h)?, cuda.alloc::<f32>(h)?);
        let cuda = cuda.clone();
        Ok(Box::new(move || {
            Ok(cuda.backward_dz(BackwardDz {
                activations: matrix(&encoded.a, n, h)?,
                activation: Activation::Relu,
                row_loss: CudaMemory::slice(&encoded.row_loss),
                row_weight: 1.0,
                statistics: Some(StatisticsTerm {
                    mean: CudaMemory::slice(&finished.mean),
                    scale: CudaMemory::slice(&finished.scale),
                    correlation: CorrelationTerm::Primal {
                        coupling: matrix(&finished.coupling, h, h)?,
                        offset: CudaMemory::slice(&finished.offset),
                    },
                }),
                dz: matrix_mut(&mut dz, n, h)?,
                accumulate: false,
                grad_bias: CudaMemory::slice_mut(&mut grad_bias),
                workspace: CudaMemory::slice_mut(&mut encoded.workspace),
            })?)
        }))
    });
}

fn products<E: CudaElement>(bench: &mut Bench, gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    // dZᵀ x and dZ W.
    let cases = [
        (Layout::Tn, "dZᵀ·x", [[n, h], [n, d], [h, d]], [h, d, n]),
        (Layout::Nn, "dZ·W", [[n, h], [h, d], [n, d]], [n, d, h]),
    ];
    for (layout, name, shapes, extents) in cases {
        for products in [Products::Own, Products::Library] {
            let cuda = cuda.clone().with_products(products);
            // Where there is no library for the type, both are the same.
            if cuda.products() != products {
                continue;
            }
            let name = typed::<E>(name) + if products == Products::Own { ", own" } else { ", cuBLASLt" };
            let [m, cols, depth] = extents;
            let work = product_flops(m, cols, depth);
            gpu.bench(bench, "product", &name, shape, work, Ceiling::Product(extents), || {
                product(&cuda, layout, shapes)
            });
        }
    }
}

/// A product of random matrices; rows and columns of left, right and output.
fn product<E: CudaElement>(cuda: &Cuda<E>, layout: Layout, shapes: [[usize; 2]; 3]) -> Result<Call> {
    let [left_shape, right_shape, [m, n]] = shapes;
    let left = random::<E, E>(cuda, 2, -1.0..1.0, left_shape[0] * left_shape[1])?;
    let right = random::<E, E>(cuda, 3, -1.0..1.0, right_shape[0] * right_shape[1])?;
    let mut out = cuda.alloc::<f32>(m * n)?;
    let depth = if layout == Layout::Tn { left_shape[0] } else { left_shape[1] };
    let shape = Shape { rows: m, inputs: depth, latents: n };
    let mut workspace = cuda.alloc(cuda.workspace_len_of(Operation::Product, shape)?)?;
    let cuda = cuda.clone();
    Ok(Box::new(move || {
        Ok(cuda.product(Product {
            layout,
            left: matrix(&left, left_shape[0], left_shape[1])?,
            right: matrix(&right, right_shape[0], right_shape[1])?,
            accumulate: false,
            out: matrix_mut(&mut out, m, n)?,
            workspace: CudaMemory::slice_mut(&mut workspace),
        })?)
    }))
}

/// 4 reads and 3 writes of f32; with 16-bit storage it also writes the parameters' copy there.
fn adam<E: CudaElement>(bench: &mut Bench, gpu: &Gpu, cuda: &Cuda<E>, shape: Shape) {
    let len = shape.inputs * shape.latents;
    let copied = is_16_bit::<E>();
    let work = Work::Bytes((len * if copied { 28 + size_of::<E>() } else { 28 }) as f64);
    gpu.bench(bench, "optimizer", &typed::<E>("adam"), shape, work, Ceiling::Copy, || {
        let gradient = random::<E, f32>(cuda, 4, -1e-3..1e-3, len)?;
        let (mut first, mut second) = (cuda.alloc::<f32>(len)?, cuda.alloc::<f32>(len)?);
        let mut parameters = random::<E, f32>(cuda, 5, -1.0..1.0, len)?;
        let mut storage = cuda.alloc::<E>(if copied { len } else { 0 })?;
        let cuda = cuda.clone();
        Ok(Box::new(move || {
            Ok(cuda.adam(Adam {
                config: AdamConfig::default(),
                step: 10,
                gradient: CudaMemory::slice(&gradient),
                first_moment: CudaMemory::slice_mut(&mut first),
                second_moment: CudaMemory::slice_mut(&mut second),
                parameters: CudaMemory::slice_mut(&mut parameters),
                storage: copied.then(|| CudaMemory::slice_mut(&mut storage)),
            })?)
        }))
    });
}

struct Parameters<E: CudaElement> {
    x: CudaBuffer<E>,
    weight: CudaBuffer<E>,
    bias: CudaBuffer<f32>,
}

impl<E: CudaElement> Parameters<E> {
    fn new(cuda: &Cuda<E>, shape: Shape) -> Result<Self> {
        let Shape { rows, inputs, latents } = shape;
        let scale = 1.0 / (inputs as f32).sqrt();
        Ok(Self {
            x: random::<E, E>(cuda, 6, -1.0..1.0, rows * inputs)?,
            weight: random::<E, E>(cuda, 7, -scale..scale, latents * inputs)?,
            bias: random::<E, f32>(cuda, 8, -scale..scale, latents)?,
        })
    }
}

/// A batch's activations and moments.
struct Encoded<E: CudaElement> {
    shape: Shape,
    a: CudaBuffer<E>,
    row_loss: CudaBuffer<f32>,
    shift: CudaBuffer<f32>,
    row_loss_sum: CudaBuffer<f64>,
    sum: CudaBuffer<f64>,
    sum_squares: CudaBuffer<f64>,
    workspace: CudaBuffer<f64>,
}

impl<E: CudaElement> Encoded<E> {
    /// With a workspace for these operations.
    fn new(cuda: &Cuda<E>, shape: Shape, operations: &[Operation]) -> Result<Self> {
        let Shape { rows: n, latents: h, .. } = shape;
        let operations: Vec<_> = operations.iter().map(|operation| (*operation, shape)).collect();
        Ok(Self {
            shape,
            a: cuda.alloc(n * h)?,
            row_loss: cuda.alloc(n)?,
            shift: cuda.alloc(h)?,
            row_loss_sum: cuda.alloc(1)?,
            sum: cuda.alloc(h)?,
            sum_squares: cuda.alloc(h)?,
            workspace: cuda.alloc(cuda.workspace_len_for(&operations)?)?,
        })
    }

    /// As a step leaves it after its first pass.
    fn filled(cuda: &Cuda<E>, shape: Shape) -> Result<Self> {
        let mut encoded = Self::new(cuda, shape, &Operation::ALL)?;
        encoded.encode(cuda, &Parameters::new(cuda, shape)?, true)?;
        cuda.recentre(Recentre {
            activations: matrix(&encoded.a, shape.rows, shape.latents)?,
            shift: CudaMemory::slice_mut(&mut encoded.shift),
            sum: CudaMemory::slice_mut(&mut encoded.sum),
            sum_squares: CudaMemory::slice_mut(&mut encoded.sum_squares),
        })?;
        Ok(encoded)
    }

    /// Row losses, and on request activations and moments.
    fn encode(&mut self, cuda: &Cuda<E>, parameters: &Parameters<E>, statistics: bool) -> Result<()> {
        let Shape { rows: n, inputs: d, latents: h } = self.shape;
        Ok(cuda.encode(Encode {
            x: matrix(&parameters.x, n, d)?,
            weight: matrix(&parameters.weight, h, d)?,
            bias: CudaMemory::slice(&parameters.bias),
            activation: Activation::Relu,
            activations: if statistics { Some(matrix_mut(&mut self.a, n, h)?) } else { None },
            row_loss: Some(CudaMemory::slice_mut(&mut self.row_loss)),
            moments: statistics.then(|| Moments {
                shift: None,
                accumulate: false,
                row_loss_sum: CudaMemory::slice_mut(&mut self.row_loss_sum),
                sum: CudaMemory::slice_mut(&mut self.sum),
                sum_squares: CudaMemory::slice_mut(&mut self.sum_squares),
            }),
            workspace: CudaMemory::slice_mut(&mut self.workspace),
        })?)
    }
}

/// What the backward pass needs of a batch's statistics.
struct Finished {
    /// Whether coupling and offset are wanted.
    primal: bool,
    coupling: CudaBuffer<f32>,
    offset: CudaBuffer<f32>,
    mean: CudaBuffer<f32>,
    variance: CudaBuffer<f32>,
    scale: CudaBuffer<f32>,
    losses: CudaBuffer<f64>,
}

impl Finished {
    fn new<E: CudaElement>(cuda: &Cuda<E>, h: usize, primal: bool) -> Result<Self> {
        Ok(Self {
            primal,
            coupling: cuda.alloc(if primal { h * h } else { 0 })?,
            offset: cuda.alloc(if primal { h } else { 0 })?,
            mean: cuda.alloc(h)?,
            variance: cuda.alloc(h)?,
            scale: cuda.alloc(h)?,
            losses: cuda.alloc(2)?,
        })
    }

    fn finish<E: CudaElement>(&mut self, cuda: &Cuda<E>, encoded: &mut Encoded<E>) -> Result<()> {
        let Shape { rows: n, latents: h, .. } = encoded.shape;
        let primal = match self.primal {
            false => None,
            true => Some(PrimalCorrelation {
                covariance: Covariance::Activations(matrix(&encoded.a, n, h)?),
                coupling: matrix_mut(&mut self.coupling, h, h)?,
                offset: CudaMemory::slice_mut(&mut self.offset),
            }),
        };
        Ok(cuda.finish_statistics(FinishStatistics {
            count: n as u64,
            objective: Objective::default(),
            shift: CudaMemory::slice(&encoded.shift),
            sum: CudaMemory::slice(&encoded.sum),
            sum_squares: CudaMemory::slice(&encoded.sum_squares),
            primal,
            mean: CudaMemory::slice_mut(&mut self.mean),
            variance: CudaMemory::slice_mut(&mut self.variance),
            scale: CudaMemory::slice_mut(&mut self.scale),
            losses: CudaMemory::slice_mut(&mut self.losses),
            workspace: CudaMemory::slice_mut(&mut encoded.workspace),
        })?)
    }
}

/// Independent numbers, which large buffers repeat: a prime number of them, so that no two rows of a matrix are the same.
fn uniform(seed: u64, range: std::ops::Range<f32>) -> Vec<f32> {
    const COUNT: usize = 1_048_583;
    let mut random = StdRng::seed_from_u64(seed);
    (0..COUNT).map(|_| random.random_range(range.clone())).collect()
}

/// Random numbers: a GPU's clocks run higher on zeros.
fn random<E: CudaElement, T: Element>(
    cuda: &Cuda<E>,
    seed: u64,
    range: std::ops::Range<f32>,
    len: usize,
) -> Result<CudaBuffer<T>> {
    let values: Vec<T> = uniform(seed, range).into_iter().map(T::from_f32).collect();
    let mut buffer = cuda.alloc::<T>(len)?;
    for start in (0..len).step_by(values.len()) {
        let end = len.min(start + values.len());
        let part = CudaMemory::part_mut(CudaMemory::slice_mut(&mut buffer), start..end);
        cuda.upload(&values[..end - start], part)?;
    }
    Ok(buffer)
}

fn matrix<T: Element>(buffer: &CudaBuffer<T>, rows: usize, cols: usize) -> Result<MatRef<'_, T, CudaMemory>> {
    Ok(MatRef::from_memory(CudaMemory::slice(buffer), rows, cols, cols)?)
}

fn matrix_mut<T: Element>(buffer: &mut CudaBuffer<T>, rows: usize, cols: usize) -> Result<MatMut<'_, T, CudaMemory>> {
    Ok(MatMut::from_memory(CudaMemory::slice_mut(buffer), rows, cols, cols)?)
}
