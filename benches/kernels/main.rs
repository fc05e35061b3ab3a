//! Criterion benchmarks of every family of operations and of whole steps, on the CPU and, with the feature `cuda`, on a GPU.
//!
//! Each line of throughput is in FLOP/s (criterion calls them elements) or bytes/s; below it stands the share of this machine's peak,
//! which is measured in the same run: fused multiply-adds for products, a copy for what is bound by memory. Where the `gemm`
//! crate has the same product it runs beside ours, with its AVX-512 kernels; `benches/peers` has more to compare with.
//!
//! `cargo bench` runs all; `cargo bench -- encode` one group; `cargo bench -- 128x784x64` one shape;
//! `cargo bench --features cuda -- cuda` what runs on the GPU, against ceilings of its own: see `cuda.rs`.

mod harness;
mod peak;

mod backward;
#[cfg(feature = "cuda")]
mod cuda;
mod decode;
mod encode;
mod optimizer;
mod product;
mod statistics;
mod step;

use criterion::Criterion;
use std::time::Duration;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .configure_from_args();
    let mut bench = harness::Bench::new(&mut criterion);
    encode::run(&mut bench);
    statistics::run(&mut bench);
    backward::run(&mut bench);
    product::run(&mut bench);
    decode::run(&mut bench);
    optimizer::run(&mut bench);
    step::run(&mut bench);
    #[cfg(feature = "cuda")]
    cuda::run(&mut bench);
    criterion.final_summary();
}
