//! Sums of the decoder-free autoencoder's statistics and gradients over the GPUs of a NCCL communicator that the host has made.
//!
//! **Not yet run on hardware.** The tests have a library of their own in NCCL's place: it shows that the right functions are called with the
//! right arguments, and that their errors come back.
//!
//! NCCL's library is looked for when the program runs; nothing of it is needed to build. Statistics are in the host's memory today, as
//! [`DecoderFree::statistics`](sae_kernels::DecoderFree::statistics) leaves them there: they are copied to the device, summed and copied back.
//! Gradients never leave the device. A step whose rows are spread over ranks:
//!
//! ```no_run
//! use sae_kernels::{
//!     Backend, Cuda, CudaBuffer, CudaMemory, DecoderFree, DecoderFreeStep, Losses, Mat, MatMut, Memory, Shape, Slice, Statistics,
//! };
//! use sae_kernels_nccl::{Error, Ranks};
//!
//! /// `gradients`: ∂L/∂W \[H·D\] and ∂L/∂b \[H\]. `mean` \[H\]: of the last step's activations, zeros at first.
//! fn step(
//!     ranks: &mut Ranks<f32>,
//!     model: &mut DecoderFree<Cuda>,
//!     (x, weight, bias): (Mat<'_, Cuda, f32>, Mat<'_, Cuda, f32>, Slice<'_, Cuda, f32>),
//!     gradients: &mut [CudaBuffer<f32>; 2],
//!     mean: &mut Vec<f64>,
//! ) -> Result<Losses, Error> {
//!     let (Shape { inputs: d, latents: h, .. }, objective) = (model.config().shape, model.config().objective);
//!     let mut statistics = Statistics::new(h, objective.lambda_tc != 0.0);
//!     model.statistics(x, weight, bias, &mut statistics)?;
//!     ranks.sum_statistics(&mut statistics, mean)?;
//!     *mean = statistics.mean();
//!
//!     // The second half adds to the gradients that it finds. The weight term is no sum over rows: one rank adds it.
//!     let [grad_weight, grad_bias] = gradients;
//!     model.backend().upload(&vec![0.0; h * d], CudaMemory::slice_mut(grad_weight))?;
//!     model.backend().upload(&vec![0.0; h], CudaMemory::slice_mut(grad_bias))?;
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
//!     model.backward(step, &statistics, ranks.rank() == 0)?;
//!     ranks.sum_gradients(CudaMemory::slice_mut(grad_weight))?;
//!     ranks.sum_gradients(CudaMemory::slice_mut(grad_bias))?;
//!     Ok(model.losses()?)
//! }
//! ```
//!
//! What is not there: a check that all ranks have the same shapes and objective (ranks that do not sum different numbers, or wait for ever), and
//! a watch over the other ranks (as in any use of NCCL, the host asks `ncclCommGetAsyncError`). The order in which NCCL adds is its own: it
//! depends on how the GPUs are connected, and nothing is promised of bits.

mod library;

pub use library::Nccl;

use sae_kernels::{Backend, Cuda, CudaBuffer, CudaElement, CudaMemory, CudaRefMut, Memory, Statistics};
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
    /// The shift does not have as many numbers as there are latents.
    #[error("the shift has {found} numbers, but the statistics are of {expected} latents")]
    Shift {
        /// Numbers needed.
        expected: usize,
        /// Numbers passed.
        found: usize,
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
    /// Statistics on the device; made when first needed.
    staging: Option<CudaBuffer<f64>>,
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
        Ok(Self { nccl, cuda, communicator, rank, size, staging: None })
    }

    /// Number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Replaces `gradients`, as many on every rank, by their sums over ranks, in f32. Only enqueues.
    ///
    /// # Errors
    /// [`Error::InProgress`], [`Error::Nccl`].
    pub fn sum_gradients(&self, gradients: CudaRefMut<'_, f32>) -> Result<()> {
        // SAFETY: so many numbers of the device's memory, borrowed for writing.
        unsafe { self.sum::<f32>(gradients.address(), CudaMemory::len_mut(&gradients)) }
    }

    /// Replaces `statistics` by those of all ranks' rows, in f64. Waits.
    ///
    /// `shift` \[H\]: what all ranks' statistics are to be about, the same on all of them: sums about different shifts do not add up. Near the
    /// mean no digits are lost, so the last step's mean is good; zeros do where means are less than some thousand deviations from 0.
    ///
    /// # Errors
    /// [`Error::Shift`], [`Error::InProgress`], [`Error::Nccl`], [`Error::Kernels`] where the device has no memory left.
    pub fn sum_statistics(&mut self, statistics: &mut Statistics, shift: &[f64]) -> Result<()> {
        if shift.len() != statistics.latents() {
            return Err(Error::Shift { expected: statistics.latents(), found: shift.len() });
        }
        statistics.rebase(shift);
        let sums = statistics.sums_mut();
        let len = sums.len();
        let mut staging = match self.staging.take() {
            Some(staging) if CudaMemory::len(&CudaMemory::slice(&staging)) >= len => staging,
            _ => self.cuda.alloc::<f64>(len)?,
        };
        let on_device = CudaMemory::part_mut(CudaMemory::slice_mut(&mut staging), 0..len);
        let address = on_device.address();
        self.cuda.upload(sums, on_device)?;
        // SAFETY: so many numbers of a buffer of ours.
        unsafe { self.sum::<f64>(address, len)? };
        self.cuda.download(CudaMemory::part(CudaMemory::slice(&staging), 0..len), sums)?;
        self.staging = Some(staging);
        Ok(())
    }

    /// # Safety
    /// `address` is that of `len` numbers in the device's memory, which nobody else uses.
    unsafe fn sum<T: Summed>(&self, address: u64, len: usize) -> Result<()> {
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
        // SAFETY: the caller's promise, and the communicator that `new` was given.
        unsafe { self.nccl.all_reduce(address, len, T::DATA_TYPE, self.communicator, stream) }
    }
}

/// What is summed.
trait Summed {
    /// `ncclDataType_t`.
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
