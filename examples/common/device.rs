//! Where to compute and in which storage type: from the command line to a [`Backend`].

use anyhow::{Result, bail};
use clap::ValueEnum;
use sae_kernels::{Backend, Reference};
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

    /// Runs a job there on `threads` threads.
    pub fn run<J: Job>(self, storage: Storage, threads: usize, job: J) -> Result<J::Output> {
        match (self, storage) {
            (Device::Reference, Storage::F64) => job.run(Reference),
            _ => bail!("no such backend yet: {threads} threads"),
        }
    }
}
