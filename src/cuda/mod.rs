//! The CUDA backend: hand-written kernels on the caller's stream.
//!
//! One product (`kernels/gemm.cuh`), with a mainloop for compute capability 9.0 and one for all else, carries all families; an operation is
//! an epilogue on it. Storage is `f32`, `bf16` or `f16`; sums are
//! `f32` within a tile and `f64` over tiles, each in a slot with one writer, folded in a fixed order. Operations only enqueue.
//!
//! `f32` operands are split into three bf16 planes and multiplied as six bf16 products, which keeps the accuracy of `f32` arithmetic.
//!
//! There is one way in for raw device pointers, unsafe and the same for all operations: [`CudaRef::from_raw`] and [`CudaRefMut::from_raw`].
//! From there on everything is a checked, borrowed slice; so no operation has an unsafe twin that takes pointers and strides. An example
//! of both ways in, cudarc's buffers and raw pointers, stands at [`Cuda`].

mod backward;
mod blas;
mod decode;
pub(crate) mod driver;
mod dual;
mod encode;
mod gemm;
mod hardware;
pub(crate) mod image;
mod memory;
mod optimizer;
mod packed;
mod pointwise;
mod product;
mod reduce;
mod redundancy;
pub(crate) mod schedule;
mod statistics;
mod tiny;

#[cfg(feature = "capi")]
pub(crate) use memory::NOWHERE;
pub use memory::{CudaBuffer, CudaMemory, CudaPointer, CudaRef, CudaRefMut};

use crate::backend::{Backend, Shape};
use crate::element::{Element, StorageType, bf16, f16};
use crate::error::{Error, Result, check_len};
use crate::objective::Activation;
use crate::operations::*;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use driver::{Argument, Driver};
use hardware::Hardware;
#[cfg(feature = "capi")]
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// Storage types of the CUDA backend: `f32`, `bf16` and `f16`.
pub trait CudaElement: Element + StorageType {
    /// Whether tensor cores multiply it as it is.
    #[doc(hidden)]
    const IS_16_BIT: bool;
    /// Names of the kernels.
    #[doc(hidden)]
    const KERNELS: image::Kernels;
    /// What lays an operand out for the type's own products.
    #[doc(hidden)]
    const RAW_KERNEL: &'static str;
    /// Plain products: Nn, Nt, Tn.
    #[doc(hidden)]
    const PRODUCTS: [&'static str; 3];
    /// What a library of products knows it as; none where only our kernels are accurate enough.
    #[doc(hidden)]
    const LIBRARY: Option<driver::Storage>;
}

const PRODUCTS_BF16: [&str; 3] = ["product_nn_bf16", "product_nt_bf16", "product_tn_bf16"];
const PRODUCTS_F16: [&str; 3] = ["product_nn_f16", "product_nt_f16", "product_tn_f16"];

impl CudaElement for f32 {
    const IS_16_BIT: bool = false;
    const KERNELS: image::Kernels = image::F32;
    const RAW_KERNEL: &'static str = "prepare_f32";
    const PRODUCTS: [&'static str; 3] = PRODUCTS_BF16;
    const LIBRARY: Option<driver::Storage> = None;
}
impl CudaElement for bf16 {
    const IS_16_BIT: bool = true;
    const KERNELS: image::Kernels = image::BF16;
    const RAW_KERNEL: &'static str = "prepare_bf16";
    const PRODUCTS: [&'static str; 3] = PRODUCTS_BF16;
    const LIBRARY: Option<driver::Storage> = Some(driver::Storage::Bf16);
}
impl CudaElement for f16 {
    const IS_16_BIT: bool = true;
    const KERNELS: image::Kernels = image::F16;
    const RAW_KERNEL: &'static str = "align_f16";
    const PRODUCTS: [&'static str; 3] = PRODUCTS_F16;
    const LIBRARY: Option<driver::Storage> = Some(driver::Storage::F16);
}

/// How operands that an operation computes itself (centred or standardised activations, M, K, Ŵ) enter a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// As three bf16 planes, six products: as accurate as `f32` arithmetic for every storage type.
    #[default]
    Full,
    /// Rounded to one bf16 plane where storage is `bf16` or `f16`: one product instead of six, with the error of bf16.
    Storage,
}

/// What computes [`Backend::product`] where storage is `bf16` or `f16`. (`f32` is always multiplied by our kernels.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// cuBLASLt, where its shared library is found and knows a way to compute the product; else our kernels.
    ///
    /// It is looked for, in version 11 or later, under the names and in the places that the system's loader knows (on Linux: those in
    /// `LD_LIBRARY_PATH` too), when the length of a workspace is first asked for. Its results too are the same bits each time, as long
    /// as the library's version and the alignment of the operands are the same. Not yet run on hardware.
    #[default]
    Library,
    /// Our kernels.
    Own,
}

/// The CUDA backend with storage type `E`: `f32`, `bf16` or `f16`.
///
/// All work goes to one stream, in order. Buffers of other origin enter by [`view`](Self::view) and [`view_mut`](Self::view_mut).
/// Results are bitwise the same each time on the same GPU model.
///
/// Every operation of the table is there. On compute capability 9.0 products use `wgmma` and TMA, elsewhere `mma.sync` and `cp.async`. A step
/// of a small batch is one cooperative launch ([`Backend::fused_step`]): up to 512 rows, 1024 inputs and 256 latents, but for ∂L/∂x, the
/// weight-redundancy term, [`Form::Dual`](crate::Form::Dual) and batches of several blocks. All its products are `f32` multiply-adds of
/// operands as they are, for every storage type and [`Precision`]; so activations and row losses may differ in the last bit from those of
/// [`Backend::encode`].
///
/// Plain products of `bf16` and `f16` go to cuBLASLt if it is there: see [`Products`].
///
/// # Launching on one's own stream
///
/// cudarc's buffers need no unsafe code. A framework's tensor is an address and a row stride: [`CudaRef::from_raw`] and
/// [`CudaRefMut::from_raw`] are the only unsafe step, and what they give goes wherever a view goes.
///
/// ```no_run
/// use sae_kernels::cudarc::driver::CudaContext;
/// use sae_kernels::{Cuda, CudaRef, DecoderFree, DecoderFreeConfig, DecoderFreeStep, MatMut, MatRef, Shape, bf16};
///
/// # fn tensor_of_a_framework() -> (u64, usize) { unimplemented!() }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (rows, inputs, latents) = (4096, 768, 6144);
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let cuda = Cuda::<bf16>::on_stream(stream.clone())?;
/// let mut model = DecoderFree::new(cuda.clone(), DecoderFreeConfig::new(Shape { rows, inputs, latents }))?;
///
/// let weight = stream.clone_htod(&vec![bf16::from_f32(0.01); latents * inputs])?;
/// let bias = stream.alloc_zeros::<f32>(latents)?;
/// let mut grad_weight = stream.alloc_zeros::<f32>(latents * inputs)?;
/// let mut grad_bias = stream.alloc_zeros::<f32>(latents)?;
///
/// // The batch: a tensor of another library, for which this stream waits; or `cuda.view(&x)?` of a buffer of cudarc's.
/// let (address, row_stride) = tensor_of_a_framework();
/// // SAFETY: so many elements of this device's memory, kept and not written until the step is done.
/// let x = unsafe { CudaRef::from_raw(address, (rows - 1) * row_stride + inputs) };
///
/// model.step(DecoderFreeStep {
///     x: MatRef::from_memory(x, rows, inputs, row_stride)?,
///     weight: MatRef::from_memory(cuda.view(&weight)?, latents, inputs, inputs)?,
///     bias: cuda.view(&bias)?,
///     grad_weight: MatMut::from_memory(cuda.view_mut(&mut grad_weight)?, latents, inputs, inputs)?,
///     grad_bias: cuda.view_mut(&mut grad_bias)?,
///     grad_x: None,
///     activations: None,
///     row_loss: None,
/// })?;
/// // All of it is only enqueued; this waits.
/// println!("{:?}", model.losses()?);
/// # Ok(())
/// # }
/// ```
///
/// # Numerics
///
/// | storage | operands as the caller stored them | operands computed on the way (a − μ, Â, M, K, Ŵ) |
/// |---|---|---|
/// | `f32` | three bf16 planes (8 + 8 + 8 bits), six products: what is left out is below the rounding of `f32` | the same |
/// | `bf16`, `f16` | one product in their own type, exact before the sum | [`Precision::Full`]: as `f32`; [`Precision::Storage`]: rounded to bf16 |
///
/// Within a product sums are `f32`, as tensor cores make them; those over rows are cut at 1024 rows where there are several planes, at 4096
/// where there is one. Row losses, moments, statistics, losses and all sums over tiles are `f64`. The gradient and everything else downstream
/// is that of the activations as stored, mask included. The bounds that the tests hold each operation to, in three ways of rounding in
/// tensor cores, stand in `tests/differential.rs`.
///
/// # CUDA graphs
///
/// Operations, steps of a model among them, may be captured from the stream. Run the same calls once before: the driver then has loaded the
/// kernels, and cuBLASLt has been opened and has its plans. Views of cudarc's buffers are made before the capture too, for they may wait
/// for another stream. Addresses, extents and scalars, such as [`Adam::step`], are those of the capture each time the graph is launched.
///
/// # On hardware
///
/// No kernel has been timed or run on a GPU so far, nor have the calls of cuBLASLt; the kernels are executed by a PTX interpreter in the
/// tests.
#[derive(Clone)]
pub struct Cuda<E: CudaElement = f32> {
    core: Core,
    hardware: Option<Arc<Hardware>>,
    element: PhantomData<fn() -> E>,
}

/// What operations need to know of the device.
#[derive(Clone)]
pub(crate) struct Core {
    driver: Arc<dyn Driver>,
    precision: Precision,
    products: Products,
}

impl Core {
    /// What the device's library knows the storage type as, and the bytes of scratch that it needs; none if it is not to be used.
    fn library<E: CudaElement>(&self) -> Option<(driver::Storage, usize)> {
        let storage = E::LIBRARY.filter(|_| self.products == Products::Library)?;
        Some((storage, self.driver.product_workspace()?))
    }
}

impl<E: CudaElement> Cuda<E> {
    /// A stream of its own on device `ordinal`.
    ///
    /// # Errors
    /// [`Error::KernelsNotBuilt`], [`Error::NoDriver`], [`Error::NoDevice`], [`Error::DriverTooOld`], [`Error::NoImage`], and
    /// [`Error::Device`] for whatever else the driver refuses.
    pub fn new(ordinal: usize) -> Result<Self> {
        Ok(Self::on_hardware(Hardware::new(ordinal)?))
    }

    /// The caller's stream.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn on_stream(stream: Arc<CudaStream>) -> Result<Self> {
        Ok(Self::on_hardware(Hardware::on_stream(stream, false)?))
    }

    /// As [`on_stream`](Self::on_stream), with the kernels that run everywhere whatever the device: to compare.
    #[doc(hidden)]
    pub fn with_portable_kernels(stream: Arc<CudaStream>) -> Result<Self> {
        Ok(Self::on_hardware(Hardware::on_stream(stream, true)?))
    }

    /// The caller's stream as the driver knows it; NULL is the default stream.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Device`] if the stream is not of the device's primary context.
    ///
    /// # Safety
    /// The stream is NULL or a stream, and outlives the backend, its clones and its buffers.
    #[cfg(feature = "capi")]
    pub(crate) unsafe fn on_raw_stream(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        // SAFETY: the caller's promise.
        Ok(Self::on_hardware(unsafe { Hardware::on_raw_stream(ordinal, stream) }?))
    }

    fn on_hardware(hardware: Hardware) -> Self {
        let hardware = Arc::new(hardware);
        Self { hardware: Some(hardware.clone()), ..Self::on_driver(hardware) }
    }

    /// Any device that answers as a driver does.
    #[doc(hidden)]
    pub fn on_driver(driver: Arc<dyn Driver>) -> Self {
        let core = Core { driver, precision: Precision::default(), products: Products::default() };
        Self { core, hardware: None, element: PhantomData }
    }

    /// The same device and stream with another storage type.
    #[cfg(feature = "capi")]
    pub(crate) fn storing<F: CudaElement>(&self) -> Cuda<F> {
        Cuda { core: self.core.clone(), hardware: self.hardware.clone(), element: PhantomData }
    }

    /// The same device and stream with another precision of computed operands. It changes the workspace's length.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.core.precision = precision;
        self
    }

    /// The precision of computed operands.
    pub fn precision(&self) -> Precision {
        self.core.precision
    }

    /// The same device and stream with something else to compute plain products. It changes the workspace's length.
    pub fn with_products(mut self, products: Products) -> Self {
        self.core.products = products;
        self
    }

    /// What computes plain products: [`Products::Library`] only if the device has the library and the storage type is one for it.
    pub fn products(&self) -> Products {
        if self.core.library::<E>().is_some() { Products::Library } else { Products::Own }
    }

    /// The stream that all work goes to; none on an emulated device.
    pub fn stream(&self) -> Option<&Arc<CudaStream>> {
        self.hardware.as_ref().map(|hardware| hardware.stream())
    }

    /// A buffer of cudarc's, or part of one, for an operation to read.
    ///
    /// The backend's stream waits for what was enqueued to write it; what writes it later on another stream must wait for the backend's.
    ///
    /// # Errors
    /// [`Error::Device`] on an emulated device.
    pub fn view<'a, T: Element>(&self, buffer: &'a impl DevicePtr<T>) -> Result<CudaRef<'a, T>> {
        let (address, _guard) = buffer.device_ptr(self.stream_of_views()?);
        // SAFETY: the buffer is borrowed for 'a, and the stream waits for it.
        Ok(unsafe { CudaRef::from_raw(address, buffer.len()) })
    }

    /// As [`view`](Self::view), for an operation to write.
    ///
    /// # Errors
    /// As [`view`](Self::view).
    pub fn view_mut<'a, T: Element>(&self, buffer: &'a mut impl DevicePtrMut<T>) -> Result<CudaRefMut<'a, T>> {
        let len = buffer.len();
        let (address, _guard) = buffer.device_ptr_mut(self.stream_of_views()?);
        // SAFETY: the buffer is borrowed for 'a, and the stream waits for it.
        Ok(unsafe { CudaRefMut::from_raw(address, len) })
    }

    fn stream_of_views(&self) -> Result<&CudaStream> {
        let none = || Error::Device { call: "viewing a buffer", reason: "the device is emulated".into() };
        self.stream().map(|stream| &**stream).ok_or_else(none)
    }
}

impl<E: CudaElement> fmt::Debug for Cuda<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cuda<{}>({}, {:?})", E::NAME, self.core.driver.name(), self.core.precision)
    }
}

/// As the kernels number it.
fn activation(activation: Activation) -> u32 {
    match activation {
        Activation::Relu => 0,
        Activation::Identity => 1,
        Activation::Softplus => 2,
    }
}

impl<E: CudaElement> Backend for Cuda<E> {
    type Memory = CudaMemory;
    type Element = E;
    type Real = f32;

    fn alloc<T: Element>(&self, len: usize) -> Result<CudaBuffer<T>> {
        CudaBuffer::new(&self.core.driver, len)
    }
    /// Waits, for the host may change `source` afterwards.
    fn upload<T: Element>(&self, source: &[T], target: CudaRefMut<'_, T>) -> Result<()> {
        use crate::matrix::Memory;
        check_len("target", source.len(), CudaMemory::len_mut(&target))?;
        if source.is_empty() {
            return Ok(());
        }
        // SAFETY: the target is borrowed.
        unsafe { self.core.driver.upload(bytemuck::cast_slice(source), target.address()) }
    }
    fn download<T: Element>(&self, source: CudaRef<'_, T>, target: &mut [T]) -> Result<()> {
        use crate::matrix::Memory;
        check_len("target", CudaMemory::len(&source), target.len())?;
        if target.is_empty() {
            return Ok(());
        }
        // SAFETY: the source is borrowed.
        unsafe { self.core.driver.download(source.address(), bytemuck::cast_slice_mut(target)) }
    }
    fn workspace_len_of(&self, operation: Operation, shape: Shape) -> Result<usize> {
        let Shape { rows: n, inputs: d, latents: h } = shape;
        let core = &self.core;
        match operation {
            Operation::Encode => memory::workspace_len(|layout| encode::plan::<E>(layout, n, d, h)),
            Operation::ActivationSums => memory::workspace_len(|layout| encode::sums_plan(layout, n, h)),
            Operation::Variance => memory::workspace_len(|layout| statistics::finish_plan::<E>(core, layout, None, h)),
            Operation::PrimalCorrelation => {
                memory::workspace_len(|layout| statistics::finish_plan::<E>(core, layout, Some(n), h))
            }
            Operation::DualCorrelation => memory::workspace_len(|layout| dual::plan::<E>(core, layout, n, h)),
            Operation::Backward => memory::workspace_len(|layout| backward::plan::<E>(core, layout, n, h, false)),
            Operation::PrimalBackward => memory::workspace_len(|layout| backward::plan::<E>(core, layout, n, h, true)),
            Operation::Product => product::workspace_len::<E>(core, n, d, h),
            Operation::ColumnSums => memory::workspace_len(|layout| product::column_sums_plan(layout, n, d.max(h))),
            Operation::PrimalRedundancy => {
                memory::workspace_len(|layout| redundancy::plan::<E>(core, layout, h, d, false))
            }
            Operation::DualRedundancy => {
                memory::workspace_len(|layout| redundancy::plan::<E>(core, layout, h, d, true))
            }
            Operation::FusedStep => match core.driver.cooperative_blocks() {
                0 => Ok(0),
                _ => memory::workspace_len(|layout| tiny::plan(layout, n, d, h)),
            },
            Operation::Decode => memory::workspace_len(|layout| decode::plan::<E>(layout, n, d, h)),
            Operation::DecodeBackward => memory::workspace_len(|layout| decode::backward_plan::<E>(layout, n, d, h)),
        }
    }

    fn encode(&self, args: Encode<'_, Self>) -> Result<()> {
        encode::encode(&self.core, args)
    }
    fn activation_sums(&self, args: ActivationSums<'_, Self>) -> Result<()> {
        encode::activation_sums(&self.core, args)
    }
    fn responsibilities(&self, args: Responsibilities<'_, Self>) -> Result<()> {
        encode::responsibilities(&self.core, args)
    }
    fn recentre(&self, args: Recentre<'_, Self>) -> Result<()> {
        statistics::recentre(&self.core, args)
    }
    fn comoments(&self, args: Comoments<'_, Self>) -> Result<()> {
        statistics::comoments(&self.core, args)
    }
    fn pack_statistics(&self, args: PackStatistics<'_, Self>) -> Result<()> {
        packed::pack_statistics(&self.core, args)
    }
    fn unpack_statistics(&self, args: UnpackStatistics<'_, Self>) -> Result<()> {
        packed::unpack_statistics(&self.core, args)
    }
    fn finish_statistics(&self, args: FinishStatistics<'_, Self>) -> Result<()> {
        statistics::finish_statistics(&self.core, args)
    }
    fn correlation_dual(&self, args: CorrelationDual<'_, Self>) -> Result<()> {
        dual::correlation_dual(&self.core, args)
    }
    fn backward_dz(&self, args: BackwardDz<'_, Self>) -> Result<()> {
        backward::backward_dz(&self.core, args)
    }
    fn product(&self, args: Product<'_, Self>) -> Result<()> {
        product::product(&self.core, args)
    }
    fn column_sums(&self, args: ColumnSums<'_, Self>) -> Result<()> {
        product::column_sums(&self.core, args)
    }
    fn weight_redundancy(&self, args: WeightRedundancy<'_, Self>) -> Result<()> {
        redundancy::weight_redundancy(&self.core, args)
    }
    fn decode(&self, args: Decode<'_, Self>) -> Result<()> {
        decode::decode(&self.core, args)
    }
    fn decode_backward(&self, args: DecodeBackward<'_, Self>) -> Result<()> {
        decode::decode_backward(&self.core, args)
    }
    fn sgd(&self, args: Sgd<'_, Self>) -> Result<()> {
        optimizer::sgd(&self.core, args)
    }
    fn adam(&self, args: Adam<'_, Self>) -> Result<()> {
        optimizer::adam(&self.core, args)
    }
    fn fused_step(&self, args: FusedStep<'_, Self>) -> Result<bool> {
        tiny::fused_step(&self.core, args)
    }
}
