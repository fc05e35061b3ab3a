//! The C ABI's calls for each storage type: steps with 16-bit storage, and losses of given activations.

#[macro_use]
mod common;

use common::{assert_same_bits, relative, rng, uniform};
use sae_kernels::capi::*;
use sae_kernels::{
    ActivationLosses, ActivationStep, Backend, Cpu, CpuElement, DecoderFree, DecoderFreeConfig, DecoderFreeStep,
    Element, Host, Isa, Losses, MatMut, MatRef, Objective, Reduction, Reference, Shape, bf16, f16,
};
use std::ffi::CStr;
use std::ptr::{null, null_mut};

const ALL_TERMS: saek_objective = saek_objective {
    lambda_lse: 0.75,
    lambda_var: 0.5,
    lambda_tc: 0.25,
    lambda_wr: 0.125,
    variance_eps: 1e-4,
    reduction: SAEK_REDUCTION_MEAN,
};

fn in_rust(objective: saek_objective) -> Objective {
    let saek_objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, reduction } = objective;
    let reduction = if reduction == SAEK_REDUCTION_SUM { Reduction::Sum } else { Reduction::Mean };
    Objective { lambda_lse, lambda_var, lambda_tc, lambda_wr, variance_eps, reduction, normalize_weight: true }
}

fn terms(losses: saek_losses) -> Vec<f64> {
    let saek_losses { lse, var, tc, wr, total } = losses;
    vec![lse, var, tc, wr, total]
}

fn last_error() -> String {
    // SAFETY: the text is valid until this thread's next failure.
    unsafe { CStr::from_ptr(saek_last_error()) }.to_str().unwrap().to_owned()
}

/// A context that ends with the test.
struct Context(*mut saek_context);
impl Context {
    fn new() -> Self {
        let mut context = null_mut();
        // SAFETY: the pointer is to a variable.
        assert_eq!(unsafe { saek_context_create_cpu(1, &mut context) }, SAEK_OK);
        Self(context)
    }
}
impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and used by nobody any more.
        unsafe { saek_context_destroy(self.0) };
    }
}

fn numbers<T: Element>(seed: usize, len: usize, scale: f64) -> Vec<T> {
    uniform(&mut rng(seed as u64), len, scale).into_iter().map(T::from_f64).collect()
}
fn poison<T: Element>(len: usize) -> Vec<T> {
    vec![T::from_f64(-123.25); len]
}
fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|v| v.to_f64()).collect()
}

/// A storage type's call for losses of given activations.
trait Storage: Backend<Memory = Host> + Sized {
    fn make() -> Self;
    /// # Safety
    /// As the C function.
    unsafe fn call(args: &Args<Self>) -> i32;
}

macro_rules! storage {
    ($($backend:ty, $make:expr, $function:ident;)*) => {
        $(impl Storage for $backend {
            fn make() -> Self {
                $make
            }
            unsafe fn call(args: &Args<Self>) -> i32 {
                let Args { context, objective, n, d, h, activations, lda, weight, .. } = *args;
                let Args { grad_activations, grad_weight, responsibilities, row_loss, losses, .. } = *args;
                // SAFETY: the caller's promise; 16-bit numbers are as u16.
                unsafe {
                    $function(
                        context,
                        objective,
                        n,
                        d,
                        h,
                        activations.cast(),
                        lda,
                        weight.cast(),
                        grad_activations.cast(),
                        grad_weight,
                        responsibilities,
                        row_loss,
                        losses,
                    )
                }
            }
        })*
    };
}
storage! {
    Cpu<f32>, Cpu::with(Isa::detect(), 1).unwrap(), saek_activation_losses_f32;
    Cpu<bf16>, Cpu::with(Isa::detect(), 1).unwrap(), saek_activation_losses_bf16;
    Cpu<f16>, Cpu::with(Isa::detect(), 1).unwrap(), saek_activation_losses_f16;
    Reference, Reference, saek_activation_losses_f64;
}

/// A call's arguments, any of which a test may spoil.
struct Args<B: Backend> {
    context: *mut saek_context,
    objective: *const saek_objective,
    n: i64,
    d: i64,
    h: i64,
    activations: *const B::Element,
    lda: i64,
    weight: *const B::Element,
    grad_activations: *mut B::Element,
    grad_weight: *mut B::Real,
    responsibilities: *mut B::Real,
    row_loss: *mut B::Real,
    losses: *mut saek_losses,
}

/// The buffers of a call.
struct Buffers<B: Backend> {
    shape: Shape,
    lda: usize,
    objective: saek_objective,
    activations: Vec<B::Element>,
    weight: Vec<B::Element>,
    grad_activations: Vec<B::Element>,
    grad_weight: Vec<B::Real>,
    responsibilities: Vec<B::Real>,
    row_loss: Vec<B::Real>,
    losses: saek_losses,
}

impl<B: Storage> Buffers<B> {
    fn new([n, d, h]: [usize; 3], gap: usize, objective: saek_objective) -> Self {
        Self {
            shape: Shape { rows: n, inputs: d, latents: h },
            lda: h + gap,
            objective,
            activations: numbers(n + h, n * (h + gap), 2.0),
            weight: numbers(h + d, h * d, 1.0),
            grad_activations: poison(n * h),
            grad_weight: poison(h * d),
            responsibilities: poison(n * h),
            row_loss: poison(n),
            losses: saek_losses { lse: -1.0, var: -2.0, tc: -3.0, wr: -4.0, total: -5.0 },
        }
    }

    fn args(&mut self, context: &Context) -> Args<B> {
        let Shape { rows, inputs, latents } = self.shape;
        Args {
            context: context.0,
            objective: &self.objective,
            n: rows as i64,
            d: inputs as i64,
            h: latents as i64,
            activations: self.activations.as_ptr(),
            lda: self.lda as i64,
            weight: self.weight.as_ptr(),
            grad_activations: self.grad_activations.as_mut_ptr(),
            grad_weight: self.grad_weight.as_mut_ptr(),
            responsibilities: self.responsibilities.as_mut_ptr(),
            row_loss: self.row_loss.as_mut_ptr(),
            losses: &mut self.losses,
        }
    }

    fn outputs(&self) -> [(&'static str, Vec<f64>); 5] {
        [
            ("grad_activations", wide(&self.grad_activations)),
            ("grad_weight", wide(&self.grad_weight)),
            ("responsibilities", wide(&self.responsibilities)),
            ("row_loss", wide(&self.row_loss)),
            ("losses", terms(self.losses)),
        ]
    }

    /// The same by the Rust API, into other buffers.
    fn directly(&self) -> Self {
        let Shape { rows: n, inputs: d, latents: h } = self.shape;
        let mut to = Self::new([n, d, h], 0, self.objective);
        let mut model = ActivationLosses::new(B::make(), self.shape, in_rust(self.objective)).unwrap();
        model
            .step(ActivationStep {
                activations: MatRef::with_stride(&self.activations, n, h, self.lda).unwrap(),
                weight: Some(MatRef::new(&self.weight, h, d).unwrap()),
                grad_activations: Some(MatMut::new(&mut to.grad_activations, n, h).unwrap()),
                grad_weight: Some(MatMut::new(&mut to.grad_weight, h, d).unwrap()),
                responsibilities: Some(MatMut::new(&mut to.responsibilities, n, h).unwrap()),
                row_loss: Some(&mut to.row_loss),
            })
            .unwrap();
        let Losses { lse, var, tc, wr, total } = model.losses().unwrap();
        to.losses = saek_losses { lse, var, tc, wr, total };
        to
    }
}

fn activation_losses<B: Storage>() {
    // One context for all: it serves one shape and objective after the other.
    let context = Context::new();
    for shape in [[2, 3, 2], [9, 20, 40], [70, 17, 33], [7, 0, 3]] {
        for (objective, gap) in [(ALL_TERMS, 0), (ALL_TERMS, 3), (saek_objective { lambda_tc: 0.0, ..ALL_TERMS }, 1)] {
            let mut buffers = Buffers::<B>::new(shape, gap, objective);
            // SAFETY: all buffers are as long as they must be.
            assert_eq!(unsafe { B::call(&buffers.args(&context)) }, SAEK_OK, "{}", last_error());
            for ((name, found), (_, expected)) in buffers.outputs().iter().zip(buffers.directly().outputs()) {
                assert_same_bits(&format!("{} {shape:?}", B::Element::NAME), name, found, &expected);
            }
        }
    }
    // Nothing but losses; a weight alone.
    let mut buffers = Buffers::<B>::new([9, 20, 40], 0, ALL_TERMS);
    let expected = buffers.directly();
    let (nothing, none) = (null_mut(), null_mut());
    let args = Args { responsibilities: none, row_loss: none, grad_weight: none, ..buffers.args(&context) };
    // SAFETY: as above, and NULL is left out.
    assert_eq!(unsafe { B::call(&Args { grad_activations: nothing, ..args }) }, SAEK_OK, "{}", last_error());
    assert_eq!(buffers.losses, expected.losses);
    assert_eq!(wide(&buffers.grad_weight), wide(&poison::<B::Real>(800)));
    buffers.objective = saek_objective { lambda_lse: 0.0, lambda_var: 0.0, lambda_tc: 0.0, ..ALL_TERMS };
    let args = Args { n: 0, activations: null(), ..buffers.args(&context) };
    // SAFETY: as above.
    assert_eq!(unsafe { B::call(&args) }, SAEK_OK, "{}", last_error());
    assert_eq!(buffers.losses.wr, expected.losses.wr);
    assert_same_bits("a weight alone", "grad_weight", &wide(&buffers.grad_weight), &wide(&expected.grad_weight));
}

type Spoil<B> = fn(&mut Args<B>);

#[rustfmt::skip]
fn refusals<B: Storage>() -> Vec<(i32, &'static str, Spoil<B>)> {
    vec![
        (SAEK_ERROR_NULL, "context", |args| args.context = null_mut()),
        (SAEK_ERROR_NULL, "objective", |args| args.objective = null()),
        (SAEK_ERROR_NULL, "activations", |args| args.activations = null()),
        (SAEK_ERROR_NULL, "weight", |args| args.weight = null()),
        (SAEK_ERROR_NULL, "losses", |args| args.losses = null_mut()),
        (SAEK_ERROR_ARGUMENT, "lambda_wr", |args| (args.weight, args.grad_weight) = (null(), null_mut())),
        (SAEK_ERROR_SHAPE, "n = -1", |args| args.n = -1),
        (SAEK_ERROR_SHAPE, "d = -1", |args| args.d = -1),
        (SAEK_ERROR_SHAPE, "h: ", |args| args.h = 0),
        (SAEK_ERROR_SHAPE, "lda: ", |args| args.lda = args.h - 1),
        (SAEK_ERROR_SHAPE, "n*lda", |args| args.lda = i64::MAX),
        (SAEK_ERROR_SHAPE, "n*h", |args| (args.n, args.h, args.lda) = (1 << 33, 1 << 31, 1 << 31)),
        (SAEK_ERROR_SHAPE, "h*d", |args| (args.h, args.d, args.lda) = (1 << 33, 1 << 31, 1 << 33)),
        (SAEK_ERROR_SHAPE, "rows", |args| args.n = 1),
        (SAEK_ERROR_POINTER, "objective", |args| args.objective = args.objective.wrapping_byte_add(1)),
        (SAEK_ERROR_POINTER, "activations", |args| args.activations = args.activations.wrapping_byte_add(1)),
        (SAEK_ERROR_POINTER, "weight", |args| args.weight = args.weight.wrapping_byte_add(1)),
        (SAEK_ERROR_POINTER, "grad_activations", |args| args.grad_activations = args.grad_activations.wrapping_byte_add(1)),
        (SAEK_ERROR_POINTER, "grad_weight", |args| args.grad_weight = args.grad_weight.wrapping_byte_add(2)),
        (SAEK_ERROR_POINTER, "responsibilities", |args| args.responsibilities = args.responsibilities.wrapping_byte_add(2)),
        (SAEK_ERROR_POINTER, "row_loss", |args| args.row_loss = args.row_loss.wrapping_byte_add(2)),
        (SAEK_ERROR_POINTER, "losses", |args| args.losses = args.losses.wrapping_byte_add(1)),
        (SAEK_ERROR_POINTER, "grad_activations overlaps activations", |args| args.grad_activations = args.activations.cast_mut()),
        (SAEK_ERROR_POINTER, "grad_activations overlaps weight", |args| args.grad_activations = args.weight.cast_mut()),
        (SAEK_ERROR_POINTER, "grad_weight overlaps weight", |args| args.grad_weight = args.weight.cast_mut().cast()),
        (SAEK_ERROR_POINTER, "responsibilities overlaps activations", |args| args.responsibilities = args.activations.cast_mut().cast()),
        (SAEK_ERROR_POINTER, "responsibilities overlaps grad_weight", |args| args.responsibilities = args.grad_weight),
        (SAEK_ERROR_POINTER, "row_loss overlaps responsibilities", |args| args.row_loss = args.responsibilities),
        (SAEK_ERROR_POINTER, "losses overlaps objective", |args| args.losses = args.objective.cast_mut().cast()),
    ]
}

fn wrong_arguments_are_refused<B: Storage>() {
    let context = Context::new();
    for (code, text, spoil) in refusals::<B>() {
        let mut buffers = Buffers::<B>::new([8, 6, 4], 4, ALL_TERMS);
        let before = buffers.outputs();
        let mut args = buffers.args(&context);
        spoil(&mut args);
        // SAFETY: what is not to be refused is as `args` made it.
        assert_eq!(unsafe { B::call(&args) }, code, "{} with a wrong {text}: {}", B::Element::NAME, last_error());
        assert!(last_error().contains(text), "{text}: {}", last_error());
        for ((name, after), (_, before)) in buffers.outputs().iter().zip(before) {
            assert_same_bits(text, name, after, &before);
        }
    }
}

macro_rules! for_each_storage {
    ($($module:ident: $backend:ty;)*) => {
        $(mod $module {
            use super::*;
            #[test]
            fn activation_losses() {
                super::activation_losses::<$backend>();
            }
            #[test]
            fn wrong_arguments_are_refused() {
                super::wrong_arguments_are_refused::<$backend>();
            }
        })*
    };
}
for_each_storage! {
    float: Cpu<f32>;
    double: Reference;
    brain: Cpu<bf16>;
    half: Cpu<f16>;
}

type StepCall = unsafe extern "C" fn(
    *mut saek_context,
    *const saek_objective,
    i64,
    i64,
    i64,
    *const u16,
    i64,
    *const u16,
    *const f32,
    *mut u16,
    *mut f32,
    *mut f32,
    *mut f32,
    *mut f32,
    *mut saek_losses,
) -> i32;
type StatisticsCall = unsafe extern "C" fn(
    *mut saek_context,
    i64,
    i64,
    i64,
    *const u16,
    i64,
    *const u16,
    *const f32,
    *const f32,
    *mut f64,
) -> i32;
type BackwardCall = unsafe extern "C" fn(
    *mut saek_context,
    *const saek_objective,
    i64,
    i64,
    i64,
    *const u16,
    i64,
    *const u16,
    *const f32,
    *const f32,
    *const f64,
    i32,
    *mut f32,
    *mut f32,
    *mut f32,
    *mut saek_losses,
) -> i32;

/// Two phases are a step.
fn sixteen_bits<E: CpuElement>(step: StepCall, statistics: StatisticsCall, backward: BackwardCall) {
    let context = Context::new();
    for [n, d, h] in [[2, 1, 1], [9, 20, 40], [70, 17, 33]] {
        let ldx = d + 3;
        let (x, weight): (Vec<E>, Vec<E>) = (numbers(n, n * ldx, 1.0), numbers(h, h * d, 1.0));
        let bias: Vec<f32> = numbers(d, h, 0.5);
        let mut grads = [poison::<f32>(h * d), poison(h), poison(n * d)];
        let mut losses = saek_losses::default();
        let [gw, gb, gx] = &mut grads;
        let (cn, cd, ch, cldx) = (n as i64, d as i64, h as i64, ldx as i64);
        let (px, pw) = (x.as_ptr().cast(), weight.as_ptr().cast());
        // SAFETY: all buffers are as long as they must be; 16-bit numbers are as u16.
        let code = unsafe {
            let (gw, gb, gx) = (gw.as_mut_ptr(), gb.as_mut_ptr(), gx.as_mut_ptr());
            let (a, l) = (null_mut(), null_mut());
            step(context.0, &ALL_TERMS, cn, cd, ch, px, cldx, pw, bias.as_ptr(), a, l, gw, gb, gx, &mut losses)
        };
        assert_eq!(code, SAEK_OK, "{}", last_error());

        let context_text = format!("{} {n}×{d}×{h}", E::NAME);
        let step_losses = terms(losses);
        let mut sums = vec![0.0; saek_statistics_len(ch) as usize];
        let mut phases = [vec![0.0f32; h * d], vec![0.0; h], poison(n * d)];
        let [gw, gb, gx] = &mut phases;
        let shift: Vec<f32> = numbers(7, h, 0.5);
        // SAFETY: as above.
        unsafe {
            let (gw, gb, gx, c) = (gw.as_mut_ptr(), gb.as_mut_ptr(), gx.as_mut_ptr(), shift.as_ptr());
            let (sums, bias) = (sums.as_mut_ptr(), bias.as_ptr());
            assert_eq!(statistics(context.0, cn, cd, ch, px, cldx, pw, bias, c, sums), SAEK_OK, "{}", last_error());
            let code =
                backward(context.0, &ALL_TERMS, cn, cd, ch, px, cldx, pw, bias, c, sums, 1, gw, gb, gx, &mut losses);
            assert_eq!(code, SAEK_OK, "{}", last_error());
            // An odd address.
            let odd = x.as_ptr().wrapping_byte_add(1).cast();
            assert_eq!(statistics(context.0, cn, cd, ch, odd, cldx, pw, bias, c, sums), SAEK_ERROR_POINTER);
            assert!(last_error().contains("multiple of 2"), "{}", last_error());
        }
        // One form of the correlation term stores its product, the other does not.
        let allowed = 8.0 * E::UNIT_ROUNDOFF;
        for (found, step) in phases.iter().zip(&grads) {
            let error = relative(&wide(found), &wide(step));
            assert!(error < allowed, "{context_text}: in phases, a gradient is off by {error:e}");
        }
        assert!(relative(&terms(losses), &step_losses) < 1e-5, "{context_text}: {losses:?}");
    }
}

#[test]
fn phases_with_bf16() {
    sixteen_bits::<bf16>(
        saek_decoder_free_step_bf16,
        saek_decoder_free_statistics_bf16,
        saek_decoder_free_backward_bf16,
    );
}

#[test]
fn phases_with_f16() {
    sixteen_bits::<f16>(saek_decoder_free_step_f16, saek_decoder_free_statistics_f16, saek_decoder_free_backward_f16);
}

/// The forward pass has the bits of a step, whose gradients in `f64` are those of the Rust API.
macro_rules! forward {
    ($($test:ident: $backend:ty, $forward:ident, $step:ident;)*) => {
        $(#[test]
        fn $test() {
            type E = <$backend as Backend>::Element;
            type R = <$backend as Backend>::Real;
            let context = Context::new();
            for [n, d, h] in [[2, 1, 1], [9, 20, 40], [70, 17, 33]] {
                let (ldx, shape) = (d + 3, Shape { rows: n, inputs: d, latents: h });
                let (x, weight): (Vec<E>, Vec<E>) = (numbers(n, n * ldx, 1.0), numbers(h, h * d, 1.0));
                let bias: Vec<R> = numbers(d, h, 0.5);
                let outputs = || (poison::<E>(n * h), poison::<R>(n), saek_losses::default());
                let (mut forward, mut step, mut direct) = (outputs(), outputs(), outputs());
                let gradients = || [poison::<R>(h * d), poison(h), poison(n * d)];
                let (mut by_c, mut by_rust) = (gradients(), gradients());
                let (cn, cd, ch, cldx) = (n as i64, d as i64, h as i64, ldx as i64);
                let (px, pw, pb) = (x.as_ptr().cast(), weight.as_ptr().cast(), bias.as_ptr());
                // SAFETY: all buffers are as long as they must be; 16-bit numbers are as u16.
                unsafe {
                    let (a, l) = (forward.0.as_mut_ptr().cast(), forward.1.as_mut_ptr());
                    let losses = &mut forward.2;
                    let code = $forward(context.0, &ALL_TERMS, cn, cd, ch, px, cldx, pw, pb, a, l, losses);
                    assert_eq!(code, SAEK_OK, "{}", last_error());
                    let none = saek_objective { lambda_tc: f64::NAN, ..ALL_TERMS };
                    let code = $forward(context.0, &none, cn, cd, ch, px, cldx, pw, pb, a, l, losses);
                    assert_eq!(code, SAEK_ERROR_ARGUMENT, "{}", last_error());
                    let code = $forward(context.0, &ALL_TERMS, cn, cd, ch, px, cldx, pw, pb, px.cast_mut(), l, losses);
                    assert_eq!(code, SAEK_ERROR_POINTER, "{}", last_error());
                    let (a, l) = (step.0.as_mut_ptr().cast(), step.1.as_mut_ptr());
                    let [gw, gb, gx] = by_c.each_mut().map(|gradient| gradient.as_mut_ptr());
                    let losses = &mut step.2;
                    let code = $step(context.0, &ALL_TERMS, cn, cd, ch, px, cldx, pw, pb, a, l, gw, gb, gx, losses);
                    assert_eq!(code, SAEK_OK, "{}", last_error());
                }
                let config = DecoderFreeConfig { objective: in_rust(ALL_TERMS), ..DecoderFreeConfig::new(shape) };
                let mut model = DecoderFree::new(<$backend>::make(), config).unwrap();
                let [gw, gb, gx] = &mut by_rust;
                model
                    .step(DecoderFreeStep {
                        x: MatRef::with_stride(&x, n, d, ldx).unwrap(),
                        weight: MatRef::new(&weight, h, d).unwrap(),
                        bias: &bias,
                        grad_weight: MatMut::new(gw, h, d).unwrap(),
                        grad_bias: gb,
                        grad_x: Some(MatMut::new(gx, n, d).unwrap()),
                        activations: Some(MatMut::new(&mut direct.0, n, h).unwrap()),
                        row_loss: Some(&mut direct.1),
                    })
                    .unwrap();
                let Losses { lse, var, tc, wr, total } = model.losses().unwrap();
                direct.2 = saek_losses { lse, var, tc, wr, total };
                let text = format!("{} {shape:?}", E::NAME);
                for found in [&forward, &step] {
                    assert_same_bits(&text, "activations", &wide(&found.0), &wide(&direct.0));
                    assert_same_bits(&text, "row_loss", &wide(&found.1), &wide(&direct.1));
                    assert_eq!(found.2, direct.2, "{text}");
                }
                for (found, expected) in by_c.iter().zip(&by_rust) {
                    assert_same_bits(&text, "a gradient", &wide(found), &wide(expected));
                }
            }
        })*
    };
}
forward! {
    forward_f32: Cpu<f32>, saek_decoder_free_forward_f32, saek_decoder_free_step_f32;
    forward_f64: Reference, saek_decoder_free_forward_f64, saek_decoder_free_step_f64;
    forward_bf16: Cpu<bf16>, saek_decoder_free_forward_bf16, saek_decoder_free_step_bf16;
    forward_f16: Cpu<f16>, saek_decoder_free_forward_f16, saek_decoder_free_step_f16;
}
