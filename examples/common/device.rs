//! Where to compute and in which storage type: from the command line to a [`Backend`].

use anyhow::{Result, bail};
use clap::ValueEnum;
use sae_kernels::{Backend, Cpu, CpuElement, Isa, Reference, bf16, f16};
use serde::{Deserialize, Serialize};

/// A backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// SIMD kernels and threads.
    Cpu,
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
pub trait Job {
    /// Result of the work.
    type Output;
    /// Does it.
    fn run<B: Backend + Clone>(self, backend: B) -> Result<Self::Output>;
}

impl Device {
    /// The storage type asked for, or the device's own.
    pub fn storage(self, asked: Option<Storage>) -> Result<Storage> {
        match (self, asked) {
            (Device::Cpu, asked) => Ok(asked.unwrap_or(Storage::F32)),
            (Device::Reference, None | Some(Storage::F64)) => Ok(Storage::F64),
            (Device::Reference, Some(_)) => {
                bail!("the reference computes in f64 alone, whatever --dtype or the checkpoint says")
            }
        }
    }

    /// Runs a job there; `threads` is of the CPU.
    pub fn run<J: Job>(self, storage: Storage, threads: usize, job: J) -> Result<J::Output> {
        match (self, storage) {
            (Device::Cpu, Storage::F32) => job.run(cpu::<f32>(threads)?),
            (Device::Cpu, Storage::Bf16) => job.run(cpu::<bf16>(threads)?),
            (Device::Cpu, Storage::F16) => job.run(cpu::<f16>(threads)?),
            (Device::Reference, Storage::F64) => job.run(Reference),
            (Device::Cpu, Storage::F64) | (Device::Reference, _) => {
                bail!("{self:?} does not compute in {storage:?}; use the device that the checkpoint was written on")
            }
        }
    }
}

/// The best instructions of this processor, on `threads` threads.
fn cpu<E: CpuElement>(threads: usize) -> Result<Cpu<E>> {
    Ok(Cpu::with(Isa::detect(), threads)?)
}
