//! Batch statistics: moments, comoments, their sums over blocks and hosts, and the variance and correlation terms made of them.

use super::{check_slice, check_slice_mut};
use crate::backend::{Backend, Mat, MatOut, Slice, SliceMut};
use crate::error::{Error, Result};
use crate::matrix::Memory;
use crate::objective::Objective;
use crate::statistics::Statistics;

/// Moves a block's moments, which are about 0, to the block's mean, so that later sums about it lose nothing to cancellation.
///
/// ```text
/// μ_j = sum_j/N      shift_j = round(μ_j)
/// sum'_j = sum_j − N·shift_j      sum_squares'_j = Σ_n (a_nj − shift_j)²
/// ```
///
/// Where 0 was near enough the new sum of squares follows from the old one; a column whose mean is far from 0
/// against its deviation is summed again from `activations`. For N = 0 the shift is 0.
pub struct Recentre<'a, B: Backend + ?Sized> {
    /// The block \[N,H\] that the moments are of, all of it.
    pub activations: Mat<'a, B, B::Element>,
    /// round(μ) \[H\]; written.
    pub shift: SliceMut<'a, B, B::Real>,
    /// Σ a \[H\], replaced by Σ(a − shift).
    pub sum: SliceMut<'a, B, f64>,
    /// Σ a² \[H\], replaced by Σ(a − shift)².
    pub sum_squares: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> Recentre<'_, B> {
    /// A column is summed again if its squared mean is more than this many times its variance: two bits are lost by then.
    pub const LIMIT: f64 = 4.0;

    /// Checks shapes and returns (N, H).
    pub fn check(&self) -> Result<(usize, usize)> {
        let (n, h) = (self.activations.rows(), self.activations.cols());
        check_slice_mut::<B, _>("shift", h, &self.shift)?;
        check_slice_mut::<B, _>("sum", h, &self.sum)?;
        check_slice_mut::<B, _>("sum_squares", h, &self.sum_squares)?;
        Ok((n, h))
    }
}

/// The comoments of a block: S_ij = Σ_n (a_ni − c_i)(a_nj − c_j), for i ≤ j.
///
/// A symmetric product: only the upper triangle with the diagonal is computed and written; what lies below is not touched.
pub struct Comoments<'a, B: Backend + ?Sized> {
    /// a \[N,H\].
    pub activations: Mat<'a, B, B::Element>,
    /// c \[H\].
    pub shift: Slice<'a, B, B::Real>,
    /// Whether to add to `comoments` or to overwrite it.
    pub accumulate: bool,
    /// S \[H,H\].
    pub comoments: MatOut<'a, B, B::Real>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> Comoments<'_, B> {
    /// Checks shapes and returns (N, H).
    pub fn check(&self) -> Result<(usize, usize)> {
        let (n, h) = (self.activations.rows(), self.activations.cols());
        check_slice::<B, _>("shift", h, &self.shift)?;
        self.comoments.expect("comoments", h, h)?;
        Ok((n, h))
    }
}

/// Adds a block's moments and comoments to the sums over the whole batch, which have a shift c' of their own.
///
/// ```text
/// δ = c − c'
/// N' += N      Σℓ' += Σℓ      sum'_i += sum_i + N δ_i
/// S'_ij += S_ij + δ_i sum_j + sum_i δ_j + N δ_i δ_j      i ≤ j, or i = j without comoments
/// ```
///
/// `packed` is laid out as [`Statistics::sums`]. All of it is `f64`, so parts of a batch may be summed in any order by any engine.
pub struct PackStatistics<'a, B: Backend + ?Sized> {
    /// N, rows of the block.
    pub count: u64,
    /// Σℓ \[1\].
    pub row_loss_sum: Slice<'a, B, f64>,
    /// c \[H\].
    pub shift: Slice<'a, B, B::Real>,
    /// Σ(a − c) \[H\].
    pub sum: Slice<'a, B, f64>,
    /// Σ(a − c)² \[H\]; not read where there are comoments.
    pub sum_squares: Slice<'a, B, f64>,
    /// S = Σ(a − c)(a − c)ᵀ \[H,H\], upper triangle; without it `packed` has squares alone.
    pub comoments: Option<Mat<'a, B, B::Real>>,
    /// c' \[H\]; 0 if not given.
    pub packed_shift: Option<Slice<'a, B, B::Real>>,
    /// Whether to add to `packed` or to overwrite it.
    pub accumulate: bool,
    /// \[2 + 2H\], or \[2 + H + H(H+1)/2\] with comoments.
    pub packed: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> PackStatistics<'_, B> {
    /// Checks shapes and returns H.
    pub fn check(&self) -> Result<usize> {
        let h = B::Memory::len::<B::Real>(&self.shift);
        check_slice::<B, _>("row_loss_sum", 1, &self.row_loss_sum)?;
        check_slice::<B, _>("sum", h, &self.sum)?;
        check_slice::<B, _>("sum_squares", h, &self.sum_squares)?;
        if let Some(comoments) = &self.comoments {
            comoments.expect("comoments", h, h)?;
        }
        if let Some(packed_shift) = &self.packed_shift {
            check_slice::<B, _>("packed_shift", h, packed_shift)?;
        }
        check_slice_mut::<B, _>("packed", Statistics::len(h, self.comoments.is_some()), &self.packed)?;
        Ok(h)
    }
}

/// The inverse of [`PackStatistics`] for the whole batch: its moments and comoments about its rounded mean.
///
/// ```text
/// shift_i = round(c'_i + sum'_i/N), 0 for N = 0      δ = c' − shift
/// ```
///
/// and sums as there. `packed` may have comoments that are not asked for.
pub struct UnpackStatistics<'a, B: Backend + ?Sized> {
    /// As [`PackStatistics`] leaves it.
    pub packed: Slice<'a, B, f64>,
    /// c' \[H\]; 0 if not given.
    pub packed_shift: Option<Slice<'a, B, B::Real>>,
    /// Σℓ \[1\]; written.
    pub row_loss_sum: SliceMut<'a, B, f64>,
    /// round(μ) \[H\]; written.
    pub shift: SliceMut<'a, B, B::Real>,
    /// Σ(a − shift) \[H\]; written.
    pub sum: SliceMut<'a, B, f64>,
    /// Σ(a − shift)² \[H\]; written.
    pub sum_squares: SliceMut<'a, B, f64>,
    /// Σ(a − shift)(a − shift)ᵀ \[H,H\], rounded; the upper triangle is written, what lies below is not touched.
    pub comoments: Option<MatOut<'a, B, B::Real>>,
}

impl<B: Backend + ?Sized> UnpackStatistics<'_, B> {
    /// Checks shapes and returns H, and whether `packed` has comoments.
    pub fn check(&self) -> Result<(usize, bool)> {
        let h = B::Memory::len_mut::<B::Real>(&self.shift);
        let full = self.comoments.is_some() || B::Memory::len::<f64>(&self.packed) != Statistics::len(h, false);
        check_slice::<B, _>("packed", Statistics::len(h, full), &self.packed)?;
        if let Some(packed_shift) = &self.packed_shift {
            check_slice::<B, _>("packed_shift", h, packed_shift)?;
        }
        check_slice_mut::<B, _>("row_loss_sum", 1, &self.row_loss_sum)?;
        check_slice_mut::<B, _>("sum", h, &self.sum)?;
        check_slice_mut::<B, _>("sum_squares", h, &self.sum_squares)?;
        if let Some(comoments) = &self.comoments {
            comoments.expect("comoments", h, h)?;
        }
        Ok((h, full))
    }
}

/// Turns the sums over the whole batch into the variance and correlation losses and the coefficients of their gradient.
///
/// ```text
/// μ = c + sum/N      v_j = [sum_squares_j − sum_j²/N]/(N−1)      s_j = √v_j + 1e-8
/// L_var = −Σ_j log(v_j + ε)
/// C_ij = cov_ij/(s_i s_j)     Ĉ = offdiag(C)     q_i = Σ_j Ĉ_ij²     L_tc = Σ_i q_i
/// M_ij = 4 λ_tc/(N−1) · Ĉ_ij/(s_i s_j)
/// d_i = −[4 λ_tc q_i/(s_i √v_i) + 2 λ_var/(v_i + ε)]/(N−1)
/// offset = M(μ − c') + d·(μ − mean)
/// ```
///
/// With `primal` the correlation is finished in its primal form. Its comoments, where they are given, have the variances on their diagonal;
/// a backend that computes them may take either those or `sum_squares`. Without `primal` (λ_tc = 0, or the dual form, which
/// [`CorrelationDual`](super::CorrelationDual) completes) q = 0.
///
/// `mean` is μ rounded. `offset` makes up for what a backend subtracts from a before it multiplies by M:
/// c' = `mean` for one that subtracts while packing, c' = 0 for one that cannot subtract; and for the rounding of `mean` in (a − μ)·d.
///
/// A dead or constant column (v = 0) has correlation 0 with all others and no 1/√v term: no 0/0 is formed.
/// For dead columns that is what autograd of the authors' code gives.
///
/// Errors: [`Error::TooFewRows`] for count < 2.
pub struct FinishStatistics<'a, B: Backend + ?Sized> {
    /// N, rows of the whole batch.
    pub count: u64,
    /// Weights λ_var, λ_tc and ε.
    pub objective: Objective,
    /// c \[H\].
    pub shift: Slice<'a, B, B::Real>,
    /// Σ(a − c) \[H\].
    pub sum: Slice<'a, B, f64>,
    /// Σ(a − c)² \[H\].
    pub sum_squares: Slice<'a, B, f64>,
    /// Covariances and what is made of them; not given in the dual form or for λ_tc = 0.
    pub primal: Option<PrimalCorrelation<'a, B>>,
    /// μ \[H\], rounded; written.
    pub mean: SliceMut<'a, B, B::Real>,
    /// v \[H\]; written.
    pub variance: SliceMut<'a, B, B::Real>,
    /// d \[H\]; written.
    pub scale: SliceMut<'a, B, B::Real>,
    /// (L_var, L_tc) \[2\], not weighted; written.
    pub losses: SliceMut<'a, B, f64>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

/// The correlation term in its primal form.
pub struct PrimalCorrelation<'a, B: Backend + ?Sized> {
    /// Where the covariances come from.
    pub covariance: Covariance<'a, B>,
    /// M \[H,H\], symmetric with a zero diagonal; written, over the comoments where they stand there.
    pub coupling: MatOut<'a, B, B::Real>,
    /// M(μ − c') + d·(μ − mean) \[H\]; written.
    pub offset: SliceMut<'a, B, B::Real>,
}

/// Where the covariances of the primal form come from.
pub enum Covariance<'a, B: Backend + ?Sized> {
    /// Σ(a − c)(a − c)ᵀ over all blocks, which stands where M will, in the upper triangle, as [`Comoments`] leaves it.
    InPlace,
    /// a \[N,H\], all of the batch: the comoments are computed on the way.
    Activations(Mat<'a, B, B::Element>),
}

impl<B: Backend + ?Sized> FinishStatistics<'_, B> {
    /// Checks shapes and returns H.
    pub fn check(&self) -> Result<usize> {
        let h = B::Memory::len::<B::Real>(&self.shift);
        if self.count < 2 {
            return Err(Error::TooFewRows { rows: self.count });
        }
        self.objective.check()?;
        check_slice::<B, _>("sum", h, &self.sum)?;
        check_slice::<B, _>("sum_squares", h, &self.sum_squares)?;
        if let Some(primal) = &self.primal {
            if let Covariance::Activations(activations) = &primal.covariance {
                activations.expect("activations", self.count as usize, h)?;
            }
            primal.coupling.expect("coupling", h, h)?;
            check_slice_mut::<B, _>("offset", h, &primal.offset)?;
        }
        check_slice_mut::<B, _>("mean", h, &self.mean)?;
        check_slice_mut::<B, _>("variance", h, &self.variance)?;
        check_slice_mut::<B, _>("scale", h, &self.scale)?;
        check_slice_mut::<B, _>("losses", 2, &self.losses)?;
        Ok(h)
    }
}
