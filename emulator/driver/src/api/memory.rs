//! Memory, copies and fills.
//!
//! A call without `Async` works on the default stream and waits; a pointer to the host's memory is followed when the copy is done.

use crate::pointers::{Host, Out};
use crate::state::{Handle, handle, in_context};
use crate::work::Work;
use crate::{Outcome, exports, say};
use cudarc::driver::sys::CUresult::*;
use cudarc::driver::sys::{CUcontext, CUdeviceptr, CUstream};
use std::alloc::Layout;
use std::collections::HashMap;
use std::ffi::{c_uchar, c_uint, c_ushort, c_void};
use std::sync::{Mutex, PoisonError};

const DEFAULT: CUstream = std::ptr::null_mut();

/// Host memory that copies need not stage.
static PINNED: Mutex<Option<HashMap<usize, Layout>>> = Mutex::new(None);

fn pinned<T>(f: impl FnOnce(&mut HashMap<usize, Layout>) -> T) -> T {
    f(PINNED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

fn alloc_pinned(address: &Out<*mut c_void>, bytes: usize) -> Outcome {
    in_context(|driver, current| {
        address.require()?;
        driver.not_capturing(current)?;
        let layout = Layout::from_size_align(bytes, 4096).map_err(|_| CUDA_ERROR_INVALID_VALUE)?;
        if bytes == 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: the layout is not empty.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        if memory.is_null() {
            return Err(CUDA_ERROR_OUT_OF_MEMORY);
        }
        pinned(|all| all.insert(memory.addr(), layout));
        address.put(memory.cast())
    })
}

/// Enqueues a copy or fill, whose device ranges must be those of allocations.
fn enqueue(ranges: &[(u64, usize)], stream: CUstream, waits: bool, work: Work) -> Outcome {
    in_context(|driver, current| {
        if waits {
            driver.not_capturing(current)?;
        }
        ranges.iter().try_for_each(|(address, bytes)| driver.context(current)?.check(*address, *bytes))?;
        driver.enqueue(current, handle(stream), work)
    })
}

fn upload(to: u64, from: Host, bytes: usize, stream: CUstream, waits: bool) -> Outcome {
    if bytes > 0 {
        from.require()?;
    }
    enqueue(&[(to, bytes)], stream, waits, Work::Upload { from, to, bytes })
}

fn download(to: Host, from: u64, bytes: usize, stream: CUstream, waits: bool) -> Outcome {
    if bytes > 0 {
        to.require()?;
    }
    enqueue(&[(from, bytes)], stream, waits, Work::Download { from, to, bytes })
}

fn copy(to: u64, from: u64, bytes: usize, stream: CUstream, waits: bool) -> Outcome {
    enqueue(&[(to, bytes), (from, bytes)], stream, waits, Work::Copy { from, to, bytes })
}

fn fill(to: u64, pattern: &[u8], count: usize, stream: CUstream, waits: bool) -> Outcome {
    if !to.is_multiple_of(pattern.len() as u64) {
        return Err(CUDA_ERROR_INVALID_VALUE);
    }
    let bytes = count.checked_mul(pattern.len()).ok_or(CUDA_ERROR_INVALID_VALUE)?;
    enqueue(&[(to, bytes)], stream, waits, Work::Fill { to, pattern: pattern.to_vec(), count })
}

/// Allocating and freeing in the order of a stream, which a graph would do with nodes of their own.
fn in_order<T>(stream: CUstream, f: impl FnOnce(&mut crate::state::Context) -> Outcome<T>) -> Outcome<T> {
    in_context(|driver, current| {
        let place = driver.place(current, handle(stream))?;
        driver.not_captured(current, place).inspect_err(|_| say!("memory nodes of graphs are not emulated"))?;
        f(driver.context(current)?)
    })
}

fn same_context(a: CUcontext, b: CUcontext) -> Outcome<Handle> {
    if a == b {
        return Ok(handle(a));
    }
    say!("copies between contexts are not emulated");
    Err(CUDA_ERROR_NOT_SUPPORTED)
}

exports! {
    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        in_context(|driver, current| {
            free.put(driver.context(current)?.unused())?;
            total.put(crate::chip::MEMORY)
        })
    }
    fn cuMemAlloc_v2(address: Out<CUdeviceptr>, bytes: usize) {
        in_context(|driver, current| {
            address.require()?;
            driver.not_capturing(current)?;
            address.put(driver.context(current)?.alloc(bytes)?)
        })
    }
    fn cuMemFree_v2(address: CUdeviceptr) {
        in_context(|driver, current| {
            driver.not_capturing(current)?;
            driver.context(current)?.free(address)
        })
    }
    fn cuMemAllocAsync(address: Out<CUdeviceptr>, bytes: usize, stream: CUstream) {
        address.require()?;
        address.put(in_order(stream, |context| context.alloc(bytes))?)
    }
    fn cuMemFreeAsync(address: CUdeviceptr, stream: CUstream) {
        in_order(stream, |context| context.free(address))
    }
    fn cuMemHostAlloc(address: Out<*mut c_void>, bytes: usize, _flags: c_uint) {
        alloc_pinned(&address, bytes)
    }
    fn cuMemAllocHost_v2(address: Out<*mut c_void>, bytes: usize) {
        alloc_pinned(&address, bytes)
    }
    fn cuMemFreeHost(address: *mut c_void) {
        in_context(|driver, current| {
            driver.not_capturing(current)?;
            let layout = pinned(|all| all.remove(&address.addr())).ok_or(CUDA_ERROR_INVALID_VALUE)?;
            // SAFETY: from `alloc_pinned`, with this layout, and forgotten by now.
            unsafe { std::alloc::dealloc(address.cast(), layout) };
            Ok(())
        })
    }
    fn cuMemcpyHtoD_v2(to: CUdeviceptr, from: Host, bytes: usize) {
        upload(to, from, bytes, DEFAULT, true)
    }
    fn cuMemcpyHtoDAsync_v2(to: CUdeviceptr, from: Host, bytes: usize, stream: CUstream) {
        upload(to, from, bytes, stream, false)
    }
    fn cuMemcpyDtoH_v2(to: Host, from: CUdeviceptr, bytes: usize) {
        download(to, from, bytes, DEFAULT, true)
    }
    fn cuMemcpyDtoHAsync_v2(to: Host, from: CUdeviceptr, bytes: usize, stream: CUstream) {
        download(to, from, bytes, stream, false)
    }
    fn cuMemcpyDtoD_v2(to: CUdeviceptr, from: CUdeviceptr, bytes: usize) {
        copy(to, from, bytes, DEFAULT, true)
    }
    fn cuMemcpyDtoDAsync_v2(to: CUdeviceptr, from: CUdeviceptr, bytes: usize, stream: CUstream) {
        copy(to, from, bytes, stream, false)
    }
    fn cuMemcpyPeerAsync(
        to: CUdeviceptr,
        to_context: CUcontext,
        from: CUdeviceptr,
        from_context: CUcontext,
        bytes: usize,
        stream: CUstream,
    ) {
        same_context(to_context, from_context)?;
        copy(to, from, bytes, stream, false)
    }
    fn cuMemsetD8_v2(to: CUdeviceptr, value: c_uchar, count: usize) {
        fill(to, &[value], count, DEFAULT, true)
    }
    fn cuMemsetD8Async(to: CUdeviceptr, value: c_uchar, count: usize, stream: CUstream) {
        fill(to, &[value], count, stream, false)
    }
    fn cuMemsetD16_v2(to: CUdeviceptr, value: c_ushort, count: usize) {
        fill(to, &value.to_le_bytes(), count, DEFAULT, true)
    }
    fn cuMemsetD16Async(to: CUdeviceptr, value: c_ushort, count: usize, stream: CUstream) {
        fill(to, &value.to_le_bytes(), count, stream, false)
    }
    fn cuMemsetD32_v2(to: CUdeviceptr, value: c_uint, count: usize) {
        fill(to, &value.to_le_bytes(), count, DEFAULT, true)
    }
    fn cuMemsetD32Async(to: CUdeviceptr, value: c_uint, count: usize, stream: CUstream) {
        fill(to, &value.to_le_bytes(), count, stream, false)
    }
}
