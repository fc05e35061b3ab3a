//! The C ABI: what `include/sae_kernels.h` declares, which is made from this file.
//!
//! cbindgen sees no macros: so each storage type has its signature here, and one body in `decoder_free` or `activation_losses`, for any
//! backend; `compute!` picks the one that the context is of. Calls on a CUDA context have run on an emulated device, not yet on hardware.
//!
//! The documentation here is the header's, so it speaks of C. What all functions ask of their pointers stands once, at
//! the header's top: an array has as many elements as the extents say; from the call to the return nobody writes what
//! the call reads, nor reads or writes what it writes.
//!
//! ```sh
//! cargo rustc --release --lib --crate-type cdylib --features capi         # or staticlib; capi,cuda for CUDA contexts too
//! ```
#![allow(non_camel_case_types, reason = "C's names")]
#![allow(clippy::too_many_arguments, reason = "C has no other way to name them")]
#![allow(rustdoc::broken_intra_doc_links, reason = "[h] is an extent")]
#![allow(clippy::missing_safety_doc, reason = "it is the same for all: see the module's documentation")]

mod activation_losses;
mod argument;
mod buffer;
mod call;
mod context;
mod decoder_free;
mod memory;

use crate::cpu::{Cpu, Isa};
#[cfg(feature = "cuda")]
use crate::cuda::Cuda;
use crate::element::{bf16, f16};
use crate::reference::Reference;
use argument::statistics_len;
use buffer::check_pointer;
use call::Failure;
use context::{Device, Plans};
use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;
use std::thread;

/// The call did what it says.
pub const SAEK_OK: i32 = 0;
/// A required pointer is NULL.
pub const SAEK_ERROR_NULL: i32 = 1;
/// A number is outside its range: a weight of the objective, the reduction, the number of threads or of the device, a
/// count of statistics.
pub const SAEK_ERROR_ARGUMENT: i32 = 2;
/// Extents are negative, too large, or do not fit together; or the batch has too few rows for the objective.
pub const SAEK_ERROR_SHAPE: i32 = 3;
/// A pointer is not aligned to its type, or an output overlaps another buffer of the call.
pub const SAEK_ERROR_POINTER: i32 = 4;
/// There is not enough memory.
pub const SAEK_ERROR_MEMORY: i32 = 5;
/// The threads could not be started.
pub const SAEK_ERROR_BACKEND: i32 = 6;
/// A bug in the library. What the call writes may be half written; the context stays usable.
pub const SAEK_ERROR_PANIC: i32 = 7;
/// The CUDA device cannot do it: the library is built without CUDA, there is no driver or no such device, the driver is
/// too old, a call of it failed, or the type is double. After a failed call of the driver what the call writes may be
/// half written, and the device may be of no more use to the process.
pub const SAEK_ERROR_DEVICE: i32 = 8;

/// The log-sum-exp term is summed over rows, as in the paper.
pub const SAEK_REDUCTION_SUM: i32 = 0;
/// The log-sum-exp term is averaged over rows.
pub const SAEK_REDUCTION_MEAN: i32 = 1;

/// The body of a call, in the backend of its context for a storage type.
macro_rules! compute {
    ($module:ident::$call:ident::<$storage:ident>($context:expr, $($argument:expr),+ $(,)?)) => {{
        #[cfg(feature = "cuda")]
        if context::is_cuda($context) {
            return $module::$call::<Cuda<$storage>>($context, $($argument),+);
        }
        $module::$call::<Cpu<$storage>>($context, $($argument),+)
    }};
}

/// Most threads of a context.
pub const SAEK_MAX_THREADS: i32 = 1024;

/// Where steps are computed, and the memory that they use. It keeps the memory of the last call, so a step of the same
/// objective, type, d and h and of as many rows or fewer allocates nothing. The two phases allocate a little; and as
/// statistics always hold what the correlation term needs, phases with lambda_tc = 0 make all their memory anew.
///
/// Several threads may use one context: their calls wait for each other.
pub struct saek_context {
    device: Device,
    plans: Mutex<Plans>,
}

/// Weights of the terms of the loss lambda_lse * lse + lambda_var * var + lambda_tc * tc + lambda_wr * wr.
/// The paper's are 1, 1, 1, 0, 1e-6, SAEK_REDUCTION_SUM.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct saek_objective {
    /// Weight of the log-sum-exp term.
    pub lambda_lse: f64,
    /// Weight of the variance term.
    pub lambda_var: f64,
    /// Weight of the correlation term.
    pub lambda_tc: f64,
    /// Weight of the weight-redundancy term, in which the rows of the weight are normalised.
    pub lambda_wr: f64,
    /// What is added to a variance before its logarithm; positive.
    pub variance_eps: f64,
    /// SAEK_REDUCTION_SUM or SAEK_REDUCTION_MEAN.
    pub reduction: i32,
}

/// Values of the terms, and their weighted sum. A term whose weight is 0 is not computed and reads 0.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct saek_losses {
    /// -sum_n log sum_j exp(-a_nj), or the mean over n.
    pub lse: f64,
    /// -sum_j log(v_j + variance_eps), v_j the unbiased variance of latent j over the batch.
    pub var: f64,
    /// Sum of the squared correlations of all pairs i != j of latents.
    pub tc: f64,
    /// Sum of the squares of V V^T - I, V the weight with normalised rows.
    pub wr: f64,
    /// The weighted sum.
    pub total: f64,
}

/// Makes a context that computes on the CPU, with the best instruction set that it has. threads: 1 is the calling
/// thread alone, more is a pool of as many threads that the context owns, 0 is one thread for each processor that the
/// process may use. Results have the same bits for any number of threads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_context_create_cpu(threads: i32, out: *mut *mut saek_context) -> i32 {
    call::status(|| {
        call::silence_caught_panics();
        check_pointer::<*mut saek_context>("out", out.addr(), 1)?;
        let threads = match threads {
            0 if cfg!(feature = "rayon") => thread::available_parallelism().map_or(1, usize::from),
            0 => 1,
            1..=SAEK_MAX_THREADS => threads as usize,
            _ => {
                let text = format!("threads = {threads}, but it must be 0 (all processors) to {SAEK_MAX_THREADS}");
                return Err(Failure::new(SAEK_ERROR_ARGUMENT, text));
            }
        };
        let cpu = Cpu::with(Isa::detect(), threads)?;
        cpu.on_own_threads(call::silence_this_thread);
        // SAFETY: not NULL and aligned, as checked; the caller promises that it is writable.
        unsafe { out.write(saek_context::on(Device::Cpu(cpu))) };
        Ok(())
    })
}

/// Makes a context that computes on a CUDA device, in a stream of the caller's (a CUstream or cudaStream_t; NULL: the
/// default stream). device is the driver's number, from 0. The stream must be of the device's primary context, which is
/// the one that the CUDA runtime and frameworks use, and outlive the saek_context. The library must be built with its
/// CUDA kernels: cargo rustc --release --lib --crate-type cdylib --features capi,cuda
///
/// All arrays of a call are then in the device's memory, shift and statistics too; objective and losses stay in the
/// host's. Work goes to the stream, behind what is there, and every call waits for the stream before it returns, as it
/// returns sums to the host. The primary context is left current to the calling thread. There is no double: those calls
/// are refused. Not yet run on hardware.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_context_create_cuda(
    device: i32,
    stream: *mut c_void,
    out: *mut *mut saek_context,
) -> i32 {
    call::status(|| {
        call::silence_caught_panics();
        check_pointer::<*mut saek_context>("out", out.addr(), 1)?;
        let ordinal = usize::try_from(device).map_err(|_| {
            let text = format!("device = {device}, but it must be at least 0");
            Failure::new(SAEK_ERROR_ARGUMENT, text)
        })?;
        // SAFETY: the caller's promise.
        let device = unsafe { Device::cuda(ordinal, stream) }?;
        // SAFETY: not NULL and aligned, as checked; the caller promises that it is writable.
        unsafe { out.write(saek_context::on(device)) };
        Ok(())
    })
}

/// Frees a context that no call uses any more. NULL is nothing to free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_context_destroy(context: *mut saek_context) {
    call::status(|| {
        if !context.is_null() {
            // SAFETY: the caller promises that it came from saek_context_create_* and is not used again.
            drop(unsafe { Box::from_raw(context) });
        }
        Ok(())
    });
}

/// What went wrong in the calling thread's last call that failed, and what would be right, in UTF-8; an empty text if
/// none failed. Never NULL. It stays valid until the next call of this thread fails, or the thread ends.
#[unsafe(no_mangle)]
pub extern "C" fn saek_last_error() -> *const c_char {
    call::last_error()
}

/// The library's version, as in 0.1.0.
#[unsafe(no_mangle)]
pub extern "C" fn saek_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("a version has no NUL"),
    };
    VERSION.as_ptr()
}

/// One step of the decoder-free autoencoder a = max(x W^T + b, 0): losses and gradients of a whole batch, which are
/// overwritten.
///
/// x [n,d], its rows ldx elements apart; weight [h,d]; bias [h]; grad_weight [h,d]; grad_bias [h]. activations [n,h],
/// row_loss [n] (-log sum_j exp(-a_nj)) and grad_x [n,d] may be NULL, if they are not wanted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_step_f32(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const f32,
    ldx: i64,
    weight: *const f32,
    bias: *const f32,
    activations: *mut f32,
    row_loss: *mut f32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    grad_x: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::step::<f32>(
            context,
            objective,
            n,
            d,
            h,
            x,
            ldx,
            weight,
            bias,
            activations,
            row_loss,
            grad_weight,
            grad_bias,
            grad_x,
            losses,
        ))
    }
}

/// As saek_decoder_free_step_f32, with bf16 for x, weight and activations.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_step_bf16(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const u16,
    ldx: i64,
    weight: *const u16,
    bias: *const f32,
    activations: *mut u16,
    row_loss: *mut f32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    grad_x: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::step::<bf16>(
            context,
            objective,
            n,
            d,
            h,
            x.cast(),
            ldx,
            weight.cast(),
            bias,
            activations.cast(),
            row_loss,
            grad_weight,
            grad_bias,
            grad_x,
            losses,
        ))
    }
}

/// As saek_decoder_free_step_f32, with f16 for x, weight and activations.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_step_f16(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const u16,
    ldx: i64,
    weight: *const u16,
    bias: *const f32,
    activations: *mut u16,
    row_loss: *mut f32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    grad_x: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::step::<f16>(
            context,
            objective,
            n,
            d,
            h,
            x.cast(),
            ldx,
            weight.cast(),
            bias,
            activations.cast(),
            row_loss,
            grad_weight,
            grad_bias,
            grad_x,
            losses,
        ))
    }
}

/// As saek_decoder_free_step_f32, all in double, and by plain loops: for checks of gradients and small batches.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_step_f64(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const f64,
    ldx: i64,
    weight: *const f64,
    bias: *const f64,
    activations: *mut f64,
    row_loss: *mut f64,
    grad_weight: *mut f64,
    grad_bias: *mut f64,
    grad_x: *mut f64,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        decoder_free::step::<Reference>(
            context,
            objective,
            n,
            d,
            h,
            x,
            ldx,
            weight,
            bias,
            activations,
            row_loss,
            grad_weight,
            grad_bias,
            grad_x,
            losses,
        )
    }
}

/// The losses of a step alone: no gradients. activations [n,h] and row_loss [n] may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_forward_f32(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const f32,
    ldx: i64,
    weight: *const f32,
    bias: *const f32,
    activations: *mut f32,
    row_loss: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::forward::<f32>(
            context,
            objective,
            n,
            d,
            h,
            x,
            ldx,
            weight,
            bias,
            activations,
            row_loss,
            losses,
        ))
    }
}

/// As saek_decoder_free_forward_f32, all in double, and by plain loops.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_forward_f64(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const f64,
    ldx: i64,
    weight: *const f64,
    bias: *const f64,
    activations: *mut f64,
    row_loss: *mut f64,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        decoder_free::forward::<Reference>(
            context,
            objective,
            n,
            d,
            h,
            x,
            ldx,
            weight,
            bias,
            activations,
            row_loss,
            losses,
        )
    }
}

/// As saek_decoder_free_forward_f32, with bf16 for x, weight and activations.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_forward_bf16(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const u16,
    ldx: i64,
    weight: *const u16,
    bias: *const f32,
    activations: *mut u16,
    row_loss: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::forward::<bf16>(
            context,
            objective,
            n,
            d,
            h,
            x.cast(),
            ldx,
            weight.cast(),
            bias,
            activations.cast(),
            row_loss,
            losses,
        ))
    }
}

/// As saek_decoder_free_forward_f32, with f16 for x, weight and activations.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_forward_f16(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const u16,
    ldx: i64,
    weight: *const u16,
    bias: *const f32,
    activations: *mut u16,
    row_loss: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::forward::<f16>(
            context,
            objective,
            n,
            d,
            h,
            x.cast(),
            ldx,
            weight.cast(),
            bias,
            activations.cast(),
            row_loss,
            losses,
        ))
    }
}

/// Numbers in a buffer of statistics: 2 + h + h(h+1)/2, or -1 and an error. With a the activations and c the shift,
/// they are the number of rows, the sum of the row losses, the sums of a_j - c_j, and the upper triangle, row by row,
/// of the sums of (a_i - c_i)(a_j - c_j). All are sums over rows, so the statistics of several ranks are the sum of
/// theirs, element by element.
#[unsafe(no_mangle)]
pub extern "C" fn saek_statistics_len(h: i64) -> i64 {
    call::run(|| Ok(statistics_len(h)? as i64)).unwrap_or(-1)
}

/// The first phase of a step whose rows are spread over ranks: adds the sums over these rows to statistics, a buffer of
/// saek_statistics_len(h) doubles. The host sets it to 0 before the first block of rows, and sums it over its ranks.
///
/// shift [h] is the same on all ranks and in the second phase; NULL is 0. It changes nothing but rounding: where a
/// latent's mean is many deviations from 0, pass something near its mean, say that of the batch before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_statistics_f32(
    context: *mut saek_context,
    n: i64,
    d: i64,
    h: i64,
    x: *const f32,
    ldx: i64,
    weight: *const f32,
    bias: *const f32,
    shift: *const f32,
    statistics: *mut f64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { compute!(decoder_free::statistics::<f32>(context, n, d, h, x, ldx, weight, bias, shift, statistics)) }
}

/// As saek_decoder_free_statistics_f32, with bf16 for x and weight.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_statistics_bf16(
    context: *mut saek_context,
    n: i64,
    d: i64,
    h: i64,
    x: *const u16,
    ldx: i64,
    weight: *const u16,
    bias: *const f32,
    shift: *const f32,
    statistics: *mut f64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::statistics::<bf16>(
            context,
            n,
            d,
            h,
            x.cast(),
            ldx,
            weight.cast(),
            bias,
            shift,
            statistics
        ))
    }
}

/// As saek_decoder_free_statistics_f32, with f16 for x and weight.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_statistics_f16(
    context: *mut saek_context,
    n: i64,
    d: i64,
    h: i64,
    x: *const u16,
    ldx: i64,
    weight: *const u16,
    bias: *const f32,
    shift: *const f32,
    statistics: *mut f64,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::statistics::<f16>(
            context,
            n,
            d,
            h,
            x.cast(),
            ldx,
            weight.cast(),
            bias,
            shift,
            statistics
        ))
    }
}

/// The second phase: given the statistics of all ranks' rows and the shift that they are about, *adds* the gradients of
/// these rows to grad_weight and grad_bias, which the host then sums over its ranks; grad_x, if it is not NULL, is
/// overwritten.
///
/// The weight-redundancy term must enter once over all ranks: add_weight_term says whether here (0: no). losses are
/// those of the whole batch, on every rank.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_backward_f32(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const f32,
    ldx: i64,
    weight: *const f32,
    bias: *const f32,
    shift: *const f32,
    statistics: *const f64,
    add_weight_term: i32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    grad_x: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::backward::<f32>(
            context,
            objective,
            n,
            d,
            h,
            x,
            ldx,
            weight,
            bias,
            shift,
            statistics,
            add_weight_term,
            grad_weight,
            grad_bias,
            grad_x,
            losses,
        ))
    }
}

/// As saek_decoder_free_backward_f32, with bf16 for x and weight.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_backward_bf16(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const u16,
    ldx: i64,
    weight: *const u16,
    bias: *const f32,
    shift: *const f32,
    statistics: *const f64,
    add_weight_term: i32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    grad_x: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::backward::<bf16>(
            context,
            objective,
            n,
            d,
            h,
            x.cast(),
            ldx,
            weight.cast(),
            bias,
            shift,
            statistics,
            add_weight_term,
            grad_weight,
            grad_bias,
            grad_x,
            losses,
        ))
    }
}

/// As saek_decoder_free_backward_f32, with f16 for x and weight.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_decoder_free_backward_f16(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    x: *const u16,
    ldx: i64,
    weight: *const u16,
    bias: *const f32,
    shift: *const f32,
    statistics: *const f64,
    add_weight_term: i32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    grad_x: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(decoder_free::backward::<f16>(
            context,
            objective,
            n,
            d,
            h,
            x.cast(),
            ldx,
            weight.cast(),
            bias,
            shift,
            statistics,
            add_weight_term,
            grad_weight,
            grad_bias,
            grad_x,
            losses,
        ))
    }
}

/// Losses of given activations, whatever encoder they come from, and their gradient, without the encoder's. activations
/// [n,h] may be negative; their rows are lda elements apart.
///
/// What is not wanted may be NULL: grad_activations [n,h]; grad_weight [h,d]; responsibilities [n,h], softmax(-a) by row;
/// row_loss [n]. All of it is overwritten. weight [h,d] may be NULL if lambda_wr is 0 and grad_weight NULL. With n = 0
/// and lambda_wr alone these are loss and gradient of a weight. A context keeps the memory of these calls, of those with
/// n = 0, and of steps, each by itself.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_activation_losses_f32(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    activations: *const f32,
    lda: i64,
    weight: *const f32,
    grad_activations: *mut f32,
    grad_weight: *mut f32,
    responsibilities: *mut f32,
    row_loss: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(activation_losses::activation_losses::<f32>(
            context,
            objective,
            n,
            d,
            h,
            activations,
            lda,
            weight,
            grad_activations,
            grad_weight,
            responsibilities,
            row_loss,
            losses,
        ))
    }
}

/// As saek_activation_losses_f32, all in double, and by plain loops: for checks of gradients and small batches.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_activation_losses_f64(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    activations: *const f64,
    lda: i64,
    weight: *const f64,
    grad_activations: *mut f64,
    grad_weight: *mut f64,
    responsibilities: *mut f64,
    row_loss: *mut f64,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        activation_losses::activation_losses::<Reference>(
            context,
            objective,
            n,
            d,
            h,
            activations,
            lda,
            weight,
            grad_activations,
            grad_weight,
            responsibilities,
            row_loss,
            losses,
        )
    }
}

/// As saek_activation_losses_f32, with bf16 for activations, weight and grad_activations.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_activation_losses_bf16(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    activations: *const u16,
    lda: i64,
    weight: *const u16,
    grad_activations: *mut u16,
    grad_weight: *mut f32,
    responsibilities: *mut f32,
    row_loss: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(activation_losses::activation_losses::<bf16>(
            context,
            objective,
            n,
            d,
            h,
            activations.cast(),
            lda,
            weight.cast(),
            grad_activations.cast(),
            grad_weight,
            responsibilities,
            row_loss,
            losses,
        ))
    }
}

/// As saek_activation_losses_f32, with f16 for activations, weight and grad_activations.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn saek_activation_losses_f16(
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    activations: *const u16,
    lda: i64,
    weight: *const u16,
    grad_activations: *mut u16,
    grad_weight: *mut f32,
    responsibilities: *mut f32,
    row_loss: *mut f32,
    losses: *mut saek_losses,
) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        compute!(activation_losses::activation_losses::<f16>(
            context,
            objective,
            n,
            d,
            h,
            activations.cast(),
            lda,
            weight.cast(),
            grad_activations.cast(),
            grad_weight,
            responsibilities,
            row_loss,
            losses,
        ))
    }
}
