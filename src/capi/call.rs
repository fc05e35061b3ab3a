//! What every call does around its work: no panic leaves it, nothing is printed, and the text of a failure is kept.

use super::{
    SAEK_ERROR_ARGUMENT, SAEK_ERROR_BACKEND, SAEK_ERROR_DEVICE, SAEK_ERROR_MEMORY, SAEK_ERROR_PANIC, SAEK_ERROR_SHAPE,
    SAEK_OK,
};
use crate::error::Error;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::thread;

/// Why a call failed.
pub(super) struct Failure {
    pub(super) code: i32,
    pub(super) text: String,
}

impl Failure {
    pub(super) fn new(code: i32, text: String) -> Self {
        Self { code, text }
    }
    /// The same, with the argument it is about in front.
    pub(super) fn of(name: &str, error: Error) -> Self {
        let failure = Self::from(error);
        Self { text: format!("{name}: {}", failure.text), ..failure }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::Configuration { .. } | Error::Count { .. } => SAEK_ERROR_ARGUMENT,
            Error::Shape { .. }
            | Error::Length { .. }
            | Error::Stride { .. }
            | Error::ViewTooShort { .. }
            | Error::Overflow { .. }
            | Error::TooFewRows { .. }
            | Error::NoLatents
            | Error::TooManyRows { .. }
            | Error::DualNeedsOneBlock { .. }
            | Error::Statistics { .. } => SAEK_ERROR_SHAPE,
            Error::Allocation { .. } | Error::DeviceMemory { .. } => SAEK_ERROR_MEMORY,
            Error::NoDriver { .. }
            | Error::NoDevice { .. }
            | Error::DriverTooOld { .. }
            | Error::KernelsNotBuilt { .. }
            | Error::NoImage { .. }
            | Error::Device { .. } => SAEK_ERROR_DEVICE,
            _ => SAEK_ERROR_BACKEND,
        };
        Self { code, text: error.to_string() }
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
    /// Whether a panic of this thread is caught and returned, and so must not be printed.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs the work of a call; a failure's text is kept for [`last_error`], and its code returned.
pub(super) fn run<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, i32> {
    let before = QUIET.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    QUIET.set(before);
    let failure = match result {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(failure)) => failure,
        Err(payload) => Failure::new(SAEK_ERROR_PANIC, panic_text(payload.as_ref())),
    };
    let text = CString::new(failure.text.replace('\0', " ")).unwrap_or_default();
    // A thread that is ending may have lost the place for its text.
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
    Err(failure.code)
}

/// [`run`], as the code that most calls return.
pub(super) fn status(work: impl FnOnce() -> Result<(), Failure>) -> i32 {
    run(work).err().unwrap_or(SAEK_OK)
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let message = (payload.downcast_ref::<&str>().copied())
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    format!("a bug in sae-kernels, please report it: {message}")
}

/// The text of this thread's last failure; empty if there was none.
pub(super) fn last_error() -> *const c_char {
    const NONE: &CStr = c"";
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(NONE.as_ptr())
}

/// Has panics that [`run`] catches not printed; all others are reported as before.
pub(super) fn silence_caught_panics() {
    static ONCE: Once = Once::new();
    // A host written in Rust may be unwinding, when no hook can be set.
    if !thread::panicking() {
        ONCE.call_once(wrap_hook);
    }
}

fn wrap_hook() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !QUIET.try_with(Cell::get).unwrap_or(false) {
            report(info);
        }
    }));
}

/// Has panics of this thread not printed: it belongs to a context, whose calls catch and return them.
pub(super) fn silence_this_thread() {
    QUIET.set(true);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, Isa};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn text() -> String {
        // SAFETY: the text is this thread's, and no call comes between.
        unsafe { CStr::from_ptr(last_error()) }.to_str().expect("UTF-8").to_owned()
    }

    #[test]
    fn a_panic_becomes_an_error() {
        let number = 7;
        assert_eq!(status(|| panic!("a fixed text")), SAEK_ERROR_PANIC);
        assert!(text().ends_with("report it: a fixed text"), "{}", text());
        assert_eq!(status(|| panic!("a text with {number}")), SAEK_ERROR_PANIC);
        assert!(text().ends_with("report it: a text with 7"), "{}", text());
        assert_eq!(status(|| panic::panic_any(7)), SAEK_ERROR_PANIC);
        assert!(text().contains("no message"), "{}", text());
        assert_eq!(status(|| Ok(())), SAEK_OK);
        assert!(text().contains("no message"), "a success keeps the last failure's text");
    }

    #[test]
    fn a_text_ends_where_it_ends() {
        assert_eq!(run::<()>(|| Err(Failure::new(3, "one\0two".into()))), Err(3));
        assert_eq!(text(), "one two");
    }

    /// A hook below ours counts what would be printed. Other tests' panics go on to the hook below that.
    #[test]
    fn only_caught_panics_are_silent() {
        static REPORTED: AtomicUsize = AtomicUsize::new(0);
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if info.payload().downcast_ref::<&str>().is_some_and(|text| text.contains("counted")) {
                REPORTED.fetch_add(1, Ordering::SeqCst);
            } else {
                report(info);
            }
        }));
        wrap_hook();
        let _ = panic::catch_unwind(|| panic!("counted, outside a call"));
        assert_eq!(REPORTED.load(Ordering::SeqCst), 1);
        assert_eq!(status(|| panic!("counted, if it were reported")), SAEK_ERROR_PANIC);
        assert_eq!(REPORTED.load(Ordering::SeqCst), 1);
        let _ = panic::catch_unwind(|| panic!("counted, after a call"));
        assert_eq!(REPORTED.load(Ordering::SeqCst), 2);
        if cfg!(feature = "rayon") {
            let silenced = AtomicUsize::new(0);
            Cpu::<f32>::with(Isa::Portable, 3).expect("three threads").on_own_threads(|| {
                silence_this_thread();
                silenced.fetch_add(1, Ordering::SeqCst);
                let _ = panic::catch_unwind(|| panic!("counted, if it were reported"));
            });
            assert_eq!((silenced.into_inner(), REPORTED.load(Ordering::SeqCst)), (3, 2));
        }
    }
}
