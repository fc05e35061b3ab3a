//! The PTX of a fatbin. Fatbins are compressed, so they are not read: the build leaves `NAME.ptx` beside `NAME.fatbin`, and the file with the
//! same bytes says which it is.

use crate::{Outcome, say};
use cudarc::driver::sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU;
use std::fs;

/// Folders to look in, separated as in PATH.
const FOLDERS: &str = "SAE_KERNELS_PTX_DIR";

pub(crate) fn ptx_of(fatbin: &[u8]) -> Outcome<String> {
    let folders = std::env::var_os(FOLDERS).unwrap_or_default();
    for folder in std::env::split_paths(&folders) {
        for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
            let is_this = path.extension().is_some_and(|extension| extension == "fatbin")
                && path.metadata().is_ok_and(|file| file.len() == fatbin.len() as u64)
                && fs::read(&path).is_ok_and(|bytes| bytes == fatbin);
            if let (true, Ok(ptx)) = (is_this, fs::read_to_string(path.with_extension("ptx"))) {
                return Ok(ptx);
            }
        }
    }
    say!("no folder of {FOLDERS} ({folders:?}) has this fatbin and its PTX");
    Err(CUDA_ERROR_NO_BINARY_FOR_GPU)
}
