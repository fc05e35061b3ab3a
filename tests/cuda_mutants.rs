//! Whether the tests would notice: the CUDA kernels with one instruction changed at a time, on the emulated GPU.
//!
//! Each barrier, commit, wait and fence of every kernel is deleted in turn, bounds at tile edges are off by one, signs are swapped, guards
//! negated. A small workload of the family's operations records launches with the memory before and after; a mutant runs on copies of
//! these, the cheapest first, and must break a rule of the checker or leave other bytes. What survives stands in `SURVIVORS` with the
//! reason, and must survive.
#![cfg(sae_kernels_ptx)]

mod common;

use common::emulated::{self, Emulated, launch_on};
use common::ops::{
    self, ActivationSums, Backward, Correlation, Covariance, Decode, DecodeBackward, Dual, Encode, Finish, Redundancy,
    StatisticsPart,
};
use common::staged::Staged;
use common::{Guarded, Place, Plan, Problem, Under, rng, uniform};
use ptx_emulator::{Device, Module, Options, Rule, mutate};
use sae_kernels::cuda_driver::{Driver, FAMILIES, Launch, Mainloop, Schedule, Tensor, TensorMap};
use sae_kernels::operations::{Adam, AdamConfig, Layout, Optimizer, Sgd, SgdConfig};
use sae_kernels::{
    Activation, Backend, Cuda, CudaElement, DecoderFree, DecoderFreeConfig, DecoderFreeTrainStep, Form, Objective,
    Precision, Reduction, Result, Shape, Statistics, Trained, bf16, f16,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

/// A launch, with the device before and after it.
struct Recorded {
    launch: Launch,
    before: Device,
    after: Device,
    instructions: u64,
}

/// An emulated GPU that remembers the launches of some kernels.
struct Recorder {
    emulated: Emulated,
    kernels: &'static [&'static str],
    launches: Mutex<Vec<Recorded>>,
}

impl Driver for Recorder {
    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.emulated.alloc(bytes)
    }
    unsafe fn free(&self, address: u64) {
        // SAFETY: the caller's promise, here and below.
        unsafe { self.emulated.free(address) }
    }
    unsafe fn upload(&self, source: &[u8], target: u64) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.emulated.upload(source, target) }
    }
    unsafe fn download(&self, source: u64, target: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.emulated.download(source, target) }
    }
    fn mainloop(&self) -> Mainloop {
        self.emulated.mainloop()
    }
    fn cooperative_blocks(&self) -> u32 {
        self.emulated.cooperative_blocks()
    }
    fn tensor_map(&self, tensor: &Tensor) -> Result<TensorMap> {
        self.emulated.tensor_map(tensor)
    }
    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let before = self.kernels.contains(&launch.kernel).then(|| self.emulated.snapshot());
        let instructions = self.emulated.run(launch).instructions;
        if let Some(before) = before {
            let after = self.emulated.snapshot();
            self.launches.lock().unwrap().push(Recorded { launch: *launch, before, after, instructions });
        }
        Ok(())
    }
    fn name(&self) -> String {
        "a recording GPU".into()
    }
}

/// Numbers that depend on nothing but how many there are.
fn numbers(len: usize, scale: f64) -> Vec<f64> {
    uniform(&mut rng(len as u64), len, scale)
}
/// Numbers from 0.5 to 1.5.
fn positive(len: usize) -> Vec<f64> {
    numbers(len, 0.5).iter().map(|x| x + 1.0).collect()
}

/// One element type's operations of a family: once within a tile, once over several, up to `most` rows or columns, of which one is full. Products
/// are deep enough to fill each stage again.
fn work<E: CudaElement>(family: &str, under: &Under<Staged<E>>, most: usize) {
    let (dense, strided) = (Place::DENSE, Place::STRIDED);
    // Six products of planes, or one.
    // Of products of squares: more stages than a ring has.
    let depth = if !E::IS_16_BIT {
        46
    } else if most > 256 {
        300
    } else {
        170
    };
    // For what need not be tried with every type.
    let once = E::NAME == "bf16" && under.backend.0.precision() == Precision::Storage;
    let encode = |n: usize, d: usize, h: usize, activation, before: bool| Encode {
        n,
        d,
        h,
        x: numbers(n * d, 1.0),
        weight: numbers(h * d, 0.3),
        bias: numbers(h, 0.2),
        activation,
        shift: before.then(|| numbers(h, 0.5)),
        before: before.then(|| (1.5, numbers(h, 1.0), positive(h))),
        wanted: [true; 3],
    };
    let backward = |n: usize, h: usize, activation, correlation| Backward {
        n,
        h,
        activations: numbers(n * h, 1.0),
        activation,
        row_loss: numbers(n, 1.0),
        row_weight: 0.7,
        statistics: Some(StatisticsPart { mean: numbers(h, 0.3), scale: numbers(h, 0.5), correlation }),
        before: Some(numbers(h, 1.0)),
    };
    let primal = |h: usize| {
        let m = numbers(h * h, 0.2);
        let coupling = (0..h * h).map(|at| m[at] + m[at % h * h + at / h]).collect();
        Correlation::Primal { coupling, offset: numbers(h, 0.4) }
    };
    let dual = |n: usize, h: usize| Dual {
        n,
        h,
        activations: numbers(n * h, 1.0),
        mean: numbers(h, 0.3),
        variance: positive(h),
        lambda_tc: 0.9,
        scale: numbers(h, 0.5),
    };
    let redundancy = |h: usize, d: usize, form| Redundancy {
        h,
        d,
        weight: numbers(h * d, 0.4),
        normalize: true,
        form,
        lambda: 0.3,
        before: Some(numbers(h * d, 1.0)),
    };
    let finish = |h: usize, count, covariance| Finish {
        h,
        count,
        objective: Objective::default(),
        shift: numbers(h, 0.5),
        sum: numbers(h, 3.0),
        // Some variances are negative but for rounding: dead columns.
        sum_squares: positive(h).iter().enumerate().map(|(j, s)| if j % 5 == 2 { 0.0 } else { *s }).collect(),
        covariance,
    };
    match family {
        "prepare" => {
            let mut values = numbers(18 * 15, 1.0);
            values[..4].copy_from_slice(&[f64::INFINITY, f64::NEG_INFINITY, f64::NAN, f64::INFINITY]);
            ops::comoments(under, strided, (18, 15), &values, &numbers(15, 0.4), None);
            ops::comoments(under, dense, (11, 141), &numbers(11 * 141, 1.0), &numbers(141, 0.4), None);
            dual(9, 15).run(under, dense);
            redundancy(9, 15, Form::Primal).run(under, dense);
            encode(9, 15, 5, Activation::Relu, false).run(under, strided);
        }
        "reduce" => {
            // Loops over slots are unrolled.
            ops::column_sums(under, dense, (700, 5), &numbers(700 * 5, 1.0), Some(&numbers(5, 1.0)));
            if once {
                // More rows than there are warps in the sum.
                encode(700, 5, 15, Activation::Relu, true).run(under, dense);
            }
            encode(9, 5, 15, Activation::Relu, false).run(under, dense);
        }
        "encode" => {
            encode(18, depth, 15, Activation::Softplus, true).run(under, strided);
            encode(most, depth, 131, Activation::Relu, false).run(under, dense);
            encode(5, 6, 7, Activation::Identity, false).run(under, dense);
            ops::responsibilities(under, dense, (18, 46), &numbers(18 * 46, 1.0), &numbers(18, 1.0));
            ops::responsibilities(under, strided, (9, 131), &numbers(9 * 131, 1.0), &numbers(9, 1.0));
        }
        "activations" => {
            for ([n, h], place) in [([19, 15], strided), ([141, 131], dense)] {
                ActivationSums {
                    n,
                    h,
                    activations: numbers(n * h, 1.0),
                    shift: Some(numbers(h, 0.5)),
                    before: Some((1.5, numbers(h, 1.0), positive(h))),
                    wanted: [true; 2],
                }
                .run(under, place);
            }
        }
        "statistics" => {
            ops::comoments(under, dense, (depth, 18), &numbers(depth * 18, 1.0), &numbers(18, 0.4), None);
            let before = ops::upper_triangle(131, &numbers(131 * 131, 1.0));
            ops::comoments(under, strided, (46, 131), &numbers(46 * 131, 1.0), &numbers(131, 0.4), Some(&before));
            // Rows begin at multiples of 16 bytes.
            let aligned = Place { multiple: 4, ..dense };
            ops::comoments(under, aligned, (46, most), &numbers(46 * most, 1.0), &numbers(most, 0.4), None);
            ops::recentre(under, dense, (0, 5), &[], &[0.0; 5], &[0.0; 5]);
            // Every third column is far from 0, then none.
            for far in [50.0, 0.0] {
                let (n, h) = (30, 46);
                let a: Vec<f64> = numbers(n * h, 0.01)
                    .iter()
                    .enumerate()
                    .map(|(i, x)| x + if i % h % 3 == 0 { far } else { 0.0 })
                    .collect();
                let column =
                    |f: fn(f64) -> f64| (0..h).map(|j| (0..n).map(|i| f(a[i * h + j])).sum()).collect::<Vec<f64>>();
                ops::recentre(under, dense, (n, h), &a, &column(|x| x), &column(|x| x * x));
            }
            finish(15, 50, Covariance::None).run(under, dense);
            for (h, place) in [(19, dense), (most, strided)] {
                let comoments = (0..h * h).map(|at| if at / h == at % h { 3.0 } else { 0.01 * (at % h) as f64 });
                finish(h, 50, Covariance::Comoments(comoments.collect())).run(under, place);
            }
            if under.backend.0.precision() == Precision::Full {
                let a = numbers(depth * most, 1.0);
                finish(most, depth as u64, Covariance::Activations(a)).run(under, dense);
            }
        }
        "packed" => {
            // Once more latents than a block has threads; and no rows.
            for (h, rows) in [(7, 46), (260, 46), (9, 0)] {
                for at in 0..8 {
                    let [full, shifted, accumulate] = [1, 2, 4].map(|bit| at & bit == 0);
                    let block = ops::Block {
                        count: rows,
                        row_loss_sum: 1.5,
                        shift: numbers(h, 0.5),
                        sum: numbers(h, 0.1),
                        sum_squares: positive(h),
                        comoments: full.then(|| numbers(h * h, 1.0)),
                    };
                    let (shift, before) = (numbers(h, 0.4), numbers(Statistics::len(h, full), 1.0));
                    let shift = shifted.then_some(shift.as_slice());
                    let mut packed = block.pack(under, dense, shift, accumulate.then_some(before.as_slice()));
                    packed[0] = rows as f64;
                    ops::Block::unpack(under, strided, &packed, shift, h, full);
                    ops::Block::unpack(under, dense, &packed, shift, h, false);
                }
            }
        }
        "backward" => {
            backward(18, 46, Activation::Softplus, primal(46)).run(under, dense);
            backward(most, 131, Activation::Relu, primal(131)).run(under, dense);
            backward(18, 46, Activation::Softplus, Correlation::Dual { product: numbers(18 * 46, 1.0) })
                .run(under, strided);
            backward(most, 131, Activation::Relu, Correlation::None).run(under, dense);
        }
        "dual" => {
            dual(46, 38).run(under, dense);
            dual(most, 131).run(under, strided);
            // gram_tn serves the dual form of the weights; in the primal form gram_nt lessens a diagonal.
            redundancy(46, 38, Form::Primal).run(under, dense);
            redundancy(131, most, Form::Dual).run(under, dense);
        }
        "product" => {
            ops::column_sums(under, dense, (143, 15), &numbers(143 * 15, 1.0), None);
            if E::IS_16_BIT {
                for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
                    // Of the last, rows begin at multiples of 16 bytes, and end elsewhere.
                    let aligned = Place { multiple: 4, ..dense };
                    for ([m, n, k], place, before) in [
                        ([18, 15, depth], dense, false),
                        ([most, 131, depth], dense, true),
                        ([most, 131, depth], aligned, false),
                    ] {
                        let before = before.then(|| numbers(m * n, 1.0));
                        let (left, right) = (numbers(m * k, 1.0), numbers(n * k, 1.0));
                        ops::product(under, place, layout, [m, n, k], &left, &right, before.as_deref());
                    }
                }
            }
        }
        "redundancy" => {
            for form in [Form::Primal, Form::Dual] {
                redundancy(46, 38, form).run(under, strided);
                redundancy(most, 131, form).run(under, dense);
            }
        }
        "decode" => {
            for (n, d, h) in [(18, 15, depth), (most, 131, depth)] {
                Decode {
                    n,
                    d,
                    h,
                    activations: numbers(n * h, 1.0),
                    weight: numbers(h * d, 0.3),
                    bias: numbers(d, 0.2),
                    x: numbers(n * d, 1.0),
                    residual_weight: 0.6,
                    before: Some(2.0),
                    wanted: [true; 2],
                }
                .run(under, dense);
            }
            for (n, d, h, activation) in [
                (18, depth, 15, Activation::Softplus),
                (most, depth, 131, Activation::Relu),
                (6, 5, 7, Activation::Identity),
            ] {
                DecodeBackward {
                    n,
                    d,
                    h,
                    residual: numbers(n * d, 1.0),
                    weight: numbers(h * d, 0.3),
                    activations: numbers(n * h, 1.0),
                    activation,
                    l1: 0.3,
                    before: Some(numbers(h, 1.0)),
                }
                .run(under, dense);
            }
        }
        "optimizer" => {
            // From multiples of 16 bytes on and not, with a tail.
            let len = 303;
            let values = |skip: usize| -> Vec<f32> { numbers(skip + len, 1.0).iter().map(|x| *x as f32).collect() };
            for (skip, momentum) in [(0, 0.9), (1, 0.9), (0, 0.0)] {
                let (mut velocity, mut parameters) = (vec![0.25f32; skip + len], values(skip));
                let (gradient, mut storage) = (values(skip), vec![E::from_f64(0.0); skip + len]);
                let config = SgdConfig { learning_rate: 0.05, momentum, weight_decay: 0.1 };
                let velocity = if momentum == 0.0 { &mut velocity[..0] } else { &mut velocity[skip..] };
                let (gradient, parameters) = (&gradient[skip..], &mut parameters[skip..]);
                let storage = Some(&mut storage[skip..]);
                under.backend.sgd(Sgd { config, gradient, velocity, parameters, storage }).unwrap();
            }
            for skip in [0, 1] {
                let (mut first, mut second) = (vec![0.25f32; skip + len], vec![0.5f32; skip + len]);
                let (mut parameters, mut storage) = (values(skip), vec![E::from_f64(0.0); skip + len]);
                let args = Adam {
                    config: AdamConfig { weight_decay: 0.1, eps: 0.1, ..AdamConfig::default() },
                    step: 3,
                    gradient: &values(skip)[skip..],
                    first_moment: &mut first[skip..],
                    second_moment: &mut second[skip..],
                    parameters: &mut parameters[skip..],
                    storage: Some(&mut storage[skip..]),
                };
                under.backend.adam(args).unwrap();
            }
        }
        "tiny" => {
            // Another precision is another product: there is none.
            if E::IS_16_BIT && under.backend.0.precision() == Precision::Storage {
                return;
            }
            let problem = |[n, d, h]: [usize; 3], objective, activation| Problem {
                shape: Shape { rows: n, inputs: d, latents: h },
                x: numbers(n * d, 1.0),
                weight: numbers(h * d, 0.5),
                bias: numbers(h, 0.3),
                objective,
                activation,
            };
            let all = Objective { lambda_lse: 0.7, lambda_var: 0.3, lambda_tc: 1.5, ..Objective::default() };
            let step = |problem: Problem, outputs, place| {
                problem
                    .step(under, &Plan { outputs, place, correlation_form: Form::Primal, ..Plan::default() })
                    .unwrap();
            };
            step(problem([5, 6, 3], all, Activation::Identity), false, strided);
            step(problem([11, 7, 6], Objective { lambda_tc: 0.0, ..all }, Activation::Softplus), true, strided);
            let lse = Objective { lambda_var: 0.0, lambda_tc: 0.0, reduction: Reduction::Mean, ..all };
            step(problem([19, 8, 10], lse, Activation::Relu), true, dense);
            // Whole steps of loops that the compiler unrolls, with what is left over.
            step(problem([55, 132, 13], Objective { lambda_lse: 0.0, ..all }, Activation::Relu), true, dense);
            step(problem([6, 260, 5], all, Activation::Relu), true, dense);
            // Of all warps.
            step(problem([9, 2, 253], all, Activation::Relu), true, dense);
            for momentum in [None, Some(0.0), Some(0.9)] {
                let sgd = momentum.map(|momentum| SgdConfig { learning_rate: 0.05, momentum, weight_decay: 0.1 });
                train(under, &problem([9, 132, 6], all, Activation::Relu), sgd, dense);
                train(under, &problem([9, 5, 6], all, Activation::Relu), sgd, strided);
            }
        }
        _ => panic!("no workload for the family {family}"),
    }
}

/// A step of training by Adam, or by gradient descent.
fn train<E: CudaElement>(under: &Under<Staged<E>>, problem: &Problem, sgd: Option<SgdConfig>, place: Place) {
    let Problem { shape, objective, activation, .. } = *problem;
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let config = DecoderFreeConfig { objective, activation, ..DecoderFreeConfig::new(shape) };
    let mut model = DecoderFree::new(under.fresh(), config).unwrap();
    let x = Guarded::<E>::matrix(place, n, d, &problem.x);
    let vector = |values: &[f64]| Guarded::<f32>::vector(place, values);
    let mut storage = [&problem.weight, &problem.bias].map(|values| Guarded::<E>::vector(place, values));
    let mut parameters = [vector(&problem.weight), vector(&problem.bias)];
    let state = |len: usize| if sgd.is_some_and(|sgd| sgd.momentum == 0.0) { vec![] } else { positive(len) };
    let mut first = [vector(&state(h * d)), vector(&state(h))];
    let mut second = [vector(&positive(h * d)), vector(&positive(h))];
    let ([w0, b0], [w1, b1], [w2, b2]) = (&mut parameters, &mut first, &mut second);
    let [mut weight, mut bias] = [(w0, w1, w2), (b0, b1, b2)].map(|(parameters, first, second)| Trained {
        parameters: parameters.slice_mut(),
        storage: None,
        optimizer: match sgd {
            Some(config) => Optimizer::Sgd { config, velocity: first.slice_mut() },
            None => Optimizer::Adam {
                config: AdamConfig { weight_decay: 0.1, eps: 0.1, ..AdamConfig::default() },
                step: 3,
                first_moment: first.slice_mut(),
                second_moment: second.slice_mut(),
            },
        },
    });
    let [weight_storage, bias_storage] = &mut storage;
    (weight.storage, bias.storage) = (Some(weight_storage.slice_mut()), Some(bias_storage.slice_mut()));
    let step = DecoderFreeTrainStep { x: x.mat(), weight, bias, activations: None, row_loss: None };
    model.train_step(step).unwrap();
}

/// The family's launches of all element types, the cheapest of each kernel first.
fn record(
    family: &str,
    kernels: &'static [&'static str],
    device: impl Fn(Options) -> Emulated,
    most: usize,
) -> HashMap<&'static str, Vec<Recorded>> {
    // An endless loop ends soon.
    let options = Options { instruction_limit: 200_000, ..Options::default() };
    let recorder = Arc::new(Recorder { emulated: device(options), kernels, launches: Mutex::default() });
    fn under<E: CudaElement>(recorder: &Arc<Recorder>, precision: Precision) -> Under<Staged<E>> {
        let recorder = recorder.clone();
        let make = move || Staged(Cuda::on_driver(recorder.clone()).with_precision(precision));
        Under::new("recorded".into(), make)
    }
    work::<f32>(family, &under(&recorder, Precision::Full), most);
    work::<bf16>(family, &under(&recorder, Precision::Full), most);
    work::<f16>(family, &under(&recorder, Precision::Full), most);
    work::<bf16>(family, &under(&recorder, Precision::Storage), most);
    work::<f16>(family, &under(&recorder, Precision::Storage), most);
    let mut launches: HashMap<_, Vec<Recorded>> = HashMap::new();
    for recorded in std::mem::take(&mut *recorder.launches.lock().unwrap()) {
        let same = launches.entry(recorded.launch.kernel).or_default();
        if same.iter().all(|other| way(&other.launch) != way(&recorded.launch)) {
            same.push(recorded);
        }
    }
    launches.values_mut().for_each(|launches| launches.sort_by_key(|recorded| recorded.instructions));
    launches
}

/// The grid, and what stands in the argument apart from addresses: launches that agree in it do the same to other numbers.
fn way(launch: &Launch) -> ([u32; 2], Vec<u64>) {
    let words = launch.argument.bytes().chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    // The emulator's memory starts there; no extent, stride or number is as large without being much larger.
    let is_address = |word: &u64| (0x7_0000_0000..0x100_0000_0000).contains(word);
    (launch.grid, words.map(|word| if is_address(&word) { 1 } else { word }).collect())
}

/// How a mutant was noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Found {
    /// It does not load: a register is read that nothing writes.
    NotLoaded,
    Checker(&'static str),
    Numbers,
    Nowhere,
}

const DELETED: &str = "deleted";
const NEGATED: &str = "negated";
const OFF_BY_ONE: &str = "off by one";
const SWAPPED: &str = "swapped sign";

fn rule_name(rule: Rule) -> &'static str {
    match rule {
        Rule::OutOfBounds => "OutOfBounds",
        Rule::Misaligned => "Misaligned",
        Rule::UninitialisedRead => "UninitialisedRead",
        Rule::Race => "Race",
        Rule::RaceBetweenBlocks => "RaceBetweenBlocks",
        Rule::CopyNotAwaited => "CopyNotAwaited",
        Rule::Divergence => "Divergence",
        Rule::WrongMask => "WrongMask",
        Rule::DepartedThread => "DepartedThread",
        Rule::Deadlock => "Deadlock",
        Rule::InstructionLimit => "InstructionLimit",
        Rule::ProxyFence => "ProxyFence",
        Rule::Mbarrier => "Mbarrier",
        Rule::Wgmma => "Wgmma",
        Rule::Registers => "Registers",
        Rule::DepartedBlock => "DepartedBlock",
        _ => "another rule",
    }
}

/// `races`: whether races are looked for.
fn try_out(module: &Module, launches: &[Recorded], races: bool) -> Found {
    for Recorded { launch, before, after, .. } in launches {
        let mut device = if races { before.clone() } else { before.clone_without_race_checks() };
        match launch_on(&mut device, module, launch) {
            Err(fault) => return Found::Checker(rule_name(fault.rule)),
            Ok(_) if device.first_difference(after).is_some() => return Found::Numbers,
            Ok(_) => {}
        }
    }
    Found::Nowhere
}

/// An instruction with its bound off by one or its sign swapped.
fn planted(text: &str) -> Option<(&'static str, String)> {
    if text.ends_with(" 0f00000000;") || text.ends_with(" 0d0000000000000000;") {
        return None;
    }
    // Elements of a chunk, rows and columns of a tile.
    for (bound, less) in [(", 8;", ", 7;"), (", 128;", ", 127;")] {
        if text.starts_with("min.s32") && text.ends_with(bound) {
            return Some((OFF_BY_ONE, text.replace(bound, less)));
        }
    }
    for (sign, swapped) in [
        ("sub.f32", "add.f32"),
        ("add.f32", "sub.f32"),
        ("neg.f32", "mov.f32"),
        ("sub.f64", "add.f64"),
        ("add.f64", "sub.f64"),
        ("neg.f64", "mov.f64"),
    ] {
        if let Some(rest) = text.strip_prefix(sign) {
            return Some((SWAPPED, format!("{swapped}{rest}")));
        }
    }
    None
}

/// What no launch of the workload can notice.
struct Survivor {
    /// Where the instruction comes from: a file of `kernels/` and a piece of the line.
    file: &'static str,
    line: &'static str,
    /// How the kernels' names start; every kernel if empty.
    kernels: &'static [&'static str],
    reason: &'static str,
}

/// No synchronisation may stand here: one that nothing misses is deleted from the kernel.
const SURVIVORS: &[Survivor] = &[
    Survivor {
        file: "packed.cu",
        line: "const double product = p.packed[from + j] +",
        kernels: &["unpack_statistics"],
        reason: "without rows and without a shift there is nothing to move, so what is added is 0: a loop of its own, as nvcc has it",
    },
    Survivor {
        file: "common.cuh",
        line: "if (count >= 4 && is_aligned(",
        kernels: &[
            "activation_sums",
            "adam",
            "align_f16",
            "backward",
            "column_sums",
            "comoments",
            "decode",
            "dual_apply",
            "gram",
            "pointwise",
            "prepare",
            "responsibilities",
            "row_norms",
            "sgd",
            "tiny_step",
        ],
        reason: "one access of four elements and four of one element do the same; where both may be, it is a matter of speed",
    },
    Survivor {
        file: "common.cuh",
        line: "v[i] = i < count ? widen(from[i])",
        kernels: &["dual_apply"],
        reason: "vectors in the workspace are aligned: four whole elements are never read one by one",
    },
    Survivor {
        file: "common.cuh",
        line: "v[i] = i < count ? widen(from[i])",
        kernels: &["column_sums"],
        reason: "the compiler makes steps of four rows; those left over are read one by one in a tail only",
    },
    Survivor {
        file: "common.cuh",
        line: "const float slope = -expm1f(-a);",
        kernels: &["backward", "decode_backward", "pointwise", "tiny_step"],
        reason: "expm1f's own cases: near overflow, and of 0",
    },
    Survivor {
        file: "common.cuh",
        line: "rectified + log1pf(expf(-fabsf(z)))",
        kernels: &["encode", "tiny_step"],
        reason: "log1pf's own case: infinity",
    },
    Survivor {
        file: "common.cuh",
        line: "x += __shfl_xor_sync(FULL_WARP, x, lane);",
        kernels: &["finish_rows"],
        reason: "most lanes of finish_rows add zeros, until there are thousands of latents",
    },
    Survivor {
        file: "tile.cuh",
        line: "col = int((sqrtf(8.0f * float(index) + 1.0f) - 1.0f) * 0.5f);",
        kernels: &[],
        reason: "an estimate that the loops below it mend",
    },
    Survivor {
        file: "tile.cuh",
        line: "while (int64_t(col) * (col + 1) / 2 > index) --col;",
        kernels: &[],
        reason: "the estimate is too large only for thousands of blocks, and other products never take this way",
    },
    Survivor {
        file: "tile.cuh",
        line: "while (int64_t(col + 1) * (col + 2) / 2 <= index) ++col;",
        kernels: &["backward", "decode", "dual_apply", "encode", "product", "redundancy"],
        reason: "only symmetric products take this way",
    },
    Survivor {
        file: "tile.cuh",
        line: "const int first = int(index / group_tiles) * 8",
        kernels: &[],
        reason: "a long division has a short way for small numbers, with the same result",
    },
    Survivor {
        file: "tile.cuh",
        line: "const int height = rows - first < 8",
        kernels: &[],
        reason: "groups of tile rows need more than seven of them",
    },
    Survivor {
        file: "gemm_sm80.cuh",
        line: "epilogue(TileOf<WARPS>{data, row0, col0,",
        kernels: &["gram_primal"],
        reason: "the compiler writes the mirror image in steps of four rows, past an end that is off by one",
    },
    Survivor {
        file: "gradient.cuh",
        line: "if (mean != nullptr) da[i]",
        kernels: &["decode_backward", "pointwise"],
        reason: "decode_backward has no mean, pointwise no offset",
    },
    Survivor {
        file: "gradient.cuh",
        line: "if (row_loss != nullptr) da[i]",
        kernels: &["decode_backward"],
        reason: "decode_backward has no row losses",
    },
    Survivor {
        file: "gradient.cuh",
        line: "if (l1 != 0.0f) da[i]",
        kernels: &["backward", "pointwise"],
        reason: "their l1 is 0, and adding 0 changes nothing",
    },
    Survivor {
        file: "mirror.cuh",
        line: "if (on_diagonal && row == col + i) v[i] -= diagonal;",
        kernels: &["gram_tn"],
        reason: "only gram_nt is given a diagonal to subtract",
    },
    Survivor {
        file: "mirror.cuh",
        line: "if (on_diagonal && row > col + i)",
        kernels: &["gram_nt", "gram_tn"],
        reason: "in a tile on the diagonal both halves hold the same numbers but for rounding, here without that",
    },
    Survivor {
        file: "prepare.cu",
        line: "",
        kernels: &["align_f16"],
        reason: "it makes one plane and shifts nothing: most of its source is never reached",
    },
    Survivor {
        file: "redundancy.cu",
        line: "less_unit ? w[i] * scale : 0.0f",
        kernels: &["redundancy_primal"],
        reason: "only the dual form lacks the unit matrix",
    },
    Survivor {
        file: "store.cuh",
        line: "if (i < count && col + i >= tile.row0 + row)",
        kernels: &["product"],
        reason: "only comoments leaves out what is below the diagonal",
    },
    Survivor {
        file: "dual.cu",
        line: "tile < p.row_tiles; ++tile",
        kernels: &["dual_finish"],
        reason: "the compiler makes steps of four tiles; the batch has two",
    },
    Survivor {
        file: "redundancy.cu",
        line: "tile < p.col_tiles; ++tile",
        kernels: &["through_norms"],
        reason: "the compiler makes steps of four tiles; the weights have two",
    },
    Survivor {
        file: "statistics.cu",
        line: "for (int64_t tile = ",
        kernels: &["finish_primal"],
        reason: "the compiler makes steps of four tiles; there are two",
    },
    Survivor {
        file: "statistics.cu",
        line: "[tile * p.latents + j], offset += ",
        kernels: &["finish_primal"],
        reason: "as above",
    },
    Survivor {
        file: "statistics.cu",
        line: "p.loss[j] = -log(v + p.eps);",
        kernels: &["variances"],
        reason: "log's own case: subnormal numbers",
    },
    Survivor {
        file: "reduce.cu",
        line: "for (int64_t i = threadIdx.x; i < p.count; i += 1024)",
        kernels: &["sum"],
        reason: "the compiler makes steps of four values a thread, 4096 in all",
    },
    Survivor {
        file: "encode.cu",
        line: "for (int64_t tile = threadIdx.x % 32; tile < p.col_tiles; tile += 32)",
        kernels: &["finish_rows"],
        reason: "a second step of a lane needs more than 32 tiles of columns, 4096 latents",
    },
    Survivor {
        file: "encode.cu",
        line: "exp(double(least) - double(slot.x))",
        kernels: &["finish_rows"],
        reason: "as above, and exp's own cases: under- and overflow",
    },
    Survivor {
        file: "encode.cu",
        line: "const double loss = double(least) - log(sum);",
        kernels: &["finish_rows"],
        reason: "log's own case: subnormal numbers",
    },
    Survivor {
        file: "tiny.cu",
        line: "const bool aligned = is_aligned(p.x) && is_aligned(p.weight);",
        kernels: &["tiny_step"],
        reason: "the loop that minds ends makes the same sums in the same order: it is a matter of speed",
    },
    Survivor {
        file: "tiny.cu",
        line: "if (lane % 2 == 0)",
        kernels: &["tiny_step"],
        reason: "both lanes of a pair hold the same number, and each writes it to one of two places",
    },
    Survivor {
        file: "tiny.cu",
        line: "const double loss = double(least) - log(warp_sum(double(sum)));",
        kernels: &["tiny_step"],
        reason: "log's own case: subnormal numbers",
    },
    Survivor {
        file: "tiny.cu",
        line: "p.variance_losses[first + j] = -log(v + p.eps);",
        kernels: &["tiny_step"],
        reason: "log's own case: subnormal numbers",
    },
];

/// The lines of a file of `kernels/`; none of a system header.
fn source(file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("{}/kernels/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap_or_default();
    text.lines().map(String::from).collect()
}

/// Which survivor, if any, an instruction of a kernel is.
fn listed(kernel: &str, file: &str, line: &str) -> Option<usize> {
    let kernel_is = |name: &&str| kernel.starts_with(*name);
    SURVIVORS.iter().position(|survivor| {
        survivor.file == file
            && line.contains(survivor.line)
            && (survivor.kernels.is_empty() || survivor.kernels.iter().any(kernel_is))
    })
}

/// Every mutant of a family's kernels.
fn check(family: &str) {
    let kernels = FAMILIES.iter().find(|(name, _)| *name == family).expect("a family").1;
    let launches = record(family, kernels, |options| Emulated::new(options).cooperative(3), 141);
    let ptx = emulated::ptx(family, Mainloop::Sm80);
    let files = mutate::files(&ptx);
    let sources: HashMap<u32, (String, Vec<String>)> =
        files.into_iter().map(|(number, path)| (number, (path.clone(), source(&path)))).collect();
    let mut table: BTreeMap<(&str, Found), usize> = BTreeMap::new();
    let (mut unnoticed, mut survived) = (Vec::new(), BTreeMap::<usize, BTreeSet<&str>>::new());
    let mut on_the_list = BTreeMap::<usize, BTreeSet<&str>>::new();
    for kernel in kernels {
        let launches = launches.get(kernel).unwrap_or_else(|| panic!("the workload never launches {kernel}"));
        let ptx = mutate::only(&ptx, kernel);
        let mut mutants: Vec<_> =
            mutate::sites(&ptx).into_iter().map(|site| (DELETED, mutate::without(&ptx, &site), site)).collect();
        // The kernels of the other types are made of the same source.
        if !kernel.ends_with("_f32") && (!kernel.ends_with("_f16") || *kernel == "align_f16") {
            for site in mutate::instructions(&ptx, |text| planted(text).is_some()) {
                let (kind, by) = planted(&site.text).unwrap();
                mutants.push((kind, mutate::replace(&ptx, &site, &by), site));
            }
            for site in mutate::guards(&ptx) {
                mutants.push((NEGATED, mutate::negate(&ptx, &site), site));
            }
        }
        for (kind, text, site) in mutants {
            let (file, line) = match sources.get(&site.innermost.0) {
                Some((file, lines)) => {
                    (&file[..], lines.get((site.innermost.1 as usize).wrapping_sub(1)).map_or("", String::as_str))
                }
                None => ("", ""),
            };
            let survivor = if kind == DELETED { None } else { listed(kernel, file, line) };
            if let Some(at) = survivor {
                on_the_list.entry(at).or_default().insert(*kernel);
            }
            let found = match Module::parse(&text) {
                Err(_) => Found::NotLoaded,
                Ok(module) if kind == DELETED => try_out(&module, launches, true),
                Ok(module) => match try_out(&module, launches, false) {
                    Found::Nowhere if kind == NEGATED && survivor.is_none() => try_out(&module, launches, true),
                    found => found,
                },
            };
            *table.entry((kind, found)).or_default() += 1;
            match (found, survivor) {
                (Found::Nowhere, Some(at)) => {
                    survived.entry(at).or_default().insert(kernel);
                }
                (Found::Nowhere, None) => {
                    unnoticed.push(format!(
                        "{kernel}: {kind} `{}`, PTX line {}, {file}: {}",
                        site.text,
                        site.line,
                        line.trim()
                    ));
                }
                _ => {}
            }
        }
    }
    for ((kind, found), count) in &table {
        println!("{family}: {kind}: {found:?}: {count}");
    }
    // Another compiler may write other instructions: then `planted` is to be told.
    if ptx.contains("mma.sync") {
        for kind in [DELETED, NEGATED, OFF_BY_ONE, SWAPPED] {
            assert!(
                table.keys().any(|(done, found)| *done == kind && *found < Found::Nowhere),
                "{family}: nothing {kind}"
            );
        }
    }
    assert!(unnoticed.is_empty(), "unnoticed:\n{}", unnoticed.join("\n"));
    // A survivor of one kernel only may be found in another of those that its entry names.
    for (at, kernels) in on_the_list {
        let Survivor { file, line, reason, .. } = SURVIVORS[at];
        assert!(
            survived.contains_key(&at),
            "`{line}` of {file} is found in {kernels:?}, though the list says: {reason}"
        );
    }
}

/// Kernels whose epilogue ends with a sum that one thread writes. Where warpgroups work in turn, that thread alone hands the tile on after
/// it, so the barrier after the epilogue orders nothing more; after other epilogues, and where both work together, it does.
const SUMMED_BY_ONE_THREAD: &[&str] = &["decode_bf16", "gram_nt", "gram_tn"];

/// The synchronisations of a family's products under the mainloop of compute capability 9.0, deleted one at a time. What else stands in
/// these kernels is the epilogue, whose mutants are tried above.
fn check_sm90(family: &str) {
    let kernels = FAMILIES.iter().find(|(name, _)| *name == family).expect("a family").1;
    // Of more than one square, so that the ring of stages goes on from one to the next.
    let mut launches = record(family, kernels, |options| Emulated::sm90(options, Schedule::Together), 268);
    for (kernel, in_turn) in record(family, kernels, |options| Emulated::sm90(options, Schedule::InTurn), 268) {
        launches.entry(kernel).or_default().extend(in_turn);
    }
    launches.values_mut().for_each(|launches| launches.sort_by_key(|recorded| recorded.instructions));
    let ptx = emulated::ptx(family, Mainloop::Sm90 { multiprocessors: 0, schedule: None });
    let (mut table, mut unnoticed, mut listed) = (BTreeMap::<Found, usize>::new(), Vec::new(), Vec::new());
    // Kernels of several types differ in nothing that synchronises.
    for kernel in kernels.iter().filter(|kernel| !kernel.ends_with("_f32") && !kernel.ends_with("_f16")) {
        let ptx = mutate::only(&ptx, kernel);
        if !ptx.contains("wgmma") {
            continue;
        }
        for site in mutate::sites(&ptx) {
            let found = match Module::parse(&mutate::without(&ptx, &site)) {
                Err(_) => Found::NotLoaded,
                Ok(module) => try_out(&module, &launches[kernel], true),
            };
            *table.entry(found).or_default() += 1;
            if found == Found::Nowhere && site.text.starts_with("bar.sync") && SUMMED_BY_ONE_THREAD.contains(kernel) {
                listed.push(*kernel);
            } else if found == Found::Nowhere {
                unnoticed.push(format!("{kernel}: `{}`, PTX line {}", site.text, site.line));
            }
        }
    }
    for (found, count) in &table {
        println!("{family}: {DELETED} under sm_90a: {found:?}: {count}");
    }
    assert!(table.keys().any(|found| *found < Found::Nowhere), "{family}: nothing {DELETED}");
    assert!(unnoticed.is_empty(), "unnoticed:\n{}", unnoticed.join("\n"));
    // One barrier each, neither more nor less.
    let expected: Vec<&str> = SUMMED_BY_ONE_THREAD.iter().copied().filter(|listed| kernels.contains(listed)).collect();
    assert_eq!(listed, expected, "{family}");
}

mod sm90 {
    macro_rules! families {
        ($($family:ident)*) => { $(#[test] fn $family() { super::check_sm90(stringify!($family)); })* }
    }
    families! { backward decode encode dual redundancy product statistics }
}

/// No entry is about what does not exist.
#[test]
fn the_list_is_of_lines_that_there_are() {
    for Survivor { file, line, kernels, .. } in SURVIVORS {
        assert!(source(file).iter().any(|there| there.contains(line)), "{file} has no `{line}`");
        for name in *kernels {
            let all = || FAMILIES.iter().flat_map(|(_, kernels)| kernels.iter());
            assert!(all().any(|kernel| kernel.starts_with(name)), "no kernel is called {name}");
        }
    }
}

macro_rules! families {
    ($($family:ident)*) => {
        $(#[test] fn $family() { check(stringify!($family)); })*

        #[test]
        fn no_family_is_left_out() {
            let mut tested = [$(stringify!($family)),*];
            tested.sort_unstable();
            let mut all: Vec<&str> = FAMILIES.iter().map(|(family, _)| *family).collect();
            all.sort_unstable();
            assert_eq!(tested[..], all);
        }
    };
}
families! { activations backward decode encode dual redundancy packed product statistics prepare reduce optimizer tiny }
