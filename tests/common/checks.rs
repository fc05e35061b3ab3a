//! Single operations against the reference: inputs, and what errors are allowed.
//!
//! What an operation reads that another computed is given as that backend stored it, so each bound is of one operation alone.

use super::ops::{
    self, ActivationSums, Backward, Correlation, Covariance, Decode, DecodeBackward, Dual, Encode, Encoded, Finish,
    MomentSums, Redundancy, StatisticsPart,
};
use super::{
    HostBackend, Place, Under, abs_nt, assert_within, reference, rng, rounded, step, transposed, uniform, z_factor,
};
use rand::rngs::StdRng;
use sae_kernels::operations::Layout;
use sae_kernels::{Activation, Element, Form, Objective};

/// Rounding errors of a sum of `len` terms that is blocked or kept in wider numbers.
pub fn sum_factor(len: usize) -> f64 {
    (len as f64 + 8.0).min(super::VARIANCE_BAR)
}

/// As [`sum_factor`], where the bar is that of a correlation.
fn correlation_factor(len: usize) -> f64 {
    (len as f64 + 8.0).min(super::CORRELATION_BAR)
}

/// Smallest normal number of `f32`: what underflows may be off by it.
pub const TINY: f64 = f32::MIN_POSITIVE as f64;

pub fn element<B: HostBackend>(values: Vec<f64>) -> Vec<f64> {
    rounded::<B::Element>(&values)
}

pub fn real<B: HostBackend>(values: Vec<f64>) -> Vec<f64> {
    rounded::<B::Real>(&values)
}

/// Inputs of an encoder, rounded as `B` stores them; rows differ in scale, so that small ones show their own errors.
pub fn encoder_inputs<B: HostBackend>([n, d, h]: [usize; 3], activation: Activation) -> Encode {
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
pub fn activations<B: HostBackend>([n, h]: [usize; 2], activation: Activation) -> Vec<f64> {
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

pub fn check_encoded<B: HostBackend>(under: &Under<B>, case: &Encode, place: Place) {
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
    check_sums(under, &context, [n, h], &found.activations, (&case.shift, &case.before), &found);
}

/// Activations of any sign, with a shift and sums to add to.
pub fn sums_inputs<B: HostBackend>([n, h]: [usize; 2]) -> ActivationSums {
    let mut rng = rng((n * 31 + h) as u64);
    ActivationSums {
        n,
        h,
        activations: activations::<B>([n, h], Activation::Identity),
        shift: Some(real::<B>(uniform(&mut rng, h, 0.5))),
        before: Some((-3.25, uniform(&mut rng, h, 10.0), uniform(&mut rng, h, 10.0))),
        wanted: [true; 2],
    }
}

pub fn check_summed<B: HostBackend>(under: &Under<B>, case: &ActivationSums, place: Place) {
    let ActivationSums { n, h, .. } = *case;
    let context = format!("{}: activation_sums {n}×{h} {place:?}", under.name);
    let found = case.run(under, place);
    check_sums(under, &context, [n, h], &case.activations, (&case.shift, &case.before), &found);
}

/// Row losses and moments of the activations that a backend has stored.
fn check_sums<B: HostBackend>(
    under: &Under<B>,
    context: &str,
    [n, h]: [usize; 2],
    a: &[f64],
    (shift, before): (&Option<Vec<f64>>, &Option<MomentSums>),
    found: &Encoded,
) {
    let u = under.real();
    let row_loss: Vec<f64> = a.chunks(h).map(step::row_loss).collect();
    assert_within(context, "row_loss", &found.row_loss, &row_loss, |row| {
        super::ROW_LOSS_BAR * u * (row_loss[row].abs() + 1.0)
    });
    let before = before.clone().unwrap_or((0.0, vec![0.0; h], vec![0.0; h]));
    let losses: f64 = found.row_loss.iter().sum();
    let losses_scale: f64 = found.row_loss.iter().map(|l| l.abs()).sum();
    assert_within(context, "row_loss_sum", &found.row_loss_sum, &[before.0 + losses], |_| {
        sum_factor(n) * u * losses_scale + sum_factor(n) * f64::EPSILON * before.0.abs()
    });
    let centred = |row: usize, j: usize| a[row * h + j] - shift.as_ref().map_or(0.0, |shift| shift[j]);
    let column = |j: usize, f: &dyn Fn(f64) -> f64| (0..n).map(|row| f(centred(row, j))).sum::<f64>();
    let sum: Vec<f64> = (0..h).map(|j| before.1[j] + column(j, &|a| a)).collect();
    let squares: Vec<f64> = (0..h).map(|j| before.2[j] + column(j, &|a| a * a)).collect();
    assert_within(context, "sum", &found.sum, &sum, |j| {
        sum_factor(n) * u * column(j, &f64::abs) + sum_factor(n) * f64::EPSILON * before.1[j].abs()
    });
    assert_within(context, "sum_squares", &found.sum_squares, &squares, |j| {
        sum_factor(n) * u * column(j, &|a| a * a) + sum_factor(n) * f64::EPSILON * before.2[j].abs()
    });
}

/// `shift` is the mean if `about_mean`.
pub fn check_comoments<B: HostBackend>(
    under: &Under<B>,
    [n, h]: [usize; 2],
    place: Place,
    about_mean: bool,
    accumulate: bool,
) {
    let a = activations::<B>([n, h], Activation::Relu);
    let mut rng = rng(n as u64);
    let anywhere = real::<B>(uniform(&mut rng, h, 0.7));
    let before = real::<B>(uniform(&mut rng, h * h, 3.0));
    let before = accumulate.then_some(before.as_slice());
    let mean = || (0..h).map(|j| (0..n).map(|row| a[row * h + j]).sum::<f64>() / n.max(1) as f64);
    let shift = if about_mean { real::<B>(mean().collect()) } else { anywhere };
    let context = format!("{}: comoments {n}×{h} {place:?} accumulate {accumulate}", under.name);
    let centred: Vec<f64> = (0..n * h).map(|at| a[at] - shift[at % h]).collect();
    let centred = transposed(n, h, &centred);
    let scale = abs_nt(h, h, n, &centred, &centred);
    let found = ops::comoments(under, place, (n, h), &a, &shift, before);
    let truth = ops::comoments(&reference(), Place::DENSE, (n, h), &a, &shift, before);
    assert_within(&context, "comoments", &found, &truth, |at| {
        // About the mean, what is off the diagonal is also within the bar of a correlation, relative to √(S_ii S_jj).
        let deviations = (scale[at / h * (h + 1)] * scale[at % h * (h + 1)]).sqrt();
        let correlation = about_mean && at / h != at % h;
        let bar = if correlation { correlation_factor(n) * deviations } else { f64::INFINITY };
        let before = before.map_or(0.0, |b| 2.0 * b[at].abs());
        under.real() * ((sum_factor(n) * scale[at]).min(bar) + before)
    });
}

/// What a case of finish_statistics is given besides sums.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Given {
    Nothing,
    Comoments,
    Activations,
}

/// Sums as a backend would hand them over: about the rounded mean, comoments rounded.
pub fn finish_inputs<B: HostBackend>([n, h]: [usize; 2], activation: Activation, given: Given) -> Finish {
    let a = activations::<B>([n, h], activation);
    let sum: Vec<f64> = (0..h).map(|j| (0..n).map(|row| a[row * h + j]).sum()).collect();
    let shift = real::<B>(sum.iter().map(|sum| sum / n as f64).collect());
    let centred: Vec<f64> = (0..n * h).map(|at| a[at] - shift[at % h]).collect();
    let centred = transposed(n, h, &centred);
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

pub fn check_finished<B: HostBackend>(under: &Under<B>, context: &str, case: &Finish, place: Place) {
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

pub fn check_dual<B: HostBackend>(under: &Under<B>, [n, h]: [usize; 2], place: Place) {
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
    let columns = transposed(n, h, &unit);
    let context = format!("{}: correlation_dual {n}×{h} {place:?}", under.name);
    let found = case.run(under, place);
    let truth = case.run(&reference(), Place::DENSE);
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
        let q_scale = of_column(&|row| (unit[row * h + j] * truth.product[row * h + j] / g(j)).abs()) + c[j] * c[j];
        let q = if dead(j) { 0.0 } else { (q_error + sum_factor(n) * u * q_scale) / (s[j] * case.variance[j].sqrt()) };
        4.0 * case.lambda_tc / degrees * (q + 8.0 * u * c[j] / (s[j] * s[j]))
            + 4.0 * u * (case.scale[j].abs() + truth.scale[j].abs())
    });
}

/// One case for each kind of statistics.
pub fn backward_inputs<B: HostBackend>(
    under: &Under<B>,
    [n, h]: [usize; 2],
    activation: Activation,
) -> impl Iterator<Item = Backward> {
    let a = activations::<B>([n, h], activation);
    let row_loss = real::<B>(a.chunks(h).map(step::row_loss).collect());
    let mut rng = rng((n + 31 * h) as u64);
    let finished = (n >= 2).then(|| finish_inputs::<B>([n, h], activation, Given::Comoments).run(under, Place::DENSE));
    let mut parts = vec![None];
    if let Some(f) = finished {
        let part = |correlation| Some(StatisticsPart { mean: f.mean.clone(), scale: f.scale.clone(), correlation });
        parts.push(part(Correlation::None));
        let product = element::<B>(uniform(&mut rng, n * h, 2.0));
        parts.push(part(Correlation::Dual { product }));
        parts.push(part(Correlation::Primal { coupling: f.coupling.clone(), offset: f.offset.clone() }));
    }
    let before = real::<B>(uniform(&mut rng, h, 2.0));
    parts.into_iter().enumerate().map(move |(at, statistics)| Backward {
        n,
        h,
        activations: a.clone(),
        activation,
        row_loss: row_loss.clone(),
        // A weight of 0 leaves the term out.
        row_weight: if at == 1 { 0.0 } else { 0.625 },
        statistics,
        before: (at % 2 == 1).then(|| before.clone()),
    })
}

pub fn check_backward<B: HostBackend>(under: &Under<B>, case: &Backward, place: Place) {
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

/// Operands of a product m×n×k as [m,k] and [n,k], what may be added to, and the scale of rounding errors.
pub struct ProductCase {
    shape: [usize; 3],
    left: Vec<f64>,
    right: Vec<f64>,
    before: Vec<f64>,
    scale: Vec<f64>,
}

impl ProductCase {
    pub fn new<B: HostBackend>([m, n, k]: [usize; 3]) -> Self {
        let mut rng = rng((m * 31 + n * 17 + k) as u64);
        let left = element::<B>(uniform(&mut rng, m * k, 1.0));
        let right = element::<B>(uniform(&mut rng, n * k, 1.0));
        let before = real::<B>(uniform(&mut rng, m * n, 2.0));
        let scale = abs_nt(m, n, k, &left, &right);
        Self { shape: [m, n, k], left, right, before, scale }
    }

    pub fn check<B: HostBackend>(&self, under: &Under<B>, layout: Layout, place: Place, accumulate: bool) {
        let Self { shape, left, right, before, scale } = self;
        let [m, n, k] = *shape;
        let before = accumulate.then_some(before.as_slice());
        let context = format!("{}: product {layout:?} {m}×{n}×{k} {place:?} accumulate {accumulate}", under.name);
        let found = ops::product(under, place, layout, *shape, left, right, before);
        let truth = ops::product(&reference(), Place::DENSE, layout, *shape, left, right, before);
        assert_within(&context, "out", &found, &truth, |at| {
            under.real() * (z_factor(k) * scale[at] + before.map_or(0.0, |b| 2.0 * b[at].abs()))
        });
    }
}

pub fn redundancy_weight<B: HostBackend>(rng: &mut StdRng, [h, d]: [usize; 2]) -> Vec<f64> {
    let mut weight = uniform(rng, h * d, 1.0 / (d.max(1) as f64).sqrt());
    if h > 2 {
        // A zero row has no direction.
        weight[d..2 * d].fill(0.0);
    }
    element::<B>(weight)
}

pub fn check_redundancy<B: HostBackend>(under: &Under<B>, case: &Redundancy, place: Place) {
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
    let columns = transposed(h, d, &unit);
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

pub fn decode_inputs<B: HostBackend>([n, d, h]: [usize; 3]) -> Decode {
    let mut rng = rng((n + 3 * d + 7 * h) as u64);
    Decode {
        n,
        d,
        h,
        activations: activations::<B>([n, h], Activation::Relu),
        weight: element::<B>(uniform(&mut rng, h * d, 0.5)),
        bias: real::<B>(uniform(&mut rng, d, 0.5)),
        x: element::<B>(uniform(&mut rng, n * d, 1.0)),
        residual_weight: 0.4,
        before: None,
        wanted: [true, true],
    }
}

pub fn check_decoded<B: HostBackend>(under: &Under<B>, case: &Decode, place: Place) {
    let Decode { n, d, h, wanted, residual_weight, .. } = *case;
    let context = format!("{}: decode {n}×{d}×{h} {wanted:?} {place:?}", under.name);
    let found = case.run(under, place);
    let truth = case.run(&reference(), Place::DENSE);
    let everything = Decode { wanted: [true, true], ..case.clone() }.run(&reference(), Place::DENSE).reconstruction;
    let u = under.real();
    let scale = abs_nt(n, d, h, &case.activations, &transposed(h, d, &case.weight));
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

/// With a bias gradient to add to.
pub fn decode_backward_inputs<B: HostBackend>([n, d, h]: [usize; 3], activation: Activation) -> DecodeBackward {
    let mut rng = rng((n + 3 * d + 7 * h) as u64);
    DecodeBackward {
        n,
        d,
        h,
        residual: element::<B>(uniform(&mut rng, n * d, 0.5)),
        weight: element::<B>(uniform(&mut rng, h * d, 0.5)),
        activations: activations::<B>([n, h], activation),
        activation,
        l1: 0.375,
        before: Some(real::<B>(uniform(&mut rng, h, 1.0))),
    }
}

pub fn check_decode_backward<B: HostBackend>(under: &Under<B>, case: &DecodeBackward, place: Place) {
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
