//! The CPU kernels touch nothing but their operands: products of every operation where matrices and workspaces end exactly where their
//! memory does, before and behind. A page that cannot be accessed ends the test at a stray access; on the heap AddressSanitizer does, which
//! allows offsets at the same time. Results must be right too, for what is read beyond a row but within the memory is NaN.
//!
//! Shapes are a seeded selection around the edges of tiles, of vectors, and of the chunks that depths are cut into.

mod common;

use common::checks::*;
use common::ops::{DecodeBackward, Redundancy};
use common::{Around, HostBackend, Place, Under, cpu, rng};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use sae_kernels::operations::Layout;
use sae_kernels::{Activation, Cpu, CpuElement, Form, Isa};

/// Cases of each operation, storage type and instruction set.
const CASES: u64 = 10;
/// Multiply-adds of a case's largest product, about: the reference has to compute it, too.
const MOST_WORK: usize = 1_000_000;
/// Rows at least where columns are correlated: of fewer, variances may be so small that the gradient does not fit into `f16`.
const FEW: usize = 13;
/// Around what registers, and chunks of the depth, are summed at a time.
const DEPTHS: [usize; 14] = [0, 1, 2, 15, 16, 17, 255, 256, 257, 511, 1023, 1024, 1025, 2049];

const ACTIVATIONS: [Activation; 3] = [Activation::Relu, Activation::Identity, Activation::Softplus];

/// Makes a test of each check for every storage type.
macro_rules! on_every_storage_type {
    ($($check:ident)*) => {
        mod cpu_f32 { $(#[test] fn $check() { super::on_every_isa::<f32>(super::$check) })* }
        mod cpu_bf16 { $(#[test] fn $check() { super::on_every_isa::<sae_kernels::bf16>(super::$check) })* }
        mod cpu_f16 { $(#[test] fn $check() { super::on_every_isa::<sae_kernels::f16>(super::$check) })* }
    };
}

on_every_storage_type!(
    encode activation_sums product comoments finish_statistics correlation_dual backward_dz weight_redundancy decode decode_backward
);

fn on_every_isa<E: CpuElement>(check: fn(&Under<Cpu<E>>, &mut Draw)) {
    for isa in Isa::available() {
        // One thread: the workspace ends where its scratch does.
        let under = cpu::<E>(isa, 1);
        for seed in 0..CASES {
            check(&under, &mut Draw { rng: rng(seed), isa, first: seed == 0 });
        }
    }
}

/// Random choices around the edges of an instruction set's tile.
struct Draw {
    rng: StdRng,
    isa: Isa,
    /// Whether this is the first case of its check.
    first: bool,
}

impl Draw {
    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        *choices.choose(&mut self.rng).unwrap()
    }

    /// An extent of a product's output.
    fn edge(&mut self) -> usize {
        let (rows, lanes) = match self.isa {
            Isa::Portable => (4, 4),
            Isa::Avx2 => (6, 8),
            _ => (14, 16),
        };
        let tile = self.of(&[rows, lanes]);
        let around = tile * self.of(&[0, 1, 2, 3, 4, 6, 8, 9]) + self.of(&[0, 1, 2]);
        usize::max(around, 2) - 1
    }

    fn depth(&mut self) -> usize {
        self.of(&DEPTHS)
    }

    /// Rows, columns and depth of a product.
    fn product(&mut self) -> [usize; 3] {
        let (mut rows, mut cols, depth) = (self.edge(), self.edge(), self.depth());
        while rows * cols * depth > MOST_WORK {
            let most = if rows > cols { &mut rows } else { &mut cols };
            *most = most.div_ceil(2);
        }
        [rows, cols, depth]
    }

    /// Extent and depth of a product of a matrix and its transpose.
    fn square(&mut self) -> [usize; 2] {
        let (mut len, depth) = (self.edge(), self.depth());
        while len * len * depth > MOST_WORK {
            len = len.div_ceil(2);
        }
        [len, depth]
    }

    fn place(&mut self) -> Place {
        let around = self.of(&[
            Around::Heap,
            #[cfg(unix)]
            Around::PageBefore,
            #[cfg(unix)]
            Around::PageBehind,
        ]);
        let offset = if around == Around::Heap { self.rng.random_range(0..=16) } else { 0 };
        // What vectors, and pairs, are read in place at; and what is too far for that.
        let multiple = self.of(&[1, 1, 1, 2, 2, 8, 16, 16, 32, 32, 256, 512]);
        Place { offset, gap: self.of(&[0, 0, 1, 2, 3, 8]), multiple, around }
    }

    fn yes(&mut self) -> bool {
        self.rng.random()
    }
}

fn encode<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    let ([n, h, d], place) = (draw.product(), draw.place());
    check_encoded(under, &encoder_inputs::<B>([n, d, h], draw.of(&ACTIVATIONS)), place);
}

fn activation_sums<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    let ([n, h, _], place) = (draw.product(), draw.place());
    check_summed(under, &sums_inputs::<B>([n, h.max(1)]), place);
}

fn product<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
        let case = ProductCase::new::<B>(draw.product());
        for _ in 0..3 {
            case.check(under, layout, draw.place(), draw.yes());
        }
    }
}

fn comoments<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    let ([h, n], place) = (draw.square(), draw.place());
    check_comoments(under, [n, h], place, draw.yes(), draw.yes());
}

fn finish_statistics<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    let ([h, n], place) = (draw.square(), draw.place());
    let case = finish_inputs::<B>([n.max(2), h], Activation::Relu, Given::Activations);
    check_finished(under, &format!("{}: finish_statistics of {n}×{h} {place:?}", under.name), &case, place);
}

/// One product has the depth H, the other N.
fn correlation_dual<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    let [n, h] = draw.square();
    check_dual(under, [n.max(FEW), h.max(1)], draw.place());
    let [h, n] = draw.square();
    let h = h.min((MOST_WORK / (n * n).max(1)).max(1));
    check_dual(under, [n.max(FEW), h], draw.place());
}

fn backward_dz<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    // More than a chunk once alone: the coupling has H² elements.
    let (n, h) = if draw.first { (FEW, 1025) } else { (draw.edge().clamp(FEW, 57), draw.depth().clamp(1, 257)) };
    let place = draw.place();
    for case in backward_inputs(under, [n, h], draw.of(&ACTIVATIONS)) {
        check_backward(under, &case, place);
    }
}

fn weight_redundancy<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    for form in [Form::Primal, Form::Dual] {
        let [side, depth] = draw.square();
        let [h, d] = if form == Form::Dual { [depth, side] } else { [side, depth] };
        let weight = redundancy_weight::<B>(&mut draw.rng, [h, d]);
        let before = Some(real::<B>(common::uniform(&mut draw.rng, h * d, 1.0)));
        let case = Redundancy { h, d, weight, normalize: draw.yes(), form, lambda: 0.75, before };
        check_redundancy(under, &case, draw.place());
    }
}

fn decode<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    let ([n, d, h], place) = (draw.product(), draw.place());
    check_decoded(under, &decode_inputs::<B>([n, d, h]), place);
}

fn decode_backward<B: HostBackend>(under: &Under<B>, draw: &mut Draw) {
    let ([n, h, d], place) = (draw.product(), draw.place());
    let adding = decode_backward_inputs::<B>([n, d, h], draw.of(&ACTIVATIONS));
    let case = if draw.yes() { adding } else { DecodeBackward { before: None, ..adding } };
    check_decode_backward(under, &case, place);
}
