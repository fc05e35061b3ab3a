//! Sufficient statistics of a batch that merge by addition.

use crate::element::Element;
use crate::error::{Error, Result};
use std::fmt;
use std::ops::Range;

/// What the decoder-free objective needs to know of a batch: count, Σℓ, Σ(a − c), and Σ(a − c)² or Σ(a − c)(a − c)ᵀ, about a shift c.
///
/// All are sums over rows, kept in `f64`, so blocks, threads and hosts merge alike: by [`merge`](Self::merge), or, where all
/// use the same shift, by one sum-reduction of [`sums`](Self::sums) with the host's own engine. Uneven and empty parts are exact.
///
/// ```
/// # use sae_kernels::Statistics;
/// let (mut left, mut right) = (Statistics::new(2, true), Statistics::new(2, true));
/// left.add_row(-0.5, &[1.0, 2.0]);
/// right.add_row(-0.25, &[3.0, 1.0]);
/// left.merge(&right)?;
/// assert_eq!(left.count(), 2);
/// assert_eq!(left.mean(), [2.0, 1.5]);
/// assert_eq!(left.covariance(0, 1), -1.0);
/// # Ok::<(), sae_kernels::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    latents: usize,
    full: bool,
    shift: Vec<f64>,
    sums: Vec<f64>,
}

/// Where the parts of [`Statistics::sums`] begin.
const ROW_LOSS: usize = 1;
const SUM: usize = 2;

/// Width and kind of statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) latents: usize,
    pub(crate) full: bool,
}

impl Kind {
    /// The same with all comoments.
    pub(crate) fn full(self) -> Self {
        Self { full: true, ..self }
    }

    pub(crate) fn len(self) -> usize {
        Statistics::len(self.latents, self.full)
    }

    /// Where latent i's products with itself and those behind it stand in the sums, or its square alone.
    pub(crate) fn products(self, i: usize) -> Range<usize> {
        let h = self.latents;
        let start = SUM + h + if self.full { i * (2 * h + 1 - i) / 2 } else { i };
        start..start + if self.full { h - i } else { 1 }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} columns {} comoments", self.latents, if self.full { "with" } else { "without" })
    }
}

impl Statistics {
    /// Empty statistics of `latents` columns about the shift 0, with all comoments (`full`) or the squares alone.
    ///
    /// Full statistics take H(H+1)/2 numbers and are needed for the correlation term.
    pub fn new(latents: usize, full: bool) -> Self {
        Self { latents, full, shift: vec![0.0; latents], sums: vec![0.0; Self::len(latents, full)] }
    }

    /// Numbers in [`sums`](Self::sums): 2 + 2H, or 2 + H + H(H+1)/2 for full statistics.
    pub fn len(latents: usize, full: bool) -> usize {
        SUM + latents + if full { latents * (latents + 1) / 2 } else { latents }
    }

    /// Number of columns, H.
    pub fn latents(&self) -> usize {
        self.latents
    }
    /// Whether all comoments are kept.
    pub fn is_full(&self) -> bool {
        self.full
    }
    /// Rows summed so far, N.
    pub fn count(&self) -> u64 {
        self.sums[0] as u64
    }
    /// Σ ℓ_n.
    pub fn row_loss_sum(&self) -> f64 {
        self.sums[ROW_LOSS]
    }
    /// The shift c \[H\].
    pub fn shift(&self) -> &[f64] {
        &self.shift
    }
    /// Everything that adds up: N, Σℓ, Σ(a − c) \[H\], then Σ(a − c)² \[H\] or the rows of the upper triangle of Σ(a − c)(a − c)ᵀ.
    pub fn sums(&self) -> &[f64] {
        &self.sums
    }
    /// The same, to be summed in place over ranks that share the shift.
    pub fn sums_mut(&mut self) -> &mut [f64] {
        &mut self.sums
    }
    /// Σ(a − c) \[H\].
    pub fn sum(&self) -> &[f64] {
        &self.sums[SUM..SUM + self.latents]
    }

    /// Where Σ(a_i − c_i)(a_j − c_j) stands in the sums, i ≤ j.
    fn index(&self, i: usize, j: usize) -> usize {
        debug_assert!(i <= j && j < self.latents && (self.full || i == j));
        self.kind().products(i).start + j - i
    }

    /// Σ(a_i − c_i)(a_j − c_j); without comoments only i = j is known.
    ///
    /// # Panics
    /// If i ≠ j and the statistics are not full.
    pub fn comoment(&self, i: usize, j: usize) -> f64 {
        assert!(self.full || i == j, "only full statistics know the comoment of two columns");
        self.sums[self.index(i.min(j), i.max(j))]
    }

    /// Adds one row with its row loss.
    ///
    /// # Panics
    /// If the row does not have H elements.
    pub fn add_row(&mut self, row_loss: f64, row: &[f64]) {
        assert_eq!(row.len(), self.latents);
        let centred: Vec<f64> = row.iter().zip(&self.shift).map(|(a, c)| a - c).collect();
        self.sums[0] += 1.0;
        self.sums[ROW_LOSS] += row_loss;
        for i in 0..self.latents {
            self.sums[SUM + i] += centred[i];
            for j in i..if self.full { self.latents } else { i + 1 } {
                let at = self.index(i, j);
                self.sums[at] += centred[i] * centred[j];
            }
        }
    }

    /// Moves the shift: with δ = c − c', Σ(a − c') = Σ(a − c) + Nδ and S' = S + δ sumᵀ + sum δᵀ + N δ δᵀ.
    ///
    /// # Panics
    /// If `shift` does not have H elements.
    pub fn rebase(&mut self, shift: &[f64]) {
        assert_eq!(shift.len(), self.latents);
        let count = self.sums[0];
        let delta: Vec<f64> = self.shift.iter().zip(shift).map(|(old, new)| old - new).collect();
        let (sum, mut products) = self.sums[SUM..].split_at_mut(self.latents);
        for i in 0..self.latents {
            let (row, rest) = products.split_at_mut(if self.full { self.latents - i } else { 1 });
            let (delta_i, sum_i) = (delta[i], sum[i] + count * delta[i]);
            for ((product, sum_j), delta_j) in row.iter_mut().zip(&sum[i..]).zip(&delta[i..]) {
                *product += delta_i * sum_j + sum_i * delta_j;
            }
            products = rest;
        }
        for (sum, delta) in sum.iter_mut().zip(&delta) {
            *sum += count * delta;
        }
        self.shift.copy_from_slice(shift);
    }

    /// Sets the shift, of sums that are about to be replaced.
    pub(crate) fn set_shift(&mut self, shift: Vec<f64>) {
        debug_assert_eq!(shift.len(), self.latents);
        self.shift = shift;
    }

    /// Moves the shift to the nearest that `T` holds.
    pub(crate) fn round_shift<T: Element>(&mut self) -> &Self {
        if !self.has_shift_of::<T>() {
            let rounded: Vec<f64> = self.shift.iter().map(|c| T::from_f64(*c).to_f64()).collect();
            self.rebase(&rounded);
        }
        self
    }

    /// Whether `T` holds the shift.
    pub(crate) fn has_shift_of<T: Element>(&self) -> bool {
        self.shift.iter().all(|c| T::from_f64(*c).to_f64() == *c)
    }

    /// Adds the other's rows, whatever its shift.
    ///
    /// # Errors
    /// [`Error::Statistics`] if widths or kinds differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.kind() != other.kind() {
            return Err(Error::Statistics { expected: self.kind().to_string(), found: other.kind().to_string() });
        }
        if other.shift == self.shift {
            self.add(other);
        } else if self.count() == 0 {
            *self = other.clone();
        } else {
            let mut other = other.clone();
            other.rebase(&self.shift);
            self.add(&other);
        }
        Ok(())
    }

    fn add(&mut self, other: &Self) {
        for (sum, term) in self.sums.iter_mut().zip(&other.sums) {
            *sum += term;
        }
    }

    /// Their width, and whether all comoments are kept.
    pub(crate) fn kind(&self) -> Kind {
        Kind { latents: self.latents, full: self.full }
    }

    /// μ \[H\]; NaN for no rows.
    pub fn mean(&self) -> Vec<f64> {
        self.shift.iter().zip(self.sum()).map(|(c, sum)| c + sum / self.sums[0]).collect()
    }

    /// Unbiased covariance of columns i and j; NaN for fewer than 2 rows.
    ///
    /// # Panics
    /// As [`comoment`](Self::comoment).
    pub fn covariance(&self, i: usize, j: usize) -> f64 {
        let n = self.sums[0];
        if n < 2.0 {
            return f64::NAN;
        }
        let (sum_i, sum_j) = (self.sums[SUM + i], self.sums[SUM + j]);
        let covariance = (self.comoment(i, j) - sum_i * sum_j / n) / (n - 1.0);
        if i == j && covariance < 0.0 { 0.0 } else { covariance }
    }

    /// Unbiased variance of column j; NaN for fewer than 2 rows.
    pub fn variance(&self, j: usize) -> f64 {
        self.covariance(j, j)
    }

    /// C_ij = cov_ij/(s_i s_j), s = √v + 1e-8.
    ///
    /// # Panics
    /// As [`comoment`](Self::comoment).
    pub fn correlation(&self, i: usize, j: usize) -> f64 {
        let deviation = |k| self.variance(k).sqrt() + 1e-8;
        self.covariance(i, j) / (deviation(i) * deviation(j))
    }
}
