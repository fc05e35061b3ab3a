//! Names of cuBLAS, cuBLASLt, cuRAND and NVRTC, so that a program which is linked to them starts and makes their handles on a machine that has
//! none of them. Nothing is computed: whatever is not about handles says so in print and returns the library's code for what it does not do.
//! `scripts/emulated-driver.sh --foreign` puts this library in their places.

use crate::pointers::Out;
use crate::say;
use crate::state::{Handle, pointer};
use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

/// `*_STATUS_SUCCESS` of them all.
const SUCCESS: c_int = 0;
/// `CUBLAS_STATUS_INVALID_VALUE`.
const INVALID_VALUE: c_int = 7;

type Pointer = *mut c_void;

fn create(handle: &Out<Pointer>) -> c_int {
    static NEXT: AtomicUsize = AtomicUsize::new(0x10);
    let new: Handle = NEXT.fetch_add(0x10, Ordering::Relaxed);
    if handle.put(pointer(new)).is_ok() { SUCCESS } else { INVALID_VALUE }
}

macro_rules! handles {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty $body:block)*) => {$(
        #[allow(non_snake_case)]
        // SAFETY: the library's own name is what a caller of this one asks for.
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $type),*) -> $result $body
    )*};
}

handles! {
    fn cublasCreate_v2(handle: Out<Pointer>) -> c_int { create(&handle) }
    fn cublasDestroy_v2(_handle: Pointer) -> c_int { SUCCESS }
    fn cublasSetStream_v2(_handle: Pointer, _stream: Pointer) -> c_int { SUCCESS }
    // Older than all that has today's interface, so that nobody counts on it.
    fn cublasLtGetVersion() -> usize { 0 }
    fn cublasLtCreate(handle: Out<Pointer>) -> c_int { create(&handle) }
    fn cublasLtDestroy(_handle: Pointer) -> c_int { SUCCESS }
    fn curandCreateGenerator(generator: Out<Pointer>, _kind: c_uint) -> c_int { create(&generator) }
    fn curandDestroyGenerator(_generator: Pointer) -> c_int { SUCCESS }
    fn curandSetStream(_generator: Pointer, _stream: Pointer) -> c_int { SUCCESS }
    fn curandSetPseudoRandomGeneratorSeed(_generator: Pointer, _seed: c_ulonglong) -> c_int { SUCCESS }
    fn curandSetGeneratorOffset(_generator: Pointer, _offset: c_ulonglong) -> c_int { SUCCESS }
    fn cublasGetStatusName(_status: c_int) -> *const c_char { c"of no cuBLAS".as_ptr() }
    fn cublasGetStatusString(_status: c_int) -> *const c_char { c"of no cuBLAS".as_ptr() }
    fn nvrtcGetErrorString(_status: c_int) -> *const c_char { c"of no NVRTC".as_ptr() }
}

macro_rules! absent {
    ($code:literal: $($name:ident)*) => {$(
        #[allow(non_snake_case)]
        // SAFETY: the library's own name; by the C calling convention the caller's arguments, whichever they are, need not be taken.
        #[unsafe(no_mangle)]
        extern "C" fn $name() -> c_int {
            say!("{}: its library is not there, and is not emulated", stringify!($name));
            $code
        }
    )*};
}

// CUBLAS_STATUS_NOT_SUPPORTED
absent! { 15:
    cublasDasum_v2 cublasDgemmStridedBatched cublasDgemm_v2 cublasDgemv_v2 cublasGemmEx cublasGemmGroupedBatchedEx cublasGemmStridedBatchedEx
    cublasGetPointerMode_v2 cublasSasum_v2 cublasSetPointerMode_v2 cublasSgemmStridedBatched cublasSgemm_v2 cublasSgemv_v2
    cublasLtMatmul cublasLtMatmulAlgoGetHeuristic cublasLtMatmulDescCreate cublasLtMatmulDescDestroy cublasLtMatmulDescSetAttribute
    cublasLtMatmulPreferenceCreate cublasLtMatmulPreferenceDestroy cublasLtMatmulPreferenceSetAttribute
    cublasLtMatrixLayoutCreate cublasLtMatrixLayoutDestroy cublasLtMatrixLayoutSetAttribute
    cublasLtLoggerOpenFile cublasLtLoggerSetLevel
}
// CURAND_STATUS_INTERNAL_ERROR: it has no code for it.
absent! { 999:
    curandGenerate curandGenerateLogNormal curandGenerateLogNormalDouble curandGenerateLongLong curandGenerateNormal
    curandGenerateNormalDouble curandGeneratePoisson curandGenerateUniform curandGenerateUniformDouble
}
// NVRTC_ERROR_INTERNAL_ERROR: as above.
absent! { 11:
    nvrtcCompileProgram nvrtcCreateProgram nvrtcDestroyProgram nvrtcGetPTX nvrtcGetPTXSize nvrtcGetProgramLog nvrtcGetProgramLogSize
}
