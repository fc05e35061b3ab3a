//! What the host code asks of a device. Hardware answers through cudarc; tests answer with an emulator.

use crate::error::Result;
use bytemuck::Pod;

/// A device: memory, copies and launches, all in the order of one stream.
///
/// Addresses are the device's. Only a launch never waits.
pub trait Driver: Send + Sync {
    /// Zeroed memory, aligned to 256 bytes; `bytes` is not 0.
    fn alloc(&self, bytes: usize) -> Result<u64>;
    /// Gives memory back, once all that was enqueued before is done with it.
    ///
    /// # Safety
    /// `address` is from [`alloc`](Self::alloc) and used no more.
    unsafe fn free(&self, address: u64);
    /// Copies from the host; `source` may change once this returns.
    ///
    /// # Safety
    /// The target is memory of this device.
    unsafe fn upload(&self, source: &[u8], target: u64) -> Result<()>;
    /// Copies to the host, once all that was enqueued before is done, and waits for it.
    ///
    /// # Safety
    /// The source is memory of this device.
    unsafe fn download(&self, source: u64, target: &mut [u8]) -> Result<()>;
    /// Enqueues a kernel.
    ///
    /// # Safety
    /// The arguments are of the kernel's type, and its addresses are memory of this device.
    unsafe fn launch(&self, launch: &Launch) -> Result<()>;
    /// For messages.
    fn name(&self) -> String;
}

/// A kernel with its geometry and argument.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// Name of the kernel, one of [`FAMILIES`](super::image::FAMILIES).
    pub kernel: &'static str,
    /// Blocks along x and y; neither is 0.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// The argument struct.
    pub argument: Argument,
}

/// A kernel's only argument: a struct by value.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(16))]
pub struct Argument {
    bytes: [u8; Self::CAPACITY],
    len: usize,
}

impl Argument {
    const CAPACITY: usize = 256;

    pub(super) fn new<T: Pod>(value: &T) -> Self {
        Self { bytes: [0; Self::CAPACITY], len: 0 }.then(value)
    }

    /// Appends a field; all fields are multiples of 8 bytes.
    pub(super) fn then<T: Pod>(mut self, value: &T) -> Self {
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let value = bytemuck::bytes_of(value);
        self.bytes[self.len..self.len + value.len()].copy_from_slice(value);
        self.len += value.len();
        self
    }

    /// The struct as the kernel sees it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
