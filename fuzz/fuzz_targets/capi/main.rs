//! Calls of the C ABI, one after the other on one context, with arguments that are right and arguments that are not.
//!
//! Each call must do what `rules`, a second telling of the header, says: succeed, or be refused with a code that fits. A refused call
//! changes no byte; one that succeeds changes no byte but of its outputs, gives the same bits again, on another context and with
//! another number of threads too, and what the reference gives, where that can be compared (`oracle`).
#![no_main]

mod call;
mod memory;
mod oracle;
mod plan;
mod rules;

use arbitrary::Arbitrary;
use call::{Call, Role};
use libfuzzer_sys::fuzz_target;
use memory::load;
use plan::{Built, Plan, Size};
use sae_kernels::capi::*;
use std::ffi::{CStr, c_char};
use std::ops::Range;
use std::ptr::{null_mut, without_provenance_mut};

/// Where there is no memory malloc says so, under AddressSanitizer too.
#[unsafe(no_mangle)]
extern "C" fn __asan_default_options() -> *const c_char {
    c"allocator_may_return_null=1".as_ptr()
}

#[derive(Debug, Arbitrary)]
struct Case {
    threads: u8,
    /// One after the other, so that a context serves one shape, type and objective after the other.
    calls: [Plan; 4],
    other: Other,
}

/// What is no call on a context.
#[derive(Debug, Arbitrary)]
enum Other {
    StatisticsLen(Size),
    Create { threads: Size, out: Out },
    CreateCuda { device: i32, out: Out },
    DestroyNothing,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Out {
    Right,
    Null,
    Misaligned(u8),
}

fuzz_target!(|case: Case| case.run());

struct Context(*mut saek_context);
impl Context {
    fn new(threads: i32) -> Self {
        let mut context = null_mut();
        // SAFETY: the pointer is to a variable.
        let code = unsafe { saek_context_create_cpu(threads, &mut context) };
        assert_eq!(code, SAEK_OK, "{}", last_error());
        Self(context)
    }
}
impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and used by nobody any more.
        unsafe { saek_context_destroy(self.0) };
    }
}

fn last_error() -> String {
    // SAFETY: the text is valid until this thread's next failure.
    unsafe { CStr::from_ptr(saek_last_error()) }.to_str().expect("UTF-8").to_owned()
}

impl Case {
    fn run(&self) {
        // Most on the calling thread alone: a pool takes as long to make as many calls.
        let threads = [1, 1, 1, 1, 1, 2, 3, 0][usize::from(self.threads % 8)];
        let (context, other) = (Context::new(threads), Context::new(1));
        for plan in &self.calls {
            perform(plan, &context, &other);
        }
        match self.other {
            Other::StatisticsLen(h) => statistics_len(h.value()),
            Other::Create { threads, out } => create(threads.value() as i32, out),
            Other::CreateCuda { device, out } => create_cuda(device, out),
            // SAFETY: NULL is nothing to free.
            Other::DestroyNothing => unsafe { saek_context_destroy(null_mut()) },
        }
    }
}

fn perform(plan: &Plan, context: &Context, other: &Context) {
    let Built { call, mut memory, comparable } = plan.build(context.0, other.0);
    let Some(verdict) = rules::verdict(&call, &memory) else { return };
    let before = memory.snapshot();
    let text = last_error();
    // SAFETY: `verdict` answers for it.
    let code = unsafe { call.run() };
    let about = || format!("{call:?} returned {code}: {}", last_error());
    assert!(verdict.allows(code), "{}", about());
    if code != SAEK_OK {
        assert!(!last_error().is_empty(), "{}", about());
        return memory.assert_kept(&before, &[], &about);
    }
    assert_eq!(last_error(), text, "a success keeps the last failure's text");
    memory.assert_kept(&before, &written(&call), &about);
    let found = outputs(&call);
    for context in [context, other] {
        memory.restore(&before);
        let again = Call { context: context.0, ..call };
        // SAFETY: as above, and on a context that is one.
        assert_eq!(unsafe { again.run() }, SAEK_OK, "again: {}", about());
        for ((role, found), (_, again)) in found.iter().zip(outputs(&call)) {
            let same = found.iter().zip(&again).all(|(f, a)| f.to_bits() == a.to_bits() || f.is_nan() && a.is_nan());
            assert!(same, "{role:?} is {found:?}, and again {again:?}: {}", about());
        }
    }
    if comparable {
        // SAFETY: the call has succeeded.
        unsafe { oracle::compare(&call, 0.5) };
    }
}

/// The roles of the arrays that a call has written.
fn written_roles(call: &Call) -> impl Iterator<Item = Role> {
    let written = call.operation.arguments().iter().filter(|argument| argument.written).map(|argument| argument.role);
    written.filter(|role| !call.pointer(*role).is_null() && call.len(*role) > 0)
}

fn written(call: &Call) -> Vec<Range<usize>> {
    let range = |role: Role| call.pointer(role).addr()..call.pointer(role).addr() + call.bytes(role) as usize;
    written_roles(call).map(range).collect()
}

fn outputs(call: &Call) -> Vec<(Role, Vec<f64>)> {
    let values = |role: Role| {
        // SAFETY: the call has succeeded, so they are there.
        (role, unsafe { load(call.pointer(role), role.number(call.storage), call.numbers(role)) })
    };
    written_roles(call).map(values).collect()
}

fn statistics_len(h: i64) {
    let expected = 2 + i128::from(h) + i128::from(h) * (i128::from(h) + 1) / 2;
    match saek_statistics_len(h) {
        -1 => {
            // A limit may leave room for what is computed of the sums.
            assert!(h < 1 || expected > 1 << 56, "{h} is refused: {}", last_error());
            assert!(last_error().contains('h'), "{}", last_error());
        }
        len => assert!(h > 0 && i128::from(len) == expected && expected < 1 << 60, "{h}: {len}"),
    }
}

/// Calls a function that makes a context, with a place for it that is right or not; gives the code, and what stands in a right place.
fn create_at(out: Out, function: impl FnOnce(*mut *mut saek_context) -> i32) -> (i32, *mut saek_context) {
    let untouched = without_provenance_mut(8);
    let mut context: Box<*mut saek_context> = Box::new(untouched);
    let place: *mut *mut saek_context = &mut *context;
    let code = function(match out {
        Out::Right => place,
        Out::Null => null_mut(),
        Out::Misaligned(by) => place.wrapping_byte_add(1 + usize::from(by) % 7),
    });
    assert!(code != SAEK_OK || matches!(out, Out::Right), "a context was written nowhere");
    assert!(code == SAEK_OK || *context == untouched && !last_error().is_empty(), "{code} and {:?}", *context);
    match out {
        Out::Null => assert_eq!(code, SAEK_ERROR_NULL),
        Out::Misaligned(_) => assert_eq!(code, SAEK_ERROR_POINTER),
        Out::Right => {}
    }
    (code, *context)
}

fn create(threads: i32, out: Out) {
    // Pools of more threads are right, and slow to make.
    let threads = if (4..=SAEK_MAX_THREADS).contains(&threads) { threads % 4 } else { threads };
    // SAFETY: the place is right, or is refused.
    let (code, context) = create_at(out, |place| unsafe { saek_context_create_cpu(threads, place) });
    if matches!(out, Out::Right) {
        let right = (0..=SAEK_MAX_THREADS).contains(&threads);
        assert_eq!(code, if right { SAEK_OK } else { SAEK_ERROR_ARGUMENT }, "{threads} threads: {}", last_error());
        if right {
            drop(Context(context));
        }
    }
}

/// The library is built without CUDA.
fn create_cuda(device: i32, out: Out) {
    // SAFETY: no stream is the default stream, and the place is right, or is refused.
    let (code, _) = create_at(out, |place| unsafe { saek_context_create_cuda(device, null_mut(), place) });
    if matches!(out, Out::Right) {
        assert_eq!(code, if device < 0 { SAEK_ERROR_ARGUMENT } else { SAEK_ERROR_DEVICE }, "device {device}");
    }
}
