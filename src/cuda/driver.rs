//! What the host code asks of a device. Hardware answers through cudarc; tests answer with an emulator.

use super::schedule::Schedule;
use crate::error::Result;
use crate::operations::Layout;
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
    /// Which mainloop the products of this device's kernels have.
    fn mainloop(&self) -> Mainloop;
    /// Blocks of a cooperative launch of [`tiny_step`](super::image::FAMILIES) that certainly run at the same time; 0 where the device has
    /// no such launches.
    fn cooperative_blocks(&self) -> u32 {
        0
    }
    /// What bulk copies need to know of a tensor; asked for only under [`Mainloop::Sm90`].
    fn tensor_map(&self, tensor: &Tensor) -> Result<TensorMap>;
    /// Enqueues a kernel.
    ///
    /// # Safety
    /// The arguments are of the kernel's type, and its addresses are memory of this device.
    unsafe fn launch(&self, launch: &Launch) -> Result<()>;
    /// Bytes of scratch that [`product`](Self::product) needs; none where the device has no library of products.
    fn product_workspace(&self) -> Option<usize> {
        None
    }
    /// Enqueues a plain product, or returns false if the device's library has no way to compute it: our own kernel is then used.
    ///
    /// # Safety
    /// Operands, output and scratch are memory of this device, to the extents that the product says.
    unsafe fn product(&self, product: &PlainProduct) -> Result<bool> {
        let _ = product;
        Ok(false)
    }
    /// For messages.
    fn name(&self) -> String;
}

/// A mainloop of `kernels/gemm.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mainloop {
    /// `kernels/gemm_sm80.cuh`: cp.async and mma.sync.
    Sm80,
    /// `kernels/gemm_sm90.cuh`: TMA and wgmma, in as many blocks as there are multiprocessors, in clusters of two.
    Sm90 {
        /// Of the device; not less than 2.
        multiprocessors: u32,
        /// How all products are computed; none picks for each what should take the fewest clocks.
        schedule: Option<Schedule>,
    },
}

/// A tensor of 16-bit elements that is copied in boxes of 64 lines of 64 elements, zeros beyond its ends, to lines of 128 bytes with a
/// swizzle as wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Of the first element; a multiple of 16.
    pub address: u64,
    /// Elements of a line, lines of a plane, planes; none is 0.
    pub extents: [u64; 3],
    /// From line to line and from plane to plane, in bytes; multiples of 16 below 2⁴⁰.
    pub strides: [u64; 2],
}

impl Tensor {
    /// Elements of a line and lines of a box.
    pub const BOX: u32 = 64;
}

/// A [`Tensor`] as the device's bulk copies take it.
pub type TensorMap = [u64; 16];

/// The 16-bit types that a library multiplies as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// `bf16`
    Bf16,
    /// `f16`
    F16,
}

/// Where a row-major matrix lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Of the first element.
    pub address: u64,
    /// In elements; not less than the columns.
    pub row_stride: usize,
}

/// A product of 16-bit matrices with sums and output in `f32`, as [`Product`](crate::operations::Product). No extent is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlainProduct {
    /// Which operand is transposed.
    pub layout: Layout,
    /// Type of both operands.
    pub storage: Storage,
    /// m, n, k.
    pub extents: [usize; 3],
    /// \[m,k\], or \[k,m\] in [`Layout::Tn`].
    pub left: Place,
    /// \[k,n\], or \[n,k\] in [`Layout::Nt`].
    pub right: Place,
    /// \[m,n\] of `f32`.
    pub out: Place,
    /// Whether to add to `out` or to overwrite it, whatever it holds.
    pub accumulate: bool,
    /// [`Driver::product_workspace`] bytes from a multiple of 256 on.
    pub workspace: u64,
}

impl PlainProduct {
    /// Rows and columns of left, right and output as they stand.
    pub fn shapes(&self) -> [[usize; 2]; 3] {
        let [m, n, k] = self.extents;
        match self.layout {
            Layout::Nn => [[m, k], [k, n], [m, n]],
            Layout::Nt => [[m, k], [n, k], [m, n]],
            Layout::Tn => [[k, m], [k, n], [m, n]],
        }
    }
}

/// A kernel with its geometry and argument.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// Name of the kernel, one of [`FAMILIES`](super::image::FAMILIES).
    pub kernel: &'static str,
    /// Blocks along x and y; neither is 0.
    pub grid: [u32; 2],
    /// Blocks of a cluster along x, as the kernel was compiled for; 1 without clusters.
    pub cluster: u32,
    /// Whether all blocks run at the same time, and may wait for each other.
    pub cooperative: bool,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// The argument struct.
    pub argument: Argument,
}

/// A kernel's only argument: a struct by value.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Argument {
    bytes: [u8; Self::CAPACITY],
    len: usize,
}

impl Argument {
    const CAPACITY: usize = 512;

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

    /// Ends a struct that is aligned to `alignment` bytes.
    pub(super) fn aligned(mut self, alignment: usize) -> Self {
        self.len = self.len.next_multiple_of(alignment);
        self
    }

    /// The struct as the kernel sees it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
