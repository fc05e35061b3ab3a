//! Where to compute and in which storage type: from the command line to a [`Backend`].

use anyhow::{Result, bail};
use clap::ValueEnum;
use sae_kernels::{Backend, Cpu, CpuElement, Isa, Reference, bf16, f16};
#[cfg(feature = "cuda")]
use sae_kernels::{Cuda, CudaElement};
use serde::{Deserialize, Serialize};

/// A backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// SIMD kernels and threads.
    Cpu,
    /// CUDA kernels on the first GPU.
    Cuda,
    /// Plain f64 loops: slow, for checking the others.
    Reference,
}

/// Storage type of inputs, weights and activations. Parameters are always kept and updated in f32 (f64 on the reference).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    /// 32 bits.
    F32,
    /// 16 bits, the exponent of f32.
    Bf16,
    /// 16 bits, IEEE half.
    F16,
    /// 64 bits; what the reference computes in.
    #[value(skip)]
    F64,
}

/// Work that runs on any backend.
pub trait Job: Send {
    /// Result of the work.
    type Output: Send;
    /// Does it.
    fn run<B: Backend + Clone>(self, backend: B) -> Result<Self::Output>;
}

impl Device {
    /// The storage type asked for, or the device's own.
    pub fn storage(self, asked: Option<Storage>) -> Result<Storage> {
        match (self, asked) {
            (Device::Cpu | Device::Cuda, asked) => Ok(asked.unwrap_or(Storage::F32)),
            (Device::Reference, None | Some(Storage::F64)) => Ok(Storage::F64),
            (Device::Reference, Some(_)) => {
                bail!("the reference computes in f64 alone, whatever --dtype or the checkpoint says")
            }
        }
    }

    /// Runs a job there; `threads` are of the CPU.
    pub fn run<J: Job>(self, storage: Storage, threads: usize, job: J) -> Result<J::Output> {
        match (self, storage) {
            (Device::Cpu, Storage::F32) => on_cpu::<f32, J>(threads, job),
            (Device::Cpu, Storage::Bf16) => on_cpu::<bf16, J>(threads, job),
            (Device::Cpu, Storage::F16) => on_cpu::<f16, J>(threads, job),
            #[cfg(feature = "cuda")]
            (Device::Cuda, Storage::F32) => on_cuda::<f32, J>(job),
            #[cfg(feature = "cuda")]
            (Device::Cuda, Storage::Bf16) => on_cuda::<bf16, J>(job),
            #[cfg(feature = "cuda")]
            (Device::Cuda, Storage::F16) => on_cuda::<f16, J>(job),
            #[cfg(not(feature = "cuda"))]
            (Device::Cuda, Storage::F32 | Storage::Bf16 | Storage::F16) => {
                bail!("this program was built without CUDA; build it with --features cuda")
            }
            (Device::Reference, Storage::F64) => job.run(Reference),
            (Device::Cpu | Device::Cuda, Storage::F64) | (Device::Reference, _) => {
                bail!("{self:?} does not compute in {storage:?}; use the device that the checkpoint was written on")
            }
        }
    }
}

/// Runs a job with the best instructions of this processor.
fn on_cpu<E: CpuElement, J: Job>(threads: usize, job: J) -> Result<J::Output> {
    if threads == 1 {
        return job.run(Cpu::<E>::with(Isa::detect(), 1)?);
    }
    // The whole job is in the pool: its operations then need not be handed over to it one by one.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    pool.install(|| job.run(Cpu::<E>::new()?))
}

/// Runs a job on a stream of its own on the first GPU.
#[cfg(feature = "cuda")]
fn on_cuda<E: CudaElement, J: Job>(job: J) -> Result<J::Output> {
    job.run(Cuda::<E>::new(0)?)
}
