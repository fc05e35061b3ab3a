//! [`Driver`] over a real GPU, through cudarc.

use super::blas::Blas;
use super::driver::{Driver, Launch, Mainloop, PlainProduct, Tensor, TensorMap};
use super::gemm::shared_bytes;
use super::image::{self, FAMILIES};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::{Arc, OnceLock};

/// A stream and the kernels loaded into its context.
pub(super) struct Hardware {
    stream: Arc<CudaStream>,
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, sys::CUfunction>,
    mainloop: Mainloop,
    cooperative_blocks: u32,
    /// Opened when first asked for: the library is large, and `f32` has no use for it.
    blas: OnceLock<Option<Blas>>,
}

// SAFETY: handles of the driver may be used from any thread; each call binds the context first.
unsafe impl Send for Hardware {}
// SAFETY: as above.
unsafe impl Sync for Hardware {}

/// Looks for the driver and the device without cudarc, which panics where there is no driver.
pub(super) fn probe(ordinal: usize) -> Result<()> {
    if let Some(reason) = image::MISSING {
        return Err(Error::KernelsNotBuilt { reason });
    }
    let name = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
    let missing = |error: libloading::Error| {
        let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        Error::NoDriver { reason: format!("{name} does not load ({cause})") }
    };
    // SAFETY: the driver's library is made to be loaded like this.
    let library = unsafe { libloading::Library::new(name) }.map_err(missing)?;
    // SAFETY: the types are those of cuda.h.
    let (init, version, count) = unsafe {
        (
            library.get::<unsafe extern "C" fn(u32) -> c_int>(b"cuInit\0").map_err(missing)?,
            library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion\0").map_err(missing)?,
            library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDeviceGetCount\0").map_err(missing)?,
        )
    };
    let (mut found, mut devices) = (0, 0);
    // SAFETY: the pointers are to integers.
    let (started, counted) = unsafe {
        version(&mut found);
        (init(0), count(&mut devices))
    };
    const NO_DEVICE: c_int = 100;
    if started != 0 && started != NO_DEVICE {
        return Err(Error::NoDriver { reason: format!("cuInit returned error {started}") });
    }
    let devices = if counted == 0 { usize::try_from(devices).unwrap_or(0) } else { 0 };
    if ordinal >= devices {
        return Err(Error::NoDevice { ordinal, found: devices });
    }
    if found < image::TOOLKIT {
        return Err(Error::DriverTooOld { found, needed: image::TOOLKIT });
    }
    // The process keeps the driver's library: unloading it is not safe.
    std::mem::forget(library);
    Ok(())
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Device { call, reason: error.to_string() }
}

impl Hardware {
    pub(super) fn new(ordinal: usize) -> Result<Self> {
        probe(ordinal)?;
        let context = CudaContext::new(ordinal).map_err(failed("making a context"))?;
        let stream = context.new_stream().map_err(failed("making a stream"))?;
        Self::on_stream(stream, false)
    }

    /// # Safety
    /// The stream is NULL or a stream, and outlives this.
    #[cfg(feature = "capi")]
    pub(super) unsafe fn on_raw_stream(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        const CALL: &str = "taking the stream";
        probe(ordinal)?;
        let context = CudaContext::new(ordinal).map_err(failed("making a context"))?;
        if !stream.is_null() {
            let mut owner = std::ptr::null_mut();
            // SAFETY: a stream, as the caller promises, and a pointer to a variable.
            unsafe { sys::cuStreamGetCtx(stream.cast(), &mut owner) }.result().map_err(failed(CALL))?;
            if owner != context.cu_ctx() {
                let reason = format!(
                    "it is not of the primary context of device {ordinal}; name the stream's own device, and make the stream by the CUDA \
                     runtime or in that context"
                );
                return Err(Error::Device { call: CALL, reason });
            }
        }
        // SAFETY: a stream of this context, or the default one, which the caller keeps. It is not destroyed with its wrapper.
        Self::on_stream(unsafe { context.wrap_borrowed_stream(stream.cast()) }, false)
    }

    /// `portable`: the kernels that run everywhere, whatever the device.
    pub(super) fn on_stream(stream: Arc<CudaStream>, portable: bool) -> Result<Self> {
        probe(stream.context().ordinal())?;
        let context = stream.context().clone();
        context.bind_to_thread().map_err(failed("binding the context"))?;
        let capability = context.compute_capability().map_err(failed("asking for the compute capability"))?;
        let attribute = |attribute| context.attribute(attribute).map_err(failed("asking for an attribute"));
        let multiprocessors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let is_cooperative = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH)? != 0;
        // The kernel's launch bounds are of two blocks a multiprocessor.
        let cooperative_blocks = if is_cooperative { 2 * multiprocessors.max(0) as u32 } else { 0 };
        let mainloop = if capability == (9, 0) && !portable && image::has_sm90() {
            Mainloop::Sm90 { multiprocessors: multiprocessors.max(2) as u32, schedule: None }
        } else {
            Mainloop::Sm80
        };
        let (modules, functions) = (Vec::new(), HashMap::new());
        let mut loaded = Self { stream, modules, functions, mainloop, cooperative_blocks, blas: OnceLock::new() };
        for (family, kernels) in FAMILIES {
            let image = image::of(family, mainloop).ok_or(Error::KernelsNotBuilt { reason: "an image is missing" })?;
            // The driver reads 8-byte words; an embedded file has no alignment.
            let mut aligned = vec![0u64; image.len().div_ceil(8)];
            bytemuck::cast_slice_mut::<_, u8>(&mut aligned)[..image.len()].copy_from_slice(image);
            // SAFETY: a whole fatbin.
            let module = unsafe { result::module::load_data(aligned.as_ptr().cast()) }.map_err(|error| {
                if error.0 == sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU {
                    let (major, minor) = capability;
                    Error::NoImage { device: context.name().unwrap_or_default(), major, minor }
                } else {
                    failed("loading the kernels")(error)
                }
            })?;
            loaded.modules.push(module);
            for kernel in *kernels {
                let name = CString::new(*kernel).expect("kernels' names have no zeros");
                // SAFETY: the module is loaded.
                let function =
                    unsafe { result::module::get_function(module, name) }.map_err(failed("finding a kernel"))?;
                let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: a function of a loaded module.
                unsafe { result::function::set_function_attribute(function, attribute, shared_bytes(mainloop) as i32) }
                    .map_err(failed("asking for shared memory"))?;
                loaded.functions.insert(kernel, function);
            }
        }
        Ok(loaded)
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(failed("binding the context"))
    }

    fn blas(&self) -> Option<&Blas> {
        self.blas.get_or_init(|| self.bind().ok().and_then(|()| Blas::open(self.stream.context()))).as_ref()
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        // Kernels may still run; their code must not go away. Errors have nowhere to go.
        let _ = self.stream.synchronize();
        drop(self.blas.take());
        for module in &self.modules {
            // SAFETY: loaded by us, and nothing runs.
            let _ = unsafe { result::module::unload(*module) };
        }
    }
}

impl Driver for Hardware {
    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        // SAFETY: the memory is zeroed below, before anyone has its address.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| {
            if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                Error::DeviceMemory { bytes }
            } else {
                failed("allocating")(error)
            }
        })?;
        // SAFETY: just allocated, that many bytes.
        if let Err(error) = unsafe { result::memset_d8_async(address, 0, bytes, self.stream.cu_stream()) } {
            // SAFETY: as above, and nobody else has it.
            unsafe { self.free(address) };
            return Err(failed("zeroing")(error));
        }
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        if self.bind().is_ok() {
            // Waits for everything enqueued. Errors have nowhere to go.
            let _ = self.stream.synchronize();
            // SAFETY: the caller's promise.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    unsafe fn upload(&self, source: &[u8], target: u64) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise; the wait below is before `source` may change (it may be page-locked, and then nothing is staged).
        let copied = unsafe { result::memcpy_htod_async(target, source, self.stream.cu_stream()) };
        let waited = self.stream.synchronize();
        copied.and(waited).map_err(failed("copying to the device"))
    }

    unsafe fn download(&self, source: u64, target: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise; the wait below is before `target` is anyone's again.
        let copied = unsafe { result::memcpy_dtoh_async(target, source, self.stream.cu_stream()) };
        let waited = self.stream.synchronize();
        copied.and(waited).map_err(failed("copying from the device"))
    }

    fn mainloop(&self) -> Mainloop {
        self.mainloop
    }

    fn cooperative_blocks(&self) -> u32 {
        self.cooperative_blocks
    }

    fn tensor_map(&self, tensor: &Tensor) -> Result<TensorMap> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: the arrays are as long as the rank says; the address is not followed.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                3,
                tensor.address as *mut c_void,
                tensor.extents.as_ptr(),
                tensor.strides.as_ptr(),
                [Tensor::BOX, Tensor::BOX, 1].as_ptr(),
                [1, 1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed("describing an operand"))?;
        Ok(map.opaque)
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        self.bind()?;
        let function = self.functions[launch.kernel];
        let [x, y] = launch.grid;
        let mut parameters = [launch.argument.bytes().as_ptr().cast_mut().cast::<c_void>()];
        let enqueue = if launch.cooperative { result::launch_cooperative_kernel } else { result::launch_kernel };
        // SAFETY: the caller's promise; the driver copies the argument before it returns.
        unsafe {
            enqueue(
                function,
                (x, y, 1),
                (launch.threads, 1, 1),
                launch.shared_bytes,
                self.stream.cu_stream(),
                &mut parameters,
            )
        }
        .map_err(failed(launch.kernel))
    }

    fn product_workspace(&self) -> Option<usize> {
        self.blas().map(Blas::workspace_bytes)
    }

    unsafe fn product(&self, product: &PlainProduct) -> Result<bool> {
        let Some(blas) = self.blas() else { return Ok(false) };
        self.bind()?;
        // SAFETY: the caller's promise; the stream is of the context that the library was opened in.
        unsafe { blas.product(product, self.stream.cu_stream()) }
    }

    fn name(&self) -> String {
        self.stream.context().name().unwrap_or_else(|_| "a GPU".into())
    }
}
