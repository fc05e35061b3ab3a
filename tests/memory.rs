//! What a plan takes: the bytes that `docs/memory.md` says, all of them when it is made and none in a step, and none that grow with rows ×
//! latents where the batch is processed in blocks. On the CPU a counting allocator tells, on CUDA a device that keeps accounts.

mod common;

use common::anywhere::{Step, Training};
use common::{assert_same_bits, relative, rng, rounded, uniform};
use sae_kernels::{
    Activation, ActivationLosses, ActivationStep, Backend, Cpu, CpuElement, DecoderFree, DecoderFreeConfig,
    DecoderFreeStep, Element, Error, Form, Isa, MatMut, MatRef, Objective, PlanMemory, Reference, Shape, bf16, f16,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, with accounts for each thread.
struct Counting;

thread_local! {
    static BYTES: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static CALLS: Cell<usize> = const { Cell::new(0) };
    /// Larger allocations are refused.
    static LARGEST: Cell<usize> = const { Cell::new(usize::MAX) };
}

// SAFETY: the system's allocator does it all.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if LARGEST.try_with(|largest| layout.size() > largest.get()).unwrap_or(false) {
            return std::ptr::null_mut();
        }
        // A thread that ends has no accounts any more.
        let _ = BYTES.try_with(|bytes| {
            bytes.set(bytes.get() + layout.size() as isize);
            let _ = PEAK.try_with(|peak| peak.set(peak.get().max(bytes.get())));
            let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
        });
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let _ = BYTES.try_with(|bytes| bytes.set(bytes.get() - layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that stay, the most that there were, and calls of the allocator.
fn measured<T>(task: impl FnOnce() -> T) -> (T, [usize; 3]) {
    let (before, calls) = (BYTES.get(), CALLS.get());
    PEAK.set(before);
    let result = task();
    (result, [(BYTES.get() - before) as usize, (PEAK.get() - before) as usize, CALLS.get() - calls])
}

const LSE_ALONE: Objective = Objective { lambda_var: 0.0, lambda_tc: 0.0, ..OBJECTIVE };
const VARIANCE: Objective = Objective { lambda_tc: 0.0, ..OBJECTIVE };
const REDUNDANCY: Objective = Objective { lambda_wr: 0.5, ..OBJECTIVE };
const OBJECTIVE: Objective = Objective {
    lambda_lse: 1.0,
    lambda_var: 1.0,
    lambda_tc: 1.0,
    lambda_wr: 0.0,
    variance_eps: 1e-6,
    reduction: sae_kernels::Reduction::Sum,
    normalize_weight: true,
};

/// Every objective, form and way to cut the batch.
fn configurations(shape: Shape, blocks: &[usize]) -> Vec<DecoderFreeConfig> {
    let mut all = Vec::new();
    for objective in [OBJECTIVE, VARIANCE, LSE_ALONE, REDUNDANCY] {
        for form in [Form::Auto, Form::Primal, Form::Dual] {
            for block_rows in blocks.iter().map(|rows| Some(*rows)).chain([None]) {
                let config = DecoderFreeConfig { objective, block_rows, ..DecoderFreeConfig::new(shape) };
                all.push(DecoderFreeConfig { correlation_form: form, weight_form: form, ..config });
            }
        }
    }
    all
}

/// The parts of `docs/memory.md` that do not depend on the backend, with numbers of 4 bytes; without gradients.
fn documented(config: &DecoderFreeConfig, element: usize) -> PlanMemory {
    let Shape { rows: n, inputs: d, latents: h } = config.shape;
    let b = config.block_rows.map_or(n, |rows| rows.min(n));
    let correlation = match config.correlation_form {
        _ if config.objective.lambda_tc == 0.0 => 0,
        Form::Dual => 4 * b * b,
        Form::Auto if b == n => 4 * n.min(h).pow(2),
        Form::Auto | Form::Primal => 4 * h * h,
    };
    let redundancy = match config.weight_form {
        _ if config.objective.lambda_wr == 0.0 => 0,
        Form::Dual => 4 * d * d,
        Form::Auto => 4 * d.min(h).pow(2),
        Form::Primal => 4 * h * h,
    };
    PlanMemory {
        block: 2 * element * b * h,
        correlation,
        redundancy,
        vectors: 4 * n + 36 * h + 40,
        gradients: 0,
        packed: 0,
        workspace: 0,
    }
}

/// Rows of the largest batch that the configuration can process: the dual form needs all in one block.
fn largest_batch(config: &DecoderFreeConfig) -> usize {
    let dual = config.objective.lambda_tc != 0.0 && config.correlation_form == Form::Dual;
    let block = config.block_rows.unwrap_or(config.shape.rows).min(config.shape.rows);
    if dual { block } else { config.shape.rows }
}

#[test]
fn a_plan_on_the_cpu_takes_what_its_configuration_says_and_steps_take_nothing() {
    fn check<E: CpuElement>() {
        for isa in Isa::available() {
            let cpu = Cpu::<E>::with(isa, 1).unwrap();
            for [rows, inputs, latents] in [[70, 37, 45], [40, 33, 130], [300, 20, 17]] {
                for config in configurations(Shape { rows, inputs, latents }, &[32]) {
                    let context = format!("{cpu:?} {config:?}");
                    let memory = config.memory(&cpu).unwrap();
                    let (model, [bytes, peak, _]) = measured(|| DecoderFree::new(cpu.clone(), config).unwrap());
                    assert_eq!(bytes, memory.total(), "{context}: {memory:?}");
                    assert_eq!(peak, bytes, "{context}");
                    assert_eq!(model.memory(), memory, "{context}");
                    let expected = PlanMemory { workspace: memory.workspace, ..documented(&config, size_of::<E>()) };
                    assert_eq!(memory, expected, "{context}");
                    steps_take_nothing(&context, model);
                }
            }
        }
    }
    check::<f32>();
    check::<bf16>();
    check::<f16>();
}

fn steps_take_nothing<E: CpuElement>(context: &str, mut model: DecoderFree<Cpu<E>>) {
    let Shape { inputs: d, latents: h, .. } = model.config().shape;
    let n = largest_batch(model.config());
    let x: Vec<E> = (0..n * d).map(|at| E::from_f32((at % 17) as f32 / 17.0)).collect();
    let weight: Vec<E> = (0..h * d).map(|at| E::from_f32((at % 7) as f32 / 7.0 - 0.4)).collect();
    let bias = vec![0.1; h];
    let (mut grad_weight, mut grad_bias, mut grad_x) = (vec![0.0; h * d], vec![0.0; h], vec![0.0; n * d]);
    for _ in 0..2 {
        let ((), used) = measured(|| {
            model
                .step(DecoderFreeStep {
                    x: MatRef::new(&x, n, d).unwrap(),
                    weight: MatRef::new(&weight, h, d).unwrap(),
                    bias: &bias,
                    grad_weight: MatMut::new(&mut grad_weight, h, d).unwrap(),
                    grad_bias: &mut grad_bias,
                    grad_x: Some(MatMut::new(&mut grad_x, n, d).unwrap()),
                    activations: None,
                    row_loss: None,
                })
                .unwrap();
        });
        assert_eq!(used, [0; 3], "{context}: bytes, peak and allocations of a step");
    }
    assert!(grad_weight.iter().all(|g| g.is_finite()) && grad_weight.iter().any(|g| *g != 0.0), "{context}");
}

/// Packed operands are bounded, whatever the shape: the rest of the CPU's workspace is about a byte for each activation of a block, and each
/// pair of latents in the primal form.
#[test]
fn the_workspace_of_the_cpu_is_bounded() {
    for isa in Isa::available() {
        for threads in if cfg!(feature = "rayon") { 1..=2 } else { 1..=1 } {
            let cpu = Cpu::<f32>::with(isa, threads).unwrap();
            for [rows, inputs, latents] in
                [[128, 784, 64], [8192, 768, 6144], [65_536, 1024, 4096], [4096, 4096, 131_072], [1 << 20, 512, 2048]]
            {
                for config in configurations(Shape { rows, inputs, latents }, &[1024]) {
                    let (b, memory) = (config.block_rows.unwrap_or(rows).min(rows), config.memory(&cpu).unwrap());
                    let squares = (memory.correlation + memory.redundancy) / 4;
                    let bound = threads * (3 << 19) + (128 << 20) + b * latents + squares + 64 * (b + inputs + latents);
                    assert!(memory.workspace <= bound, "{cpu:?} {config:?}: {memory:?}, at most {bound}");
                }
            }
        }
    }
}

#[test]
fn only_row_losses_grow_with_a_batch_of_blocks() {
    fn check<B: Backend>(backend: &B) {
        for [rows, inputs, latents] in [[300, 37, 45], [4096, 768, 6144], [4096, 512, 131_072]] {
            let shape = |rows| Shape { rows, inputs, latents };
            for (small, large) in
                configurations(shape(rows), &[128]).into_iter().zip(configurations(shape(64 * rows), &[128]))
            {
                if small.block_rows.is_none() {
                    continue;
                }
                let (one, many) = (small.memory(backend).unwrap(), large.memory(backend).unwrap());
                let grown = PlanMemory { vectors: one.vectors + 63 * rows * size_of::<B::Real>(), ..one };
                assert_eq!(many, grown, "{small:?}");
            }
        }
    }
    check(&Cpu::<f32>::new().unwrap());
    check(&Cpu::<bf16>::new().unwrap());
    check(&Reference);
    #[cfg(feature = "cuda")]
    {
        check(&cuda::nowhere::<f32>(cuda::Mainloop::Sm80, None).0);
        check(&cuda::nowhere::<bf16>(cuda::Mainloop::Sm80, Some(1000)).0);
    }
}

#[test]
fn activation_losses_on_the_cpu_take_what_they_say() {
    let cpu = Cpu::<f32>::with(Isa::detect(), 1).unwrap();
    for [rows, inputs, latents] in [[70, 37, 45], [40, 33, 130], [0, 5, 6]] {
        for objective in [OBJECTIVE, VARIANCE, LSE_ALONE, REDUNDANCY] {
            let shape = Shape { rows, inputs, latents };
            let (plan, [bytes, peak, _]) = measured(|| ActivationLosses::new(cpu.clone(), shape, objective).unwrap());
            let memory = plan.memory();
            assert_eq!([bytes, peak], [memory.total(); 2], "{shape:?} {objective:?}");
            let config = DecoderFreeConfig { objective, ..DecoderFreeConfig::new(shape) };
            let encoding = documented(&config, 4);
            let vectors = encoding.vectors + 4 * latents;
            let expected = PlanMemory { block: 0, vectors, workspace: memory.workspace, ..encoding };
            assert_eq!(memory, expected, "{shape:?} {objective:?}");
        }
    }
}

/// A dual correlation term without gradient needs scratch, which is asked for before anything is written.
#[test]
fn too_little_memory_leaves_outputs_as_they_were() {
    let shape = Shape { rows: 40, inputs: 3, latents: 130 };
    let mut plan = ActivationLosses::new(Cpu::<f32>::with(Isa::detect(), 1).unwrap(), shape, OBJECTIVE).unwrap();
    let activations = vec![0.5; 40 * 130];
    let mut step = |row_loss: &mut [f32]| {
        plan.step(ActivationStep {
            activations: MatRef::new(&activations, 40, 130).unwrap(),
            weight: None,
            grad_activations: None,
            grad_weight: None,
            responsibilities: None,
            row_loss: Some(row_loss),
        })
    };
    let mut row_loss = [7.0; 40];
    LARGEST.set(4 * 40 * 130 - 1);
    let refused = step(&mut row_loss);
    LARGEST.set(usize::MAX);
    assert!(matches!(refused, Err(Error::Allocation { .. })), "{refused:?}");
    assert_eq!(row_loss, [7.0; 40]);
    step(&mut row_loss).unwrap();
    assert!(row_loss.iter().all(|loss| (loss - (0.5 - 130f32.ln())).abs() < 1e-5), "{row_loss:?}");
}

/// Two blocks of tiles each way, and means that are far from 0 against the deviations. With the identity: a mask may differ where storage
/// rounds, and the reference does not round.
fn batch<E: Element>(objective: Objective, block_rows: Option<usize>) -> Step {
    let shape = Shape { rows: 140, inputs: 37, latents: 133 };
    let mut rng = rng(3);
    let config = DecoderFreeConfig { objective, block_rows, ..DecoderFreeConfig::new(shape) };
    Step {
        config: DecoderFreeConfig { activation: Activation::Identity, ..config },
        x: rounded::<E>(&uniform(&mut rng, shape.rows * shape.inputs, 1.0)),
        weight: rounded::<E>(&uniform(&mut rng, shape.latents * shape.inputs, 0.4)),
        bias: uniform(&mut rng, shape.latents, 0.125).iter().map(|b| f64::from((b + 2.0) as f32)).collect(),
    }
}

/// In the memory of a block, and none of it is allocated in a step: `make` gives a backend and what tells its allocations.
fn blocks_give_the_gradient_of_the_whole_batch<B: Backend, F: Fn() -> String>(make: impl Fn() -> (B, F)) {
    for objective in [LSE_ALONE, VARIANCE, OBJECTIVE] {
        let truth = batch::<B::Element>(objective, None).run(Reference).unwrap();
        let mut whole: Option<Vec<(&str, Vec<f64>)>> = None;
        for block_rows in [None, Some(128), Some(48)] {
            let (backend, allocated) = make();
            let step = batch::<B::Element>(objective, block_rows);
            let context = format!("{} {objective:?} {block_rows:?}", B::Element::NAME);
            let mut training = Training::new(backend, step.config).unwrap();
            let made = allocated();
            // Nothing is left of an earlier step that the first could use.
            let mut steps = [0, 1].map(|_| {
                training.load(&step).unwrap();
                training.enqueue().unwrap();
                training.outcome().unwrap()
            });
            assert_eq!(allocated(), made, "{context}: a step allocates");
            assert_eq!(steps[0], steps[1], "{context}: the second step differs");
            let outcome = std::mem::take(&mut steps[0]);
            let of = |outcome: &[(&str, Vec<f64>)], name: &str| {
                outcome.iter().find(|(found, _)| *found == name).unwrap().1.clone()
            };
            let bar = (16.0 * B::Element::UNIT_ROUNDOFF).max(2e-5);
            for (name, truth) in [("dW", &truth.weight), ("db", &truth.bias), ("dx", &truth.x)] {
                let error = relative(&of(&outcome, name), truth);
                assert!(error <= bar, "{context}: {name} is off by {error:e}");
            }
            let whole = whole.get_or_insert_with(|| outcome.clone());
            for name in ["losses", "dW", "db", "dx"] {
                let error = relative(&of(&outcome, name), &of(whole, name));
                assert!(error <= bar, "{context}: {name} is {error:e} off that of the whole batch");
            }
            if objective == LSE_ALONE {
                // A row's gradient depends on no other row.
                assert_same_bits(&context, "dx", &of(&outcome, "dx"), &of(whole, "dx"));
            }
        }
    }
}

#[test]
fn blocks_on_the_cpu_give_the_gradient_of_the_whole_batch() {
    fn check<E: CpuElement>() {
        for isa in Isa::available() {
            blocks_give_the_gradient_of_the_whole_batch(|| (Cpu::<E>::with(isa, 1).unwrap(), String::new));
        }
    }
    check::<f32>();
    check::<bf16>();
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::common::accounts::{Accounts, Nowhere};
    use super::*;
    pub use sae_kernels::cuda_driver::Mainloop;
    use sae_kernels::operations::{AdamConfig, Optimizer};
    use sae_kernels::{
        Cuda, CudaElement, DecoderFreeTrainStep, Precision, StandardConfig, StandardSae, Statistics, Trained,
    };
    use std::marker::PhantomData;
    use std::sync::Arc;

    pub fn nowhere<E: CudaElement>(mainloop: Mainloop, library: Option<usize>) -> (Cuda<E>, Arc<Accounts<Nowhere>>) {
        let device = Arc::new(Accounts::new(Nowhere::new(mainloop, library)));
        (Cuda::on_driver(device.clone()), device)
    }

    /// The workspaces of `docs/memory.md`, in bytes.
    struct Workspaces {
        /// Of a matrix in its storage type, and of a computed one.
        raw: usize,
        computed: usize,
        /// Bytes of the library's scratch.
        library: Option<usize>,
        inputs: usize,
        latents: usize,
    }

    fn room(bytes: usize) -> usize {
        bytes.next_multiple_of(16)
    }
    fn planes(count: usize, rows: usize, cols: usize) -> usize {
        let stored = if count == 1 { 1 } else { count + 1 };
        room(2 * stored * rows * cols.next_multiple_of(8))
    }
    fn tiles(extent: usize) -> usize {
        extent.div_ceil(128)
    }

    impl Workspaces {
        fn new<E: CudaElement>(cuda: &Cuda<E>, library: Option<usize>, shape: Shape) -> Self {
            let wide = size_of::<E>() == 4;
            Self {
                raw: if wide { 3 } else { 1 },
                computed: if wide || cuda.precision() == Precision::Full { 3 } else { 1 },
                library: library.filter(|_| !wide),
                inputs: shape.inputs,
                latents: shape.latents,
            }
        }
        /// Of sums alone, when there is no product.
        fn sums(&self, n: usize) -> usize {
            let h = self.latents;
            room(8 * n * tiles(h)) + room(8 * n) + 2 * room(8 * tiles(n) * h)
        }
        fn encode(&self, n: usize) -> usize {
            let (d, h) = (self.inputs, self.latents);
            planes(self.raw, n, d) + planes(self.raw, h, d) + self.sums(n)
        }
        fn variance(&self) -> usize {
            5 * room(8 * self.latents)
        }
        fn primal_correlation(&self, n: usize) -> usize {
            let h = self.latents;
            let rows = n.min(if self.computed == 1 { 4096 } else { 1024 });
            self.variance() + 4 * room(8 * tiles(h) * h) + planes(self.computed, rows, h)
        }
        fn dual_correlation(&self, n: usize) -> usize {
            let h = self.latents;
            let products = planes(self.computed, n, h) + planes(self.computed, n, n);
            let slots = room(8 * (tiles(n) * (tiles(n) + 1) / 2)) + room(8 * tiles(n) * h);
            3 * room(4 * h) + room(8 * h) + products + slots
        }
        fn backward(&self, n: usize) -> usize {
            room(8 * tiles(n) * self.latents)
        }
        fn primal_backward(&self, n: usize) -> usize {
            let h = self.latents;
            self.backward(n) + planes(self.computed, n, h) + planes(self.computed, h, h)
        }
        fn product(&self, n: usize) -> usize {
            let (d, h) = (self.inputs, self.latents);
            let operand = |rows: usize, cols| planes(self.raw, rows.next_multiple_of(8), cols);
            let own = [operand(n, h) + operand(n, d), operand(n, h) + operand(h, d), operand(n, d) + operand(h, d)];
            own.into_iter().chain(self.library.map(|bytes| room(bytes + 256))).max().unwrap()
        }
        fn redundancy(&self, form: Form) -> usize {
            let (d, h) = (self.inputs, self.latents);
            let side = match form {
                Form::Auto => d.min(h),
                Form::Primal => h,
                Form::Dual => d,
            };
            let vectors = 2 * room(8 * h) + room(4 * h);
            let products = planes(self.computed, h, d) + planes(self.computed, side, side);
            vectors + products + room(8 * (tiles(side) * (tiles(side) + 1) / 2)) + room(8 * h * tiles(d))
        }
        fn column_sums(&self, n: usize) -> usize {
            room(8 * tiles(n) * self.inputs.max(self.latents))
        }
        fn decode(&self, n: usize) -> usize {
            let (d, h) = (self.inputs, self.latents);
            planes(self.raw, n, h) + planes(self.raw, h, d) + room(8 * tiles(n) * tiles(d))
        }
        fn decode_backward(&self, n: usize) -> usize {
            let (d, h) = (self.inputs, self.latents);
            planes(self.raw, n, d) + planes(self.raw, h, d) + self.backward(n)
        }

        /// Of a plan, with or without an encoder.
        fn plan(&self, config: &DecoderFreeConfig, encoder: bool) -> usize {
            let (n, h, objective) = (config.shape.rows, self.latents, config.objective);
            let b = config.block_rows.map_or(n, |rows| rows.min(n));
            let mut of_operations = vec![self.backward(b), self.product(if encoder { b } else { 0 })];
            of_operations.push(if encoder { self.encode(b) } else { self.sums(b) });
            if objective.lambda_var != 0.0 || objective.lambda_tc != 0.0 {
                of_operations.push(self.variance());
            }
            let form = config.correlation_form;
            if objective.lambda_tc != 0.0 {
                if form == Form::Primal || form == Form::Auto && (b < n || h <= n) {
                    of_operations.extend([self.primal_correlation(b), self.primal_backward(b)]);
                }
                let dual_rows = match form {
                    Form::Auto => b.min(h - 1),
                    Form::Primal => 0,
                    Form::Dual => b,
                };
                of_operations.extend((dual_rows > 0).then(|| self.dual_correlation(dual_rows)));
            }
            if objective.lambda_wr != 0.0 {
                of_operations.push(self.redundancy(config.weight_form));
            }
            aligned(of_operations)
        }
    }

    /// The longest, with room to align it.
    fn aligned(of_operations: impl IntoIterator<Item = usize>) -> usize {
        let most = of_operations.into_iter().max().unwrap();
        if most == 0 { 0 } else { most + 8 }
    }

    /// Shapes of the paper and of language models, and ragged ones.
    const SHAPES: [[usize; 3]; 10] = [
        [128, 784, 64],
        [8192, 768, 6144],
        [65_536, 1024, 4096],
        [4096, 4096, 131_072],
        [16_384, 2048, 16_384],
        [1000, 37, 45],
        [130, 17, 131],
        [131, 131, 131],
        [3, 5, 2],
        [2, 1, 1],
    ];

    #[test]
    fn a_plan_takes_what_the_formula_says_and_steps_take_nothing() {
        fn check<E: CudaElement>(mainloop: Mainloop, precision: Precision, library: Option<usize>) {
            for [rows, inputs, latents] in SHAPES {
                let shape = Shape { rows, inputs, latents };
                for config in configurations(shape, &[1, 100, 1024, 1 << 30]) {
                    let (cuda, device) = nowhere::<E>(mainloop, library);
                    let cuda = cuda.with_precision(precision);
                    let context = format!("{cuda:?} {library:?} {config:?}");
                    let memory = config.memory(&cuda).unwrap();
                    let workspace = Workspaces::new(&cuda, library, shape).plan(&config, true);
                    let expected = PlanMemory { workspace, ..documented(&config, size_of::<E>()) };
                    assert_eq!(memory, expected, "{context}");

                    let operands = Operands::new(shape);
                    let before = device.balance();
                    let mut model = DecoderFree::new(cuda, config).unwrap();
                    assert_eq!(device.balance().bytes - before.bytes, memory.total(), "{context}");
                    assert_eq!(device.balance().peak - before.bytes, memory.total(), "{context}");
                    assert_eq!(model.memory(), memory, "{context}");
                    // A step of a thousand blocks says no more than one of a few; and one row has no variance.
                    if rows / config.block_rows.unwrap_or(rows) > 1000 || largest_batch(&config) < 2 {
                        continue;
                    }
                    let made = device.balance();
                    operands.step(&mut model);
                    assert_eq!(device.balance(), made, "{context}: a step allocates");

                    operands.train(&mut model);
                    let trained = PlanMemory { gradients: 4 * latents * (inputs + 1), ..memory };
                    assert_eq!(model.memory(), trained, "{context}");
                    let made = device.balance();
                    assert_eq!(made.bytes - before.bytes, trained.total(), "{context}");
                    assert_eq!(made.peak, made.bytes, "{context}");
                    operands.train(&mut model);
                    operands.step(&mut model);
                    assert_eq!(device.balance(), made, "{context}: a later step allocates");
                    drop(model);
                    assert_eq!(device.balance().bytes, before.bytes, "{context}: memory is lost");
                }
            }
        }
        let sm90 = Mainloop::Sm90 { multiprocessors: 132, schedule: None };
        check::<f32>(Mainloop::Sm80, Precision::Full, None);
        check::<f32>(sm90, Precision::Storage, Some(1 << 25));
        check::<bf16>(Mainloop::Sm80, Precision::Storage, None);
        check::<bf16>(sm90, Precision::Full, Some(1 << 25));
        check::<f16>(Mainloop::Sm80, Precision::Full, Some(1000));
    }

    /// Operands and results of steps, nowhere.
    struct Operands<E> {
        shape: Shape,
        element: PhantomData<E>,
    }

    impl<E: CudaElement> Operands<E> {
        fn new(shape: Shape) -> Self {
            Self { shape, element: PhantomData }
        }
        fn at<T: Element>(&self, len: usize) -> sae_kernels::CudaRef<'static, T> {
            // SAFETY: no launch is executed.
            unsafe { sae_kernels::CudaRef::from_raw(1 << 16, len) }
        }
        fn at_mut<T: Element>(&self, len: usize) -> sae_kernels::CudaRefMut<'static, T> {
            // SAFETY: as above.
            unsafe { sae_kernels::CudaRefMut::from_raw(1 << 16, len) }
        }
        fn step(&self, model: &mut DecoderFree<Cuda<E>>) {
            let (n, d, h) = (largest_batch(model.config()), self.shape.inputs, self.shape.latents);
            model.step(self.of_step(n, d, h)).unwrap_or_else(|error| panic!("{:?}: {error}", model.config()));
        }
        fn of_step(&self, n: usize, d: usize, h: usize) -> DecoderFreeStep<'static, Cuda<E>> {
            DecoderFreeStep {
                x: MatRef::from_memory(self.at(n * d), n, d, d).unwrap(),
                weight: MatRef::from_memory(self.at(h * d), h, d, d).unwrap(),
                bias: self.at(h),
                grad_weight: MatMut::from_memory(self.at_mut(h * d), h, d, d).unwrap(),
                grad_bias: self.at_mut(h),
                grad_x: Some(MatMut::from_memory(self.at_mut(n * d), n, d, d).unwrap()),
                activations: None,
                row_loss: None,
            }
        }
        fn train(&self, model: &mut DecoderFree<Cuda<E>>) {
            let (n, d, h) = (largest_batch(model.config()), self.shape.inputs, self.shape.latents);
            let trained = |len: usize| Trained {
                parameters: self.at_mut(len),
                storage: Some(self.at_mut(len)),
                optimizer: Optimizer::Adam {
                    config: AdamConfig::default(),
                    step: 1,
                    first_moment: self.at_mut(len),
                    second_moment: self.at_mut(len),
                },
            };
            model
                .train_step(DecoderFreeTrainStep {
                    x: MatRef::from_memory(self.at(n * d), n, d, d).unwrap(),
                    weight: trained(h * d),
                    bias: trained(h),
                    activations: None,
                    row_loss: None,
                })
                .unwrap();
        }
    }

    /// Calls in two phases take an H×H matrix and what a primal correlation's workspace takes, from the first on.
    #[test]
    fn two_phases_take_the_primal_form_when_first_used() {
        for config in configurations(Shape { rows: 300, inputs: 20, latents: 150 }, &[100]) {
            let (cuda, device) = nowhere::<bf16>(Mainloop::Sm80, None);
            let (operands, h) = (Operands::new(config.shape), config.shape.latents);
            let mut model = DecoderFree::new(cuda.clone(), config).unwrap();
            let memory = model.memory();
            let full = config.objective.lambda_tc != 0.0;
            let mut statistics = Statistics::new(h, full);
            let step = operands.of_step(300, 20, h);
            model.statistics(step.x, step.weight, step.bias, &mut statistics).unwrap();
            let all = Workspaces::new(&cuda, None, config.shape);
            let b = config.block_rows.unwrap_or(300);
            let primal = aligned([all.primal_correlation(b), all.primal_backward(b)]);
            let (correlation, workspace) = (memory.correlation.max(4 * h * h), memory.workspace.max(primal));
            let packed = 8 * Statistics::len(h, full) + 4 * h;
            let grown = if full {
                PlanMemory { correlation, packed, workspace, ..memory }
            } else {
                PlanMemory { packed, ..memory }
            };
            assert_eq!(model.memory(), grown, "{config:?}");
            let made = device.balance();
            assert_eq!(made.bytes, grown.total(), "{config:?}");
            // Nothing was computed, not even the number of rows.
            statistics.sums_mut()[0] = 300.0;
            model.backward(operands.of_step(300, 20, h), &statistics, true).unwrap();
            assert_eq!(device.balance(), made, "{config:?}: the second phase allocates");
        }
    }

    /// What a small step in one launch has for scratch is in the workspace, and no step allocates it.
    #[test]
    fn small_steps_take_what_the_formula_says() {
        for ([rows, inputs, latents], fits) in
            [([128, 784, 64], true), ([9000, 3, 255], true), ([70, 1025, 64], false), ([70, 37, 257], false)]
        {
            for config in configurations(Shape { rows, inputs, latents }, &[100]) {
                let device = Arc::new(Accounts::new(Nowhere::new(Mainloop::Sm80, None).cooperative()));
                let (plain, fused) = (nowhere::<f32>(Mainloop::Sm80, None).0, Cuda::<f32>::on_driver(device.clone()));
                let m = config.block_rows.unwrap_or(rows).min(512);
                let (m4, h4) = (m.next_multiple_of(4), latents.next_multiple_of(4));
                let scratch = [[4 * m4 * h4; 2], [4 * h4 * h4, m4 * h4], [4 * h4; 2], [4 * h4, 8 * m], [8 * h4; 2]];
                let without = config.memory(&plain).unwrap();
                let workspace = match fits && config.correlation_form != Form::Dual {
                    true => without.workspace.max(aligned([scratch.into_iter().flatten().map(room).sum()])),
                    false => without.workspace,
                };
                let memory = config.memory(&fused).unwrap();
                assert_eq!(memory, PlanMemory { workspace, ..without }, "{config:?}");
                let mut model = DecoderFree::new(fused, config).unwrap();
                let made = device.balance();
                assert_eq!(made.bytes, memory.total(), "{config:?}");
                Operands::new(config.shape).step(&mut model);
                assert_eq!(device.balance(), made, "{config:?}: a step allocates");
            }
        }
    }

    #[test]
    fn plans_of_other_models_take_what_the_formulas_say() {
        fn check<E: CudaElement>(library: Option<usize>) {
            for [rows, inputs, latents] in SHAPES {
                let shape = Shape { rows, inputs, latents };
                let (cuda, device) = nowhere::<E>(Mainloop::Sm80, library);
                let all = Workspaces::new(&cuda, library, shape);
                let standard = StandardSae::new(cuda.clone(), StandardConfig { shape, lambda_l1: 0.1 }).unwrap();
                let workspace = [all.encode(rows), all.decode(rows), all.decode_backward(rows), all.product(rows)];
                let workspace = aligned(workspace.into_iter().chain([all.column_sums(rows)]));
                let buffers = size_of::<E>() * rows * (2 * latents + inputs) + 16 * latents + 16;
                assert_eq!(device.balance().bytes, buffers + workspace, "{cuda:?} {shape:?}");
                drop(standard);
                for objective in [OBJECTIVE, VARIANCE, LSE_ALONE, REDUNDANCY] {
                    let config = DecoderFreeConfig { objective, ..DecoderFreeConfig::new(shape) };
                    let losses = ActivationLosses::new(cuda.clone(), shape, objective).unwrap();
                    let encoding = documented(&config, size_of::<E>());
                    let (vectors, workspace) = (encoding.vectors + 4 * latents, all.plan(&config, false));
                    let expected = PlanMemory { block: 0, vectors, workspace, ..encoding };
                    assert_eq!(losses.memory(), expected, "{cuda:?} {config:?}");
                    assert_eq!(device.balance().bytes, expected.total(), "{cuda:?} {config:?}");
                }
            }
        }
        check::<f32>(None);
        check::<bf16>(None);
        check::<f16>(Some(1 << 25));
    }

    /// As wide as a vocabulary, in blocks: without a correlation term there is no matrix of pairs of latents, nor room to multiply with one.
    #[test]
    fn without_a_correlation_term_memory_is_linear_in_the_latents() {
        let shape = |latents| Shape { rows: 65_536, inputs: 4096, latents };
        let (cuda, _) = nowhere::<bf16>(Mainloop::Sm80, None);
        for objective in [LSE_ALONE, VARIANCE] {
            let total = |latents| {
                let config =
                    DecoderFreeConfig { objective, block_rows: Some(1024), ..DecoderFreeConfig::new(shape(latents)) };
                config.memory(&cuda).unwrap().total()
            };
            let [one, two, four] = [1usize << 16, 1 << 17, 1 << 18].map(total);
            assert_eq!(four - two, 2 * (two - one), "{objective:?}");
            // 1.9 GB, as the page says.
            assert_eq!(two / 10_000_000, 188, "{objective:?}: {two} bytes");
        }
    }

    #[cfg(sae_kernels_ptx)]
    fn executed<E: CudaElement>() {
        use super::common::emulated::Emulated;
        use ptx_emulator::Options;
        blocks_give_the_gradient_of_the_whole_batch(|| {
            let options = Options { check_races: false, ..Options::default() };
            let device = Arc::new(Accounts::new(Emulated::new(options)));
            (Cuda::<E>::on_driver(device.clone()), move || format!("{:?}", device.balance()))
        });
    }

    #[cfg(sae_kernels_ptx)]
    #[test]
    fn executed_in_blocks_f32() {
        executed::<f32>();
    }
    #[cfg(sae_kernels_ptx)]
    #[test]
    fn executed_in_blocks_bf16() {
        executed::<bf16>();
    }
}
