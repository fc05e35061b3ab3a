//! What is enqueued on a stream: done at once, or recorded by a capture and done when its graph is launched.
//!
//! A capture records work in the order of the calls, which is one of the orders that the graph allows. What each stream has seen of it says
//! whether the streams came together again before its end.

use crate::pointers::Host;
use crate::state::{Context, Driver, Handle, Last};
use crate::{Outcome, say};
use cudarc::driver::sys::CUresult::*;
use cudarc::driver::sys::CUstream_flags::CU_STREAM_NON_BLOCKING;
use cudarc::driver::sys::CUstreamCaptureMode_enum::{
    CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
};
use ptx_emulator::{Argument, Fault, Grid, Rule};
use std::collections::HashSet;
use std::thread::ThreadId;
use std::time::Instant;

/// A piece of work with its arguments; the ranges were those of allocations when it was enqueued.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    Upload { from: Host, to: u64, bytes: usize },
    Download { from: u64, to: Host, bytes: usize },
    Copy { from: u64, to: u64, bytes: usize },
    Fill { to: u64, pattern: Vec<u8>, count: usize },
    Launch { function: Handle, grid: Grid, arguments: Vec<Argument> },
}

/// A capture under way.
pub(crate) struct Capture {
    pub context: Handle,
    /// The stream that it began on and must end on.
    pub origin: Handle,
    pub mode: u32,
    pub thread: ThreadId,
    pub work: Vec<Work>,
    /// No call has broken its rules.
    pub valid: bool,
}

/// What of a capture a stream has seen, or an event has recorded.
#[derive(Clone)]
pub(crate) struct Recorded {
    pub capture: Handle,
    /// Indices of the work that is before.
    pub seen: HashSet<usize>,
}

/// A stream of the current context.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The default stream, which waits for all streams that do not say otherwise.
    Default,
    Stream(Handle),
}

impl Driver {
    pub(crate) fn place(&self, context: Handle, stream: Handle) -> Outcome<Place> {
        const LEGACY: Handle = 1;
        const PER_THREAD: Handle = 2;
        if let 0 | LEGACY | PER_THREAD = stream {
            return Ok(Place::Default);
        }
        match self.streams.get(&stream) {
            Some(found) if found.context == context => Ok(Place::Stream(stream)),
            Some(_) => {
                say!("a stream of another context than the current one");
                Err(CUDA_ERROR_INVALID_CONTEXT)
            }
            None => Err(CUDA_ERROR_INVALID_HANDLE),
        }
    }

    /// What a stream has recorded, if it is captured; an error if the capture is spoilt, or if this is a default stream's work and a stream
    /// that it waits for is captured.
    pub(crate) fn recording(&mut self, context: Handle, place: Place) -> Outcome<Option<&mut Recorded>> {
        if place == Place::Default {
            let waits = |flags: u32| flags & CU_STREAM_NON_BLOCKING as u32 == 0;
            let spoilt = self.streams.values().filter(|stream| stream.context == context && waits(stream.flags));
            let spoilt: Vec<Handle> = spoilt.filter_map(|s| Some(s.recorded.as_ref()?.capture)).collect();
            spoilt.iter().for_each(|capture| self.spoil(*capture));
            return if spoilt.is_empty() { Ok(None) } else { Err(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) };
        }
        let Place::Stream(stream) = place else { return Ok(None) };
        let recorded = self.streams.get_mut(&stream).and_then(|stream| stream.recorded.as_mut());
        let Some(recorded) = recorded else { return Ok(None) };
        match self.captures.get(&recorded.capture) {
            Some(capture) if capture.valid => Ok(Some(recorded)),
            _ => Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
        }
    }

    pub(crate) fn spoil(&mut self, capture: Handle) {
        if let Some(capture) = self.captures.get_mut(&capture) {
            capture.valid = false;
        }
    }

    /// Refuses a call that a captured stream cannot take.
    pub(crate) fn not_captured(&mut self, context: Handle, place: Place) -> Outcome {
        let Some(capture) = self.recording(context, place)?.map(|recorded| recorded.capture) else { return Ok(()) };
        self.spoil(capture);
        Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
    }

    /// Refuses a call that may wait for all streams, or change what a graph counts on, while this thread captures.
    pub(crate) fn not_capturing(&mut self, context: Handle) -> Outcome {
        let thread = std::thread::current().id();
        let mut refused = Ok(());
        for capture in self.captures.values_mut().filter(|capture| capture.context == context) {
            let is_global = capture.mode == CU_STREAM_CAPTURE_MODE_GLOBAL as u32;
            let is_local = capture.mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as u32;
            if is_global || is_local && capture.thread == thread {
                capture.valid = false;
                refused = Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
            }
        }
        refused
    }

    /// Does work in the order of a stream: at once, as all before it is done, or records it.
    pub(crate) fn enqueue(&mut self, context: Handle, stream: Handle, work: Work) -> Outcome {
        let place = self.place(context, stream)?;
        let Some(recorded) = self.recording(context, place)? else {
            return self.perform(context, &work);
        };
        let capture = recorded.capture;
        let index = self.captures[&capture].work.len();
        if let Some(recorded) = self.recording(context, place)? {
            recorded.seen.insert(index);
        }
        self.captures.get_mut(&capture).ok_or(CUDA_ERROR_INVALID_HANDLE)?.work.push(work);
        Ok(())
    }

    /// Does work. A launch that is refused is an error; what goes wrong later is the context's failure, which the next calls return.
    pub(crate) fn perform(&mut self, context: Handle, work: &Work) -> Outcome {
        let Self { contexts, functions, modules, .. } = self;
        let context = contexts.get_mut(&context).ok_or(CUDA_ERROR_INVALID_CONTEXT)?;
        if let Some(code) = context.failed {
            return Err(code);
        }
        let done = match work {
            Work::Launch { function, grid, arguments } => {
                let loaded = functions.get(function).and_then(|f| Some((f, modules.get(&f.module)?)));
                match loaded {
                    Some((function, loaded)) => {
                        let launched = context.device.launch(&loaded.module, &function.kernel, *grid, arguments);
                        launched.map(|_| ()).map_err(Failure::Fault)
                    }
                    None => Err(Failure::Gone),
                }
            }
            copy => context.copy(copy),
        };
        if let Err(failure) = done {
            match failure {
                Failure::Fault(fault) if fault.rule == Rule::Launch && fault.here.is_none() => {
                    say!("{fault}");
                    return Err(CUDA_ERROR_INVALID_VALUE);
                }
                Failure::Fault(fault) => say!("{fault}"),
                Failure::Gone => say!("a graph launches a kernel whose module is unloaded"),
                Failure::Host => say!("a graph copies from or to host memory at null"),
            }
            context.failed = Some(CUDA_ERROR_LAUNCH_FAILED);
        }
        Ok(())
    }

    /// Records an event behind what a stream holds.
    pub(crate) fn record_event(&mut self, context: Handle, event: Handle, stream: Handle) -> Outcome {
        let place = self.place(context, stream)?;
        let last = match self.recording(context, place)? {
            Some(recorded) => Last::Captured(recorded.clone()),
            None => Last::At(Instant::now()),
        };
        let event = self.events.get_mut(&event).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        if event.context != context {
            return Err(CUDA_ERROR_INVALID_CONTEXT);
        }
        event.last = last;
        Ok(())
    }

    /// Makes a stream wait for an event: it becomes part of the event's capture.
    pub(crate) fn wait_event(&mut self, context: Handle, stream: Handle, event: Handle) -> Outcome {
        let place = self.place(context, stream)?;
        let waited = match &self.events.get(&event).ok_or(CUDA_ERROR_INVALID_HANDLE)?.last {
            Last::Nowhere => return Ok(()),
            Last::At(_) => None,
            Last::Captured(recorded) => Some(recorded.clone()),
        };
        let recorded = self.recording(context, place)?.map(|recorded| recorded.clone());
        match (recorded, waited) {
            (None, None) => Ok(()),
            // All that was before the event is done, but a graph cannot wait for what is outside.
            (Some(recorded), None) => {
                self.spoil(recorded.capture);
                Err(CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
            }
            (before, Some(waited)) => {
                let is_active = self.captures.get(&waited.capture).is_some_and(|capture| capture.valid);
                let Place::Stream(stream) = place else { return Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) };
                if !is_active {
                    return Err(CUDA_ERROR_CAPTURED_EVENT);
                }
                if let Some(before) = &before
                    && before.capture != waited.capture
                {
                    self.spoil(before.capture);
                    self.spoil(waited.capture);
                    return Err(CUDA_ERROR_STREAM_CAPTURE_MERGE);
                }
                let mut joined = waited;
                joined.seen.extend(before.into_iter().flat_map(|before| before.seen));
                self.streams.get_mut(&stream).ok_or(CUDA_ERROR_INVALID_HANDLE)?.recorded = Some(joined);
                Ok(())
            }
        }
    }

    /// Ends the capture that began on a stream and gives its work.
    pub(crate) fn end_capture(&mut self, stream: Handle) -> Outcome<Vec<Work>> {
        let recorded = self.streams.get(&stream).ok_or(CUDA_ERROR_INVALID_HANDLE)?.recorded.clone();
        let recorded = recorded.ok_or(CUDA_ERROR_ILLEGAL_STATE)?;
        let capture = self.captures.get_mut(&recorded.capture).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        if capture.origin != stream {
            capture.valid = false;
            return Err(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
        }
        let is_relaxed =
            ![CU_STREAM_CAPTURE_MODE_GLOBAL as u32, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as u32].contains(&capture.mode);
        if !is_relaxed && capture.thread != std::thread::current().id() {
            capture.valid = false;
            return Err(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        }
        let ended = self.captures.remove(&recorded.capture).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        for stream in self.streams.values_mut() {
            stream.recorded.take_if(|theirs| theirs.capture == recorded.capture);
        }
        if !ended.valid {
            return Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        if recorded.seen.len() < ended.work.len() {
            return Err(CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        }
        Ok(ended.work)
    }
}

/// Why work could not be done.
enum Failure {
    Fault(Fault),
    Gone,
    Host,
}

impl Context {
    fn copy(&mut self, work: &Work) -> Result<(), Failure> {
        let device = &mut self.device;
        match work {
            Work::Upload { bytes: 0, .. } | Work::Download { bytes: 0, .. } => Ok(()),
            Work::Upload { from, to, bytes } => {
                let data = from.read(*bytes).map_err(|_| Failure::Host)?;
                device.write(*to, &data).map_err(Failure::Fault)
            }
            Work::Download { from, to, bytes } => {
                let data = device.read(*from, *bytes).map_err(Failure::Fault)?;
                to.write(&data).map_err(|_| Failure::Host)
            }
            Work::Copy { from, to, bytes } => device.copy(*from, *to, *bytes).map_err(Failure::Fault),
            Work::Fill { to, pattern, count } => device.write(*to, &pattern.repeat(*count)).map_err(Failure::Fault),
            Work::Launch { .. } => Ok(()),
        }
    }
}
