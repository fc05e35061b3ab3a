//! What the header asks of a call's arguments, said a second time: whether a call must succeed, and with which codes it may be refused.

use crate::call::{Call, Operation, Role};
use crate::memory::{Memory, load};
use sae_kernels::capi::*;
use std::ops::Range;

/// Bytes that no allocator has: the address space ends before.
const MOST_BYTES: u128 = 1 << 47;

/// From this extent on, what a call that is not refused at once takes is too much time or memory for a fuzzer.
const HUGE: i64 = 1 << 16;

pub struct Verdict {
    pub may_succeed: bool,
    /// A bit for each code that the call may return instead.
    codes: u32,
}

impl Verdict {
    pub fn allows(&self, code: i32) -> bool {
        if code == SAEK_OK { self.may_succeed } else { (1..32).contains(&code) && self.codes >> code & 1 == 1 }
    }
}

/// Codes of what is wrong with a call.
#[derive(Default)]
struct Wrong {
    codes: u32,
}
impl Wrong {
    fn note(&mut self, wrong: bool, code: i32) {
        self.codes |= u32::from(wrong) << code;
    }
    fn any(&self) -> bool {
        self.codes != 0
    }
}

/// `None` for a call that is neither refused for certain before it touches an array, nor given arrays as long as it says: nobody may make it.
pub fn verdict(call: &Call, memory: &Memory) -> Option<Verdict> {
    let mut wrong = Wrong::default();
    let misaligned = |pointer: *mut u8, align: usize| !pointer.addr().is_multiple_of(align);
    wrong.note(call.context.is_null(), SAEK_ERROR_NULL);
    wrong.note(misaligned(call.context.cast(), align_of::<usize>()), SAEK_ERROR_POINTER);
    let Call { operation, n, d, h, stride, .. } = *call;
    if n < 0 || d < 0 || h < 1 || stride < call.cols() || stride < 0 {
        wrong.note(true, SAEK_ERROR_SHAPE);
        return Some(Verdict { may_succeed: false, codes: wrong.codes });
    }
    let product = |one: i64, other: i64| one as u128 * other as u128;
    let mut counts = vec![product(h, d), product(n, h), product((n - 1).max(0), stride)];
    if operation != Operation::ActivationLosses {
        counts.push(product(n, d));
    }
    // Rows that are not there have no span.
    if n == 0 || call.cols() == 0 {
        counts[2] = 0;
    }
    wrong.note(counts.iter().any(|count| *count > u128::from(u64::MAX)), SAEK_ERROR_SHAPE);
    let mut spans: Vec<(Range<u128>, bool)> = Vec::new();
    for argument in operation.arguments() {
        let (pointer, bytes) = (call.pointer(argument.role), call.bytes(argument.role));
        let needs_weight = operation == Operation::ActivationLosses && !call.pointer(Role::GradWeight).is_null();
        let optional = argument.optional && !(argument.role == Role::Weight && needs_weight);
        if bytes == 0 || optional && pointer.is_null() {
            continue;
        }
        let span = span(call, argument.role);
        if pointer.is_null() {
            wrong.note(true, SAEK_ERROR_NULL);
            continue;
        }
        let align = argument.role.element_bytes(call.storage).min(8);
        wrong.note(misaligned(pointer, align), SAEK_ERROR_POINTER);
        wrong.note(bytes > isize::MAX as u128 || span.end > usize::MAX as u128, SAEK_ERROR_SHAPE);
        let overlaps = spans
            .iter()
            .any(|(other, written)| (*written || argument.written) && other.start < span.end && span.start < other.end);
        wrong.note(overlaps, SAEK_ERROR_POINTER);
        spans.push((span, argument.written));
    }
    let sound = spans.iter().all(|(span, _)| memory.holds(span));
    // A plan is made before x and the sums are read; the objective may be read before.
    let block = product(n, h).saturating_mul(call.storage.bytes() as u128);
    let out_of_memory = match operation {
        Operation::Step | Operation::Forward | Operation::Backward => block > MOST_BYTES,
        Operation::Statistics => block > MOST_BYTES || (n > 0 && product(h, h).saturating_mul(4) > MOST_BYTES),
        Operation::ActivationLosses => h < HUGE && product(n, 2) > MOST_BYTES,
    };
    let huge = n.max(d).max(h) >= HUGE;
    let objective = span(call, Role::Objective);
    let objective = operation == Operation::Statistics || memory.holds(&objective);
    if !(wrong.any() || (out_of_memory && objective)) && (!sound || huge) {
        return None;
    }
    note_numbers(&mut wrong, call, memory);
    let may_succeed = !out_of_memory && !wrong.any();
    // What is computed of huge extents may be too large for any memory, or for a size.
    wrong.note(huge, SAEK_ERROR_SHAPE);
    wrong.note(huge, SAEK_ERROR_MEMORY);
    Some(Verdict { may_succeed, codes: wrong.codes })
}

/// The addresses of an array; they may be more than there are.
fn span(call: &Call, role: Role) -> Range<u128> {
    let start = call.pointer(role).addr() as u128;
    start..start.saturating_add(call.bytes(role))
}

/// What can only be said of numbers that are there to be read.
fn note_numbers(wrong: &mut Wrong, call: &Call, memory: &Memory) {
    if call.operation == Operation::Statistics || !memory.holds(&span(call, Role::Objective)) {
        return;
    }
    // SAFETY: it is in the memory, wherever it stands there.
    let objective = unsafe { call.pointer(Role::Objective).cast::<saek_objective>().read_unaligned() };
    let saek_objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, reduction } = objective;
    let finite = [lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps].iter().all(|number| number.is_finite());
    wrong.note(!finite || variance_eps <= 0.0, SAEK_ERROR_ARGUMENT);
    wrong.note(![SAEK_REDUCTION_SUM, SAEK_REDUCTION_MEAN].contains(&reduction), SAEK_ERROR_ARGUMENT);
    let mut rows = call.n as f64;
    if call.operation == Operation::Backward {
        if !memory.holds(&span(call, Role::Sums)) {
            return;
        }
        // SAFETY: as above.
        rows = unsafe { load(call.pointer(Role::Sums), Role::Sums.number(call.storage), 1) }[0];
        let count = rows >= call.n as f64 && rows.fract() == 0.0 && rows <= 2f64.powi(53);
        wrong.note(!count, SAEK_ERROR_ARGUMENT);
    }
    wrong.note((lambda_var != 0.0 || lambda_tc != 0.0) && rows < 2.0, SAEK_ERROR_SHAPE);
    let no_weight = call.operation == Operation::ActivationLosses && call.pointer(Role::Weight).is_null() && call.d > 0;
    wrong.note(no_weight && lambda_wr != 0.0, SAEK_ERROR_ARGUMENT);
}
