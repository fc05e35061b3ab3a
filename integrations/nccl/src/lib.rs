//! Sums of the decoder-free autoencoder's statistics and gradients over the GPUs of a NCCL communicator that the host has made.
//!
//! **Not yet run on hardware.** The tests have a library of their own in NCCL's place: it shows that the right functions are called with the
//! right arguments, and that their errors come back.
//!
//! NCCL's library is looked for when the program runs; nothing of it is needed to build. Neither statistics nor gradients leave the devices. A step whose
//! rows are spread over ranks:
//!
//! ```no_run
//! use sae_kernels::{Backend, Cuda, CudaBuffer, CudaMemory, DecoderFree, DecoderFreeStep, Losses, Mat, MatMut, Memory, Shape, Slice};
//! use sae_kernels_nccl::{Error, Ranks};
//!
//! /// `gradients`: ∂L/∂W \[H·D\] and ∂L/∂b \[H\]. `statistics`: as many numbers as [`Statistics::len`](sae_kernels::Statistics::len) says.
//! fn step(
//!     ranks: &Ranks<f32>,
//!     model: &mut DecoderFree<Cuda>,
//!     (x, weight, bias): (Mat<'_, Cuda, f32>, Mat<'_, Cuda, f32>, Slice<'_, Cuda, f32>),
//!     gradients: &mut [CudaBuffer<f32>; 2],
//!     statistics: &mut CudaBuffer<f64>,
//! ) -> Result<Losses, Error> {
//!     let Shape { inputs: d, latents: h, .. } = model.config().shape;
//!     // Both halves add to what they find.
//!     let [grad_weight, grad_bias] = gradients;
//!     model.backend().upload(&vec![0.0; h * d], CudaMemory::slice_mut(grad_weight))?;
//!     model.backend().upload(&vec![0.0; h], CudaMemory::slice_mut(grad_bias))?;
//!     let len = CudaMemory::len(&CudaMemory::slice(statistics));
//!     model.backend().upload(&vec![0.0; len], CudaMemory::slice_mut(statistics))?;
//!
//!     // All ranks sum about the same shift: 0, where means are less than some thousand deviations from 0; else the last step's mean.
//!     model.statistics_packed(x, weight, bias, None, CudaMemory::slice_mut(statistics))?;
//!     ranks.sum(CudaMemory::slice_mut(statistics))?;
//!     let step = DecoderFreeStep {
//!         x,
//!         weight,
//!         bias,
//!         grad_weight: MatMut::from_memory(CudaMemory::slice_mut(grad_weight), h, d, d)?,
//!         grad_bias: CudaMemory::slice_mut(grad_bias),
//!         grad_x: None,
//!         activations: None,
//!         row_loss: None,
//!     };
//!     // The weight term is no sum over rows: one rank adds it.
//!     model.backward_packed(step, None, CudaMemory::slice(statistics), ranks.rank() == 0)?;
//!     ranks.sum(CudaMemory::slice_mut(grad_weight))?;
//!     ranks.sum(CudaMemory::slice_mut(grad_bias))?;
//!     Ok(model.losses()?)
//! }
//! ```
//!
//! What is not there: a check that all ranks have the same shapes and objective (ranks that do not sum different numbers, or wait for ever), and
//! a watch over the other ranks (as in any use of NCCL, the host asks `ncclCommGetAsyncError`). The order in which NCCL adds is its own: it
//! depends on how the GPUs are connected, and nothing is promised of bits.

mod library;

pub use library::Nccl;

use sae_kernels::{Cuda, CudaElement, CudaMemory, CudaRefMut, Element, Memory};
use std::ffi::{c_int, c_void};
use std::ptr;

/// Why a sum over GPUs failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The library is not on this machine.
    #[error(
        "{library} does not load ({reason}); install NCCL 2 (libnccl2 of a distribution, or nvidia-nccl-cu13 of PyPI) and name its folder in \
         LD_LIBRARY_PATH, or its file in Nccl::open"
    )]
    NoLibrary {
        /// The file.
        library: String,
        /// What the loader said.
        reason: String,
    },
    /// The library is another one.
    #[error("{library} has no {symbol}, so it is not NCCL 2; name the right file")]
    NoSymbol {
        /// The file.
        library: String,
        /// The function that it lacks.
        symbol: &'static str,
    },
    /// The communicator is NULL.
    #[error("the communicator is NULL; make it with ncclCommInitRank first")]
    NullCommunicator,
    /// The communicator is of another GPU than the backend.
    #[error(
        "the communicator is of CUDA device {communicator}, but the backend of device {backend}; make both on the same"
    )]
    OtherDevice {
        /// Device of the communicator.
        communicator: c_int,
        /// Device of the backend.
        backend: usize,
    },
    /// A call that returned before it was done.
    #[error("{call} is still in progress: the communicator does not block; make it with the default configuration")]
    InProgress {
        /// The function.
        call: &'static str,
    },
    /// A call of NCCL's failed.
    #[error("{call} failed: {reason} (error {code}); NCCL_DEBUG=WARN in the environment has NCCL say more")]
    Nccl {
        /// The function.
        call: &'static str,
        /// `ncclResult_t`.
        code: c_int,
        /// `ncclGetErrorString`.
        reason: String,
    },
    /// The backend failed.
    #[error(transparent)]
    Kernels(#[from] sae_kernels::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The ranks of a communicator, and this one's GPU.
///
/// All sums go to the backend's stream, after what was enqueued there before. To sum on a stream of the host's, make the backend on it:
/// [`Cuda::on_stream`].
pub struct Ranks<E: CudaElement> {
    nccl: Nccl,
    cuda: Cuda<E>,
    communicator: *mut c_void,
    rank: usize,
    size: usize,
}

impl<E: CudaElement> Ranks<E> {
    /// Takes a communicator that the host has made, and goes on to own.
    ///
    /// # Errors
    /// [`Error::NullCommunicator`], [`Error::OtherDevice`], [`Error::InProgress`], [`Error::Nccl`].
    ///
    /// # Safety
    /// `communicator` is NULL or a `ncclComm_t` that `nccl`'s library has made, and outlives this.
    pub unsafe fn new(nccl: Nccl, communicator: *mut c_void, cuda: Cuda<E>) -> Result<Self> {
        if communicator.is_null() {
            return Err(Error::NullCommunicator);
        }
        // SAFETY: a communicator, as the caller promises.
        let (rank, size, device) =
            unsafe { (nccl.rank(communicator)?, nccl.size(communicator)?, nccl.device(communicator)?) };
        if let Some(stream) = cuda.stream() {
            check_device(device, stream.context().ordinal())?;
        }
        Ok(Self { nccl, cuda, communicator, rank, size })
    }

    /// Number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Replaces `values`, as many on every rank, by their sums over ranks: gradients in f32, packed statistics in f64. Only enqueues.
    ///
    /// # Errors
    /// [`Error::InProgress`], [`Error::Nccl`], [`Error::Kernels`].
    pub fn sum<T: Summed>(&self, values: CudaRefMut<'_, T>) -> Result<()> {
        let len = CudaMemory::len_mut(&values);
        if len == 0 {
            return Ok(());
        }
        let stream = match self.cuda.stream() {
            None => ptr::null_mut(),
            Some(stream) => {
                let failed = |error: sae_kernels::cudarc::driver::DriverError| sae_kernels::Error::Device {
                    call: "binding the context",
                    reason: error.to_string(),
                };
                stream.context().bind_to_thread().map_err(failed)?;
                stream.cu_stream().cast()
            }
        };
        // SAFETY: so many numbers of the device's memory, borrowed for writing, and the communicator that `new` was given.
        unsafe { self.nccl.all_reduce(values.address(), len, T::DATA_TYPE, self.communicator, stream) }
    }
}

/// What is summed: `f32` and `f64`.
pub trait Summed: Element {
    /// `ncclDataType_t`.
    #[doc(hidden)]
    const DATA_TYPE: c_int;
}
impl Summed for f32 {
    const DATA_TYPE: c_int = 7;
}
impl Summed for f64 {
    const DATA_TYPE: c_int = 8;
}

fn check_device(communicator: c_int, backend: usize) -> Result<()> {
    if usize::try_from(communicator) == Ok(backend) {
        Ok(())
    } else {
        Err(Error::OtherDevice { communicator, backend })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn communicator_and_backend_are_of_one_device() {
        assert_eq!(check_device(1, 1), Ok(()));
        for (communicator, backend) in [(0, 1), (1, 0), (-1, 0)] {
            assert_eq!(check_device(communicator, backend), Err(Error::OtherDevice { communicator, backend }));
        }
    }
}
