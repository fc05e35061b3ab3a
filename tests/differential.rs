//! Every operation of every backend against the reference on the same rounded inputs, element by element within an error bound.
//!
//! Sizes lie around the edges of any likely tile and of cache blocks; matrices are dense, and strided with unaligned starts.

#[macro_use]
mod common;

use common::checks::*;
use common::ops::{self, ActivationSums, DecodeBackward, Encode, Redundancy};
use common::{HostBackend, Place, Under, assert_within, reference, rng, step, uniform, z_factor};
use rand::RngExt;
use sae_kernels::operations::{Layout, Recentre};
use sae_kernels::{Activation, Form, Statistics};

on_every_backend!(
    encode,
    encode_adds_up,
    encode_without_outputs,
    activation_sums,
    responsibilities,
    recentre,
    comoments,
    pack_statistics,
    unpack_statistics,
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

fn activation_sums<B: HostBackend>(under: &Under<B>) {
    for shape in flat_shapes(under) {
        let all = sums_inputs::<B>(shape);
        check_summed(under, &all, Place::STRIDED);
        let fresh = ActivationSums { shift: None, before: None, ..all };
        check_summed(under, &fresh, Place::DENSE);
        // What is not wanted makes no difference to what is.
        let whole = fresh.run(under, Place::DENSE);
        for wanted in [[true, false], [false, true], [false, false]] {
            let some = ActivationSums { wanted, ..fresh.clone() }.run(under, Place::STRIDED);
            let context = format!("{}: activation_sums {shape:?}, wanted {wanted:?}", under.name);
            assert!(!wanted[0] || some.row_loss == whole.row_loss, "{context}");
            assert!(!wanted[1] || (&some.sum, &some.sum_squares) == (&whole.sum, &whole.sum_squares), "{context}");
            assert!(!wanted[1] || some.row_loss_sum == whole.row_loss_sum, "{context}");
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
    for shape in flat_shapes(under) {
        check_comoments(under, shape, Place::DENSE, false, false);
        check_comoments(under, shape, Place::STRIDED, true, false);
        check_comoments(under, shape, Place::STRIDED, false, true);
    }
}

/// A block of `count` rows about `shift`, and another shift.
fn packing<B: HostBackend>(count: u64, h: usize) -> (ops::Block, Vec<f64>) {
    let mut rng = rng(count ^ h as u64);
    let mut numbers = |len: usize, scale: f64| uniform(&mut rng, len, scale);
    let block = ops::Block {
        count,
        row_loss_sum: -3.5,
        shift: real::<B>(numbers(h, 4.0)),
        sum: numbers(h, 0.1),
        sum_squares: numbers(h, 9.0),
        comoments: Some(real::<B>(ops::upper_triangle(h, &numbers(h * h, 9.0)))),
    };
    (block, real::<B>(numbers(h, 4.0)))
}

/// Sums about c', for δ = c − c', and what rounding may change of the products.
fn moved(count: f64, sum: &[f64], delta: &[f64]) -> (Vec<f64>, impl Fn(f64, usize, usize) -> (f64, f64)) {
    let sums = sum.iter().zip(delta).map(|(sum, delta)| sum + count * delta).collect();
    let product = move |before: f64, i: usize, j: usize| {
        let terms = [before, delta[i] * sum[j], sum[i] * delta[j], count * delta[i] * delta[j]];
        (terms.iter().sum(), 8.0 * f64::EPSILON * terms.iter().map(|term| term.abs()).sum::<f64>())
    };
    (sums, product)
}

fn pack_statistics<B: HostBackend>(under: &Under<B>) {
    for h in under.cases(EDGES.into_iter().chain([130, 300]), [1, 2, 31, 257, 300]) {
        for (at, full) in [true, false, true, false].into_iter().enumerate() {
            let (mut block, packed_shift) = packing::<B>(70, h);
            block.comoments = block.comoments.filter(|_| full);
            let packed_shift = (at < 2).then_some(packed_shift);
            let before = (at % 3 == 0).then(|| uniform(&mut rng(9), Statistics::len(h, full), 5.0));
            let place = Place::ALL[h % 2];
            let context = format!("{}: pack_statistics of {h}, full {full}, {place:?}", under.name);
            let found = block.pack(under, place, packed_shift.as_deref(), before.as_deref());
            let zeros = vec![0.0; h];
            let delta: Vec<f64> =
                block.shift.iter().zip(packed_shift.as_ref().unwrap_or(&zeros)).map(|(c, p)| c - p).collect();
            let (sums, product) = moved(70.0, &block.sum, &delta);
            let mut truth = vec![(70.0, 0.0), (-3.5, 0.0)];
            truth.extend(
                sums.iter()
                    .enumerate()
                    .map(|(i, sum)| (*sum, 4.0 * f64::EPSILON * 70.0 * delta[i].abs() + f64::EPSILON)),
            );
            for i in 0..h {
                let row = i..if full { h } else { i + 1 };
                let given = |j: usize| block.comoments.as_ref().map_or(block.sum_squares[i], |all| all[i * h + j]);
                truth.extend(row.map(|j| product(given(j), i, j)));
            }
            let earlier = |at: usize| before.as_ref().map_or(0.0, |before| before[at]);
            let values: Vec<f64> = truth.iter().enumerate().map(|(at, (value, _))| value + earlier(at)).collect();
            assert_within(&context, "packed", &found, &values, |at| {
                truth[at].1 + 2.0 * f64::EPSILON * (values[at].abs() + earlier(at).abs())
            });
        }
    }
}

fn unpack_statistics<B: HostBackend>(under: &Under<B>) {
    for h in under.cases(EDGES.into_iter().chain([130, 300]), [1, 2, 31, 257, 300]) {
        for (at, (full, wanted)) in [(true, true), (true, false), (false, false), (true, true)].into_iter().enumerate()
        {
            let (_, packed_shift) = packing::<B>(70, h);
            let packed_shift = (at < 2).then_some(packed_shift);
            let mut packed = uniform(&mut rng(10), Statistics::len(h, full), 5.0);
            packed[0] = if at == 3 { 0.0 } else { 70.0 };
            let place = Place::ALL[h % 2];
            let context = format!("{}: unpack_statistics of {h}, full {full}, wanted {wanted}, {place:?}", under.name);
            let found = ops::Block::unpack(under, place, &packed, packed_shift.as_deref(), h, wanted);
            assert_eq!((found.row_loss_sum, found.comoments.is_some()), (packed[1], wanted), "{context}");
            let (u, sum) = (under.real(), &packed[2..2 + h]);
            let before = packed_shift.unwrap_or(vec![0.0; h]);
            let mean: Vec<f64> =
                (0..h).map(|j| if packed[0] == 0.0 { 0.0 } else { before[j] + sum[j] / packed[0] }).collect();
            assert_within(&context, "shift", &found.shift, &mean, |j| u * mean[j].abs() + f64::EPSILON);
            // About the shift that was found.
            let delta: Vec<f64> = before.iter().zip(&found.shift).map(|(c, shift)| c - shift).collect();
            let (sums, product) = moved(packed[0], sum, &delta);
            assert_within(&context, "sum", &found.sum, &sums, |j| {
                4.0 * f64::EPSILON * (sum[j].abs() + packed[0] * delta[j].abs())
            });
            let mut products = packed[2 + h..].iter();
            for i in 0..h {
                for (j, packed) in (i..if full { h } else { i + 1 }).zip(&mut products) {
                    let (truth, error) = product(*packed, i, j);
                    if i == j {
                        assert_within(&context, "sum_squares", &found.sum_squares[i..=i], &[truth], |_| error);
                    }
                    if let Some(comoments) = &found.comoments {
                        let at = i * h + j;
                        assert_within(&context, "comoments", &comoments[at..=at], &[truth], |_| {
                            error + u * truth.abs()
                        });
                    }
                }
            }
        }
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

fn correlation_dual<B: HostBackend>(under: &Under<B>) {
    for [n, h] in flat_shapes(under) {
        if (2..=300).contains(&n) {
            Place::ALL.into_iter().for_each(|place| check_dual(under, [n, h], place));
        }
    }
}

fn backward_dz<B: HostBackend>(under: &Under<B>) {
    for [n, h] in flat_shapes(under) {
        for activation in ACTIVATIONS {
            for (at, case) in backward_inputs(under, [n, h], activation).enumerate() {
                check_backward(under, &case, Place::ALL[(at + h) % 2]);
            }
        }
    }
}

fn product<B: HostBackend>(under: &Under<B>) {
    for shape in shapes(under) {
        let case = ProductCase::new::<B>(shape);
        for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
            case.check(under, layout, Place::DENSE, false);
            case.check(under, layout, Place::STRIDED, false);
            case.check(under, layout, Place::STRIDED, true);
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
        let weight = redundancy_weight::<B>(&mut rng, [h, d]);
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

fn decode<B: HostBackend>(under: &Under<B>) {
    for shape in shapes(under) {
        let mut case = decode_inputs::<B>(shape);
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

fn decode_backward<B: HostBackend>(under: &Under<B>) {
    for shape in shapes(under) {
        for activation in ACTIVATIONS {
            let adding = decode_backward_inputs::<B>(shape, activation);
            check_decode_backward(under, &adding, Place::STRIDED);
            check_decode_backward(under, &DecodeBackward { before: None, ..adding }, Place::DENSE);
        }
    }
}
