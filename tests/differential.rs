//! Every operation of every backend against the reference on the same rounded inputs, element by element within an error bound.
//!
//! Sizes lie around the edges of any likely tile and of cache blocks; matrices are dense, and strided with unaligned starts. What
//! an operation reads that another computed is given as that backend stored it, so each bound is of one operation alone.

#[macro_use]
mod common;

use common::ops::{
    self, Backward, Correlation, Covariance, Decode, DecodeBackward, Dual, Encode, Finish, Redundancy, StatisticsPart,
};
use common::{HostBackend, Place, Under, abs_nt, assert_within, reference, rng, rounded, step, uniform, z_factor};
use rand::RngExt;
use sae_kernels::operations::{Layout, Recentre};
use sae_kernels::{Activation, Element, Form, Objective};

on_every_backend!(
    encode,
    encode_adds_up,
    encode_without_outputs,
    responsibilities,
    recentre,
    comoments,
    finish_statistics,
    finish_statistics_of_many_rows,
    correlation_dual,
    backward_dz,
    product,
    column_sums,
    weight_redundancy,
    decode,
    decode_backward,
);

const ACTIVATIONS: [Activation; 3] = [Activation::Relu, Activation::Identity, Activation::Softplus];

/// Around the edges of tiles of 2 to 64.
const EDGES: [usize; 27] =
    [1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 27, 28, 29, 31, 32, 33, 47, 48, 49, 63, 64, 65];

/// Shapes (N, D, H), or (m, n, k); for GPUs around the edges of a tile of 128, and a depth that goes round its stages.
fn shapes<B: HostBackend>(under: &Under<B>) -> Vec<[usize; 3]> {
    let mut all = vec![[1, 1, 1], [0, 3, 4], [3, 0, 5], [65, 257, 130], [13, 1103, 17], [301, 33, 65], [9, 70, 259]];
    for s in EDGES {
        all.extend([[s, 5, 9], [7, s, 11], [4, 6, s]]);
        if s < 34 {
            all.push([s, s, s]);
        }
    }
    under.cases(all, [[1, 1, 1], [0, 3, 4], [3, 0, 5], [127, 9, 129], [129, 33, 128], [6, 203, 17]])
}

/// Shapes (N, H) of what has no inputs.
fn flat_shapes<B: HostBackend>(under: &Under<B>) -> Vec<[usize; 2]> {
    let mut all = vec![[0, 5], [1, 1], [257, 65], [520, 9], [6, 300], [65, 130]];
    for s in EDGES {
        all.extend([[s, 9], [7, s]]);
        if s < 34 {
            all.push([s, s]);
        }
    }
    under.cases(all, [[0, 5], [1, 1], [2, 31], [127, 33], [7, 128], [129, 257], [300, 5]])
}

/// Rounding errors of a sum of `len` terms that is blocked or kept in wider numbers.
fn sum_factor(len: usize) -> f64 {
    (len as f64 + 8.0).min(common::VARIANCE_BAR)
}

/// As [`sum_factor`], where the bar is that of a correlation.
fn correlation_factor(len: usize) -> f64 {
    (len as f64 + 8.0).min(common::CORRELATION_BAR)
}

/// Smallest normal number of `f32`: what underflows may be off by it.
const TINY: f64 = f32::MIN_POSITIVE as f64;

fn element<B: HostBackend>(values: Vec<f64>) -> Vec<f64> {
    rounded::<B::Element>(&values)
}

fn real<B: HostBackend>(values: Vec<f64>) -> Vec<f64> {
    rounded::<B::Real>(&values)
}

/// Inputs of an encoder, rounded as `B` stores them; rows differ in scale, so that small ones show their own errors.
fn encoder_inputs<B: HostBackend>([n, d, h]: [usize; 3], activation: Activation) -> Encode {
    let mut rng = rng((n * 1_000_003 + d * 1009 + h) as u64);
    let mut x = uniform(&mut rng, n * d, 1.0);
    for (row, x) in x.chunks_mut(d.max(1)).enumerate() {
        x.iter_mut().for_each(|x| *x *= [1.0, 0.01, 3.0][row % 3]);
    }
    Encode {
        n,
        d,
        h,
        x: element::<B>(x),
        weight: element::<B>(uniform(&mut rng, h * d, 1.0)),
        bias: real::<B>(uniform(&mut rng, h, 0.5)),
        activation,
        shift: None,
        before: None,
        wanted: [true; 3],
    }
}

/// Activations like an encoder's, half of them zero for ReLU, rounded as `B` stores them; the last of many columns is dead.
fn activations<B: HostBackend>([n, h]: [usize; 2], activation: Activation) -> Vec<f64> {
    let mut rng = rng((n * 7919 + h) as u64);
    let mut a = uniform(&mut rng, n * h, 1.5);
    for (at, a) in a.iter_mut().enumerate() {
        *a += [0.2, 0.0, 1.0][at % h % 3];
        *a = match activation {
            Activation::Relu => a.max(0.0),
            Activation::Softplus => a.exp().ln_1p(),
            _ => *a,
        };
        if h > 3 && at % h == h - 1 {
            *a = 0.0;
        }
    }
    element::<B>(a)
}

fn check_encoded<B: HostBackend>(under: &Under<B>, case: &Encode, place: Place) {
    let Encode { n, d, h, activation, .. } = *case;
    let context = format!("{}: encode {n}×{d}×{h} {activation:?} {place:?}", under.name);
    let found = case.run(under, place);
    let truth = case.run(&reference(), Place::DENSE);
    let u = under.real();
    let scale = abs_nt(n, h, d, &case.x, &case.weight);
    let z_bound = |at: usize| z_factor(d) * u * (scale[at] + case.bias[at % h].abs());
    assert_within(&context, "activations", &found.activations, &truth.activations, |at| {
        let computed = truth.activations[at].abs() + z_bound(at);
        let function = if activation == Activation::Softplus { 4.0 * u * (1.0 + computed) } else { 0.0 };
        z_bound(at) + function + under.storage(computed + function)
    });
    // All below is of the rounded activations.
    let a = &found.activations;
    let row_loss: Vec<f64> = a.chunks(h).map(step::row_loss).collect();
    assert_within(&context, "row_loss", &found.row_loss, &row_loss, |row| {
        common::ROW_LOSS_BAR * u * (row_loss[row].abs() + 1.0)
    });
    let before = case.before.clone().unwrap_or((0.0, vec![0.0; h], vec![0.0; h]));
    let losses: f64 = found.row_loss.iter().sum();
    let losses_scale: f64 = found.row_loss.iter().map(|l| l.abs()).sum();
    assert_within(&context, "row_loss_sum", &found.row_loss_sum, &[before.0 + losses], |_| {
        sum_factor(n) * u * losses_scale + 4.0 * f64::EPSILON * before.0.abs()
    });
    let centred = |row: usize, j: usize| a[row * h + j] - case.shift.as_ref().map_or(0.0, |shift| shift[j]);
    let column = |j: usize, f: &dyn Fn(f64) -> f64| (0..n).map(|row| f(centred(row, j))).sum::<f64>();
    let sum: Vec<f64> = (0..h).map(|j| before.1[j] + column(j, &|a| a)).collect();
    let squares: Vec<f64> = (0..h).map(|j| before.2[j] + column(j, &|a| a * a)).collect();
    assert_within(&context, "sum", &found.sum, &sum, |j| {
        sum_factor(n) * u * column(j, &f64::abs) + 4.0 * f64::EPSILON * before.1[j].abs()
    });
    assert_within(&context, "sum_squares", &found.sum_squares, &squares, |j| {
        sum_factor(n) * u * column(j, &|a| a * a) + 4.0 * f64::EPSILON * before.2[j].abs()
    });
}

fn encode<B: HostBackend>(under: &Under<B>) {
    for shape in shapes(under) {
        for activation in ACTIVATIONS {
            let case = encoder_inputs::<B>(shape, activation);
            Place::ALL.into_iter().for_each(|place| check_encoded(under, &case, place));
        }
    }
}

fn encode_adds_up<B: HostBackend>(under: &Under<B>) {
    for shape in shapes(under) {
        let mut case = encoder_inputs::<B>(shape, Activation::Relu);
        let mut rng = rng(5);
        case.shift = Some(real::<B>(uniform(&mut rng, case.h, 0.5)));
        check_encoded(under, &case, Place::STRIDED);
        case.before = Some((-3.25, uniform(&mut rng, case.h, 10.0), uniform(&mut rng, case.h, 10.0)));
        check_encoded(under, &case, Place::DENSE);
    }
}

/// What is not wanted makes no difference to what is.
fn encode_without_outputs<B: HostBackend>(under: &Under<B>) {
    for shape in [[0, 2, 3], [1, 4, 1], [5, 7, 9], [33, 17, 65], [70, 300, 31]] {
        for activation in ACTIVATIONS {
            let all = encoder_inputs::<B>(shape, activation);
            let whole = all.run(under, Place::DENSE);
            for wanted in 0..8 {
                let wanted = [wanted & 1 != 0, wanted & 2 != 0, wanted & 4 != 0];
                let some = Encode { wanted, ..all.clone() }.run(under, Place::STRIDED);
                let context = format!("{}: encode {shape:?} {activation:?}, wanted {wanted:?}", under.name);
                let same = |wanted: bool, found: &[f64], whole: &[f64]| {
                    assert!(!wanted || found == whole, "{context}: {found:?} but with all outputs {whole:?}");
                };
                same(wanted[0], &some.activations, &whole.activations);
                same(wanted[1], &some.row_loss, &whole.row_loss);
                same(wanted[2], &some.row_loss_sum, &whole.row_loss_sum);
                same(wanted[2], &some.sum, &whole.sum);
                same(wanted[2], &some.sum_squares, &whole.sum_squares);
            }
        }
    }
}

fn responsibilities<B: HostBackend>(under: &Under<B>) {
    for [n, h] in flat_shapes(under) {
        let mut a = activations::<B>([n, h], Activation::Identity);
        // Far from the row's least activation exp underflows.
        if let Some(last) = a.last_mut() {
            *last = element::<B>(vec![150.0])[0];
        }
        let row_loss = real::<B>(a.chunks(h).map(step::row_loss).collect());
        for place in Place::ALL {
            let context = format!("{}: responsibilities {n}×{h} {place:?}", under.name);
            let found = ops::responsibilities(under, place, (n, h), &a, &row_loss);
            let truth = ops::responsibilities(&reference(), place, (n, h), &a, &row_loss);
            assert_within(&context, "r", &found, &truth, |at| {
                truth[at] * under.real() * (4.0 + row_loss[at / h].abs() + a[at].abs()) + TINY
            });
        }
    }
}

fn recentre<B: HostBackend>(under: &Under<B>) {
    for [n, h] in flat_shapes(under) {
        let mut a = activations::<B>([n, h], Activation::Relu);
        // Some columns lie far from 0, on both sides of the limit from where they are summed again.
        for (at, a) in a.iter_mut().enumerate() {
            *a += [0.0, 1.0, 3.0, 40.0][at % h % 4];
        }
        let a = element::<B>(a);
        let column = |j: usize, f: &dyn Fn(f64) -> f64| (0..n).map(|row| f(a[row * h + j])).sum::<f64>();
        let sum: Vec<f64> = (0..h).map(|j| column(j, &|a| a)).collect();
        let squares: Vec<f64> = (0..h).map(|j| column(j, &|a| a * a)).collect();
        for place in Place::ALL {
            let context = format!("{}: recentre {n}×{h} {place:?}", under.name);
            let (shift, sum_about, squares_about) = ops::recentre(under, place, (n, h), &a, &sum, &squares);
            let mean: Vec<f64> = sum.iter().map(|sum| if n == 0 { 0.0 } else { sum / n as f64 }).collect();
            let u = under.real();
            assert_within(&context, "shift", &shift, &mean, |j| u * mean[j].abs());
            let truth: Vec<f64> = (0..h).map(|j| column(j, &|a| a - shift[j])).collect();
            let exact = |j: usize| 8.0 * f64::EPSILON * n as f64 * (mean[j].abs() + shift[j].abs());
            assert_within(&context, "sum", &sum_about, &truth, |j| {
                exact(j) + sum_factor(n) * u * column(j, &|a| a - shift[j]).abs()
            });
            let truth: Vec<f64> = (0..h).map(|j| column(j, &|a| (a - shift[j]).powi(2))).collect();
            // Columns that are not summed again lose what LIMIT allows, of sums in f64.
            assert_within(&context, "sum_squares", &squares_about, &truth, |j| {
                (sum_factor(n) * u + 16.0 * Recentre::<B>::LIMIT * f64::EPSILON) * truth[j] + exact(j) * f64::EPSILON
            });
        }
    }
}

fn comoments<B: HostBackend>(under: &Under<B>) {
    for [n, h] in flat_shapes(under) {
        let a = activations::<B>([n, h], Activation::Relu);
        let mut rng = rng(n as u64);
        let anywhere = real::<B>(uniform(&mut rng, h, 0.7));
        let mean = (0..h).map(|j| (0..n).map(|row| a[row * h + j]).sum::<f64>() / n.max(1) as f64);
        let mean = real::<B>(mean.collect());
        let before = real::<B>(uniform(&mut rng, h * h, 3.0));
        for (place, shift, before) in [
            (Place::DENSE, &anywhere, None),
            (Place::STRIDED, &mean, None),
            (Place::STRIDED, &anywhere, Some(before.as_slice())),
        ] {
            let context = format!("{}: comoments {n}×{h} {place:?} accumulate {}", under.name, before.is_some());
            let centred: Vec<f64> = (0..n * h).map(|at| a[at] - shift[at % h]).collect();
            let centred = common::transposed(n, h, &centred);
            let scale = abs_nt(h, h, n, &centred, &centred);
            let found = ops::comoments(under, place, (n, h), &a, shift, before);
            let truth = ops::comoments(&reference(), place, (n, h), &a, shift, before);
            assert_within(&context, "comoments", &found, &truth, |at| {
                // About the mean, what is off the diagonal is also within the bar of a correlation, relative to √(S_ii S_jj).
                let deviations = (scale[at / h * (h + 1)] * scale[at % h * (h + 1)]).sqrt();
                let correlation = shift == &mean && at / h != at % h;
                let bar = if correlation { correlation_factor(n) * deviations } else { f64::INFINITY };
                let before = before.map_or(0.0, |b| 2.0 * b[at].abs());
                under.real() * ((sum_factor(n) * scale[at]).min(bar) + before)
            });
        }
    }
}

/// What a case of finish_statistics is given besides sums.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Given {
    Nothing,
    Comoments,
    Activations,
}

/// Sums as a backend would hand them over: about the rounded mean, comoments rounded.
fn finish_inputs<B: HostBackend>([n, h]: [usize; 2], activation: Activation, given: Given) -> Finish {
    let a = activations::<B>([n, h], activation);
    let sum: Vec<f64> = (0..h).map(|j| (0..n).map(|row| a[row * h + j]).sum()).collect();
    let shift = real::<B>(sum.iter().map(|sum| sum / n as f64).collect());
    let centred: Vec<f64> = (0..n * h).map(|at| a[at] - shift[at % h]).collect();
    let centred = common::transposed(n, h, &centred);
    let comoment = |i: usize, j: usize| (0..n).map(|k| centred[i * n + k] * centred[j * n + k]).sum::<f64>();
    Finish {
        h,
        count: n as u64,
        objective: Objective { lambda_var: 0.75, lambda_tc: 1.5, variance_eps: 1e-5, ..Objective::default() },
        sum: (0..h).map(|j| centred[j * n..(j + 1) * n].iter().sum()).collect(),
        sum_squares: (0..h).map(|j| comoment(j, j)).collect(),
        covariance: match given {
            Given::Nothing => Covariance::None,
            Given::Comoments => {
                Covariance::Comoments(real::<B>((0..h * h).map(|at| comoment(at / h, at % h)).collect()))
            }
            Given::Activations => Covariance::Activations(a),
        },
        shift,
    }
}

fn finish_statistics<B: HostBackend>(under: &Under<B>) {
    for n in [2, 3, 70] {
        for h in under.cases(EDGES.into_iter().chain([130, 300]), [1, 2, 31, 127, 128, 259]) {
            for given in [Given::Nothing, Given::Comoments, Given::Activations] {
                let case = finish_inputs::<B>([n, h], Activation::Relu, given);
                let place = Place::ALL[h % 2];
                let context = format!("{}: finish_statistics of {h}, N = {n}, given {given:?}", under.name);
                check_finished(under, &context, &case, place);
            }
        }
    }
}

/// More rows than are summed in one go.
fn finish_statistics_of_many_rows<B: HostBackend>(under: &Under<B>) {
    for n in under.cases([8200], [2050]) {
        let case = finish_inputs::<B>([n, 9], Activation::Relu, Given::Activations);
        check_finished(under, &format!("{}: finish_statistics of {n} rows", under.name), &case, Place::STRIDED);
    }
}

fn check_finished<B: HostBackend>(under: &Under<B>, context: &str, case: &Finish, place: Place) {
    let (h, u) = (case.h, under.real());
    let found = case.run(under, place);
    let truth = case.run(&reference(), place);
    // What sums over the rows add: to a variance, relative to it, and to a correlation.
    let (variance_error, correlation_error) = match &case.covariance {
        Covariance::Activations(_) => {
            let n = case.count as usize;
            (sum_factor(n) * u, (correlation_factor(n) + sum_factor(n)) * u)
        }
        _ => (0.0, 0.0),
    };
    let Objective { lambda_var, lambda_tc, variance_eps, .. } = case.objective;
    let degrees = case.count as f64 - 1.0;
    let v = &truth.variance;
    let s: Vec<f64> = v.iter().map(|v| v.sqrt() + 1e-8).collect();
    assert_within(context, "mean", &found.mean, &truth.mean, |j| u * 2.0 * truth.mean[j].abs());
    assert_within(context, "variance", &found.variance, v, |j| (4.0 * u + variance_error) * v[j]);
    let logarithms: f64 = v.iter().map(|v| 1.0 + (v + variance_eps).ln().abs()).sum();
    assert_within(context, "L_var", &found.losses[..1], &truth.losses[..1], |_| {
        8.0 * u * logarithms + variance_error * h as f64
    });
    // A correlation is computed of three roundings and two roots; q and L_tc are sums of squares of at most 1.
    let relative = 16.0 * u;
    let unit = |i: usize, j: usize| 4.0 * lambda_tc / (degrees * s[i] * s[j]);
    let c = |i: usize, j: usize| {
        let coupling = truth.coupling.get(i * h + j).copied().unwrap_or(0.0);
        if coupling == 0.0 { 0.0 } else { coupling / unit(i, j) }
    };
    let q_error = |j: usize| (0..h).map(|i| correlation_error * (2.0 * c(i, j).abs() + correlation_error)).sum::<f64>();
    assert_within(context, "L_tc", &found.losses[1..], &truth.losses[1..], |_| {
        (sum_factor(h) * u + 2.0 * relative) * truth.losses[1] + (0..h).map(q_error).sum::<f64>()
    });
    let scale_bound = |j: usize| {
        let correlation = (truth.scale[j].abs() * degrees - 2.0 * lambda_var / (v[j] + variance_eps)).abs();
        let sums = if v[j] == 0.0 { 0.0 } else { 4.0 * lambda_tc * q_error(j) / (s[j] * v[j].sqrt()) };
        let roundings = (relative + 2.0 * variance_error) * truth.scale[j].abs() * degrees;
        ((sum_factor(h) * u + 2.0 * relative) * correlation + roundings + sums) / degrees
    };
    assert_within(context, "scale", &found.scale, &truth.scale, scale_bound);
    assert_within(context, "coupling", &found.coupling, &truth.coupling, |at| {
        let (i, j) = (at / h, at % h);
        let dead = v[i] == 0.0 || v[j] == 0.0;
        let sums = if dead { 0.0 } else { correlation_error * unit(i, j) };
        (relative + 2.0 * variance_error) * truth.coupling[at].abs() + sums + TINY * lambda_tc
    });
    if case.covariance != Covariance::None {
        for j in 0..h {
            assert_eq!(found.coupling[j * h + j], 0.0, "{context}: diagonal of the coupling");
            for i in 0..j {
                assert_eq!(found.coupling[i * h + j], found.coupling[j * h + i], "{context}: symmetry of the coupling");
            }
        }
        // offset = M(μ − c') + d·(μ − mean); c' is the rounded mean, or 0 for a backend that subtracts nothing before its product.
        let exact: Vec<f64> = (0..h).map(|j| case.shift[j] + case.sum[j] / case.count as f64).collect();
        let offset = |subtracted: &dyn Fn(usize) -> f64| -> Vec<(f64, f64)> {
            (0..h)
                .map(|j| {
                    let term = |i: usize| found.coupling[j * h + i] * (exact[i] - subtracted(i));
                    let rounding = found.scale[j] * (exact[j] - found.mean[j]);
                    let terms: Vec<f64> = (0..h).map(term).chain([rounding]).collect();
                    (terms.iter().sum(), terms.iter().map(|t| t.abs()).sum())
                })
                .collect()
        };
        let fits = |offset: Vec<(f64, f64)>| {
            let bound = |scale: f64| 2.0 * sum_factor(h) * u * scale + TINY;
            found.offset.iter().zip(&offset).all(|(found, (truth, scale))| (found - truth).abs() <= bound(*scale))
        };
        assert!(
            fits(offset(&|i| found.mean[i])) || fits(offset(&|_| 0.0)),
            "{context}: offset {:?} is neither M(μ − mean) nor Mμ",
            found.offset
        );
        if truth.losses[1] > 0.0 {
            assert!(s.iter().all(|s| *s > 0.0));
        }
    }
}

fn correlation_dual<B: HostBackend>(under: &Under<B>) {
    for [n, h] in flat_shapes(under) {
        if !(2..=300).contains(&n) {
            continue;
        }
        let a = activations::<B>([n, h], Activation::Relu);
        let finish = finish_inputs::<B>([n, h], Activation::Relu, Given::Nothing).run(under, Place::DENSE);
        let scale = real::<B>(uniform(&mut rng(3), h, 0.1));
        let (mean, variance) = (finish.mean, finish.variance);
        let case = Dual { n, h, activations: a.clone(), mean, variance, lambda_tc: 0.75, scale };
        let (degrees, u) = (n as f64 - 1.0, under.real());
        let s: Vec<f64> = case.variance.iter().map(|v| v.sqrt() + 1e-8).collect();
        let dead = |j: usize| case.variance[j] == 0.0;
        let unit: Vec<f64> =
            (0..n * h).map(|at| if dead(at % h) { 0.0 } else { (a[at] - case.mean[at % h]) / s[at % h] }).collect();
        // Errors of K, then of KÂ: its own sum's, and K's.
        let gram_error: Vec<f64> =
            abs_nt(n, n, h, &unit, &unit).iter().map(|s| correlation_factor(h) * u * s / degrees).collect();
        let columns = common::transposed(n, h, &unit);
        for place in Place::ALL {
            let context = format!("{}: correlation_dual {n}×{h} {place:?}", under.name);
            let found = case.run(under, place);
            let truth = case.run(&reference(), place);
            assert_within(&context, "gram", &found.gram, &truth.gram, |at| gram_error[at]);
            let abs_gram: Vec<f64> =
                (0..n * n).map(|at| gram_error[at] + correlation_factor(n) * u * truth.gram[at].abs()).collect();
            let product_error = abs_nt(n, h, n, &abs_gram, &columns);
            let g = |j: usize| 4.0 * case.lambda_tc / (degrees * s[j]);
            assert_within(&context, "product", &found.product, &truth.product, |at| {
                let computed = g(at % h) * product_error[at];
                computed + under.storage(truth.product[at].abs() + computed)
            });
            let c: Vec<f64> = (0..h).map(|j| case.variance[j] / (s[j] * s[j])).collect();
            let norm: f64 = truth.gram.iter().map(|k| k * k).sum();
            let norm_error: f64 = truth.gram.iter().zip(&gram_error).map(|(k, error)| 2.0 * k.abs() * error).sum();
            let squares: f64 = c.iter().map(|c| c * c).sum();
            assert_within(&context, "loss", &found.loss, &truth.loss, |_| {
                norm_error + sum_factor(n) * u * norm + sum_factor(h) * u * squares
            });
            assert_within(&context, "scale", &found.scale, &truth.scale, |j| {
                let of_column = |f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>() / degrees;
                let q_error = of_column(&|row| (unit[row * h + j] * product_error[row * h + j]).abs());
                let q_scale =
                    of_column(&|row| (unit[row * h + j] * truth.product[row * h + j] / g(j)).abs()) + c[j] * c[j];
                let q = if dead(j) {
                    0.0
                } else {
                    (q_error + sum_factor(n) * u * q_scale) / (s[j] * case.variance[j].sqrt())
                };
                4.0 * case.lambda_tc / degrees * (q + 8.0 * u * c[j] / (s[j] * s[j]))
                    + 4.0 * u * (case.scale[j].abs() + truth.scale[j].abs())
            });
        }
    }
}

fn backward_dz<B: HostBackend>(under: &Under<B>) {
    for [n, h] in flat_shapes(under) {
        for activation in ACTIVATIONS {
            let a = activations::<B>([n, h], activation);
            let row_loss = real::<B>(a.chunks(h).map(step::row_loss).collect());
            let mut rng = rng((n + 31 * h) as u64);
            let finished =
                (n >= 2).then(|| finish_inputs::<B>([n, h], activation, Given::Comoments).run(under, Place::DENSE));
            let mut parts = vec![None];
            if let Some(f) = finished {
                let part =
                    |correlation| Some(StatisticsPart { mean: f.mean.clone(), scale: f.scale.clone(), correlation });
                parts.push(part(Correlation::None));
                let product = element::<B>(uniform(&mut rng, n * h, 2.0));
                parts.push(part(Correlation::Dual { product }));
                parts.push(part(Correlation::Primal { coupling: f.coupling.clone(), offset: f.offset.clone() }));
            }
            let before = real::<B>(uniform(&mut rng, h, 2.0));
            for (at, statistics) in parts.into_iter().enumerate() {
                let case = Backward {
                    n,
                    h,
                    activations: a.clone(),
                    activation,
                    row_loss: row_loss.clone(),
                    // A weight of 0 leaves the term out.
                    row_weight: if at == 1 { 0.0 } else { 0.625 },
                    statistics,
                    before: (at % 2 == 1).then(|| before.clone()),
                };
                check_backward(under, &case, Place::ALL[(at + h) % 2]);
            }
        }
    }
}

fn check_backward<B: HostBackend>(under: &Under<B>, case: &Backward, place: Place) {
    let Backward { n, h, activation, row_weight: w, .. } = *case;
    let kind = match case.statistics.as_ref().map(|s| &s.correlation) {
        None => "no statistics",
        Some(Correlation::None) => "variance",
        Some(Correlation::Dual { .. }) => "dual",
        Some(Correlation::Primal { .. }) => "primal",
    };
    let context = format!("{}: backward_dz {n}×{h} {activation:?} {kind} {place:?}", under.name);
    let (dz, grad_bias) = case.run(under, place);
    let u = under.real();
    // What the backend subtracts before its product is its own affair: the truth has the exact mean.
    let exact = (n >= 2).then(|| {
        let sum = |j: usize| (0..n).map(|row| case.activations[row * h + j]).sum::<f64>();
        (0..h).map(|j| sum(j) / n as f64).collect::<Vec<_>>()
    });
    let (mut truth, mut bound) = (vec![0.0; n * h], vec![0.0; n * h]);
    for at in 0..n * h {
        let (row, j) = (at / h, at % h);
        let a = &case.activations[row * h..(row + 1) * h];
        let (mut da, mut error) = (0.0, 0.0);
        if w != 0.0 {
            let exponent = case.row_loss[row] - a[j];
            da += w * exponent.exp();
            error += u * da.abs() * (6.0 + case.row_loss[row].abs() + a[j].abs()) + TINY;
        }
        if let (Some(statistics), Some(exact)) = (&case.statistics, &exact) {
            let term = (a[j] - statistics.mean[j]) * statistics.scale[j];
            da += term;
            error += 3.0 * u * term.abs();
            match &statistics.correlation {
                Correlation::None => (),
                Correlation::Dual { product } => {
                    da += product[at];
                    error += u * product[at].abs();
                }
                Correlation::Primal { coupling, offset } => {
                    let term = |i: usize| (a[i] - exact[i]) * coupling[i * h + j];
                    da += (0..h).map(term).sum::<f64>();
                    // The offset makes up for the rounding of the mean above, too; the reference's mean is not rounded.
                    if B::Real::NAME == "f32" {
                        da += (statistics.mean[j] - exact[j]) * statistics.scale[j];
                    }
                    let subtracted = |i: usize| a[i].abs() * f64::from(u8::from(offset[j].abs() > 1e-3));
                    error += z_factor(h)
                        * u
                        * (0..h)
                            .map(|i| ((a[i] - exact[i]).abs() + subtracted(i) + u * a[i]) * coupling[i * h + j].abs())
                            .sum::<f64>()
                        + 2.0 * u * offset[j].abs();
                }
            }
        }
        let slope = match activation {
            Activation::Relu => f64::from(u8::from(a[j] > 0.0)),
            Activation::Softplus => -(-a[j]).exp_m1(),
            _ => 1.0,
        };
        truth[at] = da * slope;
        // 1 − exp(−a) may be off by 2u·1 where it is computed so.
        let slope_error = if activation == Activation::Softplus { 4.0 * u } else { 0.0 };
        let computed = (error + 4.0 * u * da.abs()) * slope + slope_error * da.abs();
        bound[at] = if slope == 0.0 { 0.0 } else { computed + under.storage(truth[at].abs() + computed) };
    }
    assert_within(&context, "dz", &dz, &truth, |at| bound[at]);
    let column = |j: usize, f: &dyn Fn(usize) -> f64| (0..n).map(|row| f(row * h + j)).sum::<f64>();
    let before = case.before.clone().unwrap_or(vec![0.0; h]);
    let sums: Vec<f64> = (0..h).map(|j| before[j] + column(j, &|at| dz[at])).collect();
    assert_within(&context, "grad_bias", &grad_bias, &sums, |j| {
        // It may be the sum before or after dz is rounded to be stored.
        column(j, &|at| 2.0 * under.storage(dz[at]) * f64::from(u8::from(dz[at] != 0.0)))
            + sum_factor(n) * u * column(j, &|at| dz[at].abs())
            + 2.0 * u * (before[j].abs() + sums[j].abs())
    });
}

fn product<B: HostBackend>(under: &Under<B>) {
    for [m, n, k] in shapes(under) {
        let mut rng = rng((m * 31 + n * 17 + k) as u64);
        let left = element::<B>(uniform(&mut rng, m * k, 1.0));
        let right = element::<B>(uniform(&mut rng, n * k, 1.0));
        let before = real::<B>(uniform(&mut rng, m * n, 2.0));
        let scale = abs_nt(m, n, k, &left, &right);
        for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
            for (place, before) in
                [(Place::DENSE, None), (Place::STRIDED, None), (Place::STRIDED, Some(before.as_slice()))]
            {
                let context =
                    format!("{}: product {layout:?} {m}×{n}×{k} {place:?} accumulate {}", under.name, before.is_some());
                let found = ops::product(under, place, layout, [m, n, k], &left, &right, before);
                let truth = ops::product(&reference(), Place::DENSE, layout, [m, n, k], &left, &right, before);
                assert_within(&context, "out", &found, &truth, |at| {
                    under.real() * (z_factor(k) * scale[at] + before.map_or(0.0, |b| 2.0 * b[at].abs()))
                });
            }
        }
    }
}

fn column_sums<B: HostBackend>(under: &Under<B>) {
    for [n, h] in flat_shapes(under) {
        let mut rng = rng((n + h) as u64);
        let matrix = element::<B>(uniform(&mut rng, n * h, 1.0));
        let before = real::<B>(uniform(&mut rng, h, 2.0));
        for (place, before) in [(Place::DENSE, None), (Place::STRIDED, Some(before.as_slice()))] {
            let context = format!("{}: column_sums {n}×{h} {place:?}", under.name);
            let found = ops::column_sums(under, place, (n, h), &matrix, before);
            let truth = ops::column_sums(&reference(), place, (n, h), &matrix, before);
            let scale = |j: usize| (0..n).map(|row| matrix[row * h + j].abs()).sum::<f64>();
            assert_within(&context, "sums", &found, &truth, |j| {
                under.real() * (z_factor(n) * scale(j) + before.map_or(0.0, |b| 2.0 * b[j].abs()))
            });
        }
    }
}

fn weight_redundancy<B: HostBackend>(under: &Under<B>) {
    let mut all = vec![[0, 3], [3, 0], [1, 1], [65, 130], [130, 65], [257, 12]];
    for s in EDGES {
        all.extend([[s, 9], [9, s]]);
        if s < 34 {
            all.push([s, s]);
        }
    }
    for [h, d] in under.cases(all, [[0, 3], [3, 0], [1, 1], [129, 33], [31, 128]]) {
        let mut rng = rng((h * 131 + d) as u64);
        let mut weight = uniform(&mut rng, h * d, 1.0 / (d.max(1) as f64).sqrt());
        if h > 2 {
            // A zero row has no direction.
            weight[d..2 * d].fill(0.0);
        }
        let weight = element::<B>(weight);
        for (form, normalize) in
            [(Form::Primal, true), (Form::Dual, true), (Form::Primal, false), (Form::Dual, false), (Form::Auto, true)]
        {
            let lambda = rng.random_range(0.1..2.0);
            let before = Some(real::<B>(uniform(&mut rng, h * d, 1.0)));
            let case = Redundancy { h, d, weight: weight.clone(), normalize, form, lambda, before };
            for place in Place::ALL {
                check_redundancy(under, &case, place);
            }
            let (loss, _, gram) = case.run(under, Place::DENSE);
            let alone = Redundancy { before: None, ..case }.run(under, Place::STRIDED);
            assert_eq!(
                alone,
                (loss, Vec::new(), gram),
                "{}: weight_redundancy {h}×{d} {form:?}, loss alone",
                under.name
            );
        }
    }
}

fn check_redundancy<B: HostBackend>(under: &Under<B>, case: &Redundancy, place: Place) {
    let Redundancy { h, d, ref weight, normalize, form, lambda, .. } = *case;
    let context = format!("{}: weight_redundancy {h}×{d} {form:?} normalize {normalize} {place:?}", under.name);
    let (loss, grad, found_gram) = case.run(under, place);
    let (true_loss, truth, _) = Redundancy { form: Form::Primal, ..case.clone() }.run(&reference(), place);
    let (.., true_gram) = case.run(&reference(), place);
    let u = under.real();
    let norm: Vec<f64> = (0..h).map(|j| weight[j * d..(j + 1) * d].iter().map(|w| w * w).sum::<f64>().sqrt()).collect();
    let divisor = |j: usize| if normalize { norm[j] + 1e-8 } else { 1.0 };
    let unit: Vec<f64> = (0..h * d).map(|at| weight[at] / divisor(at / d)).collect();
    // The scale of rounding errors: every factor of 4(Ŵ ŴᵀŴ − Ŵ) by its magnitude. It is the same for both forms.
    let gram = abs_nt(h, h, d, &unit, &unit);
    let squares: f64 = gram.iter().map(|g| g * g).sum();
    let trace: f64 = (0..h).map(|j| gram[j * h + j]).sum();
    let factor = z_factor(d) + z_factor(h) + 16.0;
    let columns = common::transposed(h, d, &unit);
    let scale = if form.is_dual(h, d) { abs_nt(d, d, h, &columns, &columns) } else { gram.clone() };
    assert_within(&context, "gram", &found_gram, &true_gram, |at| factor * u * (scale[at] + 1.0));
    assert_within(&context, "loss", &[loss], &[true_loss], |_| factor * u * (squares + 2.0 * trace + h as f64));
    let step: Vec<f64> = (0..h * d)
        .map(|at| {
            let (j, k) = (at / d, at % d);
            4.0 * ((0..h).map(|i| gram[j * h + i] * unit[i * d + k].abs()).sum::<f64>() + unit[at].abs())
        })
        .collect();
    assert_within(&context, "grad_weight", &grad, &truth, |at| {
        let j = at / d;
        let through_norm = if normalize && norm[j] > 0.0 {
            let along: f64 = (j * d..(j + 1) * d).map(|at| step[at] * weight[at].abs()).sum();
            weight[at].abs() * along / (norm[j] * divisor(j).powi(2))
        } else {
            0.0
        };
        u * (factor * lambda * (step[at] / divisor(j) + through_norm) + 2.0 * case.before.as_ref().unwrap()[at].abs())
    });
}

fn decode<B: HostBackend>(under: &Under<B>) {
    for [n, d, h] in shapes(under) {
        let mut rng = rng((n + 3 * d + 7 * h) as u64);
        let a = activations::<B>([n, h], Activation::Relu);
        let mut case = Decode {
            n,
            d,
            h,
            activations: a,
            weight: element::<B>(uniform(&mut rng, h * d, 0.5)),
            bias: real::<B>(uniform(&mut rng, d, 0.5)),
            x: element::<B>(uniform(&mut rng, n * d, 1.0)),
            residual_weight: 0.4,
            before: None,
            wanted: [true, true],
        };
        for (place, before, wanted) in [
            (Place::DENSE, None, [true, true]),
            (Place::STRIDED, Some(2.5), [true, true]),
            (Place::STRIDED, None, [false, true]),
            (Place::DENSE, None, [true, false]),
            (Place::DENSE, None, [false, false]),
        ] {
            (case.before, case.wanted) = (before, wanted);
            check_decoded(under, &case, place);
        }
    }
}

fn check_decoded<B: HostBackend>(under: &Under<B>, case: &Decode, place: Place) {
    let Decode { n, d, h, wanted, residual_weight, .. } = *case;
    let context = format!("{}: decode {n}×{d}×{h} {wanted:?} {place:?}", under.name);
    let found = case.run(under, place);
    let truth = case.run(&reference(), Place::DENSE);
    let everything = Decode { wanted: [true, true], ..case.clone() }.run(&reference(), Place::DENSE).reconstruction;
    let u = under.real();
    let scale = abs_nt(n, d, h, &case.activations, &common::transposed(h, d, &case.weight));
    let bound: Vec<f64> = (0..n * d).map(|at| z_factor(h) * u * (scale[at] + case.bias[at % d].abs())).collect();
    assert_within(&context, "reconstruction", &found.reconstruction, &truth.reconstruction, |at| bound[at]);
    let error = |at: usize| (everything[at] - case.x[at]).abs();
    assert_within(&context, "residual", &found.residual, &truth.residual, |at| {
        let computed = residual_weight * (bound[at] + 2.0 * u * error(at)) + u * truth.residual[at].abs();
        computed + under.storage(truth.residual[at].abs() + computed)
    });
    assert_within(&context, "squared_error", &found.squared_error, &truth.squared_error, |_| {
        let of_bounds: f64 = (0..n * d).map(|at| 2.0 * error(at) * bound[at] + bound[at].powi(2)).sum();
        of_bounds + sum_factor(n * d) * u * truth.squared_error[0]
    });
}

fn decode_backward<B: HostBackend>(under: &Under<B>) {
    for [n, d, h] in shapes(under) {
        for activation in ACTIVATIONS {
            let mut rng = rng((n + 3 * d + 7 * h) as u64);
            let mut case = DecodeBackward {
                n,
                d,
                h,
                residual: element::<B>(uniform(&mut rng, n * d, 0.5)),
                weight: element::<B>(uniform(&mut rng, h * d, 0.5)),
                activations: activations::<B>([n, h], activation),
                activation,
                l1: 0.375,
                before: None,
            };
            check_decode_backward(under, &case, Place::DENSE);
            case.before = Some(real::<B>(uniform(&mut rng, h, 1.0)));
            check_decode_backward(under, &case, Place::STRIDED);
        }
    }
}

fn check_decode_backward<B: HostBackend>(under: &Under<B>, case: &DecodeBackward, place: Place) {
    let DecodeBackward { n, d, h, activation, l1, .. } = *case;
    let context = format!("{}: decode_backward {n}×{d}×{h} {activation:?} {place:?}", under.name);
    let (dz, grad_bias) = case.run(under, place);
    let (truth, _) = case.run(&reference(), Place::DENSE);
    let u = under.real();
    let scale = abs_nt(n, h, d, &case.residual, &case.weight);
    assert_within(&context, "dz", &dz, &truth, |at| {
        let off = activation == Activation::Relu && case.activations[at] <= 0.0;
        let slope = if activation == Activation::Softplus { 4.0 * u } else { 0.0 };
        let computed = (z_factor(d) * u + slope) * (scale[at] + l1) + 2.0 * u * truth[at].abs();
        if off { 0.0 } else { computed + under.storage(truth[at].abs() + computed) }
    });
    let column = |j: usize, f: &dyn Fn(usize) -> f64| (0..n).map(|row| f(row * h + j)).sum::<f64>();
    let before = case.before.clone().unwrap_or(vec![0.0; h]);
    let sums: Vec<f64> = (0..h).map(|j| before[j] + column(j, &|at| dz[at])).collect();
    assert_within(&context, "grad_bias", &grad_bias, &sums, |j| {
        column(j, &|at| 2.0 * under.storage(dz[at]) * f64::from(u8::from(dz[at] != 0.0)))
            + sum_factor(n) * u * column(j, &|at| dz[at].abs())
            + 2.0 * u * (before[j].abs() + sums[j].abs())
    });
}
