//! The CPU backend: hand-written SIMD kernels, chosen once at run time, and threads.
//!
//! One product (`gemm`) carries all families; an operation is an epilogue on it. Storage is `f32`, `bf16` or `f16`, widened while
//! packing; arithmetic is `f32`, sums over many rows or tiles are `f64`.

mod backward;
mod decode;
mod dual;
mod element;
mod encode;
mod gemm;
mod math;
mod memory;
mod optimizer;
mod pack;
mod packed;
mod parallel;
mod product;
mod redundancy;
mod rows;
mod simd;
mod statistics;
mod symmetric;

pub use element::CpuElement;
pub use simd::Isa;

use crate::backend::{Backend, Shape, product_then_update};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::matrix::Host;
use crate::operations::*;
use parallel::Threads;
use std::fmt;
use std::marker::PhantomData;

/// The CPU backend with storage type `E`: `f32`, `bf16` or `f16`.
///
/// Results are bitwise the same for any number of threads, but differ (within the bounds) between instruction sets.
///
/// What is chosen by shape: the form of the correlation and redundancy terms, the one with the smaller square matrix, as both take the same
/// FLOPs beside it ([`Form`](crate::Form) overrides it); how a product is cut into tasks, of at most 224×256 outputs, so that a few threads
/// get equal shares of tens of milliseconds of work, and 64 threads of seconds; whether to wake other threads, from about 200 µs of work on.
#[derive(Clone)]
pub struct Cpu<E: CpuElement = f32> {
    core: Core,
    element: PhantomData<E>,
}

/// What kernels need to know of the machine.
#[derive(Clone)]
pub(crate) struct Core {
    isa: Isa,
    threads: Threads,
}

impl<E: CpuElement> Cpu<E> {
    /// The best instruction set of this processor and rayon's current thread pool.
    ///
    /// # Errors
    /// None today.
    pub fn new() -> Result<Self> {
        Ok(Self { core: Core { isa: Isa::detect(), threads: Threads::current() }, element: PhantomData })
    }

    /// A given instruction set, and `threads` threads of its own (1: the calling thread alone).
    ///
    /// Each call from outside its pool wakes the pool up. Where steps are small, run the whole loop in a rayon pool and use
    /// [`new`](Self::new) there.
    ///
    /// # Errors
    /// [`Error::IsaUnavailable`], [`Error::Threads`].
    pub fn with(isa: Isa, threads: usize) -> Result<Self> {
        Ok(Self { core: Core { isa: isa.check()?, threads: Threads::new(threads)? }, element: PhantomData })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.core.isa
    }

    /// Threads that share the work.
    pub fn threads(&self) -> usize {
        self.core.threads.count()
    }

    /// The same instruction set and threads with another storage type.
    #[cfg(feature = "capi")]
    pub(crate) fn storing<F: CpuElement>(&self) -> Cpu<F> {
        Cpu { core: self.core.clone(), element: PhantomData }
    }

    /// Calls `task` once on each thread that only this backend uses; the calling thread is none of them.
    #[cfg(feature = "capi")]
    pub(crate) fn on_own_threads(&self, task: impl Fn() + Sync) {
        self.core.threads.on_each_of_own(task);
    }
}

impl<E: CpuElement> fmt::Debug for Cpu<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpu<{}>({}, {} threads)", E::NAME, self.isa().name(), self.threads())
    }
}

impl<E: CpuElement> Backend for Cpu<E> {
    type Memory = Host;
    type Element = E;
    type Real = f32;

    fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
        Host::alloc(len)
    }
    fn upload<T: Element>(&self, source: &[T], target: &mut [T]) -> Result<()> {
        Host::copy(source, target)
    }
    fn download<T: Element>(&self, source: &[T], target: &mut [T]) -> Result<()> {
        Host::copy(source, target)
    }
    fn workspace_len_of(&self, operation: Operation, shape: Shape) -> Result<usize> {
        let Shape { rows: n, inputs: d, latents: h } = shape;
        let core = &self.core;
        for (one, other) in [(n, d), (n, h), (n, n), (h, d), (h, h), (d, d)] {
            if one.checked_mul(other).and_then(|len| len.checked_mul(64)).is_none() {
                return Err(Error::Overflow { what: "the workspace" });
            }
        }
        Ok(match operation {
            Operation::Encode => encode::workspace_len(core, n, d, h),
            Operation::ActivationSums => encode::sums_workspace_len(core, n, h),
            Operation::Variance => statistics::finish_workspace_len(core, None, h),
            Operation::PrimalCorrelation => statistics::finish_workspace_len(core, Some(n), h),
            Operation::DualCorrelation => dual::workspace_len(core, n, h),
            Operation::Backward => backward::workspace_len(core, n, h, false),
            Operation::PrimalBackward => backward::workspace_len(core, n, h, true),
            Operation::Product => product::workspace_len(core, n, d, h),
            Operation::ColumnSums => product::column_sums_workspace_len(n, d.max(h)),
            Operation::PrimalRedundancy => redundancy::workspace_len(core, h, d, false),
            Operation::DualRedundancy => redundancy::workspace_len(core, h, d, true),
            Operation::FusedStep => 0,
            Operation::Decode => decode::workspace_len(core, n, d, h),
            Operation::DecodeBackward => decode::backward_workspace_len(core, n, d, h),
        })
    }

    fn encode(&self, args: Encode<'_, Self>) -> Result<()> {
        E::encode(self, args)
    }
    fn activation_sums(&self, args: ActivationSums<'_, Self>) -> Result<()> {
        E::activation_sums(self, args)
    }
    fn responsibilities(&self, args: Responsibilities<'_, Self>) -> Result<()> {
        E::responsibilities(self, args)
    }
    fn recentre(&self, args: Recentre<'_, Self>) -> Result<()> {
        E::recentre(self, args)
    }
    fn comoments(&self, args: Comoments<'_, Self>) -> Result<()> {
        E::comoments(self, args)
    }
    fn pack_statistics(&self, args: PackStatistics<'_, Self>) -> Result<()> {
        E::pack_statistics(self, args)
    }
    fn unpack_statistics(&self, args: UnpackStatistics<'_, Self>) -> Result<()> {
        E::unpack_statistics(self, args)
    }
    fn finish_statistics(&self, args: FinishStatistics<'_, Self>) -> Result<()> {
        E::finish_statistics(self, args)
    }
    fn correlation_dual(&self, args: CorrelationDual<'_, Self>) -> Result<()> {
        E::correlation_dual(self, args)
    }
    fn backward_dz(&self, args: BackwardDz<'_, Self>) -> Result<()> {
        E::backward_dz(self, args)
    }
    fn product(&self, args: Product<'_, Self>) -> Result<()> {
        E::product(self, args)
    }
    fn column_sums(&self, args: ColumnSums<'_, Self>) -> Result<()> {
        E::column_sums(self, args)
    }
    fn weight_redundancy(&self, args: WeightRedundancy<'_, Self>) -> Result<()> {
        E::weight_redundancy(self, args)
    }
    fn decode(&self, args: Decode<'_, Self>) -> Result<()> {
        E::decode(self, args)
    }
    fn decode_backward(&self, args: DecodeBackward<'_, Self>) -> Result<()> {
        E::decode_backward(self, args)
    }
    fn sgd(&self, args: Sgd<'_, Self>) -> Result<()> {
        E::sgd(self, args)
    }
    fn adam(&self, args: Adam<'_, Self>) -> Result<()> {
        E::adam(self, args)
    }
    fn product_update(&self, args: ProductUpdate<'_, Self>) -> Result<()> {
        if optimizer::fits_l2(&args) { E::product_update(self, args) } else { product_then_update(self, args) }
    }
}
