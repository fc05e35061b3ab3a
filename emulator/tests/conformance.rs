//! The instructions one by one: the same answers in every schedule, and those that the ISA gives.

mod common;
use common::*;
use ptx_emulator::conformance::{FIRST_PLACE, SM80, SM90A, SUITES, UNWRITTEN, compare, from_line};
use ptx_emulator::{Module, Options};

const CONFORMANCE: &str = SM80.ptx;

fn input() -> Vec<u32> {
    SM80.input()
}

fn run(module: &Module, kernel: &str, options: Options) -> Vec<u32> {
    SM80.emulated(module, kernel, options).unwrap_or_else(|e| panic!("{e}"))
}

/// Outputs of chips, recorded by `tests/cuda_hardware.rs` of the library in CHIP.TARGET.txt.
#[test]
fn agrees_with_recorded_chips() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let Ok(files) = std::fs::read_dir(folder) else {
        println!("no chip has been recorded yet");
        return;
    };
    for path in files.map(|file| file.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "txt")) {
        let target = path.file_stem().unwrap().to_str().and_then(|stem| stem.rsplit('.').next());
        let suite = SUITES.into_iter().find(|suite| Some(suite.target) == target);
        let suite = suite.unwrap_or_else(|| panic!("{} names no target", path.display()));
        let module = suite.module().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut recorded = Vec::new();
        for line in text.lines() {
            let (kernel, chip) = from_line(line, suite.words).unwrap_or_else(|| panic!("{}: {line}", path.display()));
            assert!(module.kernels().contains(&kernel), "{}: there is no {kernel}", path.display());
            let here = suite.emulated(&module, kernel, Options::default()).unwrap_or_else(|e| panic!("{e}"));
            compare(kernel, &chip, &here).unwrap_or_else(|difference| panic!("{}: {difference}", path.display()));
            recorded.push(kernel);
        }
        recorded.sort_unstable();
        assert_eq!(recorded, module.kernels(), "{}", path.display());
    }
}

#[test]
fn no_kernel_depends_on_the_schedule() {
    for (suite, least) in SUITES.into_iter().zip([19, 25]) {
        let module = suite.module().unwrap();
        assert!(module.kernels().len() >= least);
        for kernel in module.kernels() {
            let run = |options| suite.emulated(&module, kernel, options).unwrap_or_else(|e| panic!("{e}"));
            let want = run(Options::default());
            assert!(want.iter().any(|&w| w != u32::MAX), "{kernel} writes nothing");
            for options in all_options() {
                assert_eq!(run(options), want, "{kernel}");
            }
        }
    }
}

#[test]
fn matrices_arrive_where_the_isa_says() {
    let (module, x) = (module(CONFORMANCE), input());
    // Element (row, column) of matrix i: its rows are given by lanes 8i to 8i + 7.
    let element = |i: usize, row: usize, column: usize| {
        let line = ((8 * i + row) * 5 + 3) % 32;
        (x[line * 4 + column / 2] >> (16 * (column % 2))) as u16
    };
    for (kernel, count, transposed) in [
        ("c_ldmatrix_x1", 1, false),
        ("c_ldmatrix_x2", 2, false),
        ("c_ldmatrix_x4", 4, false),
        ("c_ldmatrix_x1_trans", 1, true),
        ("c_ldmatrix_x2_trans", 2, true),
        ("c_ldmatrix_x4_trans", 4, true),
    ] {
        let out = run(&module, kernel, Options::default());
        for lane in 0..32 {
            for i in 0..count {
                let at = |k: usize| {
                    let (outer, inner) = (lane / 4, lane % 4 * 2 + k);
                    if transposed { element(i, inner, outer) } else { element(i, outer, inner) }
                };
                let want = u32::from(at(1)) << 16 | u32::from(at(0));
                assert_eq!(out[lane * 4 + i], want, "{kernel} lane {lane} register {i}");
            }
        }
    }
}

/// Element by element from the fragment tables of the ISA, written out here a second time.
#[test]
fn products_agree_with_f64() {
    let (module, x) = (module(CONFORMANCE), input());
    let bf16 = |w: u32, half: usize| {
        let bits = (w & 0x83FF_83FF) | 0x3C00_3C00;
        f64::from(half::bf16::from_bits((bits >> (16 * half)) as u16).to_f32())
    };
    let f16 = |w: u32, half: usize| {
        let bits = (w & 0x9FFF_9FFF) | 0x2000_2000;
        f64::from(half::f16::from_bits((bits >> (16 * half)) as u16).to_f32())
    };
    let f32_of = |w: u32| f32::from_bits((w & 0x83FF_FFFF) | 0x3C00_0000);
    let tf32 = |w: u32, _| f64::from(f32::from_bits(f32_of(w).to_bits() & !0x1FFF));
    type Read<'a> = &'a dyn Fn(u32, usize) -> f64;
    for (kernel, per, depth, read) in [
        ("c_mma_bf16", 2usize, 16usize, &bf16 as Read),
        ("c_mma_f16", 2, 16, &f16 as Read),
        ("c_mma_tf32_tame", 1, 8, &tf32 as Read),
    ] {
        // Which lane and register hold a[row][k]: groups of four lanes share a row, registers step rows by 8, then k by half.
        let a = |row: usize, k: usize| {
            let register = row / 8 + 2 * (k / (depth / 2));
            let within = k % (depth / 2);
            read(x[(row % 8 * 4 + within / per) * 4 + register], within % per)
        };
        let b = |k: usize, column: usize| {
            let within = k % (depth / 2);
            read(x[128 + (column * 4 + within / per) * 2 + k / (depth / 2)], within % per)
        };
        for rounding in ROUNDINGS {
            let out = run(&module, kernel, Options { rounding, ..Options::default() });
            for row in 0..16 {
                for column in 0..8 {
                    let at = (row % 8 * 4 + column / 2) * 4 + row / 8 * 2 + column % 2;
                    let sum: f64 = (0..depth).map(|k| a(row, k) * b(k, column)).sum();
                    let want = sum + f64::from(f32_of(x[256 + at]));
                    let got = f64::from(f32::from_bits(out[at]));
                    assert!((got - want).abs() < 2e-6, "{kernel} {row},{column}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn copies_fill_with_zeros() {
    let (module, x) = (module(CONFORMANCE), input());
    let bytes = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let check = |out: &[u32], from: usize, words: usize, live: usize| {
        let mut want = bytes(&x[from..from + words]);
        want[live..].fill(0);
        assert_eq!(bytes(&out[..words]), want, "{words} words from {from}");
    };
    let out = run(&module, "c_cp_async_16", Options::default());
    for lane in 0..32 {
        check(&out[lane * 4..], lane * 4, 4, lane % 17);
        check(&out[128 + lane * 4..], 128 + lane * 4, 4, 16 - lane % 17);
    }
    let out = run(&module, "c_cp_async_small", Options::default());
    for lane in 0..32 {
        check(&out[lane * 2..], lane * 2, 2, lane % 9);
        check(&out[64 + lane..], lane, 1, lane % 5);
    }
}

#[test]
fn stores_keep_their_order() {
    let (module, x) = (module(CONFORMANCE), input());
    let out = run(&module, "c_store", Options::default());
    for lane in 0..32 {
        assert_eq!(out[lane * 4..][..4], x[lane * 6..][..4], "lane {lane}");
        assert_eq!(out[128 + lane * 2..][..2], x[lane * 6 + 4..][..2], "lane {lane}");
    }
}

#[test]
fn the_larger_or_nan() {
    let (module, x) = (module(CONFORMANCE), input());
    let tame = |w: u32| f32::from_bits((w & 0x83FF_FFFF) | 0x3C00_0000);
    let wild = |w: u32| f32::from_bits(w | 0x7F00_0000);
    let out = run(&module, "c_max_nan", Options::default());
    for l in 0..32 {
        let (a, b) = (x[l], x[32 + l]);
        for (at, a, b) in [(l, tame(a), tame(b)), (32 + l, wild(a), tame(b)), (64 + l, tame(a), wild(b))] {
            let (got, nan) = (f32::from_bits(out[at]), a.is_nan() || b.is_nan());
            assert!(if nan { got.is_nan() } else { got == a.max(b) }, "lane {l}: max({a:e}, {b:e}) is {got:e}");
        }
    }
}

#[test]
fn shuffles_and_votes() {
    let (module, x) = (module(CONFORMANCE), input());
    let out = run(&module, "c_shuffles", Options::default());
    for l in 0..32usize {
        let want = [
            x[l * 7 % 32],
            x[if l >= 3 { l - 3 } else { l }],
            x[if l + 7 < 32 { l + 7 } else { l }],
            x[l ^ 21],
            x[if l % 8 + 3 < 8 { l + 3 } else { l }],
            x[if l % 4 >= 2 { l - 2 } else { l }],
            // A butterfly that leaves its segment upwards stays; downwards it goes through.
            x[if l ^ 9 <= l | 7 { l ^ 9 } else { l }],
            x[l / 16 * 16 + (l + 5) % 16],
            u32::from(l + 5 < 32),
        ];
        assert_eq!(out[l * 9..l * 9 + 9], want, "lane {l}");
    }
    let out = run(&module, "c_votes", Options::default());
    for l in 0..32usize {
        let x = &x[..32];
        let set = |f: &dyn Fn(u32) -> bool| (0..32).fold(0u32, |m, i| m | u32::from(f(x[i])) << i);
        let want = [
            set(&|v| v & 1 == 1),
            1,
            0,
            x.iter().fold(0, |a: u32, &v| a.wrapping_add(v)),
            x.iter().map(|&v| v as i32).min().unwrap() as u32,
            *x.iter().max().unwrap(),
            x.iter().fold(0, |a, v| a ^ v),
            set(&|v| v % 3 == x[l] % 3),
            u32::MAX,
            1,
        ];
        assert_eq!(out[l * 10..l * 10 + 10], want, "lane {l}");
    }
}

#[test]
fn bits_and_integers() {
    let (module, x) = (module(CONFORMANCE), input());
    let out = run(&module, "c_bits", Options::default());
    for l in 0..32 {
        let (a, b, c) = (x[l], x[32 + l], x[64 + l]);
        let o = &out[l * 16..l * 16 + 16];
        let pair = u64::from(b) << 32 | u64::from(a);
        assert_eq!(o[1], ((pair << (c % 32)) >> 32) as u32);
        assert_eq!(o[2], (pair >> (c % 40).min(32)) as u32);
        let (position, length) = (b % 40, c % 40);
        assert_eq!(
            o[3],
            (0..length.min(32)).filter(|i| position + i < 32).fold(0, |v, i| v | (a >> (position + i) & 1) << i)
        );
        assert_eq!(o[6], (a & b) ^ (!b & c));
        assert_eq!(o[7], ((u64::from(a) * u64::from(b)) >> 32) as u32);
        assert_eq!(o[8], ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32);
        assert_eq!(o[9..12], [a.count_ones(), (a & 0xFFFFF).leading_zeros(), a.reverse_bits()]);
        assert_eq!(o[12], ((a as i32) >> (b % 32)) as u32);
        assert_eq!(o[13], (a as i32).wrapping_div(b as i32 | 1) as u32);
        assert_eq!(o[14], a % (c | 1));
        assert_eq!(o[15], ((u64::from(a) << 32 | u64::from(b)) / u64::from(c | 1)) as u32);
    }
}

#[test]
fn exact_mathematics() {
    let (module, x) = (module(CONFORMANCE), input());
    let of = |w: u32| f32::from_bits((w & 0x83FF_FFFF) | 0x3C00_0000);
    let out = run(&module, "c_exact_math", Options::default());
    for l in 0..32 {
        let (a, b, c) = (of(x[l]), of(x[32 + l]), of(x[64 + l]));
        let o: Vec<f32> = out[l * 16..l * 16 + 16].iter().map(|&w| f32::from_bits(w)).collect();
        assert_eq!(o[..4], [a / b, a.abs().sqrt(), 1.0 / a, a.mul_add(b, c)], "lane {l}");
        assert!(f64::from(o[4]) <= f64::from(a) + f64::from(b) && f64::from(o[5]) >= f64::from(a) + f64::from(b));
        let d = f64::from(a) * f64::from(b) / f64::from(c);
        assert_eq!(u64::from(out[l * 16 + 9]) << 32 | u64::from(out[l * 16 + 8]), d.to_bits(), "lane {l}");
        assert_eq!(o[10], d as f32);
        for (got, want) in [
            (o[11], f64::from(a).exp()),
            (o[12], f64::from(a.abs()).ln()),
            (o[13], f64::from(a.abs()).ln_1p()),
            (o[14], f64::from(a).exp_m1()),
            (o[15], f64::from(a).tanh()),
        ] {
            assert!((f64::from(got) - want).abs() <= 3e-7 * want.abs().max(1e-6), "lane {l}: {got} {want}");
        }
    }
}

#[test]
fn extremes() {
    let out = run(&module(CONFORMANCE), "c_extremes", Options::default());
    let special = [0.0f32, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::from_bits(1)];
    for (i, x) in special.into_iter().enumerate() {
        for (j, y) in special.into_iter().enumerate() {
            let o = &out[i * 64 + j * 8..][..8];
            let nan = x.is_nan() || y.is_nan();
            let of = |k: usize| f32::from_bits(o[k]);
            assert_eq!(of(0).is_nan(), nan, "max.NaN({x}, {y})");
            assert_eq!(of(1).is_nan(), nan);
            assert_eq!(of(2).is_nan(), x.is_nan() && y.is_nan());
            if !nan {
                assert!(of(0) == x.max(y) && of(1) == x.min(y) && of(2) == of(0) && of(3) == of(1));
                if x == 0.0 && y == 0.0 {
                    assert_eq!(of(0).is_sign_negative(), x.is_sign_negative() && y.is_sign_negative());
                    assert_eq!(of(1).is_sign_negative(), x.is_sign_negative() || y.is_sign_negative());
                }
            }
            for (got, want) in [(of(4), x + y), (of(5), x * y)] {
                assert!(got == want || (got.is_nan() && want.is_nan()), "{x} {y}");
            }
            assert_eq!([o[6], o[7]], [u32::from(x < y), u32::from(x > y || nan)]);
        }
    }
}

// From here on: compute capability 9.0.

fn run_sm90(kernel: &str) -> Vec<u32> {
    let module = SM90A.module().unwrap();
    SM90A.emulated(&module, kernel, Options::default()).unwrap_or_else(|e| panic!("{e}"))
}

/// Element `at` of words that hold two each.
fn element(words: &[u32], at: usize) -> u16 {
    (words[at / 2] >> (16 * (at % 2))) as u16
}

/// An element of the tensor, 0 outside.
fn in_tensor(plane: usize, line: usize, column: usize) -> u16 {
    if line < 80 && column < 72 { element(&SM90A.input(), (plane * 80 + line) * 80 + column) } else { 0 }
}

/// Chunks of 16 bytes are exchanged within lines of 128 bytes by the number of the line, from 0 to 7.
fn swizzled(offset: usize) -> usize {
    offset ^ (offset / 128 % 8 * 16)
}

#[test]
fn clusters_and_mbarriers() {
    let x = SM90A.input();
    let out = run_sm90("c_cluster");
    assert_eq!((&out[..384], &out[384..768]), (&x[384..768], &x[..384]));
    let out = run_sm90("c_mbarrier");
    for phase in 0..4 {
        let sum = (0..3).fold(0u32, |sum, i| sum.wrapping_add(x[phase * 3 + i].wrapping_mul(2 * i as u32 + 1)));
        assert_eq!(out[phase * 384..][..384], [sum; 384], "phase {phase}");
    }
    assert_eq!(out[4 * 384..][..384], [1; 384], "a new barrier's odd phase is over");
    assert_eq!(run_sm90("c_mbarrier_cluster")[..768], [1; 768]);
    assert_eq!(run_sm90("c_elect")[..24], [1; 24]);
    let out = run_sm90("c_registers");
    for t in 0..768 {
        let sum = (0..100).rev().fold(0u32, |sum, i| sum.wrapping_mul(3).wrapping_add(x[t % 384 + i]));
        assert_eq!(out[t], if t % 384 < 256 { sum } else { x[t % 384] }, "thread {t}");
    }
}

#[test]
fn boxes_arrive_swizzled_and_with_zeros() {
    for (kernel, x, y) in [("c_bulk_load", 0, 0), ("c_bulk_load_edge", 48, 40)] {
        let out = run_sm90(kernel);
        for (line, column) in (0..64 * 64).map(|at| (at / 64, at % 64)) {
            let found = element(&out, swizzled(line * 128 + column * 2) / 2);
            assert_eq!(found, in_tensor(1, y + line, x + column), "{kernel}: line {line}, column {column}");
        }
    }
    let out = run_sm90("c_bulk_load_multicast");
    for block in 0..2 {
        for (from, line, column) in (0..2 * 32 * 64).map(|at| (at / 2048, at / 64 % 32, at % 64)) {
            let found = element(&out[block * 2048 + from * 1024..], swizzled(line * 128 + column * 2) / 2);
            let wanted = in_tensor(1, 4 * from + line, 8 * from + column);
            assert_eq!(found, wanted, "block {block}, from block {from}: line {line}, column {column}");
        }
    }
}

#[test]
fn rows_leave_shared_memory() {
    let out = run_sm90("c_bulk_store");
    for (at, found) in out[..2 * 8 * 128].iter().enumerate() {
        let (row, col) = (at / 128 % 8, at % 128);
        let len = if row < 7 { 4 + 16 * row } else { 128 };
        let wanted = if col < len { (row * 136 + col) as u32 } else { UNWRITTEN };
        assert_eq!(*found, wanted, "word {at}");
    }
}

/// Where wgmma's descriptors say that an element is, in bytes from where they start: the canonical layouts, written out here a second time.
#[test]
fn operands_are_where_descriptors_say() {
    let offset = |across: bool, [leading, stride]: [usize; 2], line: usize, depth: usize| {
        if across {
            line / 64 * leading + line % 64 * 2 + depth / 8 * stride + depth % 8 * 128
        } else {
            line / 8 * stride + line % 8 * 128 + depth * 2
        }
    };
    // The next 16 of the depth.
    let step_bytes = |across: bool| if across { 2048 } else { 32 };
    for (kernel, across, first, stride) in [
        ("c_left_depth", false, FIRST_PLACE, 1024),
        ("c_left_depth_stride", false, FIRST_PLACE, 3072),
        ("c_left_across", true, FIRST_PLACE, 1024),
        ("c_left_across_stride", true, FIRST_PLACE, 3072),
        ("c_left_across_f16", true, 0x0400, 1024),
    ] {
        let out = run_sm90(kernel);
        for at in 0..4 * 64 * 16 {
            let (step, row, depth) = (at / 1024, at / 16 % 64, at % 16);
            let byte = swizzled(step * step_bytes(across) + offset(across, [8192, stride], row, depth));
            assert_eq!(element(&out, at), first + (byte / 2) as u16, "{kernel}: step {step}, row {row}, depth {depth}");
        }
    }
    for (kernel, columns, across, first, strides) in [
        ("c_right_depth_128", 128, false, FIRST_PLACE, [16, 1024]),
        ("c_right_depth_256", 256, false, FIRST_PLACE, [16, 1024]),
        ("c_right_depth_stride", 128, false, FIRST_PLACE, [16, 2048]),
        ("c_right_across_128", 128, true, FIRST_PLACE, [8192, 1024]),
        ("c_right_across_256", 256, true, FIRST_PLACE, [8192, 1024]),
        ("c_right_across_leading", 128, true, FIRST_PLACE, [24 << 10, 1024]),
        ("c_right_across_stride", 128, true, FIRST_PLACE, [16 << 10, 3072]),
        ("c_right_across_f16", 128, true, 0x0400, [8192, 1024]),
    ] {
        let out = run_sm90(kernel);
        for at in 0..8192 {
            let (step, depth, column) = (at / (16 * columns), at / columns % 16, at % columns);
            let byte = swizzled(step * step_bytes(across) + offset(across, strides, column, depth));
            let wanted = first + (byte / 2) as u16;
            assert_eq!(element(&out, at), wanted, "{kernel}: step {step}, depth {depth}, column {column}");
        }
    }
}

#[test]
fn a_stage_of_the_mainloop_is_multiplied() {
    let number = |line, column| half::bf16::from_bits(in_tensor(0, line, column)).to_f32() as i32;
    let plane: Vec<i32> = (0..128 * 136).map(|at| number(at / 136, at % 136)).collect();
    for (kernel, left_across, right_across) in [
        ("c_product_depth_depth", false, false),
        ("c_product_depth_across", false, true),
        ("c_product_across_depth", true, false),
        ("c_product_across_across", true, true),
    ] {
        // Lines and columns of the tensor from 16 on are the depth.
        let at = |across: bool, line: usize, depth: usize| {
            let (line, column) = if across { (16 + depth, line) } else { (line, 16 + depth) };
            if line < 80 && column < 72 { plane[line * 136 + column] } else { 0 }
        };
        let out = run_sm90(kernel);
        for (row, word) in (0..128 * 32).map(|at| (at / 32, at % 32)) {
            let column = word / 4 * 16 + word % 4 * 2;
            let sum = |column: usize| -> i32 {
                (0..64).map(|depth| at(left_across, 7 + row, depth) * at(right_across, column, depth)).sum()
            };
            let wanted = (sum(column) & 0xFFFF) as u32 | (sum(column + 1) as u32) << 16;
            assert_eq!(out[row * 32 + word], wanted, "{kernel}: row {row}, column {column}");
        }
        assert!(out.iter().filter(|word| **word != 0).count() > 1000, "{kernel} is mostly zeros");
    }
}
