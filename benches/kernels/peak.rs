//! This machine's peaks, measured: fused multiply-adds in registers, and a copy of more than the caches hold.

use std::hint::black_box;
use std::time::Instant;

/// FLOP/s of independent `f32` multiply-adds, on `threads` threads at once.
pub fn flops(threads: usize) -> f64 {
    const STEPS: usize = 100_000;
    together(threads, || fma_loop(STEPS) as f64)
}

/// Bytes/s read and written by a copy of 64 MiB, on `threads` threads at once.
pub fn copy(threads: usize) -> f64 {
    thread_local! {
        static BUFFERS: (Vec<u64>, std::cell::RefCell<Vec<u64>>) = (vec![1; 8 << 20], vec![1; 8 << 20].into());
    }
    together(threads, || {
        BUFFERS.with(|(from, to)| {
            to.borrow_mut().copy_from_slice(black_box(from));
            black_box(&to.borrow()[0]);
            (2 * size_of_val(&from[..])) as f64
        })
    })
}

/// What `work` counts, a second, summed over threads.
fn together(threads: usize, work: impl Fn() -> f64 + Sync) -> f64 {
    let rate = || {
        work();
        let start = Instant::now();
        let done = work();
        done / start.elapsed().as_secs_f64()
    };
    if threads == 1 {
        return rate();
    }
    let barrier = std::sync::Barrier::new(threads);
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    work();
                    barrier.wait();
                    rate()
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().expect("no panic in a measurement")).sum()
    })
}

/// Floating-point operations of `steps` steps of the widest multiply-add that the machine has.
fn fma_loop(steps: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just detected.
            return unsafe { fma_avx512(steps) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: just detected.
            return unsafe { fma_avx2(steps) };
        }
    }
    fma_plain(steps)
}

/// 16 independent chains hide the latency of the two units.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_avx512(steps: usize) -> usize {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_set1_ps(1.0); 16];
    let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, x, y);
        }
    }
    black_box(sums);
    steps * sums.len() * 32
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_avx2(steps: usize) -> usize {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_set1_ps(1.0); 12];
    let (x, y) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, x, y);
        }
    }
    black_box(sums);
    steps * sums.len() * 16
}

fn fma_plain(steps: usize) -> usize {
    let mut sums = [1.0f32; 32];
    let (x, y) = (black_box(0.999), black_box(0.001));
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = *sum * x + y;
        }
    }
    black_box(sums);
    steps * sums.len() * 2
}
