//! Tensors as arguments: which types there are kernels for, what is refused, and how the others are read.

use crate::error::{Error, Result};
use crate::node::on_cpu;
use candle_core::{DType, DeviceLocation, Layout, Storage, Tensor, WithDType};
use sae_kernels::{Backend, Cpu, Element, Host, MatRef, Reference, bf16, f16};

/// A type of elements that there are kernels for.
pub(crate) trait Stored: Element + WithDType {
    /// Type of biases, gradients of parameters, row losses and responsibilities.
    type Real: Element + WithDType;
    type Backend: Backend<Memory = Host, Element = Self, Real = Self::Real> + 'static;
    /// On rayon's current threads.
    fn backend() -> sae_kernels::Result<Self::Backend>;
}

macro_rules! on_cpu_kernels {
    ($($type:ty)*) => { $(
        impl Stored for $type {
            type Real = f32;
            type Backend = Cpu<$type>;
            fn backend() -> sae_kernels::Result<Self::Backend> {
                Cpu::new()
            }
        }
    )* };
}
on_cpu_kernels!(f32 bf16 f16);

impl Stored for f64 {
    type Real = f64;
    type Backend = Reference;
    fn backend() -> sae_kernels::Result<Self::Backend> {
        Ok(Reference)
    }
}

/// Evaluates an expression in which `$stored` is the type of the tensor's elements.
macro_rules! for_type_of {
    ($name:expr, $tensor:expr, $stored:ident => $body:expr) => {
        match $tensor.dtype() {
            DType::F32 => {
                type $stored = f32;
                $body
            }
            DType::BF16 => {
                type $stored = sae_kernels::bf16;
                $body
            }
            DType::F16 => {
                type $stored = sae_kernels::f16;
                $body
            }
            DType::F64 => {
                type $stored = f64;
                $body
            }
            found => Err(Error::DType { name: $name, found }),
        }
    };
}
pub(crate) use for_type_of;

fn check_location(name: &'static str, found: DeviceLocation) -> Result<()> {
    if found == DeviceLocation::Cpu { Ok(()) } else { Err(Error::Device { name, found }) }
}

/// Rows and columns of a matrix on the CPU, of any type.
pub(crate) fn check_matrix(name: &'static str, tensor: &Tensor, expected: &str) -> Result<(usize, usize)> {
    check_location(name, tensor.device().location())?;
    let found = tensor.shape();
    found.dims2().map_err(|_| Error::Shape { name, found: found.clone(), expected: format!("a matrix {expected}") })
}

/// A tensor on the CPU of just this shape and one of these types.
pub(crate) fn check_like(
    name: &'static str,
    tensor: &Tensor,
    dims: &[usize],
    expected: &str,
    dtypes: &[DType],
) -> Result<()> {
    check_location(name, tensor.device().location())?;
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

/// What [`with_dense_rows`] has returned.
pub(crate) fn rows<'a, T: Stored>(storage: &'a Storage, layout: &Layout) -> Result<MatRef<'a, T>> {
    let ((rows, cols), stride) = (layout.shape().dims2()?, layout.stride());
    let elements = &T::cpu_storage_as_slice(on_cpu(storage)?)?[layout.start_offset()..];
    let row_stride = if rows > 1 { stride[0] } else { cols };
    Ok(MatRef::with_stride(elements, rows, cols, row_stride)?)
}

/// The elements of a contiguous tensor.
pub(crate) fn elements<'a, T: WithDType>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    let all = T::cpu_storage_as_slice(on_cpu(storage)?)?;
    Ok(&all[layout.start_offset()..][..layout.shape().elem_count()])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// There is no other device here to make a tensor on.
    #[test]
    fn other_devices_are_refused_by_name() {
        check_location("x", DeviceLocation::Cpu).expect("the CPU");
        for found in [DeviceLocation::Cuda { gpu_id: 1 }, DeviceLocation::Metal { gpu_id: 0 }] {
            let error = check_location("x", found).expect_err("no CPU");
            assert!(matches!(error, Error::Device { name: "x", found: at } if at == found));
            assert!(error.to_string().contains("x.to_device(&Device::Cpu)"), "{error}");
        }
    }

    #[test]
    fn rows_are_read_where_they_lie() -> Result<()> {
        let wide = Tensor::arange(0f32, 300.0, &candle_core::Device::Cpu)?.reshape((10, 30))?;
        let part = wide.narrow(1, 3, 17)?;
        let read = with_dense_rows(&part)?;
        let (storage, layout) = read.storage_and_layout();
        let (whole, _) = wide.storage_and_layout();
        let view = rows::<f32>(&storage, layout)?;
        assert_eq!((view.rows(), view.cols(), view.row_stride()), (10, 17, 30));
        assert_eq!(view.data().as_ptr(), f32::cpu_storage_as_slice(on_cpu(&whole)?)?[3..].as_ptr(), "a copy");
        // Columns that do not touch, and rows that are one and the same, are copied.
        for other in [wide.t()?, wide.narrow(0, 0, 1)?.broadcast_as((10, 30))?] {
            assert!(with_dense_rows(&other)?.is_contiguous());
        }
        Ok(())
    }
}
