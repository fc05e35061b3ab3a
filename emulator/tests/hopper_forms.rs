//! Each sm_90a instruction by itself, and one planted fault for each rule about them.

mod common;
use common::*;
use half::bf16;
use ptx_emulator::{
    Argument, Asynchronous, Device, Fault, Grid, Options, Rule, Swizzle, TensorElement, TensorMap, TensorMapError,
};

const FORMS: &str = include_str!("ptx/hopper.ptx");

/// Runs a kernel of (int*, int) with `size` initialised ints.
fn run(kernel: &str, grid: Grid, n: i32, size: usize, options: Options) -> Result<Vec<i32>, Fault> {
    let module = module(FORMS);
    let mut d = Device::new(options);
    let p = d.upload(&vec![0i32; size]);
    d.launch(&module, kernel, grid, &[p.into(), n.into()])?;
    d.download(p, size)
}

/// Runs a kernel of (int*, int*, int) on 0, 1, 2 and so on.
fn copy(kernel: &str, n: i32, options: Options) -> Result<Vec<i32>, Fault> {
    let module = module(FORMS);
    let mut d = Device::new(options);
    let (p, q) = (d.upload(&(0..256).collect::<Vec<i32>>()), d.upload(&[-1i32; 256]));
    d.launch(&module, kernel, Grid::linear(1, 32, 0), &[p.into(), q.into(), n.into()])?;
    d.download(q, 256)
}

#[test]
fn mbarriers() {
    for options in all_options() {
        let two = Grid::linear(1, 64, 0);
        assert_eq!(run("states", two, 5, 64, options.clone()).unwrap(), [7; 64]);
        assert_eq!(run("counted", two, 5, 64, options).unwrap(), [5; 64]);
    }
}

#[test]
fn bulk_copies() {
    for options in all_options() {
        for bytes in [16, 128, 1024] {
            let got = copy("linear", bytes, options.clone()).unwrap();
            let n = bytes / 4;
            assert!((0..256).all(|i| got[i as usize] == if i < n { i + 1 + i32::from(i == 0) } else { -1 }), "{got:?}");
        }
        let fault = copy("linear", 20, options).unwrap_err();
        assert_eq!(fault.rule, Rule::Misaligned, "{fault}");
    }
}

/// A box of 4 x 3 x 2 elements of a tensor of 10 x 5 x 4, wherever it starts; rows of 12, of which two are NaN.
#[test]
fn boxes_are_filled_with_zeros() {
    let module = module(FORMS);
    let values: Vec<f32> = (0..12 * 5 * 4).map(|i| if i % 12 < 10 { i as f32 } else { f32::NAN }).collect();
    let inside = |x: i32, y: i32, z: i32| {
        let all = (0..10).contains(&x) && (0..5).contains(&y) && (0..4).contains(&z);
        if all { values[(x + 12 * (y + 5 * z)) as usize] } else { 0.0 }
    };
    for (x, y, z) in [(0, 0, 0), (3, 1, 2), (-2, -1, -1), (7, 3, 3), (9, 4, 3), (-4, 0, 0), (10, 0, 0), (1, -3, 0)] {
        for steps in [[1, 1, 1], [1, 2, 3]] {
            let mut d = Device::new(Options::default());
            let (p, q) = (d.upload(&values), d.alloc(4 * 24));
            let map = TensorMap::new(TensorElement::F32, p, &[10, 5, 4], &[48, 240], &[4, 3 * steps[1], 2 * steps[2]])
                .element_strides(&steps);
            let arguments: [Argument; 5] = [map.encode().unwrap(), q.into(), x.into(), y.into(), z.into()];
            d.launch(&module, "boxes", Grid::linear(1, 32, 0), &arguments)
                .unwrap_or_else(|e| panic!("{x} {y} {z}: {e}"));
            for (i, got) in d.download::<f32>(q, 24).unwrap().into_iter().enumerate() {
                let [_, by, bz] = steps.map(|s| s as i32);
                let i = i as i32;
                let want = inside(x + i % 4, y + i / 4 % 3 * by, z + i / 12 * bz);
                assert_eq!(got, want, "({x}, {y}, {z}) {steps:?} element {i}");
            }
        }
    }
}

#[test]
fn registers_of_a() {
    for options in all_options() {
        let q = run("registers_of_a", Grid::linear(1, 128, 0), 0, 128, options.clone()).unwrap();
        // A product of ones is 16: once, less once, and once more.
        assert!(q.iter().all(|&v| f32::from_bits(v as u32) == 16.0), "{q:?}");
        for (kernel, n) in [("late_sums", 2), ("late_writes", 1), ("unfenced_tiles", 1), ("descriptors_differ", 1)] {
            run(kernel, Grid::linear(1, 128, 0), n, 128, options.clone()).unwrap_or_else(|e| panic!("{kernel}: {e}"));
        }
    }
}

#[test]
fn registers_move_between_warpgroups() {
    let two = Grid::linear(1, 256, 0);
    run("budget", two, 0, 256, Options::default()).unwrap();
    // 65536 / 256 registers are there: an increase to 248 is none, and 64 threads are not a warpgroup.
    assert_eq!(run("budget", two, 1, 256, Options::default()).unwrap_err().rule, Rule::Registers);
    assert_eq!(run("budget", two, 2, 256, Options::default()).unwrap_err().rule, Rule::DepartedThread);
}

#[test]
fn clusters() {
    for options in all_options() {
        for ranks in [1, 2, 4] {
            let grid = Grid::linear(4, 32, 0).clusters([ranks, 1, 1]);
            let got = run("neighbours", grid, 0, 128, options.clone()).unwrap();
            for (i, v) in got.into_iter().enumerate() {
                let (rank, lane, ranks) = (i as i32 / 32 % ranks as i32, i as i32 % 32, ranks as i32);
                // What the next block wrote here it had read from the one behind it; so did this one.
                let of = |rank: i32| 100 * (rank.rem_euclid(ranks)) + lane;
                assert_eq!(v, 1000 * (of(rank + 2) + of(rank + 1)), "{ranks} ranks, {i}");
            }
        }
        for n in [0, 2] {
            run("relaxed_start", Grid::linear(2, 32, 0).clusters([2, 1, 1]), n, 64, options.clone()).unwrap();
        }
        let four = Grid::linear(4, 32, 0).clusters([4, 1, 1]);
        assert_eq!(run("counted_by_all", four, 0, 128, options.clone()).unwrap(), [129; 128]);
        let got = run("handed_over", Grid::linear(2, 32, 0).clusters([2, 1, 1]), 0, 32, options.clone()).unwrap();
        assert_eq!(got, (0..32).collect::<Vec<_>>());
        let got = run("split", Grid::linear(2, 32, 0).clusters([2, 1, 1]), 0, 32, options).unwrap();
        assert_eq!(got, [7; 32]);
    }
    let grid = Grid { grid: [4, 2, 1], ..Grid::linear(1, 32, 0) };
    let got = run("geometry", grid.clusters([2, 2, 1]), 9, 48, Options::default()).unwrap();
    for (block, v) in got.chunks(6).enumerate() {
        let (x, y) = (block as i32 % 4, block as i32 / 4);
        assert_eq!(v, [x % 2 + 2 * y, 4, x / 2, 2, y, 9], "block {block}");
    }
    for (kernel, grid) in [
        ("geometry", Grid::linear(3, 32, 0).clusters([2, 1, 1])),
        ("geometry", Grid::linear(16, 32, 0).clusters([16, 1, 1])),
        ("geometry", Grid::linear(2, 32, 0).clusters([0, 1, 1])),
        ("split", Grid::linear(4, 32, 0)),
        ("split", Grid::linear(4, 32, 0).clusters([4, 1, 1])),
    ] {
        assert_eq!(run(kernel, grid, 0, 96, Options::default()).unwrap_err().rule, Rule::Launch, "{kernel} {grid:?}");
    }
}

#[test]
fn one_lane_is_elected() {
    for options in all_options() {
        let got = run("leader", Grid::linear(1, 96, 0), 0, 96, options).unwrap();
        assert!(got.chunks(32).all(|warp| warp.iter().sum::<i32>() == 1), "{got:?}");
    }
}

#[test]
fn every_rule_finds_its_fault() {
    let (warp, two, group) = (Grid::linear(1, 32, 0), Grid::linear(1, 64, 0), Grid::linear(1, 128, 0));
    let pair = Grid::linear(2, 32, 0).clusters([2, 1, 1]);
    for (kernel, grid, n, rule) in [
        ("too_many_arrivals", warp, 0, Rule::Mbarrier),
        ("initialised_twice", warp, 0, Rule::Mbarrier),
        ("never_initialised", warp, 0, Rule::Mbarrier),
        ("missing_arrivals", two, 0, Rule::Deadlock),
        ("relaxed_wait", two, 0, Rule::Race),
        ("registers_of_a", group, 1, Rule::Wgmma),
        ("registers_of_a", group, 2, Rule::Wgmma),
        ("registers_of_a", group, 3, Rule::Wgmma),
        ("registers_of_a", group, 4, Rule::Wgmma),
        ("late_writes", group, 0, Rule::Wgmma),
        ("late_sums", group, 0, Rule::Wgmma),
        ("late_sums", group, 1, Rule::Wgmma),
        ("unfenced_tiles", group, 0, Rule::ProxyFence),
        ("descriptors_differ", group, 0, Rule::Wgmma),
        ("neighbours", pair, 1, Rule::DepartedBlock),
        ("neighbours", pair, 2, Rule::DepartedBlock),
        ("split", pair, 1, Rule::DepartedBlock),
        ("split", pair, 2, Rule::DepartedBlock),
        ("relaxed_start", pair, 1, Rule::RaceBetweenBlocks),
        ("counted_by_all", pair, 1, Rule::RaceBetweenBlocks),
    ] {
        for options in all_options() {
            let fault = match run(kernel, grid, n, 128, options.clone()) {
                Ok(_) => panic!("{kernel} {n}: not found with {options:?}"),
                Err(fault) => fault,
            };
            // Who does not wait may also find nothing yet.
            let early = matches!(kernel, "neighbours" | "relaxed_wait") && fault.rule == Rule::UninitialisedRead;
            assert!(fault.rule == rule || early, "{kernel} {n} {options:?}\n{fault}");
            let here = fault.here.as_ref().unwrap_or_else(|| panic!("{kernel}: no place"));
            assert!(here.line > 0 && here.ptx_line > 0, "{fault}");
        }
    }
}

#[test]
fn every_fault_of_a_bulk_copy_is_found() {
    for (kernel, bad, good, rule) in [
        ("read_before_wait", 0, None, Rule::CopyNotAwaited),
        ("load_abandoned", 0, None, Rule::CopyNotAwaited),
        ("half_expected", 0, Some(128), Rule::CopyNotAwaited),
        ("load_over_writes", 0, Some(1), Rule::ProxyFence),
        ("load_of_global_writes", 0, Some(1), Rule::ProxyFence),
        ("overwritten_store", 0, Some(1), Rule::Race),
        ("read_of_store", 0, Some(1), Rule::CopyNotAwaited),
    ] {
        for options in all_options() {
            let fault = match copy(kernel, bad, options.clone()) {
                Ok(_) => panic!("{kernel}: not found with {options:?}"),
                Err(fault) => fault,
            };
            // The thread that stored may overwrite its own tile, and a read may come before the load is issued.
            let other = match kernel {
                "overwritten_store" => &[Rule::CopyNotAwaited][..],
                // Where the second copy comes first, the bytes never add up.
                "half_expected" => &[Rule::Deadlock, Rule::Race],
                "read_before_wait" => &[Rule::UninitialisedRead, Rule::Race],
                _ => &[],
            };
            assert!(fault.rule == rule || other.contains(&fault.rule), "{kernel} {options:?}\n{fault}");
            if let Some(good) = good {
                copy(kernel, good, options).unwrap_or_else(|e| panic!("{kernel}: {e}"));
            }
        }
    }
}

/// Without the checker, numbers show when bulk copies land.
#[test]
fn bulk_copies_really_land_late() {
    let run = |asynchronous| {
        let options = Options { asynchronous, check_races: false, check_uninitialised: false, ..Options::default() };
        copy("read_before_wait", 0, options).unwrap()[1]
    };
    assert_eq!(run(Asynchronous::AtOnce), 1);
    assert_ne!(run(Asynchronous::Late), 1);
}

#[test]
fn copies_land_though_others_spin() {
    for options in all_options() {
        let module = module(FORMS);
        let mut d = Device::new(options);
        let (p, q) = (d.upload(&(0..256).collect::<Vec<i32>>()), d.alloc(4));
        let arguments = [p.into(), q.into(), 0i32.into()];
        d.launch(&module, "spun_for", Grid::linear(1, 64, 0), &arguments).unwrap();
        assert_eq!(d.download::<i32>(q, 1).unwrap(), [5]);
    }
}

#[test]
fn a_register_of_wgmma_is_named_by_what_was_done_to_it() {
    for (n, message) in [(2, "register of A is written"), (3, "read before wgmma.wait_group"), (4, "returned before")] {
        let fault = run("registers_of_a", Grid::linear(1, 128, 0), n, 128, Options::default()).unwrap_err();
        assert!(fault.message.contains(message), "{fault}");
    }
}

#[test]
fn deadlocks_say_what_an_mbarrier_lacks() {
    let fault = run("missing_arrivals", Grid::linear(1, 64, 0), 0, 64, Options::default()).unwrap_err();
    assert!(fault.message.contains("threads 0..=63 wait for the mbarrier"), "{fault}");
    assert!(fault.message.contains("phase 0, 3 of 64 arrivals missing, 0 bytes missing"), "{fault}");
}

#[test]
fn tensor_maps_are_checked() {
    let map = |dims: &[u64], strides: &[u64], box_dims: &[u32]| {
        TensorMap::new(TensorElement::Bf16, 0x1000, dims, strides, box_dims)
    };
    let good = || map(&[100, 50], &[208], &[64, 8]);
    good().swizzle(Swizzle::B128).encode().unwrap();
    map(&[1 << 32], &[], &[256]).encode().unwrap();
    use TensorMapError as E;
    for (map, error) in [
        (map(&[], &[], &[]), E::Rank(0)),
        (map(&[1; 6], &[16; 5], &[8; 6]), E::Rank(6)),
        (map(&[8, 8], &[], &[8, 8]), E::Count { name: "strides", found: 0, want: 1, rank: 2 }),
        (map(&[8, 8], &[16], &[8]), E::Count { name: "box_dims", found: 1, want: 2, rank: 2 }),
        (good().element_strides(&[1]), E::Count { name: "element_strides", found: 1, want: 2, rank: 2 }),
        (TensorMap::new(TensorElement::Bf16, 0x1008, &[8], &[], &[8]), E::Address(0x1008)),
        (map(&[0, 8], &[16], &[8, 8]), E::Size { dimension: 0, size: 0 }),
        (map(&[8, (1 << 32) + 1], &[16], &[8, 8]), E::Size { dimension: 1, size: (1 << 32) + 1 }),
        (map(&[100, 50], &[200], &[64, 8]), E::Stride { dimension: 1, stride: 200 }),
        (map(&[100, 50], &[1 << 40], &[64, 8]), E::Stride { dimension: 1, stride: 1 << 40 }),
        (map(&[100, 50], &[208], &[64, 257]), E::Box { dimension: 1, size: 257 }),
        (map(&[100, 50], &[208], &[64, 0]), E::Box { dimension: 1, size: 0 }),
        (good().element_strides(&[1, 9]), E::ElementStride { dimension: 1, stride: 9 }),
        (map(&[100, 50], &[208], &[12, 8]), E::RowBytes(24)),
        (good().swizzle(Swizzle::B64), E::RowAboveSpan { bytes: 128, span: 64 }),
        (map(&[100, 50], &[208], &[32, 8]).swizzle(Swizzle::B128), E::RowBelowSpan { bytes: 64, span: 128 }),
    ] {
        assert_eq!(map.encode().unwrap_err(), error);
    }

    // What the machine checks: that there is a map, of the instruction's rank, and memory behind it.
    let module = module(FORMS);
    let launch = |map: Argument, d: &mut Device| {
        let q = d.upload(&[0f32; 24]);
        let arguments = [map, q.into(), 0i32.into(), 0i32.into(), 0i32.into()];
        d.launch(&module, "boxes", Grid::linear(1, 32, 0), &arguments).unwrap_err().rule
    };
    let mut d = Device::new(Options::default());
    assert_eq!(launch(Argument::bytes(&[0; 128]), &mut d), Rule::TensorMap);
    let p = d.upload(&[bf16::ONE; 240]);
    let flat = TensorMap::new(TensorElement::F32, p, &[4, 3], &[16], &[4, 3]);
    assert_eq!(launch(flat.encode().unwrap(), &mut d), Rule::TensorMap);
    let long = TensorMap::new(TensorElement::F32, p, &[4, 3, 200], &[16, 512], &[4, 3, 2]);
    assert_eq!(launch(long.encode().unwrap(), &mut d), Rule::OutOfBounds);
}
