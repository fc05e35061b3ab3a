//! An epilogue of the product on tiles that are read instead of computed: `kernels/pointwise.cuh`.

use super::Core;
use super::driver::Argument;
use super::gemm::{Extents, THREADS, TILE_BYTES, blocks, extent};
use super::memory::View;
use crate::error::Result;
use bytemuck::{Pod, Zeroable};

/// `Pointwise` of `kernels/pointwise.cuh`, up to the epilogue.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
struct Pointwise {
    source: View,
    rows: i32,
    cols: i32,
}

impl Core {
    /// `source`, or zeros where it is [`View::NONE`], with an epilogue.
    pub(super) fn pointwise<T: Pod>(
        &self,
        kernel: &'static str,
        source: View,
        [rows, cols]: [usize; 2],
        epilogue: &T,
    ) -> Result<()> {
        let pointwise = Pointwise { source, rows: extent(rows)?, cols: extent(cols)? };
        let grid = [blocks(Extents::full(rows, cols, 0).tiles())?, 1];
        self.launch(kernel, grid, THREADS, TILE_BYTES, Argument::new(&pointwise).then(epilogue))
    }
}
