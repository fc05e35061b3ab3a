//! A library with the functions of NCCL that sums need, for the tests. Its communicator is of ranks that all have the same numbers, in memory
//! that is the host's, and notes what it was asked for.

#![allow(missing_docs)]

use std::ffi::{c_char, c_int, c_void};

/// What `ncclComm_t` points to.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Communicator {
    pub size: c_int,
    pub rank: c_int,
    pub device: c_int,
    /// What sums return, and what the questions do.
    pub result: c_int,
    pub answers: c_int,
    /// Arguments of the last sum: addresses, numbers, type, operation, stream.
    pub sent: u64,
    pub received: u64,
    pub len: usize,
    pub data_type: c_int,
    pub operation: c_int,
    pub stream: u64,
    /// Sums so far.
    pub calls: c_int,
}

/// # Safety
/// As in nccl.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommCount(communicator: *const Communicator, answer: *mut c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        *answer = (*communicator).size;
        (*communicator).answers
    }
}

/// # Safety
/// As in nccl.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommUserRank(communicator: *const Communicator, answer: *mut c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        *answer = (*communicator).rank;
        (*communicator).answers
    }
}

/// # Safety
/// As in nccl.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommCuDevice(communicator: *const Communicator, answer: *mut c_int) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        *answer = (*communicator).device;
        (*communicator).answers
    }
}

/// Never fails.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(result: c_int) -> *const c_char {
    let text = if result == 5 { c"invalid usage" } else { c"another error" };
    text.as_ptr()
}

/// # Safety
/// As in nccl.h.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    sent: *const c_void,
    received: *mut c_void,
    len: usize,
    data_type: c_int,
    operation: c_int,
    communicator: *mut Communicator,
    stream: *mut c_void,
) -> c_int {
    // SAFETY: the caller's promise.
    let to = unsafe { &mut *communicator };
    (to.sent, to.received, to.len) = (sent as u64, received as u64, len);
    (to.data_type, to.operation, to.stream) = (data_type, operation, stream as u64);
    to.calls += 1;
    if to.result == 0 {
        for at in 0..len {
            // SAFETY: the caller's promise.
            unsafe {
                match data_type {
                    7 => *received.cast::<f32>().add(at) = *sent.cast::<f32>().add(at) * to.size as f32,
                    8 => *received.cast::<f64>().add(at) = *sent.cast::<f64>().add(at) * f64::from(to.size),
                    _ => return 4,
                }
            }
        }
    }
    to.result
}
