//! Kernels for sparse autoencoders and sparse coding: one table of operations, several backends.
//!
//! The table is the trait [`Backend`]; each operation's arguments, formula and source are in [`operations`].
//!
//! | backend | what it is |
//! |---|---|
//! | [`Reference`] | plain `f64` loops, one obvious line a formula: what every other backend is tested against |
//! | [`Cpu`] | packed, blocked SIMD kernels (AVX-512, AVX2+FMA, portable; chosen once at run time) and threads; `f32`, `bf16` and `f16` storage |
//! | `Cuda` | feature `cuda`: CUDA kernels, one tensor-core product with the operations as epilogues, on the caller's stream; the same storage types |
//!
//! On the table stand the models: [`DecoderFree`], a step of the decoder-free sparse autoencoder (Oursland 2026) with exact
//! micro-batching and mergeable [`Statistics`]; [`ActivationLosses`], the same objective of activations that any encoder has made; and
//! [`StandardSae`], the autoencoder with a linear decoder. The feature `capi` adds C functions for the first two.
//!
//! ```
//! use sae_kernels::{Cpu, DecoderFree, DecoderFreeConfig, DecoderFreeStep, MatMut, MatRef, Shape};
//!
//! # fn main() -> sae_kernels::Result<()> {
//! let (rows, inputs, latents) = (32, 20, 8);
//! let x: Vec<f32> = (0..rows * inputs).map(|i| (i % 17) as f32 / 17.0).collect();
//! let weight: Vec<f32> = (0..latents * inputs).map(|i| (i % 7) as f32 / 7.0 - 0.4).collect();
//! let bias = vec![0.1; latents];
//! let (mut grad_weight, mut grad_bias) = (vec![0.0; latents * inputs], vec![0.0; latents]);
//!
//! let mut model = DecoderFree::new(Cpu::<f32>::new()?, DecoderFreeConfig::new(Shape { rows, inputs, latents }))?;
//! model.step(DecoderFreeStep {
//!     x: MatRef::new(&x, rows, inputs)?,
//!     weight: MatRef::new(&weight, latents, inputs)?,
//!     bias: &bias,
//!     grad_weight: MatMut::new(&mut grad_weight, latents, inputs)?,
//!     grad_bias: &mut grad_bias,
//!     grad_x: None,
//!     activations: None,
//!     row_loss: None,
//! })?;
//! println!("{:?}", model.losses()?);
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

mod backend;
#[cfg(feature = "capi")]
pub mod capi;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod decoder_free;
mod element;
mod error;
mod matrix;
mod objective;
pub mod operations;
mod reference;
mod standard;
mod statistics;

pub use backend::{Backend, Buffer, Mat, MatOut, Shape, Slice, SliceMut};
pub use cpu::{Cpu, CpuElement, Isa};
#[cfg(feature = "cuda")]
pub use cuda::{Cuda, CudaBuffer, CudaElement, CudaMemory, CudaPointer, CudaRef, CudaRefMut, Precision, Products};
/// The version of cudarc that [`Cuda`]'s streams and buffers are of.
#[cfg(feature = "cuda")]
pub use cudarc;
pub use decoder_free::{
    ActivationLosses, ActivationStep, DecoderFree, DecoderFreeConfig, DecoderFreeStep, DecoderFreeTrainStep,
    PlanMemory, Trained,
};
pub use element::{Element, bf16, f16};
pub use error::{Error, Result};
pub use matrix::{Host, MatMut, MatRef, Memory};
pub use objective::{Activation, Form, Losses, Objective, Reduction};
pub use reference::Reference;
pub use standard::{StandardConfig, StandardGradients, StandardLosses, StandardParameters, StandardSae};
pub use statistics::Statistics;

/// What the CUDA backend asks of a device, for tests that answer with an emulated one. Not part of the API.
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod cuda_driver {
    pub use crate::cuda::driver::{
        Argument, Driver, Launch, Mainloop, Place, PlainProduct, Storage, Tensor, TensorMap,
    };
    pub use crate::cuda::image::FAMILIES;
    pub use crate::cuda::schedule::Schedule;
    /// Where the build left the kernels' PTX, if it did.
    pub const PTX_DIR: Option<&str> = option_env!("SAE_KERNELS_PTX_DIR");
}

/// The README's example is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
