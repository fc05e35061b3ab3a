//! Every way in which a call can fail.

use candle_core::{DType, DeviceLocation, Shape};

/// Error of a call. `?` turns it into a [`candle_core::Error`] where a function returns candle's result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor does not have the shape that is asked for, or that the other arguments ask for.
    #[error("{name} has shape {found:?}, but it must be {expected}")]
    Shape {
        /// Name of the argument.
        name: &'static str,
        /// Its shape.
        found: Shape,
        /// What it should be, in words.
        expected: String,
    },
    /// A tensor's elements are of a type that there are no kernels for.
    #[error("{name} is {found:?}, but it must be {expected}: use {name}.to_dtype(DType::F32)")]
    DType {
        /// Name of the argument.
        name: &'static str,
        /// Type of its elements.
        found: DType,
        /// Those there are kernels for, in words.
        expected: &'static str,
    },
    /// Two tensors must be of the same type.
    #[error("{name} is {found:?}, but x or the activations are {expected:?}: use {name}.to_dtype(DType::{expected:?})")]
    DTypeMismatch {
        /// Name of the argument.
        name: &'static str,
        /// Type of its elements.
        found: DType,
        /// Type they should be of.
        expected: DType,
    },
    /// A tensor is on a device that there are no kernels for.
    #[error(
        "{name} is on {found:?}, for which this build has no kernels: use {name}.to_device(&Device::Cpu), or the feature `cuda` for a CUDA device"
    )]
    Device {
        /// Name of the argument.
        name: &'static str,
        /// Where it is.
        found: DeviceLocation,
    },
    /// Two tensors must be on the same device, as candle made it: two that it made of one GPU have streams of their own.
    #[error(
        "{name} is on {found:?}, but x or the activations are on {expected:?}: use {name}.to_device(..), to the same `Device`"
    )]
    DeviceMismatch {
        /// Name of the argument.
        name: &'static str,
        /// Where it is.
        found: DeviceLocation,
        /// Where it should be.
        expected: DeviceLocation,
    },
    /// What the kernels refuse: an objective, too few rows, no latents.
    #[error(transparent)]
    Kernels(#[from] sae_kernels::Error),
    /// What candle refuses.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            error => Self::wrap(error),
        }
    }
}
