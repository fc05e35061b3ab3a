//! Contexts, and the device's own.

use crate::exports;
use crate::pointers::Out;
use crate::state::{handle, in_context, initialised, pointer, with_stack};
use cudarc::driver::sys::CUresult::*;
use cudarc::driver::sys::{CUcontext, CUctxCreateParams, CUlimit};
use std::ffi::{c_int, c_uint};

fn check_device(device: c_int) -> crate::Outcome {
    if device == 0 { Ok(()) } else { Err(CUDA_ERROR_INVALID_DEVICE) }
}

fn create(context: &Out<CUcontext>, flags: c_uint, device: c_int) -> crate::Outcome {
    initialised(|driver| {
        check_device(device)?;
        context.require()?;
        let new = driver.new_context(flags);
        with_stack(|stack| stack.push(new));
        context.put(pointer(new))
    })
}

exports! {
    fn cuDevicePrimaryCtxRetain(context: Out<CUcontext>, device: c_int) {
        initialised(|driver| {
            check_device(device)?;
            context.require()?;
            let (primary, count) = match driver.primary {
                Some((primary, count)) => (primary, count + 1),
                None => (driver.new_context(0), 1),
            };
            driver.primary = Some((primary, count));
            context.put(pointer(primary))
        })
    }
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        initialised(|driver| {
            check_device(device)?;
            let (primary, count) = driver.primary.ok_or(CUDA_ERROR_INVALID_CONTEXT)?;
            driver.primary = (count > 1).then_some((primary, count - 1));
            if driver.primary.is_none() {
                driver.end_context(primary);
            }
            Ok(())
        })
    }
    fn cuDevicePrimaryCtxReset_v2(device: c_int) {
        initialised(|driver| {
            check_device(device)?;
            if let Some((primary, _)) = driver.primary.take() {
                driver.end_context(primary);
            }
            Ok(())
        })
    }
    fn cuDevicePrimaryCtxGetState(device: c_int, flags: Out<c_uint>, active: Out<c_int>) {
        initialised(|driver| {
            check_device(device)?;
            flags.put_if_wanted(0)?;
            active.put_if_wanted(i32::from(driver.primary.is_some()))
        })
    }
    fn cuCtxCreate_v2(context: Out<CUcontext>, flags: c_uint, device: c_int) {
        create(&context, flags, device)
    }
    fn cuCtxCreate_v4(context: Out<CUcontext>, parameters: Out<CUctxCreateParams>, flags: c_uint, device: c_int) {
        if parameters.require().is_ok() {
            return Err(CUDA_ERROR_NOT_SUPPORTED);
        }
        create(&context, flags, device)
    }
    fn cuCtxDestroy_v2(context: CUcontext) {
        initialised(|driver| {
            let context = handle(context);
            if driver.primary.is_some_and(|(primary, _)| primary == context) || !driver.contexts.contains_key(&context) {
                return Err(CUDA_ERROR_INVALID_CONTEXT);
            }
            driver.end_context(context);
            with_stack(|stack| stack.pop_if(|top| *top == context));
            Ok(())
        })
    }
    fn cuCtxGetCurrent(context: Out<CUcontext>) {
        initialised(|_| context.put(with_stack(|stack| stack.last().map_or(std::ptr::null_mut(), |top| pointer(*top)))))
    }
    fn cuCtxSetCurrent(context: CUcontext) {
        initialised(|driver| {
            if !context.is_null() && !driver.contexts.contains_key(&handle(context)) {
                return Err(CUDA_ERROR_INVALID_CONTEXT);
            }
            with_stack(|stack| {
                stack.pop();
                if !context.is_null() {
                    stack.push(handle(context));
                }
            });
            Ok(())
        })
    }
    fn cuCtxPushCurrent_v2(context: CUcontext) {
        initialised(|driver| {
            if !driver.contexts.contains_key(&handle(context)) {
                return Err(CUDA_ERROR_INVALID_CONTEXT);
            }
            with_stack(|stack| stack.push(handle(context)));
            Ok(())
        })
    }
    fn cuCtxPopCurrent_v2(context: Out<CUcontext>) {
        initialised(|_| {
            let top = with_stack(Vec::pop).ok_or(CUDA_ERROR_INVALID_CONTEXT)?;
            context.put_if_wanted(pointer(top))
        })
    }
    fn cuCtxGetDevice(device: Out<c_int>) {
        initialised(|driver| {
            driver.current()?;
            device.put(0)
        })
    }
    fn cuCtxGetApiVersion(context: CUcontext, version: Out<c_uint>) {
        initialised(|driver| {
            if !context.is_null() && !driver.contexts.contains_key(&handle(context)) {
                return Err(CUDA_ERROR_INVALID_CONTEXT);
            }
            version.put(3020)
        })
    }
    fn cuCtxSynchronize() {
        in_context(|driver, current| driver.not_capturing(current))
    }
    fn cuCtxGetFlags(flags: Out<c_uint>) {
        in_context(|driver, current| flags.put(driver.context(current)?.flags))
    }
    fn cuCtxSetFlags(flags: c_uint) {
        in_context(|driver, current| {
            driver.context(current)?.flags = flags;
            Ok(())
        })
    }
    fn cuCtxGetLimit(value: Out<usize>, limit: c_uint) {
        in_context(|driver, current| {
            let limits = &driver.context(current)?.limits;
            match limit {
                limit if limit >= CUlimit::CU_LIMIT_MAX as c_uint => Err(CUDA_ERROR_INVALID_VALUE),
                limit => value.put(limits.get(&limit).copied().unwrap_or(1 << 10)),
            }
        })
    }
    fn cuCtxSetLimit(limit: c_uint, value: usize) {
        in_context(|driver, current| {
            if limit >= CUlimit::CU_LIMIT_MAX as c_uint {
                return Err(CUDA_ERROR_INVALID_VALUE);
            }
            driver.context(current)?.limits.insert(limit, value);
            Ok(())
        })
    }
    fn cuCtxGetCacheConfig(config: Out<c_uint>) {
        in_context(|driver, current| config.put(driver.context(current)?.cache_config))
    }
    fn cuCtxSetCacheConfig(config: c_uint) {
        in_context(|driver, current| {
            driver.context(current)?.cache_config = config;
            Ok(())
        })
    }
    fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) {
        in_context(|_, _| {
            least.put_if_wanted(0)?;
            greatest.put_if_wanted(-5)
        })
    }
}
