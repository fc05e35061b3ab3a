//! One planted fault for each rule, found in every schedule.

mod common;
use common::*;
use ptx_emulator::{Device, Fault, Grid, LoadError, Module, Options, Rule};

const FAULTS: &str = include_str!("ptx/faults.ptx");

/// Runs a kernel of (int*, int) on 64 initialised ints.
fn run(module: &Module, kernel: &str, grid: Grid, n: i32, options: Options) -> Result<Vec<i32>, Fault> {
    let mut d = Device::new(Options { instruction_limit: 100_000, ..options });
    let p = d.upload(&[0i32; 64]);
    d.launch(module, kernel, grid, &[p.into(), n.into()])?;
    d.download(p, 64)
}

#[test]
fn every_rule_finds_its_fault() {
    let module = module(FAULTS);
    let (warp, two) = (Grid::linear(1, 32, 0), Grid::linear(1, 64, 0));
    let blocks = Grid::linear(2, 32, 0);
    for (kernel, grid, n, rule) in [
        ("out_of_bounds", warp, 33, Rule::OutOfBounds),
        ("out_of_bounds", warp, -32, Rule::OutOfBounds),
        ("out_of_bounds_shared", warp, 32, Rule::OutOfBounds),
        ("out_of_bounds_shared", warp, -1, Rule::OutOfBounds),
        ("misaligned", Grid::linear(1, 1, 0), 1, Rule::Misaligned),
        ("uninitialised_shared", warp, 0, Rule::UninitialisedRead),
        ("race_shared_write_write", two, 0, Rule::Race),
        ("race_shared_write_read", two, 0, Rule::Race),
        ("race_shared_read_write", two, 0, Rule::Race),
        ("race_global", warp, 0, Rule::Race),
        ("race_between_blocks", blocks, 0, Rule::RaceBetweenBlocks),
        ("race_missing_fence", blocks, 0, Rule::RaceBetweenBlocks),
        ("divergent_barrier", two, 0, Rule::Divergence),
        ("departed_barrier", two, 3, Rule::DepartedThread),
        ("departed_shuffle", warp, 3, Rule::DepartedThread),
        ("mask_without_self", warp, 0, Rule::WrongMask),
        ("mask_differs", warp, 0, Rule::WrongMask),
        ("source_outside_mask", warp, 0, Rule::WrongMask),
        ("divergent_shuffle", warp, 0, Rule::Divergence),
        ("deadlock", two, 0, Rule::Deadlock),
        ("endless", warp, 0, Rule::InstructionLimit),
        ("undefined_register", warp, 0, Rule::UndefinedRegister),
        ("trapped", warp, 0, Rule::Trap),
    ] {
        for options in all_options() {
            match run(&module, kernel, grid, n, options.clone()) {
                Ok(_) => panic!("{kernel}: not found with {options:?}"),
                Err(fault) => {
                    assert_eq!(fault.rule, rule, "{options:?}\n{fault}");
                    let here = fault.here.as_ref().unwrap_or_else(|| panic!("{kernel}: no place"));
                    assert!(here.line > 0 && here.ptx_line > 0, "{fault}");
                    if matches!(rule, Rule::Race | Rule::RaceBetweenBlocks) {
                        assert!(fault.other.is_some(), "{fault}");
                    }
                }
            }
        }
    }
}

#[test]
fn barriers_of_different_counts_are_found() {
    let module = module(FAULTS);
    for options in all_options() {
        let fault = run(&module, "barrier_counts_differ", Grid::linear(1, 64, 0), 0, options).unwrap_err();
        // Where the smaller count is met first, the others wait for ever.
        assert!(matches!(fault.rule, Rule::Divergence | Rule::Deadlock), "{fault}");
    }
}

#[test]
fn the_sound_neighbours_are_clean() {
    let module = module(FAULTS);
    for options in all_options() {
        let (warp, two) = (Grid::linear(1, 32, 0), Grid::linear(1, 64, 0));
        run(&module, "out_of_bounds", warp, 0, options.clone()).unwrap();
        run(&module, "out_of_bounds_shared", warp, 5, options.clone()).unwrap();
        run(&module, "misaligned", Grid::linear(1, 1, 0), 2, options.clone()).unwrap();
        run(&module, "race_bytes_are_told_apart", two, 1, options.clone()).unwrap();
        run(&module, "undefined_register", warp, 1, options.clone()).unwrap();
        run(&module, "endless", warp, 1, options.clone()).unwrap();
        run(&module, "race_between_blocks", Grid::linear(1, 32, 0), 0, options).unwrap();
    }
}

#[test]
fn uninitialised_global_memory_is_found_and_reads_as_nan() {
    let module = module(FAULTS);
    let mut d = Device::new(Options::default());
    let p = d.alloc(64);
    let one = Grid::linear(1, 1, 0);
    let fault = d.launch(&module, "uninitialised_global", one, &[p.into(), 0i32.into()]).unwrap_err();
    assert_eq!(fault.rule, Rule::UninitialisedRead);
    assert!(d.download::<f32>(p, 16).unwrap().iter().all(|v| v.is_nan()));
    assert!(d.download::<half::bf16>(p, 32).unwrap().iter().all(|v| v.is_nan()));

    let mut d = Device::new(Options { check_uninitialised: false, ..Options::default() });
    let p = d.alloc(64);
    d.launch(&module, "uninitialised_global", one, &[p.into(), 0i32.into()]).unwrap();
}

#[test]
fn copies_must_be_awaited() {
    let module = module(FAULTS);
    for options in all_options() {
        for kernel in ["copy_not_awaited", "copy_abandoned"] {
            let mut d = Device::new(options.clone());
            let (p, q) = (d.upload(&[1i32; 128]), d.alloc(128));
            let fault = d.launch(&module, kernel, Grid::linear(1, 32, 0), &[p.into(), q.into()]).unwrap_err();
            assert_eq!(fault.rule, Rule::CopyNotAwaited, "{kernel}: {fault}");
        }
        let mut d = Device::new(options);
        let p = d.upload(&[1i32; 128]);
        let fault = d.launch(&module, "copy_too_long", Grid::linear(1, 1, 0), &[p.into(), 0i32.into()]).unwrap_err();
        assert_eq!(fault.rule, Rule::OutOfBounds);
    }
}

#[test]
fn freed_memory_is_out_of_bounds() {
    let module = module(FAULTS);
    let mut d = Device::new(Options::default());
    let p = d.upload(&[0i32; 64]);
    assert!(d.free(p) && !d.free(p));
    let fault = d.launch(&module, "out_of_bounds", Grid::linear(1, 32, 0), &[p.into(), 0i32.into()]).unwrap_err();
    assert_eq!(fault.rule, Rule::OutOfBounds);
    assert!(fault.message.contains("freed"), "{fault}");
    assert!(d.read(p, 4).is_err());
}

#[test]
fn launches_that_do_not_fit_are_refused() {
    let module = module(FAULTS);
    let mut d = Device::new(Options::default());
    let p = d.upload(&[0i32; 64]);
    let good = [p.into(), 0i32.into()];
    for (kernel, grid, arguments) in [
        ("no_such_kernel", Grid::linear(1, 32, 0), &good[..]),
        ("out_of_bounds", Grid::linear(1, 1025, 0), &good[..]),
        ("out_of_bounds", Grid::linear(0, 32, 0), &good[..]),
        ("out_of_bounds", Grid::linear(1, 32, 164 << 10), &good[..]),
        ("out_of_bounds", Grid::linear(1, 32, 0), &good[..1]),
        ("out_of_bounds", Grid::linear(1, 32, 0), &[p.into(), p.into()]),
    ] {
        let fault = d.launch(&module, kernel, grid, arguments).unwrap_err();
        assert_eq!(fault.rule, Rule::Launch, "{fault}");
    }
    d.launch(&module, "out_of_bounds", Grid::linear(1, 32, 163 << 10), &good).unwrap();
}

#[test]
fn reports_name_both_places() {
    let fault =
        run(&module(FAULTS), "race_shared_write_read", Grid::linear(1, 64, 0), 0, Options::default()).unwrap_err();
    let text = fault.to_string();
    let (read, write) = (fault.here.unwrap(), fault.other.unwrap());
    assert_eq!((read.file.as_str(), write.file.as_str()), ("faults.cu", "faults.cu"));
    assert_eq!(read.line.abs_diff(write.line), 1);
    let mut what = [read.what.as_str(), write.what.as_str()];
    what.sort();
    assert_eq!(what, ["read", "write"]);
    assert_ne!(read.thread, write.thread);
    assert!(text.contains("faults.cu:") && text.contains("nothing orders"), "{text}");
}

#[test]
fn deadlocks_say_who_waits_where() {
    let fault = run(&module(FAULTS), "deadlock", Grid::linear(1, 64, 0), 0, Options::default()).unwrap_err();
    assert!(fault.message.contains("threads 0..=31 wait at barrier 1 (32 of 64 have arrived)"), "{fault}");
    assert!(fault.message.contains("threads 32..=63 wait at barrier 2"), "{fault}");
}

fn load(body: &str) -> Result<Module, LoadError> {
    let text = format!(
        ".version 9.0\n.target sm_80\n.address_size 64\n.visible .entry k(\n.param .u64 k_param_0\n)\n{{\n.reg .pred %p<4>;\n.reg .b32 %r<9>;\n.reg .f32 %f<9>;\n.reg .b64 %rd<9>;\n{body}\nret;\n}}\n"
    );
    Module::parse(&text)
}

#[test]
fn what_is_unknown_does_not_load() {
    load("add.s32 %r1, 1, 2;").unwrap();
    for body in [
        "frobnicate.b32 %r1, 1;",
        "add.wrong.s32 %r1, 1, 2;",
        "add.f32.strange %f1, %f2, %f3;",
        "ld.global.weird.f32 %f1, [%rd1];",
        "add.s32 %r1, %r2, %nobody;",
        "bra NOWHERE;",
        "mma.sync.aligned.m16n8k16.col.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2}, {%r5,%r6}, {%f1,%f2,%f3,%f4};",
        "cp.async.cg.shared.global [%r1], [%rd1], 8;",
        "wgmma.fence.aligned;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.f16 {%f1,%f2,%f3,%f4}, %rd1, %rd2, %p1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, %rd1, %rd2, %p1, 1, 2, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, %rd1, %rd2, %p1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, %rd1, %rd2, %p1, 1, 1, 0, 0;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2}], [%r3];",
        "cp.async.bulk.tensor.2d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r3];",
        "cp.async.bulk.global.shared::cta.mbarrier::complete_tx::bytes [%rd1], [%r1], 16;",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1];",
        "mbarrier.try_wait.parity.release.shared::cta.b64 %p1, [%r1], 0;",
        "setmaxnreg.inc.sync.aligned.u32 100;",
        "fence.proxy.tensormap::generic.release.gpu;",
        "cvt.f32.s32 %f1, %r1;",
        "cvt.rn.s32.f32.ftz.what %r1, %f1;",
        "shfl.idx.b32 %r1, %r2, 0, 31;",
        "mov.b32 %r1, %clock7;",
    ] {
        let error = load(body).expect_err(body);
        assert!(error.line == 12 || error.reason.contains("label"), "{error}");
    }
}
