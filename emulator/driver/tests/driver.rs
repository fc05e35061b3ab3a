//! What the library answers where a program goes wrong, as the driver's manual has it. Programs that go right are in `tests/cuda_hardware.rs`.
//!
//! Every test has a context of its own, as a context that has failed stays so.

use cudarc::driver::sys::CUresult::{self, *};
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DriverError, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;
use std::fmt::Debug;
use std::sync::{Arc, OnceLock};

const THREAD_LOCAL: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

/// Thread i of a block: `store` writes i to place i, `twice` doubles what is there; `shared` has 16 bytes of static shared memory; `unknown` is
/// of no architecture.
const PTX: &str = r"
.version 9.0
.target sm_80
.address_size 64
.global .align 4 .u32 answer = 42;
.visible .entry store(.param .u64 store_param_0)
{
    .reg .b32 %r<2>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [store_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r1;
    ret;
}
.visible .entry twice(.param .u64 twice_param_0)
{
    .reg .b32 %r<4>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [twice_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.u32 %r2, [%rd3];
    add.u32 %r3, %r2, %r2;
    st.global.u32 [%rd3], %r3;
    ret;
}
.visible .entry shared() .maxntid 64, 1, 1
{
    .shared .align 4 .b8 buffer[16];
    ret;
}
.visible .entry unknown()
{
    frobnicate.u32;
    ret;
}
";

/// A context on the library beside this program, before any other of that name is looked for.
fn context() -> Arc<CudaContext> {
    static LIBRARY: OnceLock<libloading::Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let program = std::env::current_exe().unwrap();
        let path = program.with_file_name("libptx_emulator_driver.so");
        // SAFETY: a library that does nothing when it is loaded.
        unsafe { libloading::Library::new(&path) }.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    });
    let context = CudaContext::new_non_primary(0, 0).unwrap();
    assert_eq!(context.name().unwrap(), "PTX emulator, 8.0", "another driver was found first");
    // Events between streams are the tests' own.
    // SAFETY: every test waits itself.
    unsafe { context.disable_event_tracking() };
    context
}

fn kernel(context: &Arc<CudaContext>, name: &str) -> CudaFunction {
    context.load_module(Ptx::from_src(PTX)).unwrap().load_function(name).unwrap()
}

fn block(threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (1, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

/// Launches a kernel of one pointer.
fn launch(stream: &CudaStream, function: &CudaFunction, address: u64, shape: LaunchConfig) -> Result<(), DriverError> {
    // SAFETY: the emulator checks every access.
    unsafe { stream.launch_builder(function).arg(&address).launch(shape) }.map(|_| ())
}

#[track_caller]
fn refused<T: Debug>(result: Result<T, DriverError>, code: CUresult) {
    assert_eq!(result.map_err(|error| error.0).unwrap_err(), code);
}

#[test]
fn a_fault_is_the_next_calls_error_and_stays() {
    let context = context();
    let (stream, store) = (context.new_stream().unwrap(), kernel(&context, "store"));
    let memory = stream.alloc_zeros::<u32>(4).unwrap();
    let address = cudarc::driver::DevicePtr::device_ptr(&memory, &stream).0;
    launch(&stream, &store, address, block(4)).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(stream.clone_dtoh(&memory).unwrap(), [0, 1, 2, 3]);
    // The fifth thread's place is outside: the launch itself knows nothing of it.
    launch(&stream, &store, address, block(5)).unwrap();
    for _ in 0..2 {
        refused(stream.synchronize(), CUDA_ERROR_LAUNCH_FAILED);
    }
    refused(launch(&stream, &store, address, block(4)), CUDA_ERROR_LAUNCH_FAILED);
    refused(stream.clone_dtoh(&memory), CUDA_ERROR_LAUNCH_FAILED);
    // SAFETY: nothing is allocated.
    refused(unsafe { result::malloc_sync(16) }, CUDA_ERROR_LAUNCH_FAILED);
    // Another context is as good as new.
    let other = self::context();
    let stream = other.new_stream().unwrap();
    assert_eq!(stream.clone_dtoh(&stream.alloc_zeros::<u32>(2).unwrap()).unwrap(), [0, 0]);
}

#[test]
fn what_nothing_wrote_stays_unwritten_in_a_copy() {
    let context = context();
    let (stream, twice) = (context.new_stream().unwrap(), kernel(&context, "twice"));
    // SAFETY: allocations of this context, whose ends the copies keep to.
    let copied = unsafe {
        let (from, to) = (result::malloc_sync(16).unwrap(), result::malloc_sync(16).unwrap());
        result::memset_d8_sync(from, 0, 8).unwrap();
        result::memcpy_dtod_sync(to, from, 16).unwrap();
        to
    };
    launch(&stream, &twice, copied, block(2)).unwrap();
    stream.synchronize().unwrap();
    launch(&stream, &twice, copied, block(3)).unwrap();
    refused(stream.synchronize(), CUDA_ERROR_LAUNCH_FAILED);
}

#[test]
fn ranges_must_lie_in_one_allocation() {
    let context = context();
    // SAFETY: what does not fit is refused.
    unsafe {
        let address = result::malloc_sync(16).unwrap();
        refused(result::memcpy_htod_sync(address, &[0u8; 17]), CUDA_ERROR_INVALID_VALUE);
        refused(result::memcpy_htod_sync(address + 1, &[0u8; 16]), CUDA_ERROR_INVALID_VALUE);
        refused(result::memcpy_dtoh_sync(&mut [0u8; 17], address), CUDA_ERROR_INVALID_VALUE);
        refused(result::memcpy_dtod_sync(address, address + 8, 9), CUDA_ERROR_INVALID_VALUE);
        refused(result::memset_d8_sync(address, 0, 17), CUDA_ERROR_INVALID_VALUE);
        result::memcpy_htod_sync(address, &[7u8; 16]).unwrap();
        refused(result::free_sync(address + 8), CUDA_ERROR_INVALID_VALUE);
        result::free_sync(address).unwrap();
        refused(result::free_sync(address), CUDA_ERROR_INVALID_VALUE);
        refused(result::memset_d8_sync(address, 0, 1), CUDA_ERROR_INVALID_VALUE);
        refused(result::malloc_sync(0), CUDA_ERROR_INVALID_VALUE);
        refused(result::malloc_sync(1 << 40), CUDA_ERROR_OUT_OF_MEMORY);
    }
    context.synchronize().unwrap();
}

#[test]
fn wrong_handles_and_null_pointers_are_refused() {
    let context = context();
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
    // SAFETY: what is no stream, event or module any more is refused, and so is null.
    unsafe {
        result::stream::destroy(stream).unwrap();
        refused(result::stream::synchronize(stream), CUDA_ERROR_INVALID_HANDLE);
        refused(result::stream::destroy(stream), CUDA_ERROR_INVALID_HANDLE);
        refused(result::memset_d8_async(0, 0, 0, stream), CUDA_ERROR_INVALID_HANDLE);
        refused(result::event::synchronize(stream.cast()), CUDA_ERROR_INVALID_HANDLE);
        refused(result::module::unload(stream.cast()), CUDA_ERROR_INVALID_HANDLE);
        refused(result::graph::launch(stream.cast(), std::ptr::null_mut()), CUDA_ERROR_INVALID_VALUE);
        refused(sys::cuMemAlloc_v2(std::ptr::null_mut(), 4).result(), CUDA_ERROR_INVALID_VALUE);
        refused(sys::cuModuleLoadData(std::ptr::null_mut(), std::ptr::null()).result(), CUDA_ERROR_INVALID_VALUE);
        refused(
            sys::cuDeviceGetAttribute(std::ptr::null_mut(), sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE, 0)
                .result(),
            CUDA_ERROR_INVALID_VALUE,
        );
    }
    // A stream of another context than the current one.
    let stream = context.new_stream().unwrap();
    let _other = self::context();
    // SAFETY: refused.
    refused(unsafe { result::memset_d8_async(0, 0, 0, stream.cu_stream()) }, CUDA_ERROR_INVALID_CONTEXT);
    // A thread without a context.
    // SAFETY: nothing is allocated.
    let elsewhere = std::thread::spawn(|| unsafe { result::malloc_sync(4) }.map_err(|error| error.0));
    assert_eq!(elsewhere.join().unwrap(), Err(CUDA_ERROR_INVALID_CONTEXT));
    refused(result::device::get(1), CUDA_ERROR_INVALID_DEVICE);
}

#[test]
fn a_kernel_that_cannot_be_read_is_refused_alone() {
    let context = context();
    let module = context.load_module(Ptx::from_src(PTX)).unwrap();
    refused(module.load_function("unknown").map(|_| ()), CUDA_ERROR_INVALID_PTX);
    refused(module.load_function("nowhere").map(|_| ()), CUDA_ERROR_NOT_FOUND);
    module.load_function("store").unwrap();
    let newer = PTX.replace("sm_80", "sm_90a");
    refused(context.load_module(Ptx::from_src(newer)).map(|_| ()), CUDA_ERROR_INVALID_PTX);
    refused(context.load_module(Ptx::from_src("no PTX")).map(|_| ()), CUDA_ERROR_INVALID_PTX);
    // Machine code; a fatbin that no build has left.
    let machine = *b"\x7fELF\x02\x01\x01\x00";
    let fatbin: Vec<u8> = [&0xBA55_ED50u32.to_le_bytes()[..], &[1, 0, 16, 0], &8u64.to_le_bytes(), &[3; 8]].concat();
    for image in [&machine[..], &fatbin] {
        // SAFETY: as long as its header says.
        refused(unsafe { result::module::load_data(image.as_ptr().cast()) }, CUDA_ERROR_NO_BINARY_FOR_GPU);
    }
}

#[test]
fn a_variable_of_a_module_is_found() {
    let _context = context();
    let text = std::ffi::CString::new(PTX).unwrap();
    let mut answer = [0u32];
    // SAFETY: PTX that ends with a zero; the variable has four bytes.
    let bytes = unsafe {
        let module = result::module::load_data(text.as_ptr().cast()).unwrap();
        let (address, bytes) = result::module::get_global(module, c"answer".into()).unwrap();
        result::memcpy_dtoh_sync(&mut answer, address).unwrap();
        refused(result::module::get_global(module, c"question".into()), CUDA_ERROR_NOT_FOUND);
        bytes
    };
    assert_eq!((bytes, answer), (4, [42]));
}

#[test]
fn a_launch_that_does_not_fit_is_refused_and_harmless() {
    let context = context();
    let (stream, shared) = (context.new_stream().unwrap(), kernel(&context, "shared"));
    let shape = |blocks, threads, shared_mem_bytes| LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes,
    };
    // SAFETY: the kernel takes nothing and does nothing.
    let launch = |shape| unsafe { stream.launch_builder(&shared).launch(shape) }.map(|_| ());
    for wrong in [shape(0, 32, 0), shape(1, 0, 0), shape(1, 65, 0), shape(1, 32, (48 << 10) - 15)] {
        refused(launch(wrong), CUDA_ERROR_INVALID_VALUE);
    }
    launch(shape(1, 64, (48 << 10) - 16)).unwrap();
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    refused(shared.set_attribute(attribute, (163 << 10) - 15), CUDA_ERROR_INVALID_VALUE);
    shared.set_attribute(attribute, (163 << 10) - 16).unwrap();
    launch(shape(1, 64, (163 << 10) - 16)).unwrap();
    // Two multiprocessors, and no promise of the kernel's but one block on each.
    // SAFETY: as above.
    let cooperative = |shape| unsafe { stream.launch_builder(&shared).launch_cooperative(shape) }.map(|_| ());
    cooperative(shape(2, 32, 0)).unwrap();
    refused(cooperative(shape(3, 32, 0)), CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
    stream.synchronize().unwrap();
}

#[test]
fn a_graph_does_its_work_when_it_is_launched() {
    let context = context();
    let (stream, twice) = (context.new_stream().unwrap(), kernel(&context, "twice"));
    let mut memory = stream.clone_htod(&[1u32, 2, 3]).unwrap();
    let address = cudarc::driver::DevicePtr::device_ptr(&memory, &stream).0;
    stream.begin_capture(THREAD_LOCAL).unwrap();
    launch(&stream, &twice, address, block(3)).unwrap();
    launch(&stream, &twice, address, block(2)).unwrap();
    // SAFETY: the range is in the allocation.
    unsafe { result::memset_d8_async(address, 9, 1, stream.cu_stream()) }.unwrap();
    assert_eq!(stream.capture_status().unwrap(), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
    assert_eq!(stream.capture_status().unwrap(), CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
    assert_eq!(stream.clone_dtoh(&memory).unwrap(), [1, 2, 3]);
    for _ in 0..2 {
        stream.memcpy_htod(&[10u32, 20, 30], &mut memory).unwrap();
        graph.launch().unwrap();
        assert_eq!(stream.clone_dtoh(&memory).unwrap(), [9, 80, 60]);
    }
}

#[test]
fn what_waits_or_allocates_spoils_a_capture() {
    let context = context();
    let stream = context.new_stream().unwrap();
    type Call<'a> = &'a dyn Fn() -> Result<(), DriverError>;
    // SAFETY: refused, so nothing is allocated.
    let allocate = || unsafe { result::malloc_sync(4) }.map(|_| ());
    // SAFETY: no bytes.
    let copy = || unsafe { result::memcpy_dtod_sync(0, 0, 0) };
    let calls: [(&str, Call); 5] = [
        ("waiting for the stream", &|| stream.synchronize()),
        ("waiting for the context", &|| context.synchronize()),
        ("allocating", &allocate),
        ("copying at once", &copy),
        ("loading a module", &|| context.load_module(Ptx::from_src(PTX)).map(|_| ())),
    ];
    for (what, call) in calls {
        stream.begin_capture(THREAD_LOCAL).unwrap();
        assert_eq!(call().map_err(|error| error.0), Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED), "{what}");
        let status = stream.capture_status().unwrap();
        assert_eq!(status, CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED, "{what}");
        // SAFETY: refused.
        let after = unsafe { result::memset_d8_async(0, 0, 0, stream.cu_stream()) };
        assert_eq!(after.map_err(|error| error.0), Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED), "{what}");
        let ended = stream.end_capture(CUgraphInstantiate_flags(0)).map(|_| ());
        assert_eq!(ended.map_err(|error| error.0), Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED), "{what}");
        stream.synchronize().unwrap();
    }
    // Another thread is not concerned, nor is a capture that does not mind.
    stream.begin_capture(THREAD_LOCAL).unwrap();
    std::thread::scope(|scope| scope.spawn(|| context.synchronize()).join().unwrap()).unwrap();
    stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    context.synchronize().unwrap();
    stream.end_capture(CUgraphInstantiate_flags(0)).unwrap();
}

#[test]
fn streams_of_a_capture_come_together() {
    let context = context();
    let (one, two, twice) = (context.new_stream().unwrap(), context.new_stream().unwrap(), kernel(&context, "twice"));
    let memory = one.clone_htod(&[3u32]).unwrap();
    let address = cudarc::driver::DevicePtr::device_ptr(&memory, &one).0;
    let outside = two.record_event(None).unwrap();
    for joined in [false, true] {
        one.begin_capture(THREAD_LOCAL).unwrap();
        let fork = one.record_event(None).unwrap();
        two.wait(&fork).unwrap();
        launch(&two, &twice, address, block(1)).unwrap();
        if joined {
            one.wait(&two.record_event(None).unwrap()).unwrap();
            launch(&one, &twice, address, block(1)).unwrap();
        }
        let ended = one.end_capture(CUgraphInstantiate_flags(0));
        if joined {
            ended.unwrap().unwrap().launch().unwrap();
            assert_eq!(one.clone_dtoh(&memory).unwrap(), [12]);
        } else {
            refused(ended.map(|_| ()), CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        }
    }
    // What was recorded outside cannot be waited for inside, nor the other way round.
    one.begin_capture(THREAD_LOCAL).unwrap();
    let inside = one.record_event(None).unwrap();
    refused(inside.synchronize(), CUDA_ERROR_CAPTURED_EVENT);
    refused(one.wait(&outside), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    refused(one.end_capture(CUgraphInstantiate_flags(0)).map(|_| ()), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    // The thread that began ends.
    one.begin_capture(THREAD_LOCAL).unwrap();
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| one.end_capture(CUgraphInstantiate_flags(0)).map(|_| ())).join().unwrap()
    });
    refused(ended, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
}
