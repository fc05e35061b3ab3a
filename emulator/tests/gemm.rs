//! A complete tensor-core product: cp.async in stages, ldmatrix from swizzled tiles, mma.sync.

mod common;
use common::*;
use half::bf16;
use ptx_emulator::{Asynchronous, Device, Fault, Grid, LaunchStats, Module, Options, Rule, Schedule, mutate};

const GEMM: &str = include_str!("ptx/gemm.ptx");

struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: Vec<bf16>,
    b: Vec<bf16>,
    want: Vec<f64>,
}

impl Case {
    fn new(m: usize, n: usize, k: usize) -> Case {
        let mut r = Random(m as u64 * 31 + n as u64 * 7 + k as u64);
        let ld = k.next_multiple_of(8);
        // What lies between the rows must not matter: NaN.
        let mut matrix = |rows: usize| -> Vec<bf16> {
            (0..rows * ld).map(|i| if i % ld < k { bf16::from_f32(r.unit()) } else { bf16::NAN }).collect()
        };
        let (a, b) = (matrix(m), matrix(n));
        let row = |x: &[bf16], i: usize| -> Vec<f64> { x[i * ld..i * ld + k].iter().map(|v| v.to_f64()).collect() };
        let mut want = Vec::new();
        for i in 0..m {
            let x = row(&a, i);
            for j in 0..n {
                want.push(x.iter().zip(row(&b, j)).map(|(x, y)| x * y).sum());
            }
        }
        Case { m, n, k, a, b, want }
    }

    fn run(&self, module: &Module, kernel: &str, options: Options) -> Result<(Vec<f32>, LaunchStats), Fault> {
        let mut d = Device::new(options);
        let (pa, pb, pc) = (d.upload(&self.a), d.upload(&self.b), d.alloc(4 * self.m * self.n));
        let grid = Grid {
            grid: [self.n.div_ceil(64) as u32, self.m.div_ceil(64) as u32, 1],
            block: [128, 1, 1],
            shared_bytes: 3 * 2 * 64 * 32 * 2,
            ..Grid::linear(1, 1, 0)
        };
        let ld = self.k.next_multiple_of(8) as i32;
        let numbers = [self.m as i32, self.n as i32, self.k as i32, ld, ld];
        let mut arguments = vec![pa.into(), pb.into(), pc.into()];
        arguments.extend(numbers.map(Into::into));
        let stats = d.launch(module, kernel, grid, &arguments)?;
        Ok((d.download(pc, self.m * self.n)?, stats))
    }

    fn agrees(&self, c: &[f32]) -> bool {
        // NaN must fail.
        c.iter().zip(&self.want).all(|(c, w)| (f64::from(*c) - w).abs() <= 3e-5 * (self.k as f64).sqrt())
    }
}

#[test]
fn agrees_with_a_plain_product_however_it_runs() {
    let module = module(GEMM);
    for (m, n, k) in [(1, 1, 1), (64, 64, 32), (70, 65, 45), (33, 130, 200)] {
        let case = Case::new(m, n, k);
        for options in all_options() {
            for rounding in ROUNDINGS {
                let options = Options { rounding, ..options.clone() };
                let (c, _) = case.run(&module, "gemm", options.clone()).unwrap_or_else(|e| panic!("{m}x{n}x{k}: {e}"));
                assert!(case.agrees(&c), "{m}x{n}x{k} {options:?}");
            }
        }
    }
}

#[test]
fn the_swizzle_avoids_every_bank_conflict() {
    let (_, stats) = Case::new(64, 64, 64).run(&module(GEMM), "gemm", Options::default()).unwrap();
    assert!(stats.matrix_reads > 0);
    assert_eq!(stats.matrix_reads, stats.matrix_wavefronts);
}

#[test]
fn planted_faults_are_found() {
    let module = module(GEMM);
    let case = Case::new(70, 75, 141);
    for (kernel, rules) in [
        ("gemm_no_barrier", &[Rule::Race, Rule::UninitialisedRead][..]),
        ("gemm_late_wait", &[Rule::CopyNotAwaited, Rule::Race, Rule::UninitialisedRead]),
        ("gemm_early_refill", &[Rule::Race]),
        ("gemm_skipped_barrier", &[Rule::DepartedThread, Rule::Race, Rule::UninitialisedRead]),
        ("gemm_row_overrun", &[Rule::OutOfBounds]),
        ("gemm_edge", &[Rule::OutOfBounds, Rule::RaceBetweenBlocks, Rule::Race]),
    ] {
        for options in all_options() {
            let fault = case.run(&module, kernel, options).expect_err(kernel);
            assert!(rules.contains(&fault.rule), "{kernel}: {fault}");
            let here = fault.here.as_ref().unwrap_or_else(|| panic!("{kernel}: no place"));
            assert!(here.file.ends_with(".cu") || here.file.ends_with(".cuh"), "{kernel}: {fault}");
            assert!(here.line > 0);
        }
    }
    for kernel in ["gemm_swizzle", "gemm_short_k"] {
        let (c, _) = case.run(&module, kernel, Options::default()).unwrap_or_else(|e| panic!("{kernel}: {e}"));
        assert!(!case.agrees(&c), "{kernel} gave the right numbers");
    }
}

/// Without the checker, the numbers alone find the late wait only where copies land late.
#[test]
fn asynchronous_copies_really_land_late() {
    let module = module(GEMM);
    let case = Case::new(64, 64, 300);
    let run = |asynchronous| {
        let options = Options { asynchronous, check_races: false, check_uninitialised: false, ..Options::default() };
        case.agrees(&case.run(&module, "gemm_late_wait", options).unwrap().0)
    };
    assert!(!run(Asynchronous::Late));
    assert!(run(Asynchronous::AtOnce));
}

#[test]
fn every_synchronisation_is_needed() {
    let case = Case::new(70, 65, 200);
    let sites: Vec<_> = mutate::sites(GEMM).into_iter().filter(|s| s.function == "gemm").collect();
    assert!(sites.len() >= 5, "{sites:?}");
    for site in sites {
        let mutant = Module::parse(&mutate::without(GEMM, &site)).unwrap();
        let found = match case.run(&mutant, "gemm", Options::default()) {
            Err(_) => true,
            Ok((c, _)) => !case.agrees(&c),
        };
        assert!(found, "deleting `{}` (PTX line {}) goes unnoticed", site.text, site.line);
    }
}

#[test]
fn every_guard_matters() {
    let cases = [Case::new(70, 65, 45), Case::new(64, 64, 200), Case::new(1, 2, 3)];
    let mut unnoticed = Vec::new();
    for site in mutate::guards(GEMM).into_iter().filter(|s| s.function == "gemm") {
        let mutant = Module::parse(&mutate::negate(GEMM, &site)).unwrap();
        let options = Options { instruction_limit: 100_000, ..Options::default() };
        let found = cases.iter().any(|case| match case.run(&mutant, "gemm", options.clone()) {
            Err(_) => true,
            Ok((c, _)) => !case.agrees(&c),
        });
        if !found {
            unnoticed.push(site);
        }
    }
    assert!(unnoticed.is_empty(), "{unnoticed:#?}");
}

#[test]
fn a_run_is_a_function_of_its_seed() {
    let module = module(GEMM);
    let case = Case::new(70, 75, 141);
    let fault = |seed| {
        let options = Options { schedule: Schedule::Random(seed), preemption: Some(10), ..Options::default() };
        case.run(&module, "gemm_no_barrier", options).unwrap_err()
    };
    assert_eq!(fault(1), fault(1));
    assert!((2..8).any(|seed| fault(seed) != fault(1)));
}
