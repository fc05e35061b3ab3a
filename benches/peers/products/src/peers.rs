//! One product, and everyone's way to compute it.

use anyhow::Result;
use faer::{Accum, MatMut as FaerMut, MatRef as FaerRef, Par};
use sae_kernels::operations::{Layout, Product};
use sae_kernels::{Backend, Cpu, Isa, MatMut, MatRef, Shape};

/// Computes a job's product once.
pub type Call = fn(&mut Job);

/// Ours first.
pub const PEERS: [(&str, Call); 4] =
    [("sae-kernels", ours), ("gemm", gemm), ("faer", faer), ("matrixmultiply", matrixmultiply)];

/// out [m, n] = left [m, k] · right [k, n], all row-major, the operands perhaps transposed in memory.
pub struct Job {
    pub name: &'static str,
    pub shape: Shape,
    pub threads: usize,
    pub left: Vec<f32>,
    pub right: Vec<f32>,
    pub out: Vec<f32>,
    pub expected: Option<Vec<f32>>,
    /// m, n, k.
    pub extents: [usize; 3],
    pub transposed: [bool; 2],
    cpu: Cpu<f32>,
    workspace: Vec<f64>,
}

impl Job {
    pub fn new(
        name: &'static str,
        shape: Shape,
        threads: usize,
        left: Vec<f32>,
        right: Vec<f32>,
        extents: [usize; 3],
        transposed: [bool; 2],
    ) -> Result<Self> {
        let cpu = Cpu::with(Isa::detect(), threads)?;
        let workspace = vec![0.0; cpu.workspace_len(shape)?];
        let out = vec![0.0; extents[0] * extents[1]];
        Ok(Self { name, shape, threads, left, right, out, expected: None, extents, transposed, cpu, workspace })
    }

    /// Distances between rows and between columns of the left operand, as it enters the product.
    pub fn left_strides(&self) -> [usize; 2] {
        let [m, _, k] = self.extents;
        if self.transposed[0] { [1, m] } else { [k, 1] }
    }

    pub fn right_strides(&self) -> [usize; 2] {
        let [_, n, k] = self.extents;
        if self.transposed[1] { [1, k] } else { [n, 1] }
    }
}

fn ours(job: &mut Job) {
    let [m, n, k] = job.extents;
    let (layout, left, right) = match job.transposed {
        [false, true] => (Layout::Nt, [m, k], [n, k]),
        [false, false] => (Layout::Nn, [m, k], [k, n]),
        [true, false] => (Layout::Tn, [k, m], [k, n]),
        [true, true] => unreachable!("no step has this product"),
    };
    job.cpu
        .product(Product {
            layout,
            left: MatRef::new(&job.left, left[0], left[1]).unwrap(),
            right: MatRef::new(&job.right, right[0], right[1]).unwrap(),
            accumulate: false,
            out: MatMut::new(&mut job.out, m, n).unwrap(),
            workspace: &mut job.workspace,
        })
        .unwrap();
}

fn gemm(job: &mut Job) {
    let [m, n, k] = job.extents;
    let ([left_row, left_column], [right_row, right_column]) = (job.left_strides(), job.right_strides());
    let parallelism = if job.threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(job.threads) };
    // SAFETY: the pointers and strides are those of the matrices.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            job.out.as_mut_ptr(),
            1,
            n as isize,
            false,
            job.left.as_ptr(),
            left_column as isize,
            left_row as isize,
            job.right.as_ptr(),
            right_column as isize,
            right_row as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn faer(job: &mut Job) {
    let [m, n, k] = job.extents;
    let left = match job.transposed[0] {
        false => FaerRef::from_row_major_slice(&job.left, m, k),
        true => FaerRef::from_column_major_slice(&job.left, m, k),
    };
    let right = match job.transposed[1] {
        false => FaerRef::from_row_major_slice(&job.right, k, n),
        true => FaerRef::from_column_major_slice(&job.right, k, n),
    };
    let out = FaerMut::from_row_major_slice_mut(&mut job.out, m, n);
    let par = if job.threads == 1 { Par::Seq } else { Par::rayon(job.threads) };
    faer::linalg::matmul::matmul(out, Accum::Replace, left, right, 1.0f32, par);
}

fn matrixmultiply(job: &mut Job) {
    let [m, n, k] = job.extents;
    let ([left_row, left_column], [right_row, right_column]) = (job.left_strides(), job.right_strides());
    // SAFETY: the pointers and strides are those of the matrices.
    unsafe {
        matrixmultiply::sgemm(
            m,
            k,
            n,
            1.0,
            job.left.as_ptr(),
            left_row as isize,
            left_column as isize,
            job.right.as_ptr(),
            right_row as isize,
            right_column as isize,
            0.0,
            job.out.as_mut_ptr(),
            n as isize,
            1,
        );
    }
}
