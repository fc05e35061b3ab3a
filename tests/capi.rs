//! The C ABI, called as C would: what it computes is what [`DecoderFree`] computes, and whatever can be refused is, in
//! words, with all outputs as they were.

#[macro_use]
mod common;

use common::{assert_same_bits, relative, rng, uniform};
use sae_kernels::capi::*;
use sae_kernels::{
    Cpu, DecoderFree, DecoderFreeConfig, DecoderFreeStep, Isa, Losses, MatMut, MatRef, Objective, Reduction, Shape,
};
use std::ffi::CStr;
use std::ops::Range;
use std::ptr::{null, null_mut, without_provenance, without_provenance_mut};
use std::{env, fs, mem, thread};

const PAPER: saek_objective = saek_objective {
    lambda_lse: 1.0,
    lambda_var: 1.0,
    lambda_tc: 1.0,
    lambda_wr: 0.0,
    variance_eps: 1e-6,
    reduction: SAEK_REDUCTION_SUM,
};
const ALL_TERMS: saek_objective = saek_objective {
    lambda_lse: 0.75,
    lambda_var: 0.5,
    lambda_tc: 0.25,
    lambda_wr: 0.125,
    variance_eps: 1e-4,
    reduction: SAEK_REDUCTION_MEAN,
};
const LSE_ALONE: saek_objective = saek_objective { lambda_var: 0.0, lambda_tc: 0.0, ..PAPER };

/// What poisons outputs, and the gaps between the rows of x.
const POISON: f32 = -123.25;

/// A context that ends with the test.
struct Context(*mut saek_context);

impl Context {
    fn new(threads: i32) -> Self {
        let mut context = null_mut();
        // SAFETY: the pointer is to a variable.
        let code = unsafe { saek_context_create_cpu(threads, &mut context) };
        assert_eq!(code, SAEK_OK, "{}", last_error());
        Self(context)
    }
}
impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and used by nobody any more.
        unsafe { saek_context_destroy(self.0) };
    }
}
// SAFETY: a context may be used from several threads, which is what the tests are to show.
unsafe impl Sync for Context {}

fn last_error() -> String {
    // SAFETY: the text is valid until this thread's next failure.
    unsafe { CStr::from_ptr(saek_last_error()) }.to_str().unwrap().to_owned()
}

/// Room after a buffer, in `f64`: another that is moved onto it then lies on no third.
const ROOM: usize = 64;

/// A structure with room after it.
#[repr(C)]
struct Roomy<T> {
    value: T,
    room: [f64; ROOM],
}
fn roomy<T>(value: T) -> Box<Roomy<T>> {
    Box::new(Roomy { value, room: [0.0; ROOM] })
}

/// The buffers of a call. In `f64`, so that any of them is aligned for any type.
struct Buffers {
    shape: Shape,
    ldx: usize,
    objective: Box<Roomy<saek_objective>>,
    x: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    shift: Vec<f64>,
    statistics: Vec<f64>,
    activations: Vec<f64>,
    row_loss: Vec<f64>,
    grad_weight: Vec<f64>,
    grad_bias: Vec<f64>,
    grad_x: Vec<f64>,
    losses: Box<Roomy<saek_losses>>,
}

/// Zeros with room after them.
fn zeros(len: usize) -> Vec<f64> {
    let mut buffer = Vec::with_capacity(len + ROOM);
    buffer.resize(len, 0.0);
    buffer
}
/// As many `f64` as hold the given numbers.
fn stored(values: &[f32]) -> Vec<f64> {
    let mut buffer = zeros(values.len().div_ceil(2));
    bytemuck::cast_slice_mut(&mut buffer)[..values.len()].copy_from_slice(values);
    buffer
}
fn floats(buffer: &[f64], len: usize) -> &[f32] {
    &bytemuck::cast_slice(buffer)[..len]
}
fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

impl Buffers {
    fn new([n, d, h]: [usize; 3], gap: usize, objective: saek_objective) -> Self {
        let mut rng = rng((n + 3 * d + 7 * h) as u64);
        let mut random = |len: usize, scale: f64| -> Vec<f32> {
            uniform(&mut rng, len, scale).into_iter().map(|v| v as f32).collect()
        };
        let ldx = d + gap;
        let rows = random(n * d, 1.0);
        let mut x = vec![POISON; n * ldx];
        for row in 0..n {
            x[row * ldx..row * ldx + d].copy_from_slice(&rows[row * d..(row + 1) * d]);
        }
        let poison = |len: usize| stored(&vec![POISON; len]);
        Self {
            shape: Shape { rows: n, inputs: d, latents: h },
            ldx,
            objective: roomy(objective),
            x: stored(&x),
            weight: stored(&random(h * d, 3.0 / (d.max(1) as f64).sqrt())),
            bias: stored(&random(h, 0.5)),
            shift: stored(&random(h, 0.5)),
            statistics: zeros(2 + h + h * (h + 1) / 2),
            activations: poison(n * h),
            row_loss: poison(n),
            grad_weight: poison(h * d),
            grad_bias: poison(h),
            grad_x: poison(n * d),
            losses: roomy(saek_losses { lse: -1.0, var: -2.0, tc: -3.0, wr: -4.0, total: -5.0 }),
        }
    }

    fn x(&self) -> &[f32] {
        let Shape { rows, inputs, .. } = self.shape;
        floats(&self.x, if rows == 0 { 0 } else { (rows - 1) * self.ldx + inputs })
    }
    fn weight(&self) -> &[f32] {
        floats(&self.weight, self.shape.latents * self.shape.inputs)
    }
    fn bias(&self) -> &[f32] {
        floats(&self.bias, self.shape.latents)
    }
    fn activations(&self) -> &[f32] {
        floats(&self.activations, self.shape.rows * self.shape.latents)
    }
    fn row_loss(&self) -> &[f32] {
        floats(&self.row_loss, self.shape.rows)
    }
    fn grad_weight(&self) -> &[f32] {
        floats(&self.grad_weight, self.shape.latents * self.shape.inputs)
    }
    fn grad_bias(&self) -> &[f32] {
        floats(&self.grad_bias, self.shape.latents)
    }
    fn grad_x(&self) -> &[f32] {
        floats(&self.grad_x, self.shape.rows * self.shape.inputs)
    }

    /// All outputs, for comparison.
    fn outputs(&self) -> [(&'static str, Vec<f64>); 6] {
        let saek_losses { lse, var, tc, wr, total } = self.losses.value;
        [
            ("activations", wide(self.activations())),
            ("row_loss", wide(self.row_loss())),
            ("grad_weight", wide(self.grad_weight())),
            ("grad_bias", wide(self.grad_bias())),
            ("grad_x", wide(self.grad_x())),
            ("losses", vec![lse, var, tc, wr, total]),
        ]
    }

    fn call(&mut self, context: &Context) -> Call {
        let Shape { rows, inputs, latents } = self.shape;
        Call {
            context: context.0,
            objective: &self.objective.value,
            n: rows as i64,
            d: inputs as i64,
            h: latents as i64,
            ldx: self.ldx as i64,
            x: self.x.as_ptr().cast(),
            weight: self.weight.as_ptr().cast(),
            bias: self.bias.as_ptr().cast(),
            shift: self.shift.as_ptr().cast(),
            statistics: self.statistics.as_mut_ptr(),
            add_weight_term: 1,
            activations: self.activations.as_mut_ptr().cast(),
            row_loss: self.row_loss.as_mut_ptr().cast(),
            grad_weight: self.grad_weight.as_mut_ptr().cast(),
            grad_bias: self.grad_bias.as_mut_ptr().cast(),
            grad_x: self.grad_x.as_mut_ptr().cast(),
            losses: &mut self.losses.value,
        }
    }

    /// The same step by the Rust API, into other buffers.
    fn directly(&self) -> Self {
        let Shape { rows, inputs, latents } = self.shape;
        let mut to = Self::new([rows, inputs, latents], 0, self.objective.value);
        let saek_objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, reduction } =
            self.objective.value;
        let reduction = if reduction == SAEK_REDUCTION_SUM { Reduction::Sum } else { Reduction::Mean };
        let objective =
            Objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, reduction, normalize_weight: true };
        let config = DecoderFreeConfig { objective, ..DecoderFreeConfig::new(self.shape) };
        let mut model = DecoderFree::new(Cpu::<f32>::with(Isa::detect(), 1).unwrap(), config).unwrap();
        fn out(buffer: &mut [f64], rows: usize, cols: usize) -> MatMut<'_, f32> {
            MatMut::new(&mut bytemuck::cast_slice_mut(buffer)[..rows * cols], rows, cols).unwrap()
        }
        model
            .step(DecoderFreeStep {
                x: MatRef::with_stride(self.x(), rows, inputs, self.ldx).unwrap(),
                weight: MatRef::new(self.weight(), latents, inputs).unwrap(),
                bias: self.bias(),
                grad_weight: out(&mut to.grad_weight, latents, inputs),
                grad_bias: &mut bytemuck::cast_slice_mut(&mut to.grad_bias)[..latents],
                grad_x: Some(out(&mut to.grad_x, rows, inputs)),
                activations: Some(out(&mut to.activations, rows, latents)),
                row_loss: Some(&mut bytemuck::cast_slice_mut(&mut to.row_loss)[..rows]),
            })
            .unwrap();
        let Losses { lse, var, tc, wr, total } = model.losses().unwrap();
        to.losses.value = saek_losses { lse, var, tc, wr, total };
        to
    }
}

/// A call's arguments, any of which a test may spoil.
#[derive(Clone, Copy)]
struct Call {
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    ldx: i64,
    x: *const f32,
    weight: *const f32,
    bias: *const f32,
    shift: *const f32,
    statistics: *mut f64,
    add_weight_term: i32,
    activations: *mut f32,
    row_loss: *mut f32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    grad_x: *mut f32,
    losses: *mut saek_losses,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Function {
    Step,
    Statistics,
    Backward,
}
use Function::*;

impl Call {
    fn run(&self, function: Function) -> i32 {
        let Call { context, objective, n, d, h, ldx, x, weight, bias, shift, statistics, .. } = *self;
        let Call { add_weight_term, activations, row_loss, grad_weight, grad_bias, grad_x, losses, .. } = *self;
        // SAFETY: what is not to be refused is as it comes from `Buffers::call`.
        unsafe {
            match function {
                Step => saek_decoder_free_step_f32(
                    context,
                    objective,
                    n,
                    d,
                    h,
                    x,
                    ldx,
                    weight,
                    bias,
                    activations,
                    row_loss,
                    grad_weight,
                    grad_bias,
                    grad_x,
                    losses,
                ),
                Statistics => {
                    saek_decoder_free_statistics_f32(context, n, d, h, x, ldx, weight, bias, shift, statistics)
                }
                Backward => saek_decoder_free_backward_f32(
                    context,
                    objective,
                    n,
                    d,
                    h,
                    x,
                    ldx,
                    weight,
                    bias,
                    shift,
                    statistics,
                    add_weight_term,
                    grad_weight,
                    grad_bias,
                    grad_x,
                    losses,
                ),
            }
        }
    }
    fn succeed(&self, function: Function) {
        assert_eq!(self.run(function), SAEK_OK, "{function:?}: {}", last_error());
    }
    /// The call fails with the code, and a text that holds `name`.
    fn fail(&self, function: Function, code: i32, name: &str) {
        // Another failure, for the text not to be that of the call before.
        // SAFETY: NULL is refused.
        unsafe { saek_context_create_cpu(-77, null_mut()) };
        assert_eq!(self.run(function), code, "{function:?} with a wrong {name}: {}", last_error());
        assert!(last_error().contains(name), "{function:?} with a wrong {name}: {}", last_error());
    }
}

const SHAPES: [[usize; 3]; 5] = [[2, 1, 1], [7, 5, 3], [9, 20, 40], [70, 17, 33], [300, 64, 48]];

fn assert_same_outputs(context: &str, found: &Buffers, expected: &Buffers) {
    for ((name, found), (_, expected)) in found.outputs().iter().zip(expected.outputs()) {
        assert_same_bits(context, name, found, &expected);
    }
}

#[test]
fn a_step_has_the_bits_of_the_rust_api() {
    for threads in if cfg!(feature = "rayon") { vec![0, 1, 3] } else { vec![0, 1] } {
        for shape in SHAPES {
            for (objective, gap) in [(PAPER, 0), (ALL_TERMS, 3), (LSE_ALONE, 1)] {
                let mut buffers = Buffers::new(shape, gap, objective);
                buffers.call(&Context::new(threads)).succeed(Step);
                assert_same_outputs(&format!("{shape:?} on {threads}"), &buffers, &buffers.directly());
            }
        }
    }
}

#[test]
fn a_context_serves_one_shape_after_the_other() {
    let context = Context::new(1);
    for shape in [[70, 17, 33], [9, 17, 33], [100, 17, 33], [9, 20, 40], [70, 17, 33]] {
        for objective in [PAPER, ALL_TERMS, PAPER] {
            let mut buffers = Buffers::new(shape, 0, objective);
            buffers.call(&context).succeed(Step);
            assert_same_outputs(&format!("{shape:?}"), &buffers, &buffers.directly());
        }
    }
}

#[test]
fn what_is_not_wanted_is_left_out() {
    let context = Context::new(1);
    let expected = Buffers::new([70, 17, 33], 0, PAPER).directly();
    for without in 0..8 {
        let mut buffers = Buffers::new([70, 17, 33], 0, PAPER);
        let mut call = buffers.call(&context);
        let wanted = [without & 1 == 0, without & 2 == 0, without & 4 == 0];
        for (optional, wanted) in [&mut call.activations, &mut call.row_loss, &mut call.grad_x].into_iter().zip(wanted)
        {
            *optional = if wanted { *optional } else { null_mut() };
        }
        call.succeed(Step);
        for ((name, found), (_, expected)) in buffers.outputs().iter().zip(expected.outputs()) {
            let left_out = ["activations", "row_loss", "grad_x"].iter().zip(wanted).any(|(n, w)| n == name && !w);
            let poison = vec![f64::from(POISON); found.len()];
            assert_same_bits("optional outputs", name, found, if left_out { &poison } else { &expected });
        }
    }
}

#[test]
fn arrays_without_elements_may_be_anything() {
    let context = Context::new(1);
    for nothing in [0, 1] {
        let mut buffers = Buffers::new([0, 5, 3], 0, ALL_TERMS);
        buffers.objective.value = LSE_ALONE;
        let mut call = buffers.call(&context);
        call.x = without_provenance(nothing);
        for output in [&mut call.activations, &mut call.row_loss, &mut call.grad_x] {
            *output = without_provenance_mut(nothing);
        }
        call.succeed(Step);
        call.succeed(Statistics);
        call.succeed(Backward);
        assert_eq!(buffers.grad_bias(), [0.0; 3]);
        assert_eq!(buffers.statistics, [0.0; 11]);

        let mut buffers = Buffers::new([7, 0, 3], 2, PAPER);
        let mut call = buffers.call(&context);
        (call.x, call.weight) = (without_provenance(nothing), without_provenance(nothing));
        (call.grad_weight, call.grad_x) = (without_provenance_mut(nothing), without_provenance_mut(nothing));
        call.succeed(Step);
        assert_same_outputs("no inputs", &buffers, &buffers.directly());
    }
}

/// A step in two phases, over shards of rows that each have their own context and statistics; gradients are added to
/// ones.
fn sharded(whole: &Buffers, shards: &[Range<usize>], shift: bool) -> Buffers {
    let Shape { rows, inputs: d, latents: h } = whole.shape;
    let mut to = Buffers::new([rows, d, h], 0, whole.objective.value);
    let contexts: Vec<Context> = shards.iter().map(|_| Context::new(1)).collect();
    to.grad_weight = stored(&vec![1.0; h * d]);
    to.grad_bias = stored(&vec![1.0; h]);
    let ldx = whole.ldx;
    let part = |of: &mut Buffers, context: &Context, shard: &Range<usize>| {
        let mut call = of.call(context);
        call.n = shard.len() as i64;
        call.ldx = ldx as i64;
        // SAFETY: a shard is within the rows; the last row has no gap after it, and an empty shard may begin after it.
        call.x = whole.x.as_ptr().cast::<f32>().wrapping_add(shard.start * ldx);
        call.grad_x = call.grad_x.wrapping_add(shard.start * d);
        (call.weight, call.bias) = (whole.weight.as_ptr().cast(), whole.bias.as_ptr().cast());
        call.shift = if shift { whole.shift.as_ptr().cast() } else { null() };
        call
    };
    let mut reduced = zeros(to.statistics.len());
    for (shard, context) in shards.iter().zip(&contexts) {
        to.statistics.fill(0.0);
        part(&mut to, context, shard).succeed(Statistics);
        reduced.iter_mut().zip(&to.statistics).for_each(|(sum, term)| *sum += term);
    }
    // One buffer for all shards is the same.
    to.statistics.fill(0.0);
    for (shard, context) in shards.iter().zip(&contexts) {
        part(&mut to, context, shard).succeed(Statistics);
    }
    assert!(relative(&to.statistics, &reduced) < 1e-14, "statistics are added");
    to.statistics = reduced;
    for (at, (shard, context)) in shards.iter().zip(&contexts).enumerate() {
        let call = Call { add_weight_term: i32::from(at == 1), ..part(&mut to, context, shard) };
        call.succeed(Backward);
    }
    to
}

#[test]
fn two_phases_are_one_step() {
    for shape in [[9, 20, 40], [70, 17, 33], [300, 64, 48]] {
        let n = shape[0];
        for (objective, gap) in [(PAPER, 0), (ALL_TERMS, 3), (LSE_ALONE, 1)] {
            for shift in [false, true] {
                let mut whole = Buffers::new(shape, gap, objective);
                whole.call(&Context::new(1)).succeed(Step);
                let shards = [0..1, 1..n / 3, n / 3..n / 3, n / 3..n];
                let found = sharded(&whole, &shards, shift);
                let plus =
                    |by: f64, values: &[f32]| -> Vec<f64> { values.iter().map(|v| f64::from(*v) + by).collect() };
                for (name, found, truth) in [
                    ("grad_weight", plus(-1.0, found.grad_weight()), plus(0.0, whole.grad_weight())),
                    ("grad_bias", plus(-1.0, found.grad_bias()), plus(0.0, whole.grad_bias())),
                    ("grad_x", plus(0.0, found.grad_x()), plus(0.0, whole.grad_x())),
                ] {
                    let error = relative(&found, &truth);
                    assert!(error < 2e-5, "{name} of {shape:?} {objective:?} in shards is off by {error:e}");
                }
                let terms = |l: saek_losses| [l.lse, l.var, l.tc, l.wr, l.total];
                let error = relative(&terms(found.losses.value), &terms(whole.losses.value));
                assert!(error < 1e-5, "{:?} in shards, {:?} at once", found.losses.value, whole.losses.value);
            }
        }
    }
}

/// The layout that the header promises, against plain sums over the activations.
#[test]
fn statistics_are_sums_over_rows_about_the_shift() {
    let [n, d, h] = [70, 17, 33];
    let context = Context::new(1);
    let mut buffers = Buffers::new([n, d, h], 2, PAPER);
    buffers.statistics.fill(0.5);
    let call = buffers.call(&context);
    call.succeed(Step);
    call.succeed(Statistics);
    let (a, shift) = (wide(buffers.activations()), wide(floats(&buffers.shift, h)));
    let centred = |row: usize, j: usize| a[row * h + j] - shift[j];
    let mut expected = vec![n as f64, buffers.row_loss().iter().map(|l| f64::from(*l)).sum()];
    expected.extend((0..h).map(|j| (0..n).map(|row| centred(row, j)).sum::<f64>()));
    for i in 0..h {
        expected.extend((i..h).map(|j| (0..n).map(|row| centred(row, i) * centred(row, j)).sum::<f64>()));
    }
    assert_eq!(saek_statistics_len(h as i64), expected.len() as i64);
    common::assert_within("statistics", "sums", &buffers.statistics, &expected, |at| {
        0.5 + 1e-4 * (1.0 + expected[at].abs())
    });
    let added: Vec<f64> = buffers.statistics.iter().map(|sum| sum - 0.5).collect();
    assert!(relative(&added, &expected) < 1e-6, "off by {:e}", relative(&added, &expected));
}

#[test]
fn statistics_len_refuses_what_no_buffer_has() {
    assert_eq!([1, 2, 64].map(|h| saek_statistics_len(h)), [4, 7, 2 + 64 + 64 * 65 / 2]);
    for h in [-1, 0, i64::MIN, i64::MAX, 1 << 31] {
        assert_eq!(saek_statistics_len(h), -1, "{h}");
        assert!(last_error().contains('h'), "{h}: {}", last_error());
    }
}

const ALL: [Function; 3] = [Step, Statistics, Backward];
const GRADIENTS: [Function; 2] = [Step, Backward];

/// What a test does to a call, which functions must refuse it, with which code, and which name in the text.
type Refusal<'a> = (&'a [Function], i32, &'static str, fn(&mut Call));

#[rustfmt::skip]
const REFUSALS: &[Refusal<'static>] = &[
    (&ALL, SAEK_ERROR_NULL, "context", |call| call.context = null_mut()),
    (&GRADIENTS, SAEK_ERROR_NULL, "objective", |call| call.objective = null()),
    (&ALL, SAEK_ERROR_NULL, "x", |call| call.x = null()),
    (&ALL, SAEK_ERROR_NULL, "weight", |call| call.weight = null()),
    (&ALL, SAEK_ERROR_NULL, "bias", |call| call.bias = null()),
    (&[Statistics, Backward], SAEK_ERROR_NULL, "statistics", |call| call.statistics = null_mut()),
    (&GRADIENTS, SAEK_ERROR_NULL, "grad_weight", |call| call.grad_weight = null_mut()),
    (&GRADIENTS, SAEK_ERROR_NULL, "grad_bias", |call| call.grad_bias = null_mut()),
    (&GRADIENTS, SAEK_ERROR_NULL, "losses", |call| call.losses = null_mut()),
    // Extents.
    (&ALL, SAEK_ERROR_SHAPE, "n = -1", |call| call.n = -1),
    (&ALL, SAEK_ERROR_SHAPE, "d = -1", |call| call.d = -1),
    (&ALL, SAEK_ERROR_SHAPE, "h = -1", |call| call.h = -1),
    (&ALL, SAEK_ERROR_SHAPE, "ldx = -1", |call| call.ldx = -1),
    (&ALL, SAEK_ERROR_SHAPE, "n = -9223372036854775808", |call| call.n = i64::MIN),
    (&ALL, SAEK_ERROR_SHAPE, "h: ", |call| call.h = 0),
    (&ALL, SAEK_ERROR_SHAPE, "ldx: ", |call| call.ldx = call.d - 1),
    (&ALL, SAEK_ERROR_SHAPE, "n*ldx", |call| call.ldx = i64::MAX),
    (&ALL, SAEK_ERROR_SHAPE, "n*d", |call| (call.n, call.d, call.ldx) = (1 << 33, 1 << 31, 1 << 31)),
    (&ALL, SAEK_ERROR_SHAPE, "h*d", |call| (call.h, call.d, call.ldx) = (1 << 33, 1 << 31, 1 << 31)),
    (&ALL, SAEK_ERROR_SHAPE, "n*h", |call| (call.n, call.h, call.d, call.ldx) = (1 << 33, 1 << 31, 1, 1)),
    (&ALL, SAEK_ERROR_SHAPE, "x: ", |call| call.ldx = 1 << 60),
    (&[Step], SAEK_ERROR_SHAPE, "lambda_var", |call| call.n = 1),
    // Alignment.
    (&ALL, SAEK_ERROR_POINTER, "context", |call| call.context = call.context.wrapping_byte_add(1)),
    (&GRADIENTS, SAEK_ERROR_POINTER, "objective", |call| call.objective = call.objective.wrapping_byte_add(4)),
    (&ALL, SAEK_ERROR_POINTER, "x", |call| call.x = call.x.wrapping_byte_add(2)),
    (&ALL, SAEK_ERROR_POINTER, "weight", |call| call.weight = call.weight.wrapping_byte_add(1)),
    (&ALL, SAEK_ERROR_POINTER, "bias", |call| call.bias = call.bias.wrapping_byte_add(3)),
    (&[Statistics, Backward], SAEK_ERROR_POINTER, "shift", |call| call.shift = call.shift.wrapping_byte_add(2)),
    (&[Statistics, Backward], SAEK_ERROR_POINTER, "statistics", |call| call.statistics = call.statistics.wrapping_byte_add(4)),
    (&[Step], SAEK_ERROR_POINTER, "activations", |call| call.activations = call.activations.wrapping_byte_add(2)),
    (&[Step], SAEK_ERROR_POINTER, "row_loss", |call| call.row_loss = call.row_loss.wrapping_byte_add(2)),
    (&GRADIENTS, SAEK_ERROR_POINTER, "grad_weight", |call| call.grad_weight = call.grad_weight.wrapping_byte_add(2)),
    (&GRADIENTS, SAEK_ERROR_POINTER, "grad_bias", |call| call.grad_bias = call.grad_bias.wrapping_byte_add(2)),
    (&GRADIENTS, SAEK_ERROR_POINTER, "grad_x", |call| call.grad_x = call.grad_x.wrapping_byte_add(2)),
    (&GRADIENTS, SAEK_ERROR_POINTER, "losses", |call| call.losses = call.losses.wrapping_byte_add(4)),
    // The end of the address space.
    (&ALL, SAEK_ERROR_SHAPE, "weight: ", |call| call.weight = without_provenance(usize::MAX - 7)),
];

/// Runs a spoilt call; all outputs must keep their bits.
fn refused(context: &Context, function: Function, code: i32, name: &str, spoil: impl Fn(&mut Buffers, &mut Call)) {
    let mut buffers = Buffers::new([7, 5, 3], 3, PAPER);
    buffers.statistics[0] = 7.0;
    let mut call = buffers.call(context);
    spoil(&mut buffers, &mut call);
    let (before, statistics) = (buffers.outputs(), buffers.statistics.clone());
    call.fail(function, code, name);
    for ((name, after), (_, before)) in buffers.outputs().iter().zip(before) {
        assert_same_bits(&format!("{function:?} refused"), name, after, &before);
    }
    assert_same_bits(&format!("{function:?} refused"), "statistics", &buffers.statistics, &statistics);
}

#[test]
fn wrong_arguments_are_refused() {
    let context = Context::new(1);
    for (functions, code, name, spoil) in REFUSALS {
        for function in *functions {
            refused(&context, *function, *code, name, |_, call| spoil(call));
        }
    }
}

#[test]
fn wrong_objectives_are_refused() {
    type Field = fn(&mut saek_objective) -> &mut f64;
    let fields: [(&str, Field); 5] = [
        ("lambda_lse", |o| &mut o.lambda_lse),
        ("lambda_var", |o| &mut o.lambda_var),
        ("lambda_tc", |o| &mut o.lambda_tc),
        ("lambda_wr", |o| &mut o.lambda_wr),
        ("variance_eps", |o| &mut o.variance_eps),
    ];
    let context = Context::new(1);
    for function in GRADIENTS {
        for (name, field) in fields {
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let spoil = |buffers: &mut Buffers, _: &mut Call| *field(&mut buffers.objective.value) = value;
                refused(&context, function, SAEK_ERROR_ARGUMENT, name, spoil);
            }
        }
        for value in [0.0, -1.0] {
            let spoil = |buffers: &mut Buffers, _: &mut Call| buffers.objective.value.variance_eps = value;
            refused(&context, function, SAEK_ERROR_ARGUMENT, "variance_eps", spoil);
        }
        for value in [-1, 2, i32::MAX] {
            let spoil = |buffers: &mut Buffers, _: &mut Call| buffers.objective.value.reduction = value;
            refused(&context, function, SAEK_ERROR_ARGUMENT, "reduction", spoil);
        }
    }
}

#[test]
fn statistics_of_no_batch_are_refused() {
    let context = Context::new(1);
    for count in [0.0, 6.0, 7.5, -7.0, f64::NAN, f64::INFINITY, 1e300] {
        let spoil = |buffers: &mut Buffers, _: &mut Call| buffers.statistics[0] = count;
        refused(&context, Backward, SAEK_ERROR_ARGUMENT, "statistics[0]", spoil);
    }
    let one_row = |buffers: &mut Buffers, call: &mut Call| (buffers.statistics[0], call.n) = (1.0, 1);
    refused(&context, Backward, SAEK_ERROR_SHAPE, "lambda_var", one_row);
}

/// Where a buffer of a call lies, and how a test moves it.
struct Place {
    name: &'static str,
    written: bool,
    functions: &'static [Function],
    bytes: fn(&Call) -> Range<usize>,
    put: fn(&mut Call, usize),
}

fn places() -> Vec<Place> {
    fn bytes<T>(pointer: *const T, len: i64) -> Range<usize> {
        pointer.addr()..pointer.addr() + len as usize * mem::size_of::<T>()
    }
    const PHASES: &[Function] = &[Statistics, Backward];
    macro_rules! place {
        ($name:ident, $functions:expr, $written:expr, |$call:ident| $len:expr) => {
            Place {
                name: stringify!($name),
                written: $written,
                functions: $functions,
                bytes: |$call| bytes($call.$name, $len),
                // The tests expose nothing: a refused pointer is not followed.
                put: |call, address| call.$name = call.$name.with_addr(address),
            }
        };
    }
    vec![
        place!(objective, &GRADIENTS, false, |_call| 1),
        place!(x, &ALL, false, |call| (call.n - 1) * call.ldx + call.d),
        place!(weight, &ALL, false, |call| call.h * call.d),
        place!(bias, &ALL, false, |call| call.h),
        place!(shift, PHASES, false, |call| call.h),
        place!(statistics, &[Backward], false, |call| 2 + call.h + call.h * (call.h + 1) / 2),
        place!(statistics, &[Statistics], true, |call| 2 + call.h + call.h * (call.h + 1) / 2),
        place!(activations, &[Step], true, |call| call.n * call.h),
        place!(row_loss, &[Step], true, |call| call.n),
        place!(grad_weight, &GRADIENTS, true, |call| call.h * call.d),
        place!(grad_bias, &GRADIENTS, true, |call| call.h),
        place!(grad_x, &GRADIENTS, true, |call| call.n * call.d),
        place!(losses, &GRADIENTS, true, |_call| 1),
    ]
}

/// Every output on every other buffer of each call: at its start, on its last eight bytes, and with the output's last
/// on its first.
#[test]
fn outputs_that_overlap_are_refused() {
    let context = Context::new(1);
    let mut pairs = 0;
    for function in ALL {
        let places: Vec<Place> = places().into_iter().filter(|place| place.functions.contains(&function)).collect();
        for (at, output) in places.iter().enumerate().filter(|(_, place)| place.written) {
            for (_, other) in places.iter().enumerate().filter(|(other, _)| *other != at) {
                for how in 0..3 {
                    pairs += 1;
                    let spoil = |_: &mut Buffers, call: &mut Call| {
                        let (moved, still) = ((output.bytes)(call), (other.bytes)(call));
                        let address = match how {
                            0 => still.start,
                            // The last multiple of 8 in the other, and the one before the output's end in this.
                            1 => (still.end - 1) / 8 * 8,
                            _ => still.start - (moved.len() - 1) / 8 * 8,
                        };
                        (output.put)(call, address);
                    };
                    refused(&context, function, SAEK_ERROR_POINTER, output.name, spoil);
                    let text = last_error();
                    assert!(text.contains("overlaps") && text.contains(other.name), "{function:?}, {how}: {text}");
                }
            }
        }
    }
    assert_eq!(pairs, 3 * (6 * 9 + 4 + 4 * 9));
    let gap = |_: &mut Buffers, call: &mut Call| call.grad_bias = call.x.wrapping_add(5).cast_mut();
    refused(&context, Step, SAEK_ERROR_POINTER, "grad_bias overlaps x", gap);
}

/// All buffers of a call one after the other, without a byte between them.
#[test]
fn neighbours_do_not_overlap() {
    let shape @ [n, d, h] = [8, 6, 4];
    let context = Context::new(1);
    let mut buffers = Buffers::new(shape, 2, PAPER);
    let mut arena = vec![0.0f64; 1000];
    let base: *mut f64 = arena.as_mut_ptr();
    let mut used = 0;
    let mut call = buffers.call(&context);
    let mut take = |floats: usize| {
        let place = base.wrapping_add(used).cast::<f32>();
        used += floats / 2;
        assert!(floats.is_multiple_of(2) && used < 1000);
        place
    };
    // SAFETY: each place is within the arena, and as long as what is copied there.
    unsafe {
        let x = take((n - 1) * 8 + d);
        call.x.copy_to(x, (n - 1) * 8 + d);
        let grad_weight = take(h * d);
        let weight = take(h * d);
        call.weight.copy_to(weight, h * d);
        let row_loss = take(n);
        let bias = take(h);
        call.bias.copy_to(bias, h);
        let (grad_bias, losses, grad_x, activations) = (take(h), take(10), take(n * d), take(n * h));
        call = Call { x, weight, bias, grad_weight, grad_bias, grad_x, row_loss, activations, ..call };
        call.losses = losses.cast();
        call.succeed(Step);
        let expected = buffers.directly();
        for (name, found, expected) in [
            ("grad_weight", grad_weight, expected.grad_weight()),
            ("grad_bias", grad_bias, expected.grad_bias()),
            ("grad_x", grad_x, expected.grad_x()),
            ("row_loss", row_loss, expected.row_loss()),
            ("activations", activations, expected.activations()),
            ("weight", weight, buffers.weight()),
            ("bias", bias, buffers.bias()),
            ("x", x, buffers.x()),
        ] {
            let found = std::slice::from_raw_parts(found, expected.len());
            assert_same_bits("neighbours", name, &wide(found), &wide(expected));
        }
        assert_eq!(*call.losses, expected.losses.value);
    }
}

/// Extents that no memory holds, at addresses that nothing lies at.
#[test]
fn too_little_memory_is_an_error() {
    let context = Context::new(1);
    let mut buffers = Buffers::new([7, 5, 3], 0, PAPER);
    let mut call = buffers.call(&context);
    let place = |at: usize| without_provenance_mut(at << 60);
    (call.x, call.weight, call.bias, call.shift) = (place(1), place(2), place(3), null());
    (call.grad_weight, call.grad_bias, call.grad_x) = (place(4), place(5), null_mut());
    (call.activations, call.row_loss) = (null_mut(), null_mut());
    call.statistics = without_provenance_mut(6 << 60);
    let step = Call { n: 1 << 28, h: 1 << 20, d: 1, ldx: 1, ..call };
    step.fail(Step, SAEK_ERROR_MEMORY, "bytes");
    for function in [Statistics, Backward] {
        Call { n: 1, h: 1 << 23, d: 1, ldx: 1, ..call }.fail(function, SAEK_ERROR_MEMORY, "bytes");
    }
    // The context is as good as before.
    buffers.call(&context).succeed(Step);
}

#[test]
fn contexts_are_made_or_refused() {
    for threads in [-1, i32::MIN, SAEK_MAX_THREADS + 1, i32::MAX] {
        let mut out = without_provenance_mut(8);
        // SAFETY: the pointer is to a variable.
        let code = unsafe { saek_context_create_cpu(threads, &mut out) };
        assert_eq!((code, out.addr()), (SAEK_ERROR_ARGUMENT, 8));
        assert!(last_error().contains(&format!("threads = {threads}")), "{}", last_error());
    }
    for (out, code) in [(null_mut(), SAEK_ERROR_NULL), (without_provenance_mut(4), SAEK_ERROR_POINTER)] {
        // SAFETY: the pointer is refused.
        assert_eq!(unsafe { saek_context_create_cpu(1, out) }, code);
        assert!(last_error().contains("out"), "{}", last_error());
    }
    // SAFETY: NULL is nothing to free.
    unsafe { saek_context_destroy(null_mut()) };
    // SAFETY: a fixed text.
    assert_eq!(unsafe { CStr::from_ptr(saek_version()) }.to_str(), Ok(env!("CARGO_PKG_VERSION")));
}

#[test]
fn each_thread_has_its_own_last_error() {
    let fail = |h: i64| assert_eq!(saek_statistics_len(h), -1);
    thread::spawn(move || {
        assert_eq!(last_error(), "", "no call of this thread has failed");
        fail(-5);
        let other = thread::spawn(move || {
            assert_eq!(last_error(), "");
            fail(-6);
            assert!(last_error().contains("-6"), "{}", last_error());
        });
        other.join().unwrap();
        assert!(last_error().contains("-5"), "{}", last_error());
        assert!(saek_statistics_len(1) > 0);
        assert!(last_error().contains("-5"), "a success keeps the text: {}", last_error());
    })
    .join()
    .unwrap();
}

#[test]
fn threads_may_share_a_context() {
    let context = Context::new(if cfg!(feature = "rayon") { 2 } else { 1 });
    thread::scope(|scope| {
        for shape in [[70, 17, 33], [40, 20, 40], [300, 64, 48]] {
            let context = &context;
            scope.spawn(move || {
                let expected = Buffers::new(shape, 0, PAPER).directly();
                let mut buffers = Buffers::new(shape, 0, PAPER);
                // Many, for the threads to meet on a single processor too.
                for _ in 0..300 {
                    buffers.call(context).succeed(Step);
                    assert_same_outputs(&format!("{shape:?} beside others"), &buffers, &expected);
                }
            });
        }
    });
}

/// The function is there all the same.
#[test]
#[cfg(not(feature = "cuda"))]
fn without_cuda_a_context_on_it_is_refused() {
    let mut context = without_provenance_mut(8);
    // SAFETY: the pointer is to a variable.
    assert_eq!(unsafe { saek_context_create_cuda(0, null_mut(), &mut context) }, SAEK_ERROR_DEVICE);
    assert!(last_error().contains("--features capi,cuda"), "{}", last_error());
    assert_eq!(context.addr(), 8, "a failed call writes nothing");
}

#[test]
fn the_header_is_current() {
    let root = env!("CARGO_MANIFEST_DIR");
    let path = format!("{root}/include/sae_kernels.h");
    let config = cbindgen::Config::from_file(format!("{root}/cbindgen.toml")).unwrap();
    let mut made = Vec::new();
    let builder = cbindgen::Builder::new().with_config(config).with_src(format!("{root}/src/capi/mod.rs"));
    builder.generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    if env::var_os("SAE_KERNELS_UPDATE_HEADER").is_some() {
        fs::write(&path, &made).unwrap();
    }
    assert!(
        fs::read_to_string(&path).is_ok_and(|found| found == made),
        "include/sae_kernels.h is not what src/capi/mod.rs says; update it with\n\
         SAE_KERNELS_UPDATE_HEADER=1 cargo test --release --features capi --test capi header"
    );
}
