//! The CUDA driver's API, answered by the PTX emulator: `libcuda.so.1` for machines without a GPU. The emulator's README says what it does and
//! what it does not.
//!
//! | file | |
//! |---|---|
//! | `pointers` | what a caller's pointers are promised to be: all reads and writes of the caller's memory |
//! | `state` | contexts and handles |
//! | `work` | copies, fills and launches: done at once, or recorded by a capture |
//! | `chip`, `images` | the GPU that this is; the PTX of a fatbin |
//! | `api/` | the functions, by the chapters of the driver's manual |
//! | `foreign` | names of libraries that programs link beside the driver |

mod api;
mod chip;
mod foreign;
mod images;
mod pointers;
mod state;
mod work;

use cudarc::driver::sys::CUresult;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A call's success, or the code that it returns.
type Outcome<T = ()> = Result<T, CUresult>;

/// Runs a call: nothing unwinds into the caller's frames.
fn guarded(call: impl FnOnce() -> Outcome) -> CUresult {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => CUresult::CUDA_SUCCESS,
        Ok(Err(code)) => code,
        Err(_) => CUresult::CUDA_ERROR_UNKNOWN,
    }
}

/// Tells the person at the terminal what an error code cannot.
macro_rules! say {
    ($($message:tt)*) => { eprintln!("PTX emulator: {}", format_args!($($message)*)) };
}

/// Exports functions of the API. Their arguments are plain numbers, or pointers whose types say what the caller promises of them; an
/// enumeration is the number that it is in C.
macro_rules! exports {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        #[allow(non_snake_case)]
        // SAFETY: the driver's own name is what a caller of this library asks for.
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $type),*) -> cudarc::driver::sys::CUresult {
            $crate::guarded(|| $body)
        }
    )*};
}

use {exports, say};
