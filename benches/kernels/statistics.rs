//! Batch statistics: comoments and the finished primal form, against the dual form. Symmetric halves count once.

use crate::harness::{Bench, SHAPES, Work, cpu};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sae_kernels::operations::{
    Comoments, CorrelationDual, Covariance, FinishStatistics, PackStatistics, PrimalCorrelation, UnpackStatistics,
};
use sae_kernels::{Backend, MatMut, MatRef, Objective, Shape, Statistics};

pub fn run(bench: &mut Bench) {
    for shape in SHAPES {
        for threads in bench.threads.clone() {
            primal(bench, shape, threads);
            dual(bench, shape, threads);
        }
    }
}

fn activations(n: usize, h: usize) -> Vec<f32> {
    let mut random = StdRng::seed_from_u64(1);
    (0..n * h).map(|_| (random.random::<f32>() - 0.5).max(0.0)).collect()
}

fn primal(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, latents: h, .. } = shape;
    let (cpu, mut workspace) = cpu::<f32>(shape, threads);
    let a = activations(n, h);
    let mut comoments = vec![0.0; h * h];
    let (shift, sum, sum_squares) = (vec![0.125; h], vec![0.0; h], vec![1.0; h]);
    let work = Work::Flops((n * h * (h + 1)) as f64);
    bench.time("statistics", "comoments f32", shape, threads, work, || {
        cpu.comoments(Comoments {
            activations: MatRef::new(&a, n, h).unwrap(),
            shift: &shift,
            accumulate: false,
            comoments: MatMut::new(&mut comoments, h, h).unwrap(),
            workspace: &mut workspace,
        })
        .unwrap();
    });
    let mut packed = vec![0.0; Statistics::len(h, true)];
    // Half of the comoments is read, and twice as wide sums are added to.
    bench.time("statistics", "pack_statistics f32", shape, threads, Work::Bytes((10 * h * h) as f64), || {
        cpu.pack_statistics(PackStatistics {
            count: n as u64,
            row_loss_sum: &[0.0],
            shift: &shift,
            sum: &sum,
            sum_squares: &sum_squares,
            comoments: Some(MatRef::new(&comoments, h, h).unwrap()),
            packed_shift: None,
            accumulate: true,
            packed: &mut packed,
        })
        .unwrap();
    });
    let (mut about, mut sums, mut squares) = (vec![0.0; h], vec![0.0; h], vec![0.0; h]);
    bench.time("statistics", "unpack_statistics f32", shape, threads, Work::Bytes((6 * h * h) as f64), || {
        cpu.unpack_statistics(UnpackStatistics {
            packed: &packed,
            packed_shift: None,
            row_loss_sum: &mut [0.0],
            shift: &mut about,
            sum: &mut sums,
            sum_squares: &mut squares,
            comoments: Some(MatMut::new(&mut comoments, h, h).unwrap()),
        })
        .unwrap();
    });
    let (mut mean, mut variance, mut scale, mut offset) = (vec![0.0; h], vec![0.0; h], vec![0.0; h], vec![0.0; h]);
    let mut losses = [0.0; 2];
    // Half of the comoments is read, all of M written over them: the next call takes M for comoments, with as much work.
    bench.time("statistics", "finish_statistics f32", shape, threads, Work::Bytes((6 * h * h) as f64), || {
        cpu.finish_statistics(FinishStatistics {
            count: n as u64,
            objective: Objective::default(),
            shift: &shift,
            sum: &sum,
            sum_squares: &sum_squares,
            primal: Some(PrimalCorrelation {
                covariance: Covariance::InPlace,
                coupling: MatMut::new(&mut comoments, h, h).unwrap(),
                offset: &mut offset,
            }),
            mean: &mut mean,
            variance: &mut variance,
            scale: &mut scale,
            losses: &mut losses,
            workspace: &mut workspace,
        })
        .unwrap();
    });
}

fn dual(bench: &mut Bench, shape: Shape, threads: usize) {
    let Shape { rows: n, latents: h, .. } = shape;
    let (cpu, mut workspace) = cpu::<f32>(shape, threads);
    let a = activations(n, h);
    let (mean, variance) = (vec![0.125; h], vec![0.03; h]);
    let (mut gram, mut product) = (vec![0.0; n * n], vec![0.0; n * h]);
    let (mut scale, mut loss) = (vec![0.0; h], [0.0]);
    let work = Work::Flops((n * (n + 1) * h + 2 * n * n * h) as f64);
    bench.time("statistics", "correlation_dual f32", shape, threads, work, || {
        cpu.correlation_dual(CorrelationDual {
            activations: MatRef::new(&a, n, h).unwrap(),
            mean: &mean,
            variance: &variance,
            lambda_tc: 1.0,
            gram: MatMut::new(&mut gram, n, n).unwrap(),
            product: MatMut::new(&mut product, n, h).unwrap(),
            scale: &mut scale,
            loss: &mut loss,
            workspace: &mut workspace,
        })
        .unwrap();
    });
}
