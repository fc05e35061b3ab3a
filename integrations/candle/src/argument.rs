//! Tensors as arguments: what is refused, and how the others are read; and memory for results.

use crate::error::{Error, Result};
use crate::place::{Place, Value};
use candle_core::{DType, Layout, StorageRef, Tensor};
use sae_kernels::{Backend, Mat, MatMut, MatOut, MatRef, Memory, Slice, SliceMut};

/// Rows and columns of a matrix of any type.
pub(crate) fn check_matrix(name: &'static str, tensor: &Tensor, expected: &str) -> Result<(usize, usize)> {
    let found = tensor.shape();
    found.dims2().map_err(|_| Error::Shape { name, found: found.clone(), expected: format!("a matrix {expected}") })
}

/// A tensor of just this shape and one of these types, on the device of another one.
pub(crate) fn check_like(
    name: &'static str,
    tensor: &Tensor,
    other: &Tensor,
    dims: &[usize],
    expected: &str,
    dtypes: &[DType],
) -> Result<()> {
    if !tensor.device().same_device(other.device()) {
        let (found, expected) = (tensor.device().location(), other.device().location());
        return Err(Error::DeviceMismatch { name, found, expected });
    }
    if tensor.dims() != dims {
        return Err(Error::Shape { name, found: tensor.shape().clone(), expected: format!("{dims:?}, {expected}") });
    }
    if !dtypes.contains(&tensor.dtype()) {
        return Err(Error::DTypeMismatch { name, found: tensor.dtype(), expected: dtypes[0] });
    }
    Ok(())
}

/// The matrix itself where the kernels can read it as it lies, with dense rows any distance apart, else a dense copy.
pub(crate) fn with_dense_rows(matrix: &Tensor) -> Result<Tensor> {
    let ((rows, cols), stride) = (matrix.dims2()?, matrix.stride());
    let readable = (cols <= 1 || stride[1] == 1) && (rows <= 1 || stride[0] >= cols);
    // What is read is no part of the graph.
    let matrix = matrix.detach();
    Ok(if readable { matrix } else { matrix.contiguous()? })
}

/// A tensor that is being read.
type Read<'t> = (StorageRef<'t>, &'t Layout);

/// Memory of tensors as a backend's operands and results.
pub(crate) struct At<'p, P: Place> {
    pub(crate) place: &'p P,
    pub(crate) backend: &'p P::Backend,
}

pub(crate) type MemoryOf<P> = <<P as Place>::Backend as Backend>::Memory;

impl<P: Place> At<'_, P> {
    /// What [`with_dense_rows`] has returned.
    pub(crate) fn rows<'a, T: Value>(&self, (storage, layout): &'a Read<'_>) -> Result<Mat<'a, P::Backend, T>> {
        let ((rows, cols), stride) = (layout.shape().dims2()?, layout.stride());
        let all = self.place.read::<T>(self.backend, storage)?;
        let end = MemoryOf::<P>::len::<T>(&all);
        let row_stride = if rows > 1 { stride[0] } else { cols };
        let data = MemoryOf::<P>::part::<T>(all, layout.start_offset()..end);
        Ok(MatRef::from_memory(data, rows, cols, row_stride)?)
    }

    /// The elements of a contiguous tensor.
    pub(crate) fn elements<'a, T: Value>(&self, (storage, layout): &'a Read<'_>) -> Result<Slice<'a, P::Backend, T>> {
        let (start, len) = (layout.start_offset(), layout.shape().elem_count());
        Ok(MemoryOf::<P>::part::<T>(self.place.read::<T>(self.backend, storage)?, start..start + len))
    }

    /// Room for a result, or none where it is not wanted.
    pub(crate) fn room<T: Value>(&self, wanted: bool, len: usize) -> Result<Option<P::Array<T>>> {
        wanted.then(|| self.place.alloc(self.backend, len)).transpose()
    }

    /// Such room as a dense matrix.
    pub(crate) fn matrix<'a, T: Value>(
        &self,
        room: &'a mut Option<P::Array<T>>,
        rows: usize,
        cols: usize,
    ) -> Result<Option<MatOut<'a, P::Backend, T>>> {
        let Some(array) = room else { return Ok(None) };
        Ok(Some(MatMut::from_memory(self.place.write(self.backend, array)?, rows, cols, cols)?))
    }

    /// Such room as so many elements.
    pub(crate) fn slice<'a, T: Value>(
        &self,
        room: &'a mut Option<P::Array<T>>,
        len: usize,
    ) -> Result<Option<SliceMut<'a, P::Backend, T>>> {
        let Some(array) = room else { return Ok(None) };
        Ok(Some(MemoryOf::<P>::part_mut::<T>(self.place.write(self.backend, array)?, 0..len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::OnCpu;
    use candle_core::{Storage, WithDType};

    #[test]
    fn rows_are_read_where_they_lie() -> Result<()> {
        let wide = Tensor::arange(0f32, 300.0, &candle_core::Device::Cpu)?.reshape((10, 30))?;
        let part = wide.narrow(1, 3, 17)?;
        let read = with_dense_rows(&part)?;
        let read = read.storage_and_layout();
        let (whole, _) = wide.storage_and_layout();
        let place = OnCpu::<f32>::new();
        let view = At { place: &place, backend: &place.backend()? }.rows::<f32>(&read)?;
        let Storage::Cpu(whole) = &*whole else { panic!("not on the CPU") };
        assert_eq!((view.rows(), view.cols(), view.row_stride()), (10, 17, 30));
        assert_eq!(view.data().as_ptr(), f32::cpu_storage_as_slice(whole)?[3..].as_ptr(), "a copy");
        // Columns that do not touch, and rows that are one and the same, are copied.
        for other in [wide.t()?, wide.narrow(0, 0, 1)?.broadcast_as((10, 30))?] {
            assert!(with_dense_rows(&other)?.is_contiguous());
        }
        Ok(())
    }
}
