//! A context keeps the memory of its last step. A test program of its own, for all allocations to be counted.

use sae_kernels::capi::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::null_mut;

/// The system's allocator, with a count for each thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: the system's allocator does it all.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// N, D, H.
const SHAPE: (usize, usize, usize) = (300, 64, 48);
const OBJECTIVE: saek_objective = saek_objective {
    lambda_lse: 1.0,
    lambda_var: 1.0,
    lambda_tc: 1.0,
    lambda_wr: 1.0,
    variance_eps: 1e-6,
    reduction: SAEK_REDUCTION_SUM,
};

/// x, weight and bias.
fn inputs() -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (rows, d, h) = SHAPE;
    let x = (0..rows * d).map(|i| (i % 17) as f32 / 17.0).collect();
    let weight = (0..h * d).map(|i| (i % 7) as f32 / 7.0 - 0.4).collect();
    (x, weight, vec![0.1; h])
}

#[test]
fn steps_of_one_shape_do_not_allocate() {
    let (rows, d, h) = SHAPE;
    let (x, weight, bias) = inputs();
    let (mut grad_weight, mut grad_bias) = (vec![0.0; h * d], vec![0.0; h]);
    let (mut activations, mut grad_x) = (vec![0.0; rows * h], vec![0.0; rows * d]);
    let mut losses = saek_losses::default();
    let mut context = null_mut();
    // SAFETY: the pointer is to a variable.
    assert_eq!(unsafe { saek_context_create_cpu(1, &mut context) }, SAEK_OK);
    let mut allocations = |rows: usize, latents: usize, outputs: bool| {
        let (activations, grad_x) =
            if outputs { (activations.as_mut_ptr(), grad_x.as_mut_ptr()) } else { (null_mut(), null_mut()) };
        let before = ALLOCATIONS.get();
        // SAFETY: all arrays are as long as the extents say, or longer.
        let code = unsafe {
            saek_decoder_free_step_f32(
                context,
                &OBJECTIVE,
                rows as i64,
                d as i64,
                latents as i64,
                x.as_ptr(),
                d as i64,
                weight.as_ptr(),
                bias.as_ptr(),
                activations,
                null_mut(),
                grad_weight.as_mut_ptr(),
                grad_bias.as_mut_ptr(),
                grad_x,
                &mut losses,
            )
        };
        assert_eq!(code, SAEK_OK);
        ALLOCATIONS.get() - before
    };
    assert!(allocations(rows, h, true) > 5, "the first step makes the plan");
    for (rows, outputs) in [(rows, true), (rows, false), (17, true), (rows, true)] {
        assert_eq!(allocations(rows, h, outputs), 0, "{rows} rows");
    }
    assert!(allocations(rows, h - 1, true) > 5, "another shape needs another plan");
    // SAFETY: made above, and used by nobody any more.
    unsafe { saek_context_destroy(context) };
}

#[test]
fn phases_of_one_shape_do_not_allocate() {
    let (rows, d, h) = SHAPE;
    let (x, weight, bias) = inputs();
    let (mut grad_weight, mut grad_bias) = (vec![0.0; h * d], vec![0.0; h]);
    let mut losses = saek_losses::default();
    let mut context = null_mut();
    // SAFETY: the pointer is to a variable.
    assert_eq!(unsafe { saek_context_create_cpu(1, &mut context) }, SAEK_OK);
    let mut statistics = vec![0.0; saek_statistics_len(h as i64) as usize];
    let mut allocations = || {
        statistics.fill(0.0);
        let (n, d, h) = (rows as i64, d as i64, h as i64);
        let (x, weight, bias, shift) = (x.as_ptr(), weight.as_ptr(), bias.as_ptr(), bias.as_ptr());
        let before = ALLOCATIONS.get();
        // SAFETY: all arrays are as long as the extents say.
        let codes = unsafe {
            let sums = statistics.as_mut_ptr();
            let first = saek_decoder_free_statistics_f32(context, n, d, h, x, d, weight, bias, shift, sums);
            let (weights, biases) = (grad_weight.as_mut_ptr(), grad_bias.as_mut_ptr());
            #[rustfmt::skip]
            let second = saek_decoder_free_backward_f32(
                context, &OBJECTIVE, n, d, h, x, d, weight, bias, shift, sums, 1, weights, biases, null_mut(), &mut losses,
            );
            [first, second]
        };
        assert_eq!(codes, [SAEK_OK; 2]);
        ALLOCATIONS.get() - before
    };
    assert!(allocations() > 5, "the first phases make the plan");
    assert_eq!(allocations(), 0);
    // SAFETY: made above, and used by nobody any more.
    unsafe { saek_context_destroy(context) };
}
