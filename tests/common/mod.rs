//! What the tests share: backends to run on, guarded buffers, random inputs, comparisons with an error bound.
#![allow(dead_code, unused_imports, unused_macros, reason = "every test file uses a part")]

#[cfg(feature = "cuda")]
pub mod accounts;
pub mod anywhere;
pub mod buffer;
#[cfg(sae_kernels_ptx)]
pub mod captured;
pub mod checks;
#[cfg(sae_kernels_ptx)]
pub mod emulated;
pub mod golden;
pub mod naive;
pub mod ops;
#[cfg(feature = "cuda")]
pub mod staged;
pub mod step;

pub use buffer::{Around, Guarded, Place};
pub use step::{Outcome, Plan, Problem};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sae_kernels::{Backend, Cpu, CpuElement, Element, Host, Isa, Reference};

/// A backend whose memory is the host's.
pub trait HostBackend: Backend<Memory = Host> {}
impl<B: Backend<Memory = Host>> HostBackend for B {}

/// Where a backend computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    Host,
    Gpu,
    /// Some thousand times slower, and whole tiles take as long as ragged ones.
    EmulatedGpu,
}

/// A backend under test, with a name for messages.
pub struct Under<B> {
    pub name: String,
    pub backend: B,
    pub device: Where,
    make: Box<dyn Fn() -> B>,
}

impl<B: HostBackend> Under<B> {
    pub fn new(name: String, make: impl Fn() -> B + 'static) -> Self {
        Self { name, backend: make(), device: Where::Host, make: Box::new(make) }
    }
    pub fn on(self, device: Where) -> Self {
        Self { device, ..self }
    }
    /// Another one of the same kind, for a model to own.
    pub fn fresh(&self) -> B {
        (self.make)()
    }
    /// Cases to run: all of them, or the few that an emulated GPU has time for and that lie around the edges of its tiles; both on
    /// a real one.
    pub fn cases<T>(&self, all: impl IntoIterator<Item = T>, few: impl IntoIterator<Item = T>) -> Vec<T> {
        match self.device {
            Where::Host => all.into_iter().collect(),
            Where::EmulatedGpu => few.into_iter().collect(),
            Where::Gpu => all.into_iter().chain(few).collect(),
        }
    }
    /// Unit roundoff of what sums are kept in.
    pub fn real(&self) -> f64 {
        B::Real::UNIT_ROUNDOFF
    }
    /// Largest error of storing `value`; 0 where storage is as wide as the sums.
    pub fn storage(&self, value: f64) -> f64 {
        rounding::<B::Element>(value)
    }
}

/// Largest error of rounding a value near `value` to `T`, subnormal numbers included.
pub fn rounding<T: Element>(value: f64) -> f64 {
    let least = match T::NAME {
        "f16" => 2f64.powi(-25),
        "bf16" => 2f64.powi(-134),
        "f32" => 2f64.powi(-150),
        _ => 0.0,
    };
    (T::UNIT_ROUNDOFF * value.abs()).max(least)
}

// The bars of quality, in unit roundoffs of what sums are kept in.

/// |ẑ − z| over |x||w|ᵀ + |b|, for inner products of `len` terms: D + 2 is a bug, 16 the bar.
pub fn z_factor(len: usize) -> f64 {
    (len as f64 + 2.0).min(16.0)
}
/// Error of ℓ over |ℓ| + 1, given the stored activations.
pub const ROW_LOSS_BAR: f64 = 2.0;
/// Relative error of a variance, given the stored activations.
pub const VARIANCE_BAR: f64 = 128.0;
/// Absolute error of a correlation, given the stored activations.
pub const CORRELATION_BAR: f64 = 32.0;

/// What a gradient's relative error may be, by that of a plain implementation with the same storage type: twice, and twice that
/// with slack: where partial statistics are merged, for one.
pub fn gradient_bar<B: HostBackend>(plain: f64, slack: bool) -> f64 {
    let (real, storage) = (B::Real::UNIT_ROUNDOFF, B::Element::UNIT_ROUNDOFF);
    // A plain implementation of a tiny problem may by chance be exact.
    let floor = 16.0 * real + if storage > real { storage } else { 0.0 };
    (2.0 * plain + floor) * if slack { 2.0 } else { 1.0 }
}

/// The reference, as a backend under test.
pub fn reference() -> Under<Reference> {
    Under::new("reference".into(), || Reference)
}

/// Threads of the CPU backends, but where a test says otherwise: more than one, for the work to be cut.
const THREADS: usize = 2;

/// The CPU backend with every instruction set of this processor.
pub fn cpus<E: CpuElement>() -> Vec<Under<Cpu<E>>> {
    Isa::available().into_iter().map(|isa| cpu(isa, THREADS)).collect()
}

/// The CPU backend with an instruction set and a number of threads; one in a build without threads.
pub fn cpu<E: CpuElement>(isa: Isa, threads: usize) -> Under<Cpu<E>> {
    let threads = if cfg!(feature = "rayon") { threads } else { 1 };
    let cpu = Cpu::with(isa, threads).unwrap();
    Under::new(format!("{} {} on {threads} threads", E::NAME, isa.name()), move || cpu.clone())
}

/// Makes a `#[test]` of each generic check, for every backend: `reference::check`, `cpu_f32::check`, ...
macro_rules! on_every_backend {
    ($($check:ident),* $(,)?) => {
        mod reference { $(#[test] fn $check() { super::$check(&$crate::common::reference()) })* }
        mod cpu_f32 { $(#[test] fn $check() { $crate::common::cpus::<f32>().iter().for_each(super::$check) })* }
        mod cpu_bf16 {
            $(#[test] fn $check() { $crate::common::cpus::<sae_kernels::bf16>().iter().for_each(super::$check) })*
        }
        mod cpu_f16 {
            $(#[test] fn $check() { $crate::common::cpus::<sae_kernels::f16>().iter().for_each(super::$check) })*
        }
        #[cfg(sae_kernels_ptx)]
        mod cuda_f32 { $(#[test] fn $check() { $crate::common::emulated::cudas::<f32>().iter().for_each(super::$check) })* }
        #[cfg(sae_kernels_ptx)]
        mod cuda_bf16 {
            $(#[test] fn $check() {
                $crate::common::emulated::cudas::<sae_kernels::bf16>().iter().for_each(super::$check)
            })*
        }
        #[cfg(sae_kernels_ptx)]
        mod cuda_f16 {
            $(#[test] fn $check() { $crate::common::emulated::cudas::<sae_kernels::f16>().iter().for_each(super::$check) })*
        }
    };
}
pub(crate) use on_every_backend;

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Uniform numbers in [−scale, scale).
pub fn uniform(rng: &mut StdRng, len: usize, scale: f64) -> Vec<f64> {
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

/// Whole numbers in −most..=most.
pub fn integers(rng: &mut StdRng, len: usize, most: i32) -> Vec<f64> {
    (0..len).map(|_| f64::from(rng.random_range(-most..=most))).collect()
}
/// The values as `T` stores them.
pub fn rounded<T: Element>(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| T::from_f64(*v).to_f64()).collect()
}

/// Panics where a found value is farther than its bound from the truth; NaN and infinities must agree.
pub fn assert_within(context: &str, what: &str, found: &[f64], truth: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(found.len(), truth.len(), "{context}: length of {what}");
    for (at, (f, t)) in found.iter().zip(truth).enumerate() {
        let same = f == t || (f.is_nan() && t.is_nan());
        let allowed = bound(at);
        assert!(
            same || (f - t).abs() <= allowed,
            "{context}: {what}[{at}] is {f:e}, truth {t:e}, error {:e}, allowed {allowed:e}",
            (f - t).abs()
        );
    }
}

/// Panics where bits differ; any NaN equals any other.
pub fn assert_same_bits(context: &str, what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{context}: length of {what}");
    for (at, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan()),
            "{context}: {what}[{at}] is {f:e}, expected the same bits as {e:e}"
        );
    }
}

/// ‖found − truth‖/‖truth‖, and 0 where both are 0.
pub fn relative(found: &[f64], truth: &[f64]) -> f64 {
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut found.iter().zip(truth).map(|(f, t)| f - t));
    if error == 0.0 { 0.0 } else { error / norm(&mut truth.iter().copied()) }
}

/// Row-major product with |·| of every factor: the scale of rounding errors of left · rightᵀ.
pub fn abs_nt(m: usize, n: usize, k: usize, left: &[f64], right: &[f64]) -> Vec<f64> {
    let mut out = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            out.push((0..k).map(|l| (left[i * k + l] * right[j * k + l]).abs()).sum());
        }
    }
    out
}

pub fn transposed(rows: usize, cols: usize, values: &[f64]) -> Vec<f64> {
    (0..rows * cols).map(|at| values[(at % rows) * cols + at / rows]).collect()
}
