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
pub use statistics::{
    Comoments, Covariance, FinishStatistics, PackStatistics, PrimalCorrelation, Recentre, UnpackStatistics,
};
pub use step::{FusedParameters, FusedStep};

use crate::backend::{Backend, Slice, SliceMut};
use crate::element::Element;
use crate::error::{Result, check_len};
use crate::matrix::Memory;

/// What a workspace is for: the operations that take one, told apart where they need different lengths.
///
/// A workspace for several is the longest of theirs: [`Backend::workspace_len_for`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// [`Encode`].
    Encode,
    /// [`ActivationSums`].
    ActivationSums,
    /// [`FinishStatistics`] without a primal correlation.
    Variance,
    /// [`Comoments`], and [`FinishStatistics`] with a primal correlation.
    PrimalCorrelation,
    /// [`CorrelationDual`].
    DualCorrelation,
    /// [`BackwardDz`] without a primal correlation.
    Backward,
    /// [`BackwardDz`] with a primal correlation.
    PrimalBackward,
    /// [`Product`] in any layout, with the three extents in any order, and [`ProductUpdate`].
    Product,
    /// [`ColumnSums`] of a matrix of D or H columns.
    ColumnSums,
    /// [`WeightRedundancy`] in its primal form.
    PrimalRedundancy,
    /// [`WeightRedundancy`] in its dual form.
    DualRedundancy,
    /// [`FusedStep`] of up to N rows, which may be many more than a backend would compute so.
    FusedStep,
    /// [`Decode`].
    Decode,
    /// [`DecodeBackward`].
    DecodeBackward,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Encode,
        Self::ActivationSums,
        Self::Variance,
        Self::PrimalCorrelation,
        Self::DualCorrelation,
        Self::Backward,
        Self::PrimalBackward,
        Self::Product,
        Self::ColumnSums,
        Self::PrimalRedundancy,
        Self::DualRedundancy,
        Self::FusedStep,
        Self::Decode,
        Self::DecodeBackward,
    ];
}

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
