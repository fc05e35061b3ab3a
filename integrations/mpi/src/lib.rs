//! A step of the decoder-free autoencoder whose rows are spread over the ranks of MPI.
//!
//! Variances and correlations are of the batch, so an average of gradients that each rank computes of its own rows is the gradient of another
//! objective. Here statistics are summed over ranks before gradients are ([`step`]): the result is that of one process with all rows, up
//! to rounding, whether the ranks have as many rows as each other, few or none.
//!
//! All ranks get the same bits, each time the same for as many ranks ([`sum`]): optimisers that start alike stay alike, and nobody has to send
//! parameters around. [`run`] ends all ranks as soon as one panics, fails or does something else than the others.
//!
//! ```
//! use sae_kernels::{Cpu, DecoderFree, DecoderFreeConfig, MatRef, Shape};
//!
//! sae_kernels_mpi::run(|world| {
//!     let (rows, inputs, latents) = (32, 20, 8);
//!     let mut model = DecoderFree::new(Cpu::<f32>::new()?, DecoderFreeConfig::new(Shape { rows, inputs, latents }))?;
//!     // The rows of this rank; as many as it likes, up to the plan's.
//!     let x: Vec<f32> = (0..rows * inputs).map(|i| (i % 17) as f32 / 17.0).collect();
//!     let (weight, bias) = (vec![0.1; latents * inputs], vec![0.1; latents]);
//!     let mut gradients = vec![0.0; latents * inputs + latents];
//!     let (x, weight) = (MatRef::new(&x, rows, inputs)?, MatRef::new(&weight, latents, inputs)?);
//!     let losses = sae_kernels_mpi::step(world, &mut model, x, weight, &bias, &mut gradients)?;
//!     assert!(losses.total.is_finite() && gradients.iter().any(|g| *g != 0.0));
//!     Ok::<_, sae_kernels_mpi::Error>(())
//! });
//! ```

mod agree;
mod run;
mod step;
mod sum;

pub use agree::agree;
/// The version of rsmpi that communicators are of.
pub use mpi;
pub use run::run;
pub use step::step;
pub use sum::sum;

/// Why a step over ranks failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This rank's own part failed. The others know nothing of it and wait: end the job, as [`run`] does.
    #[error(transparent)]
    Kernels(#[from] sae_kernels::Error),
    /// Ranks do not do the same thing. All of them get this error.
    #[error("rank {rank} {theirs}, but rank 0 {first}: all ranks must do the same with the same")]
    Disagreement {
        /// The first rank that does something else than rank 0.
        rank: usize,
        /// What it does.
        theirs: String,
        /// What rank 0 does.
        first: String,
    },
}
