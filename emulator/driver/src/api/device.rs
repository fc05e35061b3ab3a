//! Initialisation, errors, devices.

use crate::chip::MEMORY;
use crate::exports;
use crate::pointers::Out;
use crate::state::{initialised, locked};
use cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX;
use cudarc::driver::sys::CUresult::{self, *};
use std::ffi::{CStr, c_char, c_int, c_uint};

/// Of the interface, as `CUDA_VERSION`.
const VERSION: c_int = 13000;

/// The codes that calls return, with what they mean.
const ERRORS: [(CUresult, &CStr, &CStr); 32] = {
    macro_rules! errors {
        ($($code:ident $meaning:literal)*) => {
            [$(($code, c_name(concat!(stringify!($code), "\0")), c_name(concat!($meaning, "\0")))),*]
        };
    }
    errors! {
        CUDA_SUCCESS "no error"
        CUDA_ERROR_INVALID_VALUE "invalid argument"
        CUDA_ERROR_OUT_OF_MEMORY "out of memory"
        CUDA_ERROR_NOT_INITIALIZED "initialization error"
        CUDA_ERROR_DEINITIALIZED "driver shutting down"
        CUDA_ERROR_NO_DEVICE "no CUDA-capable device is detected"
        CUDA_ERROR_INVALID_DEVICE "invalid device ordinal"
        CUDA_ERROR_INVALID_IMAGE "device kernel image is invalid"
        CUDA_ERROR_INVALID_CONTEXT "invalid device context"
        CUDA_ERROR_NO_BINARY_FOR_GPU "no kernel image is available for execution on the device"
        CUDA_ERROR_INVALID_PTX "a PTX JIT compilation failed"
        CUDA_ERROR_FILE_NOT_FOUND "file not found"
        CUDA_ERROR_INVALID_HANDLE "invalid resource handle"
        CUDA_ERROR_ILLEGAL_STATE "the operation cannot be performed in the present state"
        CUDA_ERROR_NOT_FOUND "named symbol not found"
        CUDA_ERROR_NOT_READY "device not ready"
        CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES "too many resources requested for launch"
        CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE "cannot set while device is active in this process"
        CUDA_ERROR_CONTEXT_IS_DESTROYED "context is destroyed"
        CUDA_ERROR_LAUNCH_FAILED "unspecified launch failure"
        CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE "too many blocks in cooperative launch"
        CUDA_ERROR_NOT_SUPPORTED "operation not supported"
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED "operation not permitted when stream is capturing"
        CUDA_ERROR_STREAM_CAPTURE_INVALIDATED "operation failed due to a previous error during capture"
        CUDA_ERROR_STREAM_CAPTURE_MERGE "operation would result in a merge of separate capture sequences"
        CUDA_ERROR_STREAM_CAPTURE_UNMATCHED "capture was not ended in the same stream as it began"
        CUDA_ERROR_STREAM_CAPTURE_UNJOINED "capturing stream has unjoined work"
        CUDA_ERROR_STREAM_CAPTURE_ISOLATION "dependency created on uncaptured work in another stream"
        CUDA_ERROR_STREAM_CAPTURE_IMPLICIT "operation would make the legacy stream depend on a capturing blocking stream"
        CUDA_ERROR_CAPTURED_EVENT "operation not permitted on an event last recorded in a capturing stream"
        CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD "attempt to terminate a thread-local capture sequence from another thread"
        CUDA_ERROR_INVALID_CLUSTER_SIZE "invalid cluster size"
    }
};

const fn c_name(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("no zero at the end"),
    }
}

fn error_text(code: c_uint) -> Option<(&'static CStr, &'static CStr)> {
    if code == CUDA_ERROR_UNKNOWN as c_uint {
        return Some((c"CUDA_ERROR_UNKNOWN", c"unknown error"));
    }
    ERRORS.iter().find(|(known, ..)| *known as c_uint == code).map(|(_, name, meaning)| (*name, *meaning))
}

fn only_device(device: c_int) -> Result<(), CUresult> {
    if device == 0 { Ok(()) } else { Err(CUDA_ERROR_INVALID_DEVICE) }
}

exports! {
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        locked(|driver| {
            driver.initialised = true;
            Ok(())
        })
    }
    fn cuDriverGetVersion(version: Out<c_int>) {
        version.put(VERSION)
    }
    fn cuGetErrorName(code: c_uint, text: Out<*const c_char>) {
        let found = error_text(code);
        text.put(found.map_or(std::ptr::null(), |(name, _)| name.as_ptr()))?;
        found.map(|_| ()).ok_or(CUDA_ERROR_INVALID_VALUE)
    }
    fn cuGetErrorString(code: c_uint, text: Out<*const c_char>) {
        let found = error_text(code);
        text.put(found.map_or(std::ptr::null(), |(_, meaning)| meaning.as_ptr()))?;
        found.map(|_| ()).ok_or(CUDA_ERROR_INVALID_VALUE)
    }
    fn cuDeviceGetCount(count: Out<c_int>) {
        initialised(|_| count.put(1))
    }
    fn cuDeviceGet(device: Out<c_int>, ordinal: c_int) {
        initialised(|_| {
            only_device(ordinal)?;
            device.put(0)
        })
    }
    fn cuDeviceGetName(text: Out<u8>, len: c_int, device: c_int) {
        initialised(|driver| {
            only_device(device)?;
            let len = usize::try_from(len).ok().filter(|len| *len > 0).ok_or(CUDA_ERROR_INVALID_VALUE)?;
            let mut name = driver.chip.name().into_bytes();
            name.truncate(len - 1);
            name.push(0);
            text.fill(&name)
        })
    }
    fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: c_int) {
        initialised(|_| {
            only_device(device)?;
            uuid.put(*b"PTX emulator's 0")
        })
    }
    fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: c_int) {
        initialised(|_| {
            only_device(device)?;
            uuid.put(*b"PTX emulator's 0")
        })
    }
    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: c_int) {
        initialised(|_| {
            only_device(device)?;
            bytes.put(MEMORY)
        })
    }
    fn cuDeviceGetAttribute(value: Out<c_int>, attribute: c_uint, device: c_int) {
        initialised(|driver| {
            only_device(device)?;
            if !(1..CU_DEVICE_ATTRIBUTE_MAX as c_uint).contains(&attribute) {
                return Err(CUDA_ERROR_INVALID_VALUE);
            }
            value.put(driver.chip.attribute(attribute))
        })
    }
}
