//! Small kernels of every kind, against plain Rust, in every schedule.

mod common;
use common::*;
use ptx_emulator::{Argument, Device, Grid, Module, Options, mutate};

const BASIC: &str = include_str!("ptx/basic.ptx");

#[test]
fn vector_add_with_a_ragged_tail() {
    let m = module(BASIC);
    for options in all_options() {
        for n in [1usize, 31, 128, 300] {
            let mut d = Device::new(options.clone());
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let (pa, pb, pc) = (d.upload(&a), d.upload(&a), d.alloc(4 * n));
            let grid = Grid::linear((n as u32).div_ceil(128), 128, 0);
            d.launch(&m, "vector_add", grid, &[pa.into(), pb.into(), pc.into(), (n as i32).into()]).unwrap();
            let c: Vec<f32> = d.download(pc, n).unwrap();
            assert!(c.iter().zip(&a).all(|(c, a)| *c == 2.0 * a));
        }
    }
}

#[test]
fn block_sum_through_shuffles_and_shared_memory() {
    let m = module(BASIC);
    for options in all_options() {
        let mut d = Device::new(options);
        let x: Vec<f32> = (0..1000).map(|i| (i % 7) as f32).collect();
        let (px, ps) = (d.upload(&x), d.alloc(12));
        d.launch(&m, "block_sum", Grid::linear(3, 256, 0), &[px.into(), ps.into(), 1000i32.into()]).unwrap();
        let sums: Vec<f32> = d.download(ps, 3).unwrap();
        assert_eq!(sums.iter().sum::<f32>(), x.iter().sum::<f32>());
    }
}

#[test]
fn transpose_through_two_buffers() {
    let m = module(BASIC);
    for options in all_options() {
        for (rows, columns) in [(1usize, 1usize), (33, 70), (40, 129)] {
            let mut d = Device::new(options.clone());
            let x: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let (px, py) = (d.upload(&x), d.alloc(4 * rows * columns));
            let grid = Grid { grid: [rows.div_ceil(32) as u32, 1, 1], block: [32, 8, 1], ..Grid::linear(1, 1, 0) };
            let arguments = [px.into(), py.into(), (rows as i32).into(), (columns as i32).into()];
            d.launch(&m, "transpose", grid, &arguments).unwrap();
            let y: Vec<f32> = d.download(py, rows * columns).unwrap();
            for r in 0..rows {
                for c in 0..columns {
                    assert_eq!(y[c * rows + r], x[r * columns + c]);
                }
            }
        }
    }
}

#[test]
fn last_block_sees_all_shares() {
    let m = module(BASIC);
    for mut options in all_options() {
        for resident in [1, 3] {
            options.resident_blocks = resident;
            let mut d = Device::new(options.clone());
            let x: Vec<i32> = (1..=7).collect();
            let (px, ps, pc, po) = (d.upload(&x), d.alloc(28), d.upload(&[0i32]), d.alloc(4));
            let arguments = [px.into(), ps.into(), pc.into(), po.into()];
            d.launch(&m, "last_block", Grid::linear(7, 64, 0), &arguments).unwrap();
            assert_eq!(d.download::<i32>(po, 1).unwrap(), [56]);
        }
    }
}

#[test]
fn named_barriers_hand_over() {
    let m = module(BASIC);
    for options in all_options() {
        let mut d = Device::new(options);
        let x: Vec<i32> = (0..160).collect();
        let (px, py) = (d.upload(&x), d.alloc(640));
        d.launch(&m, "hand_over", Grid::linear(1, 64, 0), &[px.into(), py.into(), 5i32.into()]).unwrap();
        let y: Vec<i32> = d.download(py, 160).unwrap();
        assert!((0..160).all(|i| y[i] == x[i ^ 1] + i as i32 / 32));
    }
}

#[test]
fn cooperative_blocks_wait_for_each_other() {
    let m = module(BASIC);
    for options in all_options() {
        let mut d = Device::new(options);
        let (data, counter, out) = (d.alloc(20), d.upload(&[0u32]), d.alloc(100));
        let grid = Grid { cooperative: true, ..Grid::linear(5, 32, 0) };
        let stats = d.launch(&m, "grid_barrier", grid, &[data.into(), counter.into(), out.into()]).unwrap();
        // Who polls lets the others run, and does not use its whole turn up.
        assert!(stats.instructions < 15_000, "{stats:?}");
        let out: Vec<i32> = d.download(out, 25).unwrap();
        assert!((0..25).all(|i| out[i] == i as i32 % 5 + 1));
    }
}

#[test]
fn calls_switches_constants_and_device_variables() {
    let m = module(BASIC);
    for options in all_options() {
        let mut d = Device::new(options);
        let bytes: Vec<u8> = (0..64).map(|i| (i * 37 + 11) as u8).collect();
        let (pb, pw, po) = (d.upload(&bytes), d.alloc(65 * 8), d.alloc(64 * 4));
        let arguments = [pb.into(), pw.into(), po.into(), 9i32.into()];
        d.launch(&m, "odds_and_ends", Grid::linear(1, 64, 0), &arguments).unwrap();
        let wide: Vec<i64> = d.download(pw, 65).unwrap();
        let out: Vec<f32> = d.download(po, 64).unwrap();
        for i in 0..64usize {
            let b = bytes[i];
            let v = 2.0 * [1.5f32, 2.5, 3.5, 4.5][i % 4] + 9.0 + (usize::from(b % 8) * i) as f32;
            let v = match b % 6 {
                0 => v + 1.0,
                1 => v * 3.0,
                2 => v.sqrt(),
                3 => 1.0 / v,
                4 => -v,
                _ => (v - 100.0).abs(),
            };
            assert_eq!(out[i], v, "thread {i}");
            let w = ((i as i64) << 33) / 3 - i64::from(i.count_ones()) + i64::from((b as i8) >> 1);
            assert_eq!(wide[i], w, "thread {i}");
        }
        assert_eq!(wide[64], 63 * 64 / 2);
    }
}

/// Runs a kernel and says whether it ended well with these values in its output.
fn right(
    module: &Module,
    kernel: &str,
    grid: Grid,
    before: &[&[i32]],
    output: usize,
    numbers: &[i32],
    want: &[i32],
) -> bool {
    let mut d = Device::new(Options::default());
    let pointers: Vec<u64> =
        before.iter().map(|v| if v.is_empty() { d.alloc(4 * want.len()) } else { d.upload(v) }).collect();
    let mut arguments: Vec<Argument> = pointers.iter().map(|&p| p.into()).collect();
    arguments.extend(numbers.iter().map(|&n| Argument::from(n)));
    d.launch(module, kernel, grid, &arguments).is_ok()
        && d.download::<i32>(pointers[output], want.len()).unwrap() == want
}

#[test]
fn every_synchronisation_is_needed() {
    let floats: Vec<i32> = (0..1000).map(|i| ((i % 7) as f32).to_bits() as i32).collect();
    let sum =
        |from: usize| (0..1000).filter(|i| i / 256 % 3 == from).map(|i| (i % 7) as f32).sum::<f32>().to_bits() as i32;
    let sums = [sum(0), sum(1), sum(2)];
    let square: Vec<i32> = (0..70 * 70).collect();
    let turned: Vec<i32> = (0..70 * 70).map(|i| i % 70 * 70 + i / 70).collect();
    let tile = Grid { grid: [3, 1, 1], block: [32, 8, 1], ..Grid::linear(1, 1, 0) };
    let ones = [1i32; 7];
    // Eleven rounds: nvcc unrolls by four, and the rest has code of its own.
    let handed: Vec<i32> = (0..352).map(|i| (i ^ 1) + i / 32).collect();
    let numbers: Vec<i32> = (0..352).collect();
    let seen: Vec<i32> = (0..25).map(|i| i % 5 + 1).collect();
    let together = Grid { cooperative: true, ..Grid::linear(5, 32, 0) };
    type Run<'a> = Box<dyn Fn(&Module) -> bool + 'a>;
    let runs: [(&str, usize, Run); 5] = [
        (
            "block_sum",
            1,
            Box::new(|m| right(m, "block_sum", Grid::linear(3, 256, 0), &[&floats, &[]], 1, &[1000], &sums)),
        ),
        ("transpose", 5, Box::new(|m| right(m, "transpose", tile, &[&square, &[]], 1, &[70, 70], &turned))),
        (
            "last_block",
            3,
            Box::new(|m| right(m, "last_block", Grid::linear(7, 64, 0), &[&ones, &[0; 7], &[0], &[]], 3, &[], &[14])),
        ),
        (
            "hand_over",
            4,
            Box::new(|m| right(m, "hand_over", Grid::linear(1, 64, 0), &[&numbers, &[]], 1, &[11], &handed)),
        ),
        ("grid_barrier", 3, Box::new(|m| right(m, "grid_barrier", together, &[&[0; 5], &[0], &[]], 2, &[], &seen))),
    ];
    for (kernel, least, run) in runs {
        assert!(run(&module(BASIC)), "{kernel}");
        let sites: Vec<_> = mutate::sites(BASIC).into_iter().filter(|s| s.function == kernel).collect();
        assert!(sites.len() >= least, "{kernel}: {sites:?}");
        for site in sites {
            let mutant = Module::parse(&mutate::without(BASIC, &site)).unwrap();
            assert!(!run(&mutant), "{kernel}: deleting `{}` (PTX line {}) goes unnoticed", site.text, site.line);
        }
    }
}

/// Two kernels, a function that one of them calls, and a variable, of which something is unknown in all but the first.
const PARTLY_UNKNOWN: &str = r"
.version 9.0
.target sm_90a
.address_size 64
.global .align 8 .u64 pointer = generic(somewhere);
.global .align 4 .u32 counts[2] = {5, 6};
.func helper() { frobnicate.u32; ret; }
.visible .entry good(.param .u64 good_param_0) .maxntid 64, 1, 1 .minnctapersm 3
{
    .reg .b32 %r<2>; .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [good_param_0];
    ld.global.u32 %r1, [counts+4];
    st.global.u32 [%rd1], %r1;
    ret;
}
.visible .entry calls() { call.uni helper, (); ret; }
.visible .entry points()
{
    .reg .b64 %rd<2>;
    ld.global.u64 %rd1, [pointer];
    ret;
}
";

#[test]
fn an_unknown_instruction_is_its_kernels_error_alone() {
    assert_eq!(Module::parse(PARTLY_UNKNOWN).unwrap_err().line, 7);
    let mut m = Module::open(PARTLY_UNKNOWN).unwrap();
    assert_eq!((m.kernels(), m.target()), (vec!["calls", "good", "points"], "sm_90a"));
    assert!(m.attributes("good").is_none() && m.parameters("good").is_none(), "not ready yet");
    for (kernel, line, reason) in
        [("calls", 7, "frobnicate"), ("points", 5, "numbers"), ("nowhere", 0, "no such kernel")]
    {
        let error = m.prepare(kernel).unwrap_err();
        assert!(error.line == line && error.to_string().contains(reason), "{kernel}: {error}");
    }
    m.prepare("good").unwrap();
    let attributes = m.attributes("good").unwrap();
    assert_eq!((attributes.max_threads, attributes.min_blocks, attributes.cluster), (Some(64), Some(3), None));
    let mut d = Device::new(Options::default());
    let out = d.alloc(4);
    d.launch(&m, "good", Grid::linear(1, 1, 0), &[out.into()]).unwrap();
    assert_eq!(d.download::<u32>(out, 1).unwrap(), [6]);
    // The host finds and changes the same variable.
    let (counts, bytes) = d.variable(&m, "counts").unwrap();
    assert_eq!((bytes, d.variable(&m, "pointer")), (8, None));
    d.write(counts + 4, &7u32.to_le_bytes()).unwrap();
    d.launch(&m, "good", Grid::linear(1, 1, 0), &[out.into()]).unwrap();
    assert_eq!(d.download::<u32>(out, 1).unwrap(), [7]);
}

#[test]
fn a_copy_within_the_device_leaves_unwritten_what_was() {
    let mut d = Device::new(Options::default());
    let (from, to) = (d.alloc(100), d.upload(&[0u8; 100]));
    d.write(from, &[1; 70]).unwrap();
    d.copy(from + 3, to, 90).unwrap();
    assert_eq!(d.first_unwritten(to).unwrap(), Some(67));
    assert_eq!(d.read(to, 100).unwrap()[..67], [1; 67]);
    assert!(d.copy(from, to + 50, 51).is_err() && d.check(to, 101).is_err() && d.check(to + 1, 99).is_ok());
}
