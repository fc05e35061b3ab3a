//! What programs may ask for and this library does not have. A program that is linked to it, or that looks all names up when it starts, finds
//! them; a call says so and returns `CUDA_ERROR_NOT_SUPPORTED`.

use crate::say;
use cudarc::driver::sys::CUresult::{self, CUDA_ERROR_NOT_SUPPORTED};

macro_rules! absent {
    ($($name:ident)*) => {$(
        #[allow(non_snake_case)]
        // SAFETY: the driver's own name; by the C calling convention the caller's arguments, whichever they are, need not be taken.
        #[unsafe(no_mangle)]
        extern "C" fn $name() -> CUresult {
            say!("{} is not emulated", stringify!($name));
            CUDA_ERROR_NOT_SUPPORTED
        }
    )*};
}

absent! {
    cuCtxCreate_v3
    cuDestroyExternalMemory
    cuDeviceGetDefaultMemPool
    cuDeviceGetMemPool
    cuDeviceSetMemPool
    cuExternalMemoryGetMappedBuffer
    cuGetProcAddress_v2
    cuImportExternalMemory
    cuLaunchHostFunc
    cuLaunchKernelEx
    cuMemAdvise_v2
    cuMemAllocFromPoolAsync
    cuMemAllocManaged
    cuMemPoolCreate
    cuMemPoolDestroy
    cuMemPoolGetAttribute
    cuMemPoolSetAttribute
    cuMemPoolTrimTo
    cuMemPrefetchAsync_v2
    cuMemcpy
    cuMemcpyAsync
    cuOccupancyAvailableDynamicSMemPerBlock
    cuOccupancyMaxActiveClusters
    cuOccupancyMaxPotentialBlockSize
    cuOccupancyMaxPotentialBlockSizeWithFlags
    cuOccupancyMaxPotentialClusterSize
    cuPointerGetAttribute
    cuProfilerStart
    cuProfilerStop
    cuStreamAttachMemAsync
}
