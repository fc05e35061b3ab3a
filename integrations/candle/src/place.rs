//! Where a call computes, and on which type: the memory of tensors as operands and results of the kernels.

#[cfg(feature = "cuda")]
mod cuda;

#[cfg(feature = "cuda")]
pub(crate) use cuda::OnCuda;

use crate::error::{Error, Result};
use candle_core::cuda::DeviceId;
use candle_core::{DType, DeviceLocation, Shape, Storage, Tensor, WithDType};
use sae_kernels::{Backend, Cpu, Element, Reference, Slice, SliceMut, bf16, f16};
use std::marker::PhantomData;
use std::thread::ThreadId;

/// A type of elements that candle and the kernels have in common.
pub(crate) trait Value: Element + WithDType + OnDevices {}
impl<T: Element + WithDType + OnDevices> Value for T {}

/// What memory of a CUDA device asks of its elements.
#[cfg(not(feature = "cuda"))]
pub(crate) trait OnDevices {}
#[cfg(not(feature = "cuda"))]
impl<T> OnDevices for T {}
#[cfg(feature = "cuda")]
pub(crate) use cuda::OnDevices;

/// A device and the calling thread, as candle's stream of a device is another one in each thread; none for the CPU.
pub(crate) type PlaceId = Option<(DeviceId, ThreadId)>;

/// A device and a storage type that there are kernels for.
pub(crate) trait Place: Clone + Send + Sync + 'static {
    /// Type of x, weights and activations.
    type Stored: Value;
    /// Type of biases, gradients of parameters, row losses and responsibilities.
    type Real: Value;
    type Backend: Backend<Element = Self::Stored, Real = Self::Real> + 'static;
    /// What a result is written to, before it is a tensor.
    type Array<T: Value>;

    fn id(&self) -> PlaceId;
    /// With candle's stream, or rayon's current threads.
    fn backend(&self) -> sae_kernels::Result<Self::Backend>;
    /// So many elements.
    fn alloc<T: Value>(&self, backend: &Self::Backend, len: usize) -> Result<Self::Array<T>>;
    /// The elements of the memory that a tensor lies in.
    fn read<'a, T: Value>(&self, backend: &Self::Backend, storage: &'a Storage) -> Result<Slice<'a, Self::Backend, T>>;
    fn write<'a, T: Value>(
        &self,
        backend: &Self::Backend,
        array: &'a mut Self::Array<T>,
    ) -> Result<SliceMut<'a, Self::Backend, T>>;
    fn storage<T: Value>(&self, array: Self::Array<T>) -> Storage;

    fn tensor<T: Value>(&self, array: Self::Array<T>, shape: impl Into<Shape>) -> Tensor {
        Tensor::from((self.storage(array), shape))
    }
}

/// Evaluates an expression with the place where a tensor lies.
macro_rules! at_place_of {
    ($name:expr, $tensor:expr, $place:ident => $body:expr) => {{
        use candle_core::{DType, Device};
        macro_rules! at {
            ($made:expr) => {{
                let $place = $made;
                $body
            }};
        }
        match ($tensor.device(), $tensor.dtype()) {
            (Device::Cpu, DType::F32) => at!($crate::place::OnCpu::<f32>::new()),
            (Device::Cpu, DType::BF16) => at!($crate::place::OnCpu::<sae_kernels::bf16>::new()),
            (Device::Cpu, DType::F16) => at!($crate::place::OnCpu::<sae_kernels::f16>::new()),
            (Device::Cpu, DType::F64) => at!($crate::place::OnCpu::<f64>::new()),
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), DType::F32) => at!($crate::place::OnCuda::<f32>::new(device)),
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), DType::BF16) => at!($crate::place::OnCuda::<sae_kernels::bf16>::new(device)),
            #[cfg(feature = "cuda")]
            (Device::Cuda(device), DType::F16) => at!($crate::place::OnCuda::<sae_kernels::f16>::new(device)),
            (device, found) => Err($crate::place::refused($name, device.location(), found)),
        }
    }};
}
pub(crate) use at_place_of;

/// Why there are no kernels for this tensor.
pub(crate) fn refused(name: &'static str, location: DeviceLocation, dtype: DType) -> Error {
    match location {
        DeviceLocation::Cpu => Error::DType { name, found: dtype, expected: "F32, BF16, F16 or F64" },
        DeviceLocation::Cuda { .. } if cfg!(feature = "cuda") => {
            Error::DType { name, found: dtype, expected: "F32, BF16 or F16 on a CUDA device" }
        }
        found => Error::Device { name, found },
    }
}

/// The CPU.
#[derive(Clone)]
pub(crate) struct OnCpu<T>(PhantomData<fn() -> T>);

impl<T> OnCpu<T> {
    pub(crate) fn new() -> Self {
        Self(PhantomData)
    }
}

macro_rules! on_cpu {
    ($($type:ty, $real:ty, $backend:ty, $make:expr;)*) => { $(
        impl Place for OnCpu<$type> {
            type Stored = $type;
            type Real = $real;
            type Backend = $backend;
            type Array<T: Value> = Vec<T>;

            fn id(&self) -> PlaceId {
                None
            }
            fn backend(&self) -> sae_kernels::Result<$backend> {
                $make
            }
            fn alloc<T: Value>(&self, backend: &$backend, len: usize) -> Result<Vec<T>> {
                Ok(backend.alloc(len)?)
            }
            fn read<'a, T: Value>(&self, _: &$backend, storage: &'a Storage) -> Result<&'a [T]> {
                match storage {
                    Storage::Cpu(storage) => Ok(T::cpu_storage_as_slice(storage)?),
                    other => Err(unexpected(other)),
                }
            }
            fn write<'a, T: Value>(&self, _: &$backend, array: &'a mut Vec<T>) -> Result<&'a mut [T]> {
                Ok(array)
            }
            fn storage<T: Value>(&self, array: Vec<T>) -> Storage {
                Storage::Cpu(T::to_cpu_storage_owned(array))
            }
        }
    )* };
}
on_cpu! {
    f32, f32, Cpu<f32>, Cpu::new();
    bf16, f32, Cpu<bf16>, Cpu::new();
    f16, f32, Cpu<f16>, Cpu::new();
    f64, f64, Reference, Ok(Reference);
}

/// Of a tensor whose device has been checked.
fn unexpected(storage: &Storage) -> Error {
    candle_core::Error::msg(format!("a tensor on {:?} where another device was expected", storage.device().location()))
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// There is no other device here to make a tensor on.
    #[test]
    fn other_devices_are_refused_by_name() {
        let metal = DeviceLocation::Metal { gpu_id: 0 };
        let error = refused("x", metal, DType::F32);
        assert!(matches!(error, Error::Device { name: "x", found } if found == metal));
        assert!(error.to_string().contains("x.to_device(&Device::Cpu)"), "{error}");
        let error = refused("x", DeviceLocation::Cuda { gpu_id: 1 }, DType::F64).to_string();
        assert!(error.contains(if cfg!(feature = "cuda") {
            "F32, BF16 or F16 on a CUDA device"
        } else {
            "feature `cuda`"
        }));
    }
}
