//! The instructions one by one: the same answers in every schedule, and those that the ISA gives.

mod common;
use common::*;
use ptx_emulator::conformance::{PTX as CONFORMANCE, compare, emulated, from_line, input};
use ptx_emulator::{Module, Options};

fn run(module: &Module, kernel: &str, options: Options) -> Vec<u32> {
    emulated(module, kernel, options).unwrap_or_else(|e| panic!("{e}"))
}

/// Outputs of chips, recorded by `tests/cuda_hardware.rs` of the library.
#[test]
fn agrees_with_recorded_chips() {
    let module = module(CONFORMANCE);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let Ok(files) = std::fs::read_dir(folder) else {
        println!("no chip has been recorded yet");
        return;
    };
    for path in files.map(|file| file.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "txt")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let mut recorded = Vec::new();
        for line in text.lines() {
            let (kernel, chip) = from_line(line).unwrap_or_else(|| panic!("{}: {line}", path.display()));
            assert!(module.kernels().contains(&kernel), "{}: there is no {kernel}", path.display());
            compare(kernel, &chip, &run(&module, kernel, Options::default()))
                .unwrap_or_else(|difference| panic!("{}: {difference}", path.display()));
            recorded.push(kernel);
        }
        recorded.sort_unstable();
        assert_eq!(recorded, module.kernels(), "{}", path.display());
    }
}

#[test]
fn no_kernel_depends_on_the_schedule() {
    let module = module(CONFORMANCE);
    assert!(module.kernels().len() >= 19);
    for kernel in module.kernels() {
        let want = run(&module, kernel, Options::default());
        assert!(want.iter().any(|&w| w != u32::MAX), "{kernel} writes nothing");
        for options in all_options() {
            assert_eq!(run(&module, kernel, options), want, "{kernel}");
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
