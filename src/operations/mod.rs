//! The operations' arguments: shapes, formulas, units, errors and sources, and the checks that all backends share.
//!
//! Symbols: N rows in the block, D inputs, H latents; x \[N,D\], weight W \[H,D\], bias b \[H\], activations a \[N,H\].
//! Every `check` returns before anything is written. All operations may return [`Error::Shape`](crate::Error::Shape) and
//! [`Error::Length`](crate::Error::Length), and [`Error::Workspace`](crate::Error::Workspace) where they take a workspace.

mod backward;
mod decode;
mod dual;
mod encode;
mod optimizer;
mod product;
mod redundancy;
mod statistics;
mod step;

pub use backward::{BackwardDz, CorrelationTerm, StatisticsTerm};
pub use decode::{Decode, DecodeBackward};
pub use dual::CorrelationDual;
pub use encode::{ActivationSums, Encode, Moments, Responsibilities};
pub use optimizer::{Adam, AdamConfig, Optimizer, ProductUpdate, Sgd, SgdConfig};
pub use product::{ColumnSums, Layout, Product};
pub use redundancy::WeightRedundancy;
pub use statistics::{Comoments, Covariance, FinishStatistics, PrimalCorrelation, Recentre};
pub use step::{FusedParameters, FusedStep};

use crate::backend::{Backend, Slice, SliceMut};
use crate::element::Element;
use crate::error::{Result, check_len};
use crate::matrix::Memory;

/// [`check_len`] of a slice in the backend's memory.
fn check_slice<B: Backend + ?Sized, T: Element>(
    operand: &'static str,
    len: usize,
    slice: &Slice<'_, B, T>,
) -> Result<()> {
    check_len(operand, len, B::Memory::len::<T>(slice))
}

/// [`check_len`] of a mutable slice in the backend's memory.
fn check_slice_mut<B: Backend + ?Sized, T: Element>(
    operand: &'static str,
    len: usize,
    slice: &SliceMut<'_, B, T>,
) -> Result<()> {
    check_len(operand, len, B::Memory::len_mut::<T>(slice))
}
