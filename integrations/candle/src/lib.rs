#![doc = include_str!("../README.md")]

mod activation_losses;
mod argument;
mod encoder;
mod error;
mod node;
mod place;
mod plans;

pub use activation_losses::CombinedLoss;
pub use encoder::DecoderFreeLoss;
pub use error::{Error, Result};
pub use sae_kernels::{Losses, Objective, Reduction};

use plans::Plans;
use std::fmt;
use std::sync::Arc;

/// The losses, and the memory that they need, which the next call of the same kind, width and objective uses again.
///
/// A clone shares that memory. Threads may call at the same time. Dropping the last clone, and the last tensor that [`encode_lse`](Self::encode_lse)
/// has made, frees it.
#[derive(Clone, Default)]
pub struct Kernels {
    plans: Arc<Plans>,
}

impl Kernels {
    /// Without memory yet. Instruction set and threads are chosen when it is made: the processor's best, and rayon's current ones.
    pub fn new() -> Self {
        Self::default()
    }

    fn plans(&self) -> &Plans {
        &self.plans
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").finish_non_exhaustive()
    }
}
