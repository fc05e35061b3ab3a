//! Plain matrix products and column sums.

use super::check_slice_mut;
use crate::backend::{Backend, Mat, MatOut, SliceMut};
use crate::error::Result;

/// Which operand of a product is transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// left \[m,k\] · right \[k,n\]: dx = dZ W.
    Nn,
    /// left \[m,k\] · right \[n,k\]ᵀ.
    Nt,
    /// left \[k,m\]ᵀ · right \[k,n\]: dW = dZᵀ x.
    Tn,
}

/// out = left · right, or out += left · right, with either operand transposed as `layout` says.
pub struct Product<'a, B: Backend + ?Sized> {
    /// Which operand is transposed.
    pub layout: Layout,
    /// \[m,k\], or \[k,m\] in [`Layout::Tn`].
    pub left: Mat<'a, B, B::Element>,
    /// \[k,n\], or \[n,k\] in [`Layout::Nt`].
    pub right: Mat<'a, B, B::Element>,
    /// Whether to add to `out` or to overwrite it.
    pub accumulate: bool,
    /// \[m,n\].
    pub out: MatOut<'a, B, B::Real>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> Product<'_, B> {
    /// Checks shapes and returns (m, n, k).
    pub fn check(&self) -> Result<(usize, usize, usize)> {
        let (m, k) = match self.layout {
            Layout::Nn | Layout::Nt => (self.left.rows(), self.left.cols()),
            Layout::Tn => (self.left.cols(), self.left.rows()),
        };
        let n = match self.layout {
            Layout::Nn | Layout::Tn => {
                self.right.expect("right", k, self.right.cols())?;
                self.right.cols()
            }
            Layout::Nt => {
                self.right.expect("right", self.right.rows(), k)?;
                self.right.rows()
            }
        };
        self.out.expect("out", m, n)?;
        Ok((m, n, k))
    }
}

/// sums_j = Σ_n m_nj: the gradient of a bias.
pub struct ColumnSums<'a, B: Backend + ?Sized> {
    /// \[N,H\].
    pub matrix: Mat<'a, B, B::Element>,
    /// Whether to add to `sums` or to overwrite it.
    pub accumulate: bool,
    /// \[H\].
    pub sums: SliceMut<'a, B, B::Real>,
    /// Scratch.
    pub workspace: SliceMut<'a, B, f64>,
}

impl<B: Backend + ?Sized> ColumnSums<'_, B> {
    /// Checks shapes and returns (N, H).
    pub fn check(&self) -> Result<(usize, usize)> {
        check_slice_mut::<B, _>("sums", self.matrix.cols(), &self.sums)?;
        Ok((self.matrix.rows(), self.matrix.cols()))
    }
}
