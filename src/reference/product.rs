//! [`Product`] and [`ColumnSums`].

use super::{Reference, dot};
use crate::error::Result;
use crate::operations::{ColumnSums, Layout, Product};

pub(super) fn product(mut args: Product<'_, Reference>) -> Result<()> {
    let (m, n, k) = args.check()?;
    let (left, right) = (args.left, args.right);
    for i in 0..m {
        for j in 0..n {
            let sum = match args.layout {
                Layout::Nn => dot(k, |l| left.row(i)[l], |l| right.row(l)[j]),
                Layout::Nt => dot(k, |l| left.row(i)[l], |l| right.row(j)[l]),
                Layout::Tn => dot(k, |l| left.row(l)[i], |l| right.row(l)[j]),
            };
            let before = if args.accumulate { args.out.row_mut(i)[j] } else { 0.0 };
            args.out.row_mut(i)[j] = before + sum;
        }
    }
    Ok(())
}

pub(super) fn column_sums(args: ColumnSums<'_, Reference>) -> Result<()> {
    let (n, h) = args.check()?;
    for j in 0..h {
        let before = if args.accumulate { args.sums[j] } else { 0.0 };
        args.sums[j] = before + (0..n).map(|row| args.matrix.row(row)[j]).sum::<f64>();
    }
    Ok(())
}
