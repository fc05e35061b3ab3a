//! Streams and events. All that was enqueued is done, so there is nothing to wait for.

use crate::exports;
use crate::pointers::Out;
use crate::state::{Event, Last, Stream, handle, in_context, initialised, pointer};
use crate::work::Place;
use crate::{Outcome, state::Handle};
use cudarc::driver::sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING;
use cudarc::driver::sys::CUresult::*;
use cudarc::driver::sys::{CUcontext, CUevent, CUstream};
use std::ffi::{c_int, c_uint};
use std::time::Instant;

fn create(stream: &Out<CUstream>, flags: c_uint, priority: c_int) -> Outcome {
    in_context(|driver, current| {
        stream.require()?;
        if flags > 1 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let new = driver.new_handle();
        driver.streams.insert(new, Stream { context: current, flags, priority, recorded: None });
        stream.put(pointer(new))
    })
}

/// The stream itself, whichever context is current.
fn existing<T>(stream: CUstream, f: impl FnOnce(&Stream) -> Outcome<T>) -> Outcome<T> {
    initialised(|driver| f(driver.streams.get(&handle(stream)).ok_or(CUDA_ERROR_INVALID_HANDLE)?))
}

fn is_done(stream: CUstream) -> Outcome {
    in_context(|driver, current| {
        let place = driver.place(current, handle(stream))?;
        driver.not_captured(current, place)
    })
}

/// When an event was recorded, if it was.
fn when(event: CUevent) -> Outcome<Option<Instant>> {
    in_context(|driver, _| match driver.events.get(&handle(event)).ok_or(CUDA_ERROR_INVALID_HANDLE)?.last {
        Last::Nowhere => Ok(None),
        Last::At(time) => Ok(Some(time)),
        Last::Captured(_) => Err(CUDA_ERROR_CAPTURED_EVENT),
    })
}

fn milliseconds(to: &Out<f32>, start: CUevent, end: CUevent) -> Outcome {
    let has_time = |event: CUevent| -> Outcome<bool> {
        in_context(|driver, _| Ok(driver.events.get(&handle(event)).ok_or(CUDA_ERROR_INVALID_HANDLE)?.has_time))
    };
    match (when(start)?, when(end)?, has_time(start)? && has_time(end)?) {
        (Some(start), Some(end), true) => to.put(end.saturating_duration_since(start).as_secs_f32() * 1e3),
        _ => Err(CUDA_ERROR_INVALID_HANDLE),
    }
}

fn record(event: CUevent, stream: CUstream) -> Outcome {
    in_context(|driver, current| driver.record_event(current, handle(event), handle(stream)))
}

exports! {
    fn cuStreamCreate(stream: Out<CUstream>, flags: c_uint) {
        create(&stream, flags, 0)
    }
    fn cuStreamCreateWithPriority(stream: Out<CUstream>, flags: c_uint, priority: c_int) {
        create(&stream, flags, priority.clamp(-5, 0))
    }
    fn cuStreamDestroy_v2(stream: CUstream) {
        initialised(|driver| {
            let stream = driver.streams.remove(&handle(stream)).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
            if let Some(recorded) = stream.recorded {
                driver.spoil(recorded.capture);
            }
            Ok(())
        })
    }
    fn cuStreamGetCtx(stream: CUstream, context: Out<CUcontext>) {
        if let 0..=2 = handle(stream) {
            return in_context(|_, current| context.put(pointer(current)));
        }
        existing(stream, |stream| context.put(pointer(stream.context)))
    }
    fn cuStreamGetFlags(stream: CUstream, flags: Out<c_uint>) {
        if let 0..=2 = handle(stream) {
            return in_context(|_, _| flags.put(0));
        }
        existing(stream, |stream| flags.put(stream.flags))
    }
    fn cuStreamGetPriority(stream: CUstream, priority: Out<c_int>) {
        if let 0..=2 = handle(stream) {
            return in_context(|_, _| priority.put(0));
        }
        existing(stream, |stream| priority.put(stream.priority))
    }
    fn cuStreamSynchronize(stream: CUstream) {
        is_done(stream)
    }
    fn cuStreamQuery(stream: CUstream) {
        is_done(stream)
    }
    fn cuStreamWaitEvent(stream: CUstream, event: CUevent, _flags: c_uint) {
        in_context(|driver, current| driver.wait_event(current, handle(stream), handle(event)))
    }
    fn cuEventCreate(event: Out<CUevent>, flags: c_uint) {
        in_context(|driver, current| {
            event.require()?;
            if flags > 7 {
                return Err(CUDA_ERROR_INVALID_VALUE);
            }
            let has_time = flags & CU_EVENT_DISABLE_TIMING as c_uint == 0;
            let new = driver.new_handle();
            driver.events.insert(new, Event { context: current, has_time, last: Last::Nowhere });
            event.put(pointer(new))
        })
    }
    fn cuEventDestroy_v2(event: CUevent) {
        initialised(|driver| driver.events.remove(&handle(event)).map(|_| ()).ok_or(CUDA_ERROR_INVALID_HANDLE))
    }
    fn cuEventRecord(event: CUevent, stream: CUstream) {
        record(event, stream)
    }
    fn cuEventRecordWithFlags(event: CUevent, stream: CUstream, flags: c_uint) {
        if flags != 0 {
            return Err(CUDA_ERROR_NOT_SUPPORTED);
        }
        record(event, stream)
    }
    fn cuEventQuery(event: CUevent) {
        when(event).map(|_| ())
    }
    fn cuEventSynchronize(event: CUevent) {
        when(event).map(|_| ())
    }
    fn cuEventElapsedTime(time: Out<f32>, start: CUevent, end: CUevent) {
        milliseconds(&time, start, end)
    }
    fn cuEventElapsedTime_v2(time: Out<f32>, start: CUevent, end: CUevent) {
        milliseconds(&time, start, end)
    }
}

/// The stream of a capture call: default streams cannot be captured.
pub(super) fn capturable(place: Place) -> Outcome<Handle> {
    match place {
        Place::Stream(stream) => Ok(stream),
        Place::Default => Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED),
    }
}
