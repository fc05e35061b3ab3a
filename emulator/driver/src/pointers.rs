//! Pointers as callers pass them. By the API's contract each is null or points to what its type says; null and misaligned ones are refused,
//! the rest is trusted. No other file follows a caller's pointer.

use crate::Outcome;
use cudarc::driver::sys::CUresult::CUDA_ERROR_INVALID_VALUE;
use std::ffi::{CStr, c_char, c_void};

/// To a variable, or to as many of them as another argument says, that the call writes.
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub(crate) fn put(&self, value: T) -> Outcome {
        if self.0.is_null() || !self.0.is_aligned() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: the caller's pointer is to a variable, see the file's head.
        unsafe { self.0.write(value) };
        Ok(())
    }

    /// As `put`, where the API allows null for what the caller does not want.
    pub(crate) fn put_if_wanted(&self, value: T) -> Outcome {
        if self.0.is_null() { Ok(()) } else { self.put(value) }
    }

    pub(crate) fn require(&self) -> Outcome {
        if self.0.is_null() { Err(CUDA_ERROR_INVALID_VALUE) } else { Ok(()) }
    }

    pub(crate) fn address(&self) -> usize {
        self.0.addr()
    }
}

impl<T: Copy> Out<T> {
    /// Writes all of the caller's array, which is as long.
    pub(crate) fn fill(&self, values: &[T]) -> Outcome {
        self.require()?;
        // SAFETY: the caller's array has room, see the file's head; it is none of ours.
        unsafe { self.0.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Ok(())
    }
}

/// To as many values as another argument says, that the call reads.
#[repr(transparent)]
pub(crate) struct In<T>(*const T);

impl<T: Copy> In<T> {
    pub(crate) fn read(&self, count: usize) -> Outcome<Vec<T>> {
        if self.0.is_null() || !self.0.is_aligned() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: the caller's array is as long, see the file's head.
        Ok(unsafe { std::slice::from_raw_parts(self.0, count) }.to_vec())
    }

    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }
}

/// To text that ends with a zero.
#[repr(transparent)]
pub(crate) struct Text(*const c_char);

impl Text {
    pub(crate) fn read(&self) -> Outcome<String> {
        if self.0.is_null() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: the caller's text ends with a zero, see the file's head.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}

/// To an image of kernels: a fatbin, which says how long it is, a cubin, or PTX that ends with a zero.
#[repr(transparent)]
pub(crate) struct Image(*const c_void);

const FATBIN: u32 = 0xBA55_ED50;
const ELF: u32 = u32::from_le_bytes(*b"\x7fELF");

pub(crate) enum ImageBytes {
    Fatbin(Vec<u8>),
    Machine,
    Ptx(String),
}

impl Image {
    pub(crate) fn read(&self) -> Outcome<ImageBytes> {
        let bytes = self.0.cast::<u8>();
        // Byte by byte, as text may be shorter than any header.
        let begins = |magic: u32| {
            // SAFETY: the bytes before are no zero, so neither text nor image has ended.
            magic.to_le_bytes().iter().enumerate().all(|(i, byte)| unsafe { bytes.add(i).read() } == *byte)
        };
        if bytes.is_null() {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        if begins(ELF) {
            return Ok(ImageBytes::Machine);
        }
        if begins(FATBIN) {
            // SAFETY: a fatbin's header has 16 bytes: magic, version, its own bytes, bytes behind it.
            let header: [u8; 16] = unsafe { bytes.cast::<[u8; 16]>().read_unaligned() };
            let own = u16::from_le_bytes([header[6], header[7]]);
            let behind = u64::from_le_bytes(std::array::from_fn(|i| header[8 + i]));
            let len = usize::from(own) + usize::try_from(behind).map_err(|_| CUDA_ERROR_INVALID_VALUE)?;
            // SAFETY: as the header says.
            return Ok(ImageBytes::Fatbin(unsafe { std::slice::from_raw_parts(bytes, len) }.to_vec()));
        }
        Text(self.0.cast()).read().map(ImageBytes::Ptx)
    }
}

/// To a kernel's arguments: an array of pointers, one for each.
#[repr(transparent)]
pub(crate) struct Arguments(*const *const c_void);

impl Arguments {
    /// The bytes of each argument, which are as many as the kernel was compiled for.
    pub(crate) fn read(&self, sizes: &[usize]) -> Outcome<Vec<Vec<u8>>> {
        if sizes.is_empty() {
            return Ok(Vec::new());
        }
        let pointers = In(self.0).read(sizes.len())?;
        pointers.into_iter().zip(sizes).map(|(pointer, &size)| In(pointer.cast::<u8>()).read(size)).collect()
    }
}

/// A place in the caller's memory that a copy reads or writes when it is done: at once, or each time that its graph is launched.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Host(*mut c_void);

// SAFETY: an address; the caller promises that it can be followed when the copy is done, on whichever thread that is.
unsafe impl Send for Host {}

impl Host {
    pub(crate) fn read(self, bytes: usize) -> Outcome<Vec<u8>> {
        In(self.0.cast::<u8>().cast_const()).read(bytes)
    }

    pub(crate) fn write(self, bytes: &[u8]) -> Outcome {
        Out(self.0.cast::<u8>()).fill(bytes)
    }

    pub(crate) fn require(self) -> Outcome {
        if self.0.is_null() { Err(CUDA_ERROR_INVALID_VALUE) } else { Ok(()) }
    }
}
