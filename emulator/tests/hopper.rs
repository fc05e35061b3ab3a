//! A complete Hopper product: TMA through mbarriers, warp-specialised, wgmma, clusters, bulk stores.

mod common;
use common::*;
use half::{bf16, f16};
use ptx_emulator::{
    Argument, Bytes, Device, DevicePointer, Fault, Grid, Module, Options, Swizzle, TensorElement, TensorMap,
};

const GEMM: &str = include_str!("ptx/hopper_gemm.ptx");

/// A kernel of `hopper_gemm.cu`: bytes of its swizzle span, and which operands have contiguous lines.
struct Variant {
    kernel: &'static str,
    span: u32,
    across: [bool; 2],
    half: bool,
    cluster: u32,
}

const fn variant(kernel: &'static str, span: u32, across_a: bool, across_b: bool) -> Variant {
    Variant { kernel, span, across: [across_a, across_b], half: false, cluster: 1 }
}

const GEMM_PLAIN: Variant = variant("gemm", 128, false, false);
const GEMM_CLUSTER: Variant = Variant { cluster: 2, ..variant("gemm_cluster", 128, false, false) };
const VARIANTS: [Variant; 13] = [
    variant("dd16", 16, false, false),
    variant("dd32", 32, false, false),
    variant("dd64", 64, false, false),
    variant("dd128", 128, false, false),
    variant("da128", 128, false, true),
    variant("ad128", 128, true, false),
    variant("aa16", 16, true, true),
    variant("aa32", 32, true, true),
    variant("aa64", 64, true, true),
    variant("aa128", 128, true, true),
    Variant { half: true, ..variant("half128", 128, false, true) },
    GEMM_PLAIN,
    GEMM_CLUSTER,
];

/// Factors as [lines][depth], and their product in f64.
struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    want: Vec<f64>,
}

impl Case {
    fn new(m: usize, n: usize, k: usize) -> Case {
        let mut r = Random(m as u64 * 31 + n as u64 * 7 + k as u64);
        // Eight bits of precision: the same in bf16 and f16.
        let mut matrix =
            |lines: usize| -> Vec<f32> { (0..lines * k).map(|_| (r.unit() * 64.0).round() / 64.0).collect() };
        let (a, b) = (matrix(m), matrix(n));
        let dot = |i: usize, j: usize| (0..k).map(|d| f64::from(a[i * k + d]) * f64::from(b[j * k + d])).sum();
        let want = (0..m * n).map(|at| dot(at / n, at % n)).collect();
        Case { m, n, k, a, b, want }
    }

    /// Uploads an operand with NaN between its rows and says where it is.
    fn operand(&self, d: &mut Device, v: &Variant, i: usize) -> TensorMap {
        let (values, lines) = if i == 0 { (&self.a, self.m) } else { (&self.b, self.n) };
        let (rows, columns) = if v.across[i] { (self.k, lines) } else { (lines, self.k) };
        let pitch = columns.next_multiple_of(8);
        let at = |row: usize, column: usize| {
            if v.across[i] { values[column * self.k + row] } else { values[row * self.k + column] }
        };
        let padded =
            (0..rows * pitch).map(|at_| if at_ % pitch < columns { at(at_ / pitch, at_ % pitch) } else { f32::NAN });
        let (pointer, element) = if v.half {
            (upload(d, padded.map(f16::from_f32)), TensorElement::F16)
        } else {
            (upload(d, padded.map(bf16::from_f32)), TensorElement::Bf16)
        };
        let tile_lines = if i == 0 { 128 } else { 64 };
        let box_rows = if v.across[i] { 64 } else { tile_lines };
        let box_rows = if i == 1 { box_rows / v.cluster } else { box_rows };
        let swizzle = match v.span {
            16 => Swizzle::None,
            32 => Swizzle::B32,
            64 => Swizzle::B64,
            _ => Swizzle::B128,
        };
        TensorMap::new(element, pointer, &[columns as u64, rows as u64], &[2 * pitch as u64], &[v.span / 2, box_rows])
            .swizzle(swizzle)
    }

    fn run(&self, module: &Module, v: &Variant, kernel: &str, options: Options) -> Result<Vec<f32>, Fault> {
        let mut d = Device::new(Options { shared_limit: 227 << 10, ..options });
        let (a, b) = (self.operand(&mut d, v, 0), self.operand(&mut d, v, 1));
        let pitch = self.n.next_multiple_of(4);
        let c = d.alloc(4 * self.m * pitch);
        let (dims, stride) = ([self.n as u64, self.m as u64], 4 * pitch as u64);
        let map_c = TensorMap::new(TensorElement::F32, c, &dims, &[stride], &[32, 64]).swizzle(Swizzle::B128);
        let mut arguments: Vec<Argument> = [a, b, map_c].iter().map(|m| m.encode().unwrap()).collect();
        arguments.push((self.k as i32).into());
        let rows = (self.m.div_ceil(128) as u32).next_multiple_of(v.cluster);
        let grid = Grid {
            grid: [rows, self.n.div_ceil(64) as u32, 1],
            block: [384, 1, 1],
            ..Grid::linear(1, 1, 3 * (128 + 64) * 64 * 2 + 128 * 64 * 4 + 48)
        };
        d.launch(module, kernel, grid.clusters([v.cluster, 1, 1]), &arguments)?;
        let all = d.download::<f32>(c, self.m * pitch)?;
        Ok((0..self.m * self.n).map(|at| all[at / self.n * pitch + at % self.n]).collect())
    }

    fn agrees(&self, c: &[f32]) -> bool {
        // NaN must fail.
        c.iter().zip(&self.want).all(|(c, w)| (f64::from(*c) - w).abs() <= 3e-5 * (self.k as f64).sqrt())
    }
}

fn upload<T: Bytes>(d: &mut Device, values: impl Iterator<Item = T>) -> DevicePointer {
    d.upload(&values.collect::<Vec<_>>())
}

#[test]
fn every_layout_agrees_with_a_plain_product() {
    let module = module(GEMM);
    for v in &VARIANTS {
        for (m, n, k) in [(1, 1, 1), (128, 64, 64), (150, 75, 300)] {
            let case = Case::new(m, n, k);
            let c = case.run(&module, v, v.kernel, Options::default());
            let c = c.unwrap_or_else(|e| panic!("{} {m}x{n}x{k}: {e}", v.kernel));
            assert!(case.agrees(&c), "{} {m}x{n}x{k}", v.kernel);
        }
    }
}
