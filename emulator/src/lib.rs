#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod arith;
mod clocks;
mod collective;
pub mod conformance;
mod decode;
mod defined;
mod device;
mod interp;
mod machine;
mod matrix;
mod memory;
pub mod mutate;
mod parse;
mod program;
mod report;
mod rng;
mod slots;
mod tensor_map;
mod wgmma;

pub use device::{
    Argument, Asynchronous, Attributes, Bytes, Device, DevicePointer, Grid, LaunchStats, Module, Options, Rounding,
    Schedule,
};
pub use report::{Fault, Place, Rule};
pub use tensor_map::{Swizzle, TensorElement, TensorMap, TensorMapError};

/// PTX that cannot be run: the line and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PTX line {line}: {reason}: {text}")]
pub struct LoadError {
    /// Line of the PTX text, 0 if none.
    pub line: u32,
    /// The statement.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}
