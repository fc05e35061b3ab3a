//! wgmma by itself: every width, layout and operand source, from operands that the host has put where the ISA wants them.

mod common;
use common::*;
use half::{bf16, f16};
use ptx_emulator::{Device, Grid, Options, Rounding};

/// One `wgmma.mma_async.m64nNk16`.
#[derive(Clone, Copy, Debug)]
struct Form {
    columns: usize,
    half: bool,
    /// A comes from registers.
    registers: bool,
    /// Lines are contiguous, of A and of B.
    across: [bool; 2],
    /// Bytes of the swizzle's span; 16 without.
    span: usize,
    negate: [bool; 2],
}

const PLAIN: Form =
    Form { columns: 64, half: false, registers: false, across: [false; 2], span: 128, negate: [false; 2] };

/// Shared memory holds an mbarrier, A and B.
const START: [usize; 2] = [1024, 1024 + (16 << 10)];
const END: usize = START[1] + (64 << 10);

impl Form {
    /// Where element (line, depth) of operand `i` is, from the operand's start; the layouts are chosen here, with padding
    /// between their parts so that no two strides are equal by chance. Then the strides `leading` and `stride`.
    fn place(&self, i: usize, line: usize, depth: usize) -> (usize, usize, usize) {
        let lines = if i == 0 { 64 } else { self.columns };
        let (s, w) = (self.span, self.span / 2);
        if s == 16 {
            // Core matrices of 8 by 8; steps between them along the depth and along the lines.
            let (by_depth, by_line) = if self.across[i] { (144, 320) } else { (144 + 128 * lines / 8, 128) };
            let (row, column) = if self.across[i] { (depth % 8, line % 8) } else { (line % 8, depth % 8) };
            return (line / 8 * by_line + depth / 8 * by_depth + row * 16 + column * 2, by_depth, by_line);
        }
        // Groups of eight rows of a span.
        let group = 8 * s;
        let (at, leading, stride) = if self.across[i] {
            let panel = 3 * group;
            (line / w * panel + depth / 8 * group + depth % 8 * s + line % w * 2, panel, group)
        } else {
            (line / 8 * 2 * group + line % 8 * s + depth * 2, 16, 2 * group)
        };
        // Chunks of 16 bytes are exchanged within a span by the number of the row of 128 bytes.
        (at ^ ((at >> 7) % (s / 16)) << 4, leading, stride)
    }

    fn descriptor(&self, i: usize, start: usize) -> u64 {
        let (_, leading, stride) = self.place(i, 0, 0);
        let mode = match self.span {
            16 => 0u64,
            32 => 3,
            64 => 2,
            _ => 1,
        };
        (start as u64 & 0x3FFFF) >> 4 | (leading as u64 >> 4) << 16 | (stride as u64 >> 4) << 32 | mode << 62
    }

    fn ptx(&self) -> String {
        let (n, ty) = (self.columns, if self.half { "f16" } else { "bf16" });
        let sums = (0..n / 2).map(|i| format!("%f{i}")).collect::<Vec<_>>().join(", ");
        let [sign_a, sign_b] = self.negate.map(|n| if n { -1 } else { 1 });
        let [across_a, across_b] = self.across.map(i32::from);
        let start = 0x400; // where shared memory starts
        let b = self.descriptor(1, start + START[1]);
        let (a, across) = if self.registers {
            ("{%r4, %r5, %r6, %r7}".to_string(), format!("{across_b}"))
        } else {
            (self.descriptor(0, start + START[0]).to_string(), format!("{across_a}, {across_b}"))
        };
        let wgmma = |p: &str| {
            format!(
                "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ty}.{ty} {{{sums}}}, {a}, {b}, {p}, {sign_a}, {sign_b}, {across};\n"
            )
        };
        let stores: String = (0..n / 2).map(|i| format!("st.global.f32 [%d2+{}], %f{i};\n", 4 * i)).collect();
        format!(
            ".version 8.0\n.target sm_90a\n.address_size 64\n\
             .extern .shared .align 1024 .b8 memory[];\n.visible .entry k(.param .u64 image, .param .u64 fragments, .param .u64 out, .param .u32 twice)\n{{\n\
             .reg .pred %p<4>;\n.reg .b32 %r<9>;\n.reg .f32 %f<128>;\n.reg .b64 %d<9>;\n\
             mov.u32 %r0, %tid.x;\nmov.u32 %r2, memory;\nadd.u32 %r1, %r2, {start};\n\
             setp.ne.u32 %p1, %r0, 0;\n@%p1 bra LOADED;\n\
             mbarrier.init.shared::cta.b64 [%r2], 1;\nfence.mbarrier_init.release.cluster;\n\
             mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {bytes};\nld.param.u64 %d0, [image];\n\
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0], {bytes}, [%r2];\n\
             LOADED: bar.sync 0;\n\
             WAIT: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p2, [%r2], 0, 1000;\n@!%p2 bra WAIT;\n\
             ld.param.u64 %d1, [fragments];\nmad.wide.u32 %d1, %r0, 16, %d1;\n\
             ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d1];\n\
             ld.param.u32 %r8, [twice];\nsetp.ne.u32 %p3, %r8, 0;\nwgmma.fence.sync.aligned;\n\
             setp.eq.u32 %p1, 0, 1;\n{first}\
             @!%p3 bra DONE;\n{second}\
             DONE: wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n\
             ld.param.u64 %d2, [out];\nmad.wide.u32 %d2, %r0, {row}, %d2;\n{stores}ret;\n}}\n",
            start = START[0],
            bytes = END - START[0],
            first = wgmma("%p1"),
            second = wgmma("1"),
            row = 2 * n,
        )
    }

    fn check(&self, options: Options) {
        let mut r = Random(self.columns as u64 * 64 + self.span as u64);
        let n = self.columns;
        // Eight bits of precision: the same in both types.
        let mut matrix =
            |lines: usize| -> Vec<f32> { (0..lines * 16).map(|_| (r.unit() * 64.0).round() / 64.0).collect() };
        let operands = [matrix(64), matrix(n)];
        let bits = |v: f32| if self.half { f16::from_f32(v).to_bits() } else { bf16::from_f32(v).to_bits() };
        // NaN wherever no element is.
        let mut image = vec![0xFFu8; END];
        for (i, values) in operands.iter().enumerate() {
            for (at, &v) in values.iter().enumerate() {
                let to = START[i] + self.place(i, at / 16, at % 16).0;
                assert!(to + 2 <= [START[1], END][i]);
                image[to..to + 2].copy_from_slice(&bits(v).to_le_bytes());
            }
        }
        let pair = |row: usize, k: usize| {
            let at = row * 16 + k;
            u32::from(bits(operands[0][at])) | u32::from(bits(operands[0][at + 1])) << 16
        };
        let fragments: Vec<u32> = (0..512)
            .map(|at| {
                let (t, r) = (at / 4, at % 4);
                pair(t / 32 * 16 + t % 32 / 4 + r % 2 * 8, t % 4 * 2 + r / 2 * 8)
            })
            .collect();
        let module = module(&self.ptx());
        for twice in [0, 1u32] {
            let mut d = Device::new(options.clone());
            let (image, fragments) = (d.upload(&image[START[0]..]), d.upload(&fragments));
            let out = d.alloc(4 * 64 * n);
            let arguments = [image.into(), fragments.into(), out.into(), twice.into()];
            d.launch(&module, "k", Grid::linear(1, 128, END as u32), &arguments)
                .unwrap_or_else(|e| panic!("{self:?}: {e}"));
            let sign = if self.negate[0] != self.negate[1] { -1.0 } else { 1.0 } * f64::from(1 + twice);
            for (at, got) in d.download::<f32>(out, 64 * n).unwrap().into_iter().enumerate() {
                let (t, q) = (at / (n / 2), at % (n / 2));
                let (row, column) = (t / 32 * 16 + t % 32 / 4 + q / 2 % 2 * 8, q / 4 * 8 + t % 4 * 2 + q % 2);
                let product = |k: usize| f64::from(operands[0][row * 16 + k]) * f64::from(operands[1][column * 16 + k]);
                let want = sign * (0..16).map(product).sum::<f64>();
                assert!((f64::from(got) - want).abs() < 1e-5, "{self:?} ({row}, {column}): {got} for {want}");
            }
        }
    }
}

#[test]
fn every_width() {
    for columns in (8..=256).step_by(8) {
        Form { columns, ..PLAIN }.check(Options::default());
    }
}

#[test]
fn every_layout_source_and_type() {
    for span in [16, 32, 64, 128] {
        for across in [[false, false], [false, true], [true, false], [true, true]] {
            for (half, registers) in [(false, false), (true, false), (false, true), (true, true)] {
                let across = [across[0] && !registers, across[1]];
                let negate = [across[0] ^ half, across[1] ^ registers];
                Form { span, across, half, registers, negate, ..PLAIN }.check(Options::default());
            }
        }
    }
}

#[test]
fn however_it_runs() {
    for (i, options) in all_options().into_iter().enumerate() {
        Form { registers: i % 2 == 1, ..PLAIN }.check(Options { rounding: ROUNDINGS[i % 3], ..options });
    }
}

/// The three roundings differ where they must: a term below the others' last bit.
#[test]
fn roundings_apply() {
    let sum = |rounding| {
        let mut d = Device::new(Options { rounding, ..Options::default() });
        let form = Form { columns: 8, registers: true, ..PLAIN };
        // Row 0 of A: 1 and fifteen times 2^-24. B: ones.
        let mut fragments = vec![0u32; 512];
        let small = u32::from(bf16::from_f32(2f32.powi(-24)).to_bits());
        for t in 0..4 {
            (fragments[4 * t], fragments[4 * t + 2]) = (small | small << 16, small | small << 16);
        }
        fragments[0] = u32::from(bf16::ONE.to_bits()) | small << 16;
        let ones = vec![bf16::ONE.to_bits(); (END - START[0]) / 2];
        let (image, fragments, out) = (d.upload(&ones), d.upload(&fragments), d.alloc(4 * 64 * 8));
        let arguments = [image.into(), fragments.into(), out.into(), 0u32.into()];
        d.launch(&module(&form.ptx()), "k", Grid::linear(1, 128, END as u32), &arguments).unwrap();
        d.download::<f32>(out, 1).unwrap()[0]
    };
    // In f32 each small term is lost; exactly, they are 15/16 of 2^-20; truncated, half of each is kept.
    assert_eq!(sum(Rounding::F32), 1.0);
    assert_eq!(sum(Rounding::Exact), (1.0 + 15.0 * 2f64.powi(-24)) as f32);
    assert!(sum(Rounding::Truncate) > 1.0 && sum(Rounding::Truncate) <= sum(Rounding::Exact));
}
