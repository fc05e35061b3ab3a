//! NCCL's shared library: what is needed of it, found when the program runs.

use crate::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};

/// `ncclInProgress`
const IN_PROGRESS: c_int = 7;
/// `ncclSum`
const SUM: c_int = 0;

type OfCommunicator = unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int;
type AllReduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;

/// The functions of NCCL 2 that sums need. The library stays loaded.
#[derive(Debug, Clone, Copy)]
pub struct Nccl {
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    size: OfCommunicator,
    rank: OfCommunicator,
    device: OfCommunicator,
    all_reduce: AllReduce,
}

impl Nccl {
    /// The library of the host's own NCCL, if it has loaded one, or the one that the system's loader finds.
    ///
    /// # Errors
    /// [`Error::NoLibrary`], [`Error::NoSymbol`].
    pub fn load() -> Result<Self> {
        Self::open("libnccl.so.2")
    }

    /// The library in a file: a path, or a name that the system's loader looks for.
    ///
    /// # Errors
    /// [`Error::NoLibrary`], [`Error::NoSymbol`].
    pub fn open(library: &str) -> Result<Self> {
        // SAFETY: NCCL's library is made to be loaded like this.
        let loaded = unsafe { Library::new(library) }.map_err(|error| {
            let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            Error::NoLibrary { library: library.to_owned(), reason }
        })?;
        // SAFETY: the types are those of nccl.h.
        let nccl = unsafe {
            Self {
                error_string: symbol(&loaded, library, "ncclGetErrorString")?,
                size: symbol(&loaded, library, "ncclCommCount")?,
                rank: symbol(&loaded, library, "ncclCommUserRank")?,
                device: symbol(&loaded, library, "ncclCommCuDevice")?,
                all_reduce: symbol(&loaded, library, "ncclAllReduce")?,
            }
        };
        // It has threads of its own: unloading it is not safe.
        std::mem::forget(loaded);
        Ok(nccl)
    }

    /// # Safety
    /// `communicator` is one of this library's.
    pub(crate) unsafe fn rank(&self, communicator: *mut c_void) -> Result<usize> {
        // SAFETY: the caller's promise.
        unsafe { self.ask("ncclCommUserRank", self.rank, communicator) }.map(|rank| rank as usize)
    }

    /// # Safety
    /// As [`rank`](Self::rank).
    pub(crate) unsafe fn size(&self, communicator: *mut c_void) -> Result<usize> {
        // SAFETY: the caller's promise.
        unsafe { self.ask("ncclCommCount", self.size, communicator) }.map(|size| size as usize)
    }

    /// # Safety
    /// As [`rank`](Self::rank).
    pub(crate) unsafe fn device(&self, communicator: *mut c_void) -> Result<c_int> {
        // SAFETY: the caller's promise.
        unsafe { self.ask("ncclCommCuDevice", self.device, communicator) }
    }

    /// # Safety
    /// As [`rank`](Self::rank).
    unsafe fn ask(&self, call: &'static str, function: OfCommunicator, communicator: *mut c_void) -> Result<c_int> {
        let mut answer = 0;
        // SAFETY: a communicator, and a pointer to an integer.
        let code = unsafe { function(communicator, &mut answer) };
        self.check(call, code).map(|()| answer)
    }

    /// Enqueues the sum over ranks, in place.
    ///
    /// # Safety
    /// `communicator` is one of this library's; `address` is that of `len` numbers of `data_type` in its device's memory, and `stream` a stream
    /// of that device or NULL.
    pub(crate) unsafe fn all_reduce(
        &self,
        address: u64,
        len: usize,
        data_type: c_int,
        communicator: *mut c_void,
        stream: *mut c_void,
    ) -> Result<()> {
        let numbers = address as *mut c_void;
        // SAFETY: the caller's promise. Sums in place are allowed.
        let code = unsafe { (self.all_reduce)(numbers, numbers, len, data_type, SUM, communicator, stream) };
        self.check("ncclAllReduce", code)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        match code {
            0 => Ok(()),
            IN_PROGRESS => Err(Error::InProgress { call }),
            _ => {
                // SAFETY: it takes any number, and returns a string that is never freed.
                let reason = unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy().into_owned();
                Err(Error::Nccl { call, code, reason })
            }
        }
    }
}

/// # Safety
/// `T` is the function's type.
unsafe fn symbol<T: Copy>(loaded: &Library, library: &str, symbol: &'static str) -> Result<T> {
    let missing = |_| Error::NoSymbol { library: library.to_owned(), symbol };
    // SAFETY: the caller's promise.
    unsafe { loaded.get::<T>(symbol.as_bytes()) }.map(|found| *found).map_err(missing)
}
