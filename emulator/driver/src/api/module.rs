//! Modules, and what is in them.

use crate::pointers::{Image, ImageBytes, Out, Text};
use crate::state::{Driver, Function, Handle, Loaded, handle, in_context, pointer};
use crate::{Outcome, exports, images, say};
use cudarc::driver::sys::CUresult::*;
use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUmodule};
use ptx_emulator::Module;
use std::collections::HashMap;
use std::ffi::{c_uint, c_void};

fn load(driver: &mut Driver, current: Handle, image: ImageBytes) -> Outcome<CUmodule> {
    driver.not_capturing(current)?;
    let (ptx, other_target) = match image {
        ImageBytes::Fatbin(bytes) => (images::ptx_of(&bytes)?, CUDA_ERROR_NO_BINARY_FOR_GPU),
        ImageBytes::Ptx(text) => (text, CUDA_ERROR_INVALID_PTX),
        ImageBytes::Machine => {
            say!("machine code cannot be emulated, only PTX");
            return Err(CUDA_ERROR_NO_BINARY_FOR_GPU);
        }
    };
    let module = Module::open(&ptx).map_err(|error| {
        say!("{error}");
        CUDA_ERROR_INVALID_PTX
    })?;
    let chip = driver.chip;
    if !chip.runs(module.target()) {
        say!("a module for {}, which is not for {}", module.target(), chip.name());
        return Err(other_target);
    }
    let new = driver.new_handle();
    driver.modules.insert(new, Loaded { context: current, module, functions: HashMap::new() });
    Ok(pointer(new))
}

fn load_image(module: &Out<CUmodule>, image: &Image) -> Outcome {
    in_context(|driver, current| {
        module.require()?;
        module.put(load(driver, current, image.read()?)?)
    })
}

exports! {
    fn cuModuleLoadData(module: Out<CUmodule>, image: Image) {
        load_image(&module, &image)
    }
    fn cuModuleLoadDataEx(
        module: Out<CUmodule>,
        image: Image,
        _count: c_uint,
        _options: Out<c_uint>,
        _values: Out<*mut c_void>,
    ) {
        load_image(&module, &image)
    }
    fn cuModuleLoadFatBinary(module: Out<CUmodule>, image: Image) {
        load_image(&module, &image)
    }
    fn cuModuleLoad(module: Out<CUmodule>, path: Text) {
        in_context(|driver, current| {
            module.require()?;
            let bytes = std::fs::read(path.read()?).map_err(|_| CUDA_ERROR_FILE_NOT_FOUND)?;
            let text = String::from_utf8(bytes);
            let image = text.map_or_else(|error| ImageBytes::Fatbin(error.into_bytes()), ImageBytes::Ptx);
            module.put(load(driver, current, image)?)
        })
    }
    fn cuModuleUnload(module: CUmodule) {
        in_context(|driver, current| {
            driver.not_capturing(current)?;
            let module = handle(module);
            driver.modules.remove(&module).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
            driver.functions.retain(|_, function| function.module != module);
            Ok(())
        })
    }
    fn cuModuleGetFunction(function: Out<CUfunction>, module: CUmodule, name: Text) {
        in_context(|driver, _| {
            function.require()?;
            let (kernel, new) = (name.read()?, driver.new_handle());
            let loaded = driver.modules.get_mut(&handle(module)).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
            if let Some(known) = loaded.functions.get(&kernel) {
                return function.put(pointer(*known));
            }
            if !loaded.module.kernels().contains(&kernel.as_str()) {
                return Err(CUDA_ERROR_NOT_FOUND);
            }
            loaded.module.prepare(&kernel).map_err(|error| {
                say!("{kernel}: {error}");
                CUDA_ERROR_INVALID_PTX
            })?;
            let fixed = loaded.module.attributes(&kernel).map_or(0, |attributes| attributes.static_shared);
            loaded.functions.insert(kernel.clone(), new);
            let dynamic_shared = (48u32 << 10).saturating_sub(fixed);
            driver.functions.insert(new, Function { module: handle(module), kernel, dynamic_shared });
            function.put(pointer(new))
        })
    }
    fn cuModuleGetGlobal_v2(address: Out<CUdeviceptr>, bytes: Out<usize>, module: CUmodule, name: Text) {
        in_context(|driver, current| {
            let name = name.read()?;
            let loaded = driver.modules.get(&handle(module)).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
            let context = driver.contexts.get_mut(&current).ok_or(CUDA_ERROR_INVALID_CONTEXT)?;
            let (at, size) = context.device.variable(&loaded.module, &name).ok_or(CUDA_ERROR_NOT_FOUND)?;
            address.put_if_wanted(at)?;
            bytes.put_if_wanted(size)
        })
    }
}
