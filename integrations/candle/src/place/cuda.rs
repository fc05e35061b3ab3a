//! CUDA devices: candle's stream and buffers, which are cudarc's.
//!
//! Not yet run on hardware.

use super::{Place, PlaceId, Value, unexpected};
use crate::error::Result;
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage};
use candle_core::{Storage, cuda_backend::cudarc::driver};
use driver::{CudaSlice, DeviceRepr, ValidAsZeroBits};
use sae_kernels::{Cuda, CudaElement, CudaRef, CudaRefMut};
use std::marker::PhantomData;

pub(crate) trait OnDevices: CudaDType + DeviceRepr + ValidAsZeroBits {}
impl<T: CudaDType + DeviceRepr + ValidAsZeroBits> OnDevices for T {}

/// A CUDA device of candle's.
#[derive(Clone)]
pub(crate) struct OnCuda<E>(CudaDevice, PhantomData<fn() -> E>);

impl<E> OnCuda<E> {
    pub(crate) fn new(device: &CudaDevice) -> Self {
        Self(device.clone(), PhantomData)
    }
}

impl<E: CudaElement + Value> Place for OnCuda<E> {
    type Stored = E;
    type Real = f32;
    type Backend = Cuda<E>;
    type Array<T: Value> = CudaSlice<T>;

    fn id(&self) -> PlaceId {
        Some((self.0.id(), std::thread::current().id()))
    }
    fn backend(&self) -> sae_kernels::Result<Cuda<E>> {
        Cuda::on_stream(self.0.cuda_stream())
    }
    fn alloc<T: Value>(&self, _: &Cuda<E>, len: usize) -> Result<CudaSlice<T>> {
        // The driver has no buffers without elements.
        Ok(self.0.alloc_zeros(len.max(1))?)
    }
    fn read<'a, T: Value>(&self, backend: &Cuda<E>, storage: &'a Storage) -> Result<CudaRef<'a, T>> {
        match storage {
            Storage::Cuda(storage) => Ok(backend.view(storage.as_cuda_slice::<T>()?)?),
            other => Err(unexpected(other)),
        }
    }
    fn write<'a, T: Value>(&self, backend: &Cuda<E>, array: &'a mut CudaSlice<T>) -> Result<CudaRefMut<'a, T>> {
        Ok(backend.view_mut(array)?)
    }
    fn storage<T: Value>(&self, array: CudaSlice<T>) -> Storage {
        Storage::Cuda(CudaStorage::wrap_cuda_slice(array, self.0.clone()))
    }
}
