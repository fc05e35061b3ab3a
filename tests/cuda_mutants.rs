//! Whether the tests would notice: the CUDA kernels with one instruction changed at a time, on the emulated GPU.
//!
//! Each barrier, commit, wait and fence of every kernel is deleted in turn, bounds at tile edges are off by one, signs are swapped, guards
//! negated. A small workload of the family's operations records launches with the memory before and after; a mutant runs on copies of
//! these, the cheapest first, and must break a rule of the checker or leave other bytes. What survives stands in `SURVIVORS` with the
//! reason, and must survive.
#![cfg(sae_kernels_ptx)]

mod common;

use common::emulated::{Emulated, launch_on};
use common::ops::{self, Backward, Correlation, Decode, DecodeBackward, Dual, Encode, Finish, Redundancy, StatisticsPart};
use common::staged::Staged;
use common::{Place, Under, rng, uniform};
use ptx_emulator::{Device, Module, Options, Rule, mutate};
use sae_kernels::cuda_driver::{Driver, FAMILIES, Launch, PTX_DIR};
use sae_kernels::operations::{Adam, AdamConfig, Layout, Sgd, SgdConfig};
use sae_kernels::{Activation, Backend, Cuda, CudaElement, Form, Objective, Precision, Result, bf16, f16};
use std::collections::{BTreeMap, HashMap};
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

/// One element type's operations of a family: once within a tile, once over several, of which one is full. Products are deep enough to
/// fill each stage again.
fn work<E: CudaElement>(family: &str, under: &Under<Staged<E>>) {
    let (dense, strided) = (Place::DENSE, Place::STRIDED);
    // Six products of planes, or one.
    let depth = if E::IS_16_BIT { 170 } else { 45 };
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
    match family {
        "prepare" => {
            ops::comoments(under, strided, (20, 13), &numbers(20 * 13, 1.0), &numbers(13, 0.4), None);
            ops::comoments(under, dense, (11, 140), &numbers(11 * 140, 1.0), &numbers(140, 0.4), None);
            dual(9, 13).run(under, dense);
            redundancy(9, 13, Form::Primal).run(under, dense);
            encode(9, 13, 5, Activation::Relu, false).run(under, strided);
        }
        "reduce" => {
            ops::column_sums(under, dense, (140, 13), &numbers(140 * 13, 1.0), Some(&numbers(13, 1.0)));
            encode(140, 5, 13, Activation::Relu, true).run(under, dense);
            encode(9, 5, 13, Activation::Relu, false).run(under, dense);
        }
        "encode" => {
            encode(20, depth, 13, Activation::Softplus, true).run(under, strided);
            encode(140, depth, 133, Activation::Relu, false).run(under, dense);
            ops::responsibilities(under, dense, (20, 45), &numbers(20 * 45, 1.0), &numbers(20, 1.0));
            ops::responsibilities(under, strided, (9, 133), &numbers(9 * 133, 1.0), &numbers(9, 1.0));
        }
        "statistics" => {
            ops::comoments(under, dense, (45, 20), &numbers(45 * 20, 1.0), &numbers(20, 0.4), None);
            let before = ops::upper_triangle(133, &numbers(133 * 133, 1.0));
            ops::comoments(under, strided, (45, 133), &numbers(45 * 133, 1.0), &numbers(133, 0.4), Some(&before));
            // Every third column is far from 0, then none.
            for far in [50.0, 0.0] {
                let (n, h) = (30, 45);
                let a: Vec<f64> = numbers(n * h, 0.01).iter().enumerate().map(|(i, x)| x + if i % h % 3 == 0 { far } else { 0.0 }).collect();
                let column = |f: fn(f64) -> f64| (0..h).map(|j| (0..n).map(|i| f(a[i * h + j])).sum()).collect::<Vec<f64>>();
                ops::recentre(under, dense, (n, h), &a, &column(|x| x), &column(|x| x * x));
            }
            let finish = |h: usize, comoments| Finish {
                h,
                count: 50,
                objective: Objective::default(),
                shift: numbers(h, 0.5),
                sum: numbers(h, 3.0),
                sum_squares: positive(h),
                comoments,
            };
            finish(13, None).run(under, dense);
            // Rows with two blocks of 32 columns before their own.
            let h = 77;
            let comoments = (0..h * h).map(|at| if at % (h + 1) == 0 { 3.0 } else { 0.01 * (at % h) as f64 }).collect();
            finish(h, Some(comoments)).run(under, dense);
        }
        "backward" => {
            backward(20, 45, Activation::Softplus, primal(45)).run(under, dense);
            backward(140, 133, Activation::Relu, primal(133)).run(under, dense);
            backward(20, 45, Activation::Softplus, Correlation::Dual { product: numbers(20 * 45, 1.0) }).run(under, strided);
            backward(140, 133, Activation::Relu, Correlation::None).run(under, dense);
        }
        "dual" => {
            dual(45, 37).run(under, dense);
            dual(140, 133).run(under, strided);
            // gram_tn serves the dual form of the weights.
            redundancy(140, 133, Form::Dual).run(under, dense);
        }
        "product" => {
            ops::column_sums(under, dense, (140, 13), &numbers(140 * 13, 1.0), None);
            if E::IS_16_BIT {
                for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
                    for ([m, n, k], before) in [([20, 13, 170], false), ([140, 133, 170], true)] {
                        let before = before.then(|| numbers(m * n, 1.0));
                        let (left, right) = (numbers(m * k, 1.0), numbers(n * k, 1.0));
                        ops::product(under, dense, layout, [m, n, k], &left, &right, before.as_deref());
                    }
                }
            }
        }
        "redundancy" => {
            for form in [Form::Primal, Form::Dual] {
                redundancy(45, 37, form).run(under, strided);
                redundancy(140, 133, form).run(under, dense);
            }
        }
        "decode" => {
            for (n, d, h) in [(20, 13, depth), (140, 133, depth)] {
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
            for (n, d, h, activation) in [(20, depth, 13, Activation::Softplus), (140, depth, 133, Activation::Relu)] {
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
            let len = 300;
            for momentum in [0.9, 0.0] {
                let mut velocity = vec![0.25; if momentum == 0.0 { 0 } else { len }];
                let mut parameters: Vec<f32> = numbers(len, 1.0).iter().map(|x| *x as f32).collect();
                let mut storage = vec![E::from_f64(0.0); len];
                let config = SgdConfig { learning_rate: 0.05, momentum, weight_decay: 0.1 };
                let gradient = vec![0.5; len];
                let (velocity, parameters) = (&mut velocity[..], &mut parameters[..]);
                let storage = Some(&mut storage[..]);
                under.backend.sgd(Sgd { config, gradient: &gradient, velocity, parameters, storage }).unwrap();
            }
            let (mut first, mut second) = (vec![0.25f32; len], vec![0.5f32; len]);
            let mut parameters: Vec<f32> = numbers(len, 1.0).iter().map(|x| *x as f32).collect();
            let mut storage = vec![E::from_f64(0.0); len];
            let args = Adam {
                config: AdamConfig { weight_decay: 0.1, ..AdamConfig::default() },
                step: 3,
                gradient: &vec![0.5; len][..],
                first_moment: &mut first[..],
                second_moment: &mut second[..],
                parameters: &mut parameters[..],
                storage: Some(&mut storage[..]),
            };
            under.backend.adam(args).unwrap();
        }
        _ => panic!("no workload for the family {family}"),
    }
}

/// The family's launches of all element types, the cheapest of each kernel first.
fn record(family: &str, kernels: &'static [&'static str]) -> HashMap<&'static str, Vec<Recorded>> {
    // An endless loop ends soon.
    let options = Options { instruction_limit: 200_000, ..Options::default() };
    let recorder = Arc::new(Recorder { emulated: Emulated::new(options), kernels, launches: Mutex::default() });
    fn under<E: CudaElement>(recorder: &Arc<Recorder>, precision: Precision) -> Under<Staged<E>> {
        let recorder = recorder.clone();
        let make = move || Staged(Cuda::on_driver(recorder.clone()).with_precision(precision));
        Under::new("recorded".into(), make)
    }
    work::<f32>(family, &under(&recorder, Precision::Full));
    work::<bf16>(family, &under(&recorder, Precision::Full));
    work::<f16>(family, &under(&recorder, Precision::Full));
    if family == "prepare" {
        work::<bf16>(family, &under(&recorder, Precision::Storage));
        work::<f16>(family, &under(&recorder, Precision::Storage));
    }
    let mut launches: HashMap<_, Vec<_>> = HashMap::new();
    for recorded in std::mem::take(&mut *recorder.launches.lock().unwrap()) {
        launches.entry(recorded.launch.kernel).or_default().push(recorded);
    }
    launches.values_mut().for_each(|launches| launches.sort_by_key(|recorded| recorded.instructions));
    launches
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
        _ => "another rule",
    }
}

fn try_out(mutant: &str, launches: &[Recorded]) -> Found {
    let Ok(module) = Module::parse(mutant) else { return Found::NotLoaded };
    for recorded in launches {
        let mut device = recorded.before.clone();
        match launch_on(&mut device, &module, &recorded.launch) {
            Err(fault) => return Found::Checker(rule_name(fault.rule)),
            Ok(_) if device.first_difference(&recorded.after).is_some() => return Found::Numbers,
            Ok(_) => {}
        }
    }
    Found::Nowhere
}

fn check(family: &str) {
    let kernels = FAMILIES.iter().find(|(name, _)| *name == family).expect("a family").1;
    let launches = record(family, kernels);
    let ptx = std::fs::read_to_string(format!("{}/{family}.ptx", PTX_DIR.unwrap())).unwrap();
    let mut table: BTreeMap<(&str, Found), usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for kernel in kernels {
        let launches = launches.get(kernel).unwrap_or_else(|| panic!("the workload never launches {kernel}"));
        let ptx = mutate::only(&ptx, kernel);
        let mut mutants = Vec::new();
        for site in mutate::sites(&ptx) {
            let text = mutate::without(&ptx, &site);
            mutants.push(("deleted", site, text));
        }
        for (kind, site, text) in mutants {
            let found = try_out(&text, launches);
            *table.entry((kind, found)).or_default() += 1;
            if found == Found::Nowhere {
                wrong.push(format!("{kernel}: {kind} `{}`, PTX line {}", site.text, site.line));
            }
        }
    }
    for ((kind, found), count) in table {
        println!("{family}: {kind}: {found:?}: {count}");
    }
    assert!(wrong.is_empty(), "unnoticed:\n{}", wrong.join("\n"));
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
families! { backward decode encode dual redundancy product statistics prepare reduce optimizer }
