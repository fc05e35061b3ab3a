//! Stream capture and graphs.

use super::stream::capturable;
use crate::pointers::Out;
use crate::state::{handle, in_context, initialised, pointer};
use crate::work::{Capture, Recorded};
use crate::{Outcome, exports};
use cudarc::driver::sys::CUresult::*;
use cudarc::driver::sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
use cudarc::driver::sys::CUstreamCaptureStatus_enum::*;
use cudarc::driver::sys::{CUgraph, CUgraphExec, CUgraphInstantiate_flags, CUstream};
use std::collections::HashSet;
use std::ffi::{c_uint, c_ulonglong};

exports! {
    fn cuStreamBeginCapture_v2(stream: CUstream, mode: c_uint) {
        in_context(|driver, current| {
            let stream = capturable(driver.place(current, handle(stream))?)?;
            if mode > CU_STREAM_CAPTURE_MODE_RELAXED as c_uint {
                return Err(CUDA_ERROR_INVALID_VALUE);
            }
            if driver.streams[&stream].recorded.is_some() {
                return Err(CUDA_ERROR_ILLEGAL_STATE);
            }
            let (new, thread) = (driver.new_handle(), std::thread::current().id());
            let capture = Capture { context: current, origin: stream, mode, thread, work: Vec::new(), valid: true };
            driver.captures.insert(new, capture);
            let recorded = Recorded { capture: new, seen: HashSet::new() };
            driver.streams.get_mut(&stream).ok_or(CUDA_ERROR_INVALID_HANDLE)?.recorded = Some(recorded);
            Ok(())
        })
    }
    fn cuStreamEndCapture(stream: CUstream, graph: Out<CUgraph>) {
        in_context(|driver, current| {
            graph.put(std::ptr::null_mut())?;
            let stream = capturable(driver.place(current, handle(stream))?)?;
            let work = driver.end_capture(stream)?;
            let new = driver.new_handle();
            driver.graphs.insert(new, work);
            graph.put(pointer(new))
        })
    }
    fn cuStreamIsCapturing(stream: CUstream, status: Out<c_uint>) {
        in_context(|driver, current| {
            let place = driver.place(current, handle(stream))?;
            status.put(match driver.recording(current, place) {
                Ok(Some(_)) => CU_STREAM_CAPTURE_STATUS_ACTIVE as c_uint,
                Ok(None) => CU_STREAM_CAPTURE_STATUS_NONE as c_uint,
                Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED) => CU_STREAM_CAPTURE_STATUS_INVALIDATED as c_uint,
                Err(code) => return Err(code),
            })
        })
    }
    fn cuGraphInstantiateWithFlags(executable: Out<CUgraphExec>, graph: CUgraph, flags: c_ulonglong) {
        in_context(|driver, _| {
            executable.require()?;
            let free = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH.0;
            let from_device = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH.0;
            let both = c_ulonglong::from(free | from_device);
            if flags > 15 || flags & both == both {
                return Err(CUDA_ERROR_INVALID_VALUE);
            }
            if flags & c_ulonglong::from(from_device) != 0 {
                return Err(CUDA_ERROR_NOT_SUPPORTED);
            }
            let work = driver.graphs.get(&handle(graph)).ok_or(CUDA_ERROR_INVALID_VALUE)?.clone();
            let new = driver.new_handle();
            driver.executable.insert(new, work);
            executable.put(pointer(new))
        })
    }
    fn cuGraphLaunch(executable: CUgraphExec, stream: CUstream) {
        in_context(|driver, current| {
            let work = driver.executable.get(&handle(executable)).ok_or(CUDA_ERROR_INVALID_VALUE)?.clone();
            work.into_iter().try_for_each(|work| driver.enqueue(current, handle(stream), work))
        })
    }
    fn cuGraphUpload(executable: CUgraphExec, stream: CUstream) {
        in_context(|driver, current| {
            driver.place(current, handle(stream))?;
            driver.executable.get(&handle(executable)).map(|_| ()).ok_or(CUDA_ERROR_INVALID_VALUE)
        })
    }
    fn cuGraphExecDestroy(executable: CUgraphExec) {
        initialised(|driver| gone(driver.executable.remove(&handle(executable))))
    }
    fn cuGraphDestroy(graph: CUgraph) {
        initialised(|driver| gone(driver.graphs.remove(&handle(graph))))
    }
}

fn gone<T>(removed: Option<T>) -> Outcome {
    removed.map(|_| ()).ok_or(CUDA_ERROR_INVALID_VALUE)
}
