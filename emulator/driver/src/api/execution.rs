//! Functions, launches, occupancy, and tensor maps.

use crate::chip::Chip;
use crate::pointers::{Arguments, In, Out};
use crate::state::{Driver, Handle, handle, in_context, initialised};
use crate::work::Work;
use crate::{Outcome, exports, say};
use cudarc::driver::sys::CUfunction_attribute_enum::*;
use cudarc::driver::sys::CUresult::*;
use cudarc::driver::sys::CUtensorMapDataType_enum::*;
use cudarc::driver::sys::{CUfunction, CUmodule, CUstream};
use ptx_emulator::{Argument, Attributes, Grid, Swizzle, TensorElement, TensorMap};
use std::ffi::{c_int, c_uint, c_void};

/// What a kernel was compiled for.
fn attributes(driver: &Driver, function: Handle) -> Outcome<Attributes> {
    let (function, loaded) = driver.function(function)?;
    loaded.module.attributes(&function.kernel).ok_or(CUDA_ERROR_INVALID_HANDLE)
}

/// Blocks that a multiprocessor certainly has room for. How many registers ptxas gives a kernel is not known: the promise of its launch
/// bounds is counted on, and no more.
fn blocks_per_multiprocessor(chip: Chip, kernel: &Attributes, threads: u32, dynamic_shared: u32) -> u32 {
    let shared = kernel.static_shared + dynamic_shared + (1 << 10);
    let by_threads = chip.threads_per_multiprocessor() / threads.next_multiple_of(32).max(1);
    kernel.min_blocks.unwrap_or(1).min(chip.shared_per_multiprocessor() / shared).min(by_threads)
}

struct Shape {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    cooperative: bool,
}

fn launch(function: CUfunction, shape: Shape, stream: CUstream, arguments: &Arguments, packed: bool) -> Outcome {
    let Shape { grid, block, shared_bytes, cooperative } = shape;
    in_context(|driver, current| {
        let function = handle(function);
        let kernel = attributes(driver, function)?;
        let (known, loaded) = driver.function(function)?;
        if loaded.context != current {
            say!("{} is of another context than the current one", known.kernel);
            return Err(CUDA_ERROR_INVALID_CONTEXT);
        }
        let refuse = |reason: std::fmt::Arguments| {
            say!("{} is not launched: {reason}", known.kernel);
            CUDA_ERROR_INVALID_VALUE
        };
        let threads = block.iter().fold(1u32, |product, n| product.saturating_mul(*n));
        let limit = kernel.max_threads.unwrap_or(1024).min(1024);
        if grid.contains(&0) || threads == 0 || threads > limit || block[2] > 64 {
            return Err(refuse(format_args!("a grid of {grid:?} blocks of {block:?} threads, of at most {limit}")));
        }
        if grid[0] > i32::MAX as u32 || grid[1] > 65535 || grid[2] > 65535 {
            return Err(refuse(format_args!("a grid of {grid:?} blocks")));
        }
        if shared_bytes > known.dynamic_shared {
            let most = known.dynamic_shared;
            return Err(refuse(format_args!(
                "{shared_bytes} bytes of dynamic shared memory, of {most} that CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES allows"
            )));
        }
        if packed {
            return Err(refuse(format_args!("arguments in one buffer are not emulated")));
        }
        let cluster = kernel.cluster.unwrap_or([1; 3]);
        if (0..3).any(|i| !grid[i].is_multiple_of(cluster[i])) {
            refuse(format_args!("a grid of {grid:?} blocks in clusters of {cluster:?}"));
            return Err(CUDA_ERROR_INVALID_CLUSTER_SIZE);
        }
        let resident =
            blocks_per_multiprocessor(driver.chip, &kernel, threads, shared_bytes) * driver.chip.multiprocessors;
        let blocks = grid.iter().fold(1u32, |product, n| product.saturating_mul(*n));
        if cooperative && blocks > resident {
            refuse(format_args!("{blocks} blocks that wait for each other, and certain room for {resident}"));
            return Err(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
        }
        let sizes = loaded.module.parameters(&known.kernel).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        let arguments = arguments.read(&sizes)?.iter().map(|bytes| Argument::bytes(bytes)).collect();
        let grid = Grid { grid, block, shared_bytes, cooperative, cluster };
        driver.enqueue(current, handle(stream), Work::Launch { function, grid, arguments })
    })
}

fn occupancy(blocks: &Out<c_int>, function: CUfunction, threads: c_int, dynamic_shared: usize) -> Outcome {
    initialised(|driver| {
        let kernel = attributes(driver, handle(function))?;
        let threads = u32::try_from(threads).ok().filter(|n| *n > 0).ok_or(CUDA_ERROR_INVALID_VALUE)?;
        let shared = u32::try_from(dynamic_shared).map_err(|_| CUDA_ERROR_INVALID_VALUE)?;
        blocks.put(blocks_per_multiprocessor(driver.chip, &kernel, threads, shared) as c_int)
    })
}

exports! {
    fn cuFuncGetAttribute(value: Out<c_int>, attribute: c_uint, function: CUfunction) {
        initialised(|driver| {
            let kernel = attributes(driver, handle(function))?;
            let (known, _) = driver.function(handle(function))?;
            let (major, minor) = driver.chip.capability;
            let threads = kernel.max_threads.unwrap_or(1024);
            let cluster = kernel.cluster.unwrap_or([0; 3]);
            const { assert!(CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK as u32 == 0 && CU_FUNC_ATTRIBUTE_MAX as u32 >= 16) };
            let table = [
                (CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, threads),
                (CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel.static_shared),
                (CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, kernel.local_bytes as u32),
                // The most that the launch bounds leave: ptxas does not run.
                (CU_FUNC_ATTRIBUTE_NUM_REGS, (65536 / threads.max(1) / kernel.min_blocks.unwrap_or(1).max(1)).min(255)),
                (CU_FUNC_ATTRIBUTE_PTX_VERSION, (major * 10 + minor) as u32),
                (CU_FUNC_ATTRIBUTE_BINARY_VERSION, (major * 10 + minor) as u32),
                (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, known.dynamic_shared),
                (CU_FUNC_ATTRIBUTE_CLUSTER_SIZE_MUST_BE_SET, u32::from(kernel.cluster.is_some())),
                (CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH, cluster[0]),
                (CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_HEIGHT, cluster[1]),
                (CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH, cluster[2]),
            ];
            if attribute >= CU_FUNC_ATTRIBUTE_MAX as c_uint {
                return Err(CUDA_ERROR_INVALID_VALUE);
            }
            let found = table.into_iter().find(|(name, _)| *name as c_uint == attribute);
            value.put(found.map_or(0, |(_, value)| value as c_int))
        })
    }
    fn cuFuncSetAttribute(function: CUfunction, attribute: c_uint, value: c_int) {
        in_context(|driver, _| {
            let kernel = attributes(driver, handle(function))?;
            let limit = driver.chip.shared_limit() - kernel.static_shared;
            let known = driver.functions.get_mut(&handle(function)).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
            if attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_uint {
                let value = u32::try_from(value).ok().filter(|value| *value <= limit).ok_or(CUDA_ERROR_INVALID_VALUE)?;
                known.dynamic_shared = value;
                Ok(())
            } else if attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT as c_uint {
                if (-1..=100).contains(&value) { Ok(()) } else { Err(CUDA_ERROR_INVALID_VALUE) }
            } else {
                Err(CUDA_ERROR_INVALID_VALUE)
            }
        })
    }
    fn cuFuncSetCacheConfig(function: CUfunction, config: c_uint) {
        initialised(|driver| {
            driver.function(handle(function))?;
            if config <= 3 { Ok(()) } else { Err(CUDA_ERROR_INVALID_VALUE) }
        })
    }
    fn cuFuncGetModule(module: Out<CUmodule>, function: CUfunction) {
        initialised(|driver| module.put(crate::state::pointer(driver.function(handle(function))?.0.module)))
    }
    fn cuLaunchKernel(
        function: CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        arguments: Arguments,
        extra: In<*mut c_void>,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        launch(function, Shape { grid, block, shared_bytes, cooperative: false }, stream, &arguments, !extra.is_null())
    }
    fn cuLaunchCooperativeKernel(
        function: CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        arguments: Arguments,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        launch(function, Shape { grid, block, shared_bytes, cooperative: true }, stream, &arguments, false)
    }
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: Out<c_int>,
        function: CUfunction,
        threads: c_int,
        dynamic_shared: usize,
    ) {
        occupancy(&blocks, function, threads, dynamic_shared)
    }
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: Out<c_int>,
        function: CUfunction,
        threads: c_int,
        dynamic_shared: usize,
        _flags: c_uint,
    ) {
        occupancy(&blocks, function, threads, dynamic_shared)
    }
    fn cuTensorMapEncodeTiled(
        map: Out<[u8; 128]>,
        element: c_uint,
        rank: c_uint,
        address: *mut c_void,
        extents: In<u64>,
        strides: In<u64>,
        box_extents: In<u32>,
        element_strides: In<u32>,
        interleave: c_uint,
        swizzle: c_uint,
        _promotion: c_uint,
        fill: c_uint,
    ) {
        initialised(|driver| {
            let unsupported = |what: &str| {
                say!("a tensor map {what} is not emulated");
                Err(CUDA_ERROR_NOT_SUPPORTED)
            };
            if driver.chip.capability < (9, 0) {
                say!("{} has no tensor maps", driver.chip.name());
                return Err(CUDA_ERROR_NOT_SUPPORTED);
            }
            map.require()?;
            if !map.address().is_multiple_of(64) || !(1..=5).contains(&rank) {
                return Err(CUDA_ERROR_INVALID_VALUE);
            }
            const BF16: c_uint = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 as c_uint;
            const F16: c_uint = CU_TENSOR_MAP_DATA_TYPE_FLOAT16 as c_uint;
            const U16: c_uint = CU_TENSOR_MAP_DATA_TYPE_UINT16 as c_uint;
            const F32: c_uint = CU_TENSOR_MAP_DATA_TYPE_FLOAT32 as c_uint;
            const U32: c_uint = CU_TENSOR_MAP_DATA_TYPE_UINT32 as c_uint;
            // Of the type, copies need the size only.
            let element = match element {
                BF16 | F16 | U16 => TensorElement::Bf16,
                F32 | U32 => TensorElement::F32,
                _ => return unsupported("of this type"),
            };
            let swizzle = match swizzle {
                0 => Swizzle::None,
                1 => Swizzle::B32,
                2 => Swizzle::B64,
                3 => Swizzle::B128,
                _ => return unsupported("with this swizzle"),
            };
            if interleave != 0 || fill != 0 {
                return unsupported("that interleaves, or fills with NaN");
            }
            let rank = rank as usize;
            let strides = if rank > 1 { strides.read(rank - 1)? } else { Vec::new() };
            let (extents, box_extents) = (extents.read(rank)?, box_extents.read(rank)?);
            let tensor = TensorMap::new(element, address.addr() as u64, &extents, &strides, &box_extents);
            let bytes = tensor.swizzle(swizzle).element_strides(&element_strides.read(rank)?).to_bytes();
            let bytes = bytes.map_err(|error| {
                say!("{error}");
                CUDA_ERROR_INVALID_VALUE
            })?;
            map.put(bytes)
        })
    }
}
