//! Plain products in the three layouts, beside the `gemm` crate on the same data.

use crate::harness::{Bench, Data, SHAPES, Work, cpu, product_flops};
use sae_kernels::operations::{ColumnSums, Layout, Product};
use sae_kernels::{Backend, MatMut, MatRef, Shape};

pub fn run(bench: &mut Bench) {
    for shape in SHAPES {
        for threads in bench.threads.clone() {
            products(bench, shape, threads);
        }
    }
}

fn products(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, inputs: d, latents: h } = shape;
    let (cpu, mut workspace) = cpu::<f32>(shape, threads);
    let data = Data::<f32>::new(shape);
    let dz = vec![0.01f32; n * h];
    // x Wᵀ, dZ W and dZᵀ x.
    let cases = [
        (Layout::Nt, "x·Wᵀ", &data.x, [n, d], &data.weight, [h, d], [n, h, d]),
        (Layout::Nn, "dZ·W", &dz, [n, h], &data.weight, [h, d], [n, d, h]),
        (Layout::Tn, "dZᵀ·x", &dz, [n, h], &data.x, [n, d], [h, d, n]),
    ];
    for (layout, name, left, left_shape, right, right_shape, [m, cols, depth]) in cases {
        let mut out = vec![0.0f32; m * cols];
        let work = product_flops(m, cols, depth);
        bench.time("product", &format!("{name} f32"), shape, threads, work, || {
            cpu.product(Product {
                layout,
                left: MatRef::new(left, left_shape[0], left_shape[1]).unwrap(),
                right: MatRef::new(right, right_shape[0], right_shape[1]).unwrap(),
                accumulate: false,
                out: MatMut::new(&mut out, m, cols).unwrap(),
                workspace: &mut workspace,
            })
            .unwrap();
        });
        let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
        // (row stride, column stride) of the operands as they enter the product.
        let left_strides = if layout == Layout::Tn { (1, left_shape[1]) } else { (left_shape[1], 1) };
        let right_strides = if layout == Layout::Nt { (1, right_shape[1]) } else { (right_shape[1], 1) };
        bench.time("product", &format!("{name} f32, gemm crate"), shape, threads, work, || {
            // SAFETY: the pointers and strides are those of the matrices above.
            unsafe {
                gemm::gemm(
                    m,
                    cols,
                    depth,
                    out.as_mut_ptr(),
                    1,
                    cols as isize,
                    false,
                    left.as_ptr(),
                    left_strides.1 as isize,
                    left_strides.0 as isize,
                    right.as_ptr(),
                    right_strides.1 as isize,
                    right_strides.0 as isize,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    parallelism,
                );
            }
        });
    }
    let mut sums = vec![0.0; h];
    bench.time("product", "column_sums f32", shape, threads, Work::Bytes((4 * n * h) as f64), || {
        cpu.column_sums(ColumnSums {
            matrix: MatRef::new(&dz, n, h).unwrap(),
            accumulate: false,
            sums: &mut sums,
            workspace: &mut workspace,
        })
        .unwrap();
    });
}
