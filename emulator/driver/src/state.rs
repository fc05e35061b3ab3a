//! Contexts, and the handles of what is in them.
//!
//! A handle is a number that is never given out twice, so one that is wrong or no longer good is found to be.

use crate::chip::{Chip, MEMORY};
use crate::work::{Capture, Recorded, Work};
use crate::{Outcome, say};
use cudarc::driver::sys::CUresult::{self, *};
use ptx_emulator::{Device, Module, Options};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Instant;

/// A handle as a number.
pub(crate) type Handle = usize;

/// The handle behind a pointer of the API.
pub(crate) fn handle<T>(pointer: *mut T) -> Handle {
    pointer.addr()
}

/// A handle as a pointer of the API, which nobody follows.
pub(crate) fn pointer<T>(handle: Handle) -> *mut T {
    std::ptr::without_provenance_mut(handle)
}

/// All that the library knows.
pub(crate) struct Driver {
    pub chip: Chip,
    pub initialised: bool,
    next: Handle,
    /// The device's own context, and how often it was asked for.
    pub primary: Option<(Handle, u32)>,
    pub contexts: HashMap<Handle, Context>,
    pub streams: HashMap<Handle, Stream>,
    pub events: HashMap<Handle, Event>,
    pub modules: HashMap<Handle, Loaded>,
    pub functions: HashMap<Handle, Function>,
    pub captures: HashMap<Handle, Capture>,
    /// Graphs, whether to be launched or not.
    pub graphs: HashMap<Handle, Vec<Work>>,
    pub executable: HashMap<Handle, Vec<Work>>,
}

/// Memory, and what became of it.
pub(crate) struct Context {
    pub device: Device,
    /// The code that every call returns from the first broken rule on.
    pub failed: Option<CUresult>,
    /// Bytes by address.
    pub allocations: HashMap<u64, usize>,
    pub flags: u32,
    pub limits: HashMap<u32, usize>,
    pub cache_config: u32,
}

pub(crate) struct Stream {
    pub context: Handle,
    pub flags: u32,
    pub priority: i32,
    /// The capture that it is part of.
    pub recorded: Option<Recorded>,
}

pub(crate) struct Event {
    pub context: Handle,
    pub has_time: bool,
    pub last: Last,
}

/// Where an event was last recorded.
pub(crate) enum Last {
    Nowhere,
    At(Instant),
    Captured(Recorded),
}

pub(crate) struct Loaded {
    pub context: Handle,
    pub module: Module,
    /// Handles of its functions.
    pub functions: HashMap<String, Handle>,
}

pub(crate) struct Function {
    pub module: Handle,
    pub kernel: String,
    /// What a launch may ask for.
    pub dynamic_shared: u32,
}

thread_local! {
    /// The contexts that this thread has pushed; the last is current.
    static STACK: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

pub(crate) fn with_stack<T>(f: impl FnOnce(&mut Vec<Handle>) -> T) -> T {
    STACK.with_borrow_mut(f)
}

/// Runs a call that changes something. A call that panicked has left what it had done.
pub(crate) fn locked<T>(f: impl FnOnce(&mut Driver) -> Outcome<T>) -> Outcome<T> {
    static DRIVER: LazyLock<Mutex<Result<Driver, CUresult>>> = LazyLock::new(|| {
        Mutex::new(Chip::from_environment().map(Driver::new).map_err(|reason| {
            say!("{reason}");
            CUDA_ERROR_INVALID_VALUE
        }))
    });
    let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    driver.as_mut().map_err(|code| *code).and_then(f)
}

/// Runs a call that needs `cuInit` before it.
pub(crate) fn initialised<T>(f: impl FnOnce(&mut Driver) -> Outcome<T>) -> Outcome<T> {
    locked(|driver| if driver.initialised { f(driver) } else { Err(CUDA_ERROR_NOT_INITIALIZED) })
}

/// Runs a call on this thread's context, which must not have failed.
pub(crate) fn in_context<T>(f: impl FnOnce(&mut Driver, Handle) -> Outcome<T>) -> Outcome<T> {
    initialised(|driver| {
        let current = driver.current()?;
        match driver.contexts[&current].failed {
            Some(code) => Err(code),
            None => f(driver, current),
        }
    })
}

impl Driver {
    fn new(chip: Chip) -> Self {
        Self {
            chip,
            initialised: false,
            next: 0x1000,
            primary: None,
            contexts: HashMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            captures: HashMap::new(),
            graphs: HashMap::new(),
            executable: HashMap::new(),
        }
    }

    pub(crate) fn new_handle(&mut self) -> Handle {
        self.next += 0x10;
        self.next
    }

    pub(crate) fn current(&self) -> Outcome<Handle> {
        let top = with_stack(|stack| stack.last().copied()).ok_or(CUDA_ERROR_INVALID_CONTEXT)?;
        if self.contexts.contains_key(&top) { Ok(top) } else { Err(CUDA_ERROR_CONTEXT_IS_DESTROYED) }
    }

    pub(crate) fn new_context(&mut self, flags: u32) -> Handle {
        let options = Options {
            shared_limit: self.chip.shared_limit(),
            check_races: self.chip.check_races,
            ..Options::default()
        };
        let context = Context {
            device: Device::new(options),
            failed: None,
            allocations: HashMap::new(),
            flags,
            limits: HashMap::new(),
            cache_config: 0,
        };
        let handle = self.new_handle();
        self.contexts.insert(handle, context);
        handle
    }

    /// Ends a context and all that is in it.
    pub(crate) fn end_context(&mut self, context: Handle) {
        self.contexts.remove(&context);
        self.streams.retain(|_, stream| stream.context != context);
        self.events.retain(|_, event| event.context != context);
        self.modules.retain(|_, module| module.context != context);
        let modules = &self.modules;
        self.functions.retain(|_, function| modules.contains_key(&function.module));
        self.captures.retain(|_, capture| capture.context != context);
    }

    pub(crate) fn context(&mut self, context: Handle) -> Outcome<&mut Context> {
        self.contexts.get_mut(&context).ok_or(CUDA_ERROR_INVALID_CONTEXT)
    }

    pub(crate) fn function(&self, function: Handle) -> Outcome<(&Function, &Loaded)> {
        let function = self.functions.get(&function).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        Ok((function, self.modules.get(&function.module).ok_or(CUDA_ERROR_INVALID_HANDLE)?))
    }
}

impl Context {
    /// Uninitialised memory.
    pub(crate) fn alloc(&mut self, bytes: usize) -> Outcome<u64> {
        if bytes == 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        if bytes > self.unused() {
            return Err(CUDA_ERROR_OUT_OF_MEMORY);
        }
        let address = self.device.alloc(bytes);
        self.allocations.insert(address, bytes);
        Ok(address)
    }

    /// Bytes that nobody has.
    pub(crate) fn unused(&self) -> usize {
        MEMORY - self.allocations.values().sum::<usize>()
    }

    pub(crate) fn free(&mut self, address: u64) -> Outcome {
        if address == 0 {
            return Ok(());
        }
        if self.allocations.remove(&address).is_none() {
            say!("{address:#x} is freed, but it is not the start of a live allocation");
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        self.device.free(address);
        Ok(())
    }

    /// Refuses a range that is not inside one allocation.
    pub(crate) fn check(&mut self, address: u64, bytes: usize) -> Outcome {
        if bytes == 0 {
            return Ok(());
        }
        self.device.check(address, bytes).map_err(|fault| {
            say!("{fault}");
            CUDA_ERROR_INVALID_VALUE
        })
    }
}
